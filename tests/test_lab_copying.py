"""records/tools/copying.py: kinds of targets by definition, models that copy and that do not."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import run_here
from torch import Tensor
from torch.overrides import TorchFunctionMode

import train_gpt as tg
from records.tools import copying

SMALL = dict(
    PRESET="Bp,tiny",
    MODEL_DIM="32",
    TRAIN_SEQ_LEN="40",  # 50 windows of the corpus have every target
    TRAIN_BATCH_TOKENS="480",
    ITERATIONS="4",
    WARMDOWN_ITERS="2",
    WARMUP_STEPS="0",
)
PIECES = 512


def text(pieces: int, windows: int = 4, length: int = 40) -> copying.Windows:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(pieces, (windows, length + 1), generator=random)
    return copying.Windows(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("pieces", [2, 6, 40])
def test_kinds_are_those_of_the_definition(pieces: int) -> None:
    made = text(pieces)
    found = copying.kinds(made)
    for ids, targets, row in zip(*(part.tolist() for part in made), found.tolist()):
        for t, kind in enumerate(row):
            behind = [targets[s] for s in range(t) if ids[s] == ids[t]]
            expected = "copy" if targets[t] in behind else "change"
            assert copying.KINDS[kind] == (expected if behind else "new")


class Largest(TorchFunctionMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_pairs_of_places_are_compared_in_few_windows_at_a_time() -> None:
    with Largest() as largest:
        copying.kinds(text(6, 2 * copying.BATCH + 1))
    assert largest.elements == copying.BATCH * 40 * 40


def copier(able: bool) -> Any:
    """A model that is sure of what followed the same token the last time, if it is able to."""

    def hidden(ids: Tensor, mode: object) -> tuple[Tensor, float]:
        found = torch.zeros(*ids.shape, PIECES)
        for window, row in zip(ids.tolist(), found):
            last: dict[int, int] = {}
            for t, token in enumerate(window):
                if able and token in last:
                    row[t, last[token]] = 1.0
                if t + 1 < len(window):
                    last[token] = window[t + 1]
        return found, 0.0

    return SimpleNamespace(tok_emb=20 * torch.eye(PIECES), softcap=30.0, hidden=hidden, scoring=0)


@pytest.mark.parametrize("able", [True, False])
def test_a_model_that_copies_is_told(able: bool) -> None:
    random = copying.of_chance(PIECES, 64, 8)
    assert torch.equal(random.ids[:, :31], random.ids[:, 32:])
    found = copying.losses(copier(able), random)
    gain = float(found[:, :32].mean() - found[:, 32:].mean())
    assert gain > 3 if able else gain == pytest.approx(0, abs=1e-5)


def test_a_run_is_measured_as_it_was_scored(
    corpus: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score = run_here(corpus | SMALL, tmp_path)["roundtrip"]["val_loss"]
    argv = ["copying.py", str(tmp_path / "run"), "--windows", "100000"]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    assert copying.main() == 0
    told, _, *table = capsys.readouterr().out.splitlines()
    assert told == "Validation: 50 windows of 40 tokens.", "as many as there are"
    name, total, *_ = table[-1].strip("| ").split(" | ")
    assert name == f"{tmp_path.name} run" and float(total) == pytest.approx(score, abs=2e-3)
    (tmp_path / "run" / tg.ARTIFACT).unlink()
    assert copying.main() == 2
    assert f"run holds no {tg.ARTIFACT}" in capsys.readouterr().err
