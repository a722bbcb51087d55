"""The refit: how many passes it tunes, and its part of the time."""

from pathlib import Path
from typing import Any

import pytest
from helpers import ManualTime, flat
from test_lanes import env as env  # a fixture
from test_lanes import trainer_of

import train_gpt as tg

TIMED = dict(
    REFIT_STEPS="100",
    REFIT_SECONDS="5",
    GPTQ_BATCHES="2",
    GPTQ_SECONDS="10",
    MAX_WALLCLOCK_SECONDS="600",
)


def new_log(folder: Path) -> tg.Log:
    (folder / "run").mkdir()
    return tg.Log(folder / "run", True)


def let_rounding_take(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> ManualTime:
    """The script's clock moves by one of these with every rounding, the last one for ever."""
    clock, as_stored = ManualTime(), tg.as_stored

    def timed(*given: Any) -> Any:
        clock.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]
        return as_stored(*given)

    monkeypatch.setattr(tg, "time", clock)
    monkeypatch.setattr(tg, "as_stored", timed)
    return clock


@pytest.mark.parametrize("scored", ["1", "2", "3"])
def test_it_tunes_the_passes_that_are_scored(
    env: dict[str, str], scored: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = trainer_of(tg.Config.from_env(env | dict(REFIT_STEPS="2", EVAL_PASSES=scored)))
    sum_gradients, modes = trainer.sum_gradients, []

    def noted(micro: Any, mode: tg.Mode) -> None:
        sum_gradients(micro, mode)
        modes.append(mode)

    monkeypatch.setattr(trainer, "sum_gradients", noted)
    tg.refit(trainer, {}, new_log(tmp_path))
    assert modes == [tg.Mode(int(scored))] * 2 and modes[0] in tg.training_modes(trainer.config)


@pytest.mark.parametrize(
    ("rounding", "steps"),
    [
        (4.0, 4),  # within the time of GPTQ, so it has its 5 s and would end after them with a 5th
        (9.0, 1),  # 2 s are left of 11
        (10.5, 0),  # a first step would end beyond the cap, too
        (12.0, 0),
    ],
)
def test_rounding_is_in_the_time_of_gptq_and_nothing_passes_the_cap(
    env: dict[str, str],
    rounding: float,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Training ended after 585 s, calibration took 4; a step takes one."""
    trainer = trainer_of(tg.Config.from_env(env | TIMED))
    assert trainer.config.training_seconds == 585.0
    clock = let_rounding_take([rounding], monkeypatch)
    trainer.clock.per_step = 1.0

    def step_of_a_second(*_: Any) -> None:
        clock.now += 1

    monkeypatch.setattr(trainer, "sum_gradients", step_of_a_second)
    log = new_log(tmp_path)
    assert tg.refit(trainer, {}, log, 589.0) == rounding + steps
    told = (log.folder / "train.log").read_text()
    assert f"refit steps:{steps} " in told and f"rounding:{1e3 * rounding:.0f}ms" in told


@pytest.mark.parametrize(("steps", "reserve"), [("5", 3.3), ("0", 0.0)])
def test_a_trial_reserves_the_time_of_rounding_too(
    env: dict[str, str],
    steps: str,
    reserve: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Where a refit follows. The first rounding, which loads kernels, does not count."""
    timed = {name: value for name, value in TIMED.items() if "REFIT" not in name}
    given = timed | dict(GPTQ_SECONDS="-1", REFIT_STEPS=steps)
    trainer = trainer_of(tg.Config.from_env(env | given))
    before = flat(trainer.params)
    let_rounding_take([50.0, 3.0], monkeypatch)
    assert tg.measure_reserve(trainer, new_log(tmp_path)) == pytest.approx(reserve)
    assert trainer.config.gptq_seconds == pytest.approx(reserve)
    assert flat(trainer.params).equal(before)
