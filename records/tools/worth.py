r"""What a further pass over shared layers is worth, from finished runs.

    python records/tools/worth.py 'logs/lab/pocket_steps/once*' \
        'logs/lab/pocket_steps/core*'
    python records/tools/worth.py --names plain,lanes A,B,C A,B_lanes,C_lanes

Each argument is a group: a run, a row, a pattern in quotes, or several with
commas between them. To the runs of each group is fitted

    L = E + A (N_once + r^phi N_rec)^-a + B D^-b

L is the score before rounding (bits per byte), N_once the weights that one
pass uses, embedding included, N_rec those that r passes use again, D the
tokens trained on. With phi = 1 a pass is worth as much as layers of its own,
with phi = 0 nothing (arXiv 2604.21106 found 0.46). Where all runs saw as many
tokens, B D^-b is a part of E. Intervals are of 95 %: residuals are drawn
again. A run that is in several groups then draws one of the same rank in each,
so that its chance is the same in all. Of n runs and p fitted parameters,
residuals are taken times the root of n / (n - p), as the fit has made them too
small, and what the draws reach to either side of phi times the ratio of
Student's t with n - p degrees of freedom to the normal distribution (2.20 for
six runs and four parameters), as so few residuals tell their own size badly.
For a difference of two groups it is the n - p of the one with fewer.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import told_if_missing

with told_if_missing(__name__):
    import numpy as np
    import torch
    from scipy import stats
    from scipy.optimize import least_squares

    import train_gpt as tg
    from records.tools.common import markdown_table, require_at_least, run_tool, say
    from records.tools.compare import folders
    from records.tools.results import CONFIDENCE, Result, Unusable, load

# ---- 1. What a run is to the formula -------------------------------------------------------------


class Weights(NamedTuple):
    """Matrix elements of a model, the embedding included, by how often a token meets them."""

    once: int
    recurrent: int
    passes: int  # that use the latter


class Observation(NamedTuple):
    """One run."""

    weights: Weights
    tokens: int
    bpb: float  # before rounding
    folder: Path  # which tells it from other runs


@functools.cache
def weights_of(architecture: tg.Architecture, passes: int) -> Weights:
    """Of a model at so many passes; InputError if these use its weights differently often."""
    with torch.device("meta"):
        model = tg.GPT(architecture)
    plan = model.plans[passes]
    by_uses: Counter[int] = Counter()
    for index, uses in Counter(layer.attn for layer in plan).items():
        attn = model.attn[index]
        by_uses[uses] += attn.qkv.weight.numel() + attn.proj.weight.numel()
    for index, uses in Counter(layer.mlp for layer in plan).items():
        mlp = model.mlp[index]
        by_uses[uses] += mlp.fc.weight.numel() + mlp.proj.weight.numel()
    once = by_uses.pop(1, 0) + model.tok_emb.numel()
    if not model.tied:
        once += model.lm_head.numel()
    if len(by_uses) > 1:
        counts = ", ".join(map(str, sorted(by_uses)))
        raise tg.InputError(f"its weights are used {counts} times: the formula has one number r")
    uses, recurrent = next(iter(by_uses.items()), (1, 0))
    return Weights(once, recurrent, uses)


def observe(run: Result) -> Observation:
    """InputError names a run that the formula does not describe."""
    kept = {f.name: run.config[f.name] for f in fields(tg.Architecture)}
    architecture = tg.Architecture(**kept)
    text = run.config["passes_schedule"]
    scheduled = {int(entry.partition(":")[2]) for entry in text.split(",") if entry}
    counts = {*(scheduled or {architecture.num_loops}), tg.scored_mode(architecture).passes}
    try:
        if len(counts) > 1:
            raise tg.InputError(
                f"PASSES_SCHEDULE={text}, EVAL_PASSES={architecture.eval_passes}: the formula has "
                "one number r"
            )
        weights = weights_of(architecture, *counts)
    except tg.InputError as error:
        raise tg.InputError(f"{run.folder}: {error}") from None
    tokens = run.steps * run.config["train_batch_tokens"]
    return Observation(weights, tokens, run.pre, run.folder.resolve())


def read_group(text: str) -> tuple[list[Observation], list[str]]:
    """The finished runs of a group, and messages about what was left out or skipped."""
    found, messages = [], []
    for folder in folders(text):
        try:
            run, skipped = load(folder)
        except Unusable as error:
            messages.append(f"left out: {error}")
            continue
        messages += skipped
        found.append(observe(run))
    return found, messages


# ---- 2. The fit ----------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Parameters of the formula, N and D in units of their geometric means over the runs."""

    floor: float  # E
    model: float  # A
    model_power: float  # a
    phi: float
    data: float = 0.0  # B
    data_power: float = 0.0  # b


LOW = Curve(0.0, 1e-4, 0.02, -1.0, 1e-4, 0.02)
HIGH = Curve(20.0, 20.0, 4.0, 2.0, 20.0, 4.0)
STARTS = [(power, phi) for power in (0.2, 0.7) for phi in (0.1, 0.5, 0.9)]


class Data(NamedTuple):
    """The runs of a group as arrays."""

    once: np.ndarray
    recurrent: np.ndarray
    passes: np.ndarray
    tokens: np.ndarray  # in units of their geometric mean
    bpb: np.ndarray
    unit: float  # geometric mean of all weights, each counted once
    folders: list[Path]

    @property
    def several_tokens(self) -> bool:
        return len(set(self.tokens.round(6))) > 1

    @property
    def parameters(self) -> int:
        """How many of a curve's are fitted."""
        return 6 if self.several_tokens else 4

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the residuals."""
        return len(self.bpb) - self.parameters

    def scores(self, curve: Curve) -> np.ndarray:
        """What the formula says, for every run."""
        worth = (self.once + self.passes**curve.phi * self.recurrent) / self.unit
        score = curve.floor + curve.model * worth**-curve.model_power
        return score + curve.data * self.tokens**-curve.data_power


def gather(observations: Sequence[Observation]) -> Data:
    """InputError where the runs cannot tell what a pass is worth."""
    cells = {(run.weights, run.tokens) for run in observations}
    passes = {run.weights.passes for run in observations}
    sizes = {run.weights.once + run.weights.recurrent for run in observations}
    tokens = np.array([float(run.tokens) for run in observations])
    needed = 6 if len(set(tokens)) > 1 else 4
    for found, least, what in (
        (len(passes), 2, "numbers of passes"),
        (len(sizes), 2, "sizes"),
        (len(cells), needed + 1, "kinds of runs"),
    ):
        if found < least:
            raise tg.InputError(f"there are {found} {what}; the fit needs {least}")
    once, recurrent, times = (
        np.array([float(getattr(run.weights, name)) for run in observations])
        for name in ("once", "recurrent", "passes")
    )
    unit = math.exp(np.log(once + recurrent).mean())
    tokens = tokens / math.exp(np.log(tokens).mean())
    bpb = np.array([run.bpb for run in observations])
    folders = [run.folder for run in observations]
    return Data(once, recurrent, times, tokens, bpb, unit, folders)


def solve(data: Data, bpb: np.ndarray, start: Curve) -> tuple[Curve, float]:
    """The curve nearest to the scores `bpb`, from a start, and half its squared error."""
    count = data.parameters

    def errors(values: np.ndarray) -> np.ndarray:
        return data.scores(Curve(*values)) - bpb

    found = least_squares(
        errors, start[:count], bounds=(LOW[:count], HIGH[:count]), x_scale="jac", max_nfev=2000
    )
    return Curve(*found.x), found.cost


def fit(data: Data) -> Curve:
    """The best of several starts."""
    low, spread = data.bpb.min(), float(np.ptp(data.bpb)) + 1e-3
    starts = [Curve(0.7 * low, spread, power, phi, spread, power) for power, phi in STARTS]
    solved = [solve(data, data.bpb, start) for start in starts]
    return min(solved, key=lambda found: found[1])[0]


def draw(groups: Sequence[Data], times: int) -> list[np.ndarray]:
    """For each group numbers from 0 to 1, [times, runs]; a run has the same ones in all groups."""
    every = list(dict.fromkeys(folder for data in groups for folder in data.folders))
    drawn = np.random.default_rng(0).random((times, len(every)))
    return [drawn[:, [every.index(folder) for folder in data.folders]] for data in groups]


def resample(data: Data, curve: Curve, ranks: np.ndarray) -> np.ndarray:
    """phi of fits to the curve with its residuals drawn again, [times], by `draw`'s numbers.

    A number is the share of the group's residuals that are below the one that a run is given.
    A fit takes as many degrees of freedom as it has parameters, so its residuals are too small.
    """
    expected = data.scores(curve)
    residuals = np.sort(data.bpb - expected)
    residuals *= math.sqrt(len(residuals) / data.freedom)
    drawn = residuals[(ranks * len(residuals)).astype(int)]
    return np.array([solve(data, expected + noise, curve)[0].phi for noise in drawn])


# ---- 3. What is told -----------------------------------------------------------------------------


class Worth(NamedTuple):
    """What a group says."""

    name: str
    curve: Curve
    phis: np.ndarray  # of fits to scores drawn again
    freedom: int


class Interval(NamedTuple):
    low: float
    high: float

    def __str__(self) -> str:
        return f"({self.low:.2f} to {self.high:.2f})"


def interval(found: float, drawn: np.ndarray, freedom: int) -> Interval:
    """Of a figure, by those of fits to scores drawn again.

    Their quantiles hold where the size of the chance is known. Here it is that of the residuals, so
    both sides are as much longer as Student's are than the normal distribution's.
    """
    tail = (1 + CONFIDENCE) / 2
    longer = float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail))
    low, high = np.quantile(drawn, [1 - tail, tail])
    return Interval(found - longer * (found - low), found + longer * (high - found))


def describe(worth: Worth, data: Data) -> list[str]:
    """Of a group: its phi, the worth of passes, and every kind of run beside the formula."""
    curve = worth.curve
    passes = ", ".join(f"{r} passes {r**curve.phi:.2f}" for r in (2, 3))
    powers = f"E {curve.floor:.3f}, A {curve.model:.3f}, a {curve.model_power:.2f}"
    if data.several_tokens:
        powers += f", B {curve.data:.3f}, b {curve.data_power:.2f}"
    rms = math.sqrt(np.mean((data.bpb - data.scores(curve)) ** 2))
    cells = zip(data.once, data.recurrent, data.passes, data.tokens, data.scores(curve))
    kinds: dict[tuple[float, ...], list[float]] = {}
    for cell, bpb in zip(cells, data.bpb):
        kinds.setdefault(tuple(map(float, cell)), []).append(float(bpb))
    rows = [
        [f"{once:,.0f}", f"{recurrent:,.0f}", f"{r:.0f}", f"{tokens:.2f}", len(bpbs)]
        + [f"{np.mean(bpbs):.4f}", f"{said:.4f}"]
        for (once, recurrent, r, tokens, said), bpbs in kinds.items()
    ]
    head = ["N_once", "N_rec", "r", "tokens / mean", "runs", "bpb", "formula"]
    return [
        f"{worth.name}: phi {curve.phi:.2f} {interval(curve.phi, worth.phis, worth.freedom)}; "
        f"{passes} times their layers",
        f"{powers}; residuals {rms:.4f} bpb",
        "",
        *markdown_table(head, rows),
        "",
    ]


def gathered(name: str, group: str) -> Data:
    """The runs of a named group; InputError where they cannot tell what a pass is worth."""
    observations, messages = read_group(group)
    for message in messages:
        say(message)
    try:
        return gather(observations)
    except tg.InputError as error:
        raise tg.InputError(f"{name}: {error}") from None


def work(options: argparse.Namespace) -> int:
    require_at_least(options, resamples=1)
    names = options.names.split(",") if options.names else list(options.groups)
    if len(names) != len(options.groups):
        raise tg.InputError(f"--names has {len(names)} names for {len(options.groups)} groups")
    groups = [gathered(name, group) for name, group in zip(names, options.groups)]
    found = []
    for name, data, ranks in zip(names, groups, draw(groups, options.resamples)):
        curve = fit(data)
        found.append(Worth(name, curve, resample(data, curve, ranks), data.freedom))
        say("\n".join(describe(found[-1], data)))
    for worth in found[1:]:
        first = found[0]
        change = worth.curve.phi - first.curve.phi
        told = interval(change, worth.phis - first.phis, min(worth.freedom, first.freedom))
        say(f"phi of {worth.name} less that of {first.name}: {change:+.2f} {told}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("groups", nargs="+", help="Folders of runs or rows, joined by commas, or a pattern.")
    add("--names", default="", help="Names of the groups, joined by commas (default: as given).")
    add(
        "--resamples",
        type=int,
        default=400,
        help="Fits behind an interval (default: %(default)s).",
    )
    return top


def main() -> int:
    return run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
