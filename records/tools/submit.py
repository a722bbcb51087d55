"""Makes a submission folder from finished runs, and checks any such folder against its own logs.

    python records/tools/submit.py logs/lab/full/T/seed* --name looped-T --author "A. Name" --github-id aname \
        --blurb "What it is." [--track 10min_16mb] [--baseline records/track_10min_16mb/<folder>]
    python records/tools/submit.py --check records/track_10min_16mb/<folder> [--baseline <folder>]

Every number of submission.json and of the table in README.md is parsed from the logs, and the script is the
one that the logs carry. A folder that fails its own check is not left behind. --check starts the folder's
script (with nothing to train); --no-start only compiles it, for folders whose code is not trusted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import Any, NamedTuple

from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg

SIZE_LIMIT = 16_000_000  # bytes, script + artifact, decimal
TIME_LIMIT = 600.0  # seconds of training, and of evaluation, in the record track
MARGIN, LEVEL = 0.005, 0.01  # nats by which a record must win, and p of the test that it does
TRACKS = ("10min_16mb", "non_record_16mb")
GPU_PACKAGES = ("flash_attn", "flash_attn_interface", "flash_attn_3", "triton")
NOWHERE = "no-such-artifact"
BAR = "=" * 100  # ends the source in a log
FIGURES, END = "<!-- figures: parsed from the logs -->", "<!-- end of figures -->"

# ---- 1. What a log says ----------------------------------------------------------------------------------

NUMBER = r"([\d,]*\.?\d+)"
PATTERNS = {  # the last line that matches counts; upstream's lines, and those only this script writes
    "val_loss": rf"final\S*(?:_exact)? val_loss:\s*{NUMBER} val_bpb:",
    "val_bpb": rf"final\S*(?:_exact)? val_loss:\s*\S+ val_bpb:\s*{NUMBER}",
    "pre_loss": rf"step:\d+/\d+ val_loss:{NUMBER}",
    "pre_bpb": rf"step:\d+/\d+ val_loss:\S+ val_bpb:{NUMBER}",
    "steps": r"step:(\d+)/\d+ val_loss",
    "train_ms": rf"step:\d+/\d+ .*train_time:{NUMBER}ms",
    "step_ms": rf"step:\d+/\d+ .*step_avg:{NUMBER}ms",
    "eval_ms": rf"final.*eval_time:\s*{NUMBER}\s*ms",
    "code": rf"Code size: {NUMBER} bytes",
    "model": rf"Serialized model \S+: {NUMBER} bytes",
    "total": rf"Total submission size \S+: {NUMBER} bytes",
    "seed": r"(?i:\bseed)[:=]\s*(\d+)",
    "tokens": r"val_tokens:(\d+) ",
    "ranks": r"world_size:(\d+)",
}
WORDS = {
    "artifact": r"artifact_sha256:(\w{64})",
    "script": r"^script_sha256:(\w{64})",
    "device": r"^device:(.*)",
    "torch": r"^torch:(\S+)",
    "numpy": r"^numpy:(\S+)",
    "sentencepiece": r"^sentencepiece:(\S+)",
    "config": r"^config:(.*)",
}
NEEDED = ("val_loss", "val_bpb", "train_ms", "code", "model", "total")
OURS = (
    *NEEDED,
    "pre_bpb",
    "steps",
    "step_ms",
    "eval_ms",
    "seed",
    "ranks",
    "device",
    "torch",
    "config",
    "artifact",
)
PLACES = (
    "SEED",
    "RUN_ID",
    "LOG_DIR",
    "DATA_PATH",
    "TOKENIZER_PATH",
)  # what runs of one system may differ in


@dataclass
class Log:
    """The figures of one seed's log; `line[name]` is where each stands."""

    path: Path
    values: dict[str, Any]
    line: dict[str, int]
    count: int  # lines
    source: str | None  # the script, where the log begins with one

    @classmethod
    def read(cls, path: Path) -> Log:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines, values, line = text.splitlines(), {}, {}
        first = next((i for i, written in enumerate(lines) if written.endswith(BAR)), -1) + 1
        for kinds, convert in ((PATTERNS, lambda s: float(s.replace(",", ""))), (WORDS, str)):
            for name, pattern in kinds.items():
                for i, written in enumerate(lines[first:], first + 1):
                    if found := re.search(pattern, written):
                        values[name], line[name] = convert(found[1]), i
        if "seed" not in values and (named := re.search(r"seed[_-]?(\d+)", path.name)):
            values["seed"] = float(named[1])
        return cls(path, values, line, len(lines), text.partition(BAR)[0] if first else None)

    def __getattr__(self, name: str) -> Any:
        """A figure; None where the log does not give it."""
        if name.startswith("_") or name not in PATTERNS | WORDS:
            raise AttributeError(name)
        return self.values.get(name)

    def at(self, name: str) -> str:
        return f"{self.path.name}:{self.line.get(name, self.count)}"

    def missing(self) -> list[str]:
        """What a finished run writes and this log lacks; this project's own logs give more than others."""
        return [name for name in (OURS if self.script else NEEDED) if self.values.get(name) is None]

    def settings(self) -> dict[str, str]:
        """The configuration, without what may differ between the runs of one system."""
        pairs = (word.split("=", 1) for word in (self.config or "").split(" ") if "=" in word)
        return {name: value for name, value in pairs if name not in PLACES}


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """p that ours are not lower by MARGIN (nats per token): one-sided Welch test; 1 with too few seeds."""
    if min(len(ours), len(theirs)) < 2:
        return 1.0
    raised = [x + MARGIN for x in ours]
    return float(stats.ttest_ind(raised, theirs, equal_var=False, alternative="less").pvalue)


# ---- 2. Making a folder ----------------------------------------------------------------------------------


def seed_figures(log: Log) -> dict[str, Any]:
    """submission.json's entry of a seed."""
    return dict(
        val_loss=log.val_loss,
        val_bpb=log.val_bpb,
        pre_quant_val_bpb=log.pre_bpb,
        steps=int(log.steps),
        step_avg_ms=log.step_ms,
        train_time_s=log.train_ms / 1e3,
        eval_time_s=log.eval_ms / 1e3,
        artifact_bytes=int(log.model),
        bytes_total=int(log.total),
        artifact_sha256=log.artifact,
    )


def comparison(logs: Sequence[Log], theirs: list[float], name: str) -> dict[str, Any]:
    """How the mean loss compares with a baseline's losses, in nats, and p of the margin a record needs."""
    ours = [log.val_loss for log in logs]
    return dict(
        baseline=name,
        baseline_val_loss=theirs,
        delta_nats=round(mean(ours) - mean(theirs), 8),
        margin_nats=MARGIN,
        p_value=p_value(ours, theirs),
    )


def submission(
    logs: Sequence[Log], given: argparse.Namespace, baseline: Sequence[Log]
) -> dict[str, Any]:
    """submission.json: what people say about it, then what the logs say."""
    losses, scores = [log.val_loss for log in logs], [log.val_bpb for log in logs]
    deviations = {}
    if len(logs) > 1:
        deviations = dict(val_loss_std=round(stdev(losses), 8), val_bpb_std=round(stdev(scores), 8))
    made = dict(
        author=given.author,
        github_id=given.github_id,
        name=given.name,
        blurb=given.blurb,
        date=given.date,
        track=given.track,
        val_loss=round(mean(losses), 8),
        val_bpb=round(mean(scores), 8),
        **deviations,
        pre_quant_val_bpb=round(mean(log.pre_bpb for log in logs), 8),
        seeds=[int(log.seed) for log in logs],
        seed_results={str(int(log.seed)): seed_figures(log) for log in logs},
        bytes_total=int(max(log.total for log in logs)),
        bytes_code=int(logs[0].code),
        artifact_bytes_mean=round(mean(log.model for log in logs), 1),
        artifact_bytes_max=int(max(log.model for log in logs)),
        hardware=f"{int(logs[0].ranks)}x {logs[0].device}",
        pytorch_version=logs[0].torch,
        compliance=dict(
            train_under_600s=all(log.train_ms <= 1e3 * TIME_LIMIT for log in logs),
            eval_under_600s=all(log.eval_ms <= 1e3 * TIME_LIMIT for log in logs),
            artifact_under_16mb=all(log.total <= SIZE_LIMIT for log in logs),
        ),
    )
    if baseline:
        made["comparison"] = comparison(
            logs, [log.val_loss for log in baseline], given.baseline.name
        )
    return made


def figures(logs: Sequence[Log], against: dict[str, Any] | None) -> list[str]:
    """README's lines between FIGURES and END, from the logs and the comparison alone."""
    rows = [
        [
            "seed",
            "val_loss",
            "val_bpb",
            "val_bpb before int8",
            "steps",
            "ms a step",
            "training, s",
            "evaluation, s",
            "artifact, bytes",
            "script + artifact, bytes",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    for log in logs:
        rows.append(
            [
                f"{log.seed:.0f}",
                f"{log.val_loss:.8f}",
                f"{log.val_bpb:.8f}",
                f"{log.pre_bpb:.4f}",
                f"{log.steps:.0f}",
                f"{log.step_ms:.2f}",
                f"{log.train_ms / 1e3:.3f}",
                f"{log.eval_ms / 1e3:.3f}",
                f"{log.model:,.0f}",
                f"{log.total:,.0f}",
            ]
        )
    losses, scores = [log.val_loss for log in logs], [log.val_bpb for log in logs]
    before = f"{mean(log.pre_bpb for log in logs):.5f}"
    rows.append(["mean", f"{mean(losses):.8f}", f"{mean(scores):.8f}", before] + [""] * 6)
    rows.append(["standard deviation", f"{spread(losses):.8f}", f"{spread(scores):.8f}"] + [""] * 7)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if against:
        delta, p = (float(against.get(name, "nan")) for name in ("delta_nats", "p_value"))
        lines += [
            "",
            f"Against {against.get('baseline')}: {delta:+.5f} nats; p of a margin of {MARGIN} "
            f"nats: {p:.2g} (one-sided Welch test).",
        ]
    return lines


def command(log: Log) -> str:
    """How the run is repeated: what its configuration changes of the defaults, less what cannot act in it."""
    settings, kinds = log.settings(), tg.get_type_hints(tg.Config)
    config = tg.Config(
        **{
            name.lower(): tg.parse(name, value, kinds[name.lower()])
            for name, value in settings.items()
            if name.lower() in kinds
        }
    )
    idle = {
        f.name.upper()
        for f in fields(tg.Config)
        if any(map(config.hindrance, f.metadata["needs"].split()))
    }
    defaults = {f.name.upper(): tg.show(f.default) for f in fields(tg.Config)}
    words = [
        f"{name}={value}"
        for name, value in settings.items()
        if name not in idle | {"PRESET"} and value != defaults.get(name)
    ]
    python = (
        "python" if log.ranks == 1 else f"torchrun --standalone --nproc_per_node={log.ranks:.0f}"
    )
    return " ".join([*words, f"SEED={log.seed:.0f}", python, "train_gpt.py"])


def readme(logs: Sequence[Log], made: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"# {made['name']}",
            "",
            made["blurb"],
            "",
            FIGURES,
            *figures(logs, made.get("comparison")),
            END,
            "",
            f"Hardware: {made['hardware']}; PyTorch {made['pytorch_version']}. Scores are those of the artifact, "
            "reloaded from disk.",
            "",
            "    " + command(logs[0]),
            "",
        ]
    )


def make(given: argparse.Namespace) -> Path:
    """The folder of some runs; ValueError names what stands in the way."""
    logs = sorted(
        (Log.read(run / "train.log") for run in given.runs), key=lambda log: log.seed or 0
    )
    for log in logs:
        if missing := log.missing():
            raise ValueError(f"{log.path} gives no {', '.join(missing)}: is the run finished?")
        if log.source is None or hashlib.sha256(log.source.encode()).hexdigest() != log.script:
            raise ValueError(
                f"{log.path} does not carry the script of its run (script_sha256 {log.script})"
            )
    if len({log.script for log in logs}) > 1 or any(
        log.settings() != logs[0].settings() for log in logs
    ):
        raise ValueError("the runs are of different scripts or configurations")
    if len({log.seed for log in logs}) < len(logs):
        raise ValueError("two of the runs have the same seed")
    slug = re.sub(r"[^A-Za-z0-9]+", "_", given.name).strip("_")
    folder = given.to / f"track_{given.track}" / f"{given.date}_{slug}"
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another --name or --date")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as scratch:
        draft = Path(scratch) / folder.parent.name / folder.name
        fill(draft, logs, given)
        if wrong := check(draft, given.baseline, not given.no_start):
            raise ValueError("the runs make no valid submission:\n" + "\n".join(map(str, wrong)))
        os.rename(draft, folder)
    return folder


def fill(draft: Path, logs: Sequence[Log], given: argparse.Namespace) -> None:
    """Writes script, logs, artifacts if asked for, requirements, submission.json and README.md."""
    draft.mkdir(parents=True)
    (draft / "train_gpt.py").write_bytes(logs[0].source.encode())
    for log in logs:
        shutil.copyfile(log.path, draft / f"train_seed{log.seed:.0f}.log")
        if given.artifacts:
            artifact = log.path.with_name("model.ptz")
            shutil.copyfile(artifact, draft / f"model_seed{log.seed:.0f}.ptz")
    pins = [
        f"{name}=={getattr(logs[0], name).split('+')[0]}"
        for name in ("torch", "numpy", "sentencepiece")
    ]
    (draft / "requirements.txt").write_text("\n".join(pins) + "\n")
    made = submission(logs, given, read_logs(given.baseline) if given.baseline else [])
    (draft / "submission.json").write_text(json.dumps(made, indent=2) + "\n")
    (draft / "README.md").write_text(readme(logs, made))


# ---- 3. Checking a folder --------------------------------------------------------------------------------
# Folders of others have fewer keys and other final lines: what is there must be true, and what the rules ask
# for must be there.


class Finding(NamedTuple):
    """What is wrong, and the line that is."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"FAIL {self.where}: {self.what}"


def read_logs(folder: Path) -> list[Log]:
    """The logs of a folder's seeds; requirements and other text files are no logs."""
    paths = sorted(folder.glob("*.log")) or sorted(folder.glob("*train*.txt"))
    return [Log.read(path) for path in paths]


class Folder:
    """A submission folder, read once."""

    def __init__(self, path: Path) -> None:
        self.path, self.logs = path, read_logs(path)
        self.json, self.readme = self.text("submission.json"), self.text("README.md")
        self.scripts = sorted(path.glob("train_gpt*.py"))

    def text(self, name: str) -> str:
        file = self.path / name
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    @cached_property
    def data(self) -> dict[str, Any]:
        """submission.json with its decimals as written; ValueError if it is not an object."""
        data = json.loads(self.json, parse_float=Decimal)
        if not isinstance(data, dict):
            raise ValueError("it is not an object")
        return data

    @property
    def complete(self) -> list[Log]:
        """Logs that reach their final score."""
        return [log for log in self.logs if not log.missing()]

    def at(self, *keys: str) -> str:
        """Where in submission.json a key stands."""
        position = 0
        for key in keys:
            position = max(self.json.find(f'"{key}"', position), position)
        return f"submission.json:{self.json.count(chr(10), 0, position) + 1}"


def same(given: Any, true: float) -> bool:
    """Whether a number as written is the true one, rounded to its digits."""
    written = Decimal(str(given))
    unit = Decimal(10) ** min(written.as_tuple().exponent, 0)
    return abs(written - Decimal(repr(float(true)))) <= unit / 2 * (1 + Decimal("1e-6"))


def check_files(f: Folder) -> Iterator[Finding]:
    for name in ("README.md", "submission.json"):
        if not f.text(name):
            yield Finding(name, "is not there")
    if not f.scripts:
        yield Finding("train_gpt.py", "is not there")
    if not f.logs:
        yield Finding("*.log", "no training log is there")
    for log in f.logs:
        if missing := log.missing():
            yield Finding(
                f"{log.path.name}:{log.count}", f"the log ends without {', '.join(missing)}"
            )


def check_track(f: Folder) -> Iterator[Finding]:
    parent, given = f.path.resolve().parent.name, str(f.data.get("track", "")).replace("-", "_")
    if parent.removeprefix("track_") not in TRACKS or not parent.startswith("track_"):
        yield Finding(
            f.path.name, f"lies in {parent}, not in {' or '.join('track_' + t for t in TRACKS)}"
        )
    elif given and given.removeprefix("track_") != parent.removeprefix("track_"):
        yield Finding(f.at("track"), f"track {given}, but the folder lies in {parent}")
    if parent != "track_10min_16mb":
        return
    for log in f.complete:
        if log.device and (log.ranks != 8 or "H100" not in log.device):
            yield Finding(
                log.at("device"),
                f"ran on {log.ranks:.0f} x {log.device}; the record track is 8xH100",
            )
        for name, what in (("train_ms", "training"), ("eval_ms", "evaluation")):
            if log.values.get(name, 0) > 1e3 * TIME_LIMIT:
                seconds = log.values[name] / 1e3
                yield Finding(
                    log.at(name), f"{what} took {seconds:.3f} s, more than {TIME_LIMIT:.0f}"
                )


def check_sizes(f: Folder) -> Iterator[Finding]:
    for script in f.scripts[:1]:
        code = script.stat().st_size
        for log in f.complete:
            if log.code != code:
                yield Finding(
                    log.at("code"), f"{log.code:.0f} bytes of code, {script.name} has {code}"
                )
            if log.total != log.code + log.model:
                yield Finding(
                    log.at("total"),
                    f"{log.total:.0f} bytes in total are not {log.code:.0f} of "
                    f"code + {log.model:.0f} of model",
                )
            if (total := max(code, log.code) + log.model) > SIZE_LIMIT:
                more = total - SIZE_LIMIT
                yield Finding(
                    log.at("total"), f"{total:,.0f} bytes with code, {more:,.0f} too many"
                )


def check_seeds(f: Folder) -> Iterator[Finding]:
    seen: dict[Any, Log] = {}
    for log in f.logs:
        named = re.search(r"seed[_-]?(\d+)", log.path.name)
        if named and log.seed is not None and int(named[1]) != log.seed:
            yield Finding(
                log.at("seed"), f"seed {log.seed:.0f} in a log named after seed {named[1]}"
            )
        for kind in ("seed", "artifact", "val_loss"):
            fact = log.values.get(kind)
            if fact is not None and (first := seen.setdefault((kind, fact), log)) is not log:
                yield Finding(log.at(kind), f"the same {kind} as {first.path.name}")
        if differ := dict(log.settings().items() ^ f.logs[0].settings().items()):
            yield Finding(
                log.at("config"),
                f"another configuration than {f.logs[0].path.name}: {', '.join(differ)}",
            )
    have = {int(log.seed) for log in f.logs if log.seed is not None}
    results = f.data.get("seed_results")
    named = {
        int(s)
        for s in [*f.data.get("seeds", []), *(results if isinstance(results, dict) else [])]
        if str(s).isdigit()
    }
    for seed in sorted(named - have):
        key = "seeds" if "seeds" in f.data else "seed_results"
        yield Finding(f.at(key, str(seed)), f"seed {seed} has no log")
    for seed in sorted(have - named if named else ()):
        yield Finding(f.at("seeds"), f"the log of seed {seed} is not counted")


def truths(logs: Sequence[Log]) -> dict[str, list[float]]:
    """The values each key of submission.json may have. Keys of size and time may be of any one seed."""

    def all_of(name: str, unit: float = 1) -> list[float]:
        return [log.values[name] / unit for log in logs if log.values.get(name) is not None]

    def middle(name: str) -> list[float]:
        return [mean(all_of(name))] if all_of(name) else []

    def deviations(name: str) -> list[float]:
        return [spread(all_of(name)), pstdev(all_of(name))]

    models, totals = all_of("model"), all_of("total")
    return dict(
        val_bpb=middle("val_bpb"),
        mean_val_bpb=middle("val_bpb"),
        roundtrip_val_bpb=middle("val_bpb"),
        val_loss=middle("val_loss"),
        mean_val_loss=middle("val_loss"),
        val_bpb_std=deviations("val_bpb"),
        val_loss_std=deviations("val_loss"),
        pre_quant_val_bpb=middle("pre_bpb"),
        pre_quant_val_loss=middle("pre_loss"),
        bytes_total=[*totals, mean(totals)],
        bytes_code=all_of("code"),
        bytes_model_int8_zlib=models,
        artifact_bytes=models + totals,
        artifact_bytes_mean=[mean(models), mean(totals)],
        artifact_bytes_max=[max(models), max(totals)],
        steps=all_of("steps"),
        step_stop=all_of("steps"),
        step_avg_ms=all_of("step_ms"),
        wallclock_seconds=all_of("train_ms", 1e3),
        train_time_s=all_of("train_ms", 1e3),
        eval_time_s=all_of("eval_ms", 1e3),
    )


def check_json(f: Folder) -> Iterator[Finding]:
    """Every known number of submission.json against the logs."""
    for keys in (
        ("author",),
        ("github_id",),
        ("name", "run_name"),
        ("date",),
        ("val_bpb", "mean_val_bpb"),
    ):
        if not any(f.data.get(key) for key in keys):
            yield Finding("submission.json", f"has no {' or '.join(keys)}")
    parts = [((), f.data, f.complete)]
    results = f.data.get("seed_results")
    for seed, entry in results.items() if isinstance(results, dict) else ():
        own = [
            log for log in f.complete if log.seed is not None and str(int(log.seed)) == str(seed)
        ]
        if isinstance(entry, dict):
            parts.append((("seed_results", str(seed)), entry, own))
    for path, entry, logs in parts:
        for key, allowed in (truths(logs) if logs else {}).items():
            given = entry.get(key)
            if (
                isinstance(given, (int, Decimal))
                and allowed
                and not any(same(given, x) for x in allowed)
            ):
                told = " or ".join(map(str, dict.fromkeys(allowed)))
                yield Finding(f.at(*path, key), f"{key} {given} where the logs give {told}")
        if path and logs and entry.get("artifact_sha256", logs[0].artifact) != logs[0].artifact:
            yield Finding(
                f.at(*path, "artifact_sha256"), f"it is not that of {logs[0].at('artifact')}"
            )
    over = {
        "train_under_600s": ("train_ms", 6e5),
        "eval_under_600s": ("eval_ms", 6e5),
        "artifact_under_16mb": ("total", SIZE_LIMIT),
    }
    compliance = f.data.get("compliance")
    for key, (name, limit) in over.items():
        if isinstance(compliance, dict) and compliance.get(key) is True:
            for log in f.complete:
                if log.values.get(name, 0) > limit:
                    yield Finding(
                        f.at("compliance", key), f"{key} is claimed; {log.at(name)} says otherwise"
                    )


def check_readme(f: Folder) -> Iterator[Finding]:
    """Our figures line by line; in another README, the scores in the rows of tables that name a seed."""
    lines = f.readme.splitlines()
    if FIGURES in lines and f.complete:
        start, ordered = lines.index(FIGURES) + 1, sorted(f.complete, key=lambda log: log.seed)
        for i, line in enumerate([*figures(ordered, f.data.get("comparison")), END]):
            found = lines[start + i] if start + i < len(lines) else ""
            if found != line:
                yield Finding(
                    f"README.md:{start + i + 1}", f"{found!r} where the logs give {line!r}"
                )
        return
    by_seed = {str(int(log.seed)): log for log in f.complete if log.seed is not None}
    for i, line in enumerate(lines, 1):
        cells = (
            [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]
            if "|" in line
            else []
        )
        log = next((by_seed[cell] for cell in cells if cell in by_seed), None)
        for written in re.findall(r"(?<![\d.])\d\.\d{4,}", line) if log else ():
            true = (log.val_bpb, log.val_loss, log.pre_bpb, log.pre_loss)
            if not any(x is not None and same(written, x) for x in true):
                yield Finding(
                    f"README.md:{i}",
                    f"{written} stands for seed {log.seed:.0f}, whose log gives "
                    f"val_bpb {log.val_bpb}, val_loss {log.val_loss}",
                )
    headline = f.data.get("val_bpb", f.data.get("mean_val_bpb"))
    if isinstance(headline, Decimal) and not any(
        same(written, float(headline)) for written in re.findall(r"(?<![\d.])\d\.\d{3,}", f.readme)
    ):
        yield Finding("README.md", f"does not name the val_bpb of submission.json, {headline}")


def check_artifacts(f: Folder) -> Iterator[Finding]:
    """Artifacts in the folder, and the script, are those of the logs."""
    known = {log.artifact: log for log in f.logs if log.artifact}
    for path in sorted(p for kind in ("*.ptz", "*.bin", "*.pt") for p in f.path.glob(kind)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in known:
            yield Finding(
                path.name, f"is not the artifact of any log here (SHA-256 {digest[:12]}…)"
            )
        elif (named := re.search(r"seed[_-]?(\d+)", path.name)) and int(named[1]) != known[
            digest
        ].seed:
            yield Finding(path.name, f"is the artifact of seed {known[digest].seed:.0f}")
    for log in f.logs:
        if (
            log.script
            and f.scripts
            and hashlib.sha256(f.scripts[0].read_bytes()).hexdigest() != log.script
        ):
            yield Finding(log.at("script"), f"{f.scripts[0].name} is not the script of this log")


def check_claim(f: Folder, baseline: Path | None) -> Iterator[Finding]:
    """A comparison is computed again, from `baseline` or the losses it names; a record needs the margin."""
    claim, record = f.data.get("comparison"), f.path.resolve().parent.name == "track_10min_16mb"
    theirs = [float(x) for x in claim.get("baseline_val_loss", [])] if claim else []
    if baseline:
        logs = [log for log in read_logs(baseline) if not log.missing()]
        if not logs:
            raise ValueError(f"{baseline} holds no finished log to compare with")
        if {log.tokens for log in logs} != {log.tokens for log in f.complete}:
            yield Finding(
                f.at("comparison"),
                "another validation split or tokenizer than the baseline's: "
                "nats per token do not compare",
            )
        if claim and theirs != [log.val_loss for log in logs]:
            yield Finding(
                f.at("comparison", "baseline_val_loss"), "is not what the baseline's logs say"
            )
        theirs = [log.val_loss for log in logs]
    if not theirs or not f.complete or not (claim or record):
        return
    true = comparison(f.complete, theirs, "")
    for key in ("delta_nats", "p_value"):
        given = (claim or {}).get(key)
        if given is None:
            yield Finding(f.at("comparison"), f"no {key} is given; the logs give {true[key]:.3g}")
        elif abs(float(given) - true[key]) > 1e-3 * abs(true[key]):
            yield Finding(
                f.at("comparison", key), f"{key} {given} where the logs give {true[key]:.6g}"
            )
    if record and not true["p_value"] < LEVEL:
        yield Finding(
            f.at("comparison"),
            f"no record: {len(f.complete)} seeds against {len(theirs)} give "
            f"p = {true['p_value']:.3g}, not below {LEVEL}, for {MARGIN} nats",
        )


def start(f: Folder, script: Path) -> tuple[list[str], dict[str, str]]:
    """How a script is started with nothing to do: ours (by its logs) has to score an artifact that is not
    there, others are imported."""
    clean = {n: v for n, v in os.environ.items() if n.lower() not in tg.Config.__dataclass_fields__}
    if any(log.script for log in f.logs):
        return [sys.executable, script.name], clean | {"EVAL_ONLY": NOWHERE}
    code = f"import runpy, sys; sys.path.insert(0, ''); runpy.run_path({script.name!r}, run_name='checked')"
    return [sys.executable, "-c", code], clean


def check_script(f: Folder, run: bool) -> Iterator[Finding]:
    """It compiles; started inside the folder it gets as far as its own message, or through its imports."""
    for script in f.scripts[:1]:
        try:
            compile(script.read_bytes(), script.name, "exec")
        except (SyntaxError, ValueError) as error:
            yield Finding(
                f"{script.name}:{getattr(error, 'lineno', 1)}", f"does not compile: {error}"
            )
            return
        if not run:
            return
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
        declared = f.text("requirements.txt").replace("-", "_")
        if missing and (missing[1] in GPU_PACKAGES or re.search(rf"(?m)^{missing[1]}\b", declared)):
            print(f"note {script.name}: not started here, {missing[1]} is not installed")
        elif (
            done.returncode != 2 or NOWHERE not in last if env.get("EVAL_ONLY") else done.returncode
        ):
            yield Finding(
                script.name, f"does not start in its folder (exit code {done.returncode}): {last}"
            )


def check(path: Path, baseline: Path | None, run: bool) -> list[Finding]:
    """All that is wrong with a folder; ValueError if it, or the baseline, is no folder."""
    for folder in filter(None, (path, baseline)):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
    f = Folder(path)
    found = [*check_files(f), *check_sizes(f), *check_artifacts(f), *check_script(f, run)]
    try:
        f.data
    except ValueError as error:
        return [*found, Finding("submission.json", f"cannot be read: {error}")]
    for part in (
        check_track(f),
        check_seeds(f),
        check_json(f),
        check_readme(f),
        check_claim(f, baseline),
    ):
        found += part
    return found


# ---- 4. The command --------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, one a seed")
    top.add_argument("--check", type=Path, metavar="FOLDER")
    top.add_argument(
        "--baseline", type=Path, metavar="FOLDER", help="the submission that is to be beaten"
    )
    top.add_argument("--no-start", action="store_true", help="compile the script only")
    top.add_argument("--track", choices=TRACKS, default="non_record_16mb")
    for name in ("--name", "--author", "--github-id", "--blurb"):
        top.add_argument(name)
    top.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    top.add_argument(
        "--artifacts", action="store_true", help="put the artifacts into the folder, too"
    )
    top.add_argument(
        "--to", type=Path, default=ROOT / "records", help="where the track folders are"
    )
    return top


def main() -> int:
    given = parser().parse_args()
    try:
        if given.check:
            found = check(given.check, given.baseline, not given.no_start)
            print("\n".join(map(str, found)) or f"ok {given.check}: nothing contradicts its logs")
            return 1 if found else 0
        missing = [n for n in ("name", "author", "github_id", "blurb") if not getattr(given, n)]
        if not given.runs or missing:
            raise ValueError(
                "to make a folder, name runs and give "
                + ", ".join("--" + n.replace("_", "-") for n in missing or ["name"])
            )
        print(make(given))
        return 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
