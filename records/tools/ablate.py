r"""The run matrix: the rows of runs.toml, each with several seeds.

    python records/tools/ablate.py list         # rows, series and hypotheses
    python records/tools/ablate.py run series1 wins --seeds 3 --nproc 8
    python records/tools/ablate.py run all --seeds 3 --nproc 8 \
        --cluster slurm --job slurm_partition=gpu
    python records/tools/ablate.py report       # tables and pictures

A run is train_gpt.py with the variables of its row, of the scale and of
--set. Other options of the script that happen to stand in the environment do
not reach it. Every run has a folder, <out>/<scale>/<row>/seed<n>/, where
run.json says how it was started.

`run` can be stopped at any time, and the same command goes on: finished runs
are left alone, and one that was cut off or failed goes on from its last
checkpoint. One without a checkpoint, or whose files are damaged, is set aside
and made again. It stops by itself at a run that ends with exit code 2 (bad
input), as the others would end in the same way. Nothing ends if its own
output goes to a closed pipe or a full disk. Jobs of --cluster slurm go on
without the command, and the same command waits for those that have not ended.

A job of Slurm gets --nproc GPUs of one node and an hour more than
MAX_WALLCLOCK_SECONDS, or a day where that is 0. --job changes that
(timeout_min=30 gpus_per_node=4), and many a cluster wants more to be said, such
as cpus_per_task=32: Slurm as a rule gives a job one core.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import told_if_missing

with told_if_missing(__name__):
    import train_gpt as tg
    from records.tools import common
    from records.tools.common import OPTIONS, ROOT

if TYPE_CHECKING:  # it needs records/tools/requirements.txt, and `run` does not
    from records.tools import report

SCRIPT = ROOT / "train_gpt.py"
TABLE = ROOT / "records" / "runs.toml"
FIELDS = {f.name: f.default for f in fields(tg.Config)}
SET_ELSEWHERE = {"SEED", "LOG_DIR", "RUN_ID", "EVAL_ONLY"}  # by the matrix itself
WATCH_SECONDS = 60.0  # between lines about a run in progress, where there is no terminal
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that surely hold a row
REFUSAL = re.compile(rf"(?m)^\s*exitcode\s*: {tg.EXIT_INPUT} \(")  # as torchrun writes it
REFUSED_CHECKPOINT = re.compile(r"(?m)^\[rank \d+\] (.*step_\d+\.ckpt.*)")
CHECKPOINT = re.compile(r"step_(\d+)\.ckpt")
RANKS = re.compile(r"world_size:(\d+)")
REASON = 120  # characters of a reason in the summary; it was told in full before
BESIDE_TRAINING = {  # a line of a run's output: what the run does from then on
    r"(?m)^warming up:": "warming up",
    r"(?m)^step:\d+/\d+ (passes|train_loss):": "",
    r"(?m)^(step:(\d+)/\2 train_loss|stopping_early):": "validating",
    r"(?m)^peak memory": "packing the model",
    r"(?m)^Code size:": "scoring the packed model",
}

# ---- 1. The table --------------------------------------------------------------------------------


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
    clock: str = ""  # row whose time on an H100 every row has; "": all make ITERATIONS steps
    artifact: int = 0  # bytes, where a row chooses its own; 0: SIZE_LIMIT_BYTES less the script


class Claim(NamedTuple):
    """What a source concludes from several pairs of rows, [row, baseline] each."""

    name: str
    what: str
    pairs: list[list[str]]


class Table(NamedTuple):
    rows: dict[str, Row]
    scales: dict[str, Scale]
    claims: dict[str, Claim]
    milliseconds: dict[str, list[float]]  # of a row's step at full size, in each of its modes

    def pick(self, names: Iterable[str]) -> list[Row]:
        """The rows that are named, by themselves, by their series or as `all`.

        InputError for other names.
        """
        series = {row.series for row in self.rows.values()}
        picked: dict[str, Row] = {}
        for name in names:
            if name not in self.rows and name not in series and name != "all":
                hint = did_you_mean(name, [*self.rows, *sorted(series), "all"])
                raise tg.InputError(
                    f"{name} is neither a run nor a series{hint}; `ablate.py list` shows them"
                )
            picked |= {r.name: r for r in self.rows.values() if name in (r.name, r.series, "all")}
        return list(picked.values())


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The known names that look like `name`, as a hint behind a message; "" if none does.

    Half of the letters is enough: rows have names of two, such as Bp.
    """
    alike = [other for other in known if other.lower() == name.lower()]
    alike += difflib.get_close_matches(name, known, 3, 0.5)
    return f" (did you mean {', '.join(dict.fromkeys(alike))}?)" if alike else ""


def texts(values: dict[str, Any]) -> dict[str, str]:
    """Variables as an environment holds them."""
    return {name: tg.show(value) for name, value in values.items()}


def read_section(path: Path, data: dict[str, Any], section: str, kind: Any) -> dict[str, Any]:
    """The entries of a section by name, each a `kind`; InputError for one that has other keys."""
    keys = {*kind._fields} - {"name"}
    needed = keys - kind._field_defaults.keys()
    made = {}
    for name, entry in data.get(section, {}).items():
        if not needed <= entry.keys() <= keys:
            told = f"{path}: {section}.{name} has {', '.join(entry)}"
            known = ", ".join(key for key in kind._fields if key in needed)
            raise tg.InputError(f"{told}; it needs {known}")
        if "set" in entry:
            entry = entry | {"set": texts(entry["set"])}
        made[name] = kind(name, **entry)
    return made


def scales_in_full(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """`data` whose scales have what they only say they have `like` a scale before them."""
    made: dict[str, Any] = {}
    for name, entry in data.get("scale", {}).items():
        own = {key: value for key, value in entry.items() if key != "like"}
        if "like" not in entry:
            made[name] = own
            continue
        if entry["like"] not in made:
            raise tg.InputError(f"{path}: scale.{name} is like {entry['like']}, no scale before it")
        like = made[entry["like"]]
        made[name] = like | own | {"set": like["set"] | own.get("set", {})}
    return data | {"scale": made}


def read_table(path: Path) -> Table:
    """The table in a TOML file; InputError says which entry is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise tg.InputError(f"{path}: {error}") from None
    data = scales_in_full(path, data)
    table = Table(
        read_section(path, data, "run", Row),
        read_section(path, data, "scale", Scale),
        read_section(path, data, "claim", Claim),
        data.get("milliseconds", {}),
    )
    named = {f"run {row.name}": row.baselines for row in table.rows.values()}
    named["milliseconds"] = list(table.milliseconds)
    for scale in table.scales.values():
        named[f"scale {scale.name}"] = [scale.clock] if scale.clock else []
    for claim in table.claims.values():
        named[f"claim {claim.name}"] = [name for pair in claim.pairs for name in pair]
    for entry, names in named.items():
        if missing := [name for name in names if name not in table.rows]:
            raise tg.InputError(f"{path}: {entry} names {', '.join(missing)}, which is not a run")
    return table


# ---- 2. What a run is ----------------------------------------------------------------------------


def asked_of(row: Row, table: Table, scale_name: str, given: dict[str, str]) -> dict[str, str]:
    """All variables of a row at a scale, in equal time if the scale has a clock."""
    scale = table.scales.get(scale_name)
    if scale is not None and not suits(row, scale, table):
        raise tg.InputError(
            f"scale {scale.name} sets MODEL_DIM for rows as wide as {scale.clock}, not {row.name}"
        )
    values = variables(row, scale, scale_name, given)
    if scale is not None and scale.clock:
        values = in_equal_time(row, values, table, scale.clock)
    return values


def suits(row: Row, scale: Scale, table: Table) -> bool:
    """Whether a row is as wide as the clock's, where the scale sets the width of both."""
    if "MODEL_DIM" not in scale.set:
        return True
    widths = {tg.Config.from_env(x.set).model_dim for x in (row, table.rows[scale.clock])}
    return len(widths) == 1


def variables(
    row: Row, scale: Scale | None, scale_name: str, given: dict[str, str]
) -> dict[str, str]:
    """The variables of a row at a scale of the table (`scale`), of train_gpt.py or its own."""
    if scale is None:
        preset = [p for p in (row.set.get("PRESET", ""), scale_name) if p]
        return row.set | ({"PRESET": ",".join(preset)} if preset else {}) | given
    full = tg.Config.from_env({name: row.set[name] for name in row.set.keys() & OPTIONS})
    divided = {}
    for name, divisor in scale.divide.items():
        value, rest = divmod(getattr(full, name.lower()), divisor)
        if rest:
            raise tg.InputError(
                f"scale {scale.name}: {name} of {row.name} is not a multiple of {divisor}"
            )
        if value:  # 0 is for a part that the row does not have
            divided[name] = str(value)
    last_words = row.set | acting(divided, full) | given
    config = replace(full, **tg.explicit_options(scale.set | last_words))
    return acting(scale.set, config) | equal_bytes(scale, config) | last_words


def equal_bytes(scale: Scale, config: tg.Config) -> dict[str, str]:
    """The limit with which a row that rounds as its size allows makes the scale's artifact.

    Rows of fixed bits have the size that they have, and need no limit.
    """
    chosen_late = config.fits_by_clip or not config.matrix_bits
    if not scale.artifact or not chosen_late:
        return {}
    return {"SIZE_LIMIT_BYTES": str(SCRIPT.stat().st_size + scale.artifact)}


def acting(values: dict[str, str], config: tg.Config) -> dict[str, str]:
    """Those variables that can act: WARMDOWN_ITERS cannot beside a row's WARMDOWN_FRACTION."""
    needs = {f.name.upper(): f.metadata["needs"].split() for f in fields(tg.Config)}
    return {
        name: value
        for name, value in values.items()
        if not any(map(config.unmet_need, needs.get(name, [])))
    }


class Stretch(NamedTuple):
    """A part of a run in one mode of training."""

    begins: float  # as a fraction of the time
    ends: float
    ms: float  # of a step


def stretches(row: Row, config: tg.Config, table: Table) -> list[Stretch]:
    """The parts of a run, by its options that are fractions of it; InputError without a table."""
    modes, costs = tg.training_modes(config), table.milliseconds.get(row.name, [])
    if len(costs) != len(modes):
        raise tg.InputError(
            f"{row.name} has {len(modes)} modes of training and {len(costs)} entries in "
            "[milliseconds]: its steps in equal time are not known"
        )
    schedule = dict(config.schedule())
    if max(schedule) >= 1:
        raise tg.InputError(
            f"PASSES_SCHEDULE of {row.name} counts steps; a scale with a clock needs fractions"
        )
    if config.qat_lr_factor:
        raise tg.InputError(
            f"QAT_LR_FACTOR of {row.name}: a scale with a clock needs QAT_FRACTION instead"
        )
    cost_of = {
        (mode.passes, mode.truncated, mode.core.bits > 0): ms for mode, ms in zip(modes, costs)
    }
    rounding = 1 - config.qat_fraction  # when it begins
    begins = sorted({*schedule, config.truncate_fraction, rounding} - {1.0})
    parts = []
    for begin, end in zip(begins, [*begins[1:], 1.0]):
        passes = next(schedule[when] for when in sorted(schedule, reverse=True) if when <= begin)
        rounded = begin >= rounding
        truncated = passes > 1 and begin < config.truncate_fraction and not rounded
        parts.append(Stretch(begin, end, cost_of[passes, truncated, rounded]))
    return parts


FRACTIONS = ("truncate_fraction", "muon_momentum_warmup_fraction")  # of a run, from its beginning


def in_equal_time(row: Row, values: dict[str, str], table: Table, clock_row: str) -> dict[str, str]:
    """`values` with as many steps as take the time that those of `values` take the clock's row.

    Time is that of an H100 at full size (the table's milliseconds), so that what a step costs on
    the processor at hand decides nothing. The warm-down, the parts of PASSES_SCHEDULE, FRACTIONS
    and QAT_FRACTION keep their shares of the time; REFIT_STEPS are taken off its end.
    """
    config = tg.Config.from_env(values)
    parts = stretches(row, config, table)
    if clock_row not in table.milliseconds:
        raise tg.InputError(f"{clock_row}, the clock's row, has no entry in [milliseconds]")
    time = config.iterations * table.milliseconds[clock_row][0]
    time -= config.refit_steps * parts[-1].ms

    def steps_by(share: float) -> float:
        """The steps in this share of the time."""
        return sum(max(min(x.ends, share) - x.begins, 0.0) * time / x.ms for x in parts)

    steps = round(steps_by(1.0))
    made = dict(ITERATIONS=str(steps))
    if config.warmdown_fraction:
        cooling = steps_by(1 - config.warmdown_fraction)
        made["WARMDOWN_FRACTION"] = f"{1 - cooling / steps:.6f}"
    else:
        cooling = steps_by(1 - config.warmdown_iters / config.iterations)
        made["WARMDOWN_ITERS"] = str(steps - round(cooling))
    if config.passes_schedule:
        entries = (f"{round(steps_by(when))}:{passes}" for when, passes in config.schedule())
        made["PASSES_SCHEDULE"] = ",".join(entries)
    for name in FRACTIONS:
        if share := getattr(config, name):
            made[name.upper()] = f"{steps_by(share) / steps:.6f}"
    if config.qat_fraction:
        made["QAT_FRACTION"] = f"{1 - steps_by(1 - config.qat_fraction) / steps:.6f}"
    return values | made


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
        """InputError if the script would not take the variables."""
        unknown = ", ".join(sorted(self.variables.keys() - OPTIONS))
        if unknown:
            raise tg.InputError(f"{unknown}: not an option of this train_gpt.py")
        return tg.Config.from_env(self.environment())

    def environment(self) -> dict[str, str]:
        parent = self.folder.parent
        log_dir = parent.relative_to(ROOT) if parent.is_relative_to(ROOT) else parent
        return self.variables | dict(
            SEED=str(self.seed), LOG_DIR=str(log_dir), RUN_ID=self.folder.name
        )

    def command(self) -> list[str]:
        return [*common.launcher(self.ranks), "train_gpt.py"]

    def beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def __str__(self) -> str:
        return f"{self.row} seed {self.seed}"


def damage(folder: Path) -> str:
    """Why the files of a run that has a result.json cannot be used; "" if they can."""
    told: list[str] = []
    try:
        result = common.read_result(folder / "result.json")
        if not isinstance(result.get("config"), dict):
            return f"{folder / 'result.json'} is damaged: it gives no configuration"
        for _ in common.read_metrics(folder / "metrics.jsonl", told.append):
            pass
    except FileNotFoundError as error:
        return f"{error.filename} is gone"
    except tg.InputError as error:
        return str(error)
    return told[0] if told else ""


UNCOMPARED = {"log_dir", "run_id", "preset", "resume"}


def differences(recorded: dict[str, Any], asked: dict[str, Any]) -> str:
    """What a run that is there has otherwise than the one asked for, by its configuration."""
    return "; ".join(
        f"{name.upper()} {tg.show(recorded[name])} there, {tg.show(asked[name])} asked for"
        for name in asked
        if recorded[name] != asked[name] and name not in UNCOMPARED
    )


def finished(run: Run) -> bool:
    """Whether its folder holds its whole result; InputError if it is of other variables."""
    if not (run.folder / "result.json").exists() or damage(run.folder):
        return False
    result = common.read_result(run.folder / "result.json")
    recorded, asked = FIELDS | result["config"], asdict(run.config())
    script = SCRIPT.stat().st_size
    longer = script - result.get("bytes_code", script)  # than the script of that run
    if asked["size_limit_bytes"] == recorded["size_limit_bytes"] + longer:
        asked["size_limit_bytes"] = recorded["size_limit_bytes"]  # as `equal_bytes` has it
    if apart := differences(recorded, asked):
        out = run.folder.parents[2]  # alike for all runs, so that this is told once
        raise tg.InputError(
            f"its folder in {out} holds another run ({apart}): choose another --out"
        )
    return True


def saved_step(folder: Path) -> int | None:
    """The step of the last checkpoint in a run's folder; None without one."""
    names = (CHECKPOINT.fullmatch(path.name) for path in folder.glob("step_*"))
    return max((int(name[1]) for name in names if name), default=None)


def begun_otherwise(run: Run) -> str:
    """How an unfinished run was begun otherwise than it would go on, by its train.log; else "".

    The script itself would go on with another version or number of ranks, but then run.json and
    the head of train.log would tell of one part only.
    """
    try:
        log = common.read_log(run.folder / "train.log")
    except FileNotFoundError:
        return "its train.log is gone"
    if not log.config or "script_sha256" not in log.versions:
        return "its train.log does not say how it was begun"
    ran = log.versions.get("packed_sha256", log.versions["script_sha256"])
    if ran != common.sha256(SCRIPT):
        return "it was begun by another version of train_gpt.py"
    sizes = (RANKS.match(line) for line in log.lines)
    ranks = next((int(size[1]) for size in sizes if size), run.ranks)
    if ranks != run.ranks:
        return f"it was begun on {ranks} ranks, not {run.ranks}"
    apart = differences(FIELDS | log.config, asdict(run.config()))
    return f"it was begun with other values ({apart})" if apart else ""


def why_again(run: Run) -> str:
    """Why a run that left a folder is made again from its beginning; "" if it can go on."""
    if (run.folder / "result.json").exists():
        return damage(run.folder)
    if saved_step(run.folder) is None:
        return "it left no checkpoint"
    return begun_otherwise(run)


# ---- 3. One run ----------------------------------------------------------------------------------


class Failed(RuntimeError):
    """A run that did not end with a result: its cause, and the file with all that it printed."""

    def __init__(self, why: str, console: Path | None = None) -> None:
        super().__init__(why)
        self.console = console


class Refused(Failed):
    """A run whose input the script refused: data, tokenizer or device, as a rule for all runs."""


class Busy(Failed):
    """Another process is making this run."""


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds a lock file. What is launched inherits it: a run may outlive its launcher."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("another process is making this run") from None
        yield file.fileno()


def refuse_live(folder: Path) -> None:
    """Busy if a run that was started by hand is alive in the folder: it holds run.lock."""
    lock = folder / "run.lock"
    if lock.exists():
        with locked(lock):
            pass


def set_aside(folder: Path) -> Path:
    """Renames what a run left that did not end, to the first free name, which it returns."""
    names = (folder.with_name(f"{folder.name}.unfinished{i}") for i in range(1, 10_000))
    return folder.rename(next(name for name in names if not name.exists()))


def commit() -> str | None:
    """The commit of the script, "+" behind it if it was edited since; None outside of git."""

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
    lines = [line.strip() for line in console.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line]
    ours = [line for line in told if line.startswith("[rank ")]
    if ours:
        reason = ours[0]
    elif told:
        reason = told[-1]
    else:  # nor can a full disk take what the run says
        full = shutil.disk_usage(console.parent).free < 1 << 20
        reason = "no output, as the disk is full" if full else "no output"
    return f"exit code {code}: {reason}"


def is_refusal(console: Path, code: int) -> bool:
    """Whether the script ended with the exit code for bad input.

    torchrun itself ends with 1, and tells the exit code of its ranks.
    """
    told = REFUSAL.search(console.read_text(errors="replace"))
    return code == tg.EXIT_INPUT or told is not None


def refused_checkpoint(console: Path, code: int) -> str:
    """Why the script did not take the checkpoint of a run that was to go on; "" if it did."""
    told = REFUSED_CHECKPOINT.search(console.read_text(errors="replace"))
    return told[1] if told and is_refusal(console, code) else ""


class Part(NamedTuple):
    """What a launch of a run came to."""

    begun: int | None  # the checkpoint's step, if the run went on from one
    code: int
    seconds: float


def launch(run: Run, lock: int, board: Board, begun: int | None = None) -> Part:
    """Starts a run, from its checkpoint of step `begun` if there is one, and waits for its end."""
    resume = {} if begun is None else {"RESUME": "auto"}
    started = time.time()
    with open(run.beside(".console"), "wb") as out:
        process = subprocess.Popen(
            run.command(),
            cwd=ROOT,
            env=common.without_options(os.environ) | run.environment() | resume,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            pass_fds=[lock],
        )
    try:
        while process.poll() is None:
            board.tick(run, time.time() - started)
            time.sleep(0.2)
    except (KeyboardInterrupt, SystemExit):  # a step may take seconds, and so does a checkpoint
        board.say("stopping after this step; runs that are finished are kept")
        raise
    finally:
        process.terminate()
        process.wait()
    return Part(begun, process.returncode, time.time() - started)


def go_on_or_begin(run: Run, lock: int, board: Board) -> Part:
    """Goes on from the checkpoint of a run that was cut off; begins it if there is none to use."""
    if run.folder.exists():
        why = why_again(run)
        if not why:
            step = saved_step(run.folder)
            board.say(f"{run}: goes on from step {step}")
            part = launch(run, lock, board, step)
            why = refused_checkpoint(run.beside(".console"), part.code)
            if not why:
                return part
        board.say(f"{run}: {why}; set aside as {set_aside(run.folder).name}, and begun again")
    return launch(run, lock, board)


def execute(run: Run, board: Board) -> bool:
    """Makes a run unless it is there; whether it was made now. Failed says why it is not."""
    with locked(run.beside(".lock")) as lock:
        if finished(run):
            return False
        refuse_live(run.folder)
        script, console = commit(), run.beside(".console")
        part = go_on_or_begin(run, lock, board)
        if not finished(run):
            kind = Refused if is_refusal(console, part.code) else Failed
            raise kind(cause(console, part.code), console)
        record = dict(
            row=run.row,
            seed=run.seed,
            scale=run.scale,
            variables=run.variables,
            ranks=run.ranks,
            command=["python", *run.command()[1:]],
            git_commit=script,
            exit_code=part.code,
            wall_seconds=round(part.seconds, 1),
        )
        if part.begun is not None:
            record["resumed_from_step"] = part.begun  # wall_seconds are those after it
        common.write_json(run.folder / "run.json", record)
        console.unlink()
        return True


class Progress(NamedTuple):
    """Where a run is, by the last whole line of its metrics.jsonl."""

    step: int
    iterations: int
    share: float  # of its steps, or of its time, whichever ends first
    left: float  # seconds of training, by the time of its last steps

    def __str__(self) -> str:
        return f"step {self.step} of {self.iterations} ({self.share:.0%})"


def tail(path: Path) -> bytes:
    """The end of a file that may be growing; nothing if it is not there yet."""
    try:
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            return file.read()
    except FileNotFoundError:
        return b""


def beside_training(run: Run) -> str:
    """What a run does before its first step or after its last, by what it printed; else empty."""
    text, doing = tail(run.beside(".console")).decode(errors="replace"), ""
    for line, what in BESIDE_TRAINING.items():
        if re.search(line, text):
            doing = what
    return doing


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole rows of a metrics.jsonl that may be growing, the newest first."""
    rows = (common.parse_row(line) for line in reversed(tail(path).split(b"\n")))
    return [row for row in rows if row is not None]


def progress(run: Run) -> Progress | None:
    """None before the first step. What is left falls between two rows, as time goes by."""
    path, config = run.folder / "metrics.jsonl", run.config()
    rows = last_rows(path)
    if not rows or not rows[0]["step"]:
        return None
    step, seconds = rows[0]["step"], rows[0]["train_seconds"]
    times = (row.get("step_ms") for row in rows)  # which rows of validation do not have
    ms = next((time for time in times if isinstance(time, (int, float))), 1e3 * seconds / step)
    share, left = step / max(config.iterations, 1), (config.iterations - step) * ms / 1e3
    if config.training_seconds:
        share = max(share, seconds / config.training_seconds)
        left = min(left, config.training_seconds - seconds)
    left -= max(time.time() - path.stat().st_mtime, 0.0)  # since the newest row was written
    return Progress(step, config.iterations, min(share, 1.0), max(left, 0.0))


# ---- 4. The matrix -------------------------------------------------------------------------------


class Board:
    """What has been done and how long the rest will take.

    On a terminal a line that changes, elsewhere plain lines.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs, self.left = runs, list(runs)
        self.failures: dict[Run, str] = {}
        self.made = self.found = 0
        self.watched = sys.stderr.isatty()
        self.looked = 0.0  # seconds of the run in progress when it was last looked at

    def seconds_left(self) -> float | None:
        """From the runs that are finished: of the same row where there are some, else of all."""
        known: dict[str, list[float]] = {}
        for run in self.runs:
            seconds = wall_seconds(run.folder / "run.json")
            if seconds is not None:
                known.setdefault(run.row, []).append(seconds)
        every = [seconds for row in known.values() for seconds in row]
        if not every:
            return None
        total = 0.0
        for run in self.left:
            of_row = known.get(run.row, every)
            total += sum(of_row) / len(of_row)
        return total

    def say(self, text: str, passing: bool = False) -> None:
        """A line that stays, or one that the next replaces (on a terminal only).

        If nobody can read it any more, the runs go on.
        """
        if self.watched:
            common.say(f"\r\033[K{text}", end="" if passing else "\n", stream=sys.stderr)
        elif not passing:
            common.say(text)

    def place(self) -> str:
        return f"[{len(self.runs) - len(self.left) + 1}/{len(self.runs)}]"

    def tick(self, run: Run, seconds: float) -> None:
        """Says where a run is: every second on a terminal, else every minute."""
        if seconds < self.looked:
            self.looked = 0.0
        if seconds - self.looked < (1.0 if self.watched else WATCH_SECONDS):
            return
        self.looked = seconds
        told = [f"{self.place()} {run}: {common.duration(seconds)}"]
        left, now = self.seconds_left(), progress(run)
        doing = beside_training(run)
        if now is not None:
            told.append(str(now))
        rest = 0.0
        if doing:
            told.append(doing)
        elif now is not None and now.share < 1:
            rest = now.left
            told.append(f"{common.duration(rest)} left of it")
        if left is not None and left > seconds:
            told.append(f"{common.duration(max(left - seconds, rest))} left of all")
        self.say(", ".join(told), passing=self.watched)

    def done(self, run: Run, made: bool) -> None:
        """A run with a result; what was there before is counted, not told."""
        place = self.place()
        self.left.remove(run)
        self.looked = 0.0
        if not made:
            self.found += 1
            return
        self.made += 1
        result, left = common.read_result(run.folder / "result.json"), self.seconds_left()
        large = "" if result["fits"] else "; TOO LARGE for a submission"
        score = f"val_bpb {result['roundtrip']['val_bpb']:.4f}{large}"
        rest = f", {common.duration(left)} left of all" if left else ""
        self.say(f"{place} {run}: {score}{rest}")

    def failed(self, run: Run, why: str, console: Path | None = None) -> None:
        """A run without a result; a cause that was told of another run is not told again."""
        same = next((other for other, told in self.failures.items() if told == why), None)
        where = f" ({console})" if console else ""
        told = f", {why}" if same is None else f" as {same} did"
        self.say(f"{self.place()} {run}: FAILED{told}{where}")
        self.left.remove(run)
        self.failures[run] = why

    def impossible(self, errors: dict[Run, str]) -> None:
        """Runs that cannot begin, each error once with all runs that have it."""
        for why, runs in by_reason(errors).items():
            self.say(f"{named(runs)}: FAILED, {why}")
        for run, why in errors.items():
            self.left.remove(run)
            self.failures[run] = why

    def stop(self) -> None:
        """Says which runs are not begun, after one whose input was refused."""
        for run in list(self.left):
            if finished(run):
                self.done(run, False)
        if self.left:
            self.say(
                "stopped: what one run refuses as bad input, the others as a rule would, too. Not "
                f"begun: {named(self.left)}. Once it is mended, the same command goes on"
            )

    def summary(self) -> int:
        """Prints what came of it; the exit code."""
        self.say(
            f"{len(self.runs)} runs: {self.made} made, {self.found} there already, "
            f"{len(self.failures)} failed, {len(self.left)} not started"
        )
        reasons = by_reason(self.failures)
        if self.made or len(reasons) > 1:  # else the only one stands right above
            for why, runs in reasons.items():
                short = why if len(why) <= REASON else f"{why[: REASON - 4]} ..."
                self.say(f"  {named(runs)}: {short}")
        return 1 if self.failures or self.left else 0


def wall_seconds(path: Path) -> float | None:
    """How long a run took, by its run.json; None if that is not there, damaged or of a part."""
    try:
        record = common.read_result(path)
    except (OSError, tg.InputError):
        return None
    seconds = None if "resumed_from_step" in record else record.get("wall_seconds")
    return seconds if isinstance(seconds, (int, float)) else None


def by_reason(errors: dict[Run, str]) -> dict[str, list[Run]]:
    """The runs that have the same error."""
    found: dict[str, list[Run]] = {}
    for run, why in errors.items():
        found.setdefault(why, []).append(run)
    return found


def named(runs: Iterable[Run]) -> str:
    """Runs by row, as in `Ap seeds 1337, 1338; Bp seed 1337`."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run.row, []).append(str(run.seed))
    told = []
    for row, of_row in seeds.items():
        plural = "s" if len(of_row) > 1 else ""
        told.append(f"{row} seed{plural} {', '.join(of_row)}")
    return "; ".join(told)


def run_here(board: Board) -> None:
    """One run after the other. A failure does not stop the rest, unless it is bad input."""
    for run in list(board.left):
        try:
            board.done(run, execute(run, board))
        except Failed as error:
            board.failed(run, str(error), error.console)
            if isinstance(error, Refused):
                board.stop()
                return
        except (tg.InputError, OSError) as error:
            board.failed(run, str(error))


def job_words(run: Run, options: argparse.Namespace) -> list[str]:
    """This command for one row and seed."""
    words = [sys.executable, str(Path(__file__).resolve()), "run", run.row]
    words += ["--first-seed", str(run.seed), "--nproc", str(options.nproc)]
    words += ["--out", str(options.out.resolve()), "--table", str(options.table.resolve())]
    words += ["--scale", options.scale]
    if options.set:
        words += ["--set", *options.set]
    return words


Jobs = dict[Run, Any]  # submitit's; None: a process makes the run whose job is not known


def in_progress(run: Run) -> bool:
    """Whether another process is making a run."""
    if not run.beside(".lock").exists():
        return False
    try:
        with locked(run.beside(".lock")):
            return False
    except Busy:
        return True


def earlier_job(run: Run, cluster: str, folder: Path) -> Any:
    """The job that another call handed in for a run, if it is queued or at work; else None.

    Of a local job only the call that started it knows more than `in_progress` does.
    """
    import submitit

    note = run.beside(".job")
    told = common.read_result(note) if note.exists() else {}
    if cluster != "slurm" or told.get("cluster") != cluster:
        return None
    job: Any = submitit.SlurmJob(folder, told["job_id"])
    return None if job.done() else job


def begun_before(board: Board, options: argparse.Namespace) -> Jobs:
    """Tells what runs are there or being made; the jobs of the latter."""
    jobs: Jobs = {}
    for run in list(board.left):
        if finished(run):
            run.beside(".job").unlink(missing_ok=True)  # it ended when nobody waited for it
            board.done(run, False)
        elif job := earlier_job(run, options.cluster, options.out.resolve() / "jobs"):
            jobs[run] = job
            gone = f"if it is gone, remove {run.beside('.job')}"
            board.say(f"{run}: waits for job {job.job_id} of another call ({gone})")
        elif in_progress(run):
            jobs[run] = None
            board.say(f"{run}: waits for the process that is making it")
        elif (run.folder / "result.json").exists():
            board.say(f"{run}: {damage(run.folder)}; its job sets it aside and begins it again")
    return jobs


# Of a job on a cluster, beside training: start, compiling, packing (minutes of one core for
# `frontier`), scoring (600 s at most). Nothing is paid for a limit that is too long.
BESIDE_MINUTES = 60
UNCAPPED_MINUTES = 24 * 60  # where the clock ends no run; many clusters allow no more


def usual_parameters(
    options: argparse.Namespace, runs: Sequence[Run], asked: Iterable[str]
) -> dict[str, int]:
    """Left to itself submitit ends a job after two minutes, or five, and gives it no GPU.

    `asked`: parameters that the user has given.
    """
    if options.cluster == "local":
        import torch

        return dict(
            timeout_min=7 * 24 * 60, gpus_per_node=min(options.nproc, torch.cuda.device_count())
        )
    configs = [run.config() for run in runs]
    caps = [config.max_wallclock_seconds for config in configs]
    minutes = math.ceil(max(caps, default=0) / 60) + BESIDE_MINUTES
    usual = dict(timeout_min=minutes if all(caps) else UNCAPPED_MINUTES)
    # GPUs that are asked for in another way (slurm_gres=gpu:8) would be asked for twice.
    named = any("gpu" in name or "gres" in name for name in asked)
    if not named and any(config.device != "cpu" for config in configs):
        usual["gpus_per_node"] = options.nproc
    return usual


def executor_of(options: argparse.Namespace, runs: Sequence[Run]) -> Any:
    """What hands jobs in; InputError for parameters that submitit does not take."""
    import submitit

    given = common.pairs(options.job)
    asked = {name: int(v) if v.isdigit() else v for name, v in given.items()}
    try:
        made = submitit.AutoExecutor(options.out.resolve() / "jobs", cluster=options.cluster)
        made.update_parameters(**usual_parameters(options, runs, asked) | asked)
    except (AssertionError, NameError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        words = ["--cluster", options.cluster, *(["--job"] if options.job else []), *options.job]
        raise tg.InputError(f"{' '.join(words)}: {said}") from None
    return made


def refuse_shared_clock(jobs: Sequence[Run], options: argparse.Namespace) -> None:
    """InputError where local jobs would slow each other, and the clock ends them."""
    capped = [run for run in jobs if run.config().max_wallclock_seconds]
    if options.cluster == "local" and len(jobs) > 1 and capped:
        cap = f"{capped[0].config().max_wallclock_seconds:g}"
        gpus = "GPU" if options.nproc == 1 else f"{options.nproc} GPUs"
        raise tg.InputError(
            f"--cluster local --nproc {options.nproc} starts {len(jobs)} runs at once, all on the "
            f"same processors and on the first {gpus}: with MAX_WALLCLOCK_SECONDS={cap} each would "
            "end after fewer steps than alone. Leave --cluster out to make one after the other, or "
            "give --set MAX_WALLCLOCK_SECONDS=0"
        )


def run_by_jobs(board: Board, options: argparse.Namespace) -> None:
    """Hands every run that is not there to submitit, each as a job of its own; waits."""
    with told_if_missing("__main__"):  # runs on this machine do without it
        from submitit.helpers import CommandFunction

    folder = options.out.resolve() / "jobs"
    executor = executor_of(options, board.left)
    jobs = begun_before(board, options)
    refuse_shared_clock(board.left, options)
    new = [run for run in board.left if run not in jobs]
    if new:  # submitit warns of an empty batch
        with executor.batch():
            for run in new:
                jobs[run] = executor.submit(CommandFunction(job_words(run, options)))
    for run in new:
        note = dict(cluster=options.cluster, job_id=jobs[run].job_id)
        common.write_json(run.beside(".job"), note)
    board.say(f"{len(new)} jobs, logs in {folder}")
    wait_for_jobs(board, jobs)


def wait_for_jobs(board: Board, jobs: Jobs) -> None:
    """Until every run has ended, by its job or by a process that its job has met."""
    while board.left:
        for run in list(board.left):
            job = jobs[run]
            waits = job is not None and not job.done()
            if waits or in_progress(run):
                continue
            run.beside(".job").unlink(missing_ok=True)
            if finished(run):
                board.done(run, True)
            elif job is None:
                board.failed(run, "the process that was making it ended without a result")
            else:
                board.failed(run, "its job ended without a result", job.paths.stderr)
        time.sleep(0.2)


# ---- 5. The command ------------------------------------------------------------------------------


def plan(table: Table, options: argparse.Namespace) -> list[Run]:
    """The runs that are asked for, seed by seed; InputError if nothing like it exists."""
    common.require_at_least(options, seeds=1, nproc=1)
    given, scale = common.pairs(options.set), table.scales.get(options.scale)
    if unknown := given.keys() - OPTIONS:
        names, hint = ", ".join(sorted(unknown)), did_you_mean(min(unknown), sorted(OPTIONS))
        raise tg.InputError(f"--set {names}: not an option of train_gpt.py{hint}")
    taken = given.keys() & SET_ELSEWHERE
    if given.get("RESUME") == "auto":  # a checkpoint's path is another matter
        taken |= {"RESUME"}
    if taken:
        raise tg.InputError(f"--set {', '.join(sorted(taken))}: the matrix sets that itself")
    if options.scale and scale is None and options.scale not in tg.SCALES:
        known = ", ".join([*tg.SCALES, *table.scales])
        raise tg.InputError(f"--scale {options.scale}: there are {known}")
    name, runs = options.scale or "full", []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for row in table.pick(options.names):
            values = asked_of(row, table, options.scale, given)
            folder = options.out.resolve() / name / row.name / f"seed{seed}"
            runs.append(Run(row.name, seed, name, values, folder, options.nproc))
    return runs


def show_table(table: Table, names: list[str]) -> None:
    for row in table.pick(names or ["all"]):
        against = f" (against {', '.join(row.baselines)})" if row.baselines else ""
        unknown = ", ".join(sorted(row.set.keys() - OPTIONS))
        common.say(f"{row.series}  {row.name:20} {row.what}{against}\n{'':9}{row.hypothesis}")
        if unknown:
            common.say(f"{'':9}not runnable: {unknown} is not an option of this train_gpt.py")
    for scale in table.scales.values():
        common.say(f"scale {scale.name}: {scale.what}")


def run_matrix(table: Table, options: argparse.Namespace) -> int:
    """Every run is checked before the first is launched; one that cannot run is a failure."""
    runs = plan(table, options)
    board, errors = Board(runs), {}
    for run in runs:
        try:
            finished(run)
            run.config()
        except tg.InputError as error:
            errors[run] = str(error)
    board.impossible(errors)
    try:
        if options.cluster:
            run_by_jobs(board, options)
        else:
            run_here(board)
    except KeyboardInterrupt:
        rest = "; jobs that were handed in go on (scancel ends one), and it waits for them"
        slurm = options.cluster == "slurm"
        board.say(f"interrupted; the same command goes on{rest if slurm else ''}")
    return board.summary()


def intended(table: Table, name: str) -> report.Intended:
    """What a scale asks of every row, in words and as configurations."""
    from records.tools import report

    scale, options = table.scales.get(name), set[str]()
    what = "every row at the size and length of its source"
    if scale is not None:
        what = scale.what
    elif name in tg.SCALES:
        what, options = tg.SCALES[name].what, set(tg.SCALES[name].values)
    rows = {}
    for row in table.rows.values():
        try:
            asked = asked_of(row, table, name, {})
            config = tg.Config.from_env(asked)
        except tg.InputError:  # of another version of the script, or its time is not known
            continue
        rows[row.name] = report.Asked(config, options | {option.lower() for option in asked})
    return report.Intended(f"Scale {name}" if name else "Full size", what, rows)


def show_report(table: Table, options: argparse.Namespace) -> int:
    with told_if_missing("__main__"):  # `run` does without its packages
        from records.tools import report

    folder = options.out.resolve() / (options.scale or "full")
    asked = intended(table, options.scale)
    for path in report.write(folder, table, asked, options.to or folder):
        common.say(str(path))
    return 0


def add_run_options(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("names", nargs="+", help="Rows by name or by series, or all.")
    add("--seeds", type=int, default=1, help="Number of seeds of every row (default: %(default)s).")
    add(
        "--first-seed",
        type=int,
        default=1337,
        help="The seed from which they are counted (default: %(default)s).",
    )
    add(
        "--nproc",
        type=int,
        default=1,
        help="Ranks of a run, one for each GPU (default: %(default)s).",
    )
    text = "Options of train_gpt.py for every run; they win over those of row and scale."
    common.add_settings(run, text)
    add(
        "--cluster",
        choices=("slurm", "local"),
        default="",
        help="Hand every run to submitit as a job (default: run one after the other here).",
    )
    text = "Job parameters of submitit, such as slurm_partition=gpu timeout_min=30."
    common.add_settings(run, text, "--job")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ablate.py",  # which report.py is another name of
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    texts = dict(
        list="Show the rows of the table with their hypotheses and baselines.",
        run="Make the runs that are not there yet.",
        report="Write tables and pictures of the finished runs.",
    )
    listing, run, report = (
        commands.add_parser(name, help=text, description=text) for name, text in texts.items()
    )
    listing.add_argument("names", nargs="*", help="Rows by name or by series (default: all).")
    add_run_options(run)
    report.add_argument(
        "--to", type=Path, help="Folder for the report (default: that of the runs)."
    )
    for sub in (run, report):
        sub.add_argument(
            "--scale",
            default="",
            help="A scale of runs.toml (micro) or of train_gpt.py (tiny) (default: full size).",
        )
        sub.add_argument(
            "--out",
            type=Path,
            default=ROOT / "logs" / "lab",
            help="Folder of the runs (default: logs/lab of this repository).",
        )
    for sub in (listing, run, report):
        sub.add_argument(
            "--table",
            type=Path,
            default=TABLE,
            help="The table of runs (default: records/runs.toml).",
        )
    return top


def end(number: int, _: Any) -> None:
    """Ends the command at a signal, so that a run is ended with its launcher."""
    sys.exit(128 + number)


def work(options: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, end)
    table = read_table(options.table)
    if options.command == "list":
        show_table(table, options.names)
        return 0
    if options.command == "report":
        return show_report(table, options)
    return run_matrix(table, options)


def main(words: Sequence[str] | None = None) -> int:
    """The exit code of a command; without words those of the command line."""
    return common.run_tool(work, parser().parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
