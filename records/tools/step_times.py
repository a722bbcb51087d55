"""Processor time of a training step at one, two and three passes, plain and with the recurrence study's set.

    OMP_NUM_THREADS=1 taskset -c 0 python records/tools/step_times.py >> records/growth/step_times.jsonl

What the numbers of steps of `growth/` follow from. Rows and passes take their steps in turn; needs no data.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg

PLAIN = dict(
    USE_PERI_NORM="0",
    USE_BIRKHOFF_MIX="0",
    USE_TIMESTEP_SCALE="0",
    USE_TIMESTEP_BIAS="0",
    DEPTH_EMBED="none",
)


def measure(width: int, heads: int, length: int, batch: int, steps: int) -> dict[str, float]:
    """Median milliseconds by row and passes; the first two of the steps are left out."""
    size = dict(
        MODEL_DIM=str(width),
        NUM_HEADS=str(heads),
        NUM_KV_HEADS="1",
        TRAIN_SEQ_LEN=str(length),
        TRAIN_BATCH_TOKENS=str(batch),
        MICRO_BATCH_TOKENS=str(batch),
    )
    ids, world, trainers = torch.randint(1024, (batch + 1,)), tg.World({}), {}
    micro = [(ids[:-1].view(-1, length), ids[1:].view(-1, length))]
    for row, values in (("plain", PLAIN), ("set", {})):
        config = tg.Config.from_env(size | values)
        model = tg.GPT(config.architecture(), config.tied_embed_init_std)
        trainers[row] = tg.Trainer(config, world, model, SimpleNamespace(accumulation=1))
    times: dict[str, list[float]] = {}
    for _ in range(steps):
        for row, trainer in trainers.items():
            for passes in (1, 2, 3):
                start = time.process_time()
                trainer.train_step(0, 0.0, micro, tg.Mode(passes))
                times.setdefault(f"{row} {passes}", []).append(1e3 * (time.process_time() - start))
    return {name: round(statistics.median(values[2:]), 1) for name, values in times.items()}


if __name__ == "__main__":
    for size in (
        dict(width=64, heads=2, length=256, batch=4096),
        dict(width=32, heads=1, length=128, batch=2048),
    ):
        times = measure(**size, steps=14)
        print(json.dumps(size | dict(milliseconds=times, versions=tg.versions(tg.World({})))))
