"""Turns text into token shards: trains or takes a tokenizer, refuses one that lies, encodes.

    python data/make_shards.py books/ web.jsonl.gz --out data/datasets/mine --vocab-size 8192
    python data/make_shards.py wiki.parquet --out data/datasets/wiki --tokenizer given.model

Reads .jsonl, .jsonl.gz and .parquet (a document is the field "text"), .txt and .py (a document is a
file, or with --blank-lines what blank lines separate) and folders of those. Writes a new folder
with fineweb_train_*.bin, fineweb_val_*.bin, tokenizer.model and manifest.json; it appears when it
is complete. The same input, options and seed give the same bytes with any number of workers, and
memory does not grow with the input: what a run keeps is a few blocks of text for each worker, and
the tokenizer's sample. Whatever is left out is counted by reason, and the first is named.

Exit codes: 0; 2 with one line for what the user can mend; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for whoever imports this by its path
import packages

try:
    import numpy as np
    import sample
    import shards
    from shards import InputError, Skipped, say
    from tqdm import tqdm

    MISSING = ""
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    MISSING = str(error.name)  # which is told once --help has had its chance

BLOCK = 1 << 20  # bytes of text that a worker gets at a time
MODEL = "tokenizer.model"
REQUIREMENTS = packages.HERE / "requirements.txt"


class Options(NamedTuple):
    """The command line."""

    inputs: list[Path]
    out: Path
    tokenizer: Path | None
    vocab_size: int
    sample_bytes: int
    seed: int
    val_share: float
    shard_tokens: int
    key: str
    blank_lines: bool
    workers: int


# ---- 1. Files ----------------------------------------------------------------------------------

JSON, PARQUET, TEXT = (".jsonl", ".jsonl.gz"), (".parquet",), (".txt", ".py")
SUFFIXES = (*JSON, *PARQUET, *TEXT)
READ_ALREADY = "read already, by another way"
# How Arrow writes the types of columns that hold text.
TEXT_COLUMN = re.compile(r"(large_)?string(_view)?|dictionary<values=(large_)?string, .*>")


def of_kind(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether the name ends so; capitals are as good as small letters."""
    return path.name.lower().endswith(suffixes)


def refuse_folder(error: OSError) -> None:
    """A folder that cannot be listed would be left out without a word."""
    raise InputError(f"cannot read the folder {error.filename}: {error.strerror}")


def below(folder: Path, seen: set[str], skipped: Skipped) -> Iterator[Path]:
    """All files below a folder. Links are followed, but no folder is entered a second time."""
    seen.add(os.path.realpath(folder))
    for place, names, files in os.walk(folder, onerror=refuse_folder, followlinks=True):
        entered = []
        for name in sorted(names):
            real = os.path.realpath(os.path.join(place, name))
            if real in seen:
                skipped.add(READ_ALREADY, os.path.join(place, name))
            else:
                seen.add(real)
                entered.append(name)
        names[:] = entered  # what os.walk goes on with
        for name in files:
            yield Path(place, name)


def takes(path: Path, seen: set[str], skipped: Skipped) -> bool:
    """Whether a file is one to read; if it is not, it is among the skipped."""
    real = os.path.realpath(path)
    if not path.exists():
        skipped.add("a link that leads nowhere", str(path))
    elif not path.is_file():
        skipped.add("no regular file", str(path))
    elif not of_kind(path, SUFFIXES):
        skipped.add(f"none of {', '.join(SUFFIXES)}", str(path))
    elif real in seen:
        skipped.add(READ_ALREADY, str(path))
    else:
        seen.add(real)
        return True
    return False


def find(inputs: Iterable[Path], skipped: Skipped) -> list[Path]:
    """The files to read, in order; InputError for an input that is not there or holds none."""
    paths: list[Path] = []
    seen: set[str] = set()  # real paths of what is read, folders too
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path} is not there: give {', '.join(SUFFIXES)}, or folders of them")
        if path.is_dir() and os.path.realpath(path) in seen:
            skipped.add(READ_ALREADY, str(path))
            continue
        before = skipped.counts[READ_ALREADY]
        files = sorted(below(path, seen, skipped)) if path.is_dir() else [path]
        found = [file for file in files if takes(file, seen, skipped)]
        paths += found
        if not found and skipped.counts[READ_ALREADY] == before:
            raise InputError(
                f"{path} holds no {', '.join(SUFFIXES)} ({skipped}); .txt is for any plain text"
            )
    return paths


# ---- 2. Documents ------------------------------------------------------------------------------


class Block(NamedTuple):
    """Neighbouring documents: JSON lines as they were read (workers parse them), or texts."""

    items: Sequence[bytes | str]
    path: str
    first: int  # number of the first item, for messages
    unit: str  # what is numbered; "" if a file is one document

    def place(self, i: int) -> str:
        """Where item i comes from."""
        return f"{self.path}, {self.unit} {self.first + i}" if self.unit else self.path


def lines(path: Path) -> Iterator[Block]:
    """Blocks of JSON lines."""
    first = 1
    with gzip.open(path) if of_kind(path, (".gz",)) else open(path, "rb") as file:
        while items := file.readlines(BLOCK):
            yield Block(items, str(path), first, "line")
            first += len(items)


def rows(path: Path, key: str) -> Iterator[str]:
    """The texts of a Parquet column; InputError if it is none or cannot be read. See `writable`."""
    try:
        import pyarrow as pa  # 0.3 s and 60 MB, for those who read Parquet
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: {packages.advice(str(error.name), REQUIREMENTS)}") from error
    try:
        with pq.ParquetFile(path) as file:
            kinds = {column.name: str(column.type) for column in file.schema_arrow}
            if not TEXT_COLUMN.fullmatch(kinds.get(key, "")):
                there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
                raise InputError(
                    f"{path}: {key!r} is no column of text, there are {there}: give --key"
                )
            # Without threads: the workers are forked from this process.
            for batch in file.iter_batches(batch_size=256, columns=[key], use_threads=False):
                for raw in batch.column(0).cast(pa.string()).cast(pa.binary()).to_pylist():
                    yield (raw or b"").decode(errors="surrogateescape")
    except pa.ArrowException as error:
        raise InputError(f"cannot read {path}: {error}") from error


def texts(path: Path, blank_lines: bool) -> Iterator[str]:
    """The documents of a text file. What is not UTF-8 becomes surrogates, see `writable`."""
    if not blank_lines:
        yield path.read_bytes().decode(errors="surrogateescape")
        return
    with open(path, "rb") as file:
        for blank, group in itertools.groupby(file, key=lambda line: not line.strip()):
            if not blank:
                yield b"".join(group).decode(errors="surrogateescape")


def in_blocks(path: Path, stream: Iterable[str], unit: str) -> Iterator[Block]:
    """The texts of a file, in blocks of about a megabyte."""
    items: list[str] = []
    size, first = 0, 1
    for text in stream:
        items.append(text)
        size += len(text)
        if size >= BLOCK:
            yield Block(items, str(path), first, unit)
            first += len(items)
            items, size = [], 0
    yield Block(items, str(path), first, unit)


def blocks(paths: Iterable[Path], options: Options) -> Iterator[Block]:
    """All documents, in blocks that depend on nothing but the input."""
    for path in paths:
        try:
            if of_kind(path, JSON):
                yield from lines(path)
            elif of_kind(path, PARQUET):
                yield from in_blocks(path, rows(path, options.key), "row")
            else:
                unit = "document" if options.blank_lines else ""
                yield from in_blocks(path, texts(path, options.blank_lines), unit)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"cannot read {path}: {error}") from error


def parse(line: bytes, key: str, place: str) -> str:
    """The text of a JSON line, "" for a blank line; InputError names one that is no document."""
    if not line.strip():
        return ""
    try:
        text = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{place} is no JSON with {key!r}: {error}") from None
    if not isinstance(text, str | None):
        raise InputError(f"{place}: {key!r} is {text!r:.40}, not text")
    return text or ""


def documents(block: Block, key: str, skipped: Skipped) -> Iterator[str]:
    """The texts of a block that can be written; the others are among the skipped."""
    for i, item in enumerate(block.items):
        text = item if isinstance(item, str) else parse(item, key, block.place(i))
        if not text:
            skipped.add("empty", block.place(i))
        elif not writable(text):
            skipped.add("not UTF-8", block.place(i))
        else:
            yield text


def writable(text: str) -> bool:
    """Whether it has a UTF-8 form: JSON can spell half a surrogate pair, files hold any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- 3. Splits ---------------------------------------------------------------------------------

RULE = (
    "val if the first 8 bytes of the SHA-256 of the text, NFKC-normalised and without ASCII white "
    "space, are below val_share * 2^64 (big-endian)"
)


def split_of(text: str, val_share: float) -> str:
    """Where a document belongs: its text alone decides, so copies stay together.

    That does not depend on the tokenizer, and texts that a tokenizer could fold into one (white
    space, NFKC) count as copies.
    """
    core = unicodedata.normalize("NFKC", text).encode().translate(None, b" \t\n\r\v\f")
    place = int.from_bytes(hashlib.sha256(core).digest()[:8])
    return "val" if place < val_share * 2**64 else "train"


def draw(everything: Iterable[str], size: int, seed: int, val_share: float) -> list[str]:
    """Train documents of at most `size` bytes together, drawn without regard to their order.

    They are those of lowest keyed hash, so the draw is one pass that holds no more than it returns.
    """
    heap: list[tuple[int, str]] = []  # highest hash first
    total = 0
    for text in everything:
        if split_of(text, val_share) == "train":
            raw = text.encode()
            digest = hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()).digest()
            heapq.heappush(heap, (-int.from_bytes(digest), text))
            total += len(raw)
            while total > size:
                total -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


# ---- 4. Tokenizers -----------------------------------------------------------------------------


class Encoder:
    """A tokenizer, and the bytes that each of its pieces stands for."""

    def __init__(self, path: Path) -> None:
        self.sp = shards.load_tokenizer(path)
        self.table = shards.ByteTable.of(self.sp)
        scored = self.table.size + self.table.space > 0
        self.pieces = [self.spelled(i) if scored[i] else b"" for i in range(len(self.sp))]
        self.adds_space = self.sp.decode_pieces([shards.SPACE]) == ""

    def spelled(self, i: int) -> bytes:
        """The bytes of piece i, from its name."""
        piece = self.sp.id_to_piece(i)
        if self.sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0xNN>
        return piece.replace(shards.SPACE, " ").encode()

    def encode(self, texts: list[str], where: str) -> tuple[np.ndarray, Tally]:
        """uint16 tokens of the texts, each behind a BOS; InputError if pieces miscount bytes."""
        tally = Tally(documents=len(texts))
        stream: list[list[int]] = []
        starts: list[int] = []
        sizes: list[int] = []
        for text, ids in zip(texts, self.sp.encode(texts, num_threads=1), strict=True):
            raw = text.encode()
            spelled = b"".join([self.pieces[i] for i in ids])
            if self.adds_space:
                spelled = spelled.removeprefix(b" ")
            if spelled != raw:  # the tokenizer folds; what it makes of the text is scored
                spelled = self.sp.decode(ids).encode()
                tally.changed_documents += 1
                tally.changed_bytes += lost(raw, spelled)
            starts.append(tally.tokens)
            sizes.append(len(spelled))
            stream += [[shards.BOS], ids]
            tally.tokens += 1 + len(ids)
            tally.text_bytes += len(raw)
        tokens = np.fromiter(itertools.chain.from_iterable(stream), np.uint16, tally.tokens)
        counted = np.add.reduceat(self.table.of_stream(tokens), starts)
        for i in np.flatnonzero(counted != sizes)[:1]:
            raise InputError(
                f"{where}: the pieces of {texts[i]!r:.60} count {counted[i]} bytes, decode to "
                f"{sizes[i]}: val_bpb would lie with this tokenizer"
            )
        tally.bytes = sum(sizes)
        return tokens, tally


def lost(before: bytes, after: bytes) -> int:
    """How many bytes of a text are no longer in it, whatever their place."""
    counts = [np.bincount(np.frombuffer(text, np.uint8), minlength=256) for text in (before, after)]
    return int(np.maximum(counts[0] - counts[1], 0).sum())


def refuse_liars(path: Path) -> None:
    """InputError names the piece with which, or without which, a tokenizer makes val_bpb lie."""
    encoder = Encoder(path)
    sp = encoder.sp
    if len(sp) > 65536 or sp.bos_id() != shards.BOS:
        raise InputError(
            f"{path} has {len(sp)} pieces, BOS is {sp.bos_id()}: shards take at most 65536 pieces "
            f"and BOS {shards.BOS}"
        )
    for piece in [f"<0x{i:02X}>" for i in range(256)]:
        if not sp.is_byte(sp.piece_to_id(piece)):
            raise InputError(
                f"{path} has no byte piece {piece}: characters that it does not know would count "
                "nothing; train it with byte fallback"
            )
    space = sp.piece_to_id(shards.SPACE)
    if sp.is_unknown(space) or sp.is_control(space) or sp.is_unused(space):
        raise InputError(
            f"{path} has no piece {shards.SPACE!r}, a space alone: train it on text with spaces"
        )
    refuse_false_pieces(encoder, path)
    for text in ("a b", "a", "\u00e9\u65e5\U0001f600"):
        back = sp.decode(sp.encode(text))
        if back != text:
            raise InputError(f"{path} makes {back!r} of {text!r}")


def refuse_false_pieces(encoder: Encoder, path: Path) -> None:
    """InputError names a piece that decodes to other bytes than it counts."""
    sp, table = encoder.sp, encoder.table
    anchor = sp.piece_to_id("<0x41>")  # A: the first piece of a text may lose its space
    for i, spelled in enumerate(encoder.pieces):
        if not spelled or (sp.is_byte(i) and spelled > b"\x7f"):  # no text, or part of a character
            continue
        decoded = sp.decode([anchor, i]).removeprefix("A").encode()
        claimed = int(table.size[i] + table.space[i])
        if decoded != spelled or claimed != len(decoded):
            raise InputError(
                f"{path}: piece {i} {sp.id_to_piece(i)!r} counts {claimed} bytes and decodes "
                f"to {len(decoded)}, {decoded!r}: val_bpb would lie"
            )


# ---- 5. Encoding -------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over documents."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # UTF-8, of the text that the tokens decode to: what val_bpb divides by
    text_bytes: int = 0  # UTF-8, of the text that was read
    changed_documents: int = 0  # those that decode to something else than was read
    changed_bytes: int = 0  # bytes of theirs that are gone or became others

    def add(self, other: Tally) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Job(NamedTuple):
    """What the workers do with every block."""

    model: Path
    key: str
    val_share: float


@dataclass
class Part:
    """A block, encoded."""

    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=lambda: Skipped("documents"))


encoder_of = functools.cache(Encoder)  # once in a worker


def follow_parent() -> None:
    """In a worker: leaves Ctrl-C to the main process, and ends when that is gone for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_after_parent, daemon=True).start()


def end_after_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this process is a worker"
    parent.join()
    os._exit(1)


def encode_block(job: Job, block: Block) -> Part:
    """The documents of a block, split and encoded."""
    part = Part()
    split_texts: dict[str, list[str]] = {split: [] for split in shards.SPLITS}
    for text in documents(block, job.key, part.skipped):
        split_texts[split_of(text, job.val_share)].append(text)
    for split, its in split_texts.items():
        if its:
            part.tokens[split], part.tallies[split] = encoder_of(job.model).encode(its, block.path)
    return part


class Pending(Protocol):
    """A result that is to come."""

    def result(self) -> Any: ...


def in_order(submit: Callable[[Any], Pending], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Results of all items, in order; no more than `ahead` are under way or wait to be taken."""
    waiting: deque[Pending] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class ShardWriter:
    """Cuts one stream of tokens into files of `size` tokens, the last one shorter."""

    def __init__(self, folder: Path, split: str, size: int) -> None:
        self.folder, self.split, self.size = folder, split, size
        self.paths: list[Path] = []
        self.count = 0  # tokens in the last file, 0 once it has ended

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if not self.count:
                name = shards.shard_name(self.split, len(self.paths))
                self.paths.append(self.folder / name)
                self.paths[-1].write_bytes(shards.header(0))  # until the count is known
            piece = tokens[: self.size - self.count]
            with open(self.paths[-1], "ab") as file:
                file.write(piece.astype("<u2").tobytes())
            self.count += len(piece)
            tokens = tokens[len(piece) :]
            if self.count == self.size:
                self.close()

    def close(self) -> None:
        """Ends the last file, if it is not ended yet."""
        if self.count:
            with open(self.paths[-1], "r+b") as file:
                file.write(shards.header(self.count))
                file.flush()
                os.fsync(file.fileno())
            self.count = 0


# ---- 6. The run --------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a pass over the input wrote."""

    tallies: dict[str, Tally]
    skipped: Skipped  # documents
    paths: dict[str, list[Path]]
    seconds: float

    def check(self, options: Options) -> None:
        """InputError unless both splits have documents, and text in them."""
        found = sum(tally.documents for tally in self.tallies.values())
        for split, tally in self.tallies.items():
            if not tally.documents:
                raise InputError(
                    f"no {split} documents among {found} ({self.skipped}): give more text, or "
                    f"another --val-share than {options.val_share}"
                )
            shards.check_split(split, tally.tokens, tally.bytes)


def encode_all(options: Options, everything: Iterable[Block], folder: Path) -> Result:
    """Encodes all blocks on all workers and writes them as shards."""
    start = time.perf_counter()
    job = functools.partial(encode_block, Job(folder / MODEL, options.key, options.val_share))
    writers = {split: ShardWriter(folder, split, options.shard_tokens) for split in shards.SPLITS}
    tallies = {split: Tally() for split in shards.SPLITS}
    skipped = Skipped("documents")
    fork = get_context("fork")  # what was imported here need not be imported again
    with (
        ProcessPoolExecutor(options.workers, fork, follow_parent) as pool,
        tqdm(unit="B", unit_scale=True, desc="encode", disable=not shards.watched()) as bar,
    ):
        submit = functools.partial(pool.submit, job)
        for part in in_order(submit, everything, 3 * options.workers):
            for split, tokens in part.tokens.items():
                writers[split].add(tokens)
                tallies[split].add(part.tallies[split])
                bar.update(part.tallies[split].text_bytes)
            skipped.update(part.skipped)
    for writer in writers.values():
        writer.close()
    paths = {split: writer.paths for split, writer in writers.items()}
    return Result(tallies, skipped, paths, time.perf_counter() - start)


def train(options: Options, everything: Iterable[Block], target: Path) -> dict[str, Any]:
    """Trains a tokenizer by sample.py's recipe on train documents; the manifest's entry on that."""
    skipped = Skipped("documents")
    stream = (text for block in everything for text in documents(block, options.key, skipped))
    drawn = draw(stream, options.sample_bytes, options.seed, options.val_share)
    size = sum(len(text.encode()) for text in drawn)
    if not drawn:
        raise InputError(f"no train documents to learn a tokenizer from ({skipped})")
    say(f"learns  {options.vocab_size:,} pieces from {len(drawn):,} documents, {size:,} bytes")
    try:
        target.write_bytes(sample.train_tokenizer(drawn, options.vocab_size))
    except RuntimeError as error:
        raise InputError(
            f"cannot learn {options.vocab_size} pieces from {len(drawn)} documents, {size:,} "
            f"bytes: {error}; give another --vocab-size or more text"
        ) from None
    return dict(seed=options.seed, sample_documents=len(drawn), sample_bytes=size)


def describe_splits(result: Result) -> dict[str, dict[str, Any]]:
    """The manifest's entries of both splits."""
    entries = {}
    for split, tally in result.tallies.items():
        files = {
            path.name: dict(tokens=len(shards.open_shard(path)), sha256=shards.sha256(path))
            for path in result.paths[split]
        }
        entries[split] = shards.split_entry(files, **asdict(tally))
    return entries


def describe(
    options: Options,
    folder: Path,
    training: dict[str, Any] | None,
    left_out: Skipped,
    result: Result,
) -> None:
    """Writes the manifest."""
    size = len(shards.load_tokenizer(folder / MODEL))
    shards.write_manifest(
        folder,
        shards.tokenizer_entry(folder / MODEL, folder, size) | dict(trained=training),
        describe_splits(result),
        split_rule=RULE,
        val_share=options.val_share,
        shard_size=options.shard_tokens,
        skipped=dict(sorted(result.skipped.counts.items())),
        skipped_files=dict(sorted(left_out.counts.items())),
    )


def report(result: Result) -> None:
    """Says what was written and what was left out."""
    for split, t in result.tallies.items():
        say(
            f"{split:7} {t.documents:,} documents, {t.tokens:,} tokens, "
            f"{len(result.paths[split])} shards, {t.bytes:,} bytes (text and pieces), "
            f"{t.bytes / t.tokens:.3f} bytes/token"
        )
        if t.changed_documents:
            say(
                f"CHANGED {t.changed_documents:,} of these documents by the tokenizer: "
                f"{t.changed_bytes:,} of {t.text_bytes:,} bytes are gone or others; scores are "
                "those of the changed text"
            )
    for line in result.skipped.lines():
        say(line)
    size = sum(t.text_bytes for t in result.tallies.values())
    say(f"encoded {size:,} bytes in {result.seconds:.1f} s, {size / result.seconds / 1e6:.1f} MB/s")


def fill(options: Options, folder: Path, paths: list[Path], left_out: Skipped) -> Result:
    """Makes tokenizer, shards and manifest in an empty folder."""
    training = None
    if options.tokenizer:
        shutil.copyfile(options.tokenizer, folder / MODEL)
    else:
        training = train(options, blocks(paths, options), folder / MODEL)
    refuse_liars(folder / MODEL)
    result = encode_all(options, blocks(paths, options), folder)
    result.check(options)
    describe(options, folder, training, left_out, result)
    return result


@contextlib.contextmanager
def alone(out: Path) -> Iterator[Path]:
    """The folder in which `out` is made: two runs would remove each other's files in it."""
    partial, path = (out.with_name(f".{out.name}.{what}") for what in ("partial", "lock"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        refused = InputError(f"another make_shards.py is making --out {out}: wait for it")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refused from None
        if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            raise refused  # it has just ended and removed this lock
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            path.unlink(missing_ok=True)


def build(options: Options) -> None:
    """Makes the folder beside its destination and renames it when it is complete."""
    out, left_out = options.out, Skipped("files or folders")
    if out.exists():
        raise InputError(f"--out {out} exists: give another, or remove it")
    paths = find(options.inputs, left_out)
    for line in left_out.lines():
        say(line)
    try:
        with alone(out) as partial:
            partial.mkdir()
            result = fill(options, partial, paths, left_out)
            os.rename(partial, out)
    except OSError as error:
        raise InputError(f"cannot make {out}: {error}") from error
    except BrokenProcessPool as error:
        raise InputError(
            f"cannot make {out}: a worker was killed, as a rule for memory: give fewer --workers"
        ) from error
    report(result)
    size = len(shards.load_tokenizer(out / MODEL))
    shortest = min(tally.tokens for tally in result.tallies.values())
    corpus = shards.Corpus(out, out / MODEL, size, shortest)
    say(f"next    {corpus.tiny_command()}")
    if shortest > 1024:  # TRAIN_SEQ_LEN without a scale
        say(f"        on 8 GPUs: {corpus.variables()} {shards.torchrun(8)} {shards.script_path()}")


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command_line() -> argparse.ArgumentParser:
    """The options; `Options` has their types."""
    parser = argparse.ArgumentParser(description="Turn text into token shards for train_gpt.py.")
    option = parser.add_argument
    option(
        "inputs",
        type=Path,
        nargs="+",
        help=f"Files to read ({', '.join(SUFFIXES)}), or folders that are searched for them.",
    )
    option("--out", type=Path, required=True, help="Folder to make; it must not exist.")
    option("--tokenizer", type=Path, help="SentencePiece model to use; without it one is trained.")
    number = "Number of pieces of a trained tokenizer (default: %(default)s)."
    option("--vocab-size", type=int, default=1024, help=number)
    most = "Most bytes of text that a tokenizer is trained on (default: %(default)s)."
    option("--sample-bytes", type=int, default=50_000_000, help=most)
    seed = "Seed of the choice of that text (default: %(default)s)."
    option("--seed", type=int, default=1337, help=seed)
    share = "Share of the documents that is held out for validation (default: %(default)s)."
    option("--val-share", type=float, default=0.01, help=share)
    size = "Most tokens in a shard, of 2 bytes each (default: %(default)s)."
    option("--shard-tokens", type=int, default=100_000_000, help=size)
    key = "JSON field or Parquet column that holds the text (default: %(default)s)."
    option("--key", default="text", help=key)
    blank = "Take what blank lines separate in a text file as documents."
    option("--blank-lines", action="store_true", help=blank)
    workers = "Number of processes that encode (default: all cores, %(default)s)."
    option("--workers", type=int, default=cores(), help=workers)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = command_line()
    options = Options(**vars(parser.parse_args(argv)))
    if not 260 < options.vocab_size <= 65536:
        parser.error(
            "--vocab-size is above 260 (4 special, 256 byte pieces), at most 65536 (uint16 tokens)"
        )
    if not 0 < options.val_share < 1:
        parser.error("--val-share is between 0 and 1")
    if min(options.workers, options.sample_bytes) < 1:
        parser.error("--workers and --sample-bytes are at least 1")
    if not 1 <= options.shard_tokens < 2**31:
        parser.error("--shard-tokens is at least 1 and below 2^31, what a shard's header can say")
    if not -(2**63) <= options.seed < 2**64:
        parser.error("--seed has at most 64 bits")
    if MISSING:
        return packages.complain("make_shards.py", MISSING, REQUIREMENTS)
    return shards.attempt("make_shards.py", lambda: build(options))


if __name__ == "__main__":
    sys.exit(main())
