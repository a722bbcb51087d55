"""Rounding of matrices: the reference's figures, clips, error bounds, GPTQ."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ManualTime, noise_of, noisy_model, one_rank, role_name
from hypothesis import given, settings
from hypothesis import strategies as st
from stack_written_out import COMPONENTS, STACK, Written, exact_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg

pytestmark = pytest.mark.quick
GOLDEN = json.loads(Path(__file__).with_name("golden_int8_and_muon.json").read_text())
DEFAULT = tg.Config()  # percentile clip, no floor

# ---- Rounding to nearest


def int8(w: Tensor, percentile: float, floor: float) -> tuple[Tensor, Tensor]:
    config = replace(DEFAULT, quant_clip_percentile=percentile)
    return tg.quantize_rows(w, tg.row_clip(w, 8, config), 8, floor)


@pytest.mark.parametrize("name", GOLDEN["int8"])
def test_int8_agrees_with_reference(name: str) -> None:
    case = GOLDEN["int8"][name]
    w = noise_of(name, case["shape"]) * case["scale"]
    if name.startswith("spiky"):
        w[::7, 3] *= 30
    q, step = int8(w, 99.99984, 1 / 127)
    assert q.dtype == torch.int8 and step.dtype == torch.float16
    assert int(q.int().abs().sum()) == case["sum_abs_q"]
    assert int((q != 0).sum()) == case["nonzero"]
    assert step.float().sum().item() == pytest.approx(case["scale_sum"], rel=1e-6)
    error = (tg.dequantize_rows(q, step) - w).square().mean().sqrt().item()
    assert error == pytest.approx(case["rms_error"], rel=1e-6)


@settings(max_examples=50)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 1 / 127]),
    st.floats(1e-6, 100),
    st.integers(0, 10**6),
)
def test_int8_error_is_half_a_step(
    rows: int, columns: int, floor: float, size: float, seed: int
) -> None:
    w = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    q, step = int8(w, 100.0, floor)
    error = (tg.dequantize_rows(q, step) - w).abs()
    exact = (w.abs().amax(1) / 127).clamp_min(max(floor, 2**-24))
    slack = 127 * (step.float() - exact).abs()  # the step itself is rounded to float16
    assert (error <= (exact / 2 * 1.001 + slack)[:, None]).all()


def test_rows_of_zeros_and_clipping() -> None:
    w = torch.zeros(2, 1000)
    w[1] = torch.linspace(-1, 1, 1000)
    w[1, 0] = 50.0
    q, step = int8(w, 99.0, 0.0)
    assert (tg.dequantize_rows(q, step)[0] == 0).all()
    assert q[1, 0] == 127 and step[1] < 0.01, "what lies beyond the percentile saturates"


@pytest.mark.parametrize("name", GOLDEN["int6"])
def test_int6_agrees_with_reference(name: str) -> None:
    """The published search of the clip, one for the whole matrix."""
    case = GOLDEN["int6"][name]
    w = noise_of(name, case["shape"]) * case["scale"]
    config = replace(DEFAULT, quant_clip="matrix", quant_scale_floor=1 / 127, matrix_bits=6)
    q, step = tg.quantize_rows(w, tg.row_clip(w, 6, config), 6, config.quant_scale_floor)
    assert q.dtype == torch.int8 and step.dtype == torch.float16 and q.abs().max() <= 31
    assert int(q.int().abs().sum()) == case["sum_abs_q"]
    # Releases of PyTorch interpolate quantiles differently: a float16 step may be its neighbour.
    assert step.float().sum().item() == pytest.approx(case["scale_sum"], rel=2e-5)
    error = (tg.dequantize_rows(q, step) - w).square().mean().sqrt().item()
    assert error == pytest.approx(case["rms_error"], rel=2e-5)


# ---- Where a row saturates


def row_errors(w: Tensor, bits: int, config: tg.Config) -> Tensor:
    """Squared error of every row."""
    q, step = tg.quantize_rows(w, tg.row_clip(w, bits, config), bits, config.quant_scale_floor)
    return (tg.dequantize_rows(q, step) - w).double().square().sum(1)


@settings(max_examples=60)
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
    by_row = replace(DEFAULT, quant_clip="row", quant_scale_floor=floor)
    largest = replace(by_row, quant_clip="percentile", quant_clip_percentile=100.0)
    assert (row_errors(w, bits, by_row) <= row_errors(w, bits, largest) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_clip_of_rows_beats_that_of_the_matrix_and_none(bits: int) -> None:
    """Rows of unlike tails: what clips one row best is not what clips another."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=draw)
    w[::2] = w[::2].sign() * w[::2].abs() ** 2.5
    error = {
        clip: row_errors(w, bits, replace(DEFAULT, quant_clip=clip)).sum().item()
        for clip in ("row", "matrix", "percentile")
    }
    assert error["row"] < 0.99 * error["matrix"] <= 0.99 * error["percentile"]


# ---- Clips by standard deviations (SDClip)

SDCLIP = replace(DEFAULT, quant_clip="sdclip", matrix_bits=6, matrix_clip_sigmas=3.0)


@pytest.mark.parametrize(
    ("role", "bits", "sigmas"),
    [("matrix", 6, 3.0), ("core matrix", 4, 3.0), ("tied embedding", 8, 20.0), ("head", 8, 20.0)],
)
def test_sdclip_against_float64(role: str, bits: int, sigmas: float) -> None:
    """Rows saturate at so many of their own standard deviations (n - 1), by role."""
    w = (
        torch.randn(12, 200, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 1, 12)[:, None]
    )
    w[:, :3] *= 5  # beyond three standard deviations
    exact = w.double()
    mean = exact.sum(1, keepdim=True) / 200
    deviation = ((exact - mean).square().sum(1) / 199).sqrt()
    levels = 2 ** (bits - 1) - 1
    step = (sigmas * deviation / levels).half().double()
    used = step if bits < 8 else sigmas * deviation / levels  # at 8 bits, as PR 855 rounds
    nearest = (exact / used[:, None]).round().clamp(-levels, levels)
    kind, (q, stored) = tg.store(tg.parameter(role, w), replace(SDCLIP, core_bits=4), None)
    assert kind == f"int{bits}" and torch.equal(stored.double(), step)
    assert (q != nearest).float().mean() < 0.002, "but for ties in float32"
    assert (q.double() - nearest).abs().max() <= 1
    if bits < 8:
        assert (q.abs() == levels).any(), "something saturates"


@pytest.mark.parametrize("role", ["side embedding", "projection"])
def test_sdclip_leaves_small_parameters_to_the_percentile(role: str) -> None:
    """A row of few or equal values has no standard deviation that says anything."""
    p = tg.parameter(role, torch.full((3, 2), 0.5))
    for one, other in zip(tg.store(p, SDCLIP, None).tensors, tg.store(p, DEFAULT, None).tensors):
        assert torch.equal(one, other)
    q, step = tg.store(p, SDCLIP, None).tensors
    torch.testing.assert_close(tg.dequantize_rows(q, step), p.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("with_hessian", [False, True])
def test_rows_of_zeros_stay_zeros(with_hessian: bool) -> None:
    """An untrained output projection has nothing else: its step is the smallest of float16."""
    w = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    w[1:3] = 0.0
    hessian = torch.eye(30) + 0.5 if with_hessian else None
    q, step = tg.store(tg.parameter("matrix", w), SDCLIP, hessian).tensors
    assert (q[1:3] == 0).all() and (step[1:3] == 2.0**-24).all()
    assert tg.dequantize_rows(q, step).isfinite().all() and (q[0] != 0).any()


# ---- GPTQ


def written_out_gptq(w: Tensor, step: Tensor, bits: int, hessian: Tensor, damping: float) -> Tensor:
    """GPTQ in float64, one column after the other, by the inverse of what is left of the sums."""
    left, h = w.double().clone(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    levels, q = 2 ** (bits - 1) - 1, torch.zeros(w.shape, dtype=torch.float64)
    todo = hessian.double().diagonal().argsort(descending=True).tolist()
    while todo:
        j, inverse = todo[0], h[todo][:, todo].inverse()
        q[:, j] = (left[:, j] / step.double()).round().clamp(-levels, levels)
        error = (left[:, j] - q[:, j] * step.double()) / inverse[0, 0]
        todo = todo[1:]
        left[:, todo] -= error[:, None] * inverse[0, 1:]
    return q


@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("block", [7, 128, 10**9])
def test_gptq_in_blocks_is_gptq_column_by_column(
    block: int, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a block, as it is written out in float64; ties apart."""
    monkeypatch.setattr(tg, "GPTQ_BLOCK", block)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(150, 150, generator=draw) @ torch.randn(150, 600, generator=draw)
    w, hessian = torch.randn(16, 150, generator=draw), x @ x.T
    step = (6 * w.std(1) / 7).half().float()
    q = tg.gptq_rows(w, step, 4, hessian, damping).double()
    exact = written_out_gptq(w, step, 4, hessian, damping)
    assert (q == exact).double().mean() > 0.97
    costs = []
    for integers in (q, exact):
        error = integers * step.double()[:, None] - w.double()
        costs.append((error @ x.double()).square().sum().item())
    assert costs[0] == pytest.approx(costs[1], rel=0.02)
    other = tg.gptq_rows(w, step, 4, hessian, 1.01 - damping).double()
    assert (other == exact).double().mean() < 0.9, "the damping acts"


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_gptq_moves_errors_to_where_they_cancel(bits: int) -> None:
    """For inputs that go together the output is nearer than with rounding to nearest."""
    draw = torch.Generator().manual_seed(bits)
    mixed = torch.randn(48, 48, generator=draw) @ torch.diag(torch.logspace(0, -2, 48))
    x, w = mixed @ torch.randn(48, 500, generator=draw), torch.randn(20, 48, generator=draw)
    q, step = tg.quantize_rows(w, tg.row_clip(w, bits, DEFAULT), bits, 0.0)
    moved = tg.gptq_rows(w, step.float(), bits, x @ x.T)
    assert moved.dtype == torch.int8 and moved.abs().max() <= 2 ** (bits - 1) - 1
    nearest, better = (tg.dequantize_rows(n, step) - w for n in (q, moved))
    assert (better @ x).norm() < 0.6 * (nearest @ x).norm()
    assert nearest.norm() < better.norm(), "nothing is nearer to w itself than rounding"


@settings(max_examples=30)
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


def calibrating(count: int, model: tg.GPT, micro: Any) -> Any:
    """A trainer after step 7, of which nothing is there but what calibrates GPTQ."""
    config, batches = replace(DEFAULT, gptq_batches=count), SimpleNamespace(micro=micro)
    return SimpleNamespace(config=config, world=one_rank(), model=model, batches=batches, step=7)


@pytest.mark.parametrize("name", ["everything", "everything on T", "LN scale, Output-LN"])
def test_calibration_sums_over_passes_and_micro_batches(name: str) -> None:
    """Every matrix's sum of x x^T against the inputs it has in the stack written out in float64."""
    a = tg.Architecture(**STACK | COMPONENTS[name] | dict(eval_passes=3))
    exact, model = exact_model(a), tg.GPT(a)
    model.load_state_dict(exact.state_dict())
    draw = torch.Generator().manual_seed(0)
    batches = torch.randint(2, 64, (5, 2, 24), generator=draw)
    asked: list[int] = []

    def micro(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Two micro-batches a step, from step 7 on."""
        asked.append(step)
        for ids in batches[2 * (step - 7) : 2 * (step - 7) + 2]:
            yield ids, ids

    lines: Any = []
    trainer = calibrating(3, model, micro)
    sums, _ = tg.calibrate(trainer, lines.append)
    assert trainer.world.place == "calibration of GPTQ", "where a rank that is lost is looked for"
    assert asked == [7, 8] and lines[0].startswith("gptq_calibration batches:3 ")
    reference = Written(exact, a, tg.Mode(3))
    for row in batches[:3].flatten(0, 1).tolist():
        reference.hidden(row)
    matrices = {key for key, p in model.named_parameters() if "matrix" in role_name(p)}
    assert set(sums) == set(reference.fed) == matrices
    for key in matrices:
        inputs = torch.cat(reference.fed[key])
        written = inputs.T @ inputs
        assert (sums[key] - written).norm() <= 1e-3 * written.norm(), key
    counts = {key: sum(map(len, inputs)) for key, inputs in reference.fed.items()}
    assert counts["attn.2.qkv.weight"] == 3 * counts["attn.0.qkv.weight"] == 3 * 3 * 48
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibration_alone_takes_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fails, what was set before is back."""
    products, found = torch.backends.cuda.matmul, []
    before = products.fp32_precision

    def passes(*_: Any) -> None:
        found.append(products.fp32_precision)
        if len(found) == 2:
            raise KeyboardInterrupt

    model = noisy_model(tg.Architecture(**STACK))
    monkeypatch.setattr(model, "forward", passes)
    pair = (torch.zeros(1, 4, dtype=torch.long),) * 2
    with pytest.raises(KeyboardInterrupt):
        tg.input_moments(model, [pair, pair, pair])
    assert found == ["tf32", "tf32"] and products.fp32_precision == before != "tf32"


class Float32Products(TorchDispatchMode):
    """Notes what is multiplied in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            self.operands += args
        return func(*args, **kwargs or {})


def test_calibration_multiplies_what_tf32_does_not_round() -> None:
    """A gain in float32 is no factor of a product's operands."""
    a = tg.Architecture(**STACK | dict(ln_scale=True, dtype="bfloat16"))
    ids = torch.randint(2, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    with Float32Products() as products:
        sums = tg.input_moments(noisy_model(a), [(ids, ids)])
    assert len(products.operands) >= 2 * len(sums) > 0
    assert all(x.equal(x.bfloat16().float()) for x in products.operands)


@pytest.mark.parametrize("tied", [True, False])
def test_calibration_of_the_head_is_of_the_last_state(tied: bool) -> None:
    """Of the normalised state, not of what the tied embedding is as an input; summed over ranks."""
    a = tg.Architecture(**STACK | COMPONENTS["everything"] | dict(tie_embeddings=tied))
    exact, model = exact_model(a), tg.GPT(a)
    model.load_state_dict(exact.state_dict())
    ids = torch.randint(2, 64, (2, 24), generator=torch.Generator().manual_seed(0))

    def micro(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield ids, ids

    def twice(x: Tensor) -> Tensor:
        return 2 * x

    lines: Any = []
    trainer = calibrating(1, model, micro)
    without, _ = tg.calibrate(trainer, lines.append)
    trainer.config = replace(trainer.config, gptq_embed=True)
    one = one_rank()
    trainer.world = SimpleNamespace(
        all_reduce=twice, synchronize=one.synchronize, on_main=one.on_main, enter=one.enter
    )
    sums, _ = tg.calibrate(trainer, lines.append)
    name = "tok_emb" if tied else "lm_head"
    assert set(sums) == set(without) | {name} != set(without)
    for key in without:
        assert torch.equal(sums[key], 2 * without[key])
    reference = Written(exact, a, model.scoring)
    last = torch.cat([reference.hidden(row) for row in ids.tolist()])
    written = 2 * last.T @ last
    assert (sums[name] - written).norm() <= 1e-3 * written.norm()


def test_gptq_of_the_head_keeps_its_logits() -> None:
    """Of the tied embedding, states that go together give nearer logits than by rounding."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(32, 32, generator=draw) @ torch.diag(torch.logspace(0, -2, 32))
    x, p = mixed @ torch.randn(32, 500, generator=draw), torch.randn(64, 32, generator=draw)
    config = replace(SDCLIP, embed_bits=4, embed_clip_sigmas=4.0)
    costs = []
    for hessian in (None, x @ x.T):
        q, step = tg.store(tg.parameter("tied embedding", p), config, hessian).tensors
        costs.append(((tg.dequantize_rows(q, step) - p) @ x).norm())
    assert costs[1] < 0.6 * costs[0]


def test_the_reserve_is_what_a_trial_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ_SECONDS=-1: a first micro-batch is not timed, four are, and a tenth is added."""
    clock = ManualTime()
    monkeypatch.setattr(tg, "time", clock)
    lines: Any = []
    model = noisy_model(tg.Architecture(**STACK))
    ids = torch.randint(2, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    asked: list[int] = []

    def micro(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        clock.now += 50.0 if not asked else 0.5
        asked.append(step)
        yield ids, ids

    trainer = calibrating(20, model, micro)
    given = trainer.config = replace(trainer.config, max_wallclock_seconds=100.0)
    assert tg.measure_reserve(trainer, lines.append) == 10.0 and trainer.config is given
    assert not asked and not lines and given.training_seconds == 90.0
    trainer.config = replace(given, gptq_seconds=-1.0, max_wallclock_seconds=0.0)
    assert tg.measure_reserve(trainer, lines.append) == 0.0 and not asked, "nothing to reserve from"
    trainer.config = replace(given, gptq_seconds=-1.0)
    assert trainer.config.training_seconds == 100.0
    assert tg.measure_reserve(trainer, lines.append) == pytest.approx(11.0)
    assert asked == [7] + [7, 8, 9, 10], "what training has not seen"
    assert trainer.config.gptq_seconds == pytest.approx(11.0)
    assert trainer.config.training_seconds == trainer.clock.cap == pytest.approx(89.0)
    assert lines == ["gptq_reserve batches:20 time:11000ms"]
    trainer.config = replace(given, gptq_seconds=-1.0, gptq_batches=300)
    with pytest.raises(
        tg.InputError, match="MAX_WALLCLOCK.* leaves nothing .* after GPTQ_SECONDS=165"
    ):
        tg.measure_reserve(trainer, lines.append)


def test_calibration_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches that take 2 s each, 20 are asked for, and 9 s reserved."""
    time, asked = ManualTime(), list[int]()
    lines: Any = []

    def micro(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(step)
        time.now += 2
        ids = torch.randint(2, 64, (1, 24), generator=torch.Generator().manual_seed(step))
        yield ids, ids

    monkeypatch.setattr(tg, "time", time)
    trainer = calibrating(20, tg.GPT(tg.Architecture(**STACK)), micro)
    limited = dict(gptq_seconds=9.0, max_wallclock_seconds=100.0)
    trainer.config = replace(trainer.config, **limited)
    sums, seconds = tg.calibrate(trainer, lines.append)
    assert seconds <= 10 and asked == [7, 8, 9, 10]
    assert lines[1] == (
        "warning: calibration ended with its time, 9.0 s, after 4 of GPTQ_BATCHES=20"
    )
    trainer.config = replace(trainer.config, gptq_batches=4)
    for name, moment in tg.calibrate(trainer, lines.append)[0].items():
        assert moment.equal(sums[name]), name
    trainer.config = replace(trainer.config, gptq_batches=20, max_wallclock_seconds=0.0)
    assert tg.calibrate(trainer, lines.append)[1] == 40, "no cap, no end"


def test_no_calibration_unless_asked() -> None:
    def micro(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        pytest.fail("a batch was asked for")

    lines: Any = []
    trainer = calibrating(0, noisy_model(tg.Architecture(**STACK)), micro)
    assert tg.calibrate(trainer, lines.append) == ({}, 0.0) and not lines


@pytest.mark.parametrize(
    "rule", [dict(quant_clip="row"), dict(quant_clip="sdclip"), dict(quant_clip_percentile=100.0)]
)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_training_rounds_to_what_is_stored(bits: int, rule: dict[str, Any]) -> None:
    """Up to the float16 of a step, which turns what lies half-way between two levels."""
    config = replace(DEFAULT, matrix_bits=bits, matrix_clip_sigmas=2.5, **rule)
    torch.manual_seed(1)
    matrix = tg.Matrix(torch.randn(7, 64) * torch.linspace(0.1, 3, 7)[:, None], core=False)
    trained = matrix(torch.eye(64), 1.0, tg.rounding_of(config, "matrix")).T.detach()
    stored = tg.store(matrix.weight, config, None)
    q, step = stored.tensors
    levels = (trained / step.float()[:, None]).round()
    assert (levels - q).abs().max() <= 1 and (levels != q).float().mean() < 0.01
