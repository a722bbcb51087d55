"""The model of train_gpt.py written in the usual way, as a contestant for bench.py.

One float32 weight a projection under autocast, PyTorch's fused attention, scales applied to the
data, all logits at once, an optimizer that loops over the matrices. The residual stream is DTYPE,
as in the script.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg

Micro = Iterator[tuple[Tensor, Tensor]]  # ids and targets, int64 [B, T], of every micro-batch
NOT_IMPLEMENTED = dict(
    num_shared=0,
    share_attn_only=True,
    use_unique_norms=True,
    depth_embed="learned",
    tie_embeddings=False,
    reference_bf16=True,
)
BACKENDS = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)


class Plain(NamedTuple):
    """How the plain implementation runs."""

    compile: bool = False  # the whole model as one graph, and Newton-Schulz
    attention: str = "default"  # CUDA: flash, cudnn or what PyTorch takes


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1.1920929e-07)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, E] with cos and sin [T, E/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Rope(NamedTuple):
    """Tables of the rotary embedding, [T, E/2]."""

    cos: Tensor
    sin: Tensor


class Conditions(NamedTuple):
    """What belongs to an effective layer; None where it is off."""

    gamma: Tensor | None  # [2, D]
    beta: Tensor | None  # [2, D]
    depth: Tensor | None  # [D]


class PlainBlock(nn.Module):
    """The weights of one layer."""

    def __init__(self, a: tg.Architecture) -> None:
        super().__init__()
        self.a = a
        D, hidden = a.model_dim, round(a.mlp_mult * a.model_dim)
        kv = D * a.num_kv_heads // a.num_heads
        self.q, self.out = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.k, self.v = nn.Linear(D, kv, bias=False), nn.Linear(D, kv, bias=False)
        self.up, self.down = nn.Linear(D, hidden, bias=False), nn.Linear(hidden, D, bias=False)
        self.mix = nn.Parameter(torch.zeros(D) if a.use_birkhoff_mix else torch.zeros(2, D))
        self.q_gain = nn.Parameter(torch.ones(a.num_heads))
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def attention(self, x: Tensor, rope: Rope) -> Tensor:
        B, T, D = x.shape
        E = D // self.a.num_heads
        q, k, v = (f(x).view(B, T, -1, E).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = rotate(norm(q), *rope) * self.q_gain.to(x.dtype)[:, None, None]
        k = rotate(norm(k), *rope)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def mlp(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.up(x if self.a.use_peri_norm else norm(x)), self.a.leaky_relu_slope)
        return norm(self.down(h.square())) if self.a.use_peri_norm else self.down(h.square())

    def mixed(self, x: Tensor, x0: Tensor) -> Tensor:
        """The stream x [B, T, D] with a share of the beginning x0."""
        if self.a.use_birkhoff_mix:
            carried = torch.sigmoid(self.mix)
            anchor = 1 - carried
        else:
            carried, anchor = self.mix
        return carried.to(x.dtype) * x + anchor.to(x.dtype) * x0

    def forward(self, x: Tensor, x0: Tensor, rope: Rope, cond: Conditions) -> Tensor:
        """x, x0 and what comes out: [B, T, D]."""
        x = self.mixed(x, x0)
        if cond.depth is not None:
            x = x + cond.depth
        for i, scale in enumerate((self.attn_scale, self.mlp_scale)):
            y = self.mlp(x) if i else self.attention(norm(x), rope)
            y = scale.to(x.dtype) * y
            if cond.gamma is not None:
                y = cond.gamma[i].to(x.dtype) * y
            x = x + y
            if cond.beta is not None:
                x = x + cond.beta[i].to(x.dtype)
        return x


class PlainGPT(nn.Module):
    """Prelude, looped core, coda, tied embedding.

    InputError for an architecture that it does not implement.
    """

    cos: Tensor
    sin: Tensor
    depth: Tensor

    def __init__(self, a: tg.Architecture) -> None:
        super().__init__()
        for name, refused in NOT_IMPLEMENTED.items():
            if getattr(a, name) == refused:
                shown = f"{name.upper()}={tg.show(refused)}"
                raise tg.InputError(f"the plain model does not implement {shown}")
        core = a.num_prelude + a.num_shared
        end = core + a.num_coda
        looped = [*range(a.num_prelude, core)] * a.num_loops
        self.order = [*range(a.num_prelude), *looped, *range(core, end)]
        self.a = a
        self.dtype: torch.dtype = getattr(torch, a.dtype)
        R, D = len(self.order), a.model_dim
        self.tok_emb = nn.Embedding(a.vocab_size, D)
        self.blocks = nn.ModuleList(PlainBlock(a) for _ in range(end))
        self.gamma = nn.Parameter(torch.ones(R, 2, D)) if a.use_timestep_scale else None
        self.beta = nn.Parameter(torch.zeros(R, 2, D)) if a.use_timestep_bias else None
        E = D // a.num_heads
        frequency = a.rope_base ** (-torch.arange(0, E, 2) / E)
        angle = torch.outer(torch.arange(a.train_seq_len), frequency)
        code = torch.sin(torch.arange(R)[:, None] / 10000.0 ** (torch.arange(D) / D))
        for name, values in dict(cos=angle.cos(), sin=angle.sin(), depth=code).items():
            self.register_buffer(name, values.to(self.dtype), persistent=False)

    def conditions(self) -> list[Conditions]:
        """Of every effective layer."""
        cap, gamma = self.a.timestep_gamma_max, self.gamma
        scales = gamma.clamp(-cap, cap) if gamma is not None and cap else gamma
        coded = self.a.depth_embed == "sinusoidal"
        return [
            Conditions(
                None if scales is None else scales[row],
                None if self.beta is None else self.beta[row],
                self.depth[row] if coded else None,
            )
            for row in range(len(self.order))
        ]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets [B, T] given ids [B, T]."""
        length, softcap = ids.shape[1], self.a.logit_softcap
        rope = Rope(self.cos[:length], self.sin[:length])
        x = x0 = norm(self.tok_emb(ids)).to(self.dtype)
        for cond, index in zip(self.conditions(), self.order):
            x = self.blocks[index](x, x0, rope, cond)
        logits = F.linear(norm(x), self.tok_emb.weight)
        logits = softcap * torch.tanh(logits / softcap)
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
        self.iterate: Callable[[Tensor, int], Tensor] = plain_newton_schulz
        if fast:
            self.iterate = torch.compile(plain_newton_schulz, dynamic=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        params, sizes = group["params"], [p.numel() for p in group["params"]]
        flat = torch.zeros(sum(sizes), dtype=self.dtype, device=params[0].device)
        updates = [part.view_as(p) for p, part in zip(params, flat.split(sizes))]
        for i in range(self.world.rank, len(params), self.world.size):
            updates[i].copy_(self.update(params[i], group["momentum"]))
        if self.world.size > 1:
            dist.all_reduce(flat)
        for p, update in zip(params, updates):
            p.add_(update.to(p.dtype), alpha=-group["lr"])

    def update(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The direction of a matrix, not yet times the learning rate."""
        assert p.grad is not None
        if not self.state[p]:
            self.state[p]["velocity"] = torch.zeros_like(p)
        velocity = self.state[p]["velocity"].mul_(momentum).add_(p.grad)
        u, tall = p.grad.add(velocity, alpha=momentum).to(self.dtype), len(p) > p.shape[1]
        u = self.iterate(u.T if tall else u, self.steps)
        return (u.T if tall else u) * max(1.0, len(p) / p.shape[1]) ** 0.5


class PlainBatches:
    """The tokens of tg.Batches, widened on the host and copied from pageable memory."""

    def __init__(self, batches: Any, tokens: Any, config: tg.Config, world: tg.World) -> None:
        self.tokens, self.config, self.world = tokens, config, world
        self.accumulation, self.sequences = batches.accumulation, batches.sequences

    def micro(self, step: int) -> Micro:
        T, size = self.config.train_seq_len, self.sequences * self.config.train_seq_len
        for i in range(self.accumulation):
            place = (i * self.world.size + self.world.rank) * size
            first = step * self.config.train_batch_tokens + place
            span = self.tokens.read(first, size + 1).long()
            ids, targets = span[:-1].view(-1, T), span[1:].view(-1, T)
            device = self.world.device
            yield ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)


class PlainTrainer:
    """The plain model with its optimizers; `train_step` at the full learning rates.

    More than one rank: DistributedDataParallel, and a word about the clock from all ranks at every
    step.
    """

    def __init__(
        self, config: tg.Config, world: tg.World, accumulation: int, options: Plain
    ) -> None:
        self.config, self.world, self.accumulation, self.loss = config, world, accumulation, 0.0
        self.model = PlainGPT(config.architecture()).to(world.device)
        self.forward = self.distributed(options)
        self.attention: Callable[[], Any] = contextlib.nullcontext
        if options.attention in BACKENDS:
            self.attention = functools.partial(sdpa_kernel, BACKENDS[options.attention])
        self.autocast = torch.autocast(
            world.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"
        )
        self.muon = self.make_muon(options.compile)
        self.optimizers: list[torch.optim.Optimizer] = [self.make_adam(), self.muon]

    def distributed(self, options: Plain) -> Any:
        """The model as it is called: compiled, and with gradients summed over ranks."""
        model: Any = self.model
        if options.compile:
            model = torch.compile(self.model, dynamic=False, fullgraph=True)
        if self.world.size == 1:
            return model
        with warnings.catch_warnings():
            # broadcast_buffers has a new name in torch 2.13
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    def matrices(self) -> list[nn.Parameter]:
        found = []
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                assert isinstance(module.weight, nn.Parameter)
                found.append(module.weight)
        return found

    def make_muon(self, fast: bool) -> PlainMuon:
        return PlainMuon(self.matrices(), self.config, self.world, fast)

    def make_adam(self) -> torch.optim.Adam:
        config, embedding = self.config, self.model.tok_emb.weight
        known = {*self.matrices(), embedding}
        others = [p for p in self.model.parameters() if p not in known]
        groups = [
            dict(params=[embedding], lr=config.tied_embed_lr),
            dict(params=others, lr=config.scalar_lr),
        ]
        return torch.optim.Adam(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps)

    def train_step(self, step: int, seconds: float, micro: Micro) -> None:
        self.loss, momentum = 0.0, tg.muon_momentum(self.config, step, seconds)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for i, (ids, targets) in enumerate(micro, 1):
            if self.world.size > 1:
                self.forward.require_backward_grad_sync = i == self.accumulation
            with self.autocast, self.attention():
                loss = self.forward(ids, targets) / self.accumulation
            loss.backward()
            self.loss += loss.item()
        self.muon.param_groups[0]["momentum"] = momentum
        for optimizer in self.optimizers:
            optimizer.step()
        if self.world.size > 1:
            out_of_time = torch.zeros((), dtype=torch.int32, device=self.world.device)
            dist.all_reduce(out_of_time)
            out_of_time.item()
