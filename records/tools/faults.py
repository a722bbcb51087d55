"""Faults made on purpose, and what a run of train_gpt.py does then.

    python records/tools/faults.py kills --runs 50 --out records/faults     # SIGKILL at random moments
    python records/tools/faults.py overhead --out records/faults            # what saving costs
    python records/tools/faults.py table --out records/faults               # one fault each; its disks need root
    python records/tools/faults.py agents --out records/faults              # two torchrun agents on loopback
    python records/tools/faults.py report --out records/faults              # the logs of these as report.md

Runs are started as a user starts them. Their files go to logs/faults below the current folder, which must not
exist yet for the same command; rows go to <out>/<command>.jsonl. Linux: processes are found through /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_cases import CASES, DISK, SAVED, Case
from fault_job import (
    BASE,
    PLACES,
    STEPS,
    WORK,
    Job,
    difference,
    digest,
    finish,
    metrics,
    prepare,
    same_course,
    tg,
)

# ---- 1. Kills --------------------------------------------------------------------------------------------
AIMS = ("warm-up", "training", "save", "save", "evaluation", "export", "scoring")


def strike(job: Job, draw: random.Random, usual: float) -> dict[str, Any]:
    """Kills a run, at a uniformly random moment of its `usual` seconds or aimed at a place of it."""
    aim, before = draw.choice(["time"] * len(AIMS) + [*AIMS]), job.unfinished()
    with contextlib.suppress(RuntimeError):  # it ended, or started behind the place aimed at
        if aim == "time":
            time.sleep(draw.uniform(0, usual))
        elif aim == "save":
            job.wait_for(rf"^step:{draw.randrange(2, STEPS)}/")
            pids = job.processes()
            while not job.unfinished() - before and job.popen.poll() is None:
                time.sleep(0.0002)
            # first of all rank 0, which writes
            for pid in sorted(pids, key=lambda pid: pids[pid] or "launcher"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            job.wait_for(PLACES[aim])
            time.sleep(draw.uniform(0, 0.1))
    alive = (
        job.popen.poll() is None or bool(job.processes()) or job.popen.returncode == -signal.SIGKILL
    )
    job.kill()
    place = "save" if job.unfinished() - before else job.place()
    steps = re.findall(r"^step:(\d+)/\d+ train_loss", job.text(), re.MULTILINE)
    return dict(
        aim=aim,
        killed=alive and not (job.folder / "result.json").exists(),
        place=place,
        resumed=job.resumed(),
        last_step=int(steps[-1]) if steps else None,
    )


def kill_run(number: int, ranks: int, whole: Job) -> dict[str, Any]:
    """One run that is killed once, or twice on one rank, then left alone; its row."""
    draw, name, strikes, began = random.Random(number), f"kill{number}", [], time.perf_counter()
    kills = draw.randint(1, 2) if ranks == 1 else 1
    while sum(s["killed"] for s in strikes) < kills:
        if (WORK / name / "result.json").exists():  # ended before it was hit: once more
            shutil.rmtree(WORK / name)
            strikes = []
        saved = any((WORK / name).glob("step_*.ckpt"))
        strikes.append(strike(Job(name, ranks), draw, whole.seconds) | dict(saved=saved))
    saved, job = any((WORK / name).glob("step_*.ckpt")), finish(name, ranks)
    resumes = [(s["resumed"], s["saved"]) for s in strikes[1:]] + [(job.resumed(), saved)]
    from_zero = sum(step == 0 for step, _ in resumes)
    needless = sum(step == 0 and saved for step, saved in resumes)
    ended = (WORK / name / "result.json").exists()
    equal = ended and digest(WORK / name) == digest(whole.folder)
    row = dict(
        run=number,
        ranks=ranks,
        kills=strikes,
        resumed_at_last=job.resumed(),
        from_zero=from_zero,
        lost=not ended or needless > 0,
        left_behind=len(job.unfinished()),
        equal=equal,
        same_course=ended and same_course(job.folder, whole.folder),
        seconds=round(time.perf_counter() - began, 1),
    )
    if ended and not equal:
        row["difference"] = difference(WORK / name, whole.folder)
    if row["lost"] or not equal:
        print(job.text(), file=sys.stderr)
    else:
        shutil.rmtree(WORK / name)
    return row


def kills(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    for ranks in options.ranks:
        whole = finish(f"whole{ranks}", ranks)
        write(
            dict(uninterrupted=ranks, sha256=digest(whole.folder), seconds=round(whole.seconds, 1))
        )
        for number in range(options.runs // len(options.ranks)):
            write(kill_run(number + ranks * 1000, ranks, whole))


def overhead(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Step times with SAVE_EVERY=0, 10 and 1, in turns: of the clock, which other load lengthens, and of the
    processor, in all threads of the run."""
    for repetition in range(3):
        for every in (0, 10, 1):
            job = Job(
                f"save{every}_{repetition}", fault="cpu", env=dict(SAVE_EVERY=every, ITERATIONS=60)
            )
            job.end()
            spent = [
                1e3 * float(cpu) for cpu in re.findall(r"^cpu:(.*)$", job.text(), re.MULTILINE)
            ]
            seconds = [m["train_seconds"] for m in metrics(job.folder) if "train_loss" in m]
            steps = [
                1e3 * (b - a) for a, b in zip(seconds[19:], seconds[20:])
            ]  # from 20 on: two passes
            size = max((path.stat().st_size for path in job.folder.glob("*.ckpt")), default=0)
            write(
                dict(
                    save_every=every,
                    repetition=repetition,
                    checkpoint_bytes=size,
                    ms_cpu=round((spent[-1] - spent[-40]) / 39, 2),
                    ms_mean=round(statistics.mean(steps), 2),
                    ms_median=round(statistics.median(steps), 2),
                )
            )


# ---- 2. One fault each -----------------------------------------------------------------------------------


def observe(number: int, case: Case, whole: Job) -> dict[str, Any]:
    """The row of a case: what was expected and what came."""
    name, env = f"case{number}", SAVED | case.env
    case.before(name)
    job = Job(name, case.ranks, case.inject, env, case.torchrun)
    row = dict(fault=case.fault, ranks=case.ranks, expected=case.expected)
    try:
        job.wait_for(case.mark)
        case.act(job)
    except RuntimeError as error:
        row["missed"] = str(error)
    struck = time.perf_counter()
    seconds, lines = job.end() - struck, job.text().splitlines() or [""]
    told = [line for line in lines if re.search(case.line, line)]
    said = (told or lines[-1:])[-1].strip().replace(sys.executable, "python")
    row |= dict(
        observed=said[:240],
        exits=", ".join(job.exits()),
        launcher=job.popen.returncode if case.ranks > 1 else None,
        seconds=round(seconds, 1),
    )
    if case.resume:
        case.undo(job)
        job = finish(name, case.ranks, env)
    row |= dict(
        resumed_from=job.resumed(),
        finished=(job.folder / "result.json").exists(),
        equal=digest(job.folder) == digest(whole.folder),
    )
    if row["finished"] and not row["equal"]:
        row["difference"] = difference(job.folder, whole.folder)
    right = (
        sorted(row["exits"].split(", ")) == sorted(case.exits.split(", ")) and "missed" not in row
    )
    return row | dict(as_expected=bool(told) and right and row["equal"] >= case.same)


def table(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    wholes = {ranks: finish(f"whole{ranks}", ranks) for ranks in (1, 2)}
    write(
        dict(
            uninterrupted_on_one_rank_and_two=difference(
                *(whole.folder for whole in wholes.values())
            )
        )
    )
    for number, case in enumerate(CASES):
        if re.search(options.only, case.fault):
            try:
                write(observe(number, case, wholes[case.ranks]))
            finally:
                if DISK.is_mount():
                    subprocess.run(["umount", str(DISK)], check=True)


# ---- 3. Two agents ---------------------------------------------------------------------------------------


def first_match(pattern: str, *jobs: Job) -> None:
    while not any(re.search(pattern, job.text(), re.MULTILINE) for job in jobs):
        time.sleep(0.001)


def lose_agent(lost: int, whole: Job) -> dict[str, Any]:
    """Two nodes with one rank each, one of which (0: that with the rendezvous) is killed whole and comes back
    after ten seconds. Their LOG_DIR is one folder: rank 0 may be on the other node after a restart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = (
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        "--local-addr=127.0.0.1",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=faults",
        "--max-restarts=3",
    )

    def agent() -> Job:
        return Job(f"agents{lost}", 2, "plain", SAVED, torchrun)

    jobs = [agent()]
    jobs[0].listens(port)
    jobs.append(agent())
    first_match(r"^step:7/", *jobs)
    jobs[lost].kill()
    struck, other = time.perf_counter(), jobs[1 - lost]
    while not other.exits() and other.popen.poll() is None:
        time.sleep(0.01)
    row = dict(
        lost=("the agent with the rendezvous", "the other agent")[lost],
        seconds_until_rank_ended=round(time.perf_counter() - struck, 1),
    )
    time.sleep(10)
    back, row["agent_waits"] = time.perf_counter(), other.popen.poll() is None
    if not row["agent_waits"]:  # both are started again
        jobs.append(agent())
        jobs[-1].listens(port)
    jobs.append(agent())
    row["seconds_after_return"] = round(max(job.end() for job in jobs) - back, 1)
    text = "\n".join(job.text() for job in jobs)
    return row | dict(
        told=[line[:120] for line in re.findall(r"^\[rank \d.*$", text, re.MULTILINE)],
        exits=[job.exits() for job in jobs],
        launchers=[job.popen.returncode for job in jobs],
        resumed_from=max(map(int, re.findall(r"^resumed from step:(\d+)", text, re.MULTILINE))),
        finished=(other.folder / "result.json").exists(),
        equal=digest(other.folder) == digest(whole.folder),
    )


def agents(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    whole = finish("whole2", 2)
    for lost in (1, 0):
        write(lose_agent(lost, whole))


# ---- 4. Report and commands ------------------------------------------------------------------------------


def read(options: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    path = options.out / f"{command}.jsonl"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def markdown(head: list[str], body: list[list[Any]]) -> list[str]:
    cells = [
        [str(cell).replace("|", "/") for cell in row] for row in (head, ["---"] * len(head), *body)
    ]
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def kills_report(lines: list[dict[str, Any]]) -> list[str]:
    body = []
    for ranks in (1, 2):
        runs = [row for row in lines if row.get("ranks") == ranks]
        struck = [kill for row in runs for kill in row["kills"] if kill["killed"]]
        places = [sum(kill["place"] == place for kill in struck) for place in (*PLACES, "save")]
        sums = [
            sum(row[name] for row in runs) for name in ("from_zero", "lost", "equal", "same_course")
        ]
        differences = [row.get("difference", 0) for row in runs]
        body.append([ranks, len(runs), len(struck), *places, *sums, max(differences, default=0)])
    return markdown(
        [
            "ranks",
            "runs",
            "kills",
            *PLACES,
            "inside a save",
            "began again at step 0",
            "lost",
            "artifact equal",
            "metrics equal",
            "largest difference",
        ],
        body,
    )


def overhead_report(lines: list[dict[str, Any]]) -> list[str]:
    """Of every setting: mean step times, and by how much more processor time runs took than those beside
    them with SAVE_EVERY=0."""
    rows, body = [row for row in lines if "save_every" in row], []
    for every in (0, 10, 1):
        mine = [row for row in rows if row["save_every"] == every]
        plain = [row for row in rows if row["save_every"] == 0]
        more = [a["ms_cpu"] - b["ms_cpu"] for a, b in zip(mine, plain)]
        names = "ms_mean", "ms_median", "ms_cpu"
        means = [f"{statistics.mean(row[name] for row in mine):.1f}" for name in names]
        body.append(
            [
                every,
                len(mine),
                *means,
                f"{statistics.mean(more):+.1f}",
                f"{min(more):+.1f} to {max(more):+.1f}",
            ]
        )
    return markdown(
        [
            "SAVE_EVERY",
            "runs",
            "ms a step",
            "median",
            "processor ms a step",
            "more than with 0",
            "single runs",
        ],
        body,
    )


def table_report(lines: list[dict[str, Any]]) -> list[str]:
    last = {
        row["fault"]: row for row in lines if "fault" in row
    }  # a row that was made again counts once
    rows = [last[case.fault] for case in CASES if case.fault in last]

    def artifact(row: dict[str, Any]) -> str:
        return (
            "equal"
            if row["equal"]
            else f"{row['difference']:.1g} off"
            if "difference" in row
            else "none"
        )

    return markdown(
        [
            "fault",
            "expected",
            "observed",
            "exit codes of ranks",
            "torchrun",
            "s to the end",
            "resumed from",
            "artifact",
            "as expected",
        ],
        [
            [
                row["fault"],
                row["expected"],
                row["observed"][:110],
                row["exits"] or "-",
                row["launcher"] or "-",
                row["seconds"],
                row["resumed_from"],
                artifact(row),
                "yes" if row["as_expected"] else "NO",
            ]
            for row in rows
        ],
    )


def agents_report(lines: list[dict[str, Any]]) -> list[str]:
    columns = {
        "lost": "lost",
        "seconds_until_rank_ended": "s until the other rank ended",
        "agent_waits": "its agent waits",
        "seconds_after_return": "s after the return",
        "resumed_from": "resumed from",
        "finished": "finished",
        "equal": "artifact equal",
    }
    return markdown(
        [*columns.values()], [[row[name] for name in columns] for row in lines if "lost" in row]
    )


def report(options: argparse.Namespace) -> None:
    parts = dict(
        kills=kills_report, overhead=overhead_report, table=table_report, agents=agents_report
    )
    text = [
        line
        for command, part in parts.items()
        if (lines := read(options, command))
        for line in (f"## {command}", "", *part(lines))
    ]
    (options.out / "report.md").write_text("\n".join(["# Faults", "", *text]))


@contextlib.contextmanager
def rows(options: argparse.Namespace) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes rows to <out>/<command>.jsonl, the first of which says what was run on what;
    `--only` adds to what is there."""
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / f"{options.command}.jsonl", "a" if options.only else "w") as file:

        def write(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=file, flush=True)
            print(json.dumps(row), flush=True)

        write(
            dict(
                command=options.command,
                steps=STEPS,
                torch=tg.torch.__version__,
                script_sha256=hashlib.sha256(tg.source()).hexdigest(),
                cpu=f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
                threads=tg.torch.get_num_threads(),
            )
        )
        started = time.perf_counter()
        yield write
        write(dict(seconds_in_all=round(time.perf_counter() - started)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = dict(kills=kills, overhead=overhead, table=table, agents=agents)
    parser.add_argument("command", choices=[*commands, "report"])
    parser.add_argument("--runs", type=int, default=50, help="of kills, in all")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], help="of kills: as many runs on each"
    )
    parser.add_argument("--only", default="", help="of table: faults that this pattern matches")
    parser.add_argument("--out", type=Path, default=Path("records/faults"))
    parser.add_argument(
        "--data", type=Path, default=Path("data/datasets/fineweb10B_sp1024"), help="shards"
    )
    parser.add_argument("--tokenizer", default="data/tokenizers/fineweb_1024_bpe.model")
    options = parser.parse_args()
    if options.command != "report":
        BASE["TOKENIZER_PATH"] = options.tokenizer
        prepare(options.data)
        with rows(options) as write:
            commands[options.command](options, write)
    report(options)


if __name__ == "__main__":
    main()
