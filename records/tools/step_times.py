r"""Processor time of a training step at one, two and three passes.

    OMP_NUM_THREADS=1 taskset -c 0 python records/tools/step_times.py \
        --out records/growth/step_times.jsonl

Plain and with the study's set, as the numbers of steps in records/growth/
follow from it. Rows and passes take their steps in turn. It needs no data.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import torch

    import train_gpt as tg
    from records.tools import common

ROWS: dict[str, dict[str, str]] = {
    "plain": dict(
        USE_PERI_NORM="0",
        USE_BIRKHOFF_MIX="0",
        USE_TIMESTEP_SCALE="0",
        USE_TIMESTEP_BIAS="0",
        DEPTH_EMBED="none",
    ),
    "set": {},
}
PASSES = (1, 2, 3)
LEFT_OUT = 2  # of the first steps, which fill caches


class Size(NamedTuple):
    """A toy: width, heads, tokens of a sequence and of a step."""

    width: int
    heads: int
    length: int
    batch: int

    def variables(self) -> dict[str, str]:
        return dict(
            MODEL_DIM=str(self.width),
            NUM_HEADS=str(self.heads),
            NUM_KV_HEADS="1",
            TRAIN_SEQ_LEN=str(self.length),
            TRAIN_BATCH_TOKENS=str(self.batch),
            MICRO_BATCH_TOKENS=str(self.batch),
        )


SIZES = (Size(64, 2, 256, 4096), Size(32, 1, 128, 2048))


def trainers(size: Size) -> dict[str, tg.Trainer]:
    """A trainer of each row, whose batches are handed to its steps."""
    made = {}
    for row, values in ROWS.items():
        config = tg.Config.from_env(size.variables() | values)
        model = tg.GPT(config.architecture(), config.tied_embed_init_std)
        batches: Any = SimpleNamespace(accumulation=1)
        made[row] = tg.Trainer(config, tg.World({}), model, batches)
    return made


def measure(size: Size, steps: int) -> dict[str, float]:
    """Median milliseconds by row and passes, without the first steps."""
    ids = torch.randint(1024, (size.batch + 1,))
    micro = [(ids[:-1].view(-1, size.length), ids[1:].view(-1, size.length))]
    times: dict[str, list[float]] = {}
    made = trainers(size)
    for _ in range(LEFT_OUT + steps):
        for row, trainer in made.items():
            for passes in PASSES:
                started = time.process_time()
                trainer.train_step(0, 0.0, micro, tg.Mode(passes))
                spent = 1e3 * (time.process_time() - started)
                times.setdefault(f"{row} {passes}", []).append(spent)
    return {name: round(median(values[LEFT_OUT:]), 1) for name, values in times.items()}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("--steps", type=int, default=12, help="Timed steps of each (default: %(default)s).")
    add("--out", type=Path, help="JSONL file to which the lines are added.")
    return top


def work(options: argparse.Namespace) -> int:
    common.require_at_least(options, steps=1)
    for size in SIZES:
        found = size._asdict() | dict(
            milliseconds=measure(size, options.steps), versions=tg.versions(tg.World({}))
        )
        line = json.dumps(found)
        common.say(line)
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 0


def main() -> int:
    return common.run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
