"""How fast train_gpt.py trains on this machine, compared with a plain eager implementation of the same model.

    python records/bench.py                                     # D 128, 8,192 tokens a step, bfloat16
    python records/bench.py --set MODEL_DIM=256 --out records/bench/NAME.json

The two take their steps in turn on the same random tokens, in one process with the same threads, so that
other load on the machine meets both. Nothing is timed unless one step of each, from the same parameters, gave
the same loss, gradients and updates. Shapes are named as in train_gpt.py.
"""
from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

Micro = list[tuple[Tensor, Tensor]]  # ids and targets, int64 [B, T] each, for every micro-batch of a step

# ---- The plain implementation ----------------------------------------------------------------------------
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
        self.k, self.v = (nn.Linear(D, D * a.num_kv_heads // a.num_heads, bias=False) for _ in range(2))
        self.up, self.down = nn.Linear(D, hidden, bias=False), nn.Linear(hidden, D, bias=False)
        self.mix = nn.Parameter(torch.zeros(D) if a.use_birkhoff_mix else torch.zeros(2, D))
        self.q_gain = nn.Parameter(torch.ones(a.num_heads))
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        (B, T, D), E = x.shape, x.shape[-1] // self.a.num_heads
        q, k, v = (f(x).view(B, T, -1, E).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(norm(q), *rope) * self.q_gain.to(x.dtype)[:, None, None], rotate(norm(k), *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def mlp(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.up(x if self.a.use_peri_norm else norm(x)), self.a.leaky_relu_slope)
        return norm(self.down(h.square())) if self.a.use_peri_norm else self.down(h.square())

    def forward(self, x: Tensor, x0: Tensor, rope: tuple[Tensor, Tensor], gamma: Tensor | None,
                beta: Tensor | None, depth: Tensor | None) -> Tensor:
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
                num_shared=0, share_attn_only=True, use_unique_norms=True, depth_embed="learned",
                tie_embeddings=False, reference_bf16=True).items():
            if getattr(a, name) == refused:
                raise ValueError(f"the plain model does not implement {name.upper()}={tg.show(refused)}")
        coda, end = a.num_prelude + a.num_shared, a.num_prelude + a.num_shared + a.num_coda
        self.order = [*range(a.num_prelude), *[*range(a.num_prelude, coda)] * a.num_loops, *range(coda, end)]
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

class PlainMuon(torch.optim.Optimizer):
    """Muon, one matrix after the other."""

    def __init__(self, params: list[nn.Parameter], lr: float, steps: int) -> None:
        super().__init__(params, dict(lr=lr, momentum=0.0))
        self.steps, self.dtype = steps, torch.bfloat16

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = self.state[p]["velocity"].mul_(group["momentum"]).add_(p.grad)
            x, tall = p.grad.add(velocity, alpha=group["momentum"]).to(self.dtype), len(p) > p.shape[1]
            x = (x.T if tall else x) / (x.norm() + 1e-7)
            for _ in range(self.steps):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            scale = max(1.0, len(p) / p.shape[1]) ** 0.5
            p.add_((x.T if tall else x).to(p.dtype), alpha=-group["lr"] * scale)

class PlainTrainer:
    """The plain model with its optimizers; `train_step` as that of tg.Trainer, at the full learning rates."""

    def __init__(self, config: tg.Config, world: tg.World, batches: tg.Batches) -> None:
        self.config, self.accumulation, self.loss = config, batches.accumulation, 0.0
        self.model = PlainGPT(config.architecture()).to(world.device)
        self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
        matrices = {m.weight for m in self.model.modules() if isinstance(m, nn.Linear)}
        embedding = {self.model.tok_emb.weight}
        adam = [dict(params=[*embedding], lr=config.tied_embed_lr),
                dict(params=[*{*self.model.parameters()} - matrices - embedding], lr=config.scalar_lr)]
        self.optimizers = [torch.optim.Adam(adam, betas=(config.beta1, config.beta2), eps=config.adam_eps),
                           PlainMuon([*matrices], config.matrix_lr, config.muon_backend_steps)]

    def train_step(self, step: int, seconds: float, micro: Micro) -> None:
        self.loss, momentum = 0.0, tg.muon_momentum(self.config, step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for ids, targets in micro:
            with self.autocast:
                loss = self.model(ids, targets) / self.accumulation
            loss.backward()
            self.loss += loss.item()
        self.optimizers[1].param_groups[0]["momentum"] = momentum
        for optimizer in self.optimizers:
            optimizer.step()

# ---- The same mathematics --------------------------------------------------------------------------------

class Mismatch(RuntimeError):
    """The implementations do not compute the same: their speeds cannot be compared."""

def as_plain(ours: tg.GPT, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """What `read` gives for our parameters (value, gradient), under the names of the plain model."""
    found = {"tok_emb.weight": read(ours.tok_emb)} | {n: read(p) for n, p in ours.cond.named_parameters()}
    for i, (mix, attn, mlp) in enumerate(zip(ours.mix, ours.attn, ours.mlp)):
        q, k, v = read(attn.qkv.weight).split(attn.qkv.weight.parts)
        block = {"q.weight": q, "k.weight": k, "v.weight": v, "out.weight": read(attn.proj.weight),
                 "up.weight": read(mlp.fc.weight), "down.weight": read(mlp.proj.weight), "mix": read(mix.weight),
                 "q_gain": read(attn.q_gain), "attn_scale": read(attn.scale), "mlp_scale": read(mlp.scale)}
        found |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return found

def make_pair(config: tg.Config, noise: float = 0.0) -> tuple[tg.Trainer, PlainTrainer]:
    """Our trainer and the plain one with equal parameters; `noise` is added to what training starts from."""
    config, world = replace(config, max_wallclock_seconds=0.0, warmdown_iters=0), tg.World({})
    batches = tg.Batches(None, config, world)
    plain = PlainTrainer(config, world, batches)
    torch.manual_seed(config.seed)
    model = tg.GPT(config.architecture(), config.tied_embed_init_std)
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    plain.model.load_state_dict(as_plain(model, lambda p: p.data))
    return tg.Trainer(config, world, model.to(world.device), batches), plain

def random_tokens(ours: tg.Trainer, sequences: int, length: int) -> Micro:
    """A step's micro-batches of so many sequences each."""
    shape = ours.batches.accumulation, sequences, length + 1
    draw = torch.randint(ours.config.vocab_size, shape, device=ours.world.device)
    return [(ids[:, :-1], ids[:, 1:]) for ids in draw]

def gate(config: tg.Config) -> dict[str, float]:
    """The largest relative differences after a step of both in float32; Mismatch if beyond rounding.

    Noise, because parameters that start at zero hide what is behind them; more than one block of our
    attention and one chunk of our head, both ragged; Newton-Schulz in float32, too, because rounding to
    bfloat16 moves an update by a tenth and more.
    """
    ours, plain = make_pair(replace(config, dtype="float32"), noise=0.3)
    ours.optimizers[1].dtype = plain.optimizers[1].dtype = torch.float32
    before = as_plain(ours.model, lambda p: p.detach().clone())
    tokens = random_tokens(ours, 3, min(config.train_seq_len, 192))
    ours.train_step(0, 0.0, tokens)
    plain.train_step(0, 0.0, tokens)
    gradients, after = as_plain(ours.model, lambda p: p.grad), as_plain(ours.model, lambda p: p.detach())
    found = dict(loss=[abs(plain.loss - ours.flat[-1].item())], gradient=[], update=[])
    for name, p in plain.model.named_parameters():
        for kind, a, b in (("gradient", p.grad, gradients[name]),
                           ("update", p.detach() - before[name], after[name] - before[name])):
            found[kind].append(((a - b).norm() / b.norm().clamp_min(1e-8)).item())
    worst = {kind: float(np.max(values)) for kind, values in found.items()}  # unlike max(), keeps NaN
    limits = dict(loss=1e-5, gradient=1e-3, update=1e-3)
    if not all(worst[kind] <= limit for kind, limit in limits.items()):
        raise Mismatch(f"ours and the plain implementation differ by {worst}; the limits are {limits}")
    return worst

# ---- The measurement -------------------------------------------------------------------------------------

class Stopwatch:
    """Milliseconds of every step of a trainer, and of the optimizers in it: `ms` is a list of such pairs."""

    def __init__(self, trainer: tg.Trainer | PlainTrainer, world: tg.World) -> None:
        self.trainer, self.world, self.ms = trainer, world, []
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.add(1, -1))
            optimizer.register_step_post_hook(lambda *_: self.add(1, 1))

    def add(self, which: int, sign: int) -> None:
        self.world.synchronize()
        self.ms[-1][which] += sign * 1e3 * time.perf_counter()

    def step(self, step: int, micro: Micro) -> None:
        self.ms.append([0.0, 0.0])
        self.add(0, -1)
        self.trainer.train_step(step, 0.0, micro)
        self.add(0, 1)

def spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("p10", "median", "p90"), np.percentile(values, (10, 50, 90)).round(3).tolist()))

def measure(config: tg.Config, steps: int, warmup: int) -> dict[str, Any]:
    """Times of both, taken in turn; the first `warmup` steps are left out."""
    ours, plain = make_pair(config)
    watches, result = (Stopwatch(ours, ours.world), Stopwatch(plain, ours.world)), {}
    for step in range(warmup + steps):
        tokens = random_tokens(ours, ours.batches.sequences, config.train_seq_len)
        for watch in watches:
            watch.step(step, tokens)
    times = [np.array(watch.ms[warmup:]).T for watch in watches]
    losses = ours.flat[-1].item(), plain.loss
    for name, (total, optimizer), loss in zip(("ours", "plain"), times, losses):
        result[name] = dict(
            tokens_per_second=round(1e3 * config.train_batch_tokens / np.median(total)), last_loss=loss,
            step_ms=spread(total), forward_backward_ms=spread(total - optimizer),
            optimizer_ms=spread(optimizer), every_step_ms=total.round(1).tolist())
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((x.split(":")[1].strip() for x in info if "model name" in x), platform.processor())
    return result | dict(
        plain_over_ours=spread(times[1][0] / times[0][0]), steps=steps, warmup=warmup, cpu=cpu,
        instructions=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
        versions=tg.versions(ours.world))

def show(result: dict[str, Any]) -> None:
    """The table on the terminal."""
    text, kinds = "{median:.2f} ({p10:.2f}-{p90:.2f})", ("step_ms", "forward_backward_ms", "optimizer_ms")
    print(f"{'median (p10-p90)':18}{'tokens/s':>10}" + "".join(f"{kind:>27}" for kind in kinds))
    for name in ("ours", "plain"):
        cells = (text.format(**result[name][kind]) for kind in kinds)
        print(f"{name:18}{result[name]['tokens_per_second']:>10,}" + "".join(f"{cell:>27}" for cell in cells))
    print("plain / ours, step by step: " + text.format(**result["plain_over_ours"]))

def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="F,tiny", help="PRESET of train_gpt.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before them")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    try:
        options = dict(text.split("=", 1) for text in args.set)
        if unknown := options.keys() - {name.upper() for name in tg.Config.__dataclass_fields__}:
            raise ValueError(f"{', '.join(sorted(unknown))}: not an option of train_gpt.py")
        config = tg.Config.from_env({"PRESET": args.preset} | options)
        differences = gate(config)
    except (ValueError, Mismatch) as error:
        print(f"nothing was timed: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    result = dict(preset=args.preset, set=args.set, differences=differences)
    result |= measure(config, args.steps, args.warmup)
    show(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tg.write_atomically(args.out, json.dumps(result, indent=1).encode() + b"\n")
    return 0

if __name__ == "__main__":
    sys.exit(main())
