"""Train a depth-recurrent GPT for parameter golf, pack it into 16 MB, reload the pack and score it.

    PRESET=tiny python train_gpt.py                               # laptop, sample corpus (data/sample.py)
    torchrun --standalone --nproc_per_node=8 train_gpt.py         # one 8-GPU node, FineWeb shards
    EVAL_ONLY=logs/<run>/model.int8.ptz python train_gpt.py       # score an artifact again

One transformer in three parts: prelude layers, a shared core that is looped, coda layers. A plan (a tuple of
`Layer`) says for every effective layer which weights and which conditioning it uses, and all code that walks
the depth walks that plan. Every option is a field of `Config`, set by the environment variable of the same
name in capitals; PRESET names a published system and a scale.

Sections: 1 configuration, 2 presets, 3 ranks and logs, 4 data, 5 byte accounting, 6 plan, 7 model,
8 optimizers, 9 training, 10 scoring, 11 quantisation and artifact, 12 the run.

Shapes: B sequences, T tokens, D model width, H query heads, K key/value heads, E head width, V vocabulary,
R effective layers. Parameters, tables and optimizer states are float32; matmul and attention operands and the
residual stream are DTYPE. There is no autocast.
"""
from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import struct
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- 1. Configuration ------------------------------------------------------------------------------------
# One line an option: type, default, unit. An option that cannot act is refused: a flag that was ignored in
# silence looks exactly like a negative result (PR 855's rerun of SHARE_ATTN_ONLY).

class InputError(ValueError):
    """A mistake in what the user gave (variables, files); `main` prints it as one line, exit code 2."""

def opt(default: Any, low: float = 0, high: float = math.inf, *, needs: str = "") -> Any:
    """An option with its bounds and the fields it `needs` to be on in order to act ("!x": needs x off)."""
    return field(default=default, metadata={"low": low, "high": high, "needs": needs})

def parse(name: str, text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`; InputError names the variable and what it takes."""
    choices = ("0", "1") if kind is bool else get_args(kind)
    if choices and text not in choices:
        raise InputError(f"{name}={text!r} is not one of {', '.join(choices)}")
    if get_origin(kind) is Literal or kind is str:
        return text
    try:
        return kind(int(text)) if kind is bool else kind(text)
    except ValueError:
        raise InputError(f"{name}={text!r} is not {'an integer' if kind is int else 'a number'}") from None

def show(value: Any) -> str:
    """A value as `parse` reads it."""
    return str(int(value)) if isinstance(value, bool) else str(value)

def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn a into b."""
    above, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        over, above, row = above, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
            if i > 1 < j and (x, y) == (b[j - 2], a[i - 2]):
                row[j] = min(row[j], over[j - 2] + 1)
    return row[-1]

@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The function a model computes and is scored with: what an artifact carries. Defaults: PR 855, run T."""
    vocab_size: int = opt(1024, 2, 65536)  # V, pieces; shards are uint16
    model_dim: int = opt(512, 2, 65536)  # D, width of the residual stream
    num_heads: int = opt(8, 1, 1024)  # H, query heads
    num_kv_heads: int = opt(4, 1, 1024)  # K, key/value heads, shared by H/K query heads each (GQA)
    mlp_mult: float = opt(2.0, 0.01, 64)  # hidden width of the MLP / D
    num_layers: int = opt(9, 1, 256, needs="!num_shared")  # layers of the flat U-Net
    num_prelude: int = opt(1, 0, 256, needs="num_shared")  # layers before the core
    num_shared: int = opt(4, 0, 256)  # layers of the shared core; 0: flat U-Net
    num_loops: int = opt(3, 1, 256, needs="num_shared")  # passes over the core
    num_coda: int = opt(1, 0, 256, needs="num_shared")  # layers after the core
    share_attn_only: bool = opt(False, needs="num_shared")  # core: an MLP of its own for every pass
    use_peri_norm: bool = opt(True)  # Output-LN: MLP branch normalised at its output, not its input
    use_birkhoff_mix: bool = opt(True)  # x <- a x + (1-a) x0 with a in (0, 1); off: two free weights
    use_timestep_scale: bool = opt(True)  # gamma: branch scale per effective layer
    timestep_gamma_max: float = opt(4.0, needs="use_timestep_scale")  # cap on |gamma|; 0: none
    use_timestep_bias: bool = opt(True)  # beta (FiLM): branch shift per effective layer
    use_unique_norms: bool = opt(False, needs="num_shared")  # gains on branch inputs, per layer of the core
    unique_norms_input_norm: bool = opt(False, needs="use_unique_norms use_peri_norm")  # PR 855: keep it
    depth_embed: Literal["none", "sinusoidal", "learned"] = opt("sinusoidal")  # code added per layer
    leaky_relu_slope: float = opt(0.5, 0, 1)  # MLP is W2 leaky_relu(W1 x)^2; 0: relu^2
    logit_softcap: float = opt(30.0, 1e-3)  # c in c tanh(logit / c)
    rope_base: float = opt(10000.0, 1)  # base of the rotary frequencies
    qk_gain_init: float = opt(1.5)  # initial gain of the normalised queries, per head
    tie_embeddings: bool = opt(True)  # the output projection is the token embedding
    train_seq_len: int = opt(1024, 2, 1 << 17)  # T, tokens per sequence; validation windows are as long
    dtype: Literal["bfloat16", "float32"] = opt("bfloat16")  # matmul operands and residual stream
    reference_bf16: bool = opt(False)  # PR 855's accident: RoPE positions, tables, embedding in bfloat16

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if isinstance(value, (int, float)) and not low <= value <= min(high, sys.float_info.max):
                raise InputError(f"{f.name.upper()}={value} is out of range: {low} to {high}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"NUM_KV_HEADS={self.num_kv_heads} does not divide NUM_HEADS={self.num_heads}")
        if self.model_dim % (2 * self.num_heads):
            raise InputError(f"MODEL_DIM={self.model_dim} / NUM_HEADS={self.num_heads} is not an even number")
        if round(self.mlp_mult * self.model_dim) < 1:
            raise InputError(f"MLP_MULT={self.mlp_mult} of MODEL_DIM={self.model_dim} is no hidden channel")
        layers = self.num_prelude + self.num_shared * self.num_loops + self.num_coda
        if layers > 1024 or self.train_seq_len * self.model_dim // self.num_heads > 1 << 27:
            raise InputError(f"{layers} layers, TRAIN_SEQ_LEN={self.train_seq_len}: too large")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        """From an artifact's header; ValueError if a field is missing, unknown or malformed."""
        kinds = get_type_hints(cls)
        if values.keys() != kinds.keys():
            raise ValueError(f"its architecture has other fields: {sorted(values.keys() ^ kinds.keys())}")
        return cls(**{name: parse(name.upper(), show(values[name]), kind) for name, kind in kinds.items()})

@dataclass(frozen=True, kw_only=True)
class Config(Architecture):
    """Everything a run depends on. Defaults: 8xH100, 600 s. `Config.from_env(os.environ)` is the way in."""
    preset: str = opt("")  # system and/or scale, comma-separated: section 2
    eval_only: str = opt("")  # path of an artifact: reload and score it, nothing else
    data_path: str = opt("./data/datasets/fineweb10B_sp1024")  # folder of fineweb_{train,val}_*.bin
    tokenizer_path: str = opt("./data/tokenizers/fineweb_1024_bpe.model")  # SentencePiece model of the shards
    log_dir: str = opt("./logs")  # a run writes into <log_dir>/<run_id>/
    run_id: str = opt("")  # name of the run; empty: date, time and a random suffix
    seed: int = opt(1337, 0, 2**64 - 1)  # of the random generator that draws the weights
    compile: Literal["auto", "model", "off"] = opt("auto")  # torch.compile; auto: model on CUDA, off on CPU
    iterations: int = opt(20000)  # optimizer steps at most
    max_wallclock_seconds: float = opt(600.0)  # training stops before this; 0: no cap
    warmup_steps: int = opt(20)  # compile and warm-up steps outside the clock, undone afterwards
    warmdown_iters: int = opt(1200)  # steps over which the learning rate falls to 0 at the end
    train_batch_tokens: int = opt(524288, 1)  # tokens per optimizer step, all ranks together
    micro_batch_tokens: int = opt(65536, 1)  # tokens per rank and forward pass at most
    val_batch_size: int = opt(524288, 1)  # tokens per validation batch, all ranks together
    val_loss_every: int = opt(1000)  # steps between validations; 0: only at the end
    train_log_every: int = opt(200, 1)  # steps between log lines, after the first ten
    embed_lr: float = opt(0.6, needs="!tie_embeddings")  # Adam: token embedding
    head_lr: float = opt(0.008, needs="!tie_embeddings")  # Adam: output projection
    tied_embed_lr: float = opt(0.05, needs="tie_embeddings")  # Adam: tied embedding
    tied_embed_init_std: float = opt(0.005, needs="tie_embeddings")  # its initial standard deviation
    matrix_lr: float = opt(0.04)  # Muon: matrices
    scalar_lr: float = opt(0.04)  # Adam: scales, gains, tables
    muon_momentum: float = opt(0.95, 0, 1)  # Nesterov momentum, after its warm-up
    muon_momentum_warmup_start: float = opt(0.85, 0, 1, needs="muon_momentum_warmup_steps")  # at step 0
    muon_momentum_warmup_steps: int = opt(500)  # steps until it has risen
    muon_backend_steps: int = opt(5, 1)  # Newton-Schulz iterations
    beta1: float = opt(0.9, 0, 1 - 1e-9)  # Adam: decay of the first moment
    beta2: float = opt(0.95, 0, 1 - 1e-9)  # Adam: decay of the second moment
    adam_eps: float = opt(1e-8)  # Adam: added to the root of the second moment
    grad_clip_norm: float = opt(0.0)  # L2 norm of the averaged gradient; 0: no clipping
    quant_clip_percentile: float = opt(99.99984, 50, 100)  # of |w| in a row; weights beyond it saturate
    quant_scale_floor: float = opt(0.0, 0, 1)  # smallest int8 step; PR 855: 1/127 = 0.00787
    size_limit_bytes: int = opt(16_000_000)  # script + artifact; beyond it the exit code is 4

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Defaults, presets, then explicit variables; InputError for what is unknown, malformed or inert."""
        kinds = {name.upper(): kind for name, kind in get_type_hints(cls).items()}
        for name in env.keys() - kinds.keys() - {"USE_DEPTH_EMBED"}:
            alike = [k for k in (*kinds, "USE_DEPTH_EMBED") if abs(len(k) - len(name)) <= 2]
            known = min(alike, key=lambda k: edit_distance(name, k), default="")
            if known and edit_distance(name, known) <= (2 if len(known) > 5 else 1):
                raise InputError(f"{name} is not an option; did you mean {known}? (unset it to go on)")
        explicit = {n.lower(): parse(n, env[n], kind) for n, kind in kinds.items() if n in env}
        if "USE_DEPTH_EMBED" in env:  # the public name; learned in series 4 of PR 855, sinusoidal in series 5
            if "DEPTH_EMBED" in env:
                raise InputError("USE_DEPTH_EMBED and DEPTH_EMBED are both set: drop USE_DEPTH_EMBED")
            on = parse("USE_DEPTH_EMBED", env["USE_DEPTH_EMBED"], bool)
            explicit["depth_embed"] = "sinusoidal" if on else "none"
        config = cls(**preset_values(explicit.get("preset", "")) | explicit)
        for name, value in explicit.items():
            for need in cls.__dataclass_fields__[name].metadata["needs"].split():
                other, off = need.lstrip("!"), need.startswith("!")
                if value and bool(getattr(config, other)) == off:
                    raise InputError(f"{name.upper()}={show(value)} cannot act here: {other.upper()}="
                                     f"{show(getattr(config, other))}; switch that {'off' if off else 'on'}")
            if config.eval_only and name not in EVAL_OPTIONS:
                raise InputError(f"{name.upper()} cannot act here: EVAL_ONLY trains nothing and takes the "
                                 "model from the artifact")
        return config

    def architecture(self) -> Architecture:
        return Architecture(**{f.name: getattr(self, f.name) for f in fields(Architecture)})

EVAL_OPTIONS = {"eval_only", "preset", "data_path", "tokenizer_path", "log_dir", "run_id", "compile",
                "val_batch_size", "micro_batch_tokens", "size_limit_bytes"}

# ---- 2. Presets ------------------------------------------------------------------------------------------
# The published systems: the 21 runs of the recurrence study (PR 855; A', B', C' are Ap, Bp, Cp), the naive
# baseline, and the "baseline wins" report, which gives width and depth only: the head counts here are those
# that give its parameter counts. A scale keeps the shape of a system at another size.

PLAIN: dict[str, Any] = dict(
    num_prelude=0, num_shared=0, num_loops=1, num_coda=0, use_peri_norm=False, use_birkhoff_mix=False,
    use_timestep_scale=False, timestep_gamma_max=0.0, use_timestep_bias=False, depth_embed="none")

def core(prelude: int, shared: int, loops: int, coda: int) -> dict[str, Any]:
    return dict(num_prelude=prelude, num_shared=shared, num_loops=loops, num_coda=coda)

SCREEN = dict(iterations=2000, max_wallclock_seconds=0.0)  # series 1: 1xH100, 2000 steps
REPORT = dict(leaky_relu_slope=0.0, max_wallclock_seconds=180.0)  # "baseline wins": 1xH100, 180 s
WIDE_768 = REPORT | dict(model_dim=768, num_heads=12)
WIDE_1024 = REPORT | dict(model_dim=1024, num_heads=16)
MIX = dict(use_peri_norm=True, use_birkhoff_mix=True)
SCALE = MIX | dict(use_timestep_scale=True)
CAPPED = SCALE | dict(timestep_gamma_max=4.0)
FILM = CAPPED | dict(use_timestep_bias=True)
UNIQUE = FILM | dict(use_unique_norms=True, unique_norms_input_norm=True)
SYSTEMS: dict[str, dict[str, Any]] = {
    "Ap": SCREEN | dict(num_layers=8),
    "Bp": SCREEN | core(0, 4, 2, 0),
    "C": SCREEN | MIX | core(0, 4, 2, 0),
    "Cp": SCREEN | dict(use_birkhoff_mix=True) | core(0, 4, 2, 0),
    "D": SCREEN | SCALE | core(0, 4, 2, 0),
    "E": SCREEN | SCALE | core(1, 3, 2, 1),
    "F": SCREEN | SCALE | core(1, 2, 3, 1),
    "G": MIX | core(1, 3, 2, 1),
    "H": MIX | core(1, 4, 2, 1),
    "I": CAPPED | core(1, 4, 2, 1),
    "J": MIX | core(1, 4, 3, 1),
    "K": CAPPED | core(1, 4, 3, 1),
    "L": CAPPED | core(1, 4, 2, 1) | dict(share_attn_only=True),
    "M": CAPPED | core(1, 4, 3, 1) | dict(share_attn_only=True),
    "N": FILM | core(1, 4, 2, 1),
    "O": FILM | core(1, 4, 3, 1),
    "P": UNIQUE | core(1, 4, 2, 1) | dict(depth_embed="learned"),
    "Q": UNIQUE | core(1, 4, 3, 1) | dict(depth_embed="learned"),
    "R": FILM | core(1, 4, 3, 1) | dict(depth_embed="learned"),
    "S": UNIQUE | core(1, 4, 3, 1),
    "T": FILM | core(1, 4, 3, 1) | dict(depth_embed="sinusoidal"),
    "naive": dict(num_layers=9, leaky_relu_slope=0.0),
    "flat_9x1_512": REPORT | dict(num_layers=9),
    "recur_3x3_640": REPORT | core(0, 3, 3, 0) | dict(model_dim=640),
    "recur_3x3_768": WIDE_768 | core(0, 3, 3, 0),
    "recur_4x3_768": WIDE_768 | core(0, 4, 3, 0),
    "recur_3x3_1024": WIDE_1024 | core(0, 3, 3, 0),
    "recur_2x6_1024": WIDE_1024 | core(0, 2, 6, 0),
}
SCALES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        data_path="./data/datasets/sample_sp1024", tokenizer_path="./data/tokenizers/sample_1024_bpe.model",
        train_seq_len=256, train_batch_tokens=8192, micro_batch_tokens=8192, val_batch_size=16384,
        iterations=100, max_wallclock_seconds=110.0, warmup_steps=1, warmdown_iters=50, val_loss_every=0,
        train_log_every=25, muon_momentum_warmup_steps=50),
}

def preset_values(preset: str) -> dict[str, Any]:
    """Field values of "", "SYSTEM", "SCALE" or "SYSTEM,SCALE"."""
    names = preset.split(",") if preset else []
    systems, scales = [n for n in names if n in SYSTEMS], [n for n in names if n in SCALES]
    if len(systems) > 1 or len(scales) > 1 or len(systems) + len(scales) < len(names):
        raise InputError(f"PRESET={preset}: one system of {', '.join(SYSTEMS)} and/or one scale of "
                         f"{', '.join(SCALES)}, comma-separated")
    values = PLAIN | SYSTEMS[systems[0]] if systems else {}
    for scale in scales:  # a quarter of the width in half as many heads
        full = {f.name: values.get(f.name, f.default) for f in fields(Architecture)}
        heads = {name: full[name] // 2 for name in ("num_heads", "num_kv_heads")}
        values = values | dict(model_dim=full["model_dim"] // 4, **heads) | SCALES[scale]
    return values

# ---- 3. Ranks and logs -----------------------------------------------------------------------------------

class World:
    """The ranks of a run: NCCL on CUDA, gloo on CPU, and no process group at all for a single rank."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.rank, self.size = (parse(n, env.get(n, d), int) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.is_main, self.on_cuda = self.rank == 0, torch.cuda.is_available()
        self.device, group = torch.device("cpu"), dict(backend="gloo")
        if self.on_cuda:
            self.device = torch.device("cuda", int(env.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            group = dict(backend="nccl", device_id=self.device)
        if self.size > 1:
            dist.init_process_group(**group)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def broadcast_(self, x: Tensor) -> None:
        """Rank 0's values, on all ranks, in place."""
        if self.size > 1:
            dist.broadcast(x, 0)

    def on_all(self, job: Callable[[], Any], facts: Callable[[Any], Any]) -> Any:
        """What `job` returns on each rank; InputError on all if it fails on one, or its `facts` differ."""
        mine, value = None, None
        try:
            value = job()
            mine = repr(facts(value))
        except (InputError, OSError) as error:
            mine = error
        seen = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(seen, mine)
        for error in seen:
            if isinstance(error, Exception):
                raise InputError(str(error))
        if len(set(seen)) > 1:
            raise InputError(f"ranks differ in their variables or data: {' / '.join(sorted(set(seen)))}")
        return value

    def on_main(self, job: Callable[[], Any]) -> Any:
        """What `job` returns on rank 0, on all ranks; its InputError or OSError is raised on all, too."""
        box = [None]
        if self.is_main:
            try:
                box = [job()]
            except (InputError, OSError) as error:
                box = [InputError(str(error))]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], InputError):
            raise box[0]
        return box[0]

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

class Log:
    """Rank 0's records: train.log for people, metrics.jsonl for programs, a progress line on a terminal."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self.folder, self.is_main, self.watched = folder, is_main, is_main and sys.stderr.isatty()

    def to_file(self, text: str, name: str = "train.log") -> None:
        if self.is_main:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def __call__(self, text: str) -> None:
        self.progress("")
        if self.is_main:
            print(text, flush=True)
        self.to_file(text)

    def metric(self, **values: Any) -> None:
        self.to_file(json.dumps(values), "metrics.jsonl")

    def progress(self, text: str) -> None:
        if self.watched:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

def write_atomically(path: Path, data: bytes) -> None:
    """The file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

# ---- 4. Data ---------------------------------------------------------------------------------------------
# Shards are read as one long sequence of tokens. A batch is a function of the step alone: it is the same for
# any number of ranks.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256

def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens of a shard (data/README.md) whose header and size fit; else InputError."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path} is not a token shard (begins with {header[:2].tolist()}): fetch it again")
    count, size = int(header[2]), path.stat().st_size
    if count < 1 or size != 4 * SHARD_HEADER_INTS + 2 * count:
        raise InputError(f"{path} has {size} bytes but its header says {count} tokens: fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS, shape=(count,))

class Tokens:
    """The shards of one split as one sequence of token ids that starts again at its end."""

    def __init__(self, config: Config, split: Literal["train", "val"]) -> None:
        folder, self.vocab_size = Path(config.data_path), config.vocab_size
        self.paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        if not self.paths:
            raise InputError(f"DATA_PATH={folder} holds no fineweb_{split}_*.bin: see data/README.md, or run "
                             "`python data/sample.py` and set PRESET=tiny for the sample corpus")
        self.shards = [open_shard(path) for path in self.paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.total = int(self.starts[-1])
        if self.total <= config.train_seq_len:
            raise InputError(f"TRAIN_SEQ_LEN={config.train_seq_len}: the {split} split of {folder} has only "
                             f"{self.total} tokens")

    def read(self, start: int, count: int) -> Tensor:
        """int32 tokens [count] from position `start`; ids beyond the vocabulary raise InputError."""
        pieces = []
        while count:
            start %= self.total
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            first = start - int(self.starts[i])
            piece = self.shards[i][first : first + count]
            if (largest := piece.max()) >= self.vocab_size:
                raise InputError(f"{self.paths[i]} holds token {largest}, VOCAB_SIZE={self.vocab_size}: "
                                 "it is corrupt or of another tokenizer")
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.from_numpy(np.concatenate(pieces).astype(np.int32))

class Batches:
    """Training batches: step s takes the s-th TRAIN_BATCH_TOKENS of the split, as sequences of T tokens.

    Every rank reads its own sequences only. Gradient accumulation is derived: the fewest micro-batches that
    stay within MICRO_BATCH_TOKENS.
    """

    def __init__(self, tokens: Tokens, config: Config, world: World) -> None:
        self.tokens, self.world = tokens, world
        self.batch, self.length = config.train_batch_tokens, config.train_seq_len
        sequences, ragged = divmod(self.batch, self.length)
        if ragged or not sequences:
            raise InputError(f"TRAIN_SEQ_LEN={self.length} does not divide TRAIN_BATCH_TOKENS={self.batch}")
        if sequences % world.size:
            fits = ", ".join(str(n) for n in range(1, sequences + 1) if sequences % n == 0)
            raise InputError(f"WORLD_SIZE={world.size} does not divide the {sequences} sequences of a batch "
                             f"(TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN); these do: {fits}")
        local, limit = sequences // world.size, config.micro_batch_tokens // self.length
        if not limit:
            raise InputError(f"MICRO_BATCH_TOKENS={config.micro_batch_tokens} < TRAIN_SEQ_LEN={self.length}")
        self.accumulation = next(n for n in range(1, local + 1) if local % n == 0 and local // n <= limit)
        self.sequences = local // self.accumulation  # per rank and micro-batch

    def micro(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, int64 [B, T] each on the rank's device, for every micro-batch of a step."""
        for i in range(self.accumulation):
            first = (i * self.world.size + self.world.rank) * self.sequences * self.length
            span = self.tokens.read(step * self.batch + first, self.sequences * self.length + 1)
            if self.world.on_cuda:  # from pageable memory, the copy would wait for the queue to drain
                span = span.pin_memory()
            span = span.to(self.world.device, non_blocking=True).long()
            yield span[:-1].view(-1, self.length), span[1:].view(-1, self.length)

# ---- 5. Byte accounting ----------------------------------------------------------------------------------
# Bits per byte compares models across tokenizers, so the denominator must be the bytes of the text itself.

SPACE = "\u2581"  # how SentencePiece writes a space

class ByteCounter(NamedTuple):
    """UTF-8 bytes of the text that each token stands for; all tables are [V]."""
    size: Tensor  # int64, without a leading space
    space: Tensor  # bool, the piece begins with a space
    boundary: Tensor  # bool, the space of a piece that follows was put there by the tokenizer, not the text

    @classmethod
    def from_sentencepiece(cls, path: Path, vocab_size: int) -> ByteCounter:
        """Tables for a tokenizer; InputError if it cannot be read or has another size.

        A byte-fallback piece is one byte, control and unknown pieces (BOS) are none. A leading space counts,
        except behind one of those if the tokenizer adds a space of its own to the start of a text.
        """
        tokenizer = spm.SentencePieceProcessor()
        try:
            tokenizer.load(str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"TOKENIZER_PATH={path} is not a SentencePiece model: {error}") from None
        if tokenizer.vocab_size() != vocab_size:
            raise InputError(f"TOKENIZER_PATH={path} has {len(tokenizer)} pieces, VOCAB_SIZE={vocab_size}")
        added = tokenizer.decode_pieces([SPACE]) == ""
        size, space, boundary = [0] * vocab_size, [False] * vocab_size, [False] * vocab_size
        for i in range(vocab_size):
            piece = tokenizer.id_to_piece(i)
            if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
                boundary[i] = added
            elif tokenizer.is_byte(i):
                size[i] = 1
            else:
                space[i] = piece.startswith(SPACE)
                size[i] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        return cls(torch.tensor(size), torch.tensor(space), torch.tensor(boundary))

    def count(self, previous: Tensor, token: Tensor) -> Tensor:
        """Bytes of each token, int64, given the one before it (same shape)."""
        return self.size[token] + (self.space[token] & ~self.boundary[previous])

# ---- 6. Plan ---------------------------------------------------------------------------------------------
# Which weights, conditioning and skip every effective layer uses. Sharing is a repeated index.

class Layer(NamedTuple):
    """One effective layer. Two layers that name the same `attn` or `mlp` share those weights."""
    row: int  # its depth: row of the scale, shift and depth-code tables
    attn: int  # attention and the mix in front of it
    mlp: int
    gain: int  # row of the unique norm gains; -1: the neutral row
    push: bool  # U-Net: its output is kept for a later layer
    skip: int  # U-Net: weight with which the output kept last is added to its input; -1: none

def make_plan(a: Architecture) -> tuple[Layer, ...]:
    """The effective layers in order: prelude, loops x core, coda; without a core, the flat U-Net."""
    if not a.num_shared:
        n, half = a.num_layers, a.num_layers // 2  # the second half takes the first's outputs, last one first
        return tuple(Layer(v, v, v, -1, v < half, v - half if half <= v < 2 * half else -1) for v in range(n))
    passes, layers = a.num_shared * a.num_loops, []
    for v in range(a.num_prelude + passes + a.num_coda):
        i = v - a.num_prelude  # position in the unrolled core, if 0 <= i < passes
        unique = v if i < 0 else a.num_prelude + i % a.num_shared if i < passes else v - passes + a.num_shared
        gain = i if a.use_unique_norms and 0 <= i < passes else -1
        layers.append(Layer(v, unique, v if a.share_attn_only else unique, gain, False, -1))
    return tuple(layers)

# ---- 7. Model --------------------------------------------------------------------------------------------
# A gain in front of a matrix scales its columns, one behind it its rows: the same function, and the pass over
# the data with a column reduction in its backward becomes a pass over a weight.

class Role(NamedTuple):
    """What is done with a kind of parameter; a parameter names its role where it is made."""
    optimizer: Literal["muon", "adam"]
    lr: str  # field of Config
    stored: Literal["int8", "float16"]

ROLES = {
    "matrix": Role("muon", "matrix_lr", "int8"),
    "tied embedding": Role("adam", "tied_embed_lr", "int8"),
    "embedding": Role("adam", "embed_lr", "int8"),
    "head": Role("adam", "head_lr", "int8"),
    "table": Role("adam", "scalar_lr", "float16"),  # a row for every effective layer
    "scalar": Role("adam", "scalar_lr", "float16"),  # vectors of one layer
}

def parameter(role: str, value: Tensor, parts: tuple[int, ...] = ()) -> nn.Parameter:
    """A float32 parameter with a role; `parts` are the rows of the matrices stacked in it (q, k, v)."""
    p = nn.Parameter(value)
    p.role, p.parts = role, parts or (len(value),)
    return p

def uniform(rows: int, columns: int) -> Tensor:
    """[rows, columns] from U(-1/sqrt(columns), 1/sqrt(columns)), PyTorch's default for a linear layer."""
    return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5)

EPSILON = 1.1920929e-07  # of float32, what PyTorch adds to the mean square by default

def rms_norm(x: Tensor) -> Tensor:
    """x / RMS(x) over the last dimension, without a gain."""
    if x.is_cuda or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON)
    return CPURMSNorm.apply(x)

class CPURMSNorm(torch.autograd.Function):
    """`rms_norm` in fewer passes over the data than the operations PyTorch composes it of on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square_() / x.shape[-1]).add_(EPSILON).rsqrt_()
        y = (x * inverse).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(grad.float(), y, along, value=-1).mul_(inverse).to(grad.dtype)

def rope_tables(a: Architecture) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, E/2] of the rotary angles (arXiv 2104.09864), computed in float32."""
    half = a.model_dim // a.num_heads // 2
    frequency, position = a.rope_base ** (-torch.arange(half) / half), torch.arange(a.train_seq_len).float()
    if a.reference_bf16:  # leaves 513 distinct rotations for 1,024 positions
        frequency, position = frequency.bfloat16(), position.bfloat16()
    angle = torch.outer(position, frequency).float()[:, None]
    return angle.cos(), angle.sin()

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, E]; the halves of E are the coordinates of the rotated pairs."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention: q [B, H, T, E], k and v [B, K, T, E] -> [B, H, T, E]."""
    if q.is_cuda or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return blockwise_attention(q, k, v)

def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """`attend` for CPUs, by batched products.

    A block of queries only meets the keys up to its own end; queries that share a key head are one product.
    """
    (B, H, T, E), K = q.shape, k.shape[1]
    q, k, v = (q * E**-0.5).reshape(B * K, H // K, T, E), k.reshape(B * K, T, E), v.reshape(B * K, T, E)
    out = []
    for start in range(0, T, block):
        end = min(start + block, T)
        future = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1)
        scores = q[:, :, start:end].reshape(B * K, -1, E) @ k[:, :end].mT
        mixed = scores.add_(future.repeat(H // K, 1)).softmax(-1) @ v[:, :end]
        out.append(mixed.view(B, H, end - start, E))
    return torch.cat(out, dim=2)

class Mod(NamedTuple):
    """What conditions one branch of one effective layer: [D] each, or a neutral [1] where switched off."""
    gain: Tensor  # on the input of the first matrix, float32
    gamma: Tensor  # on the output, float32
    beta: Tensor  # added to the output, DTYPE

class Mix(nn.Module):
    """What a layer starts from: carried x + anchor x0 per channel, x0 being the normalised embedding.

    The two weights are free (the naive baseline), or a and 1 - a with a = sigmoid(logit): what PR 855 made of
    mHC-lite (arXiv 2601.05732) and calls Birkhoff mixing.
    """

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.convex, start = a.use_birkhoff_mix, torch.tensor([[1.0], [0.0]]).expand(2, a.model_dim)
        self.weight = parameter("scalar", torch.zeros(a.model_dim) if self.convex else start.clone())

    def weights(self) -> tuple[Tensor, Tensor]:
        """Carried and anchor weight, float32 [D] each."""
        if self.convex:
            return torch.sigmoid(self.weight), torch.sigmoid(-self.weight)
        return self.weight[0], self.weight[1]

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        carried, anchor = (w.to(x.dtype) for w in self.weights())
        return torch.lerp(x0, x, carried) if self.convex else torch.addcmul(x * carried, x0, anchor)

class Attention(nn.Module):
    """Residual branch: pre-norm causal attention with normalised q and k, RoPE and a gain per query head."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.heads, self.width = (a.num_heads, a.num_kv_heads, a.num_kv_heads), a.model_dim // a.num_heads
        parts = tuple(n * self.width for n in self.heads)
        self.qkv = parameter("matrix", uniform(sum(parts), a.model_dim), parts)
        self.proj = parameter("matrix", torch.zeros(a.model_dim, a.model_dim))
        self.q_gain = parameter("scalar", torch.full((a.num_heads,), a.qk_gain_init))
        self.scale = parameter("scalar", torch.ones(a.model_dim))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mod: Mod) -> Tensor:
        B, T, D = x.shape
        qkv = F.linear(rms_norm(x), (self.qkv * mod.gain).to(x.dtype)).view(B, T, -1, self.width)
        q, k, v = qkv.split(self.heads, dim=2)
        q = rotate(rms_norm(q), *rope) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), *rope)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).reshape(B, T, D)
        return x + F.linear(y, (self.proj * (self.scale * mod.gamma)[:, None]).to(x.dtype)) + mod.beta

class MLP(nn.Module):
    """Residual branch: W2 leaky_relu(W1 x)^2, normalised at its input, its output (Output-LN) or both."""

    def __init__(self, a: Architecture, input_norm: bool) -> None:
        super().__init__()
        self.slope, self.input_norm, self.output_norm = a.leaky_relu_slope, input_norm, a.use_peri_norm
        hidden = round(a.mlp_mult * a.model_dim)
        self.fc = parameter("matrix", uniform(hidden, a.model_dim))
        self.proj = parameter("matrix", torch.zeros(a.model_dim, hidden))
        self.scale = parameter("scalar", torch.ones(a.model_dim))

    def forward(self, x: Tensor, mod: Mod) -> Tensor:
        h = F.linear(rms_norm(x) if self.input_norm else x, (self.fc * mod.gain).to(x.dtype))
        h, scale = F.leaky_relu(h, self.slope).square(), self.scale * mod.gamma
        if self.output_norm:
            h = rms_norm(F.linear(h, self.proj.to(x.dtype)))
            return torch.addcmul(x + mod.beta, h, scale.to(x.dtype))
        return x + F.linear(h, (self.proj * scale[:, None]).to(x.dtype)) + mod.beta

class Conditioning(nn.Module):
    """Tables by effective layer: gamma, beta (arXiv 2410.01405, 1709.07871), depth code, norm gains."""

    def __init__(self, a: Architecture, plan: tuple[Layer, ...]) -> None:
        super().__init__()
        R, D, gains = len(plan), a.model_dim, max(layer.gain for layer in plan) + 1
        self.plan, self.cap = plan, a.timestep_gamma_max or math.inf
        self.table("gamma", a.use_timestep_scale, torch.ones(R, 2, D if a.use_timestep_scale else 1))
        self.table("beta", a.use_timestep_bias, torch.zeros(R, 2, D if a.use_timestep_bias else 1))
        self.table("gain", gains > 0, torch.ones(gains, 2, D))
        code = torch.sin(torch.arange(R)[:, None] * 10000.0 ** (-torch.arange(D) / D))
        code = {"none": torch.zeros(R, 1), "sinusoidal": code, "learned": torch.zeros(R, D)}[a.depth_embed]
        self.table("depth", a.depth_embed == "learned", code)
        self.register_buffer("neutral_gain", torch.ones(2, 1), persistent=False)

    def table(self, name: str, learned: bool, value: Tensor) -> None:
        """A parameter, or a constant."""
        if learned:
            self.register_parameter(name, parameter("table", value))
        else:
            self.register_buffer(name, value, persistent=False)

    def rows(self, dtype: torch.dtype) -> list[tuple[Mod, Mod, Tensor]]:
        """For every effective layer: the Mod of attention, that of the MLP, the depth code."""
        gamma, beta = self.gamma.clamp(-self.cap, self.cap).unbind(), self.beta.to(dtype).unbind()
        gain, depth = (*self.gain.unbind(), self.neutral_gain), self.depth.to(dtype).unbind()
        return [(*map(Mod, gain[layer.gain], gamma[layer.row], beta[layer.row]), depth[layer.row])
                for layer in self.plan]

class GPT(nn.Module):
    """The layers of `make_plan` between embedding and head, drawn from torch's global random generator."""

    def __init__(self, a: Architecture, tied_embed_std: float = 0.0) -> None:
        super().__init__()
        self.plan, self.dtype = make_plan(a), getattr(torch, a.dtype)
        self.tied, self.softcap = a.tie_embeddings, a.logit_softcap
        V, D = a.vocab_size, a.model_dim
        embedding = torch.randn(V, D)
        if self.tied:
            self.tok_emb = parameter("tied embedding", embedding * tied_embed_std)
        else:
            self.tok_emb = parameter("embedding", embedding)
            self.lm_head = parameter("head", torch.zeros(V, D))
        attns, mlps = (range(1 + max(indices)) for indices in zip(*((x.attn, x.mlp) for x in self.plan)))
        both_norms = {x.mlp for x in self.plan if x.gain >= 0} if a.unique_norms_input_norm else set()
        self.mix = nn.ModuleList(Mix(a) for _ in attns)
        self.attn = nn.ModuleList(Attention(a) for _ in attns)
        self.mlp = nn.ModuleList(MLP(a, not a.use_peri_norm or i in both_norms) for i in mlps)
        self.cond = Conditioning(a, self.plan)
        self.skip = nn.ParameterList(parameter("scalar", torch.ones(D)) for x in self.plan if x.push)
        for name, table in zip(("cos", "sin"), rope_tables(a)):
            self.register_buffer(name, table, persistent=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """Normalised last state [B, T, D] of ids [B, T]."""
        x0 = rms_norm(F.embedding(ids, self.tok_emb)).to(self.dtype)
        rope = self.cos[: ids.shape[1]].to(self.dtype), self.sin[: ids.shape[1]].to(self.dtype)
        x, kept = x0, []
        for layer, (attn_mod, mlp_mod, depth) in zip(self.plan, self.cond.rows(self.dtype)):
            if layer.skip >= 0:
                x = torch.addcmul(x, kept.pop(), self.skip[layer.skip].to(self.dtype))
            x = self.mix[layer.attn](x, x0) + depth
            x = self.attn[layer.attn](x, rope, attn_mod)
            x = self.mlp[layer.mlp](x, mlp_mod)
            if layer.push:
                kept.append(x)
        return rms_norm(x)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets [B, T] given ids [B, T]; targets of -100 are left out."""
        head = self.tok_emb if self.tied else self.lm_head
        return head_loss(self.hidden(ids).flatten(0, 1), head, targets.flatten(), self.softcap)

def head_loss(h: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean cross-entropy of softcap * tanh(h head^T / softcap): h [N, D], head [V, D], targets [N]."""
    if h.is_cuda or torch.compiler.is_compiling():
        logits = F.linear(h, head.to(h.dtype)).float()
        return F.cross_entropy(softcap * torch.tanh(logits / softcap), targets)
    return ChunkedHeadLoss.apply(h, head if torch.is_grad_enabled() else head.detach(), targets, softcap)

class ChunkedHeadLoss(torch.autograd.Function):
    """`head_loss` for CPUs: loss and gradients of 512 rows at a time, so that logits stay in the cache."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        weight, count, total = head.to(h.dtype), (targets >= 0).sum().clamp_min(1), 0.0
        training = any(ctx.needs_input_grad)
        dh, dhead = (torch.empty_like(h), torch.zeros_like(head)) if training else (None, None)
        for start in range(0, len(h), 512):
            rows, target = h[start : start + 512], targets[start : start + 512, None]
            valid, index = target >= 0, target.clamp_min(0)
            squashed = F.linear(rows, weight).float().mul_(1 / softcap).tanh_()
            logits = squashed * softcap
            lse = logits.logsumexp(1, keepdim=True)
            total = total + ((lse - logits.gather(1, index)) * valid).sum(dtype=torch.float64)
            if training:  # d loss / d logit = (softmax - one-hot) (1 - tanh^2) / count
                grad = logits.sub_(lse).exp_()
                grad.scatter_add_(1, index, grad.new_full((1, 1), -1.0).expand_as(index))
                grad = grad.mul_(squashed.square_().neg_().add_(1)).mul_(valid / count).to(h.dtype)
                torch.mm(grad, weight, out=dh[start : start + 512])
                dhead += grad.t() @ rows
        ctx.save_for_backward(dh, dhead)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dh, dhead = ctx.saved_tensors
        return dh * grad.to(dh.dtype), dhead * grad, None, None

# ---- 8. Optimizers ---------------------------------------------------------------------------------------
# Muon for matrices, Adam for everything else, as the roles say.

def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Moves the singular values of matrices [N, r, c], r <= c, to about 1 (0.7 to 1.2).

    Quintic iteration and coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: W <- W - lr max(1, rows/columns)^0.5 NS(u).

    All matrices of one shape, wide or tall, are iterated as one stack. The parts of a parameter (q, k, v) are
    matrices of their own.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, steps: int) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.steps, self.dtype = steps, torch.bfloat16 if params[0].is_cuda else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            for p in params:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, grads)
            updates = torch._foreach_add(grads, velocities, alpha=group["momentum"])
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
            for p, update in zip(params, updates):
                for w, u in zip(p.split(p.parts), update.split(p.parts)):
                    scale = max(1.0, w.shape[0] / w.shape[1]) ** 0.5
                    wide = (w, u) if w.shape[0] <= w.shape[1] else (w.mT, u.mT)
                    stacks.setdefault(tuple(wide[0].shape), []).append((*wide, scale))
            for stack in stacks.values():
                directions = newton_schulz(torch.stack([u for _, u, _ in stack]).to(self.dtype), self.steps)
                for (w, _, scale), direction in zip(stack, directions.float()):
                    w.add_(direction, alpha=-group["lr"] * scale)

def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """[Adam, Muon]. Every parameter is in exactly one group, chosen by its role."""
    params = list(model.parameters())
    matrices = [p for p in params if ROLES[p.role].optimizer == "muon"]
    adam = [dict(params=[p for p in params if p.role == name], lr=getattr(config, role.lr))
            for name, role in ROLES.items() if role.optimizer == "adam"]
    grouped = sorted(id(p) for group in [*adam, dict(params=matrices)] for p in group["params"])
    assert grouped == sorted(map(id, params)), "a parameter without a group, or with two"
    optimizers = [
        torch.optim.Adam(adam, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True),
        Muon(matrices, config.matrix_lr, config.muon_momentum, config.muon_backend_steps),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers

def lr_factor(config: Config, step: int, seconds: float) -> float:
    """Fraction of the learning rates at `step`, `seconds` into training.

    Falls linearly to 0 over the last WARMDOWN_ITERS steps, or over the time that many steps take if the clock
    is going to end the run first.
    """
    span, factor = config.warmdown_iters, 1.0
    if span:
        factor = (config.iterations - step) / span
        if config.max_wallclock_seconds and step:
            factor = min(factor, (config.max_wallclock_seconds - seconds) / (span * seconds / step))
    return min(max(factor, 0.0), 1.0)

def muon_momentum(config: Config, step: int) -> float:
    """Rises linearly over the first MUON_MOMENTUM_WARMUP_STEPS."""
    steps = config.muon_momentum_warmup_steps
    done = min(step / steps, 1.0) if steps else 1.0
    return config.muon_momentum_warmup_start * (1 - done) + config.muon_momentum * done

# ---- 9. Training -----------------------------------------------------------------------------------------
# Ranks hold equal parameters and average their gradients themselves instead of through DDP: the gradients of
# shared weights are complete only when backward ends, so there is nothing to overlap with, and DDP would cut
# the compiled graph at its buckets.

class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not finite; exit code 3."""

class Clock:
    """Seconds of training that all ranks agree on, without a synchronisation at every step.

    Rank 0's time is shared every few steps, more often near the cap, and extrapolated in between.
    """

    def __init__(self, world: World, cap: float) -> None:
        self.world, self.cap, self.started = world, cap or math.inf, time.perf_counter()
        self.step, self.seconds, self.per_step, self.due = 0, 0.0, 0.0, 1  # last shared reading, and the next

    def read(self, step: int, now: bool = False) -> float:
        """Seconds spent on the first `step` steps; a reading that is due, or `now`, waits for all ranks."""
        if (now or step >= self.due) and step > self.step:
            self.world.synchronize()
            seconds = self.world.on_main(lambda: time.perf_counter() - self.started)
            self.per_step = (seconds - self.seconds) / (step - self.step)
            self.step, self.seconds = step, seconds
            self.due = step + int(min(max((self.cap - seconds) / self.per_step / 2, 1), 10))
        return self.seconds + (step - self.step) * self.per_step

    def out_of_time(self, step: int) -> bool:
        """Whether another step might pass the cap. One step is spare; the time of the first is no measure."""
        return self.read(step) + 2 * self.per_step * (step > 1) > self.cap

def compiled(model: GPT, config: Config, world: World) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as COMPILE says; one graph for training and one for scoring."""
    on = config.compile == "model" or config.compile == "auto" and world.on_cuda
    return torch.compile(model, dynamic=False, fullgraph=True) if on else model

class Trainer:
    """Model, optimizers and batches of a run.

    All gradients lie in one flat float32 buffer that ends with the loss: one all-reduce a step for both.
    """

    def __init__(self, config: Config, world: World, model: GPT, batches: Batches) -> None:
        self.config, self.world, self.model, self.batches = config, world, model, batches
        self.forward, self.params = compiled(model, config, world), list(model.parameters())
        sizes = [p.numel() for p in self.params]
        self.flat = torch.zeros(sum(sizes) + 1, device=world.device)
        for p, gradient in zip(self.params, self.flat[:-1].split(sizes)):
            world.broadcast_(p.data)  # unlike processors may draw unlike weights
            p.grad = gradient.view_as(p)
        self.optimizers = make_optimizers(model, config)
        self.first_bad = torch.full((), -1, device=world.device)  # first step that gave NaN or infinity
        self.last_good = "none"  # the last step that was seen not to

    def train_step(self, step: int, seconds: float, micro: Iterable[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step on this rank's micro-batches. Nothing here waits for the device."""
        config, flat = self.config, self.flat
        flat.zero_()
        for ids, targets in micro:
            loss = self.forward(ids, targets) / (self.batches.accumulation * self.world.size)
            loss.backward()
            flat[-1] += loss.detach()
        self.world.sum_(flat)
        self.first_bad = torch.where((self.first_bad < 0) & ~flat.sum().isfinite(), step, self.first_bad)
        if config.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.params, config.grad_clip_norm)
        factor, momentum = lr_factor(config, step, seconds), muon_momentum(config, step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
            optimizer.step()
        if config.reference_bf16:
            self.round_to_bfloat16()

    @torch.no_grad()
    def round_to_bfloat16(self) -> None:
        """What PR 855 trained by accident: tables, embedding and their Adam states in bfloat16."""
        for p in self.params:
            if p.role == "table" or p is self.model.tok_emb:
                state = self.optimizers[0].state[p]
                for t in (p, state["exp_avg"], state["exp_avg_sq"]):
                    t.copy_(t.bfloat16())

    def warm_up(self) -> None:
        """WARMUP_STEPS steps on random tokens (kernels, graphs, allocator), then every state is as before."""
        before, length = [p.detach().clone() for p in self.params], self.config.train_seq_len
        random, count = torch.Generator().manual_seed(0), self.batches.sequences * length + 1
        span = torch.randint(self.config.vocab_size, (count,), generator=random).to(self.world.device)
        micro = (span[:-1].view(-1, length), span[1:].view(-1, length))  # laid out as real ones: no new graph
        for _ in range(self.config.warmup_steps):
            self.train_step(0, 0.0, [micro] * self.batches.accumulation)
        for p, value in zip(self.params, before):
            p.data.copy_(value)
        self.optimizers = make_optimizers(self.model, self.config)
        self.first_bad.fill_(-1)
        self.world.synchronize()

    def check_finite(self, step: int, score: Score | None = None) -> float:
        """The last step's loss; NonFiniteLoss, on all ranks, for any since the last check, or the score."""
        bad, loss = int(self.first_bad), self.flat[-1].item()
        if bad >= 0 or score and not math.isfinite(score.val_loss):
            what = f"step {bad + 1}" if bad >= 0 else f"the validation loss after step {step}"
            raise NonFiniteLoss(f"{what} is not finite (last good: {self.last_good}). Nothing was exported. "
                                "Lower the learning rates or set GRAD_CLIP_NORM.")
        self.last_good = f"step {step}, train_loss {loss:.4f}" if step else "none"
        return loss

    def train(self, log: Log, validate: Callable[[int, float], Score]) -> tuple[int, float, Score]:
        """Trains until ITERATIONS or the cap; `validate` runs off the clock. Steps, seconds, last score."""
        config, step, clock = self.config, 0, Clock(self.world, self.config.max_wallclock_seconds)
        while True:
            capped = step < config.iterations and clock.out_of_time(step)
            last = capped or step == config.iterations
            if last or config.val_loss_every and step % config.val_loss_every == 0:
                seconds, paused = clock.read(step, now=True), time.perf_counter()
                if capped:
                    log(f"stopping_early: wallclock_cap train_time:{1e3 * seconds:.0f}ms "
                        f"step:{step}/{config.iterations}")
                score = validate(step, seconds)
                clock.started += time.perf_counter() - paused
            if last:
                return step, seconds, score
            self.train_step(step, clock.read(step), self.batches.micro(step))
            step += 1
            logged = step <= 10 or step % config.train_log_every == 0 or step == config.iterations
            if logged or step >= clock.due:
                self.report(step, clock, log, logged)

    def report(self, step: int, clock: Clock, log: Log, logged: bool) -> None:
        """Upstream's training line with its metrics, and the progress line; waits for the device."""
        config, seconds, loss = self.config, clock.read(step, now=True), self.check_finite(step)
        speed = step * config.train_batch_tokens / seconds
        if logged:
            log(f"step:{step}/{config.iterations} train_loss:{loss:.4f} train_time:{1e3 * seconds:.0f}ms "
                f"step_avg:{1e3 * seconds / step:.2f}ms")
            log.metric(step=step, train_loss=loss, train_seconds=seconds, tokens_per_second=speed)
        left = min((config.iterations - step) * clock.per_step, clock.cap - seconds)
        log.progress(f"step {step}, loss {loss:.3f}, {seconds:.0f} s, {left:.0f} left, {speed:,.0f} tokens/s")

# ---- 10. Scoring -----------------------------------------------------------------------------------------
# Every target of the validation split exactly once, tail included; and what the recurrence did on the way.

class Score(NamedTuple):
    """Over the whole split and all ranks."""
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    val_tokens: int  # scored targets
    val_bytes: int  # of their text
    eval_seconds: float

class Scorer:
    """The validation split in windows of T tokens, dealt out over the ranks."""

    def __init__(self, config: Config, world: World) -> None:
        counter = ByteCounter.from_sentencepiece(Path(config.tokenizer_path), config.vocab_size)
        self.counter = ByteCounter(*(table.to(world.device) for table in counter))
        self.world, self.tokens, self.length = world, Tokens(config, "val"), config.train_seq_len
        self.tokens.read(0, self.tokens.total)  # token ids are checked before anything else starts
        self.total = -(-(self.tokens.total - 1) // self.length)  # windows, the last one may be short
        most = min(config.val_batch_size // world.size, config.micro_batch_tokens) // self.length
        self.batch = min(max(most, 1), -(-self.total // world.size))

    def windows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's ids and targets [batch, T]; what fills up the last batch has targets of -100."""
        first, end = (self.total * r // self.world.size for r in (self.world.rank, self.world.rank + 1))
        for start in range(first, end, self.batch):
            count = min(self.batch, end - start) * self.length
            count = min(count, self.tokens.total - 1 - start * self.length)
            span = self.tokens.read(start * self.length, count + 1).to(self.world.device).long()
            fill = (0, self.batch * self.length - count)
            yield (F.pad(span[:-1], fill).view(-1, self.length),
                   F.pad(span[1:], fill, value=-100).view(-1, self.length))

    @torch.inference_mode()
    def score(self, model: Callable[[Tensor, Tensor], Tensor]) -> Score:
        """Scores a model that maps (ids, targets) to their mean loss, as GPT does; sums it in float64."""
        started = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # nats, targets, bytes
        for ids, targets in self.windows():
            real = targets >= 0
            sums[0] += model(ids, targets).double() * real.sum()
            sums[1] += real.sum()
            sums[2] += (self.counter.count(ids, targets.clamp_min(0)) * real).sum()
        nats, count, size = self.world.sum_(sums).tolist()
        seconds = time.perf_counter() - started
        return Score(nats / count, nats / math.log(2) / size, int(count), int(size), seconds)

def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()

@torch.no_grad()
def recurrence_health(model: GPT, ids: Tensor) -> list[dict[str, float]]:
    """Per effective layer: mean mix weights, RMS of branch scales (weights times gamma) and shifts, growth.

    Growth is the RMS of the residual stream behind the layer over that in front of it, on ids [B, T].
    """
    sizes, table = [1.0], []  # x0 is normalised
    hooks = [mlp.register_forward_hook(lambda _, inputs, out: sizes.append(rms(out))) for mlp in model.mlp]
    model.hidden(ids)
    for hook in hooks:
        hook.remove()
    for layer, (attn, mlp, _) in zip(model.plan, model.cond.rows(torch.float32)):
        carried, anchor = model.mix[layer.attn].weights()
        scales = model.attn[layer.attn].scale * attn.gamma, model.mlp[layer.mlp].scale * mlp.gamma
        table.append(dict(
            layer=layer.row, mix=carried.mean().item(), mix_x0=anchor.mean().item(),
            attn_scale=rms(scales[0]), mlp_scale=rms(scales[1]), attn_shift=rms(attn.beta),
            mlp_shift=rms(mlp.beta), growth=sizes[layer.row + 1] / sizes[layer.row]))
    return table

# ---- 11. Quantisation and artifact -----------------------------------------------------------------------
# An artifact is magic and version, SHA-256 of the rest, decompressed length, and zlib of: length of the
# header, the header (JSON: architecture; name and storage of every parameter), their values in that order.
# Shapes follow from the architecture. Nothing in it is ever executed or unpickled.

ARTIFACT_MAGIC = b"GOLFGPT\x01"  # the last byte is the version
ARTIFACT_HEAD = struct.Struct("<8s32sQ")
ARTIFACT_LIMIT = 1 << 28  # bytes, decompressed

def quantize_rows(w: Tensor, percentile: float, floor: float) -> tuple[Tensor, Tensor]:
    """int8 values and float16 steps [r] of w [r, c]; rows are clipped at `percentile` of |w|, in 127 steps.

    `floor` is the smallest step. PR 855 has 1/127, which puts rows of small weights on one coarse grid; the
    smallest float16, 2^-24, is there for rows of zeros.
    """
    clip = torch.quantile(w.abs(), percentile / 100, dim=1)
    step = (clip / 127).clamp_min(max(floor, 2.0**-24))
    q = torch.round(w.clamp(-clip[:, None], clip[:, None]) / step[:, None]).clamp(-127, 127)
    return q.to(torch.int8), step.half()

def dequantize_rows(q: Tensor, step: Tensor) -> Tensor:
    return q.float() * step.float()[:, None]

def store(p: nn.Parameter, config: Config) -> tuple[str, list[Tensor]]:
    """How a parameter is stored, and the tensors that hold it.

    What is not quantised becomes float16, unless that overflows or is off by more than 0.1 % of the norm.
    """
    w = p.detach().cpu()
    if ROLES[p.role].stored == "int8":
        return "int8", list(quantize_rows(w, config.quant_clip_percentile, config.quant_scale_floor))
    fine = (w.half().float() - w).norm() <= 1e-3 * w.norm()
    return ("float16", [w.half()]) if fine else ("float32", [w])

def pack(model: GPT, config: Config) -> bytes:
    """The artifact of a model."""
    entries, chunks = [], []
    for name, p in model.named_parameters():
        stored, tensors = store(p, config)
        entries.append([name, stored])
        chunks += [t.numpy().tobytes() for t in tensors]
    header = json.dumps(dict(architecture=asdict(config.architecture()), tensors=entries)).encode()
    raw = struct.pack("<I", len(header)) + header + b"".join(chunks)
    body = struct.pack("<Q", len(raw)) + zlib.compress(raw, 9)
    return ARTIFACT_MAGIC + hashlib.sha256(body).digest() + body

def read_tensor(raw: bytes, offset: int, stored: str, shape: torch.Size) -> tuple[Tensor, int]:
    """The float32 tensor at `offset` and the offset behind it; ValueError if it does not fit."""
    kinds = {"int8": ("<i1", "<f2"), "float16": ("<f2",), "float32": ("<f4",)}[stored]
    values = []
    for kind, count in zip(kinds, (shape.numel(), shape[0])):
        values.append(torch.from_numpy(np.frombuffer(raw, kind, count, offset).copy()))
        offset += values[-1].nbytes
    values[0] = values[0].view(shape)
    return dequantize_rows(*values) if stored == "int8" else values[0].float(), offset

def load_model(data: bytes, source: str) -> tuple[GPT, Architecture]:
    """A fresh model from an artifact; InputError names `source` and what is wrong with it."""
    if len(data) < ARTIFACT_HEAD.size or data[:7] != ARTIFACT_MAGIC[:7]:
        raise InputError(f"{source} is not an artifact of this script")
    magic, checksum, length = ARTIFACT_HEAD.unpack_from(data)
    if magic != ARTIFACT_MAGIC:
        raise InputError(f"{source} is of version {magic[7]}, this script reads version {ARTIFACT_MAGIC[7]}")
    if hashlib.sha256(data[40:]).digest() != checksum:
        raise InputError(f"{source} is damaged or truncated: its checksum does not match; copy it again")
    try:
        if not 4 <= length <= ARTIFACT_LIMIT:
            raise ValueError(f"impossible length {length}")
        raw = zlib.decompressobj().decompress(data[ARTIFACT_HEAD.size :], length)
        (size,) = struct.unpack_from("<I", raw)
        header, offset, tensors = json.loads(raw[4 : 4 + size]), 4 + size, []
        architecture = Architecture.from_json(header["architecture"])
        with torch.device("meta"):  # names, roles and shapes without memory
            expected = list(GPT(architecture).named_parameters())
        for (name, p), (given, stored) in zip(expected, header["tensors"], strict=True):
            if given != name or (stored == "int8") != (ROLES[p.role].stored == "int8"):
                raise ValueError(f"{given} stored as {stored} where {name} is due")
            tensor, offset = read_tensor(raw, offset, stored, p.shape)
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
            tensors.append(tensor)
        if offset != length:
            raise ValueError(f"{length} bytes announced, {offset} described")
    except (zlib.error, struct.error, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        raise InputError(f"{source} is not a valid artifact: {error}") from None
    model = GPT(architecture)
    for p, tensor in zip(model.parameters(), tensors):
        p.data.copy_(tensor)
    return model, architecture

# ---- 12. The run -----------------------------------------------------------------------------------------
# Check everything, train, export, reload the artifact from disk, score what was reloaded.

EXIT_INPUT, EXIT_NON_FINITE, EXIT_SIZE = 2, 3, 4

@functools.cache
def source() -> bytes:
    """This script as it is when the run begins; editing it meanwhile changes neither size nor hash."""
    return Path(__file__).read_bytes()

def versions(world: World) -> dict[str, str]:
    """What a result depends on besides the configuration."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads a rank"
    return dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
        sentencepiece=spm.__version__, cuda=f"{torch.version.cuda}, cudnn {torch.backends.cudnn.version()}",
        device=torch.cuda.get_device_name() if world.on_cuda else cpu,
        script_sha256=hashlib.sha256(source()).hexdigest())

def open_log(config: Config, world: World) -> Log:
    """Makes the run's folder, which must be new; the log opens with source, versions and configuration."""
    def make() -> Path:
        name = config.run_id or time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
        try:
            (folder := Path(config.log_dir) / name).mkdir(parents=True)
        except FileExistsError:
            raise InputError(f"{folder} exists and would be overwritten: choose another RUN_ID") from None
        return folder

    log = Log(world.on_main(make), world.is_main)
    log.to_file(source().decode() + "=" * 100)
    for name, value in versions(world).items():
        log(f"{name}:{value}")
    log("config:" + " ".join(f"{name.upper()}={show(value)}" for name, value in asdict(config).items()))
    if config.warmdown_iters >= config.iterations and not config.eval_only:
        log(f"warning: WARMDOWN_ITERS={config.warmdown_iters}: the learning rate falls from step 0 on")
    return log

def reload(path: Path, config: Config, world: World) -> tuple[Config, bytes, GPT]:
    """An artifact from disk: the configuration with its architecture, its bytes, a fresh model."""
    data = world.on_main(path.read_bytes)
    model, architecture = load_model(data, str(path))
    return replace(config, **asdict(architecture)), data, model.to(world.device)

def round_trip(data: bytes, model: GPT, scorer: Scorer, config: Config, log: Log) -> dict[str, Any]:
    """Size and score of what was reloaded, scored as the trained model was."""
    code, digest = len(source()), hashlib.sha256(data).hexdigest()
    total, raw = code + len(data), sum(4 * p.numel() for p in model.parameters())
    log(f"Code size: {code} bytes")
    log(f"Serialized model int8+zlib: {len(data)} bytes (float32:{raw} ratio:{raw / len(data):.2f}x)")
    log(f"Total submission size int8+zlib: {total} bytes")
    score, limit = scorer.score(compiled(model, config, scorer.world)), config.size_limit_bytes
    log(f"final_int8_zlib_roundtrip val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
        f"eval_time:{1e3 * score.eval_seconds:.0f}ms")
    log(f"final_int8_zlib_roundtrip_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
    log(f"val_tokens:{score.val_tokens} val_bytes:{score.val_bytes} artifact_sha256:{digest}")
    if total > limit:
        log(f"not a submission: {total} bytes exceed SIZE_LIMIT_BYTES={limit} by {total - limit}")
    return dict(roundtrip=score._asdict(), bytes_code=code, bytes_model=len(data), bytes_total=total,
                fits=total <= limit, artifact_sha256=digest)

def train_and_export(config: Config, world: World, scorer: Scorer) -> tuple[Log, dict[str, Any]]:
    """Trains a model and writes its artifact; log and figures of the run."""
    batches = world.on_all(lambda: Batches(Tokens(config, "train"), config, world), lambda b: b.tokens.total)
    log = open_log(config, world)
    torch.manual_seed(config.seed)
    model = GPT(config.architecture(), config.tied_embed_init_std).to(world.device)
    trainer = Trainer(config, world, model, batches)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"model_params:{parameters} effective_layers:{len(model.plan)}")
    log(f"world_size:{world.size} grad_accum_steps:{batches.accumulation}")
    log(f"train_loader:shards:{len(batches.tokens.paths)} tokens:{batches.tokens.total}")
    watched = scorer.tokens.read(0, config.train_seq_len).to(world.device).long()[None]

    def validate(step: int, seconds: float) -> Score:
        score = scorer.score(trainer.forward)
        trainer.check_finite(step, score)  # the last update alone may have ruined the weights
        log(f"step:{step}/{config.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
            f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / max(step, 1):.2f}ms")
        if world.is_main:
            health = recurrence_health(model, watched)
            log.metric(step=step, train_seconds=seconds, **score._asdict(), health=health)
            for row in health:
                log.to_file("health " + " ".join(f"{name}:{value:.4g}" for name, value in row.items()))
        return score

    trainer.warm_up()
    steps, seconds, score = trainer.train(log, validate)
    if world.on_cuda:
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")
    world.on_main(lambda: write_atomically(log.folder / "model.int8.ptz", pack(model, config)))
    return log, dict(model_params=parameters, steps=steps, train_seconds=seconds, pre_quant=score._asdict(),
                     tokens_per_second=steps * config.train_batch_tokens / max(seconds, 1e-9))

def run(config: Config, world: World) -> int:
    """One run as configured; result.json ends it. The exit code."""
    if config.eval_only:
        config, data, model = reload(Path(config.eval_only), config, world)
    same = replace(config, data_path="", tokenizer_path="", log_dir="")  # paths may differ between nodes
    scorer = world.on_all(lambda: Scorer(config, world), lambda scorer: (same, scorer.tokens.total))
    if config.eval_only:
        log, figures = open_log(config, world), {}
    else:
        log, figures = train_and_export(config, world, scorer)
        config, data, model = reload(log.folder / "model.int8.ptz", config, world)
    figures |= round_trip(data, model, scorer, config, log)
    figures |= dict(config=asdict(config), versions=versions(world), world_size=world.size)
    text = json.dumps(figures, indent=1).encode()
    world.on_main(lambda: write_atomically(log.folder / "result.json", text))
    return 0 if figures["fits"] else EXIT_SIZE

def main() -> int:
    """Runs what the environment describes; what a user can mend is one line without a traceback."""
    try:
        code = run(Config.from_env(os.environ), World(os.environ))
        if dist.is_initialized():
            dist.barrier()
    except (InputError, NonFiniteLoss) as error:
        print(f"[rank {os.environ.get('RANK', 0)}] {error}", file=sys.stderr)
        code = EXIT_INPUT if isinstance(error, InputError) else EXIT_NON_FINITE
    if dist.is_initialized():  # no teardown: it waits for ranks that failed, and gloo's can abort a good run
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code

if __name__ == "__main__":
    sys.exit(main())
