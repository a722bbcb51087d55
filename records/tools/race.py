"""Contestants for bench.py: train_gpt.py under any settings or of any commit, and a plain implementation of
its model. They start from the same parameters, are checked to compute the same, and take their steps in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg

Micro = Iterator[
    tuple[Tensor, Tensor]
]  # ids and targets, int64 [B, T] each, for every micro-batch of a step

# ---- 1. The plain implementation -------------------------------------------------------------------------
# One float32 weight a projection under autocast, PyTorch's fused attention, scales applied to the data, all
# logits at once, an optimizer that loops over the matrices. The residual stream is DTYPE, as in ours.


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1.1920929e-07)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, E] with cos and sin [T, E/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class PlainBlock(nn.Module):
    """The weights of one layer; what belongs to an effective layer is passed in."""

    def __init__(self, a: tg.Architecture) -> None:
        super().__init__()
        self.a, D, hidden = a, a.model_dim, round(a.mlp_mult * a.model_dim)
        self.q, self.out = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.k, self.v = (
            nn.Linear(D, D * a.num_kv_heads // a.num_heads, bias=False) for _ in range(2)
        )
        self.up, self.down = nn.Linear(D, hidden, bias=False), nn.Linear(hidden, D, bias=False)
        self.mix = nn.Parameter(torch.zeros(D) if a.use_birkhoff_mix else torch.zeros(2, D))
        self.q_gain = nn.Parameter(torch.ones(a.num_heads))
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        (B, T, D), E = x.shape, x.shape[-1] // self.a.num_heads
        q, k, v = (f(x).view(B, T, -1, E).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (
            rotate(norm(q), *rope) * self.q_gain.to(x.dtype)[:, None, None],
            rotate(norm(k), *rope),
        )
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def mlp(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.up(x if self.a.use_peri_norm else norm(x)), self.a.leaky_relu_slope)
        return norm(self.down(h.square())) if self.a.use_peri_norm else self.down(h.square())

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        rope: tuple[Tensor, Tensor],
        gamma: Tensor | None,
        beta: Tensor | None,
        depth: Tensor | None,
    ) -> Tensor:
        """x, x0 [B, T, D]; gamma, beta [2, D] and depth [D] of the effective layer, None where off."""
        carried = torch.sigmoid(self.mix) if self.a.use_birkhoff_mix else self.mix[0]
        anchor = 1 - carried if self.a.use_birkhoff_mix else self.mix[1]
        x = carried.to(x.dtype) * x + anchor.to(x.dtype) * x0
        x = x if depth is None else x + depth
        for i, scale in enumerate((self.attn_scale, self.mlp_scale)):
            y = scale.to(x.dtype) * (self.mlp(x) if i else self.attention(norm(x), rope))
            y = y if gamma is None else gamma[i].to(x.dtype) * y
            x = x + y if beta is None else x + y + beta[i].to(x.dtype)
        return x


class PlainGPT(nn.Module):
    """Prelude, looped core, coda, tied embedding; ValueError for an architecture it does not implement."""

    def __init__(self, a: tg.Architecture) -> None:
        super().__init__()
        for name, refused in dict(
            num_shared=0,
            share_attn_only=True,
            use_unique_norms=True,
            depth_embed="learned",
            tie_embeddings=False,
            reference_bf16=True,
        ).items():
            if getattr(a, name) == refused:
                raise ValueError(
                    f"the plain model does not implement {name.upper()}={tg.show(refused)}"
                )
        coda, end = a.num_prelude + a.num_shared, a.num_prelude + a.num_shared + a.num_coda
        self.order = [
            *range(a.num_prelude),
            *[*range(a.num_prelude, coda)] * a.num_loops,
            *range(coda, end),
        ]
        self.a, self.dtype, R, D = a, getattr(torch, a.dtype), len(self.order), a.model_dim
        self.tok_emb = nn.Embedding(a.vocab_size, D)
        self.blocks = nn.ModuleList(PlainBlock(a) for _ in range(end))
        self.gamma = nn.Parameter(torch.ones(R, 2, D)) if a.use_timestep_scale else None
        self.beta = nn.Parameter(torch.zeros(R, 2, D)) if a.use_timestep_bias else None
        frequency = a.rope_base ** (-torch.arange(0, D // a.num_heads, 2) / (D // a.num_heads))
        angle = torch.outer(torch.arange(a.train_seq_len), frequency)
        code = torch.sin(torch.arange(R)[:, None] / 10000.0 ** (torch.arange(D) / D))
        for name, values in dict(cos=angle.cos(), sin=angle.sin(), depth=code).items():
            self.register_buffer(name, values.to(self.dtype), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets [B, T] given ids [B, T]."""
        rope, cap = (self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]), self.a.timestep_gamma_max
        gamma = self.gamma.clamp(-cap, cap) if self.gamma is not None and cap else self.gamma
        tables = gamma, self.beta, self.depth if self.a.depth_embed == "sinusoidal" else None
        x = x0 = norm(self.tok_emb(ids)).to(self.dtype)
        for row, i in enumerate(self.order):
            x = self.blocks[i](x, x0, rope, *(None if t is None else t[row] for t in tables))
        logits = F.linear(norm(x), self.tok_emb.weight)
        logits = self.a.logit_softcap * torch.tanh(logits / self.a.logit_softcap)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plain_newton_schulz(x: Tensor, steps: int) -> Tensor:
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class PlainMuon(torch.optim.Optimizer):
    """Muon, one matrix after the other; every rank iterates on its share of them, in turn."""

    def __init__(
        self, params: list[nn.Parameter], config: tg.Config, world: tg.World, fast: bool
    ) -> None:
        super().__init__(params, dict(lr=config.matrix_lr, momentum=0.0))
        self.world, self.steps, self.dtype = world, config.muon_backend_steps, torch.bfloat16
        self.iterate = (
            torch.compile(plain_newton_schulz, dynamic=False) if fast else plain_newton_schulz
        )

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        params, sizes = group["params"], [p.numel() for p in group["params"]]
        flat = torch.zeros(sum(sizes), dtype=self.dtype, device=params[0].device)
        updates = [part.view_as(p) for p, part in zip(params, flat.split(sizes))]
        for i in range(self.world.rank, len(params), self.world.size):
            p = params[i]
            if not self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = self.state[p]["velocity"].mul_(group["momentum"]).add_(p.grad)
            u, tall = (
                p.grad.add(velocity, alpha=group["momentum"]).to(self.dtype),
                len(p) > p.shape[1],
            )
            u = self.iterate(u.T if tall else u, self.steps)
            updates[i].copy_((u.T if tall else u) * max(1.0, len(p) / p.shape[1]) ** 0.5)
        if self.world.size > 1:
            dist.all_reduce(flat)
        for p, update in zip(params, updates):
            p.add_(update.to(p.dtype), alpha=-group["lr"])


class Plain(NamedTuple):
    """How the plain implementation runs."""

    compile: bool = False  # the whole model as one graph, and Newton-Schulz
    attention: str = "default"  # CUDA: flash, cudnn or what PyTorch takes


class PlainBatches:
    """The tokens of tg.Batches, widened on the host and copied from pageable memory."""

    def __init__(
        self, batches: tg.Batches, tokens: tg.Tokens, config: tg.Config, world: tg.World
    ) -> None:
        self.tokens, self.config, self.world = tokens, config, world
        self.accumulation, self.sequences = batches.accumulation, batches.sequences

    def micro(self, step: int) -> Micro:
        T, size = self.config.train_seq_len, self.sequences * self.config.train_seq_len
        for i in range(self.accumulation):
            first = (
                step * self.config.train_batch_tokens
                + (i * self.world.size + self.world.rank) * size
            )
            span = self.tokens.read(first, size + 1).long()
            ids, targets = span[:-1].view(-1, T), span[1:].view(-1, T)
            yield tuple(t.to(self.world.device, non_blocking=True) for t in (ids, targets))


class PlainTrainer:
    """The plain model with its optimizers; `train_step` as that of tg.Trainer, at the full learning rates.
    More than one rank: DistributedDataParallel, and a word about the clock from all ranks at every step."""

    def __init__(
        self, config: tg.Config, world: tg.World, accumulation: int, options: Plain
    ) -> None:
        self.config, self.world, self.accumulation, self.loss = config, world, accumulation, 0.0
        self.model = PlainGPT(config.architecture()).to(world.device)
        model = (
            torch.compile(self.model, dynamic=False, fullgraph=True)
            if options.compile
            else self.model
        )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # broadcast_buffers has a new name in torch 2.13
            self.forward = (
                model
                if world.size == 1
                else nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
            )
        backends = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)
        forced = functools.partial(sdpa_kernel, backends.get(options.attention))
        self.attention = forced if options.attention in backends else contextlib.nullcontext
        self.autocast = torch.autocast(
            world.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"
        )
        matrices = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        embedding, known = self.model.tok_emb.weight, {*matrices, self.model.tok_emb.weight}
        adam = [
            dict(params=[embedding], lr=config.tied_embed_lr),
            dict(
                params=[p for p in self.model.parameters() if p not in known], lr=config.scalar_lr
            ),
        ]
        self.optimizers = [
            torch.optim.Adam(adam, betas=(config.beta1, config.beta2), eps=config.adam_eps),
            PlainMuon(matrices, config, world, options.compile),
        ]

    def train_step(self, step: int, seconds: float, micro: Micro) -> None:
        self.loss, momentum = 0.0, tg.muon_momentum(self.config, step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for i, (ids, targets) in enumerate(micro, 1):
            if self.world.size > 1:
                self.forward.require_backward_grad_sync = i == self.accumulation
            with self.autocast, self.attention():
                loss = self.forward(ids, targets) / self.accumulation
            loss.backward()
            self.loss += loss.item()
        self.optimizers[1].param_groups[0]["momentum"] = momentum
        for optimizer in self.optimizers:
            optimizer.step()
        if self.world.size > 1:
            out_of_time = torch.zeros((), dtype=torch.int32, device=self.world.device)
            dist.all_reduce(out_of_time)
            out_of_time.item()


# ---- 2. Contestants --------------------------------------------------------------------------------------
# Every contestant is built from a copy of the script that is a module of its own: no compiled graph, cache or
# limit on recompilations is shared, and two commits are no other case than two settings.
FROZEN = dict(
    max_wallclock_seconds=0.0, warmdown_iters=0, iterations=1 << 30
)  # no schedule moves meanwhile


class Mismatch(RuntimeError):
    """The contestants do not compute the same: their speeds cannot be compared."""


@functools.cache
def load_script(path: Path, copy_of_it: int) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{copy_of_it}_of_bench", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Case:
    """What makes a contestant: variables, a script, and whether it is the plain implementation of it."""

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
            raise ValueError(f"{', '.join(sorted(unknown))}: not an option of train_gpt.py")
        config = dataclasses.replace(kind.from_env(self.env), **FROZEN)
        if check and torch.cuda.is_available() and "ATTN_BACKEND" in known:
            config = dataclasses.replace(config, attn_backend=known["ATTN_BACKEND"].default)
        return dataclasses.replace(config, dtype="float32") if check else config


@dataclasses.dataclass
class Contestant:
    trainer: Any  # tg.Trainer, of any commit, or PlainTrainer
    batches: Any  # of its script, or PlainBatches
    config: Any
    world: Any
    attention: Callable[[], Any]  # the context in which a run takes its steps

    def step(self, step: int) -> None:
        with self.attention():
            self.trainer.train_step(step, 0.0, self.batches.micro(step))

    def loss(self) -> float:
        """Of the last step, the mean of all ranks; waits for the device."""
        if not isinstance(self.trainer, PlainTrainer):
            return self.trainer.flat[-1].item()
        mine = torch.tensor(self.trainer.loss / self.world.size, device=self.world.device)
        return self.world.sum_(mine).item()

    def values(self, read: Callable[[nn.Parameter], Tensor], as_plain: bool) -> dict[str, Tensor]:
        ours = not isinstance(self.trainer, PlainTrainer)
        return values(self.trainer.model, read, as_plain and ours)


def values(
    model: nn.Module, read: Callable[[nn.Parameter], Tensor], as_plain: bool
) -> dict[str, Tensor]:
    """What `read` gives for parameters (value, gradient) by name; `as_plain`: ours under the plain names."""
    if not as_plain:
        return {name: read(p) for name, p in model.named_parameters()}
    found = {"tok_emb.weight": read(model.tok_emb)} | {
        n: read(p) for n, p in model.cond.named_parameters()
    }
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


def draw(case: Case, noise: float = 0.0) -> nn.Module:
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
    batches = script.Batches(tokens, config, world)
    if case.plain:
        options = case.plain._replace(attention="default") if check else case.plain
        trainer = PlainTrainer(config, world, batches.accumulation, options)
        batches = PlainBatches(batches, tokens, config, world)
    else:
        model = script.GPT(config.architecture(), config.tied_embed_init_std).to(world.device)
        trainer = script.Trainer(config, world, model, batches)
    given, own = (
        values(start, lambda p: p.data, bool(case.plain)),
        dict(trainer.model.named_parameters()),
    )
    if odd := {
        n
        for n in given.keys() | own.keys()
        if n not in given or n not in own or given[n].shape != own[n].shape
    }:
        raise Mismatch(f"they have other parameters or shapes: {', '.join(sorted(odd)[:5])}")
    for name, p in own.items():
        p.data.copy_(given[name])
    chosen = contextlib.nullcontext if case.plain else attention_of(script, config)
    return Contestant(trainer, batches, config, world, chosen)


def attention_of(script: ModuleType, config: Any) -> Callable[[], Any]:
    """The context that the script's `main` enters for ATTN_BACKEND; commits without that option have none."""
    if not hasattr(script, "KERNELS"):
        return contextlib.nullcontext
    return functools.partial(sdpa_kernel, script.KERNELS[config.attn_backend], set_priority=True)


# ---- 3. The same mathematics -----------------------------------------------------------------------------
LIMITS = dict(loss=1e-5, gradient=1e-3, update=1e-3)  # relative, but for the loss


def one_step(
    contestant: Contestant, sequences: int, as_plain: bool
) -> dict[str, dict[str, Tensor]]:
    """Loss, gradients and updates of a step on so many sequences. More than one block of our attention and
    one chunk of our head, both ragged; Newton-Schulz in float32, too, because rounding to bfloat16 moves an
    update by a tenth and more."""
    trainer, config, world = contestant.trainer, contestant.config, contestant.world
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "dtype"):
            optimizer.dtype = torch.float32
    random, shape = (
        torch.Generator().manual_seed(world.rank),
        (sequences, min(config.train_seq_len, 192) + 1),
    )
    tokens = torch.randint(config.vocab_size, shape, generator=random).to(world.device)
    before = contestant.values(lambda p: p.detach().clone(), as_plain)
    micro = [(ids[:, :-1], ids[:, 1:]) for ids in tokens.chunk(contestant.batches.accumulation)]
    trainer.train_step(0, 0.0, micro)
    gradient = contestant.values(
        lambda p: torch.zeros_like(p) if p.grad is None else p.grad, as_plain
    )
    after = contestant.values(lambda p: p.detach(), as_plain)
    return dict(
        loss=dict(all=torch.tensor(contestant.loss())),
        gradient=gradient,
        update={name: after[name] - before[name] for name in before},
    )


def gate(cases: dict[str, Case], world: tg.World | None = None) -> dict[str, dict[str, float]]:
    """The largest relative differences from the first case after a step of all in float32; Mismatch if beyond
    rounding. The parameters have noise, because those that start at zero hide what is behind them."""
    start, as_plain = (
        draw(next(iter(cases.values())), 0.3),
        any(case.plain for case in cases.values()),
    )
    line = {name: build(case, start, world, check=True) for name, case in cases.items()}
    sequences = 3 * math.lcm(*(contestant.batches.accumulation for contestant in line.values()))
    (_, first), *others = [(name, one_step(c, sequences, as_plain)) for name, c in line.items()]
    found = {}
    for name, other in others:
        found[name] = worst = {
            kind: apart(first[kind], other[kind], kind != "loss") for kind in LIMITS
        }
        if not all(worst[kind] <= limit for kind, limit in LIMITS.items()):
            raise Mismatch(
                f"{name} and {next(iter(cases))} differ by {worst}; the limits are {LIMITS}"
            )
    return found


def apart(a: dict[str, Tensor], b: dict[str, Tensor], relative: bool) -> float:
    """The largest |b - a| (L2) of all names, relative to |a| if so; NaN if any is."""
    sizes = {name: value.norm().clamp_min(1e-8) if relative else 1.0 for name, value in a.items()}
    return float(np.max([((b[name] - a[name]).norm() / sizes[name]).item() for name in a]))


def curves(cases: dict[str, Case], steps: int, world: tg.World | None = None) -> dict[str, Any]:
    """Losses of so many steps from one start, as configured, and how far any is from the first case's."""
    start = draw(next(iter(cases.values())))
    line = {name: build(case, start, world) for name, case in cases.items()}
    losses: dict[str, list[float]] = {name: [] for name in line}
    for step in range(steps):
        for name, contestant in line.items():
            contestant.step(step)
            losses[name].append(contestant.loss())
    base = np.array(next(iter(losses.values())))
    return dict(
        losses=losses,
        largest_difference={
            name: float(np.abs(np.array(curve) - base).max())
            for name, curve in [*losses.items()][1:]
        },
    )


# ---- 4. The measurement ----------------------------------------------------------------------------------
PEAK_TFLOPS = {"H200": 989.0, "H100 80GB HBM3": 989.0}  # by name of the device: dense bfloat16, SXM


def flop_per_token(config: Any) -> dict[str, float]:
    """Floating-point operations of training on a token: twice a multiplication and addition, three times the
    forward pass. `matrices` of the effective layers, each as often as it is used; `attention`, whose token
    sees (T + 1) / 2 others on average; `head`. Nothing that is recomputed, side embeddings, optimizers."""
    D, T, kv = config.model_dim, config.train_seq_len, config.num_kv_heads / config.num_heads
    layers = len(
        tg.make_plan(config, config.schedule()[0][1])
    )  # of the first phase: schedules stand still
    return dict(
        matrices=6 * layers * (D * D * (2 + 2 * kv) + 2 * D * round(config.mlp_mult * D)),
        attention=6 * layers * (T + 1) * D,
        head=6 * D * config.vocab_size,
    )


def peak_flops(config: Any, world: tg.World, given: float) -> float:
    """Operations per second that MFU is a part of; 0: not known, no MFU."""
    name = (
        torch.cuda.get_device_name(world.device)
        if world.on_cuda and config.dtype == "bfloat16"
        else ""
    )
    return (
        1e12
        * world.size
        * (given or next((v for key, v in PEAK_TFLOPS.items() if key in name), 0.0))
    )


def graphs() -> np.ndarray:
    """Graphs compiled and graph breaks in this process so far; importing the compiler takes seconds."""
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
    return dict(
        zip(("p10", "median", "p90"), np.percentile(values, (10, 50, 90)).round(4).tolist())
    )


class Warm(NamedTuple):
    """A contestant behind its warm-up, and what that cost."""

    contestant: Contestant
    facts: dict[str, Any]


def warm_up(case: Case, start: nn.Module, steps: int, world: tg.World | None = None) -> Warm:
    """Builds a contestant and takes its first steps, which compile. Peak memory is that of a step, less what
    was allocated before (other contestants)."""
    cuda = torch.cuda.is_available() and torch.cuda
    before, held, began = graphs(), cuda and cuda.memory_allocated(), time.perf_counter()
    contestant = build(case, start, world)
    for step in range(steps):
        if cuda:
            cuda.reset_peak_memory_stats()
        contestant.step(step)
    contestant.world.synchronize()
    compiled, breaks = (graphs() - before).tolist()
    return Warm(
        contestant,
        dict(
            warmup_seconds=round(time.perf_counter() - began, 2),
            graphs=compiled,
            graph_breaks=breaks,
            peak_mib=(cuda.max_memory_allocated() - held) >> 20 if cuda else None,
        ),
    )


class Rounds(NamedTuple):
    """Steps that were taken in turn."""

    ms: dict[str, np.ndarray]  # of every step, by contestant
    wall_seconds: float  # of all together
    recompiles: dict[str, int]  # graphs compiled in these steps


def cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(contestants: dict[str, Contestant], first: int, steps: int) -> Rounds:
    """Steps `first` and so on of every contestant, loader to optimizer; who begins changes by round. On CUDA
    the times are those of events in the stream, and the host waits for the device once, at the end."""
    names, world = [*contestants], next(iter(contestants.values())).world
    stamp = cuda_event if world.on_cuda else time.perf_counter
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    recompiles = dict.fromkeys(names, 0)
    world.synchronize()
    began = time.perf_counter()
    for step in range(first, first + steps):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            before, start = graphs(), stamp()
            contestants[name].step(step)
            marks[name].append((start, stamp()))
            recompiles[name] += int((graphs() - before)[0])
    world.synchronize()
    wall = time.perf_counter() - began
    ms = (lambda a, b: a.elapsed_time(b)) if world.on_cuda else (lambda a, b: 1e3 * (b - a))
    times = {name: np.array([ms(*pair) for pair in pairs]) for name, pairs in marks.items()}
    return Rounds(times, wall, recompiles)


def split_of_a_step(contestant: Contestant, first: int, steps: int) -> dict[str, Any]:
    """Time in Adam, in Muon and in the rest of a step, from steps of their own: the device is waited for
    around every optimizer, which the times of `measure` are spared."""
    ms = np.zeros((steps, 3))
    clock = {"step": first}

    def add(which: int, sign: int) -> None:
        contestant.world.synchronize()
        ms[clock["step"] - first, which] += sign * 1e3 * time.perf_counter()

    hooks = [
        hook
        for i, optimizer in enumerate(contestant.trainer.optimizers)
        for hook in (
            optimizer.register_step_pre_hook(lambda *_, i=i: add(i + 1, -1)),
            optimizer.register_step_post_hook(lambda *_, i=i: add(i + 1, 1)),
        )
    ]
    for clock["step"] in range(first, first + steps):
        add(0, -1)
        contestant.step(clock["step"])
        add(0, 1)
    for hook in hooks:
        hook.remove()
    total, adam, muon = ms.T
    return dict(
        forward_backward_ms=spread(total - adam - muon), adam_ms=spread(adam), muon_ms=spread(muon)
    )


@contextlib.contextmanager
def device_watch() -> Iterator[list[list[float]]]:
    """SM clock in MHz, power in W and temperature in degrees once a second, where there is an nvidia-smi."""
    readings: list[list[float]] = []
    if not (torch.cuda.is_available() and shutil.which("nvidia-smi")):
        yield readings
        return
    command = [
        "nvidia-smi",
        "-i",
        "0",
        "--query-gpu=clocks.sm,power.draw,temperature.gpu",
        "-lms",
        "1000",
        "--format=csv,noheader,nounits",
    ]
    with tempfile.TemporaryFile("w+") as file, subprocess.Popen(command, stdout=file) as process:
        try:
            yield readings
        finally:
            process.terminate()
            process.wait()
            file.seek(0)
            readings += [
                [float(x) for x in line.split(",")] for line in file if line.count(",") == 2
            ]


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
    """What JSON says of a contestant: the script's hash and all of its configuration, but for paths."""
    config = {
        k: v
        for k, v in dataclasses.asdict(case.config()).items()
        if not k.endswith(("_path", "_dir"))
    }
    return dict(
        script_sha256=hashlib.sha256(case.path.read_bytes()).hexdigest(),
        config=config,
        plain=case.plain and case.plain._asdict(),
    )


def run(cases: dict[str, Case], args: argparse.Namespace) -> dict[str, Any]:
    """Everything about the cases' steps: each by itself, and its time as a multiple of the first one's."""
    if (
        "torch._dynamo" in sys.modules
    ):  # else the gate's graphs may serve here, too, and spare the warm-up
        torch.compiler.reset()
    start = draw(next(iter(cases.values())))
    warm = {name: warm_up(case, start, args.warmup) for name, case in cases.items()}
    line = {name: contestant for name, (contestant, _) in warm.items()}
    with device_watch() as readings:
        rounds = measure(line, args.warmup, args.steps)
    accounted = sum(ms.sum() for ms in rounds.ms.values()) / 1e3
    base, *others = cases
    result: dict[str, Any] = dict(
        contestants={},
        ratios={f"{name} / {base}": spread(rounds.ms[name] / rounds.ms[base]) for name in others},
    )
    for name, (contestant, facts) in warm.items():
        config, ms = contestant.config, rounds.ms[name]
        speed, flop = 1e3 * config.train_batch_tokens / np.median(ms), flop_per_token(config)
        peak = peak_flops(config, contestant.world, args.peak_tflops)
        result["contestants"][name] = dict(
            step_ms=spread(ms),
            tokens_per_second=round(speed),
            mflop_per_token=sum(flop.values()) / 1e6,
            mfu=speed * sum(flop.values()) / peak if peak else None,
            **facts,
            recompiles_after_warmup=rounds.recompiles[name],
            last_loss=contestant.loss(),
            **split_of_a_step(contestant, args.warmup + args.steps, min(args.steps, 5)),
            every_step_ms=ms.round(3).tolist(),
            **describe(cases[name]),
        )
    return result | dict(
        steps=args.steps,
        warmup=args.warmup,
        wall_seconds=rounds.wall_seconds,
        seconds_of_steps=accounted,
        clock_power_temperature=readings,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    )
