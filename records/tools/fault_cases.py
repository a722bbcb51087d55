"""The faults of `faults.py table`, and what is expected of a run that meets them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.fault_job import PLACES, STEPS, STORE, WORK, Job

DISK = WORK / "disk"  # a small disk of its own
SAVED = {"SAVE_EVERY": 5}  # what the runs of the table have


def nothing(_: Any) -> None:
    """Where a case does nothing."""


class Case(NamedTuple):
    """A fault: `act` on a run when its output has the line `mark`, and what is expected then."""

    fault: str
    expected: str
    line: str  # a pattern of the message
    exits: str  # "rank: code" of the ranks that choose their end; a code may be a pattern
    act: Callable[[Job], Any] = nothing
    mark: str = r"^step:7/"
    ranks: int = 1
    inject: str = "plain"
    env: dict[str, Any] = {}
    before: Callable[[str], Any] = nothing  # is given the run's name
    undo: Callable[[Job], Any] = nothing  # before it is resumed
    resume: bool = True
    same: bool = True  # the final artifact is that of an uninterrupted run
    torchrun: tuple[str, ...] = ()


# ---- 1. What is done to disks, ranks and files ---------------------------------------------------


def mount(*options: str) -> Callable[[str], None]:
    """Mounts a small disk before a run."""

    def act(_: str) -> None:
        DISK.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(DISK)]
        subprocess.run(words, check=True)

    return act


def remount_writable(_: Job) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(DISK)], check=True)


def make_read_only(job: Job) -> None:
    """Mounts the disk once more above itself, read-only.

    The disk itself stays writable while a run holds its lock open. The run stands still meanwhile:
    on a busy machine it could end before.
    """
    job.send(signal.SIGSTOP)
    subprocess.run(["mount", "--bind", str(DISK), str(DISK)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(DISK)], check=True)
    job.send(signal.SIGCONT)


def make_writable(_: Job) -> None:
    """Takes away the mount of `make_read_only`."""
    subprocess.run(["umount", str(DISK)], check=True)


def fill(_: Job) -> None:
    with contextlib.suppress(OSError), open(DISK / "filler", "wb", buffering=0) as file:
        while file.write(b"\0" * 65536):
            pass


def make_room(_: Job) -> None:
    (DISK / "filler").unlink()


def to_rank(number: int, sent: signal.Signals) -> Callable[[Job], None]:
    return lambda job: os.kill(job.rank(number), sent)


def to_launcher(sent: signal.Signals) -> Callable[[Job], None]:
    return lambda job: job.popen.send_signal(sent)


def to_launcher_late(sent: signal.Signals) -> Callable[[Job], None]:
    """A third of a second behind the line that was waited for."""

    def act(job: Job) -> None:
        time.sleep(0.3)
        job.popen.send_signal(sent)

    return act


def to_all(sent: signal.Signals) -> Callable[[Job], None]:
    """As Slurm does: torchrun then passes its own on to the ranks, which get a second one."""

    def act(job: Job) -> None:
        for pid in job.processes():
            os.kill(pid, sent)

    return act


def own_data(_: Any) -> None:
    shutil.copytree(WORK / "data", WORK / "broken", dirs_exist_ok=True)


def shard(act: Callable[[Path], Any], **env: Any) -> dict[str, Any]:
    """Fields of a case in which something happens to a shard in the middle of a run."""
    path = WORK / "broken" / "fineweb_train_000000.bin"

    def damage(_: Job) -> None:
        act(path)

    return dict(env=env | {"DATA_PATH": path.parent}, before=own_data, act=damage, undo=own_data)


def checkpoints(damage: Callable[[list[Path]], Any] = nothing) -> dict[str, Any]:
    """Fields of a case that begins with the folder of a run killed after step 17, and `damage`."""

    def before(name: str) -> None:
        if not (WORK / "killed").exists():
            job = Job("killed", env=SAVED)
            job.wait_for(r"^step:17/")
            job.kill()
        shutil.copytree(WORK / "killed", WORK / name)
        damage(sorted((WORK / name).glob("*.ckpt")))

    return dict(before=before, mark=r"^", resume=False)


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_last(paths: list[Path]) -> None:
    flip(paths[-1])


def flip_all(paths: list[Path]) -> None:
    for path in paths:
        flip(path)


def cut(path: Path) -> None:
    """Cuts a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def cut_last(paths: list[Path]) -> None:
    cut(paths[-1])


def finished_run(name: str) -> None:
    shutil.copytree(WORK / "whole1", WORK / name)


# ---- 2. The cases --------------------------------------------------------------------------------
TERM, PREVIOUS = signal.SIGTERM, "warning, the checkpoint before it is used"
STOPPED: dict[str, Any] = dict(expected="exit 5", line="stopped by SIGTERM", exits="0: 5")
ONE_STOPPED = STOPPED | dict(act=to_launcher(TERM))
BOTH_STOPPED = STOPPED | dict(expected="both exit 5", exits="0: 5, 1: 5", ranks=2)
RESTARTS = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
ON_DISK: dict[str, Any] = dict(env={"LOG_DIR": DISK})

CASES = (
    *(
        Case(
            f"rank {r} of 2 killed",
            f"rank {1 - r} names it, exit 6",
            rf"\[rank {1 - r}\] .*lost ranks: \[?{r}\b",
            f"{1 - r}: 6",
            to_rank(r, signal.SIGKILL),
            ranks=2,
        )
        for r in (0, 1)
    ),
    Case(
        "rank 1 of 2 hangs (SIGSTOP), RANK_TIMEOUT_SECONDS=5",
        "rank 0 names it, exit 6",
        r"lost ranks: \[1\]",
        "0: 6",
        to_rank(1, signal.SIGSTOP),
        ranks=2,
        env={"RANK_TIMEOUT_SECONDS": 5},
    ),
    Case(
        f"rank 1 of 2 killed, torchrun --max-restarts=2, {STORE}=1",
        "goes on by itself",
        r"^resumed from step:[1-9]",
        "0: 6, 0: 0, 1: 0",
        to_rank(1, signal.SIGKILL),
        ranks=2,
        resume=False,
        torchrun=RESTARTS,
    ),
    Case(
        "the same without",
        "goes on by itself",
        r"^resumed from step:[1-9]",
        "0: 6, 0: 0, 1: 0",
        to_rank(1, signal.SIGKILL),
        ranks=2,
        env={STORE: "0"},
        resume=False,
        torchrun=RESTARTS,
    ),
    Case(
        "NaN on rank 1 of 2 in step 13",
        "step is left out, exit 0",
        r"^step:13/\d+ train_loss:nan",
        "0: 0, 1: 0",
        ranks=2,
        inject="nan:12",
        mark=r"^step:13/",
        resume=False,
        same=False,
    ),
    Case(
        "NaN on rank 1 of 2 from step 13 on",
        "exit 3, nothing exported",
        "is not finite",
        "0: 3, 1: 3",
        ranks=2,
        inject="nan-forever:12",
        mark=r"^step:13/",
        same=False,
    ),
    Case(
        "train shard removed, 2 ranks",
        "names it, exit 2; a rank that sees the other one go: 6",
        "No such file",
        "0: [26], 1: [26]",  # a rank reads a step ahead, and neither waits for the other in it
        ranks=2,
        **shard(Path.unlink),
    ),
    Case(
        "train shard removed, SAVE_EVERY=0",
        "names it, saves, exit 2",
        "No such file",
        "0: 2",
        **shard(Path.unlink, SAVE_EVERY=0),
    ),
    Case(
        "train shard truncated",
        "names it, exit 2",
        "was cut after it was opened",
        "0: 2",
        **shard(cut),
    ),
    Case(
        "disk too small for checkpoints (tmpfs, 3 MB)",
        "warnings, exit 0",
        "warning: no checkpoint of step 5:",
        "0: 0",
        before=mount("size=3m"),
        resume=False,
        **ON_DISK,
    ),
    Case(
        "disk full from step 22 on (tmpfs, 32 MB)",
        "exit 2 at the export; resumes once there is room",
        "No space left",
        "0: 2",
        fill,
        r"^step:22/",
        before=mount("size=32m"),
        undo=make_room,
        **ON_DISK,
    ),
    Case(
        "LOG_DIR read-only",
        "exit 2",
        "Read-only file system",
        "0: 2",
        mark=r"^",
        before=mount("size=32m", "ro"),
        undo=remount_writable,
        **ON_DISK,
    ),
    Case(
        "LOG_DIR read-only from step 7 on",
        "exit 2 at the export; resumes once it is writable",
        "Read-only file system",
        "0: 2",
        make_read_only,
        before=mount("size=32m"),
        undo=make_writable,
        **ON_DISK,
    ),
    Case(
        "time.time() jumps by days",
        "nothing changes",
        rf"^step:{STEPS}/{STEPS} train_loss",
        "0: 0",
        inject="clock",
        mark=r"^step:10/",
        resume=False,
    ),
    Case(
        "SIGTERM in warm-up",
        **STOPPED,
        act=to_launcher_late(TERM),
        mark=PLACES["warm-up"],
        env={"WARMUP_STEPS": 100},
    ),
    Case("SIGTERM in evaluation", **ONE_STOPPED, mark=PLACES["evaluation"]),
    Case("SIGTERM in export", **ONE_STOPPED, mark=r"^packed"),
    Case("SIGTERM in export, SAVE_EVERY=0", **ONE_STOPPED, mark=r"^packed", env={"SAVE_EVERY": 0}),
    Case(
        "SIGTERM to torchrun and both ranks in evaluation, SAVE_EVERY=0",
        **BOTH_STOPPED,
        act=to_all(TERM),
        mark=PLACES["evaluation"],
        env={"SAVE_EVERY": 0},
    ),
    Case("SIGTERM in scoring", **ONE_STOPPED, mark=PLACES["scoring"]),
    Case("SIGTERM in training", **ONE_STOPPED),
    Case("SIGTERM to torchrun in training, 2 ranks", **BOTH_STOPPED, act=to_launcher(TERM)),
    Case("SIGTERM to rank 1 alone in training, 2 ranks", **BOTH_STOPPED, act=to_rank(1, TERM)),
    *(
        Case(
            f"{sent.name} in training",
            "exit 5",
            f"stopped by {sent.name}",
            "0: 5",
            to_launcher(sent),
        )
        for sent in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    ),
    Case(
        "last checkpoint truncated",
        PREVIOUS,
        "warning: .*00015.ckpt is damaged or truncated",
        "0: 0",
        **checkpoints(cut_last),
    ),
    Case(
        "a bit of the last checkpoint flipped",
        PREVIOUS,
        "warning: .*00015.ckpt is damaged or truncated",
        "0: 0",
        **checkpoints(flip_last),
    ),
    Case(
        "both checkpoints damaged",
        "refused, exit 2",
        r"\[rank 0\] RESUME=auto: .*00015.ckpt is damaged",
        "0: 2",
        **checkpoints(flip_all),
        same=False,
    ),
    Case(
        "resumed with another MATRIX_LR",
        "refused, names it, exit 2",
        r"\[rank 0\] RESUME=auto: .*MATRIX_LR was 0.04, is 0.01",
        "0: 2",
        **checkpoints(),
        env={"MATRIX_LR": 0.01},
        same=False,
    ),
    Case(
        "one rank's run resumed on two",
        "goes on, equal to rounding",
        "^resumed from step:15",
        "0: 0, 1: 0",
        ranks=2,
        **checkpoints(),
        same=False,
    ),
    Case(
        "a finished run resumed",
        "refused, exit 2",
        "holds a finished run",
        "0: 2",
        mark=r"^",
        resume=False,
        before=finished_run,
    ),
)
