"""What a tool says where a package is missing, instead of a traceback. It needs none itself."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "requirements.txt"
TOOLS = ROOT / "records" / "tools" / "requirements.txt"  # with those of training
OURS = ("records", "train_gpt")  # one of these is missing by a mistake of ours


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


@contextmanager
def told_if_missing(module: str, requirements: Path = TOOLS) -> Iterator[None]:
    """Ends a program whose imports find a package missing with a line and exit code 2.

    `module` is the __name__ of who imports: a module that is none of a program passes the error on.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if module != "__main__" or name in OURS:
            raise
        tool, file = Path(sys.argv[0]).name, shlex.quote(str(near(requirements)))
        print(
            f"{tool}: the package {name} is missing: {python()} -m pip install -r {file}",
            file=sys.stderr,
        )
        sys.exit(2)
