"""Steps of train_gpt.py on the pretended H100, and what each mode of training launches."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from records.tools.dryrun.roofline import (
    Attention,
    Event,
    Line,
    attention_taken,
    host_waits,
    launches,
    milliseconds,
    read_trace,
    tabulate,
)
from records.tools.dryrun.standins import InputError


class Case(NamedTuple):
    """What is to be run."""

    script: Path
    preset: str
    settings: dict[str, str]  # options of the script, in capitals
    ranks: int = 8
    share: int = 1  # of the batch is a step's: one GPU with the work of one of 8 ranks has 1/8
    whole_step: bool = (
        False  # all micro-batches of a rank, then the optimizers; else one micro-batch
    )
    validation: bool = False  # the forward pass alone, without gradients


class ModeReport(NamedTuple):
    """What one mode of training showed. Milliseconds are estimated by roofline."""

    mode: str
    layers: int
    sequences: int
    tokens: int  # of a sequence
    graphs: int  # compiled for this mode
    breaks: int  # where a graph was cut
    late_graphs: int  # compiled when the mode ran again
    compile_seconds: float  # of this machine: the first step
    compile_cpu_seconds: float  # of this process and those it waited for
    launches: int
    attention: str  # kernel that PyTorch took
    ms: float
    gemm_ms: float
    attention_ms: float
    triton_ms: float
    aten_ms: float  # kernels of torch itself: at the floor, for their bytes are not known
    other_ms: float  # copies, memory set to a value, collectives
    peak_gb: float  # allocated, parameters and optimizers included
    saved_gb: float  # held from the forward to the backward pass
    host_waits: list[str]
    table: list[Line]


class Trace:
    """The trace of this process, written by the preloaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(None)

    def mark(self, part: str) -> None:
        self.library.dryrun_mark(part.encode())

    def log(self, kind: str, name: str, *numbers: int) -> None:
        self.library.dryrun_log(kind.encode(), name.encode(), *map(ctypes.c_long, numbers))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self.library.dryrun_open(str(self.path).encode())
        try:
            yield
        finally:
            self.library.dryrun_open(b"")

    def events(self) -> list[Event]:
        return [event for event in read_trace(self.path) if event.part != "end"]


def traffic(kernel: Any, arguments: tuple[Any, ...]) -> int:
    """Bytes that a launch of Inductor's kernel reads and writes.

    A buffer is moved once, whole, or as often as the kernel has elements, whichever is less; what
    is read again is taken from the cache. Kernels that are several in one (combo_kernels) have no
    count of their own: whole buffers.
    """
    source = kernel.fn.src
    if "tl.dot(" in source:  # a product, of the script's own kernels
        return sum(value.nbytes for value in arguments if isinstance(value, Tensor))
    counts = re.findall(r"^    (?:x|y|z|r0_|r1_)numel = (\d+)", source, re.M)
    elements = math.prod(map(int, counts)) if counts else sys.maxsize
    moved = 0
    for name, value in zip(kernel.fn.arg_names, arguments):
        if isinstance(value, Tensor):
            for call in (r"tl\.load", r"tl\.(?:store|atomic_add)"):
                times = len(re.findall(rf"{call}\({name} ", source))
                moved += min(value.numel(), times * elements) * value.itemsize
    return moved


def tell_traffic(trace: Trace) -> None:
    """From now on each launch of an Inductor kernel is told with its bytes and registers."""
    from torch._inductor.runtime import triton_heuristics

    tuner: Any = triton_heuristics.CachingAutotuner
    run = tuner.run
    sizes: dict[int, int] = {}

    def told(self: Any, *arguments: Any, stream: Any, **options: Any) -> Any:
        if not options.get("benchmark_run") and id(self) not in sizes:
            sizes[id(self)] = traffic(self, arguments)
        result = run(self, *arguments, stream=stream, **options)
        if not options.get("benchmark_run"):
            launcher = self.launchers[0]
            facts = launcher.n_regs or 0, launcher.n_spills or 0, len(self.configs or ())
            trace.log("bytes", self.fn.__name__, sizes[id(self)], *facts)
        return result

    tuner.run = told


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    if spec is None or spec.loader is None or not path.exists():
        raise InputError(f"{path} is no script")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


def alone(script: Any, ranks: int, trace: Trace) -> Any:
    """A World of so many ranks of which only this one is there: collectives do nothing.

    The all-reduce of the gradients, the only one of a step, is told: behind it are the optimizers.
    """

    class Alone(script.World):
        def all_reduce(self, x: Tensor) -> Tensor:
            if ranks > 1:
                trace.log("nccl", "allreduce", x.numel(), 0, x.numel() * x.itemsize, ranks)
            trace.mark("optimizer")
            return x

        def broadcast(self, x: Tensor) -> Tensor:
            return x

        def collective(self, call: Callable[[], Any]) -> None:
            pass

    world = Alone({})
    world.size = ranks
    return world


class Session:
    """A model and its trainer, as the script makes them."""

    def __init__(self, case: Case, trace: Trace) -> None:
        self.case = case
        self.trace = trace
        self.script: Any = load_script(case.script)
        preset = {} if case.preset == "T" else {"PRESET": case.preset}
        try:
            config = self.script.Config.from_env(preset | case.settings)
        except self.script.InputError as error:
            raise InputError(str(error)) from None
        batch = config.train_batch_tokens // case.share
        self.config = dataclasses.replace(config, train_batch_tokens=batch)
        self.world = alone(self.script, case.ranks, trace)
        self.batches = self.script.Batches(None, self.config, self.world)
        torch.manual_seed(self.config.seed)
        orthogonal = self.config.matrix_init == "orthogonal"
        std = self.config.tied_embed_init_std
        model = self.script.GPT(self.config.architecture(), std, orthogonal).to(self.world.device)
        self.trainer = self.script.Trainer(self.config, self.world, model, self.batches)
        self.model = model
        self.forward = self.trainer.forward
        self.trainer.forward = self.marked_forward
        self.saved = 0  # bytes between the forward and the backward pass

    @property
    def sequences(self) -> int:
        """Of a micro-batch: what MICRO_BATCH_TOKENS holds; in a whole step, what divides that."""
        if self.case.whole_step:
            return int(self.batches.sequences)
        return int(self.config.micro_batch_tokens // self.config.train_seq_len)

    def modes(self) -> list[Any]:
        modes = self.script.training_modes(self.config)
        if self.case.validation:
            modes = [self.script.Mode(mode.passes) for mode in modes]
        return list(dict.fromkeys(modes))

    def attention(self) -> Any:
        """The context in which the script's `main` runs."""
        kernels = self.script.KERNELS[self.config.attn_backend]
        return torch.nn.attention.sdpa_kernel(kernels, set_priority=True)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, T], laid out in memory as real ones are."""
        length = self.config.train_seq_len
        span = torch.arange(self.sequences * length + 1, device="cuda") % self.config.vocab_size
        return span[:-1].view(-1, length), span[1:].view(-1, length)

    def marked_forward(self, ids: Tensor, targets: Tensor, mode: Any) -> Tensor:
        before = torch.cuda.memory_allocated()
        self.trace.mark("forward")
        loss: Tensor = self.forward(ids, targets, mode)
        self.saved = max(self.saved, torch.cuda.memory_allocated() - before)
        self.trace.mark("backward")
        return loss

    def step(self, mode: Any, pair: tuple[Tensor, Tensor]) -> None:
        """What is measured."""
        if self.case.validation:
            with torch.no_grad():
                self.marked_forward(*pair, mode)
        elif self.case.whole_step:
            self.trainer.train_step(5, 1.0, [pair] * self.batches.accumulation, mode)
        else:
            self.marked_forward(*pair, mode).backward()
        self.trace.mark("end")

    def run(self, mode: Any) -> ModeReport:
        """Three steps in a mode: one compiles, the next must not any more, the last is traced."""
        pair = self.pair()
        before = compilations()
        self.step(mode, pair)
        compiled = compilations().less(before)
        self.step(mode, pair)
        self.saved = 0
        torch.cuda.reset_peak_memory_stats()
        with self.trace.recording():
            self.step(mode, pair)
        late = compilations().graphs - before.graphs - compiled.graphs
        return self.report(mode, compiled, late)

    def report(self, mode: Any, compiled: Compilations, late: int) -> ModeReport:
        config = self.config
        length = config.train_seq_len
        width = config.model_dim // config.num_heads
        item = torch.finfo(self.model.dtype).bits // 8
        shape = Attention(
            self.sequences, length, config.num_heads, config.num_kv_heads, width, item
        )
        events = self.trace.events()
        table = tabulate(events, shape)
        ms = {name: milliseconds(table, name) for name in ("gemm", "attention", "triton", "aten")}
        total = milliseconds(table)
        return ModeReport(
            mode=str(mode),
            layers=len(self.model.plans[mode.passes]),
            sequences=self.sequences,
            tokens=length,
            graphs=compiled.graphs,
            breaks=compiled.breaks,
            late_graphs=late,
            compile_seconds=compiled.seconds,
            compile_cpu_seconds=compiled.cpu_seconds,
            launches=sum(1 for _ in launches(events)),
            attention=attention_taken(events),
            ms=total,
            gemm_ms=ms["gemm"],
            attention_ms=ms["attention"],
            triton_ms=ms["triton"],
            aten_ms=ms["aten"],
            other_ms=total - sum(ms.values()),
            peak_gb=torch.cuda.max_memory_allocated() / 1e9,
            saved_gb=self.saved / 1e9,
            host_waits=host_waits(events),
            table=table,
        )


class Compilations(NamedTuple):
    """Graphs that this process has compiled so far, and the time that has passed."""

    graphs: int
    breaks: int
    seconds: float
    cpu_seconds: float

    def less(self, other: Compilations) -> Compilations:
        return Compilations(
            self.graphs - other.graphs,
            self.breaks - other.breaks,
            self.seconds - other.seconds,
            self.cpu_seconds - other.cpu_seconds,
        )


def compilations() -> Compilations:
    graphs = counters["stats"]["unique_graphs"]
    breaks = sum(counters["graph_break"].values())
    return Compilations(graphs, breaks, time.perf_counter(), sum(os.times()[:4]))
