"""records/tools/against.py: differences of many rows from one, judged by one spread of chance."""

import json
import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from finished_runs import Made, edit_result

stats = pytest.importorskip("scipy.stats")
against = pytest.importorskip("records.tools.against", exc_type=ImportError)
results = pytest.importorskip("records.tools.results", exc_type=ImportError)
ROOT = Path(__file__).resolve().parent.parent

Scores = Mapping[tuple[str, int], float]


def scores(rows: int, seeds: int, changes: Mapping[int, float] | None = None) -> Scores:
    """Rows a, b, c and so on, which differ by what is given, seeds and chance."""
    rng = np.random.default_rng(7)
    of_seed, chance = rng.normal(0, 0.05, seeds), rng.normal(0, 0.01, (rows, seeds))
    return {
        (chr(97 + row), seed): 2 + (changes or {}).get(row, 0) + of_seed[seed] + chance[row, seed]
        for row in range(rows)
        for seed in range(seeds)
    }


def test_two_rows_are_judged_as_by_a_paired_t_test() -> None:
    given = scores(2, 4)
    made = against.fit(given, "a")
    a, b = ([given[row, seed] for seed in range(4)] for row in "ab")
    expected = results.delta(b, a, paired=True)
    assert made.changes["b"] == pytest.approx(expected, rel=1e-9)
    assert made.freedom == 3


def test_many_rows_share_their_spread() -> None:
    """Two-way analysis of variance, written out for equally many seeds in all rows."""
    given = scores(5, 3, {2: 0.1})
    y = np.array(list(given.values())).reshape(5, 3)
    residual = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    spread = math.sqrt((residual**2).sum() / (4 * 2))
    made = against.fit(given, "a")
    assert (made.freedom, made.spread) == (8, pytest.approx(spread))
    half = stats.t(8).ppf(0.975) * spread * math.sqrt(2 / 3)
    for row, name in enumerate("bcde", 1):
        change = made.changes[name]
        assert change.mean == pytest.approx(y[row].mean() - y[0].mean())
        assert change.half == pytest.approx(half)
    assert made.changes["c"].p < 1e-4 < 0.01 < made.changes["b"].p


def test_what_a_seed_adds_to_all_rows_changes_nothing() -> None:
    given = scores(4, 3)
    shifted = {(row, seed): y + 10.0 * seed for (row, seed), y in given.items()}
    ours, theirs = against.fit(given, "b"), against.fit(shifted, "b")
    for name in "acd":
        assert ours.changes[name] == pytest.approx(theirs.changes[name], abs=1e-9)


def test_a_row_that_lacks_a_seed_is_compared_with_that_seed_taken_into_account() -> None:
    given = {("a", 0): 2.0, ("a", 1): 3.0, ("b", 0): 2.5, ("b", 1): 3.5, ("c", 1): 3.2}
    assert against.fit(given, "a").changes["c"].mean == pytest.approx(0.2)
    with pytest.raises(ValueError, match="share no seed"):
        against.fit(given | {("d", 9): 2.0}, "a")


def test_one_seed_a_row_gives_differences_without_intervals() -> None:
    made = against.fit({("a", 0): 2.0, ("b", 0): 2.25}, "a")
    mean, half, p = made.changes["b"]
    assert mean == 0.25 and math.isnan(half) and math.isnan(p)
    assert against.told(made.changes["b"]) == "+0.2500"


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> tuple:
    """The tool's exit code and what it prints on both ways."""
    monkeypatch.setattr(sys, "argv", ["against.py", *words])
    capsys.readouterr()
    return against.main(), *capsys.readouterr()


def cells(out: str, row: str) -> list[str]:
    """The cells of a row of the printed table."""
    [line] = [line for line in out.splitlines() if line.startswith(f"| `{row}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for seed, noise in {1: 0.001, 2: -0.002}.items():
        Made(3.0 + noise).write(tmp_path / "K", seed)
        Made(2.9 + noise + 1e-4 * seed).write(tmp_path / "O", seed)
        Made(3.2 + noise - 1e-4 * seed).write(tmp_path / "E", seed)
        again = Made(3.0 + noise).write(tmp_path / "N", seed)
        pre = 3.0 + noise - 0.1 * math.log(100)
        edit_result(again, roundtrip=dict(val_bpb=pre + 0.05, val_tokens=1000, val_bytes=2500))
    code, out, err = call(monkeypatch, capsys, str(tmp_path / "K"), str(tmp_path / "*"))
    assert (code, err) == (0, "")
    order = re.findall(r"(?m)^\| `(\w+)`", out)
    assert order == ["K", "E", "N", "O"], "the baseline, then the worst first"
    assert cells(out, "O")[2:5] == ["2", "2.4391", "2.4449"]
    assert re.fullmatch(r"-0\.0999 ± 0\.0\d+\*", cells(out, "O")[5])
    assert cells(out, "N")[5] == "", "it has the baseline's score before rounding"
    assert cells(out, "N")[6].startswith("+0.0440"), "0.05 in place of 0.002 of 3"
    assert "(2 degrees of freedom)" in out, "three rows with two seeds; N trained nothing"
    assert out.endswith("Holm over the rows of its column: 2 before rounding, 3 after it.\n")
    picture = tmp_path / "forest.png"
    words = str(tmp_path / "K"), str(tmp_path / "*"), "--without", "E,N", "--png", str(picture)
    out = call(monkeypatch, capsys, *words)[1]
    assert re.findall(r"(?m)^\| `(\w+)`", out) == ["K", "O"]
    assert out.endswith("after Holm over 1 row.\n"), "of all columns"
    assert picture.read_bytes().startswith(b"\x89PNG")


def rounded_again(folder: Path, original: Path, bpb: float) -> None:
    """A run that was resumed from the last checkpoint of another, and rounded otherwise."""
    made = json.loads((original / "result.json").read_text())
    row = Made(9.0).write(folder, made["config"]["seed"])
    score = dict(val_bpb=bpb, val_tokens=1000, val_bytes=2500)
    config = made["config"] | dict(resume=str(original))
    edit_result(row, config=config, pre_quant=made["pre_quant"], roundtrip=score)


def test_a_training_that_was_rounded_again_counts_once(tmp_path: Path) -> None:
    """C has a run of its own and one that rounds E's weights again; D has only such."""
    noise = {1: 0.001, 2: -0.002, 3: 0.004}
    for seed in noise:
        Made(3.0 + noise[seed]).write(tmp_path / "K", seed)
        Made(2.9 - noise[seed]).write(tmp_path / "O", seed)
        # In the order of their names "E" would come after its copies.
        Made(2.95 + noise[seed] ** 2).write(tmp_path / "E", seed)
    Made(2.952).write(tmp_path / "C", 1)
    rounded_again(tmp_path / "C", tmp_path / "E/seed2", 2.51)
    for seed in noise:
        rounded_again(tmp_path / "D", tmp_path / f"E/seed{seed}", 2.53 + noise[seed])
    rows = against.read_rows([str(tmp_path / "*")])
    judged = against.judge(rows, "K")
    apart = {name: row for name, row in rows.items() if name != "D"}
    apart["C"] = {1: rows["C"][1]}
    alone = against.judge(apart, "K")
    assert judged.after.freedom == judged.before.freedom == alone.after.freedom == 4
    assert judged.before == alone.before, "its own run is all that C has there"
    assert judged.after.spread == alone.after.spread
    for name in "OE":
        assert judged.after.changes[name][:2] == alone.after.changes[name][:2]
    mean = sum(2.53 + noise[s] - rows["K"][s].post for s in noise) / 3
    copy = judged.after.changes["D"]
    half = stats.t(4).ppf(0.975) * alone.after.spread * math.sqrt(2 / 3)
    assert (copy.mean, copy.half) == (pytest.approx(mean), pytest.approx(half))
    nearest = judged.after.changes["C"]
    assert alone.after.changes["C"].half > nearest.half, "of two runs"


def test_of_equal_runs_the_baselines_counts(tmp_path: Path) -> None:
    for seed in (1, 2):
        Made(3.0 + 0.01 * seed).write(tmp_path / "O", seed)
        rounded_again(tmp_path / "K", tmp_path / f"O/seed{seed}", 2.6)
    rows = against.read_rows([str(tmp_path / "*")])
    for baseline in "KO":
        assert against.trainings(rows, baseline) == [(baseline, 1), (baseline, 2)]


def test_the_picture_has_a_line_for_every_row(tmp_path: Path) -> None:
    for seed, noise in {1: 0.001, 2: -0.002}.items():
        Made(3.0 + noise).write(tmp_path / "K", seed)
        Made(2.9 + noise + 1e-4 * seed).write(tmp_path / "O", seed)
    judged = against.judge(against.read_rows([str(tmp_path / "*")]), "K")
    [line] = against.forest_lines(judged)
    what = against.read_table(against.TABLE).rows["O"].what
    assert " ".join(line.label.split()) == f"O: {what}"
    assert [m.delta for m in line.measures] == [made.changes["O"] for made in judged.fits()]
    assert {m.verdict for m in line.measures} == {"shown"}, "p is that after Holm"


def test_rows_are_compared_at_their_own_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The runs' scores are straight lines in the logarithm of steps, .01 and .02 apart."""
    for seed in (1, 2):
        Made(3.0, steps=100).write(tmp_path / "K", seed)
        Made(3.01, steps=60).write(tmp_path / "O", seed)
        Made(2.98, steps=100).write(tmp_path / "E", seed)
        Made(2.0, steps=102 - seed).write(tmp_path / "N", seed)
    shorter = Made(3.0, steps=40).write(tmp_path / "shorter" / "K", 1)
    picture = tmp_path / "forest.png"
    rows = str(tmp_path / "K"), str(tmp_path / "[A-Z]")
    words = *rows, "--png", str(picture), "--lengths", str(shorter.parent)
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    assert cells(out, "O")[7].startswith(f"{0.01 * 1.002:+.4f}")
    assert cells(out, "E")[7].startswith(f"{-0.02 * 1.002:+.4f}")
    assert cells(out, "N")[7] == "", "one of its runs has more steps than the baseline anywhere"
    assert out.endswith("its column: 3 before rounding, 3 after it, 2 at equal steps.\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, err = call(monkeypatch, capsys, *rows, "--lengths", str(tmp_path / "O"))
    assert (code, out) == (2, "") and "is of O, not of K" in err


def test_the_difference_at_equal_steps_has_the_chance_of_one_more_run(tmp_path: Path) -> None:
    for seed, noise in {1: 0.001, 2: -0.002, 3: 0.004}.items():
        Made(3.0 + noise).write(tmp_path / "K", seed)
        Made(2.9 + noise * seed).write(tmp_path / "O", seed)
    rows = against.read_rows([str(tmp_path / "*")])
    judged = against.judge(rows, "K", list(rows["K"].values()))
    half = stats.t(2).ppf(0.975) * judged.after.spread * math.sqrt(1 / 3 + 1)
    assert judged.equal_steps.changes["O"].half == pytest.approx(half)


def test_arguments_that_cannot_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Made(3.0).write(tmp_path / "K", 1)
    Made(3.0).write(tmp_path / "O", 1)
    one, all_of_them = str(tmp_path / "K"), str(tmp_path / "[A-Z]")
    code, out, err = call(monkeypatch, capsys, all_of_them, one)
    assert (code, out) == (2, "") and "2 rows; the baseline is one row" in err
    assert call(monkeypatch, capsys, one, one)[2] == "there is no row besides the baseline\n"
    other = str(Made(3.0).write(tmp_path / "other" / "O", 1).parent)
    assert "are one row and one seed" in call(monkeypatch, capsys, one, all_of_them, other)[2]
    code, out, err = call(monkeypatch, capsys, one, all_of_them, "--without", "E")
    assert (code, out, err) == (2, "", "--without E: of O some can be left out\n")


# A command in the notes, and the table that follows it.
PRINTED = re.compile(r"`python records/tools/against\.py ([^`]+)`[^|]*\n\n((?:\|.*\n)+)\n(.*\n)")


def printed() -> list[tuple[str, str]]:
    """Every such command of research_notes.md with the table and the line below it."""
    text = (ROOT / "research_notes.md").read_text()
    return [(words, f"{table}\n{line}") for words, table, line in PRINTED.findall(text)]


def test_the_notes_have_such_tables() -> None:
    assert len(printed()) >= 1


@pytest.mark.parametrize("words, table", printed())
def test_tables_of_the_notes_are_what_the_tool_prints(
    words: str, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = call(monkeypatch, capsys, *shlex.split(words.replace("\n", " ")))
    assert (code, err) == (0, "")
    assert out == table
