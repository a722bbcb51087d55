"""data/sample.py: built once from part of the standard library and some awkward documents."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import packages
import sample
import shards
from shards import InputError

SCRIPT = Path(sample.__file__)
TOKENIZER = "tokenizers/sample_1024_bpe.model"
SHARDS = {name: f"datasets/sample_sp1024/fineweb_{name}_000000.bin" for name in ("train", "val")}
MARKER = "\u2581"  # the one character that cannot round trip: SentencePiece decodes it to a space
AWKWARD = (
    "  leading\n\n\n\tdef f(x):\r\n        return '\u65e5\u672c \U0001f600'   \n\f\0 <s><0x41> "
    "\u2047\n"
)
ONLY_IN_VAL = "qzxj"


def in_val(name: str) -> bool:
    return sample.held_out(hashlib.sha256(name.encode()).hexdigest())


def write_source(folder: Path) -> set[str]:
    """Fills the folder and returns the distinct texts that belong in the corpus."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(stdlib.glob("*.py")) if path.stat().st_size < 60_000]
    texts = {path.name: path.read_bytes().decode() for path in files}
    texts |= {f"awkward_{i}.py": f"{AWKWARD}{i}" for i in range(100)}
    # Of a hundred names some fall on each side: unless copies are dropped, the text leaks.
    texts |= {f"copy_{i}.py": "the same text\n" for i in range(100)}
    texts |= {f"only_{i}.py": ONLY_IN_VAL * 5000 for i in range(100) if in_val(f"only_{i}.py")}
    unused = {f"marker_{i}.py": f"left out {MARKER} {i}\n" for i in range(100)}
    unused |= {
        "empty.py": "",
        "notes.txt": "not Python\n",
        "site-packages/other.py": "not the library\n",
    }
    unused["__pycache__/cached.py"] = "not a source\n"
    for name, text in (texts | unused).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    (folder / "latin1.py").write_bytes(b"# caf\xe9\n")
    return set(texts.values()) - {""}


class Corpus(NamedTuple):
    root: Path
    source: Path
    expected: set[str]  # documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root, source = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("source")
    expected = write_source(source)
    sample.build(root, source, 1024)
    return Corpus(root, source, expected)


@pytest.fixture(scope="module")
def sp(corpus: Corpus) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(corpus.root / TOKENIZER))


@pytest.fixture(scope="module")
def table(sp: spm.SentencePieceProcessor) -> shards.ByteTable:
    return shards.ByteTable.of(sp)


Streams = dict[str, np.ndarray]
Documents = dict[str, list[str]]


@pytest.fixture(scope="module")
def streams(corpus: Corpus) -> Streams:
    return {
        name: np.fromfile(corpus.root / path, dtype="<u2", offset=1024)
        for name, path in SHARDS.items()
    }


@pytest.fixture(scope="module")
def documents(sp: spm.SentencePieceProcessor, streams: Streams) -> Documents:
    texts = {}
    for name, tokens in streams.items():
        edges = [*np.flatnonzero(tokens == 1).tolist(), len(tokens)]
        texts[name] = [
            sp.decode(tokens[start + 1 : end].tolist()) for start, end in pairwise(edges)
        ]
    return texts


def scored_bytes(sp: spm.SentencePieceProcessor, ids: list[int]) -> int:
    """The byte rule of data/README.md, one token at a time."""
    total = 0
    for previous, token in pairwise([1, *ids]):
        if token < 4:
            continue
        if token < 260:
            total += 1
            continue
        piece = sp.id_to_piece(token)
        if piece[0] == MARKER:
            total += previous >= 4
            piece = piece[1:]
        total += sum(1 if c == MARKER else len(c.encode()) for c in piece)
    return total


@pytest.mark.parametrize("name", SHARDS)
def test_header_and_size(corpus: Corpus, name: str) -> None:
    raw = (corpus.root / SHARDS[name]).read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:2].tolist() == [20240520, 1]
    assert not header[3:].any()
    assert len(raw) == 1024 + 2 * header[2]
    assert header[2] > 0


@pytest.mark.parametrize("name", SHARDS)
def test_ids(streams: Streams, name: str) -> None:
    tokens = streams[name]
    assert tokens[0] == 1
    assert tokens.max() < 1024
    assert not np.isin(tokens, [0, 2, 3]).any()
    assert not (tokens[1:] == 1)[tokens[:-1] == 1].any(), "an empty document"


def test_special_pieces(sp: spm.SentencePieceProcessor) -> None:
    assert sp.vocab_size() == 1024
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert [sp.id_to_piece(i) for i in range(4, 260)] == [f"<0x{i:02X}>" for i in range(256)]
    assert all(sp.is_byte(i) for i in range(4, 260))
    for piece in (MARKER, "\n", MARKER * 4):
        assert sp.piece_to_id(piece) >= 260, repr(piece)


def test_every_document_is_in_one_split(corpus: Corpus, documents: Documents) -> None:
    written = documents["train"] + documents["val"]
    assert len(written) == len(set(written))
    assert set(written) == corpus.expected
    assert min(len(texts) for texts in documents.values()) > 1


def test_split_is_by_path_hash(documents: Documents) -> None:
    for i in range(100):
        assert (f"{AWKWARD}{i}" in documents["val"]) == in_val(f"awkward_{i}.py")
    share = np.mean([in_val(str(i)) for i in range(20_000)])
    assert 0.02 < share < 0.04


def test_tokenizer_has_not_seen_validation(
    sp: spm.SentencePieceProcessor, documents: Documents
) -> None:
    assert any(ONLY_IN_VAL in text for text in documents["val"])
    assert not any(ONLY_IN_VAL[:2] in sp.id_to_piece(i) for i in range(1024))


def test_held_out_round_trip_and_bytes(
    sp: spm.SentencePieceProcessor,
    table: shards.ByteTable,
    streams: Streams,
    documents: Documents,
) -> None:
    for text in documents["val"]:
        ids = sp.encode(text)
        assert sp.decode(ids) == text
        assert scored_bytes(sp, ids) == len(text.encode())
    for name, texts in documents.items():
        size = sum(len(text.encode()) for text in texts)
        assert table.of_stream(streams[name]).sum() == size


def test_stream_is_the_encoding(
    sp: spm.SentencePieceProcessor, streams: Streams, documents: Documents
) -> None:
    for name, texts in documents.items():
        assert streams[name].tolist() == [
            token for text in texts for token in (1, *sp.encode(text))
        ]


LAYOUT = st.sampled_from(["\n", "\r\n", "\t", "    ", " ", "x = 1", "def f():", "\0"])
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=MARKER)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(CHARACTERS), st.lists(LAYOUT).map("".join)))
def test_any_text_round_trips(
    sp: spm.SentencePieceProcessor, table: shards.ByteTable, text: str
) -> None:
    """Surrogates (category Cs) are not UTF-8; nothing else but the marker is left out."""
    ids = sp.encode(text)
    assert sp.decode(ids) == text
    assert 3 not in ids
    assert scored_bytes(sp, ids) == len(text.encode())
    assert table.of_stream(np.array([1, *ids])).sum() == len(text.encode())


def test_marker_does_not_round_trip(sp: spm.SentencePieceProcessor) -> None:
    assert sp.decode(sp.encode(f"a{MARKER}b")) == "a b"


LAID_OUT = ["if x:\n        y\n    z\n\n\n", "    a", "\n", "\n\n    \n", "\tx\r\n", "a  "]


@pytest.mark.parametrize("text", LAID_OUT)
def test_newlines_and_indentation_survive(sp: spm.SentencePieceProcessor, text: str) -> None:
    ids = sp.encode(text)
    assert sp.decode(ids) == text
    assert not {4 + ord(" "), 4 + ord("\n")} & set(ids), "layout spelled in byte pieces"


def test_indentation_is_cheap(sp: spm.SentencePieceProcessor) -> None:
    assert len(sp.encode("x" + " " * 8)) <= 3
    assert len(sp.encode("x\n\n")) <= 3


def test_bytes_at_boundaries(sp: spm.SentencePieceProcessor, table: shards.ByteTable) -> None:
    marker, newline = sp.piece_to_id(MARKER), sp.piece_to_id("\n")
    four = sp.piece_to_id(MARKER * 4)
    for ids, size in [
        ([1, marker], 0),
        ([1, four], 3),
        ([1, marker, four], 4),
        ([3, marker, newline], 1),
        ([1, 4 + 0xC3, 4 + 0xA9, marker], 3),
        ([1, newline, 1, marker, 2, 0], 1),
    ]:
        assert table.of_stream(np.array(ids)).sum() == size, ids


def test_cap_passes_over_long_documents() -> None:
    documents = [sample.Document(str(i), "", size) for i, size in enumerate([6, 9, 3, 2, 1])]
    assert [document.size for document in sample.within(documents, 10)] == [6, 3, 1]


def test_manifest_is_true(corpus: Corpus, documents: Documents) -> None:
    """It names the tokenizer by its digest, and the tokens of every shard."""
    folder = corpus.root / "datasets/sample_sp1024"
    manifest = json.loads((folder / "manifest.json").read_text())
    model = folder / manifest["tokenizer"]["file"]
    assert model.resolve() == corpus.root / TOKENIZER
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["sha256"] == digest
    assert manifest["tokenizer"]["vocab_size"] == 1024
    assert manifest["splits"].keys() == documents.keys()
    for split, texts in documents.items():
        entry, path = manifest["splits"][split], corpus.root / SHARDS[split]
        tokens = (path.stat().st_size - 1024) // 2
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["files"] == {path.name: {"tokens": tokens, "sha256": digest}}
        assert (entry["tokens"], entry["documents"]) == (tokens, len(texts))
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)


def test_second_build_is_identical(corpus: Corpus, tmp_path: Path) -> None:
    """Over existing files, with another seed of Python's hashes, without docstrings."""
    shutil.copytree(corpus.root, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*.*"):
        path.write_bytes(b"old")
    options = ["--root", str(tmp_path), "--source", str(corpus.source)]
    result = subprocess.run(
        [sys.executable, "-OO", str(SCRIPT), *options],
        env=os.environ | {"PYTHONHASHSEED": "2"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert found == {TOKENIZER, *SHARDS.values(), "datasets/sample_sp1024/manifest.json"}
    for name in found:
        assert (tmp_path / name).read_bytes() == (corpus.root / name).read_bytes(), name


def test_what_is_left_out_is_counted_and_named(corpus: Corpus, tmp_path: Path) -> None:
    for name in ("a.py", "copy.py", "notes.txt", "site-packages/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin1.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "gone.py").symlink_to("nowhere.py")
    (tmp_path / "linked").symlink_to(corpus.source)
    documents, skipped = sample.find_documents(tmp_path)
    assert [document.text for document in documents] == ["x = 1\n"]
    assert skipped.first == {
        "duplicate": "copy.py",
        "empty": "empty.py",
        "not UTF-8": "latin1.py",
        "no regular file": str(tmp_path / "gone.py"),
        "linked folder": str(tmp_path / "linked"),
    }
    assert set(skipped.counts.values()) == {1}


def test_closing_command_names_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form is for the place and the vocabulary that PRESET=tiny looks for."""
    data = SCRIPT.parent
    default = shards.Corpus(data / "datasets/sample_sp1024", data / "x.model", 1024, 1000)
    monkeypatch.chdir(data.parent)
    assert sample.next_command(default) == f"PRESET=tiny {packages.python()} train_gpt.py"
    monkeypatch.chdir(tmp_path)
    other = shards.Corpus(tmp_path / "a b/sample_sp300", tmp_path / "a b/x.model", 300, 200)
    for corpus in (default, other):
        words = shlex.split(sample.next_command(corpus))
        assert words[:4] == [
            "PRESET=tiny",
            f"DATA_PATH={corpus.folder}",
            f"TOKENIZER_PATH={corpus.model}",
            f"VOCAB_SIZE={corpus.vocab_size}",
        ]
        assert Path(words[-1]).resolve() == data.parent / "train_gpt.py"
    assert "TRAIN_SEQ_LEN=128" in words, "200 tokens hold no sequence of 256"


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The only line of a run that ends with the exit code for what the user can mend."""
    assert sample.main([*options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.fixture
def learned(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds have the tokenizer that was learned before: learning it takes seconds."""
    model = (corpus.root / TOKENIZER).read_bytes()
    monkeypatch.setattr(sample, "train_tokenizer", lambda texts, vocab_size: model)


@pytest.mark.usefixtures("learned")
def test_failed_write_keeps_old_files_and_no_manifest_of_them(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there while files are replaced must not vouch for them."""
    shutil.copytree(corpus.root, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "datasets/sample_sp1024"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if "val" in target.name:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="disk full.*--root"):
        sample.build(tmp_path, corpus.source, 1024)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert before.keys() - after.keys() == {folder / "manifest.json"}
    assert after.items() <= before.items()


def test_missing_sources_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source = tmp_path / "root", tmp_path / "stripped"
    options = "--root", str(root), "--source", str(source)
    assert str(source) in refused(capsys, *options)
    source.mkdir()
    (source / "a.py").write_bytes(b"\xff")
    message = refused(capsys, *options)
    assert re.search("stripped.*1 files or folders: not UTF-8.*a.py.*--source", message)
    for i in range(200):
        (source / f"{i}.py").write_text(f"x = {i}\n")
    assert re.search("stripped.*--vocab-size", refused(capsys, *options))
    assert not root.exists()


@pytest.mark.usefixtures("learned")
def test_root_that_is_no_folder_is_named(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = "--root", str(tmp_path / "file"), "--source", str(corpus.source)
    assert re.search("file.*--root", refused(capsys, *options))


def test_shard_that_is_not_of_the_corpus_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "datasets/sample_sp1024"
    folder.mkdir(parents=True)
    (folder / "fineweb_val_000000 (1).bin").touch()
    message = refused(capsys, "--root", str(tmp_path))
    assert "fineweb_val_000000 (1).bin is not named like a shard" in message
