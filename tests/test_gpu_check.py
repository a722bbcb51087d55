"""The check of a GPU node: its table and judgements, and its whole runs, here on a CPU.

What only a CUDA build of torch can run is in test_dryrun.py.
"""

import contextlib
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import HANG, ON_CPU

from records.tools import ablate, gpu_check
from records.tools.dryrun.dryrun import title_of

# ---- the table -----------------------------------------------------------------------------------


def measured_step(**values: Any) -> dict[str, Any]:
    usual = dict(ms=50.0, peak_gb=14.0, graphs=1, breaks=0, late_graphs=0, host_waits=0)
    return usual | dict(compile_seconds=9.0, host_ms=20.0) | values


def estimated(**values: Any) -> list[dict[str, Any]]:
    usual = dict(ms=40.0, peak_gb=14.0, graphs=1, breaks=0, late_graphs=0, host_waits=[])
    return [usual | values]


def test_the_table_sets_measurements_beside_their_estimates() -> None:
    parts = dict(levels=dict(figures={"T step": measured_step()}))
    lines = gpu_check.table(parts, {"T step": estimated()})
    assert "| T step | ms | 40.00 | 50.00 | 1.25 |" in lines
    assert "| T step | breaks | 0 | 0 |  |" in lines  # no ratio to zero
    # The host's time to compile is a fact of the host: no estimate.
    assert "| T step | compile seconds |  | 9.00 |  |" in lines


def test_waits_of_the_host_are_compared_by_number() -> None:
    parts = dict(presets=dict(figures={"K step": measured_step(host_waits=3)}))
    lines = gpu_check.table(parts, {"K step": estimated(host_waits=["a wait", "another"])})
    assert "| K step | host waits | 2 | 3 | 1.50 |" in lines


def test_what_has_no_estimate_is_in_the_table_all_the_same() -> None:
    figures = {"new step": measured_step(), gpu_check.PROBLEMS: ["K: out of memory"]}
    lines = gpu_check.table(dict(presets=dict(figures=figures)), {})
    assert "| new step | ms |  | 50.00 |  |" in lines
    assert not any("out of memory" in line for line in lines)  # it is told below the table


def test_steps_on_all_gpus_stand_beside_the_estimate_of_one() -> None:
    parts = {"all GPUs": dict(figures={"ms a step": 50.0, "GPUs": 8, "not shown": 1})}
    lines = gpu_check.table(parts, {gpu_check.CONTENDER_STEP: estimated()})
    assert "| all GPUs | ms a step | 40.00 | 50.00 | 1.25 |" in lines
    assert "| all GPUs | GPUs |  | 8 |  |" in lines
    assert len(lines) == 4
    assert gpu_check.CONTENDER_STEP in json.loads(gpu_check.ESTIMATES.read_text())


def test_steps_of_rows_stand_beside_the_clock_of_runs_toml() -> None:
    """Every mode of a row beside its own estimate."""
    (first, second) = ablate.read_table(ablate.TABLE).milliseconds["band_50"]
    figures = {
        gpu_check.mode_title("band_50", 0): measured_step(ms=first),
        gpu_check.mode_title("band_50", 1): measured_step(ms=2 * second),
    }
    lines = gpu_check.table(dict(clock=dict(figures=figures)), {})
    assert f"| band_50, mode 1 | ms | {first:.2f} | {first:.2f} | 1.00 |" in lines
    assert f"| band_50, mode 2 | ms | {second:.2f} | {2 * second:.2f} | 2.00 |" in lines
    assert "| band_50, mode 2 | host ms |  | 20.00 |  |" in lines


@pytest.mark.parametrize("row", gpu_check.CLOCK)
def test_the_clock_has_an_estimate_for_every_mode_that_is_measured(row: str) -> None:
    table = ablate.read_table(ablate.TABLE)
    modes = gpu_check.tg.training_modes(gpu_check.tg.Config.from_env(table.rows[row].set))
    assert len(table.milliseconds[row]) == len(modes)


def test_time_of_kernels_stands_beside_the_estimate_of_their_kind() -> None:
    kinds = {f"{kind}_ms": 3.0 for kind in gpu_check.ALL_KINDS}
    estimate = dict.fromkeys(kinds, 2.0)
    figures: dict[str, Any] = {"T step": kinds | dict(longest={})}
    lines = gpu_check.table(dict(kernels=dict(figures=figures)), {"T step": [estimate]})
    assert lines[2:] == [f"| T step | {kind} | 2.00 | 3.00 | 1.50 |" for kind in kinds]
    (of_the_dry_run,) = json.loads(gpu_check.ESTIMATES.read_text())[
        title_of("T", dict(COMPILE="block"), step=True, share=gpu_check.RANKS)
    ]
    assert kinds.keys() <= of_the_dry_run.keys()


# As PyTorch's profiler named them on an H200 (records/h200/gpu_check.json).
NAMES = {
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>": "attention",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "gemm",
    "triton_poi_fused_add_view_6": "triton",
    "triton_per_fused__scaled_dot_product_flash_attention_for_cpu_2": "triton",
    "product": "triton",  # the script's own
    "Memcpy DtoD (Device -> Device)": "other",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "other",
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add>": "aten",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_known_by_its_name(name: str) -> None:
    assert gpu_check.kind_of(name) == NAMES[name]


class Event(NamedTuple):
    """What the profiler tells of a launch."""

    name: str
    us: float
    device_type: Any = torch.autograd.DeviceType.CUDA
    is_user_annotation: bool = False

    @property
    def time_range(self) -> Any:
        return SimpleNamespace(start=0.0, elapsed_us=lambda: self.us)


def test_the_host_is_timed_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of calls; what the host waits for before each is not counted."""
    now = itertools.count()  # seconds at which the clock is read
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: next(now))
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    longer = iter((0, 0, 7, 0, 7))  # extra seconds of each call

    def call() -> None:
        for _ in range(next(longer)):
            next(now)

    assert gpu_check.host_ms(call) == 1000.0


def test_launches_of_one_kernel_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own events and the marks of ranges are no kernels."""
    events = [
        Event("triton_poi_1", 500.0),
        Event("nvjet_sm90", 2000.0),
        Event("triton_poi_1", 1000.0),
        Event("nvjet_sm90", 7000.0, torch.autograd.DeviceType.CPU),
        Event("## Call CompiledFxGraph", 9000.0, is_user_annotation=True),
    ]
    profile = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    told = gpu_check.time_of_kernels(gpu_check.kernels_of(lambda: None))
    longest = told.pop("longest")
    nothing = dict(attention_ms=0.0, other_ms=0.0, aten_ms=0.0)
    assert told == dict(gemm_ms=2.0, triton_ms=1.5) | nothing
    assert [*longest] == ["nvjet_sm90", "triton_poi_1"]
    assert longest["triton_poi_1"]["ms"] == 1.5 and longest["triton_poi_1"]["calls"] == 2


def test_a_part_that_found_nothing_leaves_no_line() -> None:
    nothing = dict(seconds=1.0, failure="cut off after 1 s", figures={})
    parts = dict.fromkeys(("attention", "levels", "clock", "kernels", "presets"), nothing)
    assert len(gpu_check.table(parts, {})) == 2  # head and rule


def test_figures_are_kept_as_they_come(tmp_path: Path) -> None:
    """A part that is cut off has written what it had found."""
    path = tmp_path / "part.json"
    figures = gpu_check.Figures(path)
    figures["first"] = 1
    assert json.loads(path.read_text()) == dict(first=1)
    figures["second"] = [2]
    assert json.loads(path.read_text()) == dict(first=1, second=[2])


def test_estimates_are_of_what_gpu_check_measures() -> None:
    """A new preset, or another title, needs new estimates (README.md of the dry run)."""
    estimates = json.loads(gpu_check.ESTIMATES.read_text())
    block = dict(COMPILE="block")
    cases = [(preset, block) for preset in gpu_check.tg.SYSTEMS]
    cases += [("T", dict(COMPILE="model")), ("T", block | dict(FUSED_MLP="1"))]
    for preset, settings in cases:
        title = title_of(preset, settings, step=True, share=gpu_check.RANKS)
        assert estimates[title][-1]["ms"] > 0, title


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "PyTorch sees no GPU here\n"


# ---- time ----------------------------------------------------------------------------------------


class Clock:
    """A stand-in for the module `time`, whose time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def read(self) -> float:
        return self.now

    perf_counter = monotonic = read


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(gpu_check, "time", made)
    return made


def test_shares_of_the_time_are_all_of_it() -> None:
    shares = sum(part.seconds for part in gpu_check.PARTS)
    whole = shares + gpu_check.DATA_SECONDS + gpu_check.END_SECONDS
    assert whole == 60 * gpu_check.MINUTES


def some_parts(*shares: float) -> list[gpu_check.Part]:
    return [gpu_check.Part(str(i), share, gpu_check.presets) for i, share in enumerate(shares)]


def test_a_part_has_what_those_before_it_have_left() -> None:
    parts = some_parts(30, 20, 50)
    assert gpu_check.time_for(parts, 100, 1.0) == 30, "its share, where nothing is left"
    assert gpu_check.time_for(parts, 140, 1.0) == 70, (
        "and all that is, so that the rest have theirs"
    )
    assert gpu_check.time_for(parts, 50, 1.0) == 15, "too little is divided by the shares"
    assert gpu_check.time_for(parts, 100, 0.5) == 65, "of half the minutes"
    assert gpu_check.time_for(parts[2:], -1, 1.0) == 0


Times = dict[str, float]


@pytest.fixture
def times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Times:
    """Seconds that parts (else as long as they may) and the data take; what parts had, by name."""
    given: Times = {}

    def run_part(part: gpu_check.Part, options: gpu_check.Options) -> dict[str, Any]:
        clock.now += min(options.seconds, given.get(part.name, math.inf))
        given[f"{part.name} had"] = options.seconds
        return dict(seconds=1.0, failure="", figures={})

    def find_data(out: Path, seconds: float) -> dict[str, str]:
        clock.now += given.get("data", 0.0)
        return {}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "find_data", find_data)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return given


@pytest.mark.parametrize("data", [0.0, gpu_check.DATA_SECONDS, 300.0])
@pytest.mark.parametrize("minutes", [15, 4])
def test_all_that_hangs_is_cut_off_within_the_minutes(
    tmp_path: Path, times: Times, clock: Clock, data: float, minutes: float
) -> None:
    """The sample corpus included, and with what it takes to end a part at the end."""
    times["data"], begins = data * minutes / 15, clock.now
    gpu_check.check(tmp_path, gpu_check.PARTS, 60 * minutes)
    spare = gpu_check.END_SECONDS * minutes / 15
    assert clock.now - begins == pytest.approx(60 * minutes - spare)
    hungry = min(times[f"{part.name} had"] / part.seconds for part in gpu_check.PARTS)
    assert hungry > 0.6 * minutes / 15, "the parts share what the data took"


def test_time_that_is_left_comes_to_who_needs_it(tmp_path: Path, times: Times) -> None:
    for part in gpu_check.PARTS[:-1]:
        times[part.name] = part.seconds - 5
    gpu_check.check(tmp_path, gpu_check.PARTS, 60 * gpu_check.MINUTES)
    last, others = gpu_check.PARTS[-1], len(gpu_check.PARTS) - 1
    own = last.seconds + gpu_check.DATA_SECONDS + 5 * others
    assert times[f"{last.name} had"] == pytest.approx(own)


def test_few_parts_have_their_own_shares_however_long_the_data_take(
    tmp_path: Path, times: Times
) -> None:
    times["data"] = 250.0
    [part] = chosen = [part for part in gpu_check.PARTS if part.name == "attention"]
    gpu_check.check(tmp_path, chosen, 60 * gpu_check.MINUTES)
    assert times["attention had"] == pytest.approx(part.seconds + gpu_check.DATA_SECONDS)


@pytest.mark.parametrize(
    ("share", "measured"), [(1000.0, "31 of 31"), (50.0, "1 of 31"), (70.0, "4 of 31"), (29.0, "0")]
)
def test_presets_end_before_their_share_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, share: float, measured: str
) -> None:
    """The first takes 30 s, with the start of the compiler, the others 5."""
    begun: list[str] = []

    def measure(out: Any, options: Any, preset: str, *_: Any) -> None:
        clock.now += 5 if begun else 30
        begun.append(preset)
        figures[preset] = measured_step()

    monkeypatch.setattr(gpu_check, "measure_preset", measure)
    figures, begins = gpu_check.Figures(tmp_path / "part.json"), clock.now
    gpu_check.presets(figures, gpu_check.Options(tmp_path, {}, share, 1))
    assert clock.now - begins <= share
    assert figures.values[gpu_check.MEASURED].startswith(measured)
    assert gpu_check.PROBLEMS not in figures.values
    assert begun == [*reversed(gpu_check.tg.SYSTEMS)][: len(begun)]
    lines = gpu_check.table(dict(presets=dict(figures=figures.values)), {})
    assert f"| presets | measured |  | {figures.values['measured']} |  |" in lines


def test_a_part_knows_what_its_start_has_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    left: list[float] = []
    part = gpu_check.Part("race", 5, lambda out, options: left.append(options.seconds))
    for name in ("DATA_PATH", "TOKENIZER_PATH", "LOG_DIR"):
        monkeypatch.setenv(name, "x")
    given = gpu_check.make_parser().parse_args(["--until", str(clock.now + 7)])
    assert gpu_check.work_on(part, given, tmp_path) == 0
    assert left == [7.0]


def test_the_race_compiles_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain implementation as a whole takes longer than the part has."""
    begun = []

    def warm_up(case: Any, *_: Any) -> Any:
        begun.append(case.plain and case.plain.compile)
        if len(begun) == 2:
            raise InterruptedError
        return SimpleNamespace(facts={}, contestant=None)

    monkeypatch.setattr(gpu_check.race, "gate", lambda _: {})
    monkeypatch.setattr(gpu_check.race, "draw", lambda _: None)
    monkeypatch.setattr(gpu_check.race, "warm_up", warm_up)
    options = gpu_check.Options(tmp_path, {}, 9.0, 1)
    with pytest.raises(InterruptedError):
        gpu_check.race_of_two(gpu_check.Figures(tmp_path / "part.json"), options)
    assert begun == [None, False]


# ---- what is told --------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    """The check in this process, which believes to have a GPU."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    return gpu_check.main()


Failures = dict[str, str]


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Failures:
    """What parts fail by, by their names; at "Ctrl-C" the check is interrupted."""
    given: Failures = {}

    def run_part(part: gpu_check.Part, options: gpu_check.Options) -> dict[str, Any]:
        failure = given.get(part.name, "")
        if failure == "Ctrl-C":
            raise KeyboardInterrupt
        return dict(seconds=1.0, failure=failure, figures={})

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "find_data", lambda *_: {})
    return given


def told(out: Path) -> list[str]:
    """What is below the table."""
    return (out / "gpu_check.md").read_text().partition("\n\n")[2].splitlines()


NAMES_OF_PARTS = [part.name for part in gpu_check.PARTS]


def test_no_part_failed_where_all_have_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: Failures
) -> None:
    assert call(monkeypatch, tmp_path) == 0
    assert told(tmp_path) == ["No part failed."]
    failures["race"] = "too slow"
    assert call(monkeypatch, tmp_path) == 1
    assert told(tmp_path) == ["FAILED race: too slow"]


def test_parts_that_an_interruption_left_out_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failures: Failures,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures["levels"] = "Ctrl-C"
    assert call(monkeypatch, tmp_path) == 130
    rest = ", ".join(NAMES_OF_PARTS[2:])
    assert told(tmp_path) == ["No part that has run failed.", f"not run: {rest}"]
    assert capsys.readouterr().err == "interrupted\n"
    failures["environment"] = "Ctrl-C"
    assert call(monkeypatch, tmp_path) == 130
    assert told(tmp_path) == [f"not run: {', '.join(NAMES_OF_PARTS)}"], "nor those of before"
    assert not (tmp_path / "gpu_check.json").exists()


def test_without_data_nothing_of_an_earlier_check_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failures: Failures,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor is it said that nothing failed."""
    assert call(monkeypatch, tmp_path) == 0
    for name in ("race.json", "race.txt", "run_whole.txt"):
        (tmp_path / name).touch()

    def fail(*_: Any) -> dict[str, str]:
        raise gpu_check.tg.InputError("no data")

    monkeypatch.setattr(gpu_check, "find_data", fail)
    capsys.readouterr()
    assert call(monkeypatch, tmp_path) == 2
    assert capsys.readouterr() == ("", "no data\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_some_parts_leave_the_findings_of_others_and_say_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: Failures
) -> None:
    failures |= {"clock": "cut off", "race": "too slow", "levels": "Ctrl-C"}
    first = ["--only", "environment", "clock", "race"]
    assert call(monkeypatch, tmp_path, *first) == 1
    del failures["race"]
    assert call(monkeypatch, tmp_path, "--only", "race") == 0, "the other failure was told before"
    lines = told(tmp_path)
    assert lines[:2] == ["FAILED clock: cut off", "found by an earlier check: environment, clock"]
    assert lines[2].startswith("not run: attention, levels, kernels,")
    kept = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: gpu_check.EARLIER in done for name, done in kept.items()} == dict(
        environment=True, clock=True, race=False
    )
    assert call(monkeypatch, tmp_path, "--only", "levels") == 130
    kept = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {*kept} == {"environment", "clock", "race"}, "they outlast an interruption"


# ---- judgements ----------------------------------------------------------------------------------


def test_what_is_not_as_expected_is_noted_and_the_part_goes_on(tmp_path: Path) -> None:
    figures = gpu_check.Figures(tmp_path / "part.json")
    figures.expect(True, "never told")
    figures.expect(False, "slow")
    with figures.trial("K"):
        raise RuntimeError("out of memory")
    with figures.trial("T"):
        figures["T"] = 1
    assert json.loads((tmp_path / "part.json").read_text()) == {
        gpu_check.PROBLEMS: ["slow", "K failed: RuntimeError: out of memory"],
        "T": 1,
    }


# In place of the tool itself: a part that notes a problem and starts somebody who outlives it, in a
# session of their own and, as `sh` has ended, without a parent.
STAND_IN = """
import json, subprocess, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
subprocess.run(["sh", "-c", "setsid sleep 1000 & echo $! > " + given["--out"] + "/left"])
with open(given["--out"] + "/race.json", "w") as file:
    json.dump(dict(ms=1, problems=["too slow"]), file)
if given["--ranks"] == "2":
    time.sleep(1000)
sys.exit(3 if given["--ranks"] == "3" else 0)
"""


def is_running(process: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("ranks", "failure"),
    [(1, "too slow"), (2, "cut off after 5 s; too slow"), (3, "exit code 3: ; too slow")],
)
def test_nothing_that_a_part_has_started_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, failure: str
) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    (part,) = (part for part in gpu_check.PARTS if part.name == "race")
    data = dict(LOG_DIR=str(gpu_check.runs_of(tmp_path)))
    done = gpu_check.run_part(part, gpu_check.Options(tmp_path, data, 5.0, ranks))
    assert done["failure"] == failure
    assert done["figures"]["ms"] == 1
    assert not is_running(int((tmp_path / "left").read_text()))


def test_figures_of_a_check_before_are_not_those_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that fails before it has found anything has no figures."""
    script = tmp_path / "stand_in.py"
    script.write_text("")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    part = gpu_check.PARTS[0]
    gpu_check.file_of(part, tmp_path, "json").write_text('{"ms": 1}')
    data = dict(LOG_DIR=str(gpu_check.runs_of(tmp_path)))
    done = gpu_check.run_part(part, gpu_check.Options(tmp_path, data, HANG, 1))
    assert done["figures"] == {}


# ---- data and whole runs -------------------------------------------------------------------------


def test_validation_is_short_and_training_is_all_there(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "VAL_TOKENS", 1000)
    source = Path(corpus["DATA_PATH"])
    short = gpu_check.shorten(source, tmp_path / "short")
    names = {"train": "fineweb_train_000000.bin", "val": "fineweb_val_000000.bin"}
    assert {path.name for path in short.iterdir()} == {*names.values()}
    whole = {split: gpu_check.tg.open_shard(source / name) for split, name in names.items()}
    cut = {split: gpu_check.tg.open_shard(short / name) for split, name in names.items()}
    assert (cut["train"] == whole["train"]).all()
    assert len(cut["val"]) == 1000 < len(whole["val"])
    assert (cut["val"] == whole["val"][:1000]).all()


@pytest.mark.parametrize("missing", ["train", "val", "tokenizer"])
def test_fineweb_that_is_not_whole_is_not_used(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Then the sample corpus is, as without any; so `fineweb.py --train-shards 0` is no trap."""
    config = gpu_check.tg.Config()
    monkeypatch.chdir(tmp_path)
    sample, fineweb = tmp_path / "data/datasets/sample", tmp_path / config.data_path
    for folder in (sample, fineweb):
        folder.mkdir(parents=True)
        for path in Path(corpus["DATA_PATH"]).glob("*.bin"):
            (folder / path.name).symlink_to(path)
    tokenizers = tmp_path / "data/tokenizers"
    tokenizers.mkdir()
    (tokenizers / "sample.model").symlink_to(corpus["TOKENIZER_PATH"])
    Path(config.tokenizer_path).symlink_to(corpus["TOKENIZER_PATH"])
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    for name in ("datasets", "tokenizers"):
        (out / "data" / name).mkdir()
    (out / "data/datasets/sample").symlink_to(sample)
    (out / "data/tokenizers/sample.model").symlink_to(corpus["TOKENIZER_PATH"])
    if missing == "tokenizer":
        Path(config.tokenizer_path).unlink()
    else:
        (fineweb / f"fineweb_{missing}_000000.bin").unlink()
    gpu_check.find_data(out, HANG)
    (link,) = (out / "short").glob("fineweb_train_*.bin")
    assert link.resolve() == (Path(corpus["DATA_PATH"]) / link.name).resolve()


SAMPLE = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--root") + 1])
shards = ["datasets/s/fineweb_train_0.bin", "datasets/s/fineweb_val_0.bin"]
for name in [*shards, "tokenizers/t.model"]:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
"""


@pytest.fixture
def no_fineweb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of data/sample.py, where there is no FineWeb."""
    script = tmp_path / "sample.py"
    monkeypatch.setattr(gpu_check, "SAMPLE", script)
    monkeypatch.setattr(gpu_check.tg, "find_file", lambda path: tmp_path / "nowhere" / path)
    monkeypatch.setattr(gpu_check, "shorten", lambda shards, folder: shards)
    return script


@pytest.mark.parametrize(
    ("text", "seconds", "reason"),
    [
        ("import sys; sys.exit('no source here')", HANG, r" \(exit code 1\): no source here"),
        ("import time; time.sleep(1000)", 0.1, r" in 0 s, a third of --minutes"),
        ("", HANG, r": .*data lacks shards or a tokenizer"),
    ],
)
def test_a_sample_corpus_that_cannot_be_made_is_told_in_a_line(
    tmp_path: Path, no_fineweb: Path, text: str, seconds: float, reason: str
) -> None:
    no_fineweb.write_text(text)
    message = rf"^there is no FineWeb here, and .* the sample corpus{reason}$"
    with pytest.raises(gpu_check.tg.InputError, match=message):
        gpu_check.find_data(tmp_path, seconds)


def test_a_sample_corpus_that_is_half_made_is_made(tmp_path: Path, no_fineweb: Path) -> None:
    (tmp_path / "data/datasets/s").mkdir(parents=True)
    (tmp_path / "data/datasets/s/fineweb_train_0.bin").touch()
    no_fineweb.write_text(SAMPLE)
    data = gpu_check.find_data(tmp_path, HANG)
    assert data["DATA_PATH"] == str(tmp_path / "data/datasets/s")
    no_fineweb.write_text("raise SystemExit(1)")
    assert gpu_check.find_data(tmp_path, HANG) == data, "and used again"


SMALL = dict(
    MODEL_DIM="32",
    NUM_HEADS="2",  # of 16 channels, as many as `frontier` rotates
    NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="256",
    DTYPE="float32",
)


def on_cpu(corpus: dict[str, str], out: Path) -> gpu_check.Options:
    """Of runs that take a CPU some seconds."""
    data = corpus | ON_CPU | dict(LOG_DIR=str(gpu_check.runs_of(out)), COMPILE="off")
    return gpu_check.Options(out, data, 3 * HANG, 1)


def test_a_whole_run_is_stopped_resumed_and_scored_again(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "SHORT", gpu_check.SHORT | SMALL)
    figures = gpu_check.Figures(tmp_path / "part.json")
    gpu_check.whole_run(figures, on_cpu(corpus, tmp_path))
    assert abs(figures.values["scored again, difference in nats"]) < 1e-5
    assert re.match(r"resumed from step:1[2-9]", figures.values["resumed"][0])
    assert gpu_check.PROBLEMS not in figures.values


def test_a_run_that_was_stopped_ends_with_the_artifact_of_one_that_was_not(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "SHORT", gpu_check.SHORT | SMALL)
    figures = gpu_check.Figures(tmp_path / "part.json")
    gpu_check.same_bits(figures, on_cpu(corpus, tmp_path))
    assert figures.values == {"one artifact": True}


def test_other_weights_after_a_stop_are_a_problem(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "SHORT", gpu_check.SHORT | SMALL)
    whole = gpu_check.stopped_and_resumed
    other = dict(SEED="1")  # of the stopped run alone
    monkeypatch.setattr(
        gpu_check, "stopped_and_resumed", lambda o, name, env: whole(o, name, env | other)
    )
    figures = gpu_check.Figures(tmp_path / "part.json")
    gpu_check.same_bits(figures, on_cpu(corpus, tmp_path))
    assert figures.values["one artifact"] is False
    assert figures.values[gpu_check.PROBLEMS] == [
        "the run that was resumed has ended with other weights"
    ]


def test_a_run_that_begins_anew_has_not_been_resumed(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the same weights all the same."""
    run = gpu_check.Run

    def anew(options: Any, name: str, settings: dict[str, str]) -> gpu_check.Run:
        if "RESUME" in settings:
            settings = settings | dict(RESUME="", RUN_ID="anew")
        return run(options, name, settings)

    monkeypatch.setattr(gpu_check, "SHORT", gpu_check.SHORT | SMALL)
    monkeypatch.setattr(gpu_check, "Run", anew)
    figures = gpu_check.Figures(tmp_path / "part.json")
    gpu_check.same_bits(figures, on_cpu(corpus, tmp_path))
    assert figures.values["one artifact"] is True
    assert figures.values[gpu_check.PROBLEMS] == [gpu_check.BEGUN_ANEW]


def test_the_contender_is_trained_rounded_and_scored_from_its_packed_script(
    few_tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SMALL | dict(ITERATIONS="24", EVAL_STRIDE="16", GPTQ_BATCHES="1")
    monkeypatch.setattr(gpu_check, "CONTENDER", gpu_check.CONTENDER | small)
    # The part counts the batch from the preset's.
    sizes = dict(TRAIN_BATCH_TOKENS="256", MICRO_BATCH_TOKENS="256")
    options = on_cpu(few_tokens | sizes, tmp_path)
    figures = gpu_check.Figures(tmp_path / "part.json")
    gpu_check.all_gpus(figures, options)
    assert {*figures.values} >= {"GPUs", "ms a step", "train_loss", "bytes_total", "val_bpb"}
    result = json.loads((gpu_check.runs_of(tmp_path) / "contender/result.json").read_text())
    assert "packed_sha256" in result["versions"]


def test_a_run_that_fails_is_told_by_its_own_last_words(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit('[rank 0] out of memory')")
    data = dict(LOG_DIR=str(gpu_check.runs_of(tmp_path)))
    options = gpu_check.Options(tmp_path, data, HANG, 2)
    run = gpu_check.Run(options, "failed", {}, 2, script)
    with pytest.raises(RuntimeError, match=r"run_failed.txt: exit code 1, not 0: .*out of memory$"):
        run.end(HANG)
    with pytest.raises(RuntimeError, match=r"'\^step:1/' never came: .*out of memory$"):
        run.wait_for(r"^step:1/", HANG)
