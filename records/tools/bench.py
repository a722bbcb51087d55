r"""What training with train_gpt.py costs on this machine: time, memory, bytes.

    python records/tools/bench.py              # against a plain implementation
    python records/tools/bench.py ab --a COMPILE=off --b COMPILE=model
    python records/tools/bench.py revisions HEAD~3 .   # commits; . is the file
    python records/tools/bench.py levers --lever COMPILE=model \
        --lever "DTYPE=float32 COMPILE=model"
    python records/tools/bench.py ranks 2      # time in collectives, scaling
    python records/tools/bench.py profile      # one step by kind of kernel
    python records/tools/bench.py compile COMPILE=off,model NUM_LOOPS=2,3
    python records/tools/bench.py export --set TOKENIZER_PATH=...

--preset and --set take what train_gpt.py takes as variables; `COMMAND --help`
explains a command. What is compared takes its steps in turn, on the same
tokens and in one process, so that other load on the machine meets all alike.
Nothing is timed unless a step of each, from the same parameters, gave the
same loss, gradients and updates.

Exit codes: 0; 1 if they did not agree, or if anything was compiled after the
warm-up; 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import nn

    import train_gpt as tg
    from records.tools import common, plain, race
    from records.tools.race import Case, Contestant, Mismatch

# ---- 1. One step by kind of kernel ---------------------------------------------------------------
KERNEL_KINDS = (  # the first that matches a kernel's name
    ("communication", r"nccl|gloo|c10d"),
    (
        "attention",
        r"flash|fmha|sdpa|scaled_dot|attention|aten::(b?addbmm|bmm|baddbmm|_softmax)",
    ),
    ("gemm", r"gemm|nvjet|cutlass|cublas|xmma|aten::(add)?mm|matmul|triton_tem"),
    (
        "reductions",
        r"triton_(red|per)|reduce|softmax|rms_norm|aten::_?(sum|mean|linalg|norm|nll_loss)",
    ),
    ("copies", r"memcpy|memset|copy|CatArray|aten::(cat|fill_|zero_|embedding|index|.*clone)"),
    (
        "elementwise/fused",
        r"triton_poi|elementwise|vectorized|cpp_fused|CompiledFxGraph|aten::_?(foreach_)?("
        r"add|addcmul|mul|sub|rsub|div|pow|lerp|square|sigmoid|tanh|leaky_relu|relu|clamp|"
        r"clamp_min|neg|exp|where|sqrt|rsqrt|abs|triu|isfinite|le|ge|lt|gt|eq|ne)(_|\b)",
    ),
)
KINDS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KERNEL_KINDS]


class Kernel(NamedTuple):
    name: str
    kind: str
    start: float  # microseconds
    us: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


class Profiled(NamedTuple):
    """A step under the profiler."""

    kernels: list[Kernel]
    us: float


def profile_step(contestant: Contestant, step: int) -> Profiled:
    """The CUDA kernels of a step, or on CPUs the operators, less what those call.

    What runs inside an optimizer is of kind optimizer.
    """
    cuda = contestant.world.on_cuda
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        contestant.step(step)
        contestant.world.synchronize()
        us = 1e6 * (time.perf_counter() - began)
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() if event.device_type == device]
    optimizers = [event.time_range for event in events if event.name.startswith("Optimizer.step#")]
    found = []
    for event in events:
        start, kind = event.time_range.start, kind_of(event.name)
        if kind != "communication" and any(span.start <= start <= span.end for span in optimizers):
            kind = "optimizer"
        own = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        if own and not (cuda and event.is_user_annotation):
            found.append(Kernel(event.name, kind, start, own))
    return Profiled(found, us)


class Part(NamedTuple):
    """What kernels of one kind, or of one name, took of a step."""

    ms: float
    share: float
    calls: int


def sum_up(kernels: Sequence[Kernel], key: Callable[[Kernel], str]) -> dict[str, Part]:
    """Kernels by a key, the longest first."""
    total = sum(kernel.us for kernel in kernels)
    parts: dict[str, Part] = {}
    for kernel in kernels:
        ms, share, calls = parts.get(key(kernel), Part(0.0, 0.0, 0))
        parts[key(kernel)] = Part(ms + kernel.us / 1e3, share + kernel.us / total, calls + 1)
    return dict(sorted(parts.items(), key=lambda item: -item[1].ms))


def by_kind(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Milliseconds, share and count of each kind and of the longest kernels; their sum."""
    names = sum_up(kernels, lambda kernel: f"{kernel.kind}: {kernel.name[:90]}")
    return dict(
        kinds=sum_up(kernels, lambda kernel: kernel.kind),
        longest=dict(itertools.islice(names.items(), 20)),
        kernels_ms=sum(kernel.us for kernel in kernels) / 1e3,
    )


def idle(kernels: Sequence[Kernel]) -> float:
    """Part of the time from the first kernel to the end of the last in which none ran."""
    spans = sorted((kernel.start, kernel.start + kernel.us) for kernel in kernels)
    busy, end = 0.0, -math.inf  # streams overlap
    for start, until in spans:
        busy, end = busy + max(0.0, until - max(end, start)), max(end, until)
    return 1 - busy / (end - spans[0][0])


# ---- 2. Ranks ------------------------------------------------------------------------------------
ELEMENT = {
    "float": 4,
    "double": 8,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "int": 4,
    "long int": 8,
    "unsigned char": 1,
    "bool": 1,
}  # bytes, by the profiler's names


def in_children(count: int, work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What work(rank, *args) returns in the first of so many fresh processes, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        torch.multiprocessing.spawn(child, (out, work, args), count)
        result = json.loads(out.read_text())
    if "error" in result:
        kind = Mismatch if result["mismatch"] else tg.InputError
        raise kind(result["error"])
    return result


def child(rank: int, out: Path, work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    try:
        result = work(rank, *args)
    except (ValueError, Mismatch) as error:  # a copy of the script has an InputError of its own
        result = dict(error=str(error), mismatch=isinstance(error, Mismatch))
    if rank == 0:
        out.write_text(json.dumps(result))


def collectives(contestant: Contestant, first: int, steps: int) -> dict[str, Any]:
    """Calls, bytes handed over and milliseconds in collectives of a step, by gloo's profile.

    From call to completion, so waiting for other ranks and what goes on beside it are included.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        for step in range(first, first + steps):
            contestant.step(step)
    calls: list[int] = []
    count: Counter[str] = Counter()
    ms = 0.0
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name().startswith("gloo:"):
            sizes = zip(event.shapes(), event.dtypes())
            calls.append(sum(math.prod(shape) * ELEMENT[kind] for shape, kind in sizes))
            count[f"{event.name()[5:]} of {calls[-1]} bytes"] += 1
            ms += event.duration_ns() / 1e6
    return dict(
        calls=len(calls) / steps, bytes=sum(calls) / steps, ms=ms / steps, steps=steps, kinds=count
    )


def one_rank(rank: int, port: int, env: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """The work of a rank: gate, steps in turn, collectives, on CPUs with gloo."""
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    os.environ.update(place, RANK=str(rank), WORLD_SIZE=str(args.count))
    torch.set_num_threads(max(1, args.threads // args.count))
    world, cases = tg.World(os.environ, device="cpu"), against_plain(env, args)
    # elsewhere, ranks meet at a barrier before they share anything
    world.enter("a step", training=True)
    differences, start = race.gate(cases, world), race.draw(cases["ours"])
    line = {}
    for name, case in cases.items():
        line[name] = race.warm_up(case, start, args.warmup, world).contestant
    rounds, end = race.measure(line, args.warmup, args.steps), args.warmup + args.steps
    found = {
        name: dict(
            step_ms=race.spread(rounds.ms[name]),
            threads_of_a_rank=torch.get_num_threads(),
            collectives=collectives(contestant, end, 3),
        )
        for name, contestant in line.items()
    }
    dist.barrier()
    return dict(differences=differences, contestants=found)


def project(
    one: dict[str, Any],
    comm: dict[str, Any],
    ranks: int,
    muon_share: float,
    args: argparse.Namespace,
) -> float:
    """Milliseconds of a step on so many ranks by ASSUMPTIONS; `one` is that of a step on one."""
    compute, adam, muon = (
        one[f"{name}_ms"]["median"] for name in ("forward_backward", "adam", "muon")
    )
    ring = 2 * (ranks - 1) / ranks * comm["bytes"] / (args.link_gbs * 1e6)
    waiting = comm["calls"] * args.call_us / 1e3 if ranks > 1 else 0.0
    return compute / ranks + adam + muon * muon_share + ring + waiting


ASSUMPTIONS = """Projected, not measured. A step on N ranks takes
  forward and backward of one rank / N (its micro-batches are dealt out, none becomes smaller),
  + Adam, the same on every rank, + Muon: ours the same on every rank, plain its fullest share of
  matrices, + 2 (N - 1) / N x bytes / {link_gbs:g} GB/s (a ring) + {call_us:g} us a call, none
  hidden behind other work. No rank waits for another one's data or host. --link-gbs, --call-us:
  NVLink is near 300 GB/s."""


def step_on_one_rank(cases: dict[str, Case], args: argparse.Namespace) -> dict[str, Any]:
    """What `plain` measures: here, or in the file that --one-rank names."""
    if not args.one_rank:
        race.gate(cases)
        return race.run(cases, args)
    one = common.read_result(args.one_rank)
    names = [field.name for field in dataclasses.fields(tg.Architecture)]
    for name, case in cases.items():
        want, have = race.describe(case)["config"], one["contestants"][name]["config"]
        if odd := [name for name in names if want[name] != have.get(name)]:
            other = f"{args.one_rank} measured another architecture"
            raise tg.InputError(f"{other}: {', '.join(odd).upper()}")
    return one


def ranks(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Collectives on N ranks, and the scaling model from a step on one."""
    env, args.threads = base_env(args, folder), torch.get_num_threads()
    cases = against_plain(env, args)
    one = step_on_one_rank(cases, args)
    found = in_children(args.count, one_rank, common.free_port(), env, shareable(args))
    model = plain.PlainGPT(cases["ours"].config().architecture())
    matrices = sum(isinstance(module, nn.Linear) for module in model.modules())
    projected: dict[str, dict[int, float]] = {}
    for name, split in one["contestants"].items():
        comm, projected[name] = found["contestants"][name]["collectives"], {}
        for n in (1, 2, 4, 8):
            share = math.ceil(matrices / n) / matrices if name == "plain" else 1.0
            projected[name][n] = project(split, comm, n, share, args)
    result = dict(
        ranks=args.count,
        one_rank=one,
        projected_step_ms=projected,
        **found,
        assumptions=ASSUMPTIONS.format(link_gbs=args.link_gbs, call_us=args.call_us),
    )
    show_ranks(result)
    return result


# ---- 3. Compile times, export --------------------------------------------------------------------


def compile_cold(rank: int, env: dict[str, str], cache: str) -> dict[str, Any]:
    """The first steps of every mode of training in this process, whose caches are empty."""
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton")
    case = Case(env)
    seconds: list[float] = []
    contestant = race.build(case, race.draw(case))
    for mode in case.script.training_modes(contestant.config):
        for step in range(3):
            began = time.perf_counter()
            with contestant.attention():
                contestant.trainer.train_step(step, 0.0, contestant.batches.micro(step), mode)
            contestant.world.synchronize()
            seconds.append(time.perf_counter() - began)
    compiled, breaks = race.graphs().tolist()
    compiling = max(0.0, sum(seconds) - len(seconds) * float(np.median(seconds)))
    return dict(
        compile_seconds=compiling,
        graphs=compiled,
        graph_breaks=breaks,
        recompiles=race.recompiles(),
        modes=len(seconds) // 3,
        step_seconds=seconds,
    )


def compile_times(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Cold compile times of every combination of the values, each in a process of its own."""
    env = base_env(args, folder)
    found: dict[str, dict[str, Any]] = {}
    options = [
        [(name, value) for value in values.split(",")]
        for name, values in common.pairs(args.values).items()
    ]
    cases = {
        " ".join(map("=".join, choice)): env | dict(choice)
        for choice in itertools.product(*options)
    }
    for variables in cases.values():  # mistakes are told before anything starts
        Case(variables).config()
    for label, variables in cases.items():
        found[label] = in_children(1, compile_cold, variables, tempfile.mkdtemp(dir=folder))
        told = (
            "{compile_seconds:.1f} s, {graphs} graphs, {recompiles} of them recompiled, "
            "{graph_breaks} breaks, {modes} modes of training"
        )
        common.say(f"{label}: {told.format(**found[label])}")
    return dict(cases=found)


def score_kinds(script: Any, config: Any, model: Any) -> dict[str, Any]:
    """Plain, sliding and learning scores of a model, and tokens scored per second."""
    world = script.World({})
    scorer = script.Scorer(config, world)
    T, stride = config.train_seq_len, config.eval_stride or min(64, config.train_seq_len)
    chunk = min(config.ttt_chunk_tokens, config.micro_batch_tokens // T * T)
    learning = dataclasses.replace(config, ttt_lr=config.ttt_lr or 0.002, ttt_chunk_tokens=chunk)
    compiler = script.Compiler(config, world)
    forward = functools.partial(compiler.forward(model), mode=model.scoring)
    scored = {}
    for kind in ("plain", "sliding", "ttt"):
        learner = None
        if kind == "ttt":
            learner = script.Learner(model, forward, learning, world)
        with race.attention_of(script, config)():
            if compiler.level != "off":
                scorer.warm_up(forward, learner)
            score = scorer.score(forward, 0 if kind == "plain" else stride, learner)
        speed = score.val_tokens / score.eval_seconds
        scored[kind] = dict(tokens_per_second=speed, **score._asdict())
        common.say(f"{kind}: {speed:,.0f} tokens/s")
    return scored


def export(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds to pack and to reload a model on one core, and tokens scored per second."""
    case, threads = Case(base_env(args, folder)), torch.get_num_threads()
    script, config, model = case.script, case.config(), race.draw(case, 0.3)
    tokens = script.Tokens(config, "val")
    part = tokens.read(0, min(args.val_tokens, tokens.total)).numpy()
    write_shard(folder / "scored", "val", part)
    common.write_manifest(folder / "scored", tg.find_file(config.tokenizer_path))
    config = dataclasses.replace(config, data_path=str(folder / "scored"))
    script.Scorer(config, script.World({}))  # a missing tokenizer is told before anything is timed
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = script.pack_to_fit(model, config, {}, lambda text: None)
    packed = time.perf_counter()
    model = script.load_model(data, "the artifact")[0].to(script.World({}).device)
    seconds = dict(pack=packed - started, reload=time.perf_counter() - packed)
    torch.set_num_threads(threads)
    took = f"packed in {seconds['pack']:.2f} s, reloaded in {seconds['reload']:.2f} s"
    common.say(f"{len(data):,} bytes, on one core: {took}")
    scored = score_kinds(script, config, model)
    return dict(bytes=len(data), seconds_on_one_core=seconds, scored=scored, **race.describe(case))


# ---- 4. Comparisons ------------------------------------------------------------------------------


def write_shard(folder: Path, split: str, tokens: np.ndarray) -> None:
    common.write_shard(folder / f"fineweb_{split}_000000.bin", tokens)


def base_env(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Variables of --preset and --set; without a DATA_PATH among them, the tokens are random.

    The type is that of GPUs even at the scale for CPUs, unless --set has another.
    """
    env = {"PRESET": args.preset, "DTYPE": "bfloat16"} | common.pairs(args.set)
    if "DATA_PATH" not in env:
        env["DATA_PATH"] = str(folder / "random")
        random, vocabulary = np.random.default_rng(0), Case(env).config().vocab_size
        for split, count in (("train", 1 << 22), ("val", 1 << 18)):
            write_shard(folder / "random", split, random.integers(vocabulary, size=count))
    return env


def against_plain(env: dict[str, str], args: argparse.Namespace) -> dict[str, Case]:
    if args.plain_attention != "default" and not torch.cuda.is_available():
        raise tg.InputError(f"--plain-attention {args.plain_attention} needs CUDA")
    how = plain.Plain(args.plain == "compile", args.plain_attention)
    return dict(ours=Case(env), plain=Case(env, plain=how))


def shareable(args: argparse.Namespace) -> argparse.Namespace:
    """The options, without the function, for another process."""
    return argparse.Namespace(
        **{name: value for name, value in vars(args).items() if name != "run"}
    )


def compare(cases: dict[str, Case], args: argparse.Namespace) -> dict[str, Any]:
    """Gate, loss curves where asked for, race; printed."""
    result: dict[str, Any] = dict(differences=race.gate(cases))
    base = next(iter(cases))
    if args.curve:
        result["curves"] = found = race.curves(cases, args.curve)
        for name, far in found["largest_difference"].items():
            pair = f"losses of {name} and {base}"
            common.say(f"{args.curve} steps: {pair} differ by {far:.2e} at most")
    result |= race.run(cases, args)
    show(result)
    return result


def run_plain(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return compare(against_plain(base_env(args, folder), args), args)


def ab(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    env = base_env(args, folder)
    one, other = (Case(env | common.pairs(words)) for words in (args.a, args.b))
    return compare(dict(a=one, b=other), args)


def revision_file(revision: str, path: Path) -> Path:
    """train_gpt.py of a commit, at `path`; of ".", as it is."""
    if revision == ".":
        return race.ROOT / "train_gpt.py"
    command = ["git", "-C", str(race.ROOT), "show", f"{revision}:train_gpt.py"]
    git = subprocess.run(command, capture_output=True, check=False)
    if git.returncode:
        raise tg.InputError(git.stderr.decode().strip())
    path.write_bytes(git.stdout)
    return path


def revisions(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    env = base_env(args, folder)
    cases: dict[str, Case] = {}
    for i, revision in enumerate(args.commits):
        path = revision_file(revision, folder / f"revision_{i}.py")
        name = f"{revision} #{i + 1}" if revision in cases else revision
        cases[name] = Case(env, path)
        try:
            race.build(cases[name], race.draw(cases[name]))
        except (AttributeError, TypeError) as error:
            other = f"{name} has another interface than bench.py knows"
            raise tg.InputError(f"{other}: {error}") from error
    return compare(cases, args)


def levers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each lever against the settings without it, and these against themselves."""
    lines = args.file.read_text().splitlines() if args.file else []
    wanted = [*args.lever, *(line for line in lines if line.strip() and not line.startswith("#"))]
    if not wanted:
        raise tg.InputError("no lever was named: --lever KEY=VALUE or --file")
    env = base_env(args, folder)
    cases = {"baseline": Case(env), "baseline again": Case(env)}
    for text in wanted:
        cases[" ".join(text.split())] = Case(env | common.pairs(text.split()))
    result = compare(cases, args)
    again, *ratios = (ratio for ratio in result["ratios"].values())
    noise = max(abs(1 - again["p10"]), abs(1 - again["p90"]))
    result |= dict(spread_of_baseline=noise, verdicts={})
    within = f"baseline against itself: within {100 * noise:.2f} %"
    for name, ratio in zip([*cases][2:], ratios):
        gain = 1 - ratio["median"]
        kept = gain > 2 * noise
        result["verdicts"][name] = dict(gain=gain, kept=kept)
        verdict = "kept" if kept else "not kept"
        common.say(
            f"{name}: {100 * gain:+.2f} % of a step, {verdict} ({within}; a gain counts above "
            "twice that)"
        )
    return result


def profile(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cases = against_plain(base_env(args, folder), args)
    if not args.with_plain:
        cases.pop("plain")
    start = race.draw(cases["ours"])
    contestants = {}
    for name, case in cases.items():
        contestant = race.warm_up(case, start, args.warmup).contestant
        profile_step(contestant, args.warmup)  # the profiler itself starts up, too
        profiled = profile_step(contestant, args.warmup + 1)
        found = by_kind(profiled.kernels) | dict(step_ms=profiled.us / 1e3)
        show_profile(name, found)
        if contestant.world.on_cuda:
            found["idle"] = idle(profiled.kernels)
            common.say(f"the device did nothing in {100 * found['idle']:.1f} % of the step")
        contestants[name] = found | race.describe(case)
    return dict(contestants=contestants)


# ---- 5. What is printed --------------------------------------------------------------------------


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        common.say("  ".join(cells).rstrip())


def show_profile(name: str, found: dict[str, Any]) -> None:
    for table, title in (("kinds", name), ("longest", "longest")):
        rows = []
        for key, part in found[table].items():
            rows.append([key, f"{part.ms:.2f}", f"{100 * part.share:.1f}", str(part.calls)])
        print_table([title, "ms", "%", "count"], rows)
    step, kernels = found["step_ms"], found["kernels_ms"]
    common.say(f"step {step:.2f} ms under the profiler, kernels {kernels:.2f} ms")


def row_of(name: str, found: dict[str, Any]) -> list[str]:
    """A contestant's row of the comparison."""
    keys = ("forward_backward_ms", "adam_ms", "muon_ms")
    return [
        name,
        f"{found['tokens_per_second']:,}",
        "{median:.2f} ({p10:.2f}-{p90:.2f})".format(**found["step_ms"]),
        *(f"{found[key]['median']:.2f}" for key in keys),
        f"{100 * found['mfu']:.1f}" if found["mfu"] else "-",
        str(found["peak_mib"] or "-"),
        f"{found['warmup_seconds']:.1f}",
        f"{found['graphs']}/{found['graph_breaks']}/{found['recompiles_after_warmup']}",
    ]


HEAD = ["median (p10-p90)", "tokens/s", "step ms", "fwd+bwd", "Adam", "Muon", "MFU %", "peak MiB"]
HEAD += ["warm-up s", "graphs/breaks/late"]


def show(result: dict[str, Any]) -> None:
    """The comparison on the terminal."""
    print_table(HEAD, [row_of(*item) for item in result["contestants"].items()])
    for name, ratio in result["ratios"].items():
        span = f"({ratio['p10']:.3f}-{ratio['p90']:.3f})"
        common.say(f"{name}, step by step: {ratio['median']:.3f} {span}")
    steps, wall = result["seconds_of_steps"], result["wall_seconds"]
    off = abs(1 - steps / wall)
    common.say(
        f"all steps {steps:.2f} s, clock on the wall {wall:.2f} s: {100 * off:.2f} % apart"
        f"{'' if off <= 0.01 else ', MORE THAN 1 %'}"
    )
    peak = f"{result['peak_rss_mib']:,} MiB"
    common.say(f"peak RSS of the process, all contestants together: {peak}")


def show_ranks(result: dict[str, Any]) -> None:
    rows = []
    for name, found in result["contestants"].items():
        comm, step = found["collectives"], found["step_ms"]["median"]
        figures = [
            f"{step:.2f}",
            f"{comm['calls']:g}",
            f"{comm['bytes']:,.0f}",
            f"{comm['ms']:.2f}",
        ]
        rows.append([name, *figures])
    title = f"measured, {result['ranks']} ranks"
    print_table([title, "step ms", "calls/step", "bytes/step", "ms in collectives"], rows)
    common.say(result["assumptions"])
    table = result["projected_step_ms"]
    rows = []
    for n in table["ours"]:
        ideal = [f"{100 * table[name][1] / n / table[name][n]:.0f}" for name in table]
        rows.append([str(n), *(f"{table[name][n]:.2f}" for name in table), *ideal])
    head = ["ranks", *(f"{name}, ms" for name in table), *(f"{name}, % of ideal" for name in table)]
    print_table(head, rows)


# ---- 6. The command ------------------------------------------------------------------------------


def common_options() -> argparse.ArgumentParser:
    """What all commands take."""
    top = argparse.ArgumentParser(add_help=False)
    add = top.add_argument
    add("--preset", default="F,tiny", help="PRESET of train_gpt.py (default: %(default)s).")
    text = "Other variables of train_gpt.py; with DATA_PATH, tokens are real, else random."
    common.add_settings(top, text)
    add(
        "--steps",
        type=int,
        default=20,
        help="Timed steps of each contestant (default: %(default)s).",
    )
    add("--warmup", type=int, default=3, help="Untimed steps before those (default: %(default)s).")
    add(
        "--curve",
        type=int,
        default=0,
        metavar="N",
        help="Compare the losses of N steps first (default: %(default)s).",
    )
    add(
        "--peak-tflops",
        type=float,
        default=0.0,
        help="Peak TFLOP/s of the device, for MFU (default: 989 on H100 SXM and H200, else none).",
    )
    add(
        "--plain",
        choices=("eager", "compile"),
        default="eager",
        help="How the plain implementation runs (default: %(default)s).",
    )
    add(
        "--plain-attention",
        choices=("default", "flash", "cudnn"),
        default="default",
        help="Its attention backend on CUDA (default: PyTorch's choice).",
    )
    add("--out", type=Path, help="JSON file for the figures.")
    return top


def add_ranks_options(one: argparse.ArgumentParser) -> None:
    add = one.add_argument
    add("count", type=int, help="Number of ranks.")
    add(
        "--one-rank",
        type=Path,
        metavar="JSON",
        help="A step on one rank, from `plain --out` on the real device (default: measured here).",
    )
    add(
        "--link-gbs",
        type=float,
        default=300.0,
        help="Assumed bandwidth of a ring between ranks, GB/s (default: %(default)s).",
    )
    add(
        "--call-us",
        type=float,
        default=20.0,
        help="Assumed least time of a collective, microseconds (default: %(default)s).",
    )


def make_parser() -> argparse.ArgumentParser:
    shared = common_options()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command")

    def command(
        run: Callable[..., dict[str, Any]], name: str, text: str
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, parents=[shared], help=text, description=text)
        one.set_defaults(run=run)
        return one

    command(run_plain, "plain", "Race against a plain implementation of the model; the default.")
    one = command(ab, "ab", "Race two settings.")
    for side in ("--a", "--b"):
        common.add_settings(one, "Variables of this side (default: none).", side)
    one = command(revisions, "revisions", "Race commits.")
    one.add_argument(
        "commits", nargs="+", help="Commits by any name that git knows; . is the file as it is."
    )
    one = command(levers, "levers", "Race each lever alone against the same baseline.")
    help_text = "Variables of one lever; give the option once for each lever."
    one.add_argument(
        "--lever", action="append", default=[], metavar='"KEY=VALUE ..."', help=help_text
    )
    one.add_argument("--file", type=Path, help="File with a lever in each line.")
    text = "Measure collectives between ranks on this machine's CPUs, and project their scaling."
    add_ranks_options(command(ranks, "ranks", text))
    one = command(profile, "profile", "Show one step by kind of kernel.")
    one.add_argument(
        "--with-plain", action="store_true", help="Show the plain implementation, too."
    )
    one = command(compile_times, "compile", "Measure cold compile times.")
    one.add_argument(
        "values",
        nargs="+",
        metavar="KEY=VALUE,VALUE",
        help="Options with the values to try; all combinations are measured.",
    )
    one = command(export, "export", "Pack, reload and score a model.")
    one.add_argument(
        "--val-tokens",
        type=int,
        default=1 << 16,
        help="Most tokens to score (default: %(default)s).",
    )
    return parser


def late_graphs(result: dict[str, Any]) -> dict[str, int]:
    """Contestants that compiled something in their timed steps."""
    late = {}
    for name, found in result.get("contestants", {}).items():
        if found.get("recompiles_after_warmup"):
            late[name] = found["recompiles_after_warmup"]
    return late


def check_numbers(args: argparse.Namespace) -> None:
    """InputError names a number that nothing can be measured with."""
    common.require_at_least(args, steps=1, warmup=0, curve=0)
    if args.command == "export":
        common.require_at_least(args, val_tokens=1)
    if args.command == "ranks":
        if args.count < 1:
            raise tg.InputError(f"ranks {args.count} is below 1")
        if args.link_gbs <= 0:
            raise tg.InputError(f"--link-gbs {args.link_gbs:g} is not above 0")


def work(args: argparse.Namespace) -> int:
    """The exit code of a command."""
    try:
        check_numbers(args)
        with tempfile.TemporaryDirectory() as folder:
            result = args.run(args, Path(folder))
    except Mismatch as error:
        print(f"nothing was timed: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # a copy of the script has an InputError of its own
        print(f"nothing was timed: {error}", file=sys.stderr)
        return tg.EXIT_INPUT
    if args.out:
        asked = dict(command=args.command, preset=args.preset, set=args.set)
        common.write_json(args.out, asked | result | race.machine(tg.World({})))
    if late := late_graphs(result):
        common.warn(f"compiled after the warm-up: {late}; such times say nothing, raise --warmup")
        return 1
    return 0


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words = ["plain", *words]
    return common.run_tool(work, make_parser().parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
