"""Folders in the layouts of the field: score, times and seeds are found, as baseline too."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import train_gpt as tg
from records.tools import audit, checks, logs, submit

SCRIPT = "import math\n\nprint(math.pi)\n"
CODE = len(SCRIPT)
MODEL = 15_900_000
BAR = "=" * 100
NODE = "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |"

# ---- The lines of each family of scripts, as this file writes them -------------------------------


@dataclass(frozen=True)
class Seed:
    """What a log says: losses are derived from the score."""

    seed: int
    bpb: float
    train_ms: int = 588_047
    eval_ms: int = 366_525

    @property
    def loss(self) -> float:
        return self.bpb * 2.5

    def pair(self, digits: int, worse: float = 0.0) -> str:
        return (
            f"val_loss:{self.loss + worse:.{digits}f} val_bpb:{self.bpb + worse / 2.5:.{digits}f}"
        )


def sizes(label: str) -> list[str]:
    return [
        "Serialized model: 135426937 bytes",
        f"Code size: {CODE} bytes",
        f"Total submission size: {135426937 + CODE} bytes",
        f"Serialized model {label}: {MODEL} bytes",
        f"Total submission size {label}: {MODEL + CODE} bytes",
    ]


def contest(s: Seed) -> list[str]:
    """March: the contest's own script, with its source, nvidia-smi, and steps that say step_avg."""
    end = f"train_time:{s.train_ms}ms step_avg:43.54ms"
    return [
        *SCRIPT.splitlines(),
        BAR,
        "Running Python 3.12.3 (main)",
        "Running PyTorch 2.9.1+cu128",
        NODE,
        BAR,
        "world_size:8 grad_accum_steps:1",
        f"seed:{s.seed}",
        "step:0/20000 val_loss:6.9323 val_bpb:4.1057 train_time:0ms step_avg:0.02ms",
        f"step:13780/20000 {s.pair(4, -0.01)} {end}",
        f"stopping_early: wallclock_cap train_time:{s.train_ms}ms step:13780/20000",
        *sizes("int8+zlib"),
        f"final_int8_zlib_roundtrip {s.pair(4)} eval_time:{s.eval_ms}ms",
        f"final_int8_zlib_roundtrip_exact {s.pair(8)}",
    ]


def sliding(s: Seed) -> list[str]:
    """Late March: int6 with a roundtrip and a sliding score, and an alias of the latter."""
    return [
        "world_size:8 grad_accum_steps:1",
        f"seed:{s.seed}",
        f"step:7200/20000 {s.pair(4, -0.01)} train_time:{s.train_ms}ms step_avg:83.33ms",
        "peak memory allocated: 20841 MiB reserved: 21060 MiB",
        f"DIAGNOSTIC post_ema {s.pair(4, -0.02)} eval_time:1439ms",
        *sizes("int6+lzma"),
        f"final_int6_roundtrip {s.pair(4, 0.06)} eval_time:11572ms",
        f"final_int6_roundtrip_exact {s.pair(8, 0.06)}",
        f"final_int6_sliding_window {s.pair(4)} stride:64 eval_time:{s.eval_ms}ms",
        f"final_int6_sliding_window_exact {s.pair(8)}",
        f"final_int8_zlib_roundtrip_exact {s.pair(8)}",
    ]


def legal_ttt(s: Seed) -> list[str]:
    """Score-first test-time training behind a sliding score that is worse."""
    return [
        *sliding(replace(s, bpb=s.bpb + 0.0025, eval_ms=80_000)),
        "ttt_sliding:done val_loss=9.9 val_bpb=9.9 elapsed=409.2s",
        f"legal_ttt {s.pair(4)} eval_time:{s.eval_ms}ms",
        f"legal_ttt_exact {s.pair(8)}",
    ]


def april(s: Seed) -> list[str]:
    """April: hyperparameters line by line, source between bars, steps without `step:`."""
    return [
        BAR,
        "Hyperparameters:",
        "  iterations: 20000",
        f"  seed: {s.seed}",
        "  world_size: 8",
        BAR,
        "Source code:",
        BAR,
        *SCRIPT.splitlines(),
        BAR,
        "Running PyTorch 2.9.1+cu128",
        NODE,
        "val_tokens: 40540160",
        "0/20000 val_loss: 9.0047 val_bpb: 3.4860",
        "500/20000 train_loss: 3.3964 train_time: 0.9m tok/s: 7669991",
        f"4550/20000 val_loss: {s.loss - 0.01:.4f} val_bpb: {s.bpb - 0.004:.4f}",
        f"stopping_early: wallclock_cap train_time: {s.train_ms}ms step: 4550/20000",
        f"pre-quantization post-ema {s.pair(8, -0.02)} eval_time:6365ms",
        "GPTQ:collecting Hessians from calibration data...",
        "GPTQ:collected 67 Hessians in 9.6s",
        *sizes("quantized+brotli"),
        f"quantized {s.pair(8, 0.04)} eval_time:8201ms",
        f"quantized_sliding_window {s.pair(8, 0.004)} eval_time:92525ms",
        f"quantized_ttt {s.pair(8)} eval_time:{s.eval_ms}ms",
    ]


def phased(s: Seed) -> list[str]:
    """May: packed code, a diagnostic after rounding, and the time of evaluation in one line."""
    return [
        f"  seed: {s.seed}",
        "  world_size: 8",
        NODE,
        f"4841/20000 val_loss: {s.loss:.4f} val_bpb: {s.bpb:.4f}",
        f"stopping_early: wallclock_cap train_time: {s.train_ms}ms step: 4841/20000",
        f"diagnostic pre-quantization post-ema {s.pair(8, -0.02)} eval_time:18334ms",
        "Serialized model: 135426937 bytes",
        "Code size (uncompressed): 191812 bytes",
        f"Code size (compressed): {CODE} bytes",
        f"Serialized model quantized+pergroup: {MODEL} bytes",
        f"Total submission size quantized+pergroup: {MODEL + CODE} bytes",
        f"diagnostic quantized {s.pair(8, 0.04)} eval_time:11000ms",
        f"quantized_ttt_phased {s.pair(8)} eval_time:{s.eval_ms}ms",
        f"total_eval_time:{s.eval_ms / 1e3:.1f}s",
    ]


def strided(s: Seed) -> list[str]:
    """A console's output, with the stride before the score."""
    return [
        "W0319 09:54:30.001000 87624 torch/distributed/run.py:852] ****************",
        "world_size:8 grad_accum_steps:1",
        f"step:11728/20000 {s.pair(4, -0.01)} train_time:{s.train_ms}ms step_avg:51.16ms",
        *sizes("int8+zlib"),
        f"final_int8_zlib_roundtrip {s.pair(4, 0.02)} eval_time:2083ms",
        f"final_int8_zlib_roundtrip_exact {s.pair(8, 0.02)}",
        f"final_sliding_window_eval stride:64 {s.pair(4)} eval_time:{s.eval_ms}ms",
        f"final_sliding_window_eval_exact stride:64 {s.pair(8)}",
    ]


@dataclass(frozen=True)
class Layout:
    """A folder as the field has them."""

    lines: Callable[[Seed], list[str]]
    names: Sequence[str]  # of the logs
    label: str  # of the final score
    evaluation_ms: int  # other than that of the final score
    calibration_ms: int = 0


LAYOUTS = {
    "contest": Layout(
        contest,
        ["train.log", "train_seed1338.log", "train_seed1339.log"],
        "final_int8_zlib_roundtrip_exact",
        0,
    ),
    "sliding": Layout(
        sliding,
        ["train_seed1337.log", "train_seed42.log"],
        "final_int6_sliding_window_exact",
        11_572,
    ),
    "legal_ttt": Layout(
        legal_ttt, ["train_s42.log", "train_s7.log", "train_s1.log"], "legal_ttt_exact", 91_572
    ),
    "april": Layout(
        april,
        ["train_seed42.log", "train_seed314.log", "train_seed999.log"],
        "quantized_ttt",
        100_726,
        9_600,
    ),
    "phased": Layout(phased, ["train_seed42.log", "train_seed0.log"], "quantized_ttt_phased", 0),
    "logs": Layout(
        april, ["logs/run_a_seed42.txt", "logs/run_b_seed43.txt"], "quantized_ttt", 100_726, 9_600
    ),
    "strided": Layout(
        strided,
        ["rerun_seed1338.log", "rerun_seed1339.log"],
        "final_sliding_window_eval_exact",
        2_083,
    ),
}


def seeds_of(layout: Layout, first: float = 1.0808) -> list[Seed]:
    found = []
    for i, name in enumerate(layout.names):
        named = re.search(r"(\d+)\.", name)
        found.append(Seed(int(named[1]) if named else 1337, first + 0.0002 * i))
    return found


def write(folder: Path, layout: Layout, seeds: Sequence[Seed], claims: dict | None = None) -> Path:
    """A folder with logs, submission.json and README.md that agree."""
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text(SCRIPT)
    for name, seed in zip(layout.names, seeds, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(layout.lines(seed)) + "\n")
    mean = sum(seed.bpb for seed in seeds) / len(seeds)
    results = {
        str(s.seed): dict(val_bpb=round(s.bpb, 5), artifact_bytes=MODEL + CODE) for s in seeds
    }
    data = dict(
        author="A",
        github_id="a",
        name="N",
        date="2026-04-09",
        val_bpb=round(mean, 4),
        seeds=[seed.seed for seed in seeds],
        seed_results=results,
        bytes_total=MODEL + CODE,
        technique_summary="GPTQ",
        some_key_of_theirs=[1, 2],
    )
    (folder / "submission.json").write_text(json.dumps(data | (claims or {}), indent=1))
    rows = [f"| {s.seed} | {s.bpb:.4f} | -0.0337 | {MODEL + CODE:,} |" for s in seeds]
    (folder / "README.md").write_text(
        f"# N\n\n**val_bpb = {mean:.4f}**, merged before: 1.1147, delta: -0.0025, lr 0.0220.\n\n"
        "| Seed | val_bpb | Delta | Artifact |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    return folder


@pytest.fixture
def track(tmp_path: Path) -> Path:
    return tmp_path / "track_10min_16mb"


@pytest.mark.parametrize("name", LAYOUTS)
def test_score_times_and_seeds_are_found(name: str, track: Path) -> None:
    layout = LAYOUTS[name]
    seeds = seeds_of(layout)
    folder = write(track / name, layout, seeds)
    found = checks.check(folder, None, run=True)
    assert checks.faults(found) == [], "\n".join(map(str, found))
    by_seed = {log.values["seed"]: log for log in checks.Folder(folder).complete}
    assert by_seed.keys() == {seed.seed for seed in seeds}
    for seed in seeds:
        log = by_seed[seed.seed]
        assert log.words["final"] == layout.label
        assert log.values["val_bpb"] == pytest.approx(seed.bpb, abs=1e-8)
        assert log.values["val_loss"] == pytest.approx(seed.loss, abs=1e-8)
        assert log.values["train_ms"] == seed.train_ms
        assert log.train_and_calibrate_ms == seed.train_ms + layout.calibration_ms
        assert log.values["eval_ms"] == seed.eval_ms + layout.evaluation_ms
        assert log.values["total"] == MODEL + CODE
        assert log.values["pre_bpb"] < seed.bpb + 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_can_be_the_baseline(name: str, track: Path) -> None:
    layout = LAYOUTS[name]
    base = write(track / "base", layout, seeds_of(layout))
    better = write(track / "better", LAYOUTS["april"], seeds_of(LAYOUTS["april"], 1.0708))
    losses = [log.values["val_loss"] for log in checks.read_baseline(base)]
    assert losses == pytest.approx(sorted(seed.loss for seed in seeds_of(layout)), abs=1e-3)
    found = [str(finding) for finding in checks.check(better, base, run=False)]
    assert any("note submission.json:" in told and "delta_nats" in told for told in found), found
    assert not any(told.startswith("FAIL") for told in found), found


def test_the_claim_chooses_the_evaluation(track: Path) -> None:
    """The same logs under two claims: test-time training, and the sliding window before it."""
    layout = LAYOUTS["april"]
    seeds = seeds_of(layout)
    for name, worse in (("quantized_ttt", 0.0), ("quantized_sliding_window", 0.004 / 2.5)):
        claimed = {str(s.seed): dict(val_bpb=round(s.bpb + worse, 5)) for s in seeds}
        mean = round(sum(s.bpb + worse for s in seeds) / len(seeds), 5)
        claims = dict(seed_results=claimed, val_bpb=mean)
        folder = write(track / name, layout, seeds, claims)
        assert {log.words["final"] for log in checks.Folder(folder).complete} == {name}
        wrong = [
            finding
            for finding in checks.check(folder, None, run=False)
            if "val_bpb" in finding.what
        ]
        assert checks.faults([f for f in wrong if f.where.startswith("submission")]) == []
    claims = dict(seed_results={}, val_bpb=1.05)
    wrong = checks.check(write(track / "none", layout, seeds, claims), None, run=False)
    assert any("val_bpb 1.05 where the logs give" in finding.what for finding in wrong)


@pytest.mark.parametrize("copied", [True, False])
def test_train_log_may_be_a_copy_of_a_seed(copied: bool, track: Path) -> None:
    layout = LAYOUTS["sliding"]
    folder = write(track / "x", layout, seeds_of(layout))
    text = (folder / "train_seed1337.log").read_text()
    (folder / "train.log").write_text(text if copied else text + "more\n")
    found = checks.faults(checks.check(folder, None, run=False))
    same_seed = [finding for finding in found if "the same seed as" in finding.what]
    assert bool(same_seed) != copied
    assert copied or same_seed[0].where.startswith("train")


@pytest.mark.parametrize(
    ("train_ms", "level", "told"),
    [
        (600_051, "note", "0.051 s over 600, as 19 of 46 merged records are"),
        (600_101, "FAIL", "training took 600.101 s, more than 600"),
    ],
)
def test_a_tenth_of_a_second_over_is_told_as_it_is(
    train_ms: int, level: str, told: str, track: Path
) -> None:
    layout = LAYOUTS["contest"]
    seeds = [replace(seed, train_ms=train_ms) for seed in seeds_of(layout)]
    claims = dict(compliance=dict(train_under_600s=True))
    found = checks.check(write(track / "x", layout, seeds, claims), None, run=False)
    assert {f.level for f in found if told in f.what} == {level}
    assert bool(checks.faults(found)) == (level == "FAIL")


def test_calibration_counts_as_training_and_evaluations_are_summed(track: Path) -> None:
    layout = LAYOUTS["april"]
    seeds = [replace(seed, train_ms=598_000, eval_ms=500_000) for seed in seeds_of(layout)]
    claims = dict(compliance=dict(train_under_600s=True, eval_under_600s=True))
    found = [str(f) for f in checks.check(write(track / "x", layout, seeds, claims), None, False)]
    trained = "training and calibration took 607.600 s (598.000 + 9.600), more than 600"
    assert any(told.startswith("FAIL train_seed42.log:") and trained in told for told in found)
    assert any("evaluation took 600.726 s in all, more than 600" in told for told in found)
    for claim in ("train_under_600s is claimed", "eval_under_600s is claimed"):
        assert any(claim in told for told in found), found


def test_an_evaluation_in_a_log_of_its_own_belongs_to_its_seed(track: Path) -> None:
    layout = LAYOUTS["phased"]
    seeds = seeds_of(layout)
    folder = write(track / "x", layout, seeds)
    for name in layout.names:
        lines = (folder / name).read_text().splitlines()
        seed = [line for line in lines if "seed:" in line]
        final = [line for line in lines if line.startswith(("quantized_ttt", "total_eval"))]
        rest = [line for line in lines if line not in final]
        (folder / name).write_text("\n".join(rest))
        (folder / name.replace("train", "eval")).write_text("\n".join([*seed, *final]))
    assert checks.faults(checks.check(folder, None, run=False)) == []
    found = checks.Folder(folder).complete
    assert [log.values["val_bpb"] for log in found] == [
        s.bpb for s in sorted(seeds, key=lambda s: s.seed)
    ]


def test_what_a_log_does_not_give_is_told_and_the_rest_checked(track: Path) -> None:
    layout = LAYOUTS["strided"]
    folder = write(track / "x", layout, seeds_of(layout))
    path = folder / layout.names[0]
    kept = [line for line in path.read_text().splitlines() if "train_time" not in line]
    path.write_text("\n".join(kept))
    found = checks.check(folder, None, run=False)
    assert checks.faults(found) == []
    assert any("gives no train_ms" in finding.what for finding in found)
    path.write_text("step:1/20000 train_loss:6.9 train_time:10ms step_avg:10.00ms\n")
    found = checks.faults(checks.check(folder, None, run=False))
    assert any("the log ends without a final score" in finding.what for finding in found)


def test_packed_code_is_told_not_failed(track: Path) -> None:
    layout = LAYOUTS["phased"]
    folder = write(track / "x", layout, seeds_of(layout))
    (folder / "train_gpt.py").write_text(SCRIPT + "#" * 190_000)
    found = checks.check(folder, None, run=False)
    assert checks.faults(found) == []
    assert any("of a packed script; train_gpt.py here has" in finding.what for finding in found)


WRONG = [
    ("val_bpb", "1.2", 'val_bpb is "1.2", not a number from 0 to 50'),
    ("val_bpb", float("nan"), "val_bpb is NaN, not a number"),
    ("val_bpb", float("inf"), "val_bpb is Infinity, not a number"),
    ("val_bpb", True, "val_bpb is true, not a number"),
    ("val_bpb", -1.0, "val_bpb is -1.0, not a number from 0"),
    ("val_loss", None, "val_loss is null, not a number"),
    ("val_loss", 1.5, "val_loss 1.5 where the logs give"),
    ("val_bpb_std", [], "val_bpb_std is [], not a number"),
    ("val_bpb_std", 0.5, "val_bpb_std 0.5 where the logs give"),
    ("seeds", None, "seeds is null, not a list of seeds"),
    ("seeds", ["42"], 'seeds is ["42"], not a list of seeds'),
    ("seeds", [42, 43, 44], "seed 44 has no log"),
    ("seed_results", "x", 'seed_results is "x", not an object'),
    ("seed_results", {"x": {}}, '"x" is no seed'),
    ("seed_results", {"42": "y"}, '"y" is neither an object nor a score'),
    ("seed_results", {"42": {"steps": 4549}}, "steps 4549 where the logs give 4550.0"),
    ("seed_results", {"42": {"steps": 1.5}}, "steps is 1.5, not a whole number from 0"),
    ("comparison", "x", 'comparison is "x", not an object'),
    ("comparison", {"p_value": "0"}, 'p_value is "0", not a number from 0 to 1'),
    ("comparison", {"baseline_val_loss": ["a"]}, "not a list of numbers"),
    ("compliance", [], "compliance is [], not an object"),
    ("compliance", {"eval_under_600s": "yes"}, 'eval_under_600s is "yes", not true or false'),
    ("track", 10, "track is 10, not a text"),
    ("date", "yesterday", 'date is "yesterday", not a date'),
    ("author", " ", 'author is " ", not a text'),
    ("bytes_total", MODEL, "bytes_total 15900000 where the logs give"),
    ("bytes_total", -5, "bytes_total is -5, not a number from 0"),
    ("eval_time_s", 1, "eval_time_s 1 where the logs give"),
    ("train_time_s", 1, "train_time_s 1 where the logs give"),
    ("hardware", {}, "hardware is {}, not a text"),
]


@pytest.mark.parametrize(("key", "value", "told"), WRONG, ids=[told for _, _, told in WRONG])
def test_every_field_has_a_type_a_range_and_a_source(
    key: str, value: object, told: str, track: Path
) -> None:
    layout = LAYOUTS["logs"]
    folder = write(track / "x", layout, seeds_of(layout), {key: value})
    found = checks.faults(checks.check(folder, None, run=False))
    wrong = [finding for finding in found if told in finding.what]
    assert wrong, "\n".join(map(str, found))
    line = int(wrong[0].where.split(":")[1])
    text = (folder / "submission.json").read_text().splitlines()[line - 1]
    assert key in text or key in ("seed_results", "comparison", "compliance", "seeds")


@pytest.mark.parametrize("text", ["[]", "", "{", '"x"', "[" * 100_000, "1" * 5000, "null"])
def test_a_submission_json_that_is_none_is_told(text: str, track: Path) -> None:
    layout = LAYOUTS["logs"]
    folder = write(track / "x", layout, seeds_of(layout))
    (folder / "submission.json").write_text(text)
    found = checks.faults(checks.check(folder, None, run=False))
    assert any(finding.where == "submission.json" for finding in found), found


def test_a_wrong_score_in_the_readme_is_found_and_a_delta_is_none(track: Path) -> None:
    layout = LAYOUTS["april"]
    folder = write(track / "x", layout, seeds_of(layout))
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("| 42 | 1.0808", "| **42** | 1.0708"))
    found = checks.faults(checks.check(folder, None, run=False))
    assert [str(finding).split(",")[0] for finding in found] == [
        "FAIL README.md:7: 1.0708 stands for seed 42"
    ]


def test_the_command_tells_what_it_found(
    track: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS["april"]
    folder = write(track / "x", layout, seeds_of(layout))
    monkeypatch.setattr("sys.argv", ["submit.py", "--check", str(folder)])
    assert submit.main() == 0
    told = capsys.readouterr().out
    assert (
        "found train_seed42.log: seed 42, val_bpb 1.0808 (quantized_ttt), training and calibration "
        "took 597.647 s (588.047 + 9.600), evaluation 467.3 s" in told
    )
    assert "note submission.json: not checked: some_key_of_theirs" in told


def test_the_audit_reads_the_logs_of_others(
    track: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS["april"]
    slow = [replace(seed, train_ms=599_000) for seed in seeds_of(layout)]
    for name, seeds, code in (("fine", seeds_of(layout), 0), ("slow", slow, 1)):
        folder = write(track / name, layout, seeds)
        monkeypatch.setattr("sys.argv", ["audit.py", str(folder)])
        assert audit.main() == code
        told = capsys.readouterr().out
        assert "skipped causality: the logs are of another script" in told
    assert "FAILED clocks: FAIL train_seed42.log:" in told and "took 608.600 s" in told


def test_a_number_as_written_is_the_true_one_rounded() -> None:
    assert logs.same("1.0810", 1.08099352) and not logs.same("1.0810", 1.0809)
    assert logs.same(15_900_000, 15_900_000.0) and not logs.same("NaN", 1.0)
    assert not logs.same(tg.math.inf, 1.0)
