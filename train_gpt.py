"""Train a depth-recurrent GPT for parameter golf, pack it into 16 MB, reload the pack and score it.

    PRESET=tiny python train_gpt.py                               # laptop, sample corpus (data/sample.py)
    torchrun --standalone --nproc_per_node=8 train_gpt.py         # one 8-GPU node, FineWeb shards
    EVAL_ONLY=logs/<run>/model.ptz python train_gpt.py            # score an artifact again

Prelude layers, a shared core that is looped, coda layers. A plan (a tuple of `Layer`) says which weights and
conditioning every effective layer uses, and all code that walks the depth walks that plan. Every option is a
field of `Config`, set by the environment variable of its name in capitals.

Shapes: B sequences, T tokens, D model width, H query heads, K key/value heads, E head width, V vocabulary,
R effective layers. Parameters, tables and optimizer states are float32; matmul and attention operands and the
residual stream are DTYPE. There is no autocast.
"""
from __future__ import annotations
import ctypes, datetime, functools, hashlib, importlib, itertools, json, lzma, math, os  # noqa: E401
import platform, re, struct, sys, time, uuid, zlib  # noqa: E401
from collections import namedtuple
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

def require(met: Any, message: str) -> None:
    if not met:
        raise InputError(message)

def opt(default: Any, low: float = 0, high: float = math.inf, *, needs: str = "") -> Any:
    """An option, its bounds, and what it `needs` in order to act: e.g. "x !y z>1 u=v"."""
    return field(default=default, metadata={"low": low, "high": high, "needs": needs})

def parse(name: str, text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`; InputError names the variable and what it takes."""
    choices = ("0", "1") if kind is bool else get_args(kind)
    require(not choices or text in choices, f"{name}={text!r} is not one of {', '.join(choices)}")
    if get_origin(kind) is Literal or kind is str:
        return text
    try:
        return kind(int(text)) if kind is bool else kind(text)
    except ValueError:
        raise InputError(f"{name}={text!r} is not {'an integer' if kind is int else 'a number'}") from None

def show(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)

def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn a into b."""
    above, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        over, above, row = above, row, [i]
        for j, y in enumerate(b, 1):
            swap = over[j - 2] + 1 if i > 1 < j and (x, y) == (b[j - 2], a[i - 2]) else math.inf
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y), swap))
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
    num_loops: int = opt(3, 1, 256, needs="num_shared")  # passes over the core, at most, in training
    eval_passes: int = opt(0, 0, 256, needs="num_shared")  # passes over the core in scoring; 0: NUM_LOOPS
    num_coda: int = opt(1, 0, 256, needs="num_shared")  # layers after the core
    core_skips: Literal["none", "all", "published"] = opt("none", needs="num_prelude num_coda")  # U-Net skips
    share_attn_only: bool = opt(False, needs="num_shared num_loops>1")  # core: an MLP for every pass
    pass_scale_init: float = opt(1.0, -4, 4, needs="num_loops>1")  # alpha in x + alpha (core(x) - x); 1: none
    feedback_rank: int = opt(0, 0, 4096, needs="num_loops>1")  # r in x + d * (x V) U^T before a pass; 0: none
    interpass_norm: bool = opt(False, needs="num_loops>1")  # RMSNorm of the state before a further pass
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
    rope_dims: int = opt(0, 0, 65536)  # channels of a head that are rotated; 0: all
    ln_scale: bool = opt(False)  # the norms of layer i, from 0, are scaled by (i + 1)^-0.5
    xsa_last_n: int = opt(0, 0, 256)  # exclusive self-attention in so many last layers, outside the core
    smear_gate: Literal["none", "document", "published"] = opt("none")  # blends in the token before
    bigram_vocab_size: int = opt(0, 0, 1 << 20)  # buckets of the hashed bigram embedding; 0: none
    bigram_dim: int = opt(64, 1, 65536, needs="bigram_vocab_size")  # its width
    ve_last_n: int = opt(0, 0, 256)  # so many last layers take the shared value embedding; 0: none
    ve_dim: int = opt(128, 1, 65536, needs="ve_last_n")  # its width
    qk_gain_init: float = opt(1.5)  # initial gain of the normalised queries, per head
    tie_embeddings: bool = opt(True)  # the output projection is the token embedding
    train_seq_len: int = opt(1024, 2, 1 << 17)  # T, tokens per sequence; validation windows are as long
    dtype: Literal["bfloat16", "float32"] = opt("bfloat16")  # matmul operands and residual stream
    reference_bf16: bool = opt(False)  # PR 855's accident: RoPE positions, tables, embedding in bfloat16
    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            require(not isinstance(value, (int, float)) or low <= value <= min(high, sys.float_info.max),
                    f"{f.name.upper()}={value} is out of range: {low} to {high}")
        D, H, T = self.model_dim, self.num_heads, self.train_seq_len
        require(H % self.num_kv_heads == 0, f"NUM_KV_HEADS={self.num_kv_heads} does not divide NUM_HEADS={H}")
        require(D % (2 * H) == 0, f"MODEL_DIM={D} / NUM_HEADS={H} is not an even number")
        require(round(self.mlp_mult * D) >= 1, f"MLP_MULT={self.mlp_mult} of MODEL_DIM={D} is no channel")
        require(self.rope_dims % 2 == 0 and self.rope_dims <= D // H,
                f"ROPE_DIMS={self.rope_dims} is odd or wider than a head, {D // H}")
        require(self.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1: one bucket is for the first token")
        layers = self.num_prelude + self.num_shared * max(self.num_loops, self.eval_passes) + self.num_coda
        require(layers <= 1024 and T * D // H <= 1 << 27, f"{layers} layers, TRAIN_SEQ_LEN={T}: too large")
        require(not self.xsa_last_n or any(layer.xsa for layer in make_plan(self)),
                f"XSA_LAST_N={self.xsa_last_n} cannot act here: these last layers are all in the core")
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
    tracker: Literal["none", "tensorboard", "wandb"] = opt("none")  # where metrics go as well, if installed
    seed: int = opt(1337, 0, 2**64 - 1)  # of the random generator that draws the weights
    compile: Literal["auto", "model", "off"] = opt("auto")  # torch.compile; auto: model on CUDA, off on CPU
    iterations: int = opt(20000)  # optimizer steps at most
    max_wallclock_seconds: float = opt(600.0)  # training stops before this; 0: no cap
    passes_schedule: str = opt("", needs="num_loops>1")  # "0:1,0.6:2"; "" is NUM_LOOPS at once
    jacobian_weight: float = opt(0.0, needs="num_shared")  # of the penalty on growth of the state in the core
    jacobian_per_pass: bool = opt(False, needs="jacobian_weight")  # of growth in each pass, not overall
    warmup_steps: int = opt(20)  # compile and warm-up steps outside the clock, undone afterwards
    warmdown_iters: int = opt(1200)  # steps over which the learning rate falls to 0 at the end
    train_batch_tokens: int = opt(524288, 1)  # tokens per optimizer step, all ranks together
    micro_batch_tokens: int = opt(65536, 1)  # tokens per rank and forward pass at most
    val_batch_size: int = opt(524288, 1)  # tokens per validation batch, all ranks together
    val_loss_every: int = opt(1000)  # steps between validations; 0: only at the end
    train_log_every: int = opt(200, 1)  # steps between log lines, after the first ten
    embed_lr: float = opt(0.6, needs="!tie_embeddings")  # Adam: token embedding
    head_lr: float = opt(0.008, needs="!tie_embeddings")  # Adam: output projection
    tied_embed_lr: float = opt(0.05, needs="tie_embeddings")  # Adam: tied, bigram and value embeddings
    tied_embed_init_std: float = opt(0.005, needs="tie_embeddings")  # its initial standard deviation
    matrix_lr: float = opt(0.04)  # Muon: matrices
    scalar_lr: float = opt(0.04)  # Adam: scales, gains, tables, their projections
    muon_wd: float = opt(0.0)  # decoupled weight decay of matrices: W <- W (1 - lr wd)
    adam_wd: float = opt(0.0)  # decoupled weight decay of embeddings and projections
    decay_scalars: bool = opt(False, needs="adam_wd")  # PR 1230: of scales, gains and tables, too
    matrix_init: Literal["uniform", "orthogonal"] = opt("uniform")  # of matrices that do not begin at 0
    muon_momentum: float = opt(0.95, 0, 1)  # Nesterov momentum, after its warm-up
    muon_momentum_warmup_start: float = opt(0.85, 0, 1, needs="muon_momentum_warmup_steps")  # at step 0
    muon_momentum_warmup_steps: int = opt(500)  # steps until it has risen
    muon_backend_steps: int = opt(5, 1)  # Newton-Schulz iterations
    beta1: float = opt(0.9, 0, 1 - 1e-9)  # Adam: decay of the first moment
    beta2: float = opt(0.95, 0, 1 - 1e-9)  # Adam: decay of the second moment
    adam_eps: float = opt(1e-8)  # Adam: added to the root of the second moment
    grad_clip_norm: float = opt(0.0)  # L2 norm of the averaged gradient; 0: no clipping
    average: Literal["none", "ema", "swa"] = opt("none")  # of the weights over steps; it is what is exported
    ema_decay: float = opt(0.997, 0, 1 - 1e-9, needs="average=ema")  # of AVERAGE=ema, per step
    swa_every: int = opt(50, 1, needs="average=swa")  # steps between the weights that AVERAGE=swa collects
    swa_lr_factor: float = opt(0.2, 0, 1, needs="average=swa")  # once the learning rate is below this part
    qat_fraction: float = opt(0.0, 0, 1)  # last part of the run that trains on rounded matrices (QAT)
    qat_lr_factor: float = opt(0.0, 0, 1, needs="warmdown_iters")  # or once learning rates are below
    qat_core_only: bool = opt(False, needs="num_shared")  # no other matrices
    matrix_bits: int = opt(8, 0, 8)  # width of stored matrices; 0: the most that fits SIZE_LIMIT_BYTES
    core_bits: int = opt(0, 0, 8, needs="num_shared")  # width of those of the core; 0: MATRIX_BITS
    embed_bits: int = opt(8, 2, 8)  # width of stored embeddings
    quant_clip: Literal["percentile", "matrix", "row"] = opt("percentile")  # or best error for matrix or row
    quant_clip_percentile: float = opt(99.99984, 50, 100)  # of |w| in a row; weights beyond it saturate
    quant_scale_floor: float = opt(0.0, 0, 1)  # smallest int8 step; PR 855: 1/127 = 0.00787
    gptq_batches: int = opt(0)  # micro-batches per rank that calibrate GPTQ, in the training time; 0: no GPTQ
    gptq_seconds: float = opt(10.0, needs="gptq_batches max_wallclock_seconds")  # kept for them
    codec: Literal["zlib", "lzma", "brotli"] = opt("zlib")  # of the artifact; brotli is a package of its own
    eval_stride: int = opt(0)  # tokens a sliding validation window advances; 0: no sliding score
    eval_limit_seconds: float = opt(600.0)  # all scores together; a slower evaluation is no submission
    ttt_lr: float = opt(0.0)  # score-first test-time training: SGD; 0: none
    ttt_epochs: int = opt(3, 1, needs="ttt_lr")  # passes over a chunk after it was scored
    ttt_chunk_tokens: int = opt(32768, 1, needs="ttt_lr")  # tokens that are scored before they are trained on
    ttt_momentum: float = opt(0.9, 0, 1, needs="ttt_lr")  # of SGD
    ttt_grad_clip: float = opt(1.0, needs="ttt_lr")  # L2 norm of the averaged gradient; 0: no clipping
    size_limit_bytes: int = opt(16_000_000)  # script + artifact; beyond it the exit code is 4
    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Defaults, presets, then explicit variables; InputError for what is unknown, malformed or inert."""
        kinds = {name.upper(): kind for name, kind in get_type_hints(cls).items()}
        for name in env.keys() - kinds.keys() - {"USE_DEPTH_EMBED"}:
            alike = [k for k in (*kinds, "USE_DEPTH_EMBED") if abs(len(k) - len(name)) <= 2]
            known = min(alike, key=lambda k: edit_distance(name, k), default="")
            require(not known or edit_distance(name, known) > (2 if len(known) > 5 else 1),
                    f"{name} is not an option; did you mean {known}? (unset it to go on)")
        explicit = {n.lower(): parse(n, env[n], kind) for n, kind in kinds.items() if n in env}
        if "USE_DEPTH_EMBED" in env:  # the public name; learned in series 4 of PR 855, sinusoidal in series 5
            require("DEPTH_EMBED" not in env, "USE_DEPTH_EMBED and DEPTH_EMBED are both set; drop one")
            on = parse("USE_DEPTH_EMBED", env["USE_DEPTH_EMBED"], bool)
            explicit["depth_embed"] = "sinusoidal" if on else "none"
        config = cls(**preset_values(explicit.get("preset", "")) | explicit)
        for name, value in explicit.items():
            for need in cls.__dataclass_fields__[name].metadata["needs"].split():
                require(value in (0, "", "none") or not config.hindrance(need),
                        f"{name.upper()}={show(value)} cannot act here: {config.hindrance(need)}")
            require(not config.eval_only or name in EVAL_OPTIONS, f"{name.upper()} cannot act here: "
                    "EVAL_ONLY trains nothing and takes the model from the artifact")
        return config
    def __post_init__(self) -> None:
        super().__post_init__()
        (starts, counts), cap = zip(*self.schedule()), self.max_wallclock_seconds
        require(starts[0] == 0 and sorted(set(starts)) == [*starts] and len({x < 1 for x in starts[1:]}) < 2
                and all(1 <= passes <= self.num_loops for passes in counts),
                f"PASSES_SCHEDULE={self.passes_schedule} does not ascend from 0 with 1 to NUM_LOOPS="
                f"{self.num_loops} passes, as 0:1,0.6:{self.num_loops} would")
        require(self.matrix_bits or not (self.qat_fraction or self.qat_lr_factor),
                "MATRIX_BITS=0 is chosen after training: QAT_FRACTION and QAT_LR_FACTOR cannot round to it")
        require(not self.qat_core_only or self.qat_fraction or self.qat_lr_factor,
                "QAT_CORE_ONLY=1 cannot act here: it needs QAT_FRACTION or QAT_LR_FACTOR")
        require(1 not in (self.matrix_bits, self.core_bits), "MATRIX_BITS and CORE_BITS are 0 or 2 to 8")
        require(not self.gptq_batches or not cap or cap > self.gptq_seconds,
                f"GPTQ_SECONDS={self.gptq_seconds} leave nothing of MAX_WALLCLOCK_SECONDS={cap} to train")
    @property
    def training_seconds(self) -> float:
        """When training ends: MAX_WALLCLOCK_SECONDS less what GPTQ takes of it; 0: no limit."""
        return max(self.max_wallclock_seconds - self.gptq_seconds * (self.gptq_batches > 0), 0.0)
    def schedule(self) -> list[tuple[float, int]]:
        """(beginning, passes): from a step on, or from a fraction of the run on where that is below 1."""
        entries = (self.passes_schedule * (not self.eval_only) or f"0:{self.num_loops}").split(",")
        return [(parse("PASSES_SCHEDULE", when, float), parse("PASSES_SCHEDULE", passes, int))
                for when, _, passes in (entry.partition(":") for entry in entries)]
    def width(self, name: str) -> int:
        return getattr(self, name) or self.matrix_bits if name else 0
    def hindrance(self, need: str) -> str:
        """What stands against what an option `needs`, as in NUM_LOOPS=1; "" if nothing does."""
        name, sign, value = re.fullmatch(r"!?(\w+)([>=]?)(\w*)", need).groups()
        actual = getattr(self, name)
        met = actual == value if sign == "=" else actual > int(value) if sign else bool(actual)
        return "" if met != need.startswith("!") else f"{name.upper()}={show(actual)}"
    def architecture(self) -> Architecture:
        return Architecture(**{f.name: getattr(self, f.name) for f in fields(Architecture)})

EVAL_OPTIONS = set("""preset eval_only data_path tokenizer_path log_dir run_id compile val_batch_size
    micro_batch_tokens size_limit_bytes eval_passes eval_stride eval_limit_seconds ttt_lr ttt_epochs
    ttt_chunk_tokens ttt_momentum ttt_grad_clip""".split())

# ---- 2. Presets ------------------------------------------------------------------------------------------
# The published systems: the 21 runs of the recurrence study (PR 855; A', B', C' are Ap, Bp, Cp), the naive
# baseline, the "baseline wins" report (it gives width and depth; the head counts fit its parameter counts),
# and growing recurrence (PR 1230): `growing` is what it trained, less error feedback and bigrams, which could
# not learn there, with its passes by time; `growing_live` has both, and all four skips.
PLAIN: dict[str, Any] = dict(
    num_prelude=0, num_shared=0, num_loops=1, num_coda=0, use_peri_norm=False, use_birkhoff_mix=False,
    use_timestep_scale=False, timestep_gamma_max=0.0, use_timestep_bias=False, depth_embed="none")
core = lambda *layers: dict(zip(("num_prelude", "num_shared", "num_loops", "num_coda"), layers))  # noqa: E731
SCREEN = dict(iterations=2000, max_wallclock_seconds=0.0)  # series 1: 1xH100, 2000 steps
REPORT = dict(leaky_relu_slope=0.0, max_wallclock_seconds=180.0)  # "baseline wins": 1xH100, 180 s
AT_768, AT_1024 = (REPORT | dict(model_dim=d, num_heads=d // 64) for d in (768, 1024))
MIX = dict(use_peri_norm=True, use_birkhoff_mix=True)
SCALE = MIX | dict(use_timestep_scale=True)
CAPPED = SCALE | dict(timestep_gamma_max=4.0)
FILM = CAPPED | dict(use_timestep_bias=True)
UNIQUE = FILM | dict(use_unique_norms=True, unique_norms_input_norm=True)
GROWING = PLAIN | core(4, 3, 3, 4) | dict(
    core_skips="published", pass_scale_init=0.5, passes_schedule="0:1,0.626:2,0.813:3", jacobian_weight=0.01,
    mlp_mult=3.0, ln_scale=True, rope_dims=16, rope_base=10000 * 2 ** (16 / 14), xsa_last_n=4, ve_last_n=2,
    smear_gate="published", train_seq_len=2048, train_batch_tokens=786432, matrix_init="orthogonal",
    warmdown_iters=3500, matrix_lr=0.025, scalar_lr=0.025, tied_embed_lr=0.035, muon_momentum=0.99,
    muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500, muon_wd=0.04, adam_wd=0.04,
    decay_scalars=True, grad_clip_norm=0.3, average="ema", qat_lr_factor=0.15, qat_core_only=True,
    matrix_bits=6, quant_clip="matrix", quant_scale_floor=1 / 127, codec="lzma", eval_stride=64, ttt_lr=0.002)
LOOPED = (  # runs of equal techniques: name and layers (prelude, shared, passes, coda)
    (SCREEN, "Bp:0420"), (SCREEN | MIX, "C:0420"), (SCREEN | dict(use_birkhoff_mix=True), "Cp:0420"),
    (SCREEN | SCALE, "D:0420 E:1321 F:1231"), (MIX, "G:1321 H:1421 J:1431"), (CAPPED, "I:1421 K:1431"),
    (CAPPED | dict(share_attn_only=True), "L:1421 M:1431"), (FILM, "N:1421 O:1431"), (UNIQUE, "S:1431"),
    (UNIQUE | dict(depth_embed="learned"), "P:1421 Q:1431"), (FILM | dict(depth_embed="learned"), "R:1431"),
    (FILM | dict(depth_embed="sinusoidal"), "T:1431"), (REPORT | dict(model_dim=640), "recur_3x3_640:0330"),
    (AT_768, "recur_3x3_768:0330 recur_4x3_768:0430"), (AT_1024, "recur_3x3_1024:0330 recur_2x6_1024:0260"))
SYSTEMS: dict[str, dict[str, Any]] = {
    "Ap": SCREEN | dict(num_layers=8), "naive": dict(num_layers=9, leaky_relu_slope=0.0),
    "flat_9x1_512": REPORT | dict(num_layers=9), "growing": GROWING,
    "growing_live": GROWING | dict(core_skips="all", smear_gate="document", feedback_rank=2,
                                   bigram_vocab_size=512),
} | {name: base | core(*map(int, layers)) for base, runs in LOOPED
     for name, layers in (run.split(":") for run in runs.split())}
SCALES: dict[str, dict[str, Any]] = {"tiny": dict(
    data_path="./data/datasets/sample_sp1024", tokenizer_path="./data/tokenizers/sample_1024_bpe.model",
    train_seq_len=256, train_batch_tokens=8192, micro_batch_tokens=8192, val_batch_size=16384, iterations=100,
    max_wallclock_seconds=110.0, warmup_steps=1, warmdown_iters=50, val_loss_every=0, train_log_every=25,
    muon_momentum_warmup_steps=50, ema_decay=0.9, ttt_chunk_tokens=8192)}

def preset_values(preset: str) -> dict[str, Any]:
    names = preset.split(",") if preset else []
    systems, scales = [n for n in names if n in SYSTEMS], [n for n in names if n in SCALES]
    require(len(systems) <= 1 and len(scales) <= 1 and len(systems) + len(scales) == len(names),
            f"PRESET={preset}: one system of {', '.join(SYSTEMS)} and/or one scale of {', '.join(SCALES)}")
    values = PLAIN | SYSTEMS[systems[0]] if systems else {}
    for scale in scales:  # a quarter of the width in half as many heads
        full = {f.name: values.get(f.name, f.default) for f in fields(Architecture)}
        parts = dict(model_dim=4, num_heads=2, num_kv_heads=2).items()
        values = values | {name: full[name] // part for name, part in parts} | SCALES[scale]
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
        elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: keep freed memory instead of
            libc.mallopt(-3, 1 << 30)  # faulting it in again at every step
        if self.size > 1:
            dist.init_process_group(**group, timeout=datetime.timedelta(minutes=30))  # rank 0 packs alone
    def sum_(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x
    def broadcast_(self, x: Tensor) -> None:
        if self.size > 1:
            dist.broadcast(x, 0)
    def gather(self, job: Callable[[], Any]) -> list[Any]:
        """What `job` returns on every rank, on all of them, or the InputError or OSError it raises on one."""
        try:
            mine = job()
        except (InputError, OSError) as error:
            mine = InputError(str(error))
        seen = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(seen, mine)
        if errors := [x for x in seen if isinstance(x, InputError)]:
            raise errors[0]
        return seen
    def on_all(self, job: Callable[[], Any], facts: Callable[[Any], Any]) -> Any:
        """What `job` returns on each rank; InputError on all if it fails on one, or its `facts` differ."""
        value: list[Any] = []
        seen = set(self.gather(lambda: value.append(job()) or repr(facts(value[0]))))
        require(len(seen) == 1, f"ranks differ in their variables or data: {' / '.join(sorted(seen))}")
        return value[0]
    def on_main(self, job: Callable[[], Any]) -> Any:
        """What `job` returns on rank 0, on all ranks; its InputError or OSError is raised on all, too."""
        return self.gather(lambda: job() if self.is_main else None)[0]
    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

class Log:
    """Rank 0's records: train.log for people, metrics.jsonl for programs, a progress line on a terminal."""
    def __init__(self, folder: Path, is_main: bool, tracker: str = "none") -> None:
        self.folder, self.is_main, self.watched = folder, is_main, is_main and sys.stderr.isatty()
        self.tracker, self.send = tracker if is_main else "none", None
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
        try:  # a tracker that fails, in whatever way, is switched off and the run goes on
            if self.tracker != "none":
                self.send = self.send or open_tracker(self.tracker, self.folder)
                self.send(values)
        except Exception as error:
            self.tracker = "none"
            self(f"warning: TRACKER is off: {type(error).__name__}: {error}")
    def progress(self, text: str) -> None:
        if self.watched:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

def open_tracker(name: str, folder: Path) -> Callable[[dict[str, Any]], Any]:
    """What takes the metrics of a step to Weights & Biases, or to TensorBoard's files in `folder`."""
    if name == "wandb":
        return importlib.import_module("wandb").init(name=folder.name, dir=str(folder)).log
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder), flush_secs=5)
    return lambda values: [writer.add_scalar(name, value, values["step"]) for name, value in values.items()
                           if isinstance(value, (int, float))]

def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

# ---- 4. Data ---------------------------------------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS, BOS = 20240520, 1, 256, 1  # BOS begins every document

def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens of a shard (data/README.md) whose header and size fit; else InputError."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    require(len(header) == SHARD_HEADER_INTS and (header[0], header[1]) == (SHARD_MAGIC, SHARD_VERSION),
            f"{path} is not a token shard (begins with {header[:2].tolist()}): fetch it again")
    count, size = int(header[2]), path.stat().st_size
    require(count > 0 and size == 4 * SHARD_HEADER_INTS + 2 * count,
            f"{path} has {size} bytes but its header says {count} tokens: fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS, shape=(count,))

class Tokens:
    """The shards of one split as one sequence of token ids that starts again at its end."""
    def __init__(self, config: Config, split: Literal["train", "val"]) -> None:
        folder, self.vocab_size = Path(config.data_path), config.vocab_size
        self.paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        require(self.paths, f"DATA_PATH={folder} holds no fineweb_{split}_*.bin: see data/README.md, or run "
                "`python data/sample.py` and set PRESET=tiny for the sample corpus")
        self.shards = [open_shard(path) for path in self.paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.total = int(self.starts[-1])
        require(self.total > config.train_seq_len,
                f"TRAIN_SEQ_LEN={config.train_seq_len}: {split} in {folder} has only {self.total} tokens")
    def read(self, start: int, count: int) -> Tensor:
        """int32 tokens [count] from position `start`; ids beyond the vocabulary raise InputError."""
        pieces = []
        while count:
            start %= self.total
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[i][start - self.starts[i] :][:count]
            require(piece.max() < self.vocab_size, f"{self.paths[i]} holds token {piece.max()}, VOCAB_SIZE="
                    f"{self.vocab_size}: it is corrupt or of another tokenizer")
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.from_numpy(np.concatenate(pieces).astype(np.int32))

class Batches:
    """Step s is the s-th TRAIN_BATCH_TOKENS of the split, by sequences; every rank takes its part of them."""
    def __init__(self, tokens: Tokens, config: Config, world: World) -> None:
        self.tokens, self.world, self.length = tokens, world, config.train_seq_len
        self.batch = config.train_batch_tokens
        sequences, ragged = divmod(self.batch, self.length)
        require(sequences and not ragged,
                f"TRAIN_SEQ_LEN={self.length} does not divide TRAIN_BATCH_TOKENS={self.batch}")
        fits = [n for n in range(1, sequences + 1) if sequences % n == 0]
        require(world.size in fits, f"WORLD_SIZE={world.size} does not divide the {sequences} sequences of a "
                f"batch (TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN); these do: {', '.join(map(str, fits))}")
        local, limit = sequences // world.size, config.micro_batch_tokens // self.length
        require(limit, f"MICRO_BATCH_TOKENS={config.micro_batch_tokens} < TRAIN_SEQ_LEN={self.length}")
        self.accumulation = next(n for n in range(1, local + 1) if local % n == 0 and local // n <= limit)
        self.sequences = local // self.accumulation  # per rank and micro-batch
    def micro(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, int64 [B, T] each on the rank's device, for every micro-batch of a step."""
        for i in range(self.accumulation):
            first = (i * self.world.size + self.world.rank) * self.sequences * self.length
            span = self.tokens.read(step * self.batch + first, self.sequences * self.length + 1)
            span = span.pin_memory() if self.world.on_cuda else span  # else the copy waits for the queue
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
        """Tables for a tokenizer. A byte piece is a byte, control and unknown pieces none. A leading space is
        one, save behind one of those if the tokenizer begins texts with a space of its own."""
        tokenizer = spm.SentencePieceProcessor()
        try:
            tokenizer.load(str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"TOKENIZER_PATH={path} is not a SentencePiece model: {error}") from None
        require(len(tokenizer) == vocab_size,
                f"TOKENIZER_PATH={path} has {len(tokenizer)} pieces, VOCAB_SIZE={vocab_size}")
        added, ids = tokenizer.decode_pieces([SPACE]) == "", range(vocab_size)
        none = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
        text = [not none[i] and not tokenizer.is_byte(i) and tokenizer.id_to_piece(i) for i in ids]
        size = [len(piece.removeprefix(SPACE).replace(SPACE, " ").encode()) if piece else int(not none[i])
                for i, piece in enumerate(text)]
        space = [bool(piece) and piece.startswith(SPACE) for piece in text]
        return cls(torch.tensor(size), torch.tensor(space), torch.tensor(none) & added)
    def count(self, previous: Tensor, token: Tensor) -> Tensor:
        """Bytes of each token, int64, given the one before it (same shape)."""
        return self.size[token] + (self.space[token] & ~self.boundary[previous])

# ---- 6. Plan ---------------------------------------------------------------------------------------------
class Layer(NamedTuple):
    """One effective layer. Sharing is a repeated index: layers of the same `attn` or `mlp` share weights."""
    row: int  # its depth: row of the scale, shift and depth-code tables
    attn: int  # attention and the mix in front of it; in the order of the unshared network
    mlp: int
    gain: int = -1  # row of the unique norm gains; -1: the neutral row
    core: bool = False  # its weights are used in every pass
    opens: int = -1  # the pass over the core that begins here, from 0, and at most the last one trained
    closes: int = -1  # the pass over the core that ends here
    push: bool = False  # U-Net: its output is kept for a later layer
    skip: int = -1  # U-Net: weight with which the output kept last is added to its input; -1: none
    value: int = -1  # row of the value embedding's scales; -1: takes none
    xsa: bool = False  # attention leaves out what lies along the token's own value

def make_plan(a: Architecture, passes: int = 0) -> tuple[Layer, ...]:
    """The effective layers: prelude, `passes` (0: NUM_LOOPS) x core, coda. A layer has the same row at any
    number of passes, and passes beyond NUM_LOOPS have the last one's rows. Without a core, a flat U-Net."""
    pre, shared, tail, last = a.num_prelude, a.num_shared, a.num_coda, a.num_loops - 1
    # PR 1230 adds a skip while the tail layer's index is below the number of skips left: half of them
    skips = {"none": 0, "all": pre, "published": (pre + 1) // 2}[a.core_skips]
    if not shared:  # the second half takes the outputs of the first, the last one first
        pre, tail, skips = a.num_layers // 2, a.num_layers - a.num_layers // 2, a.num_layers // 2
    unique, skips, layers = pre + shared + tail, min(skips, tail), []
    looped = list(range(pre, pre + shared)) * (passes or a.num_loops)
    for v, u in enumerate([*range(pre), *looped, *range(pre + shared, unique)]):
        core, t = pre <= u < pre + shared, u - pre - shared
        loop = min((v - pre) // shared, last) if core else last if t >= 0 else 0
        row = u + shared * loop
        layers.append(Layer(
            row, u, row if a.share_attn_only else u, row - pre if a.use_unique_norms and core else -1, core,
            opens=loop if core and u == pre else -1, closes=loop if core and t == -1 else -1,
            push=pre - skips <= u < pre, skip=t if 0 <= t < skips else -1,
            value=max(u - unique + a.ve_last_n, -1), xsa=not core and u >= unique - a.xsa_last_n))
    return tuple(layers)

# ---- 7. Model --------------------------------------------------------------------------------------------
# A gain in front of a matrix scales its columns, one behind it its rows: the same function, and the pass over
# the data with a column reduction in its backward becomes a pass over a weight.
class Role(NamedTuple):
    """What is done with a kind of parameter; a parameter names its role where it is made."""
    optimizer: Literal["muon", "adam"]
    lr: str  # field of Config
    bits: str = ""  # field of Config: the width it is stored in; "": float16
    decays: bool = True  # with ADAM_WD, also without DECAY_SCALARS

ROLES = {
    "matrix": Role("muon", "matrix_lr", "matrix_bits"), "core matrix": Role("muon", "matrix_lr", "core_bits"),
    "tied embedding": Role("adam", "tied_embed_lr", "embed_bits"),
    "embedding": Role("adam", "embed_lr", "embed_bits"), "head": Role("adam", "head_lr", "embed_bits"),
    "side embedding": Role("adam", "tied_embed_lr", "embed_bits"),  # bigrams, values
    "projection": Role("adam", "scalar_lr", "embed_bits"),  # of side embeddings and error feedback
    "table": Role("adam", "scalar_lr", decays=False),  # a row for every effective layer
    "scalar": Role("adam", "scalar_lr", decays=False),  # vectors of one layer
}

def parameter(role: str, value: Tensor, parts: tuple[int, ...] = ()) -> nn.Parameter:
    """A float32 parameter with a role; `parts` are the rows of the matrices stacked in it (q, k, v)."""
    p = nn.Parameter(value)
    p.role, p.parts = role, parts or (len(value),)
    return p

def uniform(rows: int, columns: int) -> Tensor:
    """[rows, columns] from U(-1/sqrt(columns), 1/sqrt(columns)), PyTorch's default for a linear layer."""
    return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5)

class Mode(NamedTuple):
    """How a forward pass runs; torch.compile makes one graph for each."""
    passes: int  # over the core
    bits: int = 0  # width that matrices outside the core are rounded to; 0: they are not
    core_bits: int = 0  # width that those of the core are rounded to
    floor: float = 0.0  # QUANT_SCALE_FLOOR of that rounding
    jacobian: float = 0.0  # weight of the penalty on growth in the core
    per_pass: bool = False  # it is that of every pass

def row_steps(clip: Tensor, bits: int, floor: float) -> tuple[Tensor, int]:
    """Steps of rows that saturate at `clip`, and how many fit on a side of 0. `floor` is the smallest step of
    8 bits; fewer bits have the same range. 2^-24, the smallest float16, is there for rows of zeros."""
    levels = 2 ** (bits - 1) - 1
    return (clip / levels).clamp_min(max(floor * 127 / levels, 2.0**-24)), levels

class Matrix(nn.Module):
    """A linear map without bias, which Muon trains and the quantiser rounds."""
    def __init__(self, value: Tensor, core: bool, parts: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight, self.core = parameter("core matrix" if core else "matrix", value, parts), core
    def forward(self, x: Tensor, factor: Tensor | float, mode: Mode) -> Tensor:
        """x [..., c] -> [..., r]. `factor` scales columns, [c], or rows, [r, 1], of the (rounded) weight. The
        gradient passes the rounding as if it were not there (straight-through, arXiv 1308.3432)."""
        w = self.weight
        if bits := mode.core_bits if self.core else mode.bits:
            step, levels = row_steps(w.detach().abs().amax(1, keepdim=True), bits, mode.floor)
            w = w + (torch.round(w.detach() / step).clamp(-levels, levels) * step - w.detach())
        return F.linear(x, (w * factor).to(x.dtype))

def rms_norm(x: Tensor) -> Tensor:
    """x / RMS(x) over the last dimension, without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=1.1920929e-07)  # of float32, PyTorch's default

def rope_tables(a: Architecture) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, ROPE_DIMS / 2] of the rotary angles (arXiv 2104.09864), computed in float32."""
    half = (a.rope_dims or a.model_dim // a.num_heads) // 2
    frequency, position = a.rope_base ** (-torch.arange(half) / half), torch.arange(a.train_seq_len).float()
    if a.reference_bf16:  # leaves 513 distinct rotations for 1,024 positions
        frequency, position = frequency.bfloat16(), position.bfloat16()
    angle = torch.outer(position, frequency).float()[:, None]
    return angle.cos(), angle.sin()

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of x [B, T, heads, E], whose halves are the rotated pairs."""
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)

def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention (arXiv 2603.09078): y [B, T, H, E] less its part along own v [B, T, K, E]."""
    own = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
    y = y.unflatten(2, (v.shape[2], -1))
    return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention: q [B, H, T, E], k and v [B, K, T, E] -> [B, H, T, E]."""
    if q.is_cuda or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return blockwise_attention(q, k, v)

def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """`attend` for CPUs, by batched products. A block of queries only meets the keys up to its own end;
    queries that share a key head are one product."""
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
    """What a layer starts from: carried x + anchor x0 per channel, with two free weights or with a and 1 - a,
    a = sigmoid(logit): what PR 855 made of mHC-lite (arXiv 2601.05732) and calls Birkhoff mixing."""
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.convex, start = a.use_birkhoff_mix, torch.tensor([[1.0], [0.0]]).expand(2, a.model_dim)
        self.weight = parameter("scalar", torch.zeros(a.model_dim) if self.convex else start.clone())
    def weights(self) -> tuple[Tensor, Tensor]:
        if self.convex:
            return torch.sigmoid(self.weight), torch.sigmoid(-self.weight)
        return self.weight[0], self.weight[1]
    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        carried, anchor = (w.to(x.dtype) for w in self.weights())
        return torch.lerp(x0, x, carried) if self.convex else torch.addcmul(x * carried, x0, anchor)

class Shared(NamedTuple):
    """What all layers of one forward pass use."""
    mode: Mode
    rope: tuple[Tensor, Tensor]  # cos, sin
    values: list[Tensor]  # value embeddings [B, T, K E], one for every layer that takes one

class Attention(nn.Module):
    """Residual branch: pre-norm causal attention with normalised q and k, RoPE and a gain per query head."""
    def __init__(self, a: Architecture, core: bool) -> None:
        super().__init__()
        self.heads, self.width = (a.num_heads, a.num_kv_heads, a.num_kv_heads), a.model_dim // a.num_heads
        parts = tuple(n * self.width for n in self.heads)
        self.qkv = Matrix(uniform(sum(parts), a.model_dim), core, parts)
        self.proj = Matrix(torch.zeros(a.model_dim, a.model_dim), core)
        self.q_gain = parameter("scalar", torch.full((a.num_heads,), a.qk_gain_init))
        self.scale = parameter("scalar", torch.ones(a.model_dim))
    def forward(self, x: Tensor, layer: Layer, mod: Mod, shared: Shared) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(rms_norm(x), mod.gain, shared.mode).view(B, T, -1, self.width)
        q, k, v = qkv.split(self.heads, dim=2)
        if layer.value >= 0:
            v = v + shared.values[layer.value].view(v.shape)
        q = rotate(rms_norm(q), *shared.rope) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), *shared.rope)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if layer.xsa:
            y = without_own_value(y, v)
        return x + self.proj(y.reshape(B, T, D), (self.scale * mod.gamma)[:, None], shared.mode) + mod.beta

class MLP(nn.Module):
    """Residual branch: W2 leaky_relu(W1 x)^2, normalised at its input, its output (Output-LN) or both."""
    def __init__(self, a: Architecture, core: bool, input_norm: bool) -> None:
        super().__init__()
        self.slope, self.input_norm, self.output_norm = a.leaky_relu_slope, input_norm, a.use_peri_norm
        hidden = round(a.mlp_mult * a.model_dim)
        self.fc = Matrix(uniform(hidden, a.model_dim), core)
        self.proj = Matrix(torch.zeros(a.model_dim, hidden), core)
        self.scale = parameter("scalar", torch.ones(a.model_dim))
    def forward(self, x: Tensor, mod: Mod, mode: Mode) -> Tensor:
        h = self.fc(rms_norm(x) if self.input_norm else x, mod.gain, mode)
        h, scale = F.leaky_relu(h, self.slope).square(), self.scale * mod.gamma
        if self.output_norm:
            return torch.addcmul(x + mod.beta, rms_norm(self.proj(h, 1.0, mode)), scale.to(x.dtype))
        return x + self.proj(h, scale[:, None], mode) + mod.beta

class SideEmbedding(nn.Module):
    """A narrow table [N, d] and its projection to [out], scaled: bigrams into the stream, tokens into v."""
    def __init__(self, rows: int, width: int, out: int, scale: float) -> None:
        super().__init__()
        self.table = parameter("side embedding", 0.01 * torch.randn(rows, width))
        self.proj = parameter("projection", uniform(out, width))
        self.scale = parameter("scalar", torch.full((1,), scale))
    def forward(self, index: Tensor) -> Tensor:
        return F.linear(F.embedding(index, self.table), self.proj * self.scale)

def bigram_index(ids: Tensor, buckets: int) -> Tensor:
    """Bucket of each token of ids [B, T] and the one before it; the last for a first token (PR 549)."""
    mixed = (36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])
    return F.pad(mixed % (buckets - 1), (1, 0), value=buckets - 1)

class Core(nn.Module):
    """What happens between two passes over the core (PR 1230), by the second pass's number, from 1."""
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        D, rank, further = a.model_dim, a.feedback_rank, a.num_loops - 1
        self.norm, self.scaled, self.rank = a.interpass_norm, a.pass_scale_init != 1, rank
        if self.scaled and further:
            self.scale = parameter("scalar", torch.full((further,), a.pass_scale_init))
        if rank:  # U alone begins at 0: published with V and d at 0 as well, all its gradients are 0 for ever
            self.v = parameter("projection", torch.randn(D, rank) * D**-0.5)
            self.u = parameter("projection", torch.zeros(D, rank))
            self.diagonal = parameter("scalar", torch.ones(D))
    def enter(self, x: Tensor, number: int) -> Tensor:
        """The state [B, T, D] that a pass begins with; the first one, number 0, as it came."""
        x = rms_norm(x) if self.norm and number else x
        if self.rank and number:
            x = x + F.linear(x @ self.v.to(x.dtype), (self.u.T * self.diagonal).T.to(x.dtype))
        return x
    def leave(self, begun: Tensor, x: Tensor, number: int) -> Tensor:
        return torch.lerp(begun, x, self.scale[number - 1].to(x.dtype)) if self.scaled and number else x

def overgrowth(before: Tensor, after: Tensor) -> Tensor:
    """relu(|after - before| / |before| - 1)^2, Frobenius norms over the whole forward pass (PR 1230)."""
    before, change = before.float(), after.float() - before.float()
    return F.relu(change.norm() / (before.norm() + 1e-6) - 1).square()

class Conditioning(nn.Module):
    """Tables by effective layer: gamma, beta (arXiv 2410.01405, 1709.07871), depth code, norm gains."""
    def __init__(self, a: Architecture, plan: tuple[Layer, ...]) -> None:
        super().__init__()
        R, D, gains = len(plan), a.model_dim, max(layer.gain for layer in plan) + 1
        self.cap = a.timestep_gamma_max or math.inf
        self.table("gamma", a.use_timestep_scale, torch.ones(R, 2, D if a.use_timestep_scale else 1))
        self.table("beta", a.use_timestep_bias, torch.zeros(R, 2, D if a.use_timestep_bias else 1))
        self.table("gain", gains > 0, torch.ones(gains, 2, D if gains else 1))
        self.table("no_gain", False, torch.ones(1, *self.gain.shape[1:]))
        self.table("gain_row", False, torch.tensor([layer.gain for layer in plan]))
        code = torch.sin(torch.arange(R)[:, None] * 10000.0 ** (-torch.arange(D) / D))
        code = {"none": torch.zeros(R, 1), "sinusoidal": code, "learned": torch.zeros(R, D)}[a.depth_embed]
        self.table("depth", a.depth_embed == "learned", code)
        scale = torch.tensor([layer.attn + 1.0 for layer in plan]) ** (-0.5 if a.ln_scale else 0.0)
        at_output = torch.tensor([False, a.use_peri_norm])  # of attention and MLP: where the norm is
        self.table("scale_in", False, torch.where(at_output, 1.0, scale[:, None])[..., None])
        self.table("scale_out", False, torch.where(at_output, scale[:, None], 1.0)[..., None])
    def table(self, name: str, learned: bool, value: Tensor) -> None:
        constant = functools.partial(self.register_buffer, persistent=False)
        register = self.register_parameter if learned else constant
        register(name, parameter("table", value) if learned else value)
    def rows(self, plan: tuple[Layer, ...], dtype: torch.dtype) -> list[tuple[Mod, Mod, Tensor]]:
        """For every effective layer: the Mod of attention, that of the MLP, the depth code."""
        gain = (torch.cat((self.gain, self.no_gain))[self.gain_row] * self.scale_in).unbind()
        gamma = (self.gamma.clamp(-self.cap, self.cap) * self.scale_out).unbind()
        beta, depth = self.beta.to(dtype).unbind(), self.depth.to(dtype).unbind()
        return [(*map(Mod, gain[layer.row], gamma[layer.row], beta[layer.row]), depth[layer.row])
                for layer in plan]

class GPT(nn.Module):
    """The layers of `make_plan` between embedding and head, drawn from torch's global random generator."""
    def __init__(self, a: Architecture, tied_embed_std: float = 0.0, orthogonal: bool = False) -> None:
        super().__init__()
        trained, scored = make_plan(a), a.eval_passes or a.num_loops
        self.plans = {p: make_plan(a, p) for p in range(1, max(a.num_loops, scored) + 1)}
        self.scoring, self.dtype = Mode(scored), getattr(torch, a.dtype)
        self.tied, self.softcap = a.tie_embeddings, a.logit_softcap
        V, D = a.vocab_size, a.model_dim
        self.tok_emb = parameter("tied embedding" if self.tied else "embedding",
                                 torch.randn(V, D) * (tied_embed_std if self.tied else 1.0))
        if not self.tied:
            self.lm_head = parameter("head", torch.zeros(V, D))
        attns, mlps = {x.attn: x.core for x in trained}, {x.mlp: x.core for x in trained}
        self.mix = nn.ModuleList(Mix(a) for _ in attns)
        self.attn = nn.ModuleList(Attention(a, core) for core in attns.values())
        normed = {x.mlp: not a.use_peri_norm or a.unique_norms_input_norm and x.gain >= 0 for x in trained}
        self.mlp = nn.ModuleList(MLP(a, core, normed[i]) for i, core in mlps.items())
        self.cond, self.core = Conditioning(a, trained), Core(a)
        self.skip = nn.ParameterList(parameter("scalar", torch.ones(D)) for x in trained if x.push)
        self.smear, self.across = a.smear_gate != "none", a.smear_gate == "published"
        if self.smear:
            self.smear_gate = parameter("scalar", torch.zeros(D))
        self.buckets, self.valued = a.bigram_vocab_size, a.ve_last_n > 0
        if self.buckets:
            self.bigram = SideEmbedding(self.buckets, a.bigram_dim, D, 0.05)
        if self.valued:
            self.value = SideEmbedding(V, a.ve_dim, D // a.num_heads * a.num_kv_heads, 0.1)
            self.value_scale = parameter("scalar", torch.ones(1 + max(x.value for x in trained)))
        for name, table in zip(("cos", "sin"), rope_tables(a)):
            self.register_buffer(name, table, persistent=False)
        matrices = [m.weight for m in self.modules() if isinstance(m, Matrix) and orthogonal]
        for part in (part for w in matrices if w.any() for part in w.data.split(w.parts)):
            nn.init.orthogonal_(part)
    def inputs(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of ids [B, T]: x0 [B, T, D], and the value embeddings [B, T, K E] in the order of their layers."""
        x, values = F.embedding(ids, self.tok_emb), []
        if self.buckets:
            x = x + self.bigram(bigram_index(ids, self.buckets))
        x = rms_norm(x).to(self.dtype)
        if self.smear:
            share = torch.sigmoid(self.smear_gate).to(x.dtype)
            if not self.across:  # the first token of a document takes nothing from the document before
                share = share * (ids != BOS)[..., None]
            x = torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), share)
        if self.valued:
            value = self.value(ids)
            values = [(value * scale).to(self.dtype) for scale in self.value_scale]
        return x, values
    def hidden(self, ids: Tensor, mode: Mode) -> tuple[Tensor, Tensor | float]:
        """Normalised last state [B, T, D] of ids [B, T], and the penalty on growth in the core."""
        plan, (x0, values) = self.plans[mode.passes], self.inputs(ids)
        rope = self.cos[: ids.shape[1]].to(self.dtype), self.sin[: ids.shape[1]].to(self.dtype)
        shared, x, kept, begun, ended = Shared(mode, rope, values), x0, [], [], []
        for layer, (attn_mod, mlp_mod, depth) in zip(plan, self.cond.rows(plan, self.dtype)):
            if layer.skip >= 0:
                x = torch.addcmul(x, kept.pop(), self.skip[layer.skip].to(self.dtype))
            if layer.opens >= 0:
                begun.append(x := self.core.enter(x, layer.opens))
            x = self.mix[layer.attn](x, x0) + depth
            x = self.attn[layer.attn](x, layer, attn_mod, shared)
            x = self.mlp[layer.mlp](x, mlp_mod, mode)
            if layer.closes >= 0:
                ended.append(x := self.core.leave(begun[-1], x, layer.closes))
            if layer.push:
                kept.append(x)
        spans = list(zip(begun, ended)) if mode.per_pass else [(begun[0], ended[-1])] if begun else []
        penalty = sum(overgrowth(*span) for span in spans) / len(spans) if mode.jacobian else 0.0
        return rms_norm(x), mode.jacobian * penalty
    def forward(self, ids: Tensor, targets: Tensor, mode: Mode | None = None) -> Tensor:
        """Mean cross-entropy in nats of targets [B, T] given ids [B, T]; targets of -100 are left out."""
        x, penalty = self.hidden(ids, mode or self.scoring)
        head = self.tok_emb if self.tied else self.lm_head
        return head_loss(x.flatten(0, 1), head, targets.flatten(), self.softcap) + penalty

def head_loss(h: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean cross-entropy of softcap * tanh(h head^T / softcap): h [N, D], head [V, D], targets [N]. On CPUs
    512 rows at a time, so that their logits stay in the cache."""
    rows, weight = len(h) if h.is_cuda or torch.compiler.is_compiling() else 512, head.to(h.dtype)
    logits = lambda x: softcap * torch.tanh(F.linear(x, weight).float() / softcap)  # noqa: E731
    parts = zip(h.split(rows), targets.split(rows))
    return sum(F.cross_entropy(logits(x), y, reduction="sum") for x, y in parts) / (targets >= 0).sum()

# ---- 8. Optimizers ---------------------------------------------------------------------------------------
def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Moves singular values of [N, r, c], r <= c, to 0.7 to 1.2 (Muon, kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: W <- (1 - lr decay) W - lr max(1, rows/columns)^0.5 NS(u). All of
    one shape, wide or tall, are one stack; the parts of a parameter (q, k, v) are matrices of their own."""
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, steps: int,
                 decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.steps, self.decay = steps, decay
        for p in params:
            self.state[p]["velocity"] = torch.zeros_like(p)
        self.dtype = torch.bfloat16 if params[0].is_cuda else torch.float32  # of the iteration
    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            torch._foreach_mul_(params, 1 - group["lr"] * self.decay)
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
    adam = [dict(params=[p for p in params if p.role == name], lr=getattr(config, role.lr),
                 weight_decay=config.adam_wd if role.decays or config.decay_scalars else 0.0)
            for name, role in ROLES.items() if role.optimizer == "adam"]
    return [torch.optim.AdamW(adam, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True),
            Muon(matrices, config.matrix_lr, config.muon_momentum, config.muon_backend_steps, config.muon_wd)]

def lr_factor(config: Config, step: int, seconds: float) -> float:
    """Fraction of the learning rates at `step`, `seconds` into training. Falls linearly to 0 over the last
    WARMDOWN_ITERS steps, or over the time that many steps take if the clock is going to end the run first."""
    span, cap = config.warmdown_iters, config.training_seconds
    factor = (config.iterations - step) / span if span else 1.0
    if span and cap and seconds and step > 9:  # before, a step's time is no measure
        factor = min(factor, (cap - seconds) / (span * seconds / step))
    return min(max(factor, 0.0), 1.0)

def training_mode(config: Config, step: int, seconds: float) -> Mode:
    """Passes and rounding of a training step, `seconds` into training."""
    done = max(step / max(config.iterations, 1), seconds / (config.training_seconds or math.inf))
    late = lr_factor(config, step, seconds) < config.qat_lr_factor or 1 - done <= config.qat_fraction > 0
    passes = [passes for when, passes in config.schedule() if when <= (done if when < 1 else step)][-1]
    bits, core_bits = config.matrix_bits * (not config.qat_core_only), config.width("core_bits")
    return Mode(passes, bits * late, core_bits * late, config.quant_scale_floor, config.jacobian_weight,
                config.jacobian_per_pass)

def training_modes(config: Config) -> list[Mode]:
    ends = {training_mode(config, step, 0.0)._replace(passes=0) for step in (0, config.iterations)}
    return [mode._replace(passes=passes) for mode in sorted(ends) for _, passes in config.schedule()]

def muon_momentum(config: Config, step: int) -> float:
    steps = config.muon_momentum_warmup_steps
    done = min(step / steps, 1.0) if steps else 1.0
    return config.muon_momentum_warmup_start * (1 - done) + config.muon_momentum * done

# ---- 9. Training -----------------------------------------------------------------------------------------
# Ranks average their gradients themselves, not through DDP: those of shared weights are complete only when
# backward ends, so there is nothing to overlap with, and DDP would cut the compiled graph at its buckets.
class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not finite; exit code 3."""

class Clock:
    """Rank 0's seconds of training on all ranks: shared every few steps, extrapolated in between."""
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

def compiled(model: GPT, config: Config, world: World) -> Callable[..., Tensor]:
    """The model as COMPILE says; one graph for each mode of training and of scoring."""
    on = config.compile == "model" or config.compile == "auto" and world.on_cuda
    if on:  # beyond the limit, torch would stop the run
        torch._dynamo.config.recompile_limit = 8 + 2 * len(training_modes(config))
    return torch.compile(model, dynamic=False, fullgraph=True) if on else model

def flat_gradients(params: list[nn.Parameter]) -> Tensor:
    """A float32 vector whose parts are the gradients of `params`, and one place more for the loss."""
    sizes = [p.numel() for p in params]
    flat = torch.zeros(sum(sizes) + 1, device=params[0].device)
    for p, gradient in zip(params, flat[:-1].split(sizes)):
        p.grad = gradient.view_as(p)
    return flat

class Trainer:
    """All gradients lie in one flat float32 buffer that ends with the loss: one all-reduce for both."""
    def __init__(self, config: Config, world: World, model: GPT, batches: Batches) -> None:
        self.config, self.world, self.model, self.batches = config, world, model, batches
        self.forward, self.params = compiled(model, config, world), list(model.parameters())
        self.flat = flat_gradients(self.params)
        self.between_passes = [(p, p.grad) for p in model.core.parameters()]
        for p in self.params:
            world.broadcast_(p.data)  # unlike processors may draw unlike weights
        self.optimizers = make_optimizers(model, config)
        self.first_bad, self.last_good = torch.full((), -1, device=world.device), "none"  # steps
        self.average, self.averaged = [], 0  # parameters, and how many weights are in them
    def train_step(self, step: int, seconds: float, micro: Iterable[Any], mode: Mode | None = None) -> None:
        """One optimizer step on this rank's micro-batches. Nothing here waits for the device."""
        config, flat, mode = self.config, self.flat, mode or training_mode(self.config, step, seconds)
        flat.zero_()
        for p, gradient in self.between_passes:  # with one pass they are not used: no gradient, so no decay
            p.grad = gradient if mode.passes > 1 else None
        for ids, targets in micro:
            loss = self.forward(ids, targets, mode) / (self.batches.accumulation * self.world.size)
            loss.backward()
            flat[-1] += loss.detach()
        self.world.sum_(flat)
        self.first_bad = torch.where((self.first_bad < 0) & ~flat.sum().isfinite(), step, self.first_bad)
        if config.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.params, config.grad_clip_norm)
        factor, momentum = lr_factor(config, step, seconds), muon_momentum(config, step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
            optimizer.step()
        if config.reference_bf16:
            self.round_to_bfloat16()
    @torch.no_grad()
    def round_to_bfloat16(self) -> None:
        """What PR 855 trained by accident: tables, embedding and their Adam states in bfloat16."""
        for p in (p for p in self.params if p.role == "table" or p is self.model.tok_emb):
            state = self.optimizers[0].state[p]
            for t in (p, state["exp_avg"], state["exp_avg_sq"]):
                t.copy_(t.bfloat16())
    def load(self, values: list[Tensor]) -> None:
        for p, value in zip(self.params, values, strict=True):
            p.data.copy_(value)
    def warm_up(self) -> None:
        """WARMUP_STEPS steps of every mode (kernels, graphs, allocator), then every state is as before."""
        before, length = [p.detach().clone() for p in self.params], self.config.train_seq_len
        random, count = torch.Generator().manual_seed(0), self.batches.sequences * length + 1
        span = torch.randint(self.config.vocab_size, (count,), generator=random).to(self.world.device)
        micro = (span[:-1].view(-1, length), span[1:].view(-1, length))  # laid out as real ones: no new graph
        for mode in training_modes(self.config):
            for _ in range(self.config.warmup_steps):
                self.train_step(0, 0.0, [micro] * self.batches.accumulation, mode)
        self.load(before)
        self.optimizers = make_optimizers(self.model, self.config)
        self.first_bad.fill_(-1)
        self.world.synchronize()
    @torch.no_grad()
    def update_average(self, step: int, factor: float) -> None:
        """Takes in the weights after `step` steps, at `factor` of the learning rates, as AVERAGE says."""
        config = self.config
        late = factor < config.swa_lr_factor and step % config.swa_every == 0
        if config.average == "ema" or config.average == "swa" and late:
            self.average = self.average or [p.detach().clone() for p in self.params]
            self.averaged += 1
            share = 1 / self.averaged if config.average == "swa" else 1 - config.ema_decay
            torch._foreach_lerp_(self.average, self.params, share)
    def check_finite(self, step: int, score: Score | None = None) -> float:
        """The last step's loss; NonFiniteLoss, on all ranks, for any since the last check, or the score."""
        bad, loss = int(self.first_bad), self.flat[-1].item()
        if bad >= 0 or score and not math.isfinite(score.val_loss):
            what = f"step {bad + 1}" if bad >= 0 else f"the validation loss after step {step}"
            raise NonFiniteLoss(f"{what} is not finite (last good: {self.last_good}). Nothing was exported. "
                                "Lower the learning rates or set GRAD_CLIP_NORM.")
        self.last_good = f"step {step}, train_loss {loss:.4f}" if step else "none"
        return loss
    def train(self, log: Log, validate: Callable[..., Score]) -> tuple[int, float, Score]:
        """Trains until ITERATIONS or the cap; `validate` runs off the clock. Steps, seconds, last score."""
        config, step, clock, mode = self.config, 0, Clock(self.world, self.config.training_seconds), None
        while True:
            capped = step < config.iterations and clock.out_of_time(step)
            last = capped or step == config.iterations
            if last or config.val_loss_every and step % config.val_loss_every == 0:
                seconds, paused = clock.read(step, now=True), time.perf_counter()
                if capped:
                    log(f"stopping_early: wallclock_cap train_time:{1e3 * seconds:.0f}ms "
                        f"step:{step}/{config.iterations}")
                passes = training_mode(config, step, seconds).passes
                score = validate(step, seconds, None if last else Mode(passes))
                clock.started += time.perf_counter() - paused
                if last:
                    return step, seconds, score
            before, mode = mode, training_mode(config, step, clock.read(step))
            if mode != before:
                log(f"step:{step}/{config.iterations} {mode}")
            self.train_step(step, clock.read(step), self.batches.micro(step), mode)
            step += 1
            self.update_average(step, lr_factor(config, step, clock.read(step)))
            logged = step <= 10 or step % config.train_log_every == 0 or step == config.iterations
            if logged or step >= clock.due:
                self.report(step, clock, log, logged)
    @torch.no_grad()
    def calibrate(self, step: int, log: Log) -> tuple[dict[str, Tensor], float]:
        """GPTQ's sum of x x^T [c, c] over the inputs x of every matrix, by parameter name: of all passes, on
        the training tokens of all ranks that follow `step`. And the seconds that took."""
        self.world.synchronize()
        started, count, sums = time.perf_counter(), self.config.gptq_batches, {}
        def tap(name: str, args: tuple[Any, ...]) -> None:
            x, factor = args[0].flatten(0, -2).float(), torch.as_tensor(args[1])
            x = x * factor if factor.dim() == 1 else x  # a gain on columns of the weight
            sums[name] = sums.get(name, 0.0) + x.T @ x
        hooks = [m.register_forward_pre_hook(lambda _, args, name=name: tap(f"{name}.weight", args))
                 for name, m in self.model.named_modules() if isinstance(m, Matrix)]
        micro = (batch for i in itertools.count(step) for batch in self.batches.micro(i))
        for ids, targets in itertools.islice(micro, count):
            self.model(ids, targets)
        for hook in hooks:
            hook.remove()
        sums = {name: self.world.sum_(x_xt) for name, x_xt in sums.items()}
        seconds = self.world.on_main(lambda: time.perf_counter() - started)
        if count:
            log(f"gptq_calibration batches:{count} time:{1e3 * seconds:.0f}ms")
        return sums, seconds
    def report(self, step: int, clock: Clock, log: Log, logged: bool) -> None:
        config, seconds, loss = self.config, clock.read(step, now=True), self.check_finite(step)
        speed = step * config.train_batch_tokens / seconds
        if logged:
            log(f"step:{step}/{config.iterations} train_loss:{loss:.4f} train_time:{1e3 * seconds:.0f}ms "
                f"step_avg:{1e3 * seconds / step:.2f}ms")
            log.metric(step=step, train_loss=loss, train_seconds=seconds, tokens_per_second=speed)
        left = min((config.iterations - step) * clock.per_step, clock.cap - seconds)
        log.progress(f"step {step}, loss {loss:.3f}, {seconds:.0f} s, {left:.0f} left, {speed:,.0f} tokens/s")

# ---- 10. Scoring -----------------------------------------------------------------------------------------
Score = namedtuple("Score", "val_loss val_bpb val_tokens val_bytes eval_seconds")  # loss: nats per token

class Learner:
    """Test-time training: SGD on text that has been scored, all ranks together (PR 549)."""
    def __init__(self, model: GPT, config: Config, world: World) -> None:
        self.forward, self.config, self.world = compiled(model, config, world), config, world
        self.flat = flat_gradients(params := list(model.parameters()))
        self.sgd = torch.optim.SGD(params, lr=config.ttt_lr, momentum=config.ttt_momentum)
    def learn(self, tokens: Tensor, done: float) -> None:
        """TTT_EPOCHS steps on a chunk [n T + 1], after the part `done` of all chunks (cosine decay)."""
        config, mine = self.config, slice(self.world.rank, None, self.world.size)
        self.sgd.param_groups[0]["lr"] = config.ttt_lr * (1 + math.cos(math.pi * done)) / 2
        ids, targets = (t.view(-1, config.train_seq_len) for t in (tokens[:-1], tokens[1:]))
        for _ in range(config.ttt_epochs):
            self.flat.zero_()
            if share := len(ids[mine]) / len(ids):
                (self.forward(ids[mine], targets[mine]) * share).backward()
            self.world.sum_(self.flat)
            if config.ttt_grad_clip:
                nn.utils.clip_grad_norm_(self.sgd.param_groups[0]["params"], config.ttt_grad_clip)
            self.sgd.step()

class Scorer:
    """Windows of T tokens, dealt out over the ranks; all but the first score their last `stride` targets."""
    def __init__(self, config: Config, world: World) -> None:
        counter = ByteCounter.from_sentencepiece(Path(config.tokenizer_path), config.vocab_size)
        self.counter = ByteCounter(*(table.to(world.device) for table in counter))
        self.world, self.tokens, self.length = world, Tokens(config, "val"), config.train_seq_len
        self.tokens.read(0, self.tokens.total)  # token ids are checked before anything else starts
        self.targets, T, chunk = self.tokens.total - 1, config.train_seq_len, config.ttt_chunk_tokens
        require(not config.eval_stride or T % config.eval_stride == 0,
                f"EVAL_STRIDE={config.eval_stride} does not divide TRAIN_SEQ_LEN={T}")
        require(not config.ttt_lr or chunk % T == 0 and chunk <= config.micro_batch_tokens * world.size,
                f"TTT_CHUNK_TOKENS={chunk} is no multiple of TRAIN_SEQ_LEN={T} or above MICRO_BATCH_TOKENS")
        most = min(config.val_batch_size // world.size, config.micro_batch_tokens) // self.length
        self.batch = min(max(most, 1), -(-self.targets // self.length // world.size))
    def chunks(self, stride: int, size: int) -> list[range]:
        """The windows whose first scored target lies in each `size` targets, a multiple of T."""
        count = 1 + max(0, -(-(self.targets - self.length) // stride))
        first = [-(-(start - self.length) // stride) + 1 for start in range(size, self.targets, size)]
        bounds = [0, *(min(i, count) for i in first), count]
        return [range(a, b) for a, b in zip(bounds, bounds[1:]) if b > a]
    def windows(self, windows: range, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's ids and targets [batch, T]; what is not to be scored has targets of -100."""
        world, length = self.world, self.length
        first, end = (len(windows) * r // world.size for r in (world.rank, world.rank + 1))
        mine = windows[first:end]
        for i in range(0, len(mine), self.batch):
            part = mine[i : i + self.batch]
            count = min((len(part) - 1) * stride + length, self.targets - part[0] * stride)
            span = self.tokens.read(part[0] * stride, count + 1).to(world.device).long()
            fill = (0, (self.batch - 1) * stride + length - count)
            ids = F.pad(span[:-1], fill).unfold(0, length, stride)
            targets = F.pad(span[1:], fill, value=-100).unfold(0, length, stride).clone()
            targets[len(part) :] = -100
            targets[part[0] == 0 :, : length - stride] = -100
            yield ids.contiguous(), targets
    def score(self, model: Callable[[Tensor, Tensor], Tensor], stride: int = 0,
              learner: Learner | None = None) -> Score:
        """Scores a model that maps (ids, targets) to their mean loss; sums it in float64. `stride`: 0 is T. A
        `learner` trains on every chunk after it was scored, the last one excepted."""
        started, stride = time.perf_counter(), stride or self.length
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # nats, targets, bytes
        size = learner.config.ttt_chunk_tokens if learner else self.targets
        chunks = self.chunks(stride, size)
        for i, windows in enumerate(chunks):
            for ids, targets in self.windows(windows, stride):
                with torch.no_grad():
                    real, nats = targets >= 0, model(ids, targets).double()
                    size_of = self.counter.count(ids, targets.clamp_min(0))
                    sums += torch.stack((nats * real.sum(), real.sum(), (size_of * real).sum()))
            if learner and i + 1 < len(chunks):
                tokens = self.tokens.read(i * size, size + 1).to(self.world.device).long()
                learner.learn(tokens, i / (len(chunks) - 1))
        nats, count, size = self.world.sum_(sums).tolist()
        seconds = time.perf_counter() - started
        return Score(nats / count, nats / math.log(2) / size, int(count), int(size), seconds)

@torch.no_grad()
def recurrence_health(model: GPT, ids: Tensor, mode: Mode) -> list[dict[str, float]]:
    """Per effective layer: mean mix weights, RMS of branch scales (weights times gamma) and shifts, alpha of
    a pass that ends there, and growth: the RMS of the residual stream behind over in front, on ids [B, T]."""
    sizes, table, plan = [1.0], [], model.plans[mode.passes]  # x0 is normalised
    rms = lambda x: x.float().square().mean().sqrt().item()  # noqa: E731
    hooks = [mlp.register_forward_hook(lambda _, inputs, out: sizes.append(rms(out))) for mlp in model.mlp]
    model.hidden(ids, mode)
    for hook in hooks:
        hook.remove()
    for v, (layer, (attn, mlp, _)) in enumerate(zip(plan, model.cond.rows(plan, torch.float32))):
        mix, mix_x0 = (w.mean().item() for w in model.mix[layer.attn].weights())
        alpha = model.core.scale[layer.closes - 1].item() if model.core.scaled and layer.closes > 0 else 1.0
        table.append(dict(
            layer=v, mix=mix, mix_x0=mix_x0, attn_scale=rms(model.attn[layer.attn].scale * attn.gamma),
            mlp_scale=rms(model.mlp[layer.mlp].scale * mlp.gamma), attn_shift=rms(attn.beta),
            mlp_shift=rms(mlp.beta), growth=sizes[v + 1] / sizes[v], pass_scale=alpha))
    return table

# ---- 11. Quantisation and artifact -----------------------------------------------------------------------
# Magic and version, SHA-256 of the rest, codec, decompressed length; compressed: length of the header, header
# (JSON: architecture; name and storage of every parameter), values in that order. Shapes follow from the
# architecture; nothing is executed or unpickled. A byte an integer: from 5 bits on, lzma beats packing.
ARTIFACT_MAGIC = b"GOLFGPT\x02"  # the last byte is the version
ARTIFACT_HEAD = struct.Struct("<8s32s8sQ")
ARTIFACT, ARTIFACT_LIMIT = "model.ptz", 1 << 28  # in the run's folder; bytes, decompressed
STORED = ("float16", "float32"), tuple(f"int{bits}" for bits in range(2, 9))  # by whether its role has bits

CODECS: dict[str, tuple[Callable[..., bytes], ...]] = {  # how module m packs, and unpacks at most n bytes
    "zlib": (lambda m, raw: m.compress(raw, 9), lambda m, body, n: m.decompressobj().decompress(body, n)),
    "lzma": (lambda m, raw: m.compress(raw, preset=6),  # higher ones gain nothing on weights (PR 1230)
             lambda m, body, n: m.LZMADecompressor(memlimit=1 << 28).decompress(body, n)),
    "brotli": (lambda m, raw: m.compress(raw, quality=11, lgwin=24),
               lambda m, body, n: m.Decompressor().process(body, output_buffer_limit=n)),
}

def code(codec: str, way: Literal[0, 1], *data: Any) -> bytes:
    """Compresses (0) raw bytes, or decompresses (1) a body to at most about so many; ValueError if it is
    none of the codec's, InputError if the codec is not installed."""
    require(codec in CODECS, f"{codec!r} is none of the codecs {', '.join(CODECS)}")
    try:
        return CODECS[codec][way](importlib.import_module(codec), *data)
    except (ImportError, TypeError):
        raise InputError(f"{codec} is not installed or too old: pip install -U {codec}") from None
    except (zlib.error, lzma.LZMAError, getattr(sys.modules.get("brotli"), "error", zlib.error)) as error:
        raise ValueError(f"not {codec}: {error}") from None

def quantize_rows(w: Tensor, clip: Tensor, bits: int, floor: float) -> tuple[Tensor, Tensor]:
    """Integers as int8 [r, c] and float16 steps [r] of w [r, c]; rows saturate at `clip` [r] (row_steps)."""
    step, levels = row_steps(clip, bits, floor)
    stored = step.half()
    step = step if bits == 8 else stored.float()  # as PR 855 and PR 1230 do; a step of 8 bits is fine enough
    q = torch.round(w.clamp(-clip[:, None], clip[:, None]) / step[:, None]).clamp(-levels, levels)
    return q.to(torch.int8), stored

def dequantize_rows(q: Tensor, step: Tensor) -> Tensor:
    return q.float() * step.float()[:, None]

def row_clip(w: Tensor, bits: int, config: Config) -> Tensor:
    """Where each row of w [r, c] saturates: QUANT_CLIP_PERCENTILE of its |w|, or where squared error is least
    among quantiles for the whole matrix (PR 1230), or among parts of the largest |w| for each row."""
    size, by_row, quantiles = w.abs(), config.quant_clip == "row", [0.999, 0.9995, 0.9999, 0.99999, 1.0]
    if config.quant_clip == "percentile":
        quantiles = [config.quant_clip_percentile / 100]
    parts = torch.linspace(0.3, 1, 29, device=w.device)[:, None] * size.amax(1)
    clips = parts if by_row else torch.quantile(size, size.new_tensor(quantiles), dim=1)
    rounded = (dequantize_rows(*quantize_rows(w, clip, bits, config.quant_scale_floor)) for clip in clips)
    errors = torch.stack([(near - w).square().sum(1) for near in rounded])
    return clips.gather(0, errors.argmin(0)[None])[0] if by_row else clips[errors.sum(1).argmin()]

def gptq_rows(w: Tensor, step: Tensor, bits: int, hessian: Tensor) -> Tensor:
    """Integers as int8 of w [r, c], rounded column by column, the error of each moved onto those that follow:
    w x changes least over inputs x with sum x x^T = hessian [c, c] (GPTQ, arXiv 2210.17323)."""
    h, levels = hessian.double(), 2 ** (bits - 1) - 1
    order = h.diagonal().argsort(descending=True)  # columns of large inputs first; 1 % of the mean damps
    h = h[order][:, order] + torch.eye(len(h), device=h.device) * (0.01 * h.diagonal().mean() + 1e-12)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    left, q = w[:, order].clone(), torch.empty_like(w)
    for j in range(w.shape[1]):
        q[:, j] = torch.round(left[:, j] / step).clamp(-levels, levels)
        error = (left[:, j] - q[:, j] * step) / upper[j, j]
        left[:, j + 1 :].addr_(error, upper[j, j + 1 :], alpha=-1)
    return q[:, order.argsort()].to(torch.int8)

def store(p: nn.Parameter, config: Config, hessian: Tensor | None) -> tuple[str, list[Tensor]]:
    """How a parameter is stored, and the tensors that hold it; rounded by GPTQ where there is a `hessian`.
    What is not quantised becomes float16, unless that overflows or is off by more than 0.1 % of the norm."""
    w = p.detach()
    if bits := config.width(ROLES[p.role].bits):
        searched = config if ROLES[p.role].optimizer == "muon" else replace(config, quant_clip="percentile")
        q, step = quantize_rows(w, row_clip(w, bits, searched), bits, config.quant_scale_floor)
        if hessian is not None:
            q = gptq_rows(w, step.float(), bits, hessian)
        return f"int{bits}", [q, step]
    fine = (w.half().float() - w).norm() <= 1e-3 * w.norm()
    return ("float16", [w.half()]) if fine else ("float32", [w])

def pack(model: GPT, config: Config, hessians: Mapping[str, Tensor] | None = None) -> bytes:
    """The artifact of a model; `hessians` are those of `Trainer.calibrate`."""
    entries, chunks = [], []
    for name, p in model.named_parameters():
        stored, tensors = store(p, config, (hessians or {}).get(name))
        entries.append([name, stored])
        chunks += [t.cpu().numpy().tobytes() for t in tensors]
    header = json.dumps(dict(architecture=asdict(config.architecture()), tensors=entries)).encode()
    raw = struct.pack("<I", len(header)) + header + b"".join(chunks)
    body = struct.pack("<8sQ", config.codec.encode(), len(raw)) + code(config.codec, 0, raw)
    return ARTIFACT_MAGIC + hashlib.sha256(body).digest() + body

def pack_to_fit(model: GPT, config: Config, hessians: Mapping[str, Tensor], log: Log) -> bytes:
    """The artifact; for MATRIX_BITS=0 that of the most bits with which it and the script fit."""
    for bits in [config.matrix_bits] if config.matrix_bits else range(8, 1, -1):
        data = pack(model, replace(config, matrix_bits=bits), hessians)
        total = len(source()) + len(data)
        log(f"packed matrix_bits:{bits} codec:{config.codec} total:{total} bytes")
        if total <= config.size_limit_bytes:
            break
    return data

def read_tensor(raw: bytes, offset: int, stored: str, shape: torch.Size) -> tuple[Tensor, int]:
    """The float32 tensor at `offset` and the offset behind it; ValueError if it does not fit."""
    kinds = {"float16": ("<f2",), "float32": ("<f4",)}.get(stored, ("<i1", "<f2"))
    values = []
    for kind, count in zip(kinds, (shape.numel(), shape[0])):
        values.append(torch.from_numpy(np.frombuffer(raw, kind, count, offset).copy()))
        offset += values[-1].nbytes
    values[0] = values[0].view(shape)
    return dequantize_rows(*values) if len(kinds) == 2 else values[0].float(), offset

def unpack(data: bytes) -> tuple[Architecture, list[Tensor], str]:
    """Architecture, parameters, how they are held; ValueError or whatever reading malformed bytes raises."""
    _, _, name, length = ARTIFACT_HEAD.unpack_from(data)
    require(4 <= length <= ARTIFACT_LIMIT, f"impossible length {length}")
    codec = name.rstrip(b"\0").decode()
    raw = code(codec, 1, data[ARTIFACT_HEAD.size :], length)
    (size,) = struct.unpack_from("<I", raw)
    header, offset, tensors = json.loads(raw[4 : 4 + size]), 4 + size, []
    architecture = Architecture.from_json(header["architecture"])
    with torch.device("meta"):  # names, roles and shapes without memory
        expected = list(GPT(architecture).named_parameters())
    for (name, p), (given, stored) in zip(expected, header["tensors"], strict=True):
        require(given == name and stored in STORED[bool(ROLES[p.role].bits)],
                f"{given} stored as {stored} where {name} is due")
        tensor, offset = read_tensor(raw, offset, stored, p.shape)
        require(tensor.isfinite().all(), f"{name} is not finite")
        tensors.append(tensor)
    require(offset == length == len(raw), f"{length} bytes announced, {len(raw)} found, {offset} described")
    matrices = (stored for (_, p), (_, stored) in zip(expected, header["tensors"]) if "matrix" in p.role)
    return architecture, tensors, f"{'/'.join(dict.fromkeys(matrices))}+{codec}"

def load_model(data: bytes, source: str, eval_passes: int = 0) -> tuple[GPT, Architecture, str]:
    """A fresh model from an artifact, and how that holds it ("int8+zlib"); InputError names `source` and what
    is wrong with it. `eval_passes`, unless 0, is used instead of what the artifact says."""
    require(len(data) >= ARTIFACT_HEAD.size and data[:7] == ARTIFACT_MAGIC[:7],
            f"{source} is not an artifact of this script")
    version = ARTIFACT_MAGIC[7]
    require(data[7] == version, f"{source} is of version {data[7]}, this script reads version {version}")
    require(hashlib.sha256(data[40:]).digest() == data[8:40],
            f"{source} is damaged or truncated: its checksum does not match; copy it again")
    try:
        architecture, tensors, kind = unpack(data)
    except (struct.error, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        raise InputError(f"{source} is not a valid artifact: {error}") from None
    architecture = replace(architecture, eval_passes=eval_passes or architecture.eval_passes)
    model = GPT(architecture)
    for p, tensor in zip(model.parameters(), tensors):
        p.data.copy_(tensor)
    return model, architecture, kind

# ---- 12. The run -----------------------------------------------------------------------------------------
EXIT_INPUT, EXIT_NON_FINITE, EXIT_SIZE = 2, 3, 4

@functools.cache
def source() -> bytes:
    """This script as it is when the run begins; editing it meanwhile changes neither size nor hash."""
    return Path(__file__).read_bytes()

def versions(world: World) -> dict[str, str]:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads a rank"
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                sentencepiece=spm.__version__, cuda=f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
                device=torch.cuda.get_device_name() if world.on_cuda else cpu,
                script_sha256=hashlib.sha256(source()).hexdigest())

def open_log(config: Config, world: World) -> Log:
    """Makes the run's folder, which must be new; the log opens with source, versions and configuration."""
    name = config.run_id or time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
    folder = Path(config.log_dir) / world.on_main(lambda: name)
    taken = f"{folder} exists and would be overwritten: choose another RUN_ID"
    world.on_main(lambda: require(not folder.exists(), taken) or folder.mkdir(parents=True))
    log = Log(folder, world.is_main, config.tracker)
    log.to_file(source().decode() + "=" * 100)
    for name, value in versions(world).items():
        log(f"{name}:{value}")
    log("config:" + " ".join(f"{name.upper()}={show(value)}" for name, value in asdict(config).items()))
    if config.warmdown_iters >= config.iterations and not config.eval_only:
        log(f"warning: WARMDOWN_ITERS={config.warmdown_iters}: the learning rate falls from step 0 on")
    return log

def reload(path: Path, config: Config, world: World) -> tuple[Config, bytes, GPT, str]:
    """An artifact from disk: configuration with its architecture, its bytes, the model, how it is held."""
    data = world.on_main(path.read_bytes)
    model, architecture, kind = load_model(data, str(path), config.eval_passes)
    return replace(config, **asdict(architecture)), data, model.to(world.device), kind

def round_trip(scorer: Scorer, reloaded: tuple[Config, bytes, GPT, str], log: Log) -> dict[str, Any]:
    """Size and scores of what was reloaded; the first is scored as the trained model was."""
    config, data, model, kind = reloaded
    script, limit, digest = len(source()), config.size_limit_bytes, hashlib.sha256(data).hexdigest()
    total, raw = script + len(data), sum(4 * p.numel() for p in model.parameters())
    log(f"Code size: {script} bytes")
    log(f"Serialized model {kind}: {len(data)} bytes (float32:{raw} ratio:{raw / len(data):.2f}x)")
    log(f"Total submission size {kind}: {total} bytes")
    scores: dict[str, Score] = {}
    for name, on in (("roundtrip", True), ("sliding", config.eval_stride and not config.ttt_lr),
                     ("ttt", config.ttt_lr)):
        if on:
            learner = Learner(model, config, scorer.world) if name == "ttt" else None
            stride = 0 if name == "roundtrip" else config.eval_stride
            scores[name] = score = scorer.score(compiled(model, config, scorer.world), stride, learner)
            label = f"final_{kind.replace('+', '_')}_{name}"
            log(f"{label} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
                f"eval_time:{1e3 * score.eval_seconds:.0f}ms")
            log(f"{label}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
            if not math.isfinite(score.val_loss):
                raise NonFiniteLoss(f"the {name} score is not finite")
    if (spent := sum(score.eval_seconds for score in scores.values())) > config.eval_limit_seconds:
        log(f"not a submission: {spent:.1f} s exceed EVAL_LIMIT_SECONDS={config.eval_limit_seconds}")
    log(f"val_tokens:{score.val_tokens} val_bytes:{score.val_bytes} artifact_sha256:{digest}")
    if total > limit:
        log(f"not a submission: {total} bytes exceed SIZE_LIMIT_BYTES={limit} by {total - limit}")
    return dict({name: score._asdict() for name, score in scores.items()}, bytes_code=script,
                bytes_model=len(data), bytes_total=total, fits=total <= limit, artifact_sha256=digest)

def train_and_export(config: Config, world: World, scorer: Scorer) -> tuple[Log, dict[str, Any]]:
    """Trains a model and writes its artifact; log and figures of the run."""
    batches = world.on_all(lambda: Batches(Tokens(config, "train"), config, world), lambda b: b.tokens.total)
    world.gather(lambda: code(config.codec, 1, code(config.codec, 0, b"x"), 1))  # is the codec there, on all?
    log = open_log(config, world)
    torch.manual_seed(config.seed)
    model = GPT(config.architecture(), config.tied_embed_init_std, config.matrix_init == "orthogonal")
    trainer = Trainer(config, world, model.to(world.device), batches)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"model_params:{parameters} effective_layers:{len(model.plans[config.num_loops])}")
    log(f"world_size:{world.size} grad_accum_steps:{batches.accumulation}")
    log(f"train_loader:shards:{len(batches.tokens.paths)} tokens:{batches.tokens.total}")
    watched = scorer.tokens.read(0, config.train_seq_len).to(world.device).long()[None]
    def validate(step: int, seconds: float, mode: Mode | None = None, weights: str = "last") -> Score:
        mode = mode or model.scoring
        score = scorer.score(functools.partial(trainer.forward, mode=mode))
        trainer.check_finite(step, score)  # the last update alone may have ruined the weights
        log(f"step:{step}/{config.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
            f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / max(step, 1):.2f}ms")
        if world.is_main:
            health = recurrence_health(model, watched, mode)
            log.metric(step=step, train_seconds=seconds, passes=mode.passes, weights=weights,
                       **score._asdict(), health=health)
        return score
    trainer.warm_up()
    steps, seconds, last = trainer.train(log, validate)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20 if world.on_cuda else 0} MiB")
    if trainer.average:
        trainer.load(trainer.average)
    hessians, spent = trainer.calibrate(steps, log)
    score, seconds = last, seconds + spent
    if config.average != "none":  # of no weights: the last ones are exported
        log(f"AVERAGE={config.average} of {trainer.averaged} weights")
        score = validate(steps, seconds, weights=config.average)
    if training_mode(config, steps, seconds).passes != config.schedule()[-1][1]:
        log(f"warning: PASSES_SCHEDULE={config.passes_schedule} did not come to its last entry")
    if 0 < config.max_wallclock_seconds < seconds:
        log(f"not a submission: training and calibration took {seconds:.1f} s")
    world.on_main(lambda: write_atomically(log.folder / ARTIFACT, pack_to_fit(model, config, hessians, log)))
    return log, dict(model_params=parameters, steps=steps, train_seconds=seconds, pre_quant=score._asdict(),
                     last_weights=last._asdict(),
                     tokens_per_second=steps * config.train_batch_tokens / max(seconds, 1e-9))

def run(config: Config, world: World) -> int:
    """One run as configured; result.json ends it. The exit code."""
    if config.eval_only:
        config, *rest = reload(Path(config.eval_only), config, world)
    same = replace(config, data_path="", tokenizer_path="", log_dir="")  # paths may differ between nodes
    scorer = world.on_all(lambda: Scorer(config, world), lambda scorer: (same, scorer.tokens.total))
    if config.eval_only:
        log, figures = open_log(config, world), {}
    else:
        log, figures = train_and_export(config, world, scorer)
        config, *rest = reload(log.folder / ARTIFACT, config, world)
    figures |= round_trip(scorer, (config, *rest), log)
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
        os._exit(code)
    return code

if __name__ == "__main__":
    sys.exit(main())
