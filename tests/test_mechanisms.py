"""Ways to make a loop worth its time, each against its formula in float64, off and on."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import (
    check_resume,
    check_stored,
    flat,
    keep_all_checkpoints,
    let_steps_take,
    log_of,
    make_steps,
    no_score,
    one_rank,
    score_of,
)
from test_components import reached
from test_lanes import BETWEEN, SMALL, Written, gradient, norm, tokens, trainer_of
from test_lanes import env as env  # a fixture
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_gpt as tg
from records.tools import checks, logs


def architecture(**values: Any) -> tg.Architecture:
    return tg.Architecture(**SMALL | values)


def fresh_model(a: tg.Architecture) -> tg.GPT:
    torch.manual_seed(0)
    return tg.GPT(a, 0.05)


def shaken_model(a: tg.Architecture) -> tg.GPT:
    """A model none of whose parameters is at its start, so that every branch has a say."""
    model = fresh_model(a)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


class Formula(Written):
    """The same with the mechanisms of this file."""

    def mixed(self, x: Tensor, x0: Tensor, stored: int) -> Tensor:
        """The stream before a layer, from itself and the embedding."""
        first, behind = self.a.num_prelude, self.a.num_prelude + self.a.num_shared
        if self.a.mix_once_a_pass and first < stored < behind:
            return x
        weight = self.w[f"mix.{stored}.weight"]
        if not self.a.use_birkhoff_mix:
            return weight[0] * x + weight[1] * x0
        share = 1 / (1 + torch.exp(-weight))
        return share * x + (1 - share) * x0

    def mlp_of(self, stored: int, row: int) -> int:
        """The MLPs of the core stand between those of prelude and coda and are taken in turn."""
        a = self.a
        if not a.mlp_pool or stored < a.num_prelude:
            return stored
        if stored >= a.num_prelude + a.num_shared:
            return stored - a.num_shared + a.mlp_pool
        return a.num_prelude + (row - a.num_prelude) % a.mlp_pool

    def branch_scale(self, stored: int) -> float:
        """Of both branches, but not of their shifts."""
        a = self.a
        inside = a.num_prelude <= stored < a.num_prelude + a.num_shared
        if not a.core_branch_scale or not inside:
            return 1.0
        return a.core_branch_scale / (a.num_loops * math.sqrt(a.num_shared))

    def layer(self, x: Tensor, x0: Tensor, stored: int, row: int) -> Tensor:
        w, D = self.w, self.a.model_dim
        code = torch.tensor([math.sin(row / 10000 ** (i / D)) for i in range(D)])
        x = self.mixed(x, x0, stored) + code.double()
        gamma, beta = w["cond.gamma"][row].clamp(-4, 4), w["cond.beta"][row]
        gamma = gamma * self.branch_scale(stored)
        shrunk = (stored + 1) ** -0.5 if self.a.ln_scale else 1.0  # of norms
        scale = w[f"attn.{stored}.scale"] * gamma[0]
        x = x + scale * self.attention(shrunk * norm(x), stored) + beta[0]
        mlp = self.mlp_of(stored, row)
        inner = x @ w[f"mlp.{mlp}.fc.weight"].T
        inner = torch.where(inner > 0, inner, 0.5 * inner) ** 2
        scale = w[f"mlp.{mlp}.scale"] * gamma[1] * shrunk
        return x + scale * norm(inner @ w[f"mlp.{mlp}.proj.weight"].T) + beta[1]


def check_formula(passes: int = 3, **options: Any) -> None:
    """The state that a model with these options comes to is that of its formula."""
    a = architecture(eval_passes=4, **options)
    model = shaken_model(a)
    written = Formula(model, a)
    expected = torch.stack([written.hidden(row, passes) for row in tokens()])
    with torch.no_grad():
        found = model.hidden(tokens(), tg.Mode(passes))[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# What runs switch on; some of it goes together.
CARRIED: dict[str, dict[str, str]] = {
    "mixes": dict(MIX_ONCE_A_PASS="1", MIX_INIT="4"),
    "branch scale": dict(CORE_BRANCH_SCALE="1.5", EVAL_PASSES="4"),
    "truncated lanes": dict(TRUNCATE_FRACTION="0.75", PASSES_SCHEDULE="", LOOP_LANES="2"),
    "lanes by token": dict(LOOP_LANES="2", LANE_WEIGHTS="token"),
    "pool": dict(MLP_POOL="3"),
    "core rate": dict(CORE_LR_POWER="1"),
    "boundary": dict(PASS_SCALE_INIT="0.5", FEEDBACK_RANK="2"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_on_is_trained_and_carried(name: str, env: dict[str, str], tmp_path: Path) -> None:
    """By a checkpoint and an artifact; the loss is another one, and every parameter learns.

    The run has one pass and then two.
    """
    env |= dict(LOOP_LANES="1")
    config = tg.Config.from_env(env | CARRIED[name])
    start, plain = trainer_of(config).params, trainer_of(tg.Config.from_env(env))
    trainer = check_resume(config, tmp_path, 2, 4)
    for (part, p), begun in zip(trainer.model.named_parameters(), start, strict=True):
        if part != "mix.0.weight":  # before the first layer x is x0
            assert reached(p, p != begun), f"{part} is not trained"
    make_steps(plain, 4)
    assert trainer.gradients.loss != plain.gradients.loss
    read = check_stored(trainer.model, config, tokens())
    if config.core_branch_scale:  # a loader that forgot it would find every weight in its place
        without = tg.GPT(tg.replace(config.architecture(), core_branch_scale=0.0))
        without.load_state_dict(read.state_dict())
        assert score_of(without, tokens()) != score_of(read, tokens())


# ---- Where and how x0 is mixed in


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_x0_is_mixed_into_the_core_once_a_pass(passes: int, convex: bool) -> None:
    check_formula(passes, num_shared=3, mix_once_a_pass=True, use_birkhoff_mix=convex)


def test_a_mix_that_starts_at_a_logit_keeps_that_share_of_x() -> None:
    """And draws the same other weights; at 0 the mix is what it was, to the last bit."""
    plain, kept = fresh_model(architecture()), fresh_model(architecture(mix_init=3.0))
    for (name, p), q in zip(plain.named_parameters(), kept.parameters(), strict=True):
        if name.startswith("mix."):
            assert p.equal(torch.zeros(16)) and q.equal(torch.full((16,), 3.0))
        else:
            assert p.equal(q)
    x, x0 = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    share = 1 / (1 + math.exp(-3))
    torch.testing.assert_close(kept.mix[1](x, x0), share * x + (1 - share) * x0)


def test_layers_inside_a_pass_have_no_mix_and_the_health_says_so() -> None:
    model = fresh_model(architecture(num_shared=3, mix_once_a_pass=True))
    names = {name for name, _ in model.named_parameters() if name.startswith("mix.")}
    assert names == {"mix.0.weight", "mix.1.weight", "mix.4.weight"}
    health = tg.recurrence_health(model, tokens(1), tg.Mode(3))
    inside = [row for row in health if row["layer"] in (2, 3, 5, 6, 8, 9)]
    assert all((row["mix"], row["mix_x0"]) == (1.0, 0.0) for row in inside)
    assert all(row["mix"] == 0.5 for row in health if row not in inside)


# ---- The core's branches scaled by the number of passes


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_branches_of_the_core_are_scaled_by_the_passes(passes: int) -> None:
    check_formula(passes, num_shared=3, core_branch_scale=2.0)
    check_formula(passes, num_loops=2, core_branch_scale=0.5, ln_scale=True)


def test_a_scale_of_one_is_no_scale() -> None:
    """lambda = N L^0.5 computes what no scale computes, to the last bit."""
    a = architecture(num_shared=4, core_branch_scale=6.0)
    scaled, plain = shaken_model(a), shaken_model(tg.replace(a, core_branch_scale=0.0))
    with torch.no_grad():
        expected = plain.hidden(tokens(), tg.Mode(3))[0]
        assert scaled.hidden(tokens(), tg.Mode(3))[0].equal(expected)


# ---- Gradients through the last pass only


def written_gradients(
    model: tg.GPT, a: tg.Architecture, passes: int, skips: Mapping[int, tuple[int, int]]
) -> dict[str, Tensor]:
    """Of the loss of one sequence, in float64, around all passes but the last."""
    written = Formula(model, a, skips)
    for weight in written.w.values():
        weight.requires_grad_()
    ids, w = tokens(1)[0], written.w
    logits = 30 * torch.tanh(written.hidden(ids, passes, truncated=True) @ w["tok_emb"].T / 30)
    torch.nn.functional.cross_entropy(logits, ids.roll(-1)).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in w.items()}


# The U-Net skips of 0, 1 2, 1' 2', 1'' 2'', 3, which are rows 0 to 7, as `Written` has them.
LOOPED = {4: (3, 0), 5: (2, 1), 6: (1, 2), 7: (0, 3)}
SKIPS: dict[tuple[str, int], dict[int, tuple[int, int]]] = {
    ("all", 2): {7: (0, 0)},
    ("all", 3): {7: (0, 0)},
    ("looped", 2): {3: (2, 1), 4: (1, 2), 7: (0, 3)},
    ("looped", 3): LOOPED,
    ("by_position", 2): {3: (2, 0), 4: (1, 1), 7: (0, 2)},
    ("by_position", 3): LOOPED,
}


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        (2, {}),
        (3, BETWEEN),
        (3, dict(num_prelude=0)),
        (3, dict(use_birkhoff_mix=False)),
        (2, dict(mix_once_a_pass=True)),
        (3, dict(mlp_pool=5)),
        (2, dict(loop_lanes=2)),
        (3, dict(loop_lanes=2) | BETWEEN),
        (3, dict(loop_lanes=2, lane_weights="token")),
        (3, dict(core_skips="all")),
        (2, dict(core_skips="looped")),
        (3, dict(core_skips="looped") | BETWEEN),
        (2, dict(core_skips="by_position")),
        (3, dict(core_skips="by_position")),
        (3, dict(core_skips="looped", loop_lanes=2) | BETWEEN),
    ],
    ids=str,
)
def test_a_truncated_gradient_goes_through_the_last_pass_alone(
    passes: int, options: dict[str, Any]
) -> None:
    """Of all passes the value, of the last one the gradient; around the others it is whole."""
    a = architecture(**options)
    model, pair = shaken_model(a), (tokens(1), tokens(1).roll(-1, 1))
    with torch.no_grad():
        whole = model(*pair, tg.Mode(passes))
    loss = model(*pair, tg.Mode(passes, truncated=True))
    assert loss.equal(whole)
    loss.backward()
    skips = SKIPS.get((a.core_skips, passes), {})
    for name, expected in written_gradients(model, a, passes, skips).items():
        grad = model.get_parameter(name).grad
        found = torch.zeros_like(expected) if grad is None else grad.double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("convex", [True, False])
def test_a_truncated_gradient_begins_as_the_whole_one(convex: bool, lanes: int) -> None:
    """While no branch adds anything, the mixes are all that a pass does to a gradient."""
    model = fresh_model(architecture(use_birkhoff_mix=convex, loop_lanes=lanes))
    found = []
    for truncated in (True, False):
        model.zero_grad()
        model(tokens(), tokens().roll(-1, 1), tg.Mode(3, truncated=truncated)).backward()
        found.append((gradient(model.tok_emb), gradient(model.cond.beta)[0]))
    for truncated_grad, whole in zip(*found):
        assert whole.abs().max() > 0
        torch.testing.assert_close(truncated_grad, whole, rtol=1e-4, atol=1e-9)


def test_truncation_ends_by_steps_or_time_and_where_rounding_begins() -> None:
    base = tg.Config(iterations=100, max_wallclock_seconds=0.0, truncate_fraction=0.4)

    def at(config: tg.Config, step: int, seconds: float = 0.0) -> bool:
        return tg.training_mode(config, step, seconds).truncated

    assert [at(base, step) for step in (0, 39, 40, 99)] == [True, True, False, False]
    timed = tg.replace(base, max_wallclock_seconds=10.0)
    assert [at(timed, 1, seconds) for seconds in (3.9, 4.0)] == [True, False]
    grown = tg.replace(base, passes_schedule="0:1,0.2:3")
    assert [at(grown, step) for step in (19, 20, 39, 40)] == [False, True, True, False]
    rounded = tg.replace(base, qat_fraction=0.8)
    assert [at(rounded, step) for step in (19, 20, 39)] == [True, False, False]
    for config in (base, timed, grown, rounded):
        modes = tg.training_modes(config)
        assert {tg.training_mode(config, step, 0.0) for step in range(101)} <= set(modes)
    assert len(tg.training_modes(base)) == len(tg.training_modes(grown)) - 1 == 2


# ---- What is not rounded, tuned to what is


def refit_of(steps: int) -> dict[str, str]:
    return dict(REFIT_STEPS=str(steps), REFIT_LR="0.02")


def refitted(env: dict[str, str], steps: int, folder: Path) -> tuple[tg.Trainer, tg.GPT, str]:
    """A trained model, that of its artifact after a refit, and the log."""
    config = tg.Config.from_env(env | (refit_of(steps) if steps else {}) | dict(MATRIX_BITS="3"))
    trainer = trainer_of(config)
    make_steps(trainer, 4)
    log = tg.Log(folder / f"run{steps}", True)
    log.folder.mkdir()
    trained = tg.Trained(1.0, tg.Score(1.0, 1.0, 1, 1, 0.0), "iterations")
    validation: Any = None  # only averaged weights are validated again
    tg.export(trainer, trained, validation, log)
    read, _, _ = tg.load_model((log.folder / tg.ARTIFACT).read_bytes(), "here")
    return trainer, read, (log.folder / "train.log").read_text()


def test_a_refit_tunes_what_is_not_rounded_alone(env: dict[str, str], tmp_path: Path) -> None:
    """To the rounded matrices, whose integers stay as they are; on tokens that come next."""
    given = env | dict(LOOP_LANES="1")
    trainer, plain, silent = refitted(given, 0, tmp_path)
    _, tuned, told = refitted(given, 5, tmp_path)
    for (name, p), q in zip(plain.named_parameters(), tuned.parameters(), strict=True):
        if tg.role_of(p).bits:
            assert p.equal(q), name
        elif name != "mix.0.weight":
            assert not p.equal(q), name
    assert "refit" not in silent and "refit steps:5 train_loss:" in told
    batches = [pair for step in range(4, 9) for pair in trainer.batches.micro(step)]
    with torch.no_grad():
        before, after = (
            sum(model(*pair, tg.Mode(2)).item() for pair in batches) for model in (plain, tuned)
        )
    assert after < before


def run_unscored(
    env: Mapping[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tg.Trainer, bytes]:
    """A run into `folder` that scores nothing: its trainer and its artifact."""
    monkeypatch.setattr(tg, "check_tokenizer", lambda *_: "made-up tokens")
    monkeypatch.setattr(tg, "Validation", lambda *_: lambda *_, **__: no_score())
    place = dict(LOG_DIR=str(folder.parent), RUN_ID=folder.name, WARMUP_STEPS="0")
    config, scorer = tg.Config.from_env(place | dict(env)), cast(tg.Scorer, None)
    trainer, log, _ = tg.train_and_export(config, one_rank(), scorer)
    return trainer, (log.folder / tg.ARTIFACT).read_bytes()


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_a_refit_is_to_what_is_exported(
    average: str, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the average, rounded by GPTQ; weights are as before, a run that goes on packs the same."""
    seen: list[dict[str, Tensor]] = []
    sum_gradients, export = tg.Trainer.sum_gradients, tg.export

    def noted(trainer: tg.Trainer, *given: Any) -> None:
        if trainer.step == trainer.config.iterations:  # the refit's
            seen.append(rounded_matrices(trainer.model))
        sum_gradients(trainer, *given)

    def exported(trainer: tg.Trainer, *given: Any) -> dict[str, Any]:
        before = flat(trainer.params)
        figures = export(trainer, *given)
        assert flat(trainer.params).equal(before)
        return figures

    monkeypatch.setattr(tg.Trainer, "sum_gradients", noted)
    monkeypatch.setattr(tg, "export", exported)
    given = refit_of(2) | dict(GPTQ_BATCHES="1", MATRIX_BITS="3", LOOP_LANES="1")
    given |= dict(AVERAGE=average, WARMDOWN_ITERS="4", SAVE_EVERY="100")
    given |= dict(SWA_EVERY="1", SWA_LR_FACTOR="0.6") if average == "swa" else {}
    trainer, data = run_unscored(env | given, tmp_path / "run", monkeypatch)
    assert trainer.average.count == dict(none=0, ema=4, swa=3)[average]
    read, _, _ = tg.load_model(data, "here")
    with trainer.average.swapped_in(trainer.params):
        hessians, *_ = tg.sum_moments(trainer, 1)
        with tg.as_stored(dict(trainer.model.named_parameters()), trainer.config, hessians):
            seen.append(rounded_matrices(trainer.model))
    assert len(seen) == 3
    for matrices in seen:
        for name, matrix in rounded_matrices(read).items():
            assert matrices[name].equal(matrix), name
    saved = dict(RESUME=str(tmp_path / "run"))
    _, again = run_unscored(env | given | saved, tmp_path / "again", monkeypatch)
    assert again == data


def rounded_matrices(model: tg.GPT) -> dict[str, Tensor]:
    """What an artifact holds in integers, as it is now."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if tg.role_of(p).bits}


def written_refit(model: tg.GPT, config: tg.Config, pairs: list[Any]) -> dict[str, Tensor]:
    """The refit by Adam's formula in float64, with the model's gradients in float32."""
    named = dict(model.named_parameters())
    for p in named.values():
        if tg.role_of(p).bits:
            q, step = tg.store(p, config, None).tensors
            p.data = q.float() * step.float()[:, None]
    free = {name: p for name, p in named.items() if not tg.role_of(p).bits}
    values = {name: p.detach().double() for name, p in free.items()}
    first = {name: torch.zeros_like(v) for name, v in values.items()}
    second = {name: torch.zeros_like(v) for name, v in values.items()}
    for i, pair in enumerate(pairs):
        grads = torch.autograd.grad(model(*pair, tg.Mode(2)), [*free.values()])
        rate = config.refit_lr * (1 - i / len(pairs))
        for (name, v), g in zip(values.items(), grads):
            first[name] = 0.9 * first[name] + 0.1 * g.double()
            second[name] = 0.95 * second[name] + 0.05 * g.double() ** 2
            m, s = first[name] / (1 - 0.9 ** (i + 1)), second[name] / (1 - 0.95 ** (i + 1))
            v -= rate * m / (s.sqrt() + 1e-8)
            free[name].data = v.float()
    return values


def test_a_refit_is_adam_on_rounded_matrices(env: dict[str, str], tmp_path: Path) -> None:
    config = tg.Config.from_env(env | refit_of(6) | dict(LOOP_LANES="1", MATRIX_BITS="3"))
    trainer = trainer_of(config)
    make_steps(trainer, 4)
    start = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    pairs = [pair for step in range(4, 10) for pair in trainer.batches.micro(step)]
    model = tg.GPT(config.architecture())
    model.load_state_dict(trainer.model.state_dict())
    expected = written_refit(model, config, pairs)
    (tmp_path / "run").mkdir()
    tg.refit(trainer, {}, tg.Log(tmp_path / "run", True))
    for name, value in expected.items():
        move = trainer.model.get_parameter(name).double() - start[name]
        wanted = value - start[name]
        torch.testing.assert_close(move, wanted, rtol=1e-3, atol=2e-6, msg=name)


def test_a_refit_sees_what_calibration_has_not_seen(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three micro-batches of a calibration are of two steps, which a refit leaves out."""
    more = refit_of(2) | dict(GPTQ_BATCHES="3", TRAIN_BATCH_TOKENS="48")
    trainer = trainer_of(tg.Config.from_env(env | more))
    make_steps(trainer, 4)
    read, seen = trainer.batches.read, []

    def noted(step: int) -> list[Tensor]:
        seen.append(step)
        return read(step)

    monkeypatch.setattr(trainer.batches, "read", noted)
    (tmp_path / "run").mkdir()
    log = tg.Log(tmp_path / "run", True)
    hessians, _ = tg.calibrate(trainer, log)
    assert seen == [4, 5]
    tg.refit(trainer, hessians, log)
    assert seen == [4, 5, 6, 7]


def test_a_refit_skips_a_step_that_is_not_finite(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = trainer_of(tg.Config.from_env(env | refit_of(3)))
    make_steps(trainer, 4)
    sum_gradients = trainer.sum_gradients

    def bad_step(*given: Any) -> None:
        sum_gradients(*given)
        if not trainer.skipped.count:
            trainer.gradients.flat.fill_(math.nan)

    monkeypatch.setattr(trainer, "sum_gradients", bad_step)
    (tmp_path / "run").mkdir()
    before = flat(trainer.params)
    tg.refit(trainer, {}, tg.Log(tmp_path / "run", True))
    assert trainer.skipped.count == 1
    assert flat(trainer.params).isfinite().all() and not flat(trainer.params).equal(before)


def test_an_export_that_breaks_off_leaves_the_weights_as_trained(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A checkpoint that is made of them then is refitted once, not twice, by what goes on."""
    trainer = trainer_of(tg.Config.from_env(env | refit_of(3) | dict(AVERAGE="none")))
    make_steps(trainer, 4)
    trained = flat(trainer.params)
    seen = []

    def no_room(model: tg.GPT, *_: Any) -> bytes:
        seen.append(flat(model.parameters()))
        raise OSError("no room")

    monkeypatch.setattr(tg, "pack_to_fit", no_room)
    (tmp_path / "run").mkdir()
    with pytest.raises(Exception, match="no room"):
        done, validation = tg.Trained(1.0, no_score(), "steps"), SimpleNamespace()
        tg.export(trainer, done, cast(tg.Validation, validation), tg.Log(tmp_path / "run", True))
    assert not seen[0].equal(trained)
    assert flat(trainer.params).equal(trained)


def test_a_refit_ends_a_step_before_its_seconds_are_over(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step takes 2 s here, after 1 of rounding: after four, the next would end after 8.5."""
    given = env | refit_of(100) | dict(MAX_WALLCLOCK_SECONDS="600", REFIT_SECONDS="8.5")
    trainer = trainer_of(tg.Config.from_env(given))
    make_steps(trainer, 1)
    now, rates = [0.0], []
    sum_gradients, rounded = trainer.sum_gradients, tg.as_stored

    def slow_step(*given: Any) -> None:
        sum_gradients(*given)
        now[0] += 2

    def slow_rounding(*given: Any) -> Any:
        now[0] += 1
        return rounded(*given)

    def noted(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"] / trainer.config.refit_lr)

    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer, "sum_gradients", slow_step)
    monkeypatch.setattr(tg, "as_stored", slow_rounding)
    (tmp_path / "run").mkdir()
    log = tg.Log(tmp_path / "run", True)
    with register_optimizer_step_post_hook(noted):
        seconds = tg.refit(trainer, {}, log)
    assert seconds == 9.0
    # The rate falls with the time, which ends before the steps do.
    assert rates == pytest.approx([1 - spent / 8.5 for spent in (0, 2, 4, 6)])
    told = (tmp_path / "run" / "train.log").read_text()
    assert re.search("REFIT_SECONDS=8.5 .* no time for .* REFIT_STEPS=100\nrefit steps:4 ", told)


def test_the_time_of_a_refit_counts_as_training(tmp_path: Path) -> None:
    said = [
        "step:4/4 train_loss:2.0 train_time:1000ms step_avg:250.00ms",
        "gptq_calibration batches:4 time:500ms",
        "refit steps:5 train_loss:1.9 time:250ms",
    ]
    for lines, expected in ((said, 1750), (said[::2], 1250), (said[:1], 1000)):
        (tmp_path / "train.log").write_text("\n".join(lines) + "\n")
        log = logs.read(tmp_path / "train.log")
        assert log.train_and_calibrate_ms == expected
        told = f"took {expected / 1e3:.3f} s"
        assert told in checks.training_time(log)


def test_a_refit_has_its_time_and_its_graph() -> None:
    given = dict(
        REFIT_STEPS="50", REFIT_SECONDS="7", QAT_FRACTION="0.1", PASSES_SCHEDULE="0:1,0.5:2"
    )
    config = tg.Config.from_env(given | dict(NUM_LOOPS="2"))
    assert config.training_seconds == 593
    with_gptq = tg.replace(config, gptq_batches=4)
    assert with_gptq.training_seconds == 583
    late = tg.replace(config, qat_fraction=1.0)  # every step rounds; the refit does not
    assert tg.Mode(2) in tg.training_modes(late)
    assert tg.Mode(2) not in tg.training_modes(tg.replace(late, refit_steps=0))
    assert len(tg.training_modes(config)) == len(set(tg.training_modes(config))) == 4


# ---- Alpha and the error feedback of a further pass


def test_a_further_pass_starts_at_alpha_and_without_feedback() -> None:
    """U alone is 0, so that all of the feedback learns; with it a model is one without, exactly."""
    model = fresh_model(architecture(pass_scale_init=0.3, feedback_rank=2))
    core = model.core
    assert core.scale.equal(torch.full((2,), 0.3))
    assert core.diagonal.equal(torch.ones(16)) and core.u.equal(torch.zeros(16, 2))
    assert core.v.all() and core.v.square().mean().item() == pytest.approx(1 / 16, rel=0.5)
    model, without = shaken_model(architecture(feedback_rank=2)), tg.GPT(architecture())
    model.core.u.data.zero_()
    without.load_state_dict(model.state_dict(), strict=False)
    assert score_of(model, tokens()).equal(score_of(without, tokens()))
    model.core.u.data[0] = 1.0
    assert not score_of(model, tokens()).equal(score_of(without, tokens()))


def test_a_run_goes_on_across_an_onset_by_time(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved before a second pass begins at a share of the time, with parameters that wait for it.

    A step takes a second, 11 fit into 12, and the 10th begins after 9.
    """
    let_steps_take(1.0, monkeypatch)
    keep_all_checkpoints(monkeypatch)
    between = dict(LOOP_LANES="1", PASS_SCALE_INIT="0.5", FEEDBACK_RANK="2", AVERAGE="ema")
    timed = dict(MAX_WALLCLOCK_SECONDS="12", ITERATIONS="100", PASSES_SCHEDULE="0:1,0.7:2")
    given = env | between | timed | dict(SAVE_EVERY="6")
    whole, data = run_unscored(given, tmp_path / "whole", monkeypatch)
    saved = tmp_path / "whole" / "step_00000006.ckpt"
    again, same = run_unscored(given | dict(RESUME=str(saved)), tmp_path / "again", monkeypatch)
    for name in ("whole", "again"):
        onset = [line for line in log_of(tmp_path / name).splitlines() if " passes:2" in line]
        assert len(onset) == 1 and onset[0].startswith("step:9/100 ")
    assert whole.step == again.step == 11 and data == same
    assert all(t.equal(one) for t, one in zip(again.state(), whole.state(), strict=True))


# ---- A pass that begins with alpha 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "values",
    [
        dict(num_loops=2),
        dict(num_loops=3, core_skips="all"),
        # Two passes of a U-Net over the loop: all skips that come with the second end inside it.
        dict(num_prelude=3, num_shared=3, num_coda=5, num_loops=2, core_skips="looped"),
    ],
    ids=str,
)
def test_passes_that_begin_with_alpha_0_change_nothing(values: dict[str, Any], dtype: str) -> None:
    """Whatever the other parameters are, to the last bit; and alpha learns from the first step."""
    model = shaken_model(architecture(**values, dtype=dtype, pass_scale_init=0.0))
    model.core.scale.data.zero_()
    one, all_of_them = (model(tokens(), tokens(), tg.Mode(p)) for p in (1, values["num_loops"]))
    assert one.equal(all_of_them)
    all_of_them.backward()
    assert model.core.scale.grad is not None and model.core.scale.grad.all()


# ---- A pool of MLPs


@pytest.mark.parametrize("pool", [2, 3, 5, 6])
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_layers_take_the_mlps_of_a_pool_in_turn(passes: int, pool: int) -> None:
    check_formula(passes, mlp_pool=pool)


def test_a_pool_lies_between_one_a_layer_and_one_a_pass() -> None:
    """At its ends it is what there was, with the same weights, to the last bit."""
    plans = {pool: tg.make_plan(architecture(mlp_pool=pool)) for pool in (0, 2, 4, 6)}
    assert plans[2] == plans[0]
    assert plans[6] == tg.make_plan(architecture(share_attn_only=True))
    assert [layer.mlp for layer in plans[4]] == [0, 1, 2, 3, 4, 1, 2, 5]
    assert [layer.attn for layer in plans[4]] == [0, 1, 2, 1, 2, 1, 2, 3]
    one, other = (
        fresh_model(architecture(mlp_pool=6)),
        fresh_model(architecture(share_attn_only=True)),
    )
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert p.equal(q)


@pytest.mark.parametrize("mlps", [dict(SHARE_ATTN_ONLY="1"), dict(MLP_POOL="3")], ids=str)
def test_an_mlp_that_waits_for_the_loop_does_not_decay(
    env: dict[str, str], mlps: dict[str, str]
) -> None:
    """Nor do its gains; before the onset a layer has the MLP of its first pass."""
    decays = dict(MUON_WD="0.5", SCALAR_WD="0.5", USE_PERI_NORM="1")
    trainer = trainer_of(tg.Config.from_env(env | decays | mlps))
    before = [{n: p.clone() for n, p in mlp.named_parameters()} for mlp in trainer.model.mlp]
    waiting = set(range(len(before))) - {x.mlp for x in trainer.model.plans[1]}
    assert waiting
    for until, still in ((2, waiting), (4, set())):
        make_steps(trainer, until)
        for i, mlp in enumerate(trainer.model.mlp):
            moved = {n for n, p in mlp.named_parameters() if not p.equal(before[i][n])}
            assert moved == (set() if i in still else before[i].keys()), i


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            dict(TRUNCATE_FRACTION="0.5", NUM_LOOPS="1"),
            "TRUNCATE_FRACTION=0.5 cannot act here: NUM_LOOPS=1",
        ),
        (
            dict(TRUNCATE_FRACTION="0.5", JACOBIAN_WEIGHT="0.1"),
            "TRUNCATE_FRACTION=0.5 cannot act here: JACOBIAN_WEIGHT=0.1",
        ),
        (dict(REFIT_STEPS="5", MATRIX_BITS="0"), "MATRIX_BITS=0, .* rules out REFIT_STEPS=5"),
        (
            dict(REFIT_STEPS="5", REFIT_SECONDS="600"),
            "leaves nothing to train in after REFIT_SECONDS=600.0$",
        ),
        (dict(REFIT_LR="0.1"), "REFIT_LR=0.1 cannot act here: REFIT_STEPS=0"),
        (dict(MLP_POOL="4", NUM_LOOPS="1"), "MLP_POOL=4 cannot act here: NUM_LOOPS=1"),
        (dict(MLP_POOL="8", SHARE_ATTN_ONLY="1"), "MLP_POOL=8 cannot act here: SHARE_ATTN_ONLY=1"),
        (dict(MLP_POOL="3"), "MLP_POOL=3 is not 0 or 4 to 12"),
        (dict(MLP_POOL="13"), "MLP_POOL=13 is not 0 or 4 to 12"),
        (dict(CORE_LR_POWER="1", NUM_LOOPS="1"), "CORE_LR_POWER=1.0 cannot act here: NUM_LOOPS=1"),
        (dict(CORE_BRANCH_SCALE="1", NUM_SHARED="0"), "CORE_BRANCH_SCALE=1.0 cannot act here"),
        (dict(MIX_INIT="2", USE_BIRKHOFF_MIX="0"), "MIX_INIT=2.0 cannot act here: USE_BIRKHOFF"),
        (dict(MIX_ONCE_A_PASS="1", NUM_SHARED="1"), "MIX_ONCE_A_PASS=1 cannot act here"),
        (
            dict(TRUNCATE_FRACTION="0.5", PASSES_SCHEDULE="0:1,0.2:3", QAT_FRACTION="0.9"),
            "TRUNCATE_FRACTION=0.5 cannot act: .* from 0.1 of the run on, by QAT_FRACTION=0.9",
        ),
        (
            dict(
                TRUNCATE_FRACTION="0.5",
                PASSES_SCHEDULE="0:1,0.3:3",
                WARMDOWN_FRACTION="1",
                QAT_LR_FACTOR="0.75",
            ),
            "TRUNCATE_FRACTION=0.5 cannot act: .* from 0.25 of the run on, .* QAT_LR_FACTOR=0.75",
        ),
    ],
)
def test_what_cannot_act_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(tg.InputError, match=message):
        tg.Config.from_env(values)
