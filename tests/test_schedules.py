"""What is done in which step: learning rates, momentum, passes over the core, rounding."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import one_rank
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stack_written_out import STACK

import train_gpt as tg

pytestmark = pytest.mark.quick


def test_learning_rate_schedule() -> None:
    env = {"ITERATIONS": "100", "WARMDOWN_ITERS": "20", "MAX_WALLCLOCK_SECONDS": "1000"}
    config = tg.Config.from_env(env)
    assert [tg.lr_factor(config, s, 1.0 * s) for s in (0, 50, 80, 90, 100)] == [1, 1, 1, 0.5, 0]
    slow = [tg.lr_factor(config, s, 20.0 * s) for s in (1, 30, 40, 50)]
    assert slow == pytest.approx([1, 1, 0.5, 0]), "the clock ends it at step 50"
    assert tg.muon_momentum(config, 0, 0.0) == 0.85 and tg.muon_momentum(config, 500, 0.0) == 0.95
    assert tg.muon_momentum(config, 250, 999.0) == pytest.approx(0.9), "steps alone"


def test_fractions_are_of_steps_or_time_whichever_is_further() -> None:
    """Against the formulas of PR 1720 in numbers; f is .1, .4, .6, .8, .95 and 1."""
    config = replace(
        tg.Config(**STACK),
        iterations=1000,
        max_wallclock_seconds=50.0,
        warmdown_fraction=0.75,
        muon_momentum_warmup_start=0.92,
        muon_momentum=0.99,
        muon_momentum_warmup_fraction=0.4,
        passes_schedule="0:1,0.35:3",
    )
    moments = [(100, 4.0), (10, 20.0), (600, 1.0), (1, 40.0), (950, 47.4), (7, 50.0)]
    rates = [tg.lr_factor(config, *moment) for moment in moments]
    assert rates == pytest.approx([1, 0.6 / 0.75, 0.4 / 0.75, 0.2 / 0.75, 0.05 / 0.75, 0])
    floored = replace(config, lr_floor=0.1)
    assert [tg.lr_factor(floored, *moment) for moment in moments] == [*rates[:4], 0.1, 0.1]
    momenta = [tg.muon_momentum(config, *moment) for moment in moments]
    assert momenta == pytest.approx([0.92 + 0.07 * 0.25, *[0.99] * 5])
    modes = [tg.training_mode(config, *moment).passes for moment in moments]
    assert modes == [1, 3, 3, 3, 3, 3]


def test_a_floor_ends_a_warm_down_in_steps_too() -> None:
    config = tg.Config(
        **STACK, iterations=100, warmdown_iters=20, max_wallclock_seconds=0.0, lr_floor=0.25
    )
    found = [tg.lr_factor(config, step, 0.0) for step in (0, 80, 90, 95, 96, 100)]
    assert found == [1, 1, 0.5, 0.25, 0.25, 0.25]


def test_neither_warms_where_both_are_off() -> None:
    config = tg.Config(**STACK, warmdown_iters=0, muon_momentum_warmup_steps=0)
    assert tg.lr_factor(config, 19_999, 599.0) == 1
    assert tg.muon_momentum(config, 0, 0.0) == config.muon_momentum


SCHEDULES = st.sampled_from(
    ["", "0:1,0.6:2,0.8:3", "0:1,3:2,7:3", "0:2,0.5:3", "0:1,6:3", "0:1,0.9:3"]
)


def with_schedule(**values: Any) -> tg.Config:
    """Of the stack; without a truncation that its schedule leaves no room for."""
    try:
        return replace(tg.Config(**STACK), **values)
    except tg.InputError:
        return replace(tg.Config(**STACK), **values | dict(truncate_fraction=0.0))


CONFIGS = st.builds(
    with_schedule,
    passes_schedule=SCHEDULES,
    iterations=st.integers(0, 40),
    warmdown_iters=st.sampled_from([0, 1, 5, 40, 400]),
    warmdown_fraction=st.sampled_from([0.0, 0.3, 1.0]),
    lr_floor=st.sampled_from([0.0, 0.1]),
    max_wallclock_seconds=st.sampled_from([0.0, 3.0, 11.0]),
    qat_fraction=st.sampled_from([0.0, 0.3, 1.0]),
    qat_lr_factor=st.sampled_from([0.0, 0.15, 1.0]),
    qat_core_only=st.just(False),
    core_bits=st.sampled_from([0, 5]),
    gptq_batches=st.sampled_from([0, 1]),
    gptq_seconds=st.just(1.0),
    truncate_fraction=st.sampled_from([0.0, 0.5, 1.0]),
)


AT_ONCE = with_schedule(  # a pass begins exactly where rounding does, and ends the truncation
    passes_schedule="0:1,0.1:2,0.25:3",
    iterations=100,
    warmdown_fraction=1.0,
    max_wallclock_seconds=0.0,
    qat_lr_factor=0.75,
    qat_core_only=False,
    truncate_fraction=0.5,
)


@settings(max_examples=200)
@example(AT_ONCE, [0.01])
@given(CONFIGS, st.lists(st.floats(0.01, 2.0), min_size=1, max_size=41))
def test_modes_of_any_run_are_warmed_up_and_only_grow(
    config: tg.Config, per_step: list[float]
) -> None:
    """A simulated run: passes never shrink, and rounding stays on once it is on."""
    known, seconds = tg.training_modes(config), 0.0
    seen: list[tg.Mode] = []
    for step in range(config.iterations + 1):
        if config.training_seconds and seconds > config.training_seconds:
            break
        seen.append(tg.training_mode(config, step, seconds))
        seconds += per_step[step % len(per_step)]
    assert set(seen) <= set(known), "a mode that would be compiled on the clock"
    passes = [mode.passes for mode in seen]
    assert passes == sorted(passes) and passes[0] == config.schedule()[0][1]
    if config.qat_fraction and not config.qat_lr_factor:  # rates may rise where steps speed up
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
def test_every_mode_is_warmed_up_once(late: dict[str, Any], count: int) -> None:
    config = tg.Config(
        **STACK, passes_schedule="0:1,0.6:2,0.8:3", iterations=100, warmdown_iters=50, **late
    )
    assert len(tg.training_modes(config)) == len(set(tg.training_modes(config))) == count


def test_passes_that_come_again_are_one_mode() -> None:
    """Two graphs are few enough to compile the whole model."""
    config = tg.Config(**STACK, passes_schedule="0:1,0.3:3,0.6:1,0.8:3")
    assert [mode.passes for mode in tg.training_modes(config)] == [1, 3]
    gpu: Any = SimpleNamespace(on_cuda=True)
    assert tg.Compiler(config, gpu).level == "model"
    again = replace(config, passes_schedule="0:3,0.2:1,0.4:3", truncate_fraction=0.5)
    modes = tg.training_modes(again)
    assert len(modes) == len(set(modes)) == 3


def test_a_refit_is_warmed_up_at_the_passes_that_are_scored() -> None:
    config = tg.Config(**STACK | dict(eval_passes=2), refit_steps=5)
    assert tg.training_modes(config) == [tg.Mode(3), tg.Mode(2)]
    assert tg.training_modes(replace(config, eval_passes=0)) == [tg.Mode(3)]


def test_a_mode_that_began_is_not_put_back() -> None:
    """A slow spell before a reading lets estimates run ahead of the next one; resumed or not."""
    config = tg.Config(
        **STACK, passes_schedule="0:1,0.5:3", max_wallclock_seconds=40.0, iterations=10**6
    )
    clock = tg.Clock(one_rank(), 40.0, tg.Progress(step=10, seconds=10.0, per_step=2.0, due=18))

    def passes(step: int, clock: tg.Clock) -> int:
        return tg.training_mode(config, step, clock.furthest(step)).passes

    assert [passes(step, clock) for step in (10, 14, 15)] == [1, 1, 3]
    clock.seconds, clock.per_step = 19.0, 0.1  # a reading: less time has passed than was expected
    assert clock.estimate(15) < 20 and passes(16, clock) == 3
    assert clock.estimate(16) < 20, "what is reported is not more than was measured"
    past = tg.Progress(step=16, seconds=clock.estimate(16), per_step=0.1, due=20, most=clock.most)
    read = tg.Progress.from_json(json.loads(json.dumps(past._asdict())), config.iterations)
    assert passes(16, tg.Clock(one_rank(), 40.0, read)) == 3
    assert passes(16, tg.Clock(one_rank(), 40.0, read._replace(most=0.0))) == 1


def test_passes_by_step_fraction_and_clock() -> None:
    base = tg.Config(**STACK, iterations=100, max_wallclock_seconds=0.0, warmdown_iters=0)

    def at(config: tg.Config, step: int, seconds: float = 0.0) -> int:
        return tg.training_mode(config, step, seconds).passes

    by_step = replace(base, passes_schedule="0:1,10:2,20:3")
    assert [at(by_step, s) for s in (0, 9, 10, 19, 20, 99)] == [1, 1, 2, 2, 3, 3]
    assert at(by_step, 9, 1e9) == 1, "steps do not look at the clock"
    part = replace(base, passes_schedule="0:1,0.5:2,0.75:3")
    assert [at(part, s) for s in (0, 49, 50, 74, 75, 100)] == [1, 1, 2, 2, 3, 3]
    both = replace(part, max_wallclock_seconds=40.0)  # whichever of clock and steps is further
    assert [at(both, 10, t) for t in (0.0, 19.9, 20.0, 29.9, 30.0)] == [1, 1, 2, 2, 3]
    assert at(both, 60, 5.0) == 2
    assert at(replace(both, gptq_batches=1, gptq_seconds=20.0), 10, 10.0) == 2
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
