r"""Is one run, or one system over several seeds, better than another?

    python records/tools/compare.py logs/first logs/second
    python records/tools/compare.py logs/lab/tiny/T logs/lab/tiny/O \
        --html compare.html
    python records/tools/compare.py 'logs/a_seed*' logs/b_1,logs/b_2 \
        --png compare.png

A side is the folder of a run, that of a row (with seed*/ below it), a pattern
in quotes, or several of these with commas between them. The runs of one side
are seeds of one system. Nothing is trained or scored: what the runs logged is
compared, and the answer says how sure it is. A difference with p < .05 is
called suggested, never shown: whoever compares twenty pairs finds one such by
chance. The tables of `ablate.py report` and against.py are corrected for the
number of their comparisons.
"""

from __future__ import annotations

import argparse
import glob
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import told_if_missing

with told_if_missing(__name__):
    import train_gpt as tg
    from records.tools import figures
    from records.tools.common import run_tool, say
    from records.tools.page import (
        Cell,
        Picture,
        Sheet,
        badge,
        change,
        drawn,
        number,
        plain_table,
        signed,
        spread,
        templates,
        word,
    )
    from records.tools.results import (
        CONFIDENCE,
        KINDS,
        MORE_VALIDATIONS,
        Comparison,
        Measure,
        Reading,
        Result,
        Trace,
        compare,
        evenly,
        load_seeds,
        measure,
        over_steps,
        over_time,
        over_training,
        rises,
        seed_folders,
    )

# ---- 1. The two sides ----------------------------------------------------------------------------


class Side(NamedTuple):
    """The runs of one side, with the name it was given by."""

    name: str
    runs: list[Result]


def folders(text: str) -> list[Path]:
    """The run folders that a side names; InputError if there are none."""
    if not Path(text).exists() and "," in text:
        parts = [part.strip() for part in text.split(",")]
        return [folder for part in parts if part for folder in folders(part)]
    paths = [Path(text)]
    if not paths[0].exists() and glob.has_magic(text):
        paths = [path for path in map(Path, sorted(glob.glob(text))) if path.is_dir()]
    found = []
    for path in paths:
        if not path.is_dir():
            raise tg.InputError(f"{path}: there is no such folder")
        inside = seed_folders(path)
        if not inside and not any((path / n).exists() for n in ("result.json", "train.log")):
            raise tg.InputError(
                f"{path}: neither the folder of a run (result.json) nor that of a row (seed*/)"
            )
        found += inside or [path]
    if not found:
        raise tg.InputError(f"{text}: no folder has such a name")
    return found


def read_side(text: str) -> tuple[Side, list[str]]:
    """A side and what was left out of it; InputError if nothing is left."""
    loaded = load_seeds(folders(text))
    if not loaded.runs:
        raise tg.InputError(f"{text} holds no finished run: {'; '.join(loaded.messages)}")
    return Side(text.rstrip("/"), loaded.runs), loaded.messages


# ---- 2. What differs in how they were made -------------------------------------------------------

# Options that say nothing of the system.
NAMES_ONLY = {"seed", "run_id", "log_dir", "resume", "preset", "tracker"}


def options(runs: Sequence[Result]) -> dict[str, list[str]]:
    """Every option with the values that it has in the runs, as text."""
    return {
        name.upper(): sorted({tg.show(run.config.get(name, "unset")) for run in runs})
        for name in runs[0].config
        if name not in NAMES_ONLY
    }


def options_sheet(ours: Side, theirs: Side) -> Sheet:
    """The options in which the sides differ."""
    a, b = options(ours.runs), options(theirs.runs)
    rows = []
    for name in sorted({*a, *b}):
        values = [side.get(name, ["unset"]) for side in (a, b)]
        if values[0] != values[1]:
            cells = [word(" or ".join(value) or "(empty)") for value in values]
            rows.append({"option": word(name), "A": cells[0], "B": cells[1]})
    return Sheet(rows, "No option differs.")


ORIGINS = dict(  # facts of a run's origin: what follows where they differ
    validation="they were scored on different texts, so the scores do not compare",
    script="the scripts differ",
    device="the devices differ, so times do not compare",
    ranks="the numbers of ranks differ, so times do not compare",
    torch="the versions of PyTorch differ, so times may not compare",
)


def cautions(ours: Side, theirs: Side) -> list[str]:
    """What makes the comparison doubtful or worthless, most serious first."""
    risen = rises({"A": ours.runs, "B": theirs.runs})
    lines = [risen] if risen else []
    for fact, consequence in ORIGINS.items():
        a, b = (sorted({run.origin[fact] for run in side.runs}) for side in (ours, theirs))
        if a != b:
            lines.append(f"{consequence} ({', '.join(a)} against {', '.join(b)})")
    batches = {run.config["train_batch_tokens"] for run in [*ours.runs, *theirs.runs]}
    if len(batches) > 1:
        lines.append("steps are of different numbers of tokens: equal steps are not equal data")
    for name, side in (("A", ours), ("B", theirs)):
        mixed = [option for option, values in options(side.runs).items() if len(values) > 1]
        if mixed:
            lines.append(f"the runs of {name} are of different systems: {', '.join(mixed)} differ")
        over = max(run.total_bytes - run.config["size_limit_bytes"] for run in side.runs)
        if over > 0:
            lines.append(f"{name} is above SIZE_LIMIT_BYTES by {over:,} bytes")
    return lines


# ---- 3. Tables -----------------------------------------------------------------------------------


def measure_row(what: str, m: Measure, digits: int = 4) -> dict[str, Cell]:
    """A line of the main table: both sides, what they differ by, and how sure that is."""
    form = f"+.{digits}f" if digits > 4 else f".{digits}f"  # a Q-gap has a sign
    return {
        "score": word(what),
        "A": spread(m.ours, form),
        "B": spread(m.theirs, form),
        "A - B": change(m._replace(where=""), digits),
        "finding": badge(m),  # the last column, which a reason does not push aside
    }


FURTHER = dict(sliding="over sliding windows", ttt="with test-time training")


def scores_sheet(ours: Side, theirs: Side, made: Comparison) -> Sheet:
    """Scores in every way of reading them."""
    runs = [*ours.runs, *theirs.runs]
    end = made.post.where
    rows = [measure_row(f"{KINDS['post']} ({end})", made.post)]
    for kind, how in FURTHER.items():
        if all(kind in run.further for run in runs):
            scores = Reading(end, [run.further[kind] for run in runs])
            further = measure(ours.runs, theirs.runs, scores)
            rows.append(measure_row(f"after rounding, {how}", further))
    pre = measure(ours.runs, theirs.runs, Reading(end, [run.pre for run in runs]))
    rows.append(measure_row(f"before rounding, as run ({end})", pre))
    for what, equal in ((KINDS["steps"], made.steps), (KINDS["time"], made.time)):
        rows.append(measure_row(f"{what} ({equal.where})" if equal.delta else what, equal))
    rows.append(measure_row(KINDS["gap"], made.gap, digits=5))
    return Sheet(rows)


def cost_row(
    what: str, ours: Side, theirs: Side, of: Callable[[Result], float], form: str
) -> dict[str, Cell]:
    """A figure of both sides, and by how much and how many per cent they differ."""
    a, b = (fmean(of(run) for run in side.runs) for side in (ours, theirs))
    part = f"{100 * (a / b - 1):+.1f} %" if b else ""
    return {
        "cost": word(what),
        "A": number(a, form),
        "B": number(b, form),
        "A - B": number(a - b, f"+{form}", part),
    }


def costs_sheet(ours: Side, theirs: Side) -> Sheet:
    """Bytes, parameters, steps and times."""
    rows = [
        cost_row("bytes, script + artifact", ours, theirs, lambda run: run.total_bytes, ",.0f"),
        cost_row("bytes of the artifact", ours, theirs, lambda run: run.model_bytes, ",.0f"),
        cost_row("parameters", ours, theirs, lambda run: run.parameters, ",.0f"),
        cost_row("steps", ours, theirs, lambda run: run.steps, ",.0f"),
        cost_row("seconds of training", ours, theirs, lambda run: run.seconds, ",.1f"),
        cost_row("milliseconds a step", ours, theirs, lambda run: run.step_ms, ",.1f"),
    ]
    return Sheet(rows)


VALIDATIONS = f"Validations before a learning rate falls are needed: {MORE_VALIDATIONS}."
LOSSES = "Logged losses before a learning rate falls are needed: set TRAIN_LOG_EVERY smaller."


def trace_sheet(trace: Trace, unit: str, most: int, advice: str) -> Sheet:
    """A difference along training, at `most` places at most; what to do where there are none."""
    rows = []
    for i in evenly(len(trace.x), most):
        half = "" if math.isnan(trace.half[i]) else f" ± {trace.half[i]:.4f}"
        place = f"{trace.x[i]:,.0f}" if unit == "step" else f"{trace.x[i]:,.1f}"
        rows.append(
            {
                unit: Cell(place, trace.x[i], classes="n"),
                "A - B": Cell(f"{trace.mean[i]:+.4f}{half}", trace.mean[i], classes="n"),
                "learning rate": word("falls" if trace.x[i] > trace.falls else "full"),
            }
        )
    return Sheet(rows, f"The runs share no {unit} at which both sides can be compared. {advice}")


def runs_sheet(ours: Side, theirs: Side) -> Sheet:
    """Every run."""
    rows = [
        {
            "side": word(name),
            "run": word(str(run.folder)),
            "seed": number(run.seed, "d"),
            "after rounding": number(run.post),
            "before rounding": number(run.pre),
            "steps": number(run.steps, ",d"),
            "bytes, script + artifact": number(run.total_bytes, ",d"),
        }
        for name, side in (("A", ours), ("B", theirs))
        for run in side.runs
    ]
    return Sheet(rows)


# ---- 4. The answer -------------------------------------------------------------------------------


def answer(made: Comparison) -> str:
    """The difference after rounding in one sentence."""
    assert made.post.delta is not None, "both sides have runs"
    mean, half, p = made.post.delta
    if made.test == "one seed":
        return (
            f"After rounding A - B is {mean:+.4f} bits per byte. One seed on a side gives no "
            "interval: whether that is more than chance is not known."
        )
    counts = f"{len(made.post.ours)} and {len(made.post.theirs)} seeds"
    test = f"paired t test over {len(made.post.ours)} seeds"
    if made.test == "Welch":
        test = f"Welch's t test, {counts}"
    told = (
        f"A - B is {mean:+.4f} ± {half:.4f} bits per byte ({CONFIDENCE:.0%} interval, {test}, "
        f"p {p:.2g}"
    )
    if made.post.verdict == "undecided":
        return f"A and B cannot be told apart: after rounding {told})."
    side = "better" if mean < 0 else "worse"
    # How many others were compared, this tool does not know; ablate.py report does.
    return (
        f"Suggested: A is {side} than B. After rounding {told} in this test alone, not corrected "
        "for other comparisons)."
    )


@dataclass
class Section:
    """A table of the page with its pictures."""

    name: str
    title: str
    sheet: Sheet
    figures: list[Picture] = field(default_factory=list)


@dataclass
class Compared:
    """Two sides and all that is known of their difference."""

    ours: Side
    theirs: Side
    made: Comparison
    notes: list[str]

    def sections(self, most: int) -> list[Section]:
        """The tables, with `most` lines for what goes along training."""
        a, b = self.ours.runs, self.theirs.runs
        steps, seconds = over_steps(a, b), over_time(a, b)

        return [
            Section("scores", "Bits per byte", scores_sheet(self.ours, self.theirs, self.made)),
            Section("costs", "Bytes and time", costs_sheet(self.ours, self.theirs)),
            Section(
                "steps",
                "Validation over steps, bpb",
                trace_sheet(steps, "step", most, VALIDATIONS),
            ),
            Section(
                "time",
                "Validation over time, bpb",
                trace_sheet(seconds, "second", most, VALIDATIONS),
            ),
            Section(
                "training",
                "Training loss over steps, nats per token",
                trace_sheet(over_training(a, b), "step", most, LOSSES),
            ),
            Section("options", "Options that differ", options_sheet(self.ours, self.theirs)),
            Section("runs", "Runs", runs_sheet(self.ours, self.theirs)),
        ]

    def facts(self) -> list[str]:
        """What A and B stand for."""
        return [
            f"{name}: {side.name}, {len(side.runs)} seed{'s' if len(side.runs) > 1 else ''}"
            for name, side in (("A", self.ours), ("B", self.theirs))
        ]

    def text(self) -> str:
        """All of it for a terminal."""
        blocks = ["\n".join([*self.facts(), answer(self.made), *(f"! {n}" for n in self.notes)])]
        for section in self.sections(most=8):
            blocks.append(f"{section.title}\n{plain_table(section.sheet)}")
        return "\n\n".join(blocks)

    def page(self) -> str:
        """All of it as one page."""
        sections = {section.name: section for section in self.sections(most=8)}
        for name, panel in zip(("steps", "time", "training"), figures.DIFFERENCES):
            figure = figures.differences(self.ours.runs, self.theirs.runs, [panel])
            if figure is not None:
                sections[name].figures = [drawn(figure, name, CAPTION)]
        return (
            templates()
            .get_template("compare.html.j2")
            .render(
                title="Two systems compared",
                facts=self.facts(),
                answer=signed(answer(self.made)),
                notes=self.notes,
                sections=list(sections.values()),
            )
        )


CAPTION = (
    f"A minus B, negative: A is better. Bands: pointwise {CONFIDENCE:.0%} intervals. Grey: the "
    "learning rate falls. A curve ends where it falls on one side only, as scores then do not "
    "compare."
)


def compare_sides(first: str, second: str) -> Compared:
    """What is known of two sides, by their names; InputError if one has no usable run."""
    (ours, left), (theirs, right) = read_side(first), read_side(second)
    made = compare(ours.runs, theirs.runs, ("A", "B"))
    return Compared(ours, theirs, made, [*cautions(ours, theirs), *left, *right])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    side = "the folder of a run or of a row, a pattern in quotes, or several with commas"
    top.add_argument("a", metavar="A", help=f"One side: {side}.")
    top.add_argument("b", metavar="B", help="The other side, which is subtracted from the first.")
    top.add_argument("--html", type=Path, metavar="FILE", help="Write a page with the pictures.")
    top.add_argument("--png", type=Path, metavar="FILE", help="Write the picture alone.")
    return top


def work(asked: argparse.Namespace) -> int:
    compared = compare_sides(asked.a, asked.b)
    say(compared.text())
    if asked.html:
        tg.write_atomically(asked.html, compared.page().encode())
    if asked.png:
        sides = compared.ours.runs, compared.theirs.runs
        picture = figures.differences(*sides, figures.DIFFERENCES)
        if picture is None:
            raise tg.InputError(f"{asked.png} is not written: the runs share no point to draw")
        tg.write_atomically(asked.png, figures.png(picture))
    return 0


def main() -> int:
    return run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
