"""Contestants for bench.py: train_gpt.py under any settings or of any commit, and its plain model.

They start from the same parameters, are checked to compute the same, and take their steps in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg
from records.tools import common
from records.tools.common import ROOT
from records.tools.plain import Plain, PlainBatches, PlainTrainer

# ---- 1. Contestants ------------------------------------------------------------------------------
# Every contestant is built from a copy of the script that is a module of its own: no compiled
# graph, cache or limit on recompilations is shared, and two commits are no other case than two
# settings.
FROZEN = dict(max_wallclock_seconds=0.0, warmdown_iters=0, iterations=1 << 30)  # no schedule moves


class Mismatch(RuntimeError):
    """The contestants do not compute the same: their speeds cannot be compared."""


@functools.cache
def load_script(path: Path, copy_of_it: int) -> ModuleType:
    return common.load_script(path)


@dataclasses.dataclass(frozen=True)
class Case:
    """What makes a contestant: variables, a script, and whether it is the plain model of it."""

    env: dict[str, str]
    path: Path = ROOT / "train_gpt.py"
    plain: Plain | None = None
    copy: int = dataclasses.field(default_factory=itertools.count().__next__)

    @property
    def script(self) -> ModuleType:
        return tg if self.plain else load_script(self.path, self.copy)

    def config(self, check: bool = False) -> Any:
        """Its Config; `check`: in float32, which fused attention on CUDA does not know."""
        kind = self.script.Config
        known = {f.name.upper(): f for f in dataclasses.fields(kind)}
        if unknown := self.env.keys() - known.keys() - {"USE_DEPTH_EMBED"}:
            names = ", ".join(sorted(unknown))
            raise tg.InputError(f"{names}: not an option of train_gpt.py")
        try:
            config = dataclasses.replace(kind.from_env(self.env), **FROZEN)
        except self.script.InputError as error:  # of the copy's own kind
            raise tg.InputError(str(error)) from None
        if check and torch.cuda.is_available() and "ATTN_BACKEND" in known:
            config = dataclasses.replace(config, attn_backend=known["ATTN_BACKEND"].default)
        return dataclasses.replace(config, dtype="float32") if check else config


@dataclasses.dataclass
class Contestant:
    trainer: Any  # Trainer of any commit, or PlainTrainer
    batches: Any  # of its script, or PlainBatches
    config: Any
    world: Any
    attention: Callable[[], Any]  # the context in which a run takes its steps

    def step(self, step: int) -> None:
        with self.attention():
            self.trainer.train_step(step, 0.0, self.batches.micro(step))

    def loss(self) -> float:
        """Of the last step, the mean of all ranks; waits for the device."""
        trainer = self.trainer
        if isinstance(trainer, PlainTrainer):
            mine = torch.tensor(trainer.loss / self.world.size, device=self.world.device)
            return self.world.all_reduce(mine).item()
        if hasattr(trainer, "gradients"):
            return trainer.gradients.loss.item()
        return trainer.flat[-1].item()  # of commits before the script's sections were parted

    def values(self, read: Callable[[nn.Parameter], Tensor], as_plain: bool) -> dict[str, Tensor]:
        ours = not isinstance(self.trainer, PlainTrainer)
        return values(self.trainer.model, read, as_plain and ours)


def values(model: Any, read: Callable[[nn.Parameter], Tensor], as_plain: bool) -> dict[str, Tensor]:
    """What `read` gives for parameters (value, gradient) by name.

    `as_plain`: those of our model under the names of the plain one.
    """
    if not as_plain:
        return {name: read(p) for name, p in model.named_parameters()}
    found = {"tok_emb.weight": read(model.tok_emb)}
    found |= {name: read(p) for name, p in model.cond.named_parameters()}
    for i, (mix, attn, mlp) in enumerate(zip(model.mix, model.attn, model.mlp)):
        q, k, v = read(attn.qkv.weight).split(attn.qkv.weight.parts)
        block = {
            "q.weight": q,
            "k.weight": k,
            "v.weight": v,
            "out.weight": read(attn.proj.weight),
            "up.weight": read(mlp.fc.weight),
            "down.weight": read(mlp.proj.weight),
            "mix": read(mix.weight),
            "q_gain": read(attn.q_gain),
            "attn_scale": read(attn.scale),
            "mlp_scale": read(mlp.scale),
        }
        found |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return found


def draw(case: Case, noise: float = 0.0) -> Any:
    """The model that all contestants start from; `noise` is added to what training starts from."""
    config = case.config()
    torch.manual_seed(config.seed)
    orthogonal = config.matrix_init == "orthogonal"
    model = case.script.GPT(config.architecture(), config.tied_embed_init_std, orthogonal)
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return model


def build(
    case: Case, start: nn.Module, world: tg.World | None = None, check: bool = False
) -> Contestant:
    """A contestant with the parameters of `start`, a model of ours; Mismatch if it has others."""
    script, config = case.script, case.config(check)
    world = world or script.World({})
    tokens = script.Tokens(config, "train")
    batches: Any = script.Batches(tokens, config, world)
    trainer: Any = None
    attention: Callable[[], Any] = contextlib.nullcontext
    if case.plain:
        options = case.plain._replace(attention="default") if check else case.plain
        trainer = PlainTrainer(config, world, batches.accumulation, options)
        batches = PlainBatches(batches, tokens, config, world)
    else:
        model = script.GPT(config.architecture(), config.tied_embed_init_std).to(world.device)
        trainer = script.Trainer(config, world, model, batches)
        attention = attention_of(script, config)
    start_from(trainer.model, values(start, lambda p: p.data, bool(case.plain)))
    return Contestant(trainer, batches, config, world, attention)


def start_from(model: nn.Module, given: dict[str, Tensor]) -> None:
    """Copies parameters into a model; Mismatch if it has others, or of other shapes."""
    own = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in own.items()}
    odd = shapes.items() ^ {name: value.shape for name, value in given.items()}.items()
    if odd:
        names = sorted({name for name, _ in odd})[:5]
        raise Mismatch(f"they have other parameters or shapes: {', '.join(names)}")
    for name, p in own.items():
        p.data.copy_(given[name])


def attention_of(script: ModuleType, config: Any) -> Callable[[], Any]:
    """The context that the script's `main` enters for ATTN_BACKEND.

    Commits without that option have none.
    """
    if not hasattr(script, "KERNELS"):
        return contextlib.nullcontext
    return functools.partial(sdpa_kernel, script.KERNELS[config.attn_backend], set_priority=True)


# ---- 2. The same mathematics ---------------------------------------------------------------------
LIMITS = dict(loss=1e-5, gradient=1e-3, update=1e-3)  # relative, but for the loss


def one_step(
    contestant: Contestant, sequences: int, as_plain: bool
) -> dict[str, dict[str, Tensor]]:
    """Loss, gradients and updates of a step on so many sequences.

    These are more than one block of our attention and one chunk of our head, both ragged.
    Newton-Schulz is in float32, too, because rounding to bfloat16 moves an update by a tenth and
    more.
    """
    trainer, config, world = contestant.trainer, contestant.config, contestant.world
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "dtype"):
            optimizer.dtype = torch.float32
    random = torch.Generator().manual_seed(world.rank)
    shape = (sequences, min(config.train_seq_len, 192) + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=random).to(world.device)
    before = contestant.values(lambda p: p.detach().clone(), as_plain)
    parts = tokens.chunk(contestant.batches.accumulation)
    trainer.train_step(0, 0.0, iter([(ids[:, :-1], ids[:, 1:]) for ids in parts]))

    def gradient(p: nn.Parameter) -> Tensor:
        return torch.zeros_like(p) if p.grad is None else p.grad

    after = contestant.values(lambda p: p.detach(), as_plain)
    return dict(
        loss=dict(all=torch.tensor(contestant.loss())),
        gradient=contestant.values(gradient, as_plain),
        update={name: after[name] - before[name] for name in before},
    )


def gate(cases: dict[str, Case], world: tg.World | None = None) -> dict[str, dict[str, float]]:
    """The largest relative differences from the first case after a step of all in float32.

    Mismatch if they are beyond rounding. The parameters have noise, because those that start at
    zero hide what is behind them.
    """
    start = draw(next(iter(cases.values())), 0.3)
    as_plain = any(case.plain for case in cases.values())
    line = {name: build(case, start, world, check=True) for name, case in cases.items()}
    sequences = 3 * math.lcm(*(contestant.batches.accumulation for contestant in line.values()))
    made = {name: one_step(c, sequences, as_plain) for name, c in line.items()}
    (base, first), *others = made.items()
    found = {}
    for name, other in others:
        worst = {kind: apart(first[kind], other[kind], kind != "loss") for kind in LIMITS}
        if not all(worst[kind] <= limit for kind, limit in LIMITS.items()):
            raise Mismatch(f"{name} and {base} differ by {worst}; the limits are {LIMITS}")
        found[name] = worst
    return found


def apart(a: dict[str, Tensor], b: dict[str, Tensor], relative: bool) -> float:
    """The largest |b - a| (L2) of all names, relative to |a| if so; NaN if any is."""
    differences = []
    for name, value in a.items():
        size = value.norm().clamp_min(1e-8) if relative else torch.ones(())
        differences.append(((b[name] - value).norm() / size).item())
    return float(np.max(differences))


def curves(cases: dict[str, Case], steps: int, world: tg.World | None = None) -> dict[str, Any]:
    """Losses of so many steps from one start, and how far any is from the first case's."""
    start = draw(next(iter(cases.values())))
    line = {name: build(case, start, world) for name, case in cases.items()}
    losses: dict[str, list[float]] = {name: [] for name in line}
    for step in range(steps):
        for name, contestant in line.items():
            contestant.step(step)
            losses[name].append(contestant.loss())
    base, *others = (np.array(curve) for curve in losses.values())
    names = list(losses)[1:]
    far = {name: float(np.abs(curve - base).max()) for name, curve in zip(names, others)}
    return dict(losses=losses, largest_difference=far)


# ---- 3. The measurement --------------------------------------------------------------------------
PEAK_TFLOPS = {"H200": 989.0, "H100 80GB HBM3": 989.0}  # by the device's name: dense bfloat16, SXM


def flop_per_token(config: Any) -> dict[str, float]:
    """Floating-point operations of training on a token.

    Twice a multiplication and addition, three times the forward pass. `matrices` of the effective
    layers, each as often as it is used; `attention`, whose token sees (T + 1) / 2 others on
    average; `head`. Nothing that is recomputed, side embeddings, optimizers. Schedules stand still,
    so the layers are those of the first phase.
    """
    D, T, kv = config.model_dim, config.train_seq_len, config.num_kv_heads / config.num_heads
    layers = len(tg.make_plan(config, config.schedule()[0][1]))
    return dict(
        matrices=6 * layers * (D * D * (2 + 2 * kv) + 2 * D * round(config.mlp_mult * D)),
        attention=6 * layers * (T + 1) * D,
        head=6 * D * config.vocab_size,
    )


def peak_flops(config: Any, world: tg.World, given: float) -> float:
    """Operations per second that MFU is a part of; 0: not known, no MFU."""
    if given:
        return 1e12 * world.size * given
    if not world.on_cuda or config.dtype != "bfloat16":
        return 0.0
    device = torch.cuda.get_device_name(world.device)
    known = next((peak for name, peak in PEAK_TFLOPS.items() if name in device), 0.0)
    return 1e12 * world.size * known


def graphs() -> np.ndarray:
    """Graphs compiled and graph breaks in this process so far; importing the compiler is slow."""
    if "torch._dynamo" not in sys.modules:
        return np.zeros(2, int)
    counters = torch._dynamo.utils.counters
    return np.array([counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())])


def recompiles() -> int:
    """Compilations in this process of code that had been compiled before."""
    if "torch._dynamo" not in sys.modules:
        return 0
    ids = {str(metric.compile_id) for metric in torch._dynamo.utils.get_compilation_metrics()}
    return sum(not name.endswith("/0") for name in ids)  # "frame/compilation of it"


def spread(values: Any) -> dict[str, float]:
    percentiles = np.percentile(values, (10, 50, 90)).round(4).tolist()
    return dict(zip(("p10", "median", "p90"), percentiles))


class Warm(NamedTuple):
    """A contestant behind its warm-up, and what that cost."""

    contestant: Contestant
    facts: dict[str, Any]


def warm_up(case: Case, start: nn.Module, steps: int, world: tg.World | None = None) -> Warm:
    """Builds a contestant and takes its first steps, which compile.

    Peak memory is that of a step, less what was allocated before (other contestants).
    """
    cuda = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if cuda else 0
    before, began = graphs(), time.perf_counter()
    contestant = build(case, start, world)
    for step in range(steps):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        contestant.step(step)
    contestant.world.synchronize()
    compiled, breaks = (graphs() - before).tolist()
    facts = dict(
        warmup_seconds=round(time.perf_counter() - began, 2),
        graphs=compiled,
        graph_breaks=breaks,
        peak_mib=(torch.cuda.max_memory_allocated() - held) >> 20 if cuda else None,
    )
    return Warm(contestant, facts)


class Rounds(NamedTuple):
    """Steps that were taken in turn."""

    ms: dict[str, np.ndarray]  # of every step, by contestant
    wall_seconds: float  # of all together
    recompiles: dict[str, int]  # graphs compiled in these steps


def cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    """Between two events of CUDA, or two readings of the clock."""
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(end)
    return 1e3 * (end - start)


def measure(contestants: dict[str, Any], first: int, steps: int) -> Rounds:
    """Steps `first` and so on of every contestant, loader to optimizer; who begins changes.

    On CUDA the times are those of events in the stream, and the host waits for the device once, at
    the end.
    """
    names, world = [*contestants], next(iter(contestants.values())).world
    stamp: Callable[[], Any] = cuda_event if world.on_cuda else time.perf_counter
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    late = dict.fromkeys(names, 0)
    world.synchronize()
    began = time.perf_counter()
    for step in range(first, first + steps):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            before, start = graphs(), stamp()
            contestants[name].step(step)
            marks[name].append((start, stamp()))
            late[name] += int((graphs() - before)[0])
    world.synchronize()
    wall = time.perf_counter() - began
    times = {name: np.array([milliseconds(*p) for p in pairs]) for name, pairs in marks.items()}
    return Rounds(times, wall, late)


def split_of_a_step(contestant: Contestant, first: int, steps: int) -> dict[str, Any]:
    """Time in Adam, in Muon and in the rest of a step, from steps of their own.

    The device is waited for around every optimizer, which the times of `measure` are spared.
    """
    ms = np.zeros((steps, 3))
    now = 0  # the step in progress, as a row of `ms`

    def add(which: int, sign: int) -> None:
        contestant.world.synchronize()
        ms[now, which] += sign * 1e3 * time.perf_counter()

    hooks = []
    for i, optimizer in enumerate(contestant.trainer.optimizers, 1):
        begin, end = functools.partial(add, i, -1), functools.partial(add, i, 1)
        hooks.append(optimizer.register_step_pre_hook(lambda *_, then=begin: then()))
        hooks.append(optimizer.register_step_post_hook(lambda *_, then=end: then()))
    for step in range(steps):
        now = step
        add(0, -1)
        contestant.step(first + step)
        add(0, 1)
    for hook in hooks:
        hook.remove()
    total, adam, muon = ms.T
    return dict(
        forward_backward_ms=spread(total - adam - muon), adam_ms=spread(adam), muon_ms=spread(muon)
    )


@contextlib.contextmanager
def device_watch() -> Iterator[list[list[float]]]:
    """SM clock in MHz, power in W and temperature in degrees once a second.

    No readings where there is no nvidia-smi, or where it does not know all three.
    """
    readings: list[list[float]] = []
    if not (torch.cuda.is_available() and shutil.which("nvidia-smi")):
        yield readings
        return
    query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", "-i", "0", query, "-lms", "1000", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as file, subprocess.Popen(command, stdout=file) as process:
        try:
            yield readings
        finally:
            process.terminate()
            process.wait()
            file.seek(0)
            for line in file:
                with contextlib.suppress(ValueError):  # "[N/A]", as power on virtual machines
                    readings.append([float(x) for x in line.split(",")])


def machine(world: tg.World) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((x.split(":")[1].strip() for x in info if "model name" in x), platform.processor())
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        versions=tg.versions(world),
    )


def describe(case: Case) -> dict[str, Any]:
    """What JSON says of a contestant: the script's hash and its configuration, but for paths."""
    config = {
        name: value
        for name, value in dataclasses.asdict(case.config()).items()
        if not name.endswith(("_path", "_dir"))
    }
    plain = case.plain._asdict() if case.plain else None
    return dict(script_sha256=common.sha256(case.path), config=config, plain=plain)


def figures(warm: Warm, rounds: Rounds, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What JSON says of a contestant's steps."""
    contestant = warm.contestant
    config, ms = contestant.config, rounds.ms[name]
    speed, flop = 1e3 * config.train_batch_tokens / np.median(ms), flop_per_token(config)
    peak = peak_flops(config, contestant.world, args.peak_tflops)
    return dict(
        step_ms=spread(ms),
        tokens_per_second=round(speed),
        mflop_per_token=sum(flop.values()) / 1e6,
        mfu=speed * sum(flop.values()) / peak if peak else None,
        **warm.facts,
        recompiles_after_warmup=rounds.recompiles[name],
        last_loss=contestant.loss(),
        **split_of_a_step(contestant, args.warmup + args.steps, min(args.steps, 5)),
        every_step_ms=ms.round(3).tolist(),
    )


def run(cases: dict[str, Case], args: argparse.Namespace) -> dict[str, Any]:
    """Everything about the cases' steps, and their times as multiples of the first one's."""
    if "torch._dynamo" in sys.modules:
        # else the gate's graphs may serve here, too, and spare the warm-up
        torch.compiler.reset()
    start = draw(next(iter(cases.values())))
    warm = {name: warm_up(case, start, args.warmup) for name, case in cases.items()}
    line = {name: found.contestant for name, found in warm.items()}
    with device_watch() as readings:
        rounds = measure(line, args.warmup, args.steps)
    base, *others = cases
    ratios = {f"{name} / {base}": spread(rounds.ms[name] / rounds.ms[base]) for name in others}
    contestants = {
        name: figures(warm[name], rounds, name, args) | describe(case)
        for name, case in cases.items()
    }
    return dict(
        contestants=contestants,
        ratios=ratios,
        steps=args.steps,
        warmup=args.warmup,
        wall_seconds=rounds.wall_seconds,
        seconds_of_steps=sum(ms.sum() for ms in rounds.ms.values()) / 1e3,
        clock_power_temperature=readings,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    )
