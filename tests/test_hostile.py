"""Files of somebody else: artifacts, checkpoints, shards, tokenizers are read or refused.

In bounded time and memory, whatever is in them. Every parser reads mutants of valid files, made by
code that knows the format: checksums, lengths and streams around a changed value fit again, so that
it arrives where it can do harm. They are read in forked children: a crash of C code is a finding,
not the end of the tests. A mutant follows from its parser and number alone.

    FUZZ_EXAMPLES=100000 python -m pytest -n 0 -s tests/test_hostile.py   # prints counts

A new parser is an entry of PARSERS: valid files, what changes them, what reads one.
"""

import contextlib
import faulthandler
import functools
import importlib.util
import json
import lzma
import math
import os
import pickle
import re
import resource
import signal
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
from helpers import (
    ARTIFACT_MAGIC,
    CHECKPOINT_MAGIC,
    EXACT,
    one_rank,
    parts_of,
    sealed,
    shard_bytes,
    tokenizer_bytes,
)

import train_gpt as tg

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of forked children: Linux")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))  # mutants for each parser
BATCH = 1000  # mutants for each child
WAIT = 600.0  # seconds after which an input is taken to wait for ever, however loaded the machine
GROWTH, SPACE = 256 << 20, 1 << 30  # what one input may take of memory, and of addresses, bytes
RUNS = {
    "compile",
    "exec",
    "import",
    "os.exec",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "subprocess.Popen",
}  # audit events (PEP 578) that no data may cause


class Parser(NamedTuple):
    """What reads files of one kind."""

    valid: list[bytes]  # files it must read
    mutate: Callable[[Random, bytes], bytes]
    read: Callable[[bytes, Path], object]  # asserts that what it reads, or puts at a path, is sound
    seconds: float = 20.0  # of the processor for one input; one that waits has WAIT


class Outcome(NamedTuple):
    """What came of one input."""

    number: int  # of the input
    verdict: str  # "accepted", "refused", or what went wrong
    seconds: float = 0.0  # of the processor
    growth: int = 0  # bytes by which the child's peak of resident memory rose


# ---- Children


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def attempt(parser: Parser, data: bytes, path: Path, events: list[str]) -> str:
    """Reads one input: the verdict. `events` are the audit events so far."""
    events.clear()
    verdict = "accepted"
    try:
        parser.read(data, path)
    except tg.InputError as error:
        said, verdict = str(error), "refused"
        if not said.isprintable() or len(said) > 1000:  # lines, what a terminal obeys, megabytes
            verdict = f"message of {len(said)} characters: {said[:200]!r}"
    except Exception:  # whatever else it raises is a finding
        return traceback.format_exc(-3)[-1500:]
    return f"runs {sorted(set(events))}" if RUNS & set(events) else verdict


def child(parser: Parser, inputs: Iterator[tuple[int, bytes]], path: Path, report: int) -> None:
    """Reads inputs one by one and writes an outcome for each; an alarm ends it if one hangs."""
    faulthandler.disable()
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
    torch.set_num_threads(1)  # OpenMP's other threads did not come along through the fork
    hints = get_type_hints(tg.Architecture)  # evaluates our own annotations: no event of an input
    pytest.MonkeyPatch().setattr(tg, "get_type_hints", {tg.Architecture: hints}.get)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event))
    for number, data in inputs:
        before, start = peak(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, parser.seconds)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        verdict = attempt(parser, data, path, events)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome = Outcome(number, verdict, time.process_time() - start, peak() - before)
        os.write(report, json.dumps(outcome).encode() + b"\n")


def in_child(
    parser: Parser, inputs: Iterator[tuple[int, bytes]], folder: Path
) -> tuple[list[Outcome], str]:
    """Outcomes as far as a child came, and what it died of."""
    ours, theirs = os.pipe()
    errors = folder / "stderr"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            log = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 2)  # libraries write there
            child(parser, inputs, folder / "input", theirs)
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours) as lines:
        outcomes = [Outcome(*json.loads(line)) for line in lines if line.endswith("\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    cause = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    return outcomes, f"{cause}: {errors.read_text(errors='replace')[-500:]}" if status else ""


def outcomes_of(
    parser: Parser, input_of: Callable[[int], bytes], count: int, folder: Path
) -> list[Outcome]:
    """Outcomes of inputs 0 to count - 1; of one that a child dies of, its death."""
    outcomes: list[Outcome] = []
    while (done := len(outcomes)) < count:
        numbers = range(done, min(done + BATCH, count))
        some, death = in_child(parser, ((i, input_of(i)) for i in numbers), folder)
        outcomes += some
        if death:
            outcomes.append(Outcome(len(outcomes), death))
    return outcomes


def findings(outcomes: list[Outcome]) -> list[Outcome]:
    return [x for x in outcomes if x.verdict not in ("accepted", "refused") or x.growth > GROWTH]


# ---- Mutations of any bytes

EDGES = [
    struct.pack(kind, value)
    for kind in ("<b", "<h", "<i", "<q")
    for value in (
        0,
        1,
        -1,
        2 ** (8 * struct.calcsize(kind) - 1) - 1,
        -(2 ** (8 * struct.calcsize(kind) - 1)),
    )
]


def damaged(draw: Random, data: bytes) -> bytes:
    """A few places flipped, overwritten, cut out, filled in, doubled; or the end is missing."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        at, length, way = (
            draw.randrange(len(out) + 1),
            draw.choice((1, 2, 4, 8, 60)),
            draw.randrange(6),
        )
        edge = draw.choice(EDGES)
        if way == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            out[at : at + len(edge)] = edge
        elif way == 2:
            del out[at : at + length]
        elif way == 3:
            out[at:at] = draw.randbytes(length)
        elif way == 4:
            start = draw.randrange(len(out) + 1)
            out[at:at] = out[start : start + length]
        elif draw.random() < 0.2:
            del out[at:]
    return bytes(out)


# ---- Artifacts

SHRINK: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda raw: raw,
    "zlib": lambda raw: zlib.compress(raw, 1),
    "lzma": lambda raw: lzma.compress(raw, preset=0),
}
if importlib.util.find_spec("brotli"):
    import brotli

    SHRINK["brotli"] = lambda raw: brotli.compress(raw, quality=1)

SMALL: dict[str, Any] = dict(
    vocab_size=16, model_dim=8, num_heads=2, num_kv_heads=1, train_seq_len=8, dtype="float32"
)
FLAT: dict[str, Any] = SMALL | tg.PLAIN | dict(num_layers=2)
LOOPED: dict[str, Any] = SMALL | dict(
    num_prelude=1,
    num_shared=1,
    num_loops=2,
    num_coda=1,
    core_skips="all",
    pass_scale_init=0.5,
    feedback_rank=1,
    smear_gate="document",
    bigram_vocab_size=8,
    bigram_dim=2,
    ve_layers="2",
    ve_dim=2,
    use_unique_norms=True,
    depth_embed="learned",
    tie_embeddings=False,
)


def artifact(
    text: bytes,
    values: bytes,
    codec: str,
    size: int | None = None,
    length: int | None = None,
    magic: bytes = ARTIFACT_MAGIC,
) -> bytes:
    """From the header's text and the values; `size` and `length` are what it says of itself."""
    raw = struct.pack("<I", len(text) if size is None else size) + text + values
    name, length = codec.encode(), len(raw) if length is None else length
    return sealed(struct.pack("<8sQ", name, length) + SHRINK[codec](raw), magic)


def fitting(values: dict[str, Any], fill: bytes, limit: int) -> tuple[dict[str, Any], bytes] | None:
    """Header and values that agree with an architecture, which may make no sense otherwise.

    None if there is no such model, or one of more than `limit` bytes.
    """
    try:
        with torch.device("meta"):
            parameters = list(tg.GPT(tg.Architecture.from_json(values)).named_parameters())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    entries, count = [], 0
    for name, p in parameters:
        rounded = bool(tg.role_of(p).bits)
        entries.append([name, "int8" if rounded else "float16"])
        count += p.numel() + 2 * len(p) if rounded else 2 * p.numel()
    return None if count > limit else (dict(architecture=values, tensors=entries), fill * count)


SMALL_INTEGERS = (-1, 0, 1, 2, 3, 4, 7, 8, 16, 64, 255, 256, 257, 1023, 1024, 4096)
LARGE_INTEGERS = (65535, 65536, 65537, 1 << 17, 1 << 20, 2**31, 2**32, 2**63, 10**400)
TINY_AND_HUGE = (0.5, -0.0, 1e-45, 1e30, 3.4e38, 3.5e38, 1e39, 1.7e308)
NO_NUMBERS = (math.nan, math.inf, -math.inf)
NUMBERS = [*SMALL_INTEGERS, *LARGE_INTEGERS, *TINY_AND_HUGE, *NO_NUMBERS]
NAMES = ("", "none", "all", "published", "learned", "bfloat16", "float16", "float32", "pickle")
ODD_TEXTS = ("16", " 8", "1_6", "nan", "int8", "int2", "int9", "\0", "\x1b[2J\n\u202e", "\ud800")
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
ODD: list[Any] = [None, True, False, *NAMES, *ODD_TEXTS, "x" * 5000, [], {}, [[]] * 3, DEEP]
ODD += [{"architecture": {}}, [["tok_emb", "int8"]] * 2]


def changed(draw: Random, node: Any) -> Any:
    """A JSON value with one place changed: another value or name, missing, doubled, swapped."""
    if node and isinstance(node, dict | list) and draw.random() < 0.9:
        keys: Sequence[Any] = list(node) if isinstance(node, dict) else range(len(node))
        copy: Any = node.copy()
        key, other, way = draw.choice(keys), draw.choice(keys), draw.randrange(12)
        if way == 0:
            del copy[key]
        elif way == 1:
            copy[key], copy[other] = copy[other], copy[key]
        elif way == 2 and isinstance(copy, list):
            copy.insert(key, copy[other])
        elif way == 2:
            copy[str(draw.choice(ODD))] = copy.pop(key)
        else:
            copy[key] = changed(draw, copy[key])
        return copy
    return draw.choice(NUMBERS if draw.random() < 0.6 else ODD)


def changed_text(draw: Random, text: bytes) -> bytes:
    """JSON that a serialiser would not write."""
    ways: list[Callable[[], bytes]] = [
        lambda: damaged(draw, text),
        lambda: b"[" * 100_000,
        lambda: b'{"architecture":' * 100_000,
        lambda: text.decode().encode(draw.choice(("utf-16", "utf-32-le", "utf-8-sig"))),
        lambda: text * 2,
        lambda: re.sub(
            rb"\d+", b"9" * draw.choice((30, 4300, 5000)), text, count=draw.choice((1, 3))
        ),
        lambda: re.sub(
            rb"\d+", draw.choice((b"NaN", b"-Infinity", b"1e999", b"0x10")), text, count=2
        ),
        lambda: text[:-1] + b',"tensors":[]}',
        lambda: text.replace(b'"', b'"\xff\xed\xa0\x80', 1),
        lambda: text.replace(b'"', rb'"\ud800\u001b', draw.randrange(9)),
        lambda: b"",
    ]
    return draw.choice(ways)()


@functools.cache
def bomb(codec: str) -> bytes:
    """A stream that becomes 64 MiB: a header of empty objects, then zeros."""
    text = b"[" + b"{}," * 20_000_000 + b"{}]"
    return SHRINK[codec](struct.pack("<I", len(text)) + text + bytes((1 << 26) - len(text) - 4))


def odd_lengths(draw: Random) -> tuple[int | None, int | None]:
    """What a file may say of its header and of its stream; None: the truth."""
    whole = [x for x in (*SMALL_INTEGERS, *LARGE_INTEGERS) if x >= 0]
    return (
        draw.choice([None, *(x for x in whole if x < 1 << 32)]),
        draw.choice([None, *(x for x in whole if x < 1 << 64)]),
    )


def mutated_artifact(draw: Random, data: bytes) -> bytes:
    header, values, codec = parts_of(data)
    text, way = json.dumps(header).encode(), draw.randrange(200)
    size = length = None
    if way < 60:
        text = json.dumps(changed(draw, header)).encode()
    elif way < 110:  # an architecture somewhere else, or nowhere, with all that would belong to it
        strange = header["architecture"]
        for _ in range(draw.choice((1, 1, 2, 3))):
            name = draw.choice([*strange])
            strange = strange | {name: draw.choice(NUMBERS if draw.random() < 0.8 else ODD)}
        fill = draw.choice((b"\0", b"\x01", b"\x3c", b"\x7b", b"\x7c", b"\xff"))
        made = fitting(strange, fill, 1 << 20)
        header, values = made or (header | dict(architecture=strange), values)
        text = json.dumps(header).encode()
    elif way < 130:
        text = changed_text(draw, text)
    elif way < 160:
        values = damaged(draw, values)
    elif way < 180:
        codec = draw.choice([*SHRINK])
        size, length = odd_lengths(draw)
    elif way < 199:  # the stream itself, and what says what it is
        return sealed(damaged(draw, data[40:])) if draw.random() < 0.8 else damaged(draw, data)
    else:
        announced = draw.choice((1 << 20, 1 << 26))
        return sealed(struct.pack("<8sQ", codec.encode(), announced) + bomb(codec))
    return artifact(text, values, codec, size, length)


def read_artifact(data: bytes, path: Path) -> None:
    model, a, _ = tg.load_model(data, "the file")
    assert model.tok_emb.shape == (a.vocab_size, a.model_dim)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    ids = torch.arange(min(a.train_seq_len, 4))[None] % a.vocab_size
    with torch.no_grad():
        assert model(ids, ids, model.scoring).shape == ()


def artifacts() -> Parser:
    torch.manual_seed(0)
    valid = []
    for values in (FLAT, LOOPED):
        model = tg.GPT(tg.Architecture(**values), 0.1)
        packed = tg.pack(model, tg.Config(**values))
        header, raw, _ = parts_of(packed)
        valid += [artifact(json.dumps(header).encode(), raw, codec) for codec in SHRINK]
    return Parser(valid, mutated_artifact, read_artifact)


# ---- Checkpoints


class Quiet:
    """What a run logs to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def size(self) -> int:
        return 0

    def cut_metrics(self, size: int) -> None:
        assert isinstance(size, int)

    def __call__(self, text: str) -> None:
        assert text.isprintable() and len(text) < 2000


@functools.cache
def trainer() -> tg.Trainer:
    config = tg.Config(**FLAT, iterations=9, max_wallclock_seconds=0.0)
    torch.manual_seed(0)
    batches: Any = SimpleNamespace(tokens=SimpleNamespace(total=99), accumulation=1)
    return tg.Trainer(config, one_rank(), tg.GPT(config.architecture(), 0.1), batches)


def mutated_checkpoint(draw: Random, data: bytes) -> bytes:
    header, values, codec = parts_of(data)
    text, way = json.dumps(header).encode(), draw.randrange(10)
    size = length = None
    if way < 3:
        text = json.dumps(changed(draw, header)).encode()
    elif way < 5:  # the counters say how far the run is
        counters = header["progress"]
        counters[draw.choice([*counters])] = draw.choice(NUMBERS if draw.random() < 0.8 else ODD)
        text = json.dumps(header).encode()
    elif way < 6:
        text = changed_text(draw, text)
    elif way < 7:
        values = damaged(draw, values)
    elif way < 8:
        at = 4 * draw.randrange(len(values) // 4)
        number = draw.choice((math.nan, math.inf, -1.0, 1e30, 0.5, 10.0, draw.random()))
        values = values[:at] + struct.pack("<f", number) + values[at + 4 :]
    elif way < 9:
        codec = draw.choice([*SHRINK])
        size, length = odd_lengths(draw)
    else:
        if draw.random() < 0.8:
            return sealed(damaged(draw, data[40:]), CHECKPOINT_MAGIC)
        return damaged(draw, data)
    return artifact(text, values, codec, size, length, CHECKPOINT_MAGIC)


def read_checkpoint(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    config, log = replace(trainer().config, resume=str(path)), Quiet(path.parent)
    warnings: list[str] = []
    found = tg.find_checkpoint(config, trainer(), warnings)
    anything: Any = log
    tg.restore(trainer(), found, anything)
    clock = trainer().clock
    assert isinstance(trainer().step, int) and 0 <= trainer().step <= 9
    assert isinstance(trainer().average.count, int) and trainer().average.count >= 0
    assert math.isfinite(clock.seconds) and math.isfinite(clock.per_step) and clock.seconds >= 0
    assert isinstance(clock.due, int)
    assert all(p.isfinite().all() for p in trainer().params)


def checkpoints(folder: Path) -> Parser:
    log: Any = Quiet(folder)
    writer = tg.Checkpoints(trainer().config, trainer().world, 99, log)
    writer.save(trainer())
    wait(writer.pending)
    valid = [path.read_bytes() for path in folder.glob("*.ckpt")]
    return Parser(valid, mutated_checkpoint, read_checkpoint)


# ---- Shards

VOCAB = 64


def mutated_shard(draw: Random, data: bytes) -> bytes:
    way, out = draw.randrange(6), bytearray(data)
    if way == 0:
        return damaged(draw, data)
    if way == 1:  # one of the header's integers, mostly one that is read
        value = draw.choice([x for x in (*SMALL_INTEGERS, *LARGE_INTEGERS) if x < 2**31])
        struct.pack_into("<i", out, 4 * draw.choice((0, 1, 2, 2, 2, draw.randrange(256))), value)
    elif way == 2:  # a size that no count, or another one, belongs to
        del out[draw.randrange(len(out) + 1) :]
    elif way == 3:
        out += draw.randbytes(draw.choice((1, 2, 3, 1024)))
    elif way == 4:
        out = bytearray(out[:1024].ljust(1024, b"\0") + damaged(draw, data[1024:]))
    if way in (2, 3, 4) and draw.random() < 0.5 and len(out) >= 12:  # a count that fits
        struct.pack_into("<i", out, 8, (len(out) - 1024) // 2)
    if way == 5:
        for _ in range(draw.choice((0, 1, 9))):
            at = 1024 + 2 * draw.randrange((len(out) - 1024) // 2)
            struct.pack_into("<H", out, at, draw.choice((0, VOCAB - 1, VOCAB, 32767, 32768, 65535)))
    return bytes(out)


def read_shard(data: bytes, path: Path) -> None:
    """Behind a shard that is fine, with as much of both as an epoch and a bit reads."""
    folder = path.with_name("shards")
    folder.mkdir(exist_ok=True)
    (folder / "fineweb_train_000000.bin").write_bytes(shard_bytes(range(20)))
    (folder / "fineweb_train_000001.bin").write_bytes(data)
    config = replace(tg.Config(), data_path=str(folder), vocab_size=VOCAB, train_seq_len=8)
    tokens = tg.Tokens(config, "train")
    assert tokens.total == 20 + (len(data) - 1024) // 2
    ids = tokens.read(7, tokens.total)
    assert ids.shape == (tokens.total,) and 0 <= ids.min() <= ids.max() < VOCAB


def shards() -> Parser:
    draw = Random(0)
    sizes = (1, 2, 500, 4000)
    return Parser(
        [shard_bytes([draw.randrange(VOCAB) for _ in range(n)]) for n in sizes],
        mutated_shard,
        read_shard,
    )


# ---- Tokenizers: protocol buffers, a message being a sequence of tagged fields


class Field(NamedTuple):
    """Wire type 0 is a number, 1 and 5 are eight and four bytes, 2 is a run of bytes."""

    number: int
    wire: int
    value: Any  # int, or else bytes


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("a varint without an end")


def fields_of(data: bytes) -> list[Field]:
    """ValueError if this is no message."""
    fields: list[Field] = []
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise ValueError(f"field {number}, wire type {wire}")
        if wire == 0:
            value, at = read_varint(data, at)
            fields.append(Field(number, wire, value))
            continue
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, at = read_varint(data, at)
        if at + size > len(data):
            raise ValueError("a field beyond the end")
        fields.append(Field(number, wire, data[at : at + size]))
        at += size
    return fields


def message(fields: list[Field]) -> bytes:
    out = b""
    for number, wire, value in fields:
        out += varint(number << 3 | wire)
        if wire == 2:
            out += varint(len(value))
        out += varint(value) if wire == 0 else value
    return out


INTEGERS = (*range(8), 63, 64, 65, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -1, -2)
REALS = (0.0, -0.0, 1e-45, 3.4e38, -3.4e38, math.nan, math.inf, -math.inf)
FLOATS = [struct.pack("<f", x) for x in REALS]
SPACE_BYTES = "\u2581".encode()
WORDS = (b"", b"\0", b"a", b"a" * 3000, b"\t", b"\x1b[2J\n", b"<0x41>", b"<0xZZ>", b"<s>", b"<unk>")
BROKEN_UTF8 = (b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x96", b"\xf4\x90\x80\x80")
PIECES = (*WORDS, *BROKEN_UTF8, SPACE_BYTES, SPACE_BYTES * 3)


def changed_field(draw: Random, field: Field) -> Field:
    number, wire, value = field
    if draw.random() < 0.03:
        return Field(draw.choice((1, 2, 3, 4, 5, 200, 2**29 - 1)), wire, value)
    if wire == 0:
        return Field(number, 0, draw.choice(INTEGERS))
    if wire == 5 and draw.random() < 0.8:
        return Field(number, wire, draw.choice(FLOATS))
    if wire != 2:
        return Field(number, wire, draw.randbytes(len(value)))
    with contextlib.suppress(ValueError):
        if value and draw.random() < 0.8 and (inner := fields_of(value)):
            return Field(number, 2, changed_message(draw, inner))
    return Field(number, 2, draw.choice(PIECES) if draw.random() < 0.4 else damaged(draw, value))


def changed_message(draw: Random, fields: list[Field]) -> bytes:
    """A message with one field changed, left out, doubled or swapped.

    Half of the time one of a rare number (the specifications and what is in them), not one of the
    many pieces.
    """
    out = fields.copy()
    rare = draw.choice([*dict.fromkeys(field.number for field in fields)])
    some = [i for i, f in enumerate(fields) if f.number == rare or draw.random() < 0.01]
    i, j, way = draw.choice(some), draw.randrange(len(out)), draw.randrange(20)
    if way == 0:
        del out[i]
    elif way == 1:
        out.insert(j, out[i])
    elif way == 2:
        out[i], out[j] = out[j], out[i]
    elif way == 3:
        out.insert(i, Field(draw.randrange(1, 50), 0, draw.choice(INTEGERS)))
    else:
        out[i] = changed_field(draw, out[i])
    return message(out)


def mutated_tokenizer(draw: Random, data: bytes) -> bytes:
    if draw.random() < 0.15:
        return damaged(draw, data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        with contextlib.suppress(ValueError):  # an earlier change may have cut it: then it stays so
            data = changed_message(draw, fields_of(data)) if data else data
    return data


def read_tokenizer(data: bytes, path: Path) -> None:
    """With the vocabulary that the file happens to have: its size is not what it fails on."""
    pieces = VOCAB
    with contextlib.suppress(ValueError):
        pieces = max([field.number for field in fields_of(data)].count(1), 2)
    path.write_bytes(data)
    counter = tg.ByteCounter.from_sentencepiece(path, pieces)
    for table in (counter.size, counter.space, counter.boundary):
        assert table.shape == (pieces,)
    assert counter.size.min() >= 0 and counter.size.sum() <= 3 * len(data)


def tokenizers(folder: Path) -> Parser:
    """Every model type; with the default tables of normalisation (240 kB), small ones, none.

    With a table for decoding, and with samples that SentencePiece encodes when it loads.
    """
    (folder / "rules").write_text("41\t61\n42 43\t62\n20 20\t20\n")
    (folder / "decoding").write_text("2581\t20\n61 62\t63\n")
    tables: dict[str, Any] = dict(
        normalization_rule_tsv=folder / "rules",
        denormalization_rule_tsv=folder / "decoding",
        self_test_sample_size=2,
    )
    plain: dict[str, Any] = dict(vocab_size=VOCAB, byte_fallback=False, character_coverage=0.98)
    large = tokenizer_bytes(**plain)
    valid = [large]
    small = [tokenizer_bytes(**EXACT, vocab_size=330, character_coverage=0.98)]
    for kind in ("bpe", "unigram", "char", "word"):
        small.append(tokenizer_bytes(**plain | tables, model_type=kind))
    valid += small * 4  # oftener, as the large one is slow
    return Parser(valid, mutated_tokenizer, read_tokenizer)


# ---- All of them

PARSERS: dict[str, Callable[[Path], Parser]] = {
    "artifact": lambda folder: artifacts(),
    "checkpoint": checkpoints,
    "shard": lambda folder: shards(),
    "tokenizer": tokenizers,
}


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports what reading a valid file imports: in a child it would be an event of the input."""
    for name, make in PARSERS.items():
        folder = tmp_path_factory.mktemp(name)
        made = make(folder)
        for data in made.valid:
            made.read(data, folder / "input")


@pytest.fixture(scope="module", params=PARSERS)
def parser(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Parser]:
    return request.param, PARSERS[request.param](tmp_path_factory.mktemp("valid"))


def mutant(name: str, parser: Parser, number: int) -> bytes:
    draw = Random(f"{name} {number}")
    return parser.mutate(draw, draw.choice(parser.valid))


def test_valid_files_are_read(parser: tuple[str, Parser], tmp_path: Path) -> None:
    """Otherwise every mutant would be refused for the wrong reason."""
    _, p = parser
    outcomes = outcomes_of(p, p.valid.__getitem__, len(p.valid), tmp_path)
    assert {x.verdict for x in outcomes} == {"accepted"}


def test_mutants_are_read_or_refused(parser: tuple[str, Parser], tmp_path: Path) -> None:
    name, p = parser
    if name == "artifact":
        for codec in SHRINK:
            bomb(codec)  # made once, not in every child
    outcomes = outcomes_of(p, functools.partial(mutant, name, p), EXAMPLES, tmp_path)
    bad, count = findings(outcomes), [x.verdict for x in outcomes].count
    slowest = max(outcomes, key=lambda x: x.seconds)
    largest = max(outcomes, key=lambda x: x.growth)
    print(
        f"\n{name}: inputs {len(outcomes)}, refused {count('refused')}, "
        f"accepted {count('accepted')}, wrong {len(bad)}, slowest {slowest.seconds:.3f} s "
        f"(number {slowest.number}), peak memory growth {largest.growth >> 20} MiB "
        f"(number {largest.number})"
    )
    kinds = {x.verdict.strip().splitlines()[-1].split()[0]: x for x in bad}
    for kind, x in kinds.items():
        print(f"{kind} {x}")
    assert not bad, f"{len(bad)} of {name}, the first: {bad[0]}"
    assert len(outcomes) == EXAMPLES and count("refused") > EXAMPLES / 10 and count("accepted") > 0


# ---- What mutants found, or would have to be too large to find


def forged(values: dict[str, Any], **changes: Any) -> bytes:
    """The artifact of a model, with changes to its architecture that leave the parameters."""
    model = tg.GPT(tg.Architecture(**values), 0.1)
    header, raw, codec = parts_of(tg.pack(model, tg.Config(**values)))
    header["architecture"] |= changes
    return artifact(json.dumps(header).encode(), raw, codec)


def announced(codec: str) -> bytes:
    return sealed(struct.pack("<8sQ", codec.encode(), 1 << 26) + bomb(codec))


def renamed(name: str) -> bytes:
    header, raw, codec = parts_of(forged(FLAT))
    header["tensors"][0][0] = name
    return artifact(json.dumps(header).encode(), raw, codec)


def with_piece(piece: bytes, kind: int) -> bytes:
    """A tokenizer whose last piece is this one, of kind 1 (text) or 6 (a byte)."""
    fields = fields_of(tokenizer_bytes(**EXACT))
    last = max(i for i, field in enumerate(fields) if field.number == 1)
    content = [Field(1, 2, piece), Field(2, 5, bytes(4)), Field(3, 0, kind)]
    fields[last] = Field(1, 2, message(content))
    return message(fields)


CASES: dict[str, tuple[Callable[[bytes, Path], None], Callable[[], bytes]]] = {
    **{f"{codec} bomb": (read_artifact, functools.partial(announced, codec)) for codec in SHRINK},
    "header of 48 MB": (
        read_artifact,
        lambda: artifact(b"[" + b"{}," * 16_000_000 + b"{}]", Random(0).randbytes(1 << 20), "zlib"),
    ),
    "gain beyond float32": (read_artifact, lambda: forged(FLAT, qk_gain_init=1e39)),
    "cap beyond float32": (read_artifact, lambda: forged(FLAT, timestep_gamma_max=1e39)),
    "gigabytes of rotary tables": (
        read_artifact,
        lambda: forged(
            FLAT | dict(model_dim=512, num_heads=1, num_layers=1, mlp_mult=0.01),
            train_seq_len=1 << 17,
        ),
    ),
    "control characters": (read_artifact, lambda: renamed("\x1b[2J\n")),
    "long name": (read_artifact, lambda: renamed("x" * 100_000)),
    "piece that is not UTF-8": (read_tokenizer, lambda: with_piece(b"\xff", 1)),
    "byte piece that is none": (read_tokenizer, lambda: with_piece(b"\xff\n", 6)),
    "byte piece with controls": (read_tokenizer, lambda: with_piece(b"\x1b[2J\n", 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_case_is_refused(tmp_path: Path, case: str) -> None:
    read, make = CASES[case]
    data = make()
    outcomes = outcomes_of(Parser([], damaged, read), [data].__getitem__, 1, tmp_path)
    assert [x.verdict for x in outcomes] == ["refused"] and not findings(outcomes)


def test_unchanged_forgeries_are_read(tmp_path: Path) -> None:
    """Otherwise the cases above would be refused for the wrong reason."""
    files = [
        (read_artifact, forged(FLAT)),
        (read_artifact, renamed("tok_emb")),
        (read_tokenizer, with_piece("\u00e9".encode() * 3, 1)),
    ]
    for read, data in files:
        outcomes = outcomes_of(Parser([], damaged, read), [data].__getitem__, 1, tmp_path)
        assert [x.verdict for x in outcomes] == ["accepted"]


# ---- These tests themselves


def complain(error: Exception) -> None:
    raise error


def look_for_module() -> None:
    with contextlib.suppress(ImportError):
        __import__("named_by_an_artifact")


def wait_for_ever() -> None:
    """What would take WAIT to end: the alarm is set, and here it comes early."""
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert left > 0
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()


def loop_for_ever() -> None:
    while True:
        pass


HARM: dict[str, tuple[Callable[[], object], str]] = {
    "crash": (os.abort, "SIGABRT"),
    "hang": (wait_for_ever, "SIGALRM"),
    "endless loop": (loop_for_ever, "SIGPROF"),
    "exit": (lambda: sys.exit(0), "exit code"),
    "other error": (lambda: complain(KeyError("x")), "KeyError"),
    "unsound": (lambda: complain(AssertionError()), "AssertionError"),
    "two lines": (lambda: complain(tg.InputError("a\nb")), "message of 3"),
    "endless line": (lambda: complain(tg.InputError("a" * 10**6)), "message of 1000000"),
    "memory": (lambda: complain(tg.InputError(str(len(b"x" * (GROWTH * 2))))), "refused"),
    "addresses": (lambda: bytes(2 * SPACE), "MemoryError"),
    "import": (look_for_module, "runs"),
    "shell": (lambda: os.system("true"), "runs"),
    "unpickling": (lambda: pickle.loads(b"cos\ngetpid\n."), "runs"),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_found(tmp_path: Path, harm: str) -> None:
    """One harmful input of three; those around it are read all the same."""
    act, verdict = HARM[harm]

    def read(data: bytes, path: Path) -> None:
        if data:
            act()

    parser = Parser([], damaged, read, seconds=0.5 if harm == "endless loop" else 20.0)
    outcomes = outcomes_of(parser, [b"", b"x", b""].__getitem__, 3, tmp_path)
    assert [x.number for x in outcomes] == [0, 1, 2]
    assert [x.number for x in findings(outcomes)] == [1] and verdict in outcomes[1].verdict


def test_mutants_follow_from_their_number(parser: tuple[str, Parser]) -> None:
    assert len({mutant(*parser, number) for number in (5, 6, 5, 6, 7)}) == 3
