"""What is exported and how it is scored: widths, clips, GPTQ, codecs; windows, test-time training."""

import functools
import hashlib
import importlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_data import one_thread  # noqa: F401, a fixture for this file too
from test_growing import COMPONENTS, GROWTH, STACK, Written, random_model, run
from torch import Tensor

import train_gpt as tg

GOLDEN = json.loads(Path(__file__).with_name("golden_int8_and_muon.json").read_text())
TINY = dict(
    PRESET="growing_live,tiny",
    MODEL_DIM="64",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    NUM_PRELUDE="1",
    NUM_SHARED="1",
    NUM_CODA="1",
    XSA_LAST_N="1",
    VE_LAST_N="1",
    VE_DIM="8",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    TRAIN_SEQ_LEN="64",
    DTYPE="float32",
    VOCAB_SIZE="64",
    QUANT_SCALE_FLOOR="0",
    QUANT_CLIP="percentile",
    CODEC="zlib",
)
CODECS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
        ),
    )
    for name in tg.CODECS
]


def config_of(**env: str) -> tg.Config:
    return tg.Config.from_env(TINY | env)


def noisy_model(a: tg.Architecture, size: float = 0.1) -> tg.GPT:
    torch.manual_seed(0)
    model = tg.GPT(a, 0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn_like(p))
    return model


# ---- Rounding


@pytest.mark.parametrize("name", GOLDEN["int6"])
def test_int6_agrees_with_reference(name: str) -> None:
    """The published search of the clip, one for the whole matrix."""
    case = GOLDEN["int6"][name]
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(case["shape"])
    w = torch.tensor(0.15 * noise, dtype=torch.float32) * case["scale"]
    config = config_of(QUANT_CLIP="matrix", QUANT_SCALE_FLOOR=str(1 / 127), MATRIX_BITS="6")
    q, step = tg.quantize_rows(w, tg.row_clip(w, 6, config), 6, config.quant_scale_floor)
    assert q.dtype == torch.int8 and step.dtype == torch.float16 and q.abs().max() <= 31
    assert int(q.int().abs().sum()) == case["sum_abs_q"]
    assert step.float().sum().item() == pytest.approx(case["scale_sum"], rel=1e-6)
    error = (tg.dequantize_rows(q, step) - w).square().mean().sqrt().item()
    assert error == pytest.approx(case["rms_error"], rel=1e-6)


def row_errors(w: Tensor, bits: int, config: tg.Config) -> Tensor:
    """Squared error of every row."""
    q, step = tg.quantize_rows(w, tg.row_clip(w, bits, config), bits, config.quant_scale_floor)
    return (tg.dequantize_rows(q, step) - w).double().square().sum(1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([0.0, 1 / 127]),
    st.sampled_from([0.02, 1.0, 30.0]),
    st.integers(0, 10**6),
)
def test_clip_of_rows_is_never_worse_than_none(
    bits: int, rows: int, columns: int, floor: float, size: float, seed: int
) -> None:
    """For every row by itself, against the row's maximum, which is one of those it tries."""
    w = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    by_row = replace(config_of(), quant_clip="row", quant_scale_floor=floor)
    largest = replace(by_row, quant_clip="percentile", quant_clip_percentile=100.0)
    assert (row_errors(w, bits, by_row) <= row_errors(w, bits, largest) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_clip_of_rows_beats_that_of_the_matrix_and_none(bits: int) -> None:
    """Rows of unlike tails: what clips one row best is not what clips another."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=draw)
    w[::2] = w[::2].sign() * w[::2].abs() ** 2.5
    error = {
        clip: row_errors(w, bits, replace(config_of(), quant_clip=clip)).sum().item()
        for clip in ("row", "matrix", "percentile")
    }
    assert error["row"] < 0.99 * error["matrix"] <= 0.99 * error["percentile"]


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_gptq_moves_errors_to_where_they_cancel(bits: int) -> None:
    """Less error at the output than rounding to nearest, for inputs that go together; and on the grid."""
    draw = torch.Generator().manual_seed(bits)
    mixed = torch.randn(48, 48, generator=draw) @ torch.diag(torch.logspace(0, -2, 48))
    x, w = mixed @ torch.randn(48, 500, generator=draw), torch.randn(20, 48, generator=draw)
    q, step = tg.quantize_rows(w, tg.row_clip(w, bits, config_of()), bits, 0.0)
    moved = tg.gptq_rows(w, step.float(), bits, x @ x.T)
    assert moved.dtype == torch.int8 and moved.abs().max() <= 2 ** (bits - 1) - 1
    nearest, better = (((tg.dequantize_rows(n, step) - w) @ x).norm().item() for n in (q, moved))
    assert better < 0.6 * nearest
    closer = (tg.dequantize_rows(q, step) - w).norm() < (tg.dequantize_rows(moved, step) - w).norm()
    assert closer, "nothing is nearer to w itself than rounding"


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_gptq_is_rounding_where_inputs_are_independent(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    """A diagonal sum of x x^T, some of it 0 (an input that is never active)."""
    draw = torch.Generator().manual_seed(seed)
    w, diagonal = torch.randn(rows, columns, generator=draw), torch.rand(columns, generator=draw)
    diagonal[diagonal < 0.2] = 0.0
    step = (w.abs().amax(1) / (2 ** (bits - 1) - 1)).half().float().clamp_min(2**-24)
    levels = 2 ** (bits - 1) - 1
    nearest = torch.round(w / step[:, None]).clamp(-levels, levels)
    assert torch.equal(tg.gptq_rows(w, step, bits, diagonal.diag()).float(), nearest)


@pytest.mark.parametrize("name", ["everything", "everything on T", "LN scale, Output-LN"])
def test_calibration_sums_over_passes_and_micro_batches(name: str) -> None:
    """Every matrix's sum of x x^T against the inputs it has in the stack written out in float64."""
    a = tg.Architecture(**STACK | COMPONENTS[name] | dict(eval_passes=3))
    exact, model, written = random_model(a), tg.GPT(a), {}
    model.load_state_dict(exact.state_dict())
    batches = [
        torch.randint(2, 64, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(5)
    ]
    asked: list[int] = []

    def micro(step: int) -> object:
        asked.append(step)
        yield from ((ids, ids) for ids in (batches[2 * (step - 7)], batches[2 * (step - 7) + 1]))

    trainer = object.__new__(tg.Trainer)
    trainer.config, trainer.world, trainer.model = (
        replace(config_of(), gptq_batches=3),
        tg.World({}),
        model,
    )
    trainer.batches = SimpleNamespace(micro=micro)
    lines: list[str] = []
    sums, seconds = trainer.calibrate(7, lines.append)
    assert asked == [7, 8] and seconds > 0 and lines[0].startswith("gptq_calibration batches:3 ")
    reference = Written(exact, a, tg.Mode(3))
    for ids in batches[:3]:
        for row in ids.tolist():
            reference.hidden(row)
    written = {key: sum(x.T @ x for x in xs) for key, xs in reference.fed.items()}
    matrices = {key for key, p in model.named_parameters() if "matrix" in p.role}
    assert set(sums) == set(written) == matrices
    for key in matrices:
        assert (sums[key] - written[key]).norm() <= 1e-3 * written[key].norm(), key
    counts = {key: sum(map(len, xs)) for key, xs in reference.fed.items()}
    assert counts["attn.2.qkv.weight"] == 3 * counts["attn.0.qkv.weight"] == 3 * 3 * 48
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert trainer.calibrate(7, lines.append)[0] and len(lines) == 2


def test_no_calibration_unless_asked() -> None:
    trainer = object.__new__(tg.Trainer)
    trainer.config, trainer.world = replace(config_of(), gptq_batches=0), tg.World({})
    trainer.model, lines = noisy_model(config_of().architecture()), []
    trainer.batches = SimpleNamespace(micro=lambda step: iter([1 / 0]))
    assert trainer.calibrate(0, lines.append)[0] == {} and not lines


# ---- Artifact


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", [6, 4])
def test_every_codec_round_trips(bits: int, codec: str) -> None:
    check_round_trip(bits, codec)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_round_trips(bits: int) -> None:
    check_round_trip(bits, "zlib")


def check_round_trip(bits: int, codec: str) -> None:
    """Exactly what was rounded comes back; the core has a width of its own."""
    core_bits = 2 + (bits + 1) % 7
    config = config_of(
        MATRIX_BITS=str(bits), CORE_BITS=str(core_bits), EMBED_BITS=str(bits), CODEC=codec
    )
    model = noisy_model(config.architecture())
    data = tg.pack(model, config)
    loaded, architecture, kind = tg.load_model(data, "memory")
    assert (
        architecture == config.architecture()
        and set(kind.split("+")[0].split("/")) == {f"int{bits}", f"int{core_bits}"}
        and kind.endswith(f"+{codec}")
    )
    widths = {"matrix": bits, "core matrix": core_bits}
    for (name, p), near in zip(model.named_parameters(), loaded.parameters()):
        width = widths.get(p.role, bits if tg.ROLES[p.role].bits else 0)
        if width:
            levels = 2 ** (width - 1) - 1
            step = (p.detach().abs().amax(1, keepdim=True) / levels).half().float()
            half = (
                0.57 if width == 8 else 0.51
            )  # the step of 8 bits becomes float16 after the rounding
            assert ((near - p).abs() <= half * step).all(), name
            assert all(len(row.unique()) <= 2 * levels + 1 for row in near.detach()), name
        else:
            assert torch.equal(near, p.detach().half().float()), name
    assert tg.pack(loaded, config) == tg.pack(loaded, config)


def test_fewer_bits_are_fewer_bytes() -> None:
    model = noisy_model(config_of().architecture())
    sizes = [len(tg.pack(model, config_of(MATRIX_BITS=str(bits)))) for bits in range(2, 9)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("fits", [8, 5])
def test_most_bits_that_fit(fits: int) -> None:
    """MATRIX_BITS=0; the core keeps a width of its own, and the limit is on script and artifact together."""
    free = config_of(MATRIX_BITS="0", CORE_BITS="3", QAT_LR_FACTOR="0", QAT_CORE_ONLY="0")
    model, script = noisy_model(free.architecture()), len(tg.source())
    data = {bits: tg.pack(model, replace(free, matrix_bits=bits), {}) for bits in range(2, 9)}
    above = len(data[fits + 1]) - 1 if fits < 8 else len(data[8])
    for limit in (len(data[fits]), above):
        lines: list[str] = []
        packed = tg.pack_to_fit(
            model, replace(free, size_limit_bytes=script + limit), {}, lines.append
        )
        assert packed == data[fits] and len(lines) == 9 - fits
        assert f"total:{script + len(packed)} bytes" in lines[-1]
    lines = []
    none = tg.pack_to_fit(model, replace(free, size_limit_bytes=script), {}, lines.append)
    assert none == data[2] and len(lines) == 7, "what does not fit at all is the smallest"
    kept = replace(free, matrix_bits=7, size_limit_bytes=script)
    assert tg.pack_to_fit(model, kept, {}, lines.append) == data[7], "a width that is given is kept"


def artifact(codec: bytes, length: int, body: bytes) -> bytes:
    rest = struct.pack("<8sQ", codec, length) + body
    return tg.MAGIC["artifact"] + hashlib.sha256(rest).digest() + rest


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("announced", [64, 1 << 20])
def test_a_bomb_is_refused_before_it_goes_off(codec: str, announced: int) -> None:
    """A small artifact that unpacks to 96 MiB where its header announces few bytes."""
    fast = {"zlib": dict(level=1), "lzma": dict(preset=0), "brotli": dict(quality=1)}[codec]
    body = importlib.import_module(codec).compress(bytes(96 << 20), **fast)
    data = artifact(codec.encode(), announced, body)
    assert len(data) < 1 << 20
    tracemalloc.start()
    before = resident("VmRSS", forget=True)
    with pytest.raises(tg.InputError, match="memory is not a valid artifact"):
        tg.load_model(data, "memory")
    allocated, grown = tracemalloc.get_traced_memory()[1], resident("VmHWM") - before
    tracemalloc.stop()
    assert allocated < 24 << 20 and grown < 48 << 20
    assert len(tg.code(codec, 1, body, announced)) <= 2 * announced + (
        1 << 17
    )  # brotli stops between blocks


def resident(what: str, forget: bool = False) -> int:
    """Bytes of this process in memory: VmRSS, now, or VmHWM, the most since a call with `forget`; 0 where the
    system does not tell."""
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(what))


@pytest.mark.parametrize("codec", ["this", "os", "../zlib", "", "zlib\0x", "\xff"])
def test_an_artifact_cannot_name_a_module(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the codecs; nothing else is imported."""
    sys.modules.pop("this", None)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(tg.InputError, match="memory is not a valid artifact"):
        tg.load_model(artifact(codec.encode("latin-1"), 64, zlib.compress(bytes(64))), "memory")
    assert "this" not in sys.modules


def test_another_codecs_body_is_refused() -> None:
    for codec, body in (("lzma", zlib.compress(bytes(64))), ("zlib", b"\x00" * 20), ("zlib", b"")):
        with pytest.raises(tg.InputError, match="memory is not a valid artifact"):
            tg.load_model(artifact(codec.encode(), 64, body), "memory")


def test_a_codec_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    with pytest.raises(
        tg.InputError, match="brotli is not installed or too old: pip install -U brotli"
    ):
        tg.code("brotli", 0, b"")
    with pytest.raises(tg.InputError, match="brotli is not installed"):
        tg.load_model(artifact(b"brotli", 64, b"x"), "memory")


# ---- Windows


class Stream:
    """A split whose token at position i is i; to read beyond its end would be a mistake."""

    def __init__(self, total: int) -> None:
        self.total = total

    def read(self, start: int, count: int) -> Tensor:
        assert start >= 0 and start + count <= self.total and count > 0
        return torch.arange(start, start + count, dtype=torch.int32)


def scorer_of(total: int, length: int, batch: int, rank: int = 0, size: int = 1) -> tg.Scorer:
    scorer = object.__new__(tg.Scorer)
    scorer.world = SimpleNamespace(
        rank=rank, size=size, device=torch.device("cpu"), sum_=lambda x: x
    )
    scorer.tokens, scorer.length, scorer.targets, scorer.batch = (
        Stream(total),
        length,
        total - 1,
        batch,
    )
    scorer.counter = SimpleNamespace(count=lambda before, token: torch.ones_like(token))
    return scorer


SPLITS = st.tuples(
    st.sampled_from([(8, 8), (8, 4), (8, 1), (6, 2), (12, 3), (1, 1), (5, 5)]),
    st.integers(2, 90),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 4),
)


@settings(max_examples=300, deadline=None)
@given(SPLITS)
def test_every_target_is_scored_once_with_context(split: tuple) -> None:
    """For any length, stride, batch and number of ranks, chunk by chunk; with T - stride tokens before it."""
    (length, stride), total, batch, ranks, per_chunk = split
    assume(total > length)
    size, scored = per_chunk * length, []
    for rank in range(ranks):
        scorer = scorer_of(total, length, batch, rank, ranks)
        chunks = scorer.chunks(stride, size)
        assert len(chunks) == -(-(total - 1) // size)
        for i, windows in enumerate(chunks):
            for ids, targets in scorer.windows(windows, stride):
                assert ids.shape == targets.shape == (batch, length), (
                    "another shape would be another graph"
                )
                for row, column in (targets >= 0).nonzero().tolist():
                    position = targets[row, column].item()
                    context = ids[row, : column + 1].tolist()
                    assert context == list(range(position - column - 1, position))
                    assert len(context) >= min(position, length - stride + 1)
                    assert (position - 1) // size == i, "a target that is scored with another chunk"
                    scored.append(position)
    assert sorted(scored) == list(range(1, total))
    if ranks == 1:
        assert scored == sorted(scored)


@settings(max_examples=60, deadline=None)
@given(SPLITS)
def test_score_weighs_every_target_alike(split: tuple) -> None:
    """A model whose loss is a known function of the target: mean, counts and bits of the whole split."""
    (length, stride), total, batch, _, _ = split
    assume(total > length)

    def model(ids: Tensor, targets: Tensor) -> Tensor:
        return (targets[targets >= 0].double() ** 2).mean()

    score = scorer_of(total, length, batch).score(model, stride)
    expected = sum(t**2 for t in range(1, total)) / (total - 1)
    assert score.val_loss == pytest.approx(expected, rel=1e-9)
    assert score.val_tokens == score.val_bytes == total - 1
    assert score.val_bpb == pytest.approx(expected / np.log(2), rel=1e-9)
    assert scorer_of(total, length, batch).score(model, 0).val_loss == pytest.approx(
        expected, rel=1e-9
    )


# ---- Test-time training


class Split(Stream):
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


@functools.cache
def plain_losses() -> Tensor:
    """Those of `text()` with test-time training."""
    return score_with(text(), 16)[1]


def score_with(
    ids: Tensor, stride: int, batch: int = 3, learn: bool = True, **env: str
) -> tuple[tg.Score, Tensor]:
    """Score of a split, and the loss of each of its targets, by a fresh model; TTT if `learn`."""
    config = config_of(**TTT | env)
    model, seen = noisy_model(config.architecture(), 0.05), []

    def keep(ids: Tensor, targets: Tensor) -> Tensor:
        x = model.hidden(ids, model.scoring)[0]
        logits = 30 * torch.tanh(x @ model.tok_emb.T / 30)
        seen.append(F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="none"))
        return seen[-1].mean()

    scorer = scorer_of(len(ids), config.train_seq_len, batch)
    scorer.tokens = Split(ids)
    learner = tg.Learner(model, config, tg.World({})) if learn else None
    return scorer.score(keep, stride, learner), torch.cat(seen)


def text(count: int = 700, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (count,), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("stride", [16, 64])
def test_learning_rate_zero_is_the_sliding_score(stride: int) -> None:
    still, moving = (
        score_with(text(), stride, batch=1, learn=learn, TTT_LR=lr)[0]  # the same sums
        for learn, lr in ((False, "0.05"), (True, "1e-30"))
    )
    assert still.val_loss == pytest.approx(moving.val_loss, abs=1e-9) and still[2:4] == moving[2:4]
    assert abs(score_with(text(), stride)[0].val_loss - still.val_loss) > 1e-4, (
        "and 0.05 is another"
    )


@pytest.mark.parametrize("place", [1, 127, 128, 129, 130, 257, 640, 699])
def test_nothing_is_scored_after_it_was_learnt_from(place: int) -> None:
    """Another token at `place` changes no loss of a target before it: not by way of weights either. It does
    change its own, and those of targets behind, by context and by what is learnt."""
    other = text()
    other[place] = 2 + (other[place] - 1) % 62
    losses = plain_losses(), score_with(other, 16)[1]
    assert torch.equal(
        losses[0][: place - 1], losses[1][: place - 1]
    )  # the target at p is the one at p - 1
    assert losses[0][place - 1] != losses[1][place - 1]
    if place <= 512:  # targets two windows on, that only see it through the weights
        far = 128 * ((place - 1) // 128 + 2)
        assert not torch.equal(losses[0][far:], losses[1][far:])


def test_the_flip_test_would_find_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer that learns from a chunk before it scores it."""

    def early(scorer: tg.Scorer, model: object, stride: int, learner: tg.Learner) -> None:
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
    losses = [
        score_with(x, 16)[1] for x in (text(), other)
    ]  # not the cached ones, of the scorer as it is
    assert not torch.equal(losses[0][:127], losses[1][:127])


def test_learning_lowers_the_loss_where_text_repeats() -> None:
    ids = text(32).repeat(40)
    (fixed, before), (learnt, after) = (score_with(ids, 64, learn=learn) for learn in (False, True))
    assert learnt.val_loss < 0.9 * fixed.val_loss
    assert torch.equal(before[:128], after[:128]), (
        "the first chunk is scored before anything is learnt"
    )


def test_learner_is_sgd_with_momentum_clip_and_cosine() -> None:
    """Two chunks of two epochs against the updates written out."""
    config = config_of(**TTT | dict(TTT_GRAD_CLIP="0.2", TTT_MOMENTUM="0.8"))
    model, copy = (noisy_model(config.architecture(), 0.05) for _ in range(2))
    learner, params = tg.Learner(model, config, tg.World({})), list(copy.parameters())
    velocity = [torch.zeros_like(p) for p in params]
    for chunk, done in ((text(129, 1), 0.25), (text(129, 2), 0.5)):
        learner.learn(chunk, done)
        lr = 0.05 * (1 + np.cos(np.pi * done)) / 2
        for _ in range(2):
            copy.zero_grad()
            copy(chunk[:-1].view(2, 64), chunk[1:].view(2, 64)).backward()
            size = torch.cat([p.grad.flatten() for p in params]).norm().item()
            assert size > 0.2
            for p, v in zip(params, velocity):
                v.mul_(0.8).add_(p.grad * 0.2 / (size + 1e-6))
                p.data.sub_(lr * v)
    for (name, p), other in zip(model.named_parameters(), params):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-5, msg=name)


def test_the_last_chunk_is_not_learnt_and_the_rate_falls_to_its_end() -> None:
    seen: list[tuple[int, float]] = []
    learn = lambda tokens, done: seen.append((len(tokens), done))  # noqa: E731
    learner = SimpleNamespace(config=config_of(**TTT), learn=learn)
    scorer_of(700, 64, 3).score(lambda ids, targets: torch.tensor(1.0), 16, learner)
    assert seen == [(129, pytest.approx(i / 5)) for i in range(5)], (
        "five of six chunks: the sixth has lr 0"
    )


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
def trained(corpus: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Artifact and result of a short run that calibrated GPTQ and chose its width by itself."""
    folder = tmp_path_factory.mktemp("trained")
    env = {"MATRIX_BITS": "0", "QAT_FRACTION": "0", "QAT_CORE_ONLY": "0", "GPTQ_BATCHES": "2"}
    result = run(corpus | RUN | EVAL | env, folder)
    return folder / "run" / tg.ARTIFACT, result


def check_modes(result: dict, *modes: str) -> None:
    """These scores and no others, each of every target, and each another one."""
    scores = [result[name] for name in modes]
    assert [name for name in ("roundtrip", "sliding", "ttt") if name in result] == list(modes)
    assert all(score["val_tokens"] == 5_000 and np.isfinite(score["val_bpb"]) for score in scores)
    assert len({score["val_bytes"] for score in scores}) == 1
    assert len({score["val_loss"] for score in scores}) == len(modes)


def test_a_run_scores_its_artifact(trained: tuple[Path, dict]) -> None:
    path, result = trained
    check_modes(result, "roundtrip", "ttt")  # test-time training slides, too
    log = (path.parent / "train.log").read_text().split("=" * 100)[-1]
    for name in ("roundtrip", "ttt"):
        assert f"final_int8_lzma_{name}_exact val_loss:{result[name]['val_loss']:.8f}" in log
    assert "gptq_calibration batches:2" in log and "packed matrix_bits:8 codec:lzma" in log
    assert log.index("Total submission size") < log.index("final_int8_lzma_roundtrip"), (
        "before the scores"
    )


def test_eval_only_scores_an_artifact_again(
    trained: tuple[Path, dict], corpus: dict, tmp_path: Path
) -> None:
    """The same figures to the last digit; by each mode; and with more passes, other ones."""
    path, before = trained
    env = corpus | {"EVAL_ONLY": str(path), "VAL_BATCH_SIZE": "4096", "MICRO_BATCH_TOKENS": "2048"}
    ttt = run(env | EVAL, tmp_path)
    check_modes(ttt, "roundtrip", "ttt")
    assert ttt["artifact_sha256"] == before["artifact_sha256"] and ttt["config"]["eval_passes"] == 0
    for name in ("roundtrip", "ttt"):
        assert ttt[name]["val_loss"] == pytest.approx(before[name]["val_loss"], abs=1e-9)
    sliding = run(env | {"EVAL_STRIDE": "16", "RUN_ID": "sliding"}, tmp_path)
    check_modes(sliding, "roundtrip", "sliding")
    plain = run(env | {"RUN_ID": "plain"}, tmp_path)
    check_modes(plain, "roundtrip")
    assert (
        plain["roundtrip"]["val_loss"]
        == sliding["roundtrip"]["val_loss"]
        == ttt["roundtrip"]["val_loss"]
    )
    assert sliding["sliding"]["val_loss"] != ttt["ttt"]["val_loss"]
    for more in ({"EVAL_STRIDE": "16"}, EVAL):
        deeper = run(env | more | {"EVAL_PASSES": "4", "RUN_ID": f"deeper{len(more)}"}, tmp_path)
        check_modes(deeper, "roundtrip", "ttt" if "TTT_LR" in more else "sliding")
        assert deeper["config"]["eval_passes"] == 4
        assert deeper["roundtrip"]["val_loss"] != plain["roundtrip"]["val_loss"]


def test_two_ranks_score_as_one(trained: tuple[Path, dict], corpus: dict, tmp_path: Path) -> None:
    """With test-time training, whose gradients are averaged over all ranks."""
    path, before = trained
    known = {f.name.upper() for f in fields(tg.Config)}
    clean = {name: value for name, value in os.environ.items() if name not in known}
    env = corpus | EVAL | {"EVAL_ONLY": str(path), "LOG_DIR": str(tmp_path), "RUN_ID": "two"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tg.__file__]
    done = subprocess.run(
        [sys.executable, *torchrun],
        env=clean | env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    check_modes(result, "roundtrip", "ttt")
    assert result["world_size"] == 2
    for name in ("roundtrip", "ttt"):
        assert result[name]["val_loss"] == pytest.approx(before[name]["val_loss"], abs=1e-5)
