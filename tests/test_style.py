"""What ruff and mypy say of every Python file (.ruff.toml, .mypy.ini), and rules of the files."""

import json
import re
import subprocess
import sys
from pathlib import Path

from helpers import HANG, ROOT

PATHS = ("train_gpt.py", "data", "records/tools", "tests")


def test_format_lint_and_types() -> None:
    """Run by hand: ruff format . ; ruff check . ; mypy train_gpt.py data records/tools tests"""
    said = []
    for words in (("ruff", "format", "--check"), ("ruff", "check"), ("mypy",)):
        command = [sys.executable, "-m", *words, *PATHS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
        if done.returncode:
            said.append(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    assert not said, "\n".join(said)


def test_no_test_gives_a_process_so_many_seconds() -> None:
    """A machine may be slow: what waits for another process waits for HANG."""
    number = re.compile(r"timeout=\d|\.(wait|join|communicate|result)\(\d")
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        lines = path.read_text().splitlines()
        found += [f"{path.name}: {line.strip()}" for line in lines if number.search(line)]
    assert not found


def test_records_name_no_folder_of_a_machine() -> None:
    """Where a run read and wrote is told relative to the repository."""
    found = []
    for path in ROOT.glob("records/**/result.json"):
        config = json.loads(path.read_text())["config"]
        places = [config[name] for name in ("data_path", "tokenizer_path", "log_dir")]
        found += [f"{path.relative_to(ROOT)}: {place}" for place in places if place[:1] == "/"]
    assert not found
