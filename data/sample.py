"""Builds a small real corpus, offline, from the source text of the Python standard library.

    python data/sample.py && PRESET=tiny python train_gpt.py

File formats, the split and the byte count are described in data/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
PAD, BOS, EOS, UNK = range(4)
SPACE = "\u2581"  # SentencePiece's stand-in for a space
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
VAL_SHARE = 0.03  # of the files
# Of about 30 MB: validation has to stay cheap on a CPU, and train needs only a few million tokens.
MAX_BYTES = {"train": 12_000_000, "val": 500_000}
ADVICE = "Install a Python that ships its library as source, or give --source another folder of .py files."


class Document(NamedTuple):
    key: str  # sha256 of the relative path
    text: str
    size: int  # UTF-8 bytes


class Split(NamedTuple):
    tokens: np.ndarray
    documents: int
    size: int


def held_out(key: str) -> bool:
    return int(key[:8], 16) < VAL_SHARE * 2**32


def find_documents(source: Path) -> tuple[list[Document], Counter[str]]:
    """All distinct documents in the order of their keys, and how many files were dropped for what reason."""
    names = sorted(
        path.relative_to(source).as_posix() for path in source.rglob("*.py") if path.is_file()
    )
    documents, dropped, seen = [], Counter[str](), set()
    for name in names:
        if NOT_STDLIB.intersection(name.split("/")):
            continue
        raw = (source / name).read_bytes()
        digest = hashlib.sha256(raw).digest()
        if not raw or digest in seen:
            dropped["duplicate" if raw else "empty"] += 1
            continue
        seen.add(digest)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            continue
        documents.append(Document(hashlib.sha256(name.encode()).hexdigest(), text, len(raw)))
    return sorted(documents), dropped


def within(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """The documents that still fit, in order: one that is too long is passed over, not a reason to stop."""
    for document in documents:
        if document.size <= max_bytes:
            max_bytes -= document.size
            yield document


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        # Whole documents, not lines: pieces with a newline can only be learned from text that has newlines.
        sentence_iterator=iter(texts),
        max_sentence_length=1 << 24,
        model_writer=model,
        minloglevel=2,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=UNK,
        # Every covered character takes one of the few pieces, so rare ones are left to the byte pieces.
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,
        num_threads=1,  # the count is stored in the model file, which must not depend on the machine
    )
    return model.getvalue()


def count_bytes(sp: spm.SentencePieceProcessor, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text behind a token stream, by the rule that the scorer uses."""
    vocab = range(sp.vocab_size())
    boundary = np.array([sp.is_control(i) or sp.is_unknown(i) for i in vocab])
    pieces = ["" if boundary[i] else "?" if sp.is_byte(i) else sp.id_to_piece(i) for i in vocab]
    spaced = np.array([piece.startswith(SPACE) for piece in pieces])
    sizes = np.array(
        [len(piece.removeprefix(SPACE).replace(SPACE, " ").encode()) for piece in pieces]
    )
    after_text = ~boundary[np.concatenate(([BOS], tokens[:-1]))]
    return int(sizes[tokens].sum() + (spaced[tokens] & after_text).sum())


def encode_split(sp: spm.SentencePieceProcessor, documents: list[Document]) -> Split:
    stream, size = [], 0
    for document in documents:
        ids = sp.encode(document.text)
        if sp.decode(ids) == document.text:
            stream.append(np.array([BOS, *ids], dtype="<u2"))
            size += document.size
    if not stream:
        raise SystemExit(
            f"none of {len(documents)} documents survives the tokenizer's round trip. {ADVICE}"
        )
    tokens = np.concatenate(stream)
    if (counted := count_bytes(sp, tokens)) != size:
        raise SystemExit(
            f"the pieces count {counted:,} bytes, the text {size:,}: the byte rule is broken"
        )
    return Split(tokens, len(stream), size)


def shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def write_atomic(path: Path, payload: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error}. Give --root a writable folder.") from error


def build(root: Path, source: Path, vocab_size: int) -> None:
    documents, dropped = find_documents(source)
    found = {
        name: [d for d in documents if held_out(d.key) == (name == "val")] for name in MAX_BYTES
    }
    kept = {name: list(within(found[name], limit)) for name, limit in MAX_BYTES.items()}
    if not all(kept.values()):
        raise SystemExit(
            f"too few Python sources under {source} ({len(documents)} documents). {ADVICE}"
        )
    try:
        model = train_tokenizer((document.text for document in kept["train"]), vocab_size)
    except RuntimeError as error:
        reason = f"cannot learn {vocab_size} pieces from the sources under {source}: {error}"
        raise SystemExit(f"{reason}\nLower --vocab-size, or: {ADVICE}") from error
    sp = spm.SentencePieceProcessor(model_proto=model)

    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    print(f"source  {source}: {len(documents):,} documents; dropped: {reasons or 'none'}")
    payloads = {root / f"tokenizers/sample_{vocab_size}_bpe.model": model}
    for name, split in ((name, encode_split(sp, kept[name])) for name in kept):
        payloads[root / f"datasets/sample_sp{vocab_size}/fineweb_{name}_000000.bin"] = shard(
            split.tokens
        )
        print(
            f"{name:7} {split.documents:,} documents, {len(split.tokens):,} tokens, "
            f"{split.size:,} bytes (text and pieces), {split.size / len(split.tokens):.3f} bytes/token\n"
            f"        left out: {len(found[name]) - len(kept[name]):,} over the cap of "
            f"{MAX_BYTES[name]:,} bytes, {len(kept[name]) - split.documents} without an exact round trip"
        )
    for path, payload in payloads.items():
        write_atomic(path, payload)
        print(f"wrote   {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here, stdlib = Path(__file__).resolve().parent, Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--root", type=Path, default=here, help="where the corpus goes")
    parser.add_argument("--source", type=Path, default=stdlib, help="where the .py files are")
    parser.add_argument("--vocab-size", type=int, default=1024)
    args = parser.parse_args(argv)
    if not 260 < args.vocab_size <= 65536:
        parser.error(
            "--vocab-size: above 260 (4 special, 256 byte pieces), at most 65536 (uint16 tokens)"
        )
    start = time.perf_counter()
    build(args.root, args.source, args.vocab_size)
    print(f"took    {time.perf_counter() - start:.1f} s\nnext    PRESET=tiny python train_gpt.py")


if __name__ == "__main__":
    main()
