"""Train a depth-recurrent GPT for parameter golf, pack it into 16 MB, reload the pack and score it.

    PRESET=tiny python train_gpt.py                               # laptop, sample corpus
    torchrun --standalone --nproc_per_node=8 train_gpt.py         # one 8-GPU node, FineWeb shards
    EVAL_ONLY=logs/<run>/model.ptz python train_gpt.py            # score an artifact again

A model is prelude layers, a shared core whose weights are run several times, and coda layers. A
plan (a tuple of `Layer`, one for each effective layer) says which weights and which conditioning
row a layer uses, and everything that walks the depth walks the plan. Options are environment
variables; `--help` lists them.

Contents: 1 options, 2 plan, 3 model, 4 optimizers, 5 rounding and artifact, 6 scoring, 7 data and
bytes, 8 training, calibration and refit, 9 compiling, averages, reports and checkpoints, 10 ranks,
logs and files, 11 presets, names and help, 12 the run.

Shapes: B sequences, T tokens, D model width, H query heads, K key/value heads, E head width,
V vocabulary, R effective layers. Parameters, tables and optimizer states are float32; matmul
operands and the residual stream are DTYPE. "PR n" is pull request n of openai/parameter-golf.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import datetime
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import importlib
import itertools
import json
import lzma
import math
import os
import platform
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import (
    Any,
    Literal,
    NamedTuple,
    TextIO,
    get_args,
    get_origin,
    get_type_hints,
    no_type_check,
)

try:
    import numpy as np
    import sentencepiece as spm
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"{error}: {sys.executable} -m pip install -r requirements.txt\n")
    sys.exit(2)

# ---- 1. Options --------------------------------------------------------------------------------


class InputError(ValueError):
    """A mistake in what the user gave (variables, files); `main` prints it as one line."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise InputError(message)


def option(
    default: Any,
    help: str,
    low: float = 0,
    high: float = math.inf,
    *,
    needs: str = "",
    neutral: Any = None,
    zero_acts: bool = False,
    group: str = "",
) -> Any:
    """A field of `Config`: its default, what it means, its bounds.

    Numbers are at least 0 unless `low` says otherwise. `needs` lists what must hold for the option
    to act, as in "num_shared !tie_embeddings num_loops>1 average=ema !core_skips=none"; of "a|b",
    one is enough. `neutral` is the value that switches a technique off; it is given where the
    default does not, or where it is none of 0, "" and none. These count as off everywhere, but 0
    does not with `zero_acts`. `group` opens a group of --help.
    """
    return field(
        default=default,
        metadata=dict(
            help=help,
            low=low,
            high=high,
            needs=needs,
            neutral=neutral,
            zero_acts=zero_acts,
            group=group,
        ),
    )


def parse(name: str, text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`; InputError names the variable and what it takes."""
    choices = ("0", "1") if kind is bool else get_args(kind)
    if choices:
        require(text in choices, f"{name}={text!r} is not one of {', '.join(choices)}")
    if kind is bool:
        return text == "1"
    if get_origin(kind) is Literal:
        return text
    try:
        return kind(text)
    except ValueError:
        wanted = "an integer" if kind is int else "a number"
        raise InputError(f"{name}={text!r} is not {wanted}") from None


def show(value: Any) -> str:
    """A value as `parse` reads it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The function a model computes and is scored with: what an artifact carries.

    Defaults are those of PR 855, run T.
    """

    vocab_size: int = option(
        1024,
        "Pieces of the tokenizer (V); shards hold uint16 ids.",
        low=2,
        high=65536,
        group="Model",
    )
    model_dim: int = option(512, "Width of the residual stream (D).", low=2, high=65536)
    num_heads: int = option(8, "Query heads (H).", low=1, high=1024)
    num_kv_heads: int = option(
        4, "Key/value heads (K), each shared by H/K query heads.", low=1, high=1024
    )
    mlp_mult: float = option(
        2.0, "Hidden width of an MLP as a multiple of MODEL_DIM.", low=0.01, high=64
    )
    num_layers: int = option(9, "Layers of the flat U-Net.", low=1, high=256, needs="!num_shared")
    num_prelude: int = option(1, "Layers before the core.", low=0, high=256, needs="num_shared")
    num_shared: int = option(4, "Layers of the shared core; 0 makes a flat U-Net.", low=0, high=256)
    num_loops: int = option(
        3, "Passes over the core in training, at most.", low=1, high=256, needs="num_shared"
    )
    eval_passes: int = option(
        0,
        "Passes over the core in scoring; 0 means NUM_LOOPS.",
        low=0,
        high=256,
        needs="num_shared",
    )
    num_coda: int = option(1, "Layers after the core.", low=0, high=256, needs="num_shared")
    core_skips: Literal["none", "all", "published", "looped", "by_position"] = option(
        "none",
        "U-Net skips. all: from the prelude to the coda, of which neither is empty; published: "
        "half of those (PR 1230). looped: from the first half of all effective layers to the "
        "second, with weights for each pair of layers and visits; by_position: with weights for "
        "places in the second half (PR 1394).",
        needs="num_shared",
    )
    skip_gates: bool = option(
        False,
        "Mix a skip in as s x + (1 - s) w skip, s a learned sigmoid per channel, instead of adding "
        "it.",
        needs="!num_shared|!core_skips=none",
    )
    parallel_layers: str = option(
        "",
        "Layers, counted from 0 as they are stored, whose MLP reads what their attention reads "
        "(parallel residual), as 7-10.",
    )
    share_attn_only: bool = option(
        False, "Give every pass over the core MLPs of its own.", needs="num_shared num_loops>1"
    )
    mlp_pool: int = option(
        0,
        "MLPs of the core, taken in turn by its layers, pass after pass: NUM_SHARED (one for each "
        "layer) to NUM_SHARED * NUM_LOOPS (one for each layer and pass); 0: one for each layer.",
        high=1024,
        needs="num_shared num_loops>1 !share_attn_only",
    )
    pass_scale_init: float = option(
        1.0,
        "Start of alpha in x + alpha (core(x) - x), learned per further pass; 1 leaves it out.",
        low=-4,
        high=4,
        needs="num_shared num_loops>1",
        neutral=1.0,
        zero_acts=True,
    )
    feedback_rank: int = option(
        0,
        "Rank r of the error feedback x + d * (x V) U^T before a further pass; 0 leaves it out.",
        low=0,
        high=4096,
        needs="num_shared num_loops>1",
    )
    interpass_norm: bool = option(
        False,
        "Normalise the state (RMSNorm) before a further pass.",
        needs="num_shared num_loops>1",
    )
    loop_lanes: int = option(
        1,
        "Residual streams that meet only between passes over the core, by learned weights; 1: one.",
        low=1,
        high=2,
        needs="num_shared num_loops>1",
        neutral=1,
    )
    lane_weights: Literal["scalar", "channel", "token"] = option(
        "channel",
        "Weights of LOOP_LANES: a number for each pass and lane, one for each channel besides, or "
        "the latter and a part that each token's state decides.",
        needs="loop_lanes>1",
    )
    core_branch_scale: float = option(
        0.0,
        "Scale of the core's branches, as lambda in lambda / (N L^0.5) for N = NUM_LOOPS passes "
        "over L = NUM_SHARED layers; 0 leaves it out.",
        high=64,
        needs="num_shared",
    )
    use_peri_norm: bool = option(
        True,
        "Output-LN (peri norm): normalise the MLP branch at its output instead of its input.",
        neutral=False,
    )
    use_birkhoff_mix: bool = option(
        True,
        "Convex (Birkhoff) mix a x + (1-a) x0, a in (0, 1) per channel; off: two free weights.",
        neutral=False,
    )
    mix_init: float = option(
        0.0,
        "Initial logit of the convex mix: 0 halves x and x0, 4 keeps nearly all of x.",
        low=-16,
        high=16,
        needs="use_birkhoff_mix",
    )
    mix_once_a_pass: bool = option(
        False, "Mix x0 into the core only where a pass begins.", needs="num_shared>1"
    )
    use_timestep_scale: bool = option(
        True, "Scale both branches of an effective layer by a learned gamma.", neutral=False
    )
    timestep_gamma_max: float = option(
        4.0, "Cap on |gamma|; 0 means none.", needs="use_timestep_scale", neutral=0.0
    )
    use_timestep_bias: bool = option(
        True,
        "Shift both branches of an effective layer by a learned beta (FiLM bias).",
        neutral=False,
    )
    use_unique_norms: bool = option(
        False,
        "Learned gains on branch inputs for every effective layer of the core.",
        needs="num_shared",
    )
    unique_norms_input_norm: bool = option(
        False,
        "Keep the input norm beside unique norms under Output-LN, as PR 855 unknowingly did.",
        needs="use_unique_norms use_peri_norm",
    )
    depth_embed: Literal["none", "sinusoidal", "learned"] = option(
        "sinusoidal", "Depth code added to the stream before every effective layer.", neutral="none"
    )
    leaky_relu_slope: float = option(
        0.5, "Slope of W2 leaky_relu(W1 x)^2 below zero; 0 is relu^2.", low=0, high=1
    )
    logit_softcap: float = option(30.0, "Bound c of the logits in c tanh(logit / c).", low=1e-3)
    rope_base: float = option(10000.0, "Base of the rotary frequencies.", low=1)
    rope_dims: int = option(
        0, "Channels of a head that are rotated; 0 means all.", low=0, high=65536
    )
    ln_scale: bool = option(False, "Scale the norms of layer i, counted from 0, by (i + 1)^-0.5.")
    xsa_last_n: int = option(
        0, "Exclusive self-attention in this many last layers, as they are stored.", low=0, high=256
    )
    attn_gate_width: int = option(
        0,
        "First channels of the attention's input that gate its heads, y 2 sigmoid(W x), W = 0 at "
        "first; 0 leaves the gates out.",
        low=0,
        high=65536,
    )
    smear_gate: Literal["none", "document", "published"] = option(
        "none",
        "Blend the previous token into each embedding; `published` does so across documents.",
    )
    bigram_vocab_size: int = option(
        0, "Buckets of the hashed bigram embedding; 0 leaves it out.", low=0, high=1 << 20
    )
    bigram_dim: int = option(
        64, "Width of the bigram embedding.", low=1, high=65536, needs="bigram_vocab_size"
    )
    ve_layers: str = option(
        "",
        "Layers, counted like PARALLEL_LAYERS, that add the shared value embedding to v, as 9,10.",
    )
    ve_dim: int = option(128, "Width of the value embedding.", low=1, high=65536, needs="ve_layers")
    qk_gain_init: float = option(1.5, "Initial gain of the normalised queries, per head.")
    tie_embeddings: bool = option(True, "Use the token embedding as output projection.")
    train_seq_len: int = option(
        1024, "Tokens of a sequence (T), in training and in scoring.", low=2, high=1 << 17
    )
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "Type of matmul operands and of the residual stream."
    )
    reference_bf16: bool = option(
        False,
        "Round RoPE positions, and in training tables and embedding, to bfloat16, as PR 855's "
        "module-wide cast unknowingly did.",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        D, H, T, rope = self.model_dim, self.num_heads, self.train_seq_len, self.rope_dims
        require(
            H % self.num_kv_heads == 0,
            f"NUM_KV_HEADS={self.num_kv_heads} does not divide NUM_HEADS={H}",
        )
        require(D % (2 * H) == 0, f"MODEL_DIM={D} / NUM_HEADS={H} is not an even number")
        require(
            round(self.mlp_mult * D) >= 1,
            f"MLP_MULT={self.mlp_mult} of MODEL_DIM={D} is no channel",
        )
        require(
            rope % 2 == 0 and rope <= D // H,
            f"ROPE_DIMS={rope} is odd or wider than a head, {D // H}",
        )
        require(
            self.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1: one bucket is for the first token"
        )
        loops = max(self.num_loops, self.eval_passes)
        layers = self.num_prelude + self.num_shared * loops + self.num_coda
        require(layers <= 1024, f"{layers} effective layers are more than 1024")
        require(
            T * D // H <= 1 << 24,
            f"TRAIN_SEQ_LEN={T} with heads of {D // H} channels is too long for tables of RoPE",
        )
        pool, core = self.mlp_pool, self.num_shared
        require(
            not pool or not core or core <= pool <= core * self.num_loops,
            f"MLP_POOL={pool} is not 0 or {core} to {core * self.num_loops}",
        )
        gate = self.attn_gate_width
        require(gate <= D, f"ATTN_GATE_WIDTH={gate} is more than MODEL_DIM={D}")
        self.listed("parallel_layers")
        self.listed("ve_layers")

    @property
    def stored_layers(self) -> int:
        """Layers without repetition, those of the core among them."""
        if not self.num_shared:
            return self.num_layers
        return self.num_prelude + self.num_shared + self.num_coda

    def listed(self, name: str) -> tuple[int, ...]:
        """The stored layers that option `name` lists, as 9,10 or 7-10; InputError if malformed."""
        text: str = getattr(self, name)
        span = "[0-9]{1,3}(-[0-9]{1,3})?"
        parts = text.split(",") if re.fullmatch(f"{span}(,{span}){{0,255}}", text) else []
        ends = [(int(part.split("-")[0]), int(part.split("-")[-1])) for part in parts]
        layers = [i for first, last in ends for i in range(first, last + 1)]
        rising = all(first <= last for first, last in ends) and layers == sorted(set(layers))
        require(
            not text or (layers and rising and layers[-1] < self.stored_layers),
            f"{name.upper()}={text:.80} does not list layers from 0 to {self.stored_layers - 1} in "
            "rising order, as 0-2,4 would",
        )
        return tuple(layers)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        """From an artifact's header. An older header may lack an option, which was off then."""
        kinds = get_type_hints(cls) | dict(ve_last_n=int)
        unknown = sorted(values.keys() - kinds)
        require(not unknown, f"its architecture has fields that this script lacks: {unknown}")
        known = {name: parse(name.upper(), show(x), kinds[name]) for name, x in values.items()}
        last = known.pop("ve_last_n", 0)  # before VE_LAYERS, value embeddings had the last layers
        a = cls(**neutral_values(cls) | known)
        if not last:
            return a
        end = a.stored_layers
        return replace(a, ve_layers=f"{max(end - last, 0)}-{end - 1}")


def check_range(f: Field, value: Any) -> None:
    """InputError if a number is outside the bounds of its option."""
    low, high = f.metadata["low"], min(f.metadata["high"], LARGEST)
    if isinstance(value, (int, float)):
        fits = low <= value <= high
        require(fits, f"{f.name.upper()}={value} is out of range: {range_text(f)}")


LARGEST = 3.4e38  # of float32


def range_text(f: Field) -> str:
    """The bounds of a number."""
    low, high = f.metadata["low"], f.metadata["high"]
    return f"{low} to {high}" if high < LARGEST else f"at least {low}"


def neutral_values(kind: type[Architecture]) -> dict[str, Any]:
    """The values that switch techniques off, of those options that name one."""
    found = {f.name: f.metadata["neutral"] for f in fields(kind)}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Config(Architecture):
    """Everything a run depends on. `Config.from_env(os.environ)` is the way in.

    Defaults are for 8xH100 and 600 s.
    """

    preset: str = option(
        "", "A system and/or a scale, comma-separated, as in PRESET=K,tiny.", group="Run and files"
    )
    eval_only: str = option(
        "", "Path of an artifact that is reloaded and scored; nothing else runs."
    )
    data_path: str = option(
        "./data/datasets/fineweb10B_sp1024",
        "Folder of fineweb_{train,val}_*.bin; relative to the working directory, then to the "
        "script's folder, then to the one three above that.",
    )
    tokenizer_path: str = option(
        "./data/tokenizers/fineweb_1024_bpe.model",
        "SentencePiece model of the shards; relative like DATA_PATH.",
    )
    log_dir: str = option("./logs", "A run writes into <LOG_DIR>/<RUN_ID>/.")
    run_id: str = option("", "Name of the run; empty makes one of date, time and a random suffix.")
    tracker: Literal["none", "tensorboard", "wandb"] = option(
        "none", "Where metrics go as well, if it is installed."
    )
    seed: int = option(1337, "Seed of the initial weights.", low=0, high=2**64 - 1)
    data_seed: int = option(
        0,
        "Seed of a random order of training sequences; 0: the tokens of the shards in their order.",
        low=0,
        high=2**64 - 1,
    )
    device: Literal["auto", "cuda", "cpu"] = option(
        "auto",
        "Where to train; auto takes CUDA if there is a GPU, and the CPU for a single process only.",
    )
    compile: Literal["auto", "model", "block", "off"] = option(
        "auto",
        "Compile the whole model, one block, or nothing; auto: on CUDA the model, or the block "
        "where training has more than two modes (passes, rounding, truncation, refit), each of "
        "which is a graph; off on CPUs.",
    )
    attn_backend: Literal["auto", "cudnn", "flash", "math"] = option(
        "auto", "Attention kernel; auto takes the first of these that can run the shapes."
    )
    fused_mlp: bool = option(
        False, "Compute MLPs by a Triton kernel that has the activation inside; CUDA only."
    )
    deterministic: bool = option(
        False,
        "Make CUDA repeat a run to the last bit, or name what cannot; slower. Under a time cap the "
        "number of steps and their learning rates still follow the clock.",
    )
    save_every: int = option(
        -1,
        "Steps between checkpoints; 0: only when a run is interrupted, as a lost GPU rank cannot "
        "save; -1: 500 on CUDA, 0 on CPUs.",
        low=-1,
    )
    resume: str = option(
        "",
        "Path of a checkpoint to go on from, or of a folder whose last one it is; auto: the last "
        "one of RUN_ID, if any. The options of its run are given again, but those of rounding may "
        "be others if training rounds nothing, and ITERATIONS may be more.",
    )
    rank_timeout_seconds: float = option(
        60.0, "Seconds to wait for a missing rank before every rank stops.", low=5
    )
    max_skipped_steps: int = option(
        10, "Steps with a loss or gradient that is not finite, skipped before the run ends."
    )

    iterations: int = option(20000, "Optimizer steps, at most.", group="Training")
    max_wallclock_seconds: float = option(
        600.0, "Seconds of training, with GPTQ's calibration and the refit; 0 means no limit."
    )
    passes_schedule: str = option(
        "",
        "When to run how many passes, as 0:1,0.6:2; a `when` below 1 is a fraction of the run "
        "(steps or time, whichever is further), any other a step. Empty: NUM_LOOPS at once.",
        needs="num_shared num_loops>1",
    )
    truncate_fraction: float = option(
        0.0,
        "First fraction of the run (steps or time, whichever is further) whose gradient goes "
        "through the last pass over the core and around the others; rounding ends it.",
        high=1,
        needs="num_shared num_loops>1 !jacobian_weight",
    )
    jacobian_weight: float = option(
        0.0,
        "Weight of the penalty on growth of the state in the core, which is in train_loss but not "
        "in val_loss.",
        needs="num_shared",
    )
    jacobian_per_pass: bool = option(
        False,
        "Penalise the growth of each pass instead of all passes together.",
        needs="jacobian_weight num_loops>1",
    )
    warmup_steps: int = option(
        20, "Steps of every training mode before the clock starts, undone afterwards."
    )
    warmdown_iters: int = option(
        1200,
        "Steps (or their time) over which the learning rate falls at the end, where "
        "WARMDOWN_FRACTION does not say it.",
        needs="!warmdown_fraction",
    )
    warmdown_fraction: float = option(
        0.0,
        "Last fraction of the run (steps or time, whichever is further) over which the learning "
        "rate falls; 0: WARMDOWN_ITERS.",
        low=0,
        high=1,
    )
    lr_floor: float = option(
        0.0,
        "Fraction of the learning rate below which it does not fall.",
        low=0,
        high=1,
        needs="warmdown_iters|warmdown_fraction",
    )
    train_batch_tokens: int = option(524288, "Tokens of a step, all ranks together.", low=1)
    micro_batch_tokens: int = option(65536, "Tokens of a rank's forward pass, at most.", low=1)
    val_batch_size: int = option(
        524288,
        "Tokens of a validation batch, all ranks together; of a rank MICRO_BATCH_TOKENS at most.",
        low=1,
    )
    val_loss_every: int = option(1000, "Steps between validations; 0: only at the end.")
    train_log_every: int = option(200, "Steps between log lines, after the first ten.", low=1)

    embed_lr: float = option(
        0.6,
        "Adam's learning rate of an untied token embedding.",
        needs="!tie_embeddings",
        group="Optimizers",
    )
    head_lr: float = option(
        0.008, "Adam's learning rate of an untied output projection.", needs="!tie_embeddings"
    )
    tied_embed_lr: float = option(
        0.05,
        "Adam's learning rate of tied, bigram and value embeddings.",
        needs="tie_embeddings|bigram_vocab_size|ve_layers",
    )
    tied_embed_init_std: float = option(
        0.005, "Standard deviation of the tied embedding's initial weights.", needs="tie_embeddings"
    )
    matrix_lr: float = option(0.04, "Muon's learning rate of matrices.")
    core_lr_power: float = option(
        0.0,
        "Muon's learning rate of a matrix is divided by its uses in a forward pass to this power: "
        "the passes, or fewer for MLPs of SHARE_ATTN_ONLY and MLP_POOL.",
        high=4,
        needs="num_shared num_loops>1",
    )
    scalar_lr: float = option(0.04, "Adam's learning rate of scales, gains, tables, projections.")
    muon_wd: float = option(0.0, "Decoupled weight decay of matrices: W <- W (1 - lr wd).")
    adam_wd: float = option(
        0.0, "Decoupled weight decay of embeddings, and of projections (error feedback's, too)."
    )
    scalar_wd: float = option(
        0.0, "Decoupled weight decay of scales, gains and tables, where they have a gradient."
    )
    matrix_init: Literal["uniform", "orthogonal"] = option(
        "uniform", "Initial matrices, of those that do not start at zero."
    )
    muon_momentum: float = option(
        0.95, "Muon's Nesterov momentum, after its warm-up.", low=0, high=1
    )
    muon_momentum_warmup_start: float = option(
        0.85,
        "Muon's momentum at step 0.",
        low=0,
        high=1,
        needs="muon_momentum_warmup_steps|muon_momentum_warmup_fraction",
    )
    muon_momentum_warmup_steps: int = option(
        500,
        "Steps until Muon's momentum has risen.",
        needs="!muon_momentum_warmup_fraction",
    )
    muon_momentum_warmup_fraction: float = option(
        0.0,
        "First fraction of the run (steps or time, whichever is further) in which Muon's momentum "
        "rises; 0: MUON_MOMENTUM_WARMUP_STEPS.",
        low=0,
        high=1,
    )
    muon_backend_steps: int = option(5, "Newton-Schulz iterations.", low=1)
    muon_row_norm: bool = option(
        False, "Divide every row of Muon's direction by its norm before Newton-Schulz (MuonEq-R)."
    )
    muon_polar: bool = option(
        False, "Newton-Schulz with coefficients of its own for every iteration (Polar Express)."
    )
    beta1: float = option(0.9, "Adam's decay of the first moment.", low=0, high=1 - 1e-9)
    beta2: float = option(0.95, "Adam's decay of the second moment.", low=0, high=1 - 1e-9)
    adam_eps: float = option(
        1e-8, "Added to the root of Adam's second moment, which may be 0.", low=1e-30
    )
    grad_clip_norm: float = option(0.0, "Largest L2 norm of the averaged gradient; 0: no clipping.")
    average: Literal["none", "ema", "swa"] = option(
        "none", "Average of the weights over steps; it is what is exported."
    )
    ema_decay: float = option(
        0.997, "Decay a step of AVERAGE=ema.", low=0, high=1 - 1e-9, needs="average=ema"
    )
    swa_every: int = option(
        50, "Steps between the weights that AVERAGE=swa takes.", low=1, needs="average=swa"
    )
    swa_lr_factor: float = option(
        0.2,
        "AVERAGE=swa takes weights once the learning rate is below this fraction.",
        low=0,
        high=1,
        needs="average=swa",
    )

    qat_fraction: float = option(
        0.0,
        "Last fraction of the run that trains on rounded matrices (QAT).",
        low=0,
        high=1,
        group="Rounding and artifact",
    )
    qat_lr_factor: float = option(
        0.0,
        "Train on rounded matrices once the learning rate is below this fraction.",
        low=0,
        high=1,
        needs="warmdown_iters|warmdown_fraction",
    )
    qat_core_only: bool = option(
        False,
        "Round only the core's matrices in QAT.",
        needs="num_shared qat_fraction|qat_lr_factor",
    )
    matrix_bits: int = option(
        8,
        "Bits of a stored matrix element, 2 to 8; 0: the most with which script and artifact fit "
        "into SIZE_LIMIT_BYTES.",
        low=0,
        high=8,
    )
    core_bits: int = option(
        0,
        "Bits of the core's matrix elements; 0 means MATRIX_BITS.",
        low=0,
        high=8,
        needs="num_shared",
    )
    embed_bits: int = option(
        8,
        "Bits of a stored element of embeddings and projections (error feedback's, too).",
        low=2,
        high=8,
    )
    quant_clip: Literal["percentile", "matrix", "row", "sdclip"] = option(
        "percentile",
        "Where rows saturate. percentile: at QUANT_CLIP_PERCENTILE of the row. matrix, row: those "
        "of matrices where the squared error of the matrix or row is least. sdclip: those of "
        "matrices, token embedding and output projection at so many standard deviations of the row "
        "as MATRIX_CLIP_SIGMAS and EMBED_CLIP_SIGMAS say. All others as with percentile.",
    )
    matrix_clip_sigmas: float = option(
        12.85,
        "Standard deviations at which the rows of matrices saturate; 0: the fewest with which the "
        "artifact fits.",
        high=1e4,
        needs="quant_clip=sdclip",
        zero_acts=True,
    )
    embed_clip_sigmas: float = option(
        20.0,
        "The same of the token embedding and the output projection, without a choice by size.",
        low=1,
        high=1e4,
        needs="quant_clip=sdclip",
    )
    quant_clip_percentile: float = option(
        99.99984,
        "Percentile of |w| in a row beyond which weights saturate, of all rows that QUANT_CLIP has "
        "no other rule for.",
        low=50,
        high=100,
        needs="!quant_clip=sdclip|bigram_vocab_size|ve_layers|feedback_rank|lane_weights=token",
    )
    quant_scale_floor: float = option(
        0.0,
        "Smallest step of int8 rounding, and in proportion of fewer bits; PR 855 has 1/127 = "
        "0.00787.",
        low=0,
        high=1,
    )
    gptq_batches: int = option(
        0,
        "Micro-batches per rank that calibrate GPTQ, inside the training time; 0: no GPTQ.",
    )
    gptq_seconds: float = option(
        10.0,
        "Seconds of MAX_WALLCLOCK_SECONDS reserved for GPTQ's calibration, and for its rounding if "
        "a refit follows; -1: as many as a trial before training takes, and a tenth more.",
        low=-1,
        needs="gptq_batches max_wallclock_seconds",
    )
    gptq_embed: bool = option(
        False,
        "Round the output projection (a tied embedding) by GPTQ, too, as the matrix that it is to "
        "the normalised last state.",
        needs="gptq_batches",
    )
    gptq_damping: float = option(
        0.01,
        "What GPTQ adds to the diagonal of its sums, as a fraction of the diagonal's mean.",
        low=1e-6,
        high=1e6,
        needs="gptq_batches",
    )
    refit_steps: int = option(
        0,
        "Steps that tune all that is not rounded (scales, tables, mixes) to the rounded matrices, "
        "inside the training time; 0: none.",
    )
    refit_lr: float = option(
        0.002,
        "Adam's learning rate of the refit; it falls to 0 with its steps or its seconds.",
        needs="refit_steps",
    )
    refit_seconds: float = option(
        5.0,
        "Seconds of MAX_WALLCLOCK_SECONDS reserved for the refit's steps, which end with them, or "
        "earlier where rounding takes more than what calibration leaves of GPTQ_SECONDS.",
        needs="refit_steps max_wallclock_seconds",
    )
    codec: Literal["zlib", "lzma", "brotli"] = option(
        "zlib", "Compression of the artifact; brotli is a package of its own."
    )
    byte_shuffle: bool = option(
        False, "Compress the artifact's bytes in another order: those at even places, then the odd."
    )
    size_limit_bytes: int = option(
        16_000_000, "Bytes of script and artifact together; beyond it the exit code is 4."
    )

    eval_stride: int = option(
        0,
        "Tokens that a sliding validation window advances; 0: no sliding score.",
        group="Evaluation",
    )
    eval_limit_seconds: float = option(
        600.0,
        "Seconds of all evaluations together; a slower run is no submission. Reading the artifact "
        "and warming up, which compiles, do not count.",
    )
    ttt_lr: float = option(0.0, "SGD's learning rate of score-first test-time training; 0: none.")
    ttt_epochs: int = option(3, "Passes over a chunk after it was scored.", low=1, needs="ttt_lr")
    ttt_chunk_tokens: int = option(
        32768, "Tokens that are scored before they are trained on.", low=1, needs="ttt_lr"
    )
    ttt_momentum: float = option(
        0.9, "SGD's momentum in test-time training.", low=0, high=1, needs="ttt_lr"
    )
    ttt_grad_clip: float = option(
        1.0,
        "Largest L2 norm of the gradient in test-time training; 0: no clipping.",
        needs="ttt_lr",
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Defaults, presets, then explicit variables.

        InputError for a name that is misspelt or of another script, for a malformed value, and
        for an option that cannot act.
        """
        errors, _ = questionable_names(env)
        require(not errors, "; ".join(errors))
        explicit = explicit_options(env)
        preset = preset_values(explicit.get("preset", ""))
        config = cls(**without_inert(preset, explicit) | explicit)
        for name, value in explicit.items():
            require(
                not config.eval_only or name in EVAL_OPTIONS,
                f"{name.upper()} cannot act here: EVAL_ONLY trains nothing and takes the model "
                "from the artifact",
            )
            reasons = config.why_inert(name)
            require(
                not reasons or value in off_values(cls.__dataclass_fields__[name]),
                f"{name.upper()}={show(value)} cannot act here: {', '.join(reasons)}",
            )
        return config

    def why_inert(self, name: str) -> list[str]:
        """Why an option cannot act beside the others; empty if it can."""
        if self.eval_only and name == "eval_passes":
            return []  # that depends on the artifact (`read_artifact`)
        needs = self.__dataclass_fields__[name].metadata["needs"].split()
        if name == "core_skips" and self.core_skips in ("all", "published"):
            needs += ["num_prelude", "num_coda"]
        reasons = [text for text in map(self.unmet_need, needs) if text]
        of_skips = name in ("core_skips", "skip_gates")
        if of_skips and not reasons and not skip_pairs(self.architecture(), 0):
            reasons.append("these layers are too few for a skip between them")
        return reasons

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedule()
        self.check_rounding()
        self.check_lr_floor()
        cap = self.max_wallclock_seconds
        require(
            self.resume != "auto" or self.run_id, "RESUME=auto needs the RUN_ID of the checkpoints"
        )
        require(
            self.run_id == Path(self.run_id).name and self.run_id != "..",
            f"RUN_ID={self.run_id} is a path: RUN_ID names a folder in LOG_DIR",
        )
        require(
            not -1 < self.gptq_seconds < 0,
            f"GPTQ_SECONDS={self.gptq_seconds} is neither -1 nor a number of seconds",
        )
        reserved = []
        if self.gptq_batches:
            reserved.append(f"GPTQ_SECONDS={self.gptq_seconds}")
        if self.refit_steps:
            reserved.append(f"REFIT_SECONDS={self.refit_seconds}")
        require(
            not cap or self.training_seconds,
            f"MAX_WALLCLOCK_SECONDS={cap} leaves nothing to train in after "
            f"{' and '.join(reserved)}",
        )
        gamma = self.timestep_gamma_max
        require(
            self.eval_only or not 0 < gamma < 1,
            f"TIMESTEP_GAMMA_MAX={gamma} is below gamma's start, 1, so gamma would not be learned",
        )

    def check_rounding(self) -> None:
        require(
            1 not in (self.matrix_bits, self.core_bits), "MATRIX_BITS and CORE_BITS are 0 or 2 to 8"
        )
        require(
            self.matrix_bits or not self.fits_by_clip,
            "MATRIX_BITS=0 and MATRIX_CLIP_SIGMAS=0: only one of them can be what makes it fit",
        )
        require(
            self.quant_clip != "sdclip" or round(self.mlp_mult * self.model_dim) > 1,
            f"QUANT_CLIP=sdclip: MLP_MULT={self.mlp_mult} of MODEL_DIM={self.model_dim} is one "
            "channel, which has no standard deviation",
        )
        late = {"MATRIX_BITS": not self.matrix_bits, "MATRIX_CLIP_SIGMAS": self.fits_by_clip}
        for name, chosen_late in late.items():
            core_alone = name == "MATRIX_BITS" and self.qat_core_only and self.core_bits
            require(
                not chosen_late or not self.qat or core_alone,
                f"{name}=0, chosen after training, rules out QAT_FRACTION and QAT_LR_FACTOR"
                + (" but for QAT_CORE_ONLY=1 with CORE_BITS" if name == "MATRIX_BITS" else ""),
            )
            require(
                not chosen_late or not self.refit_steps,
                f"{name}=0, chosen after training, rules out REFIT_STEPS={self.refit_steps}",
            )

    def check_lr_floor(self) -> None:
        waits = {"QAT_LR_FACTOR": self.qat_lr_factor}
        if self.average == "swa":
            waits["SWA_LR_FACTOR"] = self.swa_lr_factor
            require(self.swa_lr_factor, "AVERAGE=swa cannot act: SWA_LR_FACTOR=0")
            require(
                self.warmdown_iters or self.warmdown_fraction,
                "AVERAGE=swa cannot act: the learning rate never falls to SWA_LR_FACTOR of itself "
                "with WARMDOWN_ITERS=0 and WARMDOWN_FRACTION=0",
            )
        for name, factor in waits.items():
            require(
                not factor or self.lr_floor < factor,
                f"{name}={factor} cannot act: the learning rate stays above LR_FLOOR="
                f"{self.lr_floor} of itself",
            )

    def check_schedule(self) -> None:
        schedule, n = self.schedule(), self.num_loops
        starts = [when for when, _ in schedule]
        counts = [passes for _, passes in schedule]
        ascending = starts[0] == 0 and starts == sorted(set(starts))
        finite = all(map(math.isfinite, starts))  # nothing is before or after nan
        one_unit = len({when < 1 for when in starts[1:]}) < 2
        require(
            finite and ascending and one_unit,
            f"PASSES_SCHEDULE={self.passes_schedule} does not ascend from 0 in steps, or in "
            "fractions of the run, as 0:1,0.6:3 would",
        )
        require(
            min(counts) >= 1 and max(counts) <= n,
            f"PASSES_SCHEDULE={self.passes_schedule} asks for {min(counts)} to {max(counts)} "
            f"passes, which must be 1 to NUM_LOOPS={n}",
        )
        # With NUM_LOOPS=1 the option itself is refused, by its `needs`.
        require(
            not self.truncate_fraction or n == 1 or self.truncated_passes(),
            f"TRUNCATE_FRACTION={self.truncate_fraction} cannot act: {self.before_truncation()}",
        )

    def schedule(self) -> list[tuple[float, int]]:
        """(beginning, passes): from a step on, or below 1 from a fraction of the run on."""
        text = self.passes_schedule
        if self.eval_only or not text:
            return [(0.0, self.num_loops)]
        schedule = []
        for entry in text.split(","):
            when, colon, passes = entry.partition(":")
            require(
                colon, f"PASSES_SCHEDULE={text}: {entry!r} is no beginning and passes, as in 0.6:3"
            )
            name = "PASSES_SCHEDULE"
            schedule.append((parse(name, when, float), parse(name, passes, int)))
        return schedule

    def passes_before(self, end: float) -> list[int]:
        """The numbers of passes, above 1, that begin before `end`, a fraction of the run."""
        span = max(self.iterations, 1)
        starts = [(when if when < 1 else when / span, n) for when, n in self.schedule()]
        return [n for start, n in starts if n > 1 and start < end]

    def truncated_passes(self) -> list[int]:
        """Those that begin within TRUNCATE_FRACTION and before QAT, which ends it."""
        return self.passes_before(min(self.truncate_fraction, self.rounding_begins))

    def before_truncation(self) -> str:
        """Why no pass is left for TRUNCATE_FRACTION."""
        if not self.passes_before(self.truncate_fraction):
            return f"PASSES_SCHEDULE={self.passes_schedule} has one pass until then"
        return (
            f"training rounds matrices from {self.rounding_begins:g} of the run on, by "
            f"QAT_FRACTION={self.qat_fraction} or QAT_LR_FACTOR={self.qat_lr_factor}"
        )

    @property
    def rounding_begins(self) -> float:
        """The fraction of the run from which QAT rounds; WARMDOWN_ITERS tells none beforehand."""
        return 1 - max(self.qat_fraction, self.qat_lr_factor * self.warmdown_fraction)

    @property
    def training_seconds(self) -> float:
        """When training ends: MAX_WALLCLOCK_SECONDS less GPTQ and refit; 0: no limit."""
        reserved = max(self.gptq_seconds, 0.0) if self.gptq_batches else 0.0
        reserved += self.refit_seconds if self.refit_steps else 0.0
        return max(self.max_wallclock_seconds - reserved, 0.0)

    @property
    def qat(self) -> bool:
        """Whether a part of the run trains on rounded matrices."""
        return self.qat_fraction > 0 or self.qat_lr_factor > 0

    @property
    def fits_by_clip(self) -> bool:
        """Whether export chooses the clip of matrices by the artifact's size."""
        return self.quant_clip == "sdclip" and not self.matrix_clip_sigmas

    def bits(self, name: str) -> int:
        """The stored width that option `name` says; CORE_BITS=0 means MATRIX_BITS."""
        return getattr(self, name) or self.matrix_bits

    def unmet_need(self, need: str) -> str:
        """What stands against one entry of `needs`, as in NUM_LOOPS=1; "" if nothing does."""
        return unmet_need(vars(self), need)

    def architecture(self) -> Architecture:
        return Architecture(**{f.name: getattr(self, f.name) for f in fields(Architecture)})


def unmet_need(values: Mapping[str, Any], need: str) -> str:
    """What stands against one entry of `needs` with these options; "" if nothing does."""
    unmet = [unmet_condition(values, condition) for condition in need.split("|")]
    return " and ".join(unmet) if all(unmet) else ""


def unmet_condition(values: Mapping[str, Any], need: str) -> str:
    """The same of an entry that names one option."""
    found = re.fullmatch(r"(!?)(\w+)([>=]?)(\w*)", need)
    assert found, need
    negated, name, sign, value = found.groups()
    actual = values[name]
    if sign == "=":
        met = (actual == value) != bool(negated)
    elif sign == ">":
        met = actual > int(value)
    else:
        met = bool(actual) != bool(negated)
    return "" if met else f"{name.upper()}={show(actual)}"


def off_values(option: Field) -> list[Any]:
    """The values of an option with which it does nothing."""
    values = ["", "none", option.metadata["neutral"]]
    return values if option.metadata["zero_acts"] else [*values, 0]


def without_inert(preset: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """A preset's values, less the techniques that cannot act beside the `explicit` options.

    PRESET=growing_live NUM_LOOPS=1 has no schedule of passes, and no scale for a second one.
    """
    options = Config.__dataclass_fields__
    defaults = {name: option.default for name, option in options.items()}
    techniques = {
        name: f.metadata["needs"].split()
        for name, f in options.items()
        if f.default in off_values(f)
    }
    while True:
        values = defaults | preset | explicit
        inert = [
            name
            for name in techniques.keys() & preset.keys() - explicit.keys()
            if any(unmet_need(values, need) for need in techniques[name])
        ]
        if not inert:
            return preset
        preset = {name: value for name, value in preset.items() if name not in inert}


@functools.cache
def option_types() -> dict[str, Any]:
    """The type of every option, by the name of its field."""
    return get_type_hints(Config)


def explicit_options(env: Mapping[str, str]) -> dict[str, Any]:
    """The options that are set in `env`, parsed."""
    kinds = option_types()
    found = {
        n: parse(n.upper(), env[n.upper()], kind) for n, kind in kinds.items() if n.upper() in env
    }
    # Its public name. It meant learned codes in series 4 of PR 855 and sinusoidal ones in series 5.
    if "USE_DEPTH_EMBED" in env:
        require("DEPTH_EMBED" not in env, "USE_DEPTH_EMBED and DEPTH_EMBED are both set; drop one")
        on = parse("USE_DEPTH_EMBED", env["USE_DEPTH_EMBED"], bool)
        found["depth_embed"] = "sinusoidal" if on else "none"
    return found


EVAL_OPTIONS = frozenset(
    """preset eval_only data_path tokenizer_path log_dir run_id tracker device compile attn_backend
    fused_mlp deterministic rank_timeout_seconds val_batch_size micro_batch_tokens size_limit_bytes
    eval_passes eval_stride eval_limit_seconds ttt_lr ttt_epochs ttt_chunk_tokens ttt_momentum
    ttt_grad_clip""".split()
)
# What may differ between a checkpoint and the run that goes on from it; ITERATIONS may grow, too.
MAY_DIFFER = EVAL_OPTIONS | frozenset(
    """resume save_every warmup_steps val_loss_every train_log_every max_skipped_steps""".split()
)
# How a model is rounded and packed, which training sees in QAT alone.
EXPORT_OPTIONS = frozenset(
    """matrix_bits core_bits embed_bits quant_clip matrix_clip_sigmas embed_clip_sigmas
    quant_clip_percentile quant_scale_floor gptq_batches gptq_seconds gptq_embed gptq_damping
    refit_steps refit_lr refit_seconds codec byte_shuffle""".split()
)
RESERVING = frozenset("gptq_batches gptq_seconds refit_steps refit_seconds".split())

# ---- 2. Plan -----------------------------------------------------------------------------------

NONE = -1  # an index that points at nothing


class Layer(NamedTuple):
    """One effective layer. Sharing is a repeated index: equal `attn` or `mlp` share weights."""

    row: int  # of the tables that condition effective layers: scale, shift, depth code
    attn: int  # index of the stored attention, and of the mix before it
    mlp: int  # index of the stored MLP
    gain: int = NONE  # row of the unique norm gains
    core: bool = False  # part of the core, so its attention is used in every pass
    opens: int = NONE  # the pass that begins here, by its number; beyond NUM_LOOPS, by the last
    closes: int = NONE  # the pass that ends here, likewise
    push: bool = False  # U-Net: its output is kept for a later layer
    skip: int = NONE  # U-Net: index of the weight of the kept output that is added to its input
    value: int = NONE  # row of the value embedding's scales
    xsa: bool = False  # exclusive self-attention
    parallel: bool = False  # attention and MLP read the same
    mix: bool = True  # x0 is mixed in before it


def make_plan(a: Architecture, passes: int = 0) -> tuple[Layer, ...]:
    """The effective layers: prelude, `passes` (0: NUM_LOOPS) times the core, coda.

    A layer has the same row at any number of passes, and passes beyond NUM_LOOPS have the rows of
    the last one. Without a core, the prelude and coda are the two halves of a flat U-Net.
    """
    prelude, core, _ = sections(a)
    pool, last = core_mlps(a), a.num_loops - 1
    value_rows = {index: row for row, index in enumerate(a.listed("ve_layers"))}
    parallel = a.listed("parallel_layers")
    layers = []
    for index, before, _ in visits(a, passes or a.num_loops):
        inside, behind = prelude <= index < prelude + core, index >= prelude + core
        visit = min(before, last)
        row = index + core * (last if behind else visit)
        mlp = index
        if inside:
            mlp = prelude + (row - prelude) % pool
        elif behind:
            mlp = index - core + pool
        layers.append(
            Layer(
                row,
                attn=index,
                mlp=mlp,
                gain=row - prelude if inside and a.use_unique_norms else NONE,
                core=inside,
                opens=visit if inside and index == prelude else NONE,
                closes=visit if inside and index == prelude + core - 1 else NONE,
                value=value_rows.get(index, NONE),
                xsa=index >= a.stored_layers - a.xsa_last_n,
                parallel=index in parallel,
                mix=index == prelude or not inside or not a.mix_once_a_pass,
            )
        )
    for source, target, row in skip_pairs(a, passes):
        layers[source] = layers[source]._replace(push=True)
        layers[target] = layers[target]._replace(skip=row)
    return tuple(layers)


def core_mlps(a: Architecture) -> int:
    """Stored MLPs of the core: one for each of its layers, one for each pass of it, or between."""
    if not a.num_shared:
        return 0
    if a.share_attn_only:
        return a.num_shared * a.num_loops
    return a.mlp_pool or a.num_shared


def sections(a: Architecture) -> tuple[int, int, int]:
    """Layers of prelude, core and coda; a flat U-Net has two halves and no core."""
    if a.num_shared:
        return a.num_prelude, a.num_shared, a.num_coda
    half = a.num_layers // 2
    return half, 0, a.num_layers - half


class Skip(NamedTuple):
    """A U-Net skip. Any two of a plan are nested or apart, so that kept outputs are a stack."""

    source: int  # the effective layer whose output is kept
    target: int  # the effective layer that takes it
    row: int  # of the weights


def skip_pairs(a: Architecture, passes: int) -> list[Skip]:
    """The U-Net skips of the plan with so many passes (0: NUM_LOOPS)."""
    prelude, core, coda = sections(a)
    passes = passes or a.num_loops
    if not core or a.core_skips == "all":
        number = min(prelude, coda)
    elif a.core_skips == "published":
        # PR 1230 adds a skip only while the tail layer's index is below the number of skips left.
        number = min((prelude + 1) // 2, coda)
    elif a.core_skips == "looped":
        return looped_skips(visits(a, a.num_loops), visits(a, passes))
    elif a.core_skips == "by_position":
        # At another number of passes a place has other partners (PR 1394), and a new place none.
        half = len(visits(a, passes)) // 2
        known = len(visits(a, a.num_loops)) // 2
        return [Skip(half - 1 - r, half + r, r) for r in range(min(half, known))]
    else:
        number = 0
    first = prelude + core * passes
    return [Skip(prelude - 1 - t, first + t, t) for t in range(number)]


class Visit(NamedTuple):
    """An effective layer by its stored layer and by how often that was visited."""

    layer: int
    before: int  # visits before this one
    after: int


def visits(a: Architecture, passes: int) -> list[Visit]:
    """The effective layers of the plan with so many passes."""
    prelude, core, coda = sections(a)
    inner = range(prelude, prelude + core)
    return (
        [Visit(i, 0, 0) for i in range(prelude)]
        + [Visit(i, p, passes - 1 - p) for p in range(passes) for i in inner]
        + [Visit(i, 0, 0) for i in range(prelude + core, prelude + core + coda)]
    )


def looped_skips(full: list[Visit], plan: list[Visit]) -> list[Skip]:
    """The skips of `plan`: those of the two halves of `full` whose ends are there, in their order.

    The visits of a source count from its first, those of a target from its last, so that a skip
    has the same partners, and the same weights, at any number of passes.
    """
    sources = {(v.layer, v.before): at for at, v in enumerate(plan)}
    targets = {(v.layer, v.after): at for at, v in enumerate(plan)}
    half, skips = len(full) // 2, []
    for row in range(half):
        kept, taker = full[half - 1 - row], full[half + row]
        source = sources.get((kept.layer, kept.before), len(plan))
        target = targets.get((taker.layer, taker.after), NONE)
        if source < target:
            skips.append(Skip(source, target, row))
    return skips


# ---- 3. Model ----------------------------------------------------------------------------------
# A gain on a matrix's input multiplies the columns of the matrix, a scale on its output the rows:
# W (g x) = (W g) x, and a weight is smaller than the data.


class Role(NamedTuple):
    """What is done with a kind of parameter."""

    optimizer: Literal["muon", "adam"]
    lr: str  # the option that is its learning rate
    bits: str = ""  # the option that is its stored width; "": float16
    decay: str = "adam_wd"  # the option that is its weight decay
    clip: str = ""  # the option that is its clip under QUANT_CLIP=sdclip; "": a percentile


ROLES = {
    "matrix": Role("muon", "matrix_lr", "matrix_bits", "muon_wd", "matrix_clip_sigmas"),
    "core matrix": Role("muon", "matrix_lr", "core_bits", "muon_wd", "matrix_clip_sigmas"),
    "tied embedding": Role("adam", "tied_embed_lr", "embed_bits", clip="embed_clip_sigmas"),
    "embedding": Role("adam", "embed_lr", "embed_bits", clip="embed_clip_sigmas"),
    "head": Role("adam", "head_lr", "embed_bits", clip="embed_clip_sigmas"),
    "side embedding": Role("adam", "tied_embed_lr", "embed_bits"),  # bigrams, values
    "projection": Role("adam", "scalar_lr", "embed_bits"),  # of side embeddings, error feedback
    "table": Role("adam", "scalar_lr", decay="scalar_wd"),  # a row for every effective layer
    "scalar": Role("adam", "scalar_lr", decay="scalar_wd"),  # a vector of one layer
}


def parameter(role: str, value: Tensor, parts: tuple[int, ...] = ()) -> nn.Parameter:
    """A float32 parameter with its role; `parts` are the row counts of matrices stacked in it."""
    p = nn.Parameter(value)
    p.role = role  # type: ignore[attr-defined]
    p.parts = parts or (len(value),)  # type: ignore[attr-defined]
    return p


def role_of(p: Tensor) -> Role:
    return ROLES[p.role]  # type: ignore[attr-defined]


def parts_of(p: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """The matrices stacked in `p`, as views of it, or of `like`, which has its shape."""
    return (p if like is None else like).split(p.parts)  # type: ignore[attr-defined]


def uniform(rows: int, columns: int) -> Tensor:
    """PyTorch's initial weights of a linear layer."""
    return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5)


class Rounding(NamedTuple):
    """Rounding of matrices in a forward pass (QAT)."""

    bits: int = 0  # 0: none
    floor: float = 0.0  # QUANT_SCALE_FLOOR
    search: bool = False  # rows saturate at the clip of least error, not at their largest weight
    sigmas: float = 0.0  # or at so many standard deviations


class Mode(NamedTuple):
    """How a forward pass runs. torch.compile makes one graph for each."""

    passes: int  # over the core
    outside: Rounding = Rounding()  # of matrices outside the core
    core: Rounding = Rounding()
    growth_weight: float = 0.0  # of the penalty on growth of the state in the core
    per_pass: bool = False  # penalise the growth of every pass
    truncated: bool = False  # the gradient goes around all passes but the last


def scored_mode(a: Architecture) -> Mode:
    """How a model is validated at the end, calibrated, refitted and scored."""
    return Mode(a.eval_passes or a.num_loops)


def max_level(bits: int) -> int:
    """The largest integer of symmetric rounding to `bits`."""
    return 2 ** (bits - 1) - 1


def row_steps(clip: Tensor, bits: int, floor: float) -> Tensor:
    """Rounding steps of rows that saturate at `clip`; `floor` is the smallest step at 8 bits."""
    levels = max_level(bits)
    return (clip / levels).clamp_min(max(floor * 127 / levels, 2.0**-24))  # above 0 for zeros, too


def round_to_steps(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """The integers, as float32, whose multiples of `step` are nearest to w.

    Training, export and GPTQ round with it.
    """
    levels = max_level(bits)
    return torch.round(w / step).clamp(-levels, levels)


def training_clip(w: Tensor, rounding: Rounding) -> Tensor:
    """Where the rows of w [r, c] saturate in training, [r, 1]: as in export where that is cheap.

    For QUANT_CLIP=row and sdclip the two grids are one, but for the float16 of export's steps. The
    rules of the reference differ: rows end at their largest weight, and export alone looks for
    quantiles (PR 1230). Training on the clips that export searches was .0037 bpb better (six seeds,
    five of them better, standard error .0021; 4 bits, D 64, 120 steps: records/qat_grid).
    """
    if rounding.sigmas:
        return rounding.sigmas * w.std(1, keepdim=True)
    if rounding.search:
        return least_error_clip(w, rounding.bits, rounding.floor)[:, None]
    return w.abs().amax(1, keepdim=True)


class Matrix(nn.Module):
    """A linear map without bias, which Muon trains and the quantiser rounds."""

    def __init__(self, value: Tensor, core: bool, parts: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = parameter("core matrix" if core else "matrix", value, parts)

    def forward(self, x: Tensor, factor: Tensor | float, rounding: Rounding) -> Tensor:
        """x [..., c] -> [..., r]; `factor` multiplies columns [c] or rows [r, 1] of the weight."""
        return F.linear(x, self.factored(factor, rounding).to(x.dtype))

    def factored(self, factor: Tensor | float, rounding: Rounding) -> Tensor:
        """The weight [r, c] as it is multiplied with, in float32."""
        w: Tensor = self.weight
        if rounding.bits:
            exact = w.detach()  # the gradient goes straight through (arXiv 1308.3432)
            step = row_steps(training_clip(exact, rounding), rounding.bits, rounding.floor)
            w = w + (round_to_steps(exact, step, rounding.bits) * step - exact)
        return w * factor


NORM_EPS = 1.1920929e-07  # PyTorch's default for float32, whatever the type that is normalised


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def normalise_heads(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm of each head of x [B, T, heads, E], times its gain [heads].

    The gain multiplies the norm's statistic in float32: it costs no pass over the data, and
    nothing of the normalised heads is kept for the backward pass.
    """
    wide = x.float()
    statistic = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return (wide * (statistic * gain[:, None])).to(x.dtype)


def rope_tables(a: Architecture) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, ROPE_DIMS / 2] of the rotary angles (arXiv 2104.09864), in float32."""
    half = (a.rope_dims or a.model_dim // a.num_heads) // 2
    frequency = a.rope_base ** (-torch.arange(half) / half)
    position = torch.arange(a.train_seq_len).float()
    if a.reference_bf16:  # leaves 513 distinct rotations for 1,024 positions
        frequency, position = frequency.bfloat16(), position.bfloat16()
    angle = torch.outer(position, frequency).float()[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, E]; channel i pairs with channel i + half."""
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """y [B, T, H, E] less its part along v [B, T, K, E].

    It is called exclusive self-attention (arXiv 2603.09078).
    """
    own = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
    y = y.unflatten(2, (v.shape[2], -1))
    return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal attention: q [B, H, T, E], k and v [B, K, T, E] -> [B, H, T, E]."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Causal attention: q [B, H, T, E], k and v [B, K, T, E] -> [B, H, T, E].

    On CUDA it is PyTorch's. On CPUs it multiplies blocks of queries with the keys up to their end,
    which leaves out half of the products and of the memory traffic.
    """
    if q.is_cuda:
        return torch_attention(q, k, v)
    (B, H, T, E), K = q.shape, k.shape[1]
    q = q.reshape(B * K, H // K, T, E)
    k = k.reshape(B * K, T, E)
    v = v.reshape(B * K, T, E)
    out = []
    for start in range(0, T, block):
        end = min(start + block, T)
        future = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1)
        rows = q[:, :, start:end].reshape(B * K, -1, E)
        scores = torch.baddbmm(future.repeat(H // K, 1), rows, k[:, :end].mT, alpha=E**-0.5)
        out.append((scores.softmax(-1) @ v[:, :end]).view(B, H, end - start, E))
    return torch.cat(out, dim=2)


class Modulation(NamedTuple):
    """What conditions one branch of an effective layer: [D] each, or a neutral [1] if off."""

    gain: Tensor  # on the input of its first matrix, float32
    gamma: Tensor  # on its output, float32
    beta: Tensor  # added to its output, DTYPE


class LayerConditioning(NamedTuple):
    """What conditions one effective layer."""

    attn: Modulation
    mlp: Modulation
    depth: Tensor  # code that is added to the stream: [D], or a neutral [1]; DTYPE


class Context(NamedTuple):
    """What an effective layer runs with besides the stream."""

    rounding: Rounding
    rope: tuple[Tensor, Tensor]  # cos and sin
    attention: Callable[..., Tensor]  # of q, k, v
    mlp: Callable[..., Tensor] | None = None  # both products and the activation; None: PyTorch's
    value: Tensor | None = None  # value embedding [B, T, K E] that is added to v
    xsa: bool = False
    parallel: bool = False


class Mix(nn.Module):
    """Adds x and x0 with two free weights a channel, or with a and 1 - a, a = sigmoid(w).

    The second is PR 855's "Birkhoff" mix: a doubly stochastic 2 x 2 matrix is a and 1 - a.
    """

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.convex = a.use_birkhoff_mix
        start = torch.stack((torch.ones(a.model_dim), torch.zeros(a.model_dim)))
        if self.convex:
            start = torch.full((a.model_dim,), a.mix_init)
        self.weight = parameter("scalar", start)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights of x and of x0, [D] each."""
        if self.convex:
            return torch.sigmoid(self.weight), torch.sigmoid(-self.weight)
        carried, anchor = self.weight.unbind()
        return carried, anchor

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        carried, anchor = (w.to(x.dtype) for w in self.weights())
        if self.convex:
            return torch.lerp(x0, x, carried)
        return torch.addcmul(x * carried, x0, anchor)


class NoMix(nn.Module):
    """The stream as it is, before layers inside a pass with MIX_ONCE_A_PASS=1."""

    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights of x and of x0."""
        return torch.ones(1), torch.zeros(1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        return x


class Attention(nn.Module):
    """Residual branch: pre-norm causal attention; q and k are normalised, q has a gain per head."""

    def __init__(self, a: Architecture, core: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = a.num_heads, a.num_kv_heads
        self.head_dim = a.model_dim // a.num_heads
        heads = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
        parts = tuple(n * self.head_dim for n in heads)
        self.qkv = Matrix(uniform(sum(parts), a.model_dim), core, parts)
        self.proj = Matrix(torch.zeros(a.model_dim, a.model_dim), core)
        self.q_gain = parameter("scalar", torch.full((a.num_heads,), a.qk_gain_init))
        self.scale = parameter("scalar", torch.ones(a.model_dim))
        self.gated = a.attn_gate_width > 0
        if self.gated:
            self.gate = parameter("scalar", torch.zeros(a.num_heads, a.attn_gate_width))

    def forward(self, x: Tensor, mod: Modulation, context: Context) -> Tensor:
        B, T, _ = x.shape
        H, K = self.num_heads, self.num_kv_heads
        h = rms_norm(x)
        qkv = self.qkv(h, mod.gain, context.rounding).view(B, T, -1, self.head_dim)
        qk, v = qkv.split((H + K, K), dim=2)
        if context.value is not None:
            v = v + context.value.view(v.shape)
        gain = F.pad(self.q_gain, (0, K), value=1.0)  # keys have a gain of 1
        qk = normalise_heads(qk, gain)
        qk = rotate(qk, *context.rope)
        q, k = qk.transpose(1, 2).split((H, K), dim=1)
        y = context.attention(q, k, v.transpose(1, 2)).transpose(1, 2)
        if context.xsa:
            y = without_own_value(y, v)
        if self.gated:
            y = y * self.open_gates(h, mod.gain)[..., None]
        scale = (self.scale * mod.gamma)[:, None]
        return x + self.proj(y.flatten(2), scale, context.rounding) + mod.beta

    def open_gates(self, h: Tensor, gain: Tensor) -> Tensor:
        """Factors of the heads [B, T, H], 0 to 2, by the first channels of h [B, T, D].

        With twice a sigmoid, heads start as they are without gates (PR 1667).
        """
        width = self.gate.shape[1]
        weight = (self.gate * gain[:width]).to(h.dtype)
        return 2 * torch.sigmoid(F.linear(h[..., :width], weight))


class MLP(nn.Module):
    """Residual branch: W2 leaky_relu(W1 x)^2, normalised at its input, its output or both."""

    def __init__(self, a: Architecture, core: bool, input_norm: bool) -> None:
        super().__init__()
        self.slope = a.leaky_relu_slope
        self.input_norm, self.output_norm = input_norm, a.use_peri_norm
        hidden = round(a.mlp_mult * a.model_dim)
        self.fc = Matrix(uniform(hidden, a.model_dim), core)
        self.proj = Matrix(torch.zeros(a.model_dim, hidden), core)
        self.scale = parameter("scalar", torch.ones(a.model_dim))

    def forward(
        self, x: Tensor, mod: Modulation, context: Context, read: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] plus the branch of `read`, or of x itself."""
        read = x if read is None else read
        h = rms_norm(read) if self.input_norm else read
        scale = self.scale * mod.gamma
        if self.output_norm:
            # Where W2 is 0, as at the start, the norm's gradient is 1 / sqrt(eps) = 2,900: only the
            # direction of a gradient matters to Muon.
            out = rms_norm(self.products(h, mod.gain, 1.0, context))
            return torch.addcmul(x + mod.beta, out, scale.to(x.dtype))  # x + beta + scale * out
        return x + self.products(h, mod.gain, scale[:, None], context) + mod.beta

    def products(self, x: Tensor, gain: Tensor, scale: Tensor | float, context: Context) -> Tensor:
        """W2 leaky_relu(W1 x)^2, with a gain on x and a scale of rows of W2."""
        if context.mlp is None:
            h = F.leaky_relu(self.fc(x, gain, context.rounding), self.slope).square()
            return self.proj(h, scale, context.rounding)
        w1 = self.fc.factored(gain, context.rounding).to(x.dtype)
        w2 = self.proj.factored(scale, context.rounding).to(x.dtype)
        return context.mlp(x, w1, w2, self.slope)


class LayerModules(NamedTuple):
    """The stored modules that one effective layer uses."""

    mix: nn.Module
    attn: nn.Module
    mlp: nn.Module


def block(
    layer: LayerModules, x: Tensor, x0: Tensor, cond: LayerConditioning, context: Context
) -> Tensor:
    """One effective layer, [B, T, D] -> [B, T, D]; COMPILE=block compiles it once for all alike."""
    start = layer.mix(x, x0) + cond.depth
    x = layer.attn(start, cond.attn, context)
    return layer.mlp(x, cond.mlp, context, start if context.parallel else None)


def head_loss(h: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean cross-entropy of softcap * tanh(h head^T / softcap).

    h [N, D], head [V, D], targets [N] of which those below 0 are left out.
    """
    weight = head.to(h.dtype)
    # A GPU and a compiler take all rows at once; a CPU so many that their logits stay in its cache.
    rows = len(h) if h.is_cuda or torch.compiler.is_compiling() else 512
    total = torch.zeros((), device=h.device)
    for x, y in zip(h.split(rows), targets.split(rows)):
        logits = softcap * torch.tanh(F.linear(x, weight).float() / softcap)
        total = total + F.cross_entropy(logits, y, reduction="sum")
    return total / (targets >= 0).sum()


class Ops(NamedTuple):
    """The operations of a forward pass that COMPILE, ATTN_BACKEND and FUSED_MLP replace."""

    attention: Callable[..., Tensor] = attention
    mlp: Callable[..., Tensor] | None = None
    block: Callable[..., Tensor] = block
    loss: Callable[..., Tensor] = head_loss


PLAIN_OPS = Ops()


class SideEmbedding(nn.Module):
    """A narrow table [N, d] and its scaled projection: bigrams into the stream, tokens into v."""

    def __init__(self, rows: int, width: int, out: int, scale: float) -> None:
        super().__init__()
        self.table = parameter("side embedding", 0.01 * torch.randn(rows, width))
        self.proj = parameter("projection", uniform(out, width))
        self.scale = parameter("scalar", torch.full((1,), scale))

    def forward(self, index: Tensor) -> Tensor:
        # The table is projected, not what is looked up: it has fewer rows than a batch has tokens.
        return F.embedding(index, F.linear(self.table, self.proj * self.scale))


def bigram_index(ids: Tensor, buckets: int) -> Tensor:
    """Bucket of each token of ids [B, T] and the one before it (PR 549).

    A first token has the last bucket.
    """
    mixed = (36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])
    return F.pad(mixed % (buckets - 1), (1, 0), value=buckets - 1)


def weighted_sum(terms: Iterable[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """sum_i weights[i] * terms[i]: terms [B, T, D], weights of any shape that fits."""
    total: Tensor | None = None
    for term, weight in zip(terms, weights):
        weight = weight.to(term.dtype)
        total = term * weight if total is None else torch.addcmul(total, term, weight)
    assert total is not None
    return total


class PassEntry(NamedTuple):
    """What a pass over the core begins with."""

    x: Tensor  # the state [B, T, D]
    bypass: Sequence[Tensor] = ()  # of each lane, what does not go through the pass
    write: Sequence[Tensor] = ()  # of each lane, the weight of what the pass comes to


class LaneWeights(NamedTuple):
    """The weights of one pass, by lane: [1], [D] or, for each token, [B, T, D]."""

    read: Sequence[Tensor]  # [j]
    mix: Sequence[Sequence[Tensor]]  # [i][j], from lane j to lane i
    write: Sequence[Tensor]  # [j]


class Lanes(nn.Module):
    """Residual streams that meet only between passes, with weights for each pass (LANE_WEIGHTS).

    Hyper-connections (arXiv 2409.19606) around the core as a whole. Pass p takes
    x = sum_j read[p, j] h_j to y, then h_i <- sum_j mix[p, i, j] h_j + write[p, i] (y - x). The
    coda takes sum_j coda[j] h_j. At first this is the loop with one stream, to the last bit: every
    lane is written whole, and so equal. Passes read one lane each, in turn: read alike, the lanes
    would have equal gradients and stay equal for ever.

    With LANE_WEIGHTS=token (dynamic hyper-connections), what lane j gives and takes is increased by
    tanh(W[p] rms_norm(h_j) / D^0.5): a number each for read[j], write[j] and the mix[i, j], and 0
    at first. The paper learns a factor of the tanh, from 0.01, in place of D^-0.5; W has the
    learning rate of scalars here.
    """

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        P, N, D = a.num_loops, a.loop_lanes, a.model_dim
        width = 1 if a.lane_weights == "scalar" else D
        turn = torch.eye(N)[torch.arange(P) % N]  # [P, N]
        self.read = parameter("scalar", turn[:, :, None].repeat(1, 1, width))
        self.mix = parameter("scalar", torch.eye(N)[None, :, :, None].repeat(P, 1, 1, width))
        self.write = parameter("scalar", torch.ones(P, N, width))
        self.coda = parameter("scalar", torch.full((N, width), 1 / N))
        self.by_token = a.lane_weights == "token"
        if self.by_token:
            self.proj = parameter("projection", torch.zeros(P * (2 + N), D))

    def of_pass(self, lanes: Sequence[Tensor], number: int) -> LaneWeights:
        """The weights of pass `number` for lanes [B, T, D]."""
        dtype = lanes[0].dtype
        read, mix, write = (w[number].to(dtype) for w in (self.read, self.mix, self.write))
        if not self.by_token:
            return LaneWeights(read.unbind(), [row.unbind() for row in mix], write.unbind())
        D = self.proj.shape[1]
        proj = self.proj.view(len(self.read), -1, D)[number] * D**-0.5
        parts = [  # of each lane, [B, T, 1] for read, write and every mix[i]
            F.linear(rms_norm(lane), proj.to(dtype)).tanh().split(1, dim=-1) for lane in lanes
        ]
        return LaneWeights(
            read=[weight + part[0] for weight, part in zip(read, parts)],
            write=[weight + part[1] for weight, part in zip(write, parts)],
            mix=[
                [weight + part[2 + i] for weight, part in zip(row, parts)]
                for i, row in enumerate(mix)
            ],
        )

    def take(self, lanes: Sequence[Tensor], number: int) -> PassEntry:
        """What pass `number` takes of the lanes, and what of each lane does not go through it.

        The latter is sum_j mix[i, j] h_j - write[i] x, so that `put` adds only write[i] y: at first
        it is 0, and no rounding of y - x is left in the lanes.
        """
        weights = self.of_pass(lanes, number)
        x = weighted_sum(lanes, weights.read)
        bypass = [
            torch.addcmul(weighted_sum(lanes, mix), x, write, value=-1)
            for mix, write in zip(weights.mix, weights.write)
        ]
        return PassEntry(x, bypass, weights.write)

    def put(self, entry: PassEntry, y: Tensor) -> list[Tensor]:
        """The lanes after the pass that began with `entry` and came to y."""
        return [torch.addcmul(h, y, write) for h, write in zip(entry.bypass, entry.write)]


class PassBoundary(nn.Module):
    """What happens to the state between two passes over the core (PR 1230).

    Passes are counted from 0. Lanes act on every pass, everything else from the second pass,
    number 1, on.
    """

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        D, rank = a.model_dim, a.feedback_rank
        self.lanes = Lanes(a) if a.loop_lanes > 1 else None
        self.norm, self.scaled, self.feedback = a.interpass_norm, a.pass_scale_init != 1, rank > 0
        if self.scaled:
            self.scale = parameter("scalar", torch.full((a.num_loops - 1,), a.pass_scale_init))
        if self.feedback:
            # Only U starts at 0. Published with V and d at 0 as well, all gradients are 0 for ever.
            self.v = parameter("projection", torch.randn(D, rank) * D**-0.5)
            self.u = parameter("projection", torch.zeros(D, rank))
            self.diagonal = parameter("scalar", torch.ones(D))

    def enter(self, x: Tensor, lanes: Sequence[Tensor], number: int) -> PassEntry:
        """What pass `number` begins with, of the state x [B, T, D] and the lanes.

        `lanes` are those that the pass before left, or none: then all begin as x.
        """
        if self.lanes is None:
            return PassEntry(self.prepare(x, number))
        entry = self.lanes.take(lanes or [x] * len(self.lanes.coda), number)
        return entry._replace(x=self.prepare(entry.x, number))

    def prepare(self, x: Tensor, number: int) -> Tensor:
        """The state x normalised and corrected, as a further pass takes it."""
        if number == 0:
            return x
        if self.norm:
            x = rms_norm(x)
        if self.feedback:
            back = (self.u * self.diagonal[:, None]).to(x.dtype)
            x = x + F.linear(x @ self.v.to(x.dtype), back)
        return x

    def leave(self, entry: PassEntry, x: Tensor, number: int) -> tuple[Tensor, Sequence[Tensor]]:
        """The state as the coda reads it, and the lanes, after pass `number` took `entry` to x."""
        if self.scaled and number > 0:
            x = torch.lerp(entry.x, x, self.scale[number - 1].to(x.dtype))
        if self.lanes is None:
            return x, ()
        lanes = self.lanes.put(entry, x)
        return weighted_sum(lanes, self.lanes.coda), lanes

    def unused_in_one_pass(self) -> list[nn.Parameter]:
        """The parameters that act from the second pass on: all but those of the lanes."""
        return list(self.parameters(recurse=False))

    def pass_scale(self, number: int) -> float:
        """alpha of pass `number`; 1 where there is none."""
        return self.scale[number - 1].item() if self.scaled and number > 0 else 1.0


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """`value`, whose gradient goes to `path` instead (arXiv 1308.3432)."""
    return value.detach() + (path - path.detach())


def growth_penalty(before: Tensor, after: Tensor) -> Tensor:
    """relu(|after - before| / |before| - 1)^2, Frobenius norms over a micro-batch (PR 1230)."""
    change = after.float() - before.float()
    return F.relu(change.norm() / (before.float().norm() + 1e-6) - 1).square()


class Conditioning(nn.Module):
    """Tables by effective layer: gamma and beta, depth code, norm gains.

    Sources: "On expressive power of looped transformers" (arXiv 2410.01405) for a scale by
    timestep, FiLM (arXiv 1709.07871) for the shift.
    """

    gamma: Tensor  # [R, 2, D], for attention and MLP, like beta
    beta: Tensor
    gain: Tensor  # [rows of the core, 2, D]
    no_gain: Tensor
    gain_row: Tensor  # [R], rows of no_gain and gain, one above the other
    depth: Tensor  # [R, D]
    scale_in: Tensor  # [R, 2, 1]
    scale_out: Tensor

    def __init__(self, a: Architecture, plan: tuple[Layer, ...]) -> None:
        super().__init__()
        R, D = len(plan), a.model_dim
        gains = max(layer.gain for layer in plan) + 1
        self.cap = a.timestep_gamma_max or math.inf
        self.add("gamma", a.use_timestep_scale, torch.ones(R, 2, D if a.use_timestep_scale else 1))
        self.add("beta", a.use_timestep_bias, torch.zeros(R, 2, D if a.use_timestep_bias else 1))
        self.add("gain", gains > 0, torch.ones(gains, 2, D if gains else 1))
        self.add("no_gain", False, torch.ones(1, *self.gain.shape[1:]))
        self.add("gain_row", False, torch.tensor([layer.gain + 1 for layer in plan]))
        self.add("depth", a.depth_embed == "learned", depth_code(a.depth_embed, R, D))
        # LN_SCALE multiplies norms: of the inputs, and under Output-LN of the MLP's output.
        scale_in, scale_out = torch.ones(R, 2, 1), torch.ones(R, 2, 1)
        if a.ln_scale:
            scale = torch.tensor([layer.attn + 1.0 for layer in plan])[:, None] ** -0.5
            scale_in[:, 0] = scale
            mlp = scale_out if a.use_peri_norm else scale_in
            mlp[:, 1] = scale
        if a.core_branch_scale:
            # The updates of shared weights are alike, so N passes add up to N of them: 1 / N, not
            # the 1 / N^0.5 of layers of their own (arXiv 2606.18524).
            rows = [layer.row for layer in plan if layer.core]
            scale_out[rows] *= a.core_branch_scale / (a.num_loops * a.num_shared**0.5)
        self.add("scale_in", False, scale_in)
        self.add("scale_out", False, scale_out)

    def add(self, name: str, learned: bool, value: Tensor) -> None:
        """A table that is learned, or a constant that no artifact carries."""
        if learned:
            self.register_parameter(name, parameter("table", value))
        else:
            self.register_buffer(name, value, persistent=False)

    def rows(self, plan: tuple[Layer, ...], dtype: torch.dtype) -> list[LayerConditioning]:
        """For every effective layer of `plan`, what conditions it."""
        gain = (torch.cat((self.no_gain, self.gain))[self.gain_row] * self.scale_in).unbind()
        gamma = (self.gamma.clamp(-self.cap, self.cap) * self.scale_out).unbind()
        beta = self.beta.to(dtype).unbind()
        depth = self.depth.to(dtype).unbind()

        def row(i: int) -> LayerConditioning:
            attn, mlp = (
                Modulation(gain[i][branch], gamma[i][branch], beta[i][branch]) for branch in (0, 1)
            )
            return LayerConditioning(attn, mlp, depth[i])

        return [row(layer.row) for layer in plan]


def depth_code(kind: str, rows: int, width: int) -> Tensor:
    """Codes added to the stream [R, D]: none, sin(row / 10000^(i/D)), or zeros to be learned.

    PR 855 has sines only, so the first row is 0.
    """
    if kind == "none":
        return torch.zeros(rows, 1)
    if kind == "learned":
        return torch.zeros(rows, width)
    return torch.sin(torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(width) / width))


BOS = 1  # the token that begins every document


def modules(members: Iterable[Any]) -> Any:
    """An nn.ModuleList, whose members keep their types in the eyes of a type checker."""
    return nn.ModuleList(members)


class GPT(nn.Module):
    """The layers of `make_plan` between embedding and head.

    Initial weights are drawn from torch's global random generator.
    """

    rope: Tensor

    def __init__(
        self, a: Architecture, tied_embed_std: float = 0.0, orthogonal: bool = False
    ) -> None:
        super().__init__()
        trained, self.scoring = make_plan(a), scored_mode(a)
        most = max(a.num_loops, self.scoring.passes)
        self.plans = {p: make_plan(a, p) for p in range(1, most + 1)}
        self.dtype: torch.dtype = getattr(torch, a.dtype)
        self.softcap, self.smear, self.buckets = a.logit_softcap, a.smear_gate, a.bigram_vocab_size
        V, D = a.vocab_size, a.model_dim
        self.tied = a.tie_embeddings
        if self.tied:
            self.tok_emb = parameter("tied embedding", torch.randn(V, D) * tied_embed_std)
        else:
            self.tok_emb = parameter("embedding", torch.randn(V, D))
            self.lm_head = parameter("head", torch.zeros(V, D))
        attns = {layer.attn: layer for layer in trained}
        mlps = {layer.mlp: layer for layer in trained}
        self.mix = modules(Mix(a) if layer.mix else NoMix() for layer in attns.values())
        self.attn = modules(Attention(a, layer.core) for layer in attns.values())
        self.mlp = modules(MLP(a, x.core, has_input_norm(a, x)) for x in mlps.values())
        self.cond = Conditioning(a, trained)
        self.core = PassBoundary(a)  # its parameters are named core.* in artifacts
        skips = [layer for layer in trained if layer.push]
        self.skip = nn.ParameterList(parameter("scalar", torch.ones(D)) for _ in skips)
        self.gated_skips = a.skip_gates
        gates = skips if a.skip_gates else []
        self.skip_gate = nn.ParameterList(parameter("scalar", torch.zeros(D)) for _ in gates)
        if self.smear != "none":
            self.smear_gate = parameter("scalar", torch.zeros(D))
        if self.buckets:
            self.bigram = SideEmbedding(self.buckets, a.bigram_dim, D, 0.05)
        self.has_values = any(layer.value != NONE for layer in trained)
        if self.has_values:
            self.value = SideEmbedding(V, a.ve_dim, D // a.num_heads * a.num_kv_heads, 0.1)
            self.value_scale = parameter("scalar", torch.ones(1 + max(x.value for x in trained)))
        self.register_buffer("rope", torch.stack(rope_tables(a)), persistent=False)
        if orthogonal:
            self.draw_orthogonal()

    def draw_orthogonal(self) -> None:
        """Draws anew the matrices that do not start at zero."""
        for module in self.modules():
            if isinstance(module, Matrix) and module.weight.any():
                for part in parts_of(module.weight, like=module.weight.data):
                    nn.init.orthogonal_(part)

    def embed(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of ids [B, T]: x0 [B, T, D], and the value embeddings [B, T, K E], one for each row."""
        if self.buckets:
            bigram = self.bigram(bigram_index(ids, self.buckets))
            x = rms_norm(F.embedding(ids, self.tok_emb) + bigram)
        else:  # the same for less work: a table has fewer rows than a batch has tokens
            x = F.embedding(ids, rms_norm(self.tok_emb))
        x = x.to(self.dtype)
        if self.smear != "none":
            share = torch.sigmoid(self.smear_gate).to(x.dtype)
            if self.smear == "document":
                # A document's first token takes nothing from the one before.
                share = share * (ids != BOS)[..., None]
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
            x = torch.lerp(x, before, share)
        if not self.has_values:
            return x, []
        value = self.value(ids)
        return x, [(value * scale).to(self.dtype) for scale in self.value_scale]

    def hidden(
        self, ids: Tensor, mode: Mode, ops: Ops = PLAIN_OPS
    ) -> tuple[Tensor, Tensor | float]:
        """Normalised last state [B, T, D] of ids [B, T], and the weighted penalty on growth."""
        plan = self.plans[mode.passes]
        conditions = self.cond.rows(plan, self.dtype)
        cos, sin = self.rope[:, : ids.shape[1]].to(self.dtype).unbind()
        x0, values = self.embed(ids)
        x = x0.clone()  # a compiled block with one tensor as x and x0 would be another graph
        kept: list[Tensor] = []  # for U-Net skips
        starts: list[Tensor] = []  # of passes over the core
        ends: list[Tensor] = []
        lanes: Sequence[Tensor] = ()  # between passes, with LOOP_LANES=2
        begun, kept_before = x0, 0  # the state before the first pass; the outputs kept until then
        for i, (layer, cond) in enumerate(zip(plan, conditions)):
            if layer.skip != NONE:
                taken = kept.pop()
                x = self.with_skip(x, taken, layer.skip)
                if layer.opens > 0:  # with lanes, a further pass reads these and not x
                    lanes = [self.with_skip(lane, taken, layer.skip) for lane in lanes]
            if layer.opens == 0:
                begun, kept_before = x, len(kept)
            if mode.truncated and layer.opens == mode.passes - 1:
                path = self.mixed_alone(begun, x0, plan[:i])
                x = straight_through(x, path)
                lanes = [straight_through(lane, path) for lane in lanes]
                kept[kept_before:] = [straight_through(y, path) for y in kept[kept_before:]]
            if layer.opens != NONE:
                entry = self.core.enter(x, lanes, layer.opens)
                x = entry.x
                starts.append(x)
            stored = LayerModules(self.mix[layer.attn], self.attn[layer.attn], self.mlp[layer.mlp])
            context = Context(
                rounding=mode.core if layer.core else mode.outside,
                rope=(cos, sin),
                attention=ops.attention,
                mlp=ops.mlp,
                value=values[layer.value] if layer.value != NONE else None,
                xsa=layer.xsa,
                parallel=layer.parallel,
            )
            x = ops.block(stored, x, x0, cond, context)
            if layer.closes != NONE:
                x, lanes = self.core.leave(entry, x, layer.closes)
                ends.append(x)
            if layer.push:
                kept.append(x)
        return rms_norm(x), self.penalty(mode, starts, ends)

    def mixed_alone(self, begun: Tensor, x0: Tensor, layers: Iterable[Layer]) -> Tensor:
        """What the core's among `layers` make of the state `begun` if nothing else acts on it.

        That is the guess at what passes do to a gradient. At the start, where no branch adds
        anything, it is what they do, but for skips into them and norms between them. Over eight
        layers a mix of halves leaves 1 / 256. Without this path the prelude would have no gradient.
        """
        carried, anchor = torch.ones_like(x0[0, 0]), torch.zeros_like(x0[0, 0])  # [D]
        for layer in layers:
            if layer.core and layer.mix:
                of_x, of_x0 = (w.detach().to(x0.dtype) for w in self.mix[layer.attn].weights())
                carried, anchor = of_x * carried, of_x * anchor + of_x0
        return torch.addcmul(begun * carried, x0, anchor)

    def with_skip(self, x: Tensor, kept: Tensor, row: int) -> Tensor:
        """x with an earlier layer's output, added or mixed in, by the weights of `row`."""
        weight = self.skip[row].to(x.dtype)
        if not self.gated_skips:
            return torch.addcmul(x, kept, weight)
        return torch.lerp(kept * weight, x, torch.sigmoid(self.skip_gate[row]).to(x.dtype))

    def idle(self, mode: Mode) -> list[nn.Parameter]:
        """Parameters that have no gradient in this mode, and in others do."""
        running = taking = plan = self.plans[mode.passes]
        if mode.truncated:  # the gradient goes around all passes but the last
            opens = [layer.opens for layer in plan]
            first, last = opens.index(0), opens.index(mode.passes - 1)
            running = plan[:first] + plan[last:]
            taking = plan[: first + 1] + plan[last + 1 :]  # skips are added before a pass
        used = {layer.mlp for layer in running}
        mlps = [p for i, mlp in enumerate(self.mlp) if i not in used for p in mlp.parameters()]
        taken = {layer.skip for layer in taking}
        rows = [row for row in range(len(self.skip)) if row not in taken]
        skips = [self.skip[row] for row in rows]
        gates = [self.skip_gate[row] for row in rows if self.gated_skips]
        between = self.core.unused_in_one_pass() if mode.passes == 1 else []
        return [*mlps, *skips, *gates, *between]

    def uses(self, passes: int) -> collections.Counter[nn.Parameter]:
        """How many effective layers multiply by each matrix."""
        count: collections.Counter[nn.Parameter] = collections.Counter()
        for layer in self.plans[passes]:
            attn, mlp = self.attn[layer.attn], self.mlp[layer.mlp]
            count.update(m.weight for m in (attn.qkv, attn.proj, mlp.fc, mlp.proj))
        return count

    def penalty(self, mode: Mode, starts: list[Tensor], ends: list[Tensor]) -> Tensor | float:
        """The weighted mean penalty on growth over all passes, or over each; 0 without a core."""
        if not mode.growth_weight or not starts:
            return 0.0
        if not mode.per_pass:
            starts, ends = starts[:1], ends[-1:]
        penalties = [growth_penalty(start, end) for start, end in zip(starts, ends)]
        return mode.growth_weight * (sum(penalties) / len(penalties))

    def forward(self, ids: Tensor, targets: Tensor, mode: Mode, ops: Ops = PLAIN_OPS) -> Tensor:
        """What is minimised: mean cross-entropy in nats of targets [B, T] given ids [B, T], of
        which -100 is left out, and the weighted penalty on growth."""
        x, penalty = self.hidden(ids, mode, ops)
        head = self.tok_emb if self.tied else self.lm_head  # the table as it is, not normalised
        return ops.loss(x.flatten(0, 1), head, targets.flatten(), self.softcap) + penalty


def has_input_norm(a: Architecture, layer: Layer) -> bool:
    """Whether the MLP of `layer` is normalised at its input."""
    return not a.use_peri_norm or (a.unique_norms_input_norm and layer.gain != NONE)


def triton_module() -> Any:
    try:
        return importlib.import_module("triton")
    except ImportError:
        raise InputError("FUSED_MLP=1 needs triton: pip install -U triton") from None


@functools.cache
def mlp_kernel() -> Any:
    """The kernel of `fused_mlp`; a function, as its decorator and language are Triton's.

    It has the activation inside: W1 x is not read again to be activated, and its gradient not for
    the derivative.

    It multiplies x [M, K] by w^T, w [N, K] with any strides, in tiles. In the forward pass the
    product goes to z [M, N] and h = leaky_relu(z)^2 to out. In the backward pass the product is
    the gradient of h; z is read, and its gradient goes to out.
    """
    triton = triton_module()
    tl = importlib.import_module("triton.language")

    @triton.jit
    @no_type_check  # Triton compiles it, its types are not Python's
    def product(
        x,
        w,
        z,
        out,
        M,
        N,
        K,
        w_row,
        w_column,
        BACKWARD: tl.constexpr,
        SLOPE: tl.constexpr,
        TILE: tl.constexpr,
        STEP: tl.constexpr,
    ):
        across = tl.cdiv(N, TILE)  # tiles of a row are neighbours: they find x in the cache
        row = tl.program_id(0) // across * TILE + tl.arange(0, TILE)[:, None].to(tl.int64)
        column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)[None, :]
        total = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, K, STEP):
            k = start + tl.arange(0, STEP)
            left = (row < M) & (k[None, :] < K)
            right = (k[:, None] < K) & (column < N)
            a = tl.load(x + row * K + k[None, :], left, other=0.0)
            b = tl.load(w + column * w_row + k[:, None] * w_column, right, other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")  # float32 stays float32
        inside = (row < M) & (column < N)
        if BACKWARD:
            before = tl.load(z + row * N + column, inside, other=0.0).to(tl.float32)
            result = total * 2 * tl.where(before > 0, before, SLOPE * SLOPE * before)
        else:
            rounded = total.to(z.dtype.element_ty)
            tl.store(z + row * N + column, rounded, inside)
            before = rounded.to(tl.float32)  # as the backward pass will find it
            leaky = tl.where(before > 0, before, SLOPE * before)
            result = leaky * leaky
        tl.store(out + row * N + column, result.to(out.dtype.element_ty), inside)

    return product


@functools.cache
def fused_mlp() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """W2 leaky_relu(W1 x)^2 of x [..., D], W1 [F, D] and W2 [D, F], with a gradient.

    It is an operation of PyTorch, whose graphs take it as any other.
    """
    kernel = torch.library.wrap_triton(mlp_kernel())
    # For sm_90 ptxas takes 118 registers a thread: nothing spills and two tiles are on a
    # multiprocessor. Four warps would take 254 and spill. An H200 takes 49.3 ms for a step of T
    # with it and 46.5 without (records/h200), so it is off by default.
    tile, step, warps = 128, 64, 8

    def product(x: Tensor, w: Tensor, z: Tensor, slope: float, backward: bool) -> Tensor:
        out = torch.empty_like(z)
        (M, K), N = x.shape, len(w)
        grid = (-(-M // tile) * -(-N // tile),)
        sizes = M, N, K, *w.stride()
        kernel[grid](x, w, z, out, *sizes, backward, slope, tile, step, num_warps=warps)
        return out

    @torch.library.triton_op("train_gpt::mlp", mutates_args=())
    def mlp(x: Tensor, w1: Tensor, w2: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and what the backward pass takes: W1 x and its activation."""
        z = x.new_empty(len(x), len(w1))
        h = product(x, w1, z, slope, False)
        return F.linear(h, w2), z, h

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w1, w2, ctx.slope = inputs
        ctx.save_for_backward(x, w1, w2, *output[1:])
        ctx.set_materialize_grads(False)  # nothing else takes z and h

    def gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, w1, w2, z, h = ctx.saved_tensors
        grad = grad.contiguous()
        dz = product(grad, w2.T, z, ctx.slope, True)
        return dz @ w1, dz.T @ x, grad.T @ h, None

    mlp.register_autograd(gradients, setup_context=keep)

    def apply(x: Tensor, w1: Tensor, w2: Tensor, slope: float) -> Tensor:
        out, _, _ = mlp(x.flatten(0, -2).contiguous(), w1, w2, slope)
        return out.view(x.shape)

    return apply


# ---- 4. Optimizers -----------------------------------------------------------------------------


KELLER_JORDAN = ((3.4445, -4.7750, 2.0315),)  # kellerjordan.github.io/posts/muon
# arXiv 2505.16932, as PR 1344 rounds them.
POLAR_EXPRESS = (
    (8.156554, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def newton_schulz(x: Tensor, steps: int, polar: bool = False) -> Tensor:
    """Moves the singular values s of [N, r, c], r <= c, towards 1, by a s + b s^3 + c s^5.

    Five iterations bring them to 0.7 to 1.2, or with `polar` nearer. The last coefficients are
    those of all further iterations.
    """
    coefficients = POLAR_EXPRESS if polar else KELLER_JORDAN
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def normalise_rows(directions: tuple[Tensor, ...] | list[Tensor]) -> None:
    """Divides every row, of an output unit, by its norm (MuonEq-R, arXiv 2603.28254)."""
    norms = [direction.norm(dim=1, keepdim=True) for direction in directions]
    torch._foreach_clamp_min_(norms, 1e-7)
    torch._foreach_div_(directions, norms)


class Update(NamedTuple):
    """What Muon does to one matrix, which is wide: a tall one is its transpose."""

    weight: Tensor
    direction: Tensor  # before it is orthogonalised
    rate: float


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: W <- (1 - lr decay) W - lr max(1, rows/columns)^0.5 NS(u).

    Matrices of one shape, wide or tall, are iterated as one stack; the parts of a parameter
    (q, k, v) are matrices of their own.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float,
        steps: int,
        decay: float = 0.0,
        row_norm: bool = False,
        polar: bool = False,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.steps, self.decay, self.row_norm, self.polar = steps, decay, row_norm, polar
        # Of learning rates, 1 where there is none; with 0 a step leaves a matrix as it is, decay
        # and all.
        self.factors: dict[nn.Parameter, float] = {}
        self.state.update({p: dict(velocity=torch.zeros_like(p)) for p in params})
        self.dtype = torch.bfloat16 if params[0].is_cuda else torch.float32
        self.iterate: Callable[..., Tensor] = newton_schulz

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            rates = [group["lr"] * self.factors.get(p, 1.0) for p in params]
            grads = [p.grad for p in params]
            velocities = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(params, [1 - rate * self.decay for rate in rates])
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, grads)
            directions = torch._foreach_add(grads, velocities, alpha=group["momentum"])
            if self.row_norm:
                normalise_rows(directions)
            for stack in self.stacks(params, directions, rates):
                self.apply(stack)

    def stacks(
        self, params: list[nn.Parameter], directions: Iterable[Tensor], rates: list[float]
    ) -> Iterable[list[Update]]:
        """The updates of all matrices, those of one shape together."""
        by_shape: dict[tuple[int, ...], list[Update]] = {}
        for p, direction, lr in zip(params, directions, rates):
            for w, u in zip(parts_of(p), parts_of(p, direction)):
                rows, columns = w.shape
                rate = -lr * max(1.0, rows / columns) ** 0.5
                update = Update(w.mT, u.mT, rate) if rows > columns else Update(w, u, rate)
                by_shape.setdefault(tuple(update.weight.shape), []).append(update)
        return by_shape.values()

    def apply(self, stack: list[Update]) -> None:
        batch = torch.stack([update.direction for update in stack]).to(self.dtype)
        steps = self.iterate(batch, self.steps, self.polar).float().unbind()
        steps = torch._foreach_mul(steps, [update.rate for update in stack])
        torch._foreach_add_([update.weight for update in stack], steps)


class Adam(torch.optim.AdamW):
    """AdamW whose scalars and tables decay only where they have a gradient.

    The rows of a later pass have a gradient of 0 until that pass is trained. In `frontier` plain
    decay would by then have halved gains of 1: .02 x .02 a step, some 2,000 steps.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["masked_decay"]:
                mask = torch._foreach_sign([p.grad for p in params])
                torch._foreach_abs_(mask)  # 1 where there is a gradient, else 0
                rate = group["lr"] * group["masked_decay"]
                torch._foreach_addcmul_(params, params, mask, value=-rate)
        super().step()


class Optimizers(NamedTuple):
    """Every parameter belongs to exactly one of them, by its role."""

    adam: Adam
    muon: Muon


def make_optimizers(model: GPT, config: Config) -> Optimizers:
    params = list(model.parameters())
    groups = []
    for name, role in ROLES.items():
        if role.optimizer == "adam":
            lr, decay = getattr(config, role.lr), getattr(config, role.decay)
            members = [p for p in params if p.role == name]  # type: ignore[attr-defined]
            group = dict(params=members, lr=lr, weight_decay=decay, masked_decay=0.0)
            if role.decay == "scalar_wd":
                group |= dict(weight_decay=0.0, masked_decay=decay)
            groups.append(group)
    adam = Adam(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
    for group in adam.param_groups:
        for p in group["params"]:  # made now, so that checkpoints always have one form
            adam.state[p] = dict(
                step=p.new_zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
            )
    muon = Muon(
        [p for p in params if role_of(p).optimizer == "muon"],
        lr=config.matrix_lr,
        momentum=config.muon_momentum,
        steps=config.muon_backend_steps,
        decay=config.muon_wd,
        row_norm=config.muon_row_norm,
        polar=config.muon_polar,
    )
    return Optimizers(adam, muon)


# ---- 5. Rounding and artifact ------------------------------------------------------------------
# An artifact is a sealed file (section 10): a header with the architecture and, for every
# parameter, its name and how it is stored; then the values in that order. Shapes follow from the
# architecture. An integer takes a byte at any width: from 5 bits on, lzma makes less of it than
# packed bits are.

ARTIFACT = "model.ptz"  # in the run's folder
ARTIFACT_LIMIT = 1 << 28  # bytes, decompressed


def quantize_rows(w: Tensor, clip: Tensor, bits: int, floor: float) -> tuple[Tensor, Tensor]:
    """Integers as int8 [r, c] and float16 steps [r] of w [r, c]; rows saturate at `clip` [r]."""
    step = row_steps(clip, bits, floor)
    stored = step.half()
    # At 8 bits PR 855 and PR 1230 divide by the step before it is rounded, and so does this.
    if bits < 8:
        step = stored.float()
    clipped = w.clamp(-clip[:, None], clip[:, None])
    return round_to_steps(clipped, step[:, None], bits).to(torch.int8), stored


def dequantize_rows(q: Tensor, step: Tensor) -> Tensor:
    return q.float() * step.float()[:, None]


def row_clip(w: Tensor, bits: int, config: Config, role: Role = ROLES["matrix"]) -> Tensor:
    """Where the rows of w [r, c] saturate, [r], as QUANT_CLIP says."""
    rule = config.quant_clip
    if rule == "sdclip" and role.clip:  # by each row's own standard deviation (PR 1394)
        sigmas = getattr(config, role.clip)
        assert sigmas > 0, "MATRIX_CLIP_SIGMAS=0 stands for a number that pack_to_fit finds"
        return sigmas * w.std(1)
    size, floor = w.abs(), config.quant_scale_floor
    if rule == "percentile" or role.optimizer != "muon":  # the searches are for matrices
        return torch.quantile(size, config.quant_clip_percentile / 100, dim=1)
    if rule == "matrix":  # one of five quantiles for all rows (PR 1230)
        quantiles = size.new_tensor([0.999, 0.9995, 0.9999, 0.99999, 1.0])
        clips = torch.quantile(size, quantiles, dim=1)
        return clips[rounding_errors(w, clips, bits, floor).sum(1).argmin()]
    return least_error_clip(w, bits, floor)


def least_error_clip(w: Tensor, bits: int, floor: float) -> Tensor:
    """The share of each row's largest weight that rounds w [r, c] with the least error, [r]."""
    shares = torch.linspace(0.3, 1, 29, device=w.device)
    clips = shares[:, None] * w.abs().amax(1)
    return clips.gather(0, rounding_errors(w, clips, bits, floor).argmin(0)[None])[0]


def rounding_errors(w: Tensor, clips: Tensor, bits: int, floor: float) -> Tensor:
    """Squared errors [n, r] of the rows of w [r, c] when they saturate at clips [n, r]."""
    rounded = (dequantize_rows(*quantize_rows(w, clip, bits, floor)) for clip in clips)
    return torch.stack([(values - w).square().sum(1) for values in rounded])


GPTQ_BLOCK = 128  # columns whose error is moved onto all later ones together


def gptq_rows(w: Tensor, step: Tensor, bits: int, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Integers as int8 of w [r, c], rounded column by column, the error moved onto later columns.

    So w x changes least over inputs x with sum x x^T = hessian [c, c] (GPTQ, arXiv 2210.17323).
    """
    h = hessian.double()
    order = h.diagonal().argsort(descending=True)  # columns of large inputs first
    added = damping * h.diagonal().mean() + 1e-12
    h = h[order][:, order] + torch.eye(len(h), device=h.device) * added
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left = w.T[order].contiguous()  # [c, r]: what is a column of w lies in one place
    q = torch.empty_like(left)
    for start in range(0, len(left), GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            q[j] = round_to_steps(left[j], step, bits)
            errors[j - start] = (left[j] - q[j] * step) / upper[j, j]
            left[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return q[order.argsort()].T.contiguous().to(torch.int8)


@torch.no_grad()
def input_moments(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], with_head: bool = False
) -> dict[str, Tensor]:
    """GPTQ's Hessians: sums of x x^T [c, c] over the inputs x of every matrix, all passes.

    The output projection, a matrix too, is among them `with_head`.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, gain: Tensor | None = None) -> None:
        """Of x, or of x with a gain [c], which TF32 would round."""
        moment = x.T @ x
        if gain is not None:
            moment = moment * torch.outer(gain, gain)
        sums[name] = sums.get(name, 0.0) + moment

    def watch(name: str, matrix: Matrix) -> Any:
        def add_input(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, factor = args[0].flatten(0, -2).float(), torch.as_tensor(args[1])
            # A gain on the weight's columns acts on its input.
            add(name, x, factor if factor.dim() == 1 else None)

        return matrix.register_forward_pre_hook(add_input)

    def no_loss(h: Tensor, *_: Any) -> Tensor:
        """In the place of the loss, which takes the last state and is not needed."""
        if with_head:
            add("tok_emb" if model.tied else "lm_head", h.float())
        return h.new_zeros(())

    hooks = [
        watch(f"{name}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, Matrix)
    ]
    with tf32_products():
        for ids, targets in batches:
            model(ids, targets, model.scoring, PLAIN_OPS._replace(loss=no_loss))
    for hook in hooks:
        hook.remove()
    return sums


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Multiplies float32 matrices in TF32 on CUDA, which is exact for what was bfloat16.

    In float32 GPTQ's sums would take 5.7 of the 600 s of `frontier` (a roofline estimate,
    records/frontier_export).
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


class Stored(NamedTuple):
    """How a parameter is held in an artifact."""

    kind: str  # float16, float32, or int2 to int8 with a float16 step for each row
    tensors: list[Tensor]


def store(p: nn.Parameter, config: Config, hessian: Tensor | None) -> Stored:
    """The stored form of a parameter, rounded by GPTQ where there is a `hessian`."""
    w, role = p.detach(), role_of(p)
    if not role.bits:
        half = w.half()
        exact_enough = (half.float() - w).norm() <= 1e-3 * w.norm()  # and does not overflow
        return Stored("float16", [half]) if exact_enough else Stored("float32", [w])
    bits = config.bits(role.bits)
    q, step = quantize_rows(w, row_clip(w, bits, config, role), bits, config.quant_scale_floor)
    if hessian is not None:
        q = gptq_rows(w, step.float(), bits, hessian, config.gptq_damping)
    return Stored(f"int{bits}", [q, step])


def pack(model: GPT, config: Config, hessians: Mapping[str, Tensor] | None = None) -> bytes:
    """The artifact of a model; `hessians` are those of `input_moments`, by parameter."""
    hessians = hessians or {}
    held = {name: store(p, config, hessians.get(name)) for name, p in model.named_parameters()}
    header = dict(
        architecture=asdict(config.architecture()),
        tokenizer_sha256=file_hash(find_file(config.tokenizer_path)),
        tensors=[(name, stored.kind) for name, stored in held.items()],
    )
    values = [t.cpu().numpy().tobytes() for stored in held.values() for t in stored.tensors]
    codec = config.codec + SHUFFLED if config.byte_shuffle else config.codec
    return b"".join(seal("artifact", codec, header, *values))


LANDING = 0.003  # share of SIZE_LIMIT_BYTES that MATRIX_CLIP_SIGMAS=0 leaves unused, at most
LANDING_TRIALS = 12  # most runs need two or three
MOST_SIGMAS = 1e4  # every weight is rounded to 0
# Bytes that codecs make of an integer in units of its entropy: of a million normal ones, in steps
# of 12.85 / 31 standard deviations.
OVERHEAD = dict(zlib=1.158, lzma=1.058, brotli=1.014)


def expected_bytes(model: GPT, config: Config) -> float:
    """Bytes of script and artifact, were the rows of all matrices normally distributed.

    In steps of s standard deviations, such a weight has log2(sqrt(2 pi e) / s) bits of entropy.
    """
    total = float(len(script_file()))
    for p in model.parameters():
        role = role_of(p)
        if not role.bits:
            total += 2 * p.numel()
            continue
        bits = float(config.bits(role.bits))
        if role.clip:
            step = getattr(config, role.clip) / max_level(config.bits(role.bits))
            bits = OVERHEAD[config.codec] * max(2.047 - math.log2(step), 0.0)
        total += 2 * len(p) + p.numel() * bits / 8
    return total


def least_clip(config: Config) -> float:
    """Standard deviations below which saturation costs more than the smaller steps gain.

    For Laplace-distributed weights, the squared error is within 2 % of the least at 2 to 8 bits.
    """
    bits = max(config.matrix_bits, config.core_bits)
    return round(1.3 + 1.17 * math.log(max_level(bits)), 4)


def clip_of_size(model: GPT, config: Config, size: float, between: tuple[float, float]) -> float:
    """The MATRIX_CLIP_SIGMAS whose `expected_bytes` are `size`, or the nearest in an interval."""
    low, high = between
    for _ in range(60):
        middle = math.sqrt(low * high)
        if expected_bytes(model, replace(config, matrix_clip_sigmas=middle)) > size:
            low = middle
        else:
            high = middle
    return high


def pack_by_clip(model: GPT, config: Config, hessians: Mapping[str, Tensor], log: Log) -> bytes:
    """The artifact of the fewest MATRIX_CLIP_SIGMAS with which it and the script fit.

    They end within LANDING below the limit, unless there is room for finer steps than help. What
    a trial has more or fewer bytes than expected, the next one is expected to have, too.
    """
    limit, least = config.size_limit_bytes, least_clip(config)
    low, high, surplus = least, MOST_SIGMAS, 0.0  # too many bytes at `low`, few enough at `high`
    fitting = data = b""
    tried: set[float] = set()
    while low < high and len(tried) < LANDING_TRIALS:
        aim = (1 - LANDING / 3) * limit - surplus
        sigmas = round(clip_of_size(model, config, aim, (low, high)), 4)
        if sigmas in tried:  # an end of the interval: the weights are nothing like normal
            sigmas = round(math.sqrt(low * high), 4)
        if sigmas in tried:  # the ends are neighbours
            break
        tried.add(sigmas)
        chosen = replace(config, matrix_clip_sigmas=sigmas)
        data = pack(model, chosen, hessians)
        total = len(script_file()) + len(data)
        log(f"packed matrix_clip_sigmas:{sigmas} codec:{config.codec} total:{total} bytes")
        surplus = total - expected_bytes(model, chosen)
        if total > limit:
            low = sigmas
            continue
        high, fitting = sigmas, data
        if total >= (1 - LANDING) * limit:
            break
        if sigmas == least:
            log(f"{limit - total} bytes are left, which only more MATRIX_BITS can use")
    return fitting or data


def pack_to_fit(model: GPT, config: Config, hessians: Mapping[str, Tensor], log: Log) -> bytes:
    """The artifact; if MATRIX_BITS=0, or MATRIX_CLIP_SIGMAS=0, of those with which it fits."""
    if config.fits_by_clip:
        return pack_by_clip(model, config, hessians, log)
    for bits in [config.matrix_bits] if config.matrix_bits else range(8, 1, -1):
        data = pack(model, replace(config, matrix_bits=bits), hessians)
        total = len(script_file()) + len(data)
        log(f"packed matrix_bits:{bits} codec:{config.codec} total:{total} bytes")
        if total <= config.size_limit_bytes:
            break
    return data


class Values:
    """Reads the values of an artifact one after the other; ValueError where they end too early."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, kind: str, shape: Iterable[int]) -> Tensor:
        dtype, shape = np.dtype(kind), tuple(shape)
        size = dtype.itemsize * math.prod(shape)
        require(self.at + size <= len(self.raw), f"{len(self.raw)} bytes of values are too few")
        values = np.frombuffer(self.raw[self.at : self.at + size], dtype).reshape(shape)
        self.at += size
        return torch.from_numpy(values.copy())

    def take_stored(self, name: str, kind: str, p: nn.Parameter) -> Tensor:
        """The float32 value of parameter `p`, which is stored as `kind`."""
        if role_of(p).bits:
            require(kind in INTEGERS, f"{name} is stored as {kind!r:.80}, not one of {INTEGERS}")
            value = dequantize_rows(self.take("<i1", p.shape), self.take("<f2", p.shape[:1]))
        else:
            require(kind in FLOATS, f"{name} is stored as {kind!r:.80}, not one of {[*FLOATS]}")
            value = self.take(FLOATS[kind], p.shape).float()
        require(value.isfinite().all(), f"{name} is not finite")
        return value


FLOATS = dict(float16="<f2", float32="<f4")
INTEGERS = [f"int{bits}" for bits in range(2, 9)]


class Unpacked(NamedTuple):
    """What an artifact holds."""

    architecture: Architecture
    tensors: dict[str, Tensor]  # float32 parameters by name
    kind: str  # how matrices are stored and compressed, as in int8+zlib


def unpack(header: Any, raw: bytes, codec: str) -> Unpacked:
    """Reads an artifact's contents; malformed ones raise ValueError or what reading them raises."""
    architecture = Architecture.from_json(header["architecture"])
    with torch.device("meta"):  # names, roles and shapes without memory
        expected = list(GPT(architecture).named_parameters())
    values, tensors, kinds = Values(raw), {}, []
    for (name, p), (given, kind) in zip(expected, header["tensors"], strict=True):
        require(given == name, f"{given!r:.80} is stored where {name} is due")
        tensors[name] = values.take_stored(name, kind, p)
        if role_of(p).optimizer == "muon":
            kinds.append(kind)
    require(values.at == len(raw), f"{len(raw)} bytes of values, {values.at} described")
    return Unpacked(architecture, tensors, f"{'/'.join(dict.fromkeys(kinds))}+{codec}")


def load_model(data: bytes, origin: str, eval_passes: int = 0) -> tuple[GPT, Architecture, str]:
    """Model, architecture, storage ("int8+zlib") of an artifact; InputError names `origin`."""
    architecture, tensors, kind = unseal("artifact", data, origin, ARTIFACT_LIMIT, unpack)
    architecture = replace(architecture, eval_passes=eval_passes or architecture.eval_passes)
    model = GPT(architecture)
    model.load_state_dict(tensors)
    return model, architecture, kind


def check_artifact_tokenizer(data: bytes, origin: str, config: Config) -> None:
    """InputError if an artifact names another tokenizer than the one it is to be scored with."""
    theirs = unseal(
        "artifact", data, origin, ARTIFACT_LIMIT, lambda header, *_: header.get("tokenizer_sha256")
    )
    path = find_file(config.tokenizer_path)
    ours = file_hash(path)
    require(
        not theirs or not ours or ours == theirs,
        f"{origin} was trained with another tokenizer than TOKENIZER_PATH={path}: SHA-256 "
        f"{str(theirs)[:12]!r}..., not {ours[:12]!r}...",
    )


# ---- 6. Scoring --------------------------------------------------------------------------------


class Score(NamedTuple):
    """Of validation text."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    val_tokens: int  # targets scored
    val_bytes: int  # UTF-8 bytes they stand for
    eval_seconds: float


Scored = Callable[[Tensor, Tensor], Tensor]  # (ids, targets) -> mean loss in nats


class Learner:
    """Score-first test-time training (PR 549): all ranks do SGD on text that has been scored."""

    def __init__(self, model: GPT, forward: Scored, config: Config, world: World) -> None:
        self.forward, self.config, self.world = forward, config, world
        params = list(model.parameters())
        self.gradients = Gradients(params)
        self.sgd = torch.optim.SGD(params, lr=config.ttt_lr, momentum=config.ttt_momentum)

    def learn(self, tokens: Tensor, done: float) -> None:
        """TTT_EPOCHS steps on a chunk [n T + 1]; the rate falls with the fraction `done`."""
        config, world = self.config, self.world
        self.sgd.param_groups[0]["lr"] = config.ttt_lr * (1 + math.cos(math.pi * done)) / 2
        ids, targets = self.part_of_rank(tokens)
        share = ids.numel() / (len(tokens) - 1)
        for _ in range(config.ttt_epochs):
            self.gradients.zero()
            if share:
                (self.forward(ids, targets) * share).backward()
            world.all_reduce(self.gradients.flat)
            self.gradients.clip(config.ttt_grad_clip or math.inf)
            self.sgd.step()

    def part_of_rank(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and targets [.., T] that this rank learns of a chunk [n T + 1]."""
        length = self.config.train_seq_len
        every = slice(self.world.rank, None, self.world.size)
        return tokens[:-1].view(-1, length)[every], tokens[1:].view(-1, length)[every]

    def warm_up(self) -> None:
        """Runs the forward and backward pass of a step, which `learn` forgets again.

        On a chunk cut up as those of `learn` are: other strides would be a new graph, compiled
        while the time of evaluation runs.
        """
        size = self.config.ttt_chunk_tokens + 1
        chunk = torch.zeros(size, dtype=torch.int64, device=self.world.device)
        ids, targets = self.part_of_rank(chunk)
        if len(ids):
            self.forward(ids, targets).backward()


class Scorer:
    """Windows of T tokens, dealt out over the ranks.

    All but the first score their last `stride` targets, so that every target is scored once.
    """

    def __init__(self, config: Config, world: World) -> None:
        path = find_file(config.tokenizer_path)
        counter = ByteCounter.from_sentencepiece(path, config.vocab_size)
        self.counter = counter.to(world.device)
        self.world, self.tokens, self.length = world, Tokens(config, "val"), config.train_seq_len
        used = torch.bincount(self.tokens.read(0, self.tokens.total), minlength=config.vocab_size)
        spelled = (used * (counter.size + counter.space)).sum()
        require(spelled, f"{self.tokens.paths[0]} has no text to score, only control tokens")
        self.tokenizer = check_tokenizer(path, self.tokens)
        self.targets = self.tokens.total - 1
        T, chunk = self.length, config.ttt_chunk_tokens
        require(
            not config.eval_stride or T % config.eval_stride == 0,
            f"EVAL_STRIDE={config.eval_stride} does not divide TRAIN_SEQ_LEN={T}",
        )
        fits = chunk % T == 0 and chunk <= config.micro_batch_tokens * world.size
        require(
            not config.ttt_lr or fits,
            f"TTT_CHUNK_TOKENS={chunk} is no multiple of TRAIN_SEQ_LEN={T} or above "
            f"MICRO_BATCH_TOKENS={config.micro_batch_tokens} for each rank",
        )
        most = min(config.val_batch_size // world.size, config.micro_batch_tokens) // T
        needed = math.ceil(math.ceil(self.targets / T) / world.size)
        self.batch = min(max(most, 1), needed)

    def chunks(self, stride: int, size: int) -> list[range]:
        """The windows whose first scored target lies in each `size` targets, a multiple of T."""
        ends = [*range(size, self.targets, size), self.targets]
        # Window 0 scores targets 0 to T - 1, window w the `stride` from T + (w - 1) stride on.
        bounds = [0, *(1 + math.ceil((end - self.length) / stride) for end in ends)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    def windows(self, chunk: range, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's ids and targets [batch, T]; what is not to be scored has targets of -100."""
        world, length = self.world, self.length
        first = len(chunk) * world.rank // world.size
        end = len(chunk) * (world.rank + 1) // world.size
        for i in range(first, end, self.batch):
            part = chunk[i : min(i + self.batch, end)]
            start = part[0] * stride
            count = min((len(part) - 1) * stride + length, self.targets - start)
            span = self.tokens.read(start, count + 1).to(world.device).long()
            fill = (0, (self.batch - 1) * stride + length - count)
            ids = F.pad(span[:-1], fill).unfold(0, length, stride)
            targets = F.pad(span[1:], fill, value=-100).unfold(0, length, stride).clone()
            targets[len(part) :] = -100
            whole = 1 if part[0] == 0 else 0  # the first window of all scores all its targets
            targets[whole:, : length - stride] = -100
            yield ids.contiguous(), targets

    def score(self, model: Scored, stride: int = 0, learner: Learner | None = None) -> Score:
        """The score of a model; a `learner` trains it on each chunk that has been scored."""
        began = time.perf_counter()
        stride = stride or self.length
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # nats, targets, bytes
        size = learner.config.ttt_chunk_tokens if learner else self.targets
        chunks = self.chunks(stride, size)
        for i, windows in enumerate(chunks):
            for ids, targets in self.windows(windows, stride):
                sums += self.totals(model, ids, targets)
            if learner and i + 1 < len(chunks):
                tokens = self.tokens.read(i * size, size + 1).to(self.world.device).long()
                learner.learn(tokens, i / (len(chunks) - 1))
        nats, count, size_of_text = self.world.all_reduce(sums).tolist()
        bpb = nats / math.log(2) / size_of_text
        seconds = time.perf_counter() - began
        return Score(nats / count, bpb, int(count), int(size_of_text), seconds)

    def warm_up(self, model: Scored, learner: Learner | None = None) -> None:
        """Runs what scoring runs once, so that nothing is compiled while it is timed."""
        shape = (self.batch, self.length)
        nothing = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        self.totals(model, nothing, nothing.clone())
        if learner:
            learner.warm_up()

    @torch.no_grad()
    def totals(self, model: Scored, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats, targets and bytes of a batch of windows, float64 [3]."""
        scored = targets >= 0
        count = scored.sum()
        nats = model(ids, targets).double() * count
        size = self.counter.count(ids, targets.clamp_min(0))
        return torch.stack((nats, count, (size * scored).sum()))


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


@torch.no_grad()
def recurrence_health(model: GPT, ids: Tensor, mode: Mode) -> list[dict[str, float]]:
    """Per effective layer: mix weights, RMS of scales and shifts, alpha, growth of the stream."""
    sizes = [rms(model.embed(ids)[0])]  # of the stream before the first layer and after each

    def measure(_: nn.Module, inputs: Any, out: Tensor) -> None:
        sizes.append(rms(out))

    hooks = [mlp.register_forward_hook(measure) for mlp in model.mlp]
    model.hidden(ids, mode)
    for hook in hooks:
        hook.remove()
    plan, table = model.plans[mode.passes], []
    for v, (layer, cond) in enumerate(zip(plan, model.cond.rows(plan, torch.float32))):
        mix, mix_x0 = model.mix[layer.attn].weights()
        table.append(
            dict(
                layer=v,
                mix=mix.mean().item(),
                mix_x0=mix_x0.mean().item(),
                attn_scale=rms(model.attn[layer.attn].scale * cond.attn.gamma),
                mlp_scale=rms(model.mlp[layer.mlp].scale * cond.mlp.gamma),
                attn_shift=rms(cond.attn.beta),
                mlp_shift=rms(cond.mlp.beta),
                growth=sizes[v + 1] / sizes[v],
                pass_scale=model.core.pass_scale(layer.closes),
            )
        )
    return table


# ---- 7. Data and bytes -------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def advice(vocab_size: int) -> str:
    """How data for a tokenizer of so many pieces comes here."""
    python = shlex.quote(sys.executable)
    variant = "" if vocab_size == 1024 else f" --variant sp{vocab_size}"
    return (
        f"for the sample corpus run `{python} data/sample.py` and set PRESET=tiny, for FineWeb run "
        f"`{python} data/fineweb.py{variant}` (data/README.md)"
    )


def find_file(name: str) -> Path:
    """A file or folder that is named relative to the working directory or to this script.

    A submission lies in records/<track>/<folder>/ and is started there or in the repository's root,
    whose data it reads.
    """
    folder = Path(__file__).resolve().parent
    places = (Path(), folder, *folder.parents[2:3])
    return next((place / name for place in places if (place / name).exists()), Path(name))


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens of a shard (data/README.md).

    InputError if its header and size do not fit.
    """
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    require(
        len(header) == SHARD_HEADER_INTS and (header[0], header[1]) == (SHARD_MAGIC, SHARD_VERSION),
        f"{path} is not a token shard (begins with {header[:2].tolist()}): fetch it again",
    )
    count, size = int(header[2]), path.stat().st_size
    require(
        count > 0 and size == 4 * SHARD_HEADER_INTS + 2 * count,
        f"{path} has {size} bytes but its header says {count} tokens: fetch it again",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS, shape=(count,))


def check_names(paths: list[Path]) -> None:
    """InputError names a shard that is none, such as the copy "fineweb_val_000000 (1).bin"."""
    numbers: list[str] = []
    for path in paths:
        good = re.fullmatch(r"fineweb_[a-z]+_\d+\.bin", path.name)
        require(good, f"{path} is not named like a shard, fineweb_val_NNNNNN.bin: remove it")
        numbers.append(path.stem.rpartition("_")[2])
    for last, number, path in zip(numbers, numbers[1:], paths[1:]):
        require(
            len(number) == len(last) and int(number) == int(last) + 1,
            f"{path} does not follow {last}: a split's shards have contiguous numbers of one width",
        )


class Manifest(NamedTuple):
    """What manifest.json in a folder of shards says of them (data/README.md); empty without one."""

    tokenizer_sha256: str
    tokens: dict[str, dict[str, int]]  # of every shard, by split and name

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        path = folder / "manifest.json"
        if not path.exists():
            return cls("", {})
        try:
            read = json.loads(path.read_bytes())
            sizes = {
                split: {name: int(file["tokens"]) for name, file in entry["files"].items()}
                for split, entry in read.get("splits", {}).items()
                if "files" in entry
            }
            return cls(str(read.get("tokenizer", {}).get("sha256", "")), sizes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a manifest of shards: {error!r:.200}") from None

    def check_sizes(self, split: str, sizes: dict[str, int]) -> None:
        """InputError if shards have other sizes, or if the validation split has other shards."""
        said = self.tokens.get(split, {})
        for name, size in sizes.items():
            told = said.get(name, size)
            require(told == size, f"{name} has {size} tokens, manifest.json says {told}")
        differ = sorted(said.keys() ^ sizes.keys()) if said and split == "val" else []
        require(not differ, f"manifest.json and the folder differ in {', '.join(differ)}")


class Tokens:
    """The shards of one split as one sequence of token ids that starts again at its end."""

    def __init__(self, config: Config, split: Literal["train", "val"]) -> None:
        folder, T = find_file(config.data_path), config.train_seq_len
        self.vocab_size, self.split = config.vocab_size, split
        self.paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        require(
            self.paths,
            f"{advice(config.vocab_size)}: DATA_PATH={folder} holds no fineweb_{split}_*.bin",
        )
        check_names(self.paths)
        sizes = [len(open_shard(path)) for path in self.paths]
        self.starts = np.cumsum([0, *sizes])
        self.total = int(self.starts[-1])
        self.manifest = Manifest.of(folder)
        self.manifest.check_sizes(split, dict(zip((path.name for path in self.paths), sizes)))
        require(
            self.total > T,
            f"TRAIN_SEQ_LEN={T}: {split} in {folder} has only {self.total} tokens",
        )

    def read(self, start: int, count: int) -> Tensor:
        """int32 tokens [count] from `start`; InputError for ids beyond the vocabulary."""
        pieces = []
        while count:
            start %= self.total
            shard = int(np.searchsorted(self.starts, start, side="right")) - 1
            at = int(start - self.starts[shard])
            piece = self.read_shard(shard, at, min(count, int(self.starts[shard + 1]) - start))
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.from_numpy(np.concatenate(pieces).astype(np.int32))

    def read_shard(self, shard: int, at: int, count: int) -> np.ndarray:
        """uint16 tokens [count] of one shard; read, as a mapped file that is cut is a bus error."""
        path = self.paths[shard]
        tokens = np.fromfile(path, "<u2", count, offset=4 * SHARD_HEADER_INTS + 2 * at)
        require(len(tokens) == count, f"{path} was cut after it was opened")
        require(
            tokens.max() < self.vocab_size,
            f"{path} holds token {tokens.max()}, VOCAB_SIZE={self.vocab_size}: it is corrupt or of "
            "another tokenizer",
        )
        return tokens


class Shuffle:
    """A random order of the sequences of a split, without end.

    An epoch skips a random number of tokens, cuts the rest into sequences and permutes them: each
    comes once before any comes again, and the next epoch cuts elsewhere. All of it follows from
    DATA_SEED and the size of the split, whatever its shards: ranks need not agree on it, and a run
    that goes on need only know its step.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.epoch, self.starts = NONE, np.empty(0, np.int64)  # the epoch that was drawn last

    def start(self, number: int) -> int:
        """Where in the split the `number`-th sequence of training begins."""
        T, total = self.length, self.tokens.total
        count = max(total // T - 1, 1)  # of sequences, as many in every epoch
        epoch, index = divmod(number, count)
        if epoch != self.epoch:
            draw = np.random.default_rng((self.seed, epoch))
            skipped = draw.integers(min(T, total - count * T))
            self.epoch, self.starts = epoch, skipped + T * draw.permutation(count)
        return int(self.starts[index])


class Batches:
    """Step s is the s-th TRAIN_BATCH_TOKENS of the split; each rank has sequences of them.

    The split is in its order, or with DATA_SEED in a random one. A thread of its own reads, so that
    a disk that is slow or far away does not keep a step waiting.
    """

    def __init__(self, tokens: Tokens, config: Config, world: World) -> None:
        T, batch = config.train_seq_len, config.train_batch_tokens
        self.tokens, self.world, self.length = tokens, world, T
        self.shuffle = Shuffle(tokens, T, config.data_seed) if config.data_seed else None
        self.reader = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[list[Tensor]]] = {}  # by step
        sequences, ragged = divmod(batch, T)
        require(
            sequences and not ragged,
            f"TRAIN_SEQ_LEN={T} does not divide TRAIN_BATCH_TOKENS={batch}",
        )
        fits = [n for n in range(1, sequences + 1) if sequences % n == 0]
        require(
            world.size in fits,
            f"WORLD_SIZE={world.size} does not divide the {sequences} sequences of a batch "
            f"(TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN); these do: {', '.join(map(str, fits))}",
        )
        local, limit = sequences // world.size, config.micro_batch_tokens // T
        require(limit, f"MICRO_BATCH_TOKENS={config.micro_batch_tokens} < TRAIN_SEQ_LEN={T}")
        divisors = (n for n in range(1, local + 1) if local % n == 0)
        self.accumulation = next(n for n in divisors if local // n <= limit)
        self.sequences = local // self.accumulation  # per rank and micro-batch

    def start(self, number: int) -> int:
        """Where in the split, which starts again at its end, a sequence of training begins."""
        return self.shuffle.start(number) if self.shuffle else number * self.length

    def read_ahead(self, step: int) -> None:
        """Begins to read a step that is to come."""
        self.ahead[step] = self.reader.submit(self.read, step)

    def micro(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, int64 [B, T] on the rank's device, of every micro-batch of a step."""
        if step not in self.ahead:
            self.read_ahead(step)
        for pair in self.ahead.pop(step).result():
            if self.world.on_cuda:
                pair = pair.pin_memory()  # else the copy waits for the device's queue
            pair = pair.to(self.world.device, non_blocking=True).long()
            yield pair[0], pair[1]

    def read(self, step: int) -> list[Tensor]:
        """Inputs and targets, int32 [2, B, T], of every micro-batch of a step."""
        first = step * self.accumulation * self.world.size + self.world.rank
        return [
            self.read_sequences((first + i * self.world.size) * self.sequences)
            for i in range(self.accumulation)
        ]

    def read_sequences(self, first: int) -> Tensor:
        """Inputs and targets, int32 [2, B, T], of the sequences from the `first`-th one on."""
        B, T = self.sequences, self.length
        if self.shuffle:
            starts = map(self.start, range(first, first + B))
            rows = np.stack([self.tokens.read(start, T + 1) for start in starts])
            ids, targets = rows[:, :-1], rows[:, 1:]
        else:
            span = self.tokens.read(self.start(first), B * T + 1).numpy()
            ids, targets = span[:-1].reshape(B, T), span[1:].reshape(B, T)
        return torch.from_numpy(np.stack([ids, targets]))  # by NumPy: no threads of its own


SPACE = "\u2581"  # how SentencePiece writes a space


def file_hash(path: Path) -> str:
    """SHA-256 of a file; "" if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def check_tokenizer(path: Path, tokens: Tokens) -> str:
    """How it is known that the shards are of the tokenizer at `path`; InputError if they are not.

    Without a manifest a sample decides. Decoded and encoded again it must come out nearly the same:
    over 0.99 of it does with its own tokenizer, 0.95 and less with another of 1,024 pieces.
    """
    ours, theirs = file_hash(path), tokens.manifest.tokenizer_sha256
    if theirs:
        require(
            ours == theirs,
            f"TOKENIZER_PATH={path} is not the tokenizer of {tokens.paths[0].parent}: its SHA-256 "
            f"is {ours[:12]}..., manifest.json says {theirs[:12]}...",
        )
        return "manifest"
    sp = spm.SentencePieceProcessor(model_file=str(path))
    sample: list[int] = []
    again: list[int] = []
    for is_bos, group in itertools.groupby(tokens.read(0, 2000).tolist(), lambda id: id == BOS):
        if not is_bos:  # a document or what is left of one
            ids = list(group)
            sample += ids
            again += sp.encode(sp.decode(ids))
    alike = difflib.SequenceMatcher(None, sample, again, autojunk=False).ratio()
    require(
        alike > 0.97,
        f"TOKENIZER_PATH={path} does not fit {tokens.paths[0]}: what it makes of the first tokens "
        f"is written otherwise ({alike:.2f} of it alike). Are the shards of another tokenizer?",
    )
    return f"not verified, no manifest names it; a sample fits ({alike:.3f})"


@dataclass(frozen=True)
class ByteCounter:
    """UTF-8 bytes of the text that tokens stand for, from tables [V].

    Bits per byte, unlike nats per token, compare models of different tokenizers.
    """

    size: Tensor  # int64, without a leading space
    space: Tensor  # bool, the piece begins with a space
    boundary: Tensor  # bool, the space of a piece that follows was put there by the tokenizer

    @classmethod
    def from_sentencepiece(cls, path: Path, vocab_size: int) -> ByteCounter:
        """A byte piece is one byte; a control piece none, nor is the space that follows one."""
        require(path.exists(), f"{advice(vocab_size)}: TOKENIZER_PATH={path} is not there")
        try:
            sp = spm.SentencePieceProcessor(model_file=str(path))
            require(len(sp) == vocab_size, f"it has {len(sp)} pieces, VOCAB_SIZE={vocab_size}")
            silent = [
                sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(vocab_size)
            ]
            byte = [sp.is_byte(i) for i in range(vocab_size)]
            pieces = [sp.id_to_piece(i) for i in range(vocab_size)]
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error) if isinstance(error, InputError) else f"{error!r:.300}"
            raise InputError(f"TOKENIZER_PATH={path} cannot be used: {reason}") from None
        size, space = [], []
        for piece, is_silent, is_byte in zip(pieces, silent, byte):
            text = "" if is_silent or is_byte else piece.removeprefix(SPACE)
            size.append(1 if is_byte else len(text.replace(SPACE, " ").encode()))
            space.append(not is_silent and not is_byte and piece.startswith(SPACE))
        adds_space = sp.decode_pieces([SPACE]) == ""  # the tokenizer puts one before every text
        boundary = torch.tensor(silent) & torch.tensor(adds_space)
        return cls(torch.tensor(size), torch.tensor(space), boundary)

    def to(self, device: torch.device) -> ByteCounter:
        return ByteCounter(self.size.to(device), self.space.to(device), self.boundary.to(device))

    def count(self, previous: Tensor, token: Tensor) -> Tensor:
        """Bytes of each token, int64, given the one before it (same shape)."""
        return self.size[token] + (self.space[token] & ~self.boundary[previous])


# ---- 8. Training, calibration and refit ----------------------------------------------------------
# No DistributedDataParallel: gradients of shared weights are complete only when backward ends, and
# its hooks would cut the compiled graph.


class Gradients:
    """All gradients in one flat float32 buffer that ends with the loss: one all-reduce for both."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        sizes = [p.numel() for p in params]
        self.params = params
        self.flat = torch.zeros(sum(sizes) + 1, device=params[0].device)
        self.of_params, self.loss = self.flat[:-1], self.flat[-1]  # views
        for p, gradient in zip(params, self.of_params.split(sizes)):
            p.grad = gradient.view_as(p)

    def zero(self) -> None:
        self.flat.zero_()

    def complete(self) -> bool:
        """Whether every gradient lies in the buffer, and so is summed over ranks."""
        first = self.flat.data_ptr()
        last = first + self.flat.nbytes
        return all(p.grad is None or first <= p.grad.data_ptr() < last for p in self.params)

    def clip(self, limit: float) -> Tensor:
        """Shortens the gradient to an L2 norm of `limit` and returns the norm it had."""
        return nn.utils.clip_grad_norm_(self.params, limit)


class SkippedSteps:
    """Counts steps whose loss or gradient is not finite; each becomes a step of gradient zero.

    All ranks see the same sum, so they skip together; nothing waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.zeros(2, device=device)  # how many, and the first one, counted from 1

    def mask(self, gradients: Gradients, step: int) -> None:
        bad = ~gradients.flat.sum().isfinite()
        count, first = self.numbers.unbind()  # views
        first.copy_(torch.where(bad & (count == 0), step + 1.0, first))
        count.add_(bad)
        gradients.of_params.masked_fill_(bad, 0.0)

    @property
    def count(self) -> int:
        return int(self.numbers[0])

    @property
    def first(self) -> int:
        return int(self.numbers[1])


def fraction_done(config: Config, step: int, seconds: float) -> float:
    """How far a run is after `step` steps: in steps or in time, whichever is further.

    The seconds are those of rank 0's clock, so all ranks do the same in the same step.
    """
    in_steps = step / max(config.iterations, 1)
    in_time = seconds / config.training_seconds if config.training_seconds else 0.0
    return max(in_steps, in_time)


def lr_factor(config: Config, step: int, seconds: float) -> float:
    """Factor of the learning rates: 1, and in the warm-down at the end from 1 to LR_FLOOR."""
    span, cap = config.warmdown_iters, config.training_seconds
    if config.warmdown_fraction:
        factor = (1 - fraction_done(config, step, seconds)) / config.warmdown_fraction
    elif span:
        factor = (config.iterations - step) / span
        if cap and seconds and step > 9:  # before, a step's time is no measure
            factor = min(factor, (cap - seconds) / (span * seconds / step))
    else:
        return 1.0
    return min(max(factor, config.lr_floor), 1.0)


def muon_momentum(config: Config, step: int, seconds: float) -> float:
    """Rises from its start to MUON_MOMENTUM over its warm-up."""
    if config.muon_momentum_warmup_fraction:
        done = fraction_done(config, step, seconds) / config.muon_momentum_warmup_fraction
    elif config.muon_momentum_warmup_steps:
        done = step / config.muon_momentum_warmup_steps
    else:
        done = 1.0
    if done >= 1:
        return config.muon_momentum
    return config.muon_momentum_warmup_start * (1 - done) + config.muon_momentum * done


def training_mode(config: Config, step: int, seconds: float) -> Mode:
    """Passes and rounding of a training step, `seconds` into training."""
    done = fraction_done(config, step, seconds)
    begun = [passes for when, passes in config.schedule() if when <= (done if when < 1 else step)]
    mode = Mode(
        begun[-1],
        growth_weight=config.jacobian_weight,
        per_pass=config.jacobian_per_pass,
        truncated=begun[-1] > 1 and done < min(config.truncate_fraction, config.rounding_begins),
    )
    near_end = config.qat_fraction > 0 and 1 - done <= config.qat_fraction
    if near_end or lr_factor(config, step, seconds) < config.qat_lr_factor:
        mode = mode._replace(core=rounding_of(config, "core matrix"), truncated=False)
        if not config.qat_core_only:
            mode = mode._replace(outside=rounding_of(config, "matrix"))
    return mode


def rounding_of(config: Config, role: str) -> Rounding:
    """How QAT rounds matrices of a role."""
    return Rounding(
        config.bits(ROLES[role].bits),
        config.quant_scale_floor,
        search=config.quant_clip == "row",
        sigmas=config.matrix_clip_sigmas if config.quant_clip == "sdclip" else 0.0,
    )


def training_modes(config: Config) -> list[Mode]:
    """Every mode that a step may have, once."""
    first, last = training_mode(config, 0, 0.0), training_mode(config, config.iterations, 0.0)
    first, last = first._replace(truncated=False), last._replace(truncated=False)
    roundings = [first] if first._replace(passes=last.passes) == last else [first, last]
    modes = [mode._replace(passes=passes) for mode in roundings for _, passes in config.schedule()]
    if config.refit_steps:
        modes.append(scored_mode(config))
    return [*dict.fromkeys(truncated_modes(config, first) + modes)]


def truncated_modes(config: Config, mode: Mode) -> list[Mode]:
    """Those with truncated gradients: of the passes that begin within TRUNCATE_FRACTION."""
    if mode.core.bits:  # rounding from the start
        return []
    return [mode._replace(passes=n, truncated=True) for n in config.truncated_passes()]


class Clock:
    """Rank 0's seconds of training on all ranks: shared every few steps, extrapolated in between.

    Signals that a rank has received are shared with it, so that all ranks stop after the same step.
    """

    def __init__(self, world: World, cap: float, progress: Progress | None = None) -> None:
        past = progress or Progress()
        self.step, self.seconds = past.step, past.seconds  # of the last reading
        self.per_step, self.due = past.per_step, past.due  # when the next reading is due
        self.most = past.most  # seconds that `furthest` has said
        self.stall = 0.0  # seconds since the last reading that were no step's
        self.world, self.cap = world, cap or math.inf
        self.signal = ""
        self.start()

    def start(self) -> None:
        self.started = time.perf_counter() - self.seconds

    def read(self, step: int, now: bool = False) -> float:
        """Seconds spent on `step` steps; ranks meet for a reading that is due, or `now`."""
        if (now or step >= self.due) and step > self.step:
            self.world.synchronize()
            mine = (time.perf_counter() - self.started, self.stall, self.world.signal)
            seen = self.world.gather(lambda: mine)
            seconds, stall, _ = seen[0]
            self.per_step = max(seconds - stall - self.seconds, 1e-9) / (step - self.step)
            self.step, self.seconds, self.stall = step, seconds, 0.0
            # The next reading comes in half of what is left, or after 5 s or 50 steps: a device
            # whose queue it empties waits until the next step is fetched and launched.
            ahead = min(self.cap - seconds, 10.0) / 2 / self.per_step
            self.due = step + int(min(max(ahead, 1), 50))
            signals = max(name for *_, name in seen)
            if signals:
                self.signal = self.world.signal = signals
        return self.estimate(step)

    def estimate(self, step: int) -> float:
        """Seconds spent on `step` steps, without meeting other ranks."""
        return self.seconds + (step - self.step) * self.per_step

    def furthest(self, step: int) -> float:
        """The estimate, or an earlier one that was more: no reading puts a mode back that began."""
        self.most = max(self.most, self.estimate(step))
        return self.most

    @contextlib.contextmanager
    def stalled(self, step: int) -> Iterator[None]:
        """Time after `step` steps that counts and that no estimate knows of: a reading is due."""
        self.due, began = step, time.perf_counter()
        yield
        self.stall += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began


class Trained(NamedTuple):
    """How training ended."""

    seconds: float
    score: Score  # of the last weights
    why: str


Validate = Callable[["Trainer", float, Mode], Score]  # of its weights, seconds into training


class Trainer:
    """Makes the steps of a run. Checkpoints, averages, compiling and reporting are section 9."""

    def __init__(
        self,
        config: Config,
        world: World,
        model: GPT,
        batches: Batches,
        compiler: Compiler | None = None,
    ) -> None:
        self.config, self.world, self.model, self.batches = config, world, model, batches
        self.compiler = compiler or Compiler(config, world)
        self.params = list(model.parameters())
        self.gradients = Gradients(self.params)
        several = world.on_cuda and world.size > 1
        self.reduced = torch.cuda.Event(blocking=True) if several else None  # the last all-reduce
        # What a mode leaves out has no gradient there, so no decay either. Matrices keep one of 0,
        # so that Muon's stacks, which are compiled, have one size.
        self.homes = {p: p.grad for p in self.params if role_of(p).optimizer == "adam"}
        for p in self.params:
            world.broadcast(p.data)  # unlike processors may draw unlike weights
        self.reset()

    def reset(self) -> None:
        """As before the first step, but for the weights."""
        config = self.config
        self.forward = self.compiler.forward(self.model)
        self.optimizers = make_optimizers(self.model, config)
        self.base_lrs = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.optimizers.muon.iterate = self.compiler.newton_schulz()
        self.average = Average(self.params, config)
        self.skipped = SkippedSteps(self.world.device)
        self.clock = Clock(self.world, config.training_seconds)
        self.step, self.lr_factor = 0, 0.0  # steps made; the last one's fraction of learning rates
        self.capped = False  # whether the time is up
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.last_good = "none"

    def train_step(
        self,
        step: int,
        seconds: float,
        micro: Iterable[tuple[Tensor, Tensor]],
        mode: Mode | None = None,
    ) -> None:
        """One optimizer step on this rank's micro-batches. It never drains the device's queue."""
        config, gradients = self.config, self.gradients
        mode = mode or training_mode(config, step, seconds)
        self.sum_gradients(micro, mode)
        self.skipped.mask(gradients, step)
        if config.grad_clip_norm:
            self.grad_norm = gradients.clip(config.grad_clip_norm)
        self.lr_factor = lr_factor(config, step, seconds)
        self.set_rates(self.lr_factor, muon_momentum(config, step, seconds), mode)
        for optimizer in self.optimizers:
            optimizer.step()
        if config.reference_bf16:
            self.round_to_bfloat16()

    def sum_gradients(self, micro: Iterable[tuple[Tensor, Tensor]], mode: Mode) -> None:
        """Loss and gradient of a step, from this rank's micro-batches and the other ranks."""
        gradients = self.gradients
        gradients.zero()
        idle = set(self.model.idle(mode))
        for p, gradient in self.homes.items():
            p.grad = None if p in idle else gradient
        parts = self.batches.accumulation * self.world.size
        for ids, targets in micro:
            loss = self.forward(ids, targets, mode) / parts
            if self.reduced:
                # No further ahead than this: a full queue blocks a launch, which keeps the
                # interpreter from the watchdog. A forward pass is queued, so no device waits.
                self.reduced.synchronize()
            loss.backward()
            gradients.loss.add_(loss.detach())
        self.world.all_reduce(gradients.flat)
        if self.reduced:
            self.reduced.record()

    def set_rates(self, factor: float, momentum: float, mode: Mode) -> None:
        for optimizer, rates in zip(self.optimizers, self.base_lrs):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        for group in self.optimizers.muon.param_groups:
            group["momentum"] = momentum
        # A step has a fixed length, and moves the function as often as its matrix is used.
        power, uses = self.config.core_lr_power, self.model.uses(mode.passes)
        factors = {p: count**-power for p, count in uses.items()}
        self.optimizers.muon.factors = factors | dict.fromkeys(self.model.idle(mode), 0.0)

    @torch.no_grad()
    def round_to_bfloat16(self) -> None:
        """What PR 855 trained by accident: tables, embedding and their Adam states in bfloat16."""
        for name, p in self.model.named_parameters():
            if name == "tok_emb" or role_of(p) is ROLES["table"]:
                for t in (p, *self.optimizers.adam.state[p].values()):
                    if t.dim():
                        t.copy_(t.bfloat16())

    def warm_up(self, log: Callable[[str], Any] = print) -> None:
        """Compiles every mode and makes WARMUP_STEPS steps of each; then all is as before."""
        config, world, modes = self.config, self.world, training_modes(self.config)
        before = [p.detach().clone() for p in self.params]
        length = config.train_seq_len
        span = torch.arange(self.batches.sequences * length + 1, device=world.device)
        span = span % config.vocab_size  # laid out as real batches are: no new graph
        pair = (span[:-1].view(-1, length), span[1:].view(-1, length))

        def compile_everything() -> None:
            for mode in modes:
                self.forward(*pair, mode).backward()
            self.optimizers.muon.step()

        world.enter("warm-up")
        began = time.perf_counter()
        while self.compiler.level != "off":
            try:  # first what a rank can compile before it meets the others
                world.gather(compile_everything)
                break
            except InputError as error:
                self.compiler.fall_back(error, log)
                self.reset()
        if self.compiler.level != "off":
            world.synchronize()
            log(f"compile:{self.compiler.level} time:{time.perf_counter() - began:.1f}s")
        for mode in modes:
            for _ in range(config.warmup_steps):
                self.train_step(0, 0.0, [pair] * self.batches.accumulation, mode)
                assert self.gradients.complete(), "GPT.idle names a part that is used"
        torch._foreach_copy_([p.data for p in self.params], before)
        self.reset()
        world.synchronize()

    def check_finite(self, score: Score | None = None) -> float:
        """The last step's loss; Ended if too many steps were skipped or `score` is not finite."""
        loss, skipped = self.gradients.loss.item(), self.skipped.count
        what = ""
        if skipped > self.config.max_skipped_steps:
            what = f"step {self.skipped.first}"
        elif score and not math.isfinite(score.val_loss):
            what = f"the validation loss after step {self.step}"
        if what:
            raise Ended(
                EXIT_NON_FINITE,
                f"{what} is not finite (skipped {skipped}, last good: {self.last_good}). Nothing "
                "was exported. Lower the learning rates or set GRAD_CLIP_NORM.",
            )
        if self.step and math.isfinite(loss):
            self.last_good = f"step {self.step}, train_loss {loss:.4f}"
        return loss

    def why_to_stop(self, seconds: float) -> str:
        """Why training ends now; empty while there is a step to make, with one to spare."""
        clock = self.clock
        if self.step == self.config.iterations:
            return "iterations"
        reserve = 0.0
        if self.step > 1:  # the first step's time is no measure
            reserve = 2 * clock.per_step
        self.capped = self.capped or seconds + reserve > clock.cap
        return "wallclock_cap" if self.capped else ""

    def train(self, reporter: Reporter, checkpoints: Checkpoints, validate: Validate) -> Trained:
        """Trains until ITERATIONS or the cap; `validate` runs off the clock."""
        config, clock = self.config, self.clock
        if self.step < config.iterations:
            self.batches.read_ahead(self.step)
        clock.start()
        while True:
            why = self.why_to_stop(clock.read(self.step))
            if why:
                seconds = clock.read(self.step, now=True)
                reporter.end(self, seconds, why)
                checkpoints.end(self)
                return Trained(seconds, validate(self, seconds, self.model.scoring), why)
            if config.val_loss_every and self.step % config.val_loss_every == 0:
                seconds = clock.read(self.step, now=True)
                with clock.paused():
                    validate(self, seconds, Mode(self.mode().passes))
            self.next_step(reporter)
            if clock.signal:
                raise Ended(EXIT_STOPPED, f"step {self.step}: stopped by {clock.signal}")
            if checkpoints.due(self.step) and self.step < config.iterations:
                # Others wait in the next step meanwhile, after a signal for 2 * HURRY at most.
                # Against a cap no time is spent on a slow disk: the next save is soon.
                patience = min(config.rank_timeout_seconds / 4, HURRY)
                with clock.stalled(self.step):
                    checkpoints.save(self, 0.0 if config.max_wallclock_seconds else patience)

    def next_step(self, reporter: Reporter) -> None:
        step, seconds = self.step, self.clock.estimate(self.step)
        self.world.enter(f"step {step + 1}", training=True)
        mode = self.mode()
        reporter.mode(step, mode)
        if step + 1 < self.config.iterations:
            self.batches.read_ahead(step + 1)  # while the device makes this step
        self.train_step(step, seconds, self.batches.micro(step), mode)
        self.average.update(self.params, step + 1, lr_factor(self.config, step + 1, seconds))
        self.step = step + 1  # from here on a checkpoint is of this step
        if reporter.wants(self.step) or self.step >= self.clock.due:
            reporter.step(self)

    @property
    def epochs(self) -> float:
        """How often the training split has been read."""
        return self.step * self.config.train_batch_tokens / self.batches.tokens.total

    def mode(self) -> Mode:
        """That of the next step."""
        return training_mode(self.config, self.step, self.clock.furthest(self.step))

    def state(self) -> list[Tensor]:
        """All tensors that training changes, in a fixed order.

        Nothing is random: after the initial weights no number is drawn.
        """
        moments = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    moments += optimizer.state[p].values()
        weights = [p.data for p in self.params]
        return [*weights, *moments, *self.average.weights, self.skipped.numbers]

    def progress(self) -> Progress:
        clock = self.clock
        seconds = clock.estimate(self.step)
        counts = self.step, self.average.count
        return Progress(*counts, seconds, clock.per_step, clock.due, self.capped, clock.most)

    def go_on_from(self, progress: Progress) -> None:
        """Takes over the counters of a checkpoint whose tensors are in `state` already."""
        self.step, self.average.count = progress.step, progress.averaged
        self.capped = progress.capped
        self.clock = Clock(self.world, self.config.training_seconds, progress)


def calibrate(trainer: Trainer, log: Log) -> tuple[dict[str, Tensor], float]:
    """GPTQ's Hessians, summed over ranks, on training data that comes next; the seconds it took."""
    config = trainer.config
    if not config.gptq_batches:
        return {}, 0.0
    trainer.world.enter("calibration of GPTQ")
    limit = config.gptq_seconds if config.max_wallclock_seconds else math.inf
    hessians, used, seconds = sum_moments(trainer, config.gptq_batches, limit)
    log(f"gptq_calibration batches:{used} time:{1e3 * seconds:.0f}ms")
    if used < config.gptq_batches:
        log(
            f"warning: calibration ended with its time, {limit:.1f} s, after {used} of "
            f"GPTQ_BATCHES={config.gptq_batches}"
        )
    return hessians, seconds


def sum_moments(
    trainer: Trainer, count: int, limit: float = math.inf
) -> tuple[dict[str, Tensor], int, float]:
    """GPTQ's Hessians of `count` micro-batches a rank, or of those that end within `limit` seconds.

    Then how many these are, at least one, and the seconds it took.
    """
    world, used = trainer.world, 0
    began = time.perf_counter()

    def on_time() -> bool:
        world.synchronize()
        return (time.perf_counter() - began) * (used + 1) / used < limit

    def unseen() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal used
        steps = map(trainer.batches.micro, itertools.count(trainer.step))
        batches = itertools.chain.from_iterable(steps)
        while used < count and (not used or world.on_main(on_time)):
            used += 1
            yield next(batches)

    moments = input_moments(trainer.model, unseen(), trainer.config.gptq_embed)
    hessians = {name: world.all_reduce(moment) for name, moment in moments.items()}
    world.synchronize()
    return hessians, used, world.on_main(lambda: time.perf_counter() - began)


RESERVE_TRIAL = 4  # micro-batches a rank


def measure_reserve(trainer: Trainer, log: Log) -> float:
    """For GPTQ_SECONDS=-1, puts the seconds that GPTQ will take into the trainer's options.

    That is by a trial, off the clock, whose sums are not kept: of calibration, and of rounding if a
    refit follows. Returns the seconds reserved.
    """
    config = trainer.config
    if not config.gptq_batches or not config.max_wallclock_seconds:
        return 0.0
    if config.gptq_seconds < 0:
        trainer.world.enter("trial of GPTQ's calibration")
        sums, *_ = sum_moments(trainer, 1)  # the first one loads and tunes kernels
        count = min(config.gptq_batches, RESERVE_TRIAL)
        *_, seconds = sum_moments(trainer, count)
        seconds *= config.gptq_batches / count
        if config.refit_steps:
            time_to_round(trainer, dict(itertools.islice(sums.items(), 1)))  # likewise
            seconds += time_to_round(trainer, sums)
        seconds *= 1.1
        log(f"gptq_reserve batches:{config.gptq_batches} time:{1e3 * seconds:.0f}ms")
        trainer.config = replace(config, gptq_seconds=seconds)
        trainer.clock = Clock(trainer.world, trainer.config.training_seconds)
    return trainer.config.gptq_seconds


def time_to_round(trainer: Trainer, hessians: Mapping[str, Tensor]) -> float:
    """Seconds in which all parameters are rounded, by GPTQ those that have a Hessian."""
    began = time.perf_counter()
    with as_stored(dict(trainer.model.named_parameters()), trainer.config, hessians):
        trainer.world.synchronize()
    return trainer.world.on_main(lambda: time.perf_counter() - began)


CUT_OFF = "cut off when the process ends"  # the name of such a thread


@contextlib.contextmanager
def put_back(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters have their values again afterwards."""
    params = [*params]
    exact = [p.detach().clone() for p in params]
    try:
        yield
    finally:
        torch._foreach_copy_([p.data for p in params], exact)


@contextlib.contextmanager
def as_stored(
    params: Mapping[str, nn.Parameter], config: Config, hessians: Mapping[str, Tensor]
) -> Iterator[None]:
    """The values that an artifact gives back in place of those of the parameters it rounds."""
    rounded = {name: p for name, p in params.items() if role_of(p).bits}
    with put_back(rounded.values()):
        for name, p in rounded.items():
            p.data.copy_(dequantize_rows(*store(p, config, hessians.get(name)).tensors))
        yield


def not_rounded(trainer: Trainer) -> list[nn.Parameter]:
    """What an artifact has in float16."""
    return [p for p in trainer.params if not role_of(p).bits]


def end_of_refit(config: Config, rounded: float, before: float) -> float:
    """When a refit ends, in seconds since it began, of which rounding took the first.

    Those are of the time reserved for GPTQ. Where that was not enough, the steps have less than
    REFIT_SECONDS: with what came `before`, nothing is to pass MAX_WALLCLOCK_SECONDS.
    """
    cap = config.max_wallclock_seconds
    return min(rounded + config.refit_seconds, cap - before) if cap else math.inf


def refit(trainer: Trainer, hessians: Mapping[str, Tensor], log: Log, before: float = 0.0) -> float:
    """Tunes `not_rounded` parameters to the rounded matrices, on training data that comes next.

    The matrices themselves are as before afterwards, and so are rounded to the same integers
    again. Training and calibration took the seconds `before`; it returns those it took itself.
    """
    config, world = trainer.config, trainer.world
    if not config.refit_steps:
        return 0.0
    world.enter("refit")
    began = time.perf_counter()

    def seconds() -> float:
        world.synchronize()
        return world.on_main(lambda: time.perf_counter() - began)

    betas = config.beta1, config.beta2
    adam = torch.optim.Adam(not_rounded(trainer), betas=betas, eps=config.adam_eps)
    calibrated = math.ceil(config.gptq_batches / trainer.batches.accumulation)
    first = trainer.step + calibrated  # rounding has not seen these batches either
    step, loss = 0, math.nan
    with as_stored(dict(trainer.model.named_parameters()), config, hessians):
        rounded = spent = seconds()
        limit = end_of_refit(config, rounded, before)
        per_step = trainer.clock.per_step  # of training, whose steps do more
        while step < config.refit_steps and spent + per_step < limit:
            trainer.sum_gradients(trainer.batches.micro(first + step), trainer.model.scoring)
            trainer.skipped.mask(trainer.gradients, first + step)
            done = max(step / config.refit_steps, (spent - rounded) / (limit - rounded))
            adam.param_groups[0]["lr"] = config.refit_lr * (1 - done)
            adam.step()
            loss = trainer.gradients.loss.item()
            step += 1
            now = seconds()
            spent, per_step = now, now - spent
    if step < config.refit_steps:
        log(
            f"REFIT_SECONDS={config.refit_seconds} of MAX_WALLCLOCK_SECONDS="
            f"{config.max_wallclock_seconds} have no time for more of REFIT_STEPS="
            f"{config.refit_steps}"
        )
    times = f"rounding:{1e3 * rounded:.0f}ms time:{1e3 * spent:.0f}ms"
    log(f"refit steps:{step} train_loss:{loss:.4f} {times}")
    return spent


# ---- 9. Compiling, averages, reports and checkpoints -------------------------------------------

BACKEND = torch.nn.attention.SDPBackend
KERNELS = {
    "auto": [BACKEND.CUDNN_ATTENTION, BACKEND.FLASH_ATTENTION, BACKEND.MATH],
    "cudnn": [BACKEND.CUDNN_ATTENTION],
    "flash": [BACKEND.FLASH_ATTENTION],
    "math": [BACKEND.MATH],
}  # of ATTN_BACKEND; the first that takes the shapes


class Compiler:
    """What COMPILE means here: a graph of the model for each mode, graphs of a block, or none."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.modes = 1 if config.eval_only else len(training_modes(config))
        self.level: str = config.compile
        if config.compile == "auto":
            # Six graphs of `growing` would take four minutes of a node; by block a third of one.
            # Blocks cost T 6 % of a step on an H200 (records/h200); roofline had said as much.
            whole = "model" if self.modes <= 2 else "block"
            self.level = whole if world.on_cuda else "off"
        if config.fused_mlp:
            require(world.on_cuda, "FUSED_MLP=1 needs a GPU: its kernel is for CUDA alone")
            triton_module()

    def build(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # What PyTorch's cache of compiled graphs is blind to.
        tag: str = self.config.attn_backend
        if self.config.fused_mlp:
            tag += mlp_kernel().src
        torch.compiler.config.cache_key_tag = tag
        # Every kind of layer, mode and shape of a batch has a graph; beyond the limit torch ends
        # the run, so it is out of reach.
        torch._dynamo.config.recompile_limit = 1024
        return torch.compile(function, dynamic=False, fullgraph=True)

    def forward(self, model: GPT) -> Callable[..., Tensor]:
        """The model as a function of ids, targets and mode."""
        ops = PLAIN_OPS
        if self.config.attn_backend != "auto":
            ops = ops._replace(attention=torch_attention)
        if self.config.fused_mlp:
            ops = ops._replace(mlp=fused_mlp())
        if self.level == "block":
            ops = ops._replace(block=self.build(block), loss=self.build(head_loss))
        whole = self.build(model) if self.level == "model" else model
        return functools.partial(whole, ops=ops)

    def newton_schulz(self) -> Callable[..., Tensor]:
        if self.level == "off":
            return newton_schulz
        return torch.compile(newton_schulz, dynamic=False)

    def fall_back(self, error: InputError, log: Callable[[str], Any]) -> None:
        """To blocks from the whole model if COMPILE=auto; else the error ends the run."""
        if self.config.compile != "auto" or self.level != "model":
            raise Ended(
                1, f"COMPILE={self.level} failed (COMPILE=off trains without it): {error}"
            ) from error
        log(f"warning: COMPILE=model failed, going on with COMPILE=block: {error}")
        self.level = "block"
        torch._dynamo.reset()


class Average:
    """The average of the weights over steps that AVERAGE asks for; it is what is exported."""

    def __init__(self, params: list[nn.Parameter], config: Config) -> None:
        self.config, self.count = config, 0  # weights taken
        self.weights: list[Tensor] = []
        if config.average != "none":
            self.weights = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, params: list[nn.Parameter], step: int, factor: float) -> None:
        """Takes the weights after `step` steps, at `factor` of the learning rates, if due."""
        config = self.config
        if config.average == "none":
            return
        if config.average == "ema":
            share = 1 - config.ema_decay if self.count else 1.0
        elif factor < config.swa_lr_factor and step % config.swa_every == 0:
            share = 1 / (self.count + 1)
        else:
            return
        self.count += 1
        torch._foreach_lerp_(self.weights, [p.data for p in params], share)

    @contextlib.contextmanager
    def swapped_in(self, params: list[nn.Parameter]) -> Iterator[None]:
        """The average in place of the last weights, if it has taken any."""
        weights = [p.data for p in params]
        last = [w.clone() for w in weights if self.count]
        if self.count:
            torch._foreach_copy_(weights, self.weights)
        try:
            yield
        finally:
            if self.count:
                torch._foreach_copy_(weights, last)


class Reporter:
    """What a run says of its training: log lines, metrics, a line of progress on a terminal."""

    def __init__(self, config: Config, log: Log) -> None:
        self.config, self.log = config, log
        self.last_mode: Mode | None = None
        self.repeats = False  # whether it was said that training data come again

    def at(self, step: int) -> str:
        return f"step:{step}/{self.config.iterations}"

    def mode(self, step: int, mode: Mode) -> None:
        """Says what changes: passes and bits."""
        if mode != self.last_mode:
            bits = f"bits:{mode.outside.bits} core_bits:{mode.core.bits}"
            tail = " gradient:last_pass" if mode.truncated else ""
            self.log(f"{self.at(step)} passes:{mode.passes} {bits}{tail}")
        self.last_mode = mode

    def wants(self, step: int) -> bool:
        every, last = self.config.train_log_every, self.config.iterations
        return step <= 10 or step % every == 0 or step == last

    def step(self, trainer: Trainer) -> None:
        """Of the step that was made last."""
        step, loss = trainer.step, trainer.check_finite()
        seconds = trainer.clock.read(step, now=True)
        rate = step * self.config.train_batch_tokens / seconds
        if self.wants(step):
            skipped = trainer.skipped.count
            tail = f" skipped_steps:{skipped}" if skipped else ""
            self.log(
                f"{self.at(step)} train_loss:{loss:.4f} train_time:{1e3 * seconds:.0f}ms "
                f"step_avg:{1e3 * seconds / step:.2f}ms{tail}"
            )
            if step == self.config.train_log_every:
                self.log(speed(trainer))  # while there is time to give a slow machine back
            norm = trainer.grad_norm
            if norm is None:
                norm = trainer.gradients.of_params.norm()
            self.log.metric(
                step=step,
                train_loss=loss if math.isfinite(loss) else None,
                train_seconds=seconds,
                tokens_per_second=rate,
                step_ms=1e3 * trainer.clock.per_step,
                lr_factor=trainer.lr_factor,
                grad_norm=norm.item() if norm.isfinite() else None,
            )
        self.warn_of_repetition(trainer)
        self.log.progress(self.bar(trainer, loss, seconds, rate))

    def warn_of_repetition(self, trainer: Trainer) -> None:
        if not self.repeats and trainer.epochs > 1:
            total = trainer.batches.tokens.total
            self.log(f"warning: all {total:,} training tokens were read, and are read again")
            self.repeats = True

    def bar(self, trainer: Trainer, loss: float, seconds: float, rate: float) -> str:
        """A bar of steps or of time, whichever ends first, and what is left."""
        step, iterations, clock = trainer.step, self.config.iterations, trainer.clock
        left = min((iterations - step) * clock.per_step, clock.cap - seconds)
        rest = f"{duration(left)} left" if left >= 0.5 else "validating"
        done = max(step / iterations, seconds / clock.cap)
        bar = ("=" * round(8 * done)).ljust(8)
        return (
            f"[{bar}] {done:4.0%}  step {step:,}/{iterations:,}  loss {loss:.3f}  "
            f"{rest}  {rate:,.0f} tokens/s"
        )

    def end(self, trainer: Trainer, seconds: float, why: str) -> None:
        step, planned = trainer.step, self.config.iterations
        self.warn_of_repetition(trainer)
        if why == "wallclock_cap":
            self.log(f"stopping_early: {why} train_time:{1e3 * seconds:.0f}ms {self.at(step)}")
            warmup = self.config.muon_momentum_warmup_steps
            if step < warmup and not self.config.muon_momentum_warmup_fraction:
                self.log(
                    f"warning: the time was up after {step:,} of {planned:,} planned steps, within "
                    f"MUON_MOMENTUM_WARMUP_STEPS={warmup}: fewer would suit this speed"
                )

    def validation(
        self, trainer: Trainer, seconds: float, score: Score, facts: Callable[[], dict[str, Any]]
    ) -> None:
        """Of the weights after the last step; `facts` are further metrics, computed on rank 0."""
        step = trainer.step
        self.log(
            f"{self.at(step)} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
            f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / max(step, 1):.2f}ms"
        )

        def write() -> None:
            figures = score._asdict() | facts()
            self.log.metric(step=step, train_seconds=seconds, **figures)

        trainer.world.on_main(write)  # the others wait here: a tracker may be slow


def duration(seconds: float) -> str:
    """As in 45 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress(NamedTuple):
    """The counters of a checkpoint."""

    step: int = 0
    averaged: int = 0  # weights in the average
    seconds: float = 0.0  # of training
    per_step: float = 0.0  # seconds
    due: int = 1  # step at which the clock is read next
    capped: bool = False  # the time was up: no step follows, whatever is reserved for export now
    most: float = 0.0  # seconds by which modes have gone

    @classmethod
    def from_json(cls, values: dict[str, Any], iterations: int) -> Progress:
        """From a checkpoint's header; ValueError if it is malformed."""
        values = {"capped": False, "most": 0.0} | values  # of a script that did not note them yet
        require(values.keys() == set(cls._fields), f"counters {sorted(values)}")
        require(isinstance(values["capped"], bool), f"counters capped {values['capped']!r:.80}")
        seconds, per_step, most = (float(values[name]) for name in ("seconds", "per_step", "most"))
        step, averaged, due = (int(values[name]) for name in ("step", "averaged", "due"))
        require(
            0 <= step <= iterations and 0 <= averaged <= step and 0 <= due < 1 << 32,
            f"counters step {step}, averaged {averaged}, due {due}",
        )
        good = all(0 <= x < 1e9 for x in (seconds, per_step, most))
        require(good, f"counters seconds {seconds}, per_step {per_step}, most {most}")
        return cls(step, averaged, seconds, per_step, due, values["capped"], most)


class Checkpoint(NamedTuple):
    """A checkpoint that was found good."""

    name: str
    progress: Progress
    metrics_bytes: int  # of metrics.jsonl when it was made
    threads: int  # of a rank on a CPU
    values: np.ndarray | None = None  # float32, of `Trainer.state` one after the other; on rank 0


class HostCopier:
    """Copies tensors to the host beside training: on a stream of its own, into pinned memory."""

    def __init__(self, world: World) -> None:
        self.stream = torch.cuda.Stream() if world.on_cuda else None

    def start(self, tensors: list[Tensor]) -> Callable[[], np.ndarray]:
        """Begins a copy of what the tensors hold now; what is returned waits for it."""
        flat = torch.cat([t.flatten() for t in tensors])
        if self.stream is None:
            return flat.numpy
        host = torch.empty(flat.shape, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(flat, non_blocking=True)
            copied = self.stream.record_event()
        flat.record_stream(self.stream)  # its memory is not given to others before

        def wait_for_copy() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return wait_for_copy


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.ckpt"


class Checkpoints:
    """Writes a run's checkpoints beside training and keeps two, and of a finished run the last."""

    def __init__(self, config: Config, world: World, tokens: int, log: Log) -> None:
        self.config, self.world, self.tokens, self.log = config, world, tokens, log
        self.every = config.save_every
        if config.save_every < 0:
            self.every = 500 if world.on_cuda else 0  # half a minute of eight H100s
        self.copier = HostCopier(world)
        self.writer = ThreadPoolExecutor(1)
        self.pending: list[Future] = []
        self.keep = 2
        self.metrics_bytes = 0  # when training ended; a run that goes on from there scores again

    def end(self, trainer: Trainer) -> None:
        """Of a training that is complete."""
        self.metrics_bytes = self.log.size()
        self.keep = 1
        if self.every:
            # No step any more: other ranks wait for a slow disk as long as it takes.
            self.world.enter(f"checkpoint after step {trainer.step}, the last")
            self.save(trainer)

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def save(self, trainer: Trainer, patience: float | None = None) -> None:
        """Copies the state now and has a thread write it, unless it still writes the last one."""
        step, began = trainer.step, time.perf_counter()
        if wait(self.pending, patience).not_done:
            self.log(f"warning: no checkpoint of step {step}: the one before is not written yet")
            return
        waited = time.perf_counter() - began
        if waited > 1:
            self.log(
                f"warning: the checkpoint of step {step} waited {waited:.1f} s for the one before "
                f"to be written: the disk is slow for SAVE_EVERY={self.every}"
            )
        if not self.world.is_main:
            return
        try:
            values = self.copier.start(trainer.state())
        except Exception as error:  # no memory for it, say; as in `write`
            self.log(f"warning: no checkpoint of step {step}: {error}")
            return
        header = dict(
            config=asdict(self.config),
            tokens=self.tokens,
            metrics=self.metrics_bytes or self.log.size(),
            threads=torch.get_num_threads(),
            progress=trainer.progress()._asdict(),
        )
        self.pending = [self.writer.submit(self.write, step, header, values)]

    def write(self, step: int, header: dict[str, Any], values: Callable[[], np.ndarray]) -> None:
        path = checkpoint_path(self.log.folder, step)
        try:
            write_atomically(path, *seal("checkpoint", "none", header, values().data))
            # After a damaged one, from before which a run went on, the newest may not be the last.
            others = sorted({*self.log.folder.glob("step_*.ckpt")} - {path})
            for old in others[: len(others) - (self.keep - 1)]:
                old.unlink()
        except Exception as error:  # whatever it is, the run is worth more than its checkpoint
            self.log(f"warning: no checkpoint of step {step}: {error}")

    @contextlib.contextmanager
    def kept(self, trainer: Trainer) -> Iterator[None]:
        """Saves what there is if training or export ends early: a signal, a lost rank, ..."""
        world = self.world
        try:
            yield
            wait(self.pending)  # in here: a signal that comes now is to cut no writing off
        except (Exception, Ended) as end:
            code = end.code if isinstance(end, Ended) else 0
            saves = world.is_main and self.can_save(end, code)
            if saves:
                # Still under the watchdog: a rank that died in the last step keeps the device.
                world.synchronize()
            world.ending = True  # the disk takes the time it takes, and other ranks may leave
            if saves:
                self.save_last(trainer)
            self.log.to_file(f"ended: {end}")
            if code == EXIT_NON_FINITE or (code == EXIT_STOPPED and trainer.clock.signal):
                world.wait_for_main()  # all ranks end for this reason
            raise
        finally:
            self.writer.shutdown()

    def can_save(self, end: BaseException, code: int) -> bool:
        """Whether what ends a run, with an exit code or an error, leaves a state to go on from."""
        if self.world.training and not isinstance(end, (Ended, *KNOWN)):
            return False  # it may have come amid an update
        if code == EXIT_LOST and self.world.on_cuda:
            return False  # NCCL gave no gradient back, and the update that uses it is queued
        return code != EXIT_NON_FINITE

    def save_last(self, trainer: Trainer) -> None:
        """What there is when a run ends early, and how to go on from it."""
        self.save(trainer)
        wait(self.pending)
        if any(self.log.folder.glob("step_*.ckpt")):
            self.log(f"to resume: {command_to_resume(self.world, self.log.folder)}")


class OtherRun(InputError):
    """A checkpoint is whole, but not of a run that this one may go on from."""


def find_checkpoint(config: Config, trainer: Trainer, log_later: list[str]) -> Checkpoint | None:
    """What RESUME names: a path, or the last of a folder that is whole; for auto the run's, if any.

    The tensors are on rank 0 alone. InputError if there is none that can be used.
    """
    size = sum(t.numel() for t in trainer.state())
    tokens = trainer.batches.tokens.total
    values: list[np.ndarray] = []

    def read(origin: str, header: Any, raw: bytes, _: str) -> Checkpoint:
        progress = Progress.from_json(header["progress"], config.iterations)
        complete = progress.capped or progress.step == config.iterations
        was, tokens_were = dict(header["config"]), int(header["tokens"])
        texts = what_differs(config, was, tokens_were, tokens, complete)
        if texts:
            raise OtherRun(f"{origin} is of another run: {texts}")
        found = np.frombuffer(raw, np.float32)
        require(len(found) == size, f"{len(found)} numbers where {size} are due")
        require(np.isfinite(found).all(), "it holds numbers that are not finite")
        values.append(found)
        return Checkpoint("", progress, int(header["metrics"]), int(header["threads"]))

    def find() -> Checkpoint | None:
        auto = config.resume == "auto"
        path = Path(config.log_dir, config.run_id) if auto else Path(config.resume)
        paths, errors = [path], []
        if auto or path.is_dir():
            paths = sorted(path.glob("step_*.ckpt"), reverse=True)
        for path in paths:
            try:
                data = path.read_bytes()
                reader = functools.partial(read, str(path))
                checkpoint = unseal("checkpoint", data, str(path), len(data), reader)
                return checkpoint._replace(name=path.name)
            except OtherRun:
                raise
            except KNOWN as error:
                log_later.append(f"warning: {error}")
                errors.append(str(error))
        require(not errors, f"RESUME={config.resume}: {' / '.join(errors)}")
        require(auto, f"RESUME={config.resume} is a folder without checkpoints")
        return None

    found = trainer.world.on_main(find)
    return found and found._replace(values=values[-1] if values else None)


def what_differs(
    config: Config, was: dict[str, Any], tokens_were: int, tokens: int, complete: bool
) -> str:
    """Between a checkpoint's run and this one; "" if this one may go on from it.

    `complete`: no step of training follows, so what is reserved for export moves none.
    """
    now = asdict(config)
    unknown = sorted(was.keys() - now)
    require(not unknown, f"its run had options that this script lacks: {unknown}")
    was = asdict(Config()) | neutral_values(Config) | was  # an option that was added since was off
    may_differ = MAY_DIFFER if config.qat else MAY_DIFFER | EXPORT_OPTIONS
    if config.max_wallclock_seconds and not complete:
        may_differ -= RESERVING  # training would end, and its rates fall, at another time
    differ = [name for name in now if name not in may_differ and now[name] != was[name]]
    if now["iterations"] >= was["iterations"]:
        differ = [name for name in differ if name != "iterations"]
    texts = [f"{name.upper()} was {show(was[name]):.80}, is {show(now[name])}" for name in differ]
    if tokens != tokens_were:
        texts.append(f"the training data had {tokens_were} tokens, have {tokens}")
    if not texts:
        return ""
    may = ", ".join(sorted(name.upper() for name in may_differ - EVAL_OPTIONS))
    return (
        f"{'; '.join(texts):.600}. Give the run's variables again; ITERATIONS may grow, and these "
        f"may change: {may}, and what EVAL_ONLY takes"
    )


def restore(trainer: Trainer, checkpoint: Checkpoint | None, log: Log) -> None:
    """Goes on from a checkpoint on all ranks, or begins at step 0."""
    name = "nothing"
    if checkpoint:
        name, state = checkpoint.name, trainer.state()
        flat = torch.cat([t.flatten() for t in state])
        if checkpoint.values is not None:
            flat.copy_(torch.from_numpy(checkpoint.values.copy()))
        trainer.world.broadcast(flat)
        for t, values in zip(state, flat.split([t.numel() for t in state])):
            t.copy_(values.view_as(t))
        trainer.go_on_from(checkpoint.progress)
        threads = torch.get_num_threads()
        if threads != checkpoint.threads and not trainer.world.on_cuda:
            log(
                f"warning: {checkpoint.threads} threads a rank before, {threads} now: sums, and so "
                "losses, may differ in the last bits from an uninterrupted run"
            )
    log.cut_metrics(checkpoint.metrics_bytes if checkpoint else 0)  # what follows comes again
    log(f"resumed from step:{trainer.step} of {name}")


# ---- 10. Ranks, logs and files -----------------------------------------------------------------

KNOWN = (InputError, OSError)  # told in one line, others with their traceback


class RankFailed(InputError):
    """What went wrong on a rank, and is no mistake of the user's: a traceback."""


class Ended(BaseException):
    """An end of a run before its own. No Exception: what forgives those must not forgive this."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


EXIT_INPUT, EXIT_NON_FINITE, EXIT_SIZE, EXIT_STOPPED, EXIT_LOST = range(2, 7)
STOP_SIGNALS = [
    signal.Signals[name]
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
]


def launched_as(env: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of ranks, as the launcher says; InputError if nobody launched the others."""
    rank = parse("RANK", env.get("RANK", "0"), int)
    size = parse("WORLD_SIZE", env.get("WORLD_SIZE", "1"), int)
    require(0 <= rank < size, f"RANK={rank} is not one of WORLD_SIZE={size} ranks")
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 and not env.get(n)]
    require(
        not missing,
        f"WORLD_SIZE={size}, but {' and '.join(missing)} not set: start ranks with "
        f"`torchrun --standalone --nproc_per_node={size} train_gpt.py`",
    )
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        require(
            "WORLD_SIZE" in env or env.get(name, "1") == "1",
            f"{name}={env.get(name)}, but WORLD_SIZE is not set: every task would train the whole "
            "model. Start one task a node, and let torchrun start its ranks",
        )
    again, nodes = env.get("TORCHELASTIC_MAX_RESTARTS", "0"), env.get("GROUP_WORLD_SIZE", "1")
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    require(
        size == 1 or again == "0" or nodes == "1" or not shared,
        "torchrun --max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: "
        "ranks that are started again would wait for those before them",
    )
    return rank, size


def choose_cuda(device: str, size: int) -> bool:
    """Whether to train on CUDA. InputError rather than a run on CPUs that nobody asked for."""
    if device == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    driver = Path("/proc/driver/nvidia/version")
    has_gpu = driver.exists() or Path("/dev/nvidiactl").exists()
    found = ""
    if driver.exists():
        line = driver.read_text().splitlines()[0]
        number = re.search(r"\d+\.\d+[.\d]*", line)
        found = f" The driver here is {number[0] if number else line}."
    built = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if not torch.version.cuda:
        built = f"PyTorch {torch.__version__} is built without CUDA"
    way_out = "Install a build of PyTorch with CUDA"
    if torch.version.cuda:
        way_out = (
            "CUDA 13 needs driver 580 or newer, CUDA 12.8 driver 570: update the driver, or "
            "install a PyTorch for the driver at hand (README: which releases work)"
        )
    advice = f"{built} and sees no GPU.{found} {way_out}. DEVICE=cpu trains on the CPU"
    require(device != "cuda", f"DEVICE=cuda: {advice}")
    require(not has_gpu, advice)
    require(size == 1, f"WORLD_SIZE={size} ranks without a GPU: {advice}")
    return False


class World:
    """The ranks of a run: NCCL on CUDA, gloo on CPUs, and no process group for a single rank."""

    def __init__(self, env: Mapping[str, str], timeout: float = 60.0, device: str = "auto") -> None:
        self.rank, self.size = launched_as(env)
        self.is_main = self.rank == 0
        self.on_cuda = choose_cuda(device, self.size)
        self.place, self.training, self.signal = "start", False, ""
        self.ending = False  # by itself: no signal and no watchdog is to cut short what it saves
        self.lock: TextIO | None = None  # of the run's folder
        self.collectives = 0  # begun
        self.watchdog: Watchdog | None = None
        self.slow_group: Any = None  # of gloo, for what may take long
        self.device = torch.device("cpu")
        if self.on_cuda:
            local, gpus = env.get("LOCAL_RANK", "0"), torch.cuda.device_count()
            require(
                int(local) < gpus,
                f"LOCAL_RANK={local}, but this node has {gpus} GPUs: start one process for each",
            )
            self.device = torch.device(f"cuda:{local}")
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        if self.size > 1:
            self.join(env, timeout)

    def join(self, env: Mapping[str, str], timeout: float) -> None:
        """Makes the process group, and one of gloo for what may take long."""
        try:
            store, *_ = next(dist.rendezvous("env://"))
        except (RuntimeError, ValueError) as error:
            place = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
            raise InputError(
                f"ranks cannot meet at MASTER_ADDR:MASTER_PORT={place}; is the port in use? "
                f"({str(error).splitlines()[0]:.200})"
            ) from None
        if env.get("GROUP_WORLD_SIZE", "1") == "1":
            # It may hold keys of ranks that were started before.
            store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        self.store = store
        self.store.set(f"beat {self.rank}", json.dumps(Beat()))  # there when it is first read
        # Torch's own watchdog comes after ours: it needs no interpreter, but knows no rank's name
        # and aborts the process long after its time-out.
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "500")
        dist.init_process_group(
            "nccl" if self.on_cuda else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=timeout + 10),
            device_id=self.device if self.on_cuda else None,
        )
        self.slow_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))
        self.watchdog = Watchdog(self, timeout)

    def enter(self, place: str, training: bool = False) -> None:
        """Says where this rank is now. Signals end it at once, but in training after a step."""
        self.place, self.training = place, training
        if self.signal and not training:
            raise Ended(EXIT_STOPPED, f"{place}: stopped by {self.signal}")

    def handle_signals(self) -> None:
        """Every catchable request to stop ends alike; one that was to be ignored stays ignored."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.interrupt)

    def interrupt(self, number: int, _: Any) -> None:
        if not self.signal:  # torchrun sends once more what all have got from a terminal
            self.signal = signal.Signals(number).name
            if not self.ending:  # torchrun sends one too when another rank has ended
                self.enter(self.place, self.training)

    def collective(self, call: Callable[[], Any]) -> None:
        """Calls a collective operation; Ended if a rank is gone or late."""
        if self.size == 1:
            return
        self.collectives += 1
        try:
            if not self.training:
                dist.barrier(self.slow_group)  # for half an hour: rank 0 packs alone
            call()
        except RuntimeError as error:
            raise self.lost_rank(error) from error

    def lost_rank(self, error: RuntimeError) -> Ended:
        """The end of a run whose collective failed: gloo says at once that a connection is gone."""
        assert self.watchdog
        self.ending = True  # it saves what there is
        # Until beats have ceased to come. Seconds may hold fewer rounds: a signal makes one longer.
        until = self.watchdog.rounds + GRACE + 2
        while self.watchdog.rounds < until:
            time.sleep(0.1)
        silent = self.watchdog.silent(GRACE - 1)
        left = {*range(self.size)} - {*silent}
        self.is_main = self.rank == min(left, default=self.rank)  # the first that is left saves
        lost = self.watchdog.missing(GRACE - 1) or "a collective failed"
        reason = str(error).splitlines()[0]  # gloo's is long
        return Ended(EXIT_LOST, f"{self.place}: {lost} ({reason:.160})")

    def wait_for_main(self) -> None:
        """Where all ranks end: until rank 0 has saved. torchrun kills it 30 s after another left.

        It says why it ends when it does. One that is gone, or whose store is, says nothing more.
        """
        dog = self.watchdog
        if dog and not self.is_main:
            while not (dog.beats[0].failed or dog.quiet[0] > GRACE or dog.store_error):
                time.sleep(0.1)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.collective(functools.partial(dist.all_reduce, x))
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """x of rank 0 on all ranks."""
        self.collective(functools.partial(dist.broadcast, x, 0))
        return x

    def gather(self, job: Callable[[], Any]) -> list[Any]:
        """What `job` returns on every rank, on all; InputError if it raises anything on one.

        That is RankFailed if it is nothing that a user can mend.
        """
        try:
            mine = job()
        except KNOWN as error:
            mine = InputError(str(error))
        except Exception:
            mine = RankFailed(traceback.format_exc())
        seen = [mine] * self.size
        gather = functools.partial(dist.all_gather_object, seen, mine, group=self.slow_group)
        self.collective(gather)  # by gloo: it needs no device
        for result in seen:
            if isinstance(result, InputError):
                raise result
        return seen

    def on_all(self, job: Callable[[], Any], facts: Callable[[Any], Any]) -> Any:
        """What `job` returns here; InputError on all ranks if it fails on one or `facts` differ."""
        mine: list[Any] = []

        def do() -> str:
            mine.append(job())
            return repr(facts(mine[0]))

        seen = set(self.gather(do))
        require(
            len(seen) == 1,
            f"ranks differ in their variables, data, script or PyTorch: {' / '.join(sorted(seen))}",
        )
        return mine[0]

    def on_main(self, job: Callable[[], Any]) -> Any:
        """What `job` returns on rank 0, on all ranks."""
        return self.gather(lambda: job() if self.is_main else None)[0]

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


# For how many beats, of a second each, a rank may be quiet:
GRACE = 4  # after it failed: ranks that end for the same reason are to say so themselves
HURRY = 5  # after a signal, whose sender kills after 30 s; twice that in a collective


class Beat(NamedTuple):
    """What a rank tells the others every second."""

    number: int = 0  # of the beat: where it stands still, the process does not run
    collectives: int = 0  # begun: whoever has begun fewer than others is waited for
    place: str = "start"
    failed: str = ""  # why the rank ends, if it does
    pid: int = 0


class Watchdog:
    """Ends this rank when another one is lost, or when its own main thread does not go on.

    A collective that one rank never joins keeps the devices of the others, and their main threads
    sit in C, where no exception and no signal handler reaches them. Two threads do not depend on
    those. `tell` exchanges beats through the store; `judge` counts for how long others' beats, or
    own collectives, have not moved. `judge` asks no store: a stopped one never answers.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, math.ceil(timeout)
        self.store = world.store.clone()  # a connection serves one thread at a time
        self.store_error = ""
        self.failed = ""  # why this rank ends
        self.leaving = threading.Event()
        self.beats = [Beat()] * world.size  # as last read
        self.rounds = 0  # of `judge`
        self.quiet = [0] * world.size  # of these, since beats changed
        self.known = self.beats  # in the last round
        self.begun: tuple[int, bool] | None = None  # collectives, and whether it trained, likewise
        self.stuck = 0  # rounds since a collective began, or since a signal
        self.longest = 0  # of these between two collectives of training
        self.asked = 0  # rounds since a signal came; 0: none has
        # C writes a signal's number there at once; its Python handler waits for the main thread.
        self.signals, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        self.telling = threading.Thread(target=self.tell, daemon=True)
        self.telling.start()
        threading.Thread(target=self.judge, daemon=True).start()

    def tell(self) -> None:
        """Every second: own beat into the store, all beats out of it. The last one says why."""
        world = self.world
        keys = [f"beat {rank}" for rank in range(world.size)]
        last = False
        try:
            for number in itertools.count(1):
                last = self.leaving.is_set()
                beat = Beat(number, world.collectives, world.place, self.failed, os.getpid())
                self.store.set(keys[world.rank], json.dumps(beat))
                self.beats = [Beat(*json.loads(text)) for text in self.store.multi_get(keys)]
                if last:
                    return
                self.leaving.wait(1)
        except RuntimeError as error:  # `judge` sees that no beat comes back
            self.store_error = str(error).splitlines()[0]

    def judge(self) -> None:
        """Every second: counts what has not moved, and ends the process if that is too long.

        It counts its own rounds: a job that was suspended as a whole finds nothing late.
        """
        while not self.leaving.is_set():
            if select.select([self.signals], [], [], 1)[0]:
                self.signals.recv(64)
                self.heard()
                time.sleep(1)
            self.count()
            reason = self.verdict()
            if reason and not self.world.ending and not self.leaving.is_set():
                say(sys.stderr, f"[rank {self.world.rank}] {self.world.place}: {reason}")
                self.end_stopped()
                os._exit(EXIT_LOST)

    def heard(self) -> None:
        """A signal."""
        if not self.asked:
            self.asked, self.begun = 1, None

    def count(self) -> None:
        """One round: `quiet` and `stuck` are for how many rounds beats and collectives stand still.

        One that moved has its count back at 0.
        """
        beats = self.beats
        self.rounds += 1
        for rank, beat in enumerate(beats):
            self.quiet[rank] = self.quiet[rank] + 1 if beat == self.known[rank] else 0
        # Of a wait before training nothing counts in it: the first step has all its time. After a
        # signal nothing counts of what was before: work of one rank's own begins no collective.
        now = (self.world.collectives, self.world.training)
        if now != self.begun and self.world.training and not self.asked:
            self.longest = max(self.longest, self.stuck)
        self.stuck = self.stuck + 1 if now == self.begun else 0
        self.asked = self.asked + 1 if self.asked else 0
        self.known, self.begun = beats, now

    def verdict(self) -> str:
        """Why this rank must end, and "" if it need not."""
        deaf = self.quiet[self.world.rank]  # rounds since the own beat came back
        if deaf > (GRACE if self.store_error else self.timeout):
            return f"lost ranks: [0] or torchrun, no answer from the store {self.store_error}"
        if any(beat.failed and quiet > GRACE for beat, quiet in zip(self.beats, self.quiet)):
            return self.missing(GRACE)
        patience = HURRY if self.asked else self.timeout
        if max(self.quiet) > patience:
            return self.missing(patience)
        # A step of some seconds is no collective that hangs, so it has the time of two.
        hurry = min(max(2 * HURRY, 2 * self.longest), self.timeout)
        hurried = self.asked > 0 and self.stuck > hurry
        if hurried or (self.world.training and self.stuck > self.timeout):
            return self.missing(patience) or "no rank is lost, but a collective does not end"
        return ""

    def silent(self, patience: int) -> list[int]:
        """The ranks that have sent no beat for that long.

        If the own beat does not come back, the store is gone, and with it rank 0 or torchrun.
        """
        if self.quiet[self.world.rank] > patience:
            return [0]
        return [rank for rank, quiet in enumerate(self.quiet) if quiet > patience]

    def missing(self, patience: int) -> str:
        """Which ranks are lost: without beats for that long, or else in fewer collectives."""
        ahead = max(beat.collectives for beat in self.beats)
        lost = self.silent(patience)
        lost = lost or [rank for rank, beat in enumerate(self.beats) if beat.collectives < ahead]
        facts = []
        for rank in lost:
            beat = self.beats[rank]
            why = beat.failed or ("silent" if self.quiet[rank] > GRACE else "does not go on")
            facts.append(f"rank {rank} at {beat.place}: {why}")
        return f"lost ranks: {lost} ({'; '.join(facts)})" if lost else ""

    def end_stopped(self) -> None:
        """Kills silent ranks of this machine: SIGTERM does not end one that is stopped.

        torchrun would give it 30 s. Parent and command line say whether a process is a rank.
        """
        if self.quiet[self.world.rank] > GRACE:
            return  # the store is silent, which says nothing of the ranks
        mine = process_facts(os.getpid())
        for beat, quiet in zip(self.beats, self.quiet):
            if quiet > HURRY and beat.pid and process_facts(beat.pid) == mine:
                os.kill(beat.pid, signal.SIGKILL)

    def leave(self, failed: str) -> None:
        """What the main thread calls when it ends: nothing is judged any more.

        Why it `failed`, if it did, goes to the others.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # this rank is about to end
        self.failed = failed
        self.leaving.set()
        self.telling.join(3)
        if failed and not self.world.signal:
            time.sleep(2)  # of all ranks' beats: rank 0 may take the store with it


def process_facts(pid: int) -> tuple[str, bytes]:
    """Parent and command line of a process of this machine; empty ones if there is none."""
    folder = Path(f"/proc/{pid}")
    try:
        parents = re.findall(r"^PPid:\s*(\d+)", (folder / "status").read_text(), re.M)
        return parents[0], (folder / "cmdline").read_bytes()
    except OSError:
        return "", b""


def keep_freed_memory() -> None:
    """Has glibc keep freed memory instead of faulting it in again at every step."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)


def say(stream: TextIO | None, text: str, end: str = "\n") -> None:
    """Prints, if the stream takes it. A closed pipe or a full disk behind it ends no run."""
    if stream is None:
        return
    try:
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        # What is left in its buffer would fail again when Python exits.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def append_line(path: Path, line: str) -> None:
    """Appends a line as a whole, or nothing and OSError."""
    data = line.encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


class Tracker:
    """Weights & Biases, or TensorBoard's files in the run's folder."""

    send: Callable[[dict[str, Any]], Any]  # the metrics of a step
    finish: Callable[[], Any]

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def begin(self) -> None:
        """Imports the package and opens the run, which may take minutes."""
        if self.kind == "wandb":
            wandb = importlib.import_module("wandb")
            run = wandb.init(name=self.folder.name, dir=str(self.folder))
            self.send, self.finish = run.log, run.finish
            return
        board = importlib.import_module("torch.utils.tensorboard")
        writer = board.SummaryWriter(str(self.folder), flush_secs=5)

        def add(values: dict[str, Any]) -> None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, values["step"])

        self.send, self.finish = add, writer.close


class Log:
    """Rank 0's records: train.log for people, metrics.jsonl for programs, a terminal's progress."""

    def __init__(self, folder: Path, is_main: bool, tracker: str = "none") -> None:
        self.folder, self.metrics, self.is_main = folder, folder / "metrics.jsonl", is_main
        self.tracker = Tracker(tracker, folder) if tracker != "none" and is_main else None
        self.watched = is_main and sys.stderr is not None and sys.stderr.isatty()
        self.objections: list[str] = []  # why this run is not a submission

    def size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Drops the metrics after the first `size` bytes."""
        if self.is_main and self.metrics.exists():
            os.truncate(self.metrics, min(size, self.size()))

    def to_file(self, line: str, name: str = "train.log") -> None:
        if not self.is_main:
            return
        try:
            append_line(self.folder / name, line)
        except OSError as error:  # a full disk is no reason to end training
            say(sys.stderr, f"warning: not logged: {error}: {line[:200]}")

    def object(self, reason: str) -> None:
        """Says why the run is not a submission, as result.json will."""
        self.objections.append(reason)
        self(f"not a submission: {reason}")

    def __call__(self, text: str) -> None:
        self.progress("")
        if self.is_main:
            say(sys.stdout, text)
        self.to_file(text)

    def metric(self, **values: Any) -> None:
        self.to_file(json.dumps(values), "metrics.jsonl")
        self.tracked(lambda tracker: tracker.send(values))

    def tracked(self, act: Callable[[Tracker], Any]) -> None:
        """Has the tracker act; one that fails, in whatever way, is switched off."""
        if self.tracker is None:
            return
        try:
            act(self.tracker)
        except Exception as error:
            self.tracker = None
            self(f"warning: TRACKER is off: {type(error).__name__}: {error}")

    def progress(self, text: str) -> None:
        if self.watched:
            say(sys.stderr, f"\r\033[K{text}", end="")


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """Writes a file that has its name only once it is whole on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        temporary.unlink(missing_ok=True)  # others may need the room
        if isinstance(error, OSError):
            error.filename = str(path)  # a write does not say of what
        raise
    os.replace(temporary, path)


# A sealed file: magic, SHA-256 of the rest, codec, length of what is packed; packed: length of the
# header, header (JSON), values.
SEAL = struct.Struct("<8s32s8sQ")
MAGIC = dict(artifact=b"GOLFGPT\x02", checkpoint=b"GOLFRUN\x02")  # the last byte is the version
CODECS = ("none", "zlib", "lzma", "brotli")
SHUFFLED = "-2"  # behind a codec's name: what it packs are first the even bytes, then the odd ones


def brotli_module() -> Any:
    try:
        return importlib.import_module("brotli")
    except ImportError:
        raise InputError("brotli is not installed: pip install -U brotli") from None


def compress(codec: str, data: bytes) -> bytes:
    if codec.endswith(SHUFFLED):
        return compress(codec.removesuffix(SHUFFLED), data[::2] + data[1::2])
    if codec == "zlib":
        return zlib.compress(data, 9)
    if codec == "lzma":
        return lzma.compress(data, preset=6)  # higher ones gain nothing on weights (PR 1230)
    if codec == "brotli":
        return brotli_module().compress(data, quality=11, lgwin=24)
    assert codec == "none", codec
    return data


def decompress(codec: str, data: bytes, limit: int) -> bytes:
    """The first `limit` bytes or a little more; ValueError if `data` is malformed."""
    if codec.endswith(SHUFFLED):
        shuffled = decompress(codec.removesuffix(SHUFFLED), data, limit)
        ordered, even = bytearray(len(shuffled)), (len(shuffled) + 1) // 2
        ordered[::2], ordered[1::2] = shuffled[:even], shuffled[even:]
        return bytes(ordered)
    require(codec in CODECS, f"{codec!r} is none of the codecs {', '.join(CODECS)}")
    if codec == "none":
        return data[:limit]
    try:
        if codec == "zlib":
            return zlib.decompressobj().decompress(data, limit)
        if codec == "lzma":
            return lzma.LZMADecompressor(memlimit=1 << 28).decompress(data, limit)
    except (zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"not {codec}: {error}") from None
    brotli = brotli_module()
    try:
        return brotli.Decompressor().process(data, output_buffer_limit=limit)
    except brotli.error as error:
        raise ValueError(f"not {codec}: {error}") from None
    except TypeError:
        raise InputError("brotli is too old: pip install -U brotli") from None


def seal(
    kind: str, codec: str, header: dict[str, Any], *values: bytes | memoryview
) -> list[bytes | memoryview]:
    """A sealed file in pieces.

    Without a codec the values are among them as they are. Copies of a checkpoint's would hold up
    all threads, and with them training; hashing and writing do not.
    """
    text = json.dumps(header).encode()
    raw = [struct.pack("<I", len(text)), text, *values]
    size = sum(memoryview(piece).nbytes for piece in raw)
    if codec != "none":
        raw = [compress(codec, b"".join(raw))]
    body = [struct.pack("<8sQ", codec.encode(), size), *raw]
    digest = hashlib.sha256()
    for piece in body:
        digest.update(piece)
    return [MAGIC[kind], digest.digest(), *body]


def unseal(kind: str, data: bytes, origin: str, limit: int, read: Callable[..., Any]) -> Any:
    """`read(header, values, codec)` of a sealed file; InputError names `origin`.

    At most `limit` bytes are unpacked.
    """
    an = "an" if kind == "artifact" else "a"
    foreign = f"{origin} is not {an} {kind} of this script"
    require(len(data) >= SEAL.size, foreign)
    magic, digest, name, length = SEAL.unpack_from(data)
    version, known = magic[-1], MAGIC[kind][-1]
    require(magic[:-1] == MAGIC[kind][:-1], foreign)
    require(version == known, f"{origin} is of version {version}, this script reads {known}")
    hashed = memoryview(data)[len(magic) + len(digest) :]
    require(
        hashlib.sha256(hashed).digest() == digest,
        f"{origin} is damaged or truncated: its checksum does not match; copy it again",
    )
    try:
        bomb = length > min(limit, 128 * len(data))
        require(length >= 4 and not bomb, f"impossible length {length}")
        codec = name.rstrip(b"\0").decode()
        raw = decompress(codec, data[SEAL.size :], length)
        require(len(raw) == length, f"{length} bytes announced, {len(raw)} found")
        size = int.from_bytes(raw[:4], "little")
        end = 4 + min(size, 1 << 20)  # 1,024 layers take 0.23 MB
        return read(json.loads(raw[4:end].decode()), raw[end:], codec)
    except OtherRun:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) if isinstance(error, InputError) else repr(error)
        raise InputError(f"{origin} is not a valid {kind}: {reason:.600}") from None


# ---- 11. Presets, names and help ---------------------------------------------------------------
# PR 855's 21 runs (Ap is A'), the naive baseline, the "baseline wins" report (its head counts are
# not published; these give its parameter counts), PR 1230: `growing` without error feedback and
# bigrams, which could not learn there, `growing_live` with them; and PR 1720: `frontier`.


def layers(prelude: int, shared: int, loops: int, coda: int) -> dict[str, Any]:
    return dict(num_prelude=prelude, num_shared=shared, num_loops=loops, num_coda=coda)


PLAIN = layers(0, 0, 1, 0) | neutral_values(Architecture)  # every technique off
SCREEN = dict(iterations=2000, max_wallclock_seconds=0.0)  # series 1: 1xH100, 2,000 steps
REPORT = dict(leaky_relu_slope=0.0, max_wallclock_seconds=180.0)  # "baseline wins": 1xH100, 180 s
AT_640 = REPORT | dict(model_dim=640)
AT_768 = REPORT | dict(model_dim=768, num_heads=12)
AT_1024 = REPORT | dict(model_dim=1024, num_heads=16)
NORM_AND_MIX = dict(use_peri_norm=True, use_birkhoff_mix=True)
SCALE = NORM_AND_MIX | dict(use_timestep_scale=True)
CAPPED = SCALE | dict(timestep_gamma_max=4.0)
OWN_MLPS = CAPPED | dict(share_attn_only=True)
FILM = CAPPED | dict(use_timestep_bias=True)
LEARNED = FILM | dict(depth_embed="learned")
UNIQUE = FILM | dict(use_unique_norms=True, unique_norms_input_norm=True)
GROWING = (
    PLAIN
    | layers(4, 3, 3, 4)
    | dict(
        core_skips="published",
        pass_scale_init=0.5,
        passes_schedule="0:1,0.626:2,0.813:3",
        jacobian_weight=0.01,
        mlp_mult=3.0,
        ln_scale=True,
        rope_dims=16,
        rope_base=10000 * 2 ** (16 / 14),
        xsa_last_n=4,
        ve_layers="9,10",
        smear_gate="published",
        train_seq_len=2048,
        train_batch_tokens=786432,
        micro_batch_tokens=98304,  # a rank's part of a batch on 8 GPUs: no accumulation
        matrix_init="orthogonal",
        warmdown_iters=3500,
        matrix_lr=0.025,
        scalar_lr=0.025,
        tied_embed_lr=0.035,
        muon_momentum=0.99,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=1500,
        muon_wd=0.04,
        adam_wd=0.04,
        scalar_wd=0.04,
        grad_clip_norm=0.3,
        average="ema",
        qat_lr_factor=0.15,
        qat_core_only=True,
        matrix_bits=6,
        quant_clip="matrix",
        quant_scale_floor=1 / 127,
        codec="lzma",
        eval_stride=64,
        ttt_lr=0.002,
    )
)
FRONTIER = (
    PLAIN
    | layers(3, 3, 3, 5)
    | dict(
        vocab_size=8192,
        data_path="./data/datasets/fineweb10B_sp8192",
        tokenizer_path="./data/tokenizers/fineweb_8192_bpe.model",
        passes_schedule="0:1,0.35:3",
        core_skips="looped",
        skip_gates=True,
        parallel_layers="7-10",
        mlp_mult=4.0,
        ln_scale=True,
        rope_dims=16,
        xsa_last_n=11,
        qk_gain_init=5.25,
        train_seq_len=2048,
        train_batch_tokens=786432,
        micro_batch_tokens=98304,
        matrix_init="orthogonal",
        iterations=9000,  # out of reach: the time ends a run
        data_seed=1,
        warmdown_fraction=0.75,
        matrix_lr=0.026,
        scalar_lr=0.02,
        tied_embed_lr=0.03,
        muon_row_norm=True,
        muon_momentum=0.97,  # PR 1720: .99; .97 gained .0005 in PR 1514, .016 at `pocket_narrow`
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_fraction=0.26,  # 1,500 steps of 102 ms in PR 1720's 588 s
        muon_wd=0.095,
        adam_wd=0.085,
        scalar_wd=0.02,
        grad_clip_norm=0.3,
        average="ema",
        ema_decay=0.9965,
        matrix_bits=6,
        quant_clip="sdclip",
        matrix_clip_sigmas=0.0,  # as few as fit; PR 1720 has 12.85 with brotli
        gptq_batches=16,
        gptq_seconds=-1.0,
        gptq_embed=True,
        codec="lzma",  # brotli, a package of its own, leaves room for fewer sigmas
        eval_stride=64,
    )
)


class Preset(NamedTuple):
    """Values of options, and what they are."""

    values: dict[str, Any]
    what: str
    bpb: float | None = None  # val_bpb after rounding, as published with the system
    step_ms: float | None = (
        None  # milliseconds a step, likewise: series 1 on one H100, else on eight
    )


SYSTEMS: dict[str, Preset] = {
    "Ap": Preset(SCREEN | dict(num_layers=8), "series 1, A': 8 flat layers", 1.305, 357.88),
    "Bp": Preset(
        SCREEN | layers(0, 4, 2, 0), "series 1, B': 4 layers twice, nothing else", 1.3637, 363.37
    ),
    "C": Preset(
        SCREEN | NORM_AND_MIX | layers(0, 4, 2, 0),
        "series 1: B' + Output-LN + convex mix",
        1.3587,
        352.85,
    ),
    "Cp": Preset(
        SCREEN | dict(use_birkhoff_mix=True) | layers(0, 4, 2, 0),
        "series 1, C': B' + convex mix",
        1.366,
        346.95,
    ),
    "D": Preset(
        SCREEN | SCALE | layers(0, 4, 2, 0), "series 1: C + uncapped timestep scale", 1.3584, 356.74
    ),
    "E": Preset(SCREEN | SCALE | layers(1, 3, 2, 1), "series 1: D as 1+3x2+1", 1.3428, 357.83),
    "F": Preset(SCREEN | SCALE | layers(1, 2, 3, 1), "series 1: D as 1+2x3+1", 1.3622, 360.24),
    "G": Preset(
        NORM_AND_MIX | layers(1, 3, 2, 1),
        "series 2: 1+3x2+1, Output-LN + convex mix",
        1.2856,
        34.59,
    ),
    "H": Preset(NORM_AND_MIX | layers(1, 4, 2, 1), "series 2: G as 1+4x2+1", 1.2704, 41.92),
    "I": Preset(CAPPED | layers(1, 4, 2, 1), "series 2: H + capped timestep scale", 1.2668, 41.92),
    "J": Preset(NORM_AND_MIX | layers(1, 4, 3, 1), "series 2: G as 1+4x3+1", 1.267, 57.36),
    "K": Preset(CAPPED | layers(1, 4, 3, 1), "series 2: J + capped timestep scale", 1.2659, 59.28),
    "L": Preset(
        OWN_MLPS | layers(1, 4, 2, 1), "series 3: I, an MLP of its own for every pass", 1.2406, 42.6
    ),
    "M": Preset(
        OWN_MLPS | layers(1, 4, 3, 1),
        "series 3: K, an MLP of its own for every pass; too large at 8 bits",
    ),
    "N": Preset(FILM | layers(1, 4, 2, 1), "series 3: I + FiLM bias", 1.2641, 42.48),
    "O": Preset(FILM | layers(1, 4, 3, 1), "series 3: K + FiLM bias", 1.2625, 58.18),
    "P": Preset(
        UNIQUE | LEARNED | layers(1, 4, 2, 1),
        "series 4: N + unique norms + learned depth code",
        1.2663,
        48.54,
    ),
    "Q": Preset(
        UNIQUE | LEARNED | layers(1, 4, 3, 1),
        "series 4: O + unique norms + learned depth code",
        1.2643,
        66.96,
    ),
    "R": Preset(LEARNED | layers(1, 4, 3, 1), "series 4: O + learned depth code", 1.2639, 62.56),
    "S": Preset(UNIQUE | layers(1, 4, 3, 1), "series 4: O + unique norms", 1.2629, 61.87),
    "T": Preset(
        FILM | dict(depth_embed="sinusoidal") | layers(1, 4, 3, 1),
        "series 5: O + sinusoidal depth code; the default",
        1.2624,
        58.86,
    ),
    "naive": Preset(
        dict(num_layers=9, leaky_relu_slope=0.0),
        "the contest's baseline: 9 flat layers, relu^2",
        1.2244,
        43.54,
    ),
    "flat_9x1_512": Preset(REPORT | dict(num_layers=9), '"baseline wins": 9 flat layers, D 512'),
    "recur_3x3_640": Preset(AT_640 | layers(0, 3, 3, 0), '"baseline wins": 3x3, D 640'),
    "recur_3x3_768": Preset(AT_768 | layers(0, 3, 3, 0), '"baseline wins": 3x3, D 768'),
    "recur_4x3_768": Preset(AT_768 | layers(0, 4, 3, 0), '"baseline wins": 4x3, D 768'),
    "recur_3x3_1024": Preset(AT_1024 | layers(0, 3, 3, 0), '"baseline wins": 3x3, D 1024'),
    "recur_2x6_1024": Preset(AT_1024 | layers(0, 2, 6, 0), '"baseline wins": 2x6, D 1024'),
    "growing": Preset(
        GROWING, "growing recurrence (PR 1230): 4 + 3x(1, 2, 3) + 4, less its dead parts", 1.1163
    ),
    "growing_live": Preset(
        GROWING
        | dict(core_skips="all", smear_gate="document", feedback_rank=2, bigram_vocab_size=512),
        "the same with error feedback, bigrams and skips that learn",
    ),
    "frontier": Preset(
        FRONTIER,
        "PR 1720: 3+3x(1, 3)+5, U-Net over the loop, parallel residual, XSA, 8192 pieces",
        1.0818,
    ),
}
SCALES: dict[str, Preset] = {
    "tiny": Preset(
        dict(
            vocab_size=1024,
            data_path="./data/datasets/sample_sp1024",
            tokenizer_path="./data/tokenizers/sample_1024_bpe.model",
            train_seq_len=256,
            train_batch_tokens=8192,
            micro_batch_tokens=8192,
            val_batch_size=16384,
            iterations=100,
            max_wallclock_seconds=0.0,
            warmup_steps=1,
            warmdown_iters=50,
            val_loss_every=0,
            train_log_every=25,
            muon_momentum_warmup_steps=50,
            ema_decay=0.9,
            gptq_seconds=1.0,
            ttt_chunk_tokens=8192,
            dtype="float32",  # bfloat16 takes 11 times as long on an AMD EPYC 7003
        ),
        "a quarter of the width, half the heads, 256-token sequences, the sample corpus; for a CPU",
    )
}


def preset_values(preset: str) -> dict[str, Any]:
    """The values of a system and/or a scale."""
    names = preset.split(",") if preset else []
    systems = [name for name in names if name in SYSTEMS]
    scales = [name for name in names if name in SCALES]
    for name in names:
        known = [*SYSTEMS, *SCALES]
        alike = [k for k in known if k.lower() == name.lower()]
        alike += difflib.get_close_matches(name, known, 1, 0.6)
        hint = f"; did you mean {alike[0]}?" if alike else f": there are {', '.join(known)}"
        require(name in known, f"PRESET={preset}: {name} is not a preset{hint}")
    require(
        len(systems) <= 1 and len(scales) <= 1,
        f"PRESET={preset} names more than one system or scale",
    )
    values = PLAIN | SYSTEMS[systems[0]].values if systems else {}
    if not scales:
        return values
    full = asdict(Architecture()) | values
    small = dict(
        model_dim=full["model_dim"] // 4,
        num_heads=full["num_heads"] // 2,
        num_kv_heads=full["num_kv_heads"] // 2,
    )
    return values | small | SCALES[scales[0]].values


# Names that other scripts of this contest read, which a pasted command may hold, and what has their
# place here.
INSTEAD = {
    name: ours
    for ours, names in {
        "TRAIN_SEQ_LEN": "EVAL_SEQ_LEN TTT_EVAL_SEQ_LEN ROPE_TRAIN_SEQ_LEN",
        "EVAL_STRIDE": "STRIDE SLIDING_WINDOW_ENABLED EVAL_OVERLAP SLIDING_STRIDE",
        "EVAL_ONLY": "EVAL_ONLY_PATH EVAL_ONLY_QUANTIZED_PATH TTT_EVAL_ONLY TTT_ONLY TTT_ONLY_EVAL",
        "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS EVAL_BATCH_SIZE EVAL_BATCH_SEQS SW_EVAL_BATCH",
        "TTT_LR": "TTT_ENABLED GLOBAL_TTT_LR",
        "TTT_EPOCHS": "GLOBAL_TTT_EPOCHS TTT_GRAD_STEPS",
        "TTT_CHUNK_TOKENS": "TTT_CHUNK_SIZE GLOBAL_TTT_CHUNK_TOKENS",
        "TTT_MOMENTUM": "GLOBAL_TTT_MOMENTUM",
        "TTT_GRAD_CLIP": "GLOBAL_TTT_GRAD_CLIP",
        "WARMDOWN_FRACTION": "WARMDOWN_FRAC MUON_COOLDOWN_START",
        "LR_FLOOR": "MIN_LR",
        "PASSES_SCHEDULE": "ENABLE_LOOPING_AT",
        "NUM_PRELUDE, NUM_SHARED and NUM_CODA": "LOOP_START LOOP_END OUTER_LAYERS "
        "NUM_UNIQUE_BLOCKS",
        "NUM_LOOPS": "EFFECTIVE_DEPTH NUM_VIRTUAL_LAYERS NUM_PASSES",
        "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR": "LEARNING_RATE LR",
        "MUON_WD": "MUON_WEIGHT_DECAY",
        "ADAM_WD": "ADAM_WEIGHT_DECAY EMBED_WD",
        "MUON_WD and ADAM_WD": "WEIGHT_DECAY",
        "SCALAR_WD": "DECAY_SCALARS",
        "MUON_ROW_NORM": "MUON_EQ_R MUON_ROW_NORMALIZE",
        "AVERAGE=swa": "SWA_ENABLED LAWA_ENABLED",
        "SWA_EVERY": "LAWA_FREQ",
        "SWA_LR_FACTOR": "SWA_START_FRAC",
        "AVERAGE=ema": "EMA_ENABLED",
        "QAT_FRACTION": "QAT QAT_ENABLED LATE_QAT QAT_START_FRAC QAT_AFTER_STEP",
        "QAT_LR_FACTOR": "LATE_QAT_THRESHOLD QAT_THRESHOLD",
        "MATRIX_BITS": "QUANT_BITS QUANT_BITS_MLP QAT_BITS QAT_INT6 USE_INT6",
        "EMBED_BITS": "QUANT_BITS_EMBED",
        "MATRIX_CLIP_SIGMAS": "GPTQ_CLIP_SIGMAS",
        "EMBED_CLIP_SIGMAS": "GPTQ_EMBED_CLIP_SIGMAS",
        "GPTQ_DAMPING": "GPTQ_DAMP",
        "QUANT_CLIP=matrix": "GPTQ_LITE",
        "GPTQ_BATCHES": "USE_GPTQ GPTQ_CALIBRATION_BATCHES GPTQ_CALIB_BATCHES GPTQ_CALIB_SAMPLES "
        "GPTQ_NUM_SEQS",
        "GPTQ_SECONDS": "GPTQ_RESERVE_SECONDS GPTQ_RESERVE_MS",
        "CODEC": "COMPRESSOR USE_ZSTD ZSTD_LEVEL USE_LZMA USE_BROTLI",
        "SIZE_LIMIT_BYTES": "TARGET_MB",
        "SMEAR_GATE": "USE_SMEARGATE SMEAR_GATE_ENABLED",
        "BIGRAM_VOCAB_SIZE": "USE_BIGRAM_HASH BIGRAM_BUCKETS BIGRAM_HASH_BUCKETS",
        "BIGRAM_DIM": "BIGRAM_HASH_DIM",
        "VE_LAYERS": "VE_ENABLED",
        "CORE_SKIPS and SKIP_GATES": "SKIP_GATES_ENABLED",
        "PARALLEL_LAYERS": "PARALLEL_START_LAYER",
        "ATTN_GATE_WIDTH": "ATTN_OUT_GATE_ENABLED GATE_ATTN_OUT GATE_WIDTH",
        "MATRIX_INIT=orthogonal": "USE_ORTHO_INIT",
        "LEAKY_RELU_SLOPE": "NEGATIVE_SLOPE",
        "MLP_MULT": "MLP_HIDDEN",
        "MODEL_DIM": "EMBEDDING_DIM",
        "COMPILE": "COMPILE_MODEL USE_COMPILE",
        "ITERATIONS": "MAX_STEPS",
        "VAL_LOSS_EVERY": "VAL_EVERY",
        "RESUME": "RESUME_FROM RESUME_PATH",
        "SAVE_EVERY": "CHECKPOINT_EVERY",
        "LOG_DIR": "ARTIFACT_DIR CHECKPOINT_DIR MODEL_SAVE_PATH TTT_OUTPUT_DIR",
        "DATA_PATH": "DATA_DIR DATASETS_DIR DATA_PATH_BASE DATASET_PATH",
        "MICRO_BATCH_TOKENS": "GRAD_ACCUM_STEPS",
    }.items()
    for name in names.split()
}
# Others of their names, for which there is nothing here.
UNSUPPORTED = frozenset(
    """ATTN_CLIP_SIGMAS ATTN_OUT_GATE_SRC ATTN_VARIANT BLOCK_LARS_MIN_SCALE
    BLOCK_LARS_TRUST BLOCK_TYPE CASEOPS_ENABLED CE_PURE_FRAC CE_WEIGHT COEFF_LR_BASE COEFF_LR_SCALE
    DEPTH_LORA_RANK DTG_ENABLED EMBED_INNER_DIM EVAL_NTK_ALPHA EVAL_STATE_RESET
    EVAL_TEMP FP16_EMBED_EXPORT FP16_KEEP_NAME_PATTERNS FP16_PASSTHROUGH_PATTERNS FP_STORAGE
    FUSED_CE_ENABLED GATED_ATTENTION GATED_ATTN_ENABLED GATED_ATTN_INIT_STD GATED_ATTN_QUANT_GATE
    GATE_ATTN_SRC GATE_MLP_OUT GATE_WINDOW GDN_CONV_SIZE GDN_EXPAND_V
    GDN_HEAD_DIM_RATIO GDN_LAYERS GDN_N_HEADS GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_DOC_LIMIT
    GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR
    GPTQ_BLOCK_SIZE GPTQ_GEN_LEN GPTQ_GEN_TEMP
    HNET_LR_DIFF INDEPENDENT_LR INT4_LAYERS INT4_STEP INT6_LAYERS INT6_LAYER_END INT6_LAYER_START
    INT6_STEP INT8_FULL_RANGE_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS JEPA_PURE_FRAC JEPA_WEIGHT
    LATENT_KV_DIM LAWA_K LEGENDRE_DEGREE_ATTN LEGENDRE_DEGREE_FFN LEGENDRE_GROUPS LORA_LR LORA_RANK
    LQER_ASYM_ENABLED LQER_ASYM_GROUP LQER_ENABLED LQER_FACTOR_BITS LQER_RANK LQER_TOP_K LR_SCHEDULE
    LR_START MAMBA3_CHUNK_SIZE MAMBA3_D_STATE MAMBA3_EXPAND MAMBA3_HEADDIM MAMBA3_NGROUPS
    MAMBA3_OUTPROJ_NORM MAMBA3_ROPE_FRACTION MLP_CLIP_SIGMAS MLP_RANK MODE MTP_LOSS_WEIGHT
    MTP_NUM_HEADS MUON_BETA2 MUON_COOLDOWN_END NUM_ATTN_LAYERS NUM_LIGHT_BLOCKS
    PARALLEL_FINAL_LANE PHASED_TTT_ENABLED PHASED_TTT_NUM_PHASES
    PHASED_TTT_PREFIX_DOCS PREQUANT_ONLY PRUNE_RATIO QUANT_CLIP_RANGE QUANT_CONFIG RATIO_LOSS_WEIGHT
    ROPE_YARN SCALE_STORAGE SIGREG_WEIGHT SKIP_POST_TRAIN_EVAL SKIP_TOKENS
    SMEAR_GATE_WIDTH SPARSE_ATTN_GATE_ENABLED SPARSE_ATTN_GATE_INIT_STD SPARSE_ATTN_GATE_SCALE
    SWA_DECAY SWEEP_MODE TARGET_AVG_CHUNK_LEN TRIGRAM TTT_BATCH_SEQS TTT_BATCH_SIZE TTT_BETA1
    TTT_BETA2 TTT_DOC_LIMIT TTT_EVAL_BATCHES TTT_FREEZE_BLOCKS TTT_HEARTBEAT_SECONDS TTT_K_LORA
    TTT_LORA_ALPHA TTT_LORA_LR TTT_LORA_RANK TTT_MLP_LORA TTT_OPTIMIZER TTT_O_LORA
    TTT_WARM_START_A TTT_WEIGHT_DECAY USE_WRAP VALUE_RESIDUAL VAL_DOC_FRACTION VAL_MAX_BATCHES
    VAL_MAX_TOKENS WARMDOWN_SHAPE WD_TAPER_FINAL_MULT WD_TAPER_START_FRAC WRAP_INIT_SCALE""".split()
)
# Names that shells, schedulers and other tools are known to set: a warning, not an error.
ORDINARY = frozenset(
    """ARTIFACT_DIR CHECKPOINT_DIR CODE COMPILER DATASETS_DIR DATASET_PATH DATA_DIR DEVICES
    DEVICE_ID LIB_DIR LMOD_DIR LOGDIR LOG_LEVEL MODE MODEL_DIR MODEL_ID MODEL_SAVE_PATH RUN_DIR
    SEEDS STRIDE""".split()
)


def looks_like(name: str, ours: list[str]) -> str:
    """The option that `name` may be meant for; "" if it looks like none.

    It does in other letters, as the beginning or the end of an option, as one with more behind it,
    by a typing error, or as a rate.
    """
    if name.upper() in ours:
        return name.upper()
    begins = [option for option in ours if "_" in name and option.startswith(f"{name}_")]
    ends = [option for option in ours if "_" in name and option.endswith(f"_{name}")]
    longer = [option for option in ours if "_" in option and name.startswith(f"{option}_")]
    close = difflib.get_close_matches(name, ours, 1, 0.8)
    rates = [option for option in ours if name.endswith("_LR") and option.endswith("_LR")]
    return next(iter([*begins, *close, *ends, *longer, *rates]), "")


def questionable_names(env: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What is wrong with names in `env` that are no options, and what only deserves a warning."""
    ours = [f.name.upper() for f in fields(Config)]
    errors, ignored = [], []
    for name in sorted(env.keys() - {*ours, "USE_DEPTH_EMBED"}):
        alike = looks_like(name, ours)
        problem = ""
        if name in INSTEAD:
            problem = f"{name} is read by other scripts of the contest; set {INSTEAD[name]} instead"
        elif name in UNSUPPORTED:
            problem = f"{name} is read by other scripts of the contest and has no counterpart here"
        elif alike:
            problem = f"{name} is not an option; did you mean {alike}?"
        if problem and name in ORDINARY:
            ignored.append(name)
        elif problem:
            errors.append(f"{problem} (or unset {name})")
    warnings = [f"ignored, as they are no options: {', '.join(ignored)}"] if ignored else []
    return errors, warnings


def help_text(width: int = 80) -> str:
    """What `--help` prints."""
    parts = (
        "Train a depth-recurrent GPT for parameter golf, pack it into 16 MB, reload the pack and "
        "score it in bits per byte.",
        "  PRESET=tiny python train_gpt.py                        a small model on a CPU\n"
        "  torchrun --standalone --nproc_per_node=8 train_gpt.py  a whole run on 8 GPUs\n"
        "  EVAL_ONLY=logs/RUN/model.ptz python train_gpt.py       score an artifact again",
        "Options are environment variables. A preset sets many of them; those that are set win. "
        "`--help NAME` explains one.",
    )
    text = [textwrap.fill(parts[0], width), parts[1], textwrap.fill(parts[2], width)]
    for title, presets in (
        ("Systems, as in PRESET=K", SYSTEMS),
        ("Scales, as in PRESET=K,tiny", SCALES),
    ):
        lines = [title]
        for name, preset in presets.items():
            score = f" [{preset.bpb:.4f}]" if preset.bpb else ""
            lines.append(hanging(f"  {name:<15}", preset.what + score, width))
        text.append("\n".join(lines))
    text.append(
        textwrap.fill(
            "Figures in brackets are the val_bpb published with a system, after rounding; that of "
            "growing is after test-time training, that of frontier of sliding windows.",
            width,
        )
    )
    for f in fields(Config):
        group = f.metadata["group"]
        text.append((f"{group}\n" if group else "") + option_text(f, width))
    return "\n\n".join(text)


def hanging(head: str, body: str, width: int) -> str:
    """A paragraph whose further lines begin below its first word."""
    return textwrap.fill(body, width, initial_indent=head, subsequent_indent=" " * len(head))


def option_text(f: Field, width: int = 80) -> str:
    """What `--help` says of an option: default, type and bounds, or choices, meaning, needs."""
    kind = option_types()[f.name]
    choices = ("0", "1") if kind is bool else get_args(kind)
    takes = "|".join(choices) or "text"
    if kind in (int, float):
        takes = f"{'integer' if kind is int else 'number'}, {range_text(f)}"
    lines = [f"  {f.name.upper()}={show(f.default)}  ({takes})"]
    lines.append(hanging("      ", f.metadata["help"], width))
    if f.metadata["needs"]:
        needs = [need_text(need) for need in f.metadata["needs"].split()]
        lines.append(hanging("      ", f"Acts only with {' and '.join(needs)}.", width))
    return "\n".join(lines)


def need_text(need: str) -> str:
    """One entry of `needs` as variables are written: NUM_LOOPS>1, TIE_EMBEDDINGS=0."""
    if "|" in need:
        return " or ".join(map(need_text, need.split("|")))
    if need.startswith("!") and "=" in need:
        name, _, value = need[1:].partition("=")
        return f"{name.upper()} other than {value}"
    if need.startswith("!"):
        return f"{need[1:].upper()}=0"
    name = re.split("[>=]", need)[0]
    return need.replace(name, name.upper(), 1)


def help_for(name: str) -> str:
    """What `--help NAME` says of an option, a preset or several; InputError if it is neither."""
    presets = SYSTEMS | SCALES
    if "," in name or name in presets:
        values = preset_values(name)
        what = ", ".join(presets[part].what for part in name.split(","))
        known = {f.name: f for f in fields(Config)}
        texts = [
            f"{key.upper()}={show(value)}"
            for key, value in values.items()
            if value != known[key].default
        ]
        text = f"PRESET={name}: {what}. Other than the defaults are:"
        return textwrap.fill(text, 80) + "\n" + hanging("  ", " ".join(texts) or "none", 80)
    options = {f.name.upper(): f for f in fields(Config)}
    if name.upper() in options:
        return option_text(options[name.upper()])
    errors, _ = questionable_names({name.upper(): ""})
    alike = difflib.get_close_matches(name.upper(), options, 1, 0.6)
    alike += [preset for preset in presets if preset.lower() == name.lower()]
    hint = f"did you mean {' or '.join(alike)}?" if alike else "--help lists both"
    raise InputError(errors[0] if errors else f"{name} is neither an option nor a preset; {hint}")


def answer(arguments: list[str]) -> str:
    """What to print for command-line arguments; InputError if they are not --help [NAME]."""
    if arguments[0] in ("-h", "--help"):
        names = arguments[1:]
        return "\n\n".join(help_for(name) for name in names) if names else help_text()
    alike = difflib.get_close_matches(arguments[0], ["--help"], 1, 0.6)
    require(not alike, f"{arguments[0]}: did you mean --help?")
    words = re.split(r"[= ]", " ".join(arguments))
    name = words[0].lstrip("-").replace("-", "_").upper()
    value = words[1] if len(words) > 1 else "..."
    raise InputError(
        f"{' '.join(arguments)}: options are environment variables, as in "
        f"`{name}={value} python train_gpt.py`; --help lists them"
    )


# ---- 12. The run -------------------------------------------------------------------------------


@functools.cache
def script_file() -> bytes:
    """The file that runs, as it is when the run begins: its bytes count against the limit."""
    return Path(__file__).read_bytes()


def packed_text() -> bytes:
    """The text that this script was unpacked from (records/tools/packing.py); b"" if it was not."""
    return globals().get("READABLE_SOURCE", b"")


def source() -> bytes:
    """The text of this script, whoever edits it meanwhile."""
    return packed_text() or script_file()


def source_hash() -> str:
    return hashlib.sha256(source()).hexdigest()


def versions(world: World, codec: str = "") -> dict[str, str]:
    """What a run that packs by `codec` depends on besides its configuration and data."""
    device = torch.cuda.get_device_name() if world.on_cuda else platform.machine()
    found = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        sentencepiece=spm.__version__,
        cuda=f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
        device=device,
        threads=f"{torch.get_num_threads()} a rank",
        script_sha256=source_hash(),
    )
    if codec == "brotli":  # the others come with Python
        found["brotli"] = brotli_module().__version__
    if packed_text():
        found["packed_sha256"] = hashlib.sha256(script_file()).hexdigest()
    return found


def lock_folder(folder: Path) -> TextIO:
    """Locks a run's folder while this process lives; InputError names the one that has it."""
    file = open(folder / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        raise InputError(f"{folder} is in use by a run that is alive: process {holder}") from None
    except OSError as error:  # Lustre and NFS may have none
        say(sys.stderr, f"warning: {folder} cannot be locked ({error}): let no other run use it")
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def make_folder(folder: Path, config: Config, world: World) -> None:
    """Makes and locks a run's folder. InputError if it is another run's."""
    known = folder.exists()
    checkpoints = any(folder.glob("*.ckpt"))
    saved = f", with RESUME={folder} to go on from it" if checkpoints else ""
    resume = ", or RESUME=auto"
    if config.eval_only:
        saved = resume = ""
    result = result_beside(folder)
    if result is not None:
        verdict = " and ".join(result.get("not_a_submission") or [])
        which = f"a finished run (not a submission: {verdict})" if verdict else "a finished run"
        raise InputError(f"{folder} holds {which}: choose another RUN_ID{saved}")
    if (folder / "run.lock").exists():
        lock_folder(folder).close()  # says so if another run is alive there
    require(
        not known or config.resume == "auto",
        f"{folder} exists and would be overwritten: choose another RUN_ID{resume}",
    )
    require(
        checkpoints or not (folder / ARTIFACT).exists(),
        f"{folder} has the artifact of a training that is complete, but neither its score nor "
        f"a checkpoint: EVAL_ONLY={folder} scores it, another RUN_ID trains again",
    )
    folder.mkdir(parents=True, exist_ok=known)
    world.lock = lock_folder(folder)


def begin_log(path: Path) -> None:
    """Begins a run's log with the script, unless it has one: a folder may be older than its run.

    The script's bytes are delimited by their number: it may hold any line.
    """
    head = f"script_bytes:{len(source())} script_sha256:{source_hash()}\n".encode()
    if not path.exists() or not path.stat().st_size:
        write_atomically(path, head, source(), b"\n")


def open_log(config: Config, world: World) -> Log:
    """Makes the run's folder, new or resumed; the log opens with the script and its options."""
    name = config.run_id or time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
    folder = Path(config.log_dir) / world.on_main(lambda: name)
    log = Log(folder, world.is_main, config.tracker)
    world.on_main(lambda: make_folder(folder, config, world))
    world.on_main(lambda: begin_log(folder / "train.log"))
    for fact, value in versions(world, config.codec).items():
        log(f"{fact}:{value}")
    log.to_file(f"config:{json.dumps(asdict(config))}")
    log(f"folder:{folder}")
    log(f"set:{settings(config)}")
    span = 0 if config.eval_only or config.warmdown_fraction else config.warmdown_iters
    if span >= config.iterations:
        log(f"warning: WARMDOWN_ITERS={span}: the learning rate falls from step 0 on")
    world.on_main(lambda: log.tracked(Tracker.begin))  # before the clock runs
    return log


def settings(config: Config) -> str:
    """What differs from the preset, as variables with the preset's value."""
    before = Config(**preset_values(config.preset))
    texts = []
    for f in fields(Config):
        now, was = getattr(config, f.name), getattr(before, f.name)
        if now != was:
            usual = f" (preset: {show(was)})" if was != "" else ""
            texts.append(f"{f.name.upper()}={show(now)}{usual}")
    return " ".join(texts) or "nothing beside the preset"


def command_to_resume(world: World, folder: Path) -> str:
    """The command that resumes a run, with the variables of this one."""
    options = [f.name.upper() for f in fields(Config)] + ["USE_DEPTH_EMBED"]
    ours = {name: os.environ[name] for name in options if name in os.environ}
    return command(ours | dict(RUN_ID=folder.name, RESUME="auto"), world)


def command_to_score(config: Config, world: World, folder: Path) -> str:
    """The command that scores a run's artifact as the run would have, by its preset, too."""
    ours = {}
    for f in fields(Config):
        value, needs = getattr(config, f.name), f.metadata["needs"].split()
        acts = value != f.default and not any(map(config.unmet_need, needs))
        if acts and f.name in EVAL_OPTIONS - {"preset", "run_id", "log_dir"}:
            ours[f.name.upper()] = show(value)
    data = dict(DATA_PATH=config.data_path, TOKENIZER_PATH=config.tokenizer_path)
    return command(ours | data | dict(EVAL_ONLY=str(folder)), world)


def command(ours: Mapping[str, str], world: World) -> str:
    """The command that starts this script with the variables `ours`.

    Ranks on several nodes, or of a launcher other than torchrun, are told the variables alone.
    """
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in ours.items())
    if world.size > 1 and os.environ.get("GROUP_WORLD_SIZE") != "1":  # torchrun's number of nodes
        return f"start all {world.size} ranks, on every node, as before, with {variables}"
    script = shlex.quote(sys.argv[0] or "train_gpt.py")
    python = shlex.quote(sys.executable)
    if world.size > 1:
        python += f" -m torch.distributed.run --standalone --nproc_per_node={world.size}"
    return f"{variables} {python} {script}"


class Artifact(NamedTuple):
    """An artifact that was read from the disk."""

    config: Config  # with its architecture
    data: bytes
    model: GPT
    kind: str  # how matrices are held, as in int8+zlib


def data_beside(artifact: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Data and tokenizer by the result.json beside an artifact, where `env` does not say.

    InputError if that file does not either.
    """
    wanted = {"data_path", "tokenizer_path"} - {name.lower() for name in env}
    result = result_beside(artifact)
    if not wanted or result is None:
        return {}
    told = result.get("config")
    if not isinstance(told, dict) or not wanted <= told.keys():
        raise InputError(
            f"{artifact}: its result.json does not say what it was trained on: set DATA_PATH, "
            "TOKENIZER_PATH"
        )
    return {name: str(told[name]) for name in wanted}


def result_beside(artifact: Path) -> dict[str, Any] | None:
    """The result.json beside an artifact, or in a run's folder; None without one, {} if damaged."""
    path = (artifact if artifact.is_dir() else artifact.parent) / "result.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def read_artifact(path: Path, config: Config, world: World) -> Artifact:
    """An artifact, or that of a run's folder, which rank 0 alone needs to see."""

    def read() -> bytes:
        file = path / ARTIFACT if path.is_dir() else path
        require(file.exists(), f"EVAL_ONLY={path}: there is no {file}")
        return file.read_bytes()

    data = world.on_main(read)
    check_artifact_tokenizer(data, str(path), config)
    model, architecture, kind = load_model(data, str(path), config.eval_passes)
    require(
        not config.eval_passes or architecture.num_shared,
        f"EVAL_PASSES={config.eval_passes} cannot act here: {path} has no core",
    )
    return Artifact(replace(config, **asdict(architecture)), data, model.to(world.device), kind)


def round_trip(scorer: Scorer, artifact: Artifact, compiler: Compiler, log: Log) -> dict[str, Any]:
    """Size and scores of a reloaded artifact; the first as the trained model was scored."""
    config, data, model, kind = artifact
    digest = hashlib.sha256(data).hexdigest()
    before = scorer.world.on_main(lambda: scored_before(config, digest))
    mine = len(script_file())
    script = min(mine, before.get("bytes_code", mine))  # one of the two may be packed
    total = script + len(data)
    raw = sum(4 * p.numel() for p in model.parameters())
    whose = "" if script == mine else f" (of its run's script; this one has {mine})"
    log(f"Code size: {script} bytes{whose}")
    ratio = raw / len(data)
    log(f"Serialized model {kind}: {len(data)} bytes (float32:{raw} ratio:{ratio:.2f}x)")
    log(f"Total submission size {kind}: {total} bytes")
    scores = score_artifact(scorer, artifact, compiler, log)
    spent = sum(score.eval_seconds for score in scores.values())
    if spent > config.eval_limit_seconds:
        log.object(f"{spent:.1f} s exceed EVAL_LIMIT_SECONDS={config.eval_limit_seconds}")
    read = [*scorer.tokens.paths, find_file(config.tokenizer_path)]
    text = b"".join(path.read_bytes() for path in read)
    hashes = dict(artifact_sha256=digest, data_sha256=hashlib.sha256(text).hexdigest())
    warn_of_missing_scores(before, scores, log)
    first = scores["roundtrip"]
    tail = " ".join(f"{name}:{value}" for name, value in hashes.items())
    log(f"val_tokens:{first.val_tokens} val_bytes:{first.val_bytes} {tail}")
    over = total - config.size_limit_bytes
    if over > 0:
        limit = config.size_limit_bytes
        log.object(f"{total} bytes exceed SIZE_LIMIT_BYTES={limit} by {over}")
        if any(log.folder.glob("step_*.ckpt")) and not config.qat:
            log(f"RESUME={log.folder} with another RUN_ID and fewer MATRIX_BITS packs it again")
    sizes = dict(bytes_code=script, bytes_model=len(data), bytes_total=total, fits=over <= 0)
    return {name: score._asdict() for name, score in scores.items()} | hashes | sizes


def scored_before(config: Config, digest: str) -> dict[str, Any]:
    """The result.json beside an EVAL_ONLY artifact; empty without one, or if it is another's."""
    result = result_beside(Path(config.eval_only)) if config.eval_only else None
    return result if result and result.get("artifact_sha256") == digest else {}


def warn_of_missing_scores(before: dict[str, Any], scores: Mapping[str, Score], log: Log) -> None:
    """Names a score that the artifact's run has and this one has not, and what asks for it."""
    for name in {"sliding", "ttt"} & before.keys() - scores.keys():
        asked = ["eval_stride"]
        if name == "ttt":
            asked += ["ttt_lr", "ttt_epochs", "ttt_chunk_tokens"]
        told = " ".join(f"{option.upper()}={before['config'][option]}" for option in asked)
        log(f"warning: its run also has a {name} score, with {told}; this has none")


def score_artifact(
    scorer: Scorer, artifact: Artifact, compiler: Compiler, log: Log
) -> dict[str, Score]:
    """The scores that the options ask for: plain, then sliding or with test-time training."""
    config, model, world = artifact.config, artifact.model, scorer.world
    names = ["roundtrip"]
    if config.ttt_lr:
        names.append("ttt")
        if config.ttt_chunk_tokens >= scorer.targets:
            log("warning: TTT_CHUNK_TOKENS holds the whole text: no target is scored after it")
    elif config.eval_stride:
        names.append("sliding")
    forward = functools.partial(compiler.forward(model), mode=model.scoring)
    scores, warming = {}, 0.0
    for name in names:
        learner = Learner(model, forward, config, world) if name == "ttt" else None
        began = time.perf_counter()
        if compiler.level != "off":
            scorer.warm_up(forward, learner)
            world.synchronize()
        warming += time.perf_counter() - began
        stride = 0 if name == "roundtrip" else config.eval_stride
        score = scores[name] = scorer.score(forward, stride, learner)
        loss, bpb = score.val_loss, score.val_bpb
        label = f"final_{artifact.kind.replace('+', '_')}_{name}"
        took = f"eval_time:{1e3 * score.eval_seconds:.0f}ms"
        log(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {took}")
        log(f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
        if not math.isfinite(loss):
            raise Ended(EXIT_NON_FINITE, f"the {name} score is not finite")
    spent = sum(score.eval_seconds for score in scores.values())
    log(f"evaluations time:{1e3 * spent:.0f}ms warm_up:{1e3 * warming:.0f}ms (not counted)")
    return scores


def make_trainer(config: Config, world: World) -> Trainer:
    """A model and its trainer on this rank's part of the data."""

    def batches() -> Batches:
        decompress(config.codec, compress(config.codec, b"x"), 1)  # is it installed, on all ranks?
        return Batches(Tokens(config, "train"), config, world)

    # Where the first sequence begins: ranks whose NumPy draws otherwise would share no order.
    data = world.on_all(batches, lambda batches: (batches.tokens.total, batches.start(0)))
    torch.manual_seed(config.seed)
    orthogonal = config.matrix_init == "orthogonal"
    model = GPT(config.architecture(), config.tied_embed_init_std, orthogonal)
    parameters, most = sum(p.numel() for p in model.parameters()), ARTIFACT_LIMIT // 2
    require(parameters <= most, f"{parameters:,} parameters: an artifact holds {most:,} at most")
    return Trainer(config, world, model.to(world.device), data)


def attention_kernel(config: Config, world: World) -> str:
    """The kernel that attention takes for the shapes of training."""
    if config.attn_backend == "auto" and not world.on_cuda:
        return "blocks"
    width = config.model_dim // config.num_heads
    dtype = getattr(torch, config.dtype)
    q, k = (
        torch.empty(1, heads, config.train_seq_len, width, device=world.device, dtype=dtype)
        for heads in (config.num_heads, config.num_kv_heads)
    )
    choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True)
    return BACKEND(choice).name.lower()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; True where PyTorch is too old to tell."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    features: Mapping[str, Any] = ask()
    return not features or any(has for name, has in features.items() if "bf16" in name)


def gpu_state(world: World) -> str:
    """Driver, clocks, power and temperature of this rank's GPU, as nvidia-smi says."""
    asked = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    index = torch.cuda.get_device_properties(world.device).uuid
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", f"--id=GPU-{index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not say: {error}"
    values = done.stdout.strip().split(", ")
    return " ".join(f"{name}:{value}" for name, value in zip(asked.split(","), values))


# Dense bfloat16 FLOP/s by NVIDIA's data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def flops_per_token(model: GPT, length: int, passes: int) -> float:
    """Of a training step: 6 for each matrix element used, the head's too, and causal attention.

    Attention multiplies (T + 1) / 2 keys and values on average; a backward pass costs two forward.
    """
    width, layers = model.tok_emb.shape[1], len(model.plans[passes])
    used = model.tok_emb.numel() + sum(n * p.numel() for p, n in model.uses(passes).items())
    return 6.0 * used + layers * 12.0 * width * (length + 1) / 2


def speed(trainer: Trainer) -> str:
    """Tokens/s of the last steps, MFU, and what was published with the preset."""
    config, world = trainer.config, trainer.world
    rate = config.train_batch_tokens / max(trainer.clock.per_step, 1e-9)
    flops = flops_per_token(trainer.model, config.train_seq_len, trainer.mode().passes)
    text = f"speed:{rate:,.0f} tokens/s flops_per_token:{flops / 1e6:.1f}M"
    name = torch.cuda.get_device_name() if world.on_cuda else ""
    peak = next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), 0.0)
    if peak:
        text += f" mfu:{rate * flops / peak / world.size:.3f}"
    published = published_speed(config)
    if published and world.on_cuda:
        text += f" published:{published:,.0f} tokens/s (its own hardware: see README)"
    return text


def published_speed(config: Config) -> float:
    """Tokens/s of the preset's authors; 0 without them, or if model or batch are not theirs.

    Nor is the speed of a whole run that of a step whose passes change.
    """
    system = next((name for name in config.preset.split(",") if name in SYSTEMS), "T")
    usual = Config(**preset_values(system))
    tokens, step_ms = usual.train_batch_tokens, SYSTEMS[system].step_ms
    same = (config.architecture(), config.train_batch_tokens) == (usual.architecture(), tokens)
    return 1e3 * tokens / step_ms if step_ms and same and len(config.schedule()) == 1 else 0.0


# Of a parameter, with int8 and zlib. The contest's baseline: 15,863,489 bytes in all, published,
# less 47.6 kB of script, of 17,059,912 parameters.
BASELINE_BYTES = 0.927


def warning_of_size(config: Config, parameters: int) -> str:
    """Why a run at a fixed rounding is likely to end above the limit; "" if it is not."""
    script = len(script_file())
    total = int(BASELINE_BYTES * parameters) + script
    if (config.matrix_bits, config.codec) != (8, "zlib") or total <= config.size_limit_bytes:
        return ""
    return (
        f"warning: int8 with zlib takes some {total} bytes here, {script} of them this script; "
        f"SIZE_LIMIT_BYTES={config.size_limit_bytes}. CODEC=lzma or brotli takes fewer, and so "
        "does a packed script (records/tools/submit.py --pack)"
    )


def log_setup(trainer: Trainer, log: Log) -> None:
    config, world, model = trainer.config, trainer.world, trainer.model
    batches = trainer.batches
    parameters = sum(p.numel() for p in trainer.params)
    log(f"model_params:{parameters} effective_layers:{len(model.plans[config.num_loops])}")
    kernel = attention_kernel(config, world)
    log(
        f"world_size:{world.size} grad_accum_steps:{batches.accumulation} "
        f"compile:{trainer.compiler.level} attention:{kernel}"
    )
    if world.on_cuda:
        log(f"gpu:{gpu_state(world)}")
        if kernel == "math" and config.attn_backend != "math":
            log("warning: no fused attention takes these shapes: steps are many times slower")
    elif config.model_dim * config.train_batch_tokens >= 1 << 27:
        log("warning: a step of this size takes minutes on a CPU, and gigabytes; try PRESET=tiny")
    elif config.dtype == "bfloat16" and not multiplies_bfloat16():
        log("warning: bfloat16 is slow on this processor, many times slower than DTYPE=float32")
    if warning := warning_of_size(config, parameters):
        log(warning)
    log(f"train_loader:shards:{len(batches.tokens.paths)} tokens:{batches.tokens.total}")
    train = check_tokenizer(find_file(config.tokenizer_path), batches.tokens)
    log(f"tokenizer of the train shards: {train}")


class Validation:
    """Scores a trainer's weights off the clock, and reports it with the recurrence's health."""

    def __init__(self, scorer: Scorer, reporter: Reporter, model: GPT, length: int) -> None:
        self.scorer, self.reporter, self.model = scorer, reporter, model
        self.watched = scorer.tokens.read(0, length).to(scorer.world.device).long()[None]

    def __call__(
        self, trainer: Trainer, seconds: float, mode: Mode, weights: str = "last"
    ) -> Score:
        trainer.world.enter(f"validation after step {trainer.step}")
        score = self.scorer.score(functools.partial(trainer.forward, mode=mode))
        trainer.check_finite(score)  # the last update alone may have ruined the weights

        def facts() -> dict[str, Any]:
            health = recurrence_health(self.model, self.watched, mode)
            return dict(passes=mode.passes, weights=weights, health=health)

        self.reporter.validation(trainer, seconds, score, facts)
        return score


def in_thread(work: Callable[[], Any], seconds: float | None = None) -> Any:
    """What `work` returns, while this thread can be interrupted; TimeoutError after `seconds`.

    A signal's handler waits until a codec returns, with brotli for half a minute, and its sender
    does not. The thread is left to itself then; it holds up no exit.
    """
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name=CUT_OFF).start()
    return done.result(seconds)


def export(trainer: Trainer, trained: Trained, validation: Validation, log: Log) -> dict[str, Any]:
    """Writes the artifact of the weights that AVERAGE chooses; figures of the training."""
    config, world, average = trainer.config, trainer.world, trainer.average
    # A checkpoint of an export that is broken off is of the weights as they were trained.
    with average.swapped_in(trainer.params), put_back(not_rounded(trainer)):
        hessians, calibration = calibrate(trainer, log)
        seconds, score = trained.seconds + calibration, trained.score
        if config.average != "none":
            taken = f"the average of {average.count}" if average.count else "the last"
            log(f"AVERAGE={config.average} exports {taken}")
            score = validation(trainer, seconds, trainer.model.scoring, weights=config.average)
        seconds += refit(trainer, hessians, log, seconds)
        if 0 < config.max_wallclock_seconds < seconds:
            log.object(f"training, calibration and refit took {seconds:.1f} s")
        world.enter("export")
        packing = functools.partial(pack_to_fit, trainer.model, config, hessians, log)
        world.on_main(lambda: write_atomically(log.folder / ARTIFACT, in_thread(packing)))
    return dict(
        model_params=sum(p.numel() for p in trainer.params),
        steps=trainer.step,
        train_seconds=seconds,
        ended_by=trained.why,
        pre_quant=score._asdict(),
        last_weights=trained.score._asdict(),
        skipped_steps=trainer.skipped.count,
        tokens_per_second=trainer.step * config.train_batch_tokens / max(seconds, 1e-9),
        epochs=trainer.epochs,
    )


def schedule_warnings(config: Config) -> list[str]:
    """Of passes that are scored, and so exported, and will never have been trained."""
    if config.eval_passes:  # asked for
        return []
    given, texts = f"warning: PASSES_SCHEDULE={config.passes_schedule}", []
    when, passes = config.schedule()[-1]
    if passes != config.num_loops:
        texts.append(f"{given} ends with {passes} passes; NUM_LOOPS={config.num_loops} are scored")
    if when >= max(config.iterations, 1):
        texts.append(f"{given} never comes to its last entry: ITERATIONS={config.iterations}")
    return texts


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Python's collector leaves out what exists already: its pauses would count as training."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def train_and_export(
    config: Config, world: World, scorer: Scorer
) -> tuple[Trainer, Log, dict[str, Any]]:
    """Trains a model and writes its artifact; log and figures of the run."""
    trainer = make_trainer(config, world)
    warnings = schedule_warnings(config)
    checkpoint = find_checkpoint(config, trainer, warnings) if config.resume else None
    log = open_log(config, world)
    for warning in warnings:
        log(warning)
    log_setup(trainer, log)
    reporter = Reporter(config, log)
    validation = Validation(scorer, reporter, trainer.model, config.train_seq_len)
    steps = config.warmup_steps * len(training_modes(config))
    log(f"warming up: {steps} steps that are undone, and compiling; it does not count as training")
    trainer.warm_up(log)
    reserved = measure_reserve(trainer, log)
    if config.resume:
        restore(trainer, checkpoint, log)
    checkpoints = Checkpoints(config, world, trainer.batches.tokens.total, log)
    with checkpoints.kept(trainer):
        with frozen_garbage():
            trained = trainer.train(reporter, checkpoints, validation)
        log(speed(trainer))
        peak = torch.cuda.max_memory_allocated() >> 20 if world.on_cuda else 0
        log(f"peak memory allocated: {peak} MiB")
        if trainer.mode().passes != config.schedule()[-1][1]:
            log(f"warning: PASSES_SCHEDULE={config.passes_schedule} did not come to its last entry")
        result = export(trainer, trained, validation, log)
        return trainer, log, result | dict(gptq_reserve_seconds=reserved)


@contextlib.contextmanager
def told(config: Config, world: World, log: Log, steps: int) -> Iterator[None]:
    """Says in the log why scoring ended early, and how to score what `steps` steps have made."""
    try:
        yield
    except (Exception, Ended) as end:
        log.to_file(f"ended: {str(end) or type(end).__name__}")
        if not config.eval_only:
            again = command_to_score(config, world, log.folder)
            if checkpoint_path(log.folder, steps).exists():  # then nothing is trained again
                again = command_to_resume(world, log.folder)
            log(f"to score it: {again}")
        raise


def run(config: Config, world: World) -> int:
    """One run as configured. The exit code."""
    try:
        return do_run(config, world)
    finally:
        if world.lock:
            world.lock.close()


def do_run(config: Config, world: World) -> int:
    """Trains or reads an artifact, scores it, and ends with result.json."""
    artifact = None
    result: dict[str, Any] = {}
    if config.eval_only:
        artifact = read_artifact(Path(config.eval_only), config, world)
        config = artifact.config
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(config.deterministic)
    same = replace(config, data_path="", tokenizer_path="", log_dir="")  # paths may differ by node
    scorer = world.on_all(
        lambda: Scorer(config, world),
        lambda scorer: (same, scorer.tokens.total, source_hash(), torch.__version__),
    )
    if artifact:
        log, compiler = open_log(config, world), Compiler(config, world)
    else:
        trainer, log, result = train_and_export(config, world, scorer)
        compiler = trainer.compiler
        artifact = read_artifact(log.folder / ARTIFACT, config, world)
    with told(artifact.config, world, log, result.get("steps", 0)):
        world.enter("scoring of the artifact")
        result |= round_trip(scorer, artifact, compiler, log)
    used = versions(world, artifact.config.codec)
    result |= dict(config=asdict(artifact.config), versions=used, world_size=world.size)
    result["not_a_submission"] = log.objections
    text = json.dumps(result, indent=1).encode()
    world.on_main(lambda: write_atomically(log.folder / "result.json", text))
    scores = [name for name in ("roundtrip", "sliding", "ttt") if name in result]
    final = {f"final_{name}": result[name]["val_bpb"] for name in scores}
    log.tracked(lambda tracker: tracker.send(dict(step=result.get("steps", 0), **final)))
    # All ranks wait for it, and it perhaps for a network that is gone.
    world.on_main(lambda: log.tracked(lambda tracker: in_thread(tracker.finish, 60)))
    log(f"finished:{log.folder}")
    return 0 if result["fits"] else EXIT_SIZE


def main(arguments: Iterable[str] = ()) -> int:
    """The exit code of a run, or of help. What a user can mend is one line without a traceback."""
    arguments = [*arguments]
    world, failed = None, ""
    try:
        if arguments:
            say(sys.stdout, answer(arguments))
            return 0
        config = Config.from_env(os.environ)
        world = World(os.environ, config.rank_timeout_seconds, config.device)
        if config.eval_only:
            artifact = Path(config.eval_only)
            config = replace(config, **world.on_main(lambda: data_beside(artifact, os.environ)))
        if world.is_main:
            for warning in questionable_names(os.environ)[1]:
                say(sys.stderr, f"warning: {warning}")
        world.handle_signals()
        with torch.nn.attention.sdpa_kernel(KERNELS[config.attn_backend], set_priority=True):
            code = run(config, world)
        world.gather(lambda: None)  # nobody leaves before all are done
    except (Ended, SystemError, *KNOWN) as error:
        # SystemError is what C code may make of a signal that comes amid it.
        cause = error.__cause__ if isinstance(error, SystemError) else error
        code = 1 if isinstance(cause, RankFailed) else EXIT_INPUT
        if isinstance(cause, Ended):
            code = cause.code
        failed = str(cause or error)
        say(sys.stderr, f"[rank {os.environ.get('RANK', 0)}] {failed}")
    except Exception as error:
        code = 1
        first_line = str(error).partition("\n")[0]
        failed = f"{type(error).__name__}: {first_line}"
        say(sys.stderr, traceback.format_exc())
    if dist.is_initialized() or any(thread.name == CUT_OFF for thread in threading.enumerate()):
        if world and world.watchdog:
            world.watchdog.leave(failed)
        # No teardown: it waits for ranks that failed, and gloo's can abort a run that went well, as
        # can Python's while a thread is inside of PyTorch.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
