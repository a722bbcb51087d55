"""The shard format, the byte rule and the manifest, as all tools of this folder use them.

README.md in this folder describes them. train_gpt.py has its own code for the same format, because
a submission is a single file; tests/test_shards.py holds the two to the same answers. This module
needs only NumPy and SentencePiece, so that a machine that fetches data needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import packages
import sentencepiece as spm

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
BOS = 1  # begins every document
SPACE = "\u2581"  # how SentencePiece writes a space
SPLITS = ("train", "val")
MANIFEST = "manifest.json"  # beside the shards
MOST_SHARDS = (
    1_000_000  # of a split: a number has six digits, and names in order are shards in order
)
SHARD_NAME = re.compile(r"fineweb_(train|val)_(\d{6})\.bin")
SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


class InputError(ValueError):
    """A mistake in what the user gave (options, files, variables): one line, no traceback."""


# ---- 1. Shards ---------------------------------------------------------------------------------


def shard_name(split: str, number: int) -> str:
    """Name of a shard; InputError if the number would need a seventh digit."""
    if number >= MOST_SHARDS:
        raise InputError(f"{split} would take more than {MOST_SHARDS:,} files: make shards larger")
    return f"fineweb_{split}_{number:06}.bin"


def header(tokens: int) -> bytes:
    """The first 1,024 bytes of a shard that holds so many tokens."""
    values = np.zeros(HEADER_INTS, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


def encode_shard(tokens: np.ndarray) -> bytes:
    """A whole shard in memory."""
    return header(len(tokens)) + tokens.astype("<u2").tobytes()


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens of a shard; InputError unless its header and its size fit."""
    values = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(values) < HEADER_INTS or (values[0], values[1]) != (MAGIC, VERSION):
        raise InputError(f"{path} is not a token shard (it begins with {values[:2].tolist()})")
    count, size = int(values[2]), path.stat().st_size
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise InputError(f"{path} has {size} bytes, but its header says {count} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def shards_in(folder: Path) -> list[str]:
    """Names of all files of a folder that a reader could take for shards, in order."""
    return sorted(path.name for path in folder.glob("fineweb_*.bin"))


def refuse_strays(folder: Path, expected: Iterable[str]) -> None:
    """InputError names a file with which a reader would get more than the `expected` shards.

    That is a file with another kind of name, such as a browser's "fineweb_val_000000 (1).bin", any
    further validation shard, and a train shard whose number is not the next one.
    """
    expected = set(expected)
    found = set(shards_in(folder))
    for name in sorted(found - expected):
        if not SHARD_NAME.fullmatch(name):
            raise InputError(
                f"{folder / name} is not named like a shard (fineweb_val_NNNNNN.bin), and its "
                "tokens could be read a second time: remove it or rename it"
            )
        if name.startswith("fineweb_val_"):
            raise InputError(
                f"{folder / name} is no shard of this validation split, and scores would count "
                "its text: remove it"
            )
    train = sorted(name for name in found | expected if name.startswith("fineweb_train_"))
    for number, name in enumerate(train):
        if name != shard_name("train", number):
            raise InputError(
                f"{folder / name} is there, {shard_name('train', number)} is not: remove the "
                "first, or fetch all shards before it"
            )


# ---- 2. The byte rule --------------------------------------------------------------------------


class ByteTable(NamedTuple):
    """UTF-8 bytes of text that each piece of a tokenizer stands for; arrays of an entry a piece."""

    size: np.ndarray  # int64, without a leading space
    space: np.ndarray  # bool, the piece begins with a space
    boundary: np.ndarray  # bool, a space right after this piece is the tokenizer's, not the text's

    @classmethod
    def of(cls, sp: spm.SentencePieceProcessor) -> ByteTable:
        """A byte piece is a byte; control, unknown and unused pieces are none (see README.md)."""
        ids = range(len(sp))
        silent = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
        size = np.zeros(len(ids), np.int64)
        space = np.zeros(len(ids), bool)
        for i in ids:
            if sp.is_byte(i):
                size[i] = 1
            elif not silent[i]:
                piece = sp.id_to_piece(i)
                space[i] = piece.startswith(SPACE)
                size[i] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        adds_space = sp.decode_pieces([SPACE]) == ""
        return cls(size, space, silent & adds_space)

    def of_tokens(self, previous: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each token, int64, given the token before it (arrays of the same shape)."""
        spaces = self.space[tokens] & ~self.boundary[previous]
        return self.size[tokens] + spaces

    def of_stream(self, tokens: np.ndarray, before: int = BOS) -> np.ndarray:
        """Bytes of each token of a stream that follows the token `before`."""
        return self.of_tokens(np.concatenate(([before], tokens[:-1])), tokens)


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """A SentencePiece model; InputError if the file is none."""
    sp = spm.SentencePieceProcessor()
    try:
        sp.load(str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is not a SentencePiece model: {error}") from None
    return sp


# ---- 3. Manifests ------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_entry(model: Path, folder: Path, vocab_size: int) -> dict[str, Any]:
    """What a manifest in `folder` says of the tokenizer that its shards were made with."""
    return dict(
        file=os.path.relpath(model, folder).replace(os.sep, "/"),
        sha256=sha256(model),
        vocab_size=vocab_size,
    )


def split_entry(files: dict[str, dict[str, Any]], **counts: int) -> dict[str, Any]:
    """What a manifest says of a split, given `tokens` and `sha256` of its shards by name."""
    tokens = sum(file["tokens"] for file in files.values())
    return {"tokens": tokens, **counts, "files": files}


def write_manifest(
    folder: Path, tokenizer: dict[str, Any], splits: dict[str, Any], **more: Any
) -> None:
    """Writes manifest.json as README.md describes it.

    It holds nothing of the machine and no time, so that equal shards have equal manifests.
    """
    manifest = dict(tokenizer=tokenizer, **more, splits=splits)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def check_split(name: str, tokens: int, size: int) -> None:
    """InputError unless a split has text to score, and tokens for the shortest sequence."""
    if not size:
        raise InputError(
            f"{name} has {tokens:,} tokens and not one byte of text, so bits per byte are "
            "undefined: give documents that the tokenizer leaves something of"
        )
    if tokens < 3:
        raise InputError(f"{name} has only {tokens} tokens, training takes at least 3: give more")


def write_atomically(path: Path, data: bytes) -> None:
    """The file has its old content or all of the new one, whenever somebody looks at it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- 4. What tools say -------------------------------------------------------------------------


class Skipped:
    """What a tool left out: how many for each reason, and the first one."""

    def __init__(self, unit: str) -> None:
        self.unit = unit  # what is counted: "documents"
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    def update(self, other: Skipped) -> None:
        """Adds what came after all that is here."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}

    def lines(self) -> Iterator[str]:
        """A line for each reason."""
        for reason, count in sorted(self.counts.items()):
            yield f"skipped {count:,} {self.unit}: {reason}, the first is {self.first[reason]}"

    def __str__(self) -> str:
        return "; ".join(self.lines()) or "none was skipped"


def say(text: str) -> None:
    """Prints for people. If stdout is closed or full, work goes on unheard: the files count."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a file name that is not UTF-8, or a terminal that takes ASCII only
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Says in one line why a tool ends; if stderr cannot take it, the exit code has to do."""
    with contextlib.suppress(OSError):
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)


def watched() -> bool:
    """Whether somebody looks at stderr, for progress bars."""
    return sys.stderr is not None and sys.stderr.isatty()


def attempt(tool: str, work: Callable[[], None]) -> int:
    """Exit code of a tool's work: 0; 2 and a line on what the user can mend; 130 after Ctrl-C."""
    try:
        work()
    except (InputError, OSError) as error:
        complain(f"{tool}: {error}")
        return 2
    except KeyboardInterrupt:
        complain(f"{tool}: interrupted; run it again")
        return INTERRUPTED
    return 0


class Corpus(NamedTuple):
    """What a training command has to name."""

    folder: Path
    model: Path
    vocab_size: int
    shortest: int  # tokens of the shorter split

    def variables(self) -> str:
        """DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE as a shell takes them."""
        folder, model = shlex.quote(str(self.folder)), shlex.quote(str(self.model))
        return f"DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE={self.vocab_size}"

    def tiny_command(self) -> str:
        """A command that trains on any machine, with sequences that the splits can fill."""
        length = 256  # TRAIN_SEQ_LEN of the scale; a split also needs the token after a sequence
        while length >= self.shortest:
            length //= 2
        shorter = f" TRAIN_SEQ_LEN={length}" if length < 256 else ""
        return f"PRESET=tiny {self.variables()}{shorter} {packages.python()} {script_path()}"


def torchrun(ranks: int) -> str:
    """The words before a script that start it on so many GPUs of one machine."""
    return f"{packages.python()} -m torch.distributed.run --standalone --nproc_per_node={ranks}"


def script_path() -> str:
    """train_gpt.py as a shell in the current folder finds it."""
    return shlex.quote(os.path.relpath(SCRIPT))
