"""The run matrix: the rows of runs.toml, each with several seeds, one folder a run, and what they show.

    python records/tools/ablate.py list                                    # rows, series, hypotheses
    python records/tools/ablate.py run series1 wins --seeds 3 --nproc 8    # one node, one run after the other
    python records/tools/ablate.py run all --seeds 3 --nproc 8 --cluster slurm --job slurm_partition=gpu
    python records/tools/ablate.py report                                  # tables, pictures, report.html

A run is `train_gpt.py` with the variables of its row, of the scale and of `--set`; other options of the
script that happen to stand in the environment do not reach it. It lives in <out>/<scale>/<row>/seed<n>/,
where run.json says how it was started. `run` can be stopped and started again at any time: a finished run
is left alone, a run that was cut off is set aside and made again, a failed one is tried again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg

FIELDS = {f.name: f.default for f in fields(tg.Config)}
OPTIONS = {name.upper() for name in FIELDS} | {"USE_DEPTH_EMBED"}

# ---- 1. The table ----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of runs.toml."""

    name: str
    series: str
    what: str
    hypothesis: str
    baselines: list[str]
    set: dict[str, str]


class Scale(NamedTuple):
    """A size at which rows are run: variables, and divisors of the row's own values."""

    name: str
    what: str
    divide: dict[str, int]
    set: dict[str, str]


class Claim(NamedTuple):
    """What a source concludes from several pairs of rows, [row, baseline] each."""

    name: str
    what: str
    pairs: list[list[str]]


class Table(NamedTuple):
    rows: dict[str, Row]
    scales: dict[str, Scale]
    claims: dict[str, Claim]

    def pick(self, names: Iterable[str]) -> list[Row]:
        """The rows that are named, by themselves, by their series or as `all`; ValueError for other names."""
        series, picked = {row.series for row in self.rows.values()}, {}
        for name in names:
            if name not in self.rows and name not in series and name != "all":
                raise ValueError(
                    f"{name} is neither a run nor a series; runs: {', '.join(self.rows)}; "
                    f"series: {', '.join(sorted(series))}; or all"
                )
            picked |= {r.name: r for r in self.rows.values() if name in (r.name, r.series, "all")}
        return list(picked.values())


def texts(values: dict[str, Any]) -> dict[str, str]:
    """Variables as an environment holds them."""
    return {name: tg.show(value) for name, value in values.items()}


def read_table(path: Path) -> Table:
    """The table in a TOML file; ValueError says which entry is wrong."""

    def entries(kind: type, section: str) -> dict[str, Any]:
        made = {}
        for name, entry in data.get(section, {}).items():
            if entry.keys() != set(kind._fields) - {"name"}:
                raise ValueError(
                    f"{path}: {section}.{name} has {', '.join(entry)}; it needs "
                    f"{', '.join(kind._fields[1:])}"
                )
            made[name] = kind(
                name, **entry | ({"set": texts(entry["set"])} if "set" in entry else {})
            )
        return made

    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    table = Table(entries(Row, "run"), entries(Scale, "scale"), entries(Claim, "claim"))
    named = {f"run {row.name}": row.baselines for row in table.rows.values()}
    named |= {f"claim {claim.name}": sum(claim.pairs, []) for claim in table.claims.values()}
    for entry, names in named.items():
        if missing := [name for name in names if name not in table.rows]:
            raise ValueError(f"{path}: {entry} names {', '.join(missing)}, which is not a run")
    return table


# ---- 2. What a run is ------------------------------------------------------------------------------------


def variables(
    row: Row, scale: Scale | None, scale_name: str, given: dict[str, str]
) -> dict[str, str]:
    """The variables of a row at a scale of the table (`scale`), of train_gpt.py (`scale_name`) or its own."""
    if scale is None:
        preset = [p for p in (row.set.get("PRESET", ""), scale_name) if p]
        return row.set | ({"PRESET": ",".join(preset)} if preset else {}) | given
    full = tg.Config.from_env({name: row.set[name] for name in row.set.keys() & OPTIONS})
    divided = {}
    for name, divisor in scale.divide.items():
        value, rest = divmod(getattr(full, name.lower()), divisor)
        if rest or not value:
            raise ValueError(
                f"scale {scale.name}: {name} of {row.name} is not a multiple of {divisor}"
            )
        divided[name] = str(value)
    return scale.set | row.set | divided | given


@dataclass(frozen=True, eq=False)
class Run:
    """A row with a seed, where it goes and how it is launched."""

    row: str
    seed: int
    scale: str
    variables: dict[str, str]
    folder: Path
    ranks: int

    def config(self) -> tg.Config:
        """ValueError if the script would not take the variables."""
        unknown = ", ".join(sorted(self.variables.keys() - OPTIONS))
        if unknown:
            raise ValueError(f"{unknown}: not an option of this train_gpt.py")
        return tg.Config.from_env(self.environment())

    def environment(self) -> dict[str, str]:
        parent = self.folder.parent
        log_dir = parent.relative_to(ROOT) if parent.is_relative_to(ROOT) else parent
        return self.variables | dict(
            SEED=str(self.seed), LOG_DIR=str(log_dir), RUN_ID=self.folder.name
        )

    def command(self) -> list[str]:
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(self.ranks),
        ]
        return [sys.executable, *(torchrun if self.ranks > 1 else []), "train_gpt.py"]

    def beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def __str__(self) -> str:
        return f"{self.row} seed {self.seed}"


def finished(run: Run) -> bool:
    """Whether its folder holds its result; ValueError if that is the result of other variables."""
    path = run.folder / "result.json"
    if not path.exists():
        return False
    recorded, asked = FIELDS | json.loads(path.read_text())["config"], asdict(run.config())
    apart = [
        f"{n.upper()} {tg.show(recorded[n])} there, {tg.show(asked[n])} asked for"
        for n in asked
        if recorded[n] != asked[n] and n not in ("log_dir", "run_id", "preset")
    ]
    if apart:
        raise ValueError(
            f"{run.folder} holds another run ({'; '.join(apart)}): choose another --out"
        )
    return True


# ---- 3. One run ------------------------------------------------------------------------------------------


class Failed(RuntimeError):
    """A run that did not end with a result; the message is its cause."""


class Busy(Failed):
    """Another process is making this run."""


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds a lock file. What is launched inherits it: a run that outlives its launcher still holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("another process is making this run") from None
        yield file.fileno()


def set_aside(folder: Path) -> None:
    """Renames what a run left that did not end, to the first free name."""
    if folder.exists():
        names = (folder.with_name(f"{folder.name}.unfinished{i}") for i in range(1, 10_000))
        folder.rename(next(name for name in names if not name.exists()))


def commit() -> str | None:
    """The commit of the script, "+" behind it if the script was edited since; None outside of git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    try:
        edited = git("status", "--porcelain", "train_gpt.py")
        return git("rev-parse", "HEAD").strip() + ("+" if edited else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cause(console: Path, code: int) -> str:
    """The line of a failed run's output that says why."""
    lines = [
        line.strip() for line in console.read_text(errors="replace").splitlines() if line.strip()
    ]
    ours = [line for line in lines if line.startswith("[rank ")]
    return f"exit code {code}: {(ours or lines or ['no output'])[0 if ours else -1]} ({console})"


def execute(run: Run, tick: Callable[[float], None]) -> bool:
    """Makes a run unless it is there; whether it was made now. Failed says why there is no result."""
    with locked(run.beside(".lock")) as lock:
        if finished(run):
            return False
        set_aside(run.folder)
        clean = {name: value for name, value in os.environ.items() if name not in OPTIONS}
        console, words = run.beside(".console"), run.command()
        script, started = commit(), time.time()
        with open(console, "wb") as out:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=clean | run.environment(),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                pass_fds=[lock],
            )
        try:
            while process.poll() is None:
                tick(time.time() - started)
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait()
        if not finished(run):
            raise Failed(cause(console, process.returncode))
        record = dict(
            row=run.row,
            seed=run.seed,
            scale=run.scale,
            variables=run.variables,
            ranks=run.ranks,
            command=["python", *words[1:]],
            git_commit=script,
            exit_code=process.returncode,
            wall_seconds=round(time.time() - started, 1),
        )
        tg.write_atomically(run.folder / "run.json", json.dumps(record, indent=1).encode())
        console.unlink()
        return True


# ---- 4. The matrix ---------------------------------------------------------------------------------------


class Board:
    """What has been done and how long the rest will take: a line on a terminal, plain lines elsewhere."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs, self.left, self.failures = runs, list(runs), {}
        self.made = self.found = 0
        self.watched = sys.stderr.isatty()

    def seconds_left(self) -> float | None:
        """From the runs that are finished: of the same row where there are some, else of all."""
        known: dict[str, list[float]] = {}
        for run in self.runs:
            if (path := run.folder / "run.json").exists():
                known.setdefault(run.row, []).append(json.loads(path.read_text())["wall_seconds"])
        every = [seconds for row in known.values() for seconds in row]
        if not every:
            return None
        return sum(sum(of) / len(of) for run in self.left if (of := known.get(run.row, every)))

    def say(self, text: str, passing: bool = False) -> None:
        """A line that stays, or one that the next replaces (on a terminal only)."""
        if self.watched:
            print(f"\r\033[K{text}", end="" if passing else "\n", file=sys.stderr, flush=True)
        elif not passing:
            print(text, flush=True)

    def place(self) -> str:
        return f"[{len(self.runs) - len(self.left) + 1}/{len(self.runs)}]"

    def tick(self, run: Run, seconds: float) -> None:
        if self.watched:
            left = self.seconds_left()
            rest = "" if left is None else f", {duration(max(left - seconds, 0))} left"
            self.say(f"{self.place()} {run}: {seconds:.0f} s{rest}", passing=True)

    def done(self, run: Run, made: bool) -> None:
        """A run with a result; what was there before is counted, not told."""
        place = self.place()
        self.left.remove(run)
        self.made, self.found = self.made + made, self.found + (not made)
        if made:
            result, left = json.loads((run.folder / "result.json").read_text()), self.seconds_left()
            large = "" if result["fits"] else "; TOO LARGE for a submission"
            self.say(
                f"{place} {run}: val_bpb {result['roundtrip']['val_bpb']:.4f}{large}, "
                f"{duration(left or 0)} left"
            )

    def failed(self, run: Run, why: str) -> None:
        self.say(f"{self.place()} {run}: FAILED, {why}")
        self.left.remove(run)
        self.failures[run] = why

    def summary(self) -> int:
        """Prints what came of it; the exit code."""
        self.say(
            f"{len(self.runs)} runs: {self.made} made, {self.found} there already, "
            f"{len(self.failures)} failed, {len(self.left)} not started"
        )
        for run, why in self.failures.items():
            self.say(f"  {run}: {why}")
        return 1 if self.failures or self.left else 0


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def run_here(board: Board) -> None:
    """One run after the other; a failure does not stop the rest."""
    for run in list(board.left):
        try:
            board.done(run, execute(run, lambda seconds: board.tick(run, seconds)))
        except (Failed, ValueError) as error:
            board.failed(run, str(error))


def run_by_jobs(board: Board, options: argparse.Namespace) -> None:
    """Hands every run that is not there to submitit, each as this command for one row and seed; waits."""
    import submitit  # optional: records/tools/requirements.txt
    from submitit.helpers import CommandFunction

    out, parameters = options.out.resolve(), pairs(options.job)
    jobs, executor = {}, submitit.AutoExecutor(out / "jobs", cluster=options.cluster)
    executor.update_parameters(
        **{name: int(v) if v.isdigit() else v for name, v in parameters.items()}
    )
    same = [
        "--nproc",
        str(options.nproc),
        "--out",
        str(out),
        "--table",
        str(options.table.resolve()),
        "--scale",
        options.scale,
        *(["--set", *options.set] if options.set else []),
    ]
    for run in list(board.left):
        if finished(run):
            board.done(run, False)
    with executor.batch():
        for run in board.left:
            jobs[run] = executor.submit(
                CommandFunction(
                    [
                        sys.executable,
                        str(Path(__file__).resolve()),
                        "run",
                        run.row,
                        "--first-seed",
                        str(run.seed),
                        *same,
                    ]
                )
            )
    board.say(f"{len(jobs)} jobs, logs in {out / 'jobs'}")
    while board.left:
        for run in [run for run in board.left if jobs[run].done()]:
            if finished(run):
                board.done(run, True)
            else:
                board.failed(
                    run, f"job {jobs[run].job_id} ended without a result: {jobs[run].paths.stderr}"
                )
        time.sleep(0.2)


# ---- 5. The command --------------------------------------------------------------------------------------


def pairs(words: list[str]) -> dict[str, str]:
    """KEY=VALUE words."""
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is not KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def plan(table: Table, options: argparse.Namespace) -> list[Run]:
    """The runs that are asked for, seed by seed; ValueError if nothing like it exists."""
    given, scale = pairs(options.set), table.scales.get(options.scale)
    if unknown := given.keys() - OPTIONS:
        raise ValueError(f"--set {', '.join(sorted(unknown))}: not an option of train_gpt.py")
    if taken := given.keys() & {"SEED", "LOG_DIR", "RUN_ID", "EVAL_ONLY"}:
        raise ValueError(f"--set {', '.join(sorted(taken))}: the matrix sets that itself")
    if options.scale and scale is None and options.scale not in tg.SCALES:
        raise ValueError(
            f"--scale {options.scale}: there are {', '.join([*tg.SCALES, *table.scales])}"
        )
    runs = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for row in table.pick(options.names):
            name = options.scale or "full"
            runs.append(
                Run(
                    row.name,
                    seed,
                    name,
                    variables(row, scale, options.scale, given),
                    options.out.resolve() / name / row.name / f"seed{seed}",
                    options.nproc,
                )
            )
    return runs


def show_table(table: Table, names: list[str]) -> None:
    for row in table.pick(names or ["all"]):
        against = f" (against {', '.join(row.baselines)})" if row.baselines else ""
        unknown = ", ".join(sorted(row.set.keys() - OPTIONS))
        print(f"{row.series}  {row.name:20} {row.what}{against}\n{'':9}{row.hypothesis}")
        if unknown:
            print(f"{'':9}not runnable: {unknown} is not an option of this train_gpt.py")
    for scale in table.scales.values():
        print(f"scale {scale.name}: {scale.what}")


def run_matrix(table: Table, options: argparse.Namespace) -> int:
    """Every run is checked before the first is launched; one that cannot run is a failure among others."""
    runs = plan(table, options)
    board = Board(runs)
    for run in runs:
        try:
            finished(run)
            run.config()
        except ValueError as error:
            board.failed(run, str(error))
    try:
        if options.cluster:
            run_by_jobs(board, options)
        else:
            run_here(board)
    except KeyboardInterrupt:
        board.say("interrupted; the same command goes on")
    return board.summary()


def show_report(table: Table, options: argparse.Namespace) -> int:
    from records.tools import report  # optional: records/tools/requirements.txt

    name, scale = options.scale or "full", table.scales.get(options.scale)
    what = f"Scale {name}: {scale.what}." if scale else f"Scale {name} of train_gpt.py."
    folder = options.out.resolve() / name
    for path in report.write(folder, table, what, options.to or folder):
        print(path)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    listing, run, report = (commands.add_parser(name) for name in ("list", "run", "report"))
    for sub in (listing, run):
        sub.add_argument("names", nargs="*" if sub is listing else "+", help="runs, series, or all")
    run.add_argument("--seeds", type=int, default=1, help="how many, counted from --first-seed")
    run.add_argument("--first-seed", type=int, default=1337)
    run.add_argument(
        "--nproc", type=int, default=1, help="ranks, one a GPU; more than one by torchrun"
    )
    run.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="variables for every run"
    )
    run.add_argument(
        "--cluster", choices=("slurm", "local"), default="", help="one submitit job a run"
    )
    run.add_argument(
        "--job", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's job parameters"
    )
    report.add_argument("--to", type=Path, help="folder for the report; else <out>/<scale>")
    for sub in (run, report):
        sub.add_argument(
            "--scale", default="", help="of runs.toml or of train_gpt.py; else full size"
        )
        sub.add_argument(
            "--out", type=Path, default=ROOT / "logs" / "lab", help="folder of the runs"
        )
    for sub in (listing, run, report):
        sub.add_argument("--table", type=Path, default=ROOT / "records" / "runs.toml")
    return top


def main() -> int:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that a run is ended with its launcher
    options = parser().parse_args()
    try:
        table = read_table(options.table)
        if options.command == "list":
            show_table(table, options.names)
            return 0
        if options.command == "report":
            return show_report(table, options)
        return run_matrix(table, options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
