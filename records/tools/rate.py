r"""Rate and distortion: one trained model under every rounding and every codec.

    python records/tools/rate.py --set PRESET=T,tiny [KEY=VALUE ...] \
        --seeds 3 --out records/rate/NAME.json

For each seed it makes a run of train_gpt.py in this process, takes the
weights and GPTQ's Hessians that the run exports, and exports them again with
each setting of ROUNDINGS. It tells the bytes that every codec makes of the
parameters, with a byte an integer (what artifacts hold) and with the
integers' bits packed tightly; val_bpb of the reloaded artifact; and the
seconds to round, to compress and to score. It prints a table and writes JSON.
Brotli is left out where its package is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import numpy as np
    import torch

    import train_gpt as tg
    from records.tools import common, logs

CODECS = [codec for codec in tg.CODECS if codec != "none"]
# What a rounding has where its entry says nothing: by name it is the same, whatever the run's is.
BASE: dict[str, Any] = dict(
    core_bits=0,
    quant_clip="percentile",
    matrix_clip_sigmas=12.85,
    embed_clip_sigmas=20.0,
    quant_scale_floor=0.0,
)
LITE = dict(quant_clip="matrix", quant_scale_floor=1 / 127)  # what PR 1230 calls GPTQ-lite
ROUNDINGS: dict[str, dict[str, Any]] = {  # "gptq" is not a field: whether the Hessians are used
    "int8": dict(matrix_bits=8),
    "int6": dict(matrix_bits=6),
    "int6 GPTQ-lite, floor 1/31": dict(matrix_bits=6) | LITE,
    "int6 GPTQ-lite": dict(matrix_bits=6, quant_clip="matrix"),
    "int6 row": dict(matrix_bits=6, quant_clip="row"),
    "int6 row + GPTQ": dict(matrix_bits=6, quant_clip="row", gptq=True),
    "int6 + GPTQ": dict(matrix_bits=6, gptq=True),
    "int6, core int8, row + GPTQ": dict(matrix_bits=6, core_bits=8, quant_clip="row", gptq=True),
    "int6 12.85 sigmas": dict(matrix_bits=6, quant_clip="sdclip"),
    "int6 12.85 sigmas + GPTQ": dict(matrix_bits=6, quant_clip="sdclip", gptq=True),
    "int5 row + GPTQ": dict(matrix_bits=5, quant_clip="row", gptq=True),
    "int4": dict(matrix_bits=4),
    "int4 row": dict(matrix_bits=4, quant_clip="row"),
    "int4 row + GPTQ": dict(matrix_bits=4, quant_clip="row", gptq=True),
}


class Trained(NamedTuple):
    """What a run of `config` exports, and its result.json."""

    config: tg.Config
    model: tg.GPT
    hessians: Mapping[str, torch.Tensor]
    result: dict[str, Any]
    calibration_seconds: float


def train(config: tg.Config) -> Trained:
    """A run as the script makes it; weights and Hessians are those that it packs."""
    packed: list[tuple[tg.GPT, dict[str, torch.Tensor], Mapping[str, torch.Tensor]]] = []
    pack = tg.pack

    def keep(model: tg.GPT, config: tg.Config, hessians: Any = None) -> bytes:
        if not packed:  # further trials of an export are of the same weights
            # A copy: after its export a run puts averaged or refitted weights back to the last.
            packed.append((model, copy.deepcopy(model.state_dict()), hessians or {}))
        return pack(model, config, hessians)

    with tempfile.TemporaryDirectory() as folder:
        here = replace(config, log_dir=folder, run_id="run")
        with mock.patch.object(tg, "pack", keep), contextlib.redirect_stdout(io.StringIO()):
            tg.run(here, tg.World({}))
        result = common.read_result(Path(folder, "run", "result.json"))
        log = logs.read(Path(folder, "run", "train.log"))
    [(model, weights, hessians)] = packed
    model.load_state_dict(weights)
    return Trained(config, model, hessians, result, log.values.get("calibration_ms", 0.0) / 1e3)


def tightly(q: torch.Tensor, bits: int) -> bytes:
    """Integers of a width as that many bits each."""
    unsigned = (q.numpy().ravel().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1)[:, 8 - bits :]).tobytes()


class Held(NamedTuple):
    """Parameters as bytes: a byte an integer, and with the integers' bits packed."""

    plain: bytes
    packed: bytes


def held(trained: Trained, config: tg.Config, hessians: Mapping[str, torch.Tensor]) -> Held:
    """The parameters as `config` stores them."""
    plain, packed = [], []
    for name, p in trained.model.named_parameters():
        kind, tensors = tg.store(p, config, hessians.get(name))
        values, *steps = (tensor.cpu() for tensor in tensors)
        rest = [step.numpy().tobytes() for step in steps]
        plain += [values.numpy().tobytes(), *rest]
        if kind.startswith("int"):
            packed += [tightly(values, int(kind.removeprefix("int"))), *rest]
        else:
            packed += [values.numpy().tobytes(), *rest]
    return Held(b"".join(plain), b"".join(packed))


def rounded(config: tg.Config, rounding: Mapping[str, Any]) -> tg.Config:
    """The configuration of a run with one of ROUNDINGS in place of its own."""
    values = BASE | {name: value for name, value in rounding.items() if name != "gptq"}
    return replace(config, **values, qat_fraction=0.0, qat_lr_factor=0.0, qat_core_only=False)


def measure(
    trained: Trained, scorer: tg.Scorer, rounding: dict[str, Any], codecs: Sequence[str]
) -> dict[str, Any]:
    """Bytes, score and seconds of one rounding."""
    config = rounded(trained.config, rounding)
    hessians = trained.hessians if rounding.get("gptq") else {}
    started = time.perf_counter()
    stored = held(trained, config, hessians)
    seconds = dict(round=time.perf_counter() - started)
    sizes: dict[str, int] = {}
    for codec in codecs:
        started = time.perf_counter()
        sizes[codec] = len(tg.compress(codec, stored.plain))
        seconds[codec] = time.perf_counter() - started
        sizes[f"{codec}, packed"] = len(tg.compress(codec, stored.packed))
    artifact = tg.pack(trained.model, config, hessians)
    model = tg.load_model(artifact, "the artifact in memory")[0]
    model = model.to(scorer.world.device)
    score = scorer.score(functools.partial(model, mode=model.scoring))
    before = trained.result["pre_quant"]["val_bpb"]
    return dict(
        bytes=sizes,
        val_bpb=score.val_bpb,
        gap=score.val_bpb - before,
        seconds=seconds | dict(score=score.eval_seconds),
    )


def available() -> list[str]:
    """The codecs that are installed here; the others are told."""
    found = []
    for codec in CODECS:
        try:
            tg.compress(codec, b"")
        except tg.InputError:
            common.warn(f"{codec} is not installed and left out")
        else:
            found.append(codec)
    return found


def measure_seed(config: tg.Config, codecs: Sequence[str]) -> dict[str, Any]:
    """Every rounding of one run."""
    world = tg.World({})
    trained, scorer = train(config), tg.Scorer(config, world)
    roundings = {
        name: measure(trained, scorer, rounding, codecs) for name, rounding in ROUNDINGS.items()
    }
    return dict(
        seed=config.seed,
        steps=trained.result["steps"],
        train_seconds=trained.result["train_seconds"] - trained.calibration_seconds,
        calibration_seconds=trained.calibration_seconds,
        float32=trained.result["pre_quant"],
        parameters=trained.result["model_params"],
        roundings=roundings,
        config=asdict(config),
        versions=tg.versions(world, "brotli" if "brotli" in codecs else ""),
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds; standard deviation of the gap where there are several."""
    columns = list(next(iter(runs[0]["roundings"].values()))["bytes"])
    rows = []
    for name in runs[0]["roundings"]:
        found = [run["roundings"][name] for run in runs]
        gaps = [row["gap"] for row in found]
        spread = f" ± {stdev(gaps):.4f}" if len(gaps) > 1 else ""
        sizes = [f"{mean(row['bytes'][column] for row in found):,.0f}" for column in columns]
        seconds = mean(row["seconds"]["round"] for row in found)
        rows.append([name, f"{mean(gaps):+.4f}{spread}", *sizes, f"{seconds:.1f}"])
    head = ["rounding", "gap, val_bpb", *columns, "s to round"]
    return "\n".join(common.markdown_table(head, rows))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    common.add_settings(top, "Variables of the run.")
    add("--seeds", type=int, default=1, help="Number of seeds, from 1 on (default: %(default)s).")
    add("--out", type=Path, help="JSON file for the figures.")
    return top


def work(options: argparse.Namespace) -> int:
    common.require_at_least(options, seeds=1)
    given, codecs = dict(GPTQ_BATCHES="8") | common.pairs(options.set), available()
    configs = []
    for seed in range(1, options.seeds + 1):
        configs.append(tg.Config.from_env(given | dict(SEED=str(seed))))
    runs: list[dict[str, Any]] = []
    for config in configs:
        runs.append(measure_seed(config, codecs))
        before = runs[-1]["float32"]["val_bpb"]
        common.say(f"seed {config.seed}: val_bpb {before:.4f} before rounding")
        if options.out:
            common.write_json(options.out, runs)
    common.say(table(runs))
    return 0


def main() -> int:
    return common.run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
