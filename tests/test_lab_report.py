"""records/tools/report.py and results.py: statistics, what is compared where, and the page."""

import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, variance
from typing import Any

import pytest
from finished_runs import NOISE, Made, bpb_at, edit_result, write_rows

from records.tools import ablate

t = pytest.importorskip("scipy.stats").t
to_hex = pytest.importorskip("matplotlib.colors").to_hex
report = pytest.importorskip("records.tools.report", exc_type=ImportError)
results = pytest.importorskip("records.tools.results", exc_type=ImportError)
figures = pytest.importorskip("records.tools.figures", exc_type=ImportError)
compare = pytest.importorskip("records.tools.compare", exc_type=ImportError)
page_tools = pytest.importorskip("records.tools.page", exc_type=ImportError)
TABLE = ablate.read_table(ablate.ROOT / "records" / "runs.toml")
ROWS = TABLE.rows
COMMITTED = ablate.ROOT / "records" / "micro" / "report.html"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "tiny")


def load(folder: Path) -> list:
    """The runs of a row."""
    return results.load_seeds(results.seed_folders(folder)).runs


@functools.cache
def intended() -> Any:
    """What is asked of all rows at the scale of these runs."""
    return ablate.intended(TABLE, "tiny")


def written(runs: Path) -> tuple[str, str]:
    """The report of some runs, as Markdown and as HTML."""
    to = runs.parent / "to"
    report.write(runs, TABLE, intended(), to)
    return (to / "report.md").read_text(), (to / "report.html").read_text()


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of this test have empty pictures: real ones take most of the time."""
    monkeypatch.setattr(page_tools, "svg", lambda figure, name: "<svg></svg>")
    monkeypatch.setattr(figures, "png", lambda figure: b"")
    for name in (
        "along_training",
        "bytes_and_bpb",
        "forest",
        "heat_maps",
        "narrow_forest",
        "training_curves",
        "training_differences",
        "validation_curves",
    ):
        monkeypatch.setattr(figures, name, lambda *_: figures.Figure())


# ---- Statistics


def test_welch_and_paired_tests_have_textbook_values() -> None:
    a, b = (27.5, 21.0, 19.0, 23.6, 17.0), (27.1, 22.0, 20.8, 23.4, 23.4, 25.0)
    va, vb = variance(a) / 5, variance(b) / 6
    freedom = (va + vb) ** 2 / (va**2 / 4 + vb**2 / 5)  # Welch 1947
    welch = results.delta(a, b, paired=False)
    assert welch.p == pytest.approx(2 * t.sf(abs(mean(a) - mean(b)) / math.sqrt(va + vb), freedom))
    assert welch.mean == pytest.approx(mean(a) - mean(b))
    assert welch.half == pytest.approx(t.ppf(0.975, freedom) * math.sqrt(va + vb))
    paired = results.delta(a, b[:5], paired=True)
    error = math.sqrt(variance([x - y for x, y in zip(a, b)]) / 5)
    assert paired.half == pytest.approx(2.7764 * error, rel=1e-4), "t(0.975, 4) from a table"
    assert paired.p == pytest.approx(2 * t.sf(abs(paired.mean) / error, 4))


def test_one_seed_on_a_side_has_a_difference_and_no_interval() -> None:
    for a, b in (([1.0], [2.0]), ([1.0, 1.2], [2.1]), ([1.0], [1.9, 2.3])):
        made = results.delta(a, b, paired=len(a) == len(b))
        assert made.mean == pytest.approx(mean(a) - mean(b))
        assert math.isnan(made.half) and math.isnan(made.p)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.filterwarnings("error")
def test_seeds_that_agree_to_the_last_bit_are_a_difference_without_a_doubt(paired: bool) -> None:
    assert results.delta([1.5, 1.5], [1.5, 1.5], paired) == (0.0, 0.0, 1.0)
    made = results.delta([1.1, 1.1], [0.3, 0.3], paired)
    assert made.mean == pytest.approx(0.8) and made.half == made.p == 0


def test_holm_is_holm() -> None:
    assert results.holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True
    )


def test_a_finding_is_shown_only_after_the_correction() -> None:
    ps = [0.001, 0.02, 0.04, 0.5, math.nan]
    measures = [results.Measure("", [], [], results.Delta(-1.0, 0.1, p)) for p in ps]
    measures.append(results.Measure("no runs", [], [], None))
    assert [m.verdict for m in results.adjusted(measures)] == [
        "shown",
        "suggested",
        "suggested",
        "undecided",
        "one seed",
        "none",
    ]
    alone = [measure.verdict for measure in measures]
    assert alone == ["suggested"] * 3 + ["undecided", "one seed", "none"], "in no table"


# ---- Where in training scores are compared


def test_equal_steps_and_equal_time_disagree_as_they_must(runs: Path) -> None:
    found, left = report.load_all(runs, ROWS)
    assert left == []
    c = next(c for c in report.compare_all(found, ROWS) if (c.row, c.baseline) == ("O", "K"))
    assert c.test == "paired" and c.steps.where == "end, 100" and c.time.where == "6.0 s"
    assert c.steps.delta.mean == pytest.approx(-0.02)
    assert c.post.delta.mean == pytest.approx(-0.02 * 1.002)
    fewer_steps = -0.02 + 0.1 * math.log(1.7)
    assert c.time.delta.mean == pytest.approx(fewer_steps), "in the same time"
    assert c.gap.delta.mean == pytest.approx(-0.02 * 0.002)


def test_load_on_the_machine_during_one_seed_does_not_decide(runs: Path) -> None:
    calm = results.equal_time([*load(runs / "O"), *load(runs / "K")])
    for name in ("metrics.jsonl", "result.json"):
        path = runs / "O" / "seed2" / name
        slower = re.sub(
            r'("train_seconds": )([\d.]+)',
            lambda m: m[1] + str(3 * float(m[2])),
            path.read_text(),
        )
        path.write_text(slower)
    assert results.equal_time([*load(runs / "O"), *load(runs / "K")]) == calm


def test_where_later_steps_take_longer_time_is_what_was_logged(tmp_path: Path) -> None:
    """Growth of depth: at one pace for all steps, the early ones would be dated too late."""

    class Growing(Made):
        def seconds(self, step: int) -> float:
            return 0.1 * step + 0.3 * max(step - 50, 0)

    grows = {"PASSES_SCHEDULE": "0:1,0.5:3"}
    for seed in (1, 2, 3):
        Growing(3.0, options=grows).write(tmp_path / "T", seed)
    for run in load(tmp_path / "T"):
        assert [p.seconds for p in run.points if p.step in (30, 50, 100)] == [3.0, 5.0, 25.0]
        assert run.full_rate == (60, pytest.approx(9.0))


def test_the_rate_falls_before_the_reserve_whether_given_or_measured() -> None:
    given = dict(iterations=1000, warmdown_iters=20, max_wallclock_seconds=100.0, gptq_batches=1)
    clock = [(step, 1.0 * step) for step in range(0, 100, 5)]

    def falls(**values: Any) -> tuple[int, float]:
        reserve = {"gptq_reserve_seconds": values.pop("reserve")} if "reserve" in values else {}
        return results.full_rate({"config": given | values} | reserve, clock)

    assert falls(gptq_seconds=30.0) == falls(gptq_seconds=-1.0, reserve=30.0) == (50, 50.0)
    assert falls(gptq_seconds=-1.0, reserve=0.0) == (80, 80.0)


def test_where_the_clock_ends_runs_time_is_compared_at_the_end_and_steps_before_the_warm_down(
    tmp_path: Path,
) -> None:
    capped = {"ITERATIONS": "20000", "MAX_WALLCLOCK_SECONDS": "11", "WARMDOWN_ITERS": "30"}
    Made(3.0, 0.1, steps=109, options=capped).write(tmp_path / "K", 1)
    Made(2.98, 0.11, steps=99, options=capped).write(tmp_path / "O", 1)
    a, b = load(tmp_path / "K")[0], load(tmp_path / "O")[0]
    assert results.equal_time([a, b]) == ("end, 11 s", [a.pre, b.pre])
    where, values = results.equal_step([a, b])
    assert where == "70", "O's rate begins to fall 30 steps before second 11"
    assert values == pytest.approx([bpb_at(70, 3.0), bpb_at(70, 2.98)])
    assert max(results.over_steps([b], [a]).x) == 70, "then only one rate has fallen"
    assert max(results.over_time([b], [a]).x) == pytest.approx(99 * 0.11), "both fall alike"


def test_seeds_are_paired_only_where_they_draw_the_same_weights(runs: Path) -> None:
    o, k, e = (load(runs / row) for row in "OKE")
    assert results.compare(o, k).test == "paired"
    assert results.compare(o, e).test == "Welch", "another number of stored layers"
    assert results.compare(o[:2], k).test == "Welch", "other seeds"


def test_a_curve_of_differences_is_the_difference_of_the_curves(runs: Path) -> None:
    o, k = load(runs / "O"), load(runs / "K")
    steps = results.over_steps(o, k)
    assert steps.x == list(range(10, 101, 10)) and steps.falls == 60
    assert steps.mean == pytest.approx([-0.02] * 10)
    error = 4.3027 * 1e-5 / math.sqrt(3)  # t(0.975, 2); seeds' differences are 1e-5 apart
    assert steps.half == pytest.approx([error] * 10, rel=1e-3)
    seconds = results.over_time(o, k)
    assert seconds.x == pytest.approx([1.7, 3.4, 5.1]), "K's rate falls from second 6 on"
    assert seconds.mean == pytest.approx([-0.02 + 0.1 * math.log(1.7)] * 3, abs=2e-3)
    assert results.over_training(o, k).mean == pytest.approx([-0.04] * 20)


def test_a_claim_is_tested_on_the_mean_of_its_pairs(runs: Path) -> None:
    found, pairs = report.load_all(runs, ROWS)[0], [["O", "K"], ["E", "K"]]
    post = {row: {run.seed: run.post for run in found[row]} for row in found}
    effects = [(post["O"][s] + post["E"][s]) / 2 - post["K"][s] for s in NOISE]
    measure = report.claimed(found, pairs, report.read_post)
    assert measure.delta.mean == pytest.approx(mean(effects))
    half = 4.3027 * math.sqrt(variance(effects) / 3)  # t(0.975, 2)
    assert measure.delta.half == pytest.approx(half, rel=1e-4)
    del found["E"][2]
    fewer = report.claimed(found, pairs, report.read_post)
    assert fewer.delta.mean == pytest.approx(mean(effects[:2])), "the seeds that all rows have"
    missing = report.claimed(found, [["O", "N"]], report.read_post)
    assert missing.delta is None and missing.where == "no finished run of N"


def test_a_claim_without_a_moment_in_common_has_the_reason_of_the_comparison(
    tmp_path: Path,
) -> None:
    no_validations(tmp_path)
    found, _ = report.load_all(tmp_path, ROWS)
    reason = (
        "a run has no validation in the first 5.00 s, at the end of which a learning rate falls: "
        "set VAL_LOSS_EVERY smaller"
    )
    assert results.equal_time([*found["O"], *found["K"]]) == (reason, [])
    assert report.claimed(found, [["O", "K"]], results.equal_time).where == reason
    early = replace(load(write_rows(tmp_path / "more") / "K")[0], full_rate=(100, 11.0))
    assert "a run has no validation after 11.00 s" in results.equal_time([early]).where


def test_published_differences_are_those_of_the_study() -> None:
    reference = report.published()
    assert reference.post("C", "Cp") == pytest.approx(-0.0073, abs=5e-5)
    assert reference.steps("O", "K") == pytest.approx(-0.0039, abs=5e-4)
    assert reference.steps("Q", "O") == pytest.approx(1.2895 - 1.2923)
    assert math.isnan(reference.post("M", "K")), "it crashed"
    assert math.isnan(reference.post("G", "E")), "other hardware"


# ---- The headline


def test_the_lowest_is_the_best_only_where_it_differs_from_all_others(tmp_path: Path) -> None:
    for seed in NOISE:
        Made(3.0 + NOISE[seed]).write(tmp_path / "K", seed)
        Made(3.0005 + NOISE[4 - seed]).write(tmp_path / "N", seed)
        Made(3.1 + NOISE[seed]).write(tmp_path / "O", seed)
    found, _ = report.load_all(tmp_path, ROWS)
    said = report.headline(found, []).result
    assert said.startswith("No difference is shown between K and N (\u22120.0005 ± 0.")
    assert ", p 0." in said and "; lowest of 3 systems is K: 2.5" in said
    del found["N"]
    assert report.headline(found, []).result.startswith("K is the best of 2 systems: ")
    del found["O"][1:]
    said = report.headline(found, []).result
    assert "between K and O (\u22120.1002, one seed on a side); lowest of 2 systems is K" in said
    del found["O"]
    assert report.headline(found, []).result.startswith("K is the only system: ")


def test_a_validation_that_ends_above_an_earlier_one_is_told_first(runs: Path) -> None:
    assert report.rises(report.load_all(runs, ROWS)[0]) == ""
    path = runs / "O" / "seed2" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["val_bpb"] += 1.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, _ = report.load_all(runs, ROWS)
    first = report.headline(found, report.compare_all(found, ROWS)).lines[0]
    rise = lines[-1]["val_bpb"] - bpb_at(90, 2.98 + NOISE[2])
    assert first.classes == "warning" and first.text == (
        f"Validation ends above an earlier value in 1 of 9 runs (O; by up to {rise:.4f} bpb): "
        "training diverged or oscillates, so a difference from such a run is no result."
    )
    sides = [compare.Side(row, found[row]) for row in ("O", "K")]
    assert compare.cautions(*sides)[0].startswith("validation ends above an earlier value in 1 of")


# ---- Runs as they come


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a report, with all its pictures; one is by another script, on another machine."""
    runs = write_rows(tmp_path_factory.mktemp("mixed") / "tiny")
    versions = dict(script_sha256="1" * 64, device="cpu, 1 threads a rank", torch="2")
    edit_result(runs / "O" / "seed3", versions=versions)
    written(runs)
    return runs


def test_the_report_holds_every_figure_and_warns_of_mixed_origins(mixed: Path) -> None:
    text, page = ((mixed.parent / "to" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "script: 000000000000 / 111111111111 (they differ: compare with care)" in text
    assert "device: cpu / cpu, 1 thread a rank (they differ" in text
    row = next(line for line in text.splitlines() if line.startswith("| O | K |"))
    assert "paired" in row and "-0.0200" in row and "+0.0331" in row and "-0.0033" in row
    post = mean(run.post for run in load(mixed / "O"))
    assert f"O is the best of 3 systems: {post:.4f} ± " in text
    assert "Against its baseline K, after rounding: \u22120.0200" in text
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "needs no other file"
    assert "Q-gap 0.0078" in page and "\u22120.0033" in page, "O as published"
    assert "//" not in re.sub(r"base64,[^\"]*|\n// .*", "", page), "needs no network"
    assert {path.name for path in (mixed.parent / "to").iterdir()} == {
        "report.md",
        "report.html",
        "bytes.png",
        "forest.png",
    }


@pytest.mark.usefixtures("words_only")
def test_the_head_tells_the_values_that_the_runs_had(runs: Path) -> None:
    """Not only those of the scale, which `--set` may have changed for all runs or for some."""
    for name in ("K", "O", "E"):
        for folder in (runs / name).glob("seed*"):
            config = json.loads((folder / "result.json").read_text())["config"]
            config |= dict(iterations=20, warmdown_iters=50)
            if name == "E":
                config["grad_clip_norm"] = 1.0
                (folder / "run.json").write_text('{"variables": {"GRAD_CLIP_NORM": "1"}}')
            if name == "K":  # as a younger script may have it: nobody set it
                config["adam_wd"] = 0.5
            edit_result(folder, config=config)
    text, page = written(runs)
    scale = (
        "Scale tiny: a quarter of the width, half the heads, 256-token sequences, the sample "
        "corpus; for a CPU"
    )
    changed = "ITERATIONS=20 instead of 100 in all runs", "GRAD_CLIP_NORM=1.0 instead of 0.0 in E"
    assert f"- {scale}; but {'; '.join(changed)}.\n" in text
    assert f"<li>{scale}.</li>" in page and all(f"<li>{part}</li>" in page for part in changed)
    summary = "<summary>Not as the scale has it: GRAD_CLIP_NORM, ITERATIONS</summary>"
    assert summary in page, "one line until it is opened"


@pytest.mark.usefixtures("words_only")
def test_the_head_of_a_scale_that_was_kept_is_its_own(runs: Path) -> None:
    for folder in runs.glob("*/seed*"):
        config = json.loads((folder / "result.json").read_text())["config"]
        edit_result(folder, config=config | dict(warmdown_iters=50))
    assert "the sample corpus; for a CPU.\n" in written(runs)[0]


@pytest.mark.usefixtures("words_only")
def test_a_row_is_always_beside_its_declared_baselines(runs: Path) -> None:
    text, page = written(runs)
    assert "| E | D | (no finished run of D) |  |  |  |  |" in text, "the reason once"
    series = text[text.index("## Series 1") : text.index("## Series 2")]
    assert [line.split(" | ")[3:5] for line in series.splitlines() if line.startswith("| E (")] == [
        ["D", ""],
        ["Ap", ""],
    ]
    assert "no finished run of D" in page


@pytest.mark.usefixtures("words_only")
def test_a_table_that_is_empty_says_why(tmp_path: Path) -> None:
    Made(3.0).write(tmp_path / "tiny" / "naive", 1)  # no row of the table
    Made(3.0, options={"PRESET": "tiny"}).write(tmp_path / "tiny" / "once_plain", 1)
    text, page = written(tmp_path / "tiny")
    for shown in (text, page):
        assert "There is nothing to compare: no row that has runs declares a baseline." in shown
        assert "No claim can be tested: none of the rows they name (Ap, Bp, " in shown
        assert re.search(r"left out: naive in \S+: not a row of the table", shown)
    assert not (tmp_path / "to" / "forest.png").exists()


def unlike_seeds(folder: Path) -> None:
    for seed, steps in ((1, 93), (2, 100), (3, 104)):
        capped = {"ITERATIONS": "20000", "MAX_WALLCLOCK_SECONDS": "10"}
        Made(3.0 + NOISE[seed], 10 / steps, steps, options=capped).write(folder / "K", seed)
        Made(2.9 + NOISE[seed], 11 / steps, steps - 9, options=capped).write(folder / "O", seed)


def no_validations(folder: Path) -> None:
    for seed in (1, 2):
        Made(3.0 + NOISE[seed], every=0).write(folder / "K", seed)
        Made(2.9 + NOISE[seed], every=0, steps=90).write(folder / "O", seed)


def one_seed(folder: Path) -> None:
    Made(3.0).write(folder / "K", 1)
    Made(2.9).write(folder / "O", 1)


def no_training(folder: Path) -> None:
    for seed in (1, 2):
        Made(3.0 + NOISE[seed], steps=0).write(folder / "K", seed)
        Made(2.9 + NOISE[seed], steps=0).write(folder / "O", seed)


def no_health(folder: Path) -> None:
    for seed in (1, 2):
        for row in ("K", "O"):
            made = Made(3.0 + NOISE[seed]).write(folder / row, seed)
            path = made / "metrics.jsonl"
            path.write_text(re.sub(r', "health": \[.*?\]', "", path.read_text()))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (unlike_seeds, ["93 to 104", "84 to 95", "end, 10 s"]),
        (
            no_validations,
            [
                "share no validation before",
                "Not drawn before rounding, in equal time: O \u2212 K (a run has no validation",
                "Not drawn over seconds of training: O \u2212 K",
            ],
        ),
        (one_seed, ["one seed", "one seed on a side: no test", "0 undecided, 4 without a test"]),
        (no_training, ["end, 0", "no logged step before its learning rate falls"]),
        (no_health, ["+0.0000 ± 0.0000 (p 1"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_runs_as_they_come_have_a_report(
    made: Callable[[Path], None], told: list[str], tmp_path: Path
) -> None:
    made(tmp_path / "tiny")
    text, page = written(tmp_path / "tiny")
    for words in told:
        assert words in text, words
    assert "nan" not in re.sub(r"[A-Za-z]nan|nan[a-z]", "", text), "a figure that is none"
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert "nothing to compare" not in picture and "no validation" not in picture
        assert 'id="' in picture, "a marker, a clipped curve or an image: no frame is empty"


def damage_result(folder: Path) -> str:
    (folder / "result.json").write_text('{"steps": 1')
    return f"{folder}/result.json is damaged"


def lose_result(folder: Path) -> str:
    (folder / "result.json").unlink()
    return f"{folder}: no result.json, the run did not end"


def lose_score(folder: Path) -> str:
    edit_result(folder, pre_quant={"val_bpb": None})
    return f"{folder}/result.json: pre_quant.val_bpb should be a number, is null"


def spoil_score(folder: Path) -> str:
    edit_result(folder, roundtrip={"val_bpb": math.nan})
    return f"{folder}/result.json: roundtrip.val_bpb should be a number, is NaN"


def spoil_option(folder: Path) -> str:
    config = json.loads((folder / "result.json").read_text())["config"]
    edit_result(folder, config=config | {"iterations": "many"})
    return f'{folder}/result.json: config.iterations should be a number, is "many"'


def score_only(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    del result["pre_quant"]
    result["config"]["eval_only"] = "model.ptz"
    (folder / "result.json").write_text(json.dumps(result))
    return f"{folder}/result.json: scores an artifact (EVAL_ONLY)"


def repeat_seed(folder: Path) -> str:
    again = folder.with_name("seed20")
    shutil.copytree(folder, again)
    return f"{again} has the seed of {folder}"


@pytest.mark.parametrize(
    "harm",
    [
        damage_result,
        lose_result,
        lose_score,
        spoil_score,
        spoil_option,
        score_only,
        repeat_seed,
    ],
)
def test_a_damaged_run_is_named_and_left_out(harm: Callable[[Path], str], runs: Path) -> None:
    told = harm(runs / "O" / "seed2")
    found, left = report.load_all(runs, ROWS)
    assert len(left) == 1 and left[0].startswith(f"left out: {told}")
    assert [run.seed for run in found["O"]] == ([1, 3] if harm is not repeat_seed else [1, 2, 3])


@pytest.mark.usefixtures("words_only")
def test_what_was_left_out_is_in_the_report_and_on_the_terminal(
    runs: Path, capsys: pytest.CaptureFixture
) -> None:
    told = f"left out: {damage_result(runs / 'O' / 'seed2')}"
    text, page = written(runs)
    assert told in text and told in page and f"warning: {told}" in capsys.readouterr().err
    row = next(line for line in text.splitlines() if line.startswith("| O | K |"))
    assert "Welch" in row, "the seeds differ now"


@pytest.mark.usefixtures("words_only")
def test_a_damaged_line_is_named_and_skipped(runs: Path) -> None:
    path = runs / "O" / "seed2" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    whole = load(runs / "O")[1]
    (harmed,) = [n for n, line in enumerate(lines) if '"step": 50' in line and "val_bpb" in line]
    lines[harmed] = lines[harmed][:40]
    path.write_text("\n".join(lines))
    loaded = results.load_seeds(results.seed_folders(runs / "O"))
    assert loaded.messages == [f"{path}:{harmed + 1}: a damaged line is left out"]
    assert loaded.runs[1].points == [p for p in whole.points if p.step != 50]
    path.unlink()
    loaded = results.load_seeds(results.seed_folders(runs / "O"))
    assert loaded.messages == [f"{path}: No such file or directory, so there are no curves"]
    assert loaded.runs[1].points == [] and loaded.runs[1].post == whole.post
    assert "no curves" in written(runs)[0]


def test_no_usable_run_is_an_error_that_names_every_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        report.write(tmp_path, TABLE, ablate.intended(TABLE, ""), tmp_path)
    (tmp_path / "K" / "seed1").mkdir(parents=True)
    with pytest.raises(ValueError, match="seed1: no result.json"):
        report.write(tmp_path, TABLE, ablate.intended(TABLE, ""), tmp_path)


@pytest.mark.usefixtures("words_only")
def test_a_system_above_the_size_limit_is_not_the_best(runs: Path) -> None:
    for seed in NOISE:
        edit_result(runs / "O" / f"seed{seed}", bytes_total=16_000_001)
    text, _ = written(runs)
    assert "**K is the best of 2 systems" in text
    assert "Above the size limit, so not ranked: O." in text


# ---- Figures


def test_systems_at_the_front_are_those_that_none_beats_in_bytes_and_score() -> None:
    spots = [
        figures.Spot(name, *at, math.nan)
        for name, at in dict(a=(1, 5.0), b=(2, 4.0), c=(2, 4.5), d=(3, 4.0), e=(4, 1.0)).items()
    ]
    assert [spot.name for spot in figures.front(spots)] == ["a", "b", "e"]


def test_the_bars_of_a_picture_of_bytes_have_the_colour_of_their_dot() -> None:
    spots = [figures.Spot("a", 1e6, 3.0, 0.1), figures.Spot("b", 2e6, 3.2, 0.1)]
    (axis,) = figures.bytes_and_bpb(spots, "", "").axes
    bars = [to_hex(bar.get_color()[0]) for bar in axis.collections]
    assert bars == [figures.LIGHT["better"], figures.LIGHT["muted"]]
    joined = [line for line in axis.lines if line.get_linestyle() == "-"]
    assert joined == [], "two systems are no front"


def test_two_systems_have_no_picture_as_published(runs: Path) -> None:
    found, reference = report.load_all(runs, ROWS)[0], report.published()
    assert len(report.published_picture(found, reference)) == 1
    del found["E"]
    assert report.published_picture(found, reference) == []


def test_steps_are_labelled_with_whole_numbers(tmp_path: Path) -> None:
    for row in "KO":
        Made(3.0, steps=40, every=20).write(tmp_path / row, 1)
    found, _ = report.load_all(tmp_path, ROWS)
    (validation,) = figures.validation_curves(found, ["K", "O"]).axes
    assert all(place == int(place) for place in validation.get_xticks())
    picture = figures.training_curves(found, ["K", "O"])
    picture.draw_without_rendering()
    labels = [label.get_text() for label in picture.axes[0].get_xticklabels()]
    assert {"5", "10", "20"} <= set(labels) and not any("." in label for label in labels)


def test_a_picture_takes_its_colours_from_the_theme(runs: Path) -> None:
    found, _ = report.load_all(runs, ROWS)
    made = figures.svg(figures.validation_curves(found, ["K", "O"]), "one")
    assert "var(--c0)" in made and "var(--ink)" in made
    assert set(re.findall(r"#[0-9a-f]{6}\b", made)) == set(), "a colour of no theme"
    known = set(re.findall(r"--\w+", (Path(figures.__file__).parent / STYLE).read_text()))
    assert {f"--{name}" for name in figures.LIGHT} < known


STYLE = "templates/page.css"


def test_no_two_pictures_of_a_page_share_an_id(mixed: Path) -> None:
    page = (mixed.parent / "to" / "report.html").read_text()
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ids = re.findall(r' id="([^"]*)"', picture)
        assert all(page.count(f'id="{name}"') == 1 for name in ids)
        used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', picture)
        assert {a or b for a, b in used} <= set(ids), "what it refers to is within it"


def test_long_curves_are_thinned_with_their_ends() -> None:
    places = results.evenly(20_001, 200)
    assert len(places) == 200 and (places[0], places[-1]) == (0, 20_000)
    assert places == sorted(set(places))
    assert results.evenly(3, 200) == [0, 1, 2]


# ---- The page in a browser

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
browser_needed = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int, theme: str = "light") -> None:
    """Opens a page at a width, for a reader who prefers a theme."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wish = [dict(name="prefers-color-scheme", value=theme)]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=wish))
    browser.get(page.as_uri())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of made runs, the one of the repository, and the comparison of two systems."""
    runs = write_rows(tmp_path_factory.mktemp("pages") / "tiny")
    (runs / "O" / "seed4").mkdir()
    long = dict(tokenizer_path=f"data/tokenizers/{'sample_1024_bpe_' * 4}.model")
    for folder in [*(runs / "O").glob("seed[123]"), *(runs / "K").glob("seed?")]:
        config = json.loads((folder / "result.json").read_text())["config"]
        edit_result(folder, config=config | long)
        (folder / "run.json").write_text('{"variables": {"TOKENIZER_PATH": "set"}}')
    written(runs)
    two = runs.parent / "compared.html"
    two.write_text(compare.compare_sides(str(runs / "O"), str(runs / "K")).page())
    return dict(made=runs.parent / "to" / "report.html", committed=COMMITTED, compared=two)


@pytest.fixture(params=["made", "committed", "compared"])
def page(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    return pages[request.param]


OVERFLOWING = """
const outside = (e, left, right) => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > right + 1 || box.left < left - 1);
};
const wide = [];
for (const e of document.querySelectorAll("details")) e.open = true;
for (const e of document.querySelectorAll("body *")) {
  const picture = e.closest("svg");
  if (e.tagName === "text") {
    const frame = picture.getBoundingClientRect();
    if (outside(e, frame.left, frame.right)) wide.push(e.textContent + " in a picture");
  } else if (!picture || picture === e) {
    if (outside(e, 0, innerWidth)) wide.push(e.tagName + ": " + e.textContent.slice(0, 40));
  }
}
for (const e of document.querySelectorAll("td"))
  if (e.textContent && !e.offsetWidth) wide.push("hidden: " + e.textContent);
return {wide, scrolls: document.scrollingElement.scrollWidth > innerWidth, shown: innerWidth};"""


@browser_needed
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_is_wider_than_the_screen(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    found = browser.execute_script(OVERFLOWING)
    assert found == {"wide": [], "scrolls": False, "shown": width}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


SMALL = """
const small = [];
for (const picture of document.querySelectorAll("svg")) {
  if (!picture.clientWidth) continue;
  const scale = picture.clientWidth / picture.viewBox.baseVal.width;
  for (const e of picture.querySelectorAll("text")) {
    const size = scale * parseFloat(getComputedStyle(e).fontSize);
    if (size < 8) small.push([e.textContent, size]);
  }
}
return small;"""


@browser_needed
def test_pictures_can_be_read_on_a_phone(browser: Any, page: Path) -> None:
    show(browser, page, 400)
    assert browser.execute_script(SMALL) == []


HALF_EMPTY = """
const found = [];
for (const e of document.querySelectorAll("main > section > .figures, section:not(#method) > p")) {
  const inside = [...e.querySelectorAll("figure > *")];
  const reach = Math.max(...inside.map(i => i.getBoundingClientRect().right));
  const box = e.getBoundingClientRect();
  const main = document.querySelector("main").getBoundingClientRect();
  const right = inside.length ? reach : box.right;
  if (right - main.left < 0.85 * main.width) found.push(e.textContent.trim().slice(0, 60));
}
return found;"""


@browser_needed
def test_text_and_pictures_reach_across_a_wide_page(browser: Any, page: Path) -> None:
    show(browser, page, 1280)
    assert browser.execute_script(HALF_EMPTY) == []


SORTED = """
const wrong = []; let moved = 0;
for (const table of document.querySelectorAll("table"))
  for (const [i, th] of [...table.tHead.rows[0].cells].entries()) {
    const keys = () => [...table.tBodies[0].rows].map(r => r.cells[i].dataset.key);
    const inOrder = (all, sign) => {
      const known = all.filter(k => k !== "");
      const last = all.slice(known.length).every(k => k === "");
      return last && known.every((k, j) => !j || sign * (isNaN(k) || isNaN(known[j - 1])
        ? known[j - 1].localeCompare(k) : known[j - 1] - k) <= 0);
    };
    th.firstElementChild.click(); const up = keys(), risen = th.ariaSort;
    th.firstElementChild.click(); const down = keys();
    if (!inOrder(up, 1) || risen !== "ascending") wrong.push(th.textContent + " up");
    if (!inOrder(down, -1) || th.ariaSort !== "descending") wrong.push(th.textContent + " down");
    moved += String(up) !== String(down);
  }
return {wrong, moved, columns: document.querySelectorAll("th").length};"""


@browser_needed
def test_every_column_sorts_up_and_down_and_keeps_gaps_last(browser: Any, page: Path) -> None:
    show(browser, page, 1280)
    found = browser.execute_script(SORTED)
    assert found["wrong"] == [] and found["columns"] > 20
    assert found["moved"] > 8, "most columns have different values"


@browser_needed
@pytest.mark.parametrize(("wish", "other"), [("light", "dark"), ("dark", "light")])
def test_the_theme_is_the_readers_until_the_button_is_pressed(
    browser: Any, page: Path, wish: str, other: str
) -> None:
    def colours() -> tuple[str, str, str]:
        """Of the page, its text, and the text of a picture."""
        return browser.execute_script(
            "const of = (query, name) => getComputedStyle(document.querySelector(query))[name];"
            'return [of("body", "backgroundColor"), of("body", "color"), of("svg text", "fill")];'
        )

    show(browser, page, 1280, wish)
    first = colours()
    browser.find_element("id", "theme").click()
    second = colours()
    browser.find_element("id", "theme").click()
    assert colours() == first
    assert all(a != b for a, b in zip(first, second))
    show(browser, page, 1280, other)
    assert colours() == second


@browser_needed
def test_every_entry_of_the_contents_leads_somewhere(browser: Any, page: Path) -> None:
    show(browser, page, 1280)
    lost = browser.execute_script(
        'return [...document.querySelectorAll("nav a")].map(a => a.getAttribute("href"))'
        ".filter(target => !document.querySelector(target))"
    )
    assert lost == []


def test_the_committed_report_is_that_of_the_committed_runs() -> None:
    assert COMMITTED.stat().st_size < 3_000_000
    text, page = COMMITTED.with_suffix(".md").read_text(), COMMITTED.read_text()
    found, left = report.load_all(COMMITTED.parent, ROWS)
    made, reference = report.compare_all(found, ROWS), report.published()
    judged = report.judge(found, TABLE.claims.values())
    sheets = [
        report.comparisons_sheet(made, reference),
        report.claims_sheet(judged, TABLE.claims.values()),
        report.runs_sheet(found, ROWS, reference),
    ]
    for row in (row for sheet in sheets for row in sheet.rows):
        assert f"| {' | '.join(cell.plain for cell in row.values())} |" in text
    assert left == [] and report.headline(found, made).result in text
    assert report.headline(found, made).result in page
    pictures = {path.name for path in COMMITTED.parent.glob("*.png")}
    assert pictures == {"forest.png", "bytes.png"}
