"""The rules of conftest.py, tried on tests of their own: threads, signal handlers, Ctrl-C."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest
from helpers import HANG, ROOT, clean_environment, fork_ranks, wait_for

HANDLERS = """
import os
import signal

import torch

import train_gpt


def test_one_number_of_threads():
    assert torch.get_num_threads() == 3
    assert os.environ["MKL_NUM_THREADS"] == "3" and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    torch.set_num_threads(1)


def test_that_replaces_handlers():
    assert torch.get_num_threads() == 3
    train_gpt.World({}, device="cpu").handle_signals()
    assert signal.getsignal(signal.SIGINT) != signal.default_int_handler


def test_handlers_are_back():
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""
# A run in the test process, or one on forked ranks, that lasts until it is interrupted.
ENDLESS = """
import time
from pathlib import Path

import helpers
import pytest

import train_gpt

HERE = Path(__file__).parent


def last(*_):
    (HERE / "begun").touch()
    time.sleep(10 * helpers.HANG)


def test_a_run_here(main_here, monkeypatch):
    monkeypatch.setattr(train_gpt, "run", last)
    main_here({})


def test_ranks():
    helpers.fork_ranks({"LOG_DIR": str(HERE)}, 2, last)


def test_that_must_not_begin():
    (HERE / "too far").touch()
"""


def begin(folder: Path, text: str, *words: str, threads: str = "1") -> subprocess.Popen[str]:
    """Runs a file of tests under our rules, as a terminal would: a process group that hears it.

    With plain assertions: nobody reads what they say, and pytest would rewrite all of Hypothesis.
    """
    (folder / "test_child.py").write_text(text)
    env = clean_environment() | {"OMP_NUM_THREADS": threads}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, "--assert=plain", *words, "test_child.py"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alive(group: int) -> list[str]:
    """Processes of a group that have not ended; one that nobody waits for is a zombie, Z."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, process_group = rest.split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(name)
    return found


def interrupted(folder: Path, text: str, *words: str, threads: str = "1") -> str:
    """What a file of tests says that Ctrl-C ends amid a run; nobody is left."""
    child = begin(folder, text, *words, threads=threads)
    wait_for((folder / "begun").exists, "no run began")
    os.killpg(child.pid, signal.SIGINT)
    said, _ = child.communicate(timeout=HANG)
    assert child.returncode == pytest.ExitCode.INTERRUPTED and "KeyboardInterrupt" in said, said
    assert not (folder / "too far").exists()
    wait_for(lambda: not alive(child.pid), f"these outlive the tests: {alive(child.pid)}")
    return said


@pytest.mark.bits
def test_threads_handlers_and_ctrl_c(tmp_path: Path) -> None:
    """The last one amid a run in the test process, behind tests that have replaced handlers."""
    words = "-k", "threads or handlers or run_here or begin"
    said = interrupted(tmp_path, HANDLERS + ENDLESS, *words, threads="3")
    assert "3 passed" in said and "failed" not in said, said


@pytest.mark.bits
@pytest.mark.parametrize("words", [("-k", "ranks or begin"), ("-n", "1")], ids="".join)
def test_ctrl_c_ends_the_tests(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Amid a run on forked ranks, and in a process of xdist's."""
    interrupted(tmp_path, ENDLESS, *words)


def sleep() -> int:
    """A rank that does not end by itself."""
    time.sleep(10 * HANG)
    return 0


def test_ctrl_c_while_ranks_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank runs, the second is half started: both are ended, and the tests as well."""
    sent: list[Any] = []
    send = reduction.sendfds

    def interrupted(*given: Any) -> None:
        sent.append(given)
        if len(sent) == 2:
            signal.raise_signal(signal.SIGINT)
        send(*given)

    monkeypatch.setattr(reduction, "sendfds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fork_ranks({"LOG_DIR": str(tmp_path)}, 2, sleep)
    assert len(sent) == 2 and not multiprocessing.active_children()
