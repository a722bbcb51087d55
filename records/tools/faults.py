"""Faults made on purpose, and what a run of train_gpt.py does then.

    python records/tools/faults.py kills --runs 50  # SIGKILL at random moments
    python records/tools/faults.py overhead         # what saving costs
    python records/tools/faults.py table            # one fault each; needs root
    python records/tools/faults.py agents           # two torchrun agents
    python records/tools/faults.py report           # report.md of all these

Runs are started as a user starts them. Their files go to logs/faults below
the current folder, which must not hold files of the same command yet, and
rows go to <out>/<command>.jsonl. Of the faults in `table`, those on a full
and on a read-only disk need root. Only for Linux: processes are found through
/proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import torch

    import train_gpt as tg
    from records.tools import common
    from records.tools.fault_cases import CASES, DISK, SAVED, Case
    from records.tools.fault_job import (
        BASE,
        PLACES,
        STEPS,
        THREADS,
        WORK,
        Job,
        difference,
        digest,
        finish,
        metrics,
        prepare,
        same_course,
    )

Row = dict[str, Any]
Write = Callable[[Row], None]

# ---- 1. Kills ------------------------------------------------------------------------------------
AIMS = ("warm-up", "training", "save", "save", "evaluation", "export", "scoring")


def kill_in_save(job: Job, step: int, before: set[tuple[str, int]]) -> None:
    """Kills a run while it writes a checkpoint, from `step` on; rank 0, which writes, first."""
    job.wait_for(rf"^step:{step}/")
    pids = job.processes()
    while not job.unfinished() - before and job.popen.poll() is None:
        time.sleep(0.0002)
    for pid in sorted(pids, key=lambda pid: pids[pid] or "launcher"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def strike(job: Job, draw: random.Random, usual: float) -> Row:
    """Kills a run, at a random moment of its `usual` seconds or aimed at a place of it."""
    aim, before = draw.choice(["time"] * len(AIMS) + [*AIMS]), job.unfinished()
    with contextlib.suppress(RuntimeError):  # it ended, or started behind the place aimed at
        if aim == "time":
            time.sleep(draw.uniform(0, usual))
        elif aim == "save":
            kill_in_save(job, draw.randrange(2, STEPS), before)
        else:
            job.wait_for(PLACES[aim])
            time.sleep(draw.uniform(0, 0.1))
    running = job.popen.poll() is None or bool(job.processes())
    alive = running or job.popen.returncode == -signal.SIGKILL
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


def strikes_of(number: int, ranks: int, usual: float) -> list[Row]:
    """Kills a run once, or twice on one rank; a run that ended before it was hit is made again."""
    draw, name = random.Random(number), f"kill{number}"
    strikes: list[Row] = []
    kills = draw.randint(1, 2) if ranks == 1 else 1
    while sum(strike["killed"] for strike in strikes) < kills:
        if (WORK / name / "result.json").exists():
            shutil.rmtree(WORK / name)
            strikes = []
        saved = any((WORK / name).glob("step_*.ckpt"))
        strikes.append(strike(Job(name, ranks), draw, usual) | dict(saved=saved))
    return strikes


def kill_run(number: int, ranks: int, whole: Job) -> Row:
    """One run that is killed, then left alone; its row."""
    began, folder = time.perf_counter(), WORK / f"kill{number}"
    strikes = strikes_of(number, ranks, whole.seconds)
    saved, job = any(folder.glob("step_*.ckpt")), finish(folder.name, ranks)
    resumes = [(s["resumed"], s["saved"]) for s in strikes[1:]] + [(job.resumed(), saved)]
    from_zero = sum(step == 0 for step, _ in resumes)
    needless = sum(step == 0 and saved for step, saved in resumes)
    ended = (folder / "result.json").exists()
    equal = ended and digest(folder) == digest(whole.folder)
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
        row["difference"] = difference(folder, whole.folder)
    if row["lost"] or not equal:
        print(job.text(), file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return row


def kills(options: argparse.Namespace, write: Write) -> None:
    for ranks in options.ranks:
        whole = finish(f"whole{ranks}", ranks)
        seconds = round(whole.seconds, 1)
        write(dict(uninterrupted=ranks, sha256=digest(whole.folder), seconds=seconds))
        for number in range(options.runs // len(options.ranks)):
            write(kill_run(number + ranks * 1000, ranks, whole))


def save_times(every: int, repetition: int) -> Row:
    """Step times of a run with one SAVE_EVERY, over its last 40 steps of 60, which make two passes.

    Of the clock, which other load lengthens, and of the processor, in all threads of the run.
    """
    env = dict(SAVE_EVERY=every, ITERATIONS=60)
    job = Job(f"save{every}_{repetition}", fault="cpu", env=env)
    job.end()
    spent = [1e3 * float(cpu) for cpu in re.findall(r"^cpu:(.*)$", job.text(), re.MULTILINE)]
    seconds = [row["train_seconds"] for row in metrics(job.folder) if "train_loss" in row]
    steps = [1e3 * (b - a) for a, b in zip(seconds[19:], seconds[20:])]
    sizes = [path.stat().st_size for path in job.folder.glob("*.ckpt")]
    return dict(
        save_every=every,
        repetition=repetition,
        checkpoint_bytes=max(sizes, default=0),
        ms_cpu=round((spent[-1] - spent[-40]) / 39, 2),
        ms_mean=round(mean(steps), 2),
        ms_median=round(median(steps), 2),
    )


def overhead(options: argparse.Namespace, write: Write) -> None:
    """Step times with SAVE_EVERY=0, 10 and 1, in turns."""
    for repetition in range(3):
        for every in (0, 10, 1):
            write(save_times(every, repetition))


# ---- 2. One fault each ---------------------------------------------------------------------------


def strike_case(name: str, case: Case) -> tuple[Job, Row]:
    """The run of a case, once its processes have ended, and what was seen of it."""
    case.before(name)
    job = Job(name, case.ranks, case.inject, SAVED | case.env, case.torchrun)
    row: Row = dict(fault=case.fault, ranks=case.ranks, expected=case.expected)
    try:
        job.wait_for(case.mark)
        case.act(job)
    except RuntimeError as error:
        row["missed"] = str(error)
    struck = time.perf_counter()
    seconds, lines = job.end() - struck, job.text().splitlines() or [""]
    told = [line for line in lines if re.search(case.line, line)]
    said = told[-1] if told else lines[-1]
    row |= dict(
        observed=said.strip().replace(sys.executable, "python")[:240],
        told=bool(told),
        exits=", ".join(job.exits()),
        launcher=job.popen.returncode if case.ranks > 1 else None,
        seconds=round(seconds, 1),
    )
    return job, row


def observe(number: int, case: Case, whole: Job) -> Row:
    """The row of a case: what was expected and what came."""
    name = f"case{number}"
    job, row = strike_case(name, case)
    told = row.pop("told")
    if case.resume:
        case.undo(job)
        job = finish(name, case.ranks, SAVED | case.env)
    row |= dict(
        resumed_from=job.resumed(),
        finished=(job.folder / "result.json").exists(),
        equal=digest(job.folder) == digest(whole.folder),
    )
    if row["finished"] and not row["equal"]:
        row["difference"] = difference(job.folder, whole.folder)
    found, expected = sorted(row["exits"].split(", ")), sorted(case.exits.split(", "))
    codes = len(found) == len(expected) and all(map(re.fullmatch, expected, found))
    right = told and codes and "missed" not in row
    return row | dict(as_expected=right and (row["equal"] or not case.same))


def table(options: argparse.Namespace, write: Write) -> None:
    chosen = [(i, case) for i, case in enumerate(CASES) if re.search(options.only, case.fault)]
    if not chosen:
        raise tg.InputError(f"--only {options.only} matches no fault")
    ranks = {case.ranks for _, case in chosen}
    wholes = {count: finish(f"whole{count}", count) for count in sorted(ranks | {1})}
    if len(wholes) == 2:
        apart = difference(wholes[1].folder, wholes[2].folder)
        write(dict(uninterrupted_on_one_rank_and_two=apart))
    for number, case in chosen:
        try:
            write(observe(number, case, wholes[case.ranks]))
        finally:
            while DISK.is_mount():
                subprocess.run(["umount", str(DISK)], check=True)


# ---- 3. Two agents -------------------------------------------------------------------------------


def first_match(pattern: str, *jobs: Job) -> None:
    while not any(re.search(pattern, job.text(), re.MULTILINE) for job in jobs):
        time.sleep(0.001)


def agent(name: str, port: int) -> Job:
    """One of two nodes, with one rank."""
    torchrun = (
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        "--local-addr=127.0.0.1",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=faults",
        "--max-restarts=3",
    )
    return Job(name, 2, "plain", SAVED, torchrun)


def lose_agent(lost: int, whole: Job) -> Row:
    """Two nodes, one of which is killed whole and comes back after ten seconds.

    0 is the one with the rendezvous. Their LOG_DIR is one folder: rank 0 may be on the other node
    after a restart.
    """
    port, name = common.free_port(), f"agents{lost}"
    jobs = [agent(name, port)]
    jobs[0].listens(port)
    jobs.append(agent(name, port))
    first_match(r"^step:7/", *jobs)
    jobs[lost].kill()
    struck, other = time.perf_counter(), jobs[1 - lost]
    while not other.exits() and other.popen.poll() is None:
        time.sleep(0.01)
    row: Row = dict(
        lost=("the agent with the rendezvous", "the other agent")[lost],
        seconds_until_rank_ended=round(time.perf_counter() - struck, 1),
    )
    time.sleep(10)
    back, row["agent_waits"] = time.perf_counter(), other.popen.poll() is None
    if not row["agent_waits"]:  # both are started again
        jobs.append(agent(name, port))
        jobs[-1].listens(port)
    jobs.append(agent(name, port))
    row["seconds_after_return"] = round(max(job.end() for job in jobs) - back, 1)
    text = "\n".join(job.text() for job in jobs)
    resumed = re.findall(r"^resumed from step:(\d+)", text, re.MULTILINE)
    return row | dict(
        told=[line[:120] for line in re.findall(r"^\[rank \d.*$", text, re.MULTILINE)],
        exits=[job.exits() for job in jobs],
        launchers=[job.popen.returncode for job in jobs],
        resumed_from=max(map(int, resumed)),
        finished=(other.folder / "result.json").exists(),
        equal=digest(other.folder) == digest(whole.folder),
    )


def agents(options: argparse.Namespace, write: Write) -> None:
    whole = finish("whole2", 2)
    for lost in (1, 0):
        write(lose_agent(lost, whole))


# ---- 4. Report -----------------------------------------------------------------------------------


def read(options: argparse.Namespace, command: str) -> list[Row]:
    path = options.out / f"{command}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def kills_report(lines: Sequence[Row]) -> list[str]:
    body = []
    for ranks in (1, 2):
        runs = [row for row in lines if row.get("ranks") == ranks]
        struck = [kill for row in runs for kill in row["kills"] if kill["killed"]]
        places = [sum(kill["place"] == place for kill in struck) for place in (*PLACES, "save")]
        names = ("from_zero", "lost", "equal", "same_course")
        sums = [sum(row[name] for row in runs) for name in names]
        worst = max((row.get("difference", 0) for row in runs), default=0)
        body.append([ranks, len(runs), len(struck), *places, *sums, worst])
    head = ["ranks", "runs", "kills", *PLACES, "inside a save", "began again at step 0", "lost"]
    head += ["artifact equal", "metrics equal", "largest difference"]
    return common.markdown_table(head, body)


def overhead_report(lines: Sequence[Row]) -> list[str]:
    """Of every setting: mean step times, and the processor time beyond that of the runs without
    saving beside them."""
    rows, body = [row for row in lines if "save_every" in row], []
    plain = [row for row in rows if row["save_every"] == 0]
    for every in (0, 10, 1):
        mine = [row for row in rows if row["save_every"] == every]
        more = [a["ms_cpu"] - b["ms_cpu"] for a, b in zip(mine, plain)]
        names = "ms_mean", "ms_median", "ms_cpu"
        means = [f"{mean(row[name] for row in mine):.1f}" for name in names]
        single = f"{min(more):+.1f} to {max(more):+.1f}"
        body.append([every, len(mine), *means, f"{mean(more):+.1f}", single])
    head = ["SAVE_EVERY", "runs", "ms a step", "median", "processor ms a step", "more than with 0"]
    return common.markdown_table([*head, "single runs"], body)


def artifact_of(row: Row) -> str:
    """How the artifact of a case compares with that of an uninterrupted run."""
    if row["equal"]:
        return "equal"
    return f"{row['difference']:.1g} off" if "difference" in row else "none"


def table_report(lines: Sequence[Row]) -> list[str]:
    """A row that was made again counts once."""
    last = {row["fault"]: row for row in lines if "fault" in row}
    body = []
    for case in CASES:
        if case.fault not in last:
            continue
        row = last[case.fault]
        body.append(
            [
                row["fault"],
                row["expected"],
                row["observed"][:110],
                row["exits"] or "-",
                row["launcher"] or "-",
                row["seconds"],
                row["resumed_from"],
                artifact_of(row),
                "yes" if row["as_expected"] else "NO",
            ]
        )
    head = ["fault", "expected", "observed", "exit codes of ranks", "torchrun", "s to the end"]
    head += ["resumed from", "artifact", "as expected"]
    return common.markdown_table(head, body)


def agents_report(lines: Sequence[Row]) -> list[str]:
    columns = {
        "lost": "lost",
        "seconds_until_rank_ended": "s until the other rank ended",
        "agent_waits": "its agent waits",
        "seconds_after_return": "s after the return",
        "resumed_from": "resumed from",
        "finished": "finished",
        "equal": "artifact equal",
    }
    body = [[row[name] for name in columns] for row in lines if "lost" in row]
    return common.markdown_table([*columns.values()], body)


def report(options: argparse.Namespace) -> None:
    parts = dict(
        kills=kills_report, overhead=overhead_report, table=table_report, agents=agents_report
    )
    text = ["# Faults", ""]
    for command, part in parts.items():
        if lines := read(options, command):
            text += [f"## {command}", "", *part(lines), ""]
    tg.write_atomically(options.out / "report.md", "\n".join(text).encode())


# ---- 5. The command ------------------------------------------------------------------------------


@contextlib.contextmanager
def rows(options: argparse.Namespace) -> Iterator[Write]:
    """A function that writes rows to <out>/<command>.jsonl; `--only` adds to what is there.

    The first row says what was run on what.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / f"{options.command}.jsonl", "a" if options.only else "w") as file:

        def write(row: Row) -> None:
            print(json.dumps(row), file=file, flush=True)
            common.say(json.dumps(row))

        write(
            dict(
                command=options.command,
                steps=STEPS,
                torch=torch.__version__,
                script_sha256=common.sha256(common.ROOT / "train_gpt.py"),
                cpu=f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
                threads=int(THREADS),
            )
        )
        started = time.perf_counter()
        yield write
        write(dict(seconds_in_all=round(time.perf_counter() - started)))


COMMANDS = dict(kills=kills, overhead=overhead, table=table, agents=agents)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("command", choices=[*COMMANDS, "report"], help="What to do, as above.")
    add("--runs", type=int, default=50, help="Number of runs to kill (default: %(default)s).")
    add(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2],
        help="Numbers of ranks, each for an equal share of the runs to kill (default: 1 2).",
    )
    add(
        "--only",
        default="",
        help="Regular expression for the faults of `table` to make (default: all).",
    )
    add(
        "--out",
        type=Path,
        default=Path("records/faults"),
        help="Folder of the rows and the report (default: %(default)s).",
    )
    add(
        "--data",
        type=Path,
        default=Path("data/datasets/fineweb10B_sp1024"),
        help="Folder of shards to take tokens from (default: %(default)s).",
    )
    add(
        "--tokenizer",
        default="data/tokenizers/fineweb_1024_bpe.model",
        help="Their SentencePiece model (default: %(default)s).",
    )
    return top


def work(options: argparse.Namespace) -> int:
    common.require_at_least(options, runs=1, ranks=1)
    if options.command != "report":
        BASE["TOKENIZER_PATH"] = options.tokenizer
        prepare(options.data)
        with rows(options) as write:
            COMMANDS[options.command](options, write)
    report(options)
    return 0


def main() -> int:
    return common.run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
