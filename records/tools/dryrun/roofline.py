"""What a traced step would cost on an H100: from launches to milliseconds, in plain arithmetic.

A trace is a file of tab-separated lines `kind, name, four numbers`, which the stand-ins in c/ and
session.py write. Lines of kind `mark` begin a part of the step (forward, backward, optimizer). A
kernel takes the longest of three times: its bytes at the memory's speed, its operations at the
matrix units' speed, and a floor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# What of an H100 SXM's peak is reached, fitted to published logs (README.md beside this file).
BANDWIDTH = 0.85 * 3.35e12  # bytes a second
TENSOR_CORES = 0.70 * 989e12  # floating-point operations a second, dense bfloat16 or float16
OTHER_CORES = 0.70 * 67e12  # float32 without TF32, float64
ATTENTION_FORWARD = 288e12  # of the causal half's operations; cuDNN, head width 64, 1,024 tokens
ATTENTION_BACKWARD = 250e12
NVLINK = 350e9  # bytes a second of an all-reduce over 8 GPUs, in each direction
FLOOR = 2.5e-6  # seconds of the shortest kernel

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Launches of Triton are told by `bytes` lines; the others take no time on the device.
SILENT = frozenset(("triton", "malloc", "hostalloc"))
HOST_WAITS = frozenset(("wait", "waitcopy"))
# Every call of an attention kernel launches one of these, and which one says what PyTorch chose.
ATTENTION_KERNELS = {
    "cudnn": re.compile("cudnnBackendExecute"),
    "flash": re.compile("flash_(fwd|bwd_dq_dk_dv)"),
    "efficient": re.compile("fmha_cutlass"),
}


class Event(NamedTuple):
    """A line of the trace, with the part of the step in which it stands."""

    part: str
    kind: str
    name: str
    numbers: tuple[int, int, int, int]


class Attention(NamedTuple):
    """Shapes of one call: B sequences of T tokens, H query and K key/value heads of width E."""

    sequences: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    item_bytes: int = 2


class Cost(NamedTuple):
    """Of one kernel, or of many together."""

    seconds: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0


class Line(NamedTuple):
    """Equal kernels of one part of a step."""

    part: str
    group: str  # gemm, attention, triton, aten, memset, copy, nccl
    name: str
    times: int  # how often it is launched
    cost: Cost
    registers: int = 0
    spilled: int = 0  # bytes of registers a thread that lie in memory


def read_trace(path: Path) -> list[Event]:
    """The events of a trace; ValueError if a line is none."""
    part = ""
    events = []
    for text in path.read_text().splitlines():
        try:
            kind, name, a, b, c, d = text.split("\t")
            numbers = int(a), int(b), int(c), int(d)
        except ValueError:
            raise ValueError(f"{path}: {text!r} is no line of a trace") from None
        if kind == "mark":
            part = name
        else:
            events.append(Event(part, kind, name, numbers))
    return events


def matrix_product(dtype: str, m: int, n: int, k: int, batch: int) -> Cost:
    """So many products [m, k] x [k, n]; operands and result are of one type, each is moved once."""
    flop = 2.0 * m * n * k * batch
    moved = ITEM_BYTES.get(dtype, 4) * batch * (m * k + k * n + m * n)
    peak = TENSOR_CORES if dtype in ("bfloat16", "float16") else OTHER_CORES
    return Cost(max(flop / peak, moved / BANDWIDTH, FLOOR), flop, moved)


def attention_call(shape: Attention, backward: bool) -> Cost:
    """Causal attention: each token sees (T + 1) / 2 others on average.

    The backward pass makes five products where the forward pass makes two, and moves q, k, v, the
    output and the gradients of all of them.
    """
    B, T, H, K, E, item = shape
    flop = 4.0 * B * H * E * T * (T + 1) / 2
    queries = item * B * T * H * E
    keys_and_values = 2 * item * B * T * K * E
    if backward:
        flop *= 2.5
        moved = 2 * (2 * queries + keys_and_values)
        return Cost(max(flop / ATTENTION_BACKWARD, moved / BANDWIDTH, FLOOR), flop, moved)
    moved = 2 * queries + keys_and_values
    return Cost(max(flop / ATTENTION_FORWARD, moved / BANDWIDTH, FLOOR), flop, moved)


def all_reduce(moved: int, ranks: int) -> Cost:
    """A ring: every rank sends and receives all bytes but its own share, twice."""
    return Cost(max(2 * (ranks - 1) / ranks * moved / NVLINK, FLOOR), 0.0, moved)


def attention_kernel(name: str) -> str:
    """Which kind of attention kernel this is, and "" if it is none."""
    for kind, pattern in ATTENTION_KERNELS.items():
        if pattern.search(name):
            return kind
    return ""


def is_backward(event: Event) -> bool:
    """cuDNN's kernels have no names; where a kernel has one, it tells."""
    return "bwd" in event.name or ("fwd" not in event.name and event.part == "backward")


def short(name: str) -> str:
    """The mangled name of a kernel of torch without what all have in common."""
    return re.sub(r"^_ZN2at6native\d*|_GLOBAL__N__\w+?_cu_\w{8}_?\d*", "", name)[:90]


def line_of(event: Event, shape: Attention) -> Line:
    """One event as a line of the table."""
    part, kind, name, numbers = event
    if kind == "gemm":
        m, n, k, batch = numbers
        return Line(part, "gemm", f"{name} {m}x{n}x{k}x{batch}", 1, matrix_product(name, *numbers))
    if kind == "bytes":
        moved, registers, spilled, _ = numbers
        cost = Cost(max(moved / BANDWIDTH, FLOOR), 0.0, moved)
        return Line(part, "triton", name, 1, cost, registers, spilled)
    if kind == "nccl":
        return Line(part, "nccl", name, 1, all_reduce(numbers[2], numbers[3]))
    if kind == "copy":
        return Line(part, "copy", name, 1, Cost(bytes=numbers[0]))
    if kind == "kernel" and (taken := attention_kernel(name)):
        backward = is_backward(event)
        name = f"{taken} {'backward' if backward else 'forward'}"
        return Line(part, "attention", name, 1, attention_call(shape, backward))
    group = "aten" if kind == "kernel" else kind
    return Line(part, group, short(name), 1, Cost(FLOOR))


def add(a: Cost, b: Cost) -> Cost:
    return Cost(a.seconds + b.seconds, a.flop + b.flop, a.bytes + b.bytes)


def launches(events: Iterable[Event]) -> Iterator[Event]:
    """The events that are work of the device."""
    for event in events:
        if event.kind not in SILENT | HOST_WAITS:
            yield event


def tabulate(events: Iterable[Event], shape: Attention) -> list[Line]:
    """Equal kernels of a part together, the most expensive first."""
    table: dict[tuple[str, str, str], Line] = {}
    for event in launches(events):
        line = line_of(event, shape)
        key = line[:3]
        if key in table:
            known = table[key]
            line = known._replace(times=known.times + 1, cost=add(known.cost, line.cost))
        table[key] = line
    return sorted(table.values(), key=lambda line: -line.cost.seconds)


def by_group(table: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """The lines of a table added up by part and group."""
    groups: dict[tuple[str, str], Line] = {}
    for line in table:
        key = line.part, line.group
        if key in groups:
            known = groups[key]
            line = line._replace(times=known.times + line.times, cost=add(known.cost, line.cost))
        groups[key] = line._replace(name="")
    return groups


def milliseconds(table: Iterable[Line], group: str = "") -> float:
    """Of a group of kernels, or of all."""
    return 1e3 * sum(line.cost.seconds for line in table if group in ("", line.group))


def host_waits(events: Iterable[Event]) -> list[str]:
    """What the host waited for, in order."""
    return [event.name for event in events if event.kind in HOST_WAITS]


def attention_taken(events: Iterable[Event]) -> str:
    """The kinds of attention kernels in a trace; plain products and a softmax are none."""
    found = {attention_kernel(event.name) for event in events if event.kind == "kernel"}
    return "+".join(sorted(found - {""})) or "math"
