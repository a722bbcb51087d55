r"""Many rows against one of them, with one spread of chance for all.

    python records/tools/against.py records/pocket_narrow/frontier \
        'records/pocket_narrow/*' --without frontier_set,frontier_set_identity
    python records/tools/against.py --png forest.png A 'B*'
    python records/tools/against.py A 'B*' --lengths longer/A shorter/A

Arguments are folders of rows (with seed*/ below them) or patterns in quotes.
The first is the baseline. To the scores, in bits per byte, is fitted

    score = row + seed + chance

where chance has one spread in all rows (randomised blocks, Fisher 1935). So
two seeds a row are enough for intervals: thirteen rows leave twelve degrees of
freedom, two seeds of two rows one. Where some rows scatter more than others,
compare them apart (--without). ± is half of a 95 % interval, * is p < .01
after Holm over the rows of its column. Runs of one seed whose scores before
rounding are equal are one training that was rounded in several ways. It counts
once, in the row that trained it: the others have no part in the spread and its
degrees of freedom, and a row that has no training of its own has no difference
before rounding. After rounding less chance is in the differences of such rows
than ± says. The picture (--png) has the same differences; coloured is p < .05
after Holm.

Rows that share a time make different numbers of steps. With runs of the
baseline over other numbers of steps (--lengths), each row is also compared
with what the baseline has at as many: a straight line in the logarithm of
steps between its neighbours, taken to have the chance of one run. A row of
which any run has more steps than the longest or fewer than the shortest has
no such figure.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import told_if_missing

with told_if_missing(__name__):
    import numpy as np
    from scipy import stats

    import train_gpt as tg
    from records.tools import figures
    from records.tools.ablate import TABLE, read_table
    from records.tools.common import listed, markdown_table, run_tool, say, warn
    from records.tools.compare import folders
    from records.tools.results import CONFIDENCE, Delta, Measure, Result, Unusable, holm, load

COUNTS = 0.01  # p, after Holm, below which a difference is one

# ---- 1. Runs -------------------------------------------------------------------------------------

Rows = Mapping[str, Mapping[int, Result]]  # runs by row and seed


def read_rows(sides: Iterable[str]) -> dict[str, dict[int, Result]]:
    """The finished runs of all sides; what cannot be read is told and left out.

    InputError for two folders of one row and seed, such as of two scales.
    """
    rows: dict[str, dict[int, Result]] = {}
    for folder in dict.fromkeys(path for side in sides for path in folders(side)):
        try:
            run, skipped = load(folder)
        except Unusable as error:
            warn(f"left out: {error}")
            continue
        for message in skipped:
            warn(message)
        seeds = rows.setdefault(folder.resolve().parent.name, {})
        if run.seed in seeds:
            raise tg.InputError(f"{seeds[run.seed].folder} and {folder} are one row and one seed")
        seeds[run.seed] = run
    return rows


def read_lengths(sides: Iterable[str], baseline: str) -> list[Result]:
    """Finished runs of the baseline over other numbers of steps; InputError for other rows."""
    runs = [run for side in sides for row in read_rows([side]).values() for run in row.values()]
    for run in runs:
        if run.row != baseline:
            raise tg.InputError(f"--lengths {run.folder} is of {run.row}, not of {baseline}")
    return runs


def only_rounds(row: Mapping[int, Result], baseline: Mapping[int, Result]) -> bool:
    """Whether the runs of a row round the weights of the baseline's."""
    return all(s in baseline and row[s].pre == baseline[s].pre for s in row)


Cell = tuple[str, int]  # row and seed, which name a run


def trainings(rows: Rows, baseline: str) -> list[Cell]:
    """The runs that were trained; of those that only round one's weights again, none.

    They have its score before rounding. Where several have, it is the baseline's, or else that of
    the first that was not resumed from another's checkpoint.
    """
    cells = [(name, seed) for name in rows for seed in rows[name]]
    by_origin = sorted(
        cells, key=lambda cell: (cell[0] != baseline, bool(rows[cell[0]][cell[1]].config["resume"]))
    )
    first: dict[tuple[int, float], Cell] = {}
    for name, seed in by_origin:
        first.setdefault((seed, rows[name][seed].pre), (name, seed))
    own = {*first.values()}
    return [cell for cell in cells if cell in own]


# ---- 2. The fit ----------------------------------------------------------------------------------


class Fit(NamedTuple):
    """Differences from the baseline by row, and the chance that they were judged by."""

    changes: dict[str, Delta]
    spread: float  # standard deviation of a run's chance; nan: one seed a row
    freedom: int  # degrees of freedom that it rests on


def design(cells: Sequence[Cell]) -> np.ndarray:
    """A line for each (row, seed): 1 in the column of its row and in that of its seed."""
    columns: list[str | int] = [*dict.fromkeys(row for row, _ in cells)]
    # All columns of seeds would sum to all those of rows, so the first seed has none.
    columns += sorted({seed for _, seed in cells})[1:]
    return np.array([[float(column in cell) for column in columns] for cell in cells])


def tested(change: float, error: float, freedom: int) -> Delta:
    """A difference with the standard error that it is judged by; nan: one seed a row."""
    student = stats.t(max(freedom, 1))
    half = error * student.ppf((1 + CONFIDENCE) / 2)
    p = 2 * student.sf(abs(change) / error) if error > 0 else math.nan
    return Delta(change, half, float(p))


def fit(scores: Mapping[Cell, float], baseline: str, judged_by: Fit | None = None) -> Fit:
    """score = row + seed + chance by least squares; InputError if a row shares no seed.

    Its differences are judged by its own chance, or by that of another fit.
    """
    cells = list(scores)
    rows = list(dict.fromkeys(row for row, _ in cells))
    x, y = design(cells), np.array(list(scores.values()))
    coefficients, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    if rank < x.shape[1]:
        raise tg.InputError("some rows share no seed with the others, so they cannot be compared")
    freedom = len(y) - int(rank)
    residual = y - x @ coefficients
    spread = math.sqrt(residual @ residual / freedom) if freedom else math.nan
    if judged_by is not None:
        spread, freedom = judged_by.spread, judged_by.freedom
    covariance = np.linalg.inv(x.T @ x)
    changes = {}
    for row in rows:
        if row == baseline:
            continue
        contrast = np.zeros(x.shape[1])
        contrast[rows.index(row)], contrast[rows.index(baseline)] = 1, -1
        error = spread * math.sqrt(contrast @ covariance @ contrast)
        changes[row] = tested(float(contrast @ coefficients), error, freedom)
    return Fit(changes, spread, freedom)


def rounded_again(row: Mapping[int, Result], baseline: Mapping[int, Result], made: Fit) -> Delta:
    """The difference after rounding of a row that rounds the baseline's weights."""
    change = fmean(run.post - baseline[seed].post for seed, run in row.items())
    return tested(change, made.spread * math.sqrt(2 / len(row)), made.freedom)


class Judged(NamedTuple):
    """All rows against the baseline: both scores, and the second at equal steps if asked."""

    before: Fit
    after: Fit
    equal_steps: Fit | None = None

    def fits(self) -> list[Fit]:
        return [made for made in self if made is not None]


def by_length(runs: Iterable[Result]) -> dict[int, float]:
    """Mean score after rounding by number of steps, ascending."""
    scores: dict[int, list[float]] = {}
    for run in runs:
        scores.setdefault(run.steps, []).append(run.post)
    return {steps: fmean(scores[steps]) for steps in sorted(scores)}


def at_equal_steps(rows: Rows, after: Fit, lengths: Mapping[int, float]) -> Fit:
    """Differences of `after`'s rows from the score that `lengths` have at their steps.

    A row of which one run is longer or shorter than all of them has none.
    """
    changes = {}
    for name in after.changes:
        runs = rows[name].values()
        if all(min(lengths) <= run.steps <= max(lengths) for run in runs):
            known = np.log(list(lengths)), list(lengths.values())
            change = fmean(run.post - np.interp(math.log(run.steps), *known) for run in runs)
            error = after.spread * math.sqrt(1 / len(runs) + 1)
            changes[name] = tested(float(change), error, after.freedom)
    return after._replace(changes=by_holm(changes))


def judge(rows: Rows, baseline: str, lengths: Sequence[Result] = ()) -> Judged:
    """Differences before and after rounding, and at equal steps, p by Holm over those of a kind."""
    own = trainings(rows, baseline)
    before = fit({(row, seed): rows[row][seed].pre for row, seed in own}, baseline)
    after = fit({(row, seed): rows[row][seed].post for row, seed in own}, baseline)
    after.changes.update(changes_of_copies(rows, baseline, own, after))
    before, after = (made._replace(changes=by_holm(made.changes)) for made in (before, after))
    known = by_length([*rows[baseline].values(), *lengths])
    return Judged(before, after, at_equal_steps(rows, after, known) if lengths else None)


def changes_of_copies(
    rows: Rows, baseline: str, own: Sequence[Cell], after: Fit
) -> dict[str, Delta]:
    """Differences after rounding of rows that round another's weights again with some seed.

    Their runs all have a part in the difference, none of these in the spread that it is judged by.
    """
    scores = {(name, seed): run.post for name, row in rows.items() for seed, run in row.items()}
    copied = {name for name, seed in scores.keys() - {*own}}
    changes = fit(scores, baseline, after).changes
    for name in copied:
        if only_rounds(rows[name], rows[baseline]):
            changes[name] = rounded_again(rows[name], rows[baseline], after)
    return {name: change for name, change in changes.items() if name in copied}


def by_holm(changes: Mapping[str, Delta]) -> dict[str, Delta]:
    """The same differences with p adjusted for their number."""
    ps = holm([change.p for change in changes.values()])
    return {name: change._replace(p=p) for (name, change), p in zip(changes.items(), ps)}


# ---- 3. The table --------------------------------------------------------------------------------


def told(change: Delta | None) -> str:
    """+0.0133 ± 0.0021*, or nothing."""
    if change is None:
        return ""
    half = "" if math.isnan(change.half) else f" ± {change.half:.4f}"
    return f"{change.mean:+.4f}{half}{'*' if change.p < COUNTS else ''}"


def line(name: str, runs: Mapping[int, Result], judged: Judged, what: str) -> list[str]:
    """A row's means and differences."""
    before = f"{fmean(run.pre for run in runs.values()):.4f}"
    after = f"{fmean(run.post for run in runs.values()):.4f}"
    sizes = sorted(run.model_bytes for run in runs.values())
    spread = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    changes = [told(made.changes.get(name)) for made in judged.fits()]
    return [f"`{name}`", what, str(len(runs)), before, after, *changes, spread]


def ordered(judged: Judged) -> list[str]:
    """The rows that are compared with the baseline, the worst after rounding first."""
    last = judged.after.changes
    return sorted(last, key=lambda name: -last[name].mean)


def words() -> dict[str, str]:
    """What the rows are, of the table of runs."""
    return {name: row.what for name, row in read_table(TABLE).rows.items()}


def table(rows: Rows, baseline: str, judged: Judged) -> list[str]:
    """All rows, the worst first, and what their intervals rest on."""
    what = words()
    order = [baseline, *ordered(judged)]
    lines = [line(name, rows[name], judged, what.get(name, "")) for name in order]
    head = ["row", "what", "seeds", "bpb before rounding", "after"]
    head += [f"against `{baseline}`, before", "after"]
    head += ["at equal steps"] if judged.equal_steps else []
    head += ["artifact, bytes"]
    return [*markdown_table(head, lines), "", footnote(judged)]


def footnote(judged: Judged) -> str:
    """What the intervals rest on."""
    before, after = judged.before, judged.after
    if not after.freedom:
        return "No two rows share two seeds, so there are no intervals."
    return (
        f"Spread of a run's chance: {before.spread:.4f} before rounding, {after.spread:.4f} after "
        f"it ({after.freedom} degrees of freedom). *: p < {COUNTS:g} after Holm over "
        f"{counted(judged)}."
    )


def counted(judged: Judged) -> str:
    """How many rows p is adjusted for, column by column where they are not as many in all."""
    rows = [len(made.changes) for made in judged.fits()]
    if len({*rows}) == 1:
        return f"{rows[0]} row{'s' if rows[0] > 1 else ''}"
    columns = "before rounding", "after it", "at equal steps"
    parts = [f"{count} {column}" for count, column in zip(rows, columns)]
    return f"the rows of its column: {', '.join(parts)}"


def forest_lines(judged: Judged) -> list[figures.Line]:
    """What differs from the baseline, the worst first, before rounding and after it."""
    what, lines = words(), []
    for name in ordered(judged):
        label = f"{name}: {what[name]}" if name in what else name
        changes = [made.changes.get(name) for made in judged.fits()]
        # Their p have been adjusted for the number of rows.
        measures = [Measure("", [], [], c, c.p if c else math.nan) for c in changes]
        lines.append(figures.Line("\n".join(textwrap.wrap(label, 44)), measures))
    return lines


def picture(baseline: str, judged: Judged) -> bytes:
    """The forest plot as PNG."""
    titles = [f"against {baseline}, {when} rounding" for when in ("before", "after")]
    titles += ["the second at equal steps"] if judged.equal_steps else []
    return figures.png(figures.forest(forest_lines(judged), titles, figures.XLABEL))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    side = "a row's folder, or a pattern in quotes"
    top.add_argument("baseline", help=f"What all are compared with: {side}.")
    top.add_argument("rows", nargs="+", help=f"What is compared: {side}.")
    top.add_argument(
        "--without", default="", help="Rows to leave out, with commas between (default: none)."
    )
    top.add_argument(
        "--lengths",
        nargs="+",
        default=[],
        metavar="ROW",
        help=f"Runs of the baseline over other numbers of steps: {side}.",
    )
    top.add_argument("--png", type=Path, metavar="FILE", help="Write a forest plot, too.")
    return top


def work(asked: argparse.Namespace) -> int:
    own = read_rows([asked.baseline])
    if len(own) != 1:
        raise tg.InputError(f"{asked.baseline}: {len(own)} rows; the baseline is one row")
    [baseline] = own
    rows = read_rows([asked.baseline, *asked.rows])
    for name in filter(None, asked.without.split(",")):
        others = sorted(rows.keys() - {baseline})
        if name not in others:
            raise tg.InputError(f"--without {name}: of {listed(others)} some can be left out")
        del rows[name]
    if len(rows) < 2:
        raise tg.InputError("there is no row besides the baseline")
    judged = judge(rows, baseline, read_lengths(asked.lengths, baseline))
    say("\n".join(table(rows, baseline, judged)))
    if asked.png:
        tg.write_atomically(asked.png, picture(baseline, judged))
    return 0


def main() -> int:
    return run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
