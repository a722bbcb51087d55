"""records/tools: every tool runs on something tiny, and its help is in whole sentences."""

import argparse
import hashlib
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from helpers import HANG

import train_gpt as tg
from records.tools import (
    ablate,
    audit,
    bench,
    common,
    fault_job,
    gpu_check,
    landing,
    packages,
    rate,
    step_times,
)
from records.tools.dryrun import dryrun

SCRIPTS = common.ROOT / "records" / "tools"
APART = {"report", "gpu_check", "fault_job"}  # another's command, a GPU's, one that others start
TOOLS = sorted(
    path.stem
    for path in SCRIPTS.glob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path.stem not in APART
)
TINY = dict(
    PRESET="T,tiny",
    MODEL_DIM="16",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    NUM_PRELUDE="1",
    NUM_SHARED="1",
    NUM_CODA="1",
    NUM_LOOPS="2",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="128",
    VAL_BATCH_SIZE="4096",
    ITERATIONS="3",
    WARMDOWN_ITERS="1",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="0",
    DTYPE="float32",  # with which a processor is faster
)


def words_of(variables: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


# ---- Help


def parser_of(tool: str) -> argparse.ArgumentParser:
    module = importlib.import_module(f"records.tools.{tool}")
    return module.make_parser() if hasattr(module, "make_parser") else module.parser()


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options of a parser and of its commands."""
    for one in parsers(parser):
        for action in one._actions:
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                yield action


@pytest.mark.parametrize("tool", [*TOOLS, "gpu_check", "dryrun.dryrun"])
def test_help_is_in_sentences_with_defaults(tool: str) -> None:
    for action in actions(parser_of(tool)):
        name, text = action.option_strings or [action.dest], action.help or ""
        assert re.match(r"[A-Z].*\.$", text), f"{tool} {name}: {text!r}"
        if action.default not in (None, False, [], argparse.SUPPRESS) and action.option_strings:
            assert "(default: " in text, f"{tool} {name}: {text!r}"


@pytest.mark.quick
@pytest.mark.parametrize(
    "module, words, option",
    [
        (ablate, ["run", "T"], "--set"),
        (ablate, ["run", "T"], "--job"),
        (bench, ["plain"], "--set"),
        (bench, ["ab"], "--a"),
        (rate, [], "--set"),
        (landing, [], "--set"),
        (dryrun, [], "--set"),
        (gpu_check, [], "--only"),
        (audit, ["run"], "--skip"),
    ],
)
def test_a_list_given_twice_keeps_both_parts(module: Any, words: list[str], option: str) -> None:
    """argparse's default would keep the last part alone, without a word."""
    parser = getattr(module, "make_parser", None) or module.parser
    one, other = {"--only": ("attention", "levels"), "--skip": ("causality", "bytes")}.get(
        option, ("SEED=1", "DTYPE=float32")
    )
    args = parser().parse_args([*words, option, one, option, other])
    assert getattr(args, option[2:]) == [one, other]


@pytest.mark.parametrize("tool", [*TOOLS, "gpu_check", "dryrun.dryrun"])
def test_help_is_readable_at_80_columns(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is broken by the terminal, and none of the description runs into the next."""
    monkeypatch.setenv("COLUMNS", "80")
    for parser in parsers(parser_of(tool)):
        for line in parser.format_help().splitlines():
            assert len(line) <= 80, f"{tool}: {line}"
        for line in (parser.description or "").splitlines():
            assert not re.search(r"\S {4,}[^ #]", line), f"{tool}: {line}"


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_starts_by_its_path(
    tool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From another folder, where it finds our modules itself; its help names its own command."""
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if not Path(common.ROOT, "tests").is_relative_to(path)]
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{tool}.py"), "--help"])
    with mock.patch.dict(sys.modules), pytest.raises(SystemExit) as end:
        for name in [name for name in sys.modules if name.partition(".")[0] in packages.OURS]:
            del sys.modules[name]
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert end.value.code == 0
    assert f"python records/tools/{tool}.py" in capsys.readouterr().out


def test_a_report_is_also_made_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "report.py"), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ablate.py report ")


# Starts one tool after the other by its path, each as if no other had been.
START_ALL = """
import os, runpy, sys
path, modules = sys.path[1:], {*sys.modules}
for script in sys.argv[1:]:
    sys.argv, sys.path[:] = [script, "--help"], [os.path.dirname(script), *path]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
    for name in sys.modules.keys() - modules:
        del sys.modules[name]
"""


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    """-S: Python does without what is installed. The line is a command that mends it."""
    tools = [*TOOLS, *sorted(APART)]
    paths = [str(SCRIPTS / f"{tool}.py") for tool in tools]
    command = [sys.executable, "-S", "-c", START_ALL, *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert done.stdout == len(tools) * "2\n", done.stderr
    python, root = shlex.quote(sys.executable), re.escape(shlex.quote(str(common.ROOT)))
    lines = done.stderr.splitlines()
    assert len(lines) == len(tools), done.stderr
    for tool, line in zip(tools, lines):
        assert re.fullmatch(
            rf"{tool}.py: the package (numpy|torch|sentencepiece) is missing: {python} "
            rf"-m pip install -r {root}/(records/tools/)?requirements.txt",
            line,
        ), line


def test_a_module_of_ours_that_is_missing_is_no_package() -> None:
    """A mistake of ours has its traceback, and so has an import by another module."""
    for module, missing in (("__main__", "records.nothing"), ("records.tools.race", "absent")):
        with pytest.raises(ModuleNotFoundError), packages.told_if_missing(module):
            importlib.import_module(missing)


# ---- rate.py and step_times.py


def test_rate_measures_every_rounding_and_codec(
    corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, variables = tmp_path / "new" / "r.json", words_of(corpus | TINY | {"GPTQ_BATCHES": "1"})
    words = ["rate.py", "--set", *variables, "--seeds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert rate.main() == 0
    runs = json.loads(out.read_text())
    assert [run["seed"] for run in runs] == [1, 2] and runs[0]["steps"] == 3
    for run in runs:
        assert run["roundings"].keys() == rate.ROUNDINGS.keys()
        for name, found in run["roundings"].items():
            assert found["gap"] == pytest.approx(found["val_bpb"] - run["float32"]["val_bpb"])
            assert all(size > 0 for size in found["bytes"].values()), name
        sizes = {name: found["bytes"]["zlib"] for name, found in run["roundings"].items()}
        assert sizes["int4"] < sizes["int6"] < sizes["int8"]
        assert abs(run["roundings"]["int8"]["gap"]) < abs(run["roundings"]["int4"]["gap"]) + 1e-3
    table = capsys.readouterr().out
    assert len(re.findall(r"(?m)^\| int\d.* ± ", table)) == len(rate.ROUNDINGS)


# Its weights are averaged, and its clip is chosen among trials of the export.
FRONTIER = dict(
    PRESET="frontier,tiny",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    MLP_MULT="1",
    ROPE_DIMS="8",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="128",
    ITERATIONS="3",
    WARMUP_STEPS="0",
    EVAL_STRIDE="0",
)


def test_rate_rounds_a_frontier(
    corpus: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its own rule of the clip, of no number before the export, is left behind."""
    few = {name: rate.ROUNDINGS[name] for name in ("int6", "int6 12.85 sigmas + GPTQ")}
    monkeypatch.setattr(rate, "ROUNDINGS", few)
    words = words_of(corpus | FRONTIER | {"GPTQ_BATCHES": "1", "CODEC": "zlib"})
    monkeypatch.setattr(sys, "argv", ["rate.py", "--set", *words])
    assert rate.main() == 0
    assert re.findall(r"(?m)^\| (int\d[^|]*) \|", capsys.readouterr().out) == [*few]


@pytest.mark.parametrize("preset", tg.SYSTEMS)
def test_a_rounding_is_the_same_of_every_run(preset: str) -> None:
    """The growing presets have a clip, a floor and QAT of their own, the frontier a clip."""
    run = tg.Config.from_env(dict(PRESET=preset))
    for name, rounding in rate.ROUNDINGS.items():
        made, usual = rate.rounded(run, rounding), rate.rounded(tg.Config(), rounding)
        for option in ("matrix_bits", *rate.BASE):
            assert getattr(made, option) == getattr(usual, option), (name, option)
        assert not made.fits_by_clip and not made.qat


def test_rate_keeps_the_weights_that_the_run_exports(corpus: dict) -> None:
    """They are averaged and then refitted; after its export a run has its last weights again."""
    env = dict(AVERAGE="ema", REFIT_STEPS="1", GPTQ_BATCHES="1", MATRIX_BITS="6")
    config = tg.Config.from_env(corpus | TINY | env)
    found = rate.train(config)
    assert found.result["pre_quant"] != found.result["last_weights"]
    artifact = tg.pack(found.model, config, found.hessians)
    assert hashlib.sha256(artifact).hexdigest() == found.result["artifact_sha256"]


def test_integers_are_packed_to_their_bits() -> None:
    q = tg.torch.tensor([-8, 7, 0, -1], dtype=tg.torch.int8)
    assert rate.tightly(q, 4) == bytes([0x0F, 0x87])


def test_step_times_are_of_every_row_and_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "SIZES", [step_times.Size(16, 1, 16, 32)])
    out = tmp_path / "times.jsonl"
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["step_times.py", "--steps", "1", "--out", str(out)])
        assert step_times.main() == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = [f"{row} {passes}" for row in ("plain", "set") for passes in (1, 2, 3)]
    assert [sorted(line["milliseconds"]) for line in lines] == [sorted(names)] * 2
    assert lines[0]["width"] == 16 and "torch" in lines[0]["versions"]


# ---- faults.py


@pytest.mark.bits
def test_faults_makes_a_fault_and_reports_it(
    corpus: dict,
    main_here: Callable[[Mapping[str, str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run that is hit and the one that goes on are processes; one that nothing hits is not."""
    faults = importlib.import_module("records.tools.faults")
    words = ["table", "--only", "^SIGHUP in training", "--out", "out"]
    words += ["--data", corpus["DATA_PATH"], "--tokenizer", corpus["TOKENIZER_PATH"]]

    def finish(name: str, *rest: Any) -> Any:
        if name != "whole1":
            return fault_job.finish(name, *rest)
        given = fault_job.BASE | dict(RUN_ID=name)
        assert main_here({key: str(value) for key, value in given.items()}) == 0
        return SimpleNamespace(folder=fault_job.WORK / name)

    monkeypatch.setitem(fault_job.BASE, "TOKENIZER_PATH", "")  # set by the tool
    monkeypatch.setitem(fault_job.BASE, "DTYPE", "float32")  # with which a processor is faster
    monkeypatch.setattr(faults, "finish", finish)
    monkeypatch.setattr(sys, "argv", ["faults.py", *words])
    monkeypatch.chdir(tmp_path)
    assert faults.main() == 0
    report = (tmp_path / "out" / "report.md").read_text()
    (row,) = [line for line in report.splitlines() if line.startswith("| SIGHUP in training")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == "0: 5" and cells[-2:] == ["equal", "yes"], row


def test_the_committed_report_is_that_of_the_committed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = importlib.import_module("records.tools.faults")
    folder = common.ROOT / "records" / "faults"
    for path in folder.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(sys, "argv", ["faults.py", "report", "--out", str(tmp_path)])
    assert faults.main() == 0
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "nowhere"], "--data nowhere holds no fineweb_train_*.bin"),
        (["--only", "no such"], "--only no such matches no fault"),
    ],
)
def test_faults_tells_a_mistake_in_a_line(
    words: list[str],
    told: str,
    corpus: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults = importlib.import_module("records.tools.faults")
    monkeypatch.chdir(tmp_path)
    given = ["table", "--data", corpus["DATA_PATH"], "--out", str(tmp_path / "out"), *words]
    monkeypatch.setattr(sys, "argv", ["faults.py", *given])
    assert faults.main() == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("tool", "words", "told"),
    [
        ("bench", ["--steps", "0"], "--steps 0 is below 1"),
        ("bench", ["ranks", "0"], "ranks 0 is below 1"),
        ("bench", ["ranks", "2", "--link-gbs", "0"], "--link-gbs 0 is not above 0"),
        ("bench", ["export", "--val-tokens", "0"], "--val-tokens 0 is below 1"),
        ("copying", ["run", "--windows", "0"], "--windows 0 is below 1"),
        ("dryrun.dryrun", ["--ranks", "0"], "--ranks 0 is below 1"),
        ("dryrun.dryrun", ["--share", "-1"], "--share -1 is below 1"),
        ("faults", ["kills", "--ranks", "1", "0"], "--ranks 0 is below 1"),
        ("rate", ["--seeds", "0"], "--seeds 0 is below 1"),
        ("worth", ["run", "--resamples", "0"], "--resamples 0 is below 1"),
    ],
)
def test_a_number_that_nothing_can_be_made_of_is_named(
    tool: str,
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, *words])
    assert importlib.import_module(f"records.tools.{tool}").main() == 2
    assert capsys.readouterr().err.removeprefix("nothing was timed: ") == f"{told}\n"


def test_tools_do_not_change_the_environment_of_a_run() -> None:
    given = dict(os.environ, MODEL_DIM="6", SEED="3", USE_DEPTH_EMBED="1", HOME="/x")
    clean = common.without_options(given)
    assert clean["HOME"] == "/x" and not {"MODEL_DIM", "SEED", "USE_DEPTH_EMBED"} & clean.keys()
