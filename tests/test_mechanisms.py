"""Ways to make a loop worth its time, each against its formula in float64, off and on."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import flat, no_score
from test_lanes import BETWEEN, SMALL, Written, make_steps, norm, tokens, trainer_of
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
    """The model of one sequence in float64, without lanes, with the mechanisms of this file."""

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
        scale = w[f"attn.{stored}.scale"] * gamma[0]
        x = x + scale * self.attention(norm(x), stored) + beta[0]
        mlp = self.mlp_of(stored, row)
        inner = x @ w[f"mlp.{mlp}.fc.weight"].T
        inner = torch.where(inner > 0, inner, 0.5 * inner) ** 2
        scale = w[f"mlp.{mlp}.scale"] * gamma[1]
        return x + scale * norm(inner @ w[f"mlp.{mlp}.proj.weight"].T) + beta[1]

    def hidden(self, ids: Tensor, passes: int) -> Tensor:
        a = self.a
        x = x0 = norm(self.w["tok_emb"])[ids]
        for i in range(a.num_prelude):
            x = self.layer(x, x0, i, i)
        for number in range(passes):
            x = self.core_pass(x, x0, number)
        for t in range(a.num_coda):
            stored = a.num_prelude + a.num_shared + t
            x = self.layer(x, x0, stored, stored + a.num_shared * (a.num_loops - 1))
        return norm(x)


def check_formula(passes: int = 3, **options: Any) -> None:
    """The state that a model with these options comes to is that of its formula."""
    a = architecture(eval_passes=4, **options)
    model = shaken_model(a)
    written = Formula(model, a)
    expected = torch.stack([written.hidden(row, passes) for row in tokens()])
    with torch.no_grad():
        found = model.hidden(tokens(), tg.Mode(passes))[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def check_carried(env: Mapping[str, str], folder: Path) -> None:
    """An artifact and a checkpoint carry what the variables switch on; all of it is trained.

    The run has one pass and then two.
    """
    config = tg.Config.from_env(env)
    trainer = trainer_of(config)
    before = [p.detach().clone() for p in trainer.params]
    make_steps(trainer, 2)
    log = tg.Log(folder / "run", True)
    log.folder.mkdir()
    checkpoints = tg.Checkpoints(config, trainer.world, trainer.batches.tokens.total, log)
    with checkpoints.kept(trainer):
        checkpoints.save(trainer)
    make_steps(trainer, 4)
    for (name, p), start in zip(trainer.model.named_parameters(), before):
        if name != "mix.0.weight":  # before the first layer x is x0
            assert not p.equal(start), f"{name} is not trained"
    (path,) = log.folder.glob("*.ckpt")
    config = tg.replace(config, resume=str(path))
    again = trainer_of(config)
    tg.restore(again, tg.find_checkpoint(config, again, []), log)
    make_steps(again, 4)
    for one, other in zip(trainer.state(), again.state(), strict=True):
        assert one.equal(other)
    read, found, _ = tg.load_model(tg.pack(trainer.model, config), "here")
    assert found == config.architecture()
    for (name, p), stored in zip(trainer.model.named_parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(stored, p, rtol=0.02, atol=0.02, msg=name)


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


def test_a_mix_once_a_pass_is_trained_and_carried(env: dict[str, str], tmp_path: Path) -> None:
    given = dict(MIX_ONCE_A_PASS="1", MIX_INIT="2", LOOP_LANES="1")
    check_carried(env | given, tmp_path)


# ---- The core's branches scaled by the number of passes


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_branches_of_the_core_are_scaled_by_the_passes(passes: int) -> None:
    check_formula(passes, num_shared=3, core_branch_scale=2.0)
    check_formula(passes, num_loops=2, core_branch_scale=0.5)


def test_a_scale_of_one_is_no_scale() -> None:
    """lambda = N L^0.5 computes what no scale computes, to the last bit."""
    a = architecture(num_shared=4, core_branch_scale=6.0)
    scaled, plain = shaken_model(a), shaken_model(tg.replace(a, core_branch_scale=0.0))
    with torch.no_grad():
        expected = plain.hidden(tokens(), tg.Mode(3))[0]
        assert scaled.hidden(tokens(), tg.Mode(3))[0].equal(expected)


def test_scaled_branches_are_trained_and_carried(env: dict[str, str], tmp_path: Path) -> None:
    check_carried(env | dict(CORE_BRANCH_SCALE="1.5", LOOP_LANES="1"), tmp_path)


# ---- Gradients through the last pass only


def written_gradients(model: tg.GPT, a: tg.Architecture, passes: int) -> dict[str, Tensor]:
    """Of the loss of one sequence, in float64, around all passes but the last."""
    written = Formula(model, a)
    for weight in written.w.values():
        weight.requires_grad_()
    ids, w = tokens(1)[0], written.w
    x = x0 = norm(w["tok_emb"])[ids]
    for i in range(a.num_prelude):
        x = written.layer(x, x0, i, i)
    begun = x
    with torch.no_grad():
        for number in range(passes - 1):
            x = written.core_pass(x, x0, number)
    x = begun + (x - begun).detach()
    x = written.core_pass(x, x0, passes - 1)
    for t in range(a.num_coda):
        stored = a.num_prelude + a.num_shared + t
        x = written.layer(x, x0, stored, stored + a.num_shared * (a.num_loops - 1))
    logits = 30 * torch.tanh(norm(x) @ w["tok_emb"].T / 30)
    torch.nn.functional.cross_entropy(logits, ids.roll(-1)).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in w.items()}


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("options", [{}, BETWEEN, dict(num_prelude=0), dict(mlp_pool=5)])
def test_a_truncated_gradient_goes_through_the_last_pass_alone(
    options: dict[str, Any], passes: int
) -> None:
    """Of all passes the value, of the last one the gradient; around the others it is whole."""
    a = architecture(**options)
    model, pair = shaken_model(a), (tokens(1), tokens(1).roll(-1, 1))
    with torch.no_grad():
        whole = model(*pair, tg.Mode(passes))
    loss = model(*pair, tg.Mode(passes, truncated=True))
    assert loss.equal(whole)
    loss.backward()
    for name, expected in written_gradients(model, a, passes).items():
        grad = model.get_parameter(name).grad
        found = torch.zeros_like(expected) if grad is None else grad.double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_a_truncated_gradient_reaches_every_lane() -> None:
    model = fresh_model(architecture(loop_lanes=2))
    pair = tokens(), tokens().roll(-1, 1)
    loss = model(*pair, tg.Mode(3, truncated=True))
    assert loss.equal(model(*pair, tg.Mode(3)))
    loss.backward()
    lanes = model.core.lanes
    assert lanes is not None
    for p in (lanes.read, lanes.mix, lanes.write):
        assert p.grad is not None and not p.grad[:2].any() and p.grad[2].any()
    assert model.attn[0].qkv.weight.grad is not None and model.tok_emb.grad is not None


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


def test_truncation_is_one_graph_more() -> None:
    torch._dynamo.reset()
    core = architecture(**tg.layers(0, 1, 2, 0))  # a tracer's time is that of its layers
    model, graphs = shaken_model(core), []

    def count(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    pair = tokens(), tokens().roll(-1, 1)
    for mode in (tg.Mode(2, truncated=True), tg.Mode(2), tg.Mode(2, truncated=True)):
        compiled(*pair, mode).backward()
    assert len(graphs) == 2


def test_a_run_with_truncation_goes_on(env: dict[str, str], tmp_path: Path) -> None:
    given = dict(TRUNCATE_FRACTION="0.75", PASSES_SCHEDULE="", LOOP_LANES="2")
    check_carried(env | given, tmp_path)


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
    given = env | dict(LOOP_LANES="1")
    trainer, _, _ = refitted(given, 0, tmp_path)
    _, tuned, _ = refitted(given, 3, tmp_path)
    pairs = [pair for step in range(4, 7) for pair in trainer.batches.micro(step)]
    config = tg.Config.from_env(given | refit_of(3) | dict(MATRIX_BITS="3"))
    expected = written_refit(trainer.model, config, pairs)
    for name, value in expected.items():
        found = tuned.get_parameter(name).double()
        torch.testing.assert_close(found, value, rtol=2e-3, atol=2e-4, msg=name)


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
    """A step takes 2 s here, rounding 1: after 7 s, the next one would end after 8.5."""
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
    assert seconds == 7.0
    # The rate falls with the time, which ends before the steps do.
    assert rates == pytest.approx([1 - spent / 8.5 for spent in (1, 3, 5)])
    told = (tmp_path / "run" / "train.log").read_text()
    assert "REFIT_SECONDS=8.5 have no time for more of REFIT_STEPS=100\nrefit steps:3 " in told


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


def test_gradients_reach_every_mlp_of_a_pool() -> None:
    model = fresh_model(architecture(mlp_pool=5))
    model(tokens(), tokens().roll(-1, 1), tg.Mode(3)).backward()
    assert len(model.mlp) == 7
    for mlp in model.mlp:
        assert mlp.proj.weight.grad is not None and mlp.proj.weight.grad.any()


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


def test_a_pool_is_trained_and_carried(env: dict[str, str], tmp_path: Path) -> None:
    check_carried(env | dict(MLP_POOL="3", LOOP_LANES="1"), tmp_path)


# ---- The core's learning rate by the number of passes


def moves(env: dict[str, str], last: int) -> dict[str, Tensor]:
    """How far step `last` (counted from 1) moves every matrix, the steps before being without."""
    off = tg.Config.from_env(env | dict(CORE_LR_POWER="0"))
    trainer = trainer_of(off)
    make_steps(trainer, last - 1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.config = tg.Config.from_env(env)
    make_steps(trainer, last)
    return {
        name: (p.detach() - before[name]).double()
        for name, p in trainer.model.named_parameters()
        if tg.role_of(p).optimizer == "muon"
    }


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(("step", "passes"), [(1, 1), (4, 2)])
def test_the_core_moves_less_the_more_passes_use_it(
    step: int, passes: int, power: float, env: dict[str, str]
) -> None:
    """Its step and its decay, by passes^-power; nothing else moves otherwise."""
    given = env | dict(LOOP_LANES="1", MUON_WD="0.5", WARMDOWN_ITERS="0")
    plain = moves(given, step)
    powered = moves(given | dict(CORE_LR_POWER=str(power)), step)
    core = {f"{kind}.{i}.{w}.weight" for i in (1, 2) for kind, w in CORE_MATRICES}
    assert core < plain.keys()
    for name, move in plain.items():
        expected = move * passes**-power if name in core else move
        torch.testing.assert_close(powered[name], expected, rtol=1e-4, atol=1e-7, msg=name)


CORE_MATRICES = [("attn", "qkv"), ("attn", "proj"), ("mlp", "fc"), ("mlp", "proj")]


def test_a_smaller_rate_of_the_core_is_carried(env: dict[str, str], tmp_path: Path) -> None:
    check_carried(env | dict(CORE_LR_POWER="1", LOOP_LANES="1"), tmp_path)


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
        (dict(REFIT_STEPS="5", REFIT_SECONDS="600"), "REFIT_SECONDS=600.0 leave none"),
        (dict(REFIT_LR="0.1"), "REFIT_LR=0.1 cannot act here: REFIT_STEPS=0"),
        (dict(MLP_POOL="4", NUM_LOOPS="1"), "MLP_POOL=4 cannot act here: NUM_LOOPS=1"),
        (dict(MLP_POOL="8", SHARE_ATTN_ONLY="1"), "MLP_POOL=8 cannot act here: SHARE_ATTN_ONLY=1"),
        (dict(MLP_POOL="3"), "MLP_POOL=3 is not 0 or 4 to 12"),
        (dict(MLP_POOL="13"), "MLP_POOL=13 is not 0 or 4 to 12"),
        (dict(CORE_LR_POWER="1", NUM_LOOPS="1"), "CORE_LR_POWER=1.0 cannot act here: NUM_LOOPS=1"),
        (dict(CORE_BRANCH_SCALE="1", NUM_SHARED="0"), "CORE_BRANCH_SCALE=1.0 cannot act here"),
        (dict(MIX_INIT="2", USE_BIRKHOFF_MIX="0"), "MIX_INIT=2.0 cannot act here: USE_BIRKHOFF"),
        (dict(MIX_ONCE_A_PASS="1", NUM_SHARED="0"), "MIX_ONCE_A_PASS=1 cannot act here"),
    ],
)
def test_what_cannot_act_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(tg.InputError, match=message):
        tg.Config.from_env(values)
