"""Train a depth-recurrent GPT for parameter golf, pack it into 16 MB, reload the pack and score it.

    PRESET=tiny python train_gpt.py                               # laptop, sample corpus (data/sample.py)
    torchrun --standalone --nproc_per_node=8 train_gpt.py         # one 8-GPU node, FineWeb shards
    EVAL_ONLY=logs/<run>/model.ptz python train_gpt.py            # score an artifact again
Prelude layers, a looped shared core, coda layers: a plan, a tuple of `Layer`, says what every effective layer
uses; all code that walks the depth walks it. Options are fields of `Config`, set by variables in capitals.
Shapes: B sequences, T tokens, D model width, H query heads, K key/value heads, E head width, V vocabulary,
R effective layers. Parameters, tables, optimizer states are float32; operands and residual stream DTYPE.
"""
from __future__ import annotations
import contextlib, ctypes, datetime, difflib, functools, hashlib, importlib, itertools, json  # noqa: E401
import lzma, math, os, platform, re, signal, struct, sys, time, traceback, uuid, zlib  # noqa: E401
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
import numpy as np, sentencepiece as spm  # noqa: E401
import torch, torch.distributed as dist, torch.nn.functional as F  # noqa: E401
from torch import Tensor, nn, zeros_like

# ---- 1. Configuration ------------------------------------------------------------------------------------
class InputError(ValueError):
    """A mistake in what the user gave (variables, files); `main` prints it as one line."""
KNOWN = InputError, OSError  # told in one line, others with their traceback
class Ended(BaseException):
    """Another end of a run: exit code, message. No Exception: what forgives those must not forgive this."""
EXIT_INPUT, EXIT_NON_FINITE, EXIT_SIZE, EXIT_STOPPED, EXIT_LOST = range(2, 7)
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
    try:
        return text if get_origin(kind) is Literal else text == "1" if kind is bool else kind(text)
    except ValueError:
        raise InputError(f"{name}={text!r} is not {'an integer' if kind is int else 'a number'}") from None
def show(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)

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
            require(not isinstance(value, (int, float)) or low <= value <= min(high, 3.4e38),
                    f"{f.name.upper()}={value} is out of range: {low} to {high}")
        D, H, T, rope = self.model_dim, self.num_heads, self.train_seq_len, self.rope_dims
        require(H % self.num_kv_heads == 0, f"NUM_KV_HEADS={self.num_kv_heads} does not divide NUM_HEADS={H}")
        require(D % (2 * H) == 0, f"MODEL_DIM={D} / NUM_HEADS={H} is not an even number")
        require(round(self.mlp_mult * D) >= 1, f"MLP_MULT={self.mlp_mult} of MODEL_DIM={D} is no channel")
        require(rope % 2 == 0 and rope <= D // H, f"ROPE_DIMS={rope} is odd or wider than a head, {D // H}")
        require(self.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1: one bucket is for the first token")
        layers = self.num_prelude + self.num_shared * max(self.num_loops, self.eval_passes) + self.num_coda
        require(layers <= 1024 and T * D // H <= 1 << 24, f"{layers} layers, TRAIN_SEQ_LEN={T}: too large")
        acts = not self.xsa_last_n or any(layer.xsa for layer in make_plan(self))
        require(acts, f"XSA_LAST_N={self.xsa_last_n} cannot act here: these last layers are all in the core")
    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        """From an artifact's header; ValueError if a field is missing, unknown or malformed."""
        kinds = get_type_hints(cls)
        require(not (odd := sorted(values.keys() ^ kinds)), f"its architecture has other fields: {odd}")
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
    compile: Literal["auto", "model", "block", "off"] = opt("auto")  # auto: model on CUDA, off on CPU
    attn_backend: Literal["auto", "cudnn", "flash", "math"] = opt("auto")  # of attention
    deterministic: bool = opt(False)  # CUDA, too, repeats a run to the last bit, or says what cannot; slower
    save_every: int = opt(0)  # steps between checkpoints; 0: only at a signal or, on CPUs, a lost rank
    resume: str = opt("")  # path of a checkpoint, or auto: the last one of RUN_ID, if there is one
    rank_timeout_seconds: float = opt(60.0, 5)  # that a step waits for a rank before all ranks end
    max_skipped_steps: int = opt(10)  # steps that are not finite and are left out before a run ends
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
        kinds = {name.upper(): kind for name, kind in get_type_hints(cls).items()} | {"USE_DEPTH_EMBED": bool}
        for name in env.keys() - kinds.keys():
            alike = difflib.get_close_matches(name, kinds, 1, 0.8)  # spares the names of usual environments
            require(not alike, f"{name} is not an option; did you mean {' '.join(alike)}? (or unset it)")
        explicit = {n.lower(): parse(n, env[n], kind) for n, kind in kinds.items() if n in env}
        if "use_depth_embed" in explicit:  # public name; learned in series 4 of PR 855, sinusoidal in 5
            require("DEPTH_EMBED" not in env, "USE_DEPTH_EMBED and DEPTH_EMBED are both set; drop one")
            explicit["depth_embed"] = "sinusoidal" if explicit.pop("use_depth_embed") else "none"
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
        (starts, counts), n, bits = zip(*self.schedule()), self.num_loops, self.matrix_bits
        cap, qat = self.max_wallclock_seconds, self.qat_fraction or self.qat_lr_factor
        ascend = starts[0] == 0 and sorted(set(starts)) == [*starts] and len({x < 1 for x in starts[1:]}) < 2
        require(ascend and 1 <= min(counts) <= max(counts) <= n, f"PASSES_SCHEDULE={self.passes_schedule} "
                f"does not ascend from 0 with 1 to NUM_LOOPS={n} passes, as 0:1,0.6:{n} would")
        require(self.resume != "auto" or self.run_id, "RESUME=auto needs the RUN_ID of the checkpoints")
        require(bits or not qat, "MATRIX_BITS=0, chosen after training, rules out QAT_FRACTION/QAT_LR_FACTOR")
        require(qat or not self.qat_core_only, "QAT_CORE_ONLY=1 needs QAT_FRACTION or QAT_LR_FACTOR")
        require(1 not in (bits, self.core_bits), "MATRIX_BITS and CORE_BITS are 0 or 2 to 8")
        require(not cap or self.training_seconds, f"GPTQ_SECONDS leave none of MAX_WALLCLOCK_SECONDS={cap}")
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
EVAL_OPTIONS = set("""preset eval_only data_path tokenizer_path log_dir run_id compile attn_backend
    deterministic rank_timeout_seconds val_batch_size micro_batch_tokens size_limit_bytes eval_passes
    eval_stride eval_limit_seconds ttt_lr ttt_epochs ttt_chunk_tokens ttt_momentum ttt_grad_clip""".split())
MAY_DIFFER = EVAL_OPTIONS | set("""tracker resume save_every warmup_steps val_loss_every train_log_every
    max_skipped_steps""".split())  # between a checkpoint and the run that goes on from it

# ---- 2. Presets ------------------------------------------------------------------------------------------
# PR 855's 21 runs (Ap is A'), the naive baseline, the "baseline wins" report (heads fit parameter counts),
# PR 1230: `growing` without error feedback and bigrams, which could not learn, `growing_live` with them.
core = lambda *layers: dict(zip(("num_prelude", "num_shared", "num_loops", "num_coda"), layers))  # noqa: E731
PLAIN = core(0, 0, 1, 0) | dict(use_peri_norm=False, use_birkhoff_mix=False, use_timestep_scale=False,
                                timestep_gamma_max=0.0, use_timestep_bias=False, depth_embed="none")
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
    "flat_9x1_512": REPORT | dict(num_layers=9), "growing": GROWING, "growing_live": GROWING | dict(
        core_skips="all", smear_gate="document", feedback_rank=2, bigram_vocab_size=512),
} | {name: base | core(*map(int, layers)) for base, runs in LOOPED
     for name, layers in (run.split(":") for run in runs.split())}
SCALES: dict[str, dict[str, Any]] = {"tiny": dict(
    data_path="./data/datasets/sample_sp1024", tokenizer_path="./data/tokenizers/sample_1024_bpe.model",
    train_seq_len=256, train_batch_tokens=8192, micro_batch_tokens=8192, val_batch_size=16384, iterations=100,
    max_wallclock_seconds=110.0, warmup_steps=1, warmdown_iters=50, val_loss_every=0, train_log_every=25,
    muon_momentum_warmup_steps=50, ema_decay=0.9, ttt_chunk_tokens=8192)}
def preset_values(preset: str) -> dict[str, Any]:
    names = preset.split(",") if preset else []
    systems, scales = ([n for n in names if n in table] for table in (SYSTEMS, SCALES))
    require(max(len(systems), len(scales)) <= 1 and len(systems) + len(scales) == len(names),
            f"PRESET={preset}: one system of {', '.join(SYSTEMS)} and/or one scale of {', '.join(SCALES)}")
    values = PLAIN | SYSTEMS[systems[0]] if systems else {}
    full = asdict(Architecture()) | values  # a scale has a quarter of the width in half as many heads
    parts = dict(model_dim=full["model_dim"] // 4, **{k: full[k] // 2 for k in ("num_heads", "num_kv_heads")})
    return values | parts | SCALES[scales[0]] if scales else values

# ---- 3. Ranks and logs -----------------------------------------------------------------------------------
class World:
    """The ranks of a run: NCCL on CUDA, gloo on CPU, and no process group at all for a single rank."""
    def __init__(self, env: Mapping[str, str], timeout: float = 60.0) -> None:
        self.rank, self.size = (parse(n, env.get(n, d), int) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.is_main, self.on_cuda = self.rank == 0, torch.cuda.is_available()
        self.place, self.training, self.asked, self.fallen = "start", False, "", 0  # COMPILE rungs
        self.device = torch.device(f"cuda:{env.get('LOCAL_RANK', 0)}" if self.on_cuda else "cpu")
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: keep freed memory instead of
            libc.mallopt(-3, 1 << 30)  # faulting it in again at every step
        if self.size > 1:
            again, nodes = env.get("TORCHELASTIC_MAX_RESTARTS", "0"), env.get("GROUP_WORLD_SIZE", "1")
            hangs = "0" != again and nodes != "1" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            require(not hangs, "torchrun --max-restarts on nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
            store, *_ = next(dist.rendezvous("env://"))  # may hold keys of ranks that were started before
            self.store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0") * (nodes == "1"), store)
            dist.init_process_group(
                "nccl" if self.on_cuda else "gloo", store=self.store, rank=self.rank, world_size=self.size,
                timeout=datetime.timedelta(seconds=timeout), device_id=self.device if self.on_cuda else None)
            self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))
    def enter(self, place: str, training: bool = False) -> None:
        """Where this rank is from now on. SIGTERM and SIGINT end it at once, but in training after a step."""
        self.place, self.training = place, training
        if self.asked and not training:
            raise Ended(EXIT_STOPPED, f"{place}: stopped by {self.asked}")
    def interrupt(self, number: int, _: Any) -> None:
        if not self.asked:  # torchrun sends once more what all have got from a terminal, amid the save
            self.asked = signal.Signals(number).name
            self.enter(self.place, self.training)
    def meet(self, call: Callable[..., Any], x: Any, *values: Any) -> Any:
        """`x` after call(x, *values) with all ranks; Ended if one is gone or late (30 minutes: packing)."""
        try:
            if self.size > 1:
                if not self.training:
                    dist.barrier(self.patient)
                call(x, *values)
            return x
        except RuntimeError as e:
            lost, more = [0], " or torchrun, the store is gone"
            with contextlib.suppress(RuntimeError):
                self.store.set(f"waits {self.rank}", "")
                time.sleep(3)  # those that are there say so as well
                lost, more = [r for r in range(self.size) if not self.store.check([f"waits {r}"])], ""
            self.is_main = self.rank == min({*range(self.size)} - {*lost})  # the first that is left saves
            raise Ended(EXIT_LOST, f"{self.place}: lost ranks: {lost}{more} ({str(e).splitlines()[0]})")
    def sum_(self, x: Tensor) -> Tensor:
        return self.meet(dist.all_reduce, x)
    def gather(self, job: Callable[[], Any]) -> list[Any]:
        """What `job` returns on every rank, on all of them, or an InputError if it raises anything on one."""
        try:
            mine = job()
        except Exception as error:
            mine = InputError(str(error) if isinstance(error, KNOWN) else traceback.format_exc())
        seen = self.meet(dist.all_gather_object, [mine] * self.size, mine)
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
        """What `job` returns on rank 0, on all ranks."""
        return self.gather(lambda: job() if self.is_main else None)[0]
    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
class Log:
    """Rank 0's records: train.log for people, metrics.jsonl for programs, a progress line on a terminal."""
    def __init__(self, folder: Path, is_main: bool, tracker: str = "none") -> None:
        self.folder, self.metrics, self.is_main = folder, folder / "metrics.jsonl", is_main
        self.watched, self.tracker = is_main and sys.stderr.isatty(), tracker if is_main else "none"
    def size(self) -> int:  # of the metrics, bytes
        return self.metrics.stat().st_size if self.metrics.exists() else 0
    def to_file(self, text: str, name: str = "train.log") -> None:
        if self.is_main:
            try:
                with open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError as error:  # a full disk is no reason to end training
                print(f"warning: not logged: {error}: {text[:200]}", file=sys.stderr, flush=True)
    def __call__(self, text: str) -> None:
        self.progress("")
        if self.is_main:
            print(text, flush=True)
        self.to_file(text)
    @functools.cached_property
    def send(self) -> Callable[[dict[str, Any]], Any]:
        """What takes the metrics of a step to Weights & Biases, or to TensorBoard's files in the folder."""
        if self.tracker == "wandb":
            return importlib.import_module("wandb").init(name=self.folder.name, dir=str(self.folder)).log
        board = importlib.import_module("torch.utils.tensorboard")
        writer = board.SummaryWriter(str(self.folder), flush_secs=5)
        return lambda values: [writer.add_scalar(name, x, values["step"]) for name, x in values.items()
                               if isinstance(x, (int, float))]
    def metric(self, **values: Any) -> None:
        self.to_file(json.dumps(values), "metrics.jsonl")
        try:  # a tracker that fails, in whatever way, is switched off and the run goes on
            if self.tracker != "none":
                self.send(values)
        except Exception as error:
            self.tracker = "none"
            self(f"warning: TRACKER is off: {type(error).__name__}: {error}")
    def progress(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.watched else "", end="", file=sys.stderr, flush=True)
def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
# A sealed file: magic, SHA-256 of the rest, codec, length; packed: length of header, header (JSON), values.
SEAL = struct.Struct("<8s32s8sQ")
MAGIC = dict(artifact=b"GOLFGPT\x02", checkpoint=b"GOLFRUN\x01")  # the last byte is the version
CODECS: dict[str, tuple[Callable[..., bytes], ...]] = {  # how module m packs, and unpacks at most n bytes
    "none": (lambda m, raw: raw, lambda m, body, n: body[:n]),  # checkpoints
    "zlib": (lambda m, raw: m.compress(raw, 9), lambda m, body, n: m.decompressobj().decompress(body, n)),
    "lzma": (lambda m, raw: m.compress(raw, preset=6),  # higher ones gain nothing on weights (PR 1230)
             lambda m, body, n: m.LZMADecompressor(memlimit=1 << 28).decompress(body, n)),
    "brotli": (lambda m, raw: m.compress(raw, quality=11, lgwin=24),
               lambda m, body, n: m.Decompressor().process(body, output_buffer_limit=n))}
def code(codec: str, way: Literal[0, 1], *data: Any) -> bytes:
    """Packs (0) bytes, or unpacks (1) a body to about n; ValueError, or InputError if the codec is absent."""
    require(codec in CODECS, f"{codec!r} is none of the codecs {', '.join(CODECS)}")
    try:
        return CODECS[codec][way](importlib.import_module(codec.replace("none", "zlib")), *data)
    except (ImportError, TypeError):
        raise InputError(f"{codec} is not installed or too old: pip install -U {codec}") from None
    except (zlib.error, lzma.LZMAError, getattr(sys.modules.get("brotli"), "error", zlib.error)) as error:
        raise ValueError(f"not {codec}: {error}") from None
def seal(kind: str, codec: str, header: dict[str, Any], values: Iterable[bytes]) -> bytes:
    text = json.dumps(header).encode()
    raw = struct.pack("<I", len(text)) + text + b"".join(values)
    body = struct.pack("<8sQ", codec.encode(), len(raw)) + code(codec, 0, raw)
    return MAGIC[kind] + hashlib.sha256(body).digest() + body
def unseal(kind: str, data: bytes, source: str, limit: int, read: Callable[..., Any]) -> Any:
    """`read(header, values, codec)` of a sealed file, at most `limit` bytes unpacked; else InputError."""
    magic, an = MAGIC[kind], "an" if kind == "artifact" else "a"
    require(len(data) >= SEAL.size and data[:7] == magic[:7], f"{source} is not {an} {kind} of this script")
    require(data[7] == magic[7], f"{source} is of version {data[7]}, this script reads version {magic[7]}")
    require(hashlib.sha256(data[40:]).digest() == data[8:40],
            f"{source} is damaged or truncated: its checksum does not match; copy it again")
    try:
        *_, name, length = SEAL.unpack_from(data)
        require(4 <= length <= min(limit, 128 * len(data)), f"impossible length {length}")  # a bomb
        codec = name.rstrip(b"\0").decode()
        raw = code(codec, 1, data[SEAL.size :], length)
        require(len(raw) == length, f"{length} bytes announced, {len(raw)} found")
        end = 4 + min(int.from_bytes(raw[:4], "little"), 1 << 20)  # 1,024 layers take 0.23 MB
        return read(json.loads(raw[4:end].decode()), raw[end:], codec)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{source} is not a valid {kind}: {error!r:.300}") from None

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
        folder, T, self.vocab_size = Path(config.data_path), config.train_seq_len, config.vocab_size
        self.paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        require(self.paths, f"DATA_PATH={folder} holds no fineweb_{split}_*.bin: see data/README.md, or run "
                "`python data/sample.py` and set PRESET=tiny for the sample corpus")
        self.starts = np.cumsum([0, *(len(open_shard(path)) for path in self.paths)])
        self.total = int(self.starts[-1])
        require(self.total > T, f"TRAIN_SEQ_LEN={T}: {split} in {folder} has only {self.total} tokens")
    def read(self, start: int, count: int) -> Tensor:
        """int32 tokens [count] from position `start`; ids beyond the vocabulary raise InputError."""
        pieces = []
        while count:
            start %= self.total
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            at, most = start - self.starts[i], min(count, self.starts[i + 1] - start)
            piece = np.fromfile(self.paths[i], "<u2", most, offset=4 * SHARD_HEADER_INTS + 2 * int(at))
            require(len(piece) == most, f"{self.paths[i]} was cut after it was opened")  # mapped: a bus error
            require(piece.max() < self.vocab_size, f"{self.paths[i]} holds token {piece.max()}, VOCAB_SIZE="
                    f"{self.vocab_size}: it is corrupt or of another tokenizer")
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.from_numpy(np.concatenate(pieces).astype(np.int32))
class Batches:
    """Step s is the s-th TRAIN_BATCH_TOKENS of the split, by sequences; every rank takes its part of them."""
    def __init__(self, tokens: Tokens, config: Config, world: World) -> None:
        self.tokens, self.world, T, batch = tokens, world, config.train_seq_len, config.train_batch_tokens
        (sequences, ragged), self.length, self.batch = divmod(batch, T), T, batch
        require(sequences and not ragged, f"TRAIN_SEQ_LEN={T} does not divide TRAIN_BATCH_TOKENS={batch}")
        fits = [n for n in range(1, sequences + 1) if sequences % n == 0]
        require(world.size in fits, f"WORLD_SIZE={world.size} does not divide the {sequences} sequences of a "
                f"batch (TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN); these do: {', '.join(map(str, fits))}")
        local, limit = sequences // world.size, config.micro_batch_tokens // T
        require(limit, f"MICRO_BATCH_TOKENS={config.micro_batch_tokens} < TRAIN_SEQ_LEN={T}")
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
SPACE = "\u2581"  # how SentencePiece writes a space
class ByteCounter(NamedTuple):
    """UTF-8 bytes of text that tokens stand for: bits per byte compare tokenizers. All tables are [V]."""
    size: Tensor  # int64, without a leading space
    space: Tensor  # bool, the piece begins with a space
    boundary: Tensor  # bool, the space of a piece that follows was put there by the tokenizer, not the text
    @classmethod
    def from_sentencepiece(cls, path: Path, vocab_size: int) -> ByteCounter:
        """Byte pieces are a byte, control and unknown ones none; nor is a space behind those that it adds."""
        try:
            sp = spm.SentencePieceProcessor(model_file=str(path))
            require(len(sp) == vocab_size, f"it has {len(sp)} pieces, VOCAB_SIZE={vocab_size}")
            none = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(vocab_size)]
            text = ["" if no or sp.is_byte(i) else sp.id_to_piece(i) for i, no in enumerate(none)]
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"TOKENIZER_PATH={path} cannot be used: {error!r:.300}") from None
        size = torch.tensor([len(p.replace(SPACE, " ").encode()) or 1 - no for p, no in zip(text, none)])
        space = torch.tensor([p.startswith(SPACE) for p in text])
        return cls(size - space.long(), space, torch.tensor(none) & (sp.decode_pieces([SPACE]) == ""))
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
# A gain before a matrix scales its columns, one behind it its rows: a pass over a weight, not over the data.
# What is done with a kind of parameter: its optimizer; the options that are its rate and its width in storage
# (else float16); whether ADAM_WD decays it without DECAY_SCALARS. A parameter is made with its role.
Role = namedtuple("Role", "optimizer lr bits decays", defaults=("", True))
ROLES = {  # a table has a row for every effective layer, scalars are vectors of one layer
    "matrix": Role("muon", "matrix_lr", "matrix_bits"), "core matrix": Role("muon", "matrix_lr", "core_bits"),
    "tied embedding": Role("adam", "tied_embed_lr", "embed_bits"),
    "embedding": Role("adam", "embed_lr", "embed_bits"), "head": Role("adam", "head_lr", "embed_bits"),
    "side embedding": Role("adam", "tied_embed_lr", "embed_bits"),  # bigrams, values
    "projection": Role("adam", "scalar_lr", "embed_bits"),  # of side embeddings and error feedback
    "table": Role("adam", "scalar_lr", decays=False), "scalar": Role("adam", "scalar_lr", decays=False)}
def parameter(role: str, value: Tensor, parts: tuple[int, ...] = ()) -> nn.Parameter:
    """A float32 parameter with a role; `parts` are the rows of the matrices stacked in it (q, k, v)."""
    p = nn.Parameter(value)
    p.role, p.parts = role, parts or (len(value),)
    return p
def uniform(rows: int, columns: int) -> Tensor:  # PyTorch's default for a linear layer
    return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5)
# How a forward pass runs: passes over the core, rounding of matrices outside and in it (bits, 0: none, and
# QUANT_SCALE_FLOOR), weight of the penalty on growth in the core, whether that is of every pass.
Rounding = namedtuple("Rounding", "bits floor", defaults=(0, 0.0))
Mode = namedtuple("Mode", "passes outside core jacobian per_pass", defaults=(*[Rounding()] * 2, 0.0, False))
def row_steps(clip: Tensor, bits: int, floor: float) -> tuple[Tensor, int]:
    """Steps of rows that saturate at `clip`, and how many fit on a side of 0; `floor`: smallest of 8 bits."""
    levels = 2 ** (bits - 1) - 1
    return (clip / levels).clamp_min(max(floor * 127 / levels, 2.0**-24)), levels  # above 0 also for zeros
class Matrix(nn.Module):
    """A linear map without bias, which Muon trains and the quantiser rounds."""
    def __init__(self, value: Tensor, core: bool, parts: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = parameter("core matrix" if core else "matrix", value, parts)
    def forward(self, x: Tensor, factor: Tensor | float, rounding: Rounding) -> Tensor:
        """x [..., c] -> [..., r]; `factor`: [c], or [r, 1]; rounding: straight-through (arXiv 1308.3432)."""
        w = self.weight
        if rounding.bits:
            step, levels = row_steps(w.detach().abs().amax(1, keepdim=True), *rounding)
            w = w + (torch.round(w.detach() / step).clamp(-levels, levels) * step - w.detach())
        return F.linear(x, (w * factor).to(x.dtype))
def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1.1920929e-07)  # of float32, PyTorch's default; without a gain
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
def attend(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Causal attention: q [B, H, T, E], k and v [B, K, T, E] -> [B, H, T, E]. On CPUs by products of a
    `block` of queries with the keys up to its end; on CUDA, or without one, by PyTorch's kernels."""
    (B, H, T, E), K, out = q.shape, k.shape[1], []
    if q.is_cuda or not block:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    q, k, v = q.reshape(B * K, H // K, T, E), k.reshape(B * K, T, E), v.reshape(B * K, T, E)
    for start in range(0, T, block):
        end = min(start + block, T)
        future = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1).repeat(H // K, 1)
        rows = q[:, :, start:end].reshape(B * K, -1, E)
        scores = torch.baddbmm(future, rows, k[:, :end].mT, alpha=E**-0.5)
        out.append((scores.softmax(-1) @ v[:, :end]).view(B, H, end - start, E))
    return torch.cat(out, dim=2)
# What conditions one branch of one effective layer, [D] each, or a neutral [1] where switched off: on the
# input of its first matrix, on its output (float32 both), added to its output (DTYPE).
Mod = namedtuple("Mod", "gain gamma beta")
class Mix(nn.Module):
    """x and x0 with two weights a channel, or "Birkhoff": sigmoid of w, -w (PR 855, arXiv 2601.05732)."""
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.convex, start = a.use_birkhoff_mix, torch.tensor([[1.0], [0.0]]).expand(2, a.model_dim)
        self.weight = parameter("scalar", torch.zeros(a.model_dim) if self.convex else start.clone())
    def weights(self) -> tuple[Tensor, ...]:
        w = self.weight
        return (torch.sigmoid(w), torch.sigmoid(-w)) if self.convex else w.unbind()
    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        carried, anchor = (w.to(x.dtype) for w in self.weights())
        return torch.lerp(x0, x, carried) if self.convex else torch.addcmul(x * carried, x0, anchor)
# What a layer runs with besides: rope is (cos, sin); values are none or one [B, T, K E] added to v; with xsa,
# attention leaves out what lies along the token's own value.
Setting = namedtuple("Setting", "rounding rope attend values xsa", defaults=(attend, (), False))

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
    def forward(self, x: Tensor, mod: Mod, setting: Setting) -> Tensor:
        (B, T, _), (H, K, _) = x.shape, self.heads
        qkv = self.qkv(rms_norm(x), mod.gain, setting.rounding).view(B, T, -1, self.width)
        qk, v = qkv.split((H + K, K), dim=2)
        for value in setting.values:
            v = v + value.view(v.shape)
        qk = rotate(rms_norm(qk), *setting.rope) * F.pad(self.q_gain, (0, K), value=1.0).to(x.dtype)[:, None]
        q, k = qk.transpose(1, 2).split((H, K), dim=1)
        y = setting.attend(q, k, v.transpose(1, 2)).transpose(1, 2)
        if setting.xsa:
            y = without_own_value(y, v)
        return x + self.proj(y.flatten(2), (self.scale * mod.gamma)[:, None], setting.rounding) + mod.beta
class MLP(nn.Module):
    """Residual branch: W2 leaky_relu(W1 x)^2, normalised at its input, its output (Output-LN) or both."""
    def __init__(self, a: Architecture, core: bool, input_norm: bool) -> None:
        super().__init__()
        self.slope, self.input_norm, self.output_norm = a.leaky_relu_slope, input_norm, a.use_peri_norm
        self.fc = Matrix(uniform(round(a.mlp_mult * a.model_dim), a.model_dim), core)
        self.proj = Matrix(torch.zeros(a.model_dim, len(self.fc.weight)), core)
        self.scale = parameter("scalar", torch.ones(a.model_dim))
    def forward(self, x: Tensor, mod: Mod, rounding: Rounding) -> Tensor:
        h = self.fc(rms_norm(x) if self.input_norm else x, mod.gain, rounding)
        h, scale = F.leaky_relu(h, self.slope).square(), self.scale * mod.gamma
        if self.output_norm:
            return torch.addcmul(x + mod.beta, rms_norm(self.proj(h, 1.0, rounding)), scale.to(x.dtype))
        return x + self.proj(h, scale[:, None], rounding) + mod.beta
def block(weights: tuple[Any, ...], x: Tensor, x0: Tensor, mods: tuple[Any, ...], setting: Setting) -> Tensor:
    """One effective layer, [B, T, D] -> [B, T, D]; what COMPILE=block compiles once for all alike."""
    (mix, attn, mlp), (attn_mod, mlp_mod, depth) = weights, mods
    return mlp(attn(mix(x, x0) + depth, attn_mod, setting), mlp_mod, setting.rounding)
def head_loss(h: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean cross-entropy of softcap * tanh(h head^T / softcap): h [N, D], head [V, D], targets [N]."""
    rows, weight = len(h) if h.is_cuda or torch.compiler.is_compiling() else 512, head.to(h.dtype)  # in cache
    logits = lambda x: softcap * torch.tanh(F.linear(x, weight).float() / softcap)  # noqa: E731
    parts = zip(h.split(rows), targets.split(rows))
    return sum(F.cross_entropy(logits(x), y, reduction="sum") for x, y in parts) / (targets >= 0).sum()
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
        self.norm, self.scaled, self.rank = a.interpass_norm, a.pass_scale_init != 1, a.feedback_rank
        if self.scaled:
            self.scale = parameter("scalar", torch.full((a.num_loops - 1,), a.pass_scale_init))
        if rank := self.rank:  # U alone begins at 0: published with V, d at 0, all gradients are 0 for ever
            self.v = parameter("projection", torch.randn(D := a.model_dim, rank) * D**-0.5)
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
        V, D, self.softcap = a.vocab_size, a.model_dim, a.logit_softcap
        role, std = ("tied embedding", tied_embed_std) if a.tie_embeddings else ("embedding", 1.0)
        self.tok_emb = parameter(role, torch.randn(V, D) * std)
        if not a.tie_embeddings:
            self.lm_head = parameter("head", torch.zeros(V, D))
        attns, mlps = {x.attn: x for x in trained}, {x.mlp: x for x in trained}
        self.mix = nn.ModuleList(Mix(a) for _ in attns)
        self.attn = nn.ModuleList(Attention(a, x.core) for x in attns.values())
        normed = lambda x: not a.use_peri_norm or a.unique_norms_input_norm and x.gain >= 0  # noqa: E731
        self.mlp = nn.ModuleList(MLP(a, x.core, normed(x)) for x in mlps.values())
        self.cond, self.core = Conditioning(a, trained), Core(a)
        self.skip = nn.ParameterList(parameter("scalar", torch.ones(D)) for x in trained if x.push)
        self.smear, self.buckets, self.valued = a.smear_gate, a.bigram_vocab_size, a.ve_last_n > 0
        if self.smear != "none":
            self.smear_gate = parameter("scalar", torch.zeros(D))
        if self.buckets:
            self.bigram = SideEmbedding(self.buckets, a.bigram_dim, D, 0.05)
        if self.valued:
            self.value = SideEmbedding(V, a.ve_dim, D // a.num_heads * a.num_kv_heads, 0.1)
            self.value_scale = parameter("scalar", torch.ones(1 + max(x.value for x in trained)))
        self.register_buffer("rope", torch.stack(rope_tables(a)), persistent=False)
        for w in (m.weight for m in self.modules() if isinstance(m, Matrix) and orthogonal):
            for part in w.data.split(w.parts) if w.any() else ():
                nn.init.orthogonal_(part)
    def inputs(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of ids [B, T]: x0 [B, T, D], and the value embeddings [B, T, K E] in the order of their layers."""
        x, values = F.embedding(ids, self.tok_emb), []
        if self.buckets:
            x = x + self.bigram(bigram_index(ids, self.buckets))
        x = rms_norm(x).to(self.dtype)
        if self.smear != "none":
            share = torch.sigmoid(self.smear_gate).to(x.dtype)
            if self.smear == "document":  # the first token of a document takes nothing from the one before
                share = share * (ids != BOS)[..., None]
            x = torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), share)
        if self.valued:
            value = self.value(ids)
            values = [(value * scale).to(self.dtype) for scale in self.value_scale]
        return x, values
    def hidden(self, ids: Tensor, mode: Mode, attend: Callable[..., Tensor] = attend,
               block: Callable[..., Tensor] = block) -> tuple[Tensor, Tensor | float]:
        """Normalised last state [B, T, D] of ids [B, T], and the penalty on growth in the core."""
        plan, (x0, values) = self.plans[mode.passes], self.inputs(ids)
        rope = self.rope[:, : ids.shape[1]].to(self.dtype).unbind()
        x, kept, begun, ended = x0.clone(), [], [], []  # one tensor as two arguments would be a graph more
        for layer, mods in zip(plan, self.cond.rows(plan, self.dtype)):
            if layer.skip >= 0:
                x = torch.addcmul(x, kept.pop(), self.skip[layer.skip].to(self.dtype))
            if layer.opens >= 0:
                begun.append(x := self.core.enter(x, layer.opens))
            rounding, i = mode.core if layer.core else mode.outside, layer.value
            weights = self.mix[layer.attn], self.attn[layer.attn], self.mlp[layer.mlp]
            x = block(weights, x, x0, mods, Setting(rounding, rope, attend, values[i : i + 1], layer.xsa))
            if layer.closes >= 0:
                ended.append(x := self.core.leave(begun[-1], x, layer.closes))
            if layer.push:
                kept.append(x)
        spans = list(zip(begun, ended)) if mode.per_pass else [(begun[0], ended[-1])] if begun else []
        penalty = sum(overgrowth(*span) for span in spans) / len(spans) if mode.jacobian else 0.0
        return rms_norm(x), mode.jacobian * penalty
    def forward(self, ids: Tensor, targets: Tensor, mode: Mode | None = None,
                loss: Callable[..., Tensor] = head_loss, **parts: Callable[..., Tensor]) -> Tensor:
        """Mean cross-entropy in nats of targets [B, T] given ids [B, T]; targets of -100 are left out."""
        x, penalty = self.hidden(ids, mode or self.scoring, **parts)
        head = getattr(self, "lm_head", self.tok_emb)
        return loss(x.flatten(0, 1), head, targets.flatten(), self.softcap) + penalty

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
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, steps: int, decay: float = 0):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.steps, self.decay = steps, decay
        self.state.update({p: dict(velocity=zeros_like(p)) for p in params})
        self.dtype, self.iterate = torch.bfloat16 if params[0].is_cuda else torch.float32, newton_schulz
    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            velocities = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(params, 1 - group["lr"] * self.decay)
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, grads)
            updates = torch._foreach_add(grads, velocities, alpha=group["momentum"])
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
            for p, update in zip(params, updates):
                for w, u in zip(p.split(p.parts), update.split(p.parts)):
                    rate = -group["lr"] * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
                    w, u = (w, u) if w.shape[0] <= w.shape[1] else (w.mT, u.mT)
                    stacks.setdefault(tuple(w.shape), []).append((w, u, rate))
            for stack in stacks.values():
                weights, updates, rates = zip(*stack)
                directions = self.iterate(torch.stack(updates).to(self.dtype), self.steps).float().unbind()
                torch._foreach_add_(weights, torch._foreach_mul(directions, rates))
def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """[Adam, Muon]. Every parameter is in exactly one group, chosen by its role."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.role == name], lr=getattr(config, role.lr),
                   weight_decay=config.adam_wd if role.decays or config.decay_scalars else 0.0)
              for name, role in ROLES.items() if role.optimizer == "adam"]
    adam = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
    for p in (p for group in groups for p in group["params"]):  # made now, checkpoints always have one form
        adam.state[p] = dict(step=p.new_zeros(()), exp_avg=zeros_like(p), exp_avg_sq=zeros_like(p))
    options = config.matrix_lr, config.muon_momentum, config.muon_backend_steps, config.muon_wd
    return [adam, Muon([p for p in params if ROLES[p.role].optimizer == "muon"], *options)]
def lr_factor(config: Config, step: int, seconds: float) -> float:
    """Fraction of the learning rates: falls to 0 over the last WARMDOWN_ITERS steps, or their time."""
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
    widths = config.matrix_bits * (not config.qat_core_only), config.width("core_bits")
    roundings = (Rounding(bits * late, config.quant_scale_floor) for bits in widths)
    return Mode(passes, *roundings, config.jacobian_weight, config.jacobian_per_pass)
def training_modes(config: Config) -> list[Mode]:
    ends = {training_mode(config, step, 0.0)._replace(passes=0) for step in (0, config.iterations)}
    return [mode._replace(passes=passes) for mode in sorted(ends) for _, passes in config.schedule()]
def muon_momentum(config: Config, step: int) -> float:
    done = min(step / max(config.muon_momentum_warmup_steps, 1e-9), 1.0)
    return config.muon_momentum_warmup_start * (1 - done) + config.muon_momentum * done

# ---- 9. Training -----------------------------------------------------------------------------------------
# No DDP: shared weights' gradients are complete only when backward ends, and it would cut the compiled graph.
class Clock:
    """Rank 0's seconds of training on all ranks: shared every few steps, extrapolated in between."""
    def __init__(self, world: World, cap: float, past: Iterable[Any] = (0, 0.0, 0.0, 1)) -> None:
        self.step, self.seconds, self.per_step, self.due, self.asked = *past, ""  # last, next; signal
        self.world, self.cap, self.started = world, cap or math.inf, time.perf_counter() - self.seconds
    def read(self, step: int, now: bool = False) -> float:
        """Seconds spent on `step` steps. A reading that is due, or `now`, is shared; so are signals."""
        if (now or step >= self.due) and step > self.step:
            self.world.synchronize()
            seen = self.world.gather(lambda: (time.perf_counter() - self.started, self.world.asked))
            self.per_step = (seen[0][0] - self.seconds) / (step - self.step)
            self.step, self.seconds = step, seen[0][0]
            soon = min(self.cap - self.seconds, 10) / self.per_step / 2  # in half of what is left, or 5 s
            self.due = step + int(min(max(soon, 1), 10))
            if asked := max(asked for _, asked in seen):
                self.asked = self.world.asked = asked
        return self.seconds + (step - self.step) * self.per_step
RUNGS = ("model", "block", "off")  # of COMPILE
BACKEND = torch.nn.attention.SDPBackend
KERNELS = dict(cudnn=[BACKEND.CUDNN_ATTENTION], flash=[BACKEND.FLASH_ATTENTION], math=[BACKEND.MATH])
KERNELS["auto"] = [*itertools.chain(*KERNELS.values())]  # the first that takes the shapes
def rung(config: Config, world: World) -> str:
    """What COMPILE means here, or as many rungs lower as have failed."""
    first = RUNGS[0 if world.on_cuda else 2] if config.compile == "auto" else config.compile
    return RUNGS[min(RUNGS.index(first) + world.fallen, 2)]
def compiled(model: GPT, config: Config, world: World) -> Callable[..., Tensor]:
    """The model as COMPILE says: whole, a graph a mode; by blocks, a graph a kind of layer; or as it is."""
    torch.compiler.config.cache_key_tag = config.attn_backend  # torch's cache of graphs is blind to it
    torch._dynamo.config.recompile_limit = 8 + 2 * len(training_modes(config))  # beyond, torch stops the run
    build, level = functools.partial(torch.compile, dynamic=False, fullgraph=True), rung(config, world)
    parts = {} if config.attn_backend == "auto" else dict(attend=functools.partial(attend, block=0))
    parts |= dict(block=build(block), loss=build(head_loss)) if level == "block" else {}
    return functools.partial(build(model) if level == "model" else model, **parts)
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
        self.writer, self.written = ThreadPoolExecutor(1), []  # of checkpoints; the last one
        self.between_passes = [(p, p.grad) for p in model.core.parameters()]
        for p in self.params:
            world.meet(dist.broadcast, p.data, 0)  # unlike processors may draw unlike weights
        self.begin()
    def begin(self) -> None:
        self.optimizers, self.last_good = make_optimizers(self.model, self.config), "none"
        if rung(self.config, self.world) != "off":
            self.optimizers[1].iterate = torch.compile(newton_schulz, dynamic=False)
        self.step, self.clock = 0, Clock(self.world, self.config.training_seconds)  # steps made
        self.average = [p.detach().clone() for p in self.params if self.config.average != "none"]
        self.averaged, self.logged = 0, 0  # weights in it; bytes of metrics when training ended
        self.numbers = torch.zeros(7, device=self.world.device)  # steps not finite, first; rest: by `save`
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
        bad = ~flat.sum().isfinite()  # on all ranks alike: the step is one of zero gradients
        self.numbers[1] += (step + 1) * bad * (self.numbers[0] == 0)
        self.numbers[0] += bad
        flat[:-1].masked_fill_(bad, 0.0)
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
            for t in (p, *self.optimizers[0].state[p].values()):
                t.copy_(t.bfloat16() if t.dim() else t)
    def warm_up(self, log: Callable[[str], Any] = print) -> None:
        """WARMUP_STEPS steps of every mode, then all is as before. If COMPILE fails, all go a rung lower."""
        config, world, modes = self.config, self.world, training_modes(self.config)
        before, length = [p.detach().clone() for p in self.params], config.train_seq_len
        span = torch.arange(self.batches.sequences * length + 1, device=world.device) % config.vocab_size
        pair = (span[:-1].view(-1, length), span[1:].view(-1, length))  # laid out as real ones: no new graph
        world.enter("warm-up")
        while (level := rung(config, world)) != "off":
            try:  # what a rank can compile before it meets the others
                world.gather(lambda: [self.forward(*pair, mode).backward() for mode in modes]
                             and self.optimizers[1].step())  # which is compiled, too
                break
            except InputError as error:
                log(f"warning: COMPILE={level} failed on a rank: {error}")
                world.fallen += 1
                torch._dynamo.reset()
                self.forward, _ = compiled(self.model, config, world), self.begin()
        for mode in modes * config.warmup_steps:
            self.train_step(0, 0.0, [pair] * self.batches.accumulation, mode)
        torch._foreach_copy_([p.data for p in self.params], before)
        self.begin()
        world.synchronize()
    @torch.no_grad()
    def update_average(self, step: int, factor: float) -> None:
        """Takes in the weights after `step` steps, at `factor` of the learning rates, as AVERAGE says."""
        config, swa = self.config, self.config.average == "swa"
        if self.average and (not swa or factor < config.swa_lr_factor and step % config.swa_every == 0):
            self.averaged += 1
            share = 1 / self.averaged if swa or self.averaged == 1 else 1 - config.ema_decay
            torch._foreach_lerp_(self.average, self.params, share)
    def check_finite(self, step: int, score: Score | None = None) -> float:
        """The last step's loss. All ranks end if too many steps were left out, or the score is not finite."""
        bad, first, loss = *map(int, self.numbers[:2]), self.flat[-1].item()
        if bad > self.config.max_skipped_steps or score and not math.isfinite(score.val_loss):
            it = f"step {first}" if bad else f"the validation loss after step {step}"
            raise Ended(EXIT_NON_FINITE, f"{it} is not finite (skipped {bad}, last good: {self.last_good}). "
                        "Nothing was exported. Lower the learning rates or set GRAD_CLIP_NORM.")
        self.last_good = f"step {step}, train_loss {loss:.4f}" if step and loss < math.inf else self.last_good
        return loss
    def train(self, log: Log, validate: Callable[..., Score]) -> tuple[float, Score]:
        """Trains until ITERATIONS or the cap; `validate` runs off the clock. Seconds and the last score."""
        config, clock, world, mode = self.config, self.clock, self.world, None
        clock.started = time.perf_counter() - clock.seconds
        while True:
            step, at = self.step, f"step:{self.step}/{config.iterations}"
            seconds = clock.read(step)  # a step is to spare at the end; the time of the first is no measure
            last = step == config.iterations or seconds + 2 * clock.per_step * (step > 1) > clock.cap
            if last or config.val_loss_every and step % config.val_loss_every == 0:
                seconds, paused = clock.read(step, now=True), time.perf_counter()
                if step < config.iterations and last:
                    log(f"stopping_early: wallclock_cap train_time:{1e3 * seconds:.0f}ms {at}")
                self.logged = log.size() * last  # a run that goes on from its end scores again
                if last and config.save_every:
                    self.save(log)
                passes = training_mode(config, step, seconds).passes
                score = validate(step, seconds, None if last else Mode(passes))
                clock.started += time.perf_counter() - paused
                if last:
                    return seconds, score
            world.enter(f"step {step + 1}", training=True)
            before, mode = mode, training_mode(config, step, seconds)
            if mode != before:
                log(f"{at} passes:{mode.passes} bits:{mode.outside.bits} core_bits:{mode.core.bits}")
            self.train_step(step, seconds, self.batches.micro(step), mode)
            self.update_average(step + 1, lr_factor(config, step + 1, seconds))
            self.step = step = step + 1  # from here on a checkpoint is of this step
            logged = step <= 10 or step % config.train_log_every == 0 or step == config.iterations
            if logged or step >= clock.due:
                self.report(step, log, logged)
            if clock.asked:
                raise Ended(EXIT_STOPPED, f"step {step}: stopped by {clock.asked}")
            if config.save_every and step % config.save_every == 0 and step < config.iterations:
                self.save(log, patience=config.rank_timeout_seconds / 4)  # of other ranks in a step
    def state(self) -> list[Tensor]:
        """All that training changes, in a fixed order. Nothing random: after the weights none is drawn."""
        states = [o.state[p] for o in self.optimizers for group in o.param_groups for p in group["params"]]
        moments = [t for state in states for t in state.values()]
        return [*(p.data for p in self.params), *moments, *self.average, self.numbers]
    def save(self, log: Log, patience: float | None = None) -> None:
        """A checkpoint, of which two are kept: copied now, written by a thread, unless the last still is."""
        path, step, clock = log.folder / f"step_{self.step:08d}.ckpt", self.step, self.clock
        if wait(self.written, patience).not_done:
            return log(f"warning: no checkpoint of step {step}: the one before is not written yet")
        seconds = clock.seconds + (step - clock.step) * clock.per_step  # `read` may meet others
        self.numbers[2:] = torch.tensor([step, self.averaged, seconds, clock.per_step, clock.due])
        values, facts = torch.cat([t.flatten() for t in self.state()]).cpu().numpy(), dict(
            config=asdict(self.config), tokens=self.batches.tokens.total, metrics=self.logged or log.size())
        def write() -> None:
            try:
                write_atomically(path, seal("checkpoint", "none", facts, [values.tobytes()]))
                for old in sorted(log.folder.glob("step_*.ckpt"))[:-2]:
                    old.unlink()
            except OSError as error:
                path.with_name(path.name + ".tmp").unlink(missing_ok=True)  # the artifact may need the room
                log(f"warning: no checkpoint of step {step}: {error}")
        if self.world.is_main:
            self.written = [self.writer.submit(write)]
    def resume(self, log: Log) -> None:
        """Goes on from the checkpoint RESUME names, or for auto from the run's last one that is whole."""
        state, world, auto, errors = self.state(), self.world, self.config.resume == "auto", []
        flat = torch.cat([t.flatten() for t in state])
        def read(header: Any, raw: bytes, _: str) -> int:
            us, told = dict(asdict(self.config), tokens=self.batches.tokens.total), header["config"] | header
            differ = [name for name in us if name not in MAY_DIFFER and us[name] != told[name]]
            require(not differ, ", ".join(f"{n.upper()} was {told[n]}, is {us[n]}" for n in differ))
            flat.copy_(torch.frombuffer(bytearray(raw), dtype=torch.float32).view_as(flat))
            require(flat.isfinite().all() and 0 <= flat[-5] <= self.config.iterations, f"step {flat[-5]}")
            return int(header["metrics"])
        def find() -> str:
            found, size = "", 0
            for path in sorted(log.folder.glob("step_*.ckpt"))[::-1] if auto else [Path(self.config.resume)]:
                try:
                    data = path.read_bytes()
                    found, size = path.name, unseal("checkpoint", data, str(path), len(data), read)
                    break
                except KNOWN as error:
                    log(f"warning: {error}")
                    errors.append(str(error))
            require(found or not errors, f"RESUME={self.config.resume}: {' / '.join(errors)}")
            if auto and log.metrics.exists():
                os.truncate(log.metrics, min(size, log.size()))  # what follows comes again
            return found
        if found := world.on_main(find):
            world.meet(dist.broadcast, flat, 0)
            for t, values in zip(state, flat.split([t.numel() for t in state])):
                t.copy_(values.view_as(t))
            step, averaged, seconds, per_step, due = self.numbers[2:].tolist()
            self.step, self.averaged = int(step), int(averaged)
            self.clock = Clock(world, self.config.training_seconds, (self.step, seconds, per_step, int(due)))
        log(f"resumed from step:{self.step} of {found or 'nothing'}")
    @torch.no_grad()
    def calibrate(self, step: int, log: Log) -> tuple[dict[str, Tensor], float]:
        """GPTQ's sums of x x^T [c, c] over the inputs x of matrices on tokens after `step`; its seconds."""
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
        seconds = self.world.on_main(lambda: self.world.synchronize() or time.perf_counter() - started)
        if count:
            log(f"gptq_calibration batches:{count} time:{1e3 * seconds:.0f}ms")
        return sums, seconds
    def report(self, step: int, log: Log, logged: bool) -> None:
        config, clock, loss = self.config, self.clock, self.check_finite(step)
        seconds, skipped = clock.read(step, now=True), int(self.numbers[0])
        speed, left = step * config.train_batch_tokens / seconds, (config.iterations - step) * clock.per_step
        if logged:
            log(f"step:{step}/{config.iterations} train_loss:{loss:.4f} train_time:{1e3 * seconds:.0f}ms "
                f"step_avg:{1e3 * seconds / step:.2f}ms" + f" skipped_steps:{skipped}" * (skipped > 0))
            log.metric(step=step, train_loss=loss if loss < math.inf else None, train_seconds=seconds,
                       tokens_per_second=speed)
        left = min(left, clock.cap - seconds)
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
            nn.utils.clip_grad_norm_(self.sgd.param_groups[0]["params"], config.ttt_grad_clip or math.inf)
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
        ends = *range(size, self.targets, size), self.targets
        bounds = [0, *(1 - (self.length - end) // stride for end in ends)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]
    def windows(self, windows: range, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's ids and targets [batch, T]; what is not to be scored has targets of -100."""
        world, length = self.world, self.length
        first, end = (len(windows) * r // world.size for r in (world.rank, world.rank + 1))
        for i in range(first, end, self.batch):
            part = windows[i : min(i + self.batch, end)]
            count = min((len(part) - 1) * stride + length, self.targets - part[0] * stride)
            span = self.tokens.read(part[0] * stride, count + 1).to(world.device).long()
            fill = (0, (self.batch - 1) * stride + length - count)
            ids = F.pad(span[:-1], fill).unfold(0, length, stride)
            targets = F.pad(span[1:], fill, value=-100).unfold(0, length, stride).clone()
            targets[len(part) :] = -100
            targets[part[0] == 0 :, : length - stride] = -100
            yield ids.contiguous(), targets
    def score(self, model: Callable[..., Tensor], stride: int = 0, learner: Learner | None = None) -> Score:
        """Of a model that maps (ids, targets) to a mean loss. A `learner` trains on what has been scored."""
        start, stride = time.perf_counter(), stride or self.length
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
        nats, n, size = self.world.sum_(sums).tolist()
        return Score(nats / n, nats / math.log(2) / size, int(n), int(size), time.perf_counter() - start)
@torch.no_grad()
def recurrence_health(model: GPT, ids: Tensor, mode: Mode) -> list[dict[str, float]]:
    """Per effective layer: mean mix weights, RMS of scales and shifts, alpha, growth of the stream on ids."""
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
# A sealed file: architecture; name and storage of every parameter; values in that order. Shapes follow from
# the architecture. A byte an integer: from 5 bits on, lzma beats packing.
ARTIFACT, ARTIFACT_LIMIT = "model.ptz", 1 << 28  # in the run's folder; bytes, decompressed
STORED = dict(float16="<f2", float32="<f4"), {f"int{n}": "<i1" for n in range(2, 9)}  # [role has bits]
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
    """Where rows of w [r, c] saturate: a percentile, or least squared error of matrix or row (PR 1230)."""
    size, by_row, given = w.abs(), config.quant_clip == "row", config.quant_clip_percentile / 100
    quantiles = [given] if config.quant_clip == "percentile" else [0.999, 0.9995, 0.9999, 0.99999, 1.0]
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
    """How a parameter is stored, and the tensors that hold it; rounded by GPTQ where there is a `hessian`."""
    w = p.detach()
    if bits := config.width(ROLES[p.role].bits):
        searched = config if ROLES[p.role].optimizer == "muon" else replace(config, quant_clip="percentile")
        q, step = quantize_rows(w, row_clip(w, bits, searched), bits, config.quant_scale_floor)
        return f"int{bits}", [q if hessian is None else gptq_rows(w, step.float(), bits, hessian), step]
    fine = (w.half().float() - w).norm() <= 1e-3 * w.norm()  # and does not overflow
    return ("float16", [w.half()]) if fine else ("float32", [w])
def pack(model: GPT, config: Config, hessians: Mapping[str, Tensor] | None = None) -> bytes:
    """The artifact of a model; `hessians` are those of `Trainer.calibrate`."""
    held = {name: store(p, config, (hessians or {}).get(name)) for name, p in model.named_parameters()}
    values = (t.cpu().numpy().tobytes() for _, tensors in held.values() for t in tensors)
    header = dict(architecture=asdict(config.architecture()), tensors=[(n, s) for n, (s, _) in held.items()])
    return seal("artifact", config.codec, header, values)
def pack_to_fit(model: GPT, config: Config, hessians: Mapping[str, Tensor], log: Log) -> bytes:
    """The artifact; for MATRIX_BITS=0 that of the most bits with which it and the script fit."""
    for bits in [config.matrix_bits] if config.matrix_bits else range(8, 1, -1):
        data = pack(model, replace(config, matrix_bits=bits), hessians)
        total = len(source()) + len(data)
        log(f"packed matrix_bits:{bits} codec:{config.codec} total:{total} bytes")
        if total <= config.size_limit_bytes:
            break
    return data
def unpack(header: Any, raw: bytes, codec: str) -> tuple[Architecture, dict[str, Tensor], str]:
    """Architecture, parameters, how they are held; ValueError or whatever reading malformed values raises."""
    architecture, layout, tensors = Architecture.from_json(header["architecture"]), [], {}
    with torch.device("meta"):  # names, roles and shapes without memory
        expected = list(GPT(architecture).named_parameters())
    for (name, p), (given, stored) in zip(expected, header["tensors"], strict=True):
        kinds = STORED[has_steps := bool(ROLES[p.role].bits)]
        require(given == name and stored in kinds, f"{given} stored as {stored} where {name} is due")
        parts = ("values", kinds[stored], p.shape), ("steps", "<f2", p.shape[:1])
        layout.append((name, [*parts[: 1 + has_steps]]))
    layout = np.dtype(layout)
    require(layout.itemsize == len(raw), f"{len(raw)} bytes of values, {layout.itemsize} described")
    for name, held in zip(layout.names, np.frombuffer(raw, layout)[0]):
        values, *steps = (torch.from_numpy(held[part].copy()) for part in held.dtype.names)
        tensors[name] = dequantize_rows(values, *steps) if steps else values.float()
        require(tensors[name].isfinite().all(), f"{name} is not finite")
    matrices = (stored for (_, p), (_, stored) in zip(expected, header["tensors"]) if "matrix" in p.role)
    return architecture, tensors, f"{'/'.join(dict.fromkeys(matrices))}+{codec}"
def load_model(data: bytes, source: str, eval_passes: int = 0) -> tuple[GPT, Architecture, str]:
    """Model, architecture, storage ("int8+zlib") of an artifact; InputError names `source`."""
    architecture, tensors, kind = unseal("artifact", data, source, ARTIFACT_LIMIT, unpack)
    architecture = replace(architecture, eval_passes=eval_passes or architecture.eval_passes)
    model = GPT(architecture)
    model.load_state_dict(tensors)
    return model, architecture, kind

# ---- 12. The run -----------------------------------------------------------------------------------------
@functools.cache
def source() -> bytes:
    """This script as it is when the run begins; editing it meanwhile changes neither size nor hash."""
    return Path(__file__).read_bytes()
def versions(world: World) -> dict[str, str]:
    cpu, ours = f"{platform.machine()}, {torch.get_num_threads()} threads a rank", hashlib.sha256(source())
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                sentencepiece=spm.__version__, cuda=f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
                device=torch.cuda.get_device_name() if world.on_cuda else cpu, script_sha256=ours.hexdigest())
def open_log(config: Config, world: World) -> Log:
    """Makes the run's folder, which must be new or resumed; the log opens with source, versions, options."""
    name = config.run_id or time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
    folder = Path(config.log_dir) / world.on_main(lambda: name)
    known, finished = world.on_main(lambda: (folder.exists(), (folder / "result.json").exists()))
    require(not known or config.resume == "auto",
            f"{folder} exists and would be overwritten: choose another RUN_ID")
    require(not finished, f"{folder} holds a finished run")
    world.on_main(lambda: folder.mkdir(parents=True, exist_ok=known))
    log = Log(folder, world.is_main, config.tracker)
    log.to_file("" if known else source().decode() + "=" * 100)
    log("\n".join(f"{name}:{value}" for name, value in versions(world).items()))
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
    (config, data, model, kind), world, script, scores = reloaded, scorer.world, len(source()), {}
    total, raw = script + len(data), sum(4 * p.numel() for p in model.parameters())
    log(f"Code size: {script} bytes")
    log(f"Serialized model {kind}: {len(data)} bytes (float32:{raw} ratio:{raw / len(data):.2f}x)")
    log(f"Total submission size {kind}: {total} bytes")
    for name in ["roundtrip", *(["ttt"] if config.ttt_lr else ["sliding"] if config.eval_stride else [])]:
        learner = Learner(model, config, world) if name == "ttt" else None
        stride = 0 if name == "roundtrip" else config.eval_stride
        scores[name] = score = scorer.score(compiled(model, config, world), stride, learner)
        label, loss, bpb = f"final_{kind.replace('+', '_')}_{name}", score.val_loss, score.val_bpb
        log(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1e3 * score.eval_seconds:.0f}ms")
        log(f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
        if not math.isfinite(loss):
            raise Ended(EXIT_NON_FINITE, f"the {name} score is not finite")
    if (spent := sum(score.eval_seconds for score in scores.values())) > config.eval_limit_seconds:
        log(f"not a submission: {spent:.1f} s exceed EVAL_LIMIT_SECONDS={config.eval_limit_seconds}")
    texts = b"".join(path.read_bytes() for path in (*scorer.tokens.paths, Path(config.tokenizer_path)))
    hashes = dict(artifact_sha256=hashlib.sha256(data).hexdigest(),
                  data_sha256=hashlib.sha256(texts).hexdigest())
    log(f"val_tokens:{score.val_tokens} val_bytes:{score.val_bytes} "
        + " ".join(f"{name}:{value}" for name, value in hashes.items()))
    if (over := total - config.size_limit_bytes) > 0:
        log(f"not a submission: {total} bytes exceed SIZE_LIMIT_BYTES={config.size_limit_bytes} by {over}")
    return {name: score._asdict() for name, score in scores.items()} | hashes | dict(
        bytes_code=script, bytes_model=len(data), bytes_total=total, fits=over <= 0)
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
    blocks = config.attn_backend == "auto" and not world.on_cuda
    kernels = "blocks" if blocks else ">".join(kernel.name for kernel in KERNELS[config.attn_backend])
    log(f"world_size:{world.size} grad_accum_steps:{batches.accumulation} compile:{rung(config, world)} "
        f"attention:{kernels}")
    log(f"train_loader:shards:{len(batches.tokens.paths)} tokens:{batches.tokens.total}")
    watched = scorer.tokens.read(0, config.train_seq_len).to(world.device).long()[None]
    def validate(step: int, seconds: float, mode: Mode | None = None, weights: str = "last") -> Score:
        world.enter(f"validation after step {step}")
        mode = mode or model.scoring
        score = scorer.score(functools.partial(trainer.forward, mode=mode))
        trainer.check_finite(step, score)  # the last update alone may have ruined the weights
        log(f"step:{step}/{config.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
            f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / max(step, 1):.2f}ms")
        world.on_main(lambda: log.metric(  # others wait here: a tracker may take minutes to begin
            step=step, train_seconds=seconds, passes=mode.passes, weights=weights, **score._asdict(),
            health=recurrence_health(model, watched, mode)))
        return score
    trainer.warm_up(log)
    if config.resume:
        trainer.resume(log)
    weights, kept = [p.data for p in trainer.params], []
    try:
        (seconds, last), steps = trainer.train(log, validate), trainer.step
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20 if world.on_cuda else 0} MiB")
        if trainer.averaged:
            kept = [w.clone() for w in weights]
            torch._foreach_copy_(weights, trainer.average)
        hessians, spent = trainer.calibrate(steps, log)
        score, seconds = last, seconds + spent
        if config.average != "none":  # of no weights: the last ones are exported
            log(f"AVERAGE={config.average} of {trainer.averaged} weights")
            score = validate(steps, seconds, weights=config.average)
        if training_mode(config, steps, seconds).passes != config.schedule()[-1][1]:
            log(f"warning: PASSES_SCHEDULE={config.passes_schedule} did not come to its last entry")
        if 0 < config.max_wallclock_seconds < seconds:
            log(f"not a submission: training and calibration took {seconds:.1f} s")
        world.enter("export")  # by a thread: signals wait until a codec returns, with brotli half a minute
        packed = functools.partial(ThreadPoolExecutor(1).submit, pack_to_fit, model, config, hessians, log)
        world.on_main(lambda: write_atomically(log.folder / ARTIFACT, packed().result()))
    except (Exception, Ended) as end:  # a signal, a lost rank, a full disk, too little memory
        whole = not world.training or isinstance(end, (Ended, *KNOWN))  # others may come amid an update
        if whole and not (isinstance(end, Ended) and end.args[0] == EXIT_NON_FINITE):
            torch._foreach_copy_(weights, kept or weights)
            trainer.save(log)
        raise
    finally:
        trainer.writer.shutdown()
    return log, dict(model_params=parameters, steps=steps, train_seconds=seconds, pre_quant=score._asdict(),
                     last_weights=last._asdict(), skipped_steps=int(trainer.numbers[0]),
                     tokens_per_second=steps * config.train_batch_tokens / max(seconds, 1e-9))
def run(config: Config, world: World) -> int:
    """One run as configured; result.json ends it. The exit code."""
    if config.eval_only:
        config, *rest = reload(Path(config.eval_only), config, world)
    same = replace(config, data_path="", tokenizer_path="", log_dir="")  # paths may differ between nodes
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if config.deterministic else {}
    torch.use_deterministic_algorithms(config.deterministic)
    scorer = world.on_all(lambda: Scorer(config, world), lambda scorer: (same, scorer.tokens.total))
    if config.eval_only:
        log, result = open_log(config, world), {}
    else:
        log, result = train_and_export(config, world, scorer)
        config, *rest = reload(log.folder / ARTIFACT, config, world)
    world.enter("scoring of the artifact")
    result |= round_trip(scorer, (config, *rest), log)
    result |= dict(config=asdict(config), versions=versions(world), world_size=world.size)
    world.on_main(lambda: write_atomically(log.folder / "result.json", json.dumps(result, indent=1).encode()))
    return 0 if result["fits"] else EXIT_SIZE
def main() -> int:  # what a user can mend is one line without a traceback
    try:
        config = Config.from_env(os.environ)
        world = World(os.environ, config.rank_timeout_seconds)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, world.interrupt)
        with torch.nn.attention.sdpa_kernel(KERNELS[config.attn_backend], set_priority=True):
            code = run(config, world)
        world.gather(lambda: None)  # nobody leaves before all are done
    except (Ended, SystemError, *KNOWN) as e:
        error = e.__cause__ or e  # SystemError is what C code may make of a signal that comes amid it
        code, message = error.args if isinstance(error, Ended) else (EXIT_INPUT, error)
        print(f"[rank {os.environ.get('RANK', 0)}] {message}", file=sys.stderr)
    if dist.is_initialized():  # no teardown: it waits for ranks that failed, and gloo's can abort a good run
        os._exit(code)
    return code
if __name__ == "__main__":
    sys.exit(main())
