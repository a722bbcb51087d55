"""A run of several steps against its optimizers written out in float64: every weight, every step.

Everything is on that the optimizers have: rows normalised before Newton-Schulz, clipping of the
averaged gradient, decay by role, and momentum, learning rate and passes by fractions of the run;
in one run a smaller rate of the core, too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import ManualTime, no_score, one_rank, role_name, write_shards
from numpy.typing import NDArray
from torch import Tensor

import train_gpt as tg

Array = NDArray[np.float64]
SECONDS = (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)  # of every step: 14 in all
CAP = 16.0  # at which a step more would end
ENV = dict(
    VOCAB_SIZE="32",
    MODEL_DIM="16",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    NUM_SHARED="1",
    NUM_LOOPS="2",
    MLP_MULT="3",
    PASS_SCALE_INIT="0.5",
    PASSES_SCHEDULE="0:1,0.3:2",
    TRAIN_SEQ_LEN="12",
    DTYPE="float32",
    TRAIN_BATCH_TOKENS="48",
    MICRO_BATCH_TOKENS="24",
    ITERATIONS="1000",
    MAX_WALLCLOCK_SECONDS=str(CAP),
    WARMUP_STEPS="0",
    VAL_LOSS_EVERY="0",
    TRAIN_LOG_EVERY="1",
    DEVICE="cpu",
    MATRIX_LR="0.03",
    TIED_EMBED_LR="0.02",
    SCALAR_LR="0.01",
    MUON_WD="0.9",
    ADAM_WD="0.8",
    SCALAR_WD="0.7",
    GRAD_CLIP_NORM="0.3",
    MUON_ROW_NORM="1",
    MUON_MOMENTUM="0.99",
    MUON_MOMENTUM_WARMUP_START="0.92",
    MUON_MOMENTUM_WARMUP_FRACTION="0.4",
    WARMDOWN_FRACTION="0.75",
    LR_FLOOR="0.4",
    AVERAGE="ema",
    EMA_DECAY="0.8",
)
POLAR = np.array(
    [
        [8.156554, -22.483293, 15.878770],
        [4.042930, -2.808917, 0.500018],
        [3.891668, -2.772484, 0.506065],
        [3.285754, -2.368129, 0.464490],
        [2.346541, -1.709783, 0.423236],
    ]
)
ALIKE = np.array([[3.4445, -4.7750, 2.0315]] * 5)
RATES = {"matrix": 0.03, "core matrix": 0.03, "tied embedding": 0.02, "table": 0.01, "scalar": 0.01}
DECAYS = {"matrix": 0.9, "core matrix": 0.9, "tied embedding": 0.8, "table": 0.7, "scalar": 0.7}


def orthogonalised(u: Array, coefficients: Array) -> Array:
    """Rows normalised, then five iterations on the wide form."""
    u = u / np.maximum(np.sqrt((u * u).sum(1, keepdims=True)), 1e-7)
    x = u / (np.sqrt((u * u).sum()) + 1e-7)
    if len(x) > x.shape[1]:
        x = x.T
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if x.shape == u.shape else x.T


class Reference:
    """The weights, moments and average of a run; `step` makes one update of all of them."""

    def __init__(self, model: tg.GPT, coefficients: Array, core_power: float) -> None:
        named = dict(model.named_parameters())
        self.roles = {name: role_name(p) for name, p in named.items()}
        self.parts = {name: [len(part) for part in tg.parts_of(p)] for name, p in named.items()}
        self.weights = {name: p.detach().double().numpy().copy() for name, p in named.items()}
        self.velocity = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.first = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.made = dict.fromkeys(self.weights, 0)  # updates by Adam, of each
        self.average: dict[str, Array] = {}
        self.coefficients, self.core_power = coefficients, core_power

    def step(self, gradients: Mapping[str, Array], fraction: float, passes: int) -> None:
        """`fraction` of the run is behind; a parameter without a gradient stays as it is."""
        norm = np.sqrt(sum((g * g).sum() for g in gradients.values()))
        assert norm > 0.31, "it is clipped"
        factor = max(min((1 - fraction) / 0.75, 1.0), 0.4)
        momentum = 0.92 + 0.07 * min(fraction / 0.4, 1.0)
        for name, gradient in gradients.items():
            role, g = self.roles[name], gradient * 0.3 / (norm + 1e-6)
            lr = RATES[role] * factor
            if role == "core matrix":
                lr *= passes**-self.core_power
            decays = g != 0 if role in ("table", "scalar") else 1  # where it is used
            self.weights[name] *= 1 - lr * DECAYS[role] * decays
            if "matrix" in role:
                self.weights[name] -= lr * self.by_muon(name, g, momentum)
            else:
                self.weights[name] -= lr * self.by_adam(name, g)
        before = self.average or self.weights
        self.average = {name: 0.8 * before[name] + 0.2 * w for name, w in self.weights.items()}

    def by_muon(self, name: str, g: Array, momentum: float) -> Array:
        v = self.velocity[name]
        v[:] = momentum * v + g
        moved = []
        for u in np.split(g + momentum * v, np.cumsum(self.parts[name])[:-1]):
            factor = max(1.0, len(u) / u.shape[1]) ** 0.5
            moved.append(factor * orthogonalised(u, self.coefficients))
        return np.concatenate(moved)

    def by_adam(self, name: str, g: Array) -> Array:
        self.made[name] += 1
        t, m, v = self.made[name], self.first[name], self.second[name]
        m[:], v[:] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        return m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)


def mean_gradients(
    model: tg.GPT, micro: Iterable[tuple[Tensor, Tensor]], mode: tg.Mode
) -> dict[str, Array]:
    """Of the loss over all sequences of a step together; of what the mode uses."""
    ids, targets = (torch.cat(tensors) for tensors in zip(*micro))
    named = dict(model.named_parameters())
    unused = {id(p) for p in model.core.unused_in_one_pass()} if mode.passes == 1 else set()
    used = {name: p for name, p in named.items() if id(p) not in unused}
    found = torch.autograd.grad(model(ids, targets, mode), list(used.values()))
    return {name: g.double().numpy() for name, g in zip(used, found)}


class Watch(NamedTuple):
    """What a run is compared with, and what was seen of it."""

    reference: Reference
    modes: list[int]

    def check(self, trainer: tg.Trainer) -> None:
        names = [name for name, _ in trainer.model.named_parameters()]
        pairs: list[tuple[dict[str, Array], Sequence[Tensor]]]
        pairs = [(self.reference.weights, trainer.params)]
        if trainer.average.count:
            pairs.append((self.reference.average, trainer.average.weights))
        for expected, found in pairs:
            for name, p in zip(names, found, strict=True):
                np.testing.assert_allclose(
                    p.detach().numpy(), expected[name], rtol=0, atol=3e-5, err_msg=name
                )


def watched(
    train_step: Callable[..., None], watch: Watch, clock: ManualTime
) -> Callable[..., None]:
    """`Trainer.train_step` beside the reference, with steps that take SECONDS."""

    def step(trainer: tg.Trainer, number: int, seconds: float, micro: Any, mode: tg.Mode) -> None:
        watch.check(trainer)
        micro, passed = list(micro), sum(SECONDS[:number])
        gradients = mean_gradients(trainer.model, micro, mode)
        watch.reference.step(gradients, passed / CAP, mode.passes)
        watch.modes.append(mode.passes)
        train_step(trainer, number, seconds, micro, mode)
        clock.now += SECONDS[number]

    return step


@pytest.mark.parametrize("polar, core_power", [(False, 0.0), (True, 0.5)])
def test_every_weight_is_where_the_formulas_put_it(
    polar: bool, core_power: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(2).integers(2, 32, 800)
    paths = dict(DATA_PATH=str(write_shards(tmp_path, "train", ids)), LOG_DIR=str(tmp_path))
    given = {"MUON_POLAR": str(int(polar)), "CORE_LR_POWER": str(core_power)}
    config = tg.Config.from_env(ENV | paths | given)
    trainer = tg.make_trainer(config, one_rank())
    generator = torch.Generator().manual_seed(3)
    for p in trainer.params:  # as initialised, residual branches are zero and have no gradient
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    reference = Reference(trainer.model, POLAR if polar else ALIKE, core_power)
    watch, clock = Watch(reference, []), ManualTime()
    monkeypatch.setattr(tg, "time", clock)
    monkeypatch.setattr(tg.Trainer, "train_step", watched(tg.Trainer.train_step, watch, clock))
    log = tg.Log(tmp_path, True)
    checkpoints = tg.Checkpoints(config, trainer.world, trainer.batches.tokens.total, log)
    trainer.train(tg.Reporter(config, log), checkpoints, no_score)
    watch.check(trainer)
    assert trainer.step == trainer.average.count == 9
    assert watch.modes == [1] * 5 + [2] * 4
    assert set(watch.reference.roles.values()) == RATES.keys()
