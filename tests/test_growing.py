"""The growing-recurrence stack: its components against formulas written out here, growth, late rounding and
averages of the weights."""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_plan
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import one_thread  # noqa: F401, a fixture for this file too
from torch import Tensor

import train_gpt as tg

DIMS = dict(
    vocab_size=64, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=24, dtype="float32"
)
STACK = tg.PLAIN | tg.core(2, 2, 3, 3) | DIMS | dict(mlp_mult=3.0, eval_passes=4)
T_SET = dict(
    use_peri_norm=True,
    use_birkhoff_mix=True,
    use_timestep_scale=True,
    timestep_gamma_max=1.1,
    use_timestep_bias=True,
    depth_embed="sinusoidal",
)
EVERYTHING = dict(
    core_skips="all",
    smear_gate="document",
    bigram_vocab_size=37,
    bigram_dim=6,
    ve_last_n=2,
    ve_dim=6,
    xsa_last_n=2,
    rope_dims=4,
    ln_scale=True,
    pass_scale_init=0.5,
    feedback_rank=2,
    interpass_norm=True,
)
COMPONENTS: dict[str, dict] = {name: {name: value} for name, value in EVERYTHING.items()} | {
    "nothing": {},
    "everything": EVERYTHING,
    "published skips": dict(core_skips="published"),
    "published smear": dict(smear_gate="published"),
    "one key head": dict(num_kv_heads=1, xsa_last_n=3),
    "LN scale, Output-LN": dict(ln_scale=True, use_peri_norm=True),
    "T": T_SET,
    "everything on T": EVERYTHING | T_SET,
}
del COMPONENTS["bigram_dim"], COMPONENTS["ve_dim"]


def random_model(a: tg.Architecture, seed: int = 0) -> tg.GPT:
    """With noise on every parameter, in float64."""
    model = test_plan.random_model(a, seed)
    model.dtype = torch.float64
    return model.double()


def tokens(seed: int = 0, count: int = 2, length: int = 24) -> Tensor:
    """Ids with beginnings of documents among them."""
    ids = torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, length // 3] = ids[0, -1] = tg.BOS
    return ids


# ---- Components and their formulas


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def rounded(w: Tensor, bits: int, floor: float) -> Tensor:
    """Every row on a grid of its own."""
    rows, levels = [], 2 ** (bits - 1) - 1
    for row in w.tolist():
        step = max(max(map(abs, row)) / levels, floor * 127 / levels)
        rows.append([step * min(max(round(v / step), -levels), levels) for v in row])
    return torch.tensor(rows, dtype=w.dtype)


class Written:
    """The stack written out in float64 for one sequence at a time, with a loop wherever one is meant. Keeps
    the inputs of every matrix, and the states between which the core's growth is measured."""

    def __init__(self, model: tg.GPT, a: tg.Architecture, mode: tg.Mode) -> None:
        self.model, self.a, self.mode = model, a, mode
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.fed: dict[str, list[Tensor]] = {}
        self.begun: list[list[Tensor]] = [[] for _ in range(mode.passes)]
        self.ended: list[list[Tensor]] = [[] for _ in range(mode.passes)]

    def linear(self, matrix: tg.Matrix, x: Tensor, core: bool) -> Tensor:
        w = matrix.weight.detach().double()
        self.fed.setdefault(self.names[id(matrix.weight)], []).append(x)
        rounding = self.mode.core if core else self.mode.outside
        return x @ (rounded(w, *rounding) if rounding.bits else w).T

    def rotary(self, x: Tensor) -> Tensor:
        """x [T, E]: the pairs (j, j + half) of the first channels, as complex numbers, turned back."""
        dims = self.a.rope_dims or x.shape[1]
        half, out = dims // 2, x.clone()
        for j in range(half):
            angle = torch.arange(len(x)).double() * self.a.rope_base ** (-2.0 * j / dims)
            turn = torch.complex(angle.cos(), -angle.sin())
            z = torch.complex(x[:, j], x[:, j + half]) * turn
            out[:, j], out[:, j + half] = z.real, z.imag
        return out

    def attention(self, u: int, h: Tensor, core: bool, value: Tensor | None) -> Tensor:
        a, attn = self.a, self.model.attn[u]
        E, group = a.model_dim // a.num_heads, a.num_heads // a.num_kv_heads
        q, k, v = self.linear(attn.qkv, h, core).split(
            (a.num_heads * E, *[a.num_kv_heads * E] * 2), dim=1
        )
        v = v if value is None else v + value
        layers, heads = a.num_prelude + a.num_shared + a.num_coda, []
        for i in range(a.num_heads):
            at, own = slice(i * E, i * E + E), slice(i // group * E, i // group * E + E)
            scores = (
                self.rotary(norm(q[:, at]))
                * attn.q_gain[i]
                @ self.rotary(norm(k[:, own])).T
                / E**0.5
            )
            future = torch.ones_like(scores).triu(1) > 0
            y = scores.masked_fill(future, -math.inf).softmax(1) @ v[:, own]
            if not core and u >= layers - a.xsa_last_n:
                vhat = F.normalize(v[:, own], dim=1)
                y = torch.stack([y[t] - (y[t] @ vhat[t]) * vhat[t] for t in range(len(y))])
            heads.append(y)
        return self.linear(attn.proj, torch.cat(heads, 1), core)

    def block(self, u: int, row: int, x: Tensor, x0: Tensor, core: bool = False) -> Tensor:
        """Layer u of the unshared network with the conditioning of `row`."""
        a, cond, attn, mlp = self.a, self.model.cond, self.model.attn[u], self.model.mlp[u]
        w, cap = self.model.mix[u].weight, a.timestep_gamma_max or math.inf
        s = (u + 1.0) ** (-0.5 * a.ln_scale)
        gamma, beta = cond.gamma[row].clamp(-cap, cap), cond.beta[row]
        carried, anchor = (torch.sigmoid(w), 1 - torch.sigmoid(w)) if a.use_birkhoff_mix else w
        x = carried * x + anchor * x0 + cond.depth[row]
        nth = u - (a.num_prelude + a.num_shared + a.num_coda - a.ve_last_n)
        value = self.values[nth] if a.ve_last_n and nth >= 0 else None
        x = x + attn.scale * gamma[0] * self.attention(u, norm(x) * s, core, value) + beta[0]
        h = self.linear(mlp.fc, x if a.use_peri_norm else norm(x) * s, core)
        h = self.linear(mlp.proj, torch.where(h > 0, h, a.leaky_relu_slope * h) ** 2, core)
        return x + mlp.scale * gamma[1] * (norm(h) * s if a.use_peri_norm else h) + beta[1]

    def start(self, ids: list[int]) -> Tensor:
        """x0 [T, D] of one sequence."""
        model, a = self.model, self.a
        x = [model.tok_emb[i] for i in ids]
        for t in range(len(ids)) if a.bigram_vocab_size else ():
            n = a.bigram_vocab_size - 1
            bucket = (36313 * ids[t] ^ 27191 * ids[t - 1]) % n if t else n
            x[t] = x[t] + model.bigram.scale * (model.bigram.proj @ model.bigram.table[bucket])
        x = [norm(row) for row in x]
        if a.smear_gate != "none":
            g, before = 1 / (1 + torch.exp(-model.smear_gate)), [torch.zeros_like(x[0]), *x]
            stays = [a.smear_gate == "document" and i == 1 for i in ids]
            x = [x[t] if stays[t] else (1 - g) * x[t] + g * before[t] for t in range(len(ids))]
        side = model.value if a.ve_last_n else None
        self.values = [
            torch.stack([side.proj @ side.table[i] * side.scale * scale for i in ids])
            for scale in (model.value_scale if side else [])
        ]
        return torch.stack(x)

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> Tensor:
        a, core, kept = self.a, self.model.core, []
        pre, shared, tail = a.num_prelude, a.num_shared, a.num_coda
        x = x0 = self.start(ids)
        for u in range(pre):
            kept.append(x := self.block(u, u, x, x0))
        for k in range(self.mode.passes):
            x = norm(x) if k and a.interpass_norm else x
            if k and a.feedback_rank:
                x = x + torch.stack([core.diagonal * (core.u @ (core.v.T @ row)) for row in x])
            begun, known = x, min(k, a.num_loops - 1)
            for u in range(pre, pre + shared):
                x = self.block(u, u + shared * known, x, x0, core=True)
            if k and a.pass_scale_init != 1:
                x = begun + core.scale[known - 1] * (x - begun)
            self.begun[k].append(begun)
            self.ended[k].append(x)
        for t in range(tail):
            left = {"none": 0, "all": min(pre, tail), "published": len(kept)}[a.core_skips]
            if t < left and kept:
                x = x + self.model.skip[t] * kept.pop()
            u = pre + shared + t
            x = self.block(u, u + shared * (a.num_loops - 1), x, x0)
        return norm(x)

    def penalty(self) -> float:
        """Mean over the passes, or over the core as one."""
        begun, ended = ([torch.stack(x).numpy() for x in xs] for xs in (self.begun, self.ended))
        pairs = list(zip(begun, ended)) if self.mode.per_pass else [(begun[0], ended[-1])]
        size = lambda x: math.sqrt((x**2).sum())  # noqa: E731
        return float(np.mean([max(size(b - a) / (size(a) + 1e-6) - 1, 0.0) ** 2 for a, b in pairs]))


@pytest.mark.parametrize("passes", [1, 3, 4])
@pytest.mark.parametrize("name", COMPONENTS)
def test_component_is_its_formula(name: str, passes: int) -> None:
    """Alone and together, at fewer, as many and more passes than trained."""
    a = tg.Architecture(**STACK | COMPONENTS[name])
    model, ids, mode = random_model(a), tokens(), tg.Mode(passes)
    written = Written(model, a, mode)
    expected = torch.stack([written.hidden(row) for row in ids.tolist()])
    with torch.no_grad():  # rotary angles are float32
        torch.testing.assert_close(model.hidden(ids, mode)[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("per_pass", [False, True])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_growth_penalty_is_its_formula(passes: int, per_pass: bool) -> None:
    a = tg.Architecture(**STACK | dict(pass_scale_init=0.5, feedback_rank=2))
    model, ids, mode = random_model(a), tokens(), tg.Mode(passes, jacobian=0.3, per_pass=per_pass)
    for matrix in (m for m in model.modules() if isinstance(m, tg.Matrix)):
        matrix.weight.data.mul_(1.7)  # growth beyond what is free
    written = Written(model, a, mode)
    for row in ids.tolist():
        written.hidden(row)
    with torch.no_grad():
        penalty = model.hidden(ids, mode)[1].item()
        loss, plain = (model(ids, tokens(1), m).item() for m in (mode, mode._replace(jacobian=0.0)))
    assert penalty == pytest.approx(0.3 * written.penalty(), rel=1e-4) and penalty > 1e-4
    assert loss - plain == pytest.approx(penalty, rel=1e-3)
    if passes == 1:
        other = model.hidden(ids, mode._replace(per_pass=not per_pass))[1].item()
        assert other == pytest.approx(penalty, rel=1e-12)


def test_growth_within_the_state_is_free() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert tg.overgrowth(x, 1.99 * x).item() == 0 < tg.overgrowth(x, 2.01 * x).item()
    for part in torch.autograd.grad(tg.overgrowth(x, 3 * x.detach() + x * x), x):
        assert part.isfinite().all() and part.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 23), st.integers(0, 10**6))
def test_smear_gate_stays_within_documents(place: int, seed: int) -> None:
    """The document kind; the published kind is shown to leak, so the test can tell."""
    inputs = {}
    for kind in ("document", "published"):
        model = random_model(tg.Architecture(**STACK | dict(smear_gate=kind)))
        draw = torch.Generator().manual_seed(seed)
        ids, other = torch.randint(2, 64, (2, 1, 24), generator=draw)
        other[:, place:] = ids[:, place:]
        other[:, place - 1] = 2 + (ids[:, place - 1] - 1) % 62
        ids[:, place] = other[:, place] = tg.BOS
        with torch.no_grad():
            inputs[kind] = [model.inputs(x)[0] for x in (ids, other)]
    mine, theirs = inputs["document"]
    assert torch.equal(mine[:, place:], theirs[:, place:]) and not torch.equal(mine, theirs)
    mine, theirs = inputs["published"]
    assert not torch.equal(mine[:, place], theirs[:, place])


@settings(max_examples=50, deadline=None)
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
    model, ids = random_model(a), tokens()
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


@pytest.mark.parametrize("compiling", [False, True])
def test_rounding_acts_on_a_step(compiling: bool) -> None:
    """Eager and compiled alike: a graph that forgot the mode would give the weights of the plain step."""
    torch._dynamo.reset()
    config = small_config({}, **tg.core(0, 1, 2, 1), matrix_bits=4, core_bits=3)
    after = {}
    for mode in (
        tg.Mode(2),
        tg.Mode(2, tg.Rounding(4), tg.Rounding(3)),
        tg.Mode(2, core=tg.Rounding(3)),
    ):
        trainer = stub_trainer(config)
        if compiling:
            trainer.forward = torch.compile(
                trainer.model, backend="eager", fullgraph=True, dynamic=False
            )
        for step in range(2):  # the first moves the output projections away from zero
            trainer.train_step(step, 0.0, [(tokens(0), tokens(1))], mode)
        after[mode] = torch.cat([p.detach().flatten() for p in trainer.params])
        expected = stub_trainer(config)
        for step in range(2):
            expected.train_step(step, 0.0, [(tokens(0), tokens(1))], mode)
        other = torch.cat([p.detach().flatten() for p in expected.params])
        torch.testing.assert_close(after[mode], other, rtol=0, atol=1e-3)
    plain, both, core = after.values()
    assert (
        min((a - b).abs().max().item() for a, b in ((plain, both), (plain, core), (both, core)))
        > 3e-3
    )


# ---- Optimizers and initial values


def small_config(env: dict[str, str], **values: object) -> tg.Config:
    return replace(
        tg.Config.from_env(env),
        **DIMS | dict(iterations=100, warmdown_iters=0, max_wallclock_seconds=0.0) | values,
    )


def drawn(config: tg.Config, seed: int) -> tg.GPT:
    """A model as a run begins with it."""
    torch.manual_seed(seed)
    return tg.GPT(
        config.architecture(), config.tied_embed_init_std, config.matrix_init == "orthogonal"
    )


def stub_trainer(config: tg.Config, model: tg.GPT | None = None) -> tg.Trainer:
    """A trainer whose micro-batches come from the test."""
    batches = SimpleNamespace(accumulation=1, sequences=2)
    return tg.Trainer(config, tg.World({}), model or drawn(config, 0), batches)


def test_muon_decay_is_decoupled() -> None:
    """The same update, and besides it lr * decay of the weight as it was."""
    start, moved = torch.randn(12, 8), {}
    gradients = torch.randn(2, 12, 8)
    for decay in (0.0, 0.3):
        p = tg.parameter("matrix", start.clone(), (8, 4))
        muon, steps = tg.Muon([p], 0.1, 0.9, 5, decay), []
        for gradient in gradients:
            before, p.grad = p.detach().clone(), gradient.clone()
            muon.step()
            steps.append(p.detach() - before * (1 - 0.1 * decay))
        moved[decay] = torch.stack(steps)
    torch.testing.assert_close(moved[0.3], moved[0.0])
    assert (moved[0.0].norm(dim=(1, 2)) > 0.1).all()


@pytest.mark.parametrize("scalars", [False, True])
def test_adam_decay_is_decoupled_and_by_role(scalars: bool) -> None:
    """Three steps against AdamW (arXiv 1711.05101) in numpy, for every parameter that Adam has."""
    config = small_config(
        {"PRESET": "growing_live"},
        rope_dims=4,
        eval_stride=0,
        ttt_lr=0.0,
        num_prelude=1,
        num_shared=1,
        num_coda=2,
        adam_wd=0.2,
        decay_scalars=scalars,
        use_timestep_scale=True,
    )
    model = tg.GPT(config.architecture(), 0.1)
    adam = tg.make_optimizers(model, config)[0]
    groups = [(p, group) for group in adam.param_groups for p in group["params"]]
    rates = {id(p): (group["lr"], group["weight_decay"]) for p, group in groups}
    named = {
        name: p for name, p in model.named_parameters() if tg.ROLES[p.role].optimizer == "adam"
    }
    expected = {name: p.detach().double().numpy().copy() for name, p in named.items()}
    moments = {name: [np.zeros_like(w), np.zeros_like(w)] for name, w in expected.items()}
    for step in range(1, 4):
        for name, p in named.items():
            p.grad = torch.randn_like(p) * 10.0 ** (step - 2)
            g, (m, v), (lr, decay) = p.grad.double().numpy(), moments[name], rates[id(p)]
            decays = p.role in ("tied embedding", "side embedding", "projection") or scalars
            assert decay == (0.2 if decays else 0.0), name
            m[:], v[:] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            expected[name] -= lr * decay * expected[name]
            expected[name] -= lr * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        adam.step()
    assert {p.role for p in named.values()} >= {"scalar", "table", "projection", "side embedding"}
    for name, p in named.items():
        np.testing.assert_allclose(
            p.detach().numpy(), expected[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_orthogonal_initial_values(kv_heads: int) -> None:
    """Rows or columns of q, k, v and W1 are orthonormal, each by itself; what begins at 0 stays there."""
    a, mixed = tg.Architecture(**STACK | EVERYTHING | dict(num_kv_heads=kv_heads)), 0
    model, plain = tg.GPT(a, 0.1, orthogonal=True), tg.GPT(a, 0.1)
    for (name, p), other in zip(model.named_parameters(), plain.parameters()):
        if "matrix" not in p.role:
            continue
        if name.endswith("proj.weight"):
            assert not p.any()
            continue
        for part in p.detach().split(p.parts):
            gram = part @ part.T if len(part) <= part.shape[1] else part.T @ part
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
            mixed += 1
        assert not torch.allclose(other @ other.T, p @ p.T, atol=1e-2)
    assert mixed == 7 * 4, "q, k, v and W1 of seven layers"


def test_clipping_is_of_the_averaged_gradient() -> None:
    """Two micro-batches that point apart: each is clipped if it were alone, their average is not."""
    config = small_config({}, **tg.core(1, 1, 2, 1), grad_clip_norm=1e9)
    trainer = stub_trainer(config)
    trainer.batches.accumulation = 2
    micro = [(tokens(i), tokens(i + 1)) for i in (0, 2)]
    trainer.train_step(0, 0.0, micro)
    size = trainer.flat[:-1].norm().item()
    parts = []
    for m in micro:
        alone = stub_trainer(config)
        alone.train_step(0, 0.0, [m])
        parts.append(alone.flat[:-1].clone())
    assert (sum(parts) / 2).norm().item() == pytest.approx(size, rel=1e-4)
    assert size < 0.98 * min(part.norm().item() for part in parts)
    bound = (size + min(part.norm().item() for part in parts)) / 2
    for limit, clipped in ((bound, size), (size / 2, size / 2)):
        trainer = stub_trainer(replace(config, grad_clip_norm=limit))
        trainer.batches.accumulation = 2
        trainer.train_step(0, 0.0, micro)
        assert trainer.flat[:-1].norm().item() == pytest.approx(clipped, rel=1e-3)


# ---- The plan, and when what is done

ARCHITECTURES = st.builds(
    lambda **values: tg.Architecture(**STACK | values),
    num_prelude=st.integers(0, 6),
    num_shared=st.integers(1, 4),
    num_loops=st.integers(1, 4),
    num_coda=st.integers(0, 6),
    share_attn_only=st.booleans(),
    use_unique_norms=st.booleans(),
    core_skips=st.sampled_from(["none", "all", "published"]),
    ve_last_n=st.integers(0, 4),
    eval_passes=st.integers(0, 6),
)


@settings(max_examples=150, deadline=None)
@given(ARCHITECTURES, st.integers(1, 7))
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
    opens, closes = (
        [i for i in numbers if i >= 0] for numbers in zip(*((x.opens, x.closes) for x in core))
    )
    assert opens == closes == [min(k, a.num_loops - 1) for k in range(passes)]
    assert not any(x.push or x.skip >= 0 or x.xsa for x in core)
    assert [x.row for x in full] == list(range(len(full)))
    layers = pre + n + a.num_coda
    for x in plan:  # by index of the unshared network
        assert x.value == (
            x.attn - (layers - a.ve_last_n) if x.attn >= layers - a.ve_last_n else -1
        )


@pytest.mark.parametrize("kind", ["all", "published"])
@pytest.mark.parametrize("stem", range(7))
@pytest.mark.parametrize("tail", range(7))
def test_skips_are_those_of_the_popping_loop(kind: str, stem: int, tail: int) -> None:
    a = tg.Architecture(**STACK | tg.core(stem, 2, 2, tail) | dict(core_skips=kind))
    kept, expected, taken, stack = list(range(stem)), {}, {}, []
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


SCHEDULES = st.sampled_from(
    ["", "0:1,0.6:2,0.8:3", "0:1,3:2,7:3", "0:2,0.5:3", "0:1,6:3", "0:1,0.9:3"]
)
CONFIGS = st.builds(
    lambda **values: replace(tg.Config(**STACK), **values),
    passes_schedule=SCHEDULES,
    iterations=st.integers(0, 40),
    warmdown_iters=st.sampled_from([0, 1, 5, 40, 400]),
    max_wallclock_seconds=st.sampled_from([0.0, 3.0, 11.0]),
    qat_fraction=st.sampled_from([0.0, 0.3, 1.0]),
    qat_lr_factor=st.sampled_from([0.0, 0.15, 1.0]),
    qat_core_only=st.just(False),
    core_bits=st.sampled_from([0, 5]),
    gptq_batches=st.sampled_from([0, 1]),
    gptq_seconds=st.just(1.0),
)


@settings(max_examples=200, deadline=None)
@given(CONFIGS, st.lists(st.floats(0.01, 2.0), min_size=1, max_size=41))
def test_modes_of_any_run_are_warmed_up_and_only_grow(
    config: tg.Config, per_step: list[float]
) -> None:
    """A simulated run: passes never shrink, and rounding stays on once it is on."""
    known, seen, seconds = tg.training_modes(config), [], 0.0
    for step in range(config.iterations + 1):
        if config.training_seconds and seconds > config.training_seconds:
            break
        seen.append(tg.training_mode(config, step, seconds))
        seconds += per_step[step % len(per_step)]
    assert set(seen) <= set(known), "a mode that would be compiled on the clock"
    passes = [mode.passes for mode in seen]
    assert passes == sorted(passes) and passes[0] == config.schedule()[0][1]
    if (
        config.qat_fraction and not config.qat_lr_factor
    ):  # the learning rate may rise where steps speed up
        late = [mode.outside.bits > 0 for mode in seen]
        assert late == sorted(late)


@pytest.mark.parametrize(
    "late, count",
    [
        (dict(), 3),
        (dict(qat_fraction=0.1), 6),
        (dict(qat_lr_factor=0.2), 6),
        (dict(qat_fraction=1.0), 3),
    ],
)
def test_every_mode_is_warmed_up_once(late: dict, count: int) -> None:
    config = tg.Config(
        **STACK, passes_schedule="0:1,0.6:2,0.8:3", iterations=100, warmdown_iters=50, **late
    )
    assert len(tg.training_modes(config)) == len(set(tg.training_modes(config))) == count


def test_passes_by_step_fraction_and_clock() -> None:
    base = tg.Config(**STACK, iterations=100, max_wallclock_seconds=0.0, warmdown_iters=0)
    at = lambda config, step, seconds=0.0: tg.training_mode(config, step, seconds).passes  # noqa: E731
    by_step = replace(base, passes_schedule="0:1,10:2,20:3")
    assert [at(by_step, s) for s in (0, 9, 10, 19, 20, 99)] == [1, 1, 2, 2, 3, 3]
    assert at(by_step, 9, 1e9) == 1, "steps do not look at the clock"
    part = replace(base, passes_schedule="0:1,0.5:2,0.75:3")
    assert [at(part, s) for s in (0, 49, 50, 74, 75, 100)] == [1, 1, 2, 2, 3, 3]
    both = replace(part, max_wallclock_seconds=40.0)  # whichever of clock and steps is further
    assert [at(both, 10, t) for t in (0.0, 19.9, 20.0, 29.9, 30.0)] == [1, 1, 2, 2, 3]
    assert (
        at(both, 60, 5.0) == 2
        and at(replace(both, gptq_batches=1, gptq_seconds=20.0), 10, 10.0) == 2
    )
    assert at(base, 0) == 3, "all passes from the first step on without a schedule"


def test_rounding_by_learning_rate_and_by_fraction() -> None:
    base = tg.Config(
        **STACK, iterations=100, max_wallclock_seconds=0.0, warmdown_iters=40, matrix_bits=6
    )

    def bits(config: tg.Config, step: int, seconds: float = 0.0) -> tuple[int, int]:
        mode = tg.training_mode(config, step, seconds)
        return mode.outside.bits, mode.core.bits

    by_rate = replace(base, qat_lr_factor=0.25)
    assert [bits(by_rate, s) for s in (0, 60, 90, 91, 100)] == [(0, 0)] * 3 + [(6, 6)] * 2
    part = replace(base, qat_fraction=0.2, core_bits=5)
    assert [bits(part, s) for s in (0, 79, 80, 99)] == [(0, 0)] * 2 + [(6, 5)] * 2
    assert bits(replace(part, qat_core_only=True), 99) == (0, 5)
    assert bits(replace(part, max_wallclock_seconds=50.0, warmdown_iters=0), 10, 41.0) == (6, 5)
    assert bits(base, 100) == (0, 0)


# ---- Nothing is dead


def without_gradient(model: tg.GPT, config: tg.Config) -> set[str]:
    """What gets no gradient in three steps of the fullest mode; tables and vectors, if one row does not.
    Not rounded: on the published grid, output projections that are still this near 0 would be 0."""
    trainer, mode = (
        stub_trainer(config, model),
        tg.training_modes(config)[-1]._replace(outside=tg.Rounding(), core=tg.Rounding()),
    )
    assert mode.passes == config.num_loops
    got = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for step in range(3):
        micro = [(tokens(2 * step, 4, 64), tokens(2 * step + 1, 4, 64))]
        trainer.train_step(step, 0.0, micro, mode)
        for name, p in model.named_parameters():
            got[name] |= p.grad != 0
    rows = {name: p.role in ("table", "scalar") for name, p in model.named_parameters()}
    return {
        name
        for name, seen in got.items()
        if not (seen.flatten(1).any(1) if seen.dim() > 1 else seen).all().item()
        and rows[name]
        or not seen.any()
    }


def preset_config(system: str) -> tg.Config:
    values = DIMS | dict(model_dim=64, train_seq_len=64, max_wallclock_seconds=0.0, iterations=1000)
    values |= dict(bigram_vocab_size=50) if system == "growing_live" else {}
    return replace(tg.Config.from_env({"PRESET": system}), **values)


@pytest.mark.parametrize("system", ["", *tg.SYSTEMS])
def test_every_parameter_of_every_preset_learns(system: str) -> None:
    config = preset_config(system)
    model = drawn(config, 0)
    # The first layer mixes x0 with itself: a x0 + (1 - a) x0 is x0 whatever a is, in the reference, too.
    once = sum(layer.attn == 0 for layer in tg.make_plan(config)) == 1
    idle = {"mix.0.weight"} if once and model.mix[0].convex else set()
    assert without_gradient(model, config) == idle


@pytest.mark.parametrize(
    "names", [("core.u", "core.v", "core.diagonal"), ("bigram.table", "bigram.proj")]
)
def test_what_was_dead_as_published_is_found_dead(names: tuple[str, ...]) -> None:
    """Feedback with U = V = d = 0, bigrams with table = projection = 0: the check above does fail."""
    config = preset_config("growing_live")
    model = drawn(config, 0)
    for name in names:
        model.get_parameter(name).data.zero_()
    expected = {"bigram.scale"} if "bigram.table" in names else set()
    assert without_gradient(model, config) == expected | set(names)


def test_growing_is_the_live_stack_less_what_was_dead() -> None:
    """`growing` has none of the published dead parts, `growing_live` all of them, and every skip."""
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


# ---- Growth in a run

GROWTH = dict(
    PRESET="growing_live,tiny",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    NUM_PRELUDE="1",
    NUM_SHARED="1",
    NUM_CODA="1",
    DTYPE="float32",
    XSA_LAST_N="1",
    VE_LAST_N="1",
    VE_DIM="8",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="64",
    ITERATIONS="8",
    PASSES_SCHEDULE="0:1,0.25:2,0.5:3",
    QAT_FRACTION="0.25",
    QAT_LR_FACTOR="0",
    WARMDOWN_ITERS="4",
    MAX_WALLCLOCK_SECONDS="0",
    TRAIN_LOG_EVERY="1",
    WARMUP_STEPS="1",
    EVAL_STRIDE="0",
    TTT_LR="0",
    VAL_BATCH_SIZE="4096",
    MATRIX_LR="0.01",
    SCALAR_LR="0.01",
    TIED_EMBED_LR="0.01",
)
MODES = [
    f"passes:{passes} bits:0 core_bits:{bits}" for passes, bits in ((1, 0), (2, 0), (3, 0), (3, 6))
]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


def real_trainer(env: dict[str, str]) -> tg.Trainer:
    config, world = tg.Config.from_env(env), tg.World({})
    batches = tg.Batches(tg.Tokens(config, "train"), config, world)
    return tg.Trainer(config, world, drawn(config, config.seed), batches)


def grow(env: dict[str, str], folder: Path) -> list[float]:
    """The losses of a run of `train`, which does not score."""
    folder.mkdir()
    trainer = real_trainer(env)
    trainer.warm_up()
    trainer.train(tg.Log(folder, True), lambda *_: tg.Score(0.0, 0.0, 0, 0, 0.0))
    return losses(folder)


@pytest.mark.parametrize(("rung", "graphs"), [("model", 6), ("block", 4)])
def test_growth_compiles_nothing_on_the_clock(
    corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str, graphs: int
) -> None:
    """All graphs are made in the warm-up, and losses are those of a run without it. One graph for 1, 2 and 3
    passes with and without rounding; or for a layer, one with rounding, one with a value embedding, and the
    loss. Besides, one for each of three shapes of matrices."""
    torch._dynamo.reset()
    counter, made = torch._dynamo.testing.CompileCounter(), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    warm_up, env = tg.Trainer.warm_up, corpus | GROWTH
    count = lambda trainer, _=print: warm_up(trainer, print) or made.append(counter.frame_count)  # noqa: E731
    monkeypatch.setattr(tg.Trainer, "warm_up", count)
    compiled = grow(env | {"COMPILE": rung}, tmp_path / "compiled")
    assert made == [graphs + 3]
    assert counter.frame_count == made[0]
    eager, cold = (
        grow(env | {"COMPILE": "off", "WARMUP_STEPS": n}, tmp_path / n) for n in ("1", "0")
    )
    assert eager == cold and counter.frame_count == made[0]
    assert len(compiled) == 8 and compiled == pytest.approx(cold, abs=2e-4)
    log = (tmp_path / "compiled" / "train.log").read_text()
    seen = [line for line in log.splitlines() if " passes:" in line]
    assert [line.split(" ", 1)[1] for line in seen] == MODES
    assert [int(line.split("/")[0].removeprefix("step:")) for line in seen] == [0, 2, 4, 6]


def state(trainer: tg.Trainer) -> list[Tensor]:
    kept = [torch.get_rng_state(), *trainer.state()]
    for optimizer in trainer.optimizers:
        kept += [
            torch.tensor([v for v in group.values() if isinstance(v, float)])
            for group in optimizer.param_groups
        ]
    return [t.detach().clone() for t in kept]


def test_warm_up_restores_every_state(corpus: dict) -> None:
    trainer = real_trainer(corpus | GROWTH | {"AVERAGE": "ema"})
    python, draws = np.random.get_state()[1].copy(), state(trainer)
    trainer.warm_up()
    after = state(trainer)
    assert len(draws) == len(after) and all(torch.equal(a, b) for a, b in zip(draws, after))
    assert (np.random.get_state()[1] == python).all()
    assert trainer.averaged == 0 and trainer.last_good == "none"
    assert all(torch.equal(a, p) for a, p in zip(trainer.average, trainer.params, strict=True))
    trainer.train_step(0, 0.0, trainer.batches.micro(0))
    assert not all(torch.equal(a, b) for a, b in zip(draws[1:], state(trainer)[1:]))


# A rank that grows under a backend that counts: the graphs before and after the training loop go to a file.
RANK = """
import functools, os, sys
from pathlib import Path
import torch, torch._dynamo.testing
import torch.distributed as dist
import train_gpt as tg
counter = torch._dynamo.testing.CompileCounter()
torch.compile = functools.partial(torch.compile, backend=counter)
config, world = tg.Config.from_env(os.environ), tg.World(os.environ)
torch.manual_seed(config.seed + world.rank)  # rank 0's weights are broadcast
model = tg.GPT(config.architecture(), config.tied_embed_init_std, config.matrix_init == "orthogonal")
trainer = tg.Trainer(config, world, model, tg.Batches(tg.Tokens(config, "train"), config, world))
trainer.warm_up()
before, folder = counter.frame_count, Path(config.log_dir) / str(world.rank)
folder.mkdir()
trainer.train(tg.Log(folder, True), lambda *_: tg.Score(0.0, 0.0, 0, 0, 0.0))
(folder / "graphs").write_text(f"{before} {counter.frame_count}")
dist.barrier()
os._exit(0)
"""


def test_two_ranks_grow_alike_without_compiling_on_the_clock(corpus: dict, tmp_path: Path) -> None:
    """1, 2 and 3 passes on both ranks; the losses are those of one rank that compiled nothing."""
    known = {f.name.upper() for f in fields(tg.Config)}
    clean = {name: value for name, value in os.environ.items() if name not in known}
    env, script = (
        corpus | GROWTH | {"QAT_FRACTION": "0", "QAT_CORE_ONLY": "0"},
        tmp_path / "rank.py",
    )
    script.write_text(RANK)
    given = {
        "COMPILE": "model",
        "LOG_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(tg.__file__).parent),
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script)],
        env=clean | env | given,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one = grow(env | {"COMPILE": "off", "WARMUP_STEPS": "0"}, tmp_path / "one")
    for rank in ("0", "1"):
        assert (tmp_path / rank / "graphs").read_text() == "6 6", (
            "three modes, three shapes of matrices"
        )
        two = losses(tmp_path / rank)
        assert len(two) == 8 and two == pytest.approx(one, abs=2e-4)


# ---- Rounding pays, averages are what is exported


def run(env: dict[str, str], folder: Path) -> dict:
    config = tg.Config.from_env(env | {"LOG_DIR": str(folder), "RUN_ID": env.get("RUN_ID", "run")})
    assert tg.run(config, tg.World({})) == 0
    return json.loads((folder / config.run_id / "result.json").read_text())


SMALL_T = dict(
    PRESET="T,tiny",
    NUM_SHARED="1",
    NUM_LOOPS="2",
    MODEL_DIM="64",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    DTYPE="float32",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="1024",
    MICRO_BATCH_TOKENS="1024",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="0",
    MATRIX_LR="0.02",
    SCALAR_LR="0.01",
    TIED_EMBED_LR="0.02",
    MUON_MOMENTUM_WARMUP_STEPS="20",
    SEED="1",
)


def test_training_on_rounded_matrices_shrinks_what_rounding_costs(
    corpus: dict, tmp_path: Path
) -> None:
    """At 2 bits, where the cost exceeds the noise of runs this small; the score after rounding gains, too."""
    env = corpus | SMALL_T | dict(ITERATIONS="80", WARMDOWN_ITERS="40", MATRIX_BITS="2")
    off, on = (run(env | {"QAT_FRACTION": part, "RUN_ID": part}, tmp_path) for part in ("0", "0.5"))
    cost, left = (r["roundtrip"]["val_loss"] - r["pre_quant"]["val_loss"] for r in (off, on))
    assert cost > 0.2 and left < cost - 0.2
    assert on["roundtrip"]["val_loss"] < off["roundtrip"]["val_loss"] - 0.1


def averaged(env: dict[str, str], folder: Path) -> tuple[tg.Trainer, list[np.ndarray]]:
    """A trainer after a run, and the weights it had after every step."""
    trainer, weights = real_trainer(env), []
    update = trainer.update_average

    def record(step: int, factor: float) -> None:
        weights.append(torch.cat([p.detach().flatten() for p in trainer.params]).double().numpy())
        assert step == len(weights)
        update(step, factor)

    trainer.update_average = record
    trainer.train(tg.Log(folder, True), lambda *_: tg.Score(0.0, 0.0, 0, 0, 0.0))
    return trainer, weights


AVERAGING = GROWTH | dict(
    ITERATIONS="12", WARMDOWN_ITERS="10", PASSES_SCHEDULE="0:1", QAT_FRACTION="0", QAT_CORE_ONLY="0"
)


def test_moving_average_is_its_recurrence(corpus: dict, tmp_path: Path) -> None:
    trainer, weights = averaged(
        corpus | AVERAGING | {"AVERAGE": "ema", "EMA_DECAY": "0.7"}, tmp_path
    )
    expected = weights[0]
    for w in weights[1:]:
        expected = 0.7 * expected + 0.3 * w
    found = torch.cat([p.flatten() for p in trainer.average]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert trainer.averaged == 12 and np.abs(found - weights[-1]).max() > 1e-3


def test_stochastic_average_is_the_mean_of_what_it_collects(corpus: dict, tmp_path: Path) -> None:
    env = {"AVERAGE": "swa", "SWA_EVERY": "3", "SWA_LR_FACTOR": "0.65"}
    trainer, weights = averaged(corpus | AVERAGING | env, tmp_path)
    late = [s for s in range(1, 13) if s % 3 == 0 and (12 - s) / 10 < 0.65]
    assert late == [6, 9, 12] and trainer.averaged == 3
    found = torch.cat([p.flatten() for p in trainer.average]).numpy()
    np.testing.assert_allclose(
        found, np.mean([weights[s - 1] for s in late], axis=0), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["ema", "swa", "swa too late"])
def test_the_average_is_exported_and_its_score_logged(
    kind: str, corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the last weights, and the log says so, where nothing was collected."""
    seen: dict[str, object] = {}
    pack, train = tg.pack, tg.Trainer.train

    def spy(model: tg.GPT, *rest: object) -> bytes:
        seen["packed"] = [p.detach().clone() for p in model.parameters()]
        return pack(model, *rest)

    def kept(trainer: tg.Trainer, *rest: object) -> object:
        done = train(trainer, *rest)
        seen.update(trainer=trainer, last=[p.detach().clone() for p in trainer.params])
        return done

    monkeypatch.setattr(tg, "pack", spy)
    monkeypatch.setattr(tg.Trainer, "train", kept)
    env = {"AVERAGE": kind[:3], "WARMUP_STEPS": "0"}
    env |= {"EMA_DECAY": "0.7"} if kind == "ema" else {"SWA_EVERY": "5" if kind == "swa" else "13"}
    env |= {"SWA_LR_FACTOR": "0.9"} if kind != "ema" else {}
    result, log = (
        run(corpus | AVERAGING | env, tmp_path),
        (tmp_path / "run" / "train.log").read_text(),
    )
    expected = seen["trainer"].average if seen["trainer"].averaged else seen["last"]
    assert all(torch.equal(a, b) for a, b in zip(seen["packed"], expected, strict=True))
    moved = any(not torch.equal(a, b) for a, b in zip(seen["packed"], seen["last"]))
    assert moved == (kind != "swa too late")
    assert (result["pre_quant"]["val_loss"] != result["last_weights"]["val_loss"]) == moved
    count = {"ema": 12, "swa": 2, "swa too late": 0}[kind]
    assert f"\nAVERAGE={kind[:3]} of {count} weights\n" in log.split("=" * 100)[-1]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["weights"] for row in rows if "weights" in row] == ["last", kind[:3]]


def test_nothing_is_averaged_unless_asked(corpus: dict, tmp_path: Path) -> None:
    trainer, weights = averaged(
        corpus | AVERAGING | {"AVERAGE": "none", "ITERATIONS": "2"}, tmp_path
    )
    assert len(weights) == 2 and trainer.average == [] and trainer.averaged == 0
