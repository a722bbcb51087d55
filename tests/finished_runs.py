"""Folders of finished runs with known curves, for tests of the tools that read them."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import train_gpt as tg


def bpb_at(step: int, level: float) -> float:
    """A score that falls by 0.1 for every factor e in steps."""
    return level - 0.1 * math.log(max(step, 1))


@dataclass
class Made:
    """A run whose score after a step is `bpb_at`; rounding costs 0.002 of its level."""

    level: float
    step_seconds: float = 0.1
    steps: int = 100
    every: int = 10  # steps between validations; 0: only at the end
    layers: int = 4
    bytes_total: int = 1_000_000
    options: dict[str, str] = field(default_factory=dict)

    def environment(self, row: str, seed: int) -> dict[str, str]:
        """The variables of the run: warm-down over the last 40 steps, no cap on time."""
        return {
            "PRESET": f"{row},tiny",
            "ITERATIONS": str(self.steps),
            "WARMDOWN_ITERS": "40",
            "MAX_WALLCLOCK_SECONDS": "0",
            "SEED": str(seed),
        } | self.options

    def seconds(self, step: int) -> float:
        return step * self.step_seconds

    def metrics(self, seed: int) -> list[dict]:
        """Lines of metrics.jsonl: validations, and the training loss after every fifth step."""
        health = [
            dict(
                layer=layer,
                mix=0.5 + 0.01 * layer * self.level,
                attn_scale=1.0 + layer,
                mlp_scale=1.0,
                attn_shift=0.0,
                mlp_shift=0.0,
            )
            for layer in range(self.layers)
        ]
        validated = {0, self.steps} | (
            set(range(0, self.steps, self.every)) if self.every else set()
        )
        lines: list[dict] = []
        for step in sorted(validated | set(range(5, self.steps + 1, 5))):
            at: dict = dict(step=step, train_seconds=self.seconds(step))
            if step % 5 == 0 and step:
                loss = 2 * bpb_at(step, self.level)
                lines.append(at | dict(train_loss=loss, tokens_per_second=1.0))
            if step in validated:
                bpb = bpb_at(step, self.level)
                lines.append(at | dict(val_loss=2 * bpb, val_bpb=bpb, health=health))
        return lines

    def write(self, row_folder: Path, seed: int) -> Path:
        """The folder of the run, below that of its row."""
        folder = row_folder / f"seed{seed}"
        folder.mkdir(parents=True)
        lines = [json.dumps(line) + "\n" for line in self.metrics(seed)]
        (folder / "metrics.jsonl").write_text("".join(lines))
        pre = bpb_at(self.steps, self.level)
        result = dict(
            config=asdict(tg.Config.from_env(self.environment(row_folder.name, seed))),
            versions=dict(script_sha256="0" * 64, device="cpu", torch="2"),
            world_size=1,
            pre_quant=dict(val_bpb=pre),
            roundtrip=dict(val_bpb=pre + 0.002 * self.level, val_tokens=1000, val_bytes=2500),
            bytes_model=self.bytes_total - 100_000,
            bytes_total=self.bytes_total,
            model_params=7,
            steps=self.steps,
            train_seconds=self.seconds(self.steps),
        )
        (folder / "result.json").write_text(json.dumps(result))
        return folder


NOISE = {
    1: 0.001,
    2: -0.002,
    3: 0.004,
}  # by seed; the same for K and O, which draw the same weights


def write_rows(folder: Path) -> Path:
    """K, O and E with three seeds: O beats K by 0.02 after equal steps and is 1.7 times as slow."""
    for seed, noise in NOISE.items():
        Made(3.0 + noise, 0.1).write(folder / "K", seed)
        Made(2.98 + noise + 1e-5 * (seed - 2), 0.17).write(folder / "O", seed)
        Made(3.1 - noise, 1.0).write(folder / "E", seed)
    return folder


def edit_result(folder: Path, **changes: object) -> None:
    """Changes entries of a run's result.json."""
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
