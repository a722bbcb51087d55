"""What the logs of the contest's runs say: the kinds of their lines in one table, figures by seed.

Scripts of the field descend from the contest's own and print alike, but not the same. Every line
that counts is named here once: by `SCORE` and `STAGES` if it gives a loss and bits per byte, else
by `KINDS`. Formats: the contest's script of March 2026; PR 549 (legal_ttt); PR 1394 and what
follows it (quantized_ttt, "train_time: 588047ms"); PR 1855 (packed code, total_eval_time).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools import common

# ---- 1. The kinds of lines -----------------------------------------------------------------------

NUMBER = r"((?:\d[\d,]*)?\.?\d+)"
SCORE = re.compile(
    rf"(?P<label>\S.*?)\s+(?:stride:\d+\s+)?val_loss[:=]\s*{NUMBER}\s+val_bpb[:=]\s*{NUMBER}"
    rf"(?:.*?\b(?:eval_time|t):\s*{NUMBER}\s*ms)?"
)


class Stage(NamedTuple):
    """What a line with a loss and bits per byte is the score of, by its label."""

    name: str
    pattern: re.Pattern[str]


STAGES = (  # the first that matches
    Stage("training", re.compile(r"(step:)?\d+/\d+")),
    Stage("before rounding", re.compile(r"(?i).*(pre-?quant|post[-_]?(ema|avg|swa))")),
    Stage("diagnostic", re.compile(r"(?i)diagnostic")),
    Stage("final", re.compile(r"")),
)


class Kind(NamedTuple):
    """A kind of line: which figure it gives, and its pattern, whose first group is the value."""

    figure: str
    pattern: re.Pattern[str]
    unit: float = 1.0  # of the value, in that of the figure


def kind(figure: str, pattern: str, unit: float = 1.0) -> Kind:
    return Kind(figure, re.compile(pattern.replace("NUMBER", NUMBER)), unit)


KINDS = (  # the last line that matches counts, whichever pattern of its figure it is
    kind("train_ms", r"^step:\d+/\d+ .*\btrain_time:NUMBERms"),
    kind("train_ms", r"^stopping_early: \S+ train_time: ?NUMBERms"),
    kind("train_rounded_ms", r"^\d+/\d+ train_loss: .*\btrain_time: NUMBERm\b", 6e4),
    kind("step_ms", r"^step:\d+/\d+ .*\bstep_avg:NUMBERms"),
    kind("steps", r"^(?:step:)?(\d+)/\d+ val_loss"),
    kind("steps", r"^stopping_early: .*\bstep: ?(\d+)"),
    kind("calibration_ms", r"^gptq_calibration .*\btime:NUMBERms"),
    kind("calibration_ms", r"(?i)^gptq:\s*collected .*\bin NUMBERs\b", 1e3),
    kind("calibration_ms", r"(?i)^gptq:.*\bcalibrated .*\bin NUMBERs\b", 1e3),
    kind("calibration_ms", r"(?i)^gptq:budget_check .*\bgptq:NUMBERms"),
    kind("refit_ms", r"^refit .*\btime:NUMBERms"),
    kind("total_eval_ms", r"^total_eval_time:\s*NUMBERs", 1e3),
    kind("code", r"^Code size(?: \(compressed\))?: NUMBER bytes"),
    kind("code_unpacked", r"^Code size \(uncompressed\): NUMBER bytes"),
    kind("model", r"^Serialized model \S+: NUMBER bytes"),
    kind("total", r"^Total submission size \S+: NUMBER bytes"),
    kind("tokens", r"\bval_tokens: ?NUMBER\b"),
    kind("bytes", r"^val_tokens:\d+ val_bytes:NUMBER\b"),
    kind("ranks", r"(?:^|\s)world_size: ?(\d+)"),
)
WORDS = {  # likewise, for texts
    "artifact": re.compile(r"\bartifact_sha256:(\w{64})"),
    "device": re.compile(r"^device:(.*)|\|\s+\d+\s+(NVIDIA \S+(?: \S+)*?)\s{2,}"),
    "torch": re.compile(r"^torch:(\S+)|^Running PyTorch (\S+)"),
    "finished": re.compile(r"^finished:(.*)"),
}
SEED = re.compile(r"(?i)(?:^|\s)seed[:=]\s*(\d+)\b")  # the first line: source may follow it
SEED_IN_NAME = re.compile(r"(?i)(?:seed|(?:^|[_-])s)[_-]?(\d+)")
DISQUALIFIED = re.compile(r"^not a submission: (.*)")
VALIDATED = re.compile(r"^step:(\d+)/\d+ val_loss")
RESUMED = re.compile(r"^resumed from step:")
LOG_NAME = re.compile(r"(?i)log|train|seed|run|eval")  # of a text file that may be a log
# What the end of a log of this project's script has, and that of any other should have.
OURS = (
    *("val_loss", "val_bpb", "pre_bpb", "steps", "train_ms", "step_ms", "eval_ms"),
    *("code", "model", "total", "seed", "ranks"),
)
OUR_WORDS = ("device", "torch", "numpy", "sentencepiece", "config", "artifact")
FIELD = ("train_ms", "eval_ms", "code", "model", "total", "seed", "ranks")

# ---- 2. The figures of a log ---------------------------------------------------------------------


class Score(NamedTuple):
    """A score that a log ends with."""

    label: str  # as the line begins, such as quantized_ttt
    loss: float  # nats per token
    bpb: float
    ms: float | None  # that the evaluation took, where the line says so
    where: str  # file and line

    @property
    def evaluation(self) -> str:
        """The evaluation that it is of: lines for people and exact ones have one."""
        return self.label.removesuffix("_exact")

    @property
    def file(self) -> str:
        return self.where.rpartition(":")[0]


def same(given: Any, true: float) -> bool:
    """Whether a number as written is the true one, rounded to its digits."""
    written = Decimal(str(given))
    if not written.is_finite():
        return False
    unit = Decimal(10) ** min(int(written.as_tuple().exponent), 0)
    return abs(written - Decimal(repr(float(true)))) <= unit / 2 * (1 + Decimal("1e-6"))


@dataclass
class Log:
    """The figures of one seed's log; `where` has the file and line of each."""

    path: Path
    run: common.RunLog
    count: int  # lines of the file
    values: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)  # final ones, in their order
    totals_ms: dict[str, float] = field(default_factory=dict)  # of total_eval_time, by file
    disqualified: list[tuple[str, str]] = field(default_factory=list)  # where, what it says

    @property
    def ours(self) -> bool:
        """Whether this project's script wrote it; it gives more than others do."""
        return "script_sha256" in self.run.versions

    def at(self, name: str) -> str:
        """Where a figure stands; the end of the log for one that is missing."""
        return self.where.get(name, f"{self.path.name}:{self.count}")

    def missing(self) -> list[str]:
        """What a finished log of its kind has and this one lacks."""
        names = OURS if self.ours else FIELD
        words = OUR_WORDS if self.ours else ()
        if "threads" in self.run.versions:  # scripts that say so also say when they are done
            words = (*words, "finished")
        return [name for name in names if name not in self.values] + [
            name for name in words if name not in self.words
        ]

    @property
    def complete(self) -> bool:
        """Whether it reaches its final score, and for this project's script its last line."""
        return "val_bpb" in self.values and not (self.ours and self.missing())

    @property
    def train_and_calibrate_ms(self) -> float:
        """Time that counts as training."""
        trained = self.values.get("train_ms", self.values.get("train_rounded_ms", 0.0))
        return trained + self.calibrated_ms

    @property
    def calibrated_ms(self) -> float:
        """GPTQ's calibration and the refit of what is not rounded: both read training data."""
        return self.values.get("calibration_ms", 0.0) + self.values.get("refit_ms", 0.0)

    @property
    def final_ms(self) -> float | None:
        """Time of the evaluation that gives the final score, where the log has it."""
        chosen = self.words.get("final", "").removesuffix("_exact")
        times = [score.ms for score in self.scores if score.evaluation == chosen]
        return next((ms for ms in times if ms is not None), None)

    @property
    def data(self) -> str:
        """What was scored, as far as the log says it."""
        counts = [
            f"{self.values[name]:,.0f} {name}"
            for name in ("bytes", "tokens")
            if name in self.values
        ]
        path = self.run.settings().get("DATA_PATH")
        parts = [" in ".join(counts)] if counts else []
        if path:
            parts.append(f"DATA_PATH={path}")
        return ", ".join(parts) or "data that the log does not name"

    @property
    def packages(self) -> dict[str, str]:
        """What a run of this project's script needs beside Python, with versions.

        Brotli's is "" in older logs, which do not give it.
        """
        names = ["torch", "numpy", "sentencepiece"]
        if self.settings().get("CODEC") == "brotli":
            names.append("brotli")
        return {name: self.words.get(name, "").split("+")[0] for name in names}

    def settings(self) -> dict[str, str]:
        """The configuration, without what may differ between the runs of one system."""
        settings = self.run.settings()
        return {name: value for name, value in settings.items() if name not in PLACES}

    def choose(self, score: Score) -> None:
        """Makes one of the scores the final one; the evaluations of its file are what it took."""
        self.values |= dict(val_loss=score.loss, val_bpb=score.bpb)
        self.where |= dict(val_loss=score.where, val_bpb=score.where)
        self.words["final"] = score.label
        times = {
            other.evaluation: other
            for other in self.scores
            if other.ms is not None and other.file == score.file
        }
        spent = sum(other.ms for other in times.values() if other.ms is not None)
        told = self.totals_ms.get(score.file, 0.0)
        if times or told:
            self.values["eval_ms"] = max(spent, told)
            self.where["eval_ms"] = list(times.values())[-1].where if times else score.where
        if told:
            self.values["total_eval_ms"] = told

    def add_score(self, score: Score) -> None:
        """A label that comes again with another score is another evaluation; else the same.

        Scripts repeat a score under the name that the contest's script had for it: an alias.
        """
        for known in self.scores:
            pair = known.loss, known.bpb
            other = known.evaluation != score.evaluation and score.ms is None
            if other and pair == (score.loss, score.bpb):
                return
        before = [known for known in self.scores if known.label.split(" #")[0] == score.label]
        equal = [known for known in before if (known.loss, known.bpb) == (score.loss, score.bpb)]
        if equal:
            self.scores.remove(equal[0])
            score = score._replace(label=equal[0].label, ms=score.ms or equal[0].ms)
        elif before:
            score = score._replace(label=f"{score.label} #{len(before) + 1}")
        self.scores.append(score)

    def add_earlier_score(self, score: Score, stage: str) -> None:
        """A score before rounding; of averaged weights, where the log has one, else the last."""
        if stage == "training" and self.words.get("pre_stage") == "before rounding":
            return
        self.words["pre_stage"] = stage
        self.values |= dict(pre_loss=score.loss, pre_bpb=score.bpb)
        self.where |= dict(pre_loss=score.where, pre_bpb=score.where)

    def validated_again(self, line: str) -> bool:
        """Whether a line validates a step for the second time: averaged weights, after calibration.

        This project's script adds the calibration to the time in that line; it is counted already.
        """
        found = VALIDATED.match(line)
        if found is None:
            return False
        again = self.words.get("validated") == found[1]
        self.words["validated"] = found[1]
        return again


PLACES = ("SEED", "RUN_ID", "LOG_DIR", "RESUME", "DATA_PATH", "TOKENIZER_PATH")


def number(text: str) -> float:
    return float(text.replace(",", ""))


def read_line(log: Log, line: str, where: str) -> None:
    """Takes what a line says into the log's figures."""
    if found := SCORE.match(line):
        label, loss, bpb, ms = found.groups()
        stage = next(stage.name for stage in STAGES if stage.pattern.match(label))
        time = None if ms is None else number(ms)
        score = Score(label, number(loss), number(bpb), time, where)
        if stage == "final":
            log.add_score(score)
        elif stage != "diagnostic":
            log.add_earlier_score(score, stage)
    again = log.validated_again(line)
    for figure, pattern, unit in KINDS:
        if again and figure in ("train_ms", "step_ms"):
            continue
        if found := pattern.search(line):
            log.values[figure], log.where[figure] = number(found[1]) * unit, where
    for name, pattern in WORDS.items():
        if found := pattern.search(line):
            log.words[name] = next(text for text in found.groups() if text is not None)
            log.where[name] = where
    if "seed" not in log.values and (found := SEED.search(line)):
        log.values["seed"], log.where["seed"] = number(found[1]), where
    if found := DISQUALIFIED.match(line):
        log.disqualified.append((where, found[1]))
    if RESUMED.match(line):  # what follows its checkpoint is made again
        log.disqualified.clear()
        log.values.pop("calibration_ms", None)
        log.values.pop("refit_ms", None)
        log.words.pop("validated", None)


def read(path: Path) -> Log:
    """The figures of a log. The final score is its last, until a folder's claim chooses another."""
    run = common.read_log(path)
    count = run.first + len(run.lines) - 1
    log = Log(path, run, count if run.lines[-1] else count - 1)
    for index, line in enumerate(run.lines):
        read_line(log, line, f"{path.name}:{run.first + index}")
    for name in ("numpy", "sentencepiece", "brotli"):
        if name in run.versions:
            log.words[name] = run.versions[name]
    if run.config:
        log.words["config"] = "given"
        for index, line in enumerate(run.lines):
            if line.startswith("config:"):
                log.where["config"] = f"{path.name}:{run.first + index}"
    if str(run.config.get("seed", "")).isdigit():
        log.values["seed"], log.where["seed"] = float(run.config["seed"]), log.at("config")
    elif "seed" not in log.values and (named := SEED_IN_NAME.search(path.stem)):
        log.values["seed"] = float(named[1])
    if "total_eval_ms" in log.values:
        log.totals_ms[path.name] = log.values["total_eval_ms"]
    if log.scores:
        log.choose(log.scores[-1])
    return log


# ---- 3. The logs of a folder ---------------------------------------------------------------------


def log_files(folder: Path) -> list[Path]:
    """Files that may be logs. A copy named after no seed, such as train.log, counts once."""
    found = [path for place in (folder, folder / "logs") for path in sorted(place.glob("*.log"))]
    for place in (folder, folder / "logs"):
        for path in sorted(place.glob("*.txt")):
            if LOG_NAME.search(path.stem) and not path.stem.startswith("requirements"):
                found.append(path)
    named = [path for path in found if SEED_IN_NAME.search(path.stem)]
    contents = {path.read_bytes().strip() for path in named}
    for path in found:
        content = path.read_bytes().strip()
        if path not in named and content not in contents:
            named.append(path)
            contents.add(content)
    return named


def read_logs(folder: Path) -> list[Log]:
    """The logs of a folder, by seed. A log that only evaluates belongs to the one that trained."""
    logs = []
    for log in map(read, log_files(folder)):
        if log.scores or log.values.keys() & {"steps", "train_ms"}:
            logs.append(log)
    trained = {log.values.get("seed"): log for log in logs if "train_ms" in log.values}
    kept = []
    for log in logs:
        other = trained.get(log.values.get("seed"))
        if "train_ms" in log.values or other is None:
            kept.append(log)
            continue
        for score in log.scores:
            other.add_score(score)
        other.totals_ms |= log.totals_ms
        other.disqualified += log.disqualified
        if log.scores:
            other.choose(other.scores[-1])
    return sorted(kept, key=lambda log: (log.values.get("seed", -1.0), log.path.name))


class Claim(NamedTuple):
    """The score that a folder's submission.json claims: of each seed, and of all together."""

    seeds: dict[int, Any]
    mean: Any | None


def choose_scores(logs: Sequence[Log], claim: Claim) -> None:
    """Makes the evaluation that the folder claims the final score of its logs.

    It is the one of which most claims are true; later ones come first. Where none is, the last
    score of each log stays what it is.
    """
    scored = [log for log in logs if log.scores]
    best, most = "", 0
    for label in labels(scored):
        found = [score_of(log, label) for log in scored]
        held = sum(
            score is not None and same(claim.seeds[int(log.values["seed"])], score.bpb)
            for log, score in zip(scored, found, strict=True)
            if int(log.values.get("seed", -1)) in claim.seeds
        )
        values = [score.bpb for score in found if score is not None]
        if claim.mean is not None and len(values) == len(scored):
            if same(claim.mean, mean(values)):
                held += 2
            elif any(same(claim.mean, value) for value in values):  # the best seed's, perhaps
                held += 1
        if held > most:
            best, most = label, held
    for log in scored:
        score = score_of(log, best)
        if score is not None:
            log.choose(score)


def labels(logs: Iterable[Log]) -> list[str]:
    """The labels of all final scores, those that come last in the logs first."""
    found = [score.label for log in logs for score in log.scores]
    return list(dict.fromkeys(reversed(found)))


def score_of(log: Log, label: str) -> Score | None:
    return next((score for score in log.scores if score.label == label), None)
