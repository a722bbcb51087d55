"""The dry run: its arithmetic everywhere, what it runs where a CUDA build is.

DRYRUN_PYTHON names a Python with a CUDA build of torch (records/tools/dryrun/README.md).
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from records.tools import common, gpu_check
from records.tools.dryrun import dryrun as dryrun_tool
from records.tools.dryrun import roofline, standins
from records.tools.dryrun.dryrun import title_of
from records.tools.dryrun.roofline import Attention, Cost, Event

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "records/tools/dryrun/dryrun.py"
SHAPE = Attention(sequences=64, tokens=1024, heads=8, kv_heads=4, width=64)
sizes = st.integers(1, 1 << 16)


def event(kind: str, name: str, *numbers: int, part: str = "forward") -> Event:
    a, b, c, d = (*numbers, 0, 0, 0, 0)[:4]
    return Event(part, kind, name, (a, b, c, d))


# ---- the file of cases ---------------------------------------------------------------------------


def test_cases_are_added_by_one_process_at_a_time_and_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cases.json"
    dryrun_tool.write_json(path, "first", [])
    loads, write = json.loads, common.write_json

    def held() -> bool:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def read_held(text: str) -> Any:
        assert held()
        return loads(text)

    def write_held(*words: Any) -> None:
        assert held()
        write(*words)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", read_held)
        patch.setattr(common, "write_json", write_held)
        dryrun_tool.write_json(path, "second", [])
        assert not held()
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            dryrun_tool.write_json(path, "third", [])
    assert json.loads(path.read_text()) == {"first": [], "second": []}


# ---- the trace -----------------------------------------------------------------------------------


def test_a_mark_begins_a_part(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        "malloc\tcudaMalloc\t512\t0\t0\t0\nmark\tforward\t0\t0\t0\t0\n"
        "gemm\tbfloat16\t1\t2\t3\t4\nmark\tbackward\t0\t0\t0\t0\nbytes\tkernel\t9\t8\t7\t6\n"
    )
    assert roofline.read_trace(path) == [
        Event("", "malloc", "cudaMalloc", (512, 0, 0, 0)),
        Event("forward", "gemm", "bfloat16", (1, 2, 3, 4)),
        Event("backward", "bytes", "kernel", (9, 8, 7, 6)),
    ]


@pytest.mark.parametrize("line", ["gemm\tbfloat16\t1\t2\t3", "gemm\tbfloat16\t1\t2\t3\tfour", "?"])
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"{path}: .* is no line of a trace"):
        roofline.read_trace(path)


# ---- costs ---------------------------------------------------------------------------------------


@given(sizes, sizes, sizes, st.integers(1, 64), st.sampled_from(sorted(roofline.ITEM_BYTES)))
def test_a_product_takes_the_longest_of_its_bounds(
    m: int, n: int, k: int, batch: int, dtype: str
) -> None:
    """Those of its operations, its bytes and any kernel."""
    cost = roofline.matrix_product(dtype, m, n, k, batch)
    item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    assert cost.flop == pytest.approx(2 * m * n * k * batch, rel=1e-12)  # of floats
    assert cost.bytes == item * batch * (m * k + k * n + m * n)
    peak = roofline.TENSOR_CORES if item == 2 else roofline.OTHER_CORES
    assert cost.seconds == max(cost.bytes / roofline.BANDWIDTH, roofline.FLOOR, cost.flop / peak)


def test_a_large_product_is_bound_by_operations_and_a_narrow_one_by_bytes() -> None:
    large = roofline.matrix_product("bfloat16", 65536, 4096, 4096, 1)
    narrow = roofline.matrix_product("bfloat16", 65536, 16, 512, 1)
    assert large.seconds == large.flop / roofline.TENSOR_CORES
    assert narrow.seconds == narrow.bytes / roofline.BANDWIDTH


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
def test_attention_counts_what_a_causal_mask_leaves(B: int, T: int, K: int, group: int) -> None:
    E = 8
    shape = Attention(B, T, K * group, K, E)
    pairs = int(torch.ones(T, T).tril().sum())  # of a query with a key
    products = 2  # queries with keys, probabilities with values
    forward = roofline.attention_call(shape, backward=False)
    assert forward.flop == B * K * group * pairs * products * 2 * E
    q, k = torch.empty(B, K * group, T, E), torch.empty(B, K, T, E)
    assert forward.bytes == 2 * (2 * q.numel() + 2 * k.numel())  # q, output, k, v of 2 bytes
    backward = roofline.attention_call(shape, backward=True)
    assert backward.flop == 2.5 * forward.flop
    assert backward.bytes == 2 * forward.bytes


def test_an_all_reduce_moves_all_but_its_own_share_twice() -> None:
    assert roofline.all_reduce(1 << 30, ranks=2).seconds == (1 << 30) / roofline.NVLINK
    assert roofline.all_reduce(1, ranks=8).seconds == roofline.FLOOR


# ---- tables --------------------------------------------------------------------------------------

kinds = st.sampled_from(["gemm", "bytes", "nccl", "copy", "memset", "kernel", "wait", "triton"])
names = st.sampled_from(["bfloat16", "cudnnBackendExecute", "flash_fwd_kernel", "elementwise"])
events = st.builds(
    Event,
    st.sampled_from(["forward", "backward"]),
    kinds,
    names,
    st.tuples(*[st.sampled_from([1, 300])] * 4),  # few, so that many are equal
)


@given(st.lists(events, max_size=30))
def test_tables_lose_nothing(several: list[Event]) -> None:
    """Put together in whatever way, launches and seconds are those of the events."""
    table = roofline.tabulate(several, SHAPE)
    each = [roofline.line_of(one, SHAPE).cost for one in roofline.launches(several)]
    for lines in (table, [*roofline.by_group(table).values()]):
        assert sum(line.times for line in lines) == len(each)
        assert roofline.milliseconds(lines) == pytest.approx(1e3 * sum(c.seconds for c in each))
    assert len({line[:3] for line in table}) == len(table)
    costs = [line.cost.seconds for line in table]
    assert costs == sorted(costs, reverse=True)


def test_what_the_host_does_takes_the_device_no_time() -> None:
    several = [
        event("wait", "cudaStreamSynchronize"),
        event("waitcopy", "pageable->device", 8),
        event("malloc", "cudaMalloc", 512),
        event("triton", "kernel_0", 1, 1, 1, 128),  # its launch; "bytes" tells its time
    ]
    assert roofline.tabulate(several, SHAPE) == []
    assert roofline.host_waits(several) == ["cudaStreamSynchronize", "pageable->device"]


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("cudnnBackendExecute", "cudnn"),
        ("_ZN12pytorch_flash16flash_fwd_kernelI23Flash_fwd_kernel_traits", "flash"),
        ("_ZN12pytorch_flash44flash_bwd_dq_dk_dv_loop_seqk_parallel_kernelI", "flash"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "efficient"),
        ("vectorized_elementwise_kernel", "math"),
    ],
)
def test_which_attention_kernel_was_taken(name: str, taken: str) -> None:
    assert roofline.attention_taken([event("kernel", name)]) == taken


def test_attention_that_has_no_name_is_backward_in_that_part() -> None:
    for part in ("forward", "backward"):
        (line,) = roofline.tabulate([event("kernel", "cudnnBackendExecute", part=part)], SHAPE)
        assert (line.group, line.name) == ("attention", f"cudnn {part}")
        assert line.cost == roofline.attention_call(SHAPE, part == "backward")


def test_costs_add_up() -> None:
    assert roofline.add(Cost(1.0, 2.0, 3.0), Cost(10.0, 20.0, 30.0)) == Cost(11.0, 22.0, 33.0)


def test_a_case_has_one_title() -> None:
    settings = dict(COMPILE="block", ATTN_BACKEND="flash")
    same = dict(reversed(settings.items()))
    assert title_of("K", settings, True) == title_of("K", same, True)
    others = {
        title_of("K", settings, False),
        title_of("L", settings, True),
        title_of("K", {}, True),
    }
    assert len(others | {title_of("K", settings, True)}) == 4


def test_a_stub_defines_each_name_once() -> None:
    text = standins.stubs({"cudaOne", "ncclTwo"})
    for name in ("cudaOne", "ncclTwo"):
        assert text.count(f"int {name}(void)") == 1
        assert text.count(f'"{name}"') == 1


@pytest.mark.parametrize("tool", [dryrun_tool, gpu_check], ids=["dryrun", "gpu_check"])
def test_help_is_in_sentences_with_defaults(tool: Any) -> None:
    for action in tool.make_parser()._actions[1:]:
        assert re.match(r"[A-Z].*\.$", action.help), action.dest
        assert "(default: " in action.help or not action.default, action.dest


# ---- the script under the pretended GPU ----------------------------------------------------------


def cuda_python() -> str:
    """A Python with a CUDA build of torch, and "" without one."""
    if named := os.environ.get("DRYRUN_PYTHON"):
        return named
    return sys.executable if torch.version.cuda else ""


needs_cuda_build = pytest.mark.skipif(
    not cuda_python(), reason="DRYRUN_PYTHON names no Python with a CUDA build of torch"
)


DryRun = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def dryrun(tmp_path: Path) -> DryRun:
    """The reports of a case, by what the command line says."""

    def run(*words: str) -> list[dict[str, Any]]:
        out = tmp_path / "report.json"
        command = [cuda_python(), str(TOOL), *words, "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (modes,) = json.loads(out.read_text()).values()
        return [*modes]

    return run


@needs_cuda_build
def test_T_lowers_to_one_graph_that_the_host_does_not_wait_for(dryrun: DryRun) -> None:
    (mode,) = dryrun("--preset", "T")
    assert (mode["graphs"], mode["breaks"], mode["late_graphs"]) == (1, 0, 0)
    assert mode["host_waits"] == []
    assert mode["attention"] == "cudnn"
    assert mode["layers"] == 14
    calls = {
        (kernels["part"], kernels["times"])
        for kernels in mode["kernels"]
        if kernels["group"] == "attention"
    }
    assert calls == {("forward", 14), ("backward", 14)}
    # What is kept for the backward pass is there at the peak.
    assert 0 < mode["saved_gb"] < mode["peak_gb"] < 79.19 * 1.0737


@needs_cuda_build
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "K"], "--set K: it is not NAME=VALUE\n"),
        (["--preset", "naive", "--mode", "1"], "--mode 1: there are 1 modes\n"),
        (["--set", "NUM_LOOPS=x"], "NUM_LOOPS='x' is not an integer\n"),
    ],
)
def test_a_mistake_is_told_in_a_line(words: list[str], told: str) -> None:
    command = [cuda_python(), str(TOOL), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, told)


@needs_cuda_build
def test_a_gpu_that_is_too_small_is_told(dryrun: DryRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRYRUN_GIB", "0.5")
    with pytest.raises(AssertionError, match="out of memory"):
        dryrun("--preset", "naive,tiny", "--micro-batch", "1048576", "--set", "COMPILE=off")


@needs_cuda_build
def test_waits_of_the_host_are_seen(tmp_path: Path) -> None:
    """A step that reads a value of the device is caught: else "no host waits" would say nothing."""
    job = tmp_path / "job.py"
    job.write_text(
        "import torch\nx = torch.ones(3, device='cuda')\nprint((x + 1).sum().item())\n"
        "torch.cuda.synchronize()\n"
    )
    environment = os.environ | dict(DRYRUN_TRACE=str(tmp_path / "trace"))
    command = [cuda_python(), str(TOOL), "--exec", str(job)]
    subprocess.run(command, check=True, env=environment)
    # Imports start other processes, which trace nothing.
    (path,) = (p for p in tmp_path.glob("trace.*") if p.stat().st_size)
    waits = roofline.host_waits(roofline.read_trace(path))
    assert "cudaStreamSynchronize" in waits  # of `item`
    assert "cudaDeviceSynchronize" in waits


@needs_cuda_build
def test_a_part_that_is_cut_off_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    """The whole check takes minutes; here one part has no time, another runs to its end."""
    words = ["--only", "environment", "attention", "--out", str(tmp_path), "--minutes"]
    command = [cuda_python(), str(TOOL), "--exec", gpu_check.__file__, *words]
    done = subprocess.run([*command, "30"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu_check.json").read_text())
    assert parts["environment"]["figures"]["device"]["name"].startswith("NVIDIA H100")
    assert {*parts["attention"]["figures"]} == {"math", "cudnn", "flash"}
    assert "| attention, cudnn | forward ms | 0.24 |" in done.stdout
    done = subprocess.run([*command, "0.1"], capture_output=True, text=True)
    assert done.returncode == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())
    assert all("cut off" in part["failure"] for part in parts.values())


@needs_cuda_build
@pytest.mark.parametrize("system", ["T", "growing"])
def test_eight_ranks_train_export_and_score(
    system: str, tmp_path: Path, corpus: dict[str, str]
) -> None:
    """PyTorch's process group for NCCL, and gloo's beside it; in the end all ranks agree."""
    settings = dict(
        PRESET=f"{system},tiny",
        COMPILE="off",
        ITERATIONS="6",
        WARMUP_STEPS="1",
        LOG_DIR=str(tmp_path),
        RUN_ID="run",
        DRYRUN_GPUS="8",
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    command = [cuda_python(), str(TOOL), "--exec", *launch, str(ROOT / "train_gpt.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | corpus | settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["world_size"] == 8
    assert result["steps"] == 6
    assert "NVIDIA H100" in result["versions"]["device"]
