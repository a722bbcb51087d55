"""records/tools/worth.py: runs of a known phi give it back; runs that cannot tell are refused."""

import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from finished_runs import Made, edit_result

import train_gpt as tg
from records.tools import worth

SIZES = (32, 48, 64)
TRUTH = worth.Curve(1.1, 0.6, 0.4, 0.55, 0.3, 0.5)


def options(dim: int, passes: int) -> dict[str, str]:
    return dict(
        MODEL_DIM=str(dim),
        NUM_HEADS="2",
        NUM_KV_HEADS="1",
        NUM_PRELUDE="1",
        NUM_CODA="1",
        NUM_SHARED="2",
        NUM_LOOPS=str(passes),
    )


def weights_by_hand(dim: int) -> tuple[int, int]:
    """Two layers and the embedding once, two layers in every pass."""
    layer = 2 * dim * dim + dim * dim + 4 * dim * dim  # q, k, v; proj; an MLP of twice the width
    return 2 * layer + 1024 * dim, 2 * layer


def formula(curve: worth.Curve, dim: int, passes: int, steps: int) -> float:
    once, core = weights_by_hand(dim)
    model = curve.model * ((once + passes**curve.phi * core) / 50_000) ** -curve.model_power
    return curve.floor + model + curve.data * (steps / 150) ** -curve.data_power


def write(folder: Path, curve: worth.Curve, steps: tuple[int, ...], noise: float) -> str:
    """Runs of three widths with one, two and three passes, two seeds each; the group's words."""
    random, found = np.random.default_rng(3), []
    for dim in SIZES:
        for passes in (1, 2, 3):
            for count in steps:
                row = folder / f"{dim}_{passes}_{count}" / "Bp"
                found.append(str(row))
                for seed in (1, 2):
                    made = Made(3.0, steps=count, options=options(dim, passes))
                    bpb = formula(curve, dim, passes, count) + noise * random.standard_normal()
                    edit_result(made.write(row, seed), pre_quant=dict(val_bpb=bpb))
    return ",".join(found)


def say(*words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["worth.py", *words])
    assert worth.main() == 0
    return capsys.readouterr().out


def data_of(group: str) -> worth.Data:
    observations, messages = worth.read_group(group)
    assert not messages
    return worth.gather(observations)


@pytest.mark.parametrize("phi", [0.0, 0.38, 0.65, 1.0])
@pytest.mark.parametrize("steps", [(100,), (60, 150, 400)])
def test_exact_scores_give_phi_back(phi: float, steps: tuple[int, ...], tmp_path: Path) -> None:
    """Whether tokens vary, or their share is a part of the floor."""
    data = data_of(write(tmp_path, TRUTH._replace(phi=phi), steps, 0.0))
    curve = worth.fit(data)
    assert curve.phi == pytest.approx(phi, abs=0.01)
    assert data.scores(curve) == pytest.approx(data.bpb, abs=1e-4)


def test_noisy_scores_have_an_interval_that_holds_phi(tmp_path: Path) -> None:
    data = data_of(write(tmp_path, TRUTH, (100,), 0.002))
    phis = worth.resample(data, worth.fit(data), worth.draw([data], 40)[0])
    low, high = np.quantile(phis, [0.025, 0.975])
    assert low < TRUTH.phi < high and 0.01 < high - low < 1
    louder = data_of(write(tmp_path / "louder", TRUTH, (100,), 0.008))
    wide = worth.resample(louder, worth.fit(louder), worth.draw([louder], 40)[0])
    assert np.ptp(np.quantile(wide, [0.025, 0.975])) > high - low


def test_an_interval_of_few_residuals_holds_as_often_as_it_says() -> None:
    """Means of three normal numbers, drawn again by the spread that the three show."""
    random, freedom, times = np.random.default_rng(11), 2, 2000
    drawn_again, held = random.standard_normal(400), {"longer": 0, "as drawn": 0}
    for values in random.standard_normal((times, 3)):
        middle, error = float(values.mean()), float(values.std(ddof=1)) / 3**0.5
        again = middle + error * drawn_again
        low, high = worth.interval(middle, again, freedom)
        held["longer"] += low < 0 < high
        low, high = np.quantile(again, [0.025, 0.975])
        held["as drawn"] += low < 0 < high
    assert held["longer"] / times == pytest.approx(0.95, abs=0.02)
    assert held["as drawn"] / times < 0.85
    many = worth.interval(0.5, 0.5 + drawn_again, 10_000)
    assert many == pytest.approx(np.quantile(0.5 + drawn_again, [0.025, 0.975]), rel=1e-3)


def test_a_group_is_judged_by_the_runs_that_it_has_beyond_its_parameters(tmp_path: Path) -> None:
    fixed = data_of(write(tmp_path / "fixed", TRUTH, (100,), 0.002))
    varied = data_of(write(tmp_path / "varied", TRUTH, (60, 150), 0.002))
    assert (fixed.freedom, varied.freedom) == (18 - 4, 36 - 6)
    curve = worth.fit(fixed)
    phis = worth.resample(fixed, curve, worth.draw([fixed], 20)[0])
    [first, *_] = worth.describe(worth.Worth("x", curve, phis, 2), fixed)
    assert str(worth.interval(curve.phi, phis, 2)) in first


def test_groups_are_told_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write(tmp_path / "plain", TRUTH, (100,), 1e-4)
    better = write(tmp_path / "better", TRUTH._replace(phi=0.8), (100,), 1e-4)
    words = ["--names", "plain,lanes,same", "--resamples", "40", plain, better, plain]
    told = say(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert "plain: phi 0.55 (0." in told and "lanes: phi 0.80 (0." in told
    assert "3 passes 1.83 times" in told
    assert "phi of lanes less that of plain: +0.25 (0." in told
    assert "phi of same less that of plain: +0.00 (0.00 to 0.00)" in told, "the runs are the same"
    once, core = weights_by_hand(48)
    assert f"| {once:,} | {core:,} | 3 | 1.00 | 2 |" in told


def test_a_run_draws_alike_in_all_of_its_groups_and_others_do_not() -> None:
    """Two groups share two runs, which stand at other places in them."""
    x = np.ones(4)
    groups = [
        worth.Data(x, x, x, x, x, 1.0, [Path(name) for name in names]) for names in ("abcd", "cxya")
    ]
    first, second = worth.draw(groups, 9)
    assert (first[:, 2] == second[:, 0]).all() and (first[:, 0] == second[:, 3]).all()
    assert len({*first.flat, *second.flat}) == 9 * 6, "a number for each run and time"


def architecture(**values: str) -> tg.Architecture:
    config = tg.Config.from_env({"PRESET": "Bp"} | values)
    return tg.Architecture(**{f.name: getattr(config, f.name) for f in fields(tg.Architecture)})


def test_weights_are_counted_by_their_uses() -> None:
    once, core = weights_by_hand(48)
    assert worth.weights_of(architecture(**options(48, 3)), 3) == (once, core, 3)
    assert worth.weights_of(architecture(**options(48, 1)), 1) == (once + core, 0, 1)
    untied = architecture(**options(48, 3), TIE_EMBEDDINGS="0")
    assert worth.weights_of(untied, 3) == (once + 1024 * 48, core, 3)
    own = architecture(**options(48, 3), SHARE_ATTN_ONLY="1")
    mlps, attns = 4 * 2 * 48**2, 3 * 2 * 48**2
    assert worth.weights_of(own, 3) == (once + 3 * mlps, attns, 3)
    with pytest.raises(tg.InputError, match="used 2, 3 times"):
        worth.weights_of(architecture(**options(48, 3), MLP_POOL="3"), 3)


def test_runs_that_cannot_tell_are_refused(tmp_path: Path) -> None:
    group = write(tmp_path, TRUTH, (100,), 0.0).split(",")
    for rows, what in (
        (group[::3], "1 numbers of passes; the fit needs 2"),
        (group[:3], "1 sizes; the fit needs 2"),
        (group[:4], "4 kinds of runs; the fit needs 5"),
    ):
        with pytest.raises(tg.InputError, match=what):
            data_of(",".join(rows))
    folder = Path(group[2]) / "seed1"
    result = json.loads((folder / "result.json").read_text())
    edit_result(folder, config=result["config"] | dict(passes_schedule="0:1"))
    told = "seed1: PASSES_SCHEDULE=0:1, EVAL_PASSES=0: the formula has one"
    with pytest.raises(tg.InputError, match=told):
        data_of(group[2])


def test_a_run_with_one_pass_of_several_counts_as_that(tmp_path: Path) -> None:
    """As those with lanes around one pass do: every weight is used once."""
    folder = Path(write(tmp_path, TRUTH, (100,), 0.0).split(",")[2]) / "seed1"
    whole = worth.observe(worth.load(folder)[0]).weights
    assert whole.passes == 3
    result = json.loads((folder / "result.json").read_text())
    once = dict(passes_schedule="0:1", eval_passes=1)
    edit_result(folder, config=result["config"] | once)
    found = worth.observe(worth.load(folder)[0]).weights
    assert found == (whole.once + whole.recurrent, 0, 1)


ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"^ +python records/tools/worth\.py (.*)$", re.MULTILINE)


@pytest.mark.parametrize("name", ["research_notes.md", "records/README.md"])
def test_commands_on_finished_runs_print_what_the_notes_say(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / name).read_text().replace("\\\n", "")
    commands = [shlex.split(words) for words in COMMAND.findall(text)]
    assert commands
    notes = (ROOT / "research_notes.md").read_text()
    for words in commands:
        out = say(*words, "--resamples", "5", capsys=capsys, monkeypatch=monkeypatch)
        found = re.findall(r"^(\w+: phi -?[0-9.]+) \(", out, re.MULTILINE)
        assert found and all(f" {line} (" in notes for line in found)
