"""The first minutes on a real H100: what works, how fast, and as estimated?

    python records/tools/gpu_check.py           # at most 12 minutes
    python records/tools/gpu_check.py --only attention race --out /tmp/check

Nothing has to be prepared: without FineWeb in DATA_PATH the sample corpus is
made. Every part is a process of its own with its own share of the time; what
fails or takes too long is recorded, and the rest goes on. The folder of --out
gets gpu_check.json with all figures and the output of each part. The last
thing printed is a table of what the dry run had estimated and what was
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
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
    from records.tools import common, race
    from records.tools.dryrun import roofline
    from records.tools.dryrun.dryrun import title_of
    from records.tools.plain import Plain

ROOT = Path(__file__).resolve().parents[2]
ESTIMATES = Path(__file__).resolve().parent / "dryrun/estimates.json"
SCRIPT = ROOT / "train_gpt.py"
MINUTES = 12
RANKS = 8  # of a node; one GPU is given the work of one of them

# ---- 1. Figures ----------------------------------------------------------------------------------


class Figures:
    """What a part has found, written after every new figure: a part that is cut off keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value
        common.write_json(self.path, self.values)
        print(f"{name}: {value}", flush=True)


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


def nvidia_smi() -> list[dict[str, str]]:
    """Driver, clocks and power of every GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    return [dict(zip(QUERIES, line.split(", "))) for line in lines]


def environment(out: Figures, options: Options) -> None:
    out["gpus"] = nvidia_smi() or "nvidia-smi is not installed"
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


# ---- 3. Attention --------------------------------------------------------------------------------

KERNELS = dict(
    cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION, math=SDPBackend.MATH
)
SHAPE = roofline.Attention(sequences=64, tokens=1024, heads=8, kv_heads=4, width=64)


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
        with sdpa_kernel(KERNELS[name]):
            y = causal(*heads)
            results = [y.detach(), *gradients(y, heads, grad)]
            exact = exact or results
            apart = [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact)]
            out[name] = dict(
                forward_ms=timed(functools.partial(causal, *heads), 3, 20),
                backward_ms=timed(functools.partial(gradients, y, heads, grad), 3, 20),
                relative_difference_from_math=max(apart),
            )


# ---- 4. Steps ------------------------------------------------------------------------------------


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
        self.mode = tg.training_modes(self.config)[-1]
        self.kernels = tg.KERNELS[self.config.attn_backend]

    def step(self, number: int) -> None:
        micro = self.trainer.batches.micro(number)
        with sdpa_kernel(self.kernels, set_priority=True):
            self.trainer.train_step(number, 0.0, micro, self.mode)

    def measure(self, warm: int, times: int) -> dict[str, Any]:
        """Compiling, steps, memory, and how often the host waited for the device in a step."""
        began, before = time.perf_counter(), race.graphs()
        self.step(0)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        compiled, breaks = (race.graphs() - before).tolist()
        torch.cuda.reset_peak_memory_stats()
        numbers = iter(range(1, 1 + warm + times))
        ms = timed(lambda: self.step(next(numbers)), warm, times)
        return dict(
            ms=round(ms, 3),
            graphs=compiled,
            breaks=breaks,
            late_graphs=int((race.graphs() - before)[0]) - compiled,
            compile_seconds=round(seconds, 1),
            peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
            host_waits=host_waits(lambda: self.step(warm + times + 1)),
            loss=self.trainer.gradients.loss.item(),
        )


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


def measure_step(
    out: Figures, options: Options, preset: str, level: str, times: int, **more: str
) -> None:
    """Records steps of a preset under the title that its estimate has."""
    torch._dynamo.reset()  # what another case has compiled would not be counted
    torch.cuda.empty_cache()
    settings = dict(COMPILE=level, **more)
    title = title_of(preset, settings, step=True, share=RANKS)
    stand = Stand(variables_of(preset, **settings) | options.data)
    out[title] = stand.measure(2, times)


def levels(out: Figures, options: Options) -> None:
    """T compiled by block, with its own kernel for MLPs too, and as a whole."""
    measure_step(out, options, "T", "block", 20)
    measure_step(out, options, "T", "block", 20, FUSED_MLP="1")
    measure_step(out, options, "T", "model", 20)


def presets(out: Figures, options: Options) -> None:
    """Five steps of every preset at full size; one that fails does not stop the others.

    From the last one on: the time may end before they do, and those are the most unlike T.
    """
    for preset in reversed(tg.SYSTEMS):
        try:
            measure_step(out, options, preset, "block", 3)
        except (RuntimeError, tg.InputError) as error:
            out[f"{preset} failed"] = str(error)[:500]


def race_of_two(out: Figures, options: Options) -> None:
    """200 steps of T in turn with the plain implementation, after a check that both are one."""
    settings = variables_of("T") | options.data
    plain = Plain(compile=True, attention="cudnn")
    cases = dict(ours=race.Case(settings), plain=race.Case(settings, plain=plain))
    try:
        eager = {
            name: case_with(case, COMPILE="off", TRAIN_BATCH_TOKENS="8192")
            for name, case in cases.items()
        }
        out["differences of one step in float32"] = race.gate(eager)
    except race.Mismatch as error:
        out["differences of one step in float32"] = f"too large: {error}"
    torch.cuda.empty_cache()
    start = race.draw(cases["ours"])
    with sdpa_kernel(tg.KERNELS["auto"], set_priority=True), race.device_watch() as readings:
        warm = {name: race.warm_up(case, start, 3) for name, case in cases.items()}
        out["warm-up"] = {name: one.facts for name, one in warm.items()}
        rounds = race.measure({name: one.contestant for name, one in warm.items()}, 3, 200)
    medians = {name: float(statistics.median(ms)) for name, ms in rounds.ms.items()}
    out["ms"] = {name: race.spread(ms) for name, ms in rounds.ms.items()}
    out["recompiled"] = rounds.recompiles
    out["speed against the plain implementation"] = medians["plain"] / medians["ours"]
    config, world = cases["ours"].config(), warm["ours"].contestant.world
    flop = sum(race.flop_per_token(config).values()) * config.train_batch_tokens
    peak = race.peak_flops(config, world, 0.0)
    out["MFU"] = flop / (medians["ours"] / 1e3) / peak if peak else "unknown for this GPU"
    out["MHz, W, degrees"] = readings[:: max(1, len(readings) // 10)]


def case_with(case: race.Case, **settings: str) -> race.Case:
    """The same contestant with other settings."""
    return race.Case(case.env | settings, plain=case.plain)


# ---- 5. Whole runs -------------------------------------------------------------------------------


SHORT = dict(  # of training
    ITERATIONS="20", WARMUP_STEPS="2", VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY="1", SAVE_EVERY="10"
)


class Run:
    """train_gpt.py as a user starts it, in the folder of this check."""

    def __init__(
        self, options: Options, name: str, settings: dict[str, str], ranks: int = 1
    ) -> None:
        runs = options.out / "runs"
        self.folder = runs / name
        self.output = options.out / f"run_{name}.txt"
        self.began = time.perf_counter()
        paths = dict(LOG_DIR=str(runs), RUN_ID=name, COMPILE="block")
        again = ["--max-restarts=1"] if ranks > 1 else []
        command = [*common.launcher(ranks), *again, str(SCRIPT)]
        with open(self.output, "a") as file:
            self.process = subprocess.Popen(
                command,
                env=common.without_options(os.environ) | options.data | paths | settings,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float) -> float:
        """Seconds until the output has a match; RuntimeError if the run ends before."""
        deadline = time.perf_counter() + seconds
        while not re.search(pattern, self.text(), re.M):
            if self.process.poll() is not None or time.perf_counter() > deadline:
                raise RuntimeError(f"{pattern!r} never came: {self.text()[-800:]}")
            time.sleep(0.05)
        return time.perf_counter() - self.began

    def end(self, seconds: float) -> int:
        """The exit code; RuntimeError if it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"did not end in {seconds} s: {self.text()[-800:]}") from None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, Any]:
        return common.read_result(self.folder / "result.json")


def whole_run(out: Figures, options: Options) -> None:
    """Stopped by SIGTERM, resumed, exported, reloaded, scored; and scored once more."""
    seconds = options.seconds / 3
    run = Run(options, "whole", SHORT)
    run.wait_for(r"^step:12/", seconds)
    run.process.terminate()
    code = run.end(60)
    out["stopped"] = dict(exit_code=code, checkpoints=[p.name for p in run.folder.glob("*.ckpt")])
    run = Run(options, "whole", SHORT | dict(RESUME="auto"))
    code = run.end(seconds)
    out["resumed"] = dict(exit_code=code, lines=re.findall(r"^resumed from .*", run.text(), re.M))
    result = run.result()
    score = result["roundtrip"]
    out["exported"] = dict(bytes_total=result["bytes_total"], fits=result["fits"], score=score)
    again = Run(options, "scored", dict(EVAL_ONLY=str(run.folder / tg.ARTIFACT)))
    code = again.end(seconds)
    difference = again.result()["roundtrip"]["val_loss"] - score["val_loss"]
    out["scored again"] = dict(exit_code=code, difference=difference)


def killed_rank(out: Figures, options: Options) -> None:
    """SIGKILL for a rank amid training: how soon the others end, and whether a restart resumes."""
    ranks = min(2, torch.cuda.device_count())
    if ranks < 2:
        out["skipped"] = "a second GPU is needed"
        return
    more = dict(SAVE_EVERY="5", RESUME="auto", ITERATIONS="40", RANK_TIMEOUT_SECONDS="20")
    run = Run(options, "killed", SHORT | more, ranks)
    run.wait_for(r"^step:10/", options.seconds / 2)
    victim = ranks_of(run)[-1]
    began = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    run.wait_for(r"^resumed from step:[1-9]", options.seconds / 2)
    out["seconds until resumed"] = time.perf_counter() - began
    out["messages"] = re.findall(r"^\[rank \d+\] .*", run.text(), re.M)
    out["exit code"] = run.end(options.seconds / 2)


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
    Part("environment", 20, environment),
    Part("attention", 45, attention),
    Part("levels", 145, levels),
    Part("race", 180, race_of_two),
    Part("whole run", 120, whole_run),
    Part("killed rank", 60, killed_rank),
    Part("presets", 150, presets),
]


class Options(NamedTuple):
    """What a part needs to know."""

    out: Path
    data: dict[str, str]  # DATA_PATH and TOKENIZER_PATH
    seconds: float


def file_of(part: Part, out: Path, ending: str) -> Path:
    return out / f"{part.name.replace(' ', '_')}.{ending}"


def find_data(out: Path) -> dict[str, str]:
    """FineWeb where the script looks for it, or else the sample corpus, made here."""
    config = tg.Config()
    if list(Path(config.data_path).glob("fineweb_val_*.bin")):
        return dict(DATA_PATH=config.data_path, TOKENIZER_PATH=config.tokenizer_path)
    folder = out / "data"
    if not (folder / "datasets").exists():
        command = [sys.executable, str(ROOT / "data/sample.py"), "--root", str(folder)]
        subprocess.run(command, check=True)
    (shards,) = (folder / "datasets").iterdir()
    (tokenizer,) = (folder / "tokenizers").glob("*.model")
    return dict(DATA_PATH=str(shards), TOKENIZER_PATH=str(tokenizer))


def run_part(part: Part, options: Options, data: dict[str, str]) -> dict[str, Any]:
    """A part in a process of its own: its seconds, its failure if it has one, and its figures."""
    words = ["--part", part.name, "--out", str(options.out), "--seconds", str(options.seconds)]
    command = [sys.executable, __file__, *words]
    figures, output = file_of(part, options.out, "json"), file_of(part, options.out, "txt")
    figures.unlink(missing_ok=True)
    began = time.perf_counter()
    failure = ""
    with open(output, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | data,
            start_new_session=True,
        )
        try:
            code = process.wait(options.seconds)
            lines = output.read_text(errors="replace").strip().splitlines() or [""]
            failure = "" if code == 0 else f"exit code {code}: {lines[-1][:300]}"
        except subprocess.TimeoutExpired:
            failure = f"cut off after {options.seconds:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    values = common.read_result(figures) if figures.exists() else {}
    return dict(seconds=round(time.perf_counter() - began, 1), failure=failure, figures=values)


# ---- 7. Estimated and measured -------------------------------------------------------------------

COMPARED = ("ms", "peak_gb", "graphs", "breaks", "late_graphs")


def attention_rows(measured: dict[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Roofline and measurement of the attention kernels."""
    for name, found in measured.items():
        for way in ("forward", "backward"):
            cost = roofline.attention_call(SHAPE, way == "backward")
            estimate = 1e3 * cost.seconds if name == "cudnn" else None
            yield f"attention, {name}", f"{way} ms", estimate, found[f"{way}_ms"]


def rows(parts: dict[str, Any], estimates: dict[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Case, quantity, estimate (None without one) and measurement."""
    yield from attention_rows(parts.get("attention", {}).get("figures", {}))
    for part in ("levels", "presets"):
        for title, found in parts.get(part, {}).get("figures", {}).items():
            if not isinstance(found, dict):
                yield title, "", None, found
                continue
            estimate = estimates.get(title, [{}])[-1]
            for name in COMPARED:
                yield title, name, estimate.get(name), found[name]
            waits = len(estimate["host_waits"]) if estimate else None
            yield title, "host waits", waits, found["host_waits"]
            yield title, "compile seconds", None, found["compile_seconds"]  # the host's


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
        help="Minutes for all parts together; each has its share (default: %(default)s).",
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
    add("--seconds", type=float, help="The time of that part.")
    return parser


def check(out: Path, chosen: list[Part], scale: float) -> dict[str, Any]:
    """What every part found, in gpu_check.json as well; `scale`: of the time they have."""
    data = find_data(out)
    found = {}
    for part in chosen:
        options = Options(out, data, part.seconds * scale)
        found[part.name] = done = run_part(part, options, data)
        common.say(f"{part.name}: {done['seconds']} s {done['failure']}")
        common.write_json(out / "gpu_check.json", found)
    return found


def work(given: argparse.Namespace) -> int:
    """The exit code: 0 if no part failed."""
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.part:
        part = next(part for part in PARTS if part.name == given.part)
        data = {name: os.environ[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
        part.run(Figures(file_of(part, out, "json")), Options(out, data, given.seconds))
        return 0
    tg.require(torch.cuda.is_available(), "PyTorch sees no GPU here")
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    found = check(out, chosen, given.minutes / MINUTES)
    estimates = json.loads(ESTIMATES.read_text()) if ESTIMATES.exists() else {}
    lines = table(found, estimates)
    (out / "gpu_check.md").write_text("\n".join(lines) + "\n")
    common.say("\n".join(lines))
    return 1 if any(done["failure"] for done in found.values()) else 0


def main() -> int:
    return common.run_tool(work, make_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
