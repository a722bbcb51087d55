"""Tables, figures and templates of the pages that report.py and compare.py write."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from records.tools.figures import svg
from records.tools.results import Measure, nan

# ---- 1. Tables -----------------------------------------------------------------------------------


def signed(text: str) -> str:
    """Text with a minus sign where a hyphen stands before a figure or a blank."""
    return re.sub(r"-(?=[\d ])", "\u2212", text)


class Cell(NamedTuple):
    """What is shown, what it is sorted by, a second line and classes of the style sheet."""

    text: str
    key: float | str = ""
    note: str = ""
    classes: str = ""

    @property
    def sort_key(self) -> str:
        """Empty where there is no figure, so that the row is sorted last."""
        if isinstance(self.key, float) and math.isnan(self.key):
            return ""
        return str(self.key)

    @property
    def shown(self) -> Cell:
        """The cell as a page shows it: figures with a minus sign."""
        if isinstance(self.key, str) or math.isnan(self.key):
            return self
        return self._replace(text=signed(self.text), note=signed(self.note))

    @property
    def reason(self) -> str:
        """Why there is no figure; empty where there is one."""
        return "" if self.text else self.note

    @property
    def plain(self) -> str:
        """Both lines as one, for a table in Markdown."""
        text = " ".join(part for part in (self.text, self.note and f"({self.note})") if part)
        return text.replace("|", "\\|")


def told_once(row: dict[str, Cell]) -> dict[str, Cell]:
    """A row of a table in which a reason stands in the first cell only of those that have it."""
    told: set[str] = set()
    made = {}
    for head, cell in row.items():
        made[head] = Cell("", nan) if cell.reason in told else cell
        if cell.reason:
            told.add(cell.reason)
    return made


class Sheet(NamedTuple):
    """A table, and the sentence that stands in its place if it is empty."""

    rows: list[dict[str, Cell]]  # head of a column: cell
    empty: str = ""

    @property
    def head(self) -> dict[str, bool]:
        """The heads, and whether figures stand below them, which are set to the right."""
        heads = list(self.rows[0]) if self.rows else []
        return {head: any("n" in row[head].classes.split() for row in self.rows) for head in heads}


def word(text: str, note: str = "") -> Cell:
    return Cell(text, text, note)


def number(value: float, form: str = ".4f", note: str = "") -> Cell:
    """A figure; nothing where it is not known."""
    if math.isnan(value):
        return Cell("", nan)
    return Cell(format(value, form), value, note, "n")


def spread(values: Sequence[float], form: str = ".4f", note: str = "") -> Cell:
    """Mean and standard deviation; nothing where one of them is not known."""
    if not values or any(math.isnan(value) for value in values):
        return Cell("", nan)
    deviation = f" ± {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
    return Cell(format(fmean(values), form) + deviation, fmean(values), note, "n")


def tone(measure: Measure) -> str:
    """Classes of the style sheet: the direction of a difference and how sure it is."""
    if measure.delta is None:
        return "none"
    return f"{'better' if measure.delta.mean < 0 else 'worse'} {measure.verdict.replace(' ', '-')}"


def finding(measure: Measure) -> str:
    """What is known of a difference, in two words or the reason why there is none."""
    if measure.delta is None:
        return measure.where
    if measure.verdict in ("undecided", "one seed"):
        return measure.verdict
    return f"{'better' if measure.delta.mean < 0 else 'worse'}, {measure.verdict}"


def badge(measure: Measure, note: str = "") -> Cell:
    """The finding; sorted from surely better to surely worse."""
    if measure.delta is None:
        return Cell("", nan, measure.where)
    mean, _, p = measure.delta
    key = math.copysign(0.0 if math.isnan(p) else 1 - p, mean)
    return Cell(finding(measure), key, note, f"badge {tone(measure)}")


def change(measure: Measure, digits: int = 4, with_holm: bool = False, at: str = "") -> Cell:
    """A difference with its confidence interval; below it p, and where it was read."""
    if measure.delta is None:
        return Cell("", nan, measure.where)
    mean, half, p = measure.delta
    interval = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    notes = [] if math.isnan(p) else [f"p {p:.2g}"]
    if with_holm and not math.isnan(measure.holm):
        notes.append(f"Holm {measure.holm:.2g}")
    if at:
        notes.append(f"at {at}")
    return Cell(f"{mean:+.{digits}f}{interval}", mean, ", ".join(notes), f"n {tone(measure)}")


def plain_table(sheet: Sheet) -> str:
    """A table for a terminal: words to the left, figures to the right."""
    if not sheet.rows:
        return sheet.empty
    lines = [[cell.plain for cell in row.values()] for row in sheet.rows]
    columns = [[head, *cells] for head, cells in zip(sheet.head, zip(*lines))]
    padded = []
    for cells, right in zip(columns, sheet.head.values()):
        width = max(map(len, cells))
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded))


# ---- 2. Pages ------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A figure in a page, and the same for the width of a phone, where it needs another."""

    caption: str
    svg: Markup
    narrow: Markup = Markup("")


def drawn(figure: Figure, name: str, caption: str, narrow: Figure | None = None) -> Picture:
    """A figure for a page; names differ within one."""
    small = Markup("") if narrow is None else Markup(svg(narrow, f"{name}-narrow"))
    return Picture(caption, Markup(svg(figure, name)), small)


def templates() -> Environment:
    """The page templates; what they are given is escaped in HTML and left alone in Markdown."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
