"""Checks of a run's files: data, script, sizes, header, figures, clocks, and its own verdict."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt
from records.tools import checks, packing
from records.tools.audit_scoring import EXACT_LINE
from records.tools.audited import Audit, Failed, Run, Skipped, begin, demand
from records.tools.common import FINEWEB_BYTES, FINEWEB_DOCUMENTS, FINEWEB_SPREAD, ROOT, sha256
from records.tools.logs import same

FOLDED = 2e-4  # the same as a share: what a tokenizer that folds text may change of --text
UNLOGGED = 0.1  # seconds of training that result.json may have and the log, between lines, not
SCORES = ("roundtrip", "sliding", "ttt")

# ---- 1. Data -------------------------------------------------------------------------------------


def check_data(audit: Audit) -> str:
    """SHA-256 of the validation shards, in the order of their names, and the tokenizer.

    It is that of the run: a split or tokenizer that is another gives another score.
    """
    sums, documents = hashlib.sha256(), int((audit.tokens == audit.script.BOS).sum())
    shards = audit.shards("val")
    for path in (*shards, audit.tokenizer):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                sums.update(block)
    scored = audit.run.matches(r".*\bdata_sha256:(\w{64})")
    if scored and scored[-1][0] != sums.hexdigest():
        was, here = scored[-1][0][:12], sums.hexdigest()[:12]
        what = "the run was scored with other validation shards or another tokenizer"
        raise Failed(f"{what} (sha256 {was}, here {here})")
    return (
        f"sha256 {sums.hexdigest()} of {len(shards)} validation shards and the tokenizer: "
        f"{len(audit.tokens)} tokens, {documents} documents"
    )


class Text(NamedTuple):
    """What the tokens of the split decode to."""

    documents: int
    bytes: int  # in UTF-8


def decoded(audit: Audit) -> Text:
    """The split as text, document by document.

    A character that the end of the split cuts in two is what is there of it: its byte pieces, one
    byte each.
    """
    tokenizer = spm.SentencePieceProcessor(model_file=str(audit.tokenizer))
    starts = np.flatnonzero(audit.tokens == audit.script.BOS)
    if not len(starts) or starts[0]:
        raise Failed(f"the split begins with token {audit.tokens[0]}, not with a document (BOS)")
    total, ends = 0, [*starts[1:], len(audit.tokens)]
    for start, end in zip(starts, ends):
        ids = audit.tokens[start + 1 : end].tolist()
        while end == len(audit.tokens) and ids and tokenizer.is_byte(ids[-1]):
            ids.pop()
            total += 1
        total += len(tokenizer.decode(ids).encode())
    return Text(len(starts), total)


def check_bytes(audit: Audit) -> str:
    """The bytes that the score divides by are those of the decoded text."""
    begin("bytes", f"{len(audit.tokens):,} tokens of the split, decoded and counted")
    text, counted = decoded(audit), audit.whole[0].val_bytes
    wrong: list[str] = []
    logged = audit.run.matches(r"val_tokens:\d+ val_bytes:(\d+)")
    if counted != text.bytes:
        more = f"{counted / text.bytes - 1:+.2%}"
        what = f"the script counts {counted} bytes ({more})"
        wrong.append(f"{what}, the decoded text has {text.bytes}")
    told = logged[-1][0] if logged else "no"
    if told != str(text.bytes):
        wrong.append(f"the log says {told} bytes, the decoded text has {text.bytes}")
    measured = f"{counted} bytes, those of {text.documents} decoded documents"
    if path := audit.given.text:
        size = path.stat().st_size
        measured += f"; {path.name} has {size}"
        if abs(size - text.bytes) > FOLDED * size:
            what = f"{path.name} has {size} bytes, the decoded documents have {text.bytes}"
            wrong.append(what)
    if text.documents == FINEWEB_DOCUMENTS or "fineweb10B" in audit.config.data_path:
        canonical = f"{FINEWEB_BYTES} within {FINEWEB_SPREAD}"
        measured += f"; FineWeb's split has {canonical}"
        off = abs(text.bytes - FINEWEB_BYTES) > FINEWEB_SPREAD
        if text.documents != FINEWEB_DOCUMENTS or off:
            here = f"here are {text.documents} documents of {text.bytes} bytes"
            wrong.append(f"{here}, FineWeb's split is {FINEWEB_DOCUMENTS} of {canonical}")
    demand(wrong)
    return measured


# ---- 2. Script, sizes, header --------------------------------------------------------------------


def our_script(runs: Sequence[Run], place: Path) -> Path:
    """This repository's script in the form in which the runs were started.

    The packed form is made anew in the folder `place`: packing gives the same bytes each time.
    InputError if the runs were of another packed script. One that lies beside them is named, not
    taken: what a stranger has written is executed only where --script says so.
    """
    script = ROOT / "train_gpt.py"
    told = {run.log.run.versions.get("packed_sha256", "") for run in runs}
    if told == {""}:
        return script
    text = script.read_bytes()
    packed = packing.pack(text)
    if told == {hashlib.sha256(packed).hexdigest()}:
        (place / packing.READABLE).write_bytes(text)
        (place / "train_gpt.py").write_bytes(packed)
        return place / "train_gpt.py"
    instead = "<the packed train_gpt.py that was started>"
    folder = runs[0].log.path.parent
    for near in (folder, Path("packed"), ROOT / "packed"):
        path = near / "train_gpt.py"
        if path.is_file() and told == {sha256(path)}:
            instead = str(path)
    hashes = ", ".join(digest[:12] for digest in sorted(told - {""}))
    raise train_gpt.InputError(
        f"{folder} is of a packed script (sha256 {hashes}), which is not this repository's "
        f"train_gpt.py, packed: give --script {instead}"
    )


def check_script(audit: Audit) -> str:
    """The script that was audited is the one that wrote the log; so is its packed form, if any."""
    data, log = audit.script_path.read_bytes(), audit.run.log.run
    wrong: list[str] = []
    text, logged = packing.text_of(audit.script_path), log.versions["script_sha256"]
    found, packed = hashlib.sha256(text).hexdigest(), hashlib.sha256(data).hexdigest()
    versions = (audit.run.result or {}).get("versions", {})
    for where, given in (("the log", log.versions), ("result.json", log.versions | versions)):
        for form, here in (("script", found), ("packed", packed)):
            told = given.get(f"{form}_sha256", here)
            if told != here:
                what = f"{where} is of {form} {told[:12]}, this is {here[:12]}"
                wrong.append(f"{what} (--script names another)")
    if log.script is not None and hashlib.sha256(log.script).hexdigest() != logged:
        wrong.append("the source in the log has another hash than the log says")
    demand(wrong)
    unpacked = f", {len(text)} of text" if text != data else ""
    return f"sha256 {found}, {len(data)} bytes{unpacked}, as in the log"


def check_sizes(audit: Audit) -> str:
    """Bytes of script and artifact, from the files, against log, result.json and the limit."""
    data, log, result = audit.run.artifact, audit.run.log, audit.run.result or {}
    if data is None:
        raise Skipped("no artifact of this run is here")
    script = audit.script_path.stat().st_size
    true = dict(code=script, model=len(data), total=script + len(data))
    wrong: list[str] = []
    found = hashlib.sha256(data).hexdigest()
    told_digest = str(result.get("artifact_sha256", found))
    for where, given in (("log", log.words["artifact"]), ("result.json", told_digest)):
        if given != found:
            wrong.append(f"the artifact of {where} is {given[:12]}, this is {found[:12]}")
    for name, size in true.items():
        if log.values[name] != size:
            wrong.append(f"the log gives {log.values[name]:.0f} bytes of {name}, the files {size}")
        told = result.get(f"bytes_{name}", size)
        if told != size:
            wrong.append(f"result.json gives bytes_{name} {told}, the files {size}")
    if true["total"] > checks.SIZE_LIMIT:
        wrong.append(f"{true['total']} bytes exceed {checks.SIZE_LIMIT}")
    demand(wrong)
    total = f"{script} + {len(data)} = {true['total']} bytes of {checks.SIZE_LIMIT}"
    return f"{total}; artifact sha256 {found}, as in the log"


def check_header(audit: Audit) -> str:
    """The architecture in the artifact is that of the run, field by field; so is the tokenizer."""
    if audit.run.artifact is None:
        raise Skipped("no artifact of this run is here")
    try:
        _, architecture, kind = audit.script.load_model(audit.run.artifact, "the artifact")
        audit.script.check_artifact_tokenizer(audit.run.artifact, "the artifact", audit.config)
    except audit.script.InputError as error:
        raise Failed(str(error)) from None
    carried, logged = asdict(architecture), asdict(audit.config)
    told = (audit.run.result or {}).get("config", logged)
    wrong: list[str] = []
    for where, given in (("log", logged), ("result.json", told)):
        for name, value in carried.items():
            if given.get(name) != value:
                wrong.append(f"{name} is {value} in the artifact, {given.get(name)} in {where}")
    labels = audit.run.matches(r"Serialized model (\S+):")
    if labels != [(kind,)]:
        wrong.append(f"the artifact holds {kind}, the log says {labels}")
    demand(wrong)
    return f"all {len(carried)} fields of the artifact's architecture are those of the run"


# ---- 3. Figures ----------------------------------------------------------------------------------


class Exact(NamedTuple):
    """A final score to eight digits, as the log writes it."""

    name: str  # of SCORES
    loss: str
    bpb: str


class Split(NamedTuple):
    """What a run has scored."""

    tokens: int
    bytes: int


def log_faults(run: Run, exact: Sequence[Exact], split: Split) -> Iterator[str]:
    """Scores of the log that do not follow from one another."""
    lines = run.matches(r"final_\S+_(roundtrip|sliding|ttt) val_loss:(\S+) val_bpb:(\S+)")
    rounded = {name: (loss, bpb) for name, loss, bpb in lines}
    for name, loss, bpb in exact:
        follows = float(loss) / math.log(2) * split.tokens / split.bytes
        if not math.isclose(follows, float(bpb), abs_tol=1e-7):
            counts = f"{split.tokens}/{split.bytes} bytes"
            yield f"{name} val_bpb {bpb} does not follow from val_loss {loss}, {counts}"
        pair = rounded.get(name)
        if pair is None or not (same(pair[0], float(loss)) and same(pair[1], float(bpb))):
            yield f"{name}: the log gives {pair} and {loss}, {bpb}"


def result_faults(run: Run, exact: Sequence[Exact], split: Split) -> Iterator[str]:
    """What result.json tells otherwise than the log."""
    result = run.result or {}
    for name, loss, bpb in exact:
        told = result.get(name, {})
        logged = dict(val_loss=loss, val_bpb=bpb, val_tokens=split.tokens, val_bytes=split.bytes)
        for key, text in logged.items():
            if not same(text, told.get(key, math.inf)):
                yield f"{name} {key} is {text} in the log, {told.get(key)} in result.json"
    if {score.name for score in exact} != {name for name in SCORES if name in result}:
        yield "log and result.json have other scores"
    config = result.get("config", {})
    shown = {name.upper(): train_gpt.show(value) for name, value in config.items()}
    settings = run.settings
    for name in sorted({key for key, _ in shown.items() ^ settings.items()}):
        yield f"{name} is {settings.get(name)} in the log, {shown.get(name)} in result.json"
    last, steps = result.get("pre_quant", {}).get("val_bpb", math.nan), result.get("steps")
    before = run.number("pre_bpb")
    if not same(f"{before:.4f}", last) or run.number("steps") != steps:
        yield (
            f"before rounding, val_bpb is {before} (step {run.number('steps'):.0f}) in the log, "
            f"{last:.4f} (step {steps}) in result.json"
        )


def check_figures(audit: Audit) -> str:
    """Log and result.json tell the same, and val_bpb follows from loss, tokens and bytes."""
    run = audit.run
    exact = [Exact(*groups) for groups in run.matches(EXACT_LINE)]
    counts = run.matches(r"val_tokens:(\d+) val_bytes:(\d+)")[-1]
    split = Split(*map(int, counts))
    wrong = [*log_faults(run, exact, split)]
    other = "agrees with itself; there is no result.json"
    if run.result is not None:
        wrong += result_faults(run, exact, split)
        other = "agrees with result.json"
    demand(wrong)
    scores = ", ".join(f"{score.name} {score.bpb}" for score in exact)
    return f"val_bpb {scores}: the log {other}"


def check_verdict(audit: Audit) -> str:
    """Neither script nor launcher have said that the run is no submission."""
    run = audit.run
    wrong = [f"{where}: not a submission: {reason}" for where, reason in run.log.disqualified]
    if run.result is not None and run.result.get("fits") is not True:
        wrong.append(f"result.json says that fits is {run.result.get('fits')}")
    if run.exit_code:
        wrong.append(f"run.json says that the run ended with exit code {run.exit_code}")
    demand(wrong)
    return "nothing in the run's files says that it is not a submission"


# ---- 4. Clocks -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the log that has a time."""

    step: int
    kind: str  # train, val
    loss: str
    ms: int
    average: float

    def __str__(self) -> str:
        return f"step {self.step} ({self.kind})"


class Course(NamedTuple):
    """The rows of a run, and the first step that its log has."""

    rows: list[Row]
    first: int


ROW = (
    r"step:(\d+)/\d+ (train|val)_loss:(\S+) (?:val_bpb:\S+ )?train_time:(\d+)ms step_avg:([\d.]+)ms"
)


def read_course(run: Run) -> Course:
    """Rows of the log; of a run that was resumed those that count: what follows the checkpoint was
    made again."""
    rows: list[Row] = []
    first = 1
    for step, kind, loss, ms, average, resumed in run.matches(rf"{ROW}|^resumed from step:(\d+)"):
        if not resumed:
            rows.append(Row(int(step), kind, loss, int(ms), float(average)))
            continue
        at = int(resumed)
        if not rows:
            first = at + 1
        kept = [row for row in rows if row.step < at or row.step == at and row.kind == "train"]
        rows = kept
    return Course(rows, first)


def clock_faults(course: Course, every: int, iterations: int) -> Iterator[str]:
    """Steps and times that do not go on, averages that are not theirs, steps that are missing."""
    rows, first = course
    for before, row in itertools.pairwise(rows):
        again = row.kind == before.kind == "train" and row.step == before.step
        if row.step < before.step or row.ms < before.ms or again:
            yield f"{row}, {row.ms} ms, comes after {before}, {before.ms} ms"
    for row in rows:
        count = max(row.step, 1)
        if abs(row.average * count - row.ms) > 0.005 * count + 0.51:
            yield f"{row}: {row.average} ms a step are not {row.ms} ms"
    trained = {row.step for row in rows if row.kind == "train"}
    due = {
        n for n in range(first, rows[-1].step + 1) if n <= 10 or n % every == 0 or n == iterations
    }
    if missing := sorted(due - trained):
        yield f"no line of steps {', '.join(map(str, missing[:5]))}"
    if rows[-1].step > iterations:
        yield f"{rows[-1]} is beyond ITERATIONS={iterations}"


def row_faults(row: Row, entry: dict[str, Any], batch: int) -> Iterator[str]:
    """What an entry of metrics.jsonl tells otherwise than its row of the log."""
    loss, seconds = entry.get(f"{row.kind}_loss", math.inf), entry["train_seconds"]
    if math.isfinite(float(row.loss)):
        told = loss is not None and same(row.loss, loss)
    else:  # a skipped step has null for its loss
        told = loss is None
    if not told:
        yield f"{row}: {row.kind}_loss {row.loss} in the log, {loss} in metrics.jsonl"
    elif not same(row.ms, 1e3 * seconds):
        yield f"{row}: {row.ms} ms in the log, {1e3 * seconds:.1f} in metrics.jsonl"
    elif row.kind == "train":
        speed = entry.get("tokens_per_second", math.nan)
        if not math.isclose(speed * seconds, row.step * batch, rel_tol=1e-6):
            yield f"{row}: {speed:.0f} tokens/s are not its tokens and time"


def metric_faults(
    rows: Sequence[Row], metrics: Sequence[dict[str, Any]], batch: int, damaged: int = 0
) -> Iterator[str]:
    """Lines of the log that metrics.jsonl tells otherwise, or has not, but for damaged ones."""
    waiting: dict[tuple[int, str], list[dict[str, Any]]] = {}
    count = absent = 0
    for entry in metrics:
        for kind in ("train", "val"):
            if f"{kind}_loss" in entry:
                waiting.setdefault((entry["step"], kind), []).append(entry)
                count += 1
    for row in rows:
        entries = waiting.get((row.step, row.kind))
        if entries:
            yield from row_faults(row, entries.pop(0), batch)
        else:
            absent += 1
    if absent > damaged or any(waiting.values()):
        yield f"the log has {len(rows)} lines of steps, metrics.jsonl {count}"


class Times(NamedTuple):
    """Seconds of a run by what they were spent on."""

    trained: float
    calibrated: float
    evaluated: float


def read_times(run: Run, rows: Sequence[Row]) -> Times:
    """From the log: the first validation of the last step is before calibration."""
    trained = next(row for row in rows if row.kind == "val" and row.step == rows[-1].step)
    calibrated = run.log.calibrated_ms
    return Times(trained.ms / 1e3, calibrated / 1e3, run.number("eval_ms") / 1e3)


def limit_faults(audit: Audit, times: Times, rows: Sequence[Row]) -> Iterator[str]:
    """Times beyond their limits, and steps after the end."""
    run = audit.run
    cap, allowed = limits(audit)
    seconds = times.trained + times.calibrated
    told = (run.result or {}).get("train_seconds", seconds)
    if abs(told - seconds) > UNLOGGED:
        yield f"training took {seconds:.3f} s in the log, {told:.3f} s in result.json"
    if (most := max(seconds, told, rows[-1].ms / 1e3)) > cap:
        yield f"training and calibration took {most:.3f} s, more than {cap}"
    for ms, step in run.matches(r"stopping_early: \S+ train_time:(\d+)ms step:(\d+)/"):
        if late := [row for row in rows if row.step > int(step)]:
            yield f"{late[0]} comes after the end at step {step}, {ms} ms"
    if times.evaluated > allowed:
        yield f"evaluation took {times.evaluated:.3f} s in all, more than {allowed}"


def limits(audit: Audit) -> tuple[float, float]:
    """Seconds that training with calibration, and all evaluation, may take."""
    track = checks.TIME_LIMIT if audit.given.track == "10min_16mb" else math.inf
    cap = audit.config.max_wallclock_seconds or math.inf
    return min(cap, track), min(audit.config.eval_limit_seconds, track)


def check_clocks(audit: Audit) -> str:
    """Training, calibration and evaluation within their limits, in a log whose times go on.

    They go on from step 1, or from the checkpoint of another log that the run says it resumed
    before its first line.
    """
    run, config = audit.run, audit.config
    course = read_course(run)
    rows, first = course
    if not any(row.kind == "val" for row in rows):
        raise Failed("the log has no validation of its last step")
    wrong = [*clock_faults(course, config.train_log_every, config.iterations)]
    other = "go on; there is no metrics.jsonl"
    if run.metrics is not None:
        wrong += metric_faults(rows, run.metrics, config.train_batch_tokens, run.damaged)
        other = "agree with metrics.jsonl"
    if run.damaged:
        other += f", of which {run.damaged} damaged lines were left out"
    times = read_times(run, rows)
    wrong += limit_faults(audit, times, rows)
    demand(wrong)
    cap, allowed = limits(audit)
    begun = f" (the log begins after step {first - 1}, resumed)" if first > 1 else ""
    return (
        f"{rows[-1].step} steps{begun}, {times.trained:.3f} s of training + "
        f"{times.calibrated:.3f} of calibration (cap {cap}), {times.evaluated:.3f} s of evaluation "
        f"(limit {allowed}); {len(rows)} lines {other}"
    )
