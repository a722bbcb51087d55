"""What is wrong with a submission folder: its files, logs, numbers and claims against one another.

Folders of others have fewer keys and other lines: what is there must be true, what the rules ask
for must be there, and what could not be found is told without being a fault.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg
from records.tools import common, fields, logs, packing
from records.tools.fields import spread
from records.tools.logs import Log, same
from records.tools.packages import told_if_missing

SIZE_LIMIT = 16_000_000  # bytes, script + artifact, decimal
TIME_LIMIT = 600.0  # seconds of training, and of evaluation, in the record track
OVERRUN = 0.1  # seconds: 19 of the 46 merged records train for 600.0 to 600.1 s
MARGIN, LEVEL = 0.005, 0.01  # nats by which a record must win, and p of the test that it does
TRACKS = ("10min_16mb", "non_record_16mb")
GPU_PACKAGES = ("flash_attn", "flash_attn_interface", "flash_attn_3", "triton")
NOWHERE = "no-such-artifact"
FIGURES, END = "<!-- figures: parsed from the logs -->", "<!-- end of figures -->"
SCORE_COLUMN = re.compile(r"(?i)bpb|bpp|loss|nats|score")
OTHER_COLUMN = re.compile(r"(?i)delta|gain|diff|std|\bvs\b|improv|Δ")
SCORE_IN_TEXT = re.compile(r"(?<![\d.,+\-−–±~Δ])\d\.\d{3,}(?![\d.])")  # a signed one is a delta

# ---- 1. Findings and folders ---------------------------------------------------------------------


class Finding(NamedTuple):
    """What was found, and in which line. A note is no fault."""

    where: str
    what: str
    level: str = "FAIL"

    def __str__(self) -> str:
        return f"{self.level} {self.where}: {self.what}"


def note(where: str, what: str) -> Finding:
    return Finding(where, what, "note")


def faults(found: Sequence[Finding]) -> list[Finding]:
    """The findings that are more than notes."""
    return [finding for finding in found if finding.level == "FAIL"]


class Folder:
    """A submission folder, read once; the final score of its logs is the one that it claims."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise tg.InputError(f"{path} is not a folder")
        self.path = path
        self.json = self.text("submission.json")
        self.readme = self.text("README.md")
        self.scripts = sorted(path.glob("train_gpt*.py"))
        self.wrong: list[fields.Fault] = []  # fields of another type or range
        self.broken = ""  # why submission.json cannot be read
        self.data = self.load()
        self.logs = logs.read_logs(path)
        logs.choose_scores(self.logs, self.claim())

    def text(self, name: str) -> str:
        file = self.path / name
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def load(self) -> dict[str, Any]:
        """submission.json with its decimals as written, without what is not of its type."""
        try:
            data = json.loads(self.json, parse_float=Decimal, parse_constant=Decimal)
        except (ValueError, RecursionError) as error:
            self.broken = str(error)
            return {}
        if not isinstance(data, dict):
            self.broken = "it is not an object"
            return {}
        return fields.sift_submission(data, self.wrong)

    def claim(self) -> logs.Claim:
        """The scores that submission.json claims."""
        results = self.data.get("seed_results", {})
        seeds = {seed: entry["val_bpb"] for seed, entry in results.items() if "val_bpb" in entry}
        return logs.Claim(seeds, self.data.get("val_bpb", self.data.get("mean_val_bpb")))

    @cached_property
    def complete(self) -> list[Log]:
        """Logs that reach their final score."""
        return [log for log in self.logs if log.complete]

    @property
    def ours(self) -> bool:
        """Whether this project's script wrote the logs."""
        return bool(self.logs) and all(log.ours for log in self.logs)

    @property
    def record(self) -> bool:
        return self.path.resolve().parent.name == "track_10min_16mb"

    def requires(self, package: str) -> bool:
        """Whether requirements.txt names a package, in whichever of its spellings."""
        declared = self.text("requirements.txt").replace("-", "_")
        return re.search(rf"(?mi)^{package}\b", declared) is not None

    def at(self, *keys: str) -> str:
        """Where in submission.json a key stands."""
        position = 0
        for key in keys:
            position = max(self.json.find(f'"{key}"', position), position)
        return f"submission.json:{self.json.count(chr(10), 0, position) + 1}"


# ---- 2. Files and logs ---------------------------------------------------------------------------


def check_files(f: Folder) -> Iterator[Finding]:
    for name in ("README.md", "submission.json"):
        if not f.text(name):
            yield Finding(name, "is not there")
    if f.json and f.broken:
        yield Finding("submission.json", f"cannot be read: {f.broken}")
    if not f.scripts:
        yield Finding("train_gpt.py", "is not there")
    if not f.logs:
        yield Finding("*.log", "no training log is there")
    for log in f.logs:
        missing = log.missing()
        if not log.complete:
            lacks = ", ".join(missing) if log.ours else "a final score"
            yield Finding(f"{log.path.name}:{log.count}", f"the log ends without {lacks}")
        elif missing:
            yield note(log.path.name, f"gives no {', '.join(missing)}: that was not checked")


def check_verdict(f: Folder) -> Iterator[Finding]:
    """What a script says against its own run counts."""
    for log in f.logs:
        for where, reason in log.disqualified:
            yield Finding(where, f"the script itself says that it is not a submission: {reason}")


def check_requirements(f: Folder) -> Iterator[Finding]:
    """Every package that runs of this project's script used is named."""
    needed = {name: log for log in f.logs if log.ours for name in log.packages}
    for name, log in needed.items():
        if not f.requires(name):
            yield Finding("requirements.txt", f"does not name {name}, which {log.path.name} used")


def check_track(f: Folder) -> Iterator[Finding]:
    parent, given = f.path.resolve().parent.name, f.data.get("track", "").replace("-", "_")
    tracks = [f"track_{track}" for track in TRACKS]
    if parent not in tracks:
        yield Finding(f.path.name, f"lies in {parent}, not in {' or '.join(tracks)}")
    elif given and given.removeprefix("track_") != parent.removeprefix("track_"):
        yield Finding(f.at("track"), f"track {given}, but the folder lies in {parent}")
    if not f.record:
        return
    for log in f.complete:
        device, ranks = log.words.get("device"), log.values.get("ranks")
        if device is None or ranks is None:
            yield note(log.path.name, "does not say what it ran on; the record track is 8xH100")
        elif ranks != 8 or "H100" not in device:
            what = f"ran on {ranks:.0f} x {device}; the record track is 8xH100"
            yield Finding(log.at("device"), what)


def check_data(f: Folder) -> Iterator[Finding]:
    """Scores of another text than FineWeb's validation set compare with no other submission's."""
    for log in f.complete:
        size = log.values.get("bytes")
        if size is not None and abs(size - common.FINEWEB_BYTES) > common.FINEWEB_SPREAD:
            what = (
                f"scored on {log.data}; a submission needs the score on FineWeb's validation set, "
                f"which is {common.FINEWEB_BYTES:,} bytes (data/README.md)"
            )
            yield Finding(log.at("bytes"), what, "FAIL" if f.record else "note")


def training_time(log: Log) -> str:
    """The time that counts as training, for people."""
    trained, calibrated = log.values.get("train_ms"), log.calibrated_ms
    total = f"{log.train_and_calibrate_ms / 1e3:.3f} s"
    if trained is None:
        return f"training took {total}, to 0.1 min"
    if not calibrated:
        return f"training took {total}"
    parts = f"{trained / 1e3:.3f} + {calibrated / 1e3:.3f}"
    return f"training and calibration took {total} ({parts})"


def check_times(f: Folder) -> Iterator[Finding]:
    """600 s of training and of evaluation in the record track, all parts of each together."""
    if not f.record:
        return
    for log in f.complete:
        seconds, at = log.train_and_calibrate_ms / 1e3, log.at("train_ms")
        if seconds > TIME_LIMIT + OVERRUN:
            yield Finding(at, f"{training_time(log)}, more than {TIME_LIMIT:.0f}")
        elif seconds > TIME_LIMIT:
            over = f"{seconds - TIME_LIMIT:.3f} s over {TIME_LIMIT:.0f}"
            yield note(at, f"{training_time(log)}: {over}, as 19 of 46 merged records are")
        spent = log.values.get("eval_ms", 0.0) / 1e3
        if spent > TIME_LIMIT:
            what = f"evaluation took {spent:.3f} s in all, more than {TIME_LIMIT:.0f}"
            yield Finding(log.at("eval_ms"), what)


def check_sizes(f: Folder) -> Iterator[Finding]:
    for script in f.scripts[:1]:
        for log in f.complete:
            yield from check_size(log, script)


def check_size(log: Log, script: Path) -> Iterator[Finding]:
    """Script and artifact of a log, whatever of them it gives."""
    size = script.stat().st_size
    code, model, total = (log.values.get(name) for name in ("code", "model", "total"))
    packed = "code_unpacked" in log.values and code is not None
    if packed and size != code:
        what = f"counts {code:.0f} bytes of a packed script; {script.name} here has {size}"
        yield note(log.at("code"), what)
    elif code is not None and size != code:
        what = f"{code:.0f} bytes of code, {script.name} has {size}"
        yield Finding(log.at("code"), what)
    if code is not None and model is not None and total is not None and total != code + model:
        parts = f"{code:.0f} of code + {model:.0f} of model"
        yield Finding(log.at("total"), f"{total:.0f} bytes in total are not {parts}")
    if packed or model is None:
        whole = total
    else:
        whole = max(size, code or 0) + model
    if whole is not None and whole > SIZE_LIMIT:
        more = whole - SIZE_LIMIT
        yield Finding(log.at("total"), f"{whole:,.0f} bytes with code, {more:,.0f} too many")


def exact_loss(log: Log) -> float | None:
    """The final loss, if it has so many digits that no two runs have the same one."""
    loss = log.values.get("val_loss")
    return None if loss is None or loss == round(loss, 5) else loss


def check_seeds(f: Folder) -> Iterator[Finding]:
    """Seeds are distinct, of one configuration, and those that submission.json names."""
    seen: dict[tuple[str, Any], Log] = {}
    for log in f.logs:
        seed = log.values.get("seed")
        named = logs.SEED_IN_NAME.search(log.path.stem)
        if named and seed is not None and int(named[1]) != seed:
            yield Finding(log.at("seed"), f"seed {seed:.0f} in a log named after seed {named[1]}")
        for kind, fact in (
            ("seed", seed),
            ("artifact", log.words.get("artifact")),
            ("val_loss", exact_loss(log)),
        ):
            first = seen.setdefault((kind, fact), log)
            if fact is not None and first is not log:
                yield Finding(log.at(kind), f"the same {kind} as {first.path.name}")
        if differ := common.differences(log.settings(), f.logs[0].settings()):
            told = common.listed(differ)
            what = f"another configuration than {f.logs[0].path.name}: {told}"
            yield Finding(log.at("config"), what)
    yield from check_named_seeds(f)


def check_named_seeds(f: Folder) -> Iterator[Finding]:
    have = {int(log.values["seed"]) for log in f.logs if "seed" in log.values}
    named = {*f.data.get("seeds", []), *f.data.get("seed_results", {})}
    unknown = sum("seed" not in log.values for log in f.logs)
    for seed in sorted(named - have):
        key = "seeds" if "seeds" in f.data else "seed_results"
        if unknown:
            yield note(f.at(key, str(seed)), f"seed {seed} may be a log that gives no seed")
        else:
            yield Finding(f.at(key, str(seed)), f"seed {seed} has no log")
    if named:
        for seed in sorted(have - named):
            yield Finding(f.at("seeds"), f"the log of seed {seed} is not counted")


# ---- 3. Numbers ----------------------------------------------------------------------------------


def check_json(f: Folder) -> Iterator[Finding]:
    """Every field of submission.json: its type, its range, and the logs that it comes from."""
    for wrong in f.wrong:
        yield Finding(f.at(*wrong.keys), wrong.what)
    wrong_keys = {wrong.keys[0] for wrong in f.wrong}
    for keys in fields.NEEDED:
        if not wrong_keys & {*keys} and not any(key in f.data for key in keys):
            yield Finding("submission.json", f"has no {' or '.join(keys)}")
    yield from check_entry(f, (), f.data, f.complete)
    for seed, entry in f.data.get("seed_results", {}).items():
        own = [log for log in f.complete if log.values.get("seed") == seed]
        if own:
            yield from check_entry(f, ("seed_results", str(seed)), entry, own)
    names = ", ".join(fields.unchecked(f.data))
    if names:
        yield note("submission.json", f"not checked: {names}")
    yield from check_compliance(f)


def check_entry(
    f: Folder, keys: tuple[str, ...], entry: dict[str, Any], own: list[Log]
) -> Iterator[Finding]:
    """The numbers of submission.json, or of a seed in it, against the logs that they are of."""
    for key, given in entry.items():
        field = fields.WHOLE.get(key)
        true = field.truths(own) if field and own else []
        if not true or any(same(given, value) for value in true):
            continue
        told = " or ".join(map(str, dict.fromkeys(true)))
        alone = [log for log in own if same(given, log.values.get(key, float("inf")))]
        if key in ("val_bpb", "val_loss") and alone and not keys:
            what = f"{key} {given} is that of {alone[0].path.name} alone; all give {told}"
            yield note(f.at(key), what)
        else:
            yield Finding(f.at(*keys, key), f"{key} {given} where the logs give {told}")
    digest = own[0].words.get("artifact") if keys and own else None
    if digest and str(entry.get("artifact_sha256", digest)).lower() != digest:
        yield Finding(f.at(*keys, "artifact_sha256"), f"it is not that of {own[0].at('artifact')}")


def check_compliance(f: Folder) -> Iterator[Finding]:
    """Limits that submission.json says were kept."""
    claims = f.data.get("compliance", {})
    for log in f.complete:
        train, spent = log.train_and_calibrate_ms, log.values.get("eval_ms", 0.0)
        strict, bytes_ = 1e3 * TIME_LIMIT, log.values.get("total", 0.0)
        over = {
            "train_under_600s": (train > strict + 1e3 * OVERRUN, "train_ms"),
            "train_under_600s_strict": (train > strict, "train_ms"),
            "eval_under_600s": (spent > strict, "eval_ms"),
            "artifact_under_16mb": (bytes_ > SIZE_LIMIT, "total"),
        }
        for key, (exceeded, name) in over.items():
            if claims.get(key) is True and exceeded:
                what = f"{key} is claimed; {log.at(name)} says otherwise"
                if name == "train_ms":
                    what += f": {training_time(log)}"
                yield Finding(f.at("compliance", key), what)


COLUMNS = (  # of our README: title, figure, unit of the title in that of the figure, format
    ("seed", "seed", 1, ".0f"),
    ("val_loss", "val_loss", 1, ".8f"),
    ("val_bpb", "val_bpb", 1, ".8f"),
    ("val_bpb before rounding", "pre_bpb", 1, ".4f"),
    ("steps", "steps", 1, ".0f"),
    ("ms a step", "step_ms", 1, ".2f"),
    ("training, s", "train_and_calibrate_ms", 1e3, ".3f"),
    ("evaluation, s", "eval_ms", 1e3, ".3f"),
    ("artifact, bytes", "model", 1, ",.0f"),
    ("script + artifact, bytes", "total", 1, ",.0f"),
)


def figures(seeds: Sequence[Log], against: dict[str, Any] | None) -> list[str]:
    """README's lines between FIGURES and END, from the logs and the comparison alone."""
    rows = []
    for log in seeds:
        row = []
        for _, figure, unit, form in COLUMNS:
            value = fields.figure_of(log, figure)
            row.append("" if value is None else format(value / unit, form))
        rows.append(row)
    losses, scores = ([log.values[name] for log in seeds] for name in ("val_loss", "val_bpb"))
    before = f"{mean(log.values['pre_bpb'] for log in seeds):.5f}"
    rows.append(["mean", f"{mean(losses):.8f}", f"{mean(scores):.8f}", before] + [""] * 6)
    rows.append(["standard deviation", f"{spread(losses):.8f}", f"{spread(scores):.8f}"] + [""] * 7)
    lines = common.markdown_table([column[0] for column in COLUMNS], rows)
    if against:
        delta, p = (float(against.get(name, "nan")) for name in ("delta_nats", "p_value"))
        lines += [
            "",
            f"Against {against.get('baseline')}: {delta:+.5f} nats; p of a margin of {MARGIN} "
            f"nats: {p:.2g} (one-sided Welch test).",
        ]
    return lines


def check_readme(f: Folder) -> Iterator[Finding]:
    """Our figures line by line; in another README, the scores of rows that name a seed."""
    lines = f.readme.splitlines()
    if FIGURES in lines and f.complete and f.ours:
        start = lines.index(FIGURES) + 1
        for i, line in enumerate([*figures(f.complete, f.data.get("comparison")), END]):
            found = lines[start + i] if start + i < len(lines) else ""
            if found != line:
                what = f"{found!r} where the logs give {line!r}"
                yield Finding(f"README.md:{start + i + 1}", what)
        return
    yield from check_rows(f, lines)
    headline = f.data.get("val_bpb", f.data.get("mean_val_bpb"))
    if headline is not None and f.readme:
        written = SCORE_IN_TEXT.findall(f.readme)
        if not any(same(text, float(headline)) for text in written):
            what = f"does not name the val_bpb of submission.json, {headline}"
            yield Finding("README.md", what)


def cells_of(line: str) -> list[str]:
    """The cells of a table's row; none for another line."""
    if "|" not in line:
        return []
    return [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]


def check_rows(f: Folder, lines: Sequence[str]) -> Iterator[Finding]:
    """Scores in table rows that name a seed; columns of differences are none."""
    by_seed = {str(int(log.values["seed"])): log for log in f.complete if "seed" in log.values}
    head: list[str] = []
    for number, line in enumerate(lines, 1):
        cells = cells_of(line)
        if not cells or not head:
            head = cells
            continue
        seeds = [re.sub(r"(?i)^seed[ :]*", "", cell) for cell in cells]
        log = next((by_seed[cell] for cell in seeds if cell in by_seed), None)
        if log is None:
            continue
        scored = any(SCORE_COLUMN.search(title) for title in head)
        for title, cell in zip(head, cells):
            if OTHER_COLUMN.search(title) or scored and not SCORE_COLUMN.search(title):
                continue
            for text in SCORE_IN_TEXT.findall(cell):
                if not any(same(text, value) for value in all_scores(log)):
                    yield Finding(f"README.md:{number}", contradiction(text, log))


def all_scores(log: Log) -> list[float]:
    """Every loss and score of a log, of any of its evaluations."""
    pairs = [(score.loss, score.bpb) for score in log.scores]
    pairs += [
        (log.values[n], log.values[m]) for n, m in [("pre_loss", "pre_bpb")] if n in log.values
    ]
    return [value for pair in pairs for value in pair]


def contradiction(text: str, log: Log) -> str:
    loss, bpb = log.values["val_loss"], log.values["val_bpb"]
    seed = f"seed {log.values['seed']:.0f}"
    return f"{text} stands for {seed}, whose log gives val_bpb {bpb}, val_loss {loss}"


def check_artifacts(f: Folder) -> Iterator[Finding]:
    """Artifacts in the folder, and the script, are those of the logs."""
    known = {log.words["artifact"]: log for log in f.logs if "artifact" in log.words}
    for path in sorted(p for kind in ("*.ptz", "*.bin", "*.pt") for p in f.path.glob(kind)):
        digest = common.sha256(path)
        named = logs.SEED_IN_NAME.search(path.stem)
        if digest not in known and (known or not f.logs):
            what = f"is not the artifact of any log here (SHA-256 {digest[:12]}…)"
            yield Finding(path.name, what)
        elif digest not in known:
            yield note(path.name, "no log gives the hash of its artifact: it cannot be told whose")
        elif named and int(named[1]) != known[digest].values.get("seed"):
            seed = known[digest].values.get("seed", -1)
            yield Finding(path.name, f"is the artifact of seed {seed:.0f}")
    yield from check_same_script(f)


def check_same_script(f: Folder) -> Iterator[Finding]:
    """The script is that of the logs; a packed one carries exactly the text beside it."""
    for script in f.scripts[:1]:
        if wrong := packing.fault(script):
            yield Finding(script.name, wrong)
        text = hashlib.sha256(packing.text_of(script)).hexdigest()
        for log in f.logs:
            versions, where = log.run.versions, log.path.name
            if versions.get("script_sha256", text) != text:
                yield Finding(where, f"{script.name} is not the script of this log")
            elif versions.get("packed_sha256", common.sha256(script)) != common.sha256(script):
                yield Finding(where, f"{script.name} is not packed as the script of this log was")


# ---- 4. Claims -----------------------------------------------------------------------------------


def p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """p that ours are not lower by MARGIN (nats per token): one-sided Welch test.

    1 with too few seeds.
    """
    if min(len(ours), len(theirs)) < 2:
        return 1.0
    with told_if_missing("__main__"):  # nothing else that checks or packs needs it
        from scipy import stats

    raised = [x + MARGIN for x in ours]
    p = float(stats.ttest_ind(raised, theirs, equal_var=False, alternative="less").pvalue)
    return 1.0 if math.isnan(p) else p  # all alike


def comparison(seeds: Sequence[Log], theirs: Sequence[float], name: str) -> dict[str, Any]:
    """How the mean loss compares with a baseline's losses, in nats, and p of a record's margin."""
    ours = [log.values["val_loss"] for log in seeds]
    return dict(
        baseline=name,
        baseline_val_loss=list(theirs),
        delta_nats=round(mean(ours) - mean(theirs), 8),
        margin_nats=MARGIN,
        p_value=p_value(ours, theirs),
    )


def read_baseline(path: Path) -> list[Log]:
    """The logs of the submission that is to be beaten; InputError if none has a score."""
    found = Folder(path).complete
    if not found:
        raise tg.InputError(f"{path} holds no log with a final score to compare with")
    return found


def check_claim(f: Folder, baseline: Path | None) -> Iterator[Finding]:
    """A comparison is computed again, from `baseline` or the losses that it names."""
    claim = f.data.get("comparison", {})
    theirs = [float(x) for x in claim.get("baseline_val_loss", [])]
    if baseline:
        found = read_baseline(baseline)
        tokens = {log.values.get("tokens") for log in (*found, *f.complete)}
        losses = [log.values["val_loss"] for log in found]
        if None in tokens:
            what = "whether baseline and logs were scored on the same tokens cannot be seen"
            yield note(f.at("comparison"), what)
        elif len(tokens) > 1:
            what = "another validation split or tokenizer than the baseline's: nats do not compare"
            yield Finding(f.at("comparison"), what)
        if claim and theirs != losses:
            where = f.at("comparison", "baseline_val_loss")
            yield Finding(where, "is not what the baseline's logs say")
        theirs = losses
    if theirs and f.complete and (claim or f.record):
        yield from check_margin(f, claim, theirs)


def check_margin(f: Folder, claim: dict[str, Any], theirs: Sequence[float]) -> Iterator[Finding]:
    """The difference and its p; a record needs them, and the margin."""
    true = comparison(f.complete, theirs, "")
    for key in ("delta_nats", "p_value"):
        given = claim.get(key)
        if given is None:
            what = f"no {key} is given; the logs give {true[key]:.3g}"
            yield Finding(f.at("comparison"), what, "FAIL" if f.ours else "note")
        elif abs(float(given) - true[key]) > 1e-3 * abs(true[key]):
            what = f"{key} {given} where the logs give {true[key]:.6g}"
            yield Finding(f.at("comparison", key), what)
    if f.record and not true["p_value"] < LEVEL:
        seeds = f"{len(f.complete)} seeds against {len(theirs)}"
        what = f"no record: {seeds} give p = {true['p_value']:.3g}, not below {LEVEL}"
        yield Finding(f.at("comparison"), f"{what}, for {MARGIN} nats")


# ---- 5. The script -------------------------------------------------------------------------------


def start(f: Folder, script: Path) -> tuple[list[str], dict[str, str]]:
    """How a script is started with nothing to do: ours has to score an artifact that is not there,
    others are imported.

    Ours would first complain of a driver that PyTorch cannot use, which is no fault of the folder.
    """
    clean = common.without_options(os.environ)
    if any(log.ours for log in f.logs):
        return [sys.executable, script.name], clean | {"EVAL_ONLY": NOWHERE, "DEVICE": "cpu"}
    run = f"runpy.run_path({script.name!r}, run_name='checked')"
    return [sys.executable, "-c", f"import runpy, sys; sys.path.insert(0, ''); {run}"], clean


def check_script(f: Folder, run: bool) -> Iterator[Finding]:
    """It compiles; started inside the folder it gets to its own message, or through its imports."""
    for script in f.scripts[:1]:
        try:
            compile(script.read_bytes(), script.name, "exec")
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            yield Finding(f"{script.name}:{line}", f"does not compile: {error}")
            return
        if run:
            yield from check_start(f, script)


def check_start(f: Folder, script: Path) -> Iterator[Finding]:
    command, env = start(f, script)
    try:
        done = subprocess.run(
            command, cwd=f.path, env=env, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        yield Finding(script.name, "did not start within 120 s")
        return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    missing = re.search(r"No module named '(\w+)", last)
    if missing and (missing[1] in GPU_PACKAGES or f.requires(missing[1])):
        yield note(script.name, f"not started here, {missing[1]} is not installed")
        return
    started = done.returncode == 0
    if "EVAL_ONLY" in env:
        started = done.returncode == tg.EXIT_INPUT and NOWHERE in last
    if not started:
        what = f"does not start in its folder (exit code {done.returncode}): {last}"
        yield Finding(script.name, what)


def check(path: Path, baseline: Path | None, run: bool) -> list[Finding]:
    """All that is found in a folder; InputError if it, or the baseline, is no folder."""
    f = Folder(path)
    found = [*check_files(f), *check_verdict(f), *check_sizes(f), *check_artifacts(f)]
    found += [*check_script(f, run), *check_requirements(f), *check_track(f), *check_data(f)]
    found += [*check_times(f), *check_seeds(f)]
    if f.json and not f.broken:
        found += [*check_json(f), *check_readme(f), *check_claim(f, baseline)]
    return found
