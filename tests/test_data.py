"""Shards, batches, byte counts: no token lost, none twice, every error names its file."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch
from helpers import (
    BOS,
    EXACT,
    PIECES,
    TEXTS,
    data_config,
    refused,
    shard_bytes,
    stub_world,
    tokenizer_bytes,
    write_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt as tg

pytestmark = pytest.mark.quick


# ---- Shards


def test_a_submission_finds_the_data_of_its_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started in its own folder; nearer folders of the same name come first."""
    home = tmp_path / "records" / "track_10min_16mb" / "a_submission"
    monkeypatch.setattr(tg, "__file__", str(home / "train_gpt.py"))
    for start in (home, tmp_path / "elsewhere"):
        start.mkdir(parents=True)
        monkeypatch.chdir(start)
        name = f"./data/{start.name}"
        assert tg.find_file(name) == Path(name), "as it was given"
        for place in (tmp_path, home, start):
            (place / name).mkdir(parents=True, exist_ok=True)
            assert tg.find_file(name).resolve() == (place / name).resolve()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_shard_round_trip(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    path.write_bytes(shard_bytes(tokens))
    assert tg.open_shard(path).tolist() == tokens


WHOLE = shard_bytes(range(10))


BROKEN = {
    "empty": b"",
    "header cut": WHOLE[:1000],
    "header only": WHOLE[:1024],
    "one byte short": WHOLE[:-1],
    "one token short": WHOLE[:-2],
    "one token more": WHOLE + b"\0\0",
    "no tokens": shard_bytes([]),
    "magic": shard_bytes(range(10), magic=20240521),
    "version": shard_bytes(range(10), version=2),
    "count low": shard_bytes(range(10), count=9),
    "count high": shard_bytes(range(10), count=11),
    "count negative": shard_bytes(range(10), count=-10),
    "text": b"<!DOCTYPE html>" * 200,
    "byte order": np.frombuffer(WHOLE[:1024], "<i4").astype(">i4").tobytes() + WHOLE[1024:],
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_shard_is_refused(tmp_path: Path, case: str, split: str) -> None:
    folder = write_shards(tmp_path, split, range(10))
    bad = folder / f"fineweb_{split}_000001.bin"
    bad.write_bytes(BROKEN[case])
    message = refused(tg.Tokens, data_config(folder), split)
    assert str(bad) in message and "\n" not in message


def test_missing_split_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", range(10))
    for folder in (tmp_path, tmp_path / "none"):
        message = refused(tg.Tokens, data_config(folder), "val")
        assert "DATA_PATH" in message and str(folder) in message and "fineweb_val_" in message


@pytest.mark.parametrize("length, enough", [(9, True), (10, False), (11, False)])
def test_sequence_longer_than_the_split(tmp_path: Path, length: int, enough: bool) -> None:
    """A sequence of T tokens takes T + 1: the last one is a target only."""
    c = data_config(write_shards(tmp_path, "val", range(6), range(4)), train_seq_len=length)
    if enough:
        assert tg.Tokens(c, "val").total == 10
    else:
        message = refused(tg.Tokens, c, "val")
        for part in (f"TRAIN_SEQ_LEN={length}", str(tmp_path), "10 tokens"):
            assert part in message


def test_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, "train", [0] * 10, [0, 0, 0, 8, 0, 0, 0])
    tokens = tg.Tokens(data_config(folder, vocab_size=8), "train")
    assert tokens.read(0, 13).tolist() == [0] * 13
    message = refused(tokens.read, 9, 5)
    assert str(folder / "fineweb_train_000001.bin") in message
    assert "token 8" in message and "VOCAB_SIZE" in message
    assert tg.Tokens(data_config(folder, vocab_size=9), "train").read(9, 5).tolist() == [
        0,
        0,
        0,
        0,
        8,
    ]


SHARDS = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(max_examples=60)
@given(SHARDS, st.integers(0, 200), st.integers(1, 100))
def test_read_is_a_slice_of_the_endless_stream(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], start: int, count: int
) -> None:
    whole = np.concatenate([*shards, [7, 7]])
    folder = write_shards(tmp_path_factory.mktemp("read"), "train", *shards, [7, 7])
    tokens = tg.Tokens(data_config(folder, train_seq_len=2), "train")
    read = tokens.read(start, count)
    assert read.dtype == torch.int32
    assert read.tolist() == np.take(whole, np.arange(start, start + count), mode="wrap").tolist()


# ---- Batches


# 997 is prime: no batch ends where the data or a shard does.
STREAM = np.random.default_rng(0).permutation(65536)[:997]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(
        tmp_path_factory.mktemp("stream"), "train", *np.split(STREAM, [100, 101, 700])
    )


def batches(folder: Path, rank: int = 0, size: int = 1, **values: Any) -> tg.Batches:
    c = data_config(folder, **dict(train_batch_tokens=64, micro_batch_tokens=64) | values)
    return tg.Batches(tg.Tokens(c, "train"), c, stub_world(rank, size))


def sequences(
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and targets of every sequence of some micro-batches."""
    return [
        (tuple(i), tuple(t))
        for ids, targets in pairs
        for i, t in zip(ids.tolist(), targets.tolist())
    ]


@pytest.mark.parametrize("micro", [4, 8, 12, 16, 20, 64, 1000])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_share_the_batch_out(stream: Path, size: int, micro: int) -> None:
    for step in (0, 3, 20):  # the last one wraps around
        expected = sequences(batches(stream).micro(step))
        ranks = [batches(stream, r, size, micro_batch_tokens=micro) for r in range(size)]
        dealt = [sequences(rank.micro(step)) for rank in ranks]
        assert len({len(part) for part in dealt}) == 1
        everything = [s for part in dealt for s in part]
        assert len(set(everything)) == len(everything) == 16
        assert set(everything) == set(expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [4, 7, 8, 12, 16, 20, 64, 1000])
def test_accumulation_is_the_least_that_fits(stream: Path, size: int, micro: int) -> None:
    b = batches(stream, 0, size, micro_batch_tokens=micro)
    local = 16 // size
    fits = [n for n in range(1, local + 1) if local % n == 0 and local // n * 4 <= micro]
    assert b.accumulation == min(fits)
    parts = list(b.micro(0))
    assert len(parts) == b.accumulation
    for ids, targets in parts:
        assert ids.shape == targets.shape == (local // b.accumulation, 4)
        assert ids.dtype == targets.dtype == torch.int64 and ids.numel() <= micro


@pytest.mark.parametrize("size, micro", [(1, 64), (1, 16), (4, 8), (8, 4)])
def test_steps_go_through_the_stream_in_order(stream: Path, size: int, micro: int) -> None:
    """Every token of an epoch is a target exactly once, up to the batch in which it ends."""
    ranks = [batches(stream, r, size, micro_batch_tokens=micro) for r in range(size)]
    seen = []
    for step in range(2 * 997 // 64):
        for parts in zip(*(b.micro(step) for b in ranks)):
            seen += sequences(parts)
    ids = np.concatenate([ids for ids, _ in seen])
    targets = np.concatenate([targets for _, targets in seen])
    endless = np.tile(STREAM, 3)
    assert (ids == endless[: len(ids)]).all()
    assert (targets == endless[1 : len(ids) + 1]).all()
    assert set(Counter(targets[:997].tolist()).values()) == {1}


def test_batch_that_no_sequence_divides(stream: Path) -> None:
    for tokens in (2, 63, 66):
        message = refused(lambda n: batches(stream, train_batch_tokens=n), tokens)
        assert "TRAIN_SEQ_LEN=4" in message and f"TRAIN_BATCH_TOKENS={tokens}" in message


@pytest.mark.parametrize("size", [3, 5, 32])
def test_ranks_that_do_not_divide_are_told_what_does(stream: Path, size: int) -> None:
    message = refused(lambda: batches(stream, 0, size))
    assert f"WORLD_SIZE={size}" in message and "16 sequences" in message
    assert message.endswith(": 1, 2, 4, 8, 16")


# ---- Byte accounting


# Tokenizers that keep the text, and ones that fold it.
KINDS: dict[str, dict[str, Any]] = {
    "exact": EXACT | dict(add_dummy_prefix=True),
    "no dummy prefix": EXACT | dict(add_dummy_prefix=False),
    "folding": dict(add_dummy_prefix=True),
    "folding, no dummy prefix": dict(add_dummy_prefix=False),
}


class Tokenizer:
    """A SentencePiece model with its file and the tables that are tested."""

    def __init__(self, path: Path, **options: Any) -> None:
        path.write_bytes(tokenizer_bytes(**options))
        self.path, self.sp = path, spm.SentencePieceProcessor(model_file=str(path))
        self.counter = tg.ByteCounter.from_sentencepiece(path, self.sp.vocab_size())

    def count(self, ids: list[int]) -> list[int]:
        """Bytes of every token but the first."""
        stream = torch.tensor(ids)
        return self.counter.count(stream[:-1], stream[1:]).tolist()


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer(tmp_path_factory.mktemp("sp") / "x.model", **KINDS[request.param])


AWKWARD = [" ", "  ", "\n", "x", "the ", "\u65e5", "\u2581", "\U0001f600", "\0"]


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from(AWKWARD), max_size=10).map("".join),
)


@settings(max_examples=80)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_bytes_are_those_of_the_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    """For several documents too, each behind a BOS."""
    documents = [tokenizer.sp.encode(text) for text in texts]
    sizes = [len(tokenizer.sp.decode(ids).encode()) for ids in documents]
    for ids, size in zip(documents, sizes):
        assert sum(tokenizer.count([BOS, *ids])) == size
    assert sum(tokenizer.count([token for ids in documents for token in (BOS, *ids)])) == sum(sizes)


@settings(max_examples=40)
@given(TEXT)
def test_bytes_add_up_along_a_document(tokenizer: Tokenizer, text: str) -> None:
    """Every prefix counts what it decodes to, but for characters that are cut into bytes."""
    ids = tokenizer.sp.encode(text)
    counts = tokenizer.count([BOS, *ids])
    for end in range(1, len(ids) + 1):
        if not any(tokenizer.sp.is_byte(i) for i in ids[:end]):
            assert sum(counts[:end]) == len(tokenizer.sp.decode(ids[:end]).encode())


@pytest.mark.parametrize("kind", ["exact", "no dummy prefix"])
def test_exact_tokenizers_count_the_original_text(tmp_path: Path, kind: str) -> None:
    """Here decoding is not what defines the bytes: the text itself is, leading spaces included."""
    t = Tokenizer(tmp_path / "x.model", **KINDS[kind])
    for text in (*TEXTS, "   three", "\U0001f600 \u00e9", " ", ""):
        assert sum(t.count([BOS, *t.sp.encode(text)])) == len(text.encode())


def test_special_pieces_stand_for_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.count([BOS, 0, BOS, 2, 3]) == [0] * 4
    assert tokenizer.count([BOS, *range(4, 260)]) == [1] * 256, "byte pieces"


def test_unreadable_tokenizers_are_named(tmp_path: Path) -> None:
    not_a_model = tmp_path / "x.model"
    not_a_model.write_bytes(b"not a model")
    for path in (not_a_model, tmp_path / "none.model", tmp_path):
        message = refused(tg.ByteCounter.from_sentencepiece, path, PIECES)
        assert "TOKENIZER_PATH" in message and str(path) in message and "\n" not in message


def test_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(tokenizer_bytes())
    size = spm.SentencePieceProcessor(model_file=str(path)).vocab_size()
    for other in (size - 1, size + 1, 1024):
        message = refused(tg.ByteCounter.from_sentencepiece, path, other)
        for part in (str(path), f"{size} pieces", f"VOCAB_SIZE={other}"):
            assert part in message
