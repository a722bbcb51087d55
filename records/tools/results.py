"""Finished runs as they lie on disk, and how two sets of them differ; for report.py and compare.py.

Everything is read from a run's own result.json and metrics.jsonl. Scores are bits per byte of the
validation text, lower is better. A Q-gap is the score of the reloaded artifact minus the score
before rounding. A difference is always ours minus theirs, a row minus its baseline, so negative is
better.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg
from records.tools.common import read_metrics, read_result

CONFIDENCE = 0.95
ALPHA = 0.05
nan = math.nan

# ---- 1. Runs on disk -----------------------------------------------------------------------------


class Unusable(tg.InputError):
    """A run's folder that cannot be compared; the message names the file and what is wrong."""


class Point(NamedTuple):
    """One validation of the weights as trained (not averaged)."""

    step: int
    seconds: float  # of training so far
    bpb: float
    loss: float  # nats per token
    health: list[dict[str, float]]  # of every effective layer; empty where the run did not log it


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    row: str
    seed: int
    config: dict[str, Any]
    pre: float  # bpb before rounding
    post: float  # bpb of the reloaded artifact
    further: dict[str, float]  # bpb of the artifact scored otherwise: sliding, ttt
    model_bytes: int
    total_bytes: int
    parameters: int
    steps: int
    seconds: float
    points: list[Point]
    training: dict[int, float]  # training loss by step, nats per token
    clock: list[tuple[int, float]]  # logged steps and seconds of training until then
    full_rate: tuple[int, float]  # last logged step and second before the learning rate fell
    origin: dict[str, str]  # script, device, torch, validation text, ranks

    @property
    def gap(self) -> float:
        return self.post - self.pre

    @property
    def step_ms(self) -> float:
        """Milliseconds a step; nan where there was none (ITERATIONS=0)."""
        return 1e3 * self.seconds / self.steps if self.steps else nan

    @property
    def capped(self) -> bool:
        """Whether the clock ended it."""
        return self.steps < self.config["iterations"]

    @property
    def rise(self) -> float:
        """How far its last validation is above the lowest before it, bpb; 0 where it is not."""
        scores = [point.bpb for point in self.points]
        return max(0.0, scores[-1] - min(scores[:-1])) if len(scores) > 1 else 0.0


def is_number(value: Any) -> bool:
    """Whether it is a finite number; JSON's true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def figure(path: Path, result: dict[str, Any], *keys: str) -> Any:
    """The number below the keys of a result; Unusable if there is none."""
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not is_number(value):
        raise Unusable(f"{path}: {'.'.join(keys)} should be a number, is {json.dumps(value)}")
    return value


READ = (  # options on which it depends where runs are compared
    "seed",
    "iterations",
    "warmdown_iters",
    "warmdown_fraction",
    "lr_floor",
    "max_wallclock_seconds",
    "gptq_batches",
    "gptq_seconds",
    "train_batch_tokens",
    "size_limit_bytes",
)


def known_result(path: Path) -> dict[str, Any]:
    """result.json with the options of younger scripts filled in; Unusable if it cannot be used."""
    try:
        result = read_result(path)
    except FileNotFoundError:
        raise Unusable(f"{path.parent}: no result.json, the run did not end") from None
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    except tg.InputError as error:
        raise Unusable(str(error)) from None
    if not isinstance(result.get("config"), dict):
        raise Unusable(f"{path}: the configuration of the run is missing")
    if "pre_quant" not in result and result["config"].get("eval_only"):
        raise Unusable(f"{path}: scores an artifact (EVAL_ONLY), no run was trained here")
    result["config"] = {f.name: f.default for f in fields(tg.Config)} | result["config"]
    for name in READ:
        figure(path, result, "config", name)
    return result


def logged(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl that are whole, and messages about those that are not."""
    messages: list[str] = []
    try:
        lines = list(read_metrics(path, messages.append))
    except OSError as error:
        return [], [f"{path}: {error.strerror}, so there are no curves"]
    return [line for line in lines if is_number(line["train_seconds"])], messages


def full_rate(result: dict[str, Any], clock: list[tuple[int, float]]) -> tuple[int, float]:
    """The last logged step and second at which the learning rate had not begun to fall."""
    config = result["config"]
    reserved = config["gptq_seconds"] if config["gptq_batches"] else 0.0
    reserved = result.get("gptq_reserve_seconds", reserved)  # as measured, with GPTQ_SECONDS=-1
    if config.get("refit_steps"):  # which older scripts do not have
        reserved += config["refit_seconds"]
    cap = max(config["max_wallclock_seconds"] - reserved, 0.0)
    # What an older script did not have was off.
    defaults = {field.name: field.default for field in fields(tg.Config)}
    seen: Any = SimpleNamespace(**defaults | config, training_seconds=cap)
    full = [(step, seconds) for step, seconds in clock if tg.lr_factor(seen, step, seconds) == 1]
    return max(full, default=(0, 0.0))


def origin(result: dict[str, Any]) -> dict[str, str]:
    """Where a run comes from, in words; what an old script did not log is unknown."""
    versions, score = result.get("versions", {}), result["roundtrip"]
    device = str(versions.get("device", "unknown"))
    return dict(
        script=str(versions.get("script_sha256", "unknown"))[:12],
        device=re.sub(r"\b1 threads\b", "1 thread", device),  # as older scripts logged it
        torch=str(versions.get("torch", "unknown")),
        ranks=str(result.get("world_size", "unknown")),
        validation=f"{score['val_bytes']:,} bytes of text" if "val_bytes" in score else "unknown",
    )


def load(folder: Path) -> tuple[Result, list[str]]:
    """A run from its folder, and messages about lines that had to be skipped.

    Unusable says why there is no result.
    """
    path = folder / "result.json"
    result = known_result(path)
    lines, messages = logged(folder / "metrics.jsonl")
    points = [
        Point(m["step"], m["train_seconds"], m["val_bpb"], m.get("val_loss", nan), health_of(m))
        for m in lines
        if is_number(m.get("val_bpb")) and m.get("weights", "last") == "last"
    ]
    clock = [(m["step"], m["train_seconds"]) for m in lines]
    made = Result(
        folder=folder,
        row=folder.parent.name,
        seed=result["config"]["seed"],
        config=result["config"],
        pre=figure(path, result, "pre_quant", "val_bpb"),
        post=figure(path, result, "roundtrip", "val_bpb"),
        further={
            kind: figure(path, result, kind, "val_bpb")
            for kind in ("sliding", "ttt")
            if kind in result
        },
        model_bytes=figure(path, result, "bytes_model"),
        total_bytes=figure(path, result, "bytes_total"),
        parameters=figure(path, result, "model_params"),
        steps=figure(path, result, "steps"),
        seconds=figure(path, result, "train_seconds"),
        points=list({point.step: point for point in points}.values()),
        training={m["step"]: m["train_loss"] for m in lines if is_number(m.get("train_loss"))},
        clock=clock,
        full_rate=full_rate(result, clock),
        origin=origin(result),
    )
    return made, messages


def health_of(line: dict[str, Any]) -> list[dict[str, float]]:
    """Figures of every effective layer; nothing where the line has none, or others than tables."""
    health = line.get("health")
    if isinstance(health, list) and all(isinstance(layer, dict) for layer in health):
        return health
    return []


class Loaded(NamedTuple):
    """The usable runs of some folders, at one pace, and what was left out or skipped."""

    runs: list[Result]
    messages: list[str]


def load_seeds(folders: Sequence[Path]) -> Loaded:
    """The runs of one system by seed; of two with the same seed the second is left out."""
    runs: dict[int, Result] = {}
    messages = []
    for folder in folders:
        try:
            run, skipped = load(folder)
        except Unusable as error:
            messages.append(f"left out: {error}")
            continue
        messages += skipped
        if run.seed in runs:
            messages.append(f"left out: {folder} has the seed of {runs[run.seed].folder}")
        else:
            runs[run.seed] = run
    return Loaded(at_one_pace([runs[seed] for seed in sorted(runs)]), messages)


def seed_folders(row: Path) -> list[Path]:
    """The folders seed<n> of a row; others, like seed<n>.unfinished1, have been set aside."""
    found = [path for path in row.glob("seed*") if re.fullmatch(r"seed\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[4:]))


def row_clock(runs: Sequence[Result]) -> Callable[[float], float]:
    """Seconds of training after a step, the median of a row's seeds.

    Seeds do the same work, so what their times differ by is other load on the machine, which must
    not decide. Where all steps are alike that is steps times the median step time. Where passes
    are added in training, later steps take longer, and it is the median of the seconds logged.
    """
    stepped = [run for run in runs if run.steps]
    pace = median([run.seconds / run.steps for run in stepped] or [0.0])

    def alike(step: float) -> float:
        return step * pace

    if not any(run.config["passes_schedule"] for run in runs) or not all(run.clock for run in runs):
        return alike
    steps = sorted({step for run in runs for step, _ in run.clock})
    logged = []
    for run in runs:
        at, seconds = zip(*sorted(run.clock))
        logged.append(np.interp(steps, at, seconds, right=nan))
    medians = np.nanmedian(logged, axis=0)

    def growing(step: float) -> float:
        return float(np.interp(step, steps, medians))

    return growing


def at_one_pace(runs: Sequence[Result]) -> list[Result]:
    """The runs of a row with the times of `row_clock` in place of their own."""
    clock = row_clock(runs)
    return [
        replace(
            run,
            full_rate=(run.full_rate[0], clock(run.full_rate[0])),
            points=[p._replace(seconds=clock(p.step)) for p in run.points],
            clock=[(step, clock(step)) for step, _ in run.clock],
        )
        for run in runs
    ]


def rises(systems: Mapping[str, Sequence[Result]]) -> str:
    """Which systems' validation ended above an earlier value; empty where none's did.

    Such a run diverged or oscillates: what two of them differ by is chance of when they ended.
    """
    counts = {name: sum(run.rise > 0 for run in runs) for name, runs in systems.items()}
    if not any(counts.values()):
        return ""
    names = ", ".join(name for name, count in counts.items() if count)
    most = max(run.rise for runs in systems.values() for run in runs)
    return (
        f"validation ends above an earlier value in {sum(counts.values())} of "
        f"{sum(map(len, systems.values()))} runs ({names}; by up to {most:.4f} bpb): training "
        "diverged or oscillates, so a difference from such a run is no result"
    )


# ---- 2. Statistics -------------------------------------------------------------------------------


class Delta(NamedTuple):
    """A difference of means, half its interval and p of the two-sided t test; nan: one seed."""

    mean: float
    half: float
    p: float


def delta(ours: Sequence[float], theirs: Sequence[float], paired: bool) -> Delta:
    """Ours minus theirs: paired t test on the differences, else Welch's."""
    difference = fmean(ours) - fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Delta(difference, nan, nan)
    pairs = [a - b for a, b in zip(ours, theirs)]
    spread = np.ptp(pairs) if paired else np.ptp(ours) + np.ptp(theirs)
    if spread < 1e-12:  # seeds that agree to rounding: no test is needed, nor defined
        return Delta(difference, 0.0, 0.0 if difference else 1.0)
    test = (
        stats.ttest_rel(ours, theirs) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
    )
    interval = test.confidence_interval(CONFIDENCE)
    return Delta(difference, float(interval.high - interval.low) / 2, float(test.pvalue))


def holm(ps: Sequence[float]) -> list[float]:
    """p adjusted for as many tests as there are (Holm 1979); nan stays and does not count."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, worst = [nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, ps[i] * (len(order) - rank)))
        adjusted[i] = worst
    return adjusted


@cache
def shapes(values: tuple[Any, ...]) -> list[tuple[int, ...]] | None:
    """Shapes of the matrices that a model of these architecture values draws at random.

    None: the script as it is has no such model.
    """
    names = [f.name for f in fields(tg.Architecture)]
    try:
        with torch.device("meta"):
            model = tg.GPT(tg.Architecture(**dict(zip(names, values))))
    except (tg.InputError, TypeError):  # options of another version of the script
        return None
    parameters: list[Any] = list(model.parameters())  # of the script's own kind, with a role
    return [tuple(p.shape) for p in parameters if tg.ROLES[p.role].optimizer == "muon"]


def drawn(run: Result) -> list[tuple[int, ...]] | None:
    """What a seed draws the initial weights of a run for: of equal shapes, it draws the same."""
    return shapes(tuple(run.config[f.name] for f in fields(tg.Architecture)))


def is_paired(ours: Sequence[Result], theirs: Sequence[Result]) -> bool:
    """Whether the seeds are the same and each draws the same initial weights on both sides."""
    if [run.seed for run in ours] != [run.seed for run in theirs]:
        return False
    a, b = drawn(ours[0]), drawn(theirs[0])
    return a is not None and a == b


# ---- 3. Two systems ------------------------------------------------------------------------------


class Reading(NamedTuple):
    """One score of every run, and where in training it was read; no scores: why there are none."""

    where: str
    values: list[float]


MORE_VALIDATIONS = "set VAL_LOSS_EVERY smaller"


def equal_step(runs: Sequence[Result]) -> Reading:
    """bpb of each run after equally many steps: at the end, or the last one at full rate."""
    if len({run.steps for run in runs}) == 1:
        return Reading(f"end, {runs[0].steps:,}", [run.pre for run in runs])
    common = set.intersection(
        *({p.step for p in run.points if 0 < p.step <= run.full_rate[0]} for run in runs)
    )
    if not common:
        return Reading(
            "the runs took different numbers of steps and share no validation before a learning "
            f"rate falls: {MORE_VALIDATIONS}",
            [],
        )
    step = max(common)
    return Reading(f"{step:,}", [next(p.bpb for p in run.points if p.step == step) for run in runs])


def at_second(run: Result, seconds: float) -> float:
    """bpb of a run at a moment of training; linear in log(seconds) between validations.

    nan before the first of them and after the last.
    """
    points = [p for p in run.points if p.seconds > 0]
    if not points:
        return nan
    times = [math.log(p.seconds) for p in points]
    scores = [p.bpb for p in points]
    return float(np.interp(math.log(seconds), times, scores, left=nan, right=nan))


def same_cap(runs: Sequence[Result]) -> bool:
    """Whether all runs were ended by the clock, after the same time."""
    caps = {run.config["max_wallclock_seconds"] for run in runs}
    return all(run.capped for run in runs) and len(caps) == 1


def equal_time(runs: Sequence[Result]) -> Reading:
    """bpb of each run after equally many seconds: the end, or the last second at full rate of all.

    Runs that the same cap ended are compared at their ends; others while their rates are the same.
    """
    if same_cap(runs):
        cap = runs[0].config["max_wallclock_seconds"]
        return Reading(f"end, {cap:.0f} s", [run.pre for run in runs])
    seconds = min(run.full_rate[1] for run in runs)
    if seconds <= 0:
        return Reading("a run has no logged step before its learning rate falls", [])
    values = [at_second(run, seconds) for run in runs]
    if any(math.isnan(value) for value in values):
        late = all(any(0 < p.seconds <= seconds for p in run.points) for run in runs)
        where = "after" if late else "in the first"
        return Reading(
            f"a run has no validation {where} {seconds:.2f} s, at the end of which a learning "
            f"rate falls: {MORE_VALIDATIONS}",
            [],
        )
    return Reading(f"{seconds:.1f} s", values)


class Measure(NamedTuple):
    """How two systems differ in one respect; no `delta`: `where` says why."""

    where: str
    ours: list[float]
    theirs: list[float]
    delta: Delta | None
    holm: float = nan  # p, adjusted for the table's number of tests of this kind; nan: no table

    @property
    def verdict(self) -> str:
        """What the test says: none, one seed, undecided, suggested (its own p) or shown (Holm).

        Of a test that stands in no table nobody knows how many others there were, so it shows
        nothing.
        """
        if self.delta is None:
            return "none"
        if math.isnan(self.delta.p):
            return "one seed"
        if self.holm < ALPHA:
            return "shown"
        return "suggested" if self.delta.p < ALPHA else "undecided"


KINDS = dict(  # the measures of a Comparison, in its order: what is compared
    post="after rounding, as run",
    steps="before rounding, at equal steps",
    time="before rounding, in equal time",
    gap="Q-gap: after minus before rounding",
)


class Comparison(NamedTuple):
    """A row against one of its baselines."""

    row: str
    baseline: str
    test: str  # paired, Welch, one seed, or nothing where there is nothing to compare
    post: Measure
    steps: Measure
    time: Measure
    gap: Measure


def measure(ours: Sequence[Result], theirs: Sequence[Result], reading: Reading) -> Measure:
    """The difference of a reading of both systems' runs, ours first."""
    a, b = reading.values[: len(ours)], reading.values[len(ours) :]
    difference = delta(a, b, is_paired(ours, theirs)) if a else None
    return Measure(reading.where, a, b, difference)


def kind_of_test(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    if min(len(ours), len(theirs)) < 2:
        return "one seed"
    return "paired" if is_paired(ours, theirs) else "Welch"


def compare(
    ours: Sequence[Result], theirs: Sequence[Result], names: tuple[str, str] = ("", "")
) -> Comparison:
    """All measures of two systems, each with its runs at one pace."""
    runs = [*ours, *theirs]
    ends = sorted({run.steps for run in runs})
    end = f"{ends[0]:,}" + (f" to {ends[-1]:,}" if len(ends) > 1 else "") + " steps"
    return Comparison(
        names[0] or ours[0].row,
        names[1] or theirs[0].row,
        kind_of_test(ours, theirs),
        post=measure(ours, theirs, Reading(end, [run.post for run in runs])),
        steps=measure(ours, theirs, equal_step(runs)),
        time=measure(ours, theirs, equal_time(runs)),
        gap=measure(ours, theirs, Reading(end, [run.gap for run in runs])),
    )


def not_compared(row: str, baseline: str, why: str) -> Comparison:
    """A comparison that the table declares and the runs do not allow."""
    nothing = Measure(why, [], [], None)
    return Comparison(row, baseline, "", nothing, nothing, nothing, nothing)


def adjusted(measures: Sequence[Measure]) -> list[Measure]:
    """Measures of one kind with their p adjusted (Holm) for the number of tests among them."""
    ps = holm([measure.delta.p if measure.delta else nan for measure in measures])
    return [measure._replace(holm=p) for measure, p in zip(measures, ps)]


def adjust(made: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of a table, each kind of measure adjusted for the tests of its kind."""
    columns = [adjusted([getattr(c, kind) for c in made]) for kind in KINDS]
    return [
        Comparison(c.row, c.baseline, c.test, *measures) for c, *measures in zip(made, *columns)
    ]


# ---- 4. Differences along training ---------------------------------------------------------------


class Trace(NamedTuple):
    """A difference along training, with half its confidence interval (nan: one seed)."""

    x: list[float]  # steps or seconds
    mean: list[float]
    half: list[float]
    falls: float  # where the first of the learning rates begins to fall


MOST_POINTS = 200  # of a curve in a picture; more cannot be told apart


def evenly(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced places of `count`, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place) for place in np.linspace(0, count - 1, most)]


def thinned(values: Sequence[Any]) -> list[Any]:
    """Entries at evenly spaced places, as many as a picture can show."""
    return [values[i] for i in evenly(len(values), MOST_POINTS)]


def trace(
    ours: Sequence[Result],
    theirs: Sequence[Result],
    curves: Sequence[Mapping[Any, float]],
    falls: float,
) -> Trace:
    """The difference wherever all runs have a value; `curves` are theirs, ours first."""
    paired, made = is_paired(ours, theirs), []
    x = thinned(sorted(set.intersection(*map(set, curves))))
    for at in x:
        values = [curve[at] for curve in curves]
        made.append(delta(values[: len(ours)], values[len(ours) :], paired))
    return Trace(x, [d.mean for d in made], [d.half for d in made], falls)


def over_steps(ours: Sequence[Result], theirs: Sequence[Result]) -> Trace:
    """Difference of the validation bpb at every step at which all runs were validated.

    It ends where a learning rate begins to fall, unless all fall at the same steps.
    """
    runs = [*ours, *theirs]
    falls = min(run.full_rate[0] for run in runs)
    together = len({run.steps for run in runs}) == 1
    curves = [
        {p.step: p.bpb for p in run.points if p.step and (together or p.step <= falls)}
        for run in runs
    ]
    return trace(ours, theirs, curves, falls)


def over_time(ours: Sequence[Result], theirs: Sequence[Result]) -> Trace:
    """Difference of the validation bpb after equally many seconds, at every validation of ours.

    It ends where a learning rate begins to fall, unless the same cap ended all runs. Between their
    validations the others are interpolated.
    """
    runs = [*ours, *theirs]
    falls = min(run.full_rate[1] for run in runs)
    together = same_cap(runs)
    ticks = {
        p.seconds
        for run in ours
        for p in run.points
        if p.seconds > 0 and (together or p.seconds <= falls)
    }
    curves = []
    for run in runs:
        curve = {second: at_second(run, second) for second in ticks}
        curves.append({second: bpb for second, bpb in curve.items() if not math.isnan(bpb)})
    return trace(ours, theirs, curves, falls)


def over_training(ours: Sequence[Result], theirs: Sequence[Result]) -> Trace:
    """Difference of the training loss, nats per token, at every step that all runs logged.

    It ends where that of the validations does.
    """
    runs = [*ours, *theirs]
    falls = min(run.full_rate[0] for run in runs)
    together = len({run.steps for run in runs}) == 1
    curves = [
        {step: loss for step, loss in run.training.items() if together or step <= falls}
        for run in runs
    ]
    return trace(ours, theirs, curves, falls)
