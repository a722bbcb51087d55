"""Pictures of finished runs: for a page as SVG in its theme's colours, for a README as PNG.

A figure is drawn once, in the colours of LIGHT. `svg` puts a variable of the page's style sheet in
place of each of them, so that one picture serves the light and the dark theme; `png` leaves them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    ScalarFormatter,
    StrMethodFormatter,
)

from records.tools.results import (
    Measure,
    Result,
    Trace,
    over_steps,
    over_time,
    over_training,
    thinned,
)

SIZE_LIMIT = 16_000_000  # bytes, script + artifact

# Names are those of the style sheet's variables. Blue and orange, because colour-blind readers tell
# them apart as well.
LIGHT = dict(
    page="#ffffff",
    ink="#1f2329",
    muted="#5c6670",
    grid="#d5dbe1",
    band="#eef1f5",
    better="#0b66c2",
    worse="#c14a09",
    c0="#2f6fb1",
    c1="#d1742a",
    c2="#2f8f4e",
    c3="#b5373c",
    c4="#7d5bb5",
    c5="#8a5f4d",
    c6="#c25a9e",
    c7="#6d7278",
    c8="#948a1c",
    c9="#1d93a3",
)
SERIES = [LIGHT[f"c{i}"] for i in range(10)]
DASHES = ["-", "--", ":"]  # after ten lines the colours come again

matplotlib.rcParams.update(
    {
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
        "text.color": LIGHT["ink"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.edgecolor": LIGHT["muted"],
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT["grid"],
        "grid.linewidth": 0.5,
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "lines.linewidth": 1.3,
        "svg.fonttype": "none",  # text stays text: small, sharp, and found by the browser's search
        "figure.constrained_layout.w_pad": 0.1,  # the reader's font may be wider than ours
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
)

# ---- 1. Files ------------------------------------------------------------------------------------


REWRITTEN = {  # what Matplotlib writes: what a page needs in its place
    r"<metadata>.*?</metadata>": "",
    r"<!--.*?-->": "",
    r"<defs>\s*<style.*?</style>\s*</defs>": "",  # it would hold for the whole page
    r' xmlns(:xlink)?="[^"]*"': "",
    r"xlink:href": "href",
    r'<svg width="[^"]*" height="[^"]*"': "<svg",
    r' id="[\w.]+_\d+"': "",  # names of groups, the same in every figure
    r' id="image[0-9a-f]+"': "",  # equal for equal images
    r"'DejaVu Sans'[^;\"]*": "var(--font)",
    r"\s*\n(?=[LCQz])": " ",  # points of a path
    r"\n\s*": "\n",
} | {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def svg(figure: Figure, name: str) -> str:
    """The figure as markup for a page, in the colours of its theme; no id occurs in two figures."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in REWRITTEN.items():
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=110, metadata={"Software": None}, pil_kwargs={"optimize": True}
    )
    return buffer.getvalue()


# ---- 2. Forest plots -----------------------------------------------------------------------------

XLABEL = "difference, bpb; negative: better"


class Line(NamedTuple):
    """A line of a forest plot: what is compared, and its measure in every column."""

    label: str
    measures: list[Measure]


def colour(measure: Measure) -> str:
    """Blue where ours is better and red where it is worse, as far as a test says so; else grey."""
    if measure.delta is None or measure.verdict not in ("shown", "suggested"):
        return LIGHT["muted"]
    return LIGHT["better" if measure.delta.mean < 0 else "worse"]


def interval(axis: Axes, y: float, measure: Measure) -> None:
    """A difference with its interval at height y, and in figures beside the axis."""
    if measure.delta is None:
        beside(axis, y, "nothing to compare", LIGHT["muted"])
        return
    mark(axis, y, measure)
    told, strong = measure.verdict in ("shown", "suggested"), measure.verdict == "shown"
    beside(axis, y, amount(measure), colour(measure) if told else LIGHT["ink"], bold=strong)


def amount(measure: Measure) -> str:
    """A difference with its interval in figures."""
    assert measure.delta is not None
    mean, half, _ = measure.delta
    return f"{mean:+.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def mark(axis: Axes, y: float, measure: Measure) -> None:
    """A difference with its interval at height y."""
    assert measure.delta is not None
    mean, half, _ = measure.delta
    strong, told = measure.verdict == "shown", measure.verdict in ("shown", "suggested")
    known = not math.isnan(half)
    if known:
        width = 2 if strong else 1.1
        axis.plot([mean - half, mean + half], [y, y], color=colour(measure), linewidth=width)
    axis.plot(
        mean,
        y,
        marker="o" if known else "x",
        markersize=5 if told else 4,
        color=colour(measure),
        markerfacecolor=LIGHT["page"] if measure.verdict == "suggested" else colour(measure),
    )


def beside(axis: Axes, y: float, text: str, ink: str, bold: bool = False) -> None:
    """Text to the right of an axis, at height y; the layout leaves room for it."""
    axis.annotate(
        text.replace("-", "\u2212"),
        (1.02, y),
        xycoords=axis.get_yaxis_transform(),
        va="center",
        fontsize=7.5,
        fontweight="bold" if bold else "normal",
        color=ink,
        annotation_clip=False,
    )


def forest(lines: Sequence[Line], titles: Sequence[str], xlabel: str) -> Figure:
    """Differences with their intervals, a line each, a column for each title."""
    tallest = max(line.label.count("\n") for line in lines) + 1
    height = 0.75 + (0.055 + 0.125 * tallest) * len(lines)
    figure = Figure(figsize=(1.4 + 3.6 * len(titles), height))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    for column, (axis, title) in enumerate(zip(axes, titles)):
        axis.set(title=title, xlabel=xlabel, ylim=(len(lines) - 0.5, -0.5))
        axis.axvline(0, color=LIGHT["ink"], linewidth=0.8)
        for y, line in enumerate(lines):
            interval(axis, y, line.measures[column])
            if y % 2:
                axis.axhspan(y - 0.5, y + 0.5, color=LIGHT["band"], zorder=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, symmetric=False))
        axis.set_yticks(range(len(lines)), [line.label for line in lines], color=LIGHT["ink"])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
    return figure


def narrow_forest(lines: Sequence[Line], title: str, xlabel: str) -> Figure:
    """The first column of a forest plot for the width of a phone: labels above their intervals."""
    tallest = max(line.label.count("\n") for line in lines) + 1
    inches = 0.24 + 0.125 * tallest  # of a line
    figure = Figure(figsize=(3.3, 0.75 + inches * len(lines)), layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, xlabel=xlabel, ylim=(len(lines) - 0.5, -0.5))
    axis.axvline(0, color=LIGHT["ink"], linewidth=0.8)
    shown: dict[str, Any] = dict(va="top", fontsize=7.5, transform=axis.get_yaxis_transform())
    for y, line in enumerate(lines):
        if y % 2:
            axis.axhspan(y - 0.5, y + 0.5, color=LIGHT["band"], zorder=0)
        mark(axis, y + 0.5 - 0.09 / inches, line.measures[0])
        top = y - 0.5 + 0.03 / inches
        axis.text(0.01, top, line.label, ha="left", **shown)
        axis.text(0.99, top, amount(line.measures[0]).replace("-", "\u2212"), ha="right", **shown)
    axis.xaxis.set_major_locator(MaxNLocator(4, symmetric=False))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    return figure


# ---- 3. Curves -----------------------------------------------------------------------------------


def late(values: Sequence[float]) -> np.ndarray:
    """What follows the first quarter of a curve, whose differences dwarf all later ones."""
    return np.array(values[len(values) // 4 :])


def limits(traces: Sequence[Trace], bands: bool) -> tuple[float, float]:
    """A range that holds 0 and what follows the first quarter of training, maybe with bands."""
    low, high = 0.0, 0.0
    for trace in traces:
        means = late(trace.mean)
        halves = np.nan_to_num(late(trace.half)) if bands else 0 * means
        low = min([low, *(means - halves)])
        high = max([high, *(means + halves)])
    margin = 0.08 * (high - low) or 1e-4
    return low - margin, high + margin


def difference(axis: Axes, trace: Trace, xlabel: str) -> None:
    """A difference along training with its band; grey: where a learning rate falls."""
    axis.set_xlabel(xlabel)
    axis.axhline(0, color=LIGHT["ink"], linewidth=0.8)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=xlabel == "steps"))
    axis.yaxis.set_major_locator(MaxNLocator(4))
    mean, half = np.array(trace.mean), np.array(trace.half)
    if trace.falls < trace.x[-1]:
        axis.axvspan(trace.falls, trace.x[-1], color=LIGHT["band"], zorder=0)
    axis.fill_between(trace.x, mean - half, mean + half, color=LIGHT["c0"], alpha=0.22, linewidth=0)
    axis.plot(trace.x, mean, ".-", color=LIGHT["c0"], markersize=4)
    axis.set_xlim(0, trace.x[-1] * 1.03)


def along_training(traces: dict[str, Trace], label: str) -> Figure:
    """A difference of two systems over what the traces are named by, such as steps."""
    figure = Figure(figsize=(4.3, 1.75 if len(traces) > 1 else 2.6), layout="constrained")
    axes = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    for axis, (xlabel, trace) in zip(axes, traces.items()):
        difference(axis, trace, xlabel)
    ylim = limits(list(traces.values()), bands=True)
    axes[0].set(title=label, ylabel="difference, bpb", ylim=ylim)
    return figure


DIFFERENCES = ("validation over steps", "validation over time", "training loss over steps")


def differences(
    ours: Sequence[Result], theirs: Sequence[Result], panels: Sequence[str]
) -> Figure | None:
    """The difference of A and B in those of the panels (of DIFFERENCES) that have one, if any."""
    steps, seconds = over_steps(ours, theirs), over_time(ours, theirs)
    training = over_training(ours, theirs)
    traces = dict(zip(DIFFERENCES, (steps, seconds, training)))
    shown = [panel for panel in panels if traces[panel].x]
    if not shown:
        return None
    figure = Figure(figsize=(3.0 * len(shown), 2.5), layout="constrained")
    axes = dict(zip(shown, figure.subplots(1, len(shown), squeeze=False)[0]))
    for panel, axis in axes.items():
        difference(axis, traces[panel], "seconds of training" if "time" in panel else "steps")
        if panel.startswith("training"):
            axis.set(ylabel="A \u2212 B, nats per token", ylim=limits([training], bands=True))
        else:
            both = [trace for trace in (steps, seconds) if trace.x]
            axis.set(ylabel="A \u2212 B, bpb", ylim=limits(both, bands=True))
        axis.set_title(panel)
    return figure


def style(i: int) -> dict[str, Any]:
    return dict(color=SERIES[i % len(SERIES)], linestyle=DASHES[i // len(SERIES) % len(DASHES)])


def losses() -> tuple[Figure, Axes]:
    """An empty figure for curves of losses."""
    figure = Figure(figsize=(4.3, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    return figure, axis


def finish(figure: Figure, axis: Axes, ylabel: str) -> Figure | None:
    """The figure with labels of its axes, and with a legend for which it grows.

    None where no curve is in it.
    """
    axis.set(xlabel="steps", ylabel=ylabel)
    handles, labels = axis.get_legend_handles_labels()
    if not labels:
        return None
    columns = max(1, 60 // (max(map(len, labels)) + 5))  # a line holds about 60 letters
    figure.set_figheight(figure.get_figheight() + 0.16 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=1.4)
    return figure


def whole_steps(axis: Axes) -> None:
    """A logarithmic axis of steps, labelled at 1, 2, 5, 10 and so on."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def validation_curves(found: dict[str, list[Result]], names: Sequence[str]) -> Figure | None:
    """Validation bpb against steps, mean of the seeds; band: lowest to highest seed."""
    figure, axis = losses()
    for i, name in enumerate(names):
        curves = [{p.step: p.bpb for p in run.points if p.step} for run in found[name]]
        steps = thinned(sorted(set.intersection(*map(set, curves))))
        bpb = np.array([[curve[step] for curve in curves] for step in steps])
        if steps:
            axis.plot(steps, bpb.mean(1), marker=".", markersize=3, label=name, **style(i))
            low, high = bpb.min(1), bpb.max(1)
            axis.fill_between(steps, low, high, color=style(i)["color"], alpha=0.13, linewidth=0)
    return finish(figure, axis, "validation, bpb before rounding")


def training_curves(found: dict[str, list[Result]], names: Sequence[str]) -> Figure | None:
    """Training loss against steps, mean of the seeds; a point is one batch, the same for all."""
    figure, axis = losses()
    for i, name in enumerate(names):
        steps = thinned(sorted(set.intersection(*(set(run.training) for run in found[name]))))
        if steps:
            loss = [np.mean([run.training[step] for run in found[name]]) for step in steps]
            axis.plot(steps, loss, label=name, **style(i))
    whole_steps(axis)
    return finish(figure, axis, "training loss, nats per token")


def training_differences(traces: dict[str, Trace]) -> Figure | None:
    """Training loss of rows minus that of their baselines."""
    figure, axis = losses()
    axis.axhline(0, color=LIGHT["ink"], linewidth=0.8)
    shown = {label: trace for label, trace in traces.items() if trace.x}
    if not shown:
        return None
    for i, (label, trace) in enumerate(shown.items()):
        axis.plot(trace.x, trace.mean, label=label, **style(i))
    axis.set_ylim(limits(list(shown.values()), bands=False))
    return finish(figure, axis, "difference, nats per token")


# ---- 4. Layers -----------------------------------------------------------------------------------

PANELS = dict(
    mix="Weight of the carried state in the mix",
    attn_scale="Scale of the attention branch",
    mlp_scale="Scale of the MLP branch",
    attn_shift="Shift of the attention branch",
    mlp_shift="Shift of the MLP branch",
)


def history(runs: Sequence[Result], key: str) -> tuple[list[int], np.ndarray]:
    """Validated steps, and a figure of every layer at them, mean of the seeds: [layers, steps].

    Nothing where it was not logged, or not for equally many layers.
    """
    tables = [
        {p.step: [layer.get(key, np.nan) for layer in p.health] for p in run.points if p.health}
        for run in runs
    ]
    steps = thinned(sorted(set.intersection(*map(set, tables))))
    if len({len(table[step]) for table in tables for step in steps}) != 1:
        return [], np.empty((0, 0))
    return steps, np.mean([[table[step] for step in steps] for table in tables], axis=0).T


def heat_maps(found: dict[str, list[Result]], names: Sequence[str], key: str) -> Figure | None:
    """A figure of every effective layer (down) over training (across), for rows where it varies."""
    tables = {name: history(found[name], key) for name in names}
    tables = {
        name: (steps, table)
        for name, (steps, table) in tables.items()
        if table.size and np.isfinite(table).all() and np.ptp(table) > 0
    }
    if not tables:
        return None
    columns = min(3 if max(map(len, tables)) > 12 else 4, len(tables))  # names are their titles
    rows = -(-len(tables) // columns)
    figure = Figure(figsize=(4.3, 0.55 + 1.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    low = min(table.min() for _, table in tables.values())
    high = max(table.max() for _, table in tables.values())
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, (steps, table)) in zip(axes, tables.items()):
        axis.set_axis_on()
        image = axis.imshow(table, aspect="auto", vmin=low, vmax=high, interpolation="none")
        axis.grid(visible=False)
        axis.set_title(name, fontsize=7.3)
        axis.set_xticks([0, len(steps) - 1], [f"{steps[0]:,}", f"{steps[-1]:,}"])
        axis.set_yticks([0, len(table) - 1])
        axis.tick_params(length=0, labelsize=7.3)
    figure.supxlabel("step", fontsize=7.5, color=LIGHT["muted"])
    figure.supylabel("effective layer", fontsize=7.5, color=LIGHT["muted"])
    bar = figure.colorbar(image, ax=axes, aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.3, length=0)
    return figure


# ---- 5. Bytes ------------------------------------------------------------------------------------


FEWEST = 3  # systems that have a front


class Spot(NamedTuple):
    """A system in the picture of bytes and score."""

    name: str
    bytes: float
    bpb: float
    deviation: float  # over seeds; nan: one seed


def front(spots: Sequence[Spot]) -> list[Spot]:
    """The spots that no other beats in bytes and score at once, by bytes."""
    kept: list[Spot] = []
    for spot in sorted(spots, key=lambda s: (s.bytes, s.bpb)):
        if not kept or spot.bpb < kept[-1].bpb:
            kept.append(spot)
    return kept


def scale_of_bytes(axis: Axes, spots: Sequence[Spot]) -> None:
    """A logarithmic axis where sizes differ manifold; the size limit, where it is near."""
    low, high = (f(spot.bytes for spot in spots) / 1e6 for f in (min, max))
    limit = SIZE_LIMIT / 1e6
    if high > 0.5 * limit:
        axis.axvline(limit, color=LIGHT["worse"], linestyle="--", linewidth=1)
        axis.annotate(
            "16 MB",
            (limit, 1),
            xycoords=axis.get_xaxis_transform(),
            xytext=(-3, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=7.5,
            color=LIGHT["worse"],
        )
        high = max(high, limit)
    if high > 4 * low:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(low / 1.15, high * 1.15)
    else:
        margin = 0.06 * (high - low) + 0.02 * high
        axis.set_xlim(low - margin, high + margin)


def bytes_and_bpb(spots: Sequence[Spot], title: str, xlabel: str) -> Figure:
    """Bytes against bpb after rounding; the line joins what no other system beats in both.

    Fewer than FEWEST systems are not joined: two would be a line whatever they were.
    """
    figure = Figure(figsize=(4.4, 3.3 if len(spots) > 5 else 2.4), layout="constrained")
    axis = figure.subplots()
    best = front(spots)
    x, y = [spot.bytes / 1e6 for spot in spots], [spot.bpb for spot in spots]
    line = [spot.bytes / 1e6 for spot in best], [spot.bpb for spot in best]
    if len(spots) >= FEWEST:
        axis.plot(*line, color=LIGHT["better"], linewidth=1)
    for spot in spots:
        ink = LIGHT["better" if spot in best else "muted"]
        axis.errorbar(
            spot.bytes / 1e6,
            spot.bpb,
            yerr=None if math.isnan(spot.deviation) else spot.deviation,
            fmt="o",
            markersize=4,
            elinewidth=0.8,
            capsize=1.5,
            color=ink,
        )
    axis.set(title=title, xlabel=xlabel, ylabel="validation, bpb after rounding")
    scale_of_bytes(axis, spots)
    names = [axis.text(spot.bytes / 1e6, spot.bpb, spot.name, fontsize=7.5) for spot in spots]
    thread = dict(arrowstyle="-", color=LIGHT["muted"], linewidth=0.4)
    figure.draw_without_rendering()  # the places of labels depend on the layout
    adjust_text(names, x, y, ax=axis, expand=(1.25, 1.5), arrowprops=thread)
    return figure
