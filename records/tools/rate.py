"""Rate and distortion: one trained model under every rounding and every codec.

    python records/tools/rate.py --set PRESET=T,tiny [KEY=VALUE ...] --seeds 3 --out records/rate/NAME.json

Trains a run of train_gpt.py in this process once a seed, collects GPTQ's Hessians as a run does, and exports
the same weights with each setting of `ROUNDINGS`. For each: the bytes that every codec makes of the
parameters, with a byte an integer (what artifacts hold) and with the integers' bits packed tightly; val_bpb
of the reloaded artifact; seconds to round, to compress and to score. Prints a table, writes JSON. Brotli is
left out where it is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg

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
    "int5 row + GPTQ": dict(matrix_bits=5, quant_clip="row", gptq=True),
    "int4": dict(matrix_bits=4),
    "int4 row": dict(matrix_bits=4, quant_clip="row"),
    "int4 row + GPTQ": dict(matrix_bits=4, quant_clip="row", gptq=True),
}


class Trained:
    """A model after a run of `config`, and what scores it."""

    def __init__(self, config: tg.Config, folder: Path) -> None:
        self.config, self.world = config, tg.World({})
        self.scorer, log = tg.Scorer(config, self.world), tg.Log(folder, True)
        batches = tg.Batches(tg.Tokens(config, "train"), config, self.world)
        torch.manual_seed(config.seed)
        orthogonal = config.matrix_init == "orthogonal"
        self.model = tg.GPT(config.architecture(), config.tied_embed_init_std, orthogonal)
        trainer = tg.Trainer(config, self.world, self.model.to(self.world.device), batches)
        trainer.warm_up()
        self.steps, self.seconds, _ = trainer.train(log, lambda *_: None)
        self.hessians, self.calibration = trainer.calibrate(self.steps, log)
        if trainer.average:
            trainer.load(trainer.average)
        self.score = self.scorer.score(self.model)


def packed(q: torch.Tensor, bits: int) -> bytes:
    """Integers of a width as that many bits each."""
    unsigned = (q.numpy().ravel().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1)[:, 8 - bits :]).tobytes()


def measure(trained: Trained, rounding: dict[str, Any]) -> dict[str, Any]:
    """Bytes, score and seconds of one rounding."""
    values = {name: value for name, value in rounding.items() if name != "gptq"}
    config = replace(trained.config, **values, qat_fraction=0.0, qat_lr_factor=0.0)
    hessians = trained.hessians if rounding.get("gptq") else {}
    start, plain, tight = time.perf_counter(), [], []
    for name, p in trained.model.named_parameters():
        kind, tensors = tg.store(p, config, hessians.get(name))
        tensors = [t.cpu() for t in tensors]
        plain += [t.numpy().tobytes() for t in tensors]
        is_int = kind.startswith("int")
        tight += [
            packed(tensors[0], int(kind[3:])) if is_int else plain[-1],
            *plain[len(plain) - is_int :],
        ]
    seconds = dict(round=time.perf_counter() - start)
    sizes: dict[str, int] = {}
    for codec in CODECS:
        start = time.perf_counter()
        sizes[codec] = len(tg.code(codec, 0, b"".join(plain)))
        seconds[codec] = time.perf_counter() - start
        sizes[f"{codec}, packed"] = len(tg.code(codec, 0, b"".join(tight)))
    model = tg.load_model(tg.pack(trained.model, config, hessians), "memory")[0].to(
        trained.world.device
    )
    score = trained.scorer.score(model)
    return dict(
        bytes=sizes,
        val_bpb=score.val_bpb,
        gap=score.val_bpb - trained.score.val_bpb,
        seconds=seconds | dict(score=score.eval_seconds),
    )


def available() -> list[str]:
    found = []
    for codec in tg.CODECS:
        try:
            tg.code(codec, 0, b"")
            found.append(codec)
        except tg.InputError:
            print(f"{codec} is not installed and left out", file=sys.stderr)
    return found


CODECS: list[str] = []


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds; standard deviation of the gap where there are several."""
    columns = list(next(iter(runs[0]["roundings"].values()))["bytes"])
    lines = [
        "| rounding | gap, val_bpb | " + " | ".join(columns) + " | s to round |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name in runs[0]["roundings"]:
        rows = [run["roundings"][name] for run in runs]
        gaps = [row["gap"] for row in rows]
        spread = f" ± {statistics.stdev(gaps):.4f}" if len(gaps) > 1 else ""
        sizes = [f"{statistics.mean(row['bytes'][c] for row in rows):,.0f}" for c in columns]
        lines.append(
            f"| {name} | {statistics.mean(gaps):+.4f}{spread} | {' | '.join(sizes)} | "
            f"{statistics.mean(row['seconds']['round'] for row in rows):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="variables of the run"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    CODECS[:] = available()
    runs = []
    for seed in range(1, args.seeds + 1):
        env = dict(item.split("=", 1) for item in args.set) | dict(SEED=str(seed))
        config = tg.Config.from_env(dict(GPTQ_BATCHES="8") | env)
        with tempfile.TemporaryDirectory() as folder:
            trained = Trained(config, Path(folder))
        roundings = {name: measure(trained, rounding) for name, rounding in ROUNDINGS.items()}
        runs.append(
            dict(
                seed=seed,
                steps=trained.steps,
                train_seconds=trained.seconds,
                calibration_seconds=trained.calibration,
                float32=trained.score._asdict(),
                parameters=sum(p.numel() for p in trained.model.parameters()),
                roundings=roundings,
                config=asdict(config),
                versions=tg.versions(trained.world),
            )
        )
        print(f"seed {seed}: val_bpb {trained.score.val_bpb:.4f} before rounding", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            tg.write_atomically(args.out, json.dumps(runs, indent=1).encode())
    print(table(runs))


if __name__ == "__main__":
    main()
