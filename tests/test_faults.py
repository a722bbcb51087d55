"""Runs that are killed, stopped or damaged, and go on. records/tools/faults.py does this at a larger scale.

Ranks are forked from a server that has imported PyTorch: a run takes a second, and ten under torchrun.
"""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_gpt as tg

STEPS, FAULT_STEP = 10, 5  # steps of a run; where the fault is, from 0
SMALL = dict(
    PRESET="T,tiny",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    NUM_LOOPS="2",
    PASSES_SCHEDULE="0:1,4:2",
    AVERAGE="ema",
    DTYPE="float32",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
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
)

# ---- 1. Ranks --------------------------------------------------------------------------------------------


def spoil(fault: str, here: bool) -> None:
    """Makes a fault happen in this process: a signal to itself, inside a save or in FAULT_STEP of a rank that
    is `here`, or a loss that is not a number there; SIGTERM in export, and again when that is saved; six
    seconds for packing, or for the first word to a tracker."""
    train_step, write, pack, read = (
        tg.Trainer.train_step,
        tg.write_atomically,
        tg.pack_to_fit,
        tg.Clock.read,
    )

    def broken(self: tg.Trainer, step: int, *rest: Any) -> None:
        forward, now = self.forward, here and step == FAULT_STEP
        if now and fault == "nan":
            self.forward = lambda *args: forward(*args) * math.nan
        elif now and fault == "late":
            tg.Muon.step = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        elif now and fault.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[fault])
        train_step(self, step, *rest)
        self.forward = forward

    def cut(path: Path, data: bytes) -> None:
        if path.suffix == ".ckpt" and str(FAULT_STEP + 1) in path.stem:
            path.with_name(path.name + ".tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    def terminate(then: Any, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return then(*args)

    def always_due(self: tg.Clock, *args: Any, **kwargs: Any) -> float:
        self.due = 0
        return read(self, *args, **kwargs)

    tg.Trainer.train_step, tg.Clock.read = broken, always_due if fault == "late" else read
    if fault == "tracker":
        tg.Log.send = lambda _, values: time.sleep(6 * (values["step"] == 0))
    elif fault == "packing":
        tg.pack_to_fit = lambda *args: time.sleep(6) or pack(*args)
    elif fault == "save":
        tg.write_atomically = cut
    elif fault == "export":
        tg.pack_to_fit, tg.write_atomically = partial(terminate, pack), partial(terminate, write)


def rank(env: dict[str, str], fault: str, out: Path) -> None:
    """What a process does: one rank. Its output goes to `out`, and the sum of its weights after training."""
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in os.environ.keys() & {name.upper() for name in tg.Config.__dataclass_fields__}:
        del os.environ[name]
    os.environ.update(env)
    torch.set_num_threads(1)
    fault, _, at = fault.partition("@")  # the last rank, if none is named
    spoil(fault, int(env["RANK"]) == (int(at) if at else int(env["WORLD_SIZE"]) - 1))
    train = tg.Trainer.train

    def traced(self: tg.Trainer, *rest: Any) -> Any:
        done = train(self, *rest)
        weights = sum(p.double().sum().item() for p in self.params)
        print(f"skipped {int(self.numbers[0])} weights {weights!r}", flush=True)
        return done

    tg.Trainer.train = traced
    os._exit(tg.main())


def launch(env: dict[str, str], ranks: int, fault: str = "") -> tuple[list[int], list[str]]:
    """Runs all ranks; their exit codes (-9: killed) and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(ranks)
        )
    server, processes, outs = multiprocessing.get_context("forkserver"), [], []
    server.set_forkserver_preload(["torch._dynamo", "train_gpt"])
    for i in range(ranks):
        outs.append(Path(env["LOG_DIR"]) / f"{env['RUN_ID']}.{time.monotonic_ns()}.out")
        processes.append(
            server.Process(target=rank, args=(env | place | {"RANK": str(i)}, fault, outs[-1]))
        )
        processes[-1].start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes], [out.read_text() for out in outs]


def metrics(folder: Path) -> list[tuple[int, float]]:
    """Step and training loss, as logged."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]


def scores(folder: Path) -> list[tuple[int, str, float]]:
    """Step, weights and validation loss, as logged."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["weights"], row["val_loss"]) for row in rows if "val_loss" in row]


def artifact(folder: Path) -> bytes:
    return (folder / tg.ARTIFACT).read_bytes()


@pytest.fixture(scope="module")
def env(corpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return corpus | SMALL | {"LOG_DIR": str(tmp_path_factory.mktemp("faults"))}


@pytest.fixture(scope="module")
def whole(env: dict[str, str]) -> list[Path]:
    """Folders of an uninterrupted run on one rank, and of one on two."""
    for ranks in (1, 2):
        codes, texts = launch(env | {"RUN_ID": f"whole{ranks}"}, ranks)
        assert codes == [0] * ranks, texts
    return [Path(env["LOG_DIR"]) / f"whole{ranks}" for ranks in (1, 2)]


@pytest.fixture(scope="module")
def killed(env: dict[str, str]) -> Path:
    """Folder of a run that was killed inside the save after step 6."""
    codes, texts = launch(env | {"RUN_ID": "killed"}, 1, "save")
    assert codes == [-signal.SIGKILL], texts
    return Path(env["LOG_DIR"]) / "killed"


@pytest.fixture(scope="module")
def stopped(env: dict[str, str]) -> Path:
    """Folder of a run on two ranks of which the second got SIGTERM in step 6."""
    codes, texts = launch(env | {"RUN_ID": "stopped"}, 2, "SIGTERM")
    assert codes == [tg.EXIT_STOPPED] * 2, texts
    assert all(f"[rank {i}] step 6: stopped by SIGTERM" in text for i, text in enumerate(texts))
    return Path(env["LOG_DIR"]) / "stopped"


def copied(env: dict[str, str], folder: Path, name: str) -> dict[str, str]:
    """Variables of a run that goes on in a copy of `folder`."""
    shutil.copytree(folder, Path(env["LOG_DIR"]) / name)
    return env | {"RUN_ID": name}


def resume(env: dict[str, str]) -> Path:
    """Ends a run in this process; its folder."""
    config = tg.Config.from_env(env)
    assert tg.run(config, tg.World({})) == 0
    return Path(config.log_dir) / config.run_id


# ---- 2. Tests --------------------------------------------------------------------------------------------


def test_killed_inside_a_save_and_resumed_to_the_last_bit(
    env: dict, whole: list[Path], killed: Path
) -> None:
    assert sorted(path.name for path in killed.glob("*ckpt*")) == [
        "step_00000002.ckpt",
        "step_00000004.ckpt",
        "step_00000006.ckpt.tmp",
    ]
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "train_l')  # cut off as well
    codes, texts = launch(copied(env, killed, "killed_resumed"), 1)
    assert codes == [0] and "resumed from step:4 of" in texts[0]
    folder = Path(env["LOG_DIR"]) / "killed_resumed"
    assert artifact(folder) == artifact(whole[0]) and metrics(folder) == metrics(whole[0])
    assert [step for step, _ in metrics(folder)] == [*range(1, STEPS + 1)]


def test_one_damaged_checkpoint_is_passed_over_two_are_refused(
    env: dict, whole: list, killed: Path
) -> None:
    names = copied(env, killed, "flipped")
    first, last = sorted((Path(env["LOG_DIR"]) / "flipped").glob("*.ckpt"))
    for path in (last, first):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        if path == last:
            folder = resume(copied(names, path.parent, "flipped_last"))
            log = (folder / "train.log").read_text()
            assert "step_00000004.ckpt is damaged" in log and "resumed from step:2 of" in log
            assert artifact(folder) == artifact(whole[0]) and metrics(folder) == metrics(whole[0])
    with pytest.raises(tg.InputError, match=r"RESUME=auto: .*step_00000004.ckpt is damaged"):
        resume(names)


def test_what_does_not_change_training_may_differ(
    env: dict, whole: list[Path], killed: Path
) -> None:
    other = {
        "SAVE_EVERY": "3",
        "TRAIN_LOG_EVERY": "5",
        "VAL_LOSS_EVERY": "4",
        "MAX_SKIPPED_STEPS": "1",
    }
    assert artifact(resume(copied(env, killed, "may_differ") | other)) == artifact(whole[0])


@pytest.mark.parametrize(
    ("name", "value"), [("MATRIX_LR", "0.02"), ("SEED", "1"), ("MODEL_DIM", "64")]
)
def test_another_configuration_is_refused(env: dict, killed: Path, name: str, value: str) -> None:
    names = copied(env, killed, f"other_{name}")
    with pytest.raises(tg.InputError, match=f"{name} was {env.get(name, 1337)}, is {value}"):
        resume(names | {name: value})


def test_a_finished_run_is_refused(env: dict, whole: list[Path]) -> None:
    before = artifact(whole[0])
    with pytest.raises(tg.InputError, match="holds a finished run"):
        resume(env | {"RUN_ID": "whole1"})
    assert artifact(whole[0]) == before


def test_stopped_on_two_ranks_and_resumed_to_the_last_bit(
    env: dict, whole: list, stopped: Path
) -> None:
    codes, texts = launch(copied(env, stopped, "stopped_resumed"), 2)
    assert codes == [0, 0], texts
    assert "resumed from step:6 of" in texts[0]
    folder = Path(env["LOG_DIR"]) / "stopped_resumed"
    assert artifact(folder) == artifact(whole[1]) and metrics(folder) == metrics(whole[1])


def test_resumed_on_another_number_of_ranks(env: dict, whole: list[Path], stopped: Path) -> None:
    one, two = metrics(resume(copied(env, stopped, "on_one"))), metrics(whole[1])
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], abs=1e-4)


@pytest.mark.parametrize(
    ("fault", "lost", "saved"), [("SIGKILL", 1, 5), ("SIGKILL@0", 0, 5), ("late", 1, 6)]
)
def test_a_killed_rank_ends_the_other_within_seconds(
    env: dict, fault: str, lost: int, saved: int
) -> None:
    """In a step, or after its gradients were summed, when the clock is to be read. The other one saves."""
    began = time.perf_counter()
    codes, texts = launch(env | {"RUN_ID": f"lost_{fault}", "SAVE_EVERY": "0"}, 2, fault)
    assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, tg.EXIT_LOST), texts
    assert time.perf_counter() - began < 30
    assert re.search(
        rf"^\[rank {1 - lost}\] step 6: lost ranks: \[{lost}\]", texts[1 - lost], re.MULTILINE
    )
    found = (Path(env["LOG_DIR"]) / f"lost_{fault}").glob("*.ckpt")
    assert [path.name for path in found] == [f"step_0000000{saved}.ckpt"]


@pytest.mark.parametrize("fault", ["tracker", "packing"])
def test_what_rank_0_does_alone_ends_no_run(env: dict, fault: str) -> None:
    """Also after a validation in the middle, where the next thing that other ranks do is a step."""
    slow = {
        "RUN_ID": fault,
        "TRACKER": "wandb" if fault == "tracker" else "none",
        "VAL_LOSS_EVERY": "8",
        "RANK_TIMEOUT_SECONDS": "5",
    }
    codes, texts = launch(env | slow, 2, fault)
    assert codes == [0, 0], texts


def test_a_slow_disk_ends_no_run(env: dict, whole: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks would wait RANK_TIMEOUT_SECONDS for the one that writes; it waits a quarter of that."""
    write = tg.write_atomically

    def slow(path: Path, data: bytes) -> None:
        time.sleep(2 if path.suffix == ".ckpt" else 0)
        write(path, data)

    monkeypatch.setattr(tg, "write_atomically", slow)
    folder = resume(env | {"RUN_ID": "slow", "RANK_TIMEOUT_SECONDS": "5"})
    assert (
        "warning: no checkpoint of step 4: the one before is not"
        in (folder / "train.log").read_text()
    )
    assert artifact(folder) == artifact(whole[0])


def test_a_full_disk_ends_no_run(env: dict, whole: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no room taken by checkpoints that were not written to their end."""
    write = tg.write_atomically

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".ckpt":
            path.with_name(path.name + ".tmp").write_bytes(data[:9])
            raise OSError("No space left on device")
        write(path, data)

    monkeypatch.setattr(tg, "write_atomically", full)
    folder = resume(env | {"RUN_ID": "full"})
    log = (folder / "train.log").read_text()
    warned = re.findall(r"^warning: no checkpoint of step (\d+): No space", log, re.MULTILINE)
    assert warned == ["2", "4", "6", "8", "10"] and not [*folder.glob("*.tmp")]
    assert artifact(folder) == artifact(whole[0])


def test_files_are_on_the_disk_before_they_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        does = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, n=name, does=does: calls.append(n) or does(*args)
        )
    tg.write_atomically(tmp_path / "file", b"data")
    assert calls == ["fsync", "replace"] and (tmp_path / "file").read_bytes() == b"data"


def test_a_step_that_is_not_finite_is_left_out_on_all_ranks(env: dict) -> None:
    codes, texts = launch(env | {"RUN_ID": "nan"}, 2, "nan")
    assert codes == [0, 0], texts
    first, second = (re.findall(r"^skipped 1 weights .*$", text, re.MULTILINE) for text in texts)
    assert first == second and len(first) == 1


def test_too_many_steps_left_out_end_a_run(env: dict) -> None:
    """One is too many of none, although the weights are finite."""
    codes, texts = launch(env | {"RUN_ID": "nans", "MAX_SKIPPED_STEPS": "0"}, 2, "nan")
    assert codes == [tg.EXIT_NON_FINITE] * 2, texts
    assert all("step 6 is not finite (skipped 1" in text for text in texts)
    assert not (Path(env["LOG_DIR"]) / "nans" / tg.ARTIFACT).exists()


def test_begun_again_at_step_0_every_step_is_logged_once(
    env: dict, whole: list, killed: Path
) -> None:
    names = copied(env, killed, "nothing_saved")
    for path in (Path(env["LOG_DIR"]) / "nothing_saved").glob("*.ckpt"):
        path.unlink()
    folder = resume(names)
    assert artifact(folder) == artifact(whole[0]) and metrics(folder) == metrics(whole[0])


def read_batch(_: tg.Batches, step: int) -> None:
    if step == FAULT_STEP:
        raise OSError("the disk is gone")


def compile_the_score(*_: Any) -> None:
    raise RuntimeError("no room")


@pytest.mark.parametrize(
    ("place", "name", "fail", "step"),
    [(tg.Batches, "micro", read_batch, FAULT_STEP), (tg.Scorer, "score", compile_the_score, STEPS)],
)
def test_what_fails_ends_a_run_that_can_go_on(
    place: type,
    name: str,
    fail: Any,
    step: int,
    env: dict,
    whole: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names, does = env | {"RUN_ID": f"failed_{name}", "SAVE_EVERY": "0"}, getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args: fail(*args) or does(*args))
    with pytest.raises((OSError, RuntimeError), match="the disk is gone|no room"):
        resume(names)
    monkeypatch.undo()
    folder = resume(names)
    assert f"resumed from step:{step} of" in (folder / "train.log").read_text()
    assert artifact(folder) == artifact(whole[0])


def test_a_signal_that_meets_c_code_stops_a_run(
    env: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What the handler raises in a callback of np.fromfile comes out as SystemError."""

    def run(*_: Any) -> None:
        raise SystemError("returned a result with an exception set") from tg.Ended(
            5, "scoring: stopped"
        )

    monkeypatch.setattr(tg, "run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name, value in (env | {"RUN_ID": "c_code"}).items():
        monkeypatch.setenv(name, value)
    assert tg.main() == tg.EXIT_STOPPED and capsys.readouterr().err == "[rank 0] scoring: stopped\n"


def test_an_update_that_fails_is_not_saved(env: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam has made its part, Muon has not."""

    def fails(_: tg.Muon) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(tg.Muon, "step", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        resume(env | {"RUN_ID": "half", "SAVE_EVERY": "0"})
    assert not [*(Path(env["LOG_DIR"]) / "half").glob("*.ckpt")]


def test_the_clock_goes_on_and_validation_is_not_on_it(
    env: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of 0.3 s, then fast ones in a run that goes on; each validation takes a second."""
    names = env | {"RUN_ID": "clock", "SAVE_EVERY": "0", "VAL_LOSS_EVERY": "2"}
    train_step, score, load, clocks = tg.Trainer.train_step, tg.Scorer.score, tg.Trainer.resume, []

    def slow(self: tg.Trainer, step: int, *rest: Any) -> None:
        if step == FAULT_STEP:
            clocks.append((self.clock.per_step, self.clock.due))
            raise OSError("the disk is gone")
        time.sleep(0.3)
        train_step(self, step, *rest)

    def loaded(self: tg.Trainer, log: tg.Log) -> None:
        load(self, log)
        clocks.append((self.clock.per_step, self.clock.due))

    monkeypatch.setattr(tg.Scorer, "score", lambda *args: time.sleep(1) or score(*args))
    monkeypatch.setattr(tg.Trainer, "train_step", slow)
    with pytest.raises(OSError, match="the disk is gone"):
        resume(names)
    monkeypatch.setattr(tg.Trainer, "train_step", train_step)
    monkeypatch.setattr(tg.Trainer, "resume", loaded)
    seconds = json.loads((resume(names) / "result.json").read_text())["train_seconds"]
    assert 1.5 < seconds < 4, "with validations it would be above 7"
    assert clocks[1] == pytest.approx(clocks[0], rel=1e-6) and clocks[0][0] > 0.3


def test_stopped_twice_in_export_the_training_is_kept(env: dict, whole: list) -> None:
    names = env | {"RUN_ID": "export", "SAVE_EVERY": "0"}
    codes, texts = launch(names, 1, "export")
    assert codes == [tg.EXIT_STOPPED] and "export: stopped by SIGTERM" in texts[0], texts
    folder = resume(names)
    assert f"resumed from step:{STEPS} of" in (folder / "train.log").read_text()
    assert artifact(folder) == artifact(whole[0]) and metrics(folder) == metrics(whole[0])
    assert (
        scores(folder) == scores(whole[0]) and len(scores(folder)) == 2
    )  # of the last weights, of EMA


def test_restarts_on_several_nodes_with_a_store_that_is_used_are_refused() -> None:
    env = dict(
        RANK="0",
        WORLD_SIZE="2",
        TORCHELASTIC_MAX_RESTARTS="1",
        TORCHELASTIC_USE_AGENT_STORE="True",
        GROUP_WORLD_SIZE="2",
    )
    with pytest.raises(tg.InputError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        tg.World(env)


def test_training_draws_no_random_numbers(env: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a checkpoint holds no random state."""
    states, train = [], tg.Trainer.train

    def state() -> str:
        return repr(
            (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        )

    def watched(*args: Any) -> Any:
        states.append(state())
        done = train(*args)
        states.append(state())
        return done

    monkeypatch.setattr(tg.Trainer, "train", watched)
    resume(env | {"RUN_ID": "random", "ITERATIONS": "4", "WARMDOWN_ITERS": "0", "SAVE_EVERY": "0"})
    assert states[0] == states[1]
