"""Checks of how a script scores and trains, each measured through its own Scorer and Learner.

Some places are drawn anew each time, so that no script can know them: an honest run passes wherever
they fall; a cheat in a narrow stretch may be missed by one audit and found by the next.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import math
import os
import platform
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import sentencepiece as spm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt
from records.tools import audited, common
from records.tools.audited import (
    DRAW,
    Audit,
    Failed,
    Skipped,
    Span,
    begin,
    demand,
    digest,
    nats,
)

CONSTANT = 1e-5  # nats by which a loss may move that must not: sums that are ordered otherwise
WHOLE = 1e-4  # by which probabilities may miss 1
EXACT = 1e-6  # val_bpb of the same sums in float32 on CPUs
EXACT_TTT = 1e-5  # the same after test-time training
CLOSE = 5e-4  # anything else
FLIPS = 16  # places that are drawn: of flips,
SUMS = 4  # of sums over the vocabulary,
STARTS = 3  # and of test-time training's replaced texts
EXACT_LINE = r"final_\S+_(\w+)_exact val_loss:(\S+) val_bpb:(\S+)"

# ---- 1. Causality and normalisation --------------------------------------------------------------


def flip(tokens: np.ndarray, places: slice | int) -> np.ndarray:
    """A copy with other tokens at some places: ones of the text, no beginning of documents."""
    usual, draw, other = tokens[tokens > 3], np.random.default_rng(0), tokens.copy()
    drawn = draw.choice(usual, tokens.shape)
    drawn[drawn == tokens] = usual[usual != usual[0]][0]
    other[places] = np.where(drawn == tokens, usual[0], drawn)[places]
    return other


class Reader(NamedTuple):
    """A scorer of one text with a model, in a module that has seen no other text."""

    scorer: Any
    model: audited.Scored
    stride: int

    def mean_nats(self, span: Span) -> float:
        return nats(self.scorer, self.model, self.stride, span) / (span.end - span.first)


def read_anew(audit: Audit, text: np.ndarray, stride: int) -> Reader:
    fresh = audit.anew()
    scorer = fresh.script.Scorer(fresh.split(text), fresh.world)
    return Reader(scorer, fresh.model(), stride)


def moved(one: Reader, other: Reader, span: Span) -> float:
    """By how many nats a target the losses of two readers differ; infinity if they are none."""
    difference = one.mean_nats(span) - other.mean_nats(span)
    return abs(difference) if math.isfinite(difference) else math.inf


def check_causality(audit: Audit, stride: int) -> str:
    """One token is flipped, at the ends of windows and at FLIPS places that are drawn.

    No earlier target's loss may change, nor what was expected in its place. Nor may losses depend
    on which targets are asked for, or on what was scored before. Every text meets a module that has
    seen no other. A leak into a share s of the places is missed with probability (1 - s)^FLIPS at
    most; what begins after these windows is not seen.
    """
    T = audit.length
    tokens = audit.tokens[: 2 * T + T // 2 + 2]
    reader, end = read_anew(audit, tokens, stride), len(tokens) - 1
    before = digest(reader.model.model)
    whole = nats(reader.scorer, reader.model, stride, Span(0, end))  # before any other score
    drawn = DRAW.sample(range(2, end + 1), min(FLIPS, end - 1))
    ends = T // 2, T - 1, T + 1, 2 * T - T // 3, end
    places = sorted({place for place in (*ends, *drawn) if 2 <= place <= end})
    name = "causality-sliding" if stride else "causality"
    begin(name, f"{len(places)} flips, for each 8 losses in a text of {end} targets")
    worst = own = 0.0
    for p in places:
        flipped = flip(tokens, p)
        other = read_anew(audit, flipped, stride)
        for span in (Span(0, p - 1), Span(p - 2, p - 1)):
            worst = max(worst, moved(reader, other, span))
        for token in (tokens[p], flipped[p]):
            own = max(own, moved(reader, other, Span(p - 1, p, int(token))))
    cuts = [0, end // 3, end // 2, end]
    parts = [Span(a, b) for a, b in itertools.pairwise(cuts)]
    total = sum(nats(reader.scorer, reader.model, stride, part) for part in parts)
    apart = abs(total - whole) / end
    measured = (
        f"{len(places)} flips in {-(-end // T)} windows of {T}, stride {stride}: earlier losses "
        f"move by {worst:.1e}, the flipped token's own distribution by {own:.1e} nats; losses of "
        f"parts miss the whole by {apart:.1e} a target (at most {CONSTANT:.0e})"
    )
    if digest(reader.model.model) != before:
        raise Failed(f"{measured}; scoring changed the weights")
    if not all(size <= CONSTANT for size in (worst, own, apart)):
        raise Failed(measured)
    return measured


def check_normalised(audit: Audit) -> str:
    """Every token of the vocabulary is asked for in the same place: probabilities sum to 1.

    The places are the last target of a window and SUMS that are drawn. That is a forward pass for
    every token and place, long at full size on a CPU. What is wrong at a share s of the other
    targets is missed with probability (1 - s)^SUMS at most.
    """
    length, size = audit.length, audit.config.vocab_size
    config = audit.split(audit.tokens[: length + 1])
    scorer, model = audit.script.Scorer(config, audit.world), audit.model()
    places = sorted({length - 1, *DRAW.sample(range(length - 1), min(SUMS, length - 1))})
    what = f"{len(places)} places x {size:,} tokens of the vocabulary"
    begin("normalised", f"{what} = {len(places) * size:,} forward passes of {length} tokens")
    sums = {}
    for place in places:
        spans = [Span(place, place + 1, token) for token in range(size)]
        sums[place] = math.fsum(math.exp(-nats(scorer, model, 0, span)) for span in spans)
    told = ", ".join(f"{total:.7f} at target {place}" for place, total in sums.items())
    measured = f"probabilities of all {size} tokens sum to {told} (1 within {WHOLE:.0e})"
    if not all(abs(total - 1) <= WHOLE for total in sums.values()):
        raise Failed(measured)
    return measured


# ---- 2. Every target once ------------------------------------------------------------------------


def deal(audit: Audit, config: Any, stride: int, size: int) -> tuple[Any, np.ndarray]:
    """Score and targets, in order, of an evaluation by `size` ranks, one after the other.

    The last rank comes first: the sum that each gets is of all so far, so that the first one's
    score is that of all.
    """
    sums: list[Tensor] = []
    recorders = [audited.Recorder(config) for _ in range(size)]

    def add(x: Tensor) -> Tensor:
        sums.append(x)
        return torch.stack(sums).sum(0)

    for rank in reversed(range(size)):
        world, recorder = copy.copy(audit.cpu), recorders[rank]
        world.rank, world.size, world.is_main = rank, size, rank == 0
        world.all_reduce = add
        scorer = audit.script.Scorer(config, world)
        score = scorer.score(recorder, stride, recorder if config.ttt_lr else None)
    chunks = itertools.zip_longest(*(recorder.segments for recorder in recorders), fillvalue=[])
    parts = [part for segments in chunks for segment in segments for part in segment]
    return score, np.concatenate(parts)


class Small(NamedTuple):
    """A small evaluation: tokens of the split, ranks, stride, and whether it learns."""

    tokens: int
    ranks: int
    stride: int
    learns: int


def deal_small(audit: Audit, case: Small) -> Iterator[str]:
    """What a small evaluation scores otherwise than each target once, in order."""
    T, size, expected = audit.length, case.ranks, audit.tokens[1 : case.tokens]
    config = audit.split(
        audit.tokens[: case.tokens],
        val_batch_size=2 * T * size,
        ttt_lr=1e-3 * case.learns,
        ttt_chunk_tokens=T,
        micro_batch_tokens=max(2 * T, T * size),
    )
    score, found = deal(audit, config, case.stride, size)
    off = score.val_loss - audited.known_loss(expected.astype(float)).mean()
    whole = np.array_equal(found, expected) and score.val_tokens == len(expected)
    if not whole or not abs(off) < 1e-9:
        yield (
            f"{len(expected)} targets, {size} ranks, stride {case.stride or T}, TTT {case.learns}: "
            f"{len(found)} asked for, val_tokens {score.val_tokens}, val_loss off by {off:+.2g}"
        )


def check_once(audit: Audit) -> str:
    """Every target is scored once, in order, by one or several ranks, the tail included."""
    T, targets = audit.length, len(audit.tokens) - 1
    wrong: list[str] = []
    score, found = audit.whole
    if not np.array_equal(found, audit.tokens[1:]) or score.val_tokens != targets:
        wrong.append(f"whole split: {score.val_tokens} of {targets} targets, or not in order")
    logged = audit.run.number("tokens")
    if logged != targets:
        wrong.append(f"the log says val_tokens {logged:.0f}, the shards hold {targets} targets")
    lengths = [n for n in (T + 1, 2 * T + 1, 3 * T, 2 * T + T // 2 + 2) if n <= len(audit.tokens)]
    cases = list(itertools.product(lengths, (1, 2, 3), (0, audit.sliding), (0, 1)))
    for case in cases:
        wrong += deal_small(audit, Small(*case))
    demand(wrong)
    small = f"{len(cases)} small splits on 1 to 3 ranks"
    return f"{targets} targets of the split, and {small}: each once, in order"


# ---- 3. Test-time training -----------------------------------------------------------------------


def adapt(audit: Audit, text: np.ndarray) -> tuple[audited.Watched, Any]:
    """A model that is watched while it learns from a text as it is scored, and its score."""
    fresh, T = audit.anew(), audit.length
    stride = audit.config.eval_stride
    config = fresh.split(text, eval_stride=stride, ttt_lr=audit.config.ttt_lr, ttt_chunk_tokens=T)
    scored = audited.Scored(fresh.model().model.to(fresh.cpu.device))
    watched = audited.Watched(scored)
    learner = fresh.script.Learner(scored.model, scored, config, fresh.cpu)
    return watched, fresh.script.Scorer(config, fresh.cpu).score(watched, stride, learner)


def ahead(base: audited.Watched, other: audited.Watched, start: int) -> Iterator[str]:
    """Where a run depends on the text from `start` on that another has replaced."""
    text = f"text from target {start} on"
    for one, two in zip(base.calls, other.calls, strict=True):
        if one.first <= start and one.weights != two.weights:
            yield f"the weights that score target {one.first} depend on {text}"
        elif one.end <= start and one.loss != two.loss:
            yield f"losses of targets {one.first} to {one.end} depend on {text}"


def check_ttt(audit: Audit) -> str:
    """All tokens from a chunk on are replaced: earlier losses and weights stay as they were.

    The chunk is one of the first three of twelve, or of STARTS drawn among the rest. What is done
    in a single later chunk is seen only if that one is drawn, what begins later never.
    """
    T = audit.length
    if not audit.config.ttt_lr:
        raise Skipped("TTT_LR=0 in this run")
    if len(audit.tokens) < 2 * T + 2:
        raise Skipped(f"the validation split has no two chunks of {T} tokens")
    tokens = audit.tokens[: 12 * T + T // 2 + 2]
    chunks = range(0, len(tokens) - 1, T)
    starts = sorted([*chunks[:3], *DRAW.sample(chunks[3:], min(STARTS, len(chunks[3:])))])
    texts = f"{1 + len(starts)} texts of {len(tokens) - 1} targets"
    begin("ttt", f"{texts}, each scored and learned from in {len(chunks)} chunks")
    base, score = adapt(audit, tokens)
    wrong: list[str] = []
    for start in starts:
        other, _ = adapt(audit, flip(tokens, slice(start + 1, None)))
        wrong += ahead(base, other, start)
    told = sum((call.end - call.first) * call.loss for call in base.calls) / base.seen
    if abs(told - score.val_loss) > CONSTANT:
        what = f"val_loss {score.val_loss:.6f} is not the mean of what the model returned"
        wrong.append(f"{what}, {told:.6f}")
    demand(wrong[:2])
    states = len({call.weights for call in base.calls})
    return (
        f"{len(chunks)} chunks, {states} states of the weights: none depends on text that it "
        f"scores, replaced from {len(starts)} of them on"
    )


# ---- 4. Training ---------------------------------------------------------------------------------


@dataclass
class Seen:
    """What training did: shards read in steps, tokens read of train shards, backward passes."""

    names: set[str]
    tokens: int = 0
    backward: int = 0


@contextlib.contextmanager
def training_seen(script: types.ModuleType) -> Iterator[Seen]:
    read, step, backward = script.Tokens.read, script.Trainer.train_step, torch.autograd.backward
    seen = Seen(set())
    inside: list[int] = []

    def watched_read(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        found, names = read(tokens, *args, **kwargs), {path.name for path in tokens.paths}
        if any("_train_" in name for name in names):
            seen.tokens += len(found)
        if inside:
            seen.names |= names
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


def brief_config(fresh: Audit, train: np.ndarray, text: np.ndarray) -> Any:
    """A run of three steps on `train` in a folder of its own, with the validation split `text`."""
    T = fresh.length
    off = dict(refit_steps=0, save_every=0, resume="", tracker="none", preset="", run_id="run")
    if getattr(fresh.config, "fits_by_clip", False):  # a choice among artifacts takes minutes
        off |= dict(matrix_clip_sigmas=12.85)
    known = {field.name for field in fields(fresh.config)}
    config = fresh.split(
        text,
        iterations=3,
        warmup_steps=1,
        warmdown_iters=1,
        train_batch_tokens=T,
        micro_batch_tokens=T,
        val_loss_every=1,
        max_wallclock_seconds=0.0,
        gptq_batches=min(fresh.config.gptq_batches, 1),
        **{name: value for name, value in off.items() if name in known},
    )
    common.write_shard(Path(config.data_path) / "fineweb_train_000000.bin", train)
    return replace(config, log_dir=config.data_path)


class Brief(NamedTuple):
    """What a brief training made, and what it read or trained that nothing needs."""

    artifact: bytes
    wrong: list[str]


def train_briefly(audit: Audit, train: np.ndarray, text: np.ndarray, scored: bool) -> Brief:
    """Three steps on `train` with the validation split `text`, which is scored or only there."""
    fresh, T = audit.anew(), audit.length
    config = brief_config(fresh, train, text)
    with contextlib.ExitStack() as stack:
        if not scored:
            made_up = fresh.script.Score(1.0, 1.0, len(text) - 1, len(text) - 1, 0.0)
            score = mock.patch.object(fresh.script.Scorer, "score", lambda *_, **__: made_up)
            stack.enter_context(score)
        seen = stack.enter_context(training_seen(fresh.script))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # its progress on a terminal
        fresh.script.run(config, fresh.cpu)
    wrong = [f"a training step read {name}" for name in sorted(seen.names) if "_train_" not in name]
    tokens = (3 + config.gptq_batches) * (T + 1)
    passes = 3 + len(fresh.script.training_modes(config))  # and a warm-up step a mode
    if seen.tokens > tokens:
        need = f"3 steps of {T} need {tokens}"
        wrong.append(f"{seen.tokens} tokens of train shards were read, {need}")
    if seen.backward > passes:
        wrong.append(f"there were {seen.backward} backward passes, 3 steps need {passes}")
    artifact = Path(config.log_dir) / "run" / train_gpt.ARTIFACT
    return Brief(artifact.read_bytes(), wrong)


def check_training(audit: Audit) -> str:
    """Three steps of training with validation in between make the same artifact on any split.

    The splits are two small ones, and the whole one and another of its size (which are not scored:
    that would take long). Of what train shards are read for, only `Tokens.read` is counted, and of
    training only PyTorch's backward passes; what begins after more than three steps is not seen.
    """
    if not (paths := audit.shards("train")):
        raise Skipped(f"{audit.config.data_path} holds no train shard")
    T = audit.length
    wrong: list[str] = []
    train = np.fromfile(paths[0], "<u2", count=4 * T + 2, offset=1024)
    begin("training", "4 runs of 3 steps, each with its own validation split, packed at the end")
    for text, scored in ((audit.tokens[: 2 * T + 2], True), (audit.tokens, False)):
        one = train_briefly(audit, train, text, scored)
        other = train_briefly(audit, train, flip(text, slice(None)), scored)
        wrong += one.wrong + other.wrong
        if one.artifact != other.artifact:
            wrong.append("the artifact depends on the validation split")
    demand(list(dict.fromkeys(wrong)))
    return (
        "3 steps on two small validation splits made one artifact, on two as long as the whole one "
        "as well; they read train shards only, and nothing was trained besides"
    )


# ---- 5. The score --------------------------------------------------------------------------------


@functools.cache
def listeners() -> list[set[Path]]:
    """Sets that get the paths of files that Python opens to read.

    Python keeps its hook until it ends.
    """
    sets: list[set[Path]] = []

    def note(event: str, args: tuple[Any, ...]) -> None:
        if not sets or event != "open" or not isinstance(args[0], (str, bytes)):
            return
        if args[2] & os.O_ACCMODE != os.O_WRONLY:
            sets[-1].add(Path(os.fsdecode(args[0])))

    sys.addaudithook(note)
    return sets


@contextlib.contextmanager
def files_read() -> Iterator[set[Path]]:
    paths: set[Path] = set()
    listeners().append(paths)
    try:
        yield paths
    finally:
        listeners().pop()


def foreign(audit: Audit, paths: set[Path]) -> list[str]:
    """Files that are no part of script or artifact.

    Not foreign are validation shards and their manifest, tokenizer, script, Python's libraries, the
    system's files and what the audit itself has made.
    """
    tools = common.ROOT / "records" / "tools"
    own = [*audit.shards("val"), audit.tokenizer, audit.script_path, tools]
    own += [audit.shards("val")[0].parent / "manifest.json"]
    own += [Path(str(module.__file__)).parents[1] for module in (np, spm, torch)]
    own += [Path(str(train_gpt.__file__)), audit.scratch, Path(sys.prefix), Path(sys.base_prefix)]
    own += [Path("/proc"), Path("/sys"), Path("/dev")]
    known = [path.resolve() for path in own]
    found = []
    for path in paths:
        resolved = path.resolve()
        if not any(resolved.is_relative_to(place) for place in known):
            found.append(str(path))
    return sorted(found)


def score_again(audit: Audit, name: str) -> tuple[float, set[Path]]:
    """val_bpb of the artifact scored as the run scored it, and the files that this read."""
    cache = str(audit.scratch / "compiled")
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache), files_read() as paths:
        fresh = audit.anew()
        scored = fresh.model()
        learner = None
        if name == "ttt":
            learner = fresh.script.Learner(scored.model, scored, fresh.config, fresh.world)
        stride = 0 if name == "roundtrip" else fresh.config.eval_stride
        score = fresh.scorer.score(audited.by_windows(scored), stride, learner)
    return score.val_bpb, paths


def ran_here(run: audited.Run) -> bool:
    """Whether a run was made on a CPU of this architecture, where sums come out alike."""
    return run.log.words["device"].split(",")[0] == platform.machine()


def check_score(audit: Audit) -> str:
    """The artifact is scored again as the run scored it, one window at a time.

    From the loading of script and model on, no file is read that would hold weights beside the
    artifact. Files that compiled code opens by itself, and files among Python's libraries, are not
    seen.
    """
    sure = not audit.world.on_cuda and ran_here(audit.run) and audit.config.dtype == "float32"
    told: list[str] = []
    wrong: list[str] = []
    scores = audit.run.matches(EXACT_LINE)
    targets = f"{len(audit.tokens) - 1:,} targets scored again, one window at a time"
    begin("score", f"{targets}: {', '.join(name for name, *_ in scores)}")
    for name, _, logged in scores:
        bpb, paths = score_again(audit, name)
        if others := foreign(audit, paths):
            names = ", ".join(others[:3])
            wrong.append(f"{name} read {names}, which is no part of script or artifact")
        limit = CLOSE
        if sure:
            limit = EXACT_TTT if name == "ttt" else EXACT
        told.append(f"{name} {bpb:.8f}, the log {logged} (within {limit:.0e})")
        if not abs(bpb - float(logged)) <= limit:
            wrong.append(told[-1])
    demand(wrong)
    return "val_bpb: " + "; ".join(told)
