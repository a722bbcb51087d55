"""The mathematics of the model: causality, attention, head, neutral tables, rotary embedding."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import architecture, noisy_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt as tg

pytestmark = pytest.mark.quick

# ---- Causality and attention


@pytest.mark.parametrize("preset", ["T", "M", "Q", "naive"])
def test_hidden_states_do_not_see_the_future(preset: str) -> None:
    model, ids = noisy_model(architecture(preset, train_seq_len=200)), random_tokens(200)
    with torch.no_grad():
        before = model.hidden(ids, model.scoring)[0]
        for place in (1, 127, 128, 199):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % 64
            after = model.hidden(changed, model.scoring)[0]
            torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-5)
            assert not torch.allclose(after[:, place], before[:, place], atol=1e-3)
            if place < 199:
                forgot = torch.allclose(after[:, -1], before[:, -1], atol=1e-6)
                assert not forgot, "no memory of the past"


@pytest.mark.parametrize("preset", ["T", "M", "Q", "naive"])
def test_shorter_input_is_a_prefix(preset: str) -> None:
    model, ids = noisy_model(architecture(preset)), random_tokens()
    with torch.no_grad():
        short, whole = (model.hidden(x, model.scoring)[0] for x in (ids[:, :9], ids))
    torch.testing.assert_close(short, whole[:, :9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 200, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_attention_is_pytorchs(length: int, heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v, out = (
        torch.randn(2, n, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = tg.attention(q, k, v)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad((ours * out).sum(), (q, k, v)),
        torch.autograd.grad((theirs * out).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(mine, other)


# ---- The head


def plain_loss(h: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
    logits = F.linear(h, head.to(h.dtype)).float()
    return F.cross_entropy(cap * torch.tanh(logits / cap), targets)


def head_case(
    rows: int, ignored: str, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """States [rows, 16], a head [40, 16], targets [rows], some of them to be left out."""
    generator = torch.Generator().manual_seed(rows)
    h = (scale * torch.randn(rows, 16, generator=generator)).to(dtype).requires_grad_()
    head = torch.randn(40, 16, generator=generator, requires_grad=True)
    targets = torch.randint(40, (rows,), generator=generator)
    tail, most = slice(rows - rows // 3, None), slice(1, None)
    targets[{"none": slice(0), "tail": tail, "most": most}[ignored]] = -100
    return h, head, targets


@pytest.mark.parametrize("rows", [1, 5, 511, 512, 513, 1100])
@pytest.mark.parametrize("ignored", ["none", "tail", "most"])
@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_chunked_head_loss(rows: int, ignored: str, cap: float) -> None:
    h, head, targets = head_case(rows, ignored)
    theirs, ours = plain_loss(h, head, targets, cap), tg.head_loss(h, head, targets, cap)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(3.0 * loss, (h, head)) for loss in (theirs, ours)]
    for other, mine in zip(*grads):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert not grads[1][0][targets < 0].any()
    with torch.no_grad():
        torch.testing.assert_close(tg.head_loss(h, head, targets, cap), theirs)


def test_chunked_head_loss_in_bfloat16() -> None:
    h, head, targets = head_case(700, "tail", torch.bfloat16)
    theirs, ours = plain_loss(h, head, targets, 30.0), tg.head_loss(h, head, targets, 30.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for other, mine in zip(*(torch.autograd.grad(loss, (h, head)) for loss in (theirs, ours))):
        assert mine.dtype == other.dtype
        assert (mine.float() - other.float()).norm() < 0.02 * other.float().norm()


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
def test_softcap_bounds_the_loss(cap: float) -> None:
    h, head, targets = head_case(600, "none", scale=1e3)
    for loss in (tg.head_loss(h, head, targets, cap), tg.head_loss(-h, head, targets, cap)):
        assert math.log(40) - 2 * cap <= loss.item() <= math.log(40) + 2 * cap
    uncapped = F.cross_entropy(F.linear(h, head), targets)
    assert uncapped > math.log(40) + 60, "the cap had nothing to bound"


def test_model_loss_leaves_out_ignored_targets() -> None:
    model, ids, targets = noisy_model(architecture()), random_tokens(), random_tokens(seed=1)
    h = model.hidden(ids, model.scoring)[0].flatten(0, 1)
    targets[:, ::3] = -100
    expected = plain_loss(h, model.tok_emb, targets.flatten(), 30.0)
    torch.testing.assert_close(model(ids, targets, model.scoring), expected)


# ---- Neutral is absent


# A switch that is off: preset, its options, the table that is then missing.
NEUTRAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "gamma": ("K", dict(use_timestep_scale=False), "cond.gamma"),
    "cap": ("K", dict(timestep_gamma_max=0.0), ""),
    "beta": ("O", dict(use_timestep_bias=False), "cond.beta"),
    "depth": ("R", dict(depth_embed="none"), "cond.depth"),
    "gains": ("S", dict(use_unique_norms=False, unique_norms_input_norm=False), "cond.gain"),
}


@pytest.mark.parametrize("preset, off, table", NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_table_is_no_table(preset: str, off: dict[str, Any], table: str) -> None:
    """A table as initialised changes nothing, and a changed one does."""
    a = architecture(preset, unique_norms_input_norm=False)
    with_table, without = tg.GPT(a, 0.1), noisy_model(replace(a, **off))
    missing = with_table.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert missing == ([table] if table else [])
    ids, targets, mode = random_tokens(), random_tokens(seed=1), without.scoring
    assert torch.equal(with_table(ids, targets, mode), without(ids, targets, mode))
    with torch.no_grad():
        with_table.get_parameter(table or "cond.gamma").add_(9.0)
    assert not torch.allclose(with_table(ids, targets, mode), without(ids, targets, mode))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gamma_is_capped(sign: float) -> None:
    models = [noisy_model(architecture("K")) for _ in range(2)]
    with torch.no_grad():
        for model, value in zip(models, (4.0, 400.0)):
            model.cond.gamma.fill_(sign * value)
    states = [model.hidden(random_tokens(), model.scoring)[0] for model in models]
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("preset", ["T", "M", "naive"])
def test_layers_as_initialised_pass_the_embedding_on(preset: str) -> None:
    """Output projections start at zero: without depth codes every layer is the identity on x0."""
    model = tg.GPT(architecture(preset, depth_embed="none"), 0.1)
    with torch.no_grad():
        for skip in model.skip:
            skip.zero_()
    x0 = tg.rms_norm(F.embedding(random_tokens(), model.tok_emb))
    torch.testing.assert_close(model.hidden(random_tokens(), model.scoring)[0], tg.rms_norm(x0))


def test_birkhoff_mix_is_convex() -> None:
    mix: Any = noisy_model(architecture("T")).mix[0]
    carried, anchor = mix.weights()
    torch.testing.assert_close(carried + anchor, torch.ones(32))
    assert (carried > 0).all() and (anchor > 0).all()
    x, x0 = torch.randn(2, 2, 3, 32)
    torch.testing.assert_close(mix(x, x0), carried * x + anchor * x0)


def test_free_mix_is_the_weighted_sum() -> None:
    mix = noisy_model(architecture("naive")).mix[0]
    x, x0 = torch.randn(2, 2, 3, 32)
    torch.testing.assert_close(mix(x, x0), mix.weight[0] * x + mix.weight[1] * x0)


def test_flat_model_is_the_u_net_written_out() -> None:
    a = architecture("naive", num_layers=5)
    model, ids = noisy_model(a), random_tokens()
    x0 = tg.rms_norm(F.embedding(ids, model.tok_emb))
    x = x0
    outputs: list[Tensor] = []
    cos, sin = model.rope.unbind()
    context = tg.Context(tg.Rounding(), (cos, sin), tg.attention)
    neutral = tg.Modulation(torch.ones(1), torch.ones(1), torch.zeros(1))
    for v in range(5):
        if v in (2, 3):
            x = x + model.skip[v - 2] * outputs[3 - v]
        x = model.attn[v](model.mix[v](x, x0), neutral, context)
        x = model.mlp[v](x, neutral, context)
        outputs.append(x)
    torch.testing.assert_close(model.hidden(ids, model.scoring)[0], tg.rms_norm(x))


@pytest.mark.parametrize("smear", ["none", "published"])
def test_health_measures_scales_and_growth(smear: str) -> None:
    """RMS of scale times clamped gamma; RMS after over RMS before, by hand on one layer."""
    config = tg.Config.from_env({"PRESET": "T,tiny", "DTYPE": "float32", "SMEAR_GATE": smear})
    model = tg.GPT(config.architecture(), 0.02)
    attn: Any = model.attn[3]
    mlp: Any = model.mlp[0]
    with torch.no_grad():
        model.cond.gamma[3, 0] = 9.0  # beyond the cap of 4
        attn.scale.fill_(0.5)
        model.cond.beta[:, 0] = 0.0
        model.cond.beta[0, 1] = 2.0
        mlp.scale.zero_()
    rows = tg.recurrence_health(model, torch.arange(32)[None], model.scoring)
    assert rows[3]["attn_scale"] == rows[0]["mlp_shift"] == pytest.approx(2.0)
    begun = model.embed(torch.arange(32)[None])[0]
    x = begun + 2.0  # mix, depth code, attention of layer 0 do nothing
    grown = x.square().mean().sqrt() / begun.square().mean().sqrt()
    assert rows[0]["growth"] == pytest.approx(grown.item(), rel=1e-4)


# ---- Rotary embedding


def rope_architecture(**values: Any) -> tg.Architecture:
    return tg.Architecture(**values | dict(model_dim=512, num_heads=8, train_seq_len=1024))


@settings(max_examples=30)
@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 100))
def test_rope_depends_on_the_distance_alone(i: int, j: int, shift: int) -> None:
    cos, sin = (table.double() for table in tg.rope_tables(rope_architecture()))
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def product(m: int, n: int) -> Tensor:
        return (tg.rotate(q, cos[m, 0], sin[m, 0]) * tg.rotate(k, cos[n, 0], sin[n, 0])).sum()

    torch.testing.assert_close(product(i + shift, j + shift), product(i, j), rtol=0, atol=5e-3)
    torch.testing.assert_close(tg.rotate(q, cos[i, 0], sin[i, 0]).norm(), q.norm())
    if abs(i - j) < 20 and i != j:
        assert abs(product(i, j) - product(i, i)) > 1e-6


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rope_tables_are_exact(base: float) -> None:
    """Up to the rounding of an angle to float32: at position 1023 it has four decimals."""
    angle = np.outer(np.arange(1024.0), base ** (-np.arange(32) / 32))
    tables = tg.rope_tables(rope_architecture(rope_base=base))
    for table, exact in zip(tables, (np.cos(angle), np.sin(angle))):
        assert table.dtype == torch.float32 and table.shape == (1024, 1, 32)
        assert (np.abs(table[:, 0].double().numpy() - exact) <= 1e-6 * np.maximum(angle, 1)).all()


def distinct_rotations(a: tg.Architecture) -> int:
    return len(torch.unique(torch.cat(tg.rope_tables(a), dim=-1)[:, 0], dim=0))


def test_reference_bf16_collapses_positions() -> None:
    assert distinct_rotations(rope_architecture()) == 1024
    assert distinct_rotations(rope_architecture(reference_bf16=True)) == 513


def test_sinusoidal_depth_codes_tell_the_layers_apart() -> None:
    depth: Tensor = tg.GPT(architecture("T")).cond.depth
    exact = np.sin(np.arange(14)[:, None] / 10000 ** (np.arange(32) / 32))
    np.testing.assert_allclose(depth.numpy(), exact, atol=1e-5)
    assert len(torch.unique(depth, dim=0)) == 14
