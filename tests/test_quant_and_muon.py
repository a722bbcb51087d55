"""Muon and the int8 quantiser against the reference's figures, and the laws an artifact keeps."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

GOLDEN = json.loads(Path(__file__).with_name("golden_int8_and_muon.json").read_text())
TINY = dict(PRESET="T,tiny", MODEL_DIM="32", TRAIN_SEQ_LEN="32", DTYPE="float32")


def noise(name: str, shape: list[int]) -> torch.Tensor:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.tensor(0.15 * generator.standard_normal(shape), dtype=torch.float32)


def int8(w: torch.Tensor, percentile: float, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    config = replace(tg.Config(), quant_clip_percentile=percentile)
    return tg.quantize_rows(w, tg.row_clip(w, 8, config), 8, floor)


@pytest.mark.parametrize("name", GOLDEN["int8"])
def test_int8_agrees_with_reference(name: str) -> None:
    case = GOLDEN["int8"][name]
    w = noise(name, case["shape"]) * case["scale"]
    if name.startswith("spiky"):
        w[::7, 3] *= 30
    q, step = int8(w, 99.99984, 1 / 127)
    assert q.dtype == torch.int8 and step.dtype == torch.float16
    assert int(q.int().abs().sum()) == case["sum_abs_q"]
    assert int((q != 0).sum()) == case["nonzero"]
    assert step.float().sum().item() == pytest.approx(case["scale_sum"], rel=1e-6)
    error = (tg.dequantize_rows(q, step) - w).square().mean().sqrt().item()
    assert error == pytest.approx(case["rms_error"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", GOLDEN["muon"])
def test_muon_agrees_with_reference(name: str, dtype: torch.dtype) -> None:
    case = GOLDEN["muon"][name]
    p = tg.parameter("matrix", noise(name, case["shape"]))
    muon = tg.Muon([p], lr=0.04, momentum=0.95, steps=5)
    muon.dtype = dtype
    for i in range(3):
        p.grad = noise(f"{name}.grad{i}", case["shape"])
        muon.step()
    assert p.norm().item() == pytest.approx(case["norm"], rel=1e-3)
    assert p.flatten()[:8].tolist() == pytest.approx(case["first8"], abs=3e-3)


def test_muon_orthogonalises_every_part_alone() -> None:
    """q, k and v stacked in one parameter move as three parameters would; updates are near-orthogonal."""
    torch.manual_seed(0)
    parts, start, grad = (32, 16, 16), torch.randn(64, 32), torch.randn(64, 32)
    stacked = tg.parameter("matrix", start.clone(), parts)
    single = [tg.parameter("matrix", piece.clone()) for piece in start.split(parts)]
    stacked.grad = grad.clone()
    for p, g in zip(single, grad.split(parts)):
        p.grad = g.clone()
    for params in ([stacked], single):
        tg.Muon(params, lr=0.1, momentum=0.9, steps=5).step()
    assert torch.allclose(stacked, torch.cat([p.data for p in single]), atol=1e-6)
    for p, piece in zip(single, start.split(parts)):
        singular = torch.linalg.svdvals((piece - p.detach()) / 0.1)
        assert singular.min() > 0.6 and singular.max() < 1.25


@settings(max_examples=50, deadline=None)
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


def random_model(config: tg.Config) -> tg.GPT:
    model = tg.GPT(config.architecture(), config.tied_embed_init_std)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("system", ["T", "M", "Q", "naive", "Ap"])
def test_artifact_round_trip(system: str) -> None:
    config = tg.Config.from_env(TINY | {"PRESET": f"{system},tiny"})
    model = random_model(config)
    data = tg.pack(model, config)
    loaded, architecture, kind = tg.load_model(data, "memory")
    assert architecture == config.architecture() and kind == "int8+zlib"
    for (name, p), q in zip(model.named_parameters(), loaded.parameters()):
        error = (p - q).norm() / p.norm()
        assert error <= (0.02 if tg.ROLES[p.role].bits else 1e-3), name
    assert tg.pack(loaded, config) == tg.pack(loaded, config), "packing is deterministic"


def test_float16_only_where_it_loses_nothing() -> None:
    config = tg.Config.from_env(TINY)
    fine, overflow = torch.linspace(0.5, 2, 64), torch.full((64,), 1e5)
    tiny = torch.full((64,), 1e-9)  # below the smallest float16
    kinds = [tg.store(tg.parameter("scalar", t), config, None)[0] for t in (fine, overflow, tiny)]
    assert kinds == ["float16", "float32", "float32"]


def test_scale_floor_costs_accuracy_and_saves_bytes() -> None:
    """What the reference's floor does: rows below it share one coarse grid, which compresses better."""
    config = tg.Config.from_env(TINY | {"MODEL_DIM": "128"})
    model = tg.GPT(config.architecture())
    for p in model.parameters():
        if p.role == "matrix":
            p.data = 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for floor in (0.0, 1 / 127):
        data = tg.pack(model, replace(config, quant_scale_floor=floor))
        loaded = tg.load_model(data, "memory")[0]
        error = sum(
            (p - q).square().sum().item() for p, q in zip(model.parameters(), loaded.parameters())
        )
        results.append((len(data), error))
    assert results[0][0] > 1.3 * results[1][0] and results[0][1] < 0.1 * results[1][1]
