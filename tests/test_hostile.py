"""Artifacts, checkpoints, shards, tokenizers of somebody else: read or refused, in bounded time and memory.

Every parser reads mutants of valid files, made by code that knows the format: checksums, lengths and streams
around a changed value fit again, so that it arrives where it can do harm. They are read in forked children: a
crash of C code is a finding, not the end of the tests. A mutant follows from its parser and number alone.

    FUZZ_EXAMPLES=100000 python -m pytest -s tests/test_hostile.py     # hundreds by default; prints counts

A new parser is an entry of PARSERS: valid files, what changes them, what reads one, what it may raise.
"""

import contextlib
import faulthandler
import functools
import hashlib
import importlib.util
import io
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
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import pytest
import sentencepiece as spm
import torch
from test_data import CORPUS, EXACT, shard_bytes, tokenizer_bytes

import train_gpt as tg

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of forked children: Linux")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))  # mutants for each parser
BATCH = 1000  # mutants for each child
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
    valid: list[bytes]  # files it must read
    mutate: Callable[[Random, bytes], bytes]
    read: Callable[
        [bytes, Path], None
    ]  # a file's bytes, a path for them; asserts that what is read is sound
    refusals: tuple[type[Exception], ...] = (tg.InputError,)  # what it documents
    seconds: float = 20.0  # for one input


class Outcome(NamedTuple):
    number: int  # of the input
    verdict: str  # "accepted", "refused", or what went wrong
    seconds: float = 0.0
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
    except parser.refusals as error:
        said, verdict = str(error), "refused"
        if not said.isprintable() or len(said) > 1000:  # lines, what a terminal obeys, megabytes
            verdict = f"message of {len(said)} characters: {said[:200]!r}"
    except Exception:  # whatever else it raises is a finding
        return traceback.format_exc(-3)[-1500:]
    return f"runs {sorted(set(events))}" if RUNS & set(events) else verdict


def child(parser: Parser, inputs: Iterator[tuple[int, bytes]], path: Path, report: int) -> None:
    """Reads inputs one by one and writes an outcome for each; the alarm ends the process if one hangs."""
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)
    hints = get_type_hints(
        tg.Architecture
    )  # evaluates the script's own annotations: no event of an input
    tg.get_type_hints = {tg.Architecture: hints}.get
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event))
    for number, data in inputs:
        before, start = peak(), time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, parser.seconds)
        verdict = attempt(parser, data, path, events)
        signal.setitimer(signal.ITIMER_REAL, 0)
        outcome = Outcome(number, verdict, time.perf_counter() - start, peak() - before)
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
            os.dup2(
                os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2
            )  # libraries log there
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
    """Outcomes of inputs 0 to count - 1; a child that dies makes the outcome of the input it died of."""
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

MAGIC, STATE = (
    b"GOLFGPT\x02",
    b"GOLFRUN\x01",
)  # of artifacts, checkpoints; SHA-256, codec, length, stream
SMALL = dict(
    vocab_size=16, model_dim=8, num_heads=2, num_kv_heads=1, train_seq_len=8, dtype="float32"
)
FLAT = SMALL | tg.PLAIN | dict(num_layers=2)
LOOPED = SMALL | dict(
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
    ve_last_n=1,
    ve_dim=2,
    use_unique_norms=True,
    depth_embed="learned",
    tie_embeddings=False,
)


def sealed(body: bytes, magic: bytes = MAGIC) -> bytes:
    return magic + hashlib.sha256(body).digest() + body


def artifact(
    text: bytes,
    values: bytes,
    codec: str,
    size: int | None = None,
    length: int | None = None,
    magic: bytes = MAGIC,
) -> bytes:
    """From the text of the header and the values; `size` and `length` are what it says of itself."""
    raw = struct.pack("<I", len(text) if size is None else size) + text + values
    name, length = codec.encode(), len(raw) if length is None else length
    return sealed(struct.pack("<8sQ", name, length) + SHRINK[codec](raw), magic)


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes, str]:
    """Header, values, codec."""
    codec, length = data[40:48].rstrip(b"\0").decode(), struct.unpack_from("<Q", data, 48)[0]
    raw = tg.decompress(codec, data[56:], length)
    size = struct.unpack_from("<I", raw)[0]
    return json.loads(raw[4 : 4 + size]), raw[4 + size :], codec


def fitting(values: dict[str, Any], fill: bytes, limit: int) -> tuple[dict[str, Any], bytes] | None:
    """Header and values that agree with an architecture, though nothing else may be right with it; None if
    there is no such model, or one of more than `limit` bytes."""
    try:
        with torch.device("meta"):
            parameters = list(tg.GPT(tg.Architecture.from_json(values)).named_parameters())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    bits = [bool(tg.role_of(p).bits) for _, p in parameters]
    count = sum(
        p.numel() + 2 * len(p) if b else 2 * p.numel() for b, (_, p) in zip(bits, parameters)
    )
    entries = [[name, "int8" if b else "float16"] for b, (name, _) in zip(bits, parameters)]
    return None if count > limit else (dict(architecture=values, tensors=entries), fill * count)


NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    16,
    64,
    255,
    256,
    257,
    1023,
    1024,
    4096,
    65535,
    65536,
    65537,
    1 << 17,
    1 << 20,
    2**31,
    2**32,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e-45,
    1e30,
    3.4e38,
    3.5e38,
    1e39,
    1.7e308,
    math.nan,
    math.inf,
    -math.inf,
]
ODD = [
    None,
    True,
    False,
    "",
    "none",
    "all",
    "published",
    "learned",
    "bfloat16",
    "16",
    " 8",
    "1_6",
    "nan",
    "int8",
    "int2",
    "int9",
    "float16",
    "float32",
    "pickle",
    "\0",
    "\x1b[2J\n\u202e",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [[]] * 3,
    {"architecture": {}},
    [["tok_emb", "int8"]] * 2,
    functools.reduce(lambda inner, _: [inner], range(200), 0),
]


def changed(draw: Random, node: Any) -> Any:
    """A JSON value with one place changed: other value or type, name missing, doubled, swapped, other."""
    if node and isinstance(node, dict | list) and draw.random() < 0.9:
        keys, copy = list(node) if isinstance(node, dict) else range(len(node)), node.copy()
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


def mutated_artifact(draw: Random, data: bytes) -> bytes:
    header, values, codec = parts_of(data)
    text = json.dumps(header).encode()
    way, size, length = draw.randrange(200), None, None
    if way < 60:
        text = json.dumps(changed(draw, header)).encode()
    elif way < 110:  # an architecture somewhere else, or nowhere, with all that would belong to it
        strange = header["architecture"]
        for _ in range(draw.choice((1, 1, 2, 3))):
            name = draw.choice([*strange])
            strange = strange | {name: draw.choice(NUMBERS if draw.random() < 0.8 else ODD)}
        fill = draw.choice((b"\0", b"\x01", b"\x3c", b"\x7b", b"\x7c", b"\xff"))
        header, values = fitting(strange, fill, 1 << 20) or (
            header | dict(architecture=strange),
            values,
        )
        text = json.dumps(header).encode()
    elif way < 130:
        text = changed_text(draw, text)
    elif way < 160:
        values = damaged(draw, values)
    elif way < 180:
        codec = draw.choice([*SHRINK])
        size, length = (
            draw.choice([None, *(x for x in NUMBERS if type(x) is int and 0 <= x < 1 << top)])
            for top in (32, 64)
        )
    elif way < 199:  # the stream itself, and what says what it is
        return sealed(damaged(draw, data[40:])) if draw.random() < 0.8 else damaged(draw, data)
    else:
        return sealed(
            struct.pack("<8sQ", codec.encode(), draw.choice((1 << 20, 1 << 26))) + bomb(codec)
        )
    return artifact(text, values, codec, size, length)


def read_artifact(data: bytes, path: Path) -> None:
    model, a, _ = tg.load_model(data, "the file")
    assert model.tok_emb.shape == (a.vocab_size, a.model_dim)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    ids = torch.arange(min(a.train_seq_len, 4))[None] % a.vocab_size
    with torch.no_grad():
        assert model(ids, ids).shape == ()


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

    folder = Path("/nowhere")

    def size(self) -> int:
        return 0

    def __call__(self, text: str) -> None:
        assert text.isprintable() and len(text) < 2000


@functools.cache
def trainer() -> tg.Trainer:
    config = tg.Config(**FLAT, iterations=9, max_wallclock_seconds=0.0)
    torch.manual_seed(0)
    batches = SimpleNamespace(tokens=SimpleNamespace(total=99), accumulation=1)
    return tg.Trainer(config, tg.World({}), tg.GPT(config.architecture(), 0.1), batches)


def mutated_checkpoint(draw: Random, data: bytes) -> bytes:
    header, values, codec = parts_of(data)
    text, way, size, length = json.dumps(header).encode(), draw.randrange(10), None, None
    if way < 3:
        text = json.dumps(changed(draw, header)).encode()
    elif way < 4:
        text = changed_text(draw, text)
    elif way < 5:
        values = damaged(draw, values)
    elif way < 8:  # the last seven say how far the run is
        at = draw.choice(
            (draw.randrange(len(values) // 4), len(values) // 4 - 1 - draw.randrange(7))
        )
        number = draw.choice((math.nan, math.inf, -1.0, 1e30, 0.5, 10.0, draw.random()))
        values = values[: 4 * at] + struct.pack("<f", number) + values[4 * at + 4 :]
    elif way < 9:
        codec = draw.choice([*SHRINK])
        size, length = (
            draw.choice([None, *(x for x in NUMBERS if type(x) is int and 0 <= x < 1 << top)])
            for top in (32, 64)
        )
    else:
        return (
            sealed(damaged(draw, data[40:]), STATE) if draw.random() < 0.8 else damaged(draw, data)
        )
    return artifact(text, values, codec, size, length, STATE)


def read_checkpoint(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    trainer().config = replace(trainer().config, resume=str(path))
    trainer().resume(Quiet())
    assert 0 <= trainer().step <= 9 and all(p.isfinite().all() for p in trainer().params)


def checkpoints(folder: Path) -> Parser:
    log = Quiet()
    log.folder = folder
    trainer().save(log)
    wait(trainer().written)
    return Parser(
        [path.read_bytes() for path in folder.glob("*.ckpt")], mutated_checkpoint, read_checkpoint
    )


# ---- Shards

VOCAB = 64


def mutated_shard(draw: Random, data: bytes) -> bytes:
    way, out = draw.randrange(6), bytearray(data)
    if way == 0:
        return damaged(draw, data)
    if way == 1:  # one of the header's integers, mostly one that is read
        value = draw.choice([x for x in NUMBERS if type(x) is int and x < 2**31])
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

Field = tuple[int, int, int | bytes]  # number, wire type, value


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
    fields, at = [], 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise ValueError(f"field {number}, wire type {wire}")
        value, at = read_varint(data, at) if wire in (0, 2) else ({1: 8, 5: 4}[wire], at)
        if wire:
            start, at = at, at + value
            value = data[start:at]
        if at > len(data):
            raise ValueError("a field beyond the end")
        fields.append((number, wire, value))
    return fields


def message(fields: list[Field]) -> bytes:
    return b"".join(
        varint(number << 3 | wire)
        + (varint(value) if wire == 0 else (varint(len(value)) if wire == 2 else b"") + value)
        for number, wire, value in fields
    )


INTEGERS = [
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    63,
    64,
    65,
    127,
    128,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    -1,
    -2,
]
FLOATS = [
    struct.pack("<f", x) for x in (0.0, -0.0, 1e-45, 3.4e38, -3.4e38, math.nan, math.inf, -math.inf)
]
TEXTS = [
    b"",
    b"\0",
    b"a",
    b"\xe2\x96\x81",
    b"\xe2\x96\x81" * 3,
    b"<0x41>",
    b"<0xZZ>",
    b"<s>",
    b"<unk>",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xe2\x96",
    b"\xf4\x90\x80\x80",
    b"a" * 3000,
    b"\x1b[2J\n",
    b"\t",
]


def changed_field(draw: Random, field: Field) -> Field:
    number, wire, value = field
    if draw.random() < 0.03:
        return (draw.choice((1, 2, 3, 4, 5, 200, 2**29 - 1)), wire, value)
    if wire == 0:
        return (number, 0, draw.choice(INTEGERS))
    if wire != 2:
        return (
            number,
            wire,
            draw.choice(FLOATS)
            if wire == 5 and draw.random() < 0.8
            else draw.randbytes(len(value)),
        )
    with contextlib.suppress(ValueError):
        if value and draw.random() < 0.8 and (inner := fields_of(value)):
            return (number, 2, changed_message(draw, inner))
    return (number, 2, draw.choice(TEXTS) if draw.random() < 0.4 else damaged(draw, value))


def changed_message(draw: Random, fields: list[Field]) -> bytes:
    """A message with one field changed, left out, doubled or swapped; half of the time one of a rare number
    (the specifications and what is in them), not one of the many pieces."""
    out, rare = (
        fields.copy(),
        draw.choice([number for number in {number: 0 for number, *_ in fields}]),
    )
    some = [i for i, (number, *_) in enumerate(fields) if number == rare or draw.random() < 0.01]
    i, j, way = draw.choice(some), draw.randrange(len(out)), draw.randrange(20)
    if way == 0:
        del out[i]
    elif way == 1:
        out.insert(j, out[i])
    elif way == 2:
        out[i], out[j] = out[j], out[i]
    elif way == 3:
        out.insert(i, (draw.randrange(1, 50), 0, draw.choice(INTEGERS)))
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
    """With the vocabulary that the file happens to have, so that a size cannot be what it fails on."""
    pieces = VOCAB
    with contextlib.suppress(ValueError):
        pieces = max(sum(number == 1 for number, *_ in fields_of(data)), 2)
    path.write_bytes(data)
    counter = tg.ByteCounter.from_sentencepiece(path, pieces)
    assert all(table.shape == (pieces,) for table in counter)
    assert counter.size.min() >= 0 and counter.size.sum() <= 3 * len(data)


def tokenizers(folder: Path) -> Parser:
    """Every model type; with the tables of normalisation as they come by default (240 kB), small ones, none;
    with a table for decoding and with samples that SentencePiece encodes when it loads."""
    valid = []
    (folder / "rules").write_text("41\t61\n42 43\t62\n20 20\t20\n")
    (folder / "decoding").write_text("2581\t20\n61 62\t63\n")
    tables = dict(
        normalization_rule_tsv=folder / "rules", denormalization_rule_tsv=folder / "decoding"
    )
    for kind, options in (
        ("bpe", {}),
        ("bpe", EXACT | dict(byte_fallback=True, vocab_size=330)),
        *(
            (kind, tables | dict(self_test_sample_size=2))
            for kind in ("bpe", "unigram", "char", "word")
        ),
    ):
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            model_type=kind,
            minloglevel=3,
            num_threads=1,
            hard_vocab_limit=False,
            character_coverage=0.98,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            **dict(vocab_size=VOCAB) | options,
        )
        valid += [model.getvalue()] * (
            1 if len(model.getvalue()) > 100_000 else 4
        )  # the large one is slow
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
    """What reading a valid file imports is imported once, not in every child, where it would be an event."""
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
    outcomes = outcomes_of(p, lambda number: p.valid[number], len(p.valid), tmp_path)
    assert {x.verdict for x in outcomes} == {"accepted"}


def test_mutants_are_read_or_refused(parser: tuple[str, Parser], tmp_path: Path) -> None:
    name, p = parser
    if name == "artifact":
        any(map(bomb, SHRINK))  # made once, not in every child
    outcomes = outcomes_of(p, functools.partial(mutant, name, p), EXAMPLES, tmp_path)
    bad, count = findings(outcomes), [x.verdict for x in outcomes].count
    slowest = max(outcomes, key=lambda x: x.seconds)
    largest = max(outcomes, key=lambda x: x.growth)
    print(
        f"\n{name}: inputs {len(outcomes)}, refused {count('refused')}, accepted {count('accepted')}, "
        f"wrong {len(bad)}, slowest {slowest.seconds:.3f} s (number {slowest.number}), peak memory growth "
        f"{largest.growth >> 20} MiB (number {largest.number})"
    )
    for last, x in {
        x.verdict.strip().splitlines()[-1].split()[0]: x for x in bad
    }.items():  # one of a kind
        print(f"{last} {x}")
    assert not bad, f"{len(bad)} of {name}, the first: {bad[0]}"
    assert len(outcomes) == EXAMPLES and count("refused") > EXAMPLES / 10 and count("accepted") > 0


# ---- What mutants found, or would have to be too large to find


def forged(values: dict[str, Any], **changes: Any) -> bytes:
    """The artifact of a model, with changes to the architecture that leave its parameters as they are."""
    header, raw, codec = parts_of(
        tg.pack(tg.GPT(tg.Architecture(**values), 0.1), tg.Config(**values))
    )
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
    last = max(i for i, (number, *_) in enumerate(fields) if number == 1)
    fields[last] = (1, 2, message([(1, 2, piece), (2, 5, bytes(4)), (3, 0, kind)]))
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
    outcomes = outcomes_of(Parser([], damaged, read), lambda number: data, 1, tmp_path)
    assert [x.verdict for x in outcomes] == ["refused"] and not findings(outcomes)


def test_unchanged_forgeries_are_read(tmp_path: Path) -> None:
    """Otherwise the cases above would be refused for the wrong reason."""
    files = [
        (read_artifact, forged(FLAT)),
        (read_artifact, renamed("tok_emb")),
        (read_tokenizer, with_piece("\u00e9".encode() * 3, 1)),
    ]
    for read, data in files:
        outcomes = outcomes_of(
            Parser([], damaged, read), lambda number, data=data: data, 1, tmp_path
        )
        assert [x.verdict for x in outcomes] == ["accepted"]


# ---- These tests themselves


def complain(error: Exception) -> None:
    raise error


def look_for_module() -> None:
    with contextlib.suppress(ImportError):
        __import__("named_by_an_artifact")


HARM: dict[str, tuple[Callable[[], object], str]] = {
    "crash": (os.abort, "SIGABRT"),
    "hang": (lambda: time.sleep(30), "SIGALRM"),
    "endless loop": (lambda: sum(1 for _ in iter(int, 1)), "SIGALRM"),
    "exit": (lambda: sys.exit(0), "exit code"),
    "other error": (lambda: {}["x"], "KeyError"),
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
    parser = Parser(
        [],
        damaged,
        lambda data, path: act() if data else None,
        seconds=0.5 if verdict == "SIGALRM" else 20.0,
    )
    outcomes = outcomes_of(parser, lambda number: b"x" * (number == 1), 3, tmp_path)
    assert [x.number for x in outcomes] == [0, 1, 2] and [x.number for x in findings(outcomes)] == [
        1
    ]
    assert verdict in outcomes[1].verdict


def test_mutants_follow_from_their_number(parser: tuple[str, Parser]) -> None:
    assert len({mutant(*parser, number) for number in (5, 6, 5, 6, 7)}) == 3
