"""Runs of train_gpt.py for faults.py: small ones, in processes that can be found, hit, waited for.

As a program it is what a rank runs instead of train_gpt.py: that script with a fault in it. It
notes its exit code in the file that FAULTS_EXITS names.

    python records/tools/fault_job.py plain|cpu|nan:STEP|nan-forever:STEP|clock  # NaN: last rank
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import numpy as np

    import train_gpt as tg
    from records.tools import common

WORK = Path("logs/faults")
STEPS = 30  # of a run
# 1: torchrun can start ranks again; else PyTorch 2.13 hangs
STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# Small, yet with every kind of state: both optimizers, an average, a schedule of passes, rounding
# at the end. The large bigram table makes checkpoints of 5 MB, whose writing a signal can meet.
BASE = dict(
    DEVICE="cpu",
    PRESET="T,tiny",
    MODEL_DIM=32,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    NUM_LOOPS=2,
    PASSES_SCHEDULE="0:1,10:2",
    BIGRAM_VOCAB_SIZE=16384,
    BIGRAM_DIM=16,
    AVERAGE="ema",
    QAT_FRACTION=0.3,
    TRAIN_SEQ_LEN=64,
    TRAIN_BATCH_TOKENS=512,
    ITERATIONS=STEPS,
    WARMUP_STEPS=3,
    WARMDOWN_ITERS=10,
    MAX_WALLCLOCK_SECONDS=0,
    VAL_BATCH_SIZE=8192,
    TRAIN_LOG_EVERY=1,
    SAVE_EVERY=2,
    LOG_DIR=WORK,
    DATA_PATH=WORK / "data",
)
# Of every rank: torchrun gives it one thread where it starts several ranks, and as many as there
# are cores where it starts one, whose sums are others.
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
PLACES = {  # where a run is, from the last of these lines in its output
    "set-up": r"^",
    "warm-up": r"^train_loader:",
    "training": r"^(resumed from step|step:\d+/\d+ passes:)",
    "evaluation": rf"^(step:{STEPS}/{STEPS} train_loss|resumed from step:{STEPS}\b)",
    "export": r"^peak memory",
    "scoring": r"^Code size:",
}


def obey_signals() -> None:
    """Ends this process at the signals that it is sent; a shell's background job ignores SIGINT."""
    for number in tg.STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class Job:
    """A run, in processes that carry one tag in their environment."""

    def __init__(
        self,
        name: str,
        ranks: int = 1,
        fault: str = "",  # of `worker`; "" runs the script
        env: dict[str, Any] | None = None,
        torchrun: Iterable[str] = (),  # its options, where it is not to start all ranks itself
    ) -> None:
        env = env or {}
        self.name, self.ranks, self.tag = name, ranks, uuid.uuid4().hex
        self.began, self.seconds = time.perf_counter(), 0.0
        self.folder = Path(env.get("LOG_DIR", WORK)) / name
        self.out = WORK / f"{name}.{self.tag[:6]}.out"
        launcher = common.launcher(ranks)
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", *torchrun]
        program = [__file__, fault] if fault else [str(common.ROOT / "train_gpt.py")]
        own = {key: str(v) for key, v in (BASE | dict(RUN_ID=name, RESUME="auto") | env).items()}
        exits = str(self.out.with_suffix(".exits"))
        marks = {"FAULTS_TAG": self.tag, "FAULTS_EXITS": exits, STORE: "1"}
        marks["OMP_NUM_THREADS"] = THREADS
        with open(self.out, "w") as out:
            self.popen = subprocess.Popen(
                [*launcher, *program],
                env=common.without_options(os.environ) | marks | own,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=obey_signals,
            )

    def send(self, number: signal.Signals) -> None:
        """A signal to all its processes that are left."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Processes that are left, by id: the rank, or "" for a launcher."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                values = path.read_bytes()
                if self.tag.encode() in values:
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", values)
                    found[int(path.parent.name)] = rank[1].decode() if rank else ""
        return found

    def rank(self, number: int) -> int:
        return next(pid for pid, rank in self.processes().items() if rank == str(number))

    def wait_for(self, pattern: str, seconds: float = 120) -> float:
        """When a line of the output matched first; RuntimeError if that does not happen."""
        wanted, end = re.compile(pattern, re.MULTILINE), time.perf_counter() + seconds
        while not wanted.search(self.text()):
            over = self.popen.poll() is not None and not wanted.search(self.text())
            if over or time.perf_counter() > end:
                raise RuntimeError(f"{self.out}: no line {pattern}")
            time.sleep(0.001)
        return time.perf_counter()

    def listens(self, port: int) -> None:
        """Waits until a process listens on the port."""
        while self.popen.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to all processes, the launcher first."""
        while left := self.processes():
            for pid in sorted(left, key=lambda pid: left[pid] != ""):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.popen.wait()

    def end(self, seconds: float = 240) -> float:
        """When its last process was gone; after `seconds` they are killed."""
        deadline = time.perf_counter() + seconds
        while self.popen.poll() is None or self.processes():
            if time.perf_counter() > deadline:
                print(f"warning: {self.out} did not end", file=sys.stderr)
                self.kill()
            time.sleep(0.02)
        return time.perf_counter()

    def unfinished(self) -> set[tuple[str, int]]:
        """Files of checkpoints that are being written, or were when a process was killed."""
        found = set()
        for path in self.folder.glob("*.ckpt.tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def place(self) -> str:
        """Where it was when it ended, from its output."""
        return [
            place for place, line in PLACES.items() if re.search(line, self.text(), re.MULTILINE)
        ][-1]

    def exits(self) -> list[str]:
        """Rank and code, "0: 5", of every process of `worker` that chose its end, in that order."""
        path = self.out.with_suffix(".exits")
        return path.read_text().splitlines() if path.exists() else []

    def resumed(self) -> int | None:
        """The step from which it went on last, if it came that far."""
        found = re.findall(r"^resumed from step:(\d+)", self.text(), re.MULTILINE)
        return int(found[-1]) if found else None


def digest(folder: Path) -> str:
    path = folder / tg.ARTIFACT
    return common.sha256(path) if path.exists() else ""


def difference(a: Path, b: Path) -> float:
    """Largest |a - b| / max |b| of a tensor, over the tensors of two artifacts."""
    models = [tg.load_model((path / tg.ARTIFACT).read_bytes(), str(path))[0] for path in (a, b)]
    worst = 0.0
    for p, q in zip(*(model.parameters() for model in models)):
        worst = max(worst, ((p - q).abs().max() / q.abs().max().clamp_min(1e-12)).item())
    return worst


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; ValueError if one is no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def course(folder: Path) -> list[tuple[Any, ...]]:
    """Steps and losses of a run."""
    names = ("step", "weights", "train_loss", "val_loss")
    return [tuple(row.get(name) for name in names) for row in metrics(folder)]


def same_course(a: Path, b: Path) -> bool:
    """Whether two runs logged the same steps, each once, in order, and the same losses exactly."""
    one = course(a)
    return one == course(b) and len({row[:2] for row in one}) == len(one)


def finish(name: str, ranks: int, env: dict[str, Any] | None = None) -> Job:
    """An uninterrupted run, or what is left of one."""
    job = Job(name, ranks, env=env)
    job.seconds = job.end() - job.began
    return job


def prepare(source: Path) -> None:
    """Copies 60,000 training tokens, in two shards, and 5,001 validation tokens."""
    parts = ("train", 0, 30_000), ("train", 30_000, 30_000), ("val", 0, 5_001)
    for i, (split, start, count) in enumerate(parts):
        paths = sorted(source.glob(f"fineweb_{split}_*.bin"))
        if not paths:
            raise tg.InputError(f"--data {source} holds no fineweb_{split}_*.bin")
        tokens = np.fromfile(paths[0], "<u2", count, offset=1024 + 2 * start)
        common.write_shard(WORK / "data" / f"fineweb_{split}_{i:06d}.bin", tokens)


def note_exits() -> None:
    """Has this process note the exit code by which it leaves."""
    leave = os._exit

    def note(code: int) -> Any:
        with open(os.environ["FAULTS_EXITS"], "a") as file:
            file.write(f"{os.environ.get('RANK', 0)}: {code}\n")
        leave(code)

    mock.patch.object(os, "_exit", note).start()


def spoil_steps(kind: str, hit: Iterable[int]) -> None:
    """Makes a fault happen in training steps."""
    train_step, now = tg.Trainer.train_step, time.time

    def shifted() -> float:
        return now() + 86400  # a day ahead,

    def shifted_back() -> float:
        return now() - 86400  # then two days back

    def broken(self: tg.Trainer, step: int, *rest: Any) -> None:
        forward, world = self.forward, self.world
        last = world.rank == world.size - 1
        if kind == "clock" and step >= 10:
            mock.patch.object(time, "time", shifted if step < 20 else shifted_back).start()
        elif kind == "cpu":
            print(f"cpu:{time.process_time():.4f}", flush=True)
        elif kind.startswith("nan") and world.training and last and step in hit:
            self.forward = lambda *args: forward(*args) * math.nan
        train_step(self, step, *rest)
        self.forward = forward

    mock.patch.object(tg.Trainer, "train_step", broken).start()


def worker(fault: str) -> None:
    """train_gpt.py with a fault, in this process."""
    kind, _, at = fault.partition(":")
    hit = range(int(at or 0), STEPS)
    note_exits()
    if kind != "plain":
        spoil_steps(kind, hit if "forever" in kind else hit[:1])
    os._exit(tg.main())


if __name__ == "__main__":
    if "FAULTS_EXITS" not in os.environ or len(sys.argv) != 2:
        sys.exit("fault_job.py is started by faults.py; see faults.py --help")
    worker(sys.argv[1])
