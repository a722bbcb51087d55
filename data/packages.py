"""The Python that runs a tool, in commands for people, and what to do where a package is missing.

This module needs no package itself.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def near(path: Path) -> Path:
    """A path as people write it: relative to the current folder if it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def python() -> str:
    """The Python that runs now, as a shell finds it without an activated virtual environment."""
    path = near(Path(sys.executable))
    if path.parent == Path():  # a bare name would be looked up in PATH
        path = Path(sys.executable)
    return shlex.quote(str(path))


def advice(package: str, requirements: Path) -> str:
    """Which package is missing, and the command that installs it with the others of its file."""
    file = shlex.quote(str(near(requirements)))
    return f"the package {package} is missing: {python()} -m pip install -r {file}"


def complain(tool: str, package: str, requirements: Path) -> int:
    """Says that a package is missing, in a line; the exit code."""
    print(f"{tool}: {advice(package, requirements)}", file=sys.stderr)
    return 2
