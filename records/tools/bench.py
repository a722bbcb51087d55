"""What training with train_gpt.py costs on this machine: time, memory, graphs, bytes between ranks.

    python records/tools/bench.py                                     against a plain implementation of the model
    python records/tools/bench.py ab --a COMPILE=off --b COMPILE=model    two settings
    python records/tools/bench.py revisions HEAD~3 .                      two commits; . is the file as it is
    python records/tools/bench.py levers --lever COMPILE=model --lever "DTYPE=float32 COMPILE=model"
    python records/tools/bench.py ranks 2                                 bytes, time in collectives, scaling to 8
    python records/tools/bench.py profile                                 one step by kind of kernel
    python records/tools/bench.py compile COMPILE=off,model NUM_LOOPS=2,3     cold compile times, graphs
    python records/tools/bench.py export --set TOKENIZER_PATH=...         pack, reload, score

--preset and --set take what train_gpt.py takes as variables; `COMMAND --help` tells the rest. What is
compared takes its steps in turn on the same tokens, in one process, so that other load on the machine meets
all alike, and nothing is timed unless a step of each, from the same parameters, gave the same loss, gradients
and updates.
Exit codes: 0; 1 if they did not, or if anything was compiled after the warm-up; 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg
from records.tools import race
from records.tools.race import Case, Contestant, Mismatch

# ---- 1. One step by kind of kernel -----------------------------------------------------------------------
KINDS = [
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (  # the first that matches
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
]


class Kernel(NamedTuple):
    name: str
    kind: str
    start: float  # microseconds
    us: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def profile_step(contestant: Contestant, step: int) -> tuple[list[Kernel], float]:
    """The CUDA kernels of a step, or on CPUs the operators, less what those call; and the step's microseconds
    under the profiler. What runs inside an optimizer is of kind optimizer."""
    cuda = contestant.world.on_cuda
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *[torch.profiler.ProfilerActivity.CUDA] * cuda,
    ]
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
    return found, us


def by_kind(kernels: list[Kernel]) -> dict[str, Any]:
    """Milliseconds, share and count of each kind and of the longest kernels; the sum of all milliseconds."""
    total, kinds, names = sum(kernel.us for kernel in kernels), {}, {}
    for kernel in kernels:
        for table, key in ((kinds, kernel.kind), (names, f"{kernel.kind}: {kernel.name[:90]}")):
            ms, share, count = table.get(key, (0.0, 0.0, 0))
            table[key] = ms + kernel.us / 1e3, share + kernel.us / total, count + 1
    longest, kinds = (
        sorted(table.items(), key=lambda item: -item[1][0]) for table in (names, kinds)
    )
    return dict(kinds=dict(kinds), longest=dict(longest[:20]), kernels_ms=total / 1e3)


def idle(kernels: list[Kernel]) -> float:
    """Part of the time from the first kernel to the end of the last in which none ran (streams overlap)."""
    starts, ends = (
        [kernel.start for kernel in kernels],
        [kernel.start + kernel.us for kernel in kernels],
    )
    busy, end = 0.0, -math.inf
    for start, until in sorted(zip(starts, ends)):
        busy, end = busy + max(0.0, until - max(end, start)), max(end, until)
    return 1 - busy / (max(ends) - min(starts))


# ---- 2. Ranks --------------------------------------------------------------------------------------------
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
    """What work(rank, *args) returns in the first of so many fresh processes; its ValueError or Mismatch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        torch.multiprocessing.spawn(child, (out, work, args), count)
        result = json.loads(out.read_text())
    if "error" in result:
        raise (Mismatch if result["mismatch"] else ValueError)(result["error"])
    return result


def child(rank: int, out: Path, work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    try:
        result = work(rank, *args)
    except (ValueError, Mismatch) as error:
        result = dict(error=str(error), mismatch=isinstance(error, Mismatch))
    if rank == 0:
        out.write_text(json.dumps(result))


def collectives(contestant: Contestant, first: int, steps: int) -> dict[str, Any]:
    """Calls, bytes handed over and milliseconds in collectives of a step, as gloo's profile has them: from
    call to completion, so waiting for other ranks and what goes on beside it are included."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        for step in range(first, first + steps):
            contestant.step(step)
    calls, count, ms = [], Counter(), 0.0
    for event in profile.profiler.kineto_results.events():
        if event.name().startswith("gloo:"):
            calls.append(
                sum(math.prod(x) * ELEMENT[kind] for x, kind in zip(event.shapes(), event.dtypes()))
            )
            count[f"{event.name()[5:]} of {calls[-1]} bytes"] += 1
            ms += event.duration_ns() / 1e6
    return dict(
        calls=len(calls) / steps, bytes=sum(calls) / steps, ms=ms / steps, steps=steps, kinds=count
    )


def one_rank(rank: int, port: int, env: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """The work of a rank: gate, steps in turn, collectives, on CPUs with gloo."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(args.count),
        CUDA_VISIBLE_DEVICES="",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(max(1, args.threads // args.count))
    world, cases = tg.World(os.environ), against_plain(env, args)
    world.enter(
        "a step", training=True
    )  # elsewhere, ranks meet at a barrier before they share anything
    differences, start = race.gate(cases, world), race.draw(cases["ours"])
    line = {
        name: race.warm_up(case, start, args.warmup, world).contestant
        for name, case in cases.items()
    }
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
    """Milliseconds of a step on so many ranks by ASSUMPTIONS; `one` is the split of a step on one rank."""
    compute, adam, muon = (
        one[f"{name}_ms"]["median"] for name in ("forward_backward", "adam", "muon")
    )
    ring = 2 * (ranks - 1) / ranks * comm["bytes"] / (args.link_gbs * 1e6)
    waiting = comm["calls"] * args.call_us / 1e3 if ranks > 1 else 0.0
    return compute / ranks + adam + muon * muon_share + ring + waiting


ASSUMPTIONS = """Projected, not measured. A step on N ranks takes
  forward and backward of one rank / N (its micro-batches are dealt out, none becomes smaller),
  + Adam, the same on every rank, + Muon: ours the same on every rank, plain its fullest share of matrices,
  + 2 (N - 1) / N x bytes / {link_gbs:g} GB/s (a ring) + {call_us:g} us a call, none hidden behind other work.
  No rank waits for another one's data or host. --link-gbs, --call-us: NVLink is near 300 GB/s."""


def ranks(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Collectives on N ranks, and the scaling model from a step on one: measured here, or from a file."""
    env, args.threads = base_env(args, folder), torch.get_num_threads()
    cases = against_plain(env, args)
    if args.one_rank:
        one = json.loads(args.one_rank.read_text())
        for name, case in cases.items():
            want, have = race.describe(case)["config"], one["contestants"][name]["config"]
            names = [field.name for field in dataclasses.fields(tg.Architecture)]
            if odd := [name for name in names if want[name] != have.get(name)]:
                raise ValueError(
                    f"{args.one_rank} measured another architecture: {', '.join(odd).upper()}"
                )
    else:
        race.gate(cases)
        one = race.run(cases, args)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = in_children(args.count, one_rank, port, env, shareable(args))
    model = race.PlainGPT(cases["ours"].config().architecture())
    matrices = sum(isinstance(module, nn.Linear) for module in model.modules())
    projected = {}
    for name, split in one["contestants"].items():
        comm, share = (
            found["contestants"][name]["collectives"],
            lambda n: -(-matrices // n) / matrices,
        )
        projected[name] = {
            n: project(split, comm, n, share(n) if name == "plain" else 1.0, args)
            for n in (1, 2, 4, 8)
        }
    result = dict(
        ranks=args.count,
        one_rank=one,
        projected_step_ms=projected,
        **found,
        assumptions=ASSUMPTIONS.format(link_gbs=args.link_gbs, call_us=args.call_us),
    )
    show_ranks(result)
    return result


# ---- 3. Compile times, export ----------------------------------------------------------------------------


def compile_cold(rank: int, env: dict[str, str], cache: str) -> dict[str, Any]:
    """The first steps of every mode of training in this process, whose compiler caches are empty."""
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton")
    case, seconds = Case(env), []
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
    """Cold compile times of every combination of the values asked for, each in a process of its own."""
    env, found = base_env(args, folder), {}
    options = [
        [(name, value) for value in values.split(",")]
        for name, values in pairs(args.values).items()
    ]
    cases = {
        " ".join(map("=".join, choice)): env | dict(choice)
        for choice in itertools.product(*options)
    }
    for variables in cases.values():  # mistakes are told before anything starts
        Case(variables).config()
    for label, variables in cases.items():
        found[label] = in_children(1, compile_cold, variables, tempfile.mkdtemp(dir=folder))
        print(
            "{}: {compile_seconds:.1f} s, {graphs} graphs, {recompiles} of them recompiled, {graph_breaks} "
            "breaks, {modes} modes of training".format(label, **found[label]),
            flush=True,
        )
    return dict(cases=found)


def export(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds to pack and to reload a model on one core, and tokens scored per second, by kind of score."""
    case, threads = Case(base_env(args, folder)), torch.get_num_threads()
    script, config, world, model = (
        case.script,
        case.config(),
        case.script.World({}),
        race.draw(case, 0.3),
    )
    tokens = script.Tokens(config, "val")
    write_shard(
        folder / "scored", "val", tokens.read(0, min(args.val_tokens, tokens.total)).numpy()
    )
    config = dataclasses.replace(config, data_path=str(folder / "scored"))
    scorer = script.Scorer(
        config, world
    )  # a tokenizer that is missing is told before anything is timed
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = script.pack_to_fit(model, config, {}, lambda text: None)
    packed = time.perf_counter()
    model = script.load_model(data, "the artifact")[0].to(world.device)
    seconds = dict(pack=packed - started, reload=time.perf_counter() - packed)
    torch.set_num_threads(threads)
    print(
        f"{len(data):,} bytes, on one core: packed in {seconds['pack']:.2f} s, "
        f"reloaded in {seconds['reload']:.2f} s"
    )
    scored: dict[str, Any] = {}
    T, stride = config.train_seq_len, config.eval_stride or min(64, config.train_seq_len)
    chunk = min(config.ttt_chunk_tokens, config.micro_batch_tokens // T * T)
    learning = dataclasses.replace(config, ttt_lr=config.ttt_lr or 0.002, ttt_chunk_tokens=chunk)
    forward = script.compiled(model, config, world)
    for kind in ("plain", "sliding", "ttt"):
        for _ in range(1 + (forward is not model)):  # the first compiles
            learner = script.Learner(model, learning, world) if kind == "ttt" else None
            with race.attention_of(script, config)():
                score = scorer.score(forward, 0 if kind == "plain" else stride, learner)
        scored[kind] = dict(
            tokens_per_second=score.val_tokens / score.eval_seconds, **score._asdict()
        )
        print(f"{kind}: {scored[kind]['tokens_per_second']:,.0f} tokens/s")
    return dict(bytes=len(data), seconds_on_one_core=seconds, scored=scored, **race.describe(case))


# ---- 4. The command --------------------------------------------------------------------------------------


def write_shard(folder: Path, split: str, tokens: np.ndarray) -> None:
    header = np.zeros(tg.SHARD_HEADER_INTS, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    folder.mkdir(exist_ok=True)
    path = folder / f"fineweb_{split}_000000.bin"
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def pairs(words: list[str]) -> dict[str, str]:
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{wrong[0]!r} is not KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def base_env(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Variables of --preset and --set; without a DATA_PATH among them, the tokens are random."""
    env = {"PRESET": args.preset} | pairs(args.set)
    if "DATA_PATH" not in env:
        env["DATA_PATH"] = str(folder / "random")
        random, vocabulary = np.random.default_rng(0), Case(env).config().vocab_size
        for split, count in (("train", 1 << 22), ("val", 1 << 18)):
            write_shard(folder / "random", split, random.integers(vocabulary, size=count))
    return env


def against_plain(env: dict[str, str], args: argparse.Namespace) -> dict[str, Case]:
    if args.plain_attention != "default" and not torch.cuda.is_available():
        raise ValueError(f"--plain-attention {args.plain_attention} needs CUDA")
    how = race.Plain(args.plain == "compile", args.plain_attention)
    return dict(ours=Case(env), plain=Case(env, plain=how))


def shareable(args: argparse.Namespace) -> argparse.Namespace:
    """The options, without the function, for another process."""
    return argparse.Namespace(
        **{name: value for name, value in vars(args).items() if name != "run"}
    )


def compare(cases: dict[str, Case], args: argparse.Namespace) -> dict[str, Any]:
    """Gate, loss curves where asked for, race; printed."""
    result = dict(differences=race.gate(cases))
    if args.curve:
        result["curves"] = found = race.curves(cases, args.curve)
        for name, far in found["largest_difference"].items():
            print(
                f"{args.curve} steps: losses of {name} and {next(iter(cases))} differ by {far:.2e} at most"
            )
    result |= race.run(cases, args)
    show(result)
    return result


def plain(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return compare(against_plain(base_env(args, folder), args), args)


def ab(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    env = base_env(args, folder)
    return compare(dict(a=Case(env | pairs(args.a)), b=Case(env | pairs(args.b))), args)


def revisions(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    env, cases = base_env(args, folder), {}
    for i, revision in enumerate(args.commits):
        path = race.ROOT / "train_gpt.py"
        if revision != ".":
            command = ["git", "-C", str(race.ROOT), "show", f"{revision}:train_gpt.py"]
            git = subprocess.run(command, capture_output=True, check=False)
            if git.returncode:
                raise ValueError(git.stderr.decode().strip())
            path = folder / f"revision_{i}.py"
            path.write_bytes(git.stdout)
        name = f"{revision} #{i + 1}" if revision in cases else revision
        cases[name] = Case(env, path)
        try:
            race.build(cases[name], race.draw(cases[name]))
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{name} has another interface than bench.py knows: {error}"
            ) from error
    return compare(cases, args)


def levers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each lever against the settings without it, and these against themselves."""
    lines = args.file.read_text().splitlines() if args.file else []
    wanted = [*args.lever, *(line for line in lines if line.strip() and not line.startswith("#"))]
    if not wanted:
        raise ValueError("no lever was named: --lever KEY=VALUE or --file")
    env = base_env(args, folder)
    cases = {"baseline": Case(env), "baseline again": Case(env)}
    cases |= {" ".join(text.split()): Case(env | pairs(text.split())) for text in wanted}
    result = compare(cases, args)
    again, *ratios = (ratio for ratio in result["ratios"].values())
    noise = max(abs(1 - again["p10"]), abs(1 - again["p90"]))
    result |= dict(spread_of_baseline=noise, verdicts={})
    for name, ratio in zip([*cases][2:], ratios):
        gain = 1 - ratio["median"]
        result["verdicts"][name] = dict(gain=gain, kept=gain > 2 * noise)
        print(
            f"{name}: {100 * gain:+.2f} % of a step, {'kept' if gain > 2 * noise else 'not kept'} "
            f"(baseline against itself: within {100 * noise:.2f} %; a gain counts above twice that)"
        )
    return result


def profile(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cases = against_plain(base_env(args, folder), args)
    if not args.with_plain:
        cases.pop("plain")
    start, result = race.draw(cases["ours"]), dict(contestants={})
    for name, case in cases.items():
        contestant = race.warm_up(case, start, args.warmup).contestant
        profile_step(contestant, args.warmup)  # the profiler itself starts up, too
        kernels, us = profile_step(contestant, args.warmup + 1)
        found = by_kind(kernels) | dict(step_ms=us / 1e3)
        result["contestants"][name] = found | race.describe(case)
        for table in ("kinds", "longest"):
            rows = [
                [key, f"{ms:.2f}", f"{100 * share:.1f}", str(count)]
                for key, (ms, share, count) in found[table].items()
            ]
            print_table([name if table == "kinds" else "longest", "ms", "%", "count"], rows)
        print(
            "step {step_ms:.2f} ms under the profiler, kernels {kernels_ms:.2f} ms".format(**found)
        )
        if contestant.world.on_cuda:
            found["idle"] = idle(kernels)
            print(f"the device did nothing in {100 * found['idle']:.1f} % of the step")
    return result


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        print("  ".join(cells).rstrip())


def show(result: dict[str, Any]) -> None:
    """The comparison on the terminal."""
    text, rows = "{median:.2f} ({p10:.2f}-{p90:.2f})", []
    for name, found in result["contestants"].items():
        split = (
            f"{found[key]['median']:.2f}" for key in ("forward_backward_ms", "adam_ms", "muon_ms")
        )
        rows.append(
            [
                name,
                f"{found['tokens_per_second']:,}",
                text.format(**found["step_ms"]),
                *split,
                f"{100 * found['mfu']:.1f}" if found["mfu"] else "-",
                str(found["peak_mib"] or "-"),
                f"{found['warmup_seconds']:.1f}",
                f"{found['graphs']}/{found['graph_breaks']}/{found['recompiles_after_warmup']}",
            ]
        )
    print_table(
        [
            "median (p10-p90)",
            "tokens/s",
            "step ms",
            "fwd+bwd",
            "Adam",
            "Muon",
            "MFU %",
            "peak MiB",
            "warm-up s",
            "graphs/breaks/late",
        ],
        rows,
    )
    for name, ratio in result["ratios"].items():
        print(
            f"{name}, step by step: {ratio['median']:.3f} ({ratio['p10']:.3f}-{ratio['p90']:.3f})"
        )
    off = abs(1 - result["seconds_of_steps"] / result["wall_seconds"])
    print(
        f"all steps {result['seconds_of_steps']:.2f} s, clock on the wall {result['wall_seconds']:.2f} s: "
        f"{100 * off:.2f} % apart{'' if off <= 0.01 else ', MORE THAN 1 %'}"
    )
    print(f"peak RSS of the process, all contestants together: {result['peak_rss_mib']:,} MiB")


def show_ranks(result: dict[str, Any]) -> None:
    rows = []
    for name, found in result["contestants"].items():
        comm = found["collectives"]
        rows.append(
            [
                name,
                f"{found['step_ms']['median']:.2f}",
                f"{comm['calls']:g}",
                f"{comm['bytes']:,.0f}",
                f"{comm['ms']:.2f}",
            ]
        )
    head = [
        f"measured, {result['ranks']} ranks",
        "step ms",
        "calls/step",
        "bytes/step",
        "ms in collectives",
    ]
    print_table(head, rows)
    print(result["assumptions"])
    table = result["projected_step_ms"]
    rows = [
        [
            str(n),
            *(f"{table[name][n]:.2f}" for name in table),
            *(f"{100 * table[name][1] / n / table[name][n]:.0f}" for name in table),
        ]
        for n in table["ours"]
    ]
    head = ["ranks", *(f"{name}, ms" for name in table), *(f"{name}, % of ideal" for name in table)]
    print_table(head, rows)


def make_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--preset", default="F,tiny", help="PRESET of train_gpt.py")
    common.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="its other variables; DATA_PATH: real tokens instead of random ones",
    )
    common.add_argument("--steps", type=int, default=20, help="timed steps of each contestant")
    common.add_argument("--warmup", type=int, default=3, help="steps of each before them")
    common.add_argument(
        "--curve", type=int, default=0, metavar="N", help="compare losses of N steps first"
    )
    common.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for MFU")
    common.add_argument("--plain", choices=("eager", "compile"), default="eager")
    common.add_argument(
        "--plain-attention", choices=("default", "flash", "cudnn"), default="default"
    )
    common.add_argument("--out", type=Path, help="JSON file for the figures")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command")

    def command(
        run: Callable[..., dict[str, Any]], name: str, text: str
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, parents=[common], help=text, description=text)
        one.set_defaults(run=run)
        return one

    command(plain, "plain", "against a plain implementation of the same model; the default")
    one = command(ab, "ab", "two settings")
    for side in ("--a", "--b"):
        one.add_argument(side, nargs="+", default=[], metavar="KEY=VALUE")
    command(revisions, "revisions", "commits").add_argument(
        "commits", nargs="+", help="anything git knows; . is the file as it is"
    )
    one = command(levers, "levers", "each lever alone against the same baseline")
    one.add_argument("--lever", action="append", default=[], metavar='"KEY=VALUE ..."')
    one.add_argument("--file", type=Path, help="one lever a line")
    one = command(ranks, "ranks", "collectives between ranks on this machine's CPUs; scaling")
    one.add_argument("count", type=int)
    one.add_argument(
        "--one-rank", type=Path, metavar="JSON", help="by `plain --out` on the real device"
    )
    one.add_argument("--link-gbs", type=float, default=300.0, help="GB/s of a ring between ranks")
    one.add_argument(
        "--call-us", type=float, default=20.0, help="microseconds of any collective, at least"
    )
    one = command(profile, "profile", "one step by kind of kernel")
    one.add_argument("--with-plain", action="store_true")
    command(compile_times, "compile", "cold compile times").add_argument(
        "values", nargs="+", metavar="KEY=VALUE,VALUE", help="all combinations are tried"
    )
    command(export, "export", "pack, reload, score").add_argument(
        "--val-tokens", type=int, default=1 << 16
    )
    return parser


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words = ["plain", *words]
    args = make_parser().parse_args(words)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = args.run(args, Path(folder))
    except (ValueError, Mismatch) as error:
        print(f"nothing was timed: {error}", file=sys.stderr)
        return 1 if isinstance(error, Mismatch) else 2
    if args.out:
        asked = dict(command=args.command, preset=args.preset, set=args.set)
        result = asked | result | race.machine(tg.World({}))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tg.write_atomically(args.out, json.dumps(result, indent=1).encode() + b"\n")
    late = {
        name: found["recompiles_after_warmup"]
        for name, found in result.get("contestants", {}).items()
        if found.get("recompiles_after_warmup")
    }
    if late:
        print(
            f"compiled after the warm-up: {late}; such times say nothing, raise --warmup",
            file=sys.stderr,
        )
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
