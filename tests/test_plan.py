"""The plan: which layers share weights and where skips go, at any number of passes."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import DIMS, architecture
from hypothesis import given, settings
from hypothesis import strategies as st
from stack_written_out import STACK

import train_gpt as tg

pytestmark = pytest.mark.quick

ARCHITECTURES = st.builds(
    lambda **values: replace(tg.Architecture(), **values),
    num_layers=st.integers(1, 13),
    num_prelude=st.integers(0, 3),
    num_shared=st.integers(1, 5),
    num_loops=st.integers(1, 4),
    num_coda=st.integers(0, 3),
    share_attn_only=st.booleans(),
    use_unique_norms=st.booleans(),
)


def check_looped(a: tg.Architecture) -> None:
    plan, passes = tg.make_plan(a), a.num_shared * a.num_loops
    first, end = a.num_prelude, a.num_prelude + passes
    assert len(plan) == a.num_prelude + passes + a.num_coda
    assert [layer.row for layer in plan] == list(range(len(plan)))
    skips = [layer.skip for layer in plan if layer.skip >= 0]
    assert len(skips) == sum(layer.push for layer in plan)
    assert not skips or a.core_skips != "none"
    for index in ("attn",) if a.share_attn_only else ("attn", "mlp"):
        used = [getattr(layer, index) for layer in plan]
        outside = used[:first] + used[end:]
        assert set(used) == set(range(a.num_prelude + a.num_shared + a.num_coda))
        one_pass = used[first : first + a.num_shared]
        assert Counter(used[first:end]) == dict.fromkeys(one_pass, a.num_loops)
        assert used[first:end] == one_pass * a.num_loops
        assert len(set(outside)) == len(outside) and not set(outside) & set(used[first:end])
    mlps = [layer.mlp for layer in plan]
    assert mlps == (list(range(len(plan))) if a.share_attn_only else [layer.attn for layer in plan])
    gains = list(range(passes)) if a.use_unique_norms else [-1] * passes
    assert [layer.gain for layer in plan] == [-1] * a.num_prelude + gains + [-1] * a.num_coda


def check_flat(a: tg.Architecture) -> None:
    plan, half = tg.make_plan(a), a.num_layers // 2
    kept: list[int] = []
    taken: dict[int, int] = {}
    assert [layer[:4] for layer in plan] == [(v, v, v, -1) for v in range(a.num_layers)]
    for layer in plan:
        if layer.skip >= 0:
            taken[layer.row] = kept.pop()
        if layer.push:
            kept.append(layer.row)
    assert not kept
    assert taken == {half + j: half - 1 - j for j in range(half)}
    assert [layer.skip for layer in plan if layer.skip >= 0] == list(range(half))


@pytest.mark.parametrize("preset", ["", *tg.SYSTEMS])
def test_plan_of_presets(preset: str) -> None:
    a = architecture(preset)
    if a.num_shared:
        check_looped(a)
    else:
        check_flat(a)


@settings(max_examples=200)
@given(ARCHITECTURES)
def test_plan_of_any_architecture(a: tg.Architecture) -> None:
    check_looped(a)
    check_flat(replace(a, num_shared=0))


@pytest.mark.parametrize("n", range(1, 14))
def test_flat_plan_of_every_length(n: int) -> None:
    check_flat(architecture("naive", num_layers=n))


@settings(max_examples=20)
@given(ARCHITECTURES)
def test_model_holds_what_the_plan_names(a: tg.Architecture) -> None:
    """No weights without a layer, and a table row for every effective layer."""
    a = replace(a, **DIMS, num_shared=a.num_shared % 4)
    plan = tg.make_plan(a)
    with torch.device("meta"):
        model = tg.GPT(a)
    assert len(model.attn) == len(model.mix) == len({layer.attn for layer in plan})
    assert len(model.mlp) == len({layer.mlp for layer in plan})
    assert len(model.skip) == sum(layer.push for layer in plan)
    assert model.cond.gamma.shape == model.cond.beta.shape == (len(plan), 2, 32)
    assert len(model.cond.gain) == sum(layer.gain >= 0 for layer in plan)


# ---- Any number of passes


STACKS = st.builds(
    lambda **values: tg.Architecture(**STACK | values),
    num_prelude=st.integers(0, 6),
    num_shared=st.integers(1, 4),
    num_loops=st.integers(1, 4),
    num_coda=st.integers(0, 6),
    share_attn_only=st.booleans(),
    use_unique_norms=st.booleans(),
    core_skips=st.sampled_from(["none", "all", "published"]),
    xsa_last_n=st.integers(0, 9),
    eval_passes=st.integers(0, 6),
)


@settings(max_examples=150)
@given(STACKS, st.integers(1, 7))
def test_plan_at_any_number_of_passes(a: tg.Architecture, passes: int) -> None:
    plan, full, n = tg.make_plan(a, passes), tg.make_plan(a), a.num_shared
    pre, end = a.num_prelude, a.num_prelude + n * passes
    assert tg.make_plan(a, a.num_loops) == full and len(plan) == pre + n * passes + a.num_coda
    assert plan[:pre] == full[:pre], "prelude"
    assert plan[end:] == full[len(full) - a.num_coda :], "coda"
    for k in range(passes):  # a pass is that of the whole plan with its number, or the last one
        known = min(k, a.num_loops - 1)
        assert plan[pre + k * n : pre + k * n + n] == full[pre + known * n : pre + known * n + n]
    core = plan[pre:end]
    assert [x.core for x in plan] == [False] * pre + [True] * len(core) + [False] * a.num_coda
    opens = [x.opens for x in core if x.opens >= 0]
    closes = [x.closes for x in core if x.closes >= 0]
    assert opens == closes == [min(k, a.num_loops - 1) for k in range(passes)]
    assert not any(x.push or x.skip >= 0 for x in core)
    assert [x.row for x in full] == list(range(len(full)))
    layers = pre + n + a.num_coda
    for x in plan:  # by index of the unshared network
        assert x.xsa == (x.attn >= layers - a.xsa_last_n)


@pytest.mark.parametrize("kind", ["all", "published"])
@pytest.mark.parametrize("stem", range(7))
@pytest.mark.parametrize("tail", range(7))
def test_skips_are_those_of_the_popping_loop(kind: str, stem: int, tail: int) -> None:
    a = tg.Architecture(**STACK | tg.layers(stem, 2, 2, tail) | dict(core_skips=kind))
    kept, expected, taken = list(range(stem)), {}, {}
    stack: list[int] = []
    for t in range(tail):
        if kept and (kind == "all" or t < len(kept)):
            expected[stem + 2 + t] = t, kept.pop()
    for x in tg.make_plan(a):
        if x.skip >= 0:
            taken[x.attn] = x.skip, stack.pop()
        if x.push:
            stack.append(x.attn)
    assert taken == expected and not stack, "an output is kept that nobody takes"
    with torch.device("meta"):
        assert len(tg.GPT(a).skip) == len(expected)
