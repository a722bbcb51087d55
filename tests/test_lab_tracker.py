"""TRACKER: what goes to TensorBoard or Weights & Biases as well, and that neither can end a run."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from records.tools import common

SMALL = dict(
    PRESET="Bp,tiny",
    MODEL_DIM="32",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="256",
    ITERATIONS="3",
    WARMDOWN_ITERS="0",
    WARMUP_STEPS="0",
    TRAIN_LOG_EVERY="1",
    DTYPE="float32",  # with which a processor is faster
)


def run(corpus: dict[str, str], folder: Path, tracker: str) -> str:
    """The log of a run with a tracker."""
    env = corpus | SMALL | dict(TRACKER=tracker, LOG_DIR=str(folder), RUN_ID="run")
    assert tg.run(tg.Config.from_env(env), tg.World({})) == 0
    assert (folder / "run" / "result.json").exists()
    return "\n".join(common.read_log(folder / "run" / "train.log").lines)


def test_tensorboard_shows_what_metrics_jsonl_has(corpus: dict, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(corpus, tmp_path, "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2, 3]
    assert [e.step for e in events.Scalars("val_bpb")] == [3]


def fake_wandb(fails: str, sent: list[dict[str, Any]]) -> types.ModuleType:
    def init(**_: Any) -> types.SimpleNamespace:
        if fails == "init":
            raise OSError("no network")
        return types.SimpleNamespace(log=log, finish=lambda: sent.append({"finished": True}))

    def log(values: dict[str, Any]) -> None:
        if fails == "log" and len(sent) == 2:
            raise RuntimeError("quota")
        sent.append(values)

    module: Any = types.ModuleType("wandb")
    module.init = init
    return module


@pytest.mark.parametrize(
    ("fails", "count", "warning"),
    [
        ("", 6, None),
        ("init", 0, "TRACKER is off: OSError: no network"),
        ("log", 2, "TRACKER is off: RuntimeError: quota"),
    ],
)
def test_a_tracker_that_fails_is_switched_off_and_named(
    fails: str,
    count: int,
    warning: str | None,
    corpus: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(fails, sent))
    log = run(corpus, tmp_path, "wandb")
    assert len(sent) == count
    if not fails:
        assert sent[-2]["step"] == 3 and sent[-2]["final_roundtrip"] > 0
        assert sent[-1] == {"finished": True}
    assert (warning is None) == ("warning: TRACKER" not in log)
    assert warning is None or log.count(f"warning: {warning}\n") == 1


def test_scores_of_an_artifact_go_to_a_tracker_again(
    corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb("", sent))
    run(corpus, tmp_path, "wandb")
    trained, _ = sent[-2:]
    sent.clear()
    env = corpus | dict(EVAL_ONLY=str(tmp_path / "run"), TRACKER="wandb", LOG_DIR=str(tmp_path))
    assert tg.run(tg.Config.from_env(env | dict(RUN_ID="again")), tg.World({})) == 0
    assert sent == [trained | {"step": 0}, {"finished": True}]


def test_a_tracker_begins_before_the_clock(
    corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no validation comes before the first step: it may take minutes."""
    calls = []
    monkeypatch.setattr(tg.Tracker, "begin", lambda tracker: calls.append("begin"))
    start = tg.Clock.start

    def noted(clock: tg.Clock) -> None:
        calls.append("clock")
        start(clock)

    monkeypatch.setattr(tg.Clock, "start", noted)
    run(corpus | dict(VAL_LOSS_EVERY="0"), tmp_path, "wandb")
    assert "begin" in calls and calls[-1] == "clock"


def test_a_package_that_is_missing_is_a_warning(
    corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "warning: TRACKER is off: ModuleNotFoundError" in run(corpus, tmp_path, "wandb")
