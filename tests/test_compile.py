"""COMPILE: how many graphs and when, that compiled and eager agree, what happens if it fails."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    GROWTH,
    drawn,
    fork_ranks,
    log_of,
    losses,
    noisy_model,
    one_rank,
    real_trainer,
    run_here,
    small_config,
    stub_trainer,
    train_only,
)
from stack_written_out import documents
from torch import Tensor

import train_gpt as tg

SMALL = dict(
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
    VAL_BATCH_SIZE="1024",
    ITERATIONS="2",
    WARMDOWN_ITERS="0",
    TRAIN_LOG_EVERY="1",
    MAX_WALLCLOCK_SECONDS="0",
    WARMUP_STEPS="0",
)
# Width is nothing to a compiler: layers and passes are.
NARROW = dict(MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1", DTYPE="float32", TRAIN_SEQ_LEN="32")


def loss_and_gradients(forward: Any, model: tg.GPT, ids: Tensor) -> tuple[float, list[Tensor]]:
    """Of the model, by a function that computes what it does; ids [B, T + 1]."""
    model.zero_grad()
    loss = forward(ids[:, :-1], ids[:, 1:], model.scoring)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


SHALLOW = {
    "T": dict(NUM_SHARED="1", NUM_LOOPS="2", NUM_CODA="0"),
    "M": dict(NUM_SHARED="1", NUM_LOOPS="2", NUM_PRELUDE="0", NUM_CODA="0"),
    "naive": dict(NUM_LAYERS="2"),
}


@pytest.mark.parametrize("system", SHALLOW)
def test_one_graph_compiles_and_agrees(system: str) -> None:
    """Run M, too, with an MLP a pass; the head takes all rows at once when it is compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    env = NARROW | SHALLOW[system] | {"PRESET": f"{system},tiny"}
    model = noisy_model(tg.Config.from_env(env).architecture(), 0.05)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    ids = torch.randint(1024, (2, 33))
    loss, gradients = loss_and_gradients(model, model, ids)
    for _ in range(2):
        compiled_loss, compiled_gradients = loss_and_gradients(compiled, model, ids)
        assert compiled_loss == pytest.approx(loss, abs=1e-5)
        for a, b in zip(compiled_gradients, gradients, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-7
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def counting(monkeypatch: pytest.MonkeyPatch) -> torch._dynamo.testing.CompileCounter:
    """Counts the graphs that torch.compile makes, and compiles nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.mark.parametrize("system, loops", [("K", 2), ("K", 6), ("M", 3)])
def test_blocks_are_one_graph_at_any_depth(
    system: str, loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all layers of prelude, core and coda, one for the head; M has an MLP a pass."""
    counter = counting(monkeypatch)
    env = NARROW | {"PRESET": f"{system},tiny", "COMPILE": "block", "NUM_LOOPS": str(loops)}
    config = tg.Config.from_env(env)
    model = noisy_model(config.architecture(), 0.05)
    forward = tg.Compiler(config, one_rank()).forward(model)
    ids = torch.randint(1024, (2, 33))
    found = []
    for f in (model, forward, forward):
        loss, gradients = loss_and_gradients(f, model, ids)
        found.append((loss, torch.cat([g.flatten() for g in gradients]).norm().item()))
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-4)
    assert counter.frame_count == 2


# What acts around a layer, or between passes: no reason for a graph more.
AROUND: dict[str, Any] = dict(
    loop_lanes=2,
    lane_weights="token",
    mlp_pool=3,
    core_branch_scale=1.5,
    mix_init=3.0,
    pass_scale_init=0.5,
    feedback_rank=2,
    interpass_norm=True,
    truncate_fraction=0.5,
    eval_passes=3,
)


def made_by(config: tg.Config, counter: Any) -> int:
    """The graphs that every mode of a run and of its scores makes; none when it comes again.

    They compute what the model does.
    """
    model = noisy_model(config.architecture(), 0.05)
    modes, made = [*tg.training_modes(config), model.scoring], []
    compiled = tg.Compiler(config, one_rank()).forward(model)
    pair = documents(0), documents(1)
    for _ in range(2):
        for mode in modes:
            loss = compiled(*pair, mode)
            loss.backward()
            assert loss.item() == pytest.approx(model(*pair, mode).item(), abs=1e-5)
        made.append(counter.frame_count)
    assert made[0] == made[1]
    return made[0]


@pytest.mark.parametrize(
    ("values", "more"),
    [
        (AROUND | dict(core_skips="by_position", skip_gates=True), 0),
        (AROUND | dict(core_skips="looped", skip_gates=True), 0),
        (dict(mix_once_a_pass=True), 1),  # a layer without a mix
    ],
    ids=["by_position", "looped", "mix once"],
)
def test_mechanisms_of_the_loop_make_no_graphs(
    values: dict[str, Any], more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block and the loss are compiled once each, at 1, 2 and 3 passes, truncated or not."""
    counter = counting(monkeypatch)
    loop = tg.layers(1, 2, 2, 1) | dict(passes_schedule="0:1,0.2:2", compile="block")
    config = small_config({}, **loop | values)
    assert made_by(config, counter) == 2 + more


def test_a_whole_model_is_a_graph_for_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that happens between passes: no break in it, and one graph more if truncated."""
    counter = counting(monkeypatch)
    values = AROUND | dict(mlp_pool=0, eval_passes=0, mix_once_a_pass=True, compile="model")
    config = small_config({}, **tg.layers(0, 1, 2, 0) | values)
    assert len({*tg.training_modes(config)}) == 2
    assert made_by(config, counter) == 2


def test_kinds_of_layers_may_be_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph each, with a gradient and without: more than torch compiles unless it is told to."""
    counter = counting(monkeypatch)
    values = dict(num_layers=8, ve_layers="0-3", parallel_layers="0,1,4,5", xsa_last_n=3)
    values |= dict(use_unique_norms=False, compile="block")
    config = small_config({}, **tg.layers(0, 0, 1, 0) | values | dict(num_shared=0))
    model = noisy_model(config.architecture(), 0.05)
    compiled = tg.Compiler(config, one_rank()).forward(model)
    pair = documents(0), documents(1)
    for length in (8, 12):
        ids, targets = (part[:, :length] for part in pair)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                loss = compiled(ids, targets, tg.Mode(1))
            assert loss.item() == pytest.approx(model(ids, targets, tg.Mode(1)).item(), abs=1e-5)
    assert counter.frame_count > 20


def test_rates_and_momentum_make_no_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counting(monkeypatch)
    params = [tg.parameter("matrix", torch.randn(shape)) for shape in ((8, 8), (8, 16), (16, 8))]
    muon = tg.Muon(params, 0.1, 0.9, 5)
    muon.iterate = torch.compile(tg.newton_schulz, dynamic=False)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        muon.param_groups[0].update(lr=0.1 / (step + 1), momentum=0.9 + 0.01 * step)
        muon.step()
    assert counter.frame_count == 2, "two shapes: wide and tall are one stack"


def test_a_compiled_step_rounds_as_its_mode_says() -> None:
    """A graph that forgot the mode would give the weights of the plain step."""
    torch._dynamo.reset()
    config = small_config({}, **tg.layers(0, 1, 1, 1), matrix_bits=4, core_bits=3)
    both, core = tg.Mode(1, tg.Rounding(4), tg.Rounding(3)), tg.Mode(1, core=tg.Rounding(3))
    eager, compiled = stub_trainer(config), stub_trainer(config)
    build = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    compiled.forward = build(compiled.model)
    for step, mode in enumerate((tg.Mode(1), both, core, tg.Mode(1), both, core)):
        for trainer in (eager, compiled):
            trainer.train_step(step, 0.0, [(documents(0), documents(1))], mode)
        for p, other in zip(compiled.params, eager.params):
            torch.testing.assert_close(p, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_backends_agree(backend: str) -> None:
    env = {"PRESET": "T,tiny", "DTYPE": "float32", "ATTN_BACKEND": backend}
    config, ids = tg.Config.from_env(env), torch.randint(1024, (2, 257))
    model = tg.GPT(config.architecture(), 0.02)
    forward = tg.Compiler(config, one_rank()).forward(model)
    batch = ids[:, :-1], ids[:, 1:], model.scoring
    with torch.nn.attention.sdpa_kernel(tg.KERNELS[backend]), torch.no_grad():
        assert forward(*batch).item() == pytest.approx(model(*batch).item(), abs=1e-5)


def test_a_compiled_graph_of_another_attention_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch keeps compiled graphs on disk; its key does not know the kernel of attention."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool of processes
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)  # nor trials of ten ISAs
    counts = torch._dynamo.utils.counters["aot_autograd"]
    counts.clear()
    env = NARROW | {"PRESET": "naive,tiny", "NUM_LAYERS": "1", "COMPILE": "model"}
    for backend, hits in (("math", 0), ("flash", 0), ("math", 1)):
        torch._dynamo.reset()
        config = tg.Config.from_env(env | {"ATTN_BACKEND": backend})
        model, ids = tg.GPT(config.architecture(), 0.02), torch.zeros(1, 32, dtype=torch.int64)
        kernels = torch.nn.attention.sdpa_kernel(tg.KERNELS[backend], set_priority=True)
        with kernels, torch.no_grad():
            tg.Compiler(config, one_rank()).forward(model)(ids, ids.clone(), model.scoring)
        assert counts["autograd_cache_hit"] == hits


@pytest.mark.parametrize("level", ["model", "block"])
def test_whatever_is_compiled_has_the_key_that_knows(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models and blocks alike: by `build`, which the test above shows for a model."""
    given: list[Any] = []

    def build(_: tg.Compiler, function: Any) -> Any:
        given.append(function)
        return function

    monkeypatch.setattr(tg.Compiler, "build", build)
    config = tg.Config.from_env(NARROW | {"PRESET": "Bp,tiny", "COMPILE": level})
    model = drawn(config, 0)
    tg.Compiler(config, one_rank()).forward(model)
    assert given == {"model": [model], "block": [tg.block, tg.head_loss]}[level]


# ---- A compiler that fails


def main_with_a_compiler_that_fails(whole: str, blocks: str) -> int:
    """A run whose compiler fails for whole models, and for blocks, on these ranks ("0 1").

    Elsewhere it compiles nothing, for no test here is about graphs; what ran by way of it is
    printed. COMPILE=auto means a graph of the model, as it does on CUDA.
    """
    patch, rank = pytest.MonkeyPatch(), os.environ["RANK"]
    begin = tg.Compiler.__init__

    def on_cuda(compiler: tg.Compiler, config: tg.Config, world: tg.World) -> None:
        begin(compiler, config, world)
        if config.compile == "auto":
            compiler.level = "model"

    def broken(function: Any, **_: Any) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no compiler here")

        def compiled(*args: Any, **kwargs: Any) -> Any:
            if name not in ran:
                ran.add(name)
                print(f"compiled:{name}", flush=True)  # now: ranks do not come back from `main`
            return function(*args, **kwargs)

        is_whole = isinstance(function, torch.nn.Module)
        name = "model" if is_whole else function.__name__
        fails = rank in whole if is_whole else function is tg.block and rank in blocks
        return fail if fails else compiled

    ran: set[str] = set()
    patch.setattr(tg.Compiler, "__init__", on_cuda)
    patch.setattr(torch, "compile", broken)
    return tg.main()


@pytest.mark.parametrize(
    ("ranks", "level", "whole", "blocks", "code"),
    [
        (1, "auto", "0", "", 0),  # falls to blocks
        (2, "auto", "1", "", 0),  # on both ranks, though it failed on one
        (1, "auto", "0", "0", 1),  # no further
        (2, "auto", "0 1", "1", 1),
        (1, "model", "0", "", 1),  # what was asked for by name does not fall
    ],
)
def test_a_compiler_that_fails(
    ranks: int,
    level: str,
    whole: str,
    blocks: str,
    code: int,
    corpus: dict[str, str],
    tmp_path: Path,
) -> None:
    """Never silently eager: auto falls from model to block, then the traceback ends the run."""
    env = SMALL | NARROW | corpus | dict(PRESET="Bp,tiny", COMPILE=level, LOG_DIR=str(tmp_path))
    env |= {"NUM_SHARED": "1"}
    job = functools.partial(main_with_a_compiler_that_fails, whole, blocks)
    ended = fork_ranks(env | {"RUN_ID": "run"}, ranks, job)
    assert ended.codes == [code] * ranks, ended.texts
    fell = "warning: COMPILE=model failed, going on with COMPILE=block: Traceback"
    assert (fell in log_of(tmp_path / "run")) == (level == "auto")
    assert (tmp_path / "run" / tg.ARTIFACT).exists() == (code == 0)
    if code:
        last = "block" if blocks else "model"
        for text in ended.texts:
            assert f"COMPILE={last} failed (COMPILE=off trains without it): Traceback" in text
            assert "RuntimeError: no compiler here" in text
    else:
        for text in ended.texts:
            assert {"compiled:block", "compiled:head_loss"} <= {*text.splitlines()}


# ---- Nothing is compiled on the clock


def test_warm_up_compiles_what_training_runs(corpus: dict[str, str]) -> None:
    env = corpus | SMALL | NARROW | {"PRESET": "Bp,tiny", "NUM_SHARED": "1", "WARMUP_STEPS": "1"}
    trainer = real_trainer(env)
    counter = torch._dynamo.testing.CompileCounter()
    build = functools.partial(torch.compile, backend=counter, fullgraph=True, dynamic=False)
    trainer.forward = build(trainer.model)
    trainer.warm_up()
    assert counter.frame_count == 1
    for step in range(2):
        trainer.train_step(step, 1.0, trainer.batches.micro(step))
    assert counter.frame_count == 1


def test_a_refit_compiles_nothing(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every step of training rounds, its mode is none of theirs, and the warm-up's yet."""
    counter = counting(monkeypatch)
    monkeypatch.setattr(tg.Compiler, "newton_schulz", lambda _: tg.newton_schulz)  # has no say here
    rounds = dict(QAT_FRACTION="1", REFIT_STEPS="1", COMPILE="block", PRESET="Bp,tiny")
    trainer = real_trainer(corpus | SMALL | NARROW | rounds | {"NUM_SHARED": "1"})
    trainer.warm_up()
    made = counter.frame_count
    assert made
    tg.refit(trainer, {}, tg.Log(tmp_path, True))
    assert counter.frame_count == made


MODES = [
    f"passes:{passes} bits:0 core_bits:{bits}" for passes, bits in ((1, 0), (2, 0), (3, 0), (3, 6))
]


def grow(env: Mapping[str, str], folder: Path) -> list[float]:
    """The losses of a run of `train`, which does not score."""
    folder.mkdir()
    trainer = real_trainer(env)
    trainer.warm_up()
    train_only(trainer, folder)
    return losses(folder)


@pytest.mark.parametrize(("rung", "graphs"), [("model", 6), ("block", 4)])
def test_growth_compiles_nothing_on_the_clock(
    corpus: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rung: str,
    graphs: int,
) -> None:
    """All graphs are made in the warm-up, and losses are those of a run without it.

    One graph for 1, 2 and 3 passes with and without rounding; or for a layer, one with rounding,
    one with a value embedding, and the loss. Besides, one for each of three shapes of matrices.
    """
    counter = counting(monkeypatch)
    made: list[int] = []
    warm_up = tg.Trainer.warm_up

    def counted(trainer: tg.Trainer, log: Any = print) -> None:
        warm_up(trainer, log)
        made.append(counter.frame_count)

    monkeypatch.setattr(tg.Trainer, "warm_up", counted)
    env = corpus | GROWTH
    compiled = grow(env | {"COMPILE": rung}, tmp_path / "compiled")
    assert made == [graphs + 3] == [counter.frame_count]
    eager = grow(env | {"COMPILE": "off", "WARMUP_STEPS": "1"}, tmp_path / "eager")
    cold = grow(env | {"COMPILE": "off", "WARMUP_STEPS": "0"}, tmp_path / "cold")
    assert eager == cold and counter.frame_count == made[0]
    assert len(compiled) == 8 and compiled == pytest.approx(cold, abs=2e-4)
    log = (tmp_path / "compiled" / "train.log").read_text()
    seen = [line for line in log.splitlines() if " passes:" in line]
    assert [line.split(" ", 1)[1] for line in seen] == MODES
    assert [int(line.split("/")[0].removeprefix("step:")) for line in seen] == [0, 2, 4, 6]


def grow_on_a_rank() -> int:
    """Grows under a backend that counts: graphs before and after training go to a file."""
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile = functools.partial(torch.compile, backend=counter)
    config = tg.Config.from_env(os.environ)
    world = tg.World(os.environ, device=config.device)
    model = drawn(config, config.seed + world.rank)  # rank 0's weights are broadcast
    batches = tg.Batches(tg.Tokens(config, "train"), config, world)
    trainer = tg.Trainer(config, world, model, batches)
    trainer.warm_up()
    before, folder = counter.frame_count, Path(config.log_dir) / str(world.rank)
    folder.mkdir()
    train_only(trainer, folder)
    (folder / "graphs").write_text(f"{before} {counter.frame_count}")
    torch.distributed.barrier()
    return 0


def test_two_ranks_grow_alike_without_compiling_on_the_clock(
    corpus: dict[str, str], tmp_path: Path
) -> None:
    """1, 2 and 3 passes on both ranks; the losses are those of one rank that compiled nothing."""
    env = corpus | GROWTH | {"QAT_FRACTION": "0", "QAT_CORE_ONLY": "0"}
    ended = fork_ranks(env | {"COMPILE": "model", "LOG_DIR": str(tmp_path)}, 2, grow_on_a_rank)
    assert ended.codes == [0, 0], ended.texts
    one = grow(env | {"COMPILE": "off", "WARMUP_STEPS": "0"}, tmp_path / "one")
    for rank in ("0", "1"):
        graphs = (tmp_path / rank / "graphs").read_text()
        assert graphs == "6 6", "three modes, three shapes of matrices"
        two = losses(tmp_path / rank)
        assert len(two) == 8 and two == pytest.approx(one, abs=2e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("system", ["T", "M"])
def test_trains_compiled_on_a_gpu(system: str, corpus: dict[str, str], tmp_path: Path) -> None:
    env = {"PRESET": f"{system},tiny", "COMPILE": "model", "ITERATIONS": "5"}
    result = run_here(corpus | SMALL | env, tmp_path)
    assert result["steps"] == 5
    assert torch.tensor(result["roundtrip"]["val_bpb"]).isfinite()
