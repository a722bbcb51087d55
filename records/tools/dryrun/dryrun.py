r"""Compiles and steps train_gpt.py for an H100 where there is none.

    python records/tools/dryrun/dryrun.py              # a micro-batch of T
    python records/tools/dryrun/dryrun.py --preset growing --mode -1 \
        --micro-batch 98304
    python records/tools/dryrun/dryrun.py --step --json T.json
    python records/tools/dryrun/dryrun.py --exec -m torch.distributed.run \
        --nproc_per_node=2 train_gpt.py

It needs a CUDA build of PyTorch and gcc, no GPU and no driver. Libraries that
stand in for NVIDIA's are preloaded, so that PyTorch's own code runs: its
choice of attention kernel, its allocator, Dynamo, Inductor, Triton to sm_90,
its process group for NCCL. Kernels compute nothing. So this proves that a
step lowers, compiles and fits, how many kernels it launches and where the
host waits. It estimates milliseconds by roofline. It cannot tell any value or
any measured time. README.md beside this file says more.
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

SCRIPT = Path(__file__).resolve().parents[3] / "train_gpt.py"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--script", type=Path, default=SCRIPT, help="The script (default: %(default)s).")
    add(
        "--preset",
        default="T",
        help="Preset of the script, or all, each in its own process (default: %(default)s).",
    )
    add(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="Options of the script.",
    )
    add(
        "--mode",
        type=int,
        help="Only this mode of the script by its number; -1 is the last (default: all).",
    )
    add("--micro-batch", type=int, metavar="TOKENS", help="The same as MICRO_BATCH_TOKENS.")
    add("--step", action="store_true", help="Take a whole step instead of one micro-batch.")
    add(
        "--eval",
        action="store_true",
        help="Take the graph of validation instead of that of training.",
    )
    add(
        "--ranks",
        type=int,
        default=8,
        help="Number of ranks, of which this is one (default: %(default)s).",
    )
    add(
        "--share",
        type=int,
        default=1,
        help="Divide the batch by SHARE, so that one rank does the work of one of SHARE ranks "
        "(default: %(default)s).",
    )
    add(
        "--top",
        type=int,
        default=0,
        help="Number of the most expensive kernels to print (default: %(default)s).",
    )
    add("--json", type=Path, help="JSON file of reports that these are added to.")
    add(
        "--exec",
        nargs=argparse.REMAINDER,
        help="Only run Python with these arguments on the pretended GPUs.",
    )
    return parser


def read_settings(options: argparse.Namespace) -> dict[str, str]:
    """The script's options that were given; InputError for numbers that are none of ranks."""
    for name in ("ranks", "share"):
        if getattr(options, name) < 1:
            raise standins.InputError(f"--{name} {getattr(options, name)} is below 1")
    settings = {}
    for setting in options.set:
        name, sign, value = setting.partition("=")
        if not sign:
            raise standins.InputError(f"--set {setting}: it is not NAME=VALUE")
        settings[name] = value
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
    """Adds the reports of a case to a file of cases, or replaces them there.

    Cases are added by several processes at a time, and any may be killed.
    """
    from records.tools import common  # imports torch, too

    modes: list[dict[str, Any]] = []
    for report in reports:
        groups = roofline.by_group(report.table).values()
        kernels = [
            dict(part=x.part, group=x.group, times=x.times, **x.cost._asdict()) for x in groups
        ]
        entry = report._asdict() | dict(kernels=kernels)
        del entry["table"]
        modes.append(entry)
    with common.alone_with(path):
        cases = json.loads(path.read_text() or "{}")  # the first one finds an empty file
        common.write_json(path, cases | {title: modes})


def run_all(options: argparse.Namespace) -> int:
    """The same command for every preset; how many failed."""
    import train_gpt

    failed = 0
    for preset in train_gpt.SYSTEMS:
        command = [preset if word == "all" else word for word in sys.argv]
        failed += subprocess.run([sys.executable, *command]).returncode != 0
    return failed


def chosen(modes: list[Any], number: int | None) -> list[Any]:
    """One of a case's modes, or all."""
    if number is None:
        return modes
    if not -len(modes) <= number < len(modes):
        raise standins.InputError(f"--mode {number}: there are {len(modes)} modes")
    return [modes[number]]


def run(options: argparse.Namespace) -> None:
    """One case, in a process that sees the pretended GPU."""
    # Imports torch, which the process that starts this one does without.
    from records.tools.dryrun import session

    settings = read_settings(options)
    title = title_of(options.preset, settings, options.step, options.share, options.eval)
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
    reports = []
    with running.attention():
        for mode in chosen(running.modes(), options.mode):
            reports.append(running.run(mode))
            print(f"{title}, {describe(reports[-1])}", flush=True)
            if options.top:
                print(describe_kernels(reports[-1].table, options.top), flush=True)
    if options.json:
        write_json(options.json, title, reports)
    trace.path.unlink()


def main() -> int:
    options = make_parser().parse_args()
    try:
        if options.exec:
            standins.enter(options.exec)
        read_settings(options)  # so that a mistake is told where nothing can be run, too
        if options.preset == "all":
            return run_all(options)
        if not standins.inside():
            standins.enter(sys.argv)
        run(options)
    except standins.InputError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.flush()
    os._exit(0)  # what the stand-ins never made cannot be taken down


if __name__ == "__main__":
    sys.exit(main())
