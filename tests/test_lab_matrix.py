"""records/tools/ablate.py: the table, what a run is given, a matrix that is stopped and goes on."""

import contextlib
import fcntl
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from helpers import fork_ranks, nobody_reads, wait_for

import train_gpt as tg
from records.tools import ablate, common, logs

TABLE = ablate.read_table(common.ROOT / "records" / "runs.toml")
SMALL = dict(
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
    VAL_BATCH_SIZE="1024",
    ITERATIONS="3",
    WARMDOWN_ITERS="1",
    WARMUP_STEPS="0",
    TRAIN_LOG_EVERY="1",
    MAX_WALLCLOCK_SECONDS="0",
    VAL_LOSS_EVERY="1",
    DEVICE="cpu",
    DTYPE="float32",  # with which a processor is faster
)
PUBLISHED = json.loads((common.ROOT / "records" / "reference_runs.json").read_text())["runs"]
# Stands for train_gpt.py where only the matrix is tested: writes a result, or fails for preset D.
FAKE = """
import json, os, pathlib, sys
config, env = json.loads(sys.argv[1]), dict(os.environ)
folder = pathlib.Path(env["LOG_DIR"]) / env["RUN_ID"]
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text('{"step": 1, "train_seconds": 1}\\n')
if env["PRESET"] == "D":
    sys.exit("[rank 0] out of luck")
(folder / "result.json").write_text(json.dumps(
    dict(config=config, roundtrip=dict(val_bpb=1), fits=True, env=env)))
"""
REFUSE = 'print("[rank 0] no such data", file=sys.stderr), sys.exit(2)'


def words_of(given: Mapping[str, str]) -> list[str]:
    return ["--set", *(f"{name}={value}" for name, value in given.items())]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["ablate.py", *words])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return ablate.main()


def fake_script(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Has every run execute this text instead of train_gpt.py."""
    monkeypatch.setattr(
        ablate.Run,
        "command",
        lambda run: [sys.executable, "-c", text, json.dumps(asdict(run.config()))],
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_script(monkeypatch, FAKE)


# ---- The table


@functools.cache
def config_at(name: str, scale_name: str) -> tg.Config | None:
    """A row at a scale, as the script takes it; None where the scale does not suit it."""
    row, scale = TABLE.rows[name], TABLE.scales.get(scale_name)
    if scale is not None and not ablate.suits(row, scale, TABLE):
        return None
    return tg.Config.from_env(ablate.variables(row, scale, scale_name, {}))


def test_every_published_run_has_a_row_that_the_script_takes() -> None:
    series = {name: f"series{run['series']}" for name, run in PUBLISHED.items()}
    for name, of in series.items():
        row = TABLE.rows[name.replace("'", "p")]
        assert (row.series, row.set) == (of, {"PRESET": row.name})
    assert [row.series for row in TABLE.rows.values()].count("wins") == 7
    for row in TABLE.rows.values():
        assert row.what and row.hypothesis, row.name
        if row.set.keys() <= common.OPTIONS:
            for name in ("", "tiny", *TABLE.scales):
                config_at(row.name, name)
    assert TABLE.rows["recur_3x3_768_qat"].set["QAT_FRACTION"] == "0.15"


def test_a_scale_divides_and_the_later_word_wins() -> None:
    given = {"PRESET": "recur_3x3_768", "MATRIX_LR": "0.1", "SCALAR_LR": "0.1"}
    row = ablate.Row("x", "s", "", "", [], given)
    scale = ablate.Scale("small", "", {"MODEL_DIM": 8}, {"SCALAR_LR": "0.2", "ITERATIONS": "7"})
    made = ablate.variables(row, scale, "small", {"MATRIX_LR": "0.3"})
    assert made == {
        "PRESET": "recur_3x3_768",
        "MODEL_DIM": "96",
        "SCALAR_LR": "0.1",
        "MATRIX_LR": "0.3",
        "ITERATIONS": "7",
    }
    assert ablate.variables(row, None, "tiny", {})["PRESET"] == "recur_3x3_768,tiny"
    warm = scale._replace(set={"WARMDOWN_ITERS": "40"})
    assert ablate.variables(row, warm, "small", {})["WARMDOWN_ITERS"] == "40"
    for made in (
        ablate.variables(row, warm, "small", {"WARMDOWN_FRACTION": "0.5"}),
        ablate.variables(row._replace(set={"WARMDOWN_FRACTION": "0.5"}), warm, "small", {}),
    ):
        assert "WARMDOWN_ITERS" not in made and tg.Config.from_env(made).warmdown_fraction == 0.5
    parts = scale._replace(divide={"MODEL_DIM": 8, "ROPE_DIMS": 4, "VE_DIM": 8})
    assert not {"ROPE_DIMS", "VE_DIM"} & ablate.variables(row, parts, "small", {}).keys()
    with_parts = row._replace(set={"ROPE_DIMS": "16", "VE_LAYERS": "1"})
    made = ablate.variables(with_parts, parts, "small", {})
    assert (made["ROPE_DIMS"], made["VE_DIM"]) == ("4", "16")
    with pytest.raises(ValueError, match="MODEL_DIM of x is not a multiple of 7"):
        ablate.variables(row, scale._replace(divide={"MODEL_DIM": 7}), "small", {})


def test_a_scale_gives_the_bytes_of_what_fits_by_its_size() -> None:
    scale = ablate.Scale("small", "", {}, {}, artifact=1000)
    limit = str(len(tg.script_file()) + 1000)
    row = ablate.Row("x", "s", "", "", [], {})
    assert "SIZE_LIMIT_BYTES" not in ablate.variables(row, scale, "small", {})
    for late in (
        {"MATRIX_BITS": "0"},
        {"QUANT_CLIP": "sdclip", "MATRIX_CLIP_SIGMAS": "0"},
        {"PRESET": "frontier"},
    ):
        made = ablate.variables(row._replace(set=late), scale, "small", {})
        assert made["SIZE_LIMIT_BYTES"] == limit
        made = ablate.variables(row._replace(set=late), scale._replace(artifact=0), "small", {})
        assert "SIZE_LIMIT_BYTES" not in made
    given = {"SIZE_LIMIT_BYTES": "7"}
    made = ablate.variables(row._replace(set={"MATRIX_BITS": "0"}), scale, "small", given)
    assert made["SIZE_LIMIT_BYTES"] == "7"


def test_a_scale_like_another_says_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    first = (
        "[scale.a]\nwhat = 'a'\ndivide = { MODEL_DIM = 2 }\nset = { SEED = 1, ITERATIONS = 8 }\n"
    )
    path.write_text(first + "[scale.b]\nlike = 'a'\nwhat = 'b'\nset = { ITERATIONS = 4 }\n")
    made = ablate.read_table(path).scales["b"]
    assert made == ("b", "b", {"MODEL_DIM": 2}, {"SEED": "1", "ITERATIONS": "4"}, "", 0)
    path.write_text("[scale.b]\nlike = 'a'\n" + first)
    with pytest.raises(ValueError, match="scale.b is like a, no scale before it"):
        ablate.read_table(path)


def test_pocket_narrow_has_the_steps_of_narrow_rows_at_pocket() -> None:
    """Although it shares time out by the milliseconds of the full width."""
    for name in ("frontier", "frontier_one_pass"):
        ours = ablate.asked_of(TABLE.rows[name], TABLE, "pocket_narrow", {})
        row = TABLE.rows[f"{name}_narrow"]
        pocket = ablate.asked_of(row, TABLE, "pocket", {})
        for key in ("WARMDOWN_FRACTION", "MUON_MOMENTUM_WARMUP_FRACTION"):
            assert float(ours.pop(key)) == pytest.approx(float(pocket.pop(key)), abs=1e-4)
        assert ours == pocket
        with pytest.raises(ValueError, match=f"wide as frontier_one_pass, not {row.name}"):
            ablate.asked_of(row, TABLE, "pocket_narrow", {})


@pytest.mark.parametrize(("scale", "factor"), [("pocket_short", 0.25), ("pocket_long", 4)])
def test_a_shorter_or_longer_pocket_shares_its_time_out_alike(scale: str, factor: float) -> None:
    """The parts of a run keep their shares, and so does what its average spans."""

    def config(name: str, scale: str) -> tg.Config:
        return tg.Config.from_env(ablate.asked_of(TABLE.rows[name], TABLE, scale, {}))

    ours, pocket = config("flat_6", scale), config("flat_6", "pocket")
    for field in ("iterations", "warmdown_iters", "muon_momentum_warmup_steps"):
        assert getattr(ours, field) == pytest.approx(factor * getattr(pocket, field), abs=1), field
    ours, pocket = config("frontier_narrow", scale), config("frontier_narrow", "pocket")
    assert ours.iterations == pytest.approx(factor * pocket.iterations, abs=1)
    spans = [(1 - each.ema_decay) * each.iterations for each in (ours, pocket)]
    assert spans[0] == pytest.approx(spans[1], rel=0.01)


def test_rows_at_pocket_are_scored_alike() -> None:
    """On the same pieces, without overlap and without training, whatever their presets do."""
    for row in TABLE.rows.values():
        full = config_at(row.name, "")
        assert full is not None
        share = full.rope_dims * full.num_heads / full.model_dim
        for name in TABLE.scales:
            config = config_at(row.name, name)
            if config is None:
                continue
            told = (config.vocab_size, config.eval_stride, config.ttt_lr, config.train_seq_len)
            assert told == (1024, 0, 0, 256), (row.name, name)
            width = config.model_dim / config.num_heads
            # Pairs of channels rotate: where a share is no even number, it is the next one.
            assert abs(config.rope_dims - share * width) < 1, row.name


def test_no_series_has_the_name_of_a_row() -> None:
    """`run NAME` would make the whole series."""
    assert not {row.series for row in TABLE.rows.values()} & TABLE.rows.keys()


CLOCK = {"MATRIX_LR": "0.1"}
GROWN = {"NUM_LOOPS": "3", "PASSES_SCHEDULE": "0:1,0.25:2,0.5:3"}
CUT = {"NUM_LOOPS": "2", "PASSES_SCHEDULE": "0:1,0.25:2", "TRUNCATE_FRACTION": "0.5"}
ROUNDED = {"NUM_LOOPS": "2", "PASSES_SCHEDULE": "0:1,0.5:2", "QAT_FRACTION": "0.25"}
SHARES = {"WARMDOWN_FRACTION": "0.75", "MUON_MOMENTUM_WARMUP_FRACTION": "0.25"}
TIMED = ablate.Table(
    rows={
        "clock": ablate.Row("clock", "s", "", "", [], CLOCK),
        "slow": ablate.Row("slow", "s", "", "", [], {"MATRIX_LR": "0.2"}),
        "grown": ablate.Row("grown", "s", "", "", [], GROWN),
        "rounded": ablate.Row("rounded", "s", "", "", [], ROUNDED),
        "rate": ablate.Row("rate", "s", "", "", [], {"QAT_LR_FACTOR": "0.2"}),
        "refit": ablate.Row("refit", "s", "", "", [], {"REFIT_STEPS": "16"}),
        "cut": ablate.Row("cut", "s", "", "", [], CUT),
        "shares": ablate.Row("shares", "s", "", "", [], GROWN | SHARES),
        "stepped": ablate.Row("stepped", "s", "", "", [], {"PASSES_SCHEDULE": "0:1,30:3"}),
        "unknown": ablate.Row("unknown", "s", "", "", [], {}),
    },
    scales={},
    claims={},
    milliseconds={
        "clock": [10.0],
        "slow": [25.0],
        "refit": [25.0],
        "rounded": [5, 10, 6, 20],  # one pass, two; one with rounding, two
        "rate": [5, 20],
        "grown": [5, 10, 20],
        "shares": [5, 10, 20],
        "cut": [10, 5, 20],  # two passes, truncated; one; two
        "stepped": [5, 20],
    },
)


def timed(name: str) -> dict[str, str]:
    scale = ablate.Scale("s", "", {}, {"ITERATIONS": "400", "WARMDOWN_ITERS": "120"}, "clock")
    row = TIMED.rows[name]
    return ablate.in_equal_time(row, ablate.variables(row, scale, "s", {}), TIMED, scale.clock)


def test_a_row_makes_the_steps_that_fit_into_the_time_of_the_clock() -> None:
    assert timed("clock") == CLOCK | {"ITERATIONS": "400", "WARMDOWN_ITERS": "120"}
    # 4,000 ms, of which the warm-down has the last 30 %
    assert timed("slow") == {"MATRIX_LR": "0.2", "ITERATIONS": "160", "WARMDOWN_ITERS": "48"}
    # 400 ms of refit, taken off
    assert timed("refit") == {"REFIT_STEPS": "16", "ITERATIONS": "144", "WARMDOWN_ITERS": "43"}
    # 1,000 ms at 5, 1,000 ms at 10, 2,000 ms at 20; the warm-down all at 20
    grown = {"ITERATIONS": "400", "WARMDOWN_ITERS": "60", "PASSES_SCHEDULE": "0:1,200:2,300:3"}
    assert timed("grown") == GROWN | grown
    # 1,000 ms at 5, 1,000 ms at 10, 2,000 ms at 20
    cut = {"ITERATIONS": "400", "WARMDOWN_ITERS": "60", "PASSES_SCHEDULE": "0:1,200:2"}
    assert timed("cut") == CUT | cut | {"TRUNCATE_FRACTION": "0.750000"}
    # 2,000 ms at 5, 1,000 ms at 10, 1,000 ms at 20; the warm-down 200 of those at 10
    rounded = {"ITERATIONS": "550", "WARMDOWN_ITERS": "70", "PASSES_SCHEDULE": "0:1,400:2"}
    assert timed("rounded") == ROUNDED | rounded | {"QAT_FRACTION": "0.090909"}
    # 200 steps in the first quarter, without a warm-down and with a rising momentum; 200 after it
    shares = {"WARMDOWN_FRACTION": "0.500000", "MUON_MOMENTUM_WARMUP_FRACTION": "0.500000"}
    grown.pop("WARMDOWN_ITERS")
    assert timed("shares") == GROWN | grown | shares
    for name in ("grown", "cut", "rounded", "shares"):
        tg.Config.from_env(timed(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "unknown has 1 modes of training and 0 entries in .milliseconds."),
        ("stepped", "PASSES_SCHEDULE of stepped counts steps"),
        ("rate", "QAT_LR_FACTOR of rate"),
    ],
)
def test_equal_time_needs_milliseconds_and_fractions(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timed(name)


def case(preset: str, given: dict[str, str]) -> tuple:
    """What decides the time of a step, of a row's variables or of a dry run's title."""
    config = tg.Config.from_env({**given, "PRESET": preset})
    passes = tuple(passes for _, passes in config.schedule())
    return preset, tuple(sorted(item for item in given.items() if item[0] not in TIMELESS)), passes


TIMELESS = """PRESET COMPILE PASSES_SCHEDULE MATRIX_LR CORE_LR_POWER MATRIX_BITS REFIT_STEPS
    WARMDOWN_FRACTION LR_FLOOR MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START
    MUON_MOMENTUM_WARMUP_FRACTION MUON_POLAR MUON_WD ADAM_WD SCALAR_WD AVERAGE DATA_SEED QUANT_CLIP
    GPTQ_BATCHES GPTQ_EMBED TIMESTEP_GAMMA_MAX QK_GAIN_INIT MIX_INIT""".split()
EQUAL_STEPS = "VOCAB_SIZE TRAIN_SEQ_LEN TRAIN_BATCH_TOKENS MICRO_BATCH_TOKENS".split()


def at_equal_steps(row: ablate.Row) -> dict[str, str]:
    """A row's variables with the batch and the pieces of the clock's, which its preset may lack."""
    ours, usual = (tg.Config.from_env(v) for v in (row.set, TABLE.rows["flat_6"].set))
    apart = [n for n in EQUAL_STEPS if getattr(ours, n.lower()) != getattr(usual, n.lower())]
    return row.set | {name: tg.show(getattr(usual, name.lower())) for name in apart}


def test_milliseconds_are_those_of_the_dry_run() -> None:
    found = {}
    for path in ("dryrun/pocket.json", "tools/dryrun/estimates.json"):
        for title, modes in json.loads((common.ROOT / "records" / path).read_text()).items():
            preset, *words = title.removesuffix(" step of 1/8 of a batch").split()
            given = dict(word.split("=", 1) for word in words)
            if given["COMPILE"] == "block":
                found[case(preset, given)] = [round(mode["ms"], 2) for mode in modes]
    for name, costs in TABLE.milliseconds.items():
        row = TABLE.rows[name]
        if name in WITH_LANES:
            continue
        assert found[case(row.set["PRESET"], at_equal_steps(row))] == costs, name
    for row in TABLE.rows.values():
        if row.name in TABLE.milliseconds and row.series != "wins":
            values = ablate.variables(row, TABLE.scales["pocket"], "pocket", {})
            values = ablate.in_equal_time(row, values, TABLE, "flat_6")
            config = tg.Config.from_env(values)
            span = config.warmdown_fraction * config.iterations or config.warmdown_iters
            assert 0 < span < config.iterations


WITH_LANES = {  # the row without them
    "stack_3_wide_two_lanes": "stack_3_wide_two",
    "stack_3_wider_lanes_token": "stack_3_wider_two_50_by_position",
    "stack_3_wider_two_50_lanes": "stack_3_wider_two_50_by_position",
    "stack_3_wider_two_50_lanes_token": "stack_3_wider_two_50_by_position",
}


@pytest.mark.parametrize("name", WITH_LANES)
def test_milliseconds_of_lanes_are_added_to_those_without(name: str) -> None:
    """As estimated where the model is compiled as a whole; by block they would be too few."""
    found = {}
    path = common.ROOT / "records/dryrun/lanes_model.json"
    for title, modes in json.loads(path.read_text()).items():
        given = dict(word.split("=", 1) for word in title.split() if "=" in word)
        lanes = given.get("LANE_WEIGHTS", "none")
        found[given["MODEL_DIM"], lanes] = [round(mode["ms"], 2) for mode in modes]
    row = TABLE.rows[name].set
    width = str(row["MODEL_DIM"])
    with_lanes = found[width, str(row.get("LANE_WEIGHTS", "channel"))]
    times = zip(TABLE.milliseconds[WITH_LANES[name]], with_lanes, found[width, "none"])
    wanted = [pytest.approx(base + lanes - plain) for base, lanes, plain in times]
    costs = TABLE.milliseconds[name]
    assert costs == wanted[: len(costs)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run.X]\nbaselines = []\nset = {}", "run.X has .* it needs .*hypothesis"),
        (
            "[run.X]\nhypothesis = ''\nbaselines = ['Y']\nset = {}",
            "run X names Y, which is not a run",
        ),
        ("[run.X", "t.toml: "),
    ],
)
def test_a_wrong_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text.replace("]\n", "]\nseries = 's'\nwhat = ''\n", 1))
    with pytest.raises(ValueError, match=message):
        ablate.read_table(tmp_path / "t.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["C", "--set", "MODEL_DIMM=4"], "not an option of train_gpt.py (did you mean MODEL_DIM"),
        (["C", "--set", "ANYTHING=4"], "ANYTHING: not an option"),
        (["C", "--set", "SEED=4"], "SEED: the matrix sets that itself"),
        (["C", "--set", "MODEL_DIM"], "is not KEY=VALUE"),
        (["C", "--set", "RESUME=auto"], "RESUME: the matrix sets that itself"),
        (["series9"], "series9 is neither a run nor a series (did you mean series"),
        (["Bq"], "Bp"),
        (["BP"], "a series (did you mean Bp"),
        (["Xy_unlike"], "nor a series; `ablate.py list` shows them"),
        (["C", "--scale", "huge"], "--scale huge: there are tiny, micro"),
        (["C", "--nproc", "0"], "--nproc 0 is below 1"),
        (["C", "--seeds", "-1"], "--seeds -1 is below 1"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_starts(
    words: list[str],
    message: str,
    fake: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "run", *words, "--out", str(tmp_path)) == 2
    told = capsys.readouterr().err
    assert message in told and len(told) < 200
    assert not list(tmp_path.iterdir())


# ---- The matrix, with a stand-in for the script


def test_failures_are_told_and_the_rest_goes_on(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_DIM", "6")  # must not reach a run
    words = ["run", "Ap", "D", "recur_3x3_768_qat", "E", "--out", str(tmp_path)]
    unknown = "QAT_FRACTION" not in common.OPTIONS
    assert call(monkeypatch, *words) == 1
    told = capsys.readouterr().out
    assert "D seed 1337: FAILED, exit code 1: [rank 0] out of luck" in told
    assert (
        f"4 runs: {2 + (not unknown)} made, 0 there already, {1 + unknown} failed, 0 not started"
        in told
    )
    assert not unknown or "QAT_FRACTION: not an option" in told
    result = json.loads((tmp_path / "full" / "E" / "seed1337" / "result.json").read_text())
    assert result["env"]["PRESET"] == "E" and "MODEL_DIM" not in result["env"]
    record = json.loads((tmp_path / "full" / "E" / "seed1337" / "run.json").read_text())
    assert record["variables"] == {"PRESET": "E"} and record["exit_code"] == 0
    assert record["git_commit"] is None or len(record["git_commit"].rstrip("+")) == 40
    assert call(monkeypatch, *words) == 1, "the failed one is tried again"
    told = capsys.readouterr().out
    assert "out of luck" in told and f"0 made, {2 + (not unknown)} there already" in told
    assert (tmp_path / "full" / "D" / "seed1337.unfinished1").is_dir()
    aside = "it left no checkpoint; set aside as seed1337.unfinished1, and begun again"
    assert f"D seed 1337: {aside}" in told


def test_bad_input_stops_the_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one run refuses would be told again for every other; what is finished is counted."""
    words = ["run", "Ap", "D", "E", "--seeds", "2", "--out", str(tmp_path)]
    fake_script(monkeypatch, FAKE.replace('sys.exit("[rank 0] out of luck")', REFUSE))
    assert call(monkeypatch, *words) == 1
    told = capsys.readouterr().out
    assert "D seed 1337: FAILED, exit code 2: [rank 0] no such data" in told
    assert "Not begun: E seeds 1337, 1338; Ap seed 1338; D seed 1338." in told
    assert "6 runs: 1 made, 0 there already, 1 failed, 4 not started" in told
    assert call(monkeypatch, "run", "E", "--out", str(tmp_path)) == 0
    assert call(monkeypatch, *words) == 1
    told = capsys.readouterr().out
    assert "Not begun: Ap seed 1338; D seed 1338; E seed 1338." in told
    assert "6 runs: 0 made, 2 there already, 1 failed, 3 not started" in told


def test_one_mistake_is_told_once(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "Ap", "C", "--seeds", "2", "--out", str(tmp_path), "--set", "NUM_HEADS=3"]
    assert call(monkeypatch, *words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Ap seeds 1337, 1338; C seeds 1337, 1338: FAILED, ")
    assert lines[1] == "4 runs: 0 made, 0 there already, 4 failed, 0 not started"
    assert len(lines) == 2 and "NUM_HEADS" in lines[0], lines


def test_a_full_disk_is_the_cause_of_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = tmp_path / "seed1.console"
    console.write_text("")
    for free, told in ((9, "exit code 2: no output, as the disk is full"), (1 << 30, "no output")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(ablate.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert ablate.cause(console, 2).endswith(told)


def test_a_cause_that_runs_share_is_told_in_full_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run's own output is named; a summary after other lines has the cause's beginning."""
    cause = "out of luck, " * 20
    fake_script(monkeypatch, FAKE.replace("out of luck", cause))
    out = ["--seeds", "2", "--out", str(tmp_path)]
    assert call(monkeypatch, "run", "D", *out) == 1
    first, second, _ = capsys.readouterr().out.splitlines()
    consoles = [f"({tmp_path}/full/D/seed{seed}.console)" for seed in (1337, 1338)]
    assert first.endswith(f"exit code 1: [rank 0] {cause.strip()} {consoles[0]}")
    assert second == f"[2/2] D seed 1338: FAILED as D seed 1337 did {consoles[1]}"
    assert call(monkeypatch, "run", "D", "C", *out) == 1
    *told, last = capsys.readouterr().out.splitlines()
    assert "\n".join(told).count(cause) == 1
    assert last.startswith("  D seeds 1337, 1338: exit code 1: [rank 0] out of luck, out")
    assert last.endswith(" ...") and len(last) < 160


def test_an_interruption_is_answered_at_once(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def terminate(process: subprocess.Popen) -> None:
        print("the run is told to end")
        process.kill()

    monkeypatch.setattr(ablate.Board, "tick", interrupt)
    monkeypatch.setattr(subprocess.Popen, "terminate", terminate)
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 1
    assert capsys.readouterr().out.splitlines()[:3] == [
        "stopping after this step; runs that are finished are kept",
        "the run is told to end",
        "interrupted; the same command goes on",
    ]


def cut_off(out: Path, **otherwise: object) -> Path:
    """The folder of a run of row C that was cut off after step 20."""
    folder = out / "full" / "C" / "seed1337"
    folder.mkdir(parents=True)
    (folder / "step_00000010.ckpt").touch()
    (folder / "step_00000020.ckpt").touch()
    (folder / "metrics.jsonl").touch()
    config = asdict(tg.Config.from_env({"PRESET": "C", "SEED": "1337"})) | otherwise
    script = common.sha256(ablate.SCRIPT)
    head = f"script_sha256:{script}\nconfig:{json.dumps(config)}\nworld_size:1 grad_accum_steps:8\n"
    (folder / "train.log").write_text(head)
    return folder


def other_script(folder: Path) -> str:
    log = folder / "train.log"
    log.write_text(re.sub("sha256:.*", f"sha256:{'0' * 64}", log.read_text()))
    return "it was begun by another version of train_gpt.py"


def other_ranks(folder: Path) -> str:
    log = folder / "train.log"
    log.write_text(log.read_text().replace("world_size:1 ", "world_size:8 "))
    return "it was begun on 8 ranks, not 1"


def other_values(folder: Path) -> str:
    log = folder / "train.log"
    log.write_text(log.read_text().replace('"beta1": 0.9', '"beta1": 0.5'))
    return "it was begun with other values (BETA1 0.5 there, 0.9 asked for)"


def no_checkpoint(folder: Path) -> str:
    for path in folder.glob("step_*.ckpt"):
        path.unlink()
    return "it left no checkpoint"


def no_log(folder: Path) -> str:
    (folder / "train.log").unlink()
    return "its train.log is gone"


def refused_by_the_script(folder: Path) -> str:
    (folder / "refuse").touch()
    return "/a/step_00000020.ckpt is damaged"


RESUMING = """
if (folder / "refuse").exists():
    print("[rank 0] /a/step_00000020.ckpt is damaged", file=sys.stderr)
    sys.exit(2)
"""


def test_a_refused_checkpoint_is_told_from_other_bad_input(
    corpus: dict,
    main_here: Callable[[Mapping[str, str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By what the script itself says."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_00000020.ckpt").write_bytes(b"damaged")
    env = corpus | SMALL | dict(PRESET="C", LOG_DIR=str(tmp_path), RUN_ID="run", RESUME="auto")
    console = tmp_path / "console"
    for data, named in ((corpus["DATA_PATH"], True), ("nowhere", False)):
        code = main_here(env | {"DATA_PATH": data})
        console.write_text(capsys.readouterr().err)
        assert code == tg.EXIT_INPUT
        assert ("step_00000020.ckpt" in ablate.refused_checkpoint(console, code)) == named


@pytest.fixture
def resuming(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 'folder.mkdir(parents=True, exist_ok=env.get("RESUME") == "auto")'
    fake_script(monkeypatch, FAKE.replace("folder.mkdir(parents=True)", made + RESUMING))


def test_a_run_goes_on_from_its_checkpoint(
    resuming: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = cut_off(tmp_path, resume="auto")  # it was cut off before
    monkeypatch.setenv("RESUME", "elsewhere")  # must not reach a run
    assert call(monkeypatch, "run", "C", "--seeds", "2", "--out", str(tmp_path)) == 0
    told = capsys.readouterr().out
    assert told.startswith("C seed 1337: goes on from step 20\n") and "2 runs: 2 made" in told
    assert sorted(path.name for path in folder.parent.glob("seed*[0-9]")) == [
        "seed1337",
        "seed1338",
    ]
    second = folder.with_name("seed1338")
    results, records = (
        [common.read_result(path / name) for path in (folder, second)]
        for name in ("result.json", "run.json")
    )
    assert results[0]["env"]["RESUME"] == "auto" and "RESUME" not in results[1]["env"]
    assert records[0]["variables"] == records[1]["variables"]
    assert records[0].pop("resumed_from_step") == 20
    assert records[0].keys() == records[1].keys()
    whole, part = (ablate.wall_seconds(path / "run.json") for path in (second, folder))
    assert whole is not None and part is None, "a part tells not how long others take"
    words = ["--set", "RESUME=other.ckpt", "--first-seed", "1339", "--out", str(tmp_path)]
    assert call(monkeypatch, "run", "C", *words) == 0
    third = common.read_result(folder.with_name("seed1339") / "result.json")
    assert third["env"]["RESUME"] == "other.ckpt", "a checkpoint that is named is taken"


@pytest.mark.parametrize(
    "spoil",
    [other_script, other_ranks, other_values, no_checkpoint, no_log, refused_by_the_script],
)
def test_a_run_that_cannot_go_on_is_set_aside_and_begun_again(
    spoil: Callable[[Path], str],
    resuming: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = cut_off(tmp_path)
    why = spoil(folder)
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 0
    told = capsys.readouterr().out
    assert f"C seed 1337: {why}; set aside as seed1337.unfinished1, and begun again\n" in told
    assert folder.with_name("seed1337.unfinished1").is_dir()
    assert "RESUME" not in common.read_result(folder / "result.json")["env"]
    assert "resumed_from_step" not in common.read_result(folder / "run.json")


def test_a_folder_with_another_configuration_is_neither_used_nor_lost(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 0
    path = tmp_path / "full" / "C" / "seed1337" / "result.json"
    before = path.read_bytes()
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path), "--set", "BETA1=0.5") == 1
    told = capsys.readouterr().out
    assert "holds another run (BETA1 0.9 there, 0.5 asked for): choose another --out" in told
    assert path.read_bytes() == before
    limit = ["--set", "SIZE_LIMIT_BYTES=9999999"]
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path), *limit) == 1
    assert "SIZE_LIMIT_BYTES 16000000 there, 9999999 asked for" in capsys.readouterr().out


def test_a_run_of_a_shorter_script_with_the_same_room_is_there(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a row that fits by its size counts the script, which changes."""
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 0
    path = tmp_path / "full" / "C" / "seed1337" / "result.json"
    result = json.loads(path.read_text())
    result["bytes_code"] = ablate.SCRIPT.stat().st_size - 1000
    path.write_text(json.dumps(result))
    for limit, code in ((16_001_000, 0), (16_000_999, 1)):
        words = ["--out", str(tmp_path), "--set", f"SIZE_LIMIT_BYTES={limit}"]
        assert call(monkeypatch, "run", "C", *words) == code


def test_a_run_that_another_process_makes_is_left_to_it(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "full" / "C" / "seed1337.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 1
    assert "another process is making this run" in capsys.readouterr().out
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 0


def test_time_left_comes_from_finished_runs_of_the_row(tmp_path: Path) -> None:
    runs = [
        ablate.Run(row, seed, "full", {}, tmp_path / row / str(seed), 1)
        for seed in (1, 2)
        for row in ("A", "B", "C")
    ]
    board = ablate.Board(runs)
    assert board.seconds_left() is None
    for run, seconds in zip(runs, (10.0, 40.0)):
        run.folder.mkdir(parents=True)
        (run.folder / "run.json").write_text(json.dumps(dict(wall_seconds=seconds)))
        board.left.remove(run)
    assert board.seconds_left() == 25 + 10 + 40 + 25, "C from all, A and B from their own"


def half_a_result(folder: Path) -> str:
    path = folder / "result.json"
    path.write_bytes(path.read_bytes()[:20])
    return "result.json is damaged"


def half_a_metric(folder: Path) -> str:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tra')
    return "metrics.jsonl:2: a damaged line"


def no_metrics(folder: Path) -> str:
    (folder / "metrics.jsonl").unlink()
    return "metrics.jsonl is gone"


def no_object(folder: Path) -> str:
    (folder / "result.json").write_text("[]")
    return "result.json is damaged: it holds no JSON object"


@pytest.mark.parametrize("spoil", [half_a_result, half_a_metric, no_metrics, no_object])
def test_a_run_whose_files_are_damaged_is_made_again(
    spoil: Callable[[Path], str],
    fake: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 0
    folder = tmp_path / "full" / "C" / "seed1337"
    told = spoil(folder)
    (folder / "run.json").write_text("{")
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert told in out and "; set aside as seed1337.unfinished1, and begun again" in out
    assert "1 runs: 1 made, 0 there already" in out.splitlines()[-1]
    assert folder.with_name("seed1337.unfinished1").is_dir() and ablate.damage(folder) == ""
    assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 0
    assert "0 made, 1 there already" in capsys.readouterr().out


def test_a_live_run_started_by_hand_is_left_alone(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "full" / "C" / "seed1337"
    folder.mkdir(parents=True)
    with open(folder / "run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert call(monkeypatch, "run", "C", "--out", str(tmp_path)) == 1
    assert "another process is making this run" in capsys.readouterr().out
    assert folder.is_dir() and not folder.with_name("seed1337.unfinished1").exists()


@pytest.mark.parametrize("full", [True, False], ids=["full disk", "closed pipe"])
def test_runs_go_on_when_nobody_reads_the_output(
    full: bool,
    fake: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open(nobody_reads(full), "w") as out:  # whose end says whether anything is left unwritten
        monkeypatch.setattr(sys, "stdout", out)
        code = call(monkeypatch, "run", "D", "C", "E", "--out", str(tmp_path))
    assert (code, capsys.readouterr().err) == (1, ""), "D fails, the others are made"
    made = sorted(path.parent.parent.name for path in tmp_path.glob("full/*/*/run.json"))
    assert made == ["C", "E"]


def struck(name: str, out: Path) -> int:
    """A command that gets a signal when its run, which would take 100 seconds, has begun."""
    slow = FAKE.replace("if env", "import time\ntime.sleep(100)\nif env")
    begun = out / "full" / "C" / "seed1337" / "metrics.jsonl"

    def strike(*_: object) -> None:
        if begun.exists():
            os.kill(os.getpid(), signal.Signals[name])

    with pytest.MonkeyPatch.context() as patch:
        fake_script(patch, slow)
        patch.setattr(ablate.Board, "tick", strike)
        return ablate.main(["run", "C", "--out", str(out)])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_with_its_launcher(name: str, tmp_path: Path) -> None:
    ended = fork_ranks({"LOG_DIR": str(tmp_path)}, 1, functools.partial(struck, name, tmp_path))
    assert ended.codes == [128 + signal.Signals[name]], ended.texts
    assert "stopping after this step" in ended.texts[0]
    assert (tmp_path / "full" / "C" / "seed1337" / "metrics.jsonl").exists()
    with ablate.locked(tmp_path / "full" / "C" / "seed1337.lock"):
        pass  # which the run would still hold


def test_progress_is_that_of_steps_or_of_time(tmp_path: Path) -> None:
    folder = tmp_path / "C" / "seed1"
    given = dict(PRESET="C,tiny", ITERATIONS="100", MAX_WALLCLOCK_SECONDS="50")
    run = ablate.Run("C", 1, "full", given, folder, 1)
    assert ablate.progress(run) is None
    folder.mkdir(parents=True)
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 0, "train_seconds": 0.0}\n')
    assert ablate.progress(run) is None, "before the first step there is nothing to say"
    path.write_text(
        '{"step": 20, "train_seconds": 5.0, "health": "' + "x" * 100_000 + '"}\n'
        '{"step": 20, "train_seconds": 5.0}\n{"step": 30, "tra'
    )
    assert str(ablate.progress(run)) == "step 20 of 100 (20%)"
    path.write_text('{"step": 20, "train_seconds": 40.0}\n')
    assert str(ablate.progress(run)) == "step 20 of 100 (80%)"


def test_time_left_is_that_of_steps_and_falls_as_time_goes_by(tmp_path: Path) -> None:
    """Compiling and the slow first steps tell nothing of those to come."""
    folder = tmp_path / "C" / "seed1"
    folder.mkdir(parents=True)
    given = dict(PRESET="C,tiny", ITERATIONS="100", MAX_WALLCLOCK_SECONDS="0")
    run = ablate.Run("C", 1, "full", given, folder, 1)
    path = folder / "metrics.jsonl"

    def left(age: float) -> float:
        written = time.time() - age
        os.utime(path, (written, written))
        now = ablate.progress(run)
        assert now is not None
        return now.left

    path.write_text('{"step": 20, "train_seconds": 90, "step_ms": 500}\n')
    assert left(0) == pytest.approx(40, abs=5) and left(30) == pytest.approx(10, abs=5)
    assert left(50) == 0 and left(-50) == 40, "neither late nor by a clock that is wrong"
    with open(path, "a") as file:
        file.write('{"step": 20, "train_seconds": 90, "val_loss": 3.5}\n')
    assert left(-50) == 40, "a validation tells no time of a step"
    capped = replace(run, variables=given | dict(MAX_WALLCLOCK_SECONDS="100"))
    now = ablate.progress(capped)
    assert now is not None and now.left == 10
    path.write_text('{"step": 20, "train_seconds": 10}\n')
    assert left(-50) == 40, "by all steps, in files that have no time of a step"


def test_a_board_tells_progress_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = dict(PRESET="C,tiny", ITERATIONS="100", MAX_WALLCLOCK_SECONDS="0")
    runs = [
        ablate.Run("C", seed, "full", given, tmp_path / "C" / f"seed{seed}", 1) for seed in (1, 2)
    ]
    board = ablate.Board(runs)
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "metrics.jsonl").write_text('{"step": 25, "train_seconds": 60}\n')
    ahead = 9e9  # no time has gone by since the row was written
    os.utime(runs[0].folder / "metrics.jsonl", (ahead, ahead))
    for seconds in (1.0, 59.0, 61.0, 90.0, 120.0, 150.0):
        board.tick(runs[0], seconds)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "[1/2] C seed 1: 1 min, step 25 of 100 (25%), 3 min left of it",
        "[1/2] C seed 1: 2 min, step 25 of 100 (25%), 3 min left of it",
    ], "a line a minute"
    (runs[0].folder / "run.json").write_text('{"wall_seconds": 240}')
    board.left.remove(runs[0])
    board.tick(runs[1], 60.0)
    assert capsys.readouterr().out == "[2/2] C seed 2: 1 min, 3 min left of all\n"
    runs[1].folder.mkdir(parents=True)
    runs[1].beside(".console").write_text("device:cpu\nwarming up: 1 steps that are undone\n")
    board.tick(runs[1], 150.0)
    assert capsys.readouterr().out == "[2/2] C seed 2: 2 min, warming up, 2 min left of all\n"
    (runs[1].folder / "metrics.jsonl").write_text('{"step": 80, "train_seconds": 220}\n')
    os.utime(runs[1].folder / "metrics.jsonl", (ahead, ahead))
    runs[1].beside(".console").write_text("step:80/100 train_loss:4\n")
    board.tick(runs[1], 220.0)
    assert capsys.readouterr().out.endswith(", 55 s left of it, 55 s left of all\n"), "not 20 s"
    runs[1].beside(".console").write_text("warming up: 1 steps that are undone\n")
    (runs[1].folder / "metrics.jsonl").unlink()
    board.tick(runs[1], 300.0)
    assert capsys.readouterr().out == "[2/2] C seed 2: 5 min, warming up\n", "longer than others"


@pytest.mark.parametrize(
    ("printed", "doing"),
    [
        ("step:99/100 train_loss:4.1 train_time:9ms", "0 s left of it"),
        ("step:100/100 train_loss:4.1 train_time:9ms", "validating"),
        ("stopping_early: wallclock_cap train_time:9ms step:99/100", "validating"),
        ("step:100/100 train_loss:4.1\npeak memory allocated: 0 MiB", "packing the model"),
        ("peak memory allocated: 0 MiB\nCode size: 9 bytes", "scoring the packed model"),
    ],
)
def test_a_board_tells_what_follows_the_last_step(
    printed: str, doing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the lines of train_gpt.py, as in the first run's committed log."""
    given = dict(PRESET="C,tiny", ITERATIONS="100", MAX_WALLCLOCK_SECONDS="9")
    run = ablate.Run("C", 1, "full", given, tmp_path / "C" / "seed1", 1)
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 99, "train_seconds": 8.95}\n')
    run.beside(".console").write_text(f"step:98/100 train_loss:4.2\n{printed}\n")
    ablate.Board([run]).tick(run, 61.0)
    assert capsys.readouterr().out == f"[1/1] C seed 1: 1 min, step 99 of 100 (99%), {doing}\n"
    for line in ablate.BESIDE_TRAINING:
        log = (common.ROOT / "records" / "tiny_T" / "train.log").read_text()
        assert re.search(line, log), line


@pytest.mark.parametrize(("step", "rest"), [(10_000, "2.8 h left"), (20_000, "validating")])
def test_a_terminal_tells_what_follows_the_last_step(step: int, rest: str) -> None:
    """The script's own bar, of a run that takes a second a step."""
    config = tg.Config.from_env(
        dict(PRESET="tiny", ITERATIONS="20000", WARMDOWN_ITERS="1", MAX_WALLCLOCK_SECONDS="0")
    )
    clock = SimpleNamespace(per_step=1.0, cap=math.inf)
    trainer = cast(tg.Trainer, SimpleNamespace(step=step, clock=clock))
    reporter = tg.Reporter(config, cast(tg.Log, None))
    shown = reporter.bar(trainer, loss=3.0, seconds=float(step), rate=8e6)
    assert shown.endswith(f"loss 3.000  {rest}  8,000,000 tokens/s")
    assert len(shown) < 80, "a line that a terminal breaks is not replaced as a whole"


# ---- The matrix, with the script


def outcome(out: Path) -> dict[str, tuple]:
    """What the runs of a folder came to, without their times."""
    found = {}
    for path in sorted(out.glob("full/*/seed1337/result.json")):
        rows = list(common.read_metrics(path.with_name("metrics.jsonl")))
        course = [(row["step"], row.get("train_loss"), row.get("val_loss")) for row in rows]
        found[path.parts[-3]] = common.read_result(path)["artifact_sha256"], course
    return found


def test_a_matrix_killed_in_the_middle_goes_on_where_it_was(
    corpus: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The runs are processes; what their launcher does at a signal happens in this one."""
    given = corpus | SMALL | {"ITERATIONS": "16", "VAL_LOSS_EVERY": "8"}
    out, whole = tmp_path / "cut", tmp_path / "whole"
    first, second = (out / "full" / row / "seed1337" for row in ("Bp", "C"))
    words = ["run", "Bp", "C", "--out", str(out), *words_of(given)]
    for row in ("Bp", "C"):  # without the matrix, and without a break
        env = given | dict(
            PRESET=row, SEED="1337", LOG_DIR=str(whole / "full" / row), RUN_ID="seed1337"
        )
        assert tg.run(tg.Config.from_env(env), tg.World({})) == 0
    shutil.copytree(whole / "full" / "Bp", out / "full" / "Bp")
    made = (first / "result.json").stat().st_mtime_ns

    def strike(*_: object) -> None:
        wait_for((second / "metrics.jsonl").exists, "the second did not begin")
        ablate.end(signal.SIGTERM, None)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ablate.Board, "tick", strike)
        call(patch, *words)
    assert not (second / "result.json").exists(), "the run was to be cut off in its middle"
    capsys.readouterr()
    assert call(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert "1 made, 1 there already" in told, told
    assert (first / "result.json").stat().st_mtime_ns == made, "a finished run was repeated"
    step = common.read_result(second / "run.json")["resumed_from_step"]
    assert f"C seed 1337: goes on from step {step}\n" in told
    log = logs.read(second / "train.log")
    assert f"resumed from step:{step} of step_{step:08d}.ckpt" in log.run.lines
    assert log.words["finished"] and log.values["steps"] == 16
    assert outcome(out) == outcome(whole) and len(outcome(out)) == 2


# Stands for train_gpt.py: every rank of a run leaves a file, the first one a result, too.
RANKED = """
import json, os, pathlib
folder = pathlib.Path(os.environ["LOG_DIR"], os.environ["RUN_ID"])
folder.mkdir(parents=True, exist_ok=True)
(folder / f"rank{{os.environ['RANK']}}").touch()
if os.environ["RANK"] == "0":
    (folder / "metrics.jsonl").touch()
    (folder / "result.json").write_text(json.dumps(
        dict(config={config}, roundtrip=dict(val_bpb=1), fits=True)))
"""


def test_torchrun_starts_two_ranks_and_their_failure_is_named(
    corpus: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script itself fails, on both ranks; where they succeed, another stands for it."""
    out = ["--nproc", "2", "--out", str(tmp_path / "out")]
    config = asdict(tg.Config.from_env({"PRESET": "C", "SEED": "1337"}))
    (tmp_path / "train_gpt.py").write_text(RANKED.format(config=config))
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "ROOT", tmp_path)
        assert call(patch, "run", "C", *out) == 0, capsys.readouterr()
    made = tmp_path / "out" / "full" / "C" / "seed1337"
    assert len(list(made.glob("rank[01]"))) == 2
    assert common.read_result(made / "run.json")["ranks"] == 2
    nowhere = words_of(corpus | SMALL | {"DATA_PATH": "nowhere"})
    assert call(monkeypatch, "run", "D", "E", *out, *nowhere) == 1
    told = capsys.readouterr().out
    assert "DATA_PATH=nowhere holds no fineweb_val" in told
    assert "Not begun: E seed 1337." in told, "torchrun makes exit code 1 of 2"


@pytest.mark.filterwarnings("error:No submission")
def test_submitit_runs_the_same_command(
    corpus: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("submitit")
    words = ["run", "Bp", "--cluster", "local", "--out", str(tmp_path), *words_of(corpus | SMALL)]
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "job_words", lambda *_: ["false"])  # a command that fails
        assert call(patch, *words) == 1
    assert "ended without a result" in capsys.readouterr().out
    for told in ("1 made, 0 there already", "0 made, 1 there already"):
        assert call(monkeypatch, *words) == 0, capsys.readouterr()
        assert told in capsys.readouterr().out


@pytest.mark.filterwarnings("error:No submission")
def test_local_jobs_have_the_gpus_and_time_enough(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's own values are no GPU and some minutes."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    names = ["CUDA_VISIBLE_DEVICES", "SUBMITIT_LOCAL_TIMEOUT_S"]
    code = f"import os; print(*map(os.environ.get, {names}))"
    monkeypatch.setattr(ablate, "job_words", lambda *_: [sys.executable, "-c", code])

    def told_of(*more: str) -> str:
        out = tmp_path / str(len(more))
        words = ["run", "C", "--cluster", "local", "--nproc", "2", "--out", str(out)]
        call(monkeypatch, *words, *more)
        (log,) = (out / "jobs").glob("*_log.out")
        return log.read_text()

    assert f"0,1 {7 * 24 * 3600}" in told_of()
    assert "0 600" in told_of("--job", "timeout_min=10", "gpus_per_node=1")


@pytest.fixture
def slurm_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """What Slurm would be asked for jobs of a command, by submitit; it looks for srun first."""
    pytest.importorskip("submitit")
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=os.pathsep)

    def parameters(*words: str) -> dict:
        words = ("run", *words, "--cluster", "slurm", "--out", str(tmp_path / "out"))
        options = ablate.parser().parse_args(words)
        return ablate.executor_of(options, ablate.plan(TABLE, options))._executor.parameters

    return parameters


def test_slurm_jobs_have_the_gpus_and_time_enough(slurm_of: Callable[..., dict]) -> None:
    """submitit's own values are no GPU and five minutes, in which no run of 600 s ends."""
    told = slurm_of("T", "--nproc", "8", "--job", "slurm_partition=gpu")
    assert told == dict(time=70, gpus_per_node=8, partition="gpu")
    longer = slurm_of("T", "--set", "MAX_WALLCLOCK_SECONDS=4801")
    assert longer == dict(time=81 + 60, gpus_per_node=1)
    assert slurm_of("T", "--set", "MAX_WALLCLOCK_SECONDS=0")["time"] == 24 * 60
    assert slurm_of("T", "--set", "DEVICE=cpu") == dict(time=70)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["timeout_min=30", "gpus_per_node=4"], dict(time=30, gpus_per_node=4)),
        (["slurm_time=30", "slurm_gres=gpu:8"], dict(time=30, gres="gpu:8")),
        (["cpus_per_task=32"], dict(time=70, gpus_per_node=8, cpus_per_task=32)),
    ],
)
def test_what_is_asked_of_slurm_wins(
    words: list[str], told: dict, slurm_of: Callable[..., dict]
) -> None:
    assert slurm_of("T", "--nproc", "8", "--job", *words) == told


def test_a_mistake_in_a_job_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    words = ["run", "T", "--out", str(tmp_path), "--cluster", "local", "--job"]
    for mistake, told in (("timeout_min=soon", "timeout_min"), ("slurm_gpu=1", "gpu")):
        assert call(monkeypatch, *words, mistake) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"--cluster local --job {mistake}: ") and error.count("\n") == 1
        assert told in error


def test_local_jobs_that_share_a_clock_are_refused(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All start at once, so that their steps would be those of runs that were held up."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(ablate, "job_words", lambda *_: ["false"])
    words = ["run", "T", "--out", str(tmp_path), "--seeds"]
    assert call(monkeypatch, *words, "3", "--cluster", "local") == 2
    told = capsys.readouterr().err
    assert "--nproc 1 starts 3 runs at once" in told and "MAX_WALLCLOCK_SECONDS=600 " in told
    assert not [*(tmp_path / "jobs").glob("*submitted*")]
    assert call(monkeypatch, *words, "2") == 0, "one after the other"
    assert call(monkeypatch, *words, "3", "--cluster", "local") == 1, "the third alone, which fails"
    assert "1 jobs, logs in" in capsys.readouterr().out


def test_what_an_interrupted_call_handed_in_is_waited_for(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its job if that is queued, by its lock if it is at work; what ended is handed in again."""
    submitit = pytest.importorskip("submitit")
    handed: list[list[str]] = []
    ended: set[str] = set()
    rows = ["C", "E", "F"]

    def job(folder: object, job_id: str) -> SimpleNamespace:
        paths = SimpleNamespace(stderr=tmp_path / "stderr")
        return SimpleNamespace(job_id=job_id, done=lambda: job_id in ended, paths=paths)

    def hand_in(command: SimpleNamespace) -> SimpleNamespace:
        handed.append(command.command)
        return job("", str(len(handed)))

    def executor(folder: Path, cluster: str) -> SimpleNamespace:
        return SimpleNamespace(
            update_parameters=lambda **_: None, batch=contextlib.nullcontext, submit=hand_in
        )

    def wait(then: Callable[[], object]) -> None:
        """While jobs are waited for, this happens."""

        def sleep(_: float) -> None:
            monkeypatch.setattr(ablate, "time", time)
            then()

        monkeypatch.setattr(ablate, "time", SimpleNamespace(sleep=sleep, time=time.time))

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submitit, "AutoExecutor", executor)
    monkeypatch.setattr(submitit, "SlurmJob", job)
    words = ["run", *rows, "--cluster", "slurm", "--out", str(tmp_path)]
    wait(interrupt)
    assert call(monkeypatch, *words) == 1 and len(handed) == 3
    assert "interrupted; the same command goes on; jobs" in capsys.readouterr().out

    at_work = contextlib.ExitStack()
    at_work.enter_context(ablate.locked(tmp_path / "full" / "C" / "seed1337.lock"))

    def make() -> None:
        at_work.close()
        assert ablate.main(["run", *rows, "--out", str(tmp_path)]) == 0
        ended.update("234")

    ended.update("13")
    wait(make)
    assert call(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert "C seed 1337: waits for the process that is making it" in told
    assert "E seed 1337: waits for job 2 of another call" in told
    assert [words[words.index("run") + 1] for words in handed] == ["C", "E", "F", "F"]
    common.write_json(tmp_path / "full" / "E" / "seed1337.job", {})  # as after another stop
    assert call(monkeypatch, *words) == 0 and len(handed) == 4
    assert not [*tmp_path.rglob("*.job")]
