"""records/tools/submit.py: a folder that agrees with its logs passes, any other does not."""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import train_gpt as tg
from records.tools import checks, common, submit

SMALL = dict(
    PRESET="Bp,tiny",
    MODEL_DIM="32",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
    ITERATIONS="4",
    WARMDOWN_ITERS="2",
    WARMUP_STEPS="0",
    TRAIN_LOG_EVERY="2",
    MAX_WALLCLOCK_SECONDS="0",
    DTYPE="float32",  # with which a processor is faster
)
SEEDS = 1337, 1338, 1339
LIMIT = 16_000_000
TRACK = ["--track", "non_record_16mb"]
ABOUT = ["--name", "A looped one", "--author", "A. Name", "--github-id", "aname"]
ABOUT += ["--blurb", "Small."]


@pytest.fixture(scope="session")
def finished(corpus: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs, seed1337 to seed1339."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        env = corpus | SMALL | dict(SEED=str(seed), LOG_DIR=str(folder), RUN_ID=f"seed{seed}")
        assert tg.run(tg.Config.from_env(env), tg.World({})) == 0
    for name in ("train.log", "result.json"):  # as of a run that was cut off and went on
        edit(folder / f"seed{SEEDS[-1]}" / name, '"resume": ""', '"resume": "auto"')
    return folder


def made(finished: Path, to: Path, *words: str) -> Path:
    """A submission folder of the three runs."""
    runs = [str(finished / f"seed{seed}") for seed in SEEDS]
    options = ["--date", "2026-01-02", "--artifacts", "--no-start", "--to", str(to), *TRACK]
    options += words
    return submit.make(submit.parser().parse_args([*runs, *ABOUT, *options]))


@pytest.fixture(scope="session")
def first_made(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(finished, tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(first_made: Path, tmp_path: Path) -> Path:
    """A copy of the submission folder that a test may change."""
    return shutil.copytree(first_made, tmp_path / first_made.parent.name / first_made.name)


def edit(path: Path, pattern: str, new: str | Callable[[re.Match], str], count: int = 1) -> None:
    text, changed = re.subn(pattern, new, path.read_text(), count=count, flags=re.MULTILINE)
    assert changed, f"{pattern} is not in {path.name}"
    path.write_text(text)


# ---- A folder that is true


def test_a_made_folder_passes_and_its_script_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.parts[-2:] == ("track_non_record_16mb", "2026-01-02_A_looped_one")
    found = checks.check(folder, None, run=True)
    assert checks.faults(found) == [] and len(found) == 3, "three notes on the data"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "submission.json",
        "train_gpt.py",
        "requirements.txt",
        *(f"train_seed{s}.log" for s in SEEDS),
        *(f"model_seed{s}.ptz" for s in SEEDS),
    }


def test_the_committed_submission_passes() -> None:
    folder = common.ROOT / "records" / "track_non_record_16mb"
    for path in folder.iterdir():
        assert checks.faults(checks.check(path, None, run=False)) == []


def test_no_column_of_its_readme_names_a_width() -> None:
    """Weights may be rounded to any number of bits."""
    assert not [title for title, *_ in checks.COLUMNS if re.search(r"\d", title)]


def test_its_numbers_are_those_of_the_results(folder: Path, finished: Path) -> None:
    data = json.loads((folder / "submission.json").read_text())
    results = [json.loads((finished / f"seed{seed}" / "result.json").read_text()) for seed in SEEDS]
    scores = [result["roundtrip"]["val_bpb"] for result in results]
    assert data["val_bpb"] == pytest.approx(sum(scores) / 3, abs=1e-8)
    assert data["bytes_total"] == max(result["bytes_total"] for result in results)
    assert data["seeds"] == list(SEEDS) and data["author"] == "A. Name"
    for seed, result in zip(SEEDS, results):
        entry = data["seed_results"][str(seed)]
        assert (
            entry["artifact_sha256"] == result["artifact_sha256"]
            and entry["steps"] == result["steps"]
        )
        assert entry["train_time_s"] == pytest.approx(result["train_seconds"], abs=1e-3)
    assert (folder / "train_gpt.py").read_bytes() == Path(tg.__file__).read_bytes()


def test_the_command_in_its_readme_makes_the_same_configuration(
    folder: Path, finished: Path
) -> None:
    """Data and tokenizer too: these are not the default ones. Its script is the folder's."""
    line = next(
        x for x in (folder / "README.md").read_text().splitlines() if x.endswith("train_gpt.py")
    )
    assert shlex.split(line)[-1] == f"records/{folder.parent.name}/{folder.name}/train_gpt.py"
    env = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
    made = tg.Config.from_env(env)
    config = asdict(made)
    ran = json.loads((finished / "seed1337" / "result.json").read_text())["config"]
    for name in ("preset", "log_dir", "run_id"):
        del config[name], ran[name]
    idle = {
        f.name for f in fields(tg.Config) if any(map(made.unmet_need, f.metadata["needs"].split()))
    }
    assert {name for name in config if config[name] != ran[name]} <= idle


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--track", "10min_16mb"], "the record track is 8xH100"),
        (["--date", "2026-01-02"], "exists"),
    ],
)
def test_what_would_not_pass_is_not_left_behind(
    words: list[str], message: str, folder: Path, finished: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        made(finished, tmp_path, *words)
    assert [
        path for path in sorted(tmp_path.rglob("*")) if path.name != "track_10min_16mb"
    ] == before


def test_runs_that_are_not_one_system_are_refused(
    finished: Path, corpus: dict, tmp_path: Path
) -> None:
    env = corpus | SMALL | dict(BETA1="0.8", SEED="1339", LOG_DIR=str(tmp_path), RUN_ID="seed1339")
    tg.run(tg.Config.from_env(env), tg.World({}))
    words = [*ABOUT, *TRACK, "--to", str(tmp_path)]
    one, other = str(finished / "seed1337"), str(tmp_path / "seed1339")
    with pytest.raises(ValueError, match=r"seed1339 and .*seed1337 .*: BETA1 is 0\.8 and 0\.9$"):
        submit.make(submit.parser().parse_args([one, other, *words]))
    with pytest.raises(ValueError, match="the same seed"):
        submit.make(submit.parser().parse_args([one, one, *words]))
    (tmp_path / "seed1339" / "train.log").write_text("step:1/2 train_loss:3\n")
    with pytest.raises(ValueError, match="is the run finished"):
        submit.make(submit.parser().parse_args([other, *words]))


def test_a_folder_of_runs_is_no_submission_to_check(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished / "seed1337"
    for folder, runs in ((run, run), (finished, finished / "*")):
        monkeypatch.setattr(sys, "argv", ["submit.py", "--check", str(folder)])
        assert submit.main() == 2
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1
        assert f"{folder} is no submission" in error
        assert f"to make one: submit.py {runs} --track" in error


# ---- Doctored copies: each must fail, and its own cause must be among what is named


def one_byte_over(f: Path) -> None:
    log, code = f / "train_seed1338.log", (f / "train_gpt.py").stat().st_size
    edit(log, r"(Serialized model int8\+zlib: )(\d+)", rf"\g<1>{LIMIT + 1 - code}")
    edit(log, r"(Total submission size int8\+zlib: )(\d+)", rf"\g<1>{LIMIT + 1}")


def json_number(f: Path) -> None:
    edit(
        f / "submission.json",
        r'("val_bpb": \d\.\d)(\d)',
        lambda m: m[1] + str((int(m[2]) + 1) % 10),
    )


def json_seed_number(f: Path) -> None:
    edit(f / "submission.json", r'("1338": \{\s+"val_loss": )\d', r"\g<1>0")


def readme_number(f: Path) -> None:
    edit(f / "README.md", r"^(\| 1339 \| \d\.\d)(\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10))


def missing_log(f: Path) -> None:
    (f / "train_seed1338.log").unlink()


def duplicated_seed(f: Path) -> None:
    shutil.copyfile(f / "train_seed1337.log", f / "train_seed1338.log")


def renamed_seed(f: Path) -> None:
    shutil.copyfile(f / "train_seed1337.log", f / "train_seed1338.log")
    edit(f / "train_seed1338.log", r'^(config:.*"seed": )1337', r"\g<1>1338")


def no_script(f: Path) -> None:
    (f / "train_gpt.py").unlink()


def script_needs_a_neighbour(f: Path) -> None:
    edit(f / "train_gpt.py", r"^import json$", "import helpers_next_door\nimport json")


def script_does_not_compile(f: Path) -> None:
    edit(f / "train_gpt.py", r"^import json$", "import json as well as")


def over_time(f: Path) -> None:
    edit(f / "train_seed1337.log", r"(step:4/4 val_loss.*train_time:)\d+ms", r"\g<1>600153ms")


def slow_evaluation(f: Path) -> None:
    edit(f / "train_seed1337.log", r"(roundtrip val_loss.*eval_time:)\d+ms", r"\g<1>600001ms")


def wrong_track(f: Path) -> None:
    edit(f / "submission.json", '"track": "non_record_16mb"', '"track": "10min_16mb"')


def code_left_out(f: Path) -> None:
    model = max(
        json.loads((f / "submission.json").read_text())["seed_results"].values(),
        key=lambda entry: entry["bytes_total"],
    )["artifact_bytes"]
    edit(f / "submission.json", r'^(  "bytes_total": )\d+', rf"\g<1>{model}")


def code_left_out_of_a_log(f: Path) -> None:
    edit(f / "train_seed1339.log", r"(Code size: )\d+", r"\g<1>0")


def another_artifact(f: Path) -> None:
    (f / "model_seed1339.ptz").write_bytes(b"other")


def swapped_artifact(f: Path) -> None:
    shutil.copyfile(f / "model_seed1337.ptz", f / "model_seed1338.ptz")


def no_requirements(f: Path) -> None:
    (f / "requirements.txt").unlink()


def codec_of_its_own(f: Path) -> None:
    """As if the artifacts had been packed by brotli, which is not among the requirements."""
    for log in f.glob("*.log"):
        edit(log, r'^(config:.*"codec": )"zlib"', r'\g<1>"brotli"')


def cut_log(f: Path) -> None:
    log = f / "train_seed1338.log"
    log.write_text("\n".join(log.read_text().splitlines()[:-2]) + "\n")


def last_line_cut(f: Path) -> None:
    edit(f / "train_seed1338.log", r"^finished:.*\n", "")


def log_without_score(f: Path) -> None:
    log = f / "train_seed1338.log"
    log.write_text(log.read_text()[: log.read_text().rindex("final_int8_zlib_roundtrip val_loss")])


def other_configuration(f: Path) -> None:
    edit(f / "train_seed1338.log", r'^(config:.*"beta1": )0\.9', r"\g<1>0.8")


def no_author(f: Path) -> None:
    edit(f / "submission.json", '"github_id": "aname"', '"github_id": ""')


def broken_json(f: Path) -> None:
    edit(f / "submission.json", r"\}\s*\Z", "")


@pytest.mark.parametrize(
    ("doctor", "where", "cause"),
    [
        (one_byte_over, "train_seed1338.log:", "16,000,001 bytes with code, 1 too many"),
        (json_number, "submission.json:", "val_bpb .* where the logs give"),
        (json_seed_number, "submission.json:", "val_loss .* where the logs give"),
        (readme_number, "README.md:10", "where the logs give"),
        (missing_log, "submission.json:", "seed 1338 has no log"),
        (duplicated_seed, "train_seed1338.log:", "the same seed as train_seed1337.log"),
        (renamed_seed, "train_seed1338.log:", "the same artifact as train_seed1337.log"),
        (no_script, "train_gpt.py", "is not there"),
        (script_does_not_compile, "train_gpt.py:", "does not compile"),
        (slow_evaluation, "submission.json:", "eval_under_600s is claimed"),
        (over_time, "submission.json:", "train_under_600s is claimed"),
        (
            wrong_track,
            "submission.json:7",
            "track 10min_16mb, but the folder lies in track_non_record_16mb",
        ),
        (code_left_out, "submission.json:", "bytes_total .* where the logs give"),
        (code_left_out_of_a_log, "train_seed1339.log:", "0 bytes of code, train_gpt.py has"),
        (another_artifact, "model_seed1339.ptz", "is not the artifact of any log here"),
        (swapped_artifact, "model_seed1338.ptz", "is the artifact of seed 1337"),
        (no_requirements, "requirements.txt", "does not name sentencepiece, which train_seed1"),
        (codec_of_its_own, "requirements.txt", "does not name brotli, which train_seed1"),
        (cut_log, "train_seed1338.log:", "the log ends without artifact"),
        (last_line_cut, "train_seed1338.log:", "the log ends without finished"),
        (log_without_score, "train_seed1338.log:", "the log ends without val_loss, val_bpb"),
        (
            other_configuration,
            "train_seed1338.log:",
            r"another configuration than train_seed1337.log: BETA1 is 0\.8 and 0\.9$",
        ),
        (no_author, "submission.json:3", 'github_id is "", not a text'),
        (broken_json, "submission.json", "cannot be read"),
    ],
)
def test_a_doctored_copy_fails_by_name(
    doctor: Callable[[Path], None], where: str, cause: str, folder: Path
) -> None:
    doctor(folder)
    found = checks.check(folder, None, run=False)
    hits = [f for f in found if f.where.startswith(where) and re.search(cause, f.what)]
    assert hits, "\n".join(map(str, found))


def test_a_script_that_needs_its_neighbours_does_not_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script_needs_a_neighbour(folder)
    monkeypatch.setattr(sys, "argv", ["submit.py", "--check", str(folder)])
    assert submit.main() == 1
    told = capsys.readouterr().out
    assert "FAIL train_gpt.py: does not start in its folder (exit code 1)" in told
    assert "helpers_next_door" in told


def test_a_driver_that_pytorch_cannot_use_is_no_fault_of_the_folder(folder: Path) -> None:
    """The script finds a GPU's device, without a PyTorch that sees it."""
    edit(folder / "train_gpt.py", "/dev/nvidiactl", os.devnull)
    assert [*checks.check_script(checks.Folder(folder), run=True)] == []


# ---- What the runs say against themselves


def calibrated(f: Path) -> None:
    """598 s of training and 5 s of calibration."""
    log = f / "train_seed1337.log"
    edit(log, r"(step:4/4 val_loss.*train_time:)\d+ms", r"\g<1>598000ms")
    edit(log, r"^packed ", "gptq_calibration batches:4 time:5000ms\npacked ")


def evaluated_twice(f: Path) -> None:
    """Evaluations of 200 s and of 500 s."""
    log = f / "train_seed1337.log"
    edit(log, r"(roundtrip val_loss.*eval_time:)\d+ms", r"\g<1>200000ms")
    sliding = r"\g<0>\nfinal_int8_zlib_sliding val_loss:3.1 val_bpb:1.9 eval_time:500000ms"
    edit(log, r"^final_int8_zlib_roundtrip_exact.*", sliding)


def disqualified(f: Path) -> None:
    edit(
        f / "train_seed1338.log",
        r"^(val_tokens:)",
        r"not a submission: 700.0 s exceed EVAL_LIMIT_SECONDS=600.0\n\g<1>",
    )


@pytest.mark.parametrize(
    ("doctor", "told"),
    [
        (calibrated, "training and calibration took 603.000 s (598.000 + 5.000), more than 600"),
        (calibrated, "train_under_600s is claimed"),
        (evaluated_twice, "evaluation took 700.000 s in all, more than 600"),
        (evaluated_twice, "eval_under_600s is claimed"),
        (disqualified, "the script itself says that it is not a submission: 700.0 s exceed"),
    ],
)
def test_what_counts_is_summed_and_the_script_believed(
    doctor: Callable[[Path], None], told: str, folder: Path
) -> None:
    record = as_record(folder, 0.0)
    assert checks.check(record, None, run=False) == []
    doctor(record)
    found = checks.faults(checks.check(record, None, run=False))
    assert any(told in finding.what for finding in found), "\n".join(map(str, found))


def does_not_fit(run: Path) -> None:
    edit(run / "result.json", '"fits": true', '"fits": false')


def ended_with_code_4(run: Path) -> None:
    (run / "run.json").write_text('{"exit_code": 4}')


def says_so(run: Path) -> None:
    edit(run / "train.log", "^peak memory", "not a submission: 17 bytes exceed it\npeak memory")


def no_result(run: Path) -> None:
    (run / "result.json").unlink()


def damaged_result(run: Path) -> None:
    (run / "result.json").write_text('{"fits": tr')


def other_artifact(run: Path) -> None:
    edit(run / "result.json", r'("artifact_sha256": ")\w', r"\g<1>x")


@pytest.mark.parametrize(
    ("doctor", "told"),
    [
        (does_not_fit, "result.json: script and artifact do not fit the limit"),
        (ended_with_code_4, "run.json: the run ended with exit code 4"),
        (says_so, "not a submission: 17 bytes exceed it"),
        (no_result, "No such file .*result.json"),
        (damaged_result, "result.json is damaged"),
        (other_artifact, "result.json is of another artifact than"),
    ],
)
def test_a_run_that_disqualified_itself_makes_no_folder(
    doctor: Callable[[Path], None], told: str, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished / "seed1337", tmp_path / "seed1337"))
    doctor(run)
    words = [str(run), *ABOUT, *TRACK, "--no-start", "--to", str(tmp_path)]
    with pytest.raises((tg.InputError, OSError), match=told):
        submit.make(submit.parser().parse_args(words))
    assert not any(tmp_path.glob("track_*/*"))


# ---- Scripts and configurations that are hard to read


def crlf(script: bytes) -> bytes:
    return script.replace(b"\n", b"\r\n")


def ruler(script: bytes) -> bytes:
    return script.replace(b"\nimport ", b"\n# " + b"=" * 100 + b"\nimport ", 1)


def rewrite(run: Path, change: Callable[[bytes], bytes], new_form: bool) -> bytes:
    """The log of a run as if a changed script had written it; its hard options too. The script."""
    old = common.read_log(run / "train.log")
    assert old.script is not None
    script, digest = change(old.script), hashlib.sha256(change(old.script)).hexdigest()
    config = json.loads((run / "result.json").read_text())["config"]
    config |= dict(log_dir="/x/seed=0/B=1", passes_schedule="0:1, 0.5:2")
    texts = [f"{name.upper()}={tg.show(value)}" for name, value in config.items()]
    shown = json.dumps(config) if new_form else " ".join(texts)
    model = (run / "model.ptz").stat().st_size
    text = "\n".join(old.lines)
    for pattern, new in (
        (r"^script_sha256:.*", f"script_sha256:{digest}"),
        (r"^config:.*", f"config:{shown}"),
        (r"^Code size: \d+", f"Code size: {len(script)}"),
        (r"^(Total submission size \S+) \d+", rf"\g<1> {len(script) + model}"),
    ):
        text, changed = re.subn(pattern, new, text, flags=re.MULTILINE)
        assert changed == 1, pattern
    head = f"script_bytes:{len(script)} script_sha256:{digest}\n".encode()
    data = head + script + b"\n" if new_form else script + b"=" * 100 + b"\n"
    (run / "train.log").write_bytes(data + text.encode())
    return script


@pytest.mark.parametrize("new_form", [True, False], ids=["new log", "old log"])
@pytest.mark.parametrize("change", [crlf, ruler])
def test_a_script_is_carried_by_the_byte(
    change: Callable[[bytes], bytes], new_form: bool, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished / "seed1337", tmp_path / "seed1337"))
    script = rewrite(run, change, new_form)
    words = [str(run), *ABOUT, *TRACK, "--no-start", "--to", str(tmp_path)]
    folder = submit.make(submit.parser().parse_args(words))
    assert (folder / "train_gpt.py").read_bytes() == script
    data = json.loads((folder / "submission.json").read_text())
    assert data["seeds"] == [1337] and data["bytes_code"] == len(script)
    command = (folder / "README.md").read_text().splitlines()[-1]
    assert "PASSES_SCHEDULE='0:1, 0.5:2'" in command and "seed=0" not in command


def test_a_package_of_the_codec_is_required_at_the_version_that_ran(
    corpus: dict, tmp_path: Path
) -> None:
    """Without a version, as older logs are, it is required at any."""
    brotli = pytest.importorskip("brotli")
    env = corpus | SMALL | dict(CODEC="brotli", LOG_DIR=str(tmp_path), RUN_ID="run")
    assert tg.run(tg.Config.from_env(env), tg.World({})) == 0
    pinned = [tg.torch.__version__.split("+")[0], tg.np.__version__, tg.spm.__version__]
    lines = [f"{name}=={at}" for name, at in zip(("torch", "numpy", "sentencepiece"), pinned)]
    words = [str(tmp_path / "run"), *ABOUT, *TRACK, "--no-start"]
    for to, own in (("new", f"brotli=={brotli.__version__}"), ("old", "brotli")):
        if to == "old":
            edit(tmp_path / "run" / "train.log", r"^brotli:.*\n", "")
        folder = submit.make(submit.parser().parse_args([*words, "--to", str(tmp_path / to)]))
        assert (folder / "requirements.txt").read_text().split("\n") == [*lines, own, ""]
        assert checks.faults(checks.check(folder, None, run=False)) == []
    edit(folder / "requirements.txt", "^brotli$", "Brotli>=1.1")
    assert checks.faults(checks.check(folder, None, run=False)) == [], "PyPI writes it so"


# ---- What stands beside the runs


def test_locks_and_what_was_set_aside_are_left_out(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Path(shutil.copytree(finished, tmp_path / "T"))
    (runs / "seed1337.lock").touch()
    (runs / "seed1338.console").write_text("x")
    shutil.copytree(runs / "seed1338", runs / "seed1338.unfinished1")
    words = [*map(str, sorted(runs.glob("seed*"))), *ABOUT, *TRACK, "--no-start"]
    folder = submit.make(submit.parser().parse_args([*words, "--to", str(tmp_path)]))
    assert json.loads((folder / "submission.json").read_text())["seeds"] == list(SEEDS)
    warnings = capsys.readouterr().err.splitlines()
    told = [line.split(" is no ")[0].rpartition("/")[2] for line in warnings]
    assert told == ["seed1338.unfinished1"], "locks and consoles go without saying"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x", *ABOUT], "give --track, too"),
        (["x", *TRACK], "give --name, --author, --github-id, --blurb, too"),
        ([*ABOUT, *TRACK], "name the folders of finished runs"),
        (["nowhere", *ABOUT, *TRACK], "nowhere is not there"),
        (["--check", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_what_is_missing_is_one_line(
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["submit.py", *words])
    assert submit.main() == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


# ---- The record track


def as_record(folder: Path, better_by: float) -> Path:
    """A copy as if it had been run on 8xH100, with scores lower by `better_by` nats."""
    to = folder.parent.parent / "track_10min_16mb" / f"better_by_{better_by:.4f}"
    shutil.copytree(folder, to)
    for log in to.glob("*.log"):
        edit(log, r"^device:.*", "device:NVIDIA H100 80GB HBM3")
        edit(log, r"^world_size:\d", "world_size:8")
        edit(log, r"^val_tokens:\d+ val_bytes:\d+", "val_tokens:62021632 val_bytes:151080891")
        edit(
            log,
            r"(roundtrip_exact val_loss:)([\d.]+)",
            lambda m: m[1] + f"{float(m[2]) - better_by:.8f}",
        )
    write_figures(to, None)
    return to


def read_logs(folder: Path) -> list:
    return checks.Folder(folder).complete


def write_figures(folder: Path, baseline: Path | None) -> None:
    """submission.json and README.md of a folder, made again from its logs."""
    given = argparse.Namespace(
        author="A",
        github_id="a",
        name="N",
        blurb="B",
        date="2026-01-02",
        track="10min_16mb",
        baseline=baseline,
    )
    logs = read_logs(folder)
    data = submit.submission(logs, given, read_logs(baseline) if baseline else [])
    (folder / "submission.json").write_text(json.dumps(data, indent=2))
    (folder / "README.md").write_text(submit.readme(logs, data, folder.name))


def test_a_record_needs_its_margin_and_its_p(folder: Path) -> None:
    losses = [log.values["val_loss"] for log in read_logs(folder)]
    base, won = as_record(folder, 0.0), as_record(folder, 0.005 + 10 * (max(losses) - min(losses)))
    write_figures(won, base)
    assert checks.check(won, base, run=False) == [], "a clear record passes"
    assert checks.check(won, None, run=False) == [], "its own figures suffice"
    edit(won / "submission.json", r'"p_value": [\d.e-]+', '"p_value": 0.02')
    assert any(
        "p_value 0.02 where the logs give" in f.what for f in checks.check(won, base, run=False)
    )
    edit(won / "submission.json", r',\s+"p_value": [\d.e-]+', "")
    assert any(
        "no p_value is given; the logs give" in f.what for f in checks.check(won, base, run=False)
    )
    edit(won / "submission.json", r'("baseline_val_loss": \[\s+)\d', r"\g<1>9")
    assert any(
        "is not what the baseline's logs say" in f.what for f in checks.check(won, base, run=False)
    )


def test_the_data_that_was_scored_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note where no record is claimed, a fault where one is; FineWeb's split is neither."""
    monkeypatch.setattr(sys, "argv", ["submit.py", "--no-start", "--check", str(folder)])
    assert submit.main() == 0
    told = capsys.readouterr().out
    result = read_logs(folder)[0].values
    scored = rf"{result['bytes']:,.0f} bytes in {result['tokens']:,.0f} tokens, DATA_PATH=\S+"
    needs = "a submission needs the score on FineWeb's validation set, which is 151,080,891 bytes"
    assert len(re.findall(rf"note train_seed\d+.log:\d+: scored on {scored}; {needs}", told)) == 3
    assert len(re.findall(rf"found train_seed\d+.log: .*, scored on {scored}", told)) == 3
    record = as_record(folder, 0.0)
    assert checks.check(record, None, run=False) == []
    edit(record / "train_seed1338.log", "val_bytes:151080891", "val_bytes:151040891")
    (fault,) = checks.faults(checks.check(record, None, run=False))
    assert needs in fault.what and "scored on 151,040,891 bytes" in fault.what


def test_making_a_folder_tells_the_data(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(finished, tmp_path)
    assert "a submission needs the score on FineWeb's validation set" in capsys.readouterr().out


def test_a_record_without_the_margin_fails(folder: Path) -> None:
    base, close = as_record(folder, 0.0), as_record(folder, 0.004)
    write_figures(close, base)
    assert any(
        "no record: 3 seeds against 3" in f.what for f in checks.check(close, base, run=False)
    )
    assert any(
        "no p_value" in f.what for f in checks.check(as_record(folder, 1.0), base, run=False)
    )


def test_p_is_of_the_margin_not_of_zero() -> None:
    ours, theirs = [1.000, 1.0005, 0.9995], [1.0049, 1.0054, 1.0044]
    assert checks.p_value(ours, theirs) > 0.5, "0.0049 nats are no 0.005"
    assert checks.p_value(ours, [x + 0.002 for x in theirs]) < 0.01
    assert checks.p_value([1.0], theirs) == 1.0, "one seed shows nothing"


def test_wall_clock_over_the_cap_fails_in_the_record_track(folder: Path) -> None:
    record = as_record(folder, 0.0)
    assert checks.check(record, None, run=False) == []
    over_time(record)
    found = [str(f) for f in checks.check(record, None, run=False)]
    assert any(re.search(r"train_seed1337.log:\d+: training took 600.153 s", f) for f in found), (
        found
    )


# ---- Folders of others

OTHERS_LOG = """import os
seed = int(os.environ.get("SEED", 1))
{bar}
Running Python 3.12
seed:{seed}
step:4550/20000 val_loss:2.7600 val_bpb:1.0900 train_time:588000ms step_avg:129.23ms
Code size: {code} bytes
Serialized model int6+brotli: 15900000 bytes
Total submission size int6+brotli: {total} bytes
final_int6_sliding_window val_loss:2.7400 val_bpb:{bpb:.4f} eval_time:80000ms
final_int6_sliding_window_exact val_loss:2.7400{seed} val_bpb:{bpb:.8f}
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder as others write it: fewer keys, other final lines, prose around the table."""
    folder = tmp_path / "track_10min_16mb" / "2026-03-01_Other"
    folder.mkdir(parents=True)
    script = "import math\nprint(math.pi)\n"
    (folder / "train_gpt.py").write_text(script)
    for seed, bpb in ((42, 1.08561), (314, 1.08602)):
        (folder / f"train_seed{seed}.log").write_text(
            OTHERS_LOG.format(
                seed=seed, bpb=bpb, code=len(script), total=15_900_000 + len(script), bar="=" * 100
            )
        )
    (folder / "submission.json").write_text(
        json.dumps(
            dict(
                author="O",
                github_id="o",
                name="Other",
                date="2026-03-01",
                val_bpb=1.0858,
                bytes_total=15_900_000 + len(script),
                seed_results={"42": dict(val_bpb=1.08561), "314": dict(val_bpb=1.08602)},
            ),
            indent=1,
        )
    )
    (folder / "README.md").write_text(
        "Beats 1.1147, mean **1.0858**.\n\n| seed | bpb |\n|---|---|\n"
        "| **42** | 1.0856 |\n| 314 | 1.08602 |\n| old 42nd | 1.2 |\n"
    )
    return folder


def test_a_folder_of_others_passes_and_fails_by_its_logs(other: Path) -> None:
    assert checks.faults(checks.check(other, None, run=True)) == []
    edit(other / "README.md", "1.08602", "1.08502")
    edit(other / "submission.json", "1.0858", "1.0758")
    edit(other / "train_gpt.py", "import math", "import lib_next_door, math ")
    found = [str(f) for f in checks.check(other, None, run=True)]
    assert any("README.md:6: 1.08502 stands for seed 314" in f for f in found), found
    assert any("val_bpb 1.0758 where the logs give" in f for f in found), found
    assert any("train_gpt.py: does not start" in f and "lib_next_door" in f for f in found), found


def test_a_package_that_is_declared_is_no_fault(other: Path) -> None:
    (other / "requirements.txt").write_text("some-gpu-kernel>=1\n")
    size = (other / "train_gpt.py").stat().st_size
    (other / "train_gpt.py").write_text("import some_gpu_kernel".ljust(size))
    found = checks.check(other, None, run=True)
    assert checks.faults(found) == []
    told = "note train_gpt.py: not started here, some_gpu_kernel is not installed"
    assert told in [str(finding) for finding in found]
