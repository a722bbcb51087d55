"""records/tools/compare.py: what a side is, what is said of two, and what is written."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finished_runs import NOISE, Made, edit_result, write_rows
from helpers import nobody_reads

stats = pytest.importorskip("scipy.stats")
compare = pytest.importorskip("records.tools.compare", exc_type=ImportError)
figures = pytest.importorskip("records.tools.figures", exc_type=ImportError)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "runs")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Calls the tool with words from a folder: its exit code, and what it prints on both ways."""

    def run(folder: Path, *words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        capsys.readouterr()
        return compare.main(), *capsys.readouterr()

    return run


def compared(first: Path | str, second: Path | str) -> str:
    """What is printed of two sides."""
    return compare.compare_sides(str(first), str(second)).text()


def line(text: str, beginning: str) -> list[str]:
    """The cells of the one line of a text that begins so."""
    (found,) = [row for row in text.splitlines() if row.strip().startswith(beginning)]
    return re.split(r"\s{2,}", found.strip())


# ---- Sides


def test_a_side_is_a_run_a_row_a_pattern_or_a_list(rows: Path) -> None:
    seeds = [rows / "K" / f"seed{seed}" for seed in (1, 2, 3)]
    assert compare.folders(str(seeds[1])) == [seeds[1]]
    assert compare.folders(str(rows / "K")) == seeds
    assert compare.folders(f"{rows}/K/seed[12]") == seeds[:2]
    assert compare.folders(f"{seeds[2]},{rows}/K/seed1") == [seeds[2], seeds[0]]
    assert compare.folders(f"{rows}/[K]") == seeds, "a pattern may name rows"
    (rows / "K" / "seed4.unfinished1").mkdir()
    assert compare.folders(str(rows / "K")) == seeds, "what was set aside is none of them"
    odd = Made(3.0, options={"PRESET": "tiny"}).write(rows / "a,b [c]", 1)
    assert compare.folders(str(odd)) == [odd], "a folder is taken by its name first"


@pytest.mark.parametrize(
    ("side", "told"),
    [
        ("nowhere", "nowhere: there is no such folder"),
        ("runs/X*", "runs/X*: no folder has such a name"),
        ("runs", "runs: neither the folder of a run (result.json) nor that of a row (seed*/)"),
        ("runs/K/seed1,runs/J", "runs/J: there is no such folder"),
        ("runs/bad", "runs/bad holds no finished run: left out: runs/bad/seed1: no result.json"),
    ],
)
def test_a_mistaken_side_is_one_line(side: str, told: str, rows: Path, call: Callable) -> None:
    (rows / "bad" / "seed1").mkdir(parents=True)
    for sides in ([side, "runs/K"], ["runs/K", side]):
        code, out, err = call(rows.parent, *sides)
        assert code == 2 and out == ""
        assert told in err and err.count("\n") == 1, err


# ---- What is said


def test_figures_are_those_of_scipy(rows: Path) -> None:
    made = compare.compare_sides(str(rows / "O"), str(rows / "K")).made
    ours, theirs = made.post.ours, made.post.theirs
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert made.test == "paired"
    assert made.post.delta.mean == pytest.approx((interval.low + interval.high) / 2)
    assert made.post.delta.half == pytest.approx((interval.high - interval.low) / 2)
    assert made.post.delta.p == pytest.approx(test.pvalue)
    unlike = compare.compare_sides(str(rows / "E"), str(rows / "K")).made
    welch = stats.ttest_ind(unlike.post.ours, unlike.post.theirs, equal_var=False)
    assert unlike.test == "Welch" and unlike.post.delta.p == pytest.approx(welch.pvalue)


def test_the_answer_is_in_the_first_lines_and_every_reading_below(rows: Path) -> None:
    text = compared(rows / "O", rows / "K")
    assert text.splitlines()[2] == (
        "Suggested: A is better than B. After rounding A - B is -0.0200 ± 0.0000 bits per byte "
        "(95% interval, paired t test over 3 seeds, p 8.3e-08 in this test alone, not corrected "
        "for other comparisons)."
    )
    assert line(text, "before rounding, at equal steps (end, 100)")[3].startswith(
        "-0.0200 ± 0.0000"
    )
    assert line(text, "before rounding, in equal time (6.0 s)")[3].startswith("+0.0331 ±")
    assert line(text, "before rounding, in equal time (6.0 s)")[4] == "worse, suggested"
    assert line(text, "Q-gap")[3].startswith("-0.00004 ±")
    assert line(text, "milliseconds a step")[1:] == ["170.0", "100.0", "+70.0 (+70.0 %)"]
    assert line(text, "bytes, script + artifact")[1:3] == ["1,000,000", "1,000,000"]
    assert line(text, "USE_TIMESTEP_BIAS") == ["USE_TIMESTEP_BIAS", "1", "0"]
    assert "Welch's t test, 3 and 3 seeds" in compared(rows / "E", rows / "K")


def test_sides_changed_about_change_the_sign_and_nothing_else(rows: Path) -> None:
    there = compare.compare_sides(str(rows / "O"), str(rows / "K")).made
    back = compare.compare_sides(str(rows / "K"), str(rows / "O")).made
    for kind in ("post", "steps", "time", "gap"):
        a, b = getattr(there, kind), getattr(back, kind)
        assert a.where == b.where and a.ours == b.theirs
        assert (a.delta.mean, a.delta.half, a.delta.p) == pytest.approx(
            (-b.delta.mean, b.delta.half, b.delta.p)
        )


def test_one_seed_on_a_side_is_said_and_has_no_interval(rows: Path) -> None:
    for first in ("O/seed1", "O"):
        text = compared(rows / first, rows / "K" / "seed1")
        assert "One seed on a side gives no interval" in text.splitlines()[2]
        assert line(text, "after rounding, as run")[4] == "one seed"
        assert "±" not in line(text, "before rounding, in equal time")[3]


def test_sides_that_cannot_be_told_apart_are_not_called_better(rows: Path) -> None:
    for seed in NOISE:
        Made(3.0005 + NOISE[4 - seed]).write(rows / "N", seed)
    text = compared(rows / "N", rows / "K")
    assert text.splitlines()[2].startswith("A and B cannot be told apart: after rounding A - B is")
    assert line(text, "after rounding, as run")[4] == "undecided"


def test_other_ways_of_scoring_are_compared_where_both_have_them(rows: Path) -> None:
    for row, bpb in (("O", 2.0), ("K", 2.3)):
        for seed in NOISE:
            edit_result(rows / row / f"seed{seed}", sliding={"val_bpb": bpb + NOISE[seed]})
    text = compared(rows / "O", rows / "K")
    assert line(text, "after rounding, over sliding windows")[3].startswith("-0.3000 ± 0.0000")
    assert "sliding windows" not in compared(rows / "O", rows / "E")


def test_what_makes_scores_or_times_unlike_is_said(rows: Path) -> None:
    assert "! " not in compared(rows / "O", rows / "K")
    edit_result(
        rows / "O" / "seed1", roundtrip=dict(val_bpb=2.5, val_bytes=9), bytes_total=16_000_003
    )
    edit_result(rows / "O" / "seed2", versions=dict(device="an H100"), world_size=8)
    for seed in (4, 5):
        Made(3.0, options={"TRAIN_BATCH_TOKENS": str(4096 * seed)}).write(rows / "O", seed)
    notes = [row[2:] for row in compared(rows / "O", rows / "K").splitlines() if row[:2] == "! "]
    assert [note.split(" (")[0] for note in notes] == [
        "they were scored on different texts, so the scores do not compare",
        "the scripts differ",
        "the devices differ, so times do not compare",
        "the numbers of ranks differ, so times do not compare",
        "the versions of PyTorch differ, so times may not compare",
        "steps are of different numbers of tokens: equal steps are not equal data",
        "the runs of A are of different systems: TRAIN_BATCH_TOKENS differ",
        "A is above SIZE_LIMIT_BYTES by 3 bytes",
    ]


def test_a_damaged_run_is_named_and_left_out(rows: Path) -> None:
    (rows / "O" / "seed2" / "result.json").write_text("{")
    text = compared(rows / "O", rows / "K")
    assert f"! left out: {rows}/O/seed2/result.json is damaged" in text
    assert "2 and 3 seeds" in text, "Welch's test, as the seeds differ"


def test_runs_that_share_no_validation_say_so(tmp_path: Path) -> None:
    for seed in (1, 2):
        Made(3.0 + NOISE[seed], every=0).write(tmp_path / "K", seed)
        Made(2.9 + NOISE[seed], every=0, steps=90).write(tmp_path / "O", seed)
    text = compared(tmp_path / "O", tmp_path / "K")
    assert "share no validation before" in line(text, "before rounding, at equal steps")[1]
    advice = "Validations before a learning rate falls are needed: set VAL_LOSS_EVERY smaller."
    assert f"The runs share no step at which both sides can be compared. {advice}" in text
    head, reason = (
        next(row for row in text.splitlines() if words in row)
        for words in ("finding", "a run has no validation in the first")
    )
    assert head.index("finding") == reason.index("(a run"), "it widens no column but the last"
    page = compare.compare_sides(str(tmp_path / "O"), str(tmp_path / "K")).page()
    assert page.count("<svg") == 1, "of the training loss; the others would be empty"
    assert line(text, "after rounding, as run (90 to 100 steps)")[4] == "better, suggested"


def test_runs_without_a_step_are_compared(tmp_path: Path) -> None:
    for row, level in (("K", 3.0), ("O", 2.9)):
        Made(level, steps=0).write(tmp_path / row, 1)
    text = compared(tmp_path / "O", tmp_path / "K")
    assert line(text, "before rounding, at equal steps (end, 0)")[3] == "-0.1000"
    assert line(text, "milliseconds a step") == ["milliseconds a step"] and "nan" not in text


# ---- What is written


def test_page_and_picture_are_written(rows: Path, call: Callable) -> None:
    code, out, err = call(rows, "O", "K", "--html", "page.html", "--png", "picture.png")
    assert code == 0 and err == "" and "A is better than B" in out
    page = (rows / "page.html").read_text()
    assert page.count("<svg") == 3 == len(figures.DIFFERENCES)
    assert "A is better than B. After rounding A \u2212 B is \u22120.0200" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "needs no other file"
    assert (rows / "picture.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = call(rows, "O", "K", "--png", "no/such/folder.png")
    assert code == 2 and err.count("\n") == 1 and "no/such/folder.png" in err


def test_a_reader_that_leaves_is_no_error(
    rows: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(nobody_reads(full=False), "w") as out:  # whose end writes what is left unwritten
        monkeypatch.setattr(sys, "stdout", out)
        code, _, err = call(rows, "O", "K")
    assert (code, err) == (0, "")


def test_an_interruption_is_one_line(
    rows: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare_sides", interrupt)
    assert call(rows, "O", "K") == (130, "", "interrupted\n")


def test_committed_growth_figures_are_those_of_the_readme() -> None:
    """Differences of records/growth that records/README.md tells."""
    text = (ROOT / "records" / "README.md").read_text()
    told = re.findall(
        r"^\| (\w+) - (\w+) \|.*?\| ([-+.\d]+) ± ([.\d]+) \(p [.\d]+, 3\) \|", text, re.M
    )
    assert len(told) >= 5
    for row, baseline, difference, half in told[:3]:
        folder = ROOT / "records" / "growth" / "long"
        made = compare.compare_sides(str(folder / row), str(folder / baseline)).made
        assert made.test == "paired"
        assert f"{made.post.delta.mean:+.4f}" == difference
        assert f"{made.post.delta.half:.4f}" == half
