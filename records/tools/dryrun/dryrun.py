"""Compiles and steps train_gpt.py for an H100 where there is none, and estimates what that costs.

    dryrun.py                                     a micro-batch of preset T, 65,536 tokens
    dryrun.py --preset growing --mode -1 --micro-batch 98304
    dryrun.py --step --ranks 8 --json T.json      a step of one of 8 ranks, with the optimizers
    dryrun.py --exec -m torch.distributed.run --nproc_per_node=2 train_gpt.py

Needs a CUDA build of torch and gcc; no GPU and no driver. Libraries that stand in for NVIDIA's are
preloaded, so that torch's own code runs: its choice of attention kernel, its allocator, Dynamo,
Inductor, Triton to sm_90, its process group for NCCL. Kernels compute nothing. So this proves that
a step lowers, compiles and fits, how many kernels it launches and where the host waits; it
estimates milliseconds by roofline; it cannot tell any value or any measured time. README.md beside
this file says more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from records.tools.dryrun import roofline, standins

if TYPE_CHECKING:
    from records.tools.dryrun.session import ModeReport

ROOT = Path(__file__).resolve().parents[3]


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py")
    parser.add_argument("--preset", default="T", help="all: each of them, in a process of its own")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of it")
    parser.add_argument(
        "--mode", type=int, help="only this one of its training modes; -1: the last"
    )
    parser.add_argument("--micro-batch", type=int, metavar="TOKENS", help="MICRO_BATCH_TOKENS")
    parser.add_argument("--step", action="store_true", help="a whole step, not one micro-batch")
    parser.add_argument("--eval", action="store_true", help="the graph of validation")
    parser.add_argument("--ranks", type=int, default=8, help="of which this is one")
    parser.add_argument("--share", type=int, default=1, help="a batch of 1/SHARE of its tokens")
    parser.add_argument("--top", type=int, default=0, help="so many of the most expensive kernels")
    parser.add_argument("--json", type=Path, help="where the reports go as well")
    parser.add_argument("--exec", nargs=argparse.REMAINDER, help="a Python's arguments: run that")
    return parser.parse_args()


def read_settings(options: argparse.Namespace) -> dict[str, str]:
    """The script's options that were given."""
    settings = dict(setting.split("=", 1) for setting in options.set)
    if options.micro_batch:
        settings["MICRO_BATCH_TOKENS"] = str(options.micro_batch)
    return settings


def title_of(
    preset: str, settings: dict[str, str], step: bool, share: int = 1, validation: bool = False
) -> str:
    """The name of a case, by which an estimate and a measurement find each other."""
    words = [preset, *(f"{name}={value}" for name, value in sorted(settings.items()))]
    if step:
        words.append("step" if share == 1 else f"step of 1/{share} of a batch")
    if validation:
        words.append("validation")
    return " ".join(words)


def describe(report: ModeReport) -> str:
    """A report as text, without its table."""
    waits = ", ".join(report.host_waits) or "none"
    return "\n".join(
        (
            f"{report.mode}: {report.layers} layers, [{report.sequences}, {report.tokens}] tokens",
            f"  graphs {report.graphs}, breaks {report.breaks}, compiled in "
            f"{report.compile_seconds:.1f} s here ({report.compile_cpu_seconds:.1f} s of CPUs), "
            f"later graphs {report.late_graphs}",
            f"  launches {report.launches}, attention {report.attention}, host waits: {waits}",
            f"  peak {report.peak_gb:.2f} GB, saved for backward {report.saved_gb:.2f} GB",
            f"  roofline {report.ms:.1f} ms: gemm {report.gemm_ms:.1f}, attention "
            f"{report.attention_ms:.1f}, triton {report.triton_ms:.1f}, aten {report.aten_ms:.1f}, "
            f"other {report.other_ms:.1f}",
        )
    )


def describe_kernels(table: list[roofline.Line], top: int) -> str:
    """The most expensive kernels, and all of them by part of the step and group."""
    lines = [f"  {'part':9} {'group':9} {'n':>5} {'ms':>8} {'GFLOP':>9} {'GB':>8} regs spill"]
    groups = roofline.by_group(table)
    for line in [*table[:top], *sorted(groups.values())]:
        cost = line.cost
        lines.append(
            f"  {line.part:9} {line.group:9} {line.times:5} {1e3 * cost.seconds:8.3f} "
            f"{cost.flop / 1e9:9.1f} {cost.bytes / 1e9:8.3f} {line.registers or '':4} "
            f"{line.spilled or '':5} {line.name[:120]}".rstrip()
        )
    return "\n".join(lines)


def write_json(path: Path, title: str, reports: Iterable[ModeReport]) -> None:
    """Adds the reports of a case to a file of cases, or replaces them there."""
    modes: list[dict[str, Any]] = []
    for report in reports:
        groups = roofline.by_group(report.table).values()
        kernels = [
            dict(part=x.part, group=x.group, times=x.times, **x.cost._asdict()) for x in groups
        ]
        entry = report._asdict() | dict(kernels=kernels)
        del entry["table"]
        modes.append(entry)
    cases = json.loads(path.read_text()) if path.exists() else {}
    cases[title] = modes
    path.write_text(json.dumps(cases, indent=1) + "\n")


def run_all(options: argparse.Namespace) -> int:
    """The same command for every preset; how many failed."""
    import train_gpt

    failed = 0
    for preset in train_gpt.SYSTEMS:
        command = [preset if word == "all" else word for word in sys.argv]
        failed += subprocess.run([sys.executable, *command]).returncode != 0
    return failed


def run(options: argparse.Namespace) -> None:
    # Imports torch, which only sees the pretended GPU in the process that was entered.
    from records.tools.dryrun import session

    settings = read_settings(options)
    case = session.Case(
        script=options.script.resolve(),
        preset=options.preset,
        settings=settings,
        ranks=options.ranks,
        share=options.share,
        whole_step=options.step,
        validation=options.eval,
    )
    trace = session.Trace(standins.home() / f"trace.{os.getpid()}")
    session.tell_traffic(trace)
    running = session.Session(case, trace)
    modes = running.modes()
    if options.mode is not None:
        modes = [modes[options.mode]]
    reports = []
    title = title_of(options.preset, settings, options.step, options.share, options.eval)
    with running.attention():
        for mode in modes:
            reports.append(running.run(mode))
            print(f"{title}, {describe(reports[-1])}", flush=True)
            if options.top:
                print(describe_kernels(reports[-1].table, options.top), flush=True)
    if options.json:
        write_json(options.json, title, reports)
    trace.path.unlink()


def main() -> int:
    options = parse_arguments()
    try:
        if options.exec:
            standins.enter(options.exec)
        if options.preset == "all":
            return run_all(options)
        if not standins.inside():
            standins.enter(sys.argv)
    except standins.NoCudaBuild as error:
        print(error, file=sys.stderr)
        return 2
    run(options)
    sys.stdout.flush()
    os._exit(0)  # what the stand-ins never made cannot be taken down


if __name__ == "__main__":
    sys.exit(main())
