"""DATA_SEED: a random order of sequences, one for all ranks, shards and runs that are resumed."""

import os
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    HANG,
    data_config,
    flat,
    fork_ranks,
    losses,
    no_score,
    one_rank,
    stub_world,
    write_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt as tg

T = 4
Pair = tuple[Tensor, Tensor]


def batches(folder: Path, rank: int = 0, size: int = 1, **values: Any) -> tg.Batches:
    """Sixteen sequences of four tokens a step, from the shards in a folder."""
    given = dict(train_batch_tokens=64, micro_batch_tokens=64, data_seed=7) | values
    config = data_config(folder, **given)
    return tg.Batches(tg.Tokens(config, "train"), config, stub_world(rank, size))


def sequences(micro: Iterable[Pair]) -> list[tuple[int, ...]]:
    """The T + 1 tokens of every sequence of some micro-batches."""
    found = []
    for ids, targets in micro:
        for row, last in zip(ids.tolist(), targets.tolist()):
            assert row[1:] == last[:-1], "a target is the token that comes next"
            found.append((*row, last[-1]))
    return found


def steps(b: tg.Batches, first: int, end: int) -> list[tuple[int, ...]]:
    """The sequences of steps `first` to `end`."""
    return [sequence for step in range(first, end) for sequence in sequences(b.micro(step))]


STREAM = np.random.default_rng(0).permutation(65536)[:997]  # every token tells its place
PLACE = {int(token): place for place, token in enumerate(STREAM)}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    return write_shards(folder, "train", *np.split(STREAM, [100, 101, 700]))


# ---- The order


@pytest.mark.quick
@settings(max_examples=60)
@given(st.integers(T + 1, 300), st.integers(1, 2**64 - 1))
def test_every_sequence_of_an_epoch_comes_once(
    tmp_path_factory: pytest.TempPathFactory, total: int, seed: int
) -> None:
    """Three epochs: disjoint pieces of the split each, T apart, that leave out less than 2 T."""
    folder = write_shards(tmp_path_factory.mktemp("epoch"), "train", STREAM[:total])
    b = batches(folder, train_batch_tokens=T, micro_batch_tokens=T, data_seed=seed)
    count = max(total // T - 1, 1)
    for epoch in range(3):
        found = steps(b, epoch * count, (epoch + 1) * count)
        places = sorted(PLACE[sequence[0]] for sequence in found)
        first = places[0]
        assert places == [*range(first, first + count * T, T)]
        assert 0 <= first < T and first + count * T < total, "the last target is in the split"
        assert total - count * T <= 2 * T
        for sequence in found:
            place = PLACE[sequence[0]]
            assert sequence == tuple(STREAM[place : place + T + 1])


@pytest.mark.quick
def test_epochs_are_in_another_order_and_cut_elsewhere(stream: Path) -> None:
    b = batches(stream, train_batch_tokens=T, micro_batch_tokens=T)
    count = 997 // T - 1
    epochs = [[b.start(epoch * count + i) for i in range(count)] for epoch in range(12)]
    assert {min(epoch) for epoch in epochs} == {0, 1, 2, 3}
    orders = {tuple(start // T for start in epoch) for epoch in epochs}
    assert len(orders) == len(epochs) and tuple(range(count)) not in orders
    following = sum(b == a + T for epoch in epochs for a, b in zip(epoch, epoch[1:]))
    assert following < 0.03 * 12 * count, "next to one another by chance alone, 1 in 248"


@pytest.mark.quick
@pytest.mark.parametrize("micro", [4, 16, 1000])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_share_the_batches_of_one_rank(stream: Path, size: int, micro: int) -> None:
    """In every step, also where one epoch ends amid it; in order, micro-batch by micro-batch."""
    one = batches(stream)
    ranks = [batches(stream, rank, size, micro_batch_tokens=micro) for rank in range(size)]
    for step in range(40):  # two and a half epochs
        together = [s for parts in zip(*(r.micro(step) for r in ranks)) for s in sequences(parts)]
        assert together == sequences(one.micro(step))


@pytest.mark.quick
def test_shards_do_not_matter(stream: Path, tmp_path: Path) -> None:
    """One shard for eight ranks, and as many shards as there are hundreds of tokens."""
    expected = steps(batches(stream), 0, 20)
    for name, cuts in (("one", []), ("ten", range(100, 997, 100))):
        folder = write_shards(tmp_path / name, "train", *np.split(STREAM, cuts))
        assert steps(batches(folder), 0, 20) == expected
        parts = [sequences(batches(folder, rank, 8).micro(3)) for rank in range(8)]
        assert sum(parts, []) == expected[48:64]


@pytest.mark.quick
def test_a_step_is_the_same_whatever_was_read_before(stream: Path) -> None:
    """All that a run which goes on needs to know is its step."""
    b = batches(stream)
    through = [sequences(b.micro(step)) for step in range(40)]
    for step in (39, 0, 16, 15, 31):
        assert sequences(b.micro(step)) == through[step]
        assert sequences(batches(stream).micro(step)) == through[step]


@pytest.mark.quick
def test_the_order_follows_from_its_seed_alone(stream: Path) -> None:
    def of(**values: Any) -> list[tuple[int, ...]]:
        return steps(batches(stream, **values), 0, 3)

    assert of(data_seed=1) == of(data_seed=1, seed=3) != of(data_seed=2)
    assert sorted(of(data_seed=1)) != sorted(of(data_seed=2)), "not the same sequences"
    in_order = [s[0] for s in of(data_seed=0)]
    assert in_order == STREAM[: 48 * T : T].tolist()


# ---- Reading ahead


class Watched:
    """Stands in for Tokens.read: notes which thread reads, and lets a test wait for it."""

    def __init__(self, read: Any) -> None:
        self.does, self.read = read, threading.Event()
        self.threads: list[threading.Thread] = []

    def __call__(self, start: int, count: int) -> Tensor:
        self.threads.append(threading.current_thread())
        found = self.does(start, count)
        self.read.set()
        return found


@pytest.mark.quick
@pytest.mark.parametrize("seed", [0, 7])
def test_a_step_is_read_before_it_is_asked_for(stream: Path, seed: int) -> None:
    """By a thread that is not the one which trains; and read once."""
    b = batches(stream, data_seed=seed, micro_batch_tokens=16)
    expected = sequences(batches(stream, data_seed=seed, micro_batch_tokens=16).micro(5))
    tokens: Any = b.tokens
    tokens.read = watched = Watched(b.tokens.read)
    b.read_ahead(5)
    assert watched.read.wait(HANG)
    assert sequences(b.micro(5)) == expected
    assert len(watched.threads) == (16 if seed else 4)
    assert threading.main_thread() not in watched.threads
    assert sequences(b.micro(5)) == expected, "once more, and read once more"


@pytest.mark.quick
@pytest.mark.parametrize("seed", [0, 7])
def test_what_cannot_be_read_is_said_in_the_step_that_needs_it(tmp_path: Path, seed: int) -> None:
    folder = write_shards(tmp_path, "train", STREAM)
    b = batches(folder, data_seed=seed)
    b.read_ahead(0)
    assert len(sequences(b.micro(0))) == 16
    path = folder / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:1030])
    b.read_ahead(1)
    with pytest.raises(tg.InputError, match="was cut after it was opened"):
        list(b.micro(1))


# ---- Training

MODEL = dict(
    vocab_size=32,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    num_shared=1,
    num_loops=2,
    train_seq_len=12,
    dtype="float32",
    train_batch_tokens=48,
    micro_batch_tokens=24,
    iterations=9,
    warmdown_iters=0,
    max_wallclock_seconds=0.0,
    warmup_steps=0,
    val_loss_every=0,
    train_log_every=1,
    data_seed=3,
    device="cpu",
)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A run on 221 tokens, of which an epoch is four steps and a quarter."""
    write_shards(tmp_path, "train", np.random.default_rng(1).integers(2, 32, 221))
    sizes = {name.upper(): tg.show(value) for name, value in MODEL.items()}
    paths = dict(DATA_PATH=str(tmp_path), TOKENIZER_PATH=str(tmp_path / "x"), LOG_DIR=str(tmp_path))
    return sizes | paths


def train(config: tg.Config, folder: Path, checkpoint: str = "") -> tg.Trainer:
    """Trains in `folder` with a checkpoint at the end, after one that it goes on from."""
    config = replace(config, save_every=config.iterations, resume=checkpoint)
    trainer, log = tg.make_trainer(config, one_rank()), tg.Log(folder, True)
    if checkpoint:
        tg.restore(trainer, tg.find_checkpoint(config, trainer, []), log)
    checkpoints = tg.Checkpoints(config, trainer.world, trainer.batches.tokens.total, log)
    with checkpoints.kept(trainer):
        trainer.train(tg.Reporter(config, log), checkpoints, no_score)
    return trainer


@pytest.mark.bits
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resumed_to_the_last_bit(env: dict[str, str], tmp_path: Path, stop: int) -> None:
    """Before, amid and after the step in which the second epoch begins."""
    config = tg.Config.from_env(env)
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    whole = train(config, tmp_path / "whole")
    train(replace(config, iterations=stop), tmp_path / "part")
    (path,) = (tmp_path / "part").glob("*.ckpt")
    again = train(config, tmp_path / "part", str(path))
    assert (whole.step, again.step) == (9, 9)
    assert flat(whole.state()).equal(flat(again.state()))
    assert losses(tmp_path / "whole") == losses(tmp_path / "part")


def test_the_next_step_is_read_while_this_one_is_made(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step waits at its end until the next one is read; nothing is read that is not used."""
    reads: list[int] = []
    read, train_step, changed = tg.Batches.read, tg.Trainer.train_step, threading.Condition()

    def noted(b: tg.Batches, step: int) -> Any:
        found = read(b, step)
        with changed:
            reads.append(step)
            changed.notify_all()
        return found

    def patient(trainer: tg.Trainer, step: int, *rest: Any) -> None:
        train_step(trainer, step, *rest)
        with changed:
            assert changed.wait_for(lambda: min(step + 1, 8) in reads, HANG)

    monkeypatch.setattr(tg.Batches, "read", noted)
    monkeypatch.setattr(tg.Trainer, "train_step", patient)
    (tmp_path / "run").mkdir()
    train(tg.Config.from_env(env), tmp_path / "run")
    assert reads == [*range(9)]


def train_here(env: dict[str, str], folder: Path) -> list[float]:
    folder.mkdir()
    train(tg.Config.from_env(env), folder)
    return losses(folder)


def train_on_a_rank() -> int:
    """Trains and writes the losses of this rank into a folder of its own."""
    config = tg.Config.from_env(os.environ)
    world = tg.World(os.environ, device=config.device)
    folder = Path(config.log_dir) / str(world.rank)
    folder.mkdir()
    trainer, log = tg.make_trainer(config, world), tg.Log(folder, True)
    checkpoints = tg.Checkpoints(config, world, trainer.batches.tokens.total, log)
    trainer.train(tg.Reporter(config, log), checkpoints, no_score)
    torch.distributed.barrier()
    return 0


def test_two_ranks_train_on_the_batches_of_one(env: dict[str, str], tmp_path: Path) -> None:
    """From a single shard."""
    one = train_here(env, tmp_path / "one")
    ended = fork_ranks(env, 2, train_on_a_rank)
    assert ended.codes == [0, 0], ended.texts
    for rank in ("0", "1"):
        assert losses(tmp_path / rank) == pytest.approx(one, abs=1e-4)
    other = train_here(env | {"DATA_SEED": "4"}, tmp_path / "other")
    assert max(abs(a - b) for a, b in zip(one, other)) > 1e-2


def draw_otherwise_on_rank_1() -> int:
    """As another version of NumPy might."""
    shuffle: Any = tg.Shuffle
    start = shuffle.start
    if os.environ["RANK"] == "1":
        shuffle.start = lambda self, number: start(self, number + 1)
    config = tg.Config.from_env(os.environ)
    try:
        tg.make_trainer(config, tg.World(os.environ, device=config.device))
    except tg.InputError as error:
        print(error, flush=True)
        return tg.EXIT_INPUT
    return 0


def test_ranks_that_draw_otherwise_do_not_begin(env: dict[str, str]) -> None:
    ended = fork_ranks(env, 2, draw_otherwise_on_rank_1)
    assert ended.codes == [tg.EXIT_INPUT] * 2, ended.texts
    assert all("ranks differ in their variables, data, script" in text for text in ended.texts)
