"""Shards, batches, byte counts and scoring: no token lost, none twice, every error names its file."""

import io
import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

BOS, PIECES = 1, 400


def shard_bytes(
    tokens: object, magic: int = 20240520, version: int = 1, count: int | None = None
) -> bytes:
    body = np.asarray(tokens, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(body) if count is None else count
    return header.tobytes() + body.tobytes()


def write_shards(folder: Path, split: str, *shards: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, tokens in enumerate(shards):
        (folder / f"fineweb_{split}_{i:06}.bin").write_bytes(shard_bytes(tokens))
    return folder


def config(folder: Path, **values: object) -> tg.Config:
    return replace(
        tg.Config(), data_path=str(folder), **dict(train_seq_len=4, vocab_size=65536) | values
    )


def world(rank: int = 0, size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        rank=rank, size=size, device=torch.device("cpu"), on_cuda=False, sum_=lambda x: x
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take seconds where another process has the processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refused(job: object, *args: object) -> str:
    with pytest.raises(tg.InputError) as caught:
        job(*args)
    return str(caught.value)


# ---- Shards


@settings(max_examples=30, deadline=None)
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
    message = refused(tg.Tokens, config(folder), split)
    assert str(bad) in message and "\n" not in message


def test_missing_split_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", range(10))
    for folder in (tmp_path, tmp_path / "none"):
        message = refused(tg.Tokens, config(folder), "val")
        assert "DATA_PATH" in message and str(folder) in message and "fineweb_val_" in message


@pytest.mark.parametrize("length, enough", [(9, True), (10, False), (11, False)])
def test_sequence_longer_than_the_split(tmp_path: Path, length: int, enough: bool) -> None:
    """A sequence of T tokens takes T + 1: the last one is a target only."""
    c = config(write_shards(tmp_path, "val", range(6), range(4)), train_seq_len=length)
    if enough:
        assert tg.Tokens(c, "val").total == 10
    else:
        message = refused(tg.Tokens, c, "val")
        assert (
            f"TRAIN_SEQ_LEN={length}" in message
            and str(tmp_path) in message
            and "10 tokens" in message
        )


def test_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, "train", [0] * 10, [0, 0, 0, 8, 0, 0, 0])
    tokens = tg.Tokens(config(folder, vocab_size=8), "train")
    assert tokens.read(0, 13).tolist() == [0] * 13
    message = refused(tokens.read, 9, 5)
    assert str(folder / "fineweb_train_000001.bin") in message
    assert "token 8" in message and "VOCAB_SIZE" in message
    assert tg.Tokens(config(folder, vocab_size=9), "train").read(9, 5).tolist() == [0, 0, 0, 0, 8]


SHARDS = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(0, 200), st.integers(1, 100))
def test_read_is_a_slice_of_the_endless_stream(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], start: int, count: int
) -> None:
    whole = np.concatenate([*shards, [7, 7]])
    folder = write_shards(tmp_path_factory.mktemp("read"), "train", *shards, [7, 7])
    tokens = tg.Tokens(config(folder, train_seq_len=2), "train")
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


def batches(folder: Path, rank: int = 0, size: int = 1, **values: object) -> tg.Batches:
    c = config(folder, **dict(train_batch_tokens=64, micro_batch_tokens=64) | values)
    return tg.Batches(tg.Tokens(c, "train"), c, world(rank, size))


def sequences(pairs: object) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
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
            seen += [s for part in parts for s in sequences([part])]
    ids, targets = (np.concatenate([s[i] for s in seen]) for i in (0, 1))
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

CORPUS = [
    "def f(x):\n    return [x, 'caf\u00e9']  # na\u00efve\n",
    "The quick  brown fox jumps.\n\n",
    "\u65e5\u672c " * 3,
    " leading and trailing ",
    "\ttabs\r\n",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0123456789",
] * 20
EXACT = dict(
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
)
KINDS = {
    "exact": EXACT | dict(add_dummy_prefix=True),
    "no dummy prefix": EXACT | dict(add_dummy_prefix=False),
    "folding": dict(add_dummy_prefix=True),
    "folding, no dummy prefix": dict(add_dummy_prefix=False),
}


def tokenizer_bytes(vocab_size: int = PIECES, **options: object) -> bytes:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        minloglevel=3,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        character_coverage=0.99,
        **options,
    )
    return model.getvalue()


class Tokenizer:
    """A SentencePiece model with its file and the tables that are tested."""

    def __init__(self, path: Path, **options: object) -> None:
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


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_bytes_are_those_of_the_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    """For several documents too, each behind a BOS."""
    documents = [tokenizer.sp.encode(text) for text in texts]
    sizes = [len(tokenizer.sp.decode(ids).encode()) for ids in documents]
    for ids, size in zip(documents, sizes):
        assert sum(tokenizer.count([BOS, *ids])) == size
    assert sum(tokenizer.count([token for ids in documents for token in (BOS, *ids)])) == sum(sizes)


@settings(max_examples=40, deadline=None)
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
    for text in (*CORPUS[:6], "   three", "\U0001f600 \u00e9", " ", ""):
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
        assert (
            str(path) in message
            and f"{size} pieces" in message
            and f"VOCAB_SIZE={other}" in message
        )


# ---- Scoring

LENGTH = 16


class Split:
    """A validation split and what it should score: tokens that tell every position from every other."""

    def __init__(self, folder: Path, total: int) -> None:
        self.path = folder / "x.model"
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(tokenizer_bytes(**KINDS["exact"]))
        self.sp = spm.SentencePieceProcessor(model_file=str(self.path))
        assert total <= self.sp.vocab_size()
        self.tokens = np.random.default_rng(total).permutation(self.sp.vocab_size())[:total]
        data = write_shards(folder / str(total), "val", *np.array_split(self.tokens, 3))
        self.config = config(
            data,
            tokenizer_path=str(self.path),
            vocab_size=self.sp.vocab_size(),
            train_seq_len=LENGTH,
        )

    def text_bytes(self) -> int:
        """The byte rule, one token at a time."""
        total = 0
        for before, token in zip(self.tokens[:-1].tolist(), self.tokens[1:].tolist()):
            piece = self.sp.id_to_piece(token)
            if token >= 260:
                total += len(piece.replace("\u2581", " ").encode()) - (
                    piece[0] == "\u2581" and before < 4
                )
            total += 4 <= token < 260
        return total

    def nats(self) -> float:
        return float(loss_of(self.tokens[:-1], self.tokens[1:]).sum())


def loss_of(ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return 0.5 + (7 * ids + 3 * targets) % 11 / 10


class Recorder:
    """A model of known losses that keeps what it was asked."""

    def __init__(self) -> None:
        self.pairs, self.shapes = [], []

    def __call__(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(ids.shape))
        assert ids.shape == targets.shape
        real = targets >= 0
        assert set(targets[~real].tolist()) <= {-100}
        i, t = ids[real].numpy(), targets[real].numpy()
        self.pairs += zip(i.tolist(), t.tolist())
        return torch.tensor(loss_of(i, t).mean())


def score_on_ranks(c: tg.Config, size: int) -> tuple[list[tg.Score], list[Recorder]]:
    """All ranks in threads, with a sum over ranks that waits for everyone, as all-reduce does."""
    barrier, shared, scores = threading.Barrier(size), [None] * size, [None] * size
    recorders = [Recorder() for _ in range(size)]

    def work(rank: int) -> None:
        def sum_(x: torch.Tensor) -> torch.Tensor:
            shared[rank] = x.clone()
            barrier.wait(30)
            return x.copy_(torch.stack(shared).sum(0))

        w = world(rank, size)
        w.sum_ = sum_
        scores[rank] = tg.Scorer(c, w).score(recorders[rank])

    threads = [threading.Thread(target=work, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return scores, recorders


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@settings(max_examples=40, deadline=None)
@given(st.integers(LENGTH + 1, 300), st.sampled_from([1, 2, 3, 8]), st.integers(1, 400))
def test_every_target_is_scored_once(
    split_folder: Path, total: int, size: int, val_batch: int
) -> None:
    split = Split(split_folder, total)
    scores, recorders = score_on_ranks(replace(split.config, val_batch_size=val_batch), size)
    pairs = [pair for recorder in recorders for pair in recorder.pairs]
    assert Counter(pairs) == Counter(zip(split.tokens[:-1].tolist(), split.tokens[1:].tolist()))
    assert len({shape for recorder in recorders for shape in recorder.shapes}) == 1, (
        "would compile twice"
    )
    assert len({score[:4] for score in scores}) == 1, "ranks disagree"
    score = scores[0]
    assert (score.val_tokens, score.val_bytes) == (total - 1, split.text_bytes())
    assert score.val_loss == pytest.approx(split.nats() / (total - 1), rel=1e-12)
    assert score.val_bpb == pytest.approx(
        split.nats() / math.log(2) / split.text_bytes(), rel=1e-12
    )


@pytest.mark.parametrize("total", [17, 32, 33, 34, 48, 49, 250])
def test_windows_at_their_edges(split_folder: Path, total: int) -> None:
    split = Split(split_folder, total)
    (score,), (recorder,) = score_on_ranks(replace(split.config, val_batch_size=3 * LENGTH), 1)
    assert len(recorder.pairs) == score.val_tokens == total - 1
    windows, width = math.ceil((total - 1) / LENGTH), recorder.shapes[0][0]
    assert width <= 3 and recorder.shapes == [(width, LENGTH)] * math.ceil(windows / width)


@pytest.mark.parametrize("size", [1, 3])
def test_batch_is_no_larger_than_a_rank_s_share(split_folder: Path, size: int) -> None:
    """A small split is scored in the time it takes, not in that of VAL_BATCH_SIZE."""
    _, recorders = score_on_ranks(
        replace(Split(split_folder, 250).config, val_batch_size=10**6), size
    )
    for recorder in recorders:
        assert recorder.shapes == [(math.ceil(16 / size), LENGTH)]


def test_score_of_a_real_model_is_its_mean_loss(split_folder: Path) -> None:
    """Any batch size, tail included, gives the mean over all targets of the model's own losses."""
    split = Split(split_folder, 250)
    a = replace(
        split.config.architecture(), model_dim=32, num_heads=4, num_kv_heads=2, dtype="float32"
    )
    torch.manual_seed(0)
    model = tg.GPT(a, 0.5)
    ids = torch.from_numpy(split.tokens)
    losses = [
        model(ids[i : i + n][None], ids[i + 1 : i + 1 + n][None]).item() * n
        for i in range(0, 249, LENGTH)
        for n in [min(LENGTH, 249 - i)]
    ]
    for val_batch in (1, 5 * LENGTH, 300):
        score = tg.Scorer(replace(split.config, val_batch_size=val_batch), world()).score(model)
        assert score.val_loss == pytest.approx(sum(losses) / 249, rel=1e-6)


def test_validation_beyond_the_vocabulary_is_refused(split_folder: Path, tmp_path: Path) -> None:
    split = Split(split_folder, 50)
    size = split.sp.vocab_size()
    folder = write_shards(tmp_path, "val", [0] * 40, [0] * 5 + [size])
    message = refused(tg.Scorer, replace(split.config, data_path=str(folder)), world())
    assert str(folder / "fineweb_val_000001.bin") in message and f"token {size}" in message
