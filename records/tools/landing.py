r"""An export at full size of a model that is drawn: its bytes and its time.

    python records/tools/landing.py --set CODEC=brotli --law student

No weights of full size exist that this script trained, so a model is drawn
that an export can hardly tell from a trained one: rows and columns of every
matrix have sizes of their own (log-normal, 0.3 and 0.2 in the logarithm), the
elements are normal or of Student's t with 5 degrees of freedom, and pieces
come by Zipf's law, in a random order. GPTQ's Hessians are those of the real
forward pass over such tokens. Its score
means nothing and is not taken.

Told are every trial of the clip, what is left of the limit, seconds of GPTQ's
solver and of the whole export on one core, and an estimate of the calibration
on one of 8 H100 by the roofline of records/tools/dryrun.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import numpy as np
    import torch

    import train_gpt as tg
    from records.tools import common
    from records.tools.dryrun import roofline

LAWS = ("normal", "student")
ROW_SIZES, COLUMN_SIZES = 0.3, 0.2  # standard deviations of their logarithms


class Batch(NamedTuple):
    ids: torch.Tensor
    targets: torch.Tensor


def drawn(config: tg.Config, law: str) -> tg.GPT:
    """A model as the docstring above has it; what is not rounded is as training begins with."""
    draw = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    model = tg.GPT(config.architecture(), 0.1)
    for p in model.parameters():
        if not tg.role_of(p).bits:
            continue
        shape = tuple(p.shape)
        rows = np.exp(ROW_SIZES * draw.standard_normal((shape[0], 1)))
        columns = np.exp(COLUMN_SIZES * draw.standard_normal((1, shape[1])))
        each = draw.standard_normal(shape) if law == "normal" else draw.standard_t(5, shape)
        p.data = torch.tensor(rows * columns * each / shape[1] ** 0.5, dtype=torch.float32)
    return model


def zipf_tokens(config: tg.Config, tokens: int) -> list[Batch]:
    """Batches of one sequence each, at least `tokens` tokens together."""
    draw = np.random.default_rng(config.seed + 1)
    chances = 1 / np.arange(1, config.vocab_size + 1)
    pieces = draw.permutation(config.vocab_size)
    batches = []
    for _ in range(-(-tokens // config.train_seq_len)):
        size = config.train_seq_len + 1
        text = torch.tensor(draw.choice(pieces, size=size, p=chances / chances.sum()))
        batches.append(Batch(text[None, :-1], text[None, 1:]))
    return batches


def calls_of(model: tg.GPT, batch: Batch) -> list[tuple[int, int]]:
    """Rows and columns of the matrices that a forward pass multiplies with, one each time."""
    shapes: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, _: Any) -> None:
        rows, columns = module.get_parameter("weight").shape
        shapes.append((rows, columns))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, tg.Matrix)
    ]
    with torch.no_grad():
        model(*batch, model.scoring)
    for hook in hooks:
        hook.remove()
    return shapes


def calibration_seconds(model: tg.GPT, config: tg.Config) -> dict[str, float]:
    """By roofline, for one micro-batch on an H100: the sums x x^T, and the products of the model.

    The sums are products in float32. Attention is counted, element-wise kernels are not.
    """
    tokens, length = config.micro_batch_tokens, config.train_seq_len
    calls = calls_of(model, zipf_tokens(config, 1)[0])
    head = [config.model_dim] if config.gptq_embed else []
    inputs = [columns for _, columns in calls] + head
    sums = [roofline.matrix_product("float32", c, c, tokens, 1) for c in inputs]
    products = [roofline.matrix_product("bfloat16", tokens, r, c, 1) for r, c in calls]
    heads, layers = config.num_heads, len(model.plans[model.scoring.passes])
    shape = roofline.Attention(
        tokens // length, length, heads, config.num_kv_heads, config.model_dim // heads
    )
    products += layers * [roofline.attention_call(shape, False)]
    return dict(
        sums=sum(cost.seconds for cost in sums), model=sum(cost.seconds for cost in products)
    )


class Stopwatch:
    """Calls a function and adds up the time that it takes."""

    def __init__(self, called: Any) -> None:
        self.called = called
        self.seconds, self.calls = 0.0, 0

    def __call__(self, *args: Any) -> Any:
        began = time.process_time()
        result = self.called(*args)
        self.seconds += time.process_time() - began
        self.calls += 1
        return result


def exported(
    model: tg.GPT, config: tg.Config, hessians: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Packs the model so that it fits; bytes, and CPU seconds of this process."""
    solver, packer = Stopwatch(tg.gptq_rows), Stopwatch(tg.pack)
    log: Any = common.say
    with mock.patch.object(tg, "gptq_rows", solver), mock.patch.object(tg, "pack", packer):
        data = tg.pack_to_fit(model, config, hessians, log)
    total, limit = len(tg.script_file()) + len(data), config.size_limit_bytes
    return dict(
        bytes_total=total,
        under_the_limit_percent=round(100 * (1 - total / limit), 4),
        trials=packer.calls,
        solver_seconds_a_trial=round(solver.seconds / packer.calls, 3),
        seconds_a_trial=round(packer.seconds / packer.calls, 3),
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    common.add_settings(top, "Options of train_gpt.py (default: PRESET=frontier).")
    add("--law", choices=LAWS, default="student", help="Of weights (default: %(default)s).")
    add(
        "--tokens",
        type=int,
        default=4096,
        help="Tokens that calibrate, in sequences (default: %(default)s).",
    )
    return top


def work(options: argparse.Namespace) -> int:
    common.require_at_least(options, tokens=1)
    config = tg.Config.from_env({"PRESET": "frontier"} | common.pairs(options.set))
    torch.set_num_threads(1)
    model = drawn(config, options.law)
    count = sum(p.numel() for p in model.parameters())
    common.say(f"{options.law} weights, seed {config.seed}, {count:,} parameters, {config.codec}")
    began = time.process_time()
    sums = tg.input_moments(model, zipf_tokens(config, options.tokens), config.gptq_embed)
    seconds_here = time.process_time() - began
    common.say(f"calibrated on {options.tokens} tokens in {seconds_here:.0f} s on one core here")
    found = exported(model, config, sums)
    common.say(" ".join(f"{name}:{value}" for name, value in found.items()))
    a_batch = calibration_seconds(model, config)
    seconds = {name: config.gptq_batches * value for name, value in a_batch.items()}
    told = " ".join(f"{name}:{value:.2f}s" for name, value in seconds.items())
    common.say(f"roofline of {config.gptq_batches} micro-batches on one of 8 H100: {told}")
    common.say(f"versions: {tg.versions(tg.World({}), config.codec)}")
    return 0


def main(words: list[str] | None = None) -> int:
    return common.run_tool(work, parser().parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
