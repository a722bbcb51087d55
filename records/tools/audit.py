"""Audits a finished run: what invalidated entries of the contest, each measured on the run itself.

    python records/tools/audit.py logs/<run> [--data DATA_PATH] [--tokenizer PATH] [--text FILE] [--out FILE.json]
    python records/tools/audit.py <submission folder> --script <submission folder>/train_gpt.py

THIS EXECUTES THE SCRIPT: the one at the repository's root, or that of --script, is imported, scores text and
trains for a moment. Audit a stranger's script in a container without network or anything worth reading.

Every check is a line, `ok|FAILED|skipped name: what was measured`; the exit code is 0 if none failed, 1 if
one did, 2 if there was nothing to audit. Losses are measured through the script's own Scorer and Learner.
Some places are drawn anew each time, so that no script can know them: an honest run passes wherever they
fall; a cheat in a narrow stretch may be missed by one audit and found by the next.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import sentencepiece as spm
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt
from records.tools import submit

CONSTANT = 1e-5  # nats by which a loss may move that must not move: sums that are ordered otherwise
WHOLE = 1e-4  # by which probabilities may miss 1
EXACT, EXACT_TTT, CLOSE = (
    1e-6,
    1e-5,
    5e-4,
)  # val_bpb: float32 on CPUs; after training there; anything else
FINEWEB = (
    50_000,
    151_080_891,
    30_000,
)  # documents, bytes (PR 1804), and how far tokenizers differ (PR 1289)
FOLDED = (
    2e-4  # the same difference as a share: what a tokenizer that folds text may change of --text
)
UNLOGGED = (
    0.1  # seconds of training time that result.json may have and the log not: between its lines
)
SCORES = ("roundtrip", "sliding", "ttt")
DRAW = random.SystemRandom()
FLIPS, SUMS, STARTS = (
    16,
    4,
    3,
)  # places that are drawn: of flips, of sums over the vocabulary, of TTT's flips


class Failed(Exception):
    """What a check found wrong."""


class Skipped(Exception):
    """Why a check cannot be made."""


class Line(NamedTuple):
    """The outcome of one check."""

    status: str  # ok, FAILED, skipped
    name: str
    measured: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.status} {self.name}: {self.measured}"


def demand(wrong: list[str]) -> None:
    if wrong:
        raise Failed("; ".join(wrong))


# ---- 1. The run and its script ---------------------------------------------------------------------------

LOADED = itertools.count()
compile_once = functools.cache(partial(compile, mode="exec"))  # source and path -> code


def load_script(path: Path) -> types.ModuleType:
    """The script as a new module. Its source is what runs, never a cached file beside it."""
    name = f"audited_{next(LOADED)}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile_once(path.read_bytes(), str(path)), module.__dict__)
    return module


@dataclass
class Run:
    """One finished run: its log, and what lies beside it."""

    name: str
    log: submit.Log
    artifact: bytes | None
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]] | None

    @cached_property
    def lines(self) -> list[str]:
        """The log behind the source that it begins with."""
        text = self.log.path.read_text(encoding="utf-8", errors="replace")
        return text.partition(submit.BAR)[2].splitlines()

    @cached_property
    def settings(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(.*?)(?= [A-Z0-9_]+=|$)", self.log.config))

    def matches(self, pattern: str) -> list[tuple[str, ...]]:
        found = (re.match(pattern, line) for line in self.lines)
        return [match.groups() for match in found if match]


def read_runs(folder: Path) -> list[Run]:
    """The run of a run's folder, or those of a submission folder; ValueError if there is none to audit."""
    whole = (folder / "train.log").exists()
    logs = [submit.Log.read(folder / "train.log")] if whole else submit.read_logs(folder)
    if not logs:
        raise ValueError(f"{folder} holds no train.log and no log of a submission")
    stored = [path.read_bytes() for path in sorted(folder.glob("*.ptz"))]
    by_digest, runs = {hashlib.sha256(data).hexdigest(): data for data in stored}, []
    for log in logs:
        if missing := log.missing() or log.script is None and ["script_sha256"]:
            raise ValueError(
                f"{log.path} gives no {', '.join(missing)}: is it the log of a finished run?"
            )
        artifact = stored[0] if whole and stored else by_digest.get(log.artifact)
        result, metrics = (
            whole and (folder / name).exists() and (folder / name).read_text()
            for name in ("result.json", "metrics.jsonl")
        )
        runs.append(
            Run(
                log.path.name if len(logs) > 1 else folder.name,
                log,
                artifact,
                json.loads(result) if result else None,
                [json.loads(line) for line in metrics.splitlines()] if metrics else None,
            )
        )
    return runs


def config_of(run: Run, script: types.ModuleType) -> Any:
    """The configuration in the log; ValueError if it is not one of this script."""
    kinds = {name.upper(): kind for name, kind in script.get_type_hints(script.Config).items()}
    if differ := sorted(run.settings.keys() ^ kinds.keys()):
        raise ValueError(
            f"{run.log.path} is of another script than {script.__file__} (options that only one "
            f"of them has: {', '.join(differ)}); name the run's own by --script"
        )
    values = {name: script.parse(name, text, kinds[name]) for name, text in run.settings.items()}
    return script.Config(**{name.lower(): value for name, value in values.items()})


class Audit:
    """What the checks share: script, run, configuration, validation tokens, and a place for small splits."""

    def __init__(
        self, script: types.ModuleType, run: Run, given: argparse.Namespace, scratch: Path
    ) -> None:
        self.script, self.run, self.given, self.scratch = script, run, given, scratch
        paths = dict(data_path=given.data, tokenizer_path=given.tokenizer)
        self.config = replace(
            config_of(run, script), **{name: str(x) for name, x in paths.items() if x}
        )
        self.world = script.World({})
        self.length = self.config.train_seq_len
        factor = next(n for n in range(2, self.length + 1) if self.length % n == 0)
        self.sliding = (
            self.config.eval_stride or self.length // factor
        )  # also where a run did not slide

    def anew(self) -> Audit:
        """The same with a module of its own, and with its configuration and world: what a script keeps of one
        text, it does not know in another's. Only what it hides elsewhere in the process goes along."""
        return Audit(load_script(Path(self.script.__file__)), self.run, self.given, self.scratch)

    def shards(self, split: str) -> list[Path]:
        return sorted(Path(self.config.data_path).glob(f"fineweb_{split}_*.bin"))

    @cached_property
    def tokens(self) -> np.ndarray:
        """The validation split, uint16, not read by the script."""
        if not (paths := self.shards("val")):
            raise Skipped(
                f"{self.config.data_path} holds no fineweb_val_*.bin: name the shards by --data"
            )
        if not Path(self.config.tokenizer_path).exists():
            raise Skipped(
                f"there is no {self.config.tokenizer_path}: name the tokenizer by --tokenizer"
            )
        return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])

    def model(self) -> Any:
        """A fresh model from the artifact, on the CPU."""
        if self.run.artifact is None:
            raise Skipped("no artifact of this run is here")
        try:
            return self.script.load_model(
                self.run.artifact, self.run.name, self.config.eval_passes
            )[0]
        except self.script.InputError as error:
            raise Skipped(f"the artifact does not load: {error}") from None

    def split(self, tokens: np.ndarray, **changes: Any) -> Any:
        """A configuration whose validation split is `tokens`; batches of two windows."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        write_shard(folder / "fineweb_val_000000.bin", tokens)
        length = changes.get("train_seq_len", self.length)
        small = dict(
            data_path=str(folder),
            val_batch_size=2 * length,
            eval_stride=0,
            ttt_lr=0.0,
            compile="off",
        )
        return replace(self.config, **small | changes)

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
        recorder = Recorder(self.config)
        return self.scorer.score(recorder), np.concatenate(recorder.segments[0])


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


# ---- 2. What stands for a model --------------------------------------------------------------------------
# `Scorer.score` takes any function of (ids, targets) that returns their mean loss. So every loss here has
# gone through the script's windows, its masks and its sums.


class Probe:
    """A model of whose losses only those of some targets count, by their place in the order of scoring."""

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


def nats(
    scorer: Any,
    model: Callable[..., Tensor],
    stride: int,
    span: tuple[int, int],
    instead: int | None = None,
) -> float:
    """Sum of the losses of the targets of `span`, each asked for as it is or as `instead`."""
    score = scorer.score(Probe(model, *span, instead), stride)
    return score.val_loss * score.val_tokens


def known_loss(targets: Tensor | np.ndarray) -> Any:
    return targets % 7 + 1.0


class Recorder:
    """A model of known losses that keeps the targets it is asked for, and a learner that marks its chunks."""

    def __init__(self, config: Any) -> None:
        self.config, self.segments = config, [[]]

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


def by_windows(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as a function of which a scorer sees nothing else, and which asks for one window at a time:
    losses that depend on how the scorer calls are another score then."""

    def mean_loss(ids: Tensor, targets: Tensor) -> Tensor:
        count = (targets >= 0).sum(1)
        rows = [row for row, n in enumerate(count.tolist()) if n]
        sums = [model(ids[i : i + 1], targets[i : i + 1]).double() * count[i] for i in rows]
        return sum(
            sums, torch.zeros((), dtype=torch.float64, device=ids.device)
        ) / count.sum().clamp_min(1)

    return mean_loss


class Watched:
    """A model that notes before every call how many targets came before, its weights, and the loss."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls, self.seen = model, [], 0

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        weights, count, loss = (
            digest(self.model),
            int((targets >= 0).sum()),
            self.model(ids, targets),
        )
        self.calls.append((self.seen, self.seen + count, weights, loss.item()))
        self.seen += count
        return loss


# ---- 3. Checks of how it scores and trains ---------------------------------------------------------------


def flip(tokens: np.ndarray, places: slice | int) -> np.ndarray:
    """A copy with other tokens at some places: ones that the text has, not a beginning of documents."""
    usual, draw, other = tokens[tokens > 3], np.random.default_rng(0), tokens.copy()
    drawn = draw.choice(usual, tokens.shape)
    drawn[drawn == tokens] = usual[usual != usual[0]][0]
    other[places] = np.where(drawn == tokens, usual[0], drawn)[places]
    return other


def check_causality(audit: Audit, stride: int) -> str:
    """One token is flipped, at the ends of windows and at FLIPS places drawn: no earlier target's loss may
    change, nor what was expected in its place. Nor may losses depend on which targets are asked for, or on
    what was scored before. Every text meets a module that has seen no other. A leak into a share s of the
    places is missed with probability (1 - s)^FLIPS at most; what begins after these windows is not seen."""

    def begin(text: np.ndarray) -> tuple[Any, Any]:
        fresh = audit.anew()
        return fresh.script.Scorer(fresh.split(text), fresh.world), fresh.model().to(
            fresh.world.device
        )

    T, tokens = audit.length, audit.tokens[: 2 * audit.length + audit.length // 2 + 2]
    scorer, model = begin(tokens)
    end, worst, own, before = len(tokens) - 1, 0.0, 0.0, digest(model)
    whole = nats(scorer, model, stride, (0, end))  # before anything else was scored
    drawn = DRAW.sample(range(2, end + 1), min(FLIPS, end - 1))
    places = sorted(
        {p for p in (T // 2, T - 1, T + 1, 2 * T - T // 3, end, *drawn) if 2 <= p <= end}
    )
    for p in places:
        flipped = flip(tokens, p)
        other = begin(flipped)
        for span, instead in (
            ((0, p - 1), None),
            ((p - 2, p - 1), None),
            ((p - 1, p), int(tokens[p])),
            ((p - 1, p), int(flipped[p])),
        ):
            one, two = (
                nats(*pair, stride, span, instead) / (span[1] - span[0])
                for pair in ((scorer, model), other)
            )
            moved = abs(one - two) if math.isfinite(one - two) else math.inf
            worst, own = (
                (worst, max(own, moved)) if instead is not None else (max(worst, moved), own)
            )
    cuts = [0, end // 3, end // 2, end]
    parts = sum(nats(scorer, model, stride, span) for span in itertools.pairwise(cuts))
    apart = abs(parts - whole) / end
    measured = (
        f"{len(places)} flips in {-(-end // T)} windows of {T}, stride {stride}: earlier losses move "
        f"by {worst:.1e}, the flipped token's own distribution by {own:.1e} nats; losses of parts "
        f"miss the whole by {apart:.1e} a target (at most {CONSTANT:.0e})"
    )
    changed = digest(model) != before
    if changed or not all(moved <= CONSTANT for moved in (worst, own, apart)):
        raise Failed(measured + "; scoring changed the weights" * changed)
    return measured


def check_normalised(audit: Audit) -> str:
    """Every token of the vocabulary is asked for at the last target of a window and at SUMS drawn ones:
    probabilities sum to 1. That is a forward pass for every token and place, long at full size on a CPU. What
    is wrong at a share s of the other targets is missed with probability (1 - s)^SUMS at most."""
    length, size = audit.length, audit.config.vocab_size
    config = audit.split(audit.tokens[: length + 1])
    scorer, model = audit.script.Scorer(config, audit.world), audit.model().to(audit.world.device)
    sums = {}
    for place in sorted({length - 1, *DRAW.sample(range(length - 1), min(SUMS, length - 1))}):
        losses = (nats(scorer, model, 0, (place, place + 1), v) for v in range(size))
        sums[place] = math.fsum(math.exp(-loss) for loss in losses)
    told = ", ".join(f"{total:.7f} at target {place}" for place, total in sums.items())
    measured = f"probabilities of all {size} tokens sum to {told} (1 within {WHOLE:.0e})"
    if not all(abs(total - 1) <= WHOLE for total in sums.values()):
        raise Failed(measured)
    return measured


def deal(audit: Audit, config: Any, stride: int, size: int) -> tuple[Any, np.ndarray]:
    """Score and targets, in order, of an evaluation by `size` ranks, one after the other, the last first: the
    sum that each gets is of all so far, so that the first one's score is that of all."""
    sums, recorders = [], [Recorder(config) for _ in range(size)]

    def sum_(x: Tensor) -> Tensor:
        sums.append(x)
        return torch.stack(sums).sum(0)

    for rank in reversed(range(size)):
        world, recorder = copy.copy(audit.cpu), recorders[rank]
        world.rank, world.size, world.is_main, world.sum_ = rank, size, rank == 0, sum_
        scorer = audit.script.Scorer(config, world)
        score = scorer.score(recorder, stride, recorder if config.ttt_lr else None)
    chunks = itertools.zip_longest(*(recorder.segments for recorder in recorders), fillvalue=[])
    return score, np.concatenate(
        [part for segments in chunks for segment in segments for part in segment]
    )


def check_once(audit: Audit) -> str:
    """Every target is scored once, in order, by one or several ranks, the tail included."""
    T, wrong, count, targets = audit.length, [], 0, len(audit.tokens) - 1
    score, found = audit.whole
    if not np.array_equal(found, audit.tokens[1:]) or score.val_tokens != targets:
        wrong.append(f"whole split: {score.val_tokens} of {targets} targets, or not in order")
    if audit.run.log.tokens != targets:
        wrong.append(
            f"the log says val_tokens {audit.run.log.tokens:.0f}, the shards hold {targets} targets"
        )
    lengths = [n for n in (T + 1, 2 * T + 1, 3 * T, 2 * T + T // 2 + 2) if n <= len(audit.tokens)]
    for n, size, stride, learns in itertools.product(
        lengths, (1, 2, 3), (0, audit.sliding), (0, 1)
    ):
        expected = audit.tokens[1:n]
        config = audit.split(
            audit.tokens[:n],
            val_batch_size=2 * T * size,
            ttt_lr=1e-3 * learns,
            ttt_chunk_tokens=T,
            micro_batch_tokens=max(2 * T, T * size),
        )
        score, found = deal(audit, config, stride, size)
        loss, count = known_loss(expected.astype(float)).mean(), count + 1
        off = score.val_loss - loss
        if (
            not np.array_equal(found, expected)
            or score.val_tokens != len(expected)
            or not abs(off) < 1e-9
        ):
            wrong.append(
                f"{len(expected)} targets, {size} ranks, stride {stride or T}, TTT {learns}: "
                f"{len(found)} asked for, val_tokens {score.val_tokens}, val_loss off by {off:+.2g}"
            )
    if len(wrong) > 4:
        wrong[3:] = [f"and {len(wrong) - 3} more"]
    demand(wrong)
    return f"{targets} targets of the split, and {count} small splits on 1 to 3 ranks: each once, in order"


def check_ttt(audit: Audit) -> str:
    """All tokens from a chunk on are replaced, one of the first three of twelve or of STARTS drawn among the
    rest: earlier losses and the weights it meets stay as they were. What is done in a single later chunk is
    seen only if that one is drawn, what begins later never."""
    T = audit.length
    if not audit.config.ttt_lr:
        raise Skipped("TTT_LR=0 in this run")
    if len(audit.tokens) < 2 * T + 2:
        raise Skipped(f"the validation split has no two chunks of {T} tokens")
    tokens, stride = audit.tokens[: 12 * T + T // 2 + 2], audit.config.eval_stride
    chunks = range(0, len(tokens) - 1, T)
    starts = sorted([*chunks[:3], *DRAW.sample(chunks[3:], min(STARTS, len(chunks[3:])))])

    def adapt(text: np.ndarray) -> tuple[Watched, Any]:
        fresh = audit.anew()
        config = fresh.split(
            text, eval_stride=stride, ttt_lr=audit.config.ttt_lr, ttt_chunk_tokens=T
        )
        watched = Watched(fresh.model())
        learner = fresh.script.Learner(watched.model, config, fresh.cpu)
        return watched, fresh.script.Scorer(config, fresh.cpu).score(watched, stride, learner)

    (base, score), wrong = adapt(tokens), []
    for start in starts:
        other, _ = adapt(flip(tokens, slice(start + 1, None)))
        for (first, end, weights, loss), (*_, met, lost) in zip(
            base.calls, other.calls, strict=True
        ):
            if first <= start and weights != met:
                wrong.append(
                    f"the weights that score target {first} depend on text from target {start} on"
                )
            elif end <= start and loss != lost:
                wrong.append(
                    f"losses of targets {first} to {end} depend on text from target {start} on"
                )
    told = sum((end - first) * loss for first, end, _, loss in base.calls) / base.seen
    if abs(told - score.val_loss) > CONSTANT:
        wrong.append(
            f"val_loss {score.val_loss:.6f} is not the mean of what the model returned, {told:.6f}"
        )
    demand(wrong[:2])
    steps = len({weights for *_, weights, _ in base.calls})
    return (
        f"{len(chunks)} chunks, {steps} states of the weights: none depends on text that it scores, "
        f"replaced from {len(starts)} of them on"
    )


@dataclass
class Seen:
    """What training did: shards read inside of steps, tokens read of train shards, backward passes."""

    names: set[str]
    tokens: int = 0
    backward: int = 0


@contextlib.contextmanager
def training_seen(script: types.ModuleType) -> Iterator[Seen]:
    read, step, backward = script.Tokens.read, script.Trainer.train_step, torch.autograd.backward
    seen, inside = Seen(set()), []

    def watched_read(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        found, names = read(tokens, *args, **kwargs), {path.name for path in tokens.paths}
        seen.tokens += len(found) * any("_train_" in name for name in names)
        seen.names |= names if inside else set()
        return found

    def watched_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        try:
            return step(trainer, *args, **kwargs)
        finally:
            inside.pop()

    def watched_backward(*args: Any, **kwargs: Any) -> Any:
        seen.backward += 1
        return backward(*args, **kwargs)

    with (
        mock.patch.object(script.Tokens, "read", watched_read),
        mock.patch.object(script.Trainer, "train_step", watched_step),
        mock.patch.object(torch.autograd, "backward", watched_backward),
    ):
        yield seen


def train_briefly(
    audit: Audit, train: np.ndarray, text: np.ndarray, scored: bool
) -> tuple[bytes, list[str]]:
    """The artifact of three steps on `train` with the validation split `text`, which is scored or only there;
    and what was read or trained that the steps, calibration and a warm-up step a mode do not need."""
    fresh, T = audit.anew(), audit.length
    off = dict(save_every=0, resume="", tracker="none", preset="", run_id="run")
    known = {f.name for f in fields(fresh.config)}
    config = fresh.split(
        text,
        iterations=3,
        warmup_steps=1,
        warmdown_iters=1,
        train_batch_tokens=T,
        micro_batch_tokens=T,
        val_loss_every=1,
        max_wallclock_seconds=0.0,
        gptq_batches=min(audit.config.gptq_batches, 1),
        **{name: value for name, value in off.items() if name in known},
    )
    write_shard(Path(config.data_path) / "fineweb_train_000000.bin", train)
    config = replace(config, log_dir=config.data_path)
    with contextlib.ExitStack() as stack:
        if not scored:
            made_up = fresh.script.Score(1.0, 1.0, len(text) - 1, len(text) - 1, 0.0)
            stack.enter_context(
                mock.patch.object(fresh.script.Scorer, "score", lambda *_, **__: made_up)
            )
        seen = stack.enter_context(training_seen(fresh.script))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        fresh.script.run(config, fresh.cpu)
    wrong = [f"a training step read {name}" for name in sorted(seen.names) if "_train_" not in name]
    modes = len(fresh.script.training_modes(config))
    due = Seen(set(), (3 + config.gptq_batches) * (T + 1), 3 + modes)
    if seen.tokens > due.tokens:
        wrong.append(
            f"{seen.tokens} tokens of train shards were read, 3 steps of {T} need {due.tokens}"
        )
    if seen.backward > due.backward:
        wrong.append(f"there were {seen.backward} backward passes, 3 steps need {due.backward}")
    return (Path(config.log_dir) / "run" / "model.ptz").read_bytes(), wrong


def check_training(audit: Audit) -> str:
    """Three steps of training with validation in between, on two small validation splits and on the whole one
    and another of its size (which are not scored: that would take long): the same artifact, and no training
    beyond the steps. Of what train shards are read for, only `Tokens.read` is counted, and of training only
    PyTorch's backward passes; what begins after more than three steps is not seen."""
    if not (paths := audit.shards("train")):
        raise Skipped(f"{audit.config.data_path} holds no train shard")
    T, wrong = audit.length, []
    train = np.fromfile(paths[0], "<u2", count=4 * T + 2, offset=1024)
    for text, scored in ((audit.tokens[: 2 * T + 2], True), (audit.tokens, False)):
        pair = [train_briefly(audit, train, x, scored) for x in (text, flip(text, slice(None)))]
        wrong += itertools.chain(*(faults for _, faults in pair))
        if len({artifact for artifact, _ in pair}) > 1:
            wrong.append("the artifact depends on the validation split")
    demand([*dict.fromkeys(wrong)])
    return (
        "3 steps on two small validation splits made one artifact, on two as long as the whole one as "
        "well; they read train shards only, and nothing was trained besides"
    )


# ---- 4. Checks of data and files -------------------------------------------------------------------------


def check_data(audit: Audit) -> str:
    """SHA-256 of the validation shards, in the order of their names, and the tokenizer."""
    sums, documents = hashlib.sha256(), int((audit.tokens == audit.script.BOS).sum())
    for path in (*audit.shards("val"), Path(audit.config.tokenizer_path)):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                sums.update(block)
    return (
        f"sha256 {sums.hexdigest()} of {len(audit.shards('val'))} validation shards and the tokenizer: "
        f"{len(audit.tokens)} tokens, {documents} documents"
    )


def decoded(audit: Audit) -> tuple[int, int]:
    """Documents, and UTF-8 bytes of their text. A character that the end of the split cuts in two is what is
    there of it: its byte pieces, one byte each."""
    tokenizer = spm.SentencePieceProcessor(model_file=audit.config.tokenizer_path)
    starts = np.flatnonzero(audit.tokens == audit.script.BOS)
    if not len(starts) or starts[0]:
        raise Failed(f"the split begins with token {audit.tokens[0]}, not with a document (BOS)")
    total, ends = 0, [*starts[1:], len(audit.tokens)]
    for start, end in zip(starts, ends):
        ids = audit.tokens[start + 1 : end].tolist()
        while end == len(audit.tokens) and ids and tokenizer.is_byte(ids[-1]):
            ids.pop()
            total += 1
        total += len(tokenizer.decode(ids).encode())
    return len(starts), total


def check_bytes(audit: Audit) -> str:
    """The bytes that the score divides by are those of the decoded text."""
    (documents, text), counted, wrong = decoded(audit), audit.whole[0].val_bytes, []
    logged = audit.run.matches(r"val_tokens:\d+ val_bytes:(\d+)")
    if counted != text:
        more = counted / text - 1
        wrong.append(
            f"the script counts {counted} bytes ({more:+.2%}), the decoded text has {text}"
        )
    if not logged or int(logged[-1][0]) != text:
        wrong.append(
            f"the log says {logged[-1][0] if logged else 'no'} bytes, the decoded text has {text}"
        )
    measured = f"{counted} bytes, those of {documents} decoded documents"
    if audit.given.text:
        size = audit.given.text.stat().st_size
        measured += f"; {audit.given.text.name} has {size}"
        if abs(size - text) > FOLDED * size:
            wrong.append(
                f"{audit.given.text.name} has {size} bytes, the decoded documents have {text}"
            )
    number, canonical, spread = FINEWEB
    if documents == number or "fineweb10B" in audit.config.data_path:
        measured += f"; FineWeb's split has {canonical} within {spread}"
        if documents != number or abs(text - canonical) > spread:
            wrong.append(
                f"here are {documents} documents of {text} bytes, FineWeb's split is {number} of "
                f"{canonical} within {spread}"
            )
    demand(wrong)
    return measured


def check_script(audit: Audit) -> str:
    """The script that was audited is the one that wrote the log."""
    data, log, wrong = Path(audit.script.__file__).read_bytes(), audit.run.log, []
    found = hashlib.sha256(data).hexdigest()
    versions = (audit.run.result or {}).get("versions", {})
    for where, given in (
        ("the log", log.script),
        ("result.json", versions.get("script_sha256", log.script)),
    ):
        if given != found:
            wrong.append(
                f"{where} is of script {given[:12]}, this is {found[:12]} (--script names another)"
            )
    if log.source is not None and hashlib.sha256(log.source.encode()).hexdigest() != log.script:
        wrong.append("the source in the log has another hash than the log says")
    demand(wrong)
    return f"sha256 {found}, {len(data)} bytes, as in the log"


def check_sizes(audit: Audit) -> str:
    """Bytes of script and artifact, from the files, against log, result.json and the limit."""
    if (data := audit.run.artifact) is None:
        raise Skipped("no artifact of this run is here")
    script, log, result = (
        Path(audit.script.__file__).stat().st_size,
        audit.run.log,
        audit.run.result,
    )
    true = dict(code=script, model=len(data), total=script + len(data))
    wrong = [
        f"the log gives {log.values[name]:.0f} bytes of {name}, the files {size}"
        for name, size in true.items()
        if log.values[name] != size
    ]
    found = hashlib.sha256(data).hexdigest()
    for name, size in true.items():
        if result and result.get(f"bytes_{name}") != size:
            wrong.append(
                f"result.json gives bytes_{name} {result.get(f'bytes_{name}')}, the files {size}"
            )
    for where, given in (
        ("log", log.artifact),
        ("result.json", result and result.get("artifact_sha256")),
    ):
        if given not in (None, found):
            wrong.append(f"the artifact of {where} is {given[:12]}, this is {found[:12]}")
    if true["total"] > submit.SIZE_LIMIT:
        wrong.append(f"{true['total']} bytes exceed {submit.SIZE_LIMIT}")
    demand(wrong)
    return (
        f"{script} + {len(data)} = {true['total']} bytes of {submit.SIZE_LIMIT}; artifact sha256 "
        f"{found}, as in the log"
    )


def check_header(audit: Audit) -> str:
    """The architecture in the artifact is that of the run, field by field."""
    if audit.run.artifact is None:
        raise Skipped("no artifact of this run is here")
    try:
        _, architecture, kind = audit.script.load_model(audit.run.artifact, "the artifact")
    except audit.script.InputError as error:
        raise Failed(str(error)) from None
    carried, logged, wrong = asdict(architecture), asdict(audit.config), []
    for where, given in (
        ("log", logged),
        ("result.json", (audit.run.result or {}).get("config", logged)),
    ):
        wrong += [
            f"{name} is {value} in the artifact, {given.get(name)} in {where}"
            for name, value in carried.items()
            if given.get(name) != value
        ]
    if [(kind,)] != (told := audit.run.matches(r"Serialized model (\S+):")):
        wrong.append(f"the artifact holds {kind}, the log says {told}")
    demand(wrong)
    return f"all {len(carried)} fields of the artifact's architecture are those of the run"


def check_figures(audit: Audit) -> str:
    """Log and result.json tell the same, and val_bpb follows from loss, tokens and bytes."""
    run, wrong, result = audit.run, [], audit.run.result
    exact = run.matches(r"final_\S+_(\w+)_exact val_loss:(\S+) val_bpb:(\S+)")
    rounded = {
        name: pair
        for name, *pair in run.matches(
            r"final_\S+_(roundtrip|sliding|ttt) val_loss:(\S+) val_bpb:(\S+)"
        )
    }
    tokens, size = map(int, run.matches(r"val_tokens:(\d+) val_bytes:(\d+)")[-1])
    for name, loss, bpb in exact:
        if not math.isclose(float(loss) / math.log(2) * tokens / size, float(bpb), abs_tol=1e-7):
            wrong.append(
                f"{name} val_bpb {bpb} does not follow from val_loss {loss}, {tokens}/{size} bytes"
            )
        if name not in rounded or not all(map(submit.same, rounded[name], map(float, (loss, bpb)))):
            wrong.append(f"{name}: the log gives {rounded.get(name)} and {loss}, {bpb}")
    for name, loss, bpb in exact if result else ():
        told = result.get(name, {})
        pairs = ((loss, "val_loss"), (bpb, "val_bpb"), (tokens, "val_tokens"), (size, "val_bytes"))
        wrong += [
            f"{name} {key} is {text} in the log, {told.get(key)} in result.json"
            for text, key in pairs
            if not submit.same(text, told.get(key, math.inf))
        ]
    if result:
        if {name for name, *_ in exact} != {name for name in SCORES if name in result}:
            wrong.append("log and result.json have other scores")
        shown = {name.upper(): train_gpt.show(value) for name, value in result["config"].items()}
        wrong += [
            f"{name} is {run.settings.get(name)} in the log, {shown.get(name)} in result.json"
            for name in sorted(dict(shown.items() ^ run.settings.items()))
        ]
        last = result["pre_quant"]
        if not (
            submit.same(f"{run.log.pre_bpb:.4f}", last["val_bpb"])
            and run.log.steps == result["steps"]
        ):
            wrong.append(
                f"before rounding, val_bpb is {run.log.pre_bpb} (step {run.log.steps:.0f}) in the "
                f"log, {last['val_bpb']:.4f} (step {result['steps']}) in result.json"
            )
    demand(wrong)
    scores = ", ".join(f"{name} {bpb}" for name, _, bpb in exact)
    other = "agrees with result.json" if result else "agrees with itself; there is no result.json"
    return f"val_bpb {scores}: the log {other}"


@functools.cache
def listeners() -> list[set[Path]]:
    """Sets that get the paths of files that Python opens to read. Python keeps its hook until it ends."""
    sets: list[set[Path]] = []

    def note(event: str, args: tuple[Any, ...]) -> None:
        if (
            sets
            and event == "open"
            and isinstance(args[0], (str, bytes))
            and args[2] & os.O_ACCMODE != os.O_WRONLY
        ):
            sets[-1].add(Path(os.fsdecode(args[0])))

    sys.addaudithook(note)
    return sets


@contextlib.contextmanager
def files_read() -> Iterator[set[Path]]:
    listeners().append(paths := set())
    try:
        yield paths
    finally:
        listeners().pop()


def foreign(audit: Audit, paths: set[Path]) -> list[str]:
    """Those that are neither validation shards, tokenizer, script, Python's libraries nor the system's, nor
    of what the audit itself has made."""
    own = {
        *audit.shards("val"),
        Path(audit.config.tokenizer_path),
        Path(audit.script.__file__),
        Path(__file__),
        Path(train_gpt.__file__),
    }
    packages = (Path(module.__file__).parents[1] for module in (np, spm, torch))
    known = [
        path.resolve()
        for path in (
            *own,
            *packages,
            *map(Path, (audit.scratch, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")),
        )
    ]
    return sorted(
        str(path) for path in paths if not any(path.resolve().is_relative_to(x) for x in known)
    )


def check_score(audit: Audit) -> str:
    """The artifact is scored again as the run scored it, one window at a time; from the loading of script and
    model on, no file is read that would hold weights beside the artifact. Files that compiled code opens by
    itself, and files among Python's libraries, are not seen."""
    cpus = not audit.world.on_cuda and "threads a rank" in audit.run.log.device
    sure, told, wrong = cpus and audit.config.dtype == "float32", [], []
    compiles = mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(audit.scratch / "compiled"))
    for name, _, logged in audit.run.matches(r"final_\S+_(\w+)_exact val_loss:(\S+) val_bpb:(\S+)"):
        with compiles, files_read() as paths:
            fresh = audit.anew()
            model = fresh.model().to(fresh.world.device)
            learner = (
                fresh.script.Learner(model, fresh.config, fresh.world) if name == "ttt" else None
            )
            stride = 0 if name == "roundtrip" else fresh.config.eval_stride
            score = fresh.scorer.score(by_windows(model), stride, learner)
        if others := foreign(audit, paths):
            wrong.append(
                f"{name} read {', '.join(others[:3])}, which is no part of script or artifact"
            )
        limit = (EXACT_TTT if learner else EXACT) if sure else CLOSE
        told.append(f"{name} {score.val_bpb:.8f}, the log {logged} (within {limit:.0e})")
        if not abs(score.val_bpb - float(logged)) <= limit:
            wrong.append(told[-1])
    demand(wrong)
    return "val_bpb: " + "; ".join(told)


# ---- 5. Clocks -------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the log that has a time."""

    step: int
    kind: str  # train, val
    loss: str
    ms: int
    average: float

    def __str__(self) -> str:
        return f"step {self.step} ({self.kind})"


def clock_faults(rows: list[Row], every: int, iterations: int, first: int) -> Iterator[str]:
    """Steps and times that do not go on, averages that are not theirs, steps missing from the `first` on."""
    for before, row in itertools.pairwise(rows):
        again = row.kind == before.kind == "train" and row.step == before.step
        if row.step < before.step or row.ms < before.ms or again:
            yield f"{row}, {row.ms} ms, comes after {before}, {before.ms} ms"
    for row in rows:
        count = max(row.step, 1)
        if abs(row.average * count - row.ms) > 0.005 * count + 0.51:
            yield f"{row}: {row.average} ms a step are not {row.ms} ms"
    trained = [row.step for row in rows if row.kind == "train"]
    due = {
        n for n in range(first, rows[-1].step + 1) if n <= 10 or n % every == 0 or n == iterations
    }
    if missing := sorted(due - {*trained}):
        yield f"no line of steps {', '.join(map(str, missing[:5]))}"


def metric_faults(rows: list[Row], metrics: list[dict[str, Any]], batch: int) -> Iterator[str]:
    """Lines of the log that metrics.jsonl tells otherwise."""
    metrics = [entry for entry in metrics if "train_loss" in entry or "val_loss" in entry]
    if len(metrics) != len(rows):
        yield f"the log has {len(rows)} lines of steps, metrics.jsonl {len(metrics)}"
    for row, entry in zip(rows, metrics):
        loss, seconds = entry.get(f"{row.kind}_loss", math.inf), entry["train_seconds"]
        finite = math.isfinite(float(row.loss))  # a skipped step has null for its loss
        told = loss is not None and submit.same(row.loss, loss) if finite else loss is None
        if entry["step"] != row.step or not told:
            yield f"{row}: {row.kind}_loss {row.loss} in the log, {entry['step']}: {loss} in metrics.jsonl"
        elif not submit.same(row.ms, 1e3 * seconds):
            yield f"{row}: {row.ms} ms in the log, {1e3 * seconds:.1f} in metrics.jsonl"
        elif row.kind == "train" and not math.isclose(
            entry["tokens_per_second"] * seconds, row.step * batch, rel_tol=1e-6
        ):
            yield f"{row}: {entry['tokens_per_second']:.0f} tokens/s are not its tokens and time"


def check_clocks(audit: Audit) -> str:
    """Training and calibration within the cap, evaluation within its limit, and a log whose times go on from
    step 1, or from the checkpoint of another log that the run says it resumed before its first line."""
    run, config, wrong = audit.run, audit.config, []
    limit = submit.TIME_LIMIT if audit.given.track == "10min_16mb" else math.inf
    pattern = r"step:(\d+)/\d+ (train|val)_loss:(\S+) (?:val_bpb:\S+ )?train_time:(\d+)ms step_avg:([\d.]+)ms"
    rows, first = [], 1
    for step, kind, loss, ms, average, resumed in run.matches(
        pattern + r"|^resumed from step:(\d+)"
    ):
        if resumed:  # what follows its checkpoint was made again
            first = first if rows else int(resumed) + 1
            rows = [
                x
                for x in rows
                if x.step < int(resumed) or x.step == int(resumed) and x.kind == "train"
            ]
        else:
            rows.append(Row(int(step), kind, loss, int(ms), float(average)))
    wrong += clock_faults(rows, config.train_log_every, config.iterations, first)
    wrong += (
        metric_faults(rows, run.metrics, config.train_batch_tokens)
        if run.metrics is not None
        else []
    )
    trained = next(row for row in rows if row.kind == "val" and row.step == rows[-1].step)
    calibration = sum(int(ms) for (ms,) in run.matches(r"gptq_calibration .*time:(\d+)ms"))
    seconds, cap = (
        (trained.ms + calibration) / 1e3,
        min(config.max_wallclock_seconds or math.inf, limit),
    )
    told = (run.result or {}).get("train_seconds", seconds)
    if abs(told - seconds) > UNLOGGED:
        wrong.append(f"training took {seconds:.3f} s in the log, {told:.3f} s in result.json")
    if (most := max(seconds, told, rows[-1].ms / 1e3)) > cap:
        wrong.append(f"training and calibration took {most:.3f} s, more than {cap}")
    for ms, step in run.matches(r"stopping_early: \S+ train_time:(\d+)ms step:(\d+)/"):
        if late := [row for row in rows if row.step > int(step)]:
            wrong.append(f"{late[0]} comes after the end at step {step}, {ms} ms")
    if max(row.step for row in rows) > config.iterations:
        wrong.append(f"{rows[-1]} is beyond ITERATIONS={config.iterations}")
    spent = sum(int(ms) for (ms,) in run.matches(r"final_\S+ val_loss.*eval_time:(\d+)ms")) / 1e3
    if spent > (allowed := min(config.eval_limit_seconds, limit)):
        wrong.append(f"evaluation took {spent:.3f} s, more than {allowed}")
    if len(wrong) > 4:
        wrong[3:] = [f"and {len(wrong) - 3} more"]
    demand(wrong)
    other = (
        "agree with metrics.jsonl"
        if run.metrics is not None
        else "go on; there is no metrics.jsonl"
    )
    begun = f" (the log begins after step {first - 1}, resumed)" if first > 1 else ""
    return (
        f"{rows[-1].step} steps{begun}, {trained.ms / 1e3:.3f} s of training + "
        f"{calibration / 1e3:.3f} of calibration (cap {cap}), {spent:.3f} s of evaluation (limit "
        f"{allowed}); {len(rows)} lines {other}"
    )


# ---- 6. The command --------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Audit], str]] = {
    "data": check_data,
    "script": check_script,
    "sizes": check_sizes,
    "header": check_header,
    "figures": check_figures,
    "clocks": check_clocks,
    "bytes": check_bytes,
    "once": check_once,
    "causality": partial(check_causality, stride=0),
    "causality-sliding": lambda audit: check_causality(audit, audit.sliding),
    "normalised": check_normalised,
    "ttt": check_ttt,
    "training": check_training,
    "score": check_score,
}


def outcome(name: str, audit: Audit, skip: list[str]) -> Line:
    started = time.perf_counter()
    try:
        if name in skip:
            raise Skipped("by --skip")
        status, measured = "ok", CHECKS[name](audit)
    except Skipped as reason:
        status, measured = "skipped", str(reason)
    except Failed as finding:
        status, measured = "FAILED", str(finding)
    except (
        Exception
    ) as error:  # the audited script may raise anything, and then what was asked is not shown
        status, measured = "FAILED", f"{type(error).__name__}: {error}"
    return Line(status, name, measured, time.perf_counter() - started)


def audit_folder(given: argparse.Namespace) -> Iterator[tuple[Run, Line]]:
    """Every check of every run of a folder; ValueError if there is nothing to audit."""
    runs, script = read_runs(given.run), load_script(given.script)
    for run in runs:
        with tempfile.TemporaryDirectory() as scratch:
            audit = Audit(script, run, given, Path(scratch))
            for name in CHECKS:
                yield run, outcome(name, audit, given.skip)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("run", type=Path, help="folder of a finished run, or of a submission")
    top.add_argument(
        "--data", type=Path, help="folder of the shards, if not where the run had them"
    )
    top.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model, if not where the run had it"
    )
    top.add_argument("--text", type=Path, help="the validation documents' text, one after another")
    top.add_argument(
        "--script", type=Path, default=ROOT / "train_gpt.py", help="of the run; IT IS EXECUTED"
    )
    top.add_argument(
        "--track", choices=submit.TRACKS, default="10min_16mb", help="the other has no 600 s"
    )
    top.add_argument(
        "--skip", nargs="+", default=[], choices=CHECKS, metavar="CHECK", help=", ".join(CHECKS)
    )
    top.add_argument("--out", type=Path, help="the report as JSON")
    return top


def main() -> int:
    given, lines = parser().parse_args(), []
    try:
        for run, line in audit_folder(given):
            print(line if run.name == given.run.name else f"{line} [{run.name}]", flush=True)
            lines.append(dict(run=run.name, **line._asdict()))
        counts = {
            word: sum(line["status"] == word for line in lines)
            for word in ("ok", "FAILED", "skipped")
        }
        print(", ".join(f"{count} {word}" for word, count in counts.items()))
        report = dict(
            folder=given.run.name,
            torch=torch.__version__,
            script_sha256=hashlib.sha256(given.script.read_bytes()).hexdigest(),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            counts=counts,
            checks=lines,
        )
        if given.out:
            train_gpt.write_atomically(given.out, json.dumps(report, indent=1).encode())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
