"""What finished runs show: statistics over seeds, pictures, report.md for a README and report.html.

`python records/tools/ablate.py report` calls `write`. Everything is read from the runs' own result.json and
metrics.jsonl; nothing is typed in. All scores are bits per byte, lower is better; a Q-gap is the score of the
reloaded int8 artifact minus the score before.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg

SIZE_LIMIT = 16_000_000  # bytes, script + artifact
CONFIDENCE = 0.95
nan = math.nan

# ---- 1. Runs on disk -------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One validation."""

    step: int
    seconds: float  # of training so far
    bpb: float
    health: list[dict[str, float]]  # of every effective layer


@dataclass(frozen=True)
class Result:
    """A finished run."""

    row: str
    seed: int
    config: dict[str, Any]
    pre: float  # bpb before the round trip
    post: float  # bpb of the reloaded artifact
    model_bytes: int
    total_bytes: int
    parameters: int
    steps: int
    seconds: float
    points: list[Point]
    full_rate: tuple[
        int, float
    ]  # last logged step and second before the learning rate began to fall
    origin: dict[str, str]  # script, device, torch, validation split, ranks

    @property
    def gap(self) -> float:
        return self.post - self.pre

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / self.steps

    @property
    def capped(self) -> bool:
        """Whether the clock ended it."""
        return self.steps < self.config["iterations"]


def load(folder: Path) -> Result:
    """A run from its folder <row>/seed<n>/."""
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = {f.name: f.default for f in fields(tg.Config)} | result["config"]  # of younger options
    score, versions = result["roundtrip"], result["versions"]
    points = [
        Point(m["step"], m["train_seconds"], m["val_bpb"], m["health"])
        for m in lines
        if "val_bpb" in m and m.get("weights", "last") == "last"
    ]
    calibration = config["gptq_seconds"] * (config["gptq_batches"] > 0)
    training = max(config["max_wallclock_seconds"] - calibration, 0.0)
    clock = SimpleNamespace(**config, training_seconds=training)
    full = [
        (m["step"], m["train_seconds"])
        for m in lines
        if tg.lr_factor(clock, m["step"], m["train_seconds"]) == 1
    ]
    return Result(
        folder.parent.name,
        config["seed"],
        config,
        result["pre_quant"]["val_bpb"],
        score["val_bpb"],
        result["bytes_model"],
        result["bytes_total"],
        result["model_params"],
        result["steps"],
        result["train_seconds"],
        points,
        max(full, default=(0, 0.0)),
        dict(
            script=versions["script_sha256"][:12],
            device=versions["device"],
            torch=versions["torch"],
            ranks=str(result["world_size"]),
            validation=f"{score['val_tokens']:,} tokens",
        ),
    )


def at_one_pace(runs: dict[int, Result]) -> dict[int, Result]:
    """The runs of a row as if each step had taken the median of their step times.

    Seeds do the same work, so what their times differ by is other load on the machine, which must not decide.
    """
    pace = median(run.seconds / run.steps for run in runs.values())
    return {
        seed: replace(
            run,
            full_rate=(run.full_rate[0], run.full_rate[0] * pace),
            points=[p._replace(seconds=p.step * pace) for p in run.points],
        )
        for seed, run in runs.items()
    }


def load_all(folder: Path, rows: Iterable[str]) -> dict[str, dict[int, Result]]:
    """The finished runs of each row below `folder`, by seed; rows without one are left out."""
    found = {}
    for row in rows:
        runs = sorted(
            (load(path.parent) for path in (folder / row).glob("seed*/result.json")),
            key=lambda run: run.seed,
        )
        if runs:
            found[row] = at_one_pace({run.seed: run for run in runs})
    if not found:
        raise ValueError(f"{folder} holds no finished run of the table")
    return found


# ---- 2. Statistics ---------------------------------------------------------------------------------------


class Delta(NamedTuple):
    """A difference of means, half its confidence interval, and p of the two-sided t test; nan: one seed."""

    mean: float
    half: float
    p: float


def delta(ours: Sequence[float], theirs: Sequence[float], paired: bool) -> Delta:
    """Ours minus theirs: paired t test on the differences, else Welch's."""
    difference = mean(ours) - mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Delta(difference, nan, nan)
    test = (
        stats.ttest_rel(ours, theirs) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
    )
    interval = test.confidence_interval(CONFIDENCE)
    return Delta(difference, (interval.high - interval.low) / 2, float(test.pvalue))


def holm(ps: Sequence[float]) -> list[float]:
    """p adjusted for as many tests as there are (Holm 1979); nan stays and does not count."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, worst = [nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, ps[i] * (len(order) - rank)))
        adjusted[i] = worst
    return adjusted


def drawn(run: Result) -> list[tuple[int, ...]]:
    """Shapes of the matrices a run stores: where they are equal, one seed draws the same initial weights."""
    values = {f.name: run.config[f.name] for f in fields(tg.Architecture)}
    with torch.device("meta"):
        model = tg.GPT(tg.Architecture(**values))
    return [tuple(p.shape) for p in model.parameters() if tg.ROLES[p.role].optimizer == "muon"]


def equal_step(runs: Sequence[Result]) -> tuple[str, list[float]] | None:
    """bpb of each run after equally many steps, and where: the end, or the last step at full rate."""
    if len({run.steps for run in runs}) == 1:
        return f"end, {runs[0].steps}", [run.pre for run in runs]
    common = set.intersection(
        *({p.step for p in run.points if 0 < p.step <= run.full_rate[0]} for run in runs)
    )
    if not common:
        return None
    step = max(common)
    return f"{step}", [next(p.bpb for p in run.points if p.step == step) for run in runs]


def equal_time(runs: Sequence[Result]) -> tuple[str, list[float]] | None:
    """bpb of each run after equally many seconds, and where: the end, or the last second at full rate.

    Between validations it is linear in log(seconds). Runs cut off while their rates differ are not compared.
    """
    if (
        all(run.capped for run in runs)
        and len({run.config["max_wallclock_seconds"] for run in runs}) == 1
    ):
        return f"end, {runs[0].config['max_wallclock_seconds']:.0f} s", [run.pre for run in runs]
    seconds, values = min(run.full_rate[1] for run in runs), []
    for run in runs:
        points = [p for p in run.points if p.step]
        if not points or not points[0].seconds <= seconds <= points[-1].seconds:
            return None
        values.append(
            float(
                np.interp(
                    math.log(seconds),
                    [math.log(p.seconds) for p in points],
                    [p.bpb for p in points],
                )
            )
        )
    return f"{seconds:.1f} s", values


class Comparison(NamedTuple):
    """A row against one of its baselines."""

    row: str
    baseline: str
    test: str
    post: Delta  # as run, after int8
    steps: tuple[str, Delta] | None  # at equal steps, before int8
    time: tuple[str, Delta] | None  # in equal time, before int8
    gap: Delta
    holm: float  # p of `post`, adjusted


def compare(ours: dict[int, Result], theirs: dict[int, Result]) -> Comparison:
    """Paired where the seeds are the same and draw the same initial weights."""
    a, b = list(ours.values()), list(theirs.values())
    paired = ours.keys() == theirs.keys() and drawn(a[0]) == drawn(b[0])

    def differ(values: list[float]) -> Delta:
        return delta(values[: len(a)], values[len(a) :], paired)

    steps, seconds = equal_step(a + b), equal_time(a + b)
    return Comparison(
        a[0].row,
        b[0].row,
        "paired" if paired else "Welch",
        differ([run.post for run in a + b]),
        steps and (steps[0], differ(steps[1])),
        seconds and (seconds[0], differ(seconds[1])),
        differ([run.gap for run in a + b]),
        nan,
    )


def claimed(
    found: dict[str, dict[int, Result]],
    pairs: Sequence[Sequence[str]],
    at: Callable[[Sequence[Result]], list[float] | None],
) -> tuple[int, Delta] | None:
    """The mean difference over several pairs of rows: a t test over the seeds that all of them have.

    `at` gives the scores of a pair's runs; None (also from it): there are no runs to compare.
    """
    if any(name not in found for pair in pairs for name in pair):
        return None
    seeds, columns = (
        sorted(set.intersection(*(set(found[name]) for pair in pairs for name in pair))),
        [],
    )
    for row, baseline in pairs:
        values = at([found[name][seed] for name in (row, baseline) for seed in seeds])
        if not values:
            return None
        columns.append([a - b for a, b in zip(values[: len(seeds)], values[len(seeds) :])])
    effects = [mean(of_seed) for of_seed in zip(*columns)]
    return len(seeds), delta(effects, [0.0] * len(effects), paired=True)


def compare_all(found: dict[str, dict[int, Result]], rows: dict[str, Any]) -> list[Comparison]:
    """Every row against each of its baselines, as far as there are runs of both."""
    made = [
        compare(found[name], found[baseline])
        for name in found
        for baseline in rows[name].baselines
        if baseline in found
    ]
    return [c._replace(holm=p) for c, p in zip(made, holm([c.post.p for c in made]))]


# ---- 3. What the reference published ---------------------------------------------------------------------


class Published(NamedTuple):
    """Figures of the recurrence study, one seed each (reference_runs.json)."""

    runs: dict[str, dict[str, Any]]

    def post(self, row: str, baseline: str) -> float:
        """Difference after int8, as published."""
        a, b = (self.runs.get(name, {}) for name in (row, baseline))
        return a["post_quant_bpb"] - b["post_quant_bpb"] if self.alike(a, b) else nan

    def steps(self, row: str, baseline: str) -> float:
        """Difference at the last common step before either learning rate fell, or at a common end."""
        a, b = (self.runs.get(name, {}) for name in (row, baseline))
        if not self.alike(a, b):
            return nan
        if a["steps"] == b["steps"]:
            return a["pre_quant_bpb"] - b["pre_quant_bpb"]
        x, y = a["val_bpb_at_step"], b["val_bpb_at_step"]
        step = max(
            (s for s in x.keys() & y.keys() if int(s) <= min(a["steps"], b["steps"]) - 1200),
            key=int,
        )
        return x[step] - y[step]

    @staticmethod
    def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return "post_quant_bpb" in a and "post_quant_bpb" in b and a["hardware"] == b["hardware"]


def published() -> Published:
    data = json.loads((ROOT / "records" / "reference_runs.json").read_text())
    return Published({name.replace("'", "p"): run for name, run in data["runs"].items()})


# ---- 4. Pictures -----------------------------------------------------------------------------------------

COLOURS = plt.get_cmap("tab10").colors


def curves(found: dict[str, dict[int, Result]], names: Sequence[str]) -> plt.Figure:
    """Validation bpb against steps and against seconds of training; band: lowest to highest seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for i, name in enumerate(names):
        runs = list(found[name].values())
        steps = sorted(set.intersection(*({p.step for p in run.points if p.step} for run in runs)))
        at = [[next(p for p in run.points if p.step == step) for run in runs] for step in steps]
        bpb = np.array([[p.bpb for p in points] for points in at])
        seconds = [points[0].seconds for points in at]
        for axis, x in zip(axes, (steps, seconds)):
            axis.plot(x, bpb.mean(1), ".-", color=COLOURS[i % 10], label=name, linewidth=1.2)
            axis.fill_between(
                x, bpb.min(1), bpb.max(1), color=COLOURS[i % 10], alpha=0.15, linewidth=0
            )
    axes[0].set(xlabel="step", ylabel="val_bpb before int8")
    axes[1].set(xlabel="seconds of training, at the row's median step time")
    axes[1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def gap_bars(found: dict[str, dict[int, Result]], rows: dict[str, Any]) -> plt.Figure:
    """Q-gap of every row, mean and standard deviation; a colour a series."""
    figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
    series = list(dict.fromkeys(rows[name].series for name in found))
    for i, (name, runs) in enumerate(found.items()):
        gaps, colour = [run.gap for run in runs.values()], series.index(rows[name].series)
        axis.bar(
            i,
            mean(gaps),
            yerr=stdev(gaps) if len(gaps) > 1 else None,
            color=COLOURS[colour],
            capsize=3,
            label=rows[name].series,
        )
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(handles.values(), handles, frameon=False, ncols=len(handles))
    axis.set_xticks(range(len(found)), found, rotation=60, ha="right", rotation_mode="anchor")
    axis.set(ylabel="Q-gap, bpb")
    axis.axhline(0, color="black", linewidth=0.8)
    return figure


PANELS = dict(
    mix="carried weight a",
    attn_scale="attention scale",
    mlp_scale="MLP scale",
    attn_shift="attention shift",
    mlp_shift="MLP shift",
)


def histories(runs: Iterable[Result]) -> np.ndarray:
    """Health of a row: mean of its seeds, [validations, layers, panels]."""
    tables = [
        np.array([[[layer[key] for key in PANELS] for layer in p.health] for p in run.points])
        for run in runs
    ]
    shortest = min(len(table) for table in tables)
    return np.mean([table[:shortest] for table in tables], axis=0)


def heat_maps(found: dict[str, dict[int, Result]], names: Sequence[str]) -> plt.Figure:
    """Mix weight, scales and shifts of every effective layer (down) over training (across)."""
    figure, axes = plt.subplots(
        len(names),
        len(PANELS),
        figsize=(11, 1 + 1.3 * len(names)),
        squeeze=False,
        layout="constrained",
    )
    tables = {name: histories(found[name].values()) for name in names}
    for column, title in enumerate(PANELS.values()):
        values = {name: table[..., column].T for name, table in tables.items()}
        low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
        for name, axis in zip(names, axes[:, column]):
            steps = [p.step for p in next(iter(found[name].values())).points][
                : values[name].shape[1]
            ]
            axis.set_xticks([0, len(steps) - 1], [steps[0], steps[-1]], fontsize=7)
            axis.set_yticks([0, len(values[name]) - 1], [0, len(values[name]) - 1], fontsize=7)
            axis.set_ylabel("" if column else name, fontsize=9)
            if np.ptp(values[name]) > 0:
                image = axis.imshow(
                    values[name], aspect="auto", vmin=low, vmax=high, interpolation="nearest"
                )
            else:
                axis.text(
                    0.5,
                    0.5,
                    "off",
                    ha="center",
                    va="center",
                    color="gray",
                    transform=axis.transAxes,
                )
                axis.set_xticks([])
                axis.set_yticks([])
        axes[0, column].set_title(title, fontsize=9)
        if high > low:
            bar = figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=25, pad=0.02)
            bar.ax.tick_params(labelsize=7)
    return figure


def labels(axis: plt.Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names beside points; points that lie on each other share a label."""
    together: dict[tuple[int, int], list[str]] = {}
    for name, point in points.items():
        x, y = axis.transAxes.inverted().transform(axis.transData.transform(point))
        together.setdefault((round(25 * x), round(30 * y)), []).append(name)
    for names in together.values():
        axis.annotate(
            " ".join(names), points[names[0]], fontsize=7, xytext=(5, 2), textcoords="offset points"
        )


def bytes_against_bpb(found: dict[str, dict[int, Result]], reference: Published) -> plt.Figure:
    """Script + artifact against bpb after int8: ours, and the reference's own figures."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    ours = {
        name: (
            mean(run.total_bytes for run in runs.values()) / 1e6,
            mean(run.post for run in runs.values()),
        )
        for name, runs in found.items()
    }
    theirs = {
        name: (run["model_bytes_int8_zlib"] / 1e6, run["post_quant_bpb"])
        for name, run in reference.runs.items()
        if "post_quant_bpb" in run
    }
    for name, (x, y) in ours.items():
        scores = [run.post for run in found[name].values()]
        axes[0].errorbar(
            x,
            y,
            yerr=stdev(scores) if len(scores) > 1 else None,
            fmt="o",
            color=COLOURS[0],
            ecolor="lightgray",
            markersize=4,
            zorder=3,
        )
    axes[1].plot(*zip(*theirs.values()), "s", color=COLOURS[1], markersize=4)
    titles = "ours: script + artifact", "published (PR 855): artifact alone"
    for axis, title, points in zip(axes, titles, (ours, theirs)):
        axis.axvline(SIZE_LIMIT / 1e6, color="tab:red", linestyle="--", linewidth=1)
        axis.set(xscale="log", xlabel="MB (10^6 bytes, logarithmic); dashed: 16 MB", title=title)
        axis.set_ylabel("val_bpb after int8")
        low = min(x for x, _ in points.values())
        ticks = [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 16) if x > low / 1.5]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlim(low / 1.3, 20)
        axis.grid(alpha=0.3)
        figure.canvas.draw()
        labels(axis, points)
    return figure


def png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)
    return buffer.getvalue()


def pictures(
    found: dict[str, dict[int, Result]], rows: dict[str, Any]
) -> dict[str, tuple[str, bytes]]:
    """Caption and PNG of every picture, by file name."""
    made = {
        "gaps.png": ("Q-gap: mean and standard deviation over seeds", png(gap_bars(found, rows))),
        "bytes.png": ("Bytes against val_bpb; 16 MB", png(bytes_against_bpb(found, published()))),
    }
    for series in dict.fromkeys(rows[name].series for name in found):
        names = [name for name in found if rows[name].series == series]
        made[f"{series}_loss.png"] = (
            f"{series}: validation against steps and against time; bands from the lowest to the highest seed",
            png(curves(found, names)),
        )
        made[f"{series}_health.png"] = (
            f"{series}: carried weight of the mix, effective scales and shifts of every effective layer "
            "(down) over training (across), mean of the seeds",
            png(heat_maps(found, names)),
        )
    return made


# ---- 5. Tables -------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What is shown, and what it is sorted by."""

    text: str
    key: float | str


class Sheet(NamedTuple):
    title: str
    head: list[str]
    body: list[list[Cell]]


def word(text: str) -> Cell:
    return Cell(text, text)


def number(value: float, form: str = ".4f") -> Cell:
    return Cell("", math.inf) if math.isnan(value) else Cell(format(value, form), value)


def spread(values: Sequence[float], form: str = ".4f") -> Cell:
    """Mean and standard deviation."""
    deviation = f" ± {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
    return Cell(format(mean(values), form) + deviation, mean(values))


def change(d: Delta) -> list[Cell]:
    """Difference with its confidence interval, and p."""
    half = "" if math.isnan(d.half) else f" ± {d.half:.4f}"
    return [Cell(f"{d.mean:+.4f}{half}", d.mean), number(d.p, ".2g")]


def runs_sheet(
    found: dict[str, dict[int, Result]], rows: dict[str, Any], reference: Published
) -> Sheet:
    head = [
        "run",
        "system",
        "seeds",
        "before int8",
        "after int8",
        "Q-gap",
        "script + artifact, bytes",
        "parameters",
        "ms a step",
        "steps",
        "published after int8",
        "published Q-gap",
    ]
    body = []
    for name, by_seed in found.items():
        runs, ref = list(by_seed.values()), reference.runs.get(name, {})
        post = ref.get("post_quant_bpb", nan)
        body.append(
            [
                word(name),
                word(rows[name].what),
                number(len(runs), "d"),
                spread([r.pre for r in runs]),
                spread([r.post for r in runs]),
                spread([r.gap for r in runs], "+.5f"),
                number(mean(r.total_bytes for r in runs), ",.0f"),
                number(runs[0].parameters, ",d"),
                spread([r.step_ms for r in runs], ".1f"),
                number(mean(r.steps for r in runs), ",.0f"),
                number(post),
                number(post - ref.get("pre_quant_bpb", nan)),
            ]
        )
    return Sheet("Runs", head, body)


def comparisons_sheet(made: list[Comparison], reference: Published) -> Sheet:
    head = [
        "run",
        "against",
        "test",
        "after int8, as run",
        "p",
        "p, Holm",
        "equal steps, before int8",
        "p",
        "at step",
        "equal time, before int8",
        "p",
        "at",
        "Q-gap",
        "p",
        "published after int8",
        "published, equal steps",
    ]
    body = []
    for c in made:
        cells = [
            word(c.row),
            word(c.baseline),
            word(c.test),
            *change(c.post),
            number(c.holm, ".2g"),
        ]
        for where in (c.steps, c.time):
            cells += (
                [*change(where[1]), word(where[0].replace(" ", "\u00a0"))]
                if where
                else [word("")] * 3
            )
        cells += [
            *change(c.gap),
            number(reference.post(c.row, c.baseline), "+.4f"),
            number(reference.steps(c.row, c.baseline), "+.4f"),
        ]
        body.append(cells)
    return Sheet("Comparisons", head, body)


def claims_sheet(found: dict[str, dict[int, Result]], claims: Iterable[Any]) -> Sheet:
    head = [
        "claim",
        "pairs",
        "seeds",
        "after int8, as run",
        "p",
        "p, Holm",
        "equal time, before int8",
        "p",
        "Q-gap",
        "p",
    ]

    def timed(runs: Sequence[Result]) -> list[float] | None:
        point = equal_time(runs)
        return point and point[1]

    made = [
        (claim, claimed(found, claim.pairs, lambda runs: [run.post for run in runs]))
        for claim in claims
    ]
    made, body = [(claim, *result) for claim, result in made if result], []
    for (claim, seeds, post), p in zip(made, holm([post.p for _, _, post in made])):
        time = claimed(found, claim.pairs, timed)
        gap = claimed(found, claim.pairs, lambda runs: [run.gap for run in runs])
        pairs = ", ".join(f"{row} - {baseline}" for row, baseline in claim.pairs)
        body.append(
            [
                word(claim.what),
                word(pairs),
                number(seeds, "d"),
                *change(post),
                number(p, ".2g"),
                *(change(time[1]) if time else [word("")] * 2),
                *change(gap[1]),
            ]
        )
    return Sheet("Claims, each over its pairs", head, body)


def hypotheses_sheet(found: dict[str, dict[int, Result]], rows: dict[str, Any]) -> Sheet:
    return Sheet(
        "Hypotheses",
        ["run", "hypothesis of its source"],
        [[word(name), word(rows[name].hypothesis)] for name in found],
    )


def origins(found: dict[str, dict[int, Result]]) -> list[str]:
    """Where the runs come from, one line a fact; more than one value means that they hardly compare."""
    runs = [run for by_seed in found.values() for run in by_seed.values()]
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    lines = [f"{len(runs)} runs of {len(found)} systems, seeds {seeds}."]
    for fact in runs[0].origin:
        values = sorted({run.origin[fact] for run in runs})
        warning = " (they differ: compare with care)" if len(values) > 1 else ""
        lines.append(f"{fact}: {' / '.join(values)}{warning}")
    return lines


NOTES = f"""A difference is the row minus its baseline, negative is better; ± is half of its {CONFIDENCE:.0%}
confidence interval. The test is a paired t test where both have the same seeds and a seed draws the same
initial weights for both (equal shapes), else Welch's. p is that of the single test; "p, Holm" adjusts the p
of the column before it for the number of rows of the table. A seed draws the initial weights and nothing
else: every run sees the same batches in the same order, so spread over seeds is not spread over data. A claim
is tested on the mean of its pairs' differences, seed by seed (t test, as many values as seeds).

"Equal steps" and "equal time" compare scores before int8. Where both runs ended after the same number of
steps (or by the same cap on time) it is the score at the end; else it is read at the last step (second) at
which both still had their full learning rate, because a rate that has fallen lowers the loss by itself. Such
a comparison says what comes of time before the warm-down, not what a run of that length would have ended
with. Time is steps times the median step time of a row's seeds, so that other load on the machine in one of
them does not decide. Between validations the score is taken as linear in the logarithm of time.

Published figures are those of the recurrence study (PR 855), one seed each, on other data and hardware."""

# ---- 6. The report ---------------------------------------------------------------------------------------


def markdown(sheet: Sheet) -> str:
    """A table for a README."""
    lines = [sheet.head, ["---"] * len(sheet.head)] + [
        [cell.text for cell in row] for row in sheet.body
    ]
    return (
        f"### {sheet.title}\n\n"
        + "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + "\n"
    )


def html_table(sheet: Sheet) -> str:
    def cell(c: Cell) -> str:
        kind = "" if isinstance(c.key, str) else ' class="n"'
        key = html.escape(str(c.key).replace("inf", "Infinity") if kind else c.key)
        return f'<td{kind} data-key="{key}">{html.escape(c.text)}</td>'

    head = "".join(f"<th>{html.escape(name)}</th>" for name in sheet.head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in sheet.body)
    return (
        f"<h2>{sheet.title}</h2>\n<div class=wide><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>\n"
    )


STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1700px;padding:0 1rem;color:#222}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th{cursor:pointer;background:#f4f4f4;vertical-align:bottom}
th.up::after{content:" ▲"}th.down::after{content:" ▼"}tbody tr:hover{background:#f8f8ee}
img{max-width:100%;height:auto}figure{margin:1.5rem 0}figcaption{color:#555}p{max-width:62rem}"""

SCRIPT = """for (const th of document.querySelectorAll("th")) th.addEventListener("click", () => {
  const row = th.parentNode, body = th.closest("table").tBodies[0], column = [...row.cells].indexOf(th);
  const down = th.classList.contains("up");
  for (const other of row.cells) other.classList.remove("up", "down");
  th.classList.add(down ? "down" : "up");
  const key = tr => tr.cells[column].dataset.key;
  const by = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  body.append(...[...body.rows].sort((a, b) => down ? by(b, a) : by(a, b)));
});"""


def page(
    title: str, facts: list[str], sheets: list[Sheet], images: dict[str, tuple[str, bytes]]
) -> str:
    """One file that needs no other and no network."""
    figures = ""
    for caption, data in images.values():
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        figures += (
            f'<figure><img alt="{html.escape(caption)}" src="{source}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
        )
    listed = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    paragraphs = "".join(f"<p>{html.escape(text)}</p>\n" for text in NOTES.split("\n\n"))
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n'
        f"<ul>{listed}</ul>\n{''.join(map(html_table, sheets))}{paragraphs}{figures}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def write(folder: Path, table: Any, scale: str, to: Path) -> list[Path]:
    """report.md, report.html and the pictures of the runs below `folder`, into `to`; the files."""
    rows, reference = table.rows, published()
    found = load_all(folder, rows)
    sheets = [
        runs_sheet(found, rows, reference),
        claims_sheet(found, table.claims.values()),
        comparisons_sheet(compare_all(found, rows), reference),
        hypotheses_sheet(found, rows),
    ]
    images, facts, title = (
        pictures(found, rows),
        [scale, *origins(found)],
        f"Runs at {folder.name} scale",
    )
    text = (
        f"# {title}\n\n"
        + "\n".join(f"- {fact}" for fact in facts)
        + "\n\n"
        + "\n".join(map(markdown, sheets))
        + f"\n{NOTES}\n"
    )
    files = {"report.md": text.encode(), "report.html": page(title, facts, sheets, images).encode()}
    to.mkdir(parents=True, exist_ok=True)
    for name, data in (files | {name: data for name, (_, data) in images.items()}).items():
        tg.write_atomically(to / name, data)
    return [to / name for name in (*files, *images)]
