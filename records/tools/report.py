"""The report of a run matrix: what differs from its baseline, by how much and how surely.

`python records/tools/ablate.py report` calls `write`, which makes report.html (one file that needs
no other and no network), report.md with the same tables, and two pictures for a README. Everything
is read from the runs' own result.json and metrics.jsonl; nothing is typed in. Started by its path,
this file is the same command.
"""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import told_if_missing

with told_if_missing(__name__):
    import train_gpt as tg
    from records.tools import figures
    from records.tools.common import ROOT, read_result, warn
    from records.tools.page import (
        Cell,
        Picture,
        Sheet,
        badge,
        change,
        drawn,
        finding,
        number,
        signed,
        spread,
        templates,
        told_once,
        tone,
        word,
    )
    from records.tools.results import (
        ALPHA,
        CONFIDENCE,
        KINDS,
        MORE_VALIDATIONS,
        Comparison,
        Measure,
        Reading,
        Result,
        adjust,
        adjusted,
        compare,
        delta,
        equal_time,
        load_seeds,
        nan,
        not_compared,
        over_steps,
        over_time,
        over_training,
        rises,
        seed_folders,
    )

Found = dict[str, list[Result]]  # the runs of every row, in the order of their seeds

# ---- 1. The runs of the table --------------------------------------------------------------------


def load_all(folder: Path, rows: Iterable[str]) -> tuple[Found, list[str]]:
    """The finished runs of each row below `folder`, and what was left out.

    InputError if there are none.
    """
    found, messages = {}, []
    names = list(rows)
    for name in names:
        loaded = load_seeds(seed_folders(folder / name))
        messages += loaded.messages
        if loaded.runs:
            found[name] = loaded.runs
    others = sorted(p.name for p in folder.glob("*") if seed_folders(p) and p.name not in names)
    if others:
        messages.append(f"left out: {', '.join(others)} in {folder}: not a row of the table")
    if not found:
        reasons = "".join(f"\n  {message}" for message in messages)
        raise tg.InputError(f"{folder} holds no finished run of the table{reasons}")
    return found, messages


def compare_all(found: Found, rows: dict[str, Any]) -> list[Comparison]:
    """Every row that has runs against each of its baselines, also those that have none."""
    made = []
    for name in found:
        for baseline in rows[name].baselines:
            if baseline in found:
                made.append(compare(found[name], found[baseline], (name, baseline)))
            else:
                made.append(not_compared(name, baseline, f"no finished run of {baseline}"))
    return adjust(made)


def post_of(runs: Sequence[Result]) -> list[float]:
    return [run.post for run in runs]


def gap_of(runs: Sequence[Result]) -> list[float]:
    return [run.gap for run in runs]


def read_post(runs: Sequence[Result]) -> Reading:
    return Reading("end", post_of(runs))


def read_gap(runs: Sequence[Result]) -> Reading:
    return Reading("end", gap_of(runs))


def seeds_of(found: Found, pairs: Sequence[Sequence[str]]) -> list[int]:
    """The seeds that all rows of the pairs have; none where a row has no runs."""
    rows = [{run.seed for run in found.get(name, [])} for pair in pairs for name in pair]
    return sorted(set.intersection(*rows))


def claimed(
    found: Found, pairs: Sequence[Sequence[str]], read: Callable[[Sequence[Result]], Reading]
) -> Measure:
    """The mean difference over several pairs of rows: a t test over the seeds that all have.

    `read` gives the scores of a pair's runs, or says why there are none.
    """
    if missing := sorted({name for pair in pairs for name in pair} - set(found)):
        return Measure(f"no finished run of {', '.join(missing)}", [], [], None)
    seeds, columns = seeds_of(found, pairs), []
    if not seeds:
        return Measure("the rows have no seed in common", [], [], None)
    for pair in pairs:
        where, values = read([run for name in pair for run in found[name] if run.seed in seeds])
        if not values:
            of_pair = f"{' and '.join(pair)}: " if len(pairs) > 1 else ""
            return Measure(of_pair + where, [], [], None)
        columns.append([a - b for a, b in zip(values[: len(seeds)], values[len(seeds) :])])
    effects = [fmean(of_seed) for of_seed in zip(*columns)]
    return Measure("", effects, [], delta(effects, [0.0] * len(effects), paired=True))


class Judged(NamedTuple):
    """A claim with the mean of its pairs' differences."""

    claim: Any
    seeds: int
    post: Measure
    time: Measure
    gap: Measure


def judge(found: Found, claims: Iterable[Any]) -> list[Judged]:
    """Every claim about a row that has runs, adjusted for the number of these claims."""
    about = [c for c in claims if any(name in found for pair in c.pairs for name in pair)]
    columns = [
        adjusted([claimed(found, claim.pairs, read) for claim in about])
        for read in (read_post, equal_time, read_gap)
    ]
    return [
        Judged(claim, len(seeds_of(found, claim.pairs)), *measures)
        for claim, *measures in zip(about, *columns)
    ]


# ---- 2. What the reference published -------------------------------------------------------------


class Published(NamedTuple):
    """Figures of the recurrence study, one seed each (reference_runs.json)."""

    runs: dict[str, dict[str, Any]]

    def post(self, row: str, baseline: str) -> float:
        """Difference after int8, as published."""
        a, b = (self.runs.get(name, {}) for name in (row, baseline))
        return a["post_quant_bpb"] - b["post_quant_bpb"] if self.alike(a, b) else nan

    def steps(self, row: str, baseline: str) -> float:
        """Difference at a common end, or the last common step before a learning rate fell."""
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


# ---- 3. Tables -----------------------------------------------------------------------------------


def rounded(runs: Sequence[Result]) -> Cell:
    return spread(post_of(runs))


def ends(runs: Sequence[Result]) -> Cell:
    """The steps at which the seeds ended, one figure or a range."""
    first, last = min(run.steps for run in runs), max(run.steps for run in runs)
    text = f"{first:,}" if first == last else f"{first:,} to {last:,}"
    return Cell(text, first, classes="n")


def size(runs: Sequence[Result]) -> float:
    """Mean bytes of script and artifact."""
    return fmean(run.total_bytes for run in runs)


def runs_sheet(found: Found, rows: dict[str, Any], reference: Published) -> Sheet:
    made = []
    for name, runs in found.items():
        theirs = reference.runs.get(name, {})
        post, pre = (theirs.get(key, nan) for key in ("post_quant_bpb", "pre_quant_bpb"))
        made.append(
            {
                "run": word(name, rows[name].what),
                "seeds": number(len(runs), "d"),
                "after rounding": rounded(runs),
                "before rounding": spread([run.pre for run in runs]),
                "Q-gap": spread(gap_of(runs), "+.5f"),
                "bytes, script + artifact": number(size(runs), ",.0f"),
                "parameters": number(runs[0].parameters, ",d"),
                "ms a step": spread([run.step_ms for run in runs], ".1f"),
                "steps": ends(runs),
                "published, after rounding": number(post, note=f"Q-gap {post - pre:.4f}"),
            }
        )
    return Sheet(made)


def published_change(c: Comparison, reference: Published) -> Cell:
    """The published difference after rounding, and below it that at equal steps."""
    return number(
        reference.post(c.row, c.baseline),
        "+.4f",
        f"{reference.steps(c.row, c.baseline):+.4f} at equal steps",
    )


def comparisons_sheet(made: Sequence[Comparison], reference: Published) -> Sheet:
    rows = [
        {
            "run": word(c.row),
            "against": word(c.baseline),
            "finding after rounding": badge(c.post, c.test),
            "after rounding, as run": change(c.post, with_holm=True),
            "at equal steps": change(c.steps, at=c.steps.where),
            "in equal time": change(c.time, at=c.time.where),
            "Q-gap": change(c.gap, digits=5),
            "published, after rounding": published_change(c, reference),
        }
        for c in made
    ]
    empty = "There is nothing to compare: no row that has runs declares a baseline."
    return Sheet([told_once(row) for row in rows], empty)


def claims_sheet(judged: Sequence[Judged], claims: Iterable[Any]) -> Sheet:
    rows = [
        {
            "claim": word(j.claim.what),
            "pairs": word(
                ", ".join(f"{row}\u00a0\u2212\u00a0{base}" for row, base in j.claim.pairs)
            ),
            "seeds": number(j.seeds, "d"),
            "finding": badge(j.post),
            "after rounding, as run": change(j.post, with_holm=True),
            "in equal time": change(j.time),
            "Q-gap": change(j.gap, digits=5),
        }
        for j in judged
    ]
    rows = [told_once(row) for row in rows]
    names = sorted({name for claim in claims for pair in claim.pairs for name in pair})
    if not names:
        return Sheet(rows, "The table of runs makes no claims.")
    return Sheet(
        rows, f"No claim can be tested: none of the rows they name ({', '.join(names)}) has runs."
    )


def series_sheet(
    found: Found, rows: dict[str, Any], made: Sequence[Comparison], names: Sequence[str]
) -> Sheet:
    """Every row of a series beside its declared baselines."""
    body = []
    for name in names:
        own = [c for c in made if c.row == name]
        for c in own or [not_compared(name, "none declared", "")]:
            body.append(
                {
                    "run": word(name, rows[name].what),
                    "hypothesis of its source": word(rows[name].hypothesis),
                    "after rounding": rounded(found[name]),
                    "baseline": word(c.baseline),
                    "its score": rounded(found.get(c.baseline, [])),
                    "difference": change(c.post),
                    "finding": badge(c.post),
                }
            )
    return Sheet([told_once(row) for row in body])


def origins(found: Found) -> list[str]:
    """Where the runs come from, a line a fact; of several values it is said that they differ."""
    runs = [run for of_row in found.values() for run in of_row]
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    lines = [f"{len(runs)} runs of {len(found)} systems, seeds {seeds}"]
    for fact in runs[0].origin:
        values = sorted({run.origin[fact] for run in runs})
        warning = " (they differ: compare with care)" if len(values) > 1 else ""
        lines.append(f"{fact}: {' / '.join(values)}{warning}")
    return lines


class Asked(NamedTuple):
    """What a row is run with at a scale."""

    config: tg.Config
    options: set[str]  # that the scale or the row sets, in lower case


class Intended(NamedTuple):
    """What a scale asks of its rows; `--set` may have asked something else of the runs."""

    name: str
    what: str
    rows: dict[str, Asked]  # rows that this script does not take are absent


PATHS = ("data_path", "tokenizer_path")


def set_by_hand(run: Result, intended: Intended) -> list[str]:
    """The options of a run that are not as its row has them at the scale, with both values.

    Looked at are the options that the scale or a row sets, and those in the run's run.json. Other
    options may differ as well, where a default of the script has changed since.
    """
    asked = intended.rows.get(run.row)
    if asked is None:
        return []
    names = {*asked.options, *(name.lower() for name in recorded_variables(run))}
    found = []
    for name in sorted(names & run.config.keys() - {"preset", "seed", "log_dir", "run_id"}):
        own, usual = run.config[name], getattr(asked.config, name)
        if name in PATHS:
            own, usual = str(Path(own)), str(Path(usual))
        if own != usual:
            found.append(f"{name.upper()}={tg.show(own)} instead of {tg.show(usual) or 'nothing'}")
    return found


def recorded_variables(run: Result) -> dict[str, Any]:
    """The variables in a run's run.json; none for a run that was started by hand."""
    try:
        variables = read_result(run.folder / "run.json").get("variables")
    except (OSError, tg.InputError):
        return {}
    return variables if isinstance(variables, dict) else {}


class Scale(NamedTuple):
    """The scale in words, and the values that the runs really had where they are others."""

    what: str
    changed: list[str]  # a text for each set of rows, such as "A=1 instead of 2 in all runs"
    options: str  # their names


def scale_of(found: Found, intended: Intended) -> Scale:
    """What the runs were to be and what they were."""
    rows: dict[str, list[str]] = {}  # that have a value set by hand
    for row, runs in found.items():
        for told in sorted({told for run in runs for told in set_by_hand(run, intended)}):
            rows.setdefault(told, []).append(row)
    together: dict[str, list[str]] = {}  # what the same rows have
    for told, having in rows.items():
        where = "all runs" if len(having) == len(found) else ", ".join(having)
        together.setdefault(where, []).append(told)
    common_first = sorted(together.items(), key=lambda entry: entry[0] != "all runs")
    parts = [f"{', '.join(values)} in {where}" for where, values in common_first]
    options = ", ".join(sorted({told.partition("=")[0] for told in rows}))
    return Scale(f"{intended.name}: {intended.what}", parts, options)


# ---- 4. The headline -----------------------------------------------------------------------------


class Said(NamedTuple):
    """A line of the headline, with classes of the style sheet."""

    text: str
    classes: str = ""


class Headline(NamedTuple):
    result: str
    lines: list[Said]


def sentence(measure: Measure, what: str) -> Said:
    """A difference, its interval and what follows from it."""
    if measure.delta is None:
        return Said(f"{what}: {measure.where}.", "none")
    mean, half, p = measure.delta
    if math.isnan(p):
        return Said(
            f"{what}: {signed(f'{mean:+.4f}')} with one seed on a side: no test.", "one-seed"
        )
    corrected = "" if math.isnan(measure.holm) else f", {measure.holm:.2g} after Holm's correction"
    figures_of_it = signed(f"{mean:+.4f} ± {half:.4f}")
    return Said(
        f"{what}: {figures_of_it} (p {p:.2g}{corrected}): {finding(measure)}.", tone(measure)
    )


def tally(made: Sequence[Comparison]) -> Said:
    """How many comparisons ended how."""
    verdicts = [c.post.verdict for c in made]
    untested = verdicts.count("one seed") + verdicts.count("none")
    return Said(
        f"Of {len(made)} declared comparisons after rounding, {verdicts.count('shown')} are shown "
        f"(p below {ALPHA} after Holm's correction), {verdicts.count('suggested')} suggested (p "
        f"below {ALPHA} in their own test), {verdicts.count('undecided')} undecided, {untested} "
        "without a test."
    )


def lead(best: str, others: dict[str, Measure]) -> str:
    """That the best differs from all others (in their order, best first), or from which it may not.

    `others` has the measures of the best against them, adjusted for their number.
    """
    systems = f"{len(others) + 1} systems" if others else "1 system"
    alike = {name: measure for name, measure in others.items() if measure.verdict != "shown"}
    if not alike:
        return f"{best} is the best of {systems}" if others else f"{best} is the only system"
    name, measure = next(iter(alike.items()))
    assert measure.delta is not None, "all have scores after rounding"
    how = "one seed on a side" if math.isnan(measure.delta.p) else f"p {measure.delta.p:.2g}"
    those = f"{name} ({signed(figures.amount(measure))}, {how})"
    if len(alike) > 1:
        those = f"{len(alike)} others, such as {those}"
    return f"No difference is shown between {best} and {those}; lowest of {systems} is {best}"


def headline(found: Found, made: Sequence[Comparison]) -> Headline:
    """The best row that fits, by how much it is the best, and how sure that is."""
    large = [
        name
        for name, runs in found.items()
        if any(run.total_bytes > run.config["size_limit_bytes"] for run in runs)
    ]
    fitting = [name for name in found if name not in large] or list(found)
    best, *others = sorted(fitting, key=lambda name: fmean(post_of(found[name])))
    runs = found[best]
    seeds = f"mean ± standard deviation of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    risen = rises(found)
    lines = [Said(f"{risen[0].upper()}{risen[1:]}.", "warning")] if risen else []
    for c in made:
        if c.row == best:
            lines.append(sentence(c.post, f"Against its baseline {c.baseline}, after rounding"))
        if c.row == best and c.test:
            lines.append(sentence(c.time, f"Against {c.baseline} in equal time, before rounding"))
    measures = adjusted([compare(runs, found[name]).post for name in others])
    if others:
        lines.append(sentence(measures[0], f"Against the second, {others[0]}, after rounding"))
    if made:
        lines.append(tally(made))
    if large and len(large) < len(found):
        lines.append(Said(f"Above the size limit, so not ranked: {', '.join(large)}."))
    elif large:
        lines.append(Said("No system is within the size limit."))
    return Headline(
        f"{lead(best, dict(zip(others, measures)))}: {rounded(runs).text} bits per byte after "
        f"rounding ({seeds}), {size(runs):,.0f} bytes with the script.",
        lines,
    )


# ---- 5. Sections ---------------------------------------------------------------------------------


@dataclass
class Part:
    """A table with the pictures that belong to it."""

    sheet: Sheet | None = None
    figures: list[Picture] = field(default_factory=list)
    kind: str = ""  # large: pictures with long labels
    picture: str = ""  # the file that shows them in report.md


@dataclass
class Section:
    """What has an entry in the table of contents."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


def against(c: Comparison) -> str:
    return f"{c.row} \u2212 {c.baseline}"


def left_out(measures: dict[str, Measure], kind: str) -> list[str]:
    """A sentence for each reason for which lines are not in the picture of a kind."""
    names: dict[str, list[str]] = {}
    for name, measure in measures.items():
        if measure.delta is None:
            names.setdefault(measure.where, []).append(name)
    return [f"Not drawn {KINDS[kind]}: {', '.join(of)} ({why})." for why, of in names.items()]


def forest_picture(measures: dict[str, Measure], kind: str, name: str, caption: str) -> Picture:
    """The measures of a kind, at least one of which has a difference, by their labels."""
    lines = [
        figures.Line("\n".join(textwrap.wrap(label, 36)), [measure])
        for label, measure in measures.items()
        if measure.delta
    ]
    broad = figures.forest(lines, [KINDS[kind]], figures.XLABEL)
    narrow = figures.narrow_forest(lines, KINDS[kind], figures.XLABEL)
    return drawn(broad, f"{name}-{kind}", caption, narrow)


def forest_columns(made: Sequence[Comparison]) -> list[str]:
    """Kinds of comparison that are worth a column: equal steps only where they are not the ends."""
    if all(c.steps.where.startswith("end") for c in made):
        return ["post", "time"]
    return ["post", "steps", "time"]


def comparisons_section(made: Sequence[Comparison], reference: Published) -> Section:
    text = (
        "Each row against the baselines that the table of runs declares for it. Filled and bold: "
        "shown (p below 0.05 after Holm's correction). Open: suggested (p below 0.05 in its own "
        "test). Grey: undecided. Blue is better than the baseline, orange worse."
    )
    tested, pictures, omitted = [c for c in made if c.test], list[Picture](), list[str]()
    for kind in forest_columns(tested) if tested else []:
        measures = {against(c): getattr(c, kind) for c in tested}
        omitted += left_out(measures, kind)
        caption = f"Every comparison {KINDS[kind]}, with its {CONFIDENCE:.0%} confidence interval."
        if any(measure.delta for measure in measures.values()):
            pictures.append(forest_picture(measures, kind, "comparisons", caption))
    sheet = comparisons_sheet(made, reference)
    part = Part(sheet, pictures, "large", "forest.png" if pictures else "")
    texts = [text, *omitted] if pictures else omitted
    return Section("comparisons", "Comparisons", texts, [part])


def claims_section(judged: Sequence[Judged], claims: Iterable[Any]) -> Section:
    text = (
        "What a source concludes from several pairs of rows, tested on the mean of the pairs' "
        "differences over the seeds that all of them have."
    )
    pictures = []
    for kind in ("post", "time"):
        measures = {j.claim.what: getattr(j, kind) for j in judged}
        if any(measure.delta for measure in measures.values()):
            caption = f"The claims {KINDS[kind]}."
            pictures.append(forest_picture(measures, kind, "claims", caption))
    part = Part(claims_sheet(judged, claims), pictures, "large")
    return Section("claims", "Claims", [text] if judged else [], [part])


def spots(found: Found) -> list[figures.Spot]:
    """The systems in the picture of bytes and score."""
    made = []
    for name, runs in found.items():
        deviation = stdev(post_of(runs)) if len(runs) > 1 else nan
        made.append(figures.Spot(name, size(runs), fmean(post_of(runs)), deviation))
    return made


def bytes_figure(found: Found) -> figures.Figure:
    xlabel = "script + artifact, MB (10^6 bytes)"
    return figures.bytes_and_bpb(spots(found), "Bytes and score", xlabel)


def published_picture(found: Found, reference: Published) -> list[Picture]:
    """Bytes and score of the same rows as published, if there are enough for a front."""
    theirs = [
        figures.Spot(name, run["model_bytes_int8_zlib"], run["post_quant_bpb"], nan)
        for name, run in reference.runs.items()
        if "post_quant_bpb" in run and name in found
    ]
    if len(theirs) < figures.FEWEST:
        return []
    figure = figures.bytes_and_bpb(
        theirs, "The same, as published", "artifact alone, MB (10^6 bytes)"
    )
    caption = "These rows as the recurrence study (PR 855) published them, one seed each."
    return [drawn(figure, "published", caption)]


def gaps_picture(found: Found) -> Picture:
    """The Q-gap of every row, tested against 0."""
    gaps = [gap_of(runs) for runs in found.values()]
    tests = [Measure("", gap, [], delta(gap, [0.0] * len(gap), paired=True)) for gap in gaps]
    lines = [figures.Line(name, [test]) for name, test in zip(found, adjusted(tests))]
    title, xlabel = KINDS["gap"], "bpb; 0: rounding is free"
    broad = figures.forest(lines, [title], xlabel)
    narrow = figures.narrow_forest(lines, title, xlabel)
    caption = f"What rounding costs, with its {CONFIDENCE:.0%} confidence interval over the seeds."
    return drawn(broad, "gaps", caption, narrow)


def runs_section(found: Found, rows: dict[str, Any], reference: Published) -> Section:
    caption = "Bytes against the score after rounding, mean and standard deviation of the seeds."
    if len(found) >= figures.FEWEST:
        caption += " The line joins the systems that no other beats in both."
    pictures = [
        drawn(bytes_figure(found), "bytes", caption),
        *published_picture(found, reference),
        gaps_picture(found),
    ]
    text = "Mean ± standard deviation over the seeds of a row."
    part = Part(runs_sheet(found, rows, reference), pictures, "large", "bytes.png")
    return Section("runs", "Runs", [text], [part])


def along_pictures(found: Found, own: Sequence[Comparison]) -> tuple[list[Picture], list[str]]:
    """How every comparison came about over steps and over time, and what could not be drawn."""
    pictures = []
    undrawn: dict[str, list[str]] = {}
    for c in own:
        sides = found[c.row], found[c.baseline]
        traces = {"steps": over_steps(*sides), "seconds of training": over_time(*sides)}
        for xlabel, trace in traces.items():
            if not trace.x:
                undrawn.setdefault(xlabel, []).append(against(c))
        shown = {xlabel: trace for xlabel, trace in traces.items() if trace.x}
        if shown:
            figure = figures.along_training(shown, against(c))
            pictures.append(drawn(figure, f"along-{c.row}-{c.baseline}", ""))
    told = [
        f"Not drawn over {xlabel}: {', '.join(names)} (the runs share no validation before a "
        f"learning rate falls: {MORE_VALIDATIONS})."
        for xlabel, names in undrawn.items()
    ]
    return pictures, told


def loss_pictures(found: Found, own: Sequence[Comparison], names: Sequence[str]) -> list[Picture]:
    """Validation and training losses of rows and baselines, and what the latter differ by."""
    traces = {against(c): over_training(found[c.row], found[c.baseline]) for c in own}
    made = [
        (
            "validation",
            figures.validation_curves(found, names),
            "Validation, mean of the seeds; bands from the lowest to the highest seed.",
        ),
        (
            "training",
            figures.training_curves(found, names),
            "Training, mean of the seeds; a point is one batch, the same for all rows.",
        ),
        (
            "training-differences",
            figures.training_differences(traces),
            "Training loss minus that of the baseline on the same batches, mean of the seeds.",
        ),
    ]
    return [
        drawn(figure, f"{kind}-{names[0]}", caption)
        for kind, figure, caption in made
        if figure is not None
    ]


def layer_pictures(found: Found, names: Sequence[str]) -> list[Picture]:
    """Figures of the effective layers; what varies in no row has no picture."""
    pictures = []
    for key, what in figures.PANELS.items():
        figure = figures.heat_maps(found, names, key)
        if figure is not None:
            caption = f"{what}: effective layers down, training across, mean of the seeds."
            pictures.append(drawn(figure, f"{key}-{names[0]}", caption))
    return pictures


def series_section(
    found: Found, rows: dict[str, Any], made: Sequence[Comparison], series: str
) -> Section:
    """A series: its rows beside their baselines, differences along training, losses and layers."""
    names = [name for name in found if rows[name].series == series]
    own = [c for c in made if c.row in names and c.test]
    shown = list(dict.fromkeys([*names, *(c.baseline for c in own)]))
    text = (
        f"Below the table: validation minus that of the baseline, before rounding, with pointwise "
        f"{CONFIDENCE:.0%} intervals. Grey: the learning rate falls. A curve ends where it falls "
        "on one side only, as scores then do not compare. The first quarter may leave the frame."
    )
    along, undrawn = along_pictures(found, own)
    texts = [text, *undrawn] if along else undrawn
    return Section(
        series,
        re.sub(r"(?<=[a-z])(?=\d)", " ", series).capitalize(),  # series1: Series 1
        texts,
        [
            Part(series_sheet(found, rows, made, names)),
            Part(figures=[*along, *loss_pictures(found, own, shown)]),
            Part(figures=layer_pictures(found, shown)),
        ],
    )


# ---- 6. The report -------------------------------------------------------------------------------


def sections(
    found: Found, table: Any, made: Sequence[Comparison], left: list[str]
) -> list[Section]:
    """All that follows the headline; `left` says what was left out."""
    reference, rows, claims = published(), table.rows, list(table.claims.values())
    listed = [
        comparisons_section(made, reference),
        claims_section(judge(found, claims), claims),
        runs_section(found, rows, reference),
    ]
    for series in dict.fromkeys(rows[name].series for name in found):
        listed.append(series_section(found, rows, made, series))
    if left:
        listed.append(Section("left-out", "Left out", messages=left))
    method = templates().get_template("method.txt.j2").render(confidence=f"{CONFIDENCE:.0%}")
    listed.append(Section("method", "How it is compared", method.split("\n\n")))
    return listed


def readme_pictures(found: Found, made: Sequence[Comparison]) -> dict[str, bytes]:
    """The pictures that a README shows, by file name."""
    pictures = {"bytes.png": figures.png(bytes_figure(found))}
    tested = [c for c in made if c.test]
    if tested:
        kinds = forest_columns(tested)
        lines = [figures.Line(against(c), [getattr(c, kind) for kind in kinds]) for c in tested]
        figure = figures.forest(lines, [KINDS[kind] for kind in kinds], figures.XLABEL)
        pictures["forest.png"] = figures.png(figure)
    return pictures


def write(folder: Path, table: Any, intended: Intended, to: Path) -> list[Path]:
    """report.md, report.html and two pictures of the runs below `folder`, into `to`; the files."""
    found, left = load_all(folder, table.rows)
    for message in left:
        warn(message)
    made = compare_all(found, table.rows)
    values = dict(
        title=f"Runs at {folder.name} scale",
        scale=scale_of(found, intended),
        facts=origins(found),
        headline=headline(found, made),
        sections=sections(found, table, made, left),
    )
    files = {
        name: templates().get_template(f"{name}.j2").render(values).encode()
        for name in ("report.md", "report.html")
    }
    files |= readme_pictures(found, made)
    to.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        tg.write_atomically(to / name, data)
    return [to / name for name in files]


if __name__ == "__main__":
    from records.tools import ablate

    sys.exit(ablate.main(["report", *sys.argv[1:]]))
