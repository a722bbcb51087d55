"""data/shards.py: the same shards and the same bytes as train_gpt.py, and what all tools share."""

import ast
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch

import train_gpt as tg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import packages
import sample
import shards
from shards import InputError

DATA = Path(shards.__file__).parent
TEXTS = ["import os  # \u65e5\u672c \U0001f600\n\tx = 1\n", "def f(x): return x ** 2\n"] * 40
TOOLS = ("sample.py", "make_shards.py", "fineweb.py")
NEEDED = {"make_shards.py": ["text.txt", "--out", "made"]}  # arguments without which it ends

# ---- The same format and the same rule as in train_gpt.py


def folding(**options: Any) -> bytes:
    """A model trained with SentencePiece's own normalisation, which the sample's lacks."""
    model = BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


MODELS = {
    "sample": lambda: sample.train_tokenizer(TEXTS, 320),
    "folding": folding,
    "no dummy prefix": lambda: folding(add_dummy_prefix=False, remove_extra_whitespaces=False),
    "symbols": lambda: folding(user_defined_symbols=["\u2581\u2581x", "return"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_every_pair_of_tokens_are_those_of_the_script(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODELS[name]())
    sp = shards.load_tokenizer(path)
    ours, size = shards.ByteTable.of(sp), len(sp)
    theirs = tg.ByteCounter.from_sentencepiece(path, size)
    previous, token = np.repeat(np.arange(size), size), np.tile(np.arange(size), size)
    expected = theirs.count(torch.from_numpy(previous), torch.from_numpy(token))
    assert np.array_equal(ours.of_tokens(previous, token), expected.numpy())
    encoded = sp.encode(TEXTS[:2])
    stream = np.array([token for ids in encoded for token in (shards.BOS, *ids)])
    size_of_text = sum(len(sp.decode(ids).encode()) for ids in encoded)
    assert ours.of_stream(stream).sum() == size_of_text


def damaged() -> dict[str, bytes]:
    whole = shards.encode_shard(np.arange(5))
    return {
        "whole": whole,
        "empty": b"",
        "no tokens": shards.encode_shard(np.arange(0)),
        "header only": whole[:1024],
        "cut header": whole[:600],
        "cut": whole[:-1],
        "too long": whole + b"\0\0",
        "other kind": b"\1" + whole[1:],
        "other version": whole[:4] + b"\2" + whole[5:],
        "negative": whole[:8] + b"\xff\xff\xff\xff" + whole[12:],
    }


@pytest.mark.parametrize("name", damaged())
def test_shards_are_opened_as_the_script_opens_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(damaged()[name])
    if name == "whole":
        assert shards.open_shard(path).tolist() == tg.open_shard(path).tolist() == [*range(5)]
        return
    with pytest.raises(tg.InputError):
        tg.open_shard(path)
    with pytest.raises(InputError, match=str(path)):
        shards.open_shard(path)


def test_numbers_of_shards_have_one_width() -> None:
    assert shards.shard_name("val", 999_999) == "fineweb_val_999999.bin"
    with pytest.raises(InputError, match="more than 1,000,000 files"):
        shards.shard_name("val", 1_000_000)


# ---- Strays

EXPECTED = ["fineweb_val_000000.bin", "fineweb_train_000000.bin", "fineweb_train_000001.bin"]
STRAYS = {
    "fineweb_val_000000 (1).bin": "is not named like a shard",
    "fineweb_val_0000000.bin": "is not named like a shard",
    "fineweb_test_000000.bin": "is not named like a shard",
    "fineweb_val_000001.bin": "is no shard of this validation split",
    "fineweb_train_000003.bin": "is there, fineweb_train_000002.bin is not",
    "fineweb_train_000002.bin": "",  # of an earlier run that asked for more
    "fineweb_val_000000.bin.tmp": "",
    "notes.bin": "",
}


@pytest.mark.parametrize("name", STRAYS)
def test_files_that_a_reader_would_take_for_shards_are_named(tmp_path: Path, name: str) -> None:
    shards.refuse_strays(tmp_path, EXPECTED)
    for there in (*EXPECTED, name):
        (tmp_path / there).touch()
    if not STRAYS[name]:
        shards.refuse_strays(tmp_path, EXPECTED)
        return
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / name} {STRAYS[name]}")):
        shards.refuse_strays(tmp_path, EXPECTED)


def test_split_that_cannot_be_scored_is_refused() -> None:
    shards.check_split("val", 3, 1)
    with pytest.raises(InputError, match="val has 4 tokens and not one byte of text"):
        shards.check_split("val", 4, 0)
    with pytest.raises(InputError, match="train has only 2 tokens"):
        shards.check_split("train", 2, 1)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "shard.bin"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        shards.write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# ---- Requirements


def imported(tool: Path) -> set[str]:
    """Modules of others that a tool imports anywhere, by way of its neighbours too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(tool.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    others: set[str] = set()
    for name in found:
        if (tool.parent / f"{name}.py").exists():
            others |= imported(tool.parent / f"{name}.py")
        elif name not in sys.stdlib_module_names:
            others.add(name)
    return others


def required(requirements: Path) -> set[str]:
    """Names of the packages of a requirements file."""
    lines = [re.split(r"[<>=!~\[; ]", line)[0] for line in requirements.read_text().splitlines()]
    return {line.lower().replace("_", "-") for line in lines if line and line[0] not in "#-"}


def distributions(modules: set[str]) -> set[str]:
    """Packages that have the modules."""
    owners = importlib.metadata.packages_distributions()
    return {owners[module][0].lower().replace("_", "-") for module in modules}


@pytest.mark.parametrize("tool", TOOLS)
def test_requirements_cover_what_a_tool_imports(tool: str) -> None:
    needed = distributions(imported(DATA / tool))
    assert "numpy" in needed
    assert needed <= required(DATA / "requirements.txt")
    assert "torch" not in needed, "a machine that fetches or makes data needs none"
    if tool == "sample.py":  # README: the sample needs no further package
        assert needed <= required(DATA.parent / "requirements.txt")


def test_every_requirement_is_needed() -> None:
    needed = set().union(*(imported(DATA / tool) for tool in TOOLS))
    assert required(DATA / "requirements.txt") == distributions(needed)


@pytest.mark.parametrize("tool", TOOLS)
def test_missing_package_is_one_line(tmp_path: Path, tool: str) -> None:
    """Each package of a tool in turn is one that cannot be found."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == os.environ['HIDDEN']:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    for name in imported(DATA / tool) - {"pyarrow"}:  # which is imported when it is needed
        env = os.environ | {"HIDDEN": name, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, str(DATA / tool), *NEEDED.get(tool, [])]
        result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2, name
        python, requirements = map(re.escape, (shlex.quote(sys.executable), f"{DATA.parent}/"))
        assert re.fullmatch(
            rf"{tool}: the package {name} is missing: "
            rf"{python} -m pip install -r {requirements}(data/)?requirements.txt\n",
            result.stderr,
        ), result.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_help_needs_no_package(tool: str) -> None:
    """-S: Python does without what is installed."""
    command = [sys.executable, "-S", str(DATA / tool), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: {tool} ")


@pytest.mark.parametrize(
    ("python", "written"),
    [
        ("my venv/bin/python", "'my venv/bin/python'"),
        ("python", "'{here}/python'"),
        ("/opt/elsewhere/python3", "/opt/elsewhere/python3"),
    ],
)
def test_commands_name_the_python_that_runs(
    python: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment need not be activated. A bare name would be another Python."""
    here = tmp_path / "a folder"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "executable", str(here / python))
    assert packages.python() == written.format(here=here)


def test_a_run_without_data_names_the_python_that_runs() -> None:
    with pytest.raises(tg.InputError) as told:
        tg.Tokens(tg.Config(data_path="nowhere"), "val")
    for tool in ("sample.py", "fineweb.py"):
        assert f"`{shlex.quote(sys.executable)} data/{tool}`" in str(told.value)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_without_docstrings(tool: str) -> None:
    """python -OO removes them. The help has a whole sentence for every option."""
    command = [sys.executable, "-OO", str(DATA / tool), "--help"]
    env = os.environ | {"COLUMNS": "80"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    options = re.split(r"\n  (?=-)", result.stdout.split("options:")[1])[1:]
    assert len(options) >= 3
    for option in options[1:]:  # the first is argparse's own --help
        assert re.search(r"[A-Z][^.]*.*\.\s*$", option, re.DOTALL), option
    assert max(map(len, result.stdout.splitlines())) <= 80
