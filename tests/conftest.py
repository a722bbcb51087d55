"""Rules for every test: threads, signal handlers, workers; and a small real corpus."""

import os
import sys
from pathlib import Path

# Sums depend on the number of threads, so "the same run to the last bit" needs one number for this
# process, for the ranks it forks and for the scripts it starts; PyTorch reads it at import.
# PASSIVE: a thread that waits for another one sleeps. Otherwise two processes with two threads each
# on two cores slow one another twentyfold.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fcntl
import gc
import shutil
import signal
import sysconfig
from collections.abc import Callable, Generator, Iterator, Mapping

import numpy as np
import pytest
import sample
import torch
from helpers import NAMES, ON_CPU, THREADS, default_signals, write_manifest
from hypothesis import HealthCheck, settings

import train_gpt as tg

torch.set_num_threads(THREADS)
default_signals()  # what a test starts inherits them; a shell's background job ignores SIGINT
# No example has a time limit: a loaded machine is no fault of the code.
settings.register_profile("any load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any load")


def pytest_xdist_auto_num_workers() -> int:
    """Processes of `-n auto`: with their threads they are as many as the processors."""
    return max(1, len(os.sched_getaffinity(0)) // THREADS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, bool | None, bool | None]:
    """Puts back what a test, or a fixture before it, has replaced: signal handlers and threads.

    A run of the script in this process may install handlers; left there, Ctrl-C would end no test.
    """
    handlers = {number: signal.getsignal(number) for number in tg.STOP_SIGNALS}
    try:
        return (yield)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True, scope="session")
def less_to_wait_for() -> Iterator[None]:
    """Leaves out what costs every run in a test process time, and shows no test anything.

    A full collection walks all that the tests have imported. Files are synced to outlast a loss of
    power.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda generation=2: 0)
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws from PyTorch's global generator is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def main_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], int]:
    """Runs the script's `main` in this process with these variables; its exit code.

    It gets no signals: Ctrl-C is to end the tests, not one run of them.
    """

    def run(env: Mapping[str, str]) -> int:
        with monkeypatch.context() as patch:
            for name in NAMES:
                patch.delenv(name, raising=False)
            for name, value in (ON_CPU | dict(env)).items():
                patch.setenv(name, value)
            patch.setattr(tg.World, "handle_signals", lambda world: None)
            return tg.main()

    return run


def shortened(source: Path, folder: Path, counts: Mapping[str, int]) -> None:
    """Fills a folder with so many tokens of the splits of `source`, and a manifest."""
    for split, count in counts.items():
        path = source / f"fineweb_{split}_000000.bin"
        header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", count, offset=1024)
        header[2] = count
        (folder / path.name).write_bytes(header.tobytes() + tokens.tobytes())
    write_manifest(folder, source.parents[1] / "tokenizers" / "sample_1024_bpe.model")


@pytest.fixture(scope="session")
def source_code(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a third of Python's standard library, which no test writes to.

    The first process of xdist's that needs them builds them for all: it takes seconds.
    """
    shared = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):  # one of xdist's, whose folder is in the session's
        shared = shared.parent
    root, source = shared / "source_code", shared / "standard_library"
    folder = root / "datasets" / "sample_sp1024"
    with open(shared / "source_code.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "manifest.json").exists():  # which is written last
            copy_standard_library(source)
            sample.build(root, source, 1024)
    return folder


def copy_standard_library(source: Path) -> None:
    """A third of its files, also where one begun before did not come to its end."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in [*stdlib.glob("*.py"), *stdlib.glob("[a-e]*/*.py")]:
        copy = source / path.relative_to(stdlib)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


@pytest.fixture(scope="session")
def corpus(source_code: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables that point a run at 60,000 training and 2,001 validation tokens of source code."""
    folder = tmp_path_factory.mktemp("corpus")
    shortened(source_code, folder, dict(train=60_000, val=2_001))
    tokenizer = source_code.parents[1] / "tokenizers" / "sample_1024_bpe.model"
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(tokenizer)}


@pytest.fixture(scope="session")
def more_validation(
    source_code: Path, corpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same with 5,001 validation tokens: the first 2,000 are little like those of training."""
    folder = tmp_path_factory.mktemp("more_validation")
    shortened(source_code, folder, dict(train=60_000, val=5_001))
    return corpus | {"DATA_PATH": str(folder)}


@pytest.fixture(scope="session")
def few_tokens(
    source_code: Path, corpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same with 177 validation tokens, for tests that ask only whether they are scored.

    In windows of 32 or 64 they end in part of a batch, and in part of a window.
    """
    folder = tmp_path_factory.mktemp("few_tokens")
    shortened(source_code, folder, dict(train=60_000, val=177))
    return corpus | {"DATA_PATH": str(folder)}
