"""Builds a small real corpus, offline, from the source text of the Python standard library.

    python data/sample.py && PRESET=tiny python train_gpt.py

File formats, the split and the byte count are described in data/README.md. Exit codes: 0; 2 with
one line for what the user can mend; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for whoever imports this by its path
import packages

try:
    import numpy as np
    import sentencepiece as spm
    import shards
    from shards import BOS, InputError, Skipped, say
    from shards import encode_shard as shard

    MISSING = ""
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    MISSING = str(error.name)  # which is told once --help has had its chance

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 1024
PAD, EOS, UNK = 0, 2, 3
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
VAL_SHARE = 0.03  # of the files
# Of about 30 MB: validation has to stay cheap on a CPU, and train needs only a few million tokens.
MAX_BYTES = {"train": 12_000_000, "val": 500_000}
ADVICE = (
    "Install a Python that ships its library as source, or give --source another folder of .py "
    "files."
)


class Document(NamedTuple):
    """A source file."""

    key: str  # sha256 of the relative path
    text: str
    size: int  # UTF-8 bytes


class Split(NamedTuple):
    """The documents of a split as tokens."""

    tokens: np.ndarray
    documents: int
    size: int  # UTF-8 bytes of the text


# ---- 1. Documents ------------------------------------------------------------------------------


def held_out(key: str) -> bool:
    """Whether a document is for validation."""
    return int(key[:8], 16) < VAL_SHARE * 2**32


def find_files(source: Path, skipped: Skipped) -> Iterator[str]:
    """Paths of the library's .py files below the source.

    Links to folders are not followed: the corpus must not depend on what lies elsewhere.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read the folder {error.filename}: {error.strerror}")

    for place, folders, files in os.walk(source, onerror=refuse):
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                skipped.add("linked folder", os.path.join(place, name))
        for name in files:
            path = Path(place, name)
            relative = path.relative_to(source)
            if name.endswith(".py") and not NOT_STDLIB.intersection(relative.parts):
                if path.is_file():
                    yield relative.as_posix()
                else:
                    skipped.add("no regular file", str(path))


def find_documents(source: Path) -> tuple[list[Document], Skipped]:
    """All distinct documents in the order of their keys, and what was left out."""
    skipped = Skipped("files or folders")
    documents: list[Document] = []
    seen: set[bytes] = set()
    for name in sorted(find_files(source, skipped)):
        raw = (source / name).read_bytes()
        digest = hashlib.sha256(raw).digest()
        if not raw:
            skipped.add("empty", name)
        elif digest in seen:
            skipped.add("duplicate", name)
        else:
            seen.add(digest)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                skipped.add("not UTF-8", name)
            else:
                key = hashlib.sha256(os.fsencode(name)).hexdigest()
                documents.append(Document(key, text, len(raw)))
    return sorted(documents), skipped


def within(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """The documents that still fit, in order: one that is too long is passed over, no reason to
    stop."""
    for document in documents:
        if document.size <= max_bytes:
            max_bytes -= document.size
            yield document


# ---- 2. Tokens ---------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model; RuntimeError if the texts do not give that many pieces."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        # Whole documents, not lines: pieces with a newline can only be learned from text that has
        # newlines.
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
        # Every covered character takes one of the few pieces, so rare ones are left to the byte
        # pieces.
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,
        num_threads=1,  # stored in the model file, which must not depend on the machine
    )
    return model.getvalue()


def learn(documents: list[Document], vocab_size: int, source: Path) -> bytes:
    """A model that is trained on train documents; InputError if they do not give so many pieces."""
    try:
        return train_tokenizer((document.text for document in documents), vocab_size)
    except RuntimeError as error:
        raise InputError(
            f"cannot learn {vocab_size} pieces from the sources under {source}: {error}. Give "
            f"another --vocab-size, or: {ADVICE}"
        ) from error


def encode_split(sp: spm.SentencePieceProcessor, documents: list[Document]) -> Split:
    """The documents that the tokenizer decodes to exactly their text, as one stream of tokens."""
    stream: list[np.ndarray] = []
    size = 0
    for document in documents:
        ids = sp.encode(document.text)
        if sp.decode(ids) == document.text:
            stream.append(np.array([BOS, *ids], dtype="<u2"))
            size += document.size
    if not stream:
        raise InputError(
            f"none of {len(documents)} documents survives the tokenizer's round trip. {ADVICE}"
        )
    tokens = np.concatenate(stream)
    counted = int(shards.ByteTable.of(sp).of_stream(tokens).sum())
    assert counted == size, f"the pieces count {counted} bytes, the text {size}"
    return Split(tokens, len(stream), size)


# ---- 3. The corpus -----------------------------------------------------------------------------


class Selection(NamedTuple):
    """The documents of both splits."""

    kept: dict[str, list[Document]]
    over_cap: dict[str, int]  # how many did not fit


def select(source: Path) -> Selection:
    """Splits the documents and keeps what fits; InputError if a split stays empty."""
    documents, skipped = find_documents(source)
    found = {
        name: [d for d in documents if held_out(d.key) == (name == "val")] for name in MAX_BYTES
    }
    kept = {name: list(within(found[name], limit)) for name, limit in MAX_BYTES.items()}
    if not all(kept.values()):
        raise InputError(
            f"too few Python sources under {source} ({len(documents)} documents; {skipped}). "
            f"{ADVICE}"
        )
    say(f"source  {source}: {len(documents):,} documents")
    for line in skipped.lines():
        say(line)
    return Selection(kept, {name: len(found[name]) - len(kept[name]) for name in kept})


def report(name: str, split: Split, selection: Selection) -> None:
    """Says what a split holds and what it leaves out."""
    lossy = len(selection.kept[name]) - split.documents
    say(
        f"{name:7} {split.documents:,} documents, {len(split.tokens):,} tokens, {split.size:,} "
        f"bytes (text and pieces), {split.size / len(split.tokens):.3f} bytes/token\n"
        f"        left out: {selection.over_cap[name]:,} over the cap of {MAX_BYTES[name]:,} "
        f"bytes, {lossy} without an exact round trip"
    )


def describe(name: str, payload: bytes, split: Split) -> dict[str, Any]:
    """The manifest's entry of a split that is one shard."""
    file = dict(tokens=len(split.tokens), sha256=hashlib.sha256(payload).hexdigest())
    return shards.split_entry({name: file}, documents=split.documents, bytes=split.size)


def encode(model: bytes, selection: Selection) -> dict[str, Split]:
    """Both splits as tokens; InputError if one has nothing to score."""
    sp = spm.SentencePieceProcessor(model_proto=model)
    splits = {name: encode_split(sp, documents) for name, documents in selection.kept.items()}
    for name, split in splits.items():
        shards.check_split(name, len(split.tokens), split.size)
        report(name, split, selection)
    return splits


def write(corpus: shards.Corpus, model: bytes, splits: dict[str, Split]) -> None:
    """Writes tokenizer, shards and manifest. No manifest is there while files do not fit it."""
    files, entries = {corpus.model: model}, {}
    for split, content in splits.items():
        name, payload = shards.shard_name(split, 0), shard(content.tokens)
        files[corpus.folder / name] = payload
        entries[split] = describe(name, payload, content)
    (corpus.folder / shards.MANIFEST).unlink(missing_ok=True)
    for path, payload in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shards.write_atomically(path, payload)
        say(f"wrote   {path}")
    tokenizer = shards.tokenizer_entry(corpus.model, corpus.folder, corpus.vocab_size)
    shards.write_manifest(corpus.folder, tokenizer, entries)
    say(f"wrote   {corpus.folder / shards.MANIFEST}")


def build(root: Path, source: Path, vocab_size: int) -> shards.Corpus:
    """Makes the corpus below the root."""
    folder = root / f"datasets/sample_sp{vocab_size}"
    shards.refuse_strays(folder, [shards.shard_name(split, 0) for split in shards.SPLITS])
    selection = select(source)
    model = learn(selection.kept["train"], vocab_size, source)
    splits = encode(model, selection)
    shortest = min(len(split.tokens) for split in splits.values())
    model_path = root / f"tokenizers/sample_{vocab_size}_bpe.model"
    corpus = shards.Corpus(folder, model_path, vocab_size, shortest)
    try:
        write(corpus, model, splits)
    except OSError as error:
        raise InputError(f"{error}. Give --root a folder that can be written.") from error
    return corpus


def next_command(corpus: shards.Corpus) -> str:
    """The command that trains on the corpus from the current folder."""
    default = HERE / f"datasets/sample_sp{VOCAB_SIZE}"
    if corpus.folder == default and Path.cwd() == HERE.parent:  # what PRESET=tiny looks for
        return f"PRESET=tiny {packages.python()} train_gpt.py"
    return corpus.tiny_command()


def run(root: Path, source: Path, vocab_size: int) -> None:
    """Builds the corpus and says how to go on."""
    start = time.perf_counter()
    corpus = build(root, source, vocab_size)
    say(f"took    {time.perf_counter() - start:.1f} s\nnext    {next_command(corpus)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build a small corpus from the source text of the Python standard library."
    )
    parser.add_argument(
        "--root", type=Path, default=HERE, help="Folder for the corpus (default: %(default)s)."
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="Folder of .py files (default: %(default)s).",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        help="Number of pieces of the tokenizer (default: %(default)s).",
    )
    args = parser.parse_args(argv)
    if not 260 < args.vocab_size <= 65536:
        parser.error(
            "--vocab-size is above 260 (4 special, 256 byte pieces), at most 65536 (uint16 tokens)"
        )
    if MISSING:
        return packages.complain("sample.py", MISSING, HERE.parent / "requirements.txt")
    return shards.attempt("sample.py", lambda: run(args.root, args.source, args.vocab_size))


if __name__ == "__main__":
    sys.exit(main())
