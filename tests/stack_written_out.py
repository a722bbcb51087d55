"""The growing-recurrence stack written out in float64, for tests that compare the model with it."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from helpers import DIMS, noisy_model
from torch import Tensor

import train_gpt as tg

# Two prelude layers, a core of two run three times in training and four in scoring, three coda.
STACK: dict[str, Any] = tg.PLAIN | tg.layers(2, 2, 3, 3) | DIMS | dict(mlp_mult=3.0, eval_passes=4)
T_SET: dict[str, Any] = dict(
    use_peri_norm=True,
    use_birkhoff_mix=True,
    use_timestep_scale=True,
    timestep_gamma_max=1.1,
    use_timestep_bias=True,
    depth_embed="sinusoidal",
)
SIDE_WIDTHS: dict[str, Any] = dict(bigram_dim=6, ve_dim=6)
EVERYTHING: dict[str, Any] = SIDE_WIDTHS | dict(
    core_skips="all",
    smear_gate="document",
    bigram_vocab_size=37,
    ve_layers="0,3,6",
    xsa_last_n=4,
    rope_dims=4,
    ln_scale=True,
    pass_scale_init=0.5,
    feedback_rank=2,
    interpass_norm=True,
)
# Every component by itself, then combinations.
COMPONENTS: dict[str, dict[str, Any]] = {
    name: {name: value} for name, value in EVERYTHING.items() if name not in SIDE_WIDTHS
} | {
    "nothing": {},
    "everything": EVERYTHING,
    "published skips": dict(core_skips="published"),
    "published smear": dict(smear_gate="published"),
    "one key head": dict(num_kv_heads=1, xsa_last_n=7),
    "LN scale, Output-LN": dict(ln_scale=True, use_peri_norm=True),
    "T": T_SET,
    "everything on T": EVERYTHING | T_SET,
}


def exact_model(a: tg.Architecture) -> tg.GPT:
    """With noise on every parameter, in float64."""
    model = noisy_model(a)
    model.dtype = torch.float64
    return model.double()


def documents(seed: int = 0, count: int = 2, length: int = 24) -> Tensor:
    """Ids [count, length] with beginnings of documents among them."""
    ids = torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, length // 3] = ids[0, -1] = tg.BOS
    return ids


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def frobenius(x: np.ndarray) -> float:
    return math.sqrt((x**2).sum())


def rounded(w: Tensor, bits: int, floor: float) -> Tensor:
    """Every row on a grid of its own."""
    rows, levels = [], 2 ** (bits - 1) - 1
    for row in w.tolist():
        step = max(max(map(abs, row)) / levels, floor * 127 / levels)
        rows.append([step * min(max(round(v / step), -levels), levels) for v in row])
    return torch.tensor(rows, dtype=w.dtype)


class Written:
    """The stack for one sequence at a time, with a loop wherever one is meant.

    Keeps the inputs of every matrix (`fed`), and the states between which the growth of the core is
    measured (`begun`, `ended`, by pass).
    """

    def __init__(self, model: tg.GPT, a: tg.Architecture, mode: tg.Mode) -> None:
        self.model, self.a, self.mode = model, a, mode
        self.layers = a.num_prelude + a.num_shared + a.num_coda
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.values: list[Tensor] = []
        self.fed: dict[str, list[Tensor]] = {}
        self.begun: list[list[Tensor]] = [[] for _ in range(mode.passes)]
        self.ended: list[list[Tensor]] = [[] for _ in range(mode.passes)]

    def linear(self, matrix: tg.Matrix, x: Tensor, core: bool) -> Tensor:
        w = matrix.weight.detach().double()
        self.fed.setdefault(self.names[id(matrix.weight)], []).append(x)
        rounding = self.mode.core if core else self.mode.outside
        return x @ (rounded(w, rounding.bits, rounding.floor) if rounding.bits else w).T

    def rotary(self, x: Tensor) -> Tensor:
        """x [T, E]: pairs (j, j + half) of the first channels, as complex numbers, turned back."""
        dims = self.a.rope_dims or x.shape[1]
        half, out = dims // 2, x.clone()
        for j in range(half):
            angle = torch.arange(len(x)).double() * self.a.rope_base ** (-2.0 * j / dims)
            turn = torch.complex(angle.cos(), -angle.sin())
            z = torch.complex(x[:, j], x[:, j + half]) * turn
            out[:, j], out[:, j + half] = z.real, z.imag
        return out

    def head(self, q: Tensor, k: Tensor, v: Tensor, gain: Tensor, xsa: bool) -> Tensor:
        """Causal attention of one head, [T, E] each."""
        scores = self.rotary(norm(q)) * gain @ self.rotary(norm(k)).T / q.shape[1] ** 0.5
        future = torch.ones_like(scores).triu(1) > 0
        y = scores.masked_fill(future, -math.inf).softmax(1) @ v
        if xsa:
            own = F.normalize(v, dim=1)
            y = torch.stack([y[t] - (y[t] @ own[t]) * own[t] for t in range(len(y))])
        return y

    def attention(self, u: int, h: Tensor, core: bool, value: Tensor | None) -> Tensor:
        a = self.a
        attn: Any = self.model.attn[u]
        E, group = a.model_dim // a.num_heads, a.num_heads // a.num_kv_heads
        widths = [a.num_heads * E, a.num_kv_heads * E, a.num_kv_heads * E]
        q, k, v = self.linear(attn.qkv, h, core).split(widths, dim=1)
        if value is not None:
            v = v + value
        xsa, heads = u >= self.layers - a.xsa_last_n, []
        for i in range(a.num_heads):
            at, own = slice(i * E, i * E + E), slice(i // group * E, i // group * E + E)
            heads.append(self.head(q[:, at], k[:, own], v[:, own], attn.q_gain[i], xsa))
        return self.linear(attn.proj, torch.cat(heads, 1), core)

    def block(self, u: int, row: int, x: Tensor, x0: Tensor, core: bool = False) -> Tensor:
        """Layer u of the unshared network with the conditioning of `row`."""
        a, cond = self.a, self.model.cond
        attn: Any = self.model.attn[u]
        mlp: Any = self.model.mlp[u]
        mix: Any = self.model.mix[u]
        cap = a.timestep_gamma_max or math.inf
        s = (u + 1.0) ** -0.5 if a.ln_scale else 1.0
        gamma, beta = cond.gamma[row].clamp(-cap, cap), cond.beta[row]
        if a.use_birkhoff_mix:
            carried = torch.sigmoid(mix.weight)
            anchor = 1 - carried
        else:
            carried, anchor = mix.weight
        x = carried * x + anchor * x0 + cond.depth[row]
        listed = a.ve_layers.split(",")
        value = self.values[listed.index(str(u))] if str(u) in listed else None
        x = x + attn.scale * gamma[0] * self.attention(u, norm(x) * s, core, value) + beta[0]
        h = self.linear(mlp.fc, x if a.use_peri_norm else norm(x) * s, core)
        h = self.linear(mlp.proj, torch.where(h > 0, h, a.leaky_relu_slope * h) ** 2, core)
        return x + mlp.scale * gamma[1] * (norm(h) * s if a.use_peri_norm else h) + beta[1]

    def start(self, ids: list[int]) -> Tensor:
        """x0 [T, D] of one sequence; keeps its value embeddings."""
        model, a = self.model, self.a
        x = [model.tok_emb[i] for i in ids]
        if a.bigram_vocab_size:
            last = a.bigram_vocab_size - 1
            for t in range(len(ids)):
                bucket = (36313 * ids[t] ^ 27191 * ids[t - 1]) % last if t else last
                x[t] = x[t] + model.bigram.scale * (model.bigram.proj @ model.bigram.table[bucket])
        x = [norm(row) for row in x]
        if a.smear_gate != "none":
            g, before = 1 / (1 + torch.exp(-model.smear_gate)), [torch.zeros_like(x[0]), *x]
            stays = [a.smear_gate == "document" and i == tg.BOS for i in ids]
            x = [x[t] if stays[t] else (1 - g) * x[t] + g * before[t] for t in range(len(ids))]
        self.values = []
        if a.ve_layers:
            side = model.value
            for scale in model.value_scale:
                rows = [side.proj @ side.table[i] * side.scale * scale for i in ids]
                self.values.append(torch.stack(rows))
        return torch.stack(x)

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> Tensor:
        """The normalised last state [T, D] of one sequence."""
        a, core, kept = self.a, self.model.core, []
        pre, shared, tail = a.num_prelude, a.num_shared, a.num_coda
        x = x0 = self.start(ids)
        for u in range(pre):
            x = self.block(u, u, x, x0)
            kept.append(x)
        for k in range(self.mode.passes):
            if k and a.interpass_norm:
                x = norm(x)
            if k and a.feedback_rank:
                x = x + torch.stack([core.diagonal * (core.u @ (core.v.T @ row)) for row in x])
            begun, known = x, min(k, a.num_loops - 1)
            for u in range(pre, pre + shared):
                x = self.block(u, u + shared * known, x, x0, core=True)
            if k and a.pass_scale_init != 1:
                x = begun + core.scale[known - 1] * (x - begun)
            self.begun[k].append(begun)
            self.ended[k].append(x)
        for t in range(tail):
            left = {"none": 0, "all": min(pre, tail), "published": len(kept)}[a.core_skips]
            if t < left and kept:
                x = x + self.model.skip[t] * kept.pop()
            u = pre + shared + t
            x = self.block(u, u + shared * (a.num_loops - 1), x, x0)
        return norm(x)

    def penalty(self) -> float:
        """Mean over the passes, or over the core as one."""
        begun = [torch.stack(states).numpy() for states in self.begun]
        ended = [torch.stack(states).numpy() for states in self.ended]
        pairs = list(zip(begun, ended)) if self.mode.per_pass else [(begun[0], ended[-1])]
        growth = [frobenius(b - a) / (frobenius(a) + 1e-6) - 1 for a, b in pairs]
        return float(np.mean([max(g, 0.0) ** 2 for g in growth]))
