"""What is done in which step: learning rates, momentum, passes over the core, rounding."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
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
    assert tg.muon_momentum(config, 0) == 0.85 and tg.muon_momentum(config, 500) == 0.95
    assert tg.muon_momentum(config, 250) == pytest.approx(0.9)


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
    truncate_fraction=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=200)
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
