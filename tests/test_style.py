"""What ruff and mypy say of every Python file; .ruff.toml and .mypy.ini say what they look for."""

import subprocess
import sys

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
