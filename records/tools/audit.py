r"""Audits a finished run for what has invalidated entries of the contest.

    python records/tools/audit.py logs/<run> [--data DATA_PATH] \
        [--tokenizer PATH] [--text FILE] [--out FILE.json]
    python records/tools/audit.py <submission folder> \
        --script <submission folder>/train_gpt.py

THIS EXECUTES THE SCRIPT: the one at the repository's root (packed, if the run
was started packed), or that of --script, is imported, scores text and trains
for a moment. Audit a stranger's script in a container without network or
anything worth reading.

Every check is a line, `ok|FAILED|skipped name: what was measured`. What a long
check is about to do is told before, on stderr. The exit code is 0 if none
failed, 1 if one did, 2 if there was nothing to audit. Losses are measured
through the script's own Scorer and Learner. Some places are drawn anew each
time, so that no script can know them: an honest run passes wherever they fall,
while a cheat in a narrow stretch may be missed by one audit and found by the
next. Of a folder that another project's script has made, only what its logs
say is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import torch

    import train_gpt
    from records.tools import audit_files, audit_scoring, audited, checks, common, packing
    from records.tools.audited import Audit, Failed, Skipped


def check_sliding_causality(audit: Audit) -> str:
    return audit_scoring.check_causality(audit, audit.sliding)


CHECKS: dict[str, Callable[[Audit], str]] = {
    "verdict": audit_files.check_verdict,
    "data": audit_files.check_data,
    "script": audit_files.check_script,
    "sizes": audit_files.check_sizes,
    "header": audit_files.check_header,
    "figures": audit_files.check_figures,
    "clocks": audit_files.check_clocks,
    "bytes": audit_files.check_bytes,
    "once": audit_scoring.check_once,
    "causality": partial(audit_scoring.check_causality, stride=0),
    "causality-sliding": check_sliding_causality,
    "normalised": audit_scoring.check_normalised,
    "ttt": audit_scoring.check_ttt,
    "training": audit_scoring.check_training,
    "score": audit_scoring.check_score,
}
FIELD_CHECKS = {  # of logs that another script has written
    "verdict": checks.check_verdict,
    "sizes": checks.check_sizes,
    "clocks": checks.check_times,
}


class Line(NamedTuple):
    """The outcome of one check of one run."""

    status: str  # ok, FAILED, skipped
    name: str
    measured: str
    seconds: float
    run: str

    def __str__(self) -> str:
        return f"{self.status} {self.name}: {self.measured}"


def outcome(name: str, audit: Audit, skip: list[str]) -> Line:
    started = time.perf_counter()
    try:
        if name in skip:
            raise Skipped("by --skip")
        status, measured = "ok", CHECKS[name](audit)
    except Skipped as reason:
        status, measured = "skipped", str(reason)
    except Failed as finding:
        status, measured = "FAILED", str(finding)
    except Exception as error:  # the audited script may raise anything, and then nothing was shown
        status, measured = "FAILED", f"{type(error).__name__}: {error}"
    return Line(status, name, measured, time.perf_counter() - started, audit.run.name)


def audit_field(folder: checks.Folder, skip: list[str]) -> Iterator[Line]:
    """What the logs of another script say; nothing is executed, so nothing else can be measured."""
    for name in CHECKS:
        status, told = "skipped", "the logs are of another script than this project's"
        if name in FIELD_CHECKS and name not in skip:
            found = list(FIELD_CHECKS[name](folder))
            wrong = checks.faults(found)
            status = "FAILED" if wrong else "ok"
            seen = ", ".join(log.path.name for log in folder.complete) or "no complete log"
            told = "; ".join(map(str, found)) or f"nothing against {seen}"
        yield Line(status, name, told, 0.0, folder.path.name)


def is_field(folder: Path) -> bool:
    """Whether a folder's logs are all of other scripts."""
    if not folder.is_dir() or (folder / "result.json").exists():
        return False
    found = audited.logs.read_logs(folder)
    return bool(found) and not any(log.ours for log in found)


def audit_folder(given: argparse.Namespace) -> Iterator[Line]:
    """Every check of every run of a folder; InputError if there is nothing to audit."""
    if is_field(given.run):
        yield from audit_field(checks.Folder(given.run), given.skip)
        return
    runs = audited.read_runs(given.run)
    with tempfile.TemporaryDirectory() as place:
        path = given.script or audit_files.our_script(runs, Path(place))
        if wrong := packing.fault(path):
            raise train_gpt.InputError(f"not executed: {path} {wrong}")
        script = common.load_script(path)
        for run in runs:
            with tempfile.TemporaryDirectory() as scratch:
                audit = Audit(script, run, given, Path(scratch))
                for name in CHECKS:
                    yield outcome(name, audit, given.skip)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("run", type=Path, help="Folder of a finished run, or of a submission.")
    add("--data", type=Path, help="Folder of the shards (default: where the run had them).")
    add("--tokenizer", type=Path, help="SentencePiece model (default: the one that the run had).")
    add("--text", type=Path, help="A file with the validation documents' text, one after another.")
    add(
        "--script",
        type=Path,
        help="Script of the run, which IS EXECUTED (default: train_gpt.py of this repository, "
        "packed for a run that was started packed).",
    )
    add(
        "--track",
        choices=checks.TRACKS,
        default="10min_16mb",
        help="Track whose limits hold; non_record_16mb has no 600 s (default: %(default)s).",
    )
    add(
        "--skip",
        nargs="+",
        action="extend",
        default=[],
        choices=CHECKS,
        metavar="CHECK",
        help=f"Checks to leave out, of {', '.join(CHECKS)}.",
    )
    add("--out", type=Path, help="JSON file to which the report is written.")
    return top


def report(given: argparse.Namespace, lines: list[Line]) -> dict[str, Any]:
    """What --out holds."""
    words = ("ok", "FAILED", "skipped")
    script = given.script or common.ROOT / "train_gpt.py"
    return dict(
        folder=given.run.name,
        torch=torch.__version__,
        script_sha256=hashlib.sha256(packing.text_of(script)).hexdigest(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        counts={word: sum(line.status == word for line in lines) for word in words},
        checks=[line._asdict() for line in lines],
    )


def run(given: argparse.Namespace) -> int:
    lines = []
    for line in audit_folder(given):
        several = line.run != given.run.name
        common.say(f"{line} [{line.run}]" if several else str(line))
        lines.append(line)
    told = report(given, lines)
    common.say(", ".join(f"{count} {word}" for word, count in told["counts"].items()))
    if given.out:
        common.write_json(given.out, told)
    return 1 if told["counts"]["FAILED"] else 0


def main() -> int:
    return common.run_tool(run, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
