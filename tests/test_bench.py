"""records/bench.py: it times only what computes the same, and it says what it measured."""
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_gpt as tg
from records import bench

SMALL = dict(MODEL_DIM="32", NUM_HEADS="4", NUM_KV_HEADS="2", VOCAB_SIZE="64", TRAIN_SEQ_LEN="160",
             TRAIN_BATCH_TOKENS="640", MICRO_BATCH_TOKENS="320")


def small(preset: str, **variables: str) -> tg.Config:
    return tg.Config.from_env(dict(PRESET=f"{preset},tiny") | SMALL | variables)


@pytest.mark.parametrize("preset", ["T", "K", "J", "Bp", "C", "E"])
def test_gate_passes_for_what_the_plain_model_implements(preset: str) -> None:
    bench.gate(small(preset))


def other_softcap(plain: bench.PlainTrainer) -> None:
    plain.model.a = tg.replace(plain.model.a, logit_softcap=15.0)


def other_weight(plain: bench.PlainTrainer) -> None:
    plain.model.blocks[0].up.weight.data[0, 0] += 0.1


def frozen_table(plain: bench.PlainTrainer) -> None:
    plain.model.beta.register_hook(torch.zeros_like)


def not_finite(plain: bench.PlainTrainer) -> None:
    plain.model.beta.register_hook(lambda gradient: gradient * float("nan"))


def other_iteration(plain: bench.PlainTrainer) -> None:
    plain.optimizers[1].steps = 4


def other_rate(plain: bench.PlainTrainer) -> None:
    plain.optimizers[0].param_groups[0]["lr"] *= 1.01


@pytest.mark.parametrize(
    "spoil", [other_softcap, other_weight, frozen_table, not_finite, other_iteration, other_rate])
def test_gate_fails_for_another_model_or_optimizer(
        spoil: Callable[[bench.PlainTrainer], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: object, **kwargs: object) -> tuple[tg.Trainer, bench.PlainTrainer]:
        ours, plain = make_pair(*args, **kwargs)
        spoil(plain)
        return ours, plain

    make_pair = bench.make_pair
    monkeypatch.setattr(bench, "make_pair", spoiled)
    with pytest.raises(bench.Mismatch):
        bench.gate(small("T"))


@pytest.mark.parametrize("preset", ["Ap", "L", "P", "S"])
def test_other_architectures_are_refused(preset: str) -> None:
    with pytest.raises(ValueError, match="does not implement"):
        bench.gate(small(preset))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    variables = [f"{name}={value}" for name, value in SMALL.items()]
    argv = ["bench.py", "--set", *variables, "--steps", "2", "--warmup", "1", *words]
    monkeypatch.setattr(sys, "argv", argv)
    return bench.main()


def test_command_prints_and_writes_the_figures(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "x.json"
    assert run(monkeypatch, "--out", str(path)) == 0
    result = json.loads(path.read_text())
    for name in ("ours", "plain"):
        total, split = result[name]["step_ms"]["median"], ("forward_backward_ms", "optimizer_ms")
        assert total == pytest.approx(sum(result[name][kind]["median"] for kind in split), rel=1e-3)
        assert result[name]["tokens_per_second"] == pytest.approx(640e3 / total, abs=1)
        assert len(result[name]["every_step_ms"]) == 2
    assert result["ours"]["last_loss"] == pytest.approx(result["plain"]["last_loss"], abs=0.1)
    assert "plain / ours" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "reason"), [
    (["--set", "NUM_HEAD=4"], "NUM_HEAD"),
    (["--set", "NO_SUCH_OPTION=4"], "NO_SUCH_OPTION"),
    (["--preset", "naive,tiny"], "NUM_SHARED"),
])
def test_command_times_nothing_it_was_not_asked_for(
        words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, *words) == 2
    out, error = capsys.readouterr()
    assert "plain / ours" not in out
    assert reason in error
