"""The first minutes on a real GPU node: what works, how fast, and as estimated?

    python records/tools/gpu_check.py           # at most 15 minutes
    python records/tools/gpu_check.py --only attention race --out /tmp/check

Nothing has to be prepared: without FineWeb in DATA_PATH the sample corpus is
made, within the same minutes. Every part is a process of its own with its own
share of the time, and with what those before it have left of theirs; what
fails, takes too long or is not as it should be is recorded, and the rest goes
on. The last part, `presets`, measures as many as there is time for. Nothing
that a part has started outlives it. The folder of --out gets gpu_check.json
with all figures and the output of each part; what an earlier check has left
there goes first, but for the parts that --only leaves out, which stay and are
called earlier. The last things printed are a table of what the dry run had
estimated and what was measured, what failed (then the exit code is 1), and
which parts have not run.

On a GPU (one H200, records/h200/) have run: environment, attention, levels,
kernels, and clock until it was cut off; all GPUs on that one; whole run, same
bits, and killed rank, which wants a second GPU and skipped. Race and presets
never have, and the check as a whole, as it is now, has not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import train_gpt as tg
    from records.tools import ablate, bench, common, packing, race
    from records.tools.dryrun import roofline
    from records.tools.dryrun.dryrun import title_of
    from records.tools.plain import Plain

ROOT = Path(__file__).resolve().parents[2]
ESTIMATES = Path(__file__).resolve().parent / "dryrun/estimates.json"
SCRIPT = ROOT / "train_gpt.py"
SAMPLE = ROOT / "data/sample.py"
MINUTES = 15
DATA_SECONDS = 40  # of them, for the sample corpus where there is no FineWeb
END_SECONDS = 20  # for the start of this tool and for whatever does not end at once
RANKS = 8  # of a node; one GPU is given the work of one of them
# Of validation: all of FineWeb's would take one GPU 15 s, at PR 855's 15.8 ms for 65,536.
VAL_TOKENS = 1 << 20

# ---- 1. Figures ----------------------------------------------------------------------------------


PROBLEMS = "problems"  # the figure that has them


class Figures:
    """What a part has found, written after every new figure: a part that is cut off keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value
        common.write_json(self.path, self.values)
        print(f"{name}: {value}", flush=True)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Notes what is wrong, for which the part counts as failed, and goes on."""
        if not holds:
            self[PROBLEMS] = [*self.values.get(PROBLEMS, []), otherwise]

    @contextlib.contextmanager
    def trial(self, name: str) -> Iterator[None]:
        """Whatever fails in it, a compiler too, is a finding: noted as a problem of `name`."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.expect(False, f"{name} failed: {type(error).__name__}: {str(error)[:500]}")


def timed(call: Callable[[], Any], warm: int, times: int) -> float:
    """Median milliseconds of a call on the device, by events in its stream."""
    for _ in range(warm):
        call()
    pairs = []
    for _ in range(times):
        start = race.cuda_event()
        call()
        pairs.append((start, race.cuda_event()))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


# ---- 2. The machine ------------------------------------------------------------------------------

QUERIES = (
    "name driver_version clocks.sm clocks.max.sm clocks.mem power.draw power.limit temperature.gpu "
    "memory.total ecc.mode.current persistence_mode clocks_throttle_reasons.active"
).split()


def nvidia_smi() -> list[dict[str, str]] | str:
    """Driver, clocks and power of every GPU, or why they are not known."""
    if not shutil.which("nvidia-smi"):
        return "nvidia-smi is not installed"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    try:  # without persistence mode it starts every GPU first, which takes seconds for each
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return [dict(zip(QUERIES, line.split(", "))) for line in told.stdout.splitlines()]


def product_ms(device: int) -> float:
    """Milliseconds of a bfloat16 product of 8192 x 8192 on a GPU."""
    with torch.cuda.device(device):
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        return timed(functools.partial(torch.mm, a, a), 3, 10)


def environment(out: Figures, options: Options) -> None:
    """What is installed, and whether every GPU works and is as fast as the others."""
    out["versions"] = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )
    properties = torch.cuda.get_device_properties(0)
    out["device"] = dict(
        name=properties.name,
        count=torch.cuda.device_count(),
        gigabytes=round(properties.total_memory / 1e9, 1),
        processors=properties.multi_processor_count,
    )
    out["host"] = dict(cpus=os.cpu_count(), machine=platform.machine(), system=platform.platform())
    out["ms of a product"] = ms = [product_ms(i) for i in range(torch.cuda.device_count())]
    slow = [i for i, one in enumerate(ms) if one > 1.2 * statistics.median(ms)]
    out.expect(not slow, f"GPU {slow}: slower than the others, by more than a fifth")
    out["gpus"] = nvidia_smi()


# ---- 3. Attention --------------------------------------------------------------------------------

KERNELS = dict(
    cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION, math=SDPBackend.MATH
)
SHAPE = roofline.Attention(sequences=64, tokens=1024, heads=8, kv_heads=4, width=64)
# Of a kernel from `math`: some roundings to bfloat16 (.004 each), nothing like a wrong gradient.
APART = 0.03


def draw_heads(shape: roofline.Attention, heads: int) -> Tensor:
    """Bfloat16 [B, heads, T, E] that wants a gradient, laid out in memory as the model's."""
    size = (shape.sequences, shape.tokens, heads, shape.width)
    return torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()


def gradients(y: Tensor, heads: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Of q, k and v; the graph is kept for the next time."""
    return [*torch.autograd.grad(y, heads, grad, retain_graph=True)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention(out: Figures, options: Options) -> None:
    """The kernels at T's shape: time forward and backward, and how far each is from `math`."""
    torch.manual_seed(0)
    heads = tuple(draw_heads(SHAPE, n) for n in (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads))
    grad = torch.randn_like(heads[0])
    exact: list[Tensor] = []
    for name in ("math", "cudnn", "flash"):
        with out.trial(name), sdpa_kernel(KERNELS[name]):
            y = causal(*heads)
            results = [y.detach(), *gradients(y, heads, grad)]
            exact = exact or results
            apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(results, exact))
            out[name] = dict(
                forward_ms=timed(functools.partial(causal, *heads), 3, 20),
                backward_ms=timed(functools.partial(gradients, y, heads, grad), 3, 20),
                relative_difference_from_math=apart,
            )
            out.expect(apart < APART, f"{name} differs from math by {apart:.3g} of its size")


# ---- 4. Steps ------------------------------------------------------------------------------------


# Kernels by their names: of cuDNN and FlashAttention, of cuBLAS, of Inductor and the script's own.
# The rest are PyTorch's.
KINDS = {
    "attention": re.compile("sdpa|flash_(fwd|bwd)|fmha|cudnn::fusion"),
    "gemm": re.compile("gemm|gemv|nvjet|cutlass|xmma|cublas|splitK"),
    "triton": re.compile("^triton_|^product"),
    "other": re.compile("^Memcpy|^Memset|nccl"),
}
ALL_KINDS = (*KINDS, "aten")
TOP = 60  # kernels of a step, the longest, that are kept


def kind_of(kernel: str) -> str:
    """What a kernel is counted as, in the words of the dry run."""
    return next((kind for kind, names in KINDS.items() if names.search(kernel)), "aten")


def kernels_of(call: Callable[[], Any]) -> list[bench.Kernel]:
    """The kernels that a call launches, as PyTorch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = []
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            span = event.time_range
            kind = kind_of(event.name)
            found.append(bench.Kernel(event.name, kind, span.start, span.elapsed_us()))
    return found


class Stand:
    """A trainer of the script on one GPU, with the work of one of 8 ranks."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.config = tg.Config.from_env(settings)
        self.world = tg.World({})
        torch.manual_seed(self.config.seed)
        model = tg.GPT(
            self.config.architecture(),
            self.config.tied_embed_init_std,
            self.config.matrix_init == "orthogonal",
        )
        tokens = tg.Tokens(self.config, "train")
        batches = tg.Batches(tokens, self.config, self.world)
        self.trainer = tg.Trainer(self.config, self.world, model.to(self.world.device), batches)
        self.modes = tg.training_modes(self.config)
        self.kernels = tg.KERNELS[self.config.attn_backend]

    def step(self, number: int, mode: tg.Mode) -> None:
        micro = self.trainer.batches.micro(number)
        with sdpa_kernel(self.kernels, set_priority=True):
            self.trainer.train_step(number, 0.0, micro, mode)

    def measure(self, mode: tg.Mode, warm: int, times: int) -> dict[str, Any]:
        """Compiling, steps, memory, and how often the host waited for the device in a step."""
        began, before = time.perf_counter(), race.graphs()
        self.step(0, mode)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        compiled, breaks = (race.graphs() - before).tolist()
        torch.cuda.reset_peak_memory_stats()
        numbers = iter(range(1, 1 + warm + times))
        ms = timed(lambda: self.step(next(numbers), mode), warm, times)
        return dict(
            ms=round(ms, 3),
            graphs=compiled,
            breaks=breaks,
            late_graphs=int((race.graphs() - before)[0]) - compiled,
            compile_seconds=round(seconds, 1),
            peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
            host_waits=host_waits(lambda: self.step(warm + times + 1, mode)),
            host_ms=round(host_ms(lambda: self.step(warm + times + 2, mode)), 3),
            loss=self.trainer.gradients.loss.item(),
        )

    def kernels_of_step(self) -> list[bench.Kernel]:
        """Of a step in the last mode, after two others."""
        mode = self.modes[-1]
        for number in range(2):
            self.step(number, mode)
        return kernels_of(lambda: self.step(2, mode))


def host_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds in which the host issues a call to an idle device.

    A step that takes no longer than that has kept the device waiting for the host. (With more than
    some 1,000 launches the host waits for the device at times, and takes as long as that does.)
    """
    ms = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        ms.append(1e3 * (time.perf_counter() - began))
    return statistics.median(ms)


def host_waits(call: Callable[[], Any]) -> int:
    """How often PyTorch waits for the device in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def variables_of(preset: str, **more: str) -> dict[str, str]:
    """A preset with an eighth of its batch."""
    named = {} if preset == "T" else dict(PRESET=preset)
    whole = tg.Config.from_env(named).train_batch_tokens
    return named | dict(TRAIN_BATCH_TOKENS=str(whole // RANKS), **more)


def measure_steps(
    out: Figures, title: str, settings: dict[str, str], times: int, all_modes: bool = False
) -> None:
    """Records steps of a configuration, in its last mode or in all; a failure is noted."""
    torch._dynamo.reset()  # what another case has compiled would not be counted
    torch.cuda.empty_cache()
    with out.trial(title):
        stand = Stand(settings)
        named = {title: stand.modes[-1]}
        if all_modes:
            named = {mode_title(title, number): mode for number, mode in enumerate(stand.modes)}
        for name, mode in named.items():
            out[name] = found = stand.measure(mode, 2, times)
            out.expect(math.isfinite(found["loss"]), f"{name}: the loss is {found['loss']}")
            out.expect(not found["late_graphs"], f"{name}: compiled again after its first step")


def measure_preset(
    out: Figures, options: Options, preset: str, level: str, times: int, **more: str
) -> None:
    """Records steps of a preset under the title that its estimate has."""
    settings = dict(COMPILE=level, **more)
    title = title_of(preset, settings, step=True, share=RANKS)
    measure_steps(out, title, variables_of(preset, **settings) | options.data, times)


def mode_title(row: str, number: int) -> str:
    """Of a row's modes, in the order of runs.toml's [milliseconds]."""
    return f"{row}, mode {number + 1}"


def levels(out: Figures, options: Options) -> None:
    """T compiled by block, as a whole, and with its own kernel for MLPs, which may break most."""
    measure_preset(out, options, "T", "block", 20)
    measure_preset(out, options, "T", "model", 20)
    measure_preset(out, options, "T", "block", 20, FUSED_MLP="1")


FIRST_SECONDS = 30  # of the first preset, which starts the compiler: an H200's host took 24
MEASURED = "measured"  # the figure that has the number of presets


def presets(out: Figures, options: Options) -> None:
    """Five steps of every preset at full size, as far as the time goes.

    From the last one on, as those are the most unlike T. None is begun that would not end if it
    took as long as the longest so far, as a rule the first.
    """
    names, seconds = [*reversed(tg.SYSTEMS)], list[float]()
    began = time.perf_counter()
    for preset in names:
        begins = time.perf_counter()
        if begins - began + max(seconds, default=FIRST_SECONDS) > options.seconds:
            break
        measure_preset(out, options, preset, "block", 3)
        seconds.append(time.perf_counter() - begins)
    out[MEASURED] = f"{len(seconds)} of {len(names)} presets"


# The verdicts on loops rest on what a step of these takes (research_notes.md, section 10).
CLOCK = (
    "stack_3_wider_two_50_by_position",
    "flat_6",
    "band_50",
    "core_0",
    "core_0_lanes",
    "core_0_pool",
    "core_0_truncated",
    "flat_3_wide",
    "frontier",
)


def clock(out: Figures, options: Options) -> None:
    """Rows of runs.toml that are compared in equal H100 time, which is estimated: is it right?"""
    table = ablate.read_table(ablate.TABLE)
    batch = str(tg.Config().train_batch_tokens // RANKS)
    sizes = dict(TRAIN_BATCH_TOKENS=batch, MICRO_BATCH_TOKENS=batch, TRAIN_SEQ_LEN="1024")
    usual = sizes | dict(VOCAB_SIZE=str(tg.Config().vocab_size), COMPILE="block")
    for row in CLOCK:
        measure_steps(out, row, table.rows[row].set | usual | options.data, 20, all_modes=True)


def kernels(out: Figures, options: Options) -> None:
    """Where the time of a step of T and of `frontier` goes, kernel by kernel.

    It has a process of its own: a profiler that a node forbids or lacks may end the process.
    """
    for preset in ("T", "frontier"):
        settings = dict(COMPILE="block")
        title = title_of(preset, settings, step=True, share=RANKS)
        with out.trial(title):
            found = Stand(variables_of(preset, **settings) | options.data).kernels_of_step()
            out.expect(bool(found), f"{title}: the profiler saw no kernel")
            out[title] = time_of_kernels(found)


def time_of_kernels(found: list[bench.Kernel]) -> dict[str, Any]:
    """Milliseconds of every kind, and of the longest kernels by name."""
    kinds = dict.fromkeys(ALL_KINDS, 0.0)
    kinds |= {kind: part.ms for kind, part in bench.sum_up(found, lambda k: k.kind).items()}
    names = bench.sum_up(found, lambda kernel: kernel.name)
    longest = {name: part._asdict() for name, part in itertools.islice(names.items(), TOP)}
    return {f"{kind}_ms": ms for kind, ms in kinds.items()} | dict(longest=longest)


def race_of_two(out: Figures, options: Options) -> None:
    """100 steps of T in turn with the plain implementation, after a check that both are one.

    The plain one is not compiled: as a whole, that took longer than this part has.
    """
    settings = variables_of("T") | options.data
    plain = Plain(attention="cudnn")
    cases = dict(ours=race.Case(settings), plain=race.Case(settings, plain=plain))
    with out.trial("one step in float32 beside the plain one"):
        small = settings | dict(COMPILE="off", TRAIN_BATCH_TOKENS="8192")
        eager = dict(ours=race.Case(small), plain=race.Case(small, plain=Plain()))
        out["differences of one step in float32"] = race.gate(eager)
    torch.cuda.empty_cache()
    start = race.draw(cases["ours"])
    with sdpa_kernel(tg.KERNELS["auto"], set_priority=True), race.device_watch() as readings:
        warm = {name: race.warm_up(case, start, 3) for name, case in cases.items()}
        out["warm-up"] = {name: one.facts for name, one in warm.items()}
        rounds = race.measure({name: one.contestant for name, one in warm.items()}, 3, 100)
    medians = {name: float(statistics.median(ms)) for name, ms in rounds.ms.items()}
    out["ms"] = {name: race.spread(ms) for name, ms in rounds.ms.items()}
    out["recompiled"] = late = rounds.recompiles
    out.expect(not late["ours"], f"compiled again {late['ours']} times during the race")
    out["speed against the plain implementation"] = medians["plain"] / medians["ours"]
    config, world = cases["ours"].config(), warm["ours"].contestant.world
    flop = sum(race.flop_per_token(config).values()) * config.train_batch_tokens
    peak = race.peak_flops(config, world, 0.0)
    out["MFU"] = flop / (medians["ours"] / 1e3) / peak if peak else "unknown for this GPU"
    out["MHz, W, degrees"] = readings[:: max(1, len(readings) // 10)]


# ---- 5. Whole runs -------------------------------------------------------------------------------


SHORT = dict(  # of training
    ITERATIONS="20", WARMUP_STEPS="2", VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY="1", SAVE_EVERY="10"
)


class Run:
    """train_gpt.py as a user starts it, in the folder of this check."""

    def __init__(
        self,
        options: Options,
        name: str,
        settings: dict[str, str],
        ranks: int = 1,
        script: Path = SCRIPT,
    ) -> None:
        self.folder = runs_of(options.out) / settings.get("RUN_ID", name)
        self.output = options.out / f"run_{name}.txt"
        named = dict(RUN_ID=name, COMPILE="block")
        again = ["--max-restarts=1"] if "RESUME" in settings and ranks > 1 else []
        command = [*common.launcher(ranks), *again, str(script)]
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                command,
                env=common.without_options(os.environ) | named | settings | options.data,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float) -> None:
        """Waits until the output has a match; RuntimeError if none comes."""
        deadline = time.perf_counter() + seconds
        while not re.search(pattern, self.text(), re.M):
            ended = self.process.poll() is not None
            if ended and re.search(pattern, self.text(), re.M):
                break  # it came with the last lines
            if ended or time.perf_counter() > deadline:
                raise RuntimeError(f"{self.output.name}: {pattern!r} never came: {self.tail()}")
            time.sleep(0.05)

    def end(self, seconds: float, expected: int = 0) -> None:
        """Waits for its end; RuntimeError if that takes too long or the exit code is another."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            text = f"{self.output.name}: did not end in {seconds:.0f} s: {self.tail()}"
            raise RuntimeError(text) from None
        if code != expected:
            raise RuntimeError(
                f"{self.output.name}: exit code {code}, not {expected}: {self.tail()}"
            )

    def tail(self) -> str:
        """The last lines of its output in one line, without torchrun's account of it."""
        own = re.split(
            r"^[EW]\d{4} .*torch/distributed/elastic", self.text(), maxsplit=1, flags=re.M
        )[0]
        return " / ".join(own.strip().splitlines()[-8:])[-800:]

    def result(self) -> dict[str, Any]:
        return common.read_result(self.folder / "result.json")


BEGUN_ANEW = "the run began anew where it should have been resumed"


def stopped_and_resumed(options: Options, name: str, settings: dict[str, str]) -> list[Run]:
    """A run that SIGTERM stops after its twelfth step, and what resumes it to its end."""
    seconds = options.seconds / 3
    run = Run(options, name, settings)
    run.wait_for(r"^step:12/", seconds)
    run.process.terminate()
    run.end(seconds, tg.EXIT_STOPPED)
    resumed = Run(options, f"{name}_resumed", settings | dict(RUN_ID=name, RESUME="auto"))
    resumed.end(seconds)
    return [run, resumed]


def whole_run(out: Figures, options: Options) -> None:
    """Stopped by SIGTERM, resumed, exported, reloaded, scored; and scored once more."""
    run, resumed = stopped_and_resumed(options, "whole", SHORT)
    out["checkpoints"] = sorted(path.name for path in run.folder.glob("*.ckpt"))
    out["resumed"] = lines = re.findall(r"^resumed from .*", resumed.text(), re.M)
    out.expect(len(lines) == 1, BEGUN_ANEW)
    result = resumed.result()
    score = result["roundtrip"]
    out["exported"] = dict(bytes_total=result["bytes_total"], val_bpb=score["val_bpb"])
    again = Run(options, "scored", dict(EVAL_ONLY=str(run.folder / tg.ARTIFACT)))
    again.end(options.seconds / 3)
    difference = again.result()["roundtrip"]["val_loss"] - score["val_loss"]
    out["scored again, difference in nats"] = difference
    out.expect(abs(difference) < 1e-4, f"the same artifact scored again is {difference} nats apart")


def same_bits(out: Figures, options: Options) -> None:
    """With DETERMINISTIC=1 a run that was stopped and resumed ends as one that was not."""
    exact = SHORT | dict(DETERMINISTIC="1")
    straight = Run(options, "straight", exact)
    _, resumed = stopped_and_resumed(options, "stopped", exact)
    out.expect("\nresumed from step:" in resumed.text(), BEGUN_ANEW)
    straight.end(options.seconds / 3)
    bits = [run.folder.joinpath(tg.ARTIFACT).read_bytes() for run in (straight, resumed)]
    out["one artifact"] = same = bits[0] == bits[1]
    out.expect(same, "the run that was resumed has ended with other weights")


def killed_rank(out: Figures, options: Options) -> None:
    """SIGKILL for a rank amid training: how soon the others end, and whether a restart resumes."""
    if options.ranks < 2:
        out["skipped"] = "a second GPU is needed"
        return
    more = dict(SAVE_EVERY="5", RESUME="auto", ITERATIONS="40", RANK_TIMEOUT_SECONDS="20")
    run = Run(options, "killed", SHORT | more, options.ranks)
    run.wait_for(r"^step:10/", options.seconds / 2)
    victim = ranks_of(run)[-1]
    began = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    run.wait_for(r"^resumed from step:[1-9]", options.seconds / 2)
    out["seconds until resumed"] = time.perf_counter() - began
    out["messages"] = re.findall(r"^\[rank \d+\] .*", run.text(), re.M)
    run.end(options.seconds / 2)


CONTENDER = dict(
    PRESET="frontier",
    CODEC="zlib",  # packs in seconds, where its own takes minutes of one processor
    ITERATIONS="40",
    WARMUP_STEPS="2",
    EMA_DECAY="0.9",
    VAL_LOSS_EVERY="0",
    SAVE_EVERY="0",
    TRAIN_LOG_EVERY="10",
)
LATE = 20  # its last steps, all after the onset of the loop


def all_gpus(out: Figures, options: Options) -> None:
    """`frontier` on every GPU, from the packed script: trained, rounded by GPTQ, scored."""
    packed = options.out / "packed/train_gpt.py"
    packed.parent.mkdir(exist_ok=True)
    packed.write_bytes(packing.pack(SCRIPT.read_bytes()))
    batch = tg.Config.from_env(dict(PRESET="frontier")).train_batch_tokens // RANKS * options.ranks
    sizes = dict(TRAIN_BATCH_TOKENS=str(batch), VOCAB_SIZE=str(tg.Config().vocab_size))
    run = Run(options, "contender", CONTENDER | sizes, options.ranks, packed)
    run.end(options.seconds)
    result = run.result()
    rows = [*common.read_metrics(run.folder / "metrics.jsonl")]
    steps = {row["step"]: row for row in rows if "train_loss" in row}
    last = max(steps)
    took = steps[last]["train_seconds"] - steps[last - LATE]["train_seconds"]
    out["GPUs"] = result["world_size"]
    out["ms a step"] = 1e3 * took / LATE
    losses = steps[min(steps)]["train_loss"], steps[last]["train_loss"]
    out["train_loss"] = losses
    out.expect(losses[1] < losses[0] - 1, f"the loss went from {losses[0]} to {losses[1]}")
    out["bytes_total"] = result["bytes_total"]
    scores = {name: result[name]["val_bpb"] for name in ("pre_quant", "roundtrip", "sliding")}
    out["val_bpb"] = scores
    lost = scores["roundtrip"] - scores["pre_quant"]
    out.expect(abs(lost) < 0.1, f"rounding to six bits changes val_bpb by {lost:.3f}")


def ranks_of(run: Run) -> list[int]:
    """Process ids of the ranks that torchrun has started, in their order."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
    found = {}
    for child in map(int, children.read_text().split()):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = child
    return [found[rank] for rank in sorted(found)]


# ---- 6. All parts --------------------------------------------------------------------------------


class Part(NamedTuple):
    """A function of the check and its share of the time."""

    name: str
    seconds: float
    run: Callable[[Figures, Options], None]


PARTS = [
    Part("environment", 30, environment),
    Part("attention", 20, attention),
    Part("levels", 100, levels),
    Part("clock", 135, clock),
    Part("kernels", 60, kernels),
    Part("all GPUs", 125, all_gpus),
    Part("whole run", 100, whole_run),
    Part("same bits", 100, same_bits),
    Part("killed rank", 60, killed_rank),
    Part("race", 65, race_of_two),
    Part("presets", 45, presets),
]


def time_for(parts: Sequence[Part], left: float, scale: float) -> float:
    """Seconds for the first of the parts that are left: its share, and all that is beyond theirs.

    Where less is left than their shares, each gets as much less. `scale`: of the shares.
    """
    own, later = parts[0].seconds, sum(part.seconds for part in parts[1:])
    return max(left - scale * later, left * own / (own + later), 0.0)


class Options(NamedTuple):
    """What a part needs to know."""

    out: Path
    data: dict[str, str]  # DATA_PATH, TOKENIZER_PATH, and LOG_DIR, by which processes are known
    seconds: float  # until the part is cut off
    ranks: int  # as many as GPUs, but a power of two, which divides every batch


def runs_of(out: Path) -> Path:
    return out / "runs"


def file_of(part: Part, out: Path, ending: str) -> Path:
    return out / f"{part.name.replace(' ', '_')}.{ending}"


def is_whole(shards: Path, tokenizer: Path) -> bool:
    """Whether there is a tokenizer, and shards of both splits."""
    splits = (f"fineweb_{split}_*.bin" for split in ("train", "val"))
    return tokenizer.exists() and all([*shards.glob(names)] for names in splits)


def find_data(out: Path, seconds: float) -> dict[str, str]:
    """FineWeb where the script looks for it, or else the sample corpus, made in `seconds`."""
    config = tg.Config()
    shards, tokenizer = tg.find_file(config.data_path), tg.find_file(config.tokenizer_path)
    if not is_whole(shards, tokenizer):
        if not sample(out / "data"):
            make_sample(out / "data", seconds)
        [(shards, tokenizer)] = sample(out / "data")
    short = shorten(shards, out / "short")
    return dict(DATA_PATH=str(short), TOKENIZER_PATH=str(tokenizer.resolve()))


def sample(folder: Path) -> list[tuple[Path, Path]]:
    """Shards and tokenizer of the sample corpus in a folder; none where it is not whole."""
    shards, tokenizers = (folder / "datasets").glob("*"), (folder / "tokenizers").glob("*.model")
    return [pair for pair in itertools.product(shards, tokenizers) if is_whole(*pair)][:1]


def make_sample(folder: Path, seconds: float) -> None:
    """Makes the sample corpus; InputError says why there is none."""
    command = [sys.executable, str(SAMPLE), "--root", str(folder)]
    failed = "there is no FineWeb here, and data/sample.py did not make the sample corpus"
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise tg.InputError(f"{failed} in {seconds:.0f} s, a third of --minutes") from None
    told = done.stderr.strip().splitlines() or ["it says nothing"]
    tg.require(not done.returncode, f"{failed} (exit code {done.returncode}): {told[-1]}")
    tg.require(sample(folder), f"{failed}: {folder} lacks shards or a tokenizer")


def shorten(shards: Path, folder: Path) -> Path:
    """`folder`, with links to the shards for training and the first tokens of validation."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted(shards.glob("fineweb_train_*.bin")):
        (folder / path.name).symlink_to(path.resolve())
    first = min(shards.glob("fineweb_val_*.bin"))
    common.write_shard(folder / first.name, tg.open_shard(first)[:VAL_TOKENS])
    return folder


def end_all(out: Path) -> None:
    """Kills every process of a part of the check in `out`.

    They are known by a variable: torchrun's ranks have sessions of their own, and whoever lost its
    parent has another.
    """
    mark = f"LOG_DIR={runs_of(out)}".encode()
    for _ in range(100):  # until none is left; one that a driver holds may stay for ever
        left = False
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended, or is somebody else's
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
                    left = True
        if not left:
            break
        time.sleep(0.05)


def run_part(part: Part, options: Options) -> dict[str, Any]:
    """A part in a process of its own: its seconds, its failure if it has one, and its figures."""
    until = time.monotonic() + options.seconds
    words = ["--part", part.name, "--out", str(options.out), "--until", str(until)]
    command = [sys.executable, __file__, *words, "--ranks", str(options.ranks)]
    figures, output = file_of(part, options.out, "json"), file_of(part, options.out, "txt")
    figures.unlink(missing_ok=True)
    began = time.perf_counter()
    problems = []
    with open(output, "w") as file:
        variables = os.environ | options.data
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables)
    try:
        code = process.wait(options.seconds)
        if code:
            lines = output.read_text(errors="replace").strip().splitlines() or [""]
            problems.append(f"exit code {code}: {lines[-1][:1000]}")
    except subprocess.TimeoutExpired:
        problems.append(f"cut off after {options.seconds:.0f} s")
    finally:  # after Ctrl-C, too
        end_all(options.out)
    values = common.read_result(figures) if figures.exists() else {}
    problems += values.get(PROBLEMS, [])
    seconds = round(time.perf_counter() - began, 1)
    return dict(seconds=seconds, failure="; ".join(problems), figures=values)


# ---- 7. Estimated and measured -------------------------------------------------------------------

COMPARED = ("ms", "peak_gb", "graphs", "breaks", "late_graphs")


# What the table has of the parts that are no steps of one GPU.
SHOWN = {
    "all GPUs": ("GPUs", "ms a step", "train_loss", "bytes_total", "val_bpb"),
    "whole run": ("checkpoints", "resumed", "exported", "scored again, difference in nats"),
    "same bits": ("one artifact",),
    "killed rank": ("seconds until resumed", "skipped"),
    "race": ("ms", "speed against the plain implementation", "MFU"),
    "presets": (MEASURED,),
}
CONTENDER_STEP = title_of(
    "frontier", dict(COMPILE="block", VOCAB_SIZE="1024"), step=True, share=RANKS
)
Row = tuple[str, str, Any, Any]  # case, quantity, estimate (None without one), measurement


def attention_rows(measured: dict[str, Any]) -> Iterator[Row]:
    """Roofline and measurement of the attention kernels."""
    for name, found in measured.items():
        for way in ("forward", "backward"):
            cost = roofline.attention_call(SHAPE, way == "backward")
            estimate = 1e3 * cost.seconds if name == "cudnn" else None
            yield f"attention, {name}", f"{way} ms", estimate, found[f"{way}_ms"]


def step_rows(title: str, found: dict[str, Any], estimate: dict[str, Any]) -> Iterator[Row]:
    """A step of one GPU."""
    for name in COMPARED:
        yield title, name, estimate.get(name), found[name]
    waits = len(estimate["host_waits"]) if estimate else None
    yield title, "host waits", waits, found["host_waits"]
    yield title, "host ms", None, found["host_ms"]
    yield title, "compile seconds", None, found["compile_seconds"]  # the host's


def rows(parts: dict[str, Any], estimates: dict[str, Any]) -> Iterator[Row]:
    """All of the table."""
    measured = {
        part: {name: found for name, found in done["figures"].items() if name != PROBLEMS}
        for part, done in parts.items()
    }
    yield from attention_rows(measured.get("attention", {}))
    for part in ("levels", "presets"):
        for title, found in measured.get(part, {}).items():
            if title != MEASURED:
                yield from step_rows(title, found, estimates.get(title, [{}])[-1])
    for title, found in measured.get("kernels", {}).items():
        for name in (f"{kind}_ms" for kind in ALL_KINDS):
            yield title, name, estimates.get(title, [{}])[-1].get(name), found[name]
    for title, found in measured.get("clock", {}).items():
        yield title, "ms", clock_estimates().get(title), found["ms"]
        yield title, "host ms", None, found["host_ms"]
    alone = estimates.get(CONTENDER_STEP, [{}])[-1].get("ms")  # without collectives
    for part, names in SHOWN.items():
        for name in names:
            if name in measured.get(part, {}):
                estimate = alone if (part, name) == ("all GPUs", "ms a step") else None
                yield part, name, estimate, measured[part][name]


def clock_estimates() -> dict[str, float]:
    """Milliseconds of the rows' steps as runs.toml has them, by the titles of part `clock`."""
    table = ablate.read_table(ablate.TABLE).milliseconds
    return {mode_title(row, i): ms for row, all_ms in table.items() for i, ms in enumerate(all_ms)}


def number(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


def table(parts: dict[str, Any], estimates: dict[str, Any]) -> list[str]:
    """Lines in Markdown; the last column is measured / estimated."""
    cells = []
    for case, name, estimate, measured in rows(parts, estimates):
        both = isinstance(estimate, int | float) and isinstance(measured, int | float)
        ratio = measured / estimate if both and estimate else None
        cells.append((case, name, number(estimate), number(measured), number(ratio)))
    return common.markdown_table(("case", "", "estimated", "measured", "ratio"), cells)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("logs/gpu_check"),
        help="A folder for figures, outputs and runs (default: %(default)s).",
    )
    add(
        "--minutes",
        type=float,
        default=MINUTES,
        help="Minutes of the whole check, of which each part has its share, with --only as well "
        "(default: %(default)s).",
    )
    add(
        "--only",
        nargs="*",
        action="extend",
        choices=names,
        metavar="PART",
        help=f"Parts to run, of {', '.join(names)} (default: all).",
    )
    add(
        "--part",
        choices=names,
        metavar="PART",
        help="The part of a process that this tool starts itself.",
    )
    add("--until", type=float, help="When that part is cut off, by the monotonic clock.")
    add("--ranks", type=int, help="The GPUs of that part.")
    return parser


EARLIER = "earlier"  # marks the findings of an earlier check


def begin(out: Path, chosen: list[Part]) -> dict[str, Any]:
    """Removes what an earlier check has left; what it found in other parts is kept, and marked."""
    path, found = out / "gpu_check.json", dict[str, Any]()
    others = {part.name for part in PARTS} - {part.name for part in chosen}
    if others and path.exists():
        before = common.read_result(path)
        found = {name: done | {EARLIER: True} for name, done in before.items() if name in others}
    old = [path, out / "gpu_check.md", *out.glob("run_*.txt")]
    for part in chosen:
        old += [file_of(part, out, "json"), file_of(part, out, "txt")]
    for file in old:
        file.unlink(missing_ok=True)
    shutil.rmtree(runs_of(out), ignore_errors=True)
    if found:
        common.write_json(path, found)
    return found


def check(out: Path, chosen: list[Part], seconds: float) -> int:
    """Runs the parts and tells what they found; the exit code: 0 if none failed."""
    scale, began = seconds / (60 * MINUTES), time.monotonic()
    found = begin(out, chosen)
    data = find_data(out, seconds / 3) | dict(LOG_DIR=str(runs_of(out)))
    shares = scale * (DATA_SECONDS + sum(part.seconds for part in chosen))  # of few parts, few
    deadline = min(time.monotonic() + shares, began + seconds - scale * END_SECONDS)
    ranks = 2 ** int(math.log2(torch.cuda.device_count()))
    try:
        for i, part in enumerate(chosen):
            left = deadline - time.monotonic()
            done = run_part(part, Options(out, data, time_for(chosen[i:], left, scale), ranks))
            common.say(f"{part.name}: {done['seconds']} s {done['failure']}")
            found[part.name] = done
            common.write_json(out / "gpu_check.json", found)
    finally:  # after Ctrl-C, too
        tell(out, found)
    return 1 if any(found[part.name]["failure"] for part in chosen) else 0


def tell(out: Path, found: dict[str, Any]) -> None:
    """Prints the table, what failed and what did not run, and writes them into gpu_check.md."""
    estimates = json.loads(ESTIMATES.read_text()) if ESTIMATES.exists() else {}
    lines = [*table(found, estimates), "", *verdict(found)]
    tg.write_atomically(out / "gpu_check.md", "\n".join([*lines, ""]).encode())
    common.say("\n".join(lines))


def verdict(found: dict[str, Any]) -> list[str]:
    """What failed, and which parts this check has not run, or not to their end."""
    failed = {name: done for name, done in found.items() if done["failure"]}
    lines = [f"FAILED {name}: {done['failure']}" for name, done in failed.items()]
    earlier = [name for name, done in found.items() if EARLIER in done]
    missing = [part.name for part in PARTS if part.name not in found]
    if not failed and found:
        lines.append("No part that has run failed." if missing else "No part failed.")
    if earlier:
        lines.append(f"found by an earlier check: {', '.join(earlier)}")
    if missing:
        lines.append(f"not run: {', '.join(missing)}")
    return lines


def work_on(part: Part, given: argparse.Namespace, out: Path) -> int:
    """Runs a part in this process, which the check has started for it."""
    data = {name: os.environ[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "LOG_DIR")}
    options = Options(out, data, given.until - time.monotonic(), given.ranks)
    part.run(Figures(file_of(part, out, "json")), options)
    return 0


def work(given: argparse.Namespace) -> int:
    """The exit code: 0 if no part failed."""
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.part:
        return work_on(next(part for part in PARTS if part.name == given.part), given, out)
    tg.require(given.minutes > 0, f"--minutes {given.minutes:g} is not above 0")
    tg.require(torch.cuda.is_available(), "PyTorch sees no GPU here")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, after which nothing is left behind
        signal.signal(number, signal.default_int_handler)
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    with tg.lock_folder(out):
        return check(out, chosen, 60 * given.minutes)


def main() -> int:
    return common.run_tool(work, make_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
