"""data/sample.py: built once from part of the standard library and some awkward documents."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[1] / "data/sample.py"
spec = importlib.util.spec_from_file_location("sample", SCRIPT)
sample = importlib.util.module_from_spec(spec)
sys.modules["sample"] = sample
spec.loader.exec_module(sample)

TOKENIZER = "tokenizers/sample_1024_bpe.model"
SHARDS = {name: f"datasets/sample_sp1024/fineweb_{name}_000000.bin" for name in ("train", "val")}
MARKER = "\u2581"  # the one character that cannot round trip: SentencePiece decodes it to a space
AWKWARD = "  leading\n\n\n\tdef f(x):\r\n        return '\u65e5\u672c \U0001f600'   \n\f\0 <s><0x41> \u2047\n"
ONLY_IN_VAL = "qzxj"


def in_val(name: str) -> bool:
    return sample.held_out(hashlib.sha256(name.encode()).hexdigest())


def write_source(folder: Path) -> set[str]:
    """Fills the folder and returns the distinct texts that belong in the corpus."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(stdlib.glob("*.py")) if path.stat().st_size < 60_000]
    texts = {path.name: path.read_bytes().decode() for path in files}
    texts |= {f"awkward_{i}.py": f"{AWKWARD}{i}" for i in range(100)}
    # Of a hundred names some fall on each side of the split: unless copies are dropped, the text leaks.
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root, source = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("source")
    expected = write_source(source)
    sample.build(root, source, 1024)
    return root, source, expected


@pytest.fixture(scope="module")
def sp(corpus):
    return spm.SentencePieceProcessor(model_file=str(corpus[0] / TOKENIZER))


@pytest.fixture(scope="module")
def streams(corpus):
    return {
        name: np.fromfile(corpus[0] / path, dtype="<u2", offset=1024)
        for name, path in SHARDS.items()
    }


@pytest.fixture(scope="module")
def documents(sp, streams):
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
def test_header_and_size(corpus, name):
    raw = (corpus[0] / SHARDS[name]).read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:2].tolist() == [20240520, 1]
    assert not header[3:].any()
    assert len(raw) == 1024 + 2 * header[2]
    assert header[2] > 0


@pytest.mark.parametrize("name", SHARDS)
def test_ids(streams, name):
    tokens = streams[name]
    assert tokens[0] == 1
    assert tokens.max() < 1024
    assert not np.isin(tokens, [0, 2, 3]).any()
    assert not (tokens[1:] == 1)[tokens[:-1] == 1].any(), "an empty document"


def test_special_pieces(sp):
    assert sp.vocab_size() == 1024
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert [sp.id_to_piece(i) for i in range(4, 260)] == [f"<0x{i:02X}>" for i in range(256)]
    assert all(sp.is_byte(i) for i in range(4, 260))
    for piece in (MARKER, "\n", MARKER * 4):
        assert sp.piece_to_id(piece) >= 260, repr(piece)


def test_every_document_is_in_one_split(corpus, documents):
    written = documents["train"] + documents["val"]
    assert len(written) == len(set(written))
    assert set(written) == corpus[2]
    assert min(len(texts) for texts in documents.values()) > 1


def test_split_is_by_path_hash(documents):
    for i in range(100):
        assert (f"{AWKWARD}{i}" in documents["val"]) == in_val(f"awkward_{i}.py")
    share = np.mean([in_val(str(i)) for i in range(20_000)])
    assert 0.02 < share < 0.04


def test_tokenizer_has_not_seen_validation(sp, documents):
    assert any(ONLY_IN_VAL in text for text in documents["val"])
    assert not any(ONLY_IN_VAL[:2] in sp.id_to_piece(i) for i in range(1024))


def test_held_out_round_trip_and_bytes(sp, streams, documents):
    for text in documents["val"]:
        ids = sp.encode(text)
        assert sp.decode(ids) == text
        assert scored_bytes(sp, ids) == len(text.encode())
    for name, texts in documents.items():
        assert sample.count_bytes(sp, streams[name]) == sum(len(text.encode()) for text in texts)


def test_stream_is_the_encoding(sp, streams, documents):
    for name, texts in documents.items():
        assert streams[name].tolist() == [
            token for text in texts for token in (1, *sp.encode(text))
        ]


LAYOUT = st.sampled_from(["\n", "\r\n", "\t", "    ", " ", "x = 1", "def f():", "\0"])
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=MARKER)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(CHARACTERS), st.lists(LAYOUT).map("".join)))
def test_any_text_round_trips(sp, text):
    """Surrogates (category Cs) are not UTF-8; nothing else but the marker is left out, not even NUL."""
    ids = sp.encode(text)
    assert sp.decode(ids) == text
    assert 3 not in ids
    assert scored_bytes(sp, ids) == len(text.encode())
    assert sample.count_bytes(sp, np.array([1, *ids])) == len(text.encode())


def test_marker_does_not_round_trip(sp):
    assert sp.decode(sp.encode(f"a{MARKER}b")) == "a b"


LAID_OUT = ["if x:\n        y\n    z\n\n\n", "    a", "\n", "\n\n    \n", "\tx\r\n", "a  "]


@pytest.mark.parametrize("text", LAID_OUT)
def test_newlines_and_indentation_survive(sp, text):
    ids = sp.encode(text)
    assert sp.decode(ids) == text
    assert not {4 + ord(" "), 4 + ord("\n")} & set(ids), "layout spelled in byte pieces"


def test_indentation_is_cheap(sp):
    assert len(sp.encode("x" + " " * 8)) <= 3
    assert len(sp.encode("x\n\n")) <= 3


def test_count_bytes_boundaries(sp):
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
        assert sample.count_bytes(sp, np.array(ids)) == size, ids


def test_cap_passes_over_long_documents():
    documents = [sample.Document(str(i), "", size) for i, size in enumerate([6, 9, 3, 2, 1])]
    assert [document.size for document in sample.within(documents, 10)] == [6, 3, 1]


def test_second_build_is_identical(corpus, tmp_path):
    root, source, _ = corpus
    command = [sys.executable, str(SCRIPT), "--root", str(tmp_path), "--source", str(source)]
    for seed in ("1", "2"):  # the second time over existing files
        env = os.environ | {"PYTHONHASHSEED": seed}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert "PRESET=tiny python train_gpt.py" in result.stdout
        files = {
            path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
        }
        assert files == {TOKENIZER, *SHARDS.values()}
        for name in files:
            assert (tmp_path / name).read_bytes() == (root / name).read_bytes(), name


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "shard.bin"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(sample.os, "replace", fail)
    with pytest.raises(SystemExit, match="shard.bin.*disk full.*--root"):
        sample.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_missing_sources_are_named(tmp_path):
    root, source = tmp_path / "root", tmp_path / "stripped"
    with pytest.raises(SystemExit, match="stripped.*--source"):
        sample.build(root, source, 1024)
    source.mkdir()
    for i in range(200):
        (source / f"{i}.py").write_text(f"x = {i}\n")
    with pytest.raises(SystemExit, match="stripped(.|\n)*--vocab-size"):
        sample.build(root, source, 1024)
    assert not root.exists()


def test_root_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file.*--root"):
        sample.write_atomic(tmp_path / "file" / "x.bin", b"")
