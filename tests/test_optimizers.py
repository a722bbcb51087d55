"""Muon and Adam: their steps written out, who trains what, initial values, clipping."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DIMS,
    architecture,
    noise_of,
    noisy_model,
    role_name,
    small_config,
    stub_trainer,
)
from stack_written_out import EVERYTHING, STACK, documents
from torch import Tensor, nn

import train_gpt as tg

pytestmark = pytest.mark.quick
GOLDEN = json.loads(Path(__file__).with_name("golden_int8_and_muon.json").read_text())["muon"]

# ---- Muon


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", GOLDEN)
def test_muon_agrees_with_reference(name: str, dtype: torch.dtype) -> None:
    case = GOLDEN[name]
    p = tg.parameter("matrix", noise_of(name, case["shape"]))
    muon = tg.Muon([p], lr=0.04, momentum=0.95, steps=5)
    muon.dtype = dtype
    for i in range(3):
        p.grad = noise_of(f"{name}.grad{i}", case["shape"])
        muon.step()
    assert p.norm().item() == pytest.approx(case["norm"], rel=1e-3)
    assert p.flatten()[:8].tolist() == pytest.approx(case["first8"], abs=3e-3)


def test_muon_orthogonalises_every_part_alone() -> None:
    """q, k and v in one parameter move as three parameters would; updates are near-orthogonal."""
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


POLAR = (  # what PR 1344 has, by iteration
    (8.156554, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


@pytest.mark.parametrize(("polar", "steps"), [(False, 5), (True, 5), (True, 3), (True, 7)])
def test_newton_schulz_moves_singular_values_by_its_polynomials(polar: bool, steps: int) -> None:
    """A further iteration has the coefficients of the last one."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for i in range(steps):
        a, b, c = POLAR[min(i, 4)] if polar else (3.4445, -4.7750, 2.0315)
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(tg.newton_schulz(x, steps, polar), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_normalised_before_the_iteration() -> None:
    """Rows of the weight as it is stored, a tall one's too; a row without a gradient stays."""
    for rows, columns in ((6, 9), (9, 6)):
        start, gradient = torch.randn(rows, columns), torch.randn(rows, columns)
        gradient *= torch.logspace(-3, 3, rows)[:, None]
        gradient[1] = 0
        moved = {}
        for row_norm, given in ((True, gradient), (False, nn.functional.normalize(gradient))):
            p = tg.parameter("matrix", start.clone())
            p.grad = given.clone()
            tg.Muon([p], 0.1, 0.0, 5, row_norm=row_norm).step()
            assert p.grad.equal(given), "the gradient is left as it was"
            moved[row_norm] = p.detach() - start
        torch.testing.assert_close(moved[True], moved[False])
        assert not moved[True][1].any() and moved[True].isfinite().all()


# ---- Groups of parameters


@pytest.mark.parametrize("preset", ["", *tg.SYSTEMS])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(preset: str, tied: bool) -> None:
    config = replace(
        tg.Config.from_env({"PRESET": preset}),
        **DIMS,
        rope_dims=0,
        tie_embeddings=tied,
        matrix_lr=0.01,
        ttt_lr=0.0,
        eval_stride=0,
        scalar_lr=0.02,
        tied_embed_lr=0.03,
        embed_lr=0.04,
        head_lr=0.05,
    )
    model = tg.GPT(config.architecture(), 0.1)
    adam, muon = tg.make_optimizers(model, config)
    groups = [(type(o), group) for o in (adam, muon) for group in o.param_groups]
    listed = [id(p) for _, group in groups for p in group["params"]]
    rate = {id(p): (kind, group["lr"]) for kind, group in groups for p in group["params"]}
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    for name, p in model.named_parameters():
        assert role_name(p) in tg.ROLES and p.dtype == torch.float32
        expected: tuple[type, float]
        if name == "lm_head":
            expected = tg.Adam, 0.05
        elif name == "tok_emb":
            expected = tg.Adam, 0.03 if tied else 0.04
        elif name.endswith(("qkv.weight", "proj.weight", "fc.weight")):
            expected = tg.Muon, 0.01
        elif name.endswith("table"):
            expected = tg.Adam, config.tied_embed_lr
        else:
            expected = tg.Adam, 0.02
        assert rate[id(p)] == expected, name


def test_unknown_role_has_no_group() -> None:
    config = replace(tg.Config(), **DIMS)
    model = tg.GPT(config.architecture(), 0.1)
    p: Any = model.tok_emb
    p.role = "other"
    with pytest.raises(KeyError, match="other"):
        tg.make_optimizers(model, config)


@pytest.mark.parametrize("preset", ["", "L", "naive"])
def test_parts_cover_the_matrices(preset: str) -> None:
    a = architecture(preset)
    for p in tg.GPT(a, 0.1).parameters():
        if tg.role_of(p).optimizer == "muon":
            assert torch.equal(torch.cat(tg.parts_of(p)), p)
    attn: Any = tg.GPT(a, 0.1).attn[0]
    assert attn.qkv.weight.parts == (32, 16, 16)


@pytest.mark.parametrize("scalars", [0.0, 0.05])
def test_adam_decay_is_decoupled_and_by_role(scalars: float) -> None:
    """Three steps against AdamW (arXiv 1711.05101) in numpy, for every parameter that Adam has."""
    config = small_config(
        {"PRESET": "growing_live"},
        rope_dims=4,
        eval_stride=0,
        ttt_lr=0.0,
        num_prelude=1,
        num_shared=1,
        num_coda=2,
        ve_layers="2,3",
        adam_wd=0.2,
        scalar_wd=scalars,
        use_timestep_scale=True,
    )
    model = tg.GPT(config.architecture(), 0.1)
    adam = tg.make_optimizers(model, config)[0]
    groups = [(p, group) for group in adam.param_groups for p in group["params"]]
    decays = "weight_decay", "masked_decay"
    rates = {id(p): (group["lr"], sum(group[name] for name in decays)) for p, group in groups}
    adams = {id(p) for p, _ in groups}
    named = {name: p for name, p in model.named_parameters() if id(p) in adams}
    expected = {name: p.detach().double().numpy().copy() for name, p in named.items()}
    moments = {name: [np.zeros_like(w), np.zeros_like(w)] for name, w in expected.items()}
    for step in range(1, 4):
        for name, p in named.items():
            p.grad = torch.randn_like(p) * 10.0 ** (step - 2)
            g, (lr, decay) = p.grad.double().numpy(), rates[id(p)]
            m, v = moments[name]
            embeds = role_name(p) in ("tied embedding", "side embedding", "projection")
            assert decay == (0.2 if embeds else scalars), name
            m[:], v[:] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            expected[name] -= lr * decay * expected[name]
            expected[name] -= lr * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        adam.step()
    assert {role_name(p) for p in named.values()} >= {
        "scalar",
        "table",
        "projection",
        "side embedding",
    }
    for name, p in named.items():
        np.testing.assert_allclose(
            p.detach().numpy(), expected[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_what_no_pass_has_used_yet_does_not_decay(passes: int) -> None:
    """Rows of tables, of lanes and of pass scales that belong to passes which come later."""
    values = dict(use_timestep_scale=True, use_timestep_bias=True, loop_lanes=2, scalar_wd=0.5)
    config = small_config({"PRESET": "growing_live", "ROPE_DIMS": "4"}, scalar_lr=0.1, **values)
    trainer = stub_trainer(config, noisy_model(config.architecture()))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step(0, 0.0, [(documents(0), documents(1))], tg.Mode(passes))
    waiting = 0
    for name, p in trainer.model.named_parameters():
        if role_name(p) in ("table", "scalar"):
            unused = torch.ones_like(p, dtype=torch.bool) if p.grad is None else p.grad == 0
            stays = p == before[name]
            assert stays.equal(unused), name
            waiting += int(stays.sum())
    assert (waiting > 0) == (passes < config.num_loops)


MODES = [tg.Mode(1), tg.Mode(2), tg.Mode(3), tg.Mode(2, truncated=True), tg.Mode(3, truncated=True)]
MLPS: list[dict[str, Any]] = [{}, dict(share_attn_only=True), dict(mlp_pool=5)]


def looped_config(**values: Any) -> tg.Config:
    """Two layers before, in and behind a core that is run three times."""
    return small_config({}, **STACK | dict(num_coda=2, eval_passes=0) | values)


# One layer that is run often, behind so many that a skip ends where its first pass begins.
BEHIND = dict(num_prelude=4, num_shared=1, num_coda=1)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "skips, shape",
    [
        *zip(("all", "looped", "by_position"), MLPS),
        ("looped", BEHIND),
        ("by_position", BEHIND | dict(share_attn_only=True)),
    ],
    ids=str,
)
def test_what_has_no_gradient_in_a_mode_stays_as_it_is(
    skips: str, shape: dict[str, Any], mode: tg.Mode
) -> None:
    """Under any decay; it is what `idle` names, and everything else moves."""
    between = dict(pass_scale_init=0.5, feedback_rank=2, skip_gates=True)
    decays = dict(muon_wd=0.5, scalar_wd=0.5, adam_wd=0.5)
    config = looped_config(core_skips=skips, **between, **decays, **shape)
    model = noisy_model(config.architecture())
    pair = documents(0), documents(1)
    model(*pair, mode).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    idle = {id(p) for p in model.idle(mode)}
    assert {n for n, p in model.named_parameters() if id(p) in idle} == without
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = stub_trainer(config, model)
    trainer.train_step(0, 0.0, [pair], mode)
    assert {n for n, p in model.named_parameters() if p.equal(before[n])} == without
    assert trainer.gradients.complete()


def count_products(model: tg.GPT, mode: tg.Mode) -> dict[str, int]:
    """How often a forward pass calls each matrix."""
    counts: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, tg.Matrix):
            key = f"{name}.weight"

            def count(*_: Any, key: str = key) -> None:
                counts[key] = counts.get(key, 0) + 1

            hooks.append(module.register_forward_hook(count))
    model.hidden(documents(), mode)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("mlps", MLPS, ids=str)
def test_a_matrix_moves_less_the_more_often_a_pass_uses_it(
    mlps: dict[str, Any], passes: int
) -> None:
    """CORE_LR_POWER: its step and its decay; one that is used once moves as without."""
    moves = []
    for power in (0.0, 0.5):
        config = looped_config(core_lr_power=power, muon_wd=0.5, matrix_lr=0.1, **mlps)
        model = noisy_model(config.architecture())
        uses = count_products(model, tg.Mode(passes))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        pair = documents(0), documents(1)
        stub_trainer(config, model).train_step(0, 0.0, [pair], tg.Mode(passes))
        moves.append({n: p.detach() - before[n] for n, p in model.named_parameters() if n in uses})
    assert max(uses.values()) == passes and min(uses.values()) == 1
    for name, count in uses.items():
        expected = moves[0][name] * count**-0.5
        torch.testing.assert_close(moves[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_orthogonal_initial_values(kv_heads: int) -> None:
    """Rows or columns of q, k, v and W1 are orthonormal, each alone; what begins at 0 stays 0."""
    a = tg.Architecture(**STACK | EVERYTHING | dict(num_kv_heads=kv_heads))
    parts = 0
    model, plain = tg.GPT(a, 0.1, orthogonal=True), tg.GPT(a, 0.1)
    for (name, p), other in zip(model.named_parameters(), plain.parameters()):
        if "matrix" not in role_name(p):
            continue
        if name.endswith("proj.weight"):
            assert not p.any()
            continue
        for part in tg.parts_of(p, like=p.detach()):
            gram = part @ part.T if len(part) <= part.shape[1] else part.T @ part
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
            parts += 1
        assert not torch.allclose(other @ other.T, p @ p.T, atol=1e-2)
    assert parts == 7 * 4, "q, k, v and W1 of seven layers"


def gradient_norm(config: tg.Config, micro: list[tuple[Tensor, Tensor]]) -> float:
    """Norm of the gradient that a first step on these micro-batches ends with."""
    trainer = stub_trainer(config)
    trainer.batches.accumulation = len(micro)
    trainer.train_step(0, 0.0, micro)
    gradients = [p.grad.flatten() for p in trainer.params if p.grad is not None]
    return torch.cat(gradients).norm().item()


def test_clipping_is_of_the_averaged_gradient() -> None:
    """Two micro-batches that point apart: each by itself would be clipped, their average is not."""
    config = small_config({}, **tg.layers(1, 1, 2, 1), grad_clip_norm=1e9)
    micro = [(documents(i), documents(i + 1)) for i in (0, 2)]
    size = gradient_norm(config, micro)
    alone = min(gradient_norm(config, [pair]) for pair in micro)
    assert size < 0.98 * alone
    for limit, clipped in (((size + alone) / 2, size), (size / 2, size / 2)):
        found = gradient_norm(replace(config, grad_clip_norm=limit), micro)
        assert found == pytest.approx(clipped, rel=1e-3)
