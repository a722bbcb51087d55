"""Scoring: every target once with its context; sliding windows, test-time training, EVAL_ONLY."""

import functools
import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F
from helpers import (
    EXACT,
    GROWING,
    GROWTH,
    HANG,
    ON_CPU,
    ManualTime,
    data_config,
    fork_ranks,
    log_of,
    noisy_model,
    one_rank,
    refused,
    run_here,
    stub_world,
    tokenizer_bytes,
    write_manifest,
    write_shards,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt as tg

# ---- A split on any number of ranks


LENGTH = 16


class Validation:
    """A validation split of distinct tokens, so that every position is told from every other."""

    def __init__(self, folder: Path, total: int) -> None:
        self.path = folder / "x.model"
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(tokenizer_bytes(**EXACT, add_dummy_prefix=True))
        self.sp = spm.SentencePieceProcessor(model_file=str(self.path))
        assert total <= self.sp.vocab_size()
        self.tokens = np.random.default_rng(total).permutation(self.sp.vocab_size())[:total]
        data = write_shards(folder / str(total), "val", *np.array_split(self.tokens, 3))
        write_manifest(data, self.path)
        self.config = data_config(
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
            if 4 <= token < 260:
                total += 1
            elif token >= 260:
                total += len(piece.replace("\u2581", " ").encode())
                if piece[0] == "\u2581" and before < 4:  # a space that the tokenizer put there
                    total -= 1
        return total

    def nats(self) -> float:
        return float(loss_of(self.tokens[:-1], self.tokens[1:]).sum())


def loss_of(ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return 0.5 + (7 * ids + 3 * targets) % 11 / 10


class Recorder:
    """A model of known losses that keeps what it was asked."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        self.shapes.append(tuple(ids.shape))
        assert ids.shape == targets.shape
        real = targets >= 0
        assert set(targets[~real].tolist()) <= {-100}
        i, t = ids[real].numpy(), targets[real].numpy()
        self.pairs += zip(i.tolist(), t.tolist())
        return torch.tensor(loss_of(i, t).mean())


def score_on_ranks(c: tg.Config, size: int) -> tuple[list[tg.Score], list[Recorder]]:
    """All ranks in threads, with a sum over ranks that waits for everyone, as all-reduce does."""
    barrier = threading.Barrier(size)
    shared: dict[int, Tensor] = {}
    scores: dict[int, tg.Score] = {}
    recorders = [Recorder() for _ in range(size)]

    def work(rank: int) -> None:
        def all_reduce(x: Tensor) -> Tensor:
            shared[rank] = x.clone()
            barrier.wait(HANG)
            return x.copy_(torch.stack([shared[r] for r in range(size)]).sum(0))

        scores[rank] = tg.Scorer(c, stub_world(rank, size, all_reduce)).score(recorders[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [scores[rank] for rank in range(size)], recorders


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.mark.bits
@settings(max_examples=40)
@given(st.integers(LENGTH + 1, 300), st.sampled_from([1, 2, 3, 8]), st.integers(1, 400))
def test_every_target_is_scored_once(
    split_folder: Path, total: int, size: int, val_batch: int
) -> None:
    split = Validation(split_folder, total)
    scores, recorders = score_on_ranks(replace(split.config, val_batch_size=val_batch), size)
    pairs = [pair for recorder in recorders for pair in recorder.pairs]
    assert Counter(pairs) == Counter(zip(split.tokens[:-1].tolist(), split.tokens[1:].tolist()))
    shapes = {shape for recorder in recorders for shape in recorder.shapes}
    assert len(shapes) == 1, "would compile twice"
    assert len({score[:4] for score in scores}) == 1, "ranks disagree"
    score = scores[0]
    assert (score.val_tokens, score.val_bytes) == (total - 1, split.text_bytes())
    assert score.val_loss == pytest.approx(split.nats() / (total - 1), rel=1e-12)
    assert score.val_bpb == pytest.approx(
        split.nats() / math.log(2) / split.text_bytes(), rel=1e-12
    )


@pytest.mark.parametrize("total", [17, 32, 33, 34, 48, 49, 250])
def test_windows_at_their_edges(split_folder: Path, total: int) -> None:
    split = Validation(split_folder, total)
    (score,), (recorder,) = score_on_ranks(replace(split.config, val_batch_size=3 * LENGTH), 1)
    assert len(recorder.pairs) == score.val_tokens == total - 1
    windows, width = math.ceil((total - 1) / LENGTH), recorder.shapes[0][0]
    assert width <= 3 and recorder.shapes == [(width, LENGTH)] * math.ceil(windows / width)


@pytest.mark.parametrize("size", [1, 3])
def test_batch_is_no_larger_than_a_rank_s_share(split_folder: Path, size: int) -> None:
    """A small split is no work of VAL_BATCH_SIZE."""
    config = replace(Validation(split_folder, 250).config, val_batch_size=10**6)
    _, recorders = score_on_ranks(config, size)
    for recorder in recorders:
        assert recorder.shapes == [(math.ceil(16 / size), LENGTH)]


def test_score_of_a_real_model_is_its_mean_loss(split_folder: Path) -> None:
    """Any batch size, tail included, gives the mean over all targets of the model's own losses."""
    split = Validation(split_folder, 250)
    size: Any = dict(model_dim=32, num_heads=4, num_kv_heads=2)
    model = tg.GPT(replace(split.config.architecture(), **size, dtype="float32"), 0.5)
    forward = functools.partial(model, mode=model.scoring)
    ids, total = torch.from_numpy(split.tokens), 0.0
    for start in range(0, 249, LENGTH):
        span = ids[start : start + LENGTH + 1]
        total += forward(span[None, :-1], span[None, 1:]).item() * (len(span) - 1)
    for val_batch in (1, 5 * LENGTH, 300):
        config = replace(split.config, val_batch_size=val_batch)
        score = tg.Scorer(config, stub_world()).score(forward)
        assert score.val_loss == pytest.approx(total / 249, rel=1e-6)


def test_validation_beyond_the_vocabulary_is_refused(split_folder: Path, tmp_path: Path) -> None:
    split = Validation(split_folder, 50)
    size = split.sp.vocab_size()
    folder = write_shards(tmp_path, "val", [0] * 40, [0] * 5 + [size])
    message = refused(tg.Scorer, replace(split.config, data_path=str(folder)), stub_world())
    assert str(folder / "fineweb_val_000001.bin") in message and f"token {size}" in message


# ---- Windows


TINY = GROWING | dict(VOCAB_SIZE="64", TRAIN_SEQ_LEN="64", QUANT_SCALE_FLOOR="0")


def config_of(**env: str) -> tg.Config:
    return tg.Config.from_env(TINY | env)


class Stream:
    """A split whose token at position i is i; to read beyond its end would be a mistake."""

    def __init__(self, total: int) -> None:
        self.total = total

    def read(self, start: int, count: int) -> Tensor:
        assert start >= 0 and start + count <= self.total and count > 0
        return torch.arange(start, start + count, dtype=torch.int32)


def scorer_of(total: int, length: int, batch: int, rank: int = 0, size: int = 1) -> tg.Scorer:
    """Of a split of `total` tokens and `batch` windows at a time; every target is one byte."""
    scorer = object.__new__(tg.Scorer)
    tokens: Any = Stream(total)
    counter: Any = SimpleNamespace(count=lambda before, token: torch.ones_like(token))
    scorer.world, scorer.tokens, scorer.counter = stub_world(rank, size), tokens, counter
    scorer.length, scorer.targets, scorer.batch = length, total - 1, batch
    return scorer


SPLITS = st.tuples(
    st.sampled_from([(8, 8), (8, 4), (8, 1), (6, 2), (12, 3), (1, 1), (5, 5)]),
    st.integers(2, 90),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 4),
)


@settings(max_examples=300)
@given(SPLITS)
def test_every_target_is_scored_once_with_context(split: Any) -> None:
    """For any length, stride, batch, number of ranks, chunk; T - stride tokens before it."""
    (length, stride), total, batch, ranks, per_chunk = split
    assume(total > length)
    size = per_chunk * length
    scored: list[int] = []
    for rank in range(ranks):
        scorer = scorer_of(total, length, batch, rank, ranks)
        chunks = scorer.chunks(stride, size)
        assert len(chunks) == -(-(total - 1) // size)
        for i, windows in enumerate(chunks):
            for ids, targets in scorer.windows(windows, stride):
                assert ids.shape == targets.shape == (batch, length), "would be another graph"
                for row, column in (targets >= 0).nonzero().tolist():
                    position = int(targets[row, column])
                    context = ids[row, : column + 1].tolist()
                    assert context == list(range(position - column - 1, position))
                    assert len(context) >= min(position, length - stride + 1)
                    assert (position - 1) // size == i, "a target that is scored with another chunk"
                    scored.append(position)
    assert sorted(scored) == list(range(1, total))
    if ranks == 1:
        assert scored == sorted(scored)


@settings(max_examples=60)
@given(SPLITS)
def test_score_weighs_every_target_alike(split: Any) -> None:
    """A model whose loss is a known function of the target: mean, counts and bits of a split."""
    (length, stride), total, batch, _, _ = split
    assume(total > length)

    def model(ids: Tensor, targets: Tensor) -> Tensor:
        return (targets[targets >= 0].double() ** 2).mean()

    score = scorer_of(total, length, batch).score(model, stride)
    expected = sum(t**2 for t in range(1, total)) / (total - 1)
    assert score.val_loss == pytest.approx(expected, rel=1e-9)
    assert score.val_tokens == score.val_bytes == total - 1
    assert score.val_bpb == pytest.approx(expected / np.log(2), rel=1e-9)
    contiguous = scorer_of(total, length, batch).score(model, 0)
    assert contiguous.val_loss == pytest.approx(expected, rel=1e-9)


# ---- Test-time training


class TextStream(Stream):
    """A split of given tokens."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__(len(ids))
        self.ids = ids

    def read(self, start: int, count: int) -> Tensor:
        super().read(start, count)
        return self.ids[start : start + count].int()


TTT = dict(
    TTT_LR="0.05", TTT_CHUNK_TOKENS="128", TTT_EPOCHS="2", EVAL_STRIDE="16", BIGRAM_VOCAB_SIZE="16"
)


def learner_of(model: tg.GPT, config: tg.Config) -> tg.Learner:
    forward = functools.partial(model, mode=model.scoring)
    return tg.Learner(model, forward, config, one_rank())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_chunk_is_laid_out_as_the_warm_up_was(rank: int) -> None:
    """A graph is of strides, too: another one would be compiled while evaluation's time runs."""
    config = config_of(**TTT)
    model = noisy_model(config.architecture(), 0.05)
    seen: list[tuple[Any, ...]] = []

    def forward(ids: Tensor, targets: Tensor) -> Tensor:
        seen.append((ids.shape, ids.stride(), targets.shape, targets.stride()))
        return model(ids, targets, model.scoring)

    learner = tg.Learner(model, forward, config, stub_world(rank, 2))
    learner.warm_up()
    learner.learn(text(config.ttt_chunk_tokens + 1).long(), 0.0)
    assert len(seen) > 1 and len(set(seen)) == 1, seen


@functools.cache
def plain_losses() -> Tensor:
    """Those of `text()` with test-time training."""
    return score_with(text(), 16)[1]


def score_with(
    ids: Tensor, stride: int, batch: int = 3, learn: bool = True, **env: str
) -> tuple[tg.Score, Tensor]:
    """Score of a split, and the loss of each of its targets, by a fresh model; TTT if `learn`."""
    config = config_of(**TTT | env)
    model = noisy_model(config.architecture(), 0.05)
    seen: list[Tensor] = []

    def keep(ids: Tensor, targets: Tensor) -> Tensor:
        x = model.hidden(ids, model.scoring)[0]
        logits = 30 * torch.tanh(x @ model.tok_emb.T / 30)
        seen.append(F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="none"))
        return seen[-1].mean()

    scorer = scorer_of(len(ids), config.train_seq_len, batch)
    tokens: Any = TextStream(ids)
    scorer.tokens = tokens
    learner = learner_of(model, config) if learn else None
    return scorer.score(keep, stride, learner), torch.cat(seen)


def text(count: int = 700, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.bits
def test_stride_of_a_window_is_the_contiguous_score() -> None:
    (one, mine), (other, theirs) = (score_with(text(), stride, learn=False) for stride in (64, 0))
    assert torch.equal(mine, theirs) and one[:4] == other[:4]
    finer, losses = score_with(text(), 16, learn=False)
    assert finer.val_tokens == one.val_tokens == 699 and finer.val_bytes == one.val_bytes
    assert torch.equal(losses[:64], mine[:64]), "the first window is the same"
    assert not torch.allclose(losses[64:], mine[64:], atol=1e-3)


def test_sliding_is_every_target_in_its_own_window() -> None:
    """Against the model run once for every target, on the window it belongs to."""
    config, ids = config_of(**TTT), text(300)
    model, (_, losses) = noisy_model(config.architecture(), 0.05), score_with(ids, 16, learn=False)
    for target in (0, 1, 63, 64, 79, 80, 200, 298):
        window = 0 if target < 64 else (target - 64) // 16 + 1
        before = ids[window * 16 : target + 1][None]
        with torch.no_grad():
            x = model.hidden(before, model.scoring)[0][0, -1]
            nats = F.cross_entropy(30 * torch.tanh(x @ model.tok_emb.T / 30), ids[target + 1])
        assert losses[target].item() == pytest.approx(nats.item(), abs=1e-4)


@pytest.mark.bits
@pytest.mark.parametrize("stride", [16, 64])
def test_learning_rate_zero_is_the_sliding_score(stride: int) -> None:
    still, moving = (
        score_with(text(300), stride, batch=1, learn=learn, TTT_LR=lr)[0]  # the same sums
        for learn, lr in ((False, "0.05"), (True, "1e-30"))
    )
    assert still.val_loss == pytest.approx(moving.val_loss, abs=1e-9) and still[2:4] == moving[2:4]
    learnt = score_with(text(300), stride)[0]
    assert abs(learnt.val_loss - still.val_loss) > 1e-4, "and 0.05 is another"


@pytest.mark.bits
@pytest.mark.parametrize("place", [1, 127, 128, 129, 130, 257, 640, 699])
def test_nothing_is_scored_after_it_was_learnt_from(place: int) -> None:
    """Another token at `place` changes no loss of a target before it, not through weights either.

    It does change its own, and those of targets behind, by context and by what is learnt.
    """
    other = text()
    other[place] = 2 + (other[place] - 1) % 62
    before, after = plain_losses(), score_with(other, 16)[1]
    own = place - 1  # the first token is no target
    assert torch.equal(before[:own], after[:own]) and before[own] != after[own]
    if place <= 512:  # targets two windows on, that only see it through the weights
        far = 128 * (own // 128 + 2)
        assert not torch.equal(before[far:], after[far:])


def test_the_flip_test_would_find_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer that learns from a chunk before it scores it."""

    def early(scorer: tg.Scorer, model: Any, stride: int, learner: tg.Learner) -> None:
        for i, windows in enumerate(scorer.chunks(stride, 128)):
            count = min(128, scorer.targets - i * 128) // 64 * 64
            if count:
                learner.learn(scorer.tokens.read(i * 128, count + 1).long(), 0.0)
            for batch in scorer.windows(windows, stride):
                with torch.no_grad():
                    model(*batch)

    monkeypatch.setattr(tg.Scorer, "score", early)
    other = text()
    other[128] = 2 + (other[128] - 1) % 62
    losses = [score_with(x, 16)[1] for x in (text(), other)]
    assert not torch.equal(losses[0][:127], losses[1][:127])


@pytest.mark.bits
def test_learning_lowers_the_loss_where_text_repeats() -> None:
    ids = text(32).repeat(40)
    (fixed, before), (learnt, after) = (score_with(ids, 64, learn=learn) for learn in (False, True))
    assert learnt.val_loss < 0.9 * fixed.val_loss
    assert torch.equal(before[:128], after[:128]), "the first chunk: nothing is learnt yet"


def test_learner_is_sgd_with_momentum_clip_and_cosine() -> None:
    """Two chunks of two epochs against the updates written out."""
    config = config_of(**TTT | dict(TTT_GRAD_CLIP="0.2", TTT_MOMENTUM="0.8"))
    model, copy = (noisy_model(config.architecture(), 0.05) for _ in range(2))
    learner, params = learner_of(model, config), list(copy.parameters())
    velocity = [torch.zeros_like(p) for p in params]
    for chunk, done in ((text(129, 1), 0.25), (text(129, 2), 0.5)):
        learner.learn(chunk, done)
        lr = 0.05 * (1 + np.cos(np.pi * done)) / 2
        for _ in range(2):
            copy.zero_grad()
            copy(chunk[:-1].view(2, 64), chunk[1:].view(2, 64), copy.scoring).backward()
            gradients = [p.grad for p in params if p.grad is not None]
            size = torch.cat([g.flatten() for g in gradients]).norm().item()
            assert size > 0.2
            for p, v, g in zip(params, velocity, gradients, strict=True):
                v.mul_(0.8).add_(g * 0.2 / (size + 1e-6))
                p.data.sub_(lr * v)
    for (name, p), other in zip(model.named_parameters(), params):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-5, msg=name)


def test_the_last_chunk_is_not_learnt_and_the_rate_falls_to_its_end() -> None:
    seen: list[tuple[int, float]] = []

    def learn(tokens: Tensor, done: float) -> None:
        seen.append((len(tokens), done))

    learner: Any = SimpleNamespace(config=config_of(**TTT), learn=learn)
    scorer_of(700, 64, 3).score(lambda ids, targets: torch.tensor(1.0), 16, learner)
    expected = [(129, pytest.approx(i / 5)) for i in range(5)]
    assert seen == expected, "five of six chunks: the sixth has a rate of 0"


# ---- Whole runs


RUN = GROWTH | dict(ITERATIONS="6", WARMUP_STEPS="0", TRAIN_SEQ_LEN="32")


EVAL = dict(
    EVAL_STRIDE="16",
    TTT_LR="0.01",
    TTT_CHUNK_TOKENS="1024",
    TTT_EPOCHS="1",
    VAL_BATCH_SIZE="4096",
    MICRO_BATCH_TOKENS="2048",
)


@pytest.fixture(scope="module")
def trained(
    corpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Artifact and result of a short run that calibrated GPTQ and chose its width by itself."""
    folder = tmp_path_factory.mktemp("trained")
    env = {"MATRIX_BITS": "0", "QAT_FRACTION": "0", "QAT_CORE_ONLY": "0", "GPTQ_BATCHES": "2"}
    result = run_here(corpus | RUN | EVAL | env, folder)
    return folder / "run" / tg.ARTIFACT, result


def check_modes(result: dict[str, Any], *modes: str) -> None:
    """These scores and no others, each of every target, and each another one."""
    scores = [result[name] for name in modes]
    assert [name for name in ("roundtrip", "sliding", "ttt") if name in result] == list(modes)
    assert all(score["val_tokens"] == 2_000 and np.isfinite(score["val_bpb"]) for score in scores)
    assert len({score["val_bytes"] for score in scores}) == 1
    assert len({score["val_loss"] for score in scores}) == len(modes)


def test_a_run_scores_its_artifact(trained: tuple[Path, dict[str, Any]]) -> None:
    path, result = trained
    check_modes(result, "roundtrip", "ttt")  # test-time training slides, too
    log = log_of(path.parent)
    for name in ("roundtrip", "ttt"):
        assert f"final_int8_lzma_{name}_exact val_loss:{result[name]['val_loss']:.8f}" in log
    assert "gptq_calibration batches:2" in log and "packed matrix_bits:8 codec:lzma" in log
    size, score = log.index("Total submission size"), log.index("final_int8_lzma_roundtrip")
    assert size < score, "whether it fits is said before it is scored"


def loss_at(passes: int, path: Path, env: Mapping[str, str]) -> float:
    """The loss of an artifact's values in a model that has this EVAL_PASSES."""
    read, a, _ = tg.load_model(path.read_bytes(), str(path))
    model = tg.GPT(replace(a, eval_passes=passes))
    model.load_state_dict(read.state_dict())
    config = replace(tg.Config.from_env(env), **asdict(a))
    scored = functools.partial(model, mode=tg.Mode(passes or a.num_loops))
    return tg.Scorer(config, one_rank()).score(scored).val_loss


def test_warming_up_is_told_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualTime()
    lines: list[str] = []
    monkeypatch.setattr(tg, "time", clock)

    def warm_up(*_: Any) -> None:
        clock.now += 7

    model: Any = SimpleNamespace(scoring=tg.Mode(1))
    scored = tg.Score(1.0, 1.0, 1, 1, 2.0)
    scorer: Any = SimpleNamespace(world=one_rank(), warm_up=warm_up, score=lambda *_: scored)
    config = replace(tg.Config(), eval_stride=16)
    for level, warming in (("model", 14), ("off", 0)):
        compiler: Any = SimpleNamespace(level=level, forward=lambda model: lambda *_, **__: None)
        artifact = tg.Artifact(config, b"", model, "int8+zlib")
        log: Any = lines.append
        assert tg.score_artifact(scorer, artifact, compiler, log).keys() == {"roundtrip", "sliding"}
        assert lines[-1] == f"evaluations time:4000ms warm_up:{1000 * warming}ms (not counted)"


@pytest.mark.bits
def test_eval_only_scores_an_artifact_again(
    trained: tuple[Path, dict[str, Any]], corpus: dict[str, str], tmp_path: Path
) -> None:
    """The same figures to the last digit; by each mode; and with more passes, those of a model."""
    path, before = trained
    env = corpus | {"EVAL_ONLY": str(path), "VAL_BATCH_SIZE": "4096", "MICRO_BATCH_TOKENS": "2048"}
    ttt = run_here(env | EVAL, tmp_path)
    check_modes(ttt, "roundtrip", "ttt")
    assert ttt["artifact_sha256"] == before["artifact_sha256"] and ttt["config"]["eval_passes"] == 0
    for name in ("roundtrip", "ttt"):
        assert ttt[name]["val_loss"] == pytest.approx(before[name]["val_loss"], abs=1e-9)
    sliding = run_here(env | {"EVAL_STRIDE": "16", "RUN_ID": "sliding"}, tmp_path)
    check_modes(sliding, "roundtrip", "sliding")
    plain = run_here(env | {"RUN_ID": "plain"}, tmp_path)
    check_modes(plain, "roundtrip")
    contiguous = [result["roundtrip"]["val_loss"] for result in (plain, sliding, ttt)]
    assert contiguous == contiguous[:1] * 3
    assert sliding["sliding"]["val_loss"] != ttt["ttt"]["val_loss"]
    expected = {passes: loss_at(passes, path, env) for passes in (0, 4)}
    assert expected[0] != expected[4]
    assert plain["roundtrip"]["val_loss"] == pytest.approx(expected[0], abs=1e-9)
    for more in ({"EVAL_STRIDE": "16"}, EVAL):
        deeper = run_here(
            env | more | {"EVAL_PASSES": "4", "RUN_ID": f"deeper{len(more)}"}, tmp_path
        )
        check_modes(deeper, "roundtrip", "ttt" if "TTT_LR" in more else "sliding")
        assert deeper["config"]["eval_passes"] == 4
        assert deeper["roundtrip"]["val_loss"] == pytest.approx(expected[4], abs=1e-9)


def test_an_artifact_counts_with_the_script_of_its_run(
    trained: tuple[Path, dict[str, Any]], corpus: dict[str, str], tmp_path: Path
) -> None:
    """A packed one, say; and a score that its run had and this one has not is named."""
    path, before = trained
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(path, beside)
    small = ON_CPU | {"VAL_BATCH_SIZE": "4096", "MICRO_BATCH_TOKENS": "2048"}
    limit = str(before["bytes_model"] + 5)
    env = corpus | small | {"EVAL_ONLY": str(beside), "SIZE_LIMIT_BYTES": limit}
    for digest, counted in ((before["artifact_sha256"], True), ("another's", False)):
        told = before | {"bytes_code": 5, "artifact_sha256": digest}
        (beside / "result.json").write_text(json.dumps(told))
        config = tg.Config.from_env(env | {"LOG_DIR": str(tmp_path), "RUN_ID": digest})
        assert tg.run(config, one_rank()) == (0 if counted else tg.EXIT_SIZE)
        log = log_of(tmp_path / digest)
        assert ("\nCode size: 5 bytes (of its run's script; this one has " in log) == counted
        scored_with = "a ttt score, with EVAL_STRIDE=16 TTT_LR=0.01 TTT_EPOCHS=1 TTT_CHUNK_TOKENS="
        assert (f"warning: its run also has {scored_with}" in log) == counted


def test_passes_over_a_core_that_an_artifact_lacks_are_refused(tmp_path: Path) -> None:
    config = tg.Config.from_env(dict(PRESET="Ap,tiny", MODEL_DIM="64", NUM_LAYERS="2"))
    path = tmp_path / "flat.ptz"
    path.write_bytes(tg.pack(tg.GPT(config.architecture()), config))
    given = replace(config, eval_passes=2)
    message = refused(tg.read_artifact, path, given, one_rank())
    assert f"EVAL_PASSES=2 cannot act here: {path} has no core" in message
    assert tg.read_artifact(path, config, one_rank()).model


@pytest.mark.bits
def test_two_ranks_score_as_one(
    trained: tuple[Path, dict[str, Any]], corpus: dict[str, str], tmp_path: Path
) -> None:
    """With test-time training, whose gradients are averaged over all ranks."""
    path, before = trained
    env = corpus | EVAL | {"EVAL_ONLY": str(path), "LOG_DIR": str(tmp_path), "RUN_ID": "two"}
    ended = fork_ranks(env, 2)
    assert ended.codes == [0, 0], ended.texts
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    check_modes(result, "roundtrip", "ttt")
    assert result["world_size"] == 2
    for name in ("roundtrip", "ttt"):
        assert result[name]["val_loss"] == pytest.approx(before[name]["val_loss"], abs=1e-5)
