"""Turns text into token shards: trains a tokenizer or takes one, refuses one that lies, encodes on all cores.

    python data/make_shards.py books/ web.jsonl.gz --out data/datasets/mine_sp8192 --vocab-size 8192
    python data/make_shards.py wiki.parquet --out data/datasets/wiki_sp1024 --tokenizer fineweb_1024_bpe.model

Reads .jsonl, .jsonl.gz and .parquet (a document is the field "text"), .txt and .py (a document is a file, or
with --blank-lines what blank lines separate) and folders of those. Writes a new folder with
fineweb_train_*.bin, fineweb_val_*.bin, tokenizer.model and manifest.json; it appears when it is complete. The
same input, options and seed give the same bytes with any number of workers, and memory does not grow with the
input: what a run keeps is a few blocks of text for each worker, and the tokenizer's sample.

Exit codes: 0; 2 with one line for what the user can mend.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import os
import shutil
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import sample

import train_gpt as tg

BLOCK = 1 << 20  # bytes of text that a worker gets at a time
MODEL = "tokenizer.model"
SPLITS = ("train", "val")

# ---- 1. Documents ----------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".py")


class Block(NamedTuple):
    """Neighbouring documents: JSON lines as they were read (parsing is the workers' job), or texts."""

    items: list[bytes] | list[str]
    path: str
    line: int  # number of the first item, for messages


def find(inputs: Iterable[Path]) -> list[Path]:
    """The files to read, in order; InputError for what is not there or cannot be read."""
    paths: list[Path] = []
    for path in inputs:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        paths += [p for p in found if p.is_file() and p.name.endswith(SUFFIXES)]
        if not path.exists() or not any(p.name.endswith(SUFFIXES) for p in found):
            kinds = ", ".join(SUFFIXES)
            raise tg.InputError(
                f"{path} {'holds no' if path.exists() else 'is not there: give a'} {kinds}"
            )
    return paths


def lines(path: Path) -> Iterator[Block]:
    """Blocks of JSON lines."""
    first = 1
    with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
        while items := file.readlines(BLOCK):
            yield Block(items, str(path), first)
            first += len(items)


def columns(path: Path, key: str) -> Iterator[str]:
    """The values of a Parquet column."""
    import pyarrow.parquet as pq  # 0.3 s and 60 MB, for those who read Parquet

    with pq.ParquetFile(path) as file:
        kinds = {column.name: str(column.type) for column in file.schema_arrow}
        if "string" not in kinds.get(key, ""):
            raise ValueError(f"{key!r} is no column of text, there are {kinds}: give --key")
        # Without threads: the workers are forked from this process.
        for batch in file.iter_batches(batch_size=256, columns=[key], use_threads=False):
            yield from (text or "" for text in batch.column(0).to_pylist())


def texts(path: Path, blank_lines: bool) -> Iterator[str]:
    """The documents of a text file; what is not UTF-8 in it becomes surrogates, see `writable`."""
    if not blank_lines:
        yield path.read_bytes().decode(errors="surrogateescape")
        return
    with open(path, "rb") as file:
        for blank, group in itertools.groupby(file, key=lambda line: not line.strip()):
            if not blank:
                yield b"".join(group).decode(errors="surrogateescape")


def blocks(paths: Iterable[Path], key: str, blank_lines: bool) -> Iterator[Block]:
    """All documents, in blocks that depend on nothing but the input."""
    for path in paths:
        try:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from lines(path)
                continue
            items, size, first = [], 0, 1
            for text in (
                columns(path, key) if path.suffix == ".parquet" else texts(path, blank_lines)
            ):
                items.append(text)
                size += len(text)
                if size >= BLOCK:
                    yield Block(items, str(path), first)
                    items, size, first = [], 0, first + len(items)
            yield Block(items, str(path), first)
        except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are among them
            raise tg.InputError(f"cannot read {path}: {error}") from error


def documents(block: Block, key: str) -> Iterator[str]:
    """The texts of a block; InputError names the line that is no document."""
    for number, item in enumerate(block.items, block.line):
        try:
            text = item if isinstance(item, str) else json.loads(item)[key] if item.strip() else ""
        except (ValueError, KeyError, TypeError) as error:
            raise tg.InputError(
                f"{block.path}, line {number} is no JSON with {key!r}: {error}"
            ) from None
        if not isinstance(text, str | None):
            raise tg.InputError(f"{block.path}, line {number}: {key!r} is {text!r:.40}, not text")
        yield text or ""


# ---- 2. Splits -------------------------------------------------------------------------------------------

RULE = (
    "val if the first 8 bytes of the SHA-256 of the text, NFKC-normalised and without ASCII white space, "
    "are below val_share * 2^64 (big-endian)"
)


def split_of(text: str, val_share: float) -> str:
    """Where a document belongs: its text alone decides, so copies stay together, whatever the tokenizer.

    Texts that a tokenizer could fold into one (white space, NFKC) count as copies.
    """
    core = unicodedata.normalize("NFKC", text).encode().translate(None, b" \t\n\r\v\f")
    return (
        "val" if int.from_bytes(hashlib.sha256(core).digest()[:8]) < val_share * 2**64 else "train"
    )


def writable(text: str) -> bool:
    """Whether it has a UTF-8 form: JSON can spell half a surrogate pair, a file can hold any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def draw(everything: Iterable[str], size: int, seed: int, val_share: float) -> list[str]:
    """Train documents of at most `size` bytes together, drawn without regard to their order.

    They are those of lowest keyed hash, so the draw is one pass that holds no more than it returns.
    """
    heap: list[tuple[int, str]] = []  # highest hash first
    total = 0
    for text in everything:
        if text and writable(text) and split_of(text, val_share) == "train":
            raw = text.encode()
            rank = int.from_bytes(
                hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()).digest()
            )
            heapq.heappush(heap, (-rank, text))
            total += len(raw)
            while total > size:
                total -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


# ---- 3. Tokenizers ---------------------------------------------------------------------------------------


class Encoder:
    """A tokenizer, and the bytes that each of its pieces stands for."""

    def __init__(self, path: Path) -> None:
        self.sp = spm.SentencePieceProcessor()
        try:
            self.sp.load(str(path))
        except (OSError, RuntimeError) as error:
            raise tg.InputError(f"{path} is not a SentencePiece model: {error}") from None
        tables = tg.ByteCounter.from_sentencepiece(path, len(self.sp))
        self.counter = tg.ByteCounter(*(table.numpy() for table in tables))
        self.pieces = [
            self.spelled(i) if scored else b""
            for i, scored in enumerate(self.counter.size + self.counter.space)
        ]
        self.added = self.sp.decode_pieces([tg.SPACE]) == ""

    def spelled(self, i: int) -> bytes:
        piece = self.sp.id_to_piece(i)
        return (
            bytes([int(piece[3:5], 16)])
            if self.sp.is_byte(i)
            else piece.replace(tg.SPACE, " ").encode()
        )

    def encode(self, texts: list[str], where: str) -> tuple[np.ndarray, Tally]:
        """uint16 tokens of the texts, a BOS in front of each; InputError if the pieces count other bytes."""
        tally, stream, starts, sizes = Tally(documents=len(texts)), [], [], []
        for text, ids in zip(texts, self.sp.encode(texts, num_threads=1), strict=True):
            raw, spelled = text.encode(), b"".join([self.pieces[i] for i in ids])
            if self.added:
                spelled = spelled.removeprefix(b" ")
            if spelled != raw:  # the tokenizer folds: what it makes of the text is what is scored
                spelled = self.sp.decode(ids).encode()
                tally.changed_documents += 1
                tally.changed_bytes += lost(raw, spelled)
            starts.append(tally.tokens)
            sizes.append(len(spelled))
            stream += [[sample.BOS], ids]
            tally.tokens += 1 + len(ids)
            tally.text_bytes += len(raw)
        tokens = np.fromiter(itertools.chain.from_iterable(stream), np.uint16, tally.tokens)
        counts = self.counter.count(np.concatenate(([sample.BOS], tokens[:-1])), tokens)
        counted = np.add.reduceat(counts, starts)
        if (wrong := np.flatnonzero(counted != sizes)).size:
            i = wrong[0]
            raise tg.InputError(
                f"{where}: the pieces of {texts[i]!r:.60} count {counted[i]} bytes, decode "
                f"to {sizes[i]}: val_bpb would lie with this tokenizer"
            )
        tally.bytes = int(sum(sizes))
        return tokens, tally


def lost(before: bytes, after: bytes) -> int:
    """How many bytes of a text are no longer in it, whatever their place."""
    counts = [np.bincount(np.frombuffer(text, np.uint8), minlength=256) for text in (before, after)]
    return int(np.maximum(counts[0] - counts[1], 0).sum())


def refuse_liars(path: Path) -> None:
    """InputError names the piece with which, or the lack of which, a tokenizer would make val_bpb lie."""
    encoder = Encoder(path)
    sp, counter = encoder.sp, encoder.counter
    if len(sp) > 65536 or sp.bos_id() != sample.BOS:
        raise tg.InputError(
            f"{path} has {len(sp)} pieces, BOS is {sp.bos_id()}: shards take at most "
            f"65536 pieces and BOS {sample.BOS}"
        )
    for piece in [f"<0x{i:02X}>" for i in range(256)]:
        if not sp.is_byte(sp.piece_to_id(piece)):
            raise tg.InputError(
                f"{path} has no byte piece {piece}: characters that it does not know would "
                "count nothing; train it with byte fallback"
            )
    space = sp.piece_to_id(tg.SPACE)
    if sp.is_unknown(space) or sp.is_control(space) or sp.is_unused(space):
        raise tg.InputError(
            f"{path} has no piece {tg.SPACE!r}, a space alone: train it on text with spaces"
        )
    anchor = sp.piece_to_id("<0x41>")  # A: the first piece of a text may lose its space
    for i, spelled in enumerate(encoder.pieces):
        if not spelled or (sp.is_byte(i) and spelled > b"\x7f"):  # no text, or part of a character
            continue
        decoded = sp.decode([anchor, i]).removeprefix("A").encode()
        claimed = int(counter.size[i] + counter.space[i])
        if decoded != spelled or claimed != len(decoded):
            raise tg.InputError(
                f"{path}: piece {i} {sp.id_to_piece(i)!r} counts {claimed} bytes and decodes "
                f"to {len(decoded)}, {decoded!r}: val_bpb would lie"
            )
    for text in ("a b", "a", "\u00e9\u65e5\U0001f600"):
        if (back := sp.decode(sp.encode(text))) != text:
            raise tg.InputError(f"{path} makes {back!r} of {text!r}")


# ---- 4. Encoding -----------------------------------------------------------------------------------------


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
    skipped: Counter[str] = field(default_factory=Counter)


encoder_of = functools.cache(Encoder)  # once in a worker


def end_with_parent() -> None:
    """In a worker: ends it when the main process is gone, however that ended."""
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_block(job: Job, block: Block) -> Part:
    part, split_texts = Part(), {split: [] for split in SPLITS}
    for text in documents(block, job.key):
        if not text:
            part.skipped["empty"] += 1
        elif not writable(text):
            part.skipped["not UTF-8"] += 1
        else:
            split_texts[split_of(text, job.val_share)].append(text)
    for split, its in split_texts.items():
        if its:
            part.tokens[split], part.tallies[split] = encoder_of(job.model).encode(its, block.path)
    return part


def in_order(
    pool: ProcessPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int
) -> Iterator[Any]:
    """function(item) of every item, in order; no more than `ahead` are under way or wait to be taken."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class ShardWriter:
    """Cuts one stream of tokens into files of `size` tokens, the last one shorter."""

    def __init__(self, folder: Path, split: str, size: int) -> None:
        self.folder, self.split, self.size = folder, split, size
        self.paths: list[Path] = []
        self.file: BinaryIO | None = None
        self.count = 0  # tokens in the open file

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.file is None:
                self.paths.append(self.folder / f"fineweb_{self.split}_{len(self.paths):06}.bin")
                self.file, self.count = open(self.paths[-1], "wb"), 0
                self.file.write(
                    sample.shard(tokens[:0])
                )  # a header that says 0, until the count is known
            piece = tokens[: self.size - self.count]
            self.file.write(piece.astype("<u2").tobytes())
            self.count, tokens = self.count + len(piece), tokens[len(piece) :]
            if self.count == self.size:
                self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.seek(8)
            self.file.write(self.count.to_bytes(4, "little"))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


# ---- 5. The run ------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a pass over the input wrote."""

    tallies: dict[str, Tally]
    skipped: Counter[str]
    paths: dict[str, list[Path]]
    seconds: float


def encode_all(args: argparse.Namespace, everything: Iterable[Block], folder: Path) -> Result:
    job = functools.partial(encode_block, Job(folder / MODEL, args.key, args.val_share))
    writers = {split: ShardWriter(folder, split, args.shard_tokens) for split in SPLITS}
    tallies, skipped, start = (
        {split: Tally() for split in SPLITS},
        Counter[str](),
        time.perf_counter(),
    )
    fork = get_context("fork")  # torch is imported only once
    with (
        ProcessPoolExecutor(args.workers, fork, end_with_parent) as pool,
        tqdm(unit="B", unit_scale=True, desc="encode", disable=None) as bar,
    ):
        for part in in_order(pool, job, everything, 3 * args.workers):
            for split, tokens in part.tokens.items():
                writers[split].add(tokens)
                tallies[split].add(part.tallies[split])
                bar.update(part.tallies[split].text_bytes)
            skipped.update(part.skipped)
    for split, writer in writers.items():
        writer.close()
        if not writer.paths:
            found = sum(tally.documents for tally in tallies.values())
            raise tg.InputError(
                f"no {split} documents among {found} ({skipped.total()} skipped): give more "
                f"text, or another --val-share than {args.val_share}"
            )
    seconds = time.perf_counter() - start
    return Result(
        tallies, skipped, {split: writer.paths for split, writer in writers.items()}, seconds
    )


def train(args: argparse.Namespace, everything: Iterable[Block], target: Path) -> dict[str, Any]:
    """Trains a tokenizer by data/sample.py's recipe, on train documents; returns what the manifest says."""
    stream = (text for block in everything for text in documents(block, args.key))
    drawn = draw(stream, args.sample_bytes, args.seed, args.val_share)
    size = sum(len(text.encode()) for text in drawn)
    print(
        f"learns  {args.vocab_size:,} pieces from {len(drawn):,} documents, {size:,} bytes",
        flush=True,
    )
    try:
        target.write_bytes(sample.train_tokenizer(drawn, args.vocab_size))
    except RuntimeError as error:
        raise tg.InputError(
            f"cannot learn {args.vocab_size} pieces from {len(drawn)} documents, {size:,} "
            f"bytes: {error}; lower --vocab-size or give more text"
        ) from None
    return dict(seed=args.seed, sample_documents=len(drawn), sample_bytes=size)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(
    args: argparse.Namespace, folder: Path, training: dict[str, Any] | None, result: Result
) -> dict[str, Any]:
    """The manifest. It holds nothing of the machine, so that equal shards have equal manifests."""
    splits = {}
    for split, tally in result.tallies.items():
        files = {
            path.name: dict(tokens=len(tg.open_shard(path)), sha256=sha256(path))
            for path in result.paths[split]
        }
        splits[split] = asdict(tally) | dict(files=files)
    model = dict(
        file=MODEL, sha256=sha256(folder / MODEL), vocab_size=len(Encoder(folder / MODEL).sp)
    )
    return dict(
        tokenizer=model | dict(trained=training),
        split_rule=RULE,
        val_share=args.val_share,
        shard_size=args.shard_tokens,
        skipped=dict(result.skipped),
        splits=splits,
    )


def report(result: Result) -> None:
    for split, t in result.tallies.items():
        print(
            f"{split:7} {t.documents:,} documents, {t.tokens:,} tokens, {len(result.paths[split])} shards, "
            f"{t.bytes:,} bytes (text and pieces), {t.bytes / t.tokens:.3f} bytes/token"
        )
        if t.changed_documents:
            print(
                f"CHANGED {t.changed_documents:,} of these documents by the tokenizer: {t.changed_bytes:,} "
                f"of {t.text_bytes:,} bytes are gone or others; scores are those of the changed text"
            )
    for reason, count in result.skipped.items():
        print(f"skipped {count:,} documents: {reason}")
    size = sum(t.text_bytes for t in result.tallies.values())
    print(
        f"encoded {size:,} bytes in {result.seconds:.1f} s, {size / result.seconds / 1e6:.1f} MB/s"
    )


def build(args: argparse.Namespace) -> None:
    """Makes the folder beside its destination and renames it when it is complete."""
    if args.out.exists():
        raise tg.InputError(f"--out {args.out} exists: give another, or remove it")
    paths, partial = find(args.inputs), args.out.with_name(f".{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        training = None
        if args.tokenizer:
            shutil.copyfile(args.tokenizer, partial / MODEL)
        else:
            training = train(args, blocks(paths, args.key, args.blank_lines), partial / MODEL)
        refuse_liars(partial / MODEL)
        result = encode_all(args, blocks(paths, args.key, args.blank_lines), partial)
        manifest = describe(args, partial, training, result)
        tg.write_atomically(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        os.rename(partial, args.out)
    except (
        OSError,
        BrokenProcessPool,
    ) as error:  # the second: a worker was killed, for memory as a rule
        raise tg.InputError(f"cannot make {args.out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(result)
    print(
        f"next    DATA_PATH={args.out} TOKENIZER_PATH={args.out / MODEL} "
        f"VOCAB_SIZE={manifest['tokenizer']['vocab_size']} python train_gpt.py"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs", type=Path, nargs="+", help=f"{', '.join(SUFFIXES)}, or folders of them"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--tokenizer", type=Path, help="a SentencePiece model; without it, one is trained"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=1024, help="pieces of the tokenizer to train"
    )
    parser.add_argument(
        "--sample-bytes", type=int, default=50_000_000, help="text to train it on, at most"
    )
    parser.add_argument("--seed", type=int, default=1337, help="of the choice of that text")
    parser.add_argument("--val-share", type=float, default=0.01, help="of the documents")
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, help="in a file, 2 bytes each"
    )
    parser.add_argument("--key", default="text", help="JSON field or Parquet column of the text")
    parser.add_argument(
        "--blank-lines", action="store_true", help="separate the documents of a text file"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    if not 260 < args.vocab_size <= 65536:
        parser.error(
            "--vocab-size: above 260 (4 special, 256 byte pieces), at most 65536 (uint16 tokens)"
        )
    if not 0 < args.val_share < 1 or min(args.shard_tokens, args.workers, args.sample_bytes) < 1:
        parser.error(
            "--val-share is between 0 and 1; --shard-tokens, --workers, --sample-bytes at least 1"
        )
    try:
        build(args)
    except tg.InputError as error:
        print(f"make_shards.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
