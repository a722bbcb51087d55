"""A finished run that is audited, and what stands for its model in the script's own Scorer."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import random
import re
import sys
import tempfile
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt
from records.tools import common, logs

DRAW = random.SystemRandom()


class Failed(Exception):
    """What a check found wrong."""


class Skipped(Exception):
    """Why a check cannot be made."""


def demand(wrong: list[str]) -> None:
    """Failed, with the first of what is wrong, if anything is."""
    if len(wrong) > 4:
        wrong = [*wrong[:3], f"and {len(wrong) - 3} more"]
    if wrong:
        raise Failed("; ".join(wrong))


def begin(check: str, what: str) -> None:
    """Says what a long check is about to do: on stderr, as stdout has the outcomes alone."""
    common.say(f"{check}: {what} ...", stream=sys.stderr)


# ---- 1. The run and its script -------------------------------------------------------------------


@dataclass
class Run:
    """One finished run: its log, and what lies beside it."""

    name: str
    log: logs.Log
    artifact: bytes | None
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]] | None
    damaged: int = 0  # lines of metrics.jsonl that could not be read
    exit_code: int = 0  # where run.json has it

    @property
    def lines(self) -> list[str]:
        """The log behind the source that it begins with."""
        return self.log.run.lines

    @property
    def settings(self) -> dict[str, str]:
        """The configuration, as variables of an environment would give it."""
        return self.log.run.settings()

    def matches(self, pattern: str) -> list[tuple[str, ...]]:
        """The groups of every line that the pattern matches from its beginning."""
        compiled = re.compile(pattern)
        found = (compiled.match(line) for line in self.lines)
        return [match.groups() for match in found if match]

    def number(self, name: str) -> float:
        """A figure of the log, which a complete log has."""
        return self.log.values[name]


def read_log(path: Path) -> logs.Log:
    """The log of a finished run of this project's script; InputError for any other."""
    log = logs.read(path)
    if log.run.eval_only:
        told = f"{log.run.scored_only()}: audit that of the run that trained it"
        raise train_gpt.InputError(told)
    missing = log.missing() if log.ours else ["script_sha256"]
    if missing:
        told = f"{path} gives no {', '.join(missing)}"
        raise train_gpt.InputError(f"{told}: is it the log of a finished run of this project?")
    return log


def read_run(folder: Path) -> Run:
    """The run in its own folder."""
    log = read_log(folder / "train.log")
    stored = sorted(folder.glob("*.ptz"))
    result, record = folder / "result.json", folder / "run.json"
    told: list[str] = []
    metrics = None
    if (folder / "metrics.jsonl").exists():
        metrics = list(common.read_metrics(folder / "metrics.jsonl", told.append))
    for text in told:
        common.warn(text)
    return Run(
        folder.name,
        log,
        stored[0].read_bytes() if stored else None,
        common.read_result(result) if result.exists() else None,
        metrics,
        len(told),
        common.read_result(record).get("exit_code", 0) if record.exists() else 0,
    )


def read_runs(folder: Path) -> list[Run]:
    """The run of a run's folder, or those of a submission folder.

    InputError if there is none to audit.
    """
    if (folder / "result.json").exists() or (folder / "metrics.jsonl").exists():
        return [read_run(folder)]
    paths = [log.path for log in logs.read_logs(folder)]
    if not paths:
        raise train_gpt.InputError(f"{folder} holds no train.log and no log of a submission")
    if paths == [folder / "train.log"]:
        return [read_run(folder)]
    by_digest = {}
    for path in sorted(folder.glob("*.ptz")):
        data = path.read_bytes()
        by_digest[hashlib.sha256(data).hexdigest()] = data
    runs = []
    for path in paths:
        log = read_log(path)
        name = path.name if len(paths) > 1 else folder.name
        runs.append(Run(name, log, by_digest.get(log.words["artifact"]), None, None))
    return runs


def config_of(run: Run, script: types.ModuleType) -> Any:
    """The configuration in the log; InputError if it is not one of this script."""
    hints = typing.get_type_hints(script.Config)
    kinds = {name.upper(): kind for name, kind in hints.items()}
    settings = run.settings
    if differ := sorted(settings.keys() ^ kinds.keys()):
        raise train_gpt.InputError(
            f"{run.log.path} is of another script than {script.__file__} (options that only one "
            f"of them has: {', '.join(differ)}); name the run's own by --script"
        )
    values = {name: script.parse(name, text, kinds[name]) for name, text in settings.items()}
    return script.Config(**{name.lower(): value for name, value in values.items()})


class Scored:
    """A model as a function of (ids, targets), in the mode in which it is scored."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model(ids, targets, self.model.scoring)


class Audit:
    """What the checks share: script, run, configuration, validation tokens, small splits."""

    def __init__(
        self, script: types.ModuleType, run: Run, given: argparse.Namespace, scratch: Path
    ) -> None:
        self.script, self.run, self.given, self.scratch = script, run, given, scratch
        paths = dict(data_path=given.data, tokenizer_path=given.tokenizer)
        named = {name: str(path) for name, path in paths.items() if path}
        self.config = dataclasses.replace(config_of(run, script), **named)
        self.world = script.World({})
        self.length = self.config.train_seq_len
        factor = next(n for n in range(2, self.length + 1) if self.length % n == 0)
        # also where a run did not slide
        self.sliding = self.config.eval_stride or self.length // factor

    @property
    def script_path(self) -> Path:
        return Path(str(self.script.__file__))

    def anew(self) -> Audit:
        """The same with a module of its own, and with its configuration and world.

        What a script keeps of one text, it does not know in another's. Only what it hides
        elsewhere in the process goes along.
        """
        script = common.load_script(self.script_path)
        return Audit(script, self.run, self.given, self.scratch)

    def shards(self, split: str) -> list[Path]:
        folder = self.script.find_file(self.config.data_path)
        return sorted(folder.glob(f"fineweb_{split}_*.bin"))

    @property
    def tokenizer(self) -> Path:
        return self.script.find_file(self.config.tokenizer_path)

    @cached_property
    def tokens(self) -> np.ndarray:
        """The validation split, uint16, not read by the script."""
        paths, tokenizer = self.shards("val"), self.tokenizer
        if not paths:
            place = self.config.data_path
            raise Skipped(f"{place} holds no fineweb_val_*.bin: name the shards by --data")
        if not tokenizer.exists():
            raise Skipped(f"there is no {tokenizer}: name the tokenizer by --tokenizer")
        return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])

    def model(self) -> Scored:
        """A fresh model from the artifact, on the script's device."""
        data, run = self.run.artifact, self.run
        if data is None:
            raise Skipped("no artifact of this run is here")
        try:
            model = self.script.load_model(data, run.name, self.config.eval_passes)[0]
        except self.script.InputError as error:
            raise Skipped(f"the artifact does not load: {error}") from None
        return Scored(model.to(self.world.device))

    def split(self, tokens: np.ndarray, **changes: Any) -> Any:
        """A configuration whose validation split is `tokens`; batches of two windows."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        common.write_shard(folder / "fineweb_val_000000.bin", tokens)
        common.write_manifest(folder, self.tokenizer)
        length = changes.get("train_seq_len", self.length)
        small = dict(
            data_path=str(folder),
            val_batch_size=2 * length,
            eval_stride=0,
            ttt_lr=0.0,
            compile="off",
        )
        if hasattr(self.config, "fused_mlp"):  # scripts from before the kernel have no such option
            small |= dict(fused_mlp=False)  # what is trained on a split is on a CPU, which lacks it
        return dataclasses.replace(self.config, **small | changes)

    @cached_property
    def cpu(self) -> Any:
        """A world of one rank on the CPU: what has to agree to the bit is computed there."""
        world = self.script.World({})
        world.on_cuda, world.device = False, torch.device("cpu")
        return world

    @cached_property
    def scorer(self) -> Any:
        """The script's, of the whole split, where it is there."""
        if len(self.tokens) <= self.length:
            raise Skipped(f"the validation split has only {len(self.tokens)} tokens")
        return self.script.Scorer(self.config, self.world)

    @cached_property
    def whole(self) -> tuple[Any, np.ndarray]:
        """Score and targets of the whole split, as the script counts them."""
        recorder = Recorder()
        return self.scorer.score(recorder), np.concatenate(recorder.segments[0])


# ---- 2. What stands for a model ------------------------------------------------------------------
# `Scorer.score` takes any function of (ids, targets) that returns their mean loss. So every loss
# here has gone through the script's windows, its masks and its sums.


class Probe:
    """A model of whose losses only those of some targets count, by their place in the order."""

    def __init__(
        self, model: Callable[..., Tensor], first: int, end: int, instead: int | None
    ) -> None:
        self.model, self.first, self.end, self.instead, self.seen = model, first, end, instead, 0

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        real = targets >= 0
        place = self.seen + real.flatten().cumsum(0).view_as(targets) - 1
        kept = real & (self.first <= place) & (place < self.end)
        self.seen += int(real.sum())
        if not kept.any():
            return torch.zeros((), dtype=torch.float64, device=ids.device)
        asked = targets if self.instead is None else torch.full_like(targets, self.instead)
        return self.model(ids, asked.where(kept, -100)).double() * kept.sum() / real.sum()


class Span(NamedTuple):
    """Targets by their places in the order of scoring, and what is asked for in their stead."""

    first: int
    end: int
    instead: int | None = None


def nats(scorer: Any, model: Callable[..., Tensor], stride: int, span: Span) -> float:
    """The sum of the losses of the targets of a span."""
    score = scorer.score(Probe(model, *span), stride)
    return score.val_loss * score.val_tokens


def known_loss(targets: Any) -> Any:
    return targets % 7 + 1.0


class Recorder:
    """A model of known losses that keeps the targets it is asked for.

    As a learner it marks where its chunks end.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.segments: list[list[np.ndarray]] = [[]]

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        found = targets[targets >= 0]
        self.segments[-1].append(found.cpu().numpy().astype("<u2"))
        return known_loss(found.double()).mean()

    def learn(self, tokens: Tensor, done: float) -> None:
        self.segments.append([])


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights."""
    sums = hashlib.sha256()
    for p in model.parameters():
        sums.update(p.detach().cpu().numpy().tobytes())
    return sums.hexdigest()


def by_windows(model: Scored) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as a function of which a scorer sees nothing else, asked for one window at a time.

    Losses that depend on how the scorer calls are another score then.
    """

    def mean_loss(ids: Tensor, targets: Tensor) -> Tensor:
        count = (targets >= 0).sum(1)
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        for row, n in enumerate(count.tolist()):
            if n:
                total += model(ids[row : row + 1], targets[row : row + 1]).double() * n
        return total / count.sum().clamp_min(1)

    return mean_loss


class Call(NamedTuple):
    """A call of a model: its targets by their places, the weights that it met, and the loss."""

    first: int
    end: int
    weights: str
    loss: float


class Watched:
    """A model that notes its calls."""

    def __init__(self, scored: Scored) -> None:
        self.scored, self.seen = scored, 0
        self.calls: list[Call] = []

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        weights, count = digest(self.scored.model), int((targets >= 0).sum())
        loss = self.scored(ids, targets)
        self.calls.append(Call(self.seen, self.seen + count, weights, loss.item()))
        self.seen += count
        return loss
