"""records/tools/report.py: statistics against known answers, equal steps against equal time, and the page."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from statistics import mean, variance

import pytest

import train_gpt as tg
from records.tools import ablate

t = pytest.importorskip("scipy.stats").t
report = pytest.importorskip("records.tools.report", exc_type=ImportError)  # scipy, matplotlib
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TABLE = ablate.read_table(ablate.ROOT / "records" / "runs.toml")
ROWS = TABLE.rows
STEPS = range(0, 101, 10)


def bpb_at(step: int, level: float) -> float:
    """A score that falls by 0.1 for every factor e in steps."""
    return level - 0.1 * math.log(max(step, 1))


def write_run(
    folder: Path, row: str, seed: int, level: float, step_seconds: float, **config: str
) -> None:
    """The files of a run of 100 steps, warm-down over the last 40, with a known curve."""
    env = dict(
        PRESET=f"{row},tiny", ITERATIONS="100", WARMDOWN_ITERS="40", MAX_WALLCLOCK_SECONDS="0"
    )
    made, to = tg.Config.from_env(env | config | {"SEED": str(seed)}), folder / row / f"seed{seed}"
    to.mkdir(parents=True)
    health = [
        dict(
            layer=v,
            mix=0.5 + 0.01 * v,
            attn_scale=1.0 + v,
            mlp_scale=1.0,
            attn_shift=0.0,
            mlp_shift=0.0,
        )
        for v in range(4)
    ]
    lines = [
        dict(step=s, train_seconds=s * step_seconds, val_bpb=bpb_at(s, level), health=health)
        for s in STEPS
    ]
    (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = dict(val_bpb=bpb_at(100, level) + 0.002 * level, val_tokens=1000)
    (to / "result.json").write_text(
        json.dumps(
            dict(
                config=asdict(made),
                versions=dict(script_sha256="0" * 64, device="cpu", torch="2"),
                world_size=1,
                pre_quant=dict(val_bpb=bpb_at(100, level)),
                roundtrip=score,
                bytes_model=900_000,
                bytes_total=1_000_000,
                model_params=7,
                steps=100,
                train_seconds=100 * step_seconds,
            )
        )
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """K and O of three seeds: O is better by 0.02 at equal steps and takes 1.7 times as long."""
    for seed, noise in zip((1, 2, 3), (0.001, -0.002, 0.004)):
        write_run(tmp_path / "tiny", "K", seed, 3.0 + noise, 0.1)
        write_run(tmp_path / "tiny", "O", seed, 2.98 + noise + 1e-5 * (seed - 2), 0.17)
        write_run(tmp_path / "tiny", "E", seed, 3.1 - noise, 1.0)
    return tmp_path / "tiny"


# ---- Statistics


def test_welch_and_paired_tests_have_textbook_values() -> None:
    a, b = (27.5, 21.0, 19.0, 23.6, 17.0), (27.1, 22.0, 20.8, 23.4, 23.4, 25.0)
    va, vb = variance(a) / 5, variance(b) / 6
    freedom = (va + vb) ** 2 / (va**2 / 4 + vb**2 / 5)  # Welch 1947
    welch = report.delta(a, b, paired=False)
    assert welch.p == pytest.approx(2 * t.sf(abs(mean(a) - mean(b)) / math.sqrt(va + vb), freedom))
    assert welch.mean == pytest.approx(mean(a) - mean(b))
    assert welch.half == pytest.approx(t.ppf(0.975, freedom) * math.sqrt(va + vb))
    paired = report.delta(a, b[:5], paired=True)
    error = math.sqrt(variance([x - y for x, y in zip(a, b)]) / 5)
    assert paired.half == pytest.approx(2.7764 * error, rel=1e-4), "t(0.975, 4) from a table"
    assert paired.p == pytest.approx(2 * t.sf(abs(paired.mean) / error, 4))
    assert (
        math.isnan(report.delta([1.0], [2.0], True).p)
        and report.delta([1.0], [2.0], True).mean == -1
    )


def test_holm_is_holm() -> None:
    assert report.holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True
    )


def test_equal_steps_and_equal_time_disagree_as_they_must(runs: Path) -> None:
    made = report.compare_all(report.load_all(runs, ROWS), ROWS)
    assert [(c.row, c.baseline) for c in made] == [("O", "K")], (
        "K's own baselines have no runs here"
    )
    c = made[0]
    assert c.test == "paired" and c.steps[0] == "end, 100" and c.time[0] == "6.0 s"
    assert c.steps[1].mean == pytest.approx(-0.02) and c.post.mean == pytest.approx(-0.02 * 1.002)
    assert c.time[1].mean == pytest.approx(-0.02 + 0.1 * math.log(1.7)), (
        "fewer steps in the same time"
    )
    assert c.gap.mean == pytest.approx(-0.02 * 0.002)


def test_load_on_the_machine_during_one_seed_does_not_decide(runs: Path) -> None:
    calm = report.compare_all(report.load_all(runs, ROWS), ROWS)
    for name, key in (("metrics.jsonl", "train_seconds"), ("result.json", "train_seconds")):
        path = runs / "O" / "seed2" / name
        slower = re.sub(
            rf'("{key}": )([\d.]+)', lambda m: m[1] + str(3 * float(m[2])), path.read_text()
        )
        path.write_text(slower)
    assert report.compare_all(report.load_all(runs, ROWS), ROWS)[0].time == calm[0].time


def test_where_the_clock_ends_a_run_time_is_compared_at_the_end_and_steps_before_the_warm_down(
    tmp_path: Path,
) -> None:
    for row, pace, level in (("K", 0.1, 3.0), ("O", 0.11, 2.98)):
        write_run(
            tmp_path,
            row,
            1,
            level,
            pace,
            ITERATIONS="20000",
            MAX_WALLCLOCK_SECONDS="11",
            WARMDOWN_ITERS="30",
        )
    a, b = (next(iter(report.load_all(tmp_path, [row])[row].values())) for row in ("K", "O"))
    assert report.equal_time([a, b]) == ("end, 11 s", [a.pre, b.pre])
    where, values = (
        report.equal_step([a, b])
        if a.steps != b.steps
        else report.equal_step([a, report.Result(**{**b.__dict__, "steps": 99})])
    )
    assert where == "70", "O's rate begins to fall 30 steps before second 11"
    assert values == pytest.approx([bpb_at(70, 3.0), bpb_at(70, 2.98)])


def test_seeds_are_paired_only_where_they_draw_the_same_weights(runs: Path) -> None:
    found = report.load_all(runs, ROWS)
    assert report.compare(found["O"], found["E"]).test == "Welch", "another number of stored layers"
    fewer = {seed: run for seed, run in found["O"].items() if seed < 3}
    assert report.compare(fewer, found["K"]).test == "Welch", "other seeds"


def test_a_claim_is_tested_on_the_mean_of_its_pairs(runs: Path) -> None:
    found, pairs = report.load_all(runs, ROWS), [["O", "K"], ["E", "K"]]
    effects = [
        ((found["O"][s].post - found["K"][s].post) + (found["E"][s].post - found["K"][s].post)) / 2
        for s in (1, 2, 3)
    ]
    seeds, d = report.claimed(found, pairs, lambda of: [run.post for run in of])
    assert seeds == 3 and d.mean == pytest.approx(mean(effects))
    assert d.half == pytest.approx(4.3027 * math.sqrt(variance(effects) / 3), rel=1e-4), (
        "t(0.975, 2)"
    )
    del found["E"][3]
    assert report.claimed(found, pairs, lambda of: [run.post for run in of])[0] == 2, (
        "the seeds all have"
    )
    assert report.claimed(found, [["O", "N"]], lambda of: [0.0]) is None, "no runs of N"


def test_published_differences_are_those_of_the_study() -> None:
    reference = report.published()
    assert reference.post("C", "Cp") == pytest.approx(-0.0073, abs=5e-5)
    assert reference.steps("O", "K") == pytest.approx(-0.0039, abs=5e-4)
    assert reference.steps("Q", "O") == pytest.approx(1.2895 - 1.2923)
    assert math.isnan(reference.post("M", "K")), "it crashed"
    assert math.isnan(reference.post("G", "E")), "other hardware"


# ---- The page


def test_report_names_every_figure_and_warns_of_mixed_origins(runs: Path, tmp_path: Path) -> None:
    path = runs / "O" / "seed3" / "result.json"
    result = json.loads(path.read_text())
    result["versions"]["script_sha256"] = "1" * 64
    path.write_text(json.dumps(result))
    names = {file.name for file in report.write(runs, TABLE, "scale", tmp_path / "to")}
    assert {
        "report.md",
        "report.html",
        "gaps.png",
        "bytes.png",
        "series3_loss.png",
        "series3_health.png",
    } < names
    text = (tmp_path / "to" / "report.md").read_text()
    assert "script: 000000000000 / 111111111111 (they differ: compare with care)" in text
    row = next(line for line in text.splitlines() if line.startswith("| O | K |"))
    assert "paired" in row and "-0.0200" in row and "+0.0331" in row and "-0.0033" in row
    page = (tmp_path / "to" / "report.html").read_text()
    page = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "//" not in page, (
        "needs no network"
    )


def test_no_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        report.write(tmp_path, TABLE, "", tmp_path)


HARNESS = """<script>
const wrong = [];
addEventListener("error", e => wrong.push(String(e.message)));
addEventListener("load", () => {
  let sorted = 0, moved = 0;
  for (const table of document.querySelectorAll("table"))
    for (const [i, th] of [...table.tHead.rows[0].cells].entries()) {
      const keys = () => [...table.tBodies[0].rows].map(r => r.cells[i].dataset.key);
      const rises = k => k.every((x, j) => !j || (isNaN(k[j-1]) || isNaN(x) ? k[j-1].localeCompare(x) <= 0
                                                                         : +k[j-1] <= +x));
      th.click(); const up = keys(); th.click(); const down = keys();
      sorted += rises(up) && rises([...down].reverse()); moved += String(up) != String(down);
      if (!rises(up) || !rises([...down].reverse())) wrong.push(th.textContent + " is not sorted");
    }
  const images = [...document.images];
  document.body.dataset.result = JSON.stringify({wrong, sorted, moved, images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth > 100).length});
});</script>"""


def browse(page: Path, *words: str) -> subprocess.CompletedProcess:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    return subprocess.run(
        [CHROMIUM, *flags, *words, page.as_uri()], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_page_in_a_browser(runs: Path, tmp_path: Path) -> None:
    report.write(runs, TABLE, "scale", tmp_path / "to")
    page = tmp_path / "checked.html"
    text = (tmp_path / "to" / "report.html").read_text()
    page.write_text(text.replace("<head>", "<head>" + HARNESS))
    done = browse(page, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    result = json.loads(re.search(r'data-result="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    columns = len(re.findall("<th>", text))
    assert result["wrong"] == [] and result["sorted"] == columns, result
    assert result["moved"] > 4 and result["images"] == result["loaded"] == 8, result
