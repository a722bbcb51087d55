"""Runs that are killed, stopped or damaged, and go on; records/tools/faults.py does it at scale."""

import fcntl
import itertools
import math
import os
import random
import re
import shlex
import shutil
import signal
import threading
import time
import tracemalloc
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    HANG,
    NAMES,
    THREADS,
    ManualTime,
    fork_ranks,
    let_steps_take,
    log_of,
    metrics,
    one_rank,
    result_of,
    wait_for,
)

import train_gpt as tg
from records.tools import common

pytestmark = pytest.mark.bits
STEPS, FAULT_STEP = 10, 5  # steps of a run; where the fault is, from 0
SMALL = dict(
    PRESET="T,tiny",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    NUM_SHARED="1",
    NUM_LOOPS="2",
    PASSES_SCHEDULE="0:1,4:2",
    AVERAGE="ema",
    DTYPE="float32",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="256",
    VAL_BATCH_SIZE="4096",
    ITERATIONS=str(STEPS),
    WARMDOWN_ITERS="4",
    WARMUP_STEPS="0",
    SAVE_EVERY="2",
    MAX_WALLCLOCK_SECONDS="0",
    TRAIN_LOG_EVERY="1",
    MATRIX_LR="0.01",
    SCALAR_LR="0.01",
    TIED_EMBED_LR="0.02",
    RESUME="auto",
    RANK_TIMEOUT_SECONDS=str(10 * HANG),  # no test passes because a rank was waited for in vain
)
Env = dict[str, str]

# ---- Faults, by the process that suffers them. What they patch stays so until it ends.

PATCH = pytest.MonkeyPatch()


def in_fault_step(act: Callable[[tg.Trainer], None]) -> None:
    """`act` happens at the beginning of step FAULT_STEP."""
    train_step = tg.Trainer.train_step

    def broken(self: tg.Trainer, step: int, *rest: Any) -> None:
        if step == FAULT_STEP:
            act(self)
        train_step(self, step, *rest)

    PATCH.setattr(tg.Trainer, "train_step", broken)


def get_signal(name: str) -> None:
    in_fault_step(lambda _: os.kill(os.getpid(), signal.Signals[name]))


def lose_a_loss() -> None:
    """The loss of one step is not a number."""

    def spoil(trainer: tg.Trainer) -> None:
        forward = trainer.forward

        def once(*args: Any) -> torch.Tensor:
            trainer.forward = forward
            return forward(*args) * math.nan

        trainer.forward = once

    in_fault_step(spoil)


def die_in_the_update() -> None:
    """Killed when the gradients have been summed over the ranks."""

    def die(_: tg.Muon) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    in_fault_step(lambda _: PATCH.setattr(tg.Muon, "step", die))


def share_every_reading_of_the_clock() -> None:
    read = tg.Clock.read

    def always_due(self: tg.Clock, *args: Any, **kwargs: Any) -> float:
        self.due = 0
        return read(self, *args, **kwargs)

    PATCH.setattr(tg.Clock, "read", always_due)


def die_inside_a_save() -> None:
    """Killed when half of the checkpoint of step 6 is written."""
    write = tg.write_atomically

    def cut(path: Path, *pieces: bytes) -> None:
        if path.suffix == ".ckpt" and str(FAULT_STEP + 1) in path.stem:
            data = b"".join(pieces)
            path.with_name(path.name + ".tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *pieces)

    PATCH.setattr(tg, "write_atomically", cut)


def die_in_validation() -> None:
    PATCH.setattr(tg.Scorer, "score", lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def get_sigterm_for_a_lost_rank() -> None:
    """As torchrun sends it to those that are left, here while they look who is gone."""
    lost_rank = tg.World.lost_rank

    def terminated(self: tg.World, error: RuntimeError) -> tg.Ended:
        def send() -> None:
            wait_for(lambda: self.ending, "nobody is lost")
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=send, daemon=True).start()
        return lost_rank(self, error)

    PATCH.setattr(tg.World, "lost_rank", terminated)


def lose_a_rank_under_torchrun() -> None:
    share_every_reading_of_the_clock()
    get_sigterm_for_a_lost_rank()


def write_slowly(step: int, rounds: int) -> None:
    """The checkpoint of a step takes so many rounds, of a second, of this rank's watchdog."""
    write, count = tg.write_atomically, tg.Watchdog.count
    counted: list[int] = []

    def counting(self: tg.Watchdog) -> None:
        count(self)
        counted.append(self.stuck)

    def slow(path: Path, *pieces: bytes) -> None:
        if path.name == name_of(step):
            last = len(counted) + rounds
            wait_for(lambda: len(counted) >= last, "the watchdog does not count")
        write(path, *pieces)

    PATCH.setattr(tg.Watchdog, "count", counting)
    PATCH.setattr(tg, "write_atomically", slow)


def write_slowly_and_get_sigterm() -> None:
    """The signal finds rank 0 waiting for what it writes, and rank 1 for rank 0."""
    leave = tg.Watchdog.leave

    def told(self: tg.Watchdog, failed: str) -> None:
        print(f"leaves {checkpoints(folder_of(dict(os.environ)))}", flush=True)
        leave(self, failed)

    PATCH.setattr(tg.Watchdog, "leave", told)
    write_slowly(FAULT_STEP - 1, rounds=25)
    get_signal("SIGTERM")


def get_sigterm_in_the_last_write(begin: threading.Event) -> None:
    """It comes once `begin` is set, and the checkpoint is written when it has come.

    It is sent until it has: one just before the main thread begins to wait does not wake it.
    """
    write, interrupt, came = tg.write_atomically, tg.World.interrupt, threading.Event()

    def noted(self: tg.World, *args: Any) -> None:
        came.set()
        interrupt(self, *args)

    def has_come() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return came.is_set()

    def late(path: Path, *pieces: bytes) -> None:
        if path.name == name_of(STEPS) and not came.is_set():
            assert begin.wait(HANG)
            wait_for(has_come, "no signal comes")
        write(path, *pieces)

    PATCH.setattr(tg.World, "interrupt", noted)
    PATCH.setattr(tg, "write_atomically", late)


def fail_to_score_and_get_sigterm() -> None:
    """As torchrun sends it when another rank, which failed too, has left."""
    begin = threading.Event()
    begin.set()
    PATCH.setattr(tg.Scorer, "score", lambda *_: unreadable("the disk is gone"))
    get_sigterm_in_the_last_write(begin)


def export_and_get_sigterm() -> None:
    """While the checkpoint of the last step is still being written."""
    export, exported = tg.export, threading.Event()

    def noted(*args: Any) -> Any:
        done = export(*args)
        exported.set()
        return done

    PATCH.setattr(tg, "export", noted)
    get_sigterm_in_the_last_write(exported)


def get_sigterm_in_export() -> None:
    """Before packing, and again when a file is written."""

    def terminated(then: Callable[..., Any], *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return then(*args)

    def pack(*args: Any) -> bytes:
        PATCH.setattr(tg, "write_atomically", partial(terminated, write))
        return terminated(packing, *args)

    packing, write = tg.pack_to_fit, tg.write_atomically
    PATCH.setattr(tg, "pack_to_fit", pack)


def linger_on_rank_0(seconds: float) -> None:
    """With the beginning of a tracker, and with packing: both of them rank 0 does alone.

    Then a step takes its time, in which nothing that was before may count.
    """
    pack, sum_gradients = tg.pack_to_fit, tg.Trainer.sum_gradients

    def begin(tracker: tg.Tracker) -> None:
        time.sleep(seconds)
        tracker.send, tracker.finish = lambda values: None, lambda: None

    def slow_pack(*args: Any) -> bytes:
        time.sleep(seconds)
        return pack(*args)

    def slow_step(self: tg.Trainer, *args: Any) -> None:
        if self.step == 0:
            time.sleep(3)
        sum_gradients(self, *args)

    PATCH.setattr(tg.Trainer, "sum_gradients", slow_step)
    PATCH.setattr(tg.Tracker, "begin", begin)
    PATCH.setattr(tg, "pack_to_fit", slow_pack)


def print_weights() -> None:
    """Prints the sum of the weights after training, and how many steps were left out."""
    train = tg.Trainer.train

    def traced(self: tg.Trainer, *rest: Any) -> Any:
        done = train(self, *rest)
        weights = sum(p.double().sum().item() for p in self.params)
        print(f"skipped {self.skipped.count} weights {weights!r}", flush=True)
        return done

    PATCH.setattr(tg.Trainer, "train", traced)


def main_with(fault: Callable[[], None], at: int | None, also: Callable[[], None] | None) -> int:
    """A rank of a run: `fault` on rank `at` (None: all of them), `also` on every rank."""
    if also:
        also()
    if at in (None, int(os.environ["RANK"])):
        fault()
    return tg.main()


def suffer(
    env: Env,
    ranks: int,
    fault: Callable[[], None],
    at: int | None = None,
    also: Callable[[], None] | None = None,
) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs of the ranks of a run with a fault."""
    return fork_ranks(env, ranks, partial(main_with, fault, at, also))


# ---- Runs


def losses_by_step(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train_loss"]) for row in metrics(folder) if "train_loss" in row]


def scores(folder: Path) -> list[tuple[int, str, float]]:
    """Step, weights and validation loss, as logged."""
    rows = [row for row in metrics(folder) if "val_loss" in row]
    return [(row["step"], row["weights"], row["val_loss"]) for row in rows]


def artifact(folder: Path) -> bytes:
    return (folder / tg.ARTIFACT).read_bytes()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def name_of(step: int) -> str:
    """Of a step's checkpoint."""
    return f"step_{step:08d}.ckpt"


def check_same(folder: Path, other: Path) -> None:
    """The same losses and the same artifact, to the last bit."""
    assert losses_by_step(folder) == losses_by_step(other)
    assert artifact(folder) == artifact(other)


def folder_of(env: Env) -> Path:
    return Path(env["LOG_DIR"]) / env["RUN_ID"]


def copied(env: Env, folder: Path, name: str) -> Env:
    """Variables of a run that goes on in a copy of `folder`."""
    shutil.copytree(folder, folder.with_name(name))
    return env | {"RUN_ID": name}


def run_to_its_end(env: Env) -> Path:
    """Begins a run in this process or goes on with it; its folder."""
    assert tg.run(tg.Config.from_env(env), one_rank()) == 0
    return folder_of(env)


@pytest.fixture(scope="module")
def env(few_tokens: Env, tmp_path_factory: pytest.TempPathFactory) -> Env:
    return few_tokens | SMALL | {"LOG_DIR": str(tmp_path_factory.mktemp("faults"))}


def uninterrupted(env: Env, ranks: int) -> Path:
    names = env | {"RUN_ID": f"whole{ranks}"}
    codes, texts = fork_ranks(names, ranks)
    assert codes == [0] * ranks, texts
    return folder_of(names)


@pytest.fixture(scope="module")
def whole(env: Env) -> Path:
    """Folder of an uninterrupted run on one rank."""
    return uninterrupted(env, 1)


@pytest.fixture(scope="module")
def whole_on_two(env: Env) -> Path:
    """Folder of an uninterrupted run on two ranks."""
    return uninterrupted(env, 2)


@pytest.fixture(scope="module")
def killed(env: Env) -> Path:
    """Folder of a run that was killed inside the save after step 6."""
    names = env | {"RUN_ID": "killed"}
    codes, texts = suffer(names, 1, die_inside_a_save)
    assert codes == [-signal.SIGKILL], texts
    return folder_of(names)


@pytest.fixture(scope="module")
def stopped(env: Env) -> Path:
    """Folder of a run on two ranks of which the second got SIGTERM in step 6."""
    names = env | {"RUN_ID": "stopped"}
    codes, texts = suffer(names, 2, partial(get_signal, "SIGTERM"), at=1)
    assert codes == [tg.EXIT_STOPPED] * 2, texts
    for rank, text in enumerate(texts):
        assert f"[rank {rank}] step 6: stopped by SIGTERM" in text
    return folder_of(names)


# ---- One rank


def test_killed_inside_a_save_and_resumed_to_the_last_bit(
    env: Env, whole: Path, killed: Path
) -> None:
    found = sorted(path.name for path in killed.glob("*ckpt*"))
    assert found == ["step_00000002.ckpt", "step_00000004.ckpt", "step_00000006.ckpt.tmp"]
    names = copied(env, killed, "killed_resumed")
    folder = folder_of(names)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "train_l')  # cut off as well
    codes, texts = fork_ranks(names, 1)
    assert codes == [0] and "resumed from step:4 of" in texts[0]
    check_same(folder, whole)
    assert [step for step, _ in losses_by_step(folder)] == [*range(1, STEPS + 1)]


def test_a_run_in_this_process_and_one_in_a_rank_are_the_same(env: Env, whole: Path) -> None:
    """One number of threads everywhere: what the comparisons in this file stand on."""
    check_same(run_to_its_end(env | {"RUN_ID": "here"}), whole)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_damaged_checkpoint_is_passed_over_two_are_refused(
    env: Env, whole: Path, killed: Path
) -> None:
    names = copied(env, killed, "one_damaged")
    flip_a_bit(folder_of(names) / "step_00000004.ckpt")
    folder = run_to_its_end(names)
    log = log_of(folder)
    assert "step_00000004.ckpt is damaged" in log and "resumed from step:2 of" in log
    assert "threads a rank before" not in log
    check_same(folder, whole)
    names = copied(env, killed, "two_damaged")
    for name in ("step_00000002.ckpt", "step_00000004.ckpt"):
        flip_a_bit(folder_of(names) / name)
    with pytest.raises(tg.InputError, match=r"RESUME=auto: .*step_00000004.ckpt is damaged"):
        run_to_its_end(names)


def test_what_does_not_change_training_may_differ(env: Env, whole: Path, killed: Path) -> None:
    other = dict(SAVE_EVERY="3", TRAIN_LOG_EVERY="5", VAL_LOSS_EVERY="4", MAX_SKIPPED_STEPS="1")
    folder = run_to_its_end(copied(env, killed, "may_differ") | other)
    assert artifact(folder) == artifact(whole)


def test_iterations_may_grow(env: Env, killed: Path) -> None:
    folder = run_to_its_end(copied(env, killed, "longer") | {"ITERATIONS": "12"})
    assert [step for step, _ in losses_by_step(folder)] == [*range(1, 13)]


def test_another_number_of_threads_is_said(env: Env, killed: Path) -> None:
    """Sums depend on it, and with them the last bits of what follows."""
    torch.set_num_threads(THREADS + 1)
    log = log_of(run_to_its_end(copied(env, killed, "threads")))
    assert f"\nwarning: {THREADS} threads a rank before, {THREADS + 1} now: " in log


def test_a_run_that_is_alive_keeps_others_out(env: Env, killed: Path) -> None:
    names = copied(env, killed, "alive")
    refused = pytest.raises(tg.InputError, match=f"in use by .*: process {os.getpid()}")
    for resume in ("auto", ""):
        with tg.lock_folder(folder_of(names)), refused:
            run_to_its_end(names | {"RESUME": resume})
    run_to_its_end(names)


@pytest.mark.parametrize(
    ("name", "value"), [("MATRIX_LR", "0.02"), ("SEED", "1"), ("MODEL_DIM", "64")]
)
def test_another_configuration_is_refused(env: Env, killed: Path, name: str, value: str) -> None:
    names = copied(env, killed, f"other_{name}")
    told = rf"/step_\d+.ckpt is of another run: {name} was {env.get(name, 1337)}, is {value}"
    with pytest.raises(tg.InputError, match=told):
        run_to_its_end(names | {name: value})


def test_a_trained_model_is_rounded_in_another_way(env: Env, whole: Path) -> None:
    """From its last checkpoint, as a run that rounds so from the start; QAT sees the rounding."""
    other = env | {"MATRIX_BITS": "4", "QUANT_CLIP": "row", "GPTQ_BATCHES": "2", "CODEC": "lzma"}
    saved = {"RESUME": str(whole)}
    again = run_to_its_end(other | saved | {"RUN_ID": "rounded again"})
    assert f"resumed from step:{STEPS} of" in log_of(again)
    rounded = run_to_its_end(other | {"RUN_ID": "rounded so"})
    assert artifact(again) == artifact(rounded) != artifact(whole)
    qat = env | {"QAT_FRACTION": "0.5", "RUN_ID": "qat"}
    saved = {"RESUME": str(run_to_its_end(qat))}
    with pytest.raises(tg.InputError, match="MATRIX_BITS was 8, is 4"):
        run_to_its_end(qat | saved | {"RUN_ID": "qat again", "MATRIX_BITS": "4"})


def test_a_run_that_ended_by_its_time_is_packed_again_without_a_further_step(
    env: Env, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even if GPTQ no longer takes a part of it; before its end, that would move the warm-down."""
    write = tg.write_atomically

    def write_twice(path: Path, *pieces: Any) -> None:
        write(path, *pieces)
        shutil.copy(path, tmp_path)  # a finished run keeps its last checkpoint alone

    monkeypatch.setattr(tg, "write_atomically", write_twice)
    let_steps_take(0.25, monkeypatch)
    capped = env | {"MAX_WALLCLOCK_SECONDS": "3"}
    reserving = {"GPTQ_BATCHES": "1", "GPTQ_SECONDS": "1"}
    first = run_to_its_end(capped | reserving | {"RUN_ID": "capped"})
    steps = result_of(first)["steps"]
    assert 4 < steps < STEPS and result_of(first)["ended_by"] == "wallclock_cap"
    again = run_to_its_end(capped | {"RESUME": str(first), "RUN_ID": "capped again"})
    assert f"resumed from step:{steps} of" in log_of(again)
    before, after = result_of(first), result_of(again)
    assert after["steps"] == steps and after["ended_by"] == "wallclock_cap"
    for score in ("last_weights", "pre_quant"):
        assert after[score]["val_loss"] == before[score]["val_loss"]
    earlier = min(tmp_path.glob("step_*.ckpt"))
    with pytest.raises(tg.InputError, match="GPTQ_BATCHES was 1, is 0"):
        run_to_its_end(capped | {"RESUME": str(earlier), "RUN_ID": "cut off"})


def test_counters_of_an_older_checkpoint_are_read() -> None:
    """From before two of them were noted; what else is missing or odd is refused."""
    given = tg.Progress(step=3, averaged=2, seconds=1.5, per_step=0.5, due=4)
    values = given._asdict()
    older = {name: value for name, value in values.items() if name not in ("capped", "most")}
    assert tg.Progress.from_json(values, 9) == tg.Progress.from_json(older, 9) == given
    for bad in (values | {"capped": 1}, values | {"capped": "no"}, values | {"more": 0}):
        with pytest.raises(ValueError, match="counters"):
            tg.Progress.from_json(bad, 9)
    del older["due"]
    with pytest.raises(ValueError, match="counters"):
        tg.Progress.from_json(older, 9)


def test_a_finished_run_is_refused(env: Env, whole: Path) -> None:
    before = artifact(whole)
    with pytest.raises(tg.InputError, match=f"holds a finished run: .*RESUME={whole}"):
        run_to_its_end(env | {"RUN_ID": whole.name})
    assert artifact(whole) == before


def test_begun_again_at_step_0_every_step_is_logged_once(
    env: Env, whole: Path, killed: Path
) -> None:
    names = copied(env, killed, "nothing_saved")
    for path in folder_of(names).glob("*.ckpt"):
        path.unlink()
    check_same(run_to_its_end(names), whole)


def test_stopped_twice_in_export_the_training_is_kept(env: Env, whole: Path) -> None:
    names = env | {"RUN_ID": "export", "SAVE_EVERY": "0"}
    codes, texts = suffer(names, 1, get_sigterm_in_export)
    assert codes == [tg.EXIT_STOPPED] and "export: stopped by SIGTERM" in texts[0], texts
    folder = run_to_its_end(names)
    assert f"resumed from step:{STEPS} of" in log_of(folder)
    check_same(folder, whole)
    assert scores(folder) == scores(whole) and len(scores(folder)) == 2  # last weights, EMA


def ignore_sighup_and_get_it() -> None:
    """As under nohup, whose terminal goes away."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    get_signal("SIGHUP")


def test_sighup_stops_a_run_unless_it_is_ignored(env: Env, whole: Path) -> None:
    names = env | {"RUN_ID": "hung up"}
    codes, texts = suffer(names, 1, partial(get_signal, "SIGHUP"))
    assert codes == [tg.EXIT_STOPPED] and "step 6: stopped by SIGHUP" in texts[0], texts
    codes, texts = suffer(names, 1, ignore_sighup_and_get_it)
    assert codes == [0], texts
    check_same(folder_of(names), whole)


@pytest.mark.parametrize(
    ("fault", "every", "code"),
    [
        (fail_to_score_and_get_sigterm, "0", tg.EXIT_INPUT),
        (export_and_get_sigterm, str(STEPS), tg.EXIT_STOPPED),
    ],
)
def test_a_signal_does_not_cut_off_the_last_checkpoint(
    fault: Callable[[], None], every: str, code: int, env: Env
) -> None:
    names = env | {"RUN_ID": f"signal_in_save_{code}", "SAVE_EVERY": every}
    codes, texts = suffer(names, 1, fault)
    assert codes == [code], texts
    folder = folder_of(names)
    assert "\nto resume: " in log_of(folder) and checkpoints(folder) == [name_of(STEPS)]


# ---- Two ranks


def test_stopped_on_two_ranks_and_resumed_to_the_last_bit(
    env: Env, whole_on_two: Path, stopped: Path
) -> None:
    names = copied(env, stopped, "stopped_resumed")
    codes, texts = fork_ranks(names, 2)
    assert codes == [0, 0], texts
    assert "resumed from step:6 of" in texts[0]
    check_same(folder_of(names), whole_on_two)


def test_resumed_on_another_number_of_ranks(env: Env, whole_on_two: Path, stopped: Path) -> None:
    one = losses_by_step(run_to_its_end(copied(env, stopped, "on_one")))
    two = losses_by_step(whole_on_two)
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], abs=1e-4)


def test_a_stopped_run_finishes_its_checkpoint(env: Env) -> None:
    """On a disk slower than a rank is waited for after a signal, or after it said that it ends.

    And no rank leaves before: torchrun would give the others 30 s.
    """
    names = env | {"RUN_ID": "stopped on a slow disk", "SAVE_EVERY": "1"}
    codes, texts = suffer(names, 2, write_slowly_and_get_sigterm)
    assert codes == [tg.EXIT_STOPPED] * 2, texts
    stop, folder = FAULT_STEP + 1, folder_of(names)
    log = log_of(folder)
    assert "\nto resume: " in log and f"ended: step {stop}: stopped by SIGTERM" in log
    assert f"\nwarning: no checkpoint of step {FAULT_STEP}: the one before is not" in log
    saved = [name_of(FAULT_STEP - 1), name_of(stop)]
    assert checkpoints(folder) == saved and not [*folder.glob("*.tmp")]
    assert all(f"\nleaves {saved}\n" in text for text in texts), texts


IN_STEP, AT_END = f"step {FAULT_STEP + 1}", f"validation after step {STEPS}"
# What kills a rank, which one; where the other one notices, and the step that it saves.
LOST: dict[str, tuple[Callable[[], None], int, str, int]] = {
    "in a step": (partial(get_signal, "SIGKILL"), 1, IN_STEP, FAULT_STEP),
    "rank 0 in a step": (partial(get_signal, "SIGKILL"), 0, IN_STEP, FAULT_STEP),
    "before the clock is read": (die_in_the_update, 1, IN_STEP, FAULT_STEP + 1),
    "rank 0 in validation": (die_in_validation, 0, AT_END, STEPS),
}


def lose_a_rank(ports: list[int]) -> int:
    """The ranks of all runs of LOST, two of each, begin at once: they spend their time waiting."""
    number, rank = divmod(int(os.environ["RANK"]), 2)
    case = list(LOST)[number]
    os.environ.update(RUN_ID=f"lost {case}", MASTER_PORT=str(ports[number]))
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    die, lost, _, _ = LOST[case]
    return main_with(die, lost, lose_a_rank_under_torchrun)


def test_a_killed_rank_ends_the_other_one_which_saves(env: Env) -> None:
    """Because it is gone: the time to wait for a rank is longer than a test may take."""
    names, ports = env | {"SAVE_EVERY": "0"}, [common.free_port() for _ in LOST]
    ended = fork_ranks(names, 2 * len(LOST), partial(lose_a_rank, ports))
    for number, (case, (_, lost, place, saved)) in enumerate(LOST.items()):
        pair, left = slice(2 * number, 2 * number + 2), 1 - lost
        codes, texts = ended.codes[pair], ended.texts[pair]
        assert (codes[lost], codes[left]) == (-signal.SIGKILL, tg.EXIT_LOST), (case, texts)
        told = rf"^\[rank {left}\] {place}: lost ranks: \[{lost}\]"
        assert re.search(told, texts[left], re.MULTILINE), case
        folder = folder_of(names | {"RUN_ID": f"lost {case}"})
        assert checkpoints(folder) == [name_of(saved)], case


def test_what_rank_0_does_alone_ends_no_run(env: Env) -> None:
    """Though it takes longer than a rank is waited for in a step."""
    names = env | {"RUN_ID": "slow rank 0", "TRACKER": "wandb"}
    codes, texts = suffer(names | {"RANK_TIMEOUT_SECONDS": "8"}, 2, partial(linger_on_rank_0, 9))
    assert codes == [0, 0], texts


def test_a_slow_disk_at_the_end_of_training_ends_no_run(env: Env) -> None:
    """The last checkpoint waits for the one before it longer than a rank is waited for in a step.

    How long it waited is said.
    """
    names = env | {"RUN_ID": "slow at the end", "RANK_TIMEOUT_SECONDS": "8"}
    codes, texts = suffer(names, 2, partial(write_slowly, STEPS - 2, rounds=14))
    assert codes == [0, 0], texts
    folder = folder_of(names)
    assert checkpoints(folder) == [name_of(STEPS)]  # no more of a training that is complete
    said = rf"^warning: the checkpoint of step {STEPS} waited \d+\.\d s .* SAVE_EVERY=2$"
    assert re.search(said, log_of(folder), re.MULTILINE), log_of(folder)


def test_a_step_that_is_not_finite_is_left_out_on_all_ranks(env: Env) -> None:
    codes, texts = suffer(env | {"RUN_ID": "nan"}, 2, lose_a_loss, 1, print_weights)
    assert codes == [0, 0], texts
    first, second = (re.findall(r"^skipped 1 weights .*$", text, re.MULTILINE) for text in texts)
    assert first == second and len(first) == 1


def test_too_many_steps_left_out_end_a_run(env: Env) -> None:
    """One is too many of none, although the weights are finite."""
    names = env | {"RUN_ID": "nans", "MAX_SKIPPED_STEPS": "0"}
    codes, texts = suffer(names, 2, lose_a_loss, 1)
    assert codes == [tg.EXIT_NON_FINITE] * 2, texts
    assert all("step 6 is not finite (skipped 1" in text for text in texts)
    assert not (folder_of(names) / tg.ARTIFACT).exists()


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        (
            "1",
            r"RUN_ID=a RESUME=auto \S+ -m torch.distributed.run --standalone --nproc_per_node=8 ",
        ),
        ("2", r"start all 8 ranks, on every node, as before, with SEED=7 RUN_ID=a RESUME=auto$"),
        ("", r"start all 8 ranks, on every node, as before, with SEED=7 RUN_ID=a RESUME=auto$"),
    ],
)
def test_how_to_resume_is_told_for_the_nodes_of_the_run(
    nodes: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that is not torchrun says nothing of nodes."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    if not nodes:
        monkeypatch.delenv("GROUP_WORLD_SIZE")
    world: Any = types.SimpleNamespace(size=8)
    assert re.search(told, tg.command_to_resume(world, Path("logs/a")))


def test_restarts_on_several_nodes_with_a_store_that_is_used_are_refused() -> None:
    env = dict(
        RANK="0",
        WORLD_SIZE="2",
        TORCHELASTIC_MAX_RESTARTS="1",
        TORCHELASTIC_USE_AGENT_STORE="True",
        GROUP_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    with pytest.raises(tg.InputError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        tg.World(env)


# ---- Disks


def test_a_slow_disk_ends_no_run(env: Env, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is left out while the one before is being written, here until that is said.

    Other ranks would wait RANK_TIMEOUT_SECONDS for the one that writes; it waits a quarter of that
    at most.
    """
    write, say, said = tg.write_atomically, tg.Log.__call__, threading.Event()

    def slow(path: Path, *pieces: bytes) -> None:
        if path.suffix == ".ckpt":
            assert said.wait(HANG)
        write(path, *pieces)

    def listened(log: tg.Log, text: str) -> None:
        say(log, text)
        if text.startswith("warning: no checkpoint of step 4: the one before is not"):
            said.set()

    monkeypatch.setattr(tg, "write_atomically", slow)
    monkeypatch.setattr(tg.Log, "__call__", listened)
    folder = run_to_its_end(env | {"RUN_ID": "slow", "RANK_TIMEOUT_SECONDS": "5"})
    assert said.is_set() and "step_00000004.ckpt" not in checkpoints(folder)
    check_same(folder, whole)


def no_room_for_checkpoints(error: Exception, patch: pytest.MonkeyPatch) -> None:
    """They fail when they are written, and not to their end."""
    sync = os.fsync

    def full(descriptor: int) -> None:
        if ".ckpt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise error
        sync(descriptor)

    patch.setattr(os, "fsync", full)


def no_memory_for_checkpoints(error: Exception, patch: pytest.MonkeyPatch) -> None:
    """They fail when they are copied."""

    def full(*_: Any) -> None:
        raise error

    patch.setattr(tg.HostCopier, "start", full)


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (no_room_for_checkpoints, OSError(28, "No space left"), "No space left: '.*.ckpt'"),
        (no_room_for_checkpoints, MemoryError("No space"), "No space"),
        (no_memory_for_checkpoints, RuntimeError("out of memory"), "out of memory"),
    ],
)
def test_a_checkpoint_that_has_no_room_ends_no_run(
    fault: Callable[..., None],
    error: Exception,
    said: str,
    env: Env,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And leaves no room taken by one that was not written to its end."""
    fault(error, monkeypatch)
    names = env | {"RUN_ID": f"full_{type(error).__name__}"}
    folder = run_to_its_end(names)
    said = rf"^warning: no checkpoint of step (\d+): .*{said}$"
    warned = re.findall(said, log_of(folder), re.MULTILINE)
    assert warned == ["2", "4", "6", "8", "10"] and not [*folder.glob("*.tmp")]
    check_same(folder, whole)


def test_an_artifact_that_has_no_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/model.ptz'"):
        tg.write_atomically(tmp_path / "model.ptz", b"data")
    assert not [*tmp_path.iterdir()]


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    tg.lock_folder(tmp_path).close()
    assert f"warning: {tmp_path} cannot be locked" in capsys.readouterr().err


def test_a_slow_disk_takes_no_time_from_a_cap(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1 s and 60 s of training, of which a save takes 5 s from time to time.

    The next step knows of it, and the last one ends within the cap.
    """
    time, patiences = ManualTime(), []
    train_step = tg.Trainer.train_step

    def timed_step(self: tg.Trainer, *args: Any) -> None:
        train_step(self, *args)
        time.now += 1

    def save(_: tg.Checkpoints, trainer: tg.Trainer, patience: float | None = None) -> None:
        patiences.append(patience)
        time.now += 5

    monkeypatch.setattr(tg, "time", time)
    monkeypatch.setattr(tg.Trainer, "train_step", timed_step)
    monkeypatch.setattr(tg.Checkpoints, "save", save)
    names = env | {"RUN_ID": "saves", "ITERATIONS": "100", "SAVE_EVERY": "11"}
    folder = run_to_its_end(names | {"MAX_WALLCLOCK_SECONDS": "60"})
    assert 55 < result_of(folder)["train_seconds"] <= 60
    assert set(patiences[:-1]) == {0.0}


def test_files_are_on_the_disk_before_they_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, does: Callable[..., None], *args: Any) -> None:
        calls.append(name)
        does(*args)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(noted, name, getattr(os, name)))
    tg.write_atomically(tmp_path / "file", b"data")
    assert calls == ["fsync", "replace"] and (tmp_path / "file").read_bytes() == b"data"


def test_a_checkpoint_is_written_without_a_copy_of_it(tmp_path: Path) -> None:
    """A copy, of 448 MB for `frontier`, holds up the thread that trains."""
    values = np.arange(1 << 20, dtype=np.float32)
    tracemalloc.start()
    try:
        pieces = tg.seal("checkpoint", "none", {"step": 1}, values.data)
        tg.write_atomically(tmp_path / "file", *pieces)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < values.nbytes // 8
    data = (tmp_path / "file").read_bytes()
    raw = tg.unseal("checkpoint", data, "file", len(data), lambda header, raw, codec: raw)
    assert raw == values.tobytes()


def test_a_signal_does_not_wait_for_a_codec() -> None:
    release, finished = threading.Event(), []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGALRM)
        release.wait(HANG)
        finished.append(True)

    def stop(*_: Any) -> None:
        raise tg.Ended(tg.EXIT_STOPPED, "export: stopped")

    before = signal.signal(signal.SIGALRM, stop)
    with pytest.raises(tg.Ended):
        tg.in_thread(work)
    signal.signal(signal.SIGALRM, before)
    assert not finished
    assert tg.CUT_OFF in {thread.name for thread in threading.enumerate()}
    with pytest.raises(TimeoutError):
        tg.in_thread(release.wait, 0.01)
    release.set()
    assert tg.in_thread(lambda: 7) == 7
    with pytest.raises(OSError, match="disk"):
        tg.in_thread(partial(unreadable, "the disk is gone"))


def unreadable(why: str) -> None:
    raise OSError(why)


def test_an_exit_does_not_wait_for_what_was_left_to_itself(
    env: Env, main_here: Callable[[Env], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own end, amid PyTorch's work in another thread, aborts the process."""
    release, codes = threading.Event(), list[int]()

    def run(*_: Any) -> None:
        threading.Thread(target=release.wait, args=(HANG,), daemon=True, name=tg.CUT_OFF).start()
        raise tg.Ended(tg.EXIT_STOPPED, "export: stopped")

    monkeypatch.setattr(tg, "run", run)
    monkeypatch.setattr(os, "_exit", codes.append)
    main_here(env | {"RUN_ID": "left"})
    assert codes == [tg.EXIT_STOPPED]
    release.set()


def alone(timeout: int, training: bool) -> tuple[Any, Callable[[int], str]]:
    """The watchdog of a single rank, and what it says after so many rounds more."""
    dog: Any = tg.Watchdog.__new__(tg.Watchdog)
    dog.world = types.SimpleNamespace(collectives=5, training=training, rank=0)
    dog.timeout, dog.store_error, dog.quiet = timeout, "", [0]
    dog.stuck = dog.asked = dog.rounds = dog.longest = 0
    dog.known, dog.begun = [tg.Beat()], None
    numbers = itertools.count(1)

    def rounds(count: int) -> str:
        for _ in range(count):
            dog.beats = [tg.Beat(next(numbers))]
            dog.count()
        return dog.verdict()

    return dog, rounds


def test_a_rank_that_gets_a_signal_in_long_work_of_its_own_is_not_lost() -> None:
    """It begins no collective, and neither does the checkpoint that it then writes."""
    dog, rounds = alone(60, training=False)
    assert rounds(30) == "" and dog.stuck == 29
    dog.heard()
    assert rounds(2 * tg.HURRY) == ""
    assert "a collective does not end" in rounds(5)


@pytest.mark.parametrize(("timeout", "more"), [(60, 40), (30, 30)])
def test_a_signal_in_a_long_step_does_not_end_it(timeout: int, more: int) -> None:
    """Steps of 20 s have the time of two, and never more than RANK_TIMEOUT_SECONDS."""
    dog, rounds = alone(timeout, training=True)
    for _ in range(2):
        assert rounds(21) == ""
        dog.world.collectives += 1
    dog.heard()
    assert rounds(more + 1) == ""
    assert "a collective does not end" in rounds(1)


# ---- Errors


def unreadable_batch(read: Callable[..., Any], batches: tg.Batches, step: int) -> Any:
    if step == FAULT_STEP:
        raise OSError("the disk is gone")
    return read(batches, step)


def no_memory_to_score(*_: Any) -> None:
    raise RuntimeError("no room")


@pytest.mark.parametrize(
    ("place", "name", "fails", "step"),
    [
        (tg.Batches, "micro", unreadable_batch, FAULT_STEP),
        (tg.Scorer, "score", no_memory_to_score, STEPS),
    ],
)
def test_what_fails_ends_a_run_that_can_go_on(
    place: type,
    name: str,
    fails: Callable[..., Any],
    step: int,
    env: Env,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names, does = env | {"RUN_ID": f"failed_{name}", "SAVE_EVERY": "0"}, getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, lambda *args: fails(does, *args))
        with pytest.raises((OSError, RuntimeError), match="the disk is gone|no room"):
            run_to_its_end(names)
    folder = run_to_its_end(names)
    assert f"resumed from step:{step} of" in log_of(folder)
    assert artifact(folder) == artifact(whole)


def test_an_end_in_scoring_is_told_and_so_is_how_to_score(
    env: Env, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is not repeated for it: neither by hand nor by a launcher that starts it again."""
    names = env | {"RUN_ID": "unscored", "SAVE_EVERY": "0", "EVAL_STRIDE": "4", "SEED": "1337"}

    def stopped(*_: Any) -> None:
        raise tg.Ended(tg.EXIT_STOPPED, "scoring: stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(tg, "round_trip", stopped)
        with pytest.raises(tg.Ended):
            run_to_its_end(names)
        saved = names | {"RUN_ID": "saved", "SAVE_EVERY": "2"}
        with pytest.raises(tg.Ended):
            run_to_its_end(saved)
        no_last = names | {"RUN_ID": "no last", "SAVE_EVERY": "2"}
        patch.setattr(tg.Checkpoints, "end", lambda *_: None)
        with pytest.raises(tg.Ended):
            run_to_its_end(no_last)
    assert " RESUME=auto " in log_of(folder_of(saved)).partition("\nto score it: ")[2]
    assert checkpoints(folder_of(no_last)) and "RESUME" not in log_of(folder_of(no_last))[-600:]
    folder = folder_of(names)
    assert "\nended: scoring: stopped by SIGTERM\n" in log_of(folder)
    told = log_of(folder).partition("\nto score it: ")[2].splitlines()[0]
    given = dict(word.split("=", 1) for word in shlex.split(told) if "=" in word)
    assert given["EVAL_STRIDE"] == "4" and "SEED" not in given
    assert given["EVAL_ONLY"] == str(folder) and given["DATA_PATH"] == env["DATA_PATH"]
    with pytest.raises(tg.InputError, match=f"EVAL_ONLY={folder} scores it"):
        run_to_its_end(names | {"RESUME": "auto"})
    assert artifact(folder) == artifact(whole)
    again = given | {"LOG_DIR": env["LOG_DIR"], "RUN_ID": "scored", "EVAL_STRIDE": "0"}
    scored = result_of(run_to_its_end(again))
    assert scored["roundtrip"]["val_loss"] == result_of(whole)["roundtrip"]["val_loss"]
    with pytest.raises(tg.InputError, match="choose another RUN_ID$"):
        run_to_its_end(again)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (dict(PRESET="frontier"), {"EVAL_STRIDE": "64"}),
        (dict(PRESET="growing", TTT_LR="0"), {"EVAL_STRIDE": "64"}),
        (dict(PRESET="growing", EVAL_STRIDE="0"), {"TTT_LR": "0.002"}),
        (dict(SEED="7", DEVICE="cpu"), {"DEVICE": "cpu"}),
    ],
)
def test_the_command_that_scores_has_what_the_preset_said(
    env: dict[str, str], expected: dict[str, str]
) -> None:
    config = tg.Config.from_env(env)
    told = tg.command_to_score(config, one_rank(), Path("logs/a"))
    given = dict(word.split("=", 1) for word in shlex.split(told) if "=" in word)
    mode = {n: given.get(n) for n in ("EVAL_STRIDE", "TTT_LR", "DEVICE", "SEED") if n in given}
    assert mode == expected
    again = tg.Config.from_env(given)
    assert all(getattr(again, n.lower()) == getattr(config, n.lower()) for n in mode)


@pytest.mark.parametrize(("keep", "kept"), [(1, [480]), (2, [480, 500])])
def test_a_checkpoint_that_was_just_written_stays(
    keep: int, kept: list[int], tmp_path: Path
) -> None:
    """Of a run that went on from step 400, as its checkpoint of step 500 is damaged."""
    for step in (400, 500):
        tg.checkpoint_path(tmp_path, step).write_bytes(b"")
    mine: Any = SimpleNamespace(log=SimpleNamespace(folder=tmp_path), keep=keep)
    tg.Checkpoints.write(mine, 480, {}, lambda: np.zeros(1))
    assert checkpoints(tmp_path) == [name_of(step) for step in kept]


def test_a_finished_run_says_why_it_is_no_submission(tmp_path: Path) -> None:
    """To whom a launcher has started again, and so hidden what was said first."""
    (tmp_path / "result.json").write_text('{"not_a_submission": ["9 bytes exceed"]}')
    with pytest.raises(tg.InputError, match=r"a finished run \(not a submission: 9 bytes exceed\)"):
        tg.make_folder(tmp_path, tg.Config(resume="auto", run_id="a"), one_rank())


def test_a_folder_that_was_there_first_gets_the_script(env: Env, whole: Path) -> None:
    """As of a shell that puts a console's output there."""
    names = env | {"RUN_ID": "there first", "RESUME": "auto"}
    folder = folder_of(names)
    folder.mkdir()
    (folder / "console.txt").write_text("")
    run_to_its_end(names)
    check_same(folder, whole)
    head, script = (folder / "train.log").read_bytes().split(b"\n", 1)
    assert head == f"script_bytes:{len(tg.source())} script_sha256:{tg.source_hash()}".encode()
    assert script.startswith(tg.source())


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("a bug"), 1), (tg.InputError("a typing error"), tg.EXIT_INPUT)],
)
def test_a_bug_on_a_rank_is_no_mistake_of_the_user(
    error: Exception,
    code: int,
    env: Env,
    main_here: Callable[[Env], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(tg, "pack_to_fit", failing)
    assert main_here(env | {"RUN_ID": f"bug{code}", "SAVE_EVERY": "0"}) == code
    told = capsys.readouterr().err
    assert str(error) in told and ("Traceback" in told) == (code == 1)


def test_an_update_that_fails_is_not_saved(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam has made its part, Muon has not."""

    def fails(_: tg.Muon) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(tg.Muon, "step", fails)
    names = env | {"RUN_ID": "half", "SAVE_EVERY": "0"}
    with pytest.raises(RuntimeError, match="no memory"):
        run_to_its_end(names)
    assert not checkpoints(folder_of(names))


def test_a_signal_that_meets_c_code_stops_a_run(
    env: Env,
    main_here: Callable[[Env], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the handler raises in a callback of np.fromfile comes out as SystemError."""

    def run(*_: Any) -> None:
        stop = tg.Ended(tg.EXIT_STOPPED, "scoring: stopped")
        raise SystemError("returned a result with an exception set") from stop

    monkeypatch.setattr(tg, "run", run)
    assert main_here(env | {"RUN_ID": "c_code"}) == tg.EXIT_STOPPED
    assert capsys.readouterr().err == "[rank 0] scoring: stopped\n"


# ---- The clock, and chance


def test_the_clock_goes_on_and_validation_is_not_on_it(
    env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of 0.3 s, then steps of 0.1 s in a run that goes on; a validation takes 1 s."""
    names = env | {"RUN_ID": "clock", "SAVE_EVERY": "0", "VAL_LOSS_EVERY": "2"}
    clock, clocks = ManualTime(), []
    train_step, score, restore = tg.Trainer.train_step, tg.Scorer.score, tg.restore
    step_seconds = itertools.chain([0.3] * FAULT_STEP, [math.nan], itertools.repeat(0.1))

    def timed_step(self: tg.Trainer, *args: Any) -> None:
        seconds = next(step_seconds)
        if math.isnan(seconds):
            clocks.append((self.clock.per_step, self.clock.due))
            raise OSError("the disk is gone")
        train_step(self, *args)
        clock.now += seconds

    def timed_score(*args: Any) -> tg.Score:
        clock.now += 1
        return score(*args)

    def restored(trainer: tg.Trainer, *rest: Any) -> None:
        restore(trainer, *rest)
        if trainer.step:
            clocks.append((trainer.clock.per_step, trainer.clock.due))

    monkeypatch.setattr(tg, "time", clock)
    monkeypatch.setattr(tg.Trainer, "train_step", timed_step)
    monkeypatch.setattr(tg, "restore", restored)
    monkeypatch.setattr(tg.Scorer, "score", timed_score)
    with pytest.raises(OSError, match="the disk is gone"):
        run_to_its_end(names)
    seconds = result_of(run_to_its_end(names))["train_seconds"]
    assert seconds == pytest.approx(5 * 0.3 + 5 * 0.1, rel=1e-6)
    assert clocks[1] == pytest.approx(clocks[0], rel=1e-6)
    assert clocks[0][0] == pytest.approx(0.3)


@pytest.mark.parametrize("step_ms", [40, 134, 2000, 9000])
def test_the_clock_is_read_rarely_and_not_too_late(
    step_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 s whose steps take half as long again from .35 on, as those of a loop do."""
    time, cap = ManualTime(), 600.0
    monkeypatch.setattr(tg, "time", time)
    clock, began = tg.Clock(tg.World({}), cap), time.now
    readings, taken, step = [0], 0.0, 0
    # The rule by which training ends.
    while clock.read(step) + (2 * clock.per_step if step > 1 else 0) <= cap:
        if clock.step != readings[-1]:
            readings.append(clock.step)
        taken = step_ms / 1e3 * (1.5 if time.now - began > 0.35 * cap else 1)
        time.now += taken
        step += 1
    assert cap - 3 * taken < time.now - began <= cap
    gaps = np.diff(readings)
    assert gaps.max() <= 50 and gaps.max() * step_ms / 1e3 <= max(5, step_ms / 1e3)
    assert len(readings) < 15 + step / min(50, max(1, 5000 // (1.5 * step_ms)))


def test_training_draws_no_random_numbers(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a checkpoint holds no random state."""
    states: list[tuple[Any, ...]] = []
    train = tg.Trainer.train

    def keep_state() -> None:
        numpy_state = repr(np.random.get_state())
        states.append((torch.get_rng_state().tolist(), random.getstate(), numpy_state))

    def watched(*args: Any) -> Any:
        keep_state()
        done = train(*args)
        keep_state()
        return done

    monkeypatch.setattr(tg.Trainer, "train", watched)
    names = env | {"RUN_ID": "random", "ITERATIONS": "4", "WARMDOWN_ITERS": "0"}
    run_to_its_end(names | {"SAVE_EVERY": "0"})
    before, after = states
    assert before == after
