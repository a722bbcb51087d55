"""Components of the stack against formulas written out; and that every parameter learns."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import DIMS, drawn, role_name, small_config, stub_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from stack_written_out import (
    COMPONENTS,
    EVERYTHING,
    STACK,
    Written,
    documents,
    exact_model,
    rounded,
)
from torch import Tensor

import train_gpt as tg

pytestmark = pytest.mark.quick


# ---- Components and their formulas


@pytest.mark.parametrize("passes", [1, 3, 4])
@pytest.mark.parametrize("name", COMPONENTS)
def test_component_is_its_formula(name: str, passes: int) -> None:
    """Alone and together, at fewer, as many and more passes than trained."""
    a = tg.Architecture(**STACK | COMPONENTS[name])
    model, ids, mode = exact_model(a), documents(), tg.Mode(passes)
    written = Written(model, a, mode)
    expected = torch.stack([written.hidden(row) for row in ids.tolist()])
    with torch.no_grad():  # rotary angles are float32
        torch.testing.assert_close(model.hidden(ids, mode)[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("per_pass", [False, True])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_growth_penalty_is_its_formula(passes: int, per_pass: bool) -> None:
    a = tg.Architecture(**STACK | dict(pass_scale_init=0.5, feedback_rank=2))
    model, ids = exact_model(a), documents()
    mode = tg.Mode(passes, growth_weight=0.3, per_pass=per_pass)
    for matrix in (m for m in model.modules() if isinstance(m, tg.Matrix)):
        matrix.weight.data.mul_(1.7)  # growth beyond what is free
    written = Written(model, a, mode)
    for row in ids.tolist():
        written.hidden(row)
    with torch.no_grad():
        penalty = float(model.hidden(ids, mode)[1])
        loss = model(ids, documents(1), mode).item()
        plain = model(ids, documents(1), mode._replace(growth_weight=0.0)).item()
        other = float(model.hidden(ids, mode._replace(per_pass=not per_pass))[1])
    assert penalty == pytest.approx(0.3 * written.penalty(), rel=1e-4) and penalty > 1e-4
    assert loss - plain == pytest.approx(penalty, rel=1e-3)
    if passes == 1:
        assert other == pytest.approx(penalty, rel=1e-12)


def test_growth_within_the_state_is_free() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert tg.growth_penalty(x, 1.99 * x).item() == 0 < tg.growth_penalty(x, 2.01 * x).item()
    for part in torch.autograd.grad(tg.growth_penalty(x, 3 * x.detach() + x * x), x):
        assert part.isfinite().all() and part.any()


@settings(max_examples=30)
@given(st.integers(1, 23), st.integers(0, 10**6))
def test_smear_gate_stays_within_documents(place: int, seed: int) -> None:
    """The document kind; the published kind is shown to leak, so the test can tell."""
    inputs = {}
    for kind in ("document", "published"):
        model = exact_model(tg.Architecture(**STACK | dict(smear_gate=kind)))
        draw = torch.Generator().manual_seed(seed)
        ids, other = torch.randint(2, 64, (2, 1, 24), generator=draw)
        other[:, place:] = ids[:, place:]
        other[:, place - 1] = 2 + (ids[:, place - 1] - 1) % 62
        ids[:, place] = other[:, place] = tg.BOS
        with torch.no_grad():
            inputs[kind] = [model.embed(x)[0] for x in (ids, other)]
    mine, theirs = inputs["document"]
    assert torch.equal(mine[:, place:], theirs[:, place:]) and not torch.equal(mine, theirs)
    mine, theirs = inputs["published"]
    assert not torch.equal(mine[:, place], theirs[:, place])


@settings(max_examples=50)
@given(st.integers(2, 5000), st.lists(st.integers(0, 65535), min_size=1, max_size=9))
def test_bigram_index(buckets: int, ids: list[int]) -> None:
    found = tg.bigram_index(torch.tensor([ids]), buckets)[0].tolist()
    pairs = zip(ids[1:], ids)
    assert found == [buckets - 1] + [
        (36313 * x ^ 27191 * before) % (buckets - 1) for x, before in pairs
    ]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_exclusive_attention_is_orthogonal_to_own_value(heads: int, kv_heads: int) -> None:
    y, v = torch.randn(2, 5, heads, 8).double(), torch.randn(2, 5, kv_heads, 8).double()
    v[0, 3] = 0.0  # nothing to leave out
    out = tg.without_own_value(y, v)
    for h in range(heads):
        own = v[:, :, h // (heads // kv_heads)]
        assert ((out[:, :, h] * own).sum(-1).abs() < 1e-12).all()
        along = y[:, :, h] - out[:, :, h]  # what was taken away lies along the value
        torch.testing.assert_close(
            (along * own).sum(-1).abs(), along.norm(dim=-1) * own.norm(dim=-1)
        )
    assert torch.equal(out[0, 3], y[0, 3])


@pytest.mark.parametrize("dims", [2, 4, 8])
def test_partial_rope_leaves_the_rest_and_turns_by_position(dims: int) -> None:
    a = tg.Architecture(**STACK | dict(rope_dims=dims, rope_base=50.0))
    x = torch.randn(1, 24, 3, 8, dtype=torch.float64)
    out = tg.rotate(x, *tg.rope_tables(a))
    assert torch.equal(out[..., dims:], x[..., dims:]) and torch.equal(out[:, 0], x[:, 0])
    for j in range(dims // 2):
        for t in range(24):
            angle, (p, q) = t * 50.0 ** (-2 * j / dims), x[0, t, 1, [j, j + dims // 2]].tolist()
            turned = [
                p * math.cos(angle) + q * math.sin(angle),
                q * math.cos(angle) - p * math.sin(angle),
            ]
            assert out[0, t, 1, [j, j + dims // 2]].tolist() == pytest.approx(turned, abs=1e-5)


# ---- Rounding in training


@pytest.mark.parametrize(
    "bits, core_bits, floor", [(0, 6, 1 / 127), (4, 4, 0.0), (5, 3, 0.0), (8, 0, 0.01)]
)
def test_training_on_rounded_matrices_is_its_formula(
    bits: int, core_bits: int, floor: float
) -> None:
    """Each matrix on the grid of its width: all of them, or those of the core alone."""
    a = tg.Architecture(**STACK | EVERYTHING)
    model, ids = exact_model(a), documents()
    mode = tg.Mode(3, tg.Rounding(bits, floor), tg.Rounding(core_bits, floor))
    written = Written(model, a, mode)
    expected = torch.stack([written.hidden(row) for row in ids.tolist()])
    with torch.no_grad():
        found, plain = model.hidden(ids, mode)[0], model.hidden(ids, tg.Mode(3))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("factor", [1.0, torch.rand(12).double(), torch.rand(7, 1).double()])
def test_rounding_is_straight_through(core: bool, factor: Tensor | float) -> None:
    """The output is that of the rounded weight; the weight's gradient that of the plain one."""
    w, x, out = torch.randn(7, 12).double(), torch.randn(5, 12).double(), torch.randn(5, 7).double()
    w[2] = 0.0
    matrix, found = tg.Matrix(w.clone(), core), {}
    for bits in (0, 3):
        y = matrix(x, factor, tg.Rounding(bits))
        found[bits] = y, torch.autograd.grad((y * out).sum(), matrix.weight)[0]
    (plain, gradient), (near, through) = found.values()
    torch.testing.assert_close(plain, x @ (w * factor).T)
    grid = rounded(w[[0, 1, 3, 4, 5, 6]], 3, 0.0)
    expected = torch.cat((grid[:2], torch.zeros(1, 12), grid[2:]))
    torch.testing.assert_close(near, x @ (expected * factor).T)
    torch.testing.assert_close(through, gradient)


def test_rounding_acts_on_a_step() -> None:
    """Rounding nothing, everything and the core alone move the weights to different places."""
    config = small_config({}, **tg.layers(0, 1, 2, 1), matrix_bits=4, core_bits=3)
    both, core = tg.Mode(2, tg.Rounding(4), tg.Rounding(3)), tg.Mode(2, core=tg.Rounding(3))
    after = []
    for mode in (tg.Mode(2), both, core):
        trainer = stub_trainer(config)
        for step in range(2):  # the first moves the output projections away from zero
            trainer.train_step(step, 0.0, [(documents(0), documents(1))], mode)
        after.append(torch.cat([p.detach().flatten() for p in trainer.params]))
    for one, other in itertools.combinations(after, 2):
        assert (one - other).abs().max() > 3e-3


# ---- Every parameter learns


def without_gradient(model: tg.GPT, config: tg.Config) -> set[str]:
    """Names of parameters that get no gradient in three steps of the fullest mode.

    Of tables and vectors every row has to get one. Nothing is rounded: on the published grid,
    output projections that are still this near 0 would be 0.
    """
    trainer = stub_trainer(config, model)
    mode = tg.training_modes(config)[-1]._replace(outside=tg.Rounding(), core=tg.Rounding())
    assert mode.passes == config.num_loops
    got = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for step in range(3):
        micro = [(documents(2 * step, 4, 64), documents(2 * step + 1, 4, 64))]
        trainer.train_step(step, 0.0, micro, mode)
        for name, p in model.named_parameters():
            if p.grad is not None:
                got[name] |= p.grad != 0
    return {name for name, p in model.named_parameters() if not reached(p, got[name])}


def reached(p: Tensor, where: Tensor) -> bool:
    """Whether that happened to a parameter which happened at these of its elements.

    To tables and vectors it has to happen in every row.
    """
    rows = where.flatten(1).any(1) if p.dim() > 1 else where
    return bool(rows.all() if role_name(p) in ("table", "scalar") else rows.any())


def preset_config(system: str) -> tg.Config:
    """A preset at a small size, with batches of four sequences of 64 tokens."""
    values = DIMS | dict(model_dim=64, train_seq_len=64, max_wallclock_seconds=0.0, iterations=1000)
    if system == "growing_live":
        values["bigram_vocab_size"] = 50
    return replace(tg.Config.from_env({"PRESET": system}), **values)


@pytest.mark.parametrize("system", ["", *tg.SYSTEMS])
def test_every_parameter_of_every_preset_learns(system: str) -> None:
    config = preset_config(system)
    model = drawn(config, 0)
    # The first layer mixes x0 with itself: a x0 + (1 - a) x0 is x0 whatever a is, as published.
    uses = sum(layer.attn == 0 for layer in tg.make_plan(config))
    first: Any = model.mix[0]
    idle = {"mix.0.weight"} if uses == 1 and first.convex else set()
    assert without_gradient(model, config) == idle


@pytest.mark.parametrize(
    "names", [("core.u", "core.v", "core.diagonal"), ("bigram.table", "bigram.proj")]
)
def test_what_was_dead_as_published_is_found_dead(names: tuple[str, ...]) -> None:
    """Feedback with U = V = d = 0, bigrams with table = projection = 0: the check above fails."""
    config = preset_config("growing_live")
    model = drawn(config, 0)
    for name in names:
        model.get_parameter(name).data.zero_()
    expected = {"bigram.scale"} if "bigram.table" in names else set()
    assert without_gradient(model, config) == expected | set(names)


def test_growing_is_the_live_stack_less_what_was_dead() -> None:
    """`growing` has none of the published dead parts, `growing_live` all, and every skip."""
    dead, live = (drawn(preset_config(name), 0) for name in ("growing", "growing_live"))
    names = [{name for name, _ in model.named_parameters()} for model in (dead, live)]
    assert names[1] - names[0] == {
        "core.u",
        "core.v",
        "core.diagonal",
        "bigram.table",
        "bigram.proj",
        "bigram.scale",
        "skip.2",
        "skip.3",
    }
    assert names[0] < names[1] and (len(dead.skip), len(live.skip)) == (2, 4)
