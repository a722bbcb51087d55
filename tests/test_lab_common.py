"""records/tools/common.py: logs of both forms, damaged files, output that nobody reads."""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from helpers import nobody_reads

import train_gpt as tg
from records.tools import common

LINES = ["torch:2.9", "numpy:2", "step:1/2 train_loss:3", ""]
RULER = b"import math\n" + b"# " + b"=" * 100 + b"\nx = 1\n"
SCRIPTS = dict(plain=b"import math\n", crlf=b"import math\r\nx = 1\r\n", ruler=RULER)


def old_log(script: bytes, config: str) -> bytes:
    """A log as the script wrote it before it gave the length of its source."""
    digest = hashlib.sha256(script).hexdigest()
    lines = [*LINES[:2], f"script_sha256:{digest}", f"config:{config}", *LINES[2:]]
    return script + b"=" * 100 + b"\n" + "\n".join(lines).encode()


def new_log(script: bytes, config: dict) -> bytes:
    """A log as the script writes it: length and hash, source, lines."""
    header = f"script_bytes:{len(script)} script_sha256:{hashlib.sha256(script).hexdigest()}\n"
    lines = [*LINES[:2], "config:" + json.dumps(config), *LINES[2:]]
    return header.encode() + script + b"\n" + "\n".join(lines).encode()


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_log_gives_its_script_to_the_byte(script: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    for data in (old_log(script, "SEED=3 BETA1=0.9"), new_log(script, dict(seed=3, beta1=0.9))):
        path.write_bytes(data)
        log = common.read_log(path)
        assert log.script == script
        assert log.versions["torch"] == "2.9"
        assert log.versions["script_sha256"] == hashlib.sha256(script).hexdigest()
        assert log.settings() == {"SEED": "3", "BETA1": "0.9"}
        number = log.first + log.lines.index("step:1/2 train_loss:3")
        assert data.split(b"\n")[number - 1].startswith(b"step:1/2")


def test_values_with_spaces_and_equals_signs_are_read(tmp_path: Path) -> None:
    hard = dict(PASSES_SCHEDULE="0:1, 0.5:2", LOG_DIR="/x/seed=0/b c", SEED="7", USE_PERI_NORM="1")
    path = tmp_path / "train.log"
    path.write_bytes(old_log(b"import math\n", " ".join(f"{k}={v}" for k, v in hard.items())))
    assert common.read_log(path).settings() == hard
    typed = dict(passes_schedule="0:1, 0.5:2", log_dir="/x/A=1 B=2", seed=7, use_peri_norm=True)
    path.write_bytes(new_log(b"import math\n", typed))
    assert common.read_log(path).config == typed
    assert common.read_log(path).settings()["USE_PERI_NORM"] == "1"


def test_a_script_that_was_changed_in_its_log_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    told: list[str] = []
    path.write_bytes(new_log(b"import math\n", dict(seed=1)).replace(b"math", b"nath"))
    log = common.read_log(path, told.append)
    assert log.script is None and told == [
        f"{path}:1: the script in this log is not the one that it names"
    ]
    assert log.settings() == {"SEED": "1"}, "the rest is read all the same"


def test_committed_logs_of_the_older_form_are_read() -> None:
    folder = next((common.ROOT / "records" / "track_non_record_16mb").iterdir())
    for path in folder.glob("*.log"):
        log = common.read_log(path)
        assert log.script == (folder / "train_gpt.py").read_bytes()
        assert log.settings()["SEED"] in path.name


DAMAGED = """{"step": 1, "train_seconds": 0.5}
{"step": 2, "train_sec
[1]
{"step": "3", "train_seconds": 1}

{"step": 4, "train_seconds": 2}
{"step": 5, "tra{"step": 6, "train_seconds": 3}
{"step": 7, "tra"""


def test_damaged_lines_are_named_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    told: list[str] = []
    path.write_text(DAMAGED)
    assert [row["step"] for row in common.read_metrics(path, told.append)] == [1, 4, 6]
    assert told == [f"{path}:{n}: a damaged line is left out" for n in (2, 3, 4, 7, 8)]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"a": 1'])
def test_a_damaged_result_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(data)
    with pytest.raises(tg.InputError, match="result.json is damaged"):
        common.read_result(tmp_path / "result.json")


def test_a_shard_is_one_that_the_script_opens(tmp_path: Path) -> None:
    tokens = np.arange(100)
    common.write_shard(tmp_path / "new" / "fineweb_val_000000.bin", tokens)
    opened = tg.open_shard(tmp_path / "new" / "fineweb_val_000000.bin")
    assert np.array_equal(opened, tokens)


def test_scripts_are_loaded_anew(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("kept = []\ndef keep(): kept.append(1)\n")
    one, other = common.load_script(path), common.load_script(path)
    one.keep()
    assert other.kept == [] and not (tmp_path / "__pycache__").exists()
    assert one.keep.__code__ is not other.keep.__code__, "torch.compile would share its graphs"


@pytest.mark.parametrize("words", [["A"], ["=1"]])
def test_what_is_no_pair_is_refused(words: list[str]) -> None:
    assert common.pairs(["A=1", "B=x=y"]) == {"A": "1", "B": "x=y"}
    with pytest.raises(tg.InputError, match="is not KEY=VALUE"):
        common.pairs(words)


@pytest.mark.parametrize("full", [True, False], ids=["full disk", "closed pipe"])
def test_output_that_nobody_reads_does_not_end_the_work(full: bool) -> None:
    code = (
        "from records.tools import common\n"
        "for i in range(3): common.say(str(i))\n"
        "common.warn('done')\n"
    )
    out, command = nobody_reads(full), [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=common.ROOT, stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    assert (done.returncode, done.stderr) == (0, "warning: done\n")


def test_who_waited_for_a_file_holds_the_one_that_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / "file", fcntl.flock

    def late(file: IO[bytes], how: int) -> None:
        """It is had only once the process that had it before has replaced the file."""
        monkeypatch.setattr(fcntl, "flock", flock)
        tg.write_atomically(path, b"new")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with common.alone_with(path), open(path) as file:
        assert file.read() == "new"
        with pytest.raises(BlockingIOError):
            flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("given", [0, [2, 0]])
def test_a_number_that_is_too_small_is_named(given: object) -> None:
    options = argparse.Namespace(val_tokens=given)
    with pytest.raises(tg.InputError, match="^--val-tokens 0 is below 1$"):
        common.require_at_least(options, val_tokens=1)
    common.require_at_least(options, val_tokens=0)


def test_what_differs_is_named_with_both_values() -> None:
    ours, theirs = dict(A="1", B="2", C=""), dict(A="1", B="3", C="x", D="4")
    told = ["B is 2 and 3", "C is (empty) and x", "D is unset and 4"]
    assert common.differences(ours, theirs) == told
    assert common.differences(ours, ours) == []
    assert common.listed(told) == ", ".join(told)
    assert common.listed(told, most=1) == "B is 2 and 3, and 2 more"


def test_ctrl_c_ends_a_tool_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: None) -> int:
        raise KeyboardInterrupt

    assert common.run_tool(work, None) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_tables_and_times_read_well() -> None:
    assert common.markdown_table(["a", "b"], [[1, "x|y"]]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | x/y |",
    ]
    assert [common.duration(s) for s in (7, 90, 3700)] == ["7 s", "2 min", "1 h 2 min"]
