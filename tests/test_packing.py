"""records/tools/packing.py: a packed script runs as its text would, and carries nothing else."""

import base64
import bz2
import dataclasses
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
from helpers import HANG, ROOT, clean_environment, log_of, result_of, start
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from records.tools import audit, audit_files, checks, common, packing, submit

TEXT = b"print('caf\xc3\xa9')\r\nx = 1\n"
SMALL = dict(
    PRESET="Bp,tiny",
    MODEL_DIM="32",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
    ITERATIONS="4",
    WARMDOWN_ITERS="2",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="0",
    RUN_ID="seed1337",
)


def packed_in(folder: Path, text: bytes) -> Path:
    """The packed form of a text in a folder, its text beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    submit.write_packed(folder, text)
    return folder / "train_gpt.py"


# ---- What it carries


@given(st.binary(max_size=300))
def test_any_text_comes_back_by_the_byte(text: bytes) -> None:
    assert packing.unpack(packing.pack(text)) == text


def carried(payload: bytes) -> bytes:
    """A file of the packed form around some payload."""
    return packing.HEAD + base64.b85encode(payload) + packing.TAIL


GOOD = packing.pack(TEXT)
NO_PACKED_FORM = {
    "the text itself": TEXT,
    "code before": b"import os\n" + GOOD,
    "code behind": GOOD + b"x = 2\n",
    "code in a line that is there": GOOD.replace(b"import os\n", b"import os; x = 2\n"),
    "code within the literal's line": GOOD.replace(b'"))\n', b'") + b"x = 2")\n'),
    "carriage returns": GOOD.replace(b"\n", b"\r\n"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "a second stream": carried(bz2.compress(TEXT) + bz2.compress(b"x = 2\n")),
    "bytes behind the stream": carried(bz2.compress(TEXT) + b"x = 2\n"),
    "half a stream": carried(bz2.compress(TEXT)[:-9]),
    "no stream": carried(b"x = 2\n"),
    "no base 85": packing.HEAD + b"~~~~~" + packing.TAIL,
}


@pytest.mark.parametrize("data", NO_PACKED_FORM.values(), ids=NO_PACKED_FORM)
def test_whatever_else_a_file_holds_makes_it_no_packed_script(data: bytes, tmp_path: Path) -> None:
    assert packing.unpack(GOOD) == TEXT and packing.unpack(data) is None
    script = packed_in(tmp_path, TEXT)
    assert packing.fault(script) == ""
    script.write_bytes(data)
    assert packing.fault(script) == "is not the packed form of train_gpt_readable.py beside it"


def test_the_text_beside_it_is_the_text_that_it_carries(tmp_path: Path) -> None:
    script, beside = packed_in(tmp_path, TEXT), tmp_path / packing.READABLE
    for other in (TEXT + b"\n", TEXT.replace(b"\r\n", b"\n"), b""):
        beside.write_bytes(other)
        assert "unpacks to another text" in packing.fault(script)
    beside.unlink()
    assert "is not beside it" in packing.fault(script)


# ---- How it runs

PROBE = b'''"""A probe."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from dataclasses import dataclass
from typing import get_type_hints

import torch


@dataclass
class Pair:
    """Two numbers."""

    a: int
    b: Pair | None = None


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x  # doubled


def fail() -> None:
    raise ValueError("no")  # here


try:
    fail()
except ValueError:
    told = traceback.format_exc()
facts = dict(
    file=__file__,
    name=__name__,
    doc=__doc__,
    arguments=sys.argv[1:],
    hints=str(get_type_hints(Pair)["a"]),
    function=inspect.getsource(double),
    kind=inspect.getsource(Pair),
    traceback=told,
    compiled=torch.compile(double, backend="eager", fullgraph=True)(torch.ones(2)).tolist(),
)
print(json.dumps(facts))
'''


def test_a_packed_script_runs_as_its_text_would(tmp_path: Path) -> None:
    script = packed_in(tmp_path / "a", PROBE)
    (tmp_path / "a" / packing.READABLE).unlink()  # for people: it runs without
    command = [sys.executable, str(script), "--word"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True)
    facts = json.loads(done.stdout)
    text = PROBE.decode()
    assert facts["file"] == str(script) and facts["name"] == "__main__"
    assert facts["doc"] == "A probe." and facts["arguments"] == ["--word"]
    assert facts["hints"] == "<class 'int'>" and facts["compiled"] == [2.0, 2.0]
    assert "return 2 * x  # doubled\n" in facts["function"] and facts["function"] in text
    assert facts["kind"].startswith("@dataclass\nclass Pair:") and facts["kind"] in text
    line = text[: text.index('raise ValueError("no")')].count("\n") + 1
    assert f'train_gpt_readable.py", line {line}, in fail\n' in facts["traceback"]
    assert 'raise ValueError("no")  # here\n' in facts["traceback"]


def test_the_packed_script_has_the_help_of_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started as a user starts it."""
    assert submit.run(submit.parser().parse_args(["--pack", str(tmp_path)])) == 0
    capsys.readouterr()
    assert tg.main(["--help"]) == 0
    told = capsys.readouterr().out
    command = [sys.executable, str(tmp_path / "train_gpt.py"), "--help"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG,
        env=clean_environment(),
        check=True,
    )
    assert done.stdout == told and "SIZE_LIMIT_BYTES" in told
    assert (tmp_path / packing.READABLE).read_bytes() == (ROOT / "train_gpt.py").read_bytes()


def test_packing_replaces_a_packed_script_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "train_gpt.py"
    told = submit.pack(tmp_path)
    assert "packed of" in told
    assert submit.pack(tmp_path) == f"{told}; it replaces the packed script that was there"
    script.write_bytes(TEXT)
    with pytest.raises(tg.InputError, match="would be overwritten"):
        submit.pack(tmp_path)
    assert script.read_bytes() == TEXT


def test_git_ignores_the_folder_that_the_readme_packs_into() -> None:
    folders = re.findall(r"submit\.py --pack (\w+)", (ROOT / "README.md").read_text())
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert folders and {f"/{folder}/" for folder in folders} <= {*ignored}


NOT_OF_TRAINING = ("scipy", "matplotlib", "adjustText", "jinja2", "submitit")


@pytest.mark.parametrize(
    ("tool", "words", "told"),
    [("submit", ["--pack", "packed"], "packed of"), ("audit", ["--help"], "THIS EXECUTES")],
)
def test_packages_of_training_are_enough(
    tool: str,
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To pack, and to audit: where the script runs, the tools' own packages may be missing."""
    path = ROOT / "records" / "tools" / f"{tool}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with mock.patch.dict(sys.modules, dict.fromkeys(NOT_OF_TRAINING)):
        for name in [name for name in sys.modules if name.partition(".")[0] == "records"]:
            del sys.modules[name]
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    assert told in said.out


def test_a_comparison_names_the_package_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert checks.p_value([1.0], [1.0, 1.1]) == 1.0
    with pytest.raises(SystemExit) as end:
        checks.p_value([1.0, 1.1], [1.0, 1.1])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "the package scipy is missing: " in error and "tools/requirements.txt" in error


# ---- A run of it, and its folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    submit.pack(folder)
    return folder / "train_gpt.py"


@pytest.fixture(scope="module")
def finished(corpus: dict, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that torchrun started on two ranks."""
    logs = tmp_path_factory.mktemp("runs")
    done = start(corpus | SMALL | dict(LOG_DIR=str(logs)), ranks=2, script=packed)
    assert done.returncode == 0, done.stderr
    return logs / "seed1337"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A submission folder of that run."""
    words = [str(finished), "--name", "x", "--author", "x", "--github-id", "x", "--blurb", "x"]
    words += ["--artifacts", "--no-start", "--track", "non_record_16mb", "--to", str(tmp_path)]
    return submit.make(submit.parser().parse_args(words))


def test_its_log_counts_the_packed_file_and_carries_the_text(packed: Path, finished: Path) -> None:
    result, size = result_of(finished), packed.stat().st_size
    text = packed.with_name(packing.READABLE).read_bytes()
    assert result["bytes_code"] == size < len(text) / 2
    assert result["bytes_total"] == size + (finished / "model.ptz").stat().st_size
    assert f"\nCode size: {size} bytes\n" in log_of(finished)
    log = common.read_log(finished / "train.log")
    assert log.script == text
    assert log.versions["script_sha256"] == hashlib.sha256(text).hexdigest()
    assert log.versions["packed_sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_a_script_that_is_not_packed_counts_itself() -> None:
    assert tg.source() == tg.script_file() == (ROOT / "train_gpt.py").read_bytes()
    assert "packed_sha256" not in tg.versions(tg.World({}, device="cpu"))


def test_the_budget_is_that_of_the_file_that_runs(
    packed: Path, corpus: dict, tmp_path: Path
) -> None:
    """MATRIX_BITS=0 takes the bits that fit beside the packed file, not beside its text."""
    script = common.load_script(packed)
    config = script.Config.from_env(corpus | SMALL)
    model, log = script.GPT(config.architecture()), script.Log(tmp_path, True)
    whole = len(script.pack(model, config))
    limit = whole + packed.stat().st_size
    config = dataclasses.replace(config, matrix_bits=0, size_limit_bytes=limit)
    assert len(script.pack_to_fit(model, config, {}, log)) == whole
    config = dataclasses.replace(config, size_limit_bytes=limit - 1)
    assert len(script.pack_to_fit(model, config, {}, log)) < whole


def test_a_folder_of_it_passes_and_starts(folder: Path, packed: Path) -> None:
    assert checks.faults(checks.check(folder, None, run=True)) == []
    for name in ("train_gpt.py", packing.READABLE):
        assert (folder / name).read_bytes() == packed.with_name(name).read_bytes()
    lines = audited(folder)
    assert lines["script"].status == lines["sizes"].status == "ok", lines
    assert f"{packed.stat().st_size} bytes, " in lines["script"].measured


def test_an_audit_packs_the_script_as_the_run_had_it(
    finished: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --script. If ours is another by now, the right one is named but not executed."""
    lines = audited(finished, [])
    assert lines["script"].status == lines["sizes"].status == "ok", lines
    assert f"{packed.stat().st_size} bytes, " in lines["script"].measured
    (tmp_path / "train_gpt.py").write_bytes(TEXT)
    monkeypatch.setattr(audit_files, "ROOT", tmp_path)
    told = f"{finished} is of a packed script .* give --script "
    with pytest.raises(tg.InputError, match=f"{told}<the packed train_gpt.py that was started>$"):
        audited(finished, [])
    there = shutil.copytree(packed.parent, tmp_path / "packed") / "train_gpt.py"
    with pytest.raises(tg.InputError, match=f"{told}{there}$"):
        audited(finished, [])


def audited(folder: Path, script: Sequence[str] = ("train_gpt.py",)) -> dict[str, audit.Line]:
    """What the audit says of a folder's script and sizes."""
    skip = [name for name in audit.CHECKS if name not in ("script", "sizes")]
    words = [str(folder), "--skip", *skip]
    for name in script:
        words += ["--script", str(folder / name)]
    return {line.name: line for line in audit.audit_folder(audit.parser().parse_args(words))}


def another_payload(script: Path) -> None:
    script.write_bytes(packing.pack(packing.text_of(script) + b"x = 2\n"))


def code_before(script: Path) -> None:
    script.write_bytes(b"x = 2\n" + script.read_bytes())


def code_behind(script: Path) -> None:
    script.write_bytes(script.read_bytes() + b"x = 2\n")


def carriage_returns(script: Path) -> None:
    script.write_bytes(script.read_bytes().replace(b"\n", b"\r\n"))


def no_text(script: Path) -> None:
    script.with_name(packing.READABLE).unlink()


def another_text(script: Path) -> None:
    beside = script.with_name(packing.READABLE)
    beside.write_bytes(beside.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize(
    "cheat",
    [another_payload, code_before, code_behind, carriage_returns, no_text, another_text],
)
def test_cheats_are_found_and_not_executed(cheat: Callable[[Path], None], folder: Path) -> None:
    script = folder / "train_gpt.py"
    cheat(script)
    found = [str(fault) for fault in checks.faults(checks.check(folder, None, run=False))]
    assert any(line.startswith(f"FAIL train_gpt.py: {packing.fault(script)}") for line in found)
    with pytest.raises(tg.InputError, match="not executed"):
        audited(folder)


def test_a_payload_and_its_text_of_another_script_are_not_those_of_the_log(folder: Path) -> None:
    packed_in(folder, (folder / packing.READABLE).read_bytes() + b"x = 2\n")
    found = [str(fault) for fault in checks.faults(checks.check(folder, None, run=False))]
    assert any("is not the script of this log" in line for line in found)
    assert audited(folder)["script"].status == "FAILED"


def test_the_text_alone_is_not_what_ran(folder: Path) -> None:
    """Its hash is that of the log; the bytes that the log counts are those of the packed form."""
    shutil.move(folder / packing.READABLE, folder / "train_gpt.py")
    found = [str(fault) for fault in checks.faults(checks.check(folder, None, run=False))]
    assert any("is not packed as the script of this log was" in line for line in found)
    assert "is of packed" in audited(folder)["script"].measured
