"""The artifact: what is stored comes back; codecs, widths that fit, bombs."""

import functools
import importlib
import struct
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from helpers import GROWING, fork_ranks, log_of, noisy_model, result_of, role_name, sealed

import train_gpt as tg

SMALL_T = dict(PRESET="T,tiny", MODEL_DIM="32", TRAIN_SEQ_LEN="32", DTYPE="float32")
TINY = GROWING | dict(VOCAB_SIZE="64", QUANT_SCALE_FLOOR="0", QUANT_CLIP="percentile", CODEC="zlib")
CODECS = get_args(get_type_hints(tg.Config)["codec"])


def config_of(**env: str) -> tg.Config:
    """Of a small model with a core and every side embedding."""
    return tg.Config.from_env(TINY | env)


@pytest.mark.parametrize("system", ["T", "M", "Q", "naive", "Ap"])
def test_artifact_round_trip(system: str) -> None:
    config = tg.Config.from_env(SMALL_T | {"PRESET": f"{system},tiny"})
    model = noisy_model(config.architecture(), 0.1)
    data = tg.pack(model, config)
    loaded, architecture, kind = tg.load_model(data, "memory")
    assert architecture == config.architecture() and kind == "int8+zlib"
    for (name, p), q in zip(model.named_parameters(), loaded.parameters()):
        error = (p - q).norm() / p.norm()
        assert error <= (0.02 if tg.role_of(p).bits else 1e-3), name
    assert tg.pack(loaded, config) == tg.pack(loaded, config), "packing is deterministic"


def test_float16_only_where_it_loses_nothing() -> None:
    config = tg.Config.from_env(SMALL_T)
    fine, overflow = torch.linspace(0.5, 2, 64), torch.full((64,), 1e5)
    tiny = torch.full((64,), 1e-9)  # below the smallest float16
    kinds = [tg.store(tg.parameter("scalar", t), config, None)[0] for t in (fine, overflow, tiny)]
    assert kinds == ["float16", "float32", "float32"]


def test_scale_floor_costs_accuracy_and_saves_bytes() -> None:
    """The reference's floor: rows below it share one coarse grid, which compresses better."""
    config = tg.Config.from_env(SMALL_T | {"MODEL_DIM": "128"})
    model = tg.GPT(config.architecture())
    for p in model.parameters():
        if role_name(p) == "matrix":
            p.data = 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for floor in (0.0, 1 / 127):
        data = tg.pack(model, replace(config, quant_scale_floor=floor))
        loaded = tg.load_model(data, "memory")[0]
        pairs = zip(model.parameters(), loaded.parameters())
        results.append((len(data), sum((p - q).square().sum().item() for p, q in pairs)))
    (size, error), (size_with_floor, error_with_floor) = results
    assert size > 1.3 * size_with_floor and error < 0.1 * error_with_floor


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", [6, 4])
def test_every_codec_round_trips(bits: int, codec: str) -> None:
    check_round_trip(bits, codec)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_round_trips(bits: int) -> None:
    check_round_trip(bits, "zlib")


def check_round_trip(bits: int, codec: str) -> None:
    """Exactly what was rounded comes back; the core has a width of its own."""
    core_bits = 2 + (bits + 1) % 7
    widths = dict(MATRIX_BITS=str(bits), CORE_BITS=str(core_bits), EMBED_BITS=str(bits))
    config = config_of(CODEC=codec, **widths)
    model = noisy_model(config.architecture(), 0.1)
    data = tg.pack(model, config)
    loaded, architecture, kind = tg.load_model(data, "memory")
    assert architecture == config.architecture()
    stored, _, packed = kind.partition("+")
    assert set(stored.split("/")) == {f"int{bits}", f"int{core_bits}"} and packed == codec
    for (name, p), near in zip(model.named_parameters(), loaded.parameters()):
        if not tg.role_of(p).bits:
            assert torch.equal(near, p.detach().half().float()), name
            continue
        width = core_bits if role_name(p) == "core matrix" else bits
        levels = 2 ** (width - 1) - 1
        exact = p.detach().abs().amax(1, keepdim=True) / levels
        stored = exact.half().float()
        bound = 0.501 * stored + levels * (stored - exact).abs()
        assert ((near - p).abs() <= bound).all(), name
        assert all(len(row.unique()) <= 2 * levels + 1 for row in near.detach()), name
    assert tg.pack(loaded, config) == tg.pack(loaded, config)


def test_fewer_bits_are_fewer_bytes() -> None:
    model = noisy_model(config_of().architecture(), 0.1)
    sizes = [len(tg.pack(model, config_of(MATRIX_BITS=str(bits)))) for bits in range(2, 9)]
    assert sizes == sorted(set(sizes))


def test_most_bits_that_fit() -> None:
    """MATRIX_BITS=0: the core keeps its own width; the limit is on script and artifact together."""
    free = config_of(MATRIX_BITS="0", CORE_BITS="3", QAT_LR_FACTOR="0", QAT_CORE_ONLY="0")
    model, script = noisy_model(free.architecture(), 0.1), len(tg.source())
    data = {bits: tg.pack(model, replace(free, matrix_bits=bits), {}) for bits in range(2, 9)}

    def packed(limit: int, bits: int = 0) -> tuple[bytes, list[str]]:
        """The artifact for which `limit` bytes are left by the script, and what was logged."""
        lines: Any = []
        config = replace(free, matrix_bits=bits, size_limit_bytes=script + limit)
        return tg.pack_to_fit(model, config, {}, lines.append), lines

    for bits in (8, 5):
        just_below_the_next = len(data[bits + 1]) - 1 if bits < 8 else len(data[8]) + 1
        for limit in (len(data[bits]), just_below_the_next):
            found, lines = packed(limit)
            assert found == data[bits] and len(lines) == 9 - bits
            assert f"total:{script + len(found)} bytes" in lines[-1]
    found, lines = packed(0)
    assert found == data[2] and len(lines) == 7, "what does not fit at all is the smallest"
    assert packed(0, bits=7)[0] == data[7], "a width that is given is kept"


# ---- A size that lands on the limit: MATRIX_CLIP_SIGMAS=0

FLAT = dict(
    PRESET="Ap,tiny",
    VOCAB_SIZE="64",
    MODEL_DIM="64",
    NUM_LAYERS="2",
    TRAIN_SEQ_LEN="32",
    CODEC="lzma",
    QUANT_CLIP="sdclip",
    MATRIX_CLIP_SIGMAS="0",
    MATRIX_BITS="6",
)


def weights_of(kind: str, seed: int) -> tg.GPT:
    """A model whose matrices are drawn from a law, every row with a size of its own."""
    draw = np.random.default_rng(seed)
    model = tg.GPT(tg.Config.from_env(FLAT).architecture(), 0.1)
    laws: dict[str, Any] = dict(
        normal=draw.standard_normal,
        laplace=draw.laplace,
        student=lambda size: draw.standard_t(4, size),
    )
    for p in model.parameters():
        if tg.role_of(p).bits:
            size = np.exp(draw.standard_normal((len(p), 1)))
            rows = size * laws[kind](size=tuple(p.shape))
            p.data = torch.tensor(rows, dtype=torch.float32)
    return model


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_script_and_artifact_land_on_the_limit(kind: str, share: float) -> None:
    """Within 0.3 % below it, for every seed, whatever the law of the weights."""
    config = tg.Config.from_env(FLAT)
    script = len(tg.script_file())
    for seed in range(3):
        lines: Any = []
        model = weights_of(kind, seed)
        limit = script + int(share * sum(p.numel() for p in model.parameters()))
        data = tg.pack_to_fit(model, replace(config, size_limit_bytes=limit), {}, lines.append)
        assert 0.997 * limit <= script + len(data) <= limit
        assert len(lines) <= 4 and f"total:{script + len(data)} bytes" in lines[-1]
        sigmas = float(lines[-1].split("matrix_clip_sigmas:")[1].split()[0])
        assert data == tg.pack(model, replace(config, matrix_clip_sigmas=sigmas))


def test_no_finer_steps_than_help() -> None:
    """Where everything fits, rows saturate where a Laplace law has its least squared error."""
    lines: Any = []
    config, model = tg.Config.from_env(FLAT), weights_of("laplace", 0)
    data = tg.pack_to_fit(model, config, {}, lines.append)
    least = tg.least_clip(config)
    assert data == tg.pack(model, replace(config, matrix_clip_sigmas=least))
    assert len(lines) == 2 and "more MATRIX_BITS" in lines[1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_least_clip_is_the_best_of_a_laplace_law(bits: int) -> None:
    x = torch.tensor(np.random.default_rng(bits).laplace(size=(1, 400_000)))
    x = (x / x.std()).float()
    levels = 2 ** (bits - 1) - 1

    def squared_error(clip: float) -> float:
        step = clip / levels
        return ((x / step).round().clamp(-levels, levels) * step - x).square().mean().item()

    best = min(squared_error(clip) for clip in np.linspace(1, 9, 81))
    least = tg.least_clip(tg.Config(matrix_bits=bits))
    assert squared_error(least) < 1.02 * best


def test_what_does_not_fit_at_all_is_packed_as_small_as_it_goes() -> None:
    config = replace(tg.Config.from_env(FLAT), size_limit_bytes=1000)
    lines: Any = []
    model = weights_of("normal", 0)
    data = tg.pack_to_fit(model, config, {}, lines.append)
    values = [p for p in tg.load_model(data, "memory")[0].parameters() if role_name(p) == "matrix"]
    assert not any(p.any() for p in values), "steps so wide that all weights are 0"
    assert len(lines) == 1


def test_one_thing_at_a_time_makes_it_fit() -> None:
    with pytest.raises(tg.InputError, match="MATRIX_BITS=0 and MATRIX_CLIP_SIGMAS=0"):
        tg.Config.from_env(FLAT | {"MATRIX_BITS": "0"})
    with pytest.raises(tg.InputError, match="MATRIX_CLIP_SIGMAS=0, chosen after training"):
        tg.Config.from_env(FLAT | {"REFIT_STEPS": "1"})


@pytest.mark.parametrize("codec", CODECS)
def test_expected_bytes_are_those_of_normal_weights(codec: str) -> None:
    """To a part of what a codec adds to the entropy of the integers, and a header."""
    config = replace(tg.Config.from_env(FLAT | {"CODEC": codec}), model_dim=256)
    config = replace(config, matrix_clip_sigmas=12.85)
    model, draw = tg.GPT(config.architecture(), 0.1), torch.Generator().manual_seed(0)
    for p in model.parameters():
        if tg.role_of(p).bits:
            p.data = torch.randn(p.shape, generator=draw)
    expected = tg.expected_bytes(model, config) - len(tg.script_file())
    # What lzma makes of such integers changes by 3 % with a few bytes more or less before them.
    near = 0.04 if codec == "lzma" else 0.015
    assert len(tg.pack(model, config)) == pytest.approx(expected, rel=near)


def test_a_run_that_lands(corpus: dict[str, str], tmp_path: Path) -> None:
    """Two ranks calibrate the embedding, too, in a reserve that was measured, and fit the limit."""
    limit = len(tg.script_file()) + 40_000
    env = corpus | FLAT
    env |= dict(
        TRAIN_BATCH_TOKENS="256",
        VAL_BATCH_SIZE="16384",
        ITERATIONS="3",
        WARMDOWN_ITERS="1",
        WARMUP_STEPS="0",
        MAX_WALLCLOCK_SECONDS="300",
        GPTQ_BATCHES="2",
        GPTQ_SECONDS="-1",
        GPTQ_EMBED="1",
        GPTQ_DAMPING="0.02",
        BYTE_SHUFFLE="1",
        SIZE_LIMIT_BYTES=str(limit),
        LOG_DIR=str(tmp_path),
        RUN_ID="run",
        VOCAB_SIZE="1024",
    )
    ranks = fork_ranks(env, 2)
    assert ranks.codes == [0, 0], ranks.texts
    result, log = result_of(tmp_path / "run"), log_of(tmp_path / "run")
    assert 0.997 * limit <= result["bytes_total"] <= limit
    assert 0 < result["gptq_reserve_seconds"] < 300
    assert result["config"]["gptq_seconds"] == -1, "the log and result.json give what was asked for"
    assert "gptq_reserve batches:2 " in log and "gptq_calibration batches:2 " in log
    assert "final_int6_lzma-2_roundtrip val_loss:" in log


# ---- The order of bytes


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [0, 1, 2, 7, 1000])
def test_shuffled_bytes_come_back(codec: str, length: int) -> None:
    data = bytes(np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8))
    packed = tg.compress(codec + "-2", data)
    assert packed == tg.compress(codec, data[::2] + data[1::2])
    assert tg.decompress(codec + "-2", packed, max(length, 1)) == data


@pytest.mark.parametrize("codec", CODECS)
def test_an_artifact_of_shuffled_bytes_is_the_same_model(codec: str) -> None:
    config = config_of(CODEC=codec)
    model = noisy_model(config.architecture(), 0.1)
    plain, shuffled = (tg.pack(model, replace(config, byte_shuffle=on)) for on in (False, True))
    assert plain != shuffled
    (one, _, kind), (other, _, named) = (tg.load_model(x, "memory") for x in (plain, shuffled))
    assert named == f"{kind}-2" and kind.endswith(f"+{codec}")
    for p, q in zip(one.parameters(), other.parameters()):
        assert torch.equal(p, q)


def artifact(codec: bytes, length: int, body: bytes) -> bytes:
    """An artifact with this stream, which announces `length` bytes."""
    return sealed(struct.pack("<8sQ", codec, length) + body)


@functools.cache
def bomb(codec: str) -> bytes:
    """A small stream that unpacks to 96 MiB."""
    fast: dict[str, Any] = dict(zlib=dict(level=1), lzma=dict(preset=0), brotli=dict(quality=1))
    return importlib.import_module(codec).compress(bytes(96 << 20), **fast[codec])


@pytest.mark.parametrize("order", ["", "-2"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("announced", [64, 1 << 20])
def test_a_bomb_is_refused_before_it_goes_off(codec: str, announced: int, order: str) -> None:
    """Its header announces few bytes."""
    body = bomb(codec)
    data = artifact((codec + order).encode(), announced, body)
    assert len(data) < 1 << 20
    tracemalloc.start()
    before = resident("VmRSS", forget=True)
    with pytest.raises(tg.InputError, match="memory is not a valid artifact"):
        tg.load_model(data, "memory")
    allocated, grown = tracemalloc.get_traced_memory()[1], resident("VmHWM") - before
    tracemalloc.stop()
    assert allocated < 24 << 20 and grown < 48 << 20
    unpacked = len(tg.decompress(codec + order, body, announced))
    assert unpacked <= 2 * announced + (1 << 17)  # brotli stops between blocks


def resident(what: str, forget: bool = False) -> int:
    """Bytes of this process in memory: VmRSS, now, or VmHWM, the most since a call with `forget`.

    0 where the system does not tell.
    """
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next(line for line in status.splitlines() if line.startswith(what))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("codec", ["this", "os", "../zlib", "", "zlib\0x", "\xff", "os-2", "-2"])
def test_an_artifact_cannot_name_a_module(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the codecs; nothing else is imported."""
    sys.modules.pop("this", None)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(tg.InputError, match="memory is not a valid artifact"):
        tg.load_model(artifact(codec.encode("latin-1"), 64, zlib.compress(bytes(64))), "memory")
    assert "this" not in sys.modules


def test_another_codecs_body_is_refused() -> None:
    for codec, body in (("lzma", zlib.compress(bytes(64))), ("zlib", b"\x00" * 20), ("zlib", b"")):
        with pytest.raises(tg.InputError, match="memory is not a valid artifact"):
            tg.load_model(artifact(codec.encode(), 64, body), "memory")


def test_a_codec_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    with pytest.raises(tg.InputError, match="brotli is not installed: pip install -U brotli"):
        tg.compress("brotli", b"")
    with pytest.raises(tg.InputError, match="brotli is not installed"):
        tg.load_model(artifact(b"brotli", 64, b"x"), "memory")


@pytest.mark.parametrize(
    ("given", "parameters", "over"),
    [
        (dict(PRESET="naive"), 17_059_912, True),  # 15,815,889 bytes published, without the script
        (dict(PRESET="naive", CODEC="lzma"), 17_059_912, False),
        (dict(PRESET="naive", SIZE_LIMIT_BYTES="17000000"), 17_059_912, False),
        (dict(PRESET="T"), 11_572_272, False),
        (dict(PRESET="M"), 19_950_640, True),
    ],
)
def test_a_run_that_is_likely_to_end_above_the_limit_says_so_before_it_starts(
    given: dict[str, str], parameters: int, over: bool
) -> None:
    told = tg.warning_of_size(tg.Config.from_env(given), parameters)
    assert bool(told) == over and (not over or "SIZE_LIMIT_BYTES=" in told)
