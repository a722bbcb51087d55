"""What the tools share: the script as a module, a run's files, launching, what they print."""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import marshal
import os
import re
import signal
import socket
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = frozenset(name.upper() for name in tg.Config.__dataclass_fields__) | {"USE_DEPTH_EMBED"}
# FineWeb's validation split: PR 1289 decodes 151,073,604 bytes, PR 1804 counts 151,080,891, as
# tokenizers fold text a little differently.
FINEWEB_DOCUMENTS, FINEWEB_BYTES, FINEWEB_SPREAD = 50_000, 151_080_891, 30_000
BAR = "=" * 100  # ends the script in logs whose first line does not give its length


def warn(text: str) -> None:
    """Tells a person what is wrong but does not stop the work."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


# ---- 1. The script -------------------------------------------------------------------------------


def load_script(path: Path) -> types.ModuleType:
    """The script as a new module each time: what one keeps, the next does not know.

    Its source is what runs, never a cached file beside it. The newest module of a source takes the
    place of the one before, which lives as long as somebody uses it: an audit loads dozens.
    """
    source = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(source).hexdigest()[:16]}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up
    exec(marshal.loads(compiled(source, str(path))), module.__dict__)
    return module


@functools.lru_cache(maxsize=8)
def compiled(source: bytes, name: str) -> bytes:
    """The code of a source text that tracebacks call `name`, marshalled.

    Each module needs code objects of its own: torch.compile ties its graphs to them.
    """
    return marshal.dumps(compile(source, name, "exec"))


def without_options(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the script's options, which must not reach a run by accident."""
    return {name: value for name, value in environment.items() if name not in OPTIONS}


def pairs(words: Iterable[str]) -> dict[str, str]:
    """Words KEY=VALUE as a dictionary; InputError for any other word."""
    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise tg.InputError(f"{word!r} is not KEY=VALUE")
        found[name] = value
    return found


def add_settings(parser: argparse.ArgumentParser, help: str, name: str = "--set") -> None:
    """Gives a tool an option that takes words for `pairs`; given twice, it takes both lists."""
    parser.add_argument(
        name, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help
    )


def require_at_least(options: argparse.Namespace, **least: int) -> None:
    """InputError names an option, of one number or several, that is below its least value."""
    for name, low in least.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value < low:
                raise tg.InputError(f"--{name.replace('_', '-')} {value} is below {low}")


# ---- 2. A run's files ----------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_result(path: Path) -> dict[str, Any]:
    """The object in a JSON file such as result.json; InputError names the file if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise tg.InputError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise tg.InputError(f"{path} is damaged: it holds no JSON object")
    return value


def parse_row(text: bytes) -> dict[str, Any] | None:
    """What every line of metrics.jsonl is: an object with a step and a time; None for less."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return None
    return value if type(value.get("train_seconds")) in (int, float) else None


def read_metrics(path: Path, say: Callable[[str], None] = warn) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl. A damaged line is named with its number and left out.

    A disk that was full for a moment leaves half a line, and the next row right behind it, which is
    read; a run that is writing a line now leaves half a line at the end.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        row = parse_row(line)
        if row is None:
            say(f"{path}:{number}: a damaged line is left out")
            row = parse_row(line[line.rfind(b'{"step"') :])
        if row is not None:
            yield row


class RunLog(NamedTuple):
    """A train.log, or the log of a seed in a submission folder."""

    path: Path
    script: bytes | None  # as it ran, where the log carries it
    first: int  # number in the file, from 1, of lines[0]
    lines: list[str]  # what follows the script
    config: dict[str, Any]  # by names in lower case; values of JSON, in older logs text
    versions: dict[str, str]  # python, torch, ..., device, script_sha256

    def settings(self) -> dict[str, str]:
        """The configuration as variables of an environment would give it."""
        return {name.upper(): tg.show(value) for name, value in self.config.items()}

    @property
    def eval_only(self) -> str:
        """The artifact that the run scored again, training nothing; "" for a run that trained."""
        return str(self.config.get("eval_only", ""))

    def scored_only(self) -> str:
        """What is to be said of the folder of such a run where one that trained is needed."""
        return (
            f"{self.path.parent} is the folder of a run that only scored an artifact "
            f"(EVAL_ONLY={self.eval_only})"
        )


HEADER = re.compile(rb"script_bytes:(\d+) script_sha256:([0-9a-f]{64})\r?\n")
ENDS = re.compile(rb"={100}\r?\n")
OLD_OPTION = re.compile(r"([A-Z][A-Z0-9_]*)=(.*?)(?= [A-Z][A-Z0-9_]*=|$)")
VERSION = re.compile(
    r"(python|torch|numpy|sentencepiece|brotli|cuda|device|threads|script_sha256|packed_sha256)"
    r":(.*)"
)


def split_log(data: bytes, path: Path, say: Callable[[str], None]) -> tuple[bytes | None, int]:
    """The script at the beginning of a log, and the offset of what follows it.

    Newer logs give its length and hash first. In older ones, and in those of others, a line of 100
    "=" ends it: the one before which the bytes have the hash that the log gives, as a script may
    have such a line itself; without a hash the first.
    """
    if header := HEADER.match(data):
        end = header.end() + int(header[1])
        script = data[header.end() : end]
        if hashlib.sha256(script).hexdigest() == header[2].decode():
            return script, min(end + 1, len(data))
        say(f"{path}:1: the script in this log is not the one that it names")
        return None, header.end()
    told = re.search(rb"(?m)^script_sha256:([0-9a-f]{64})", data)
    ends = list(ENDS.finditer(data))
    for found in ends:
        script = data[: found.start()]
        if told and hashlib.sha256(script).hexdigest().encode() == told[1]:
            return script, found.end()
    if ends and re.search(rb"(?m)^(import|from) \w", data[: ends[0].start()]):
        return data[: ends[0].start()], ends[0].end()
    return None, 0


def read_config(lines: Sequence[str]) -> dict[str, Any]:
    """The configuration in the last line that gives one, by names in lower case; {} without one."""
    text = next((line[7:] for line in reversed(lines) if line.startswith("config:")), "")
    if not text.startswith("{"):
        return {name.lower(): value for name, value in OLD_OPTION.findall(text)}
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def read_log(path: Path, say: Callable[[str], None] = warn) -> RunLog:
    """A log in either form, or of others; what it does not have is None or empty."""
    data = path.read_bytes()
    script, at = split_log(data, path, say)
    lines = [line.rstrip("\r") for line in data[at:].decode(errors="replace").split("\n")]
    versions = {}
    if header := HEADER.match(data):
        versions["script_sha256"] = header[2].decode()
    for line in lines:
        if found := VERSION.fullmatch(line):
            versions[found[1]] = found[2]
    first = data.count(b"\n", 0, at) + 1
    return RunLog(path, script, first, lines, read_config(lines), versions)


# ---- 3. What tools make --------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """A shard of token ids in the contest's format."""
    header = np.zeros(tg.SHARD_HEADER_INTS, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def write_manifest(folder: Path, tokenizer: Path) -> None:
    """Names the tokenizer of a folder of shards, so that random tokens pass for text of it."""
    write_json(folder / "manifest.json", dict(tokenizer=dict(sha256=tg.file_hash(tokenizer))))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, as a whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tg.write_atomically(path, json.dumps(value, indent=1).encode() + b"\n")


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Waits until no other process is in such a block of the same file; makes an empty one.

    For files that are read, changed and replaced as a whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While this one waited, another may have put a new file in the place of this.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


def free_port() -> int:
    """A port of this machine on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(ranks: int) -> list[str]:
    """The words before a script's name that start it on so many ranks of this machine."""
    if ranks == 1:
        return [sys.executable]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *torchrun]


# ---- 4. What tools say ---------------------------------------------------------------------------


def silence(stream: TextIO) -> None:
    """Sends what a stream still holds, and all that follows, nowhere: its reader has gone."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # it is no file, as under a test
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def say(text: str, end: str = "\n", stream: TextIO | None = None) -> None:
    """Prints for people. A closed pipe or a full disk behind the output does not end the work."""
    stream = stream or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        silence(stream)


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The options in which two configurations differ, each with both its values."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        values = [side.get(name, "unset") or "(empty)" for side in (ours, theirs)]
        if values[0] != values[1]:
            found.append(f"{name} is {values[0]} and {values[1]}")
    return found


def listed(parts: Sequence[str], most: int = 8) -> str:
    """Parts of a sentence with commas between them; beyond `most`, how many more there are."""
    more = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return ", ".join([*parts[:most], *more])


def markdown_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table in Markdown; a "|" within a cell becomes "/"."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |")
    return lines


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def run_tool(work: Callable[[Any], int], given: Any) -> int:
    """The exit code of a command; what its user can mend is a line without a traceback, and 2."""
    try:
        return work(given)
    except (tg.InputError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return tg.EXIT_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT  # as a shell has it
