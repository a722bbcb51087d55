"""Configuration: defaults, presets, the environment, and everything that is refused."""

import difflib
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from helpers import HANG, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

pytestmark = pytest.mark.quick
PUBLISHED = json.loads((ROOT / "records" / "reference_runs.json").read_text())
RUNS = {name.replace("'", "p"): run for name, run in PUBLISHED["runs"].items()}
KINDS = {name.upper(): kind for name, kind in get_type_hints(tg.Config).items()}
FIELDS = {f.name.upper(): f for f in fields(tg.Config)}
NUMBERS = [name for name, kind in KINDS.items() if kind in (int, float)]
CONDITIONAL = [name for name, f in FIELDS.items() if f.metadata["needs"]]
# What the published script does where a run's environment is silent.
ALL_OFF = dict(
    NUM_PRELUDE=0,
    NUM_SHARED=0,
    NUM_CODA=0,
    USE_PERI_NORM=False,
    USE_BIRKHOFF_MIX=False,
    USE_TIMESTEP_SCALE=False,
    TIMESTEP_GAMMA_MAX=0.0,
    USE_TIMESTEP_BIAS=False,
    SHARE_ATTN_ONLY=False,
    USE_UNIQUE_NORMS=False,
    DEPTH_EMBED="none",
)
SHARED_BY_ALL_RUNS = dict(
    MODEL_DIM=512,
    NUM_HEADS=8,
    NUM_KV_HEADS=4,
    MLP_MULT=2.0,
    LEAKY_RELU_SLOPE=0.5,
    TIE_EMBEDDINGS=True,
    LOGIT_SOFTCAP=30.0,
    ROPE_BASE=10000.0,
    QK_GAIN_INIT=1.5,
)
# "Baseline wins" gives its parameter counts in millions, rounded to 0.1.
REPORTED_MILLIONS = dict(
    flat_9x1_512=17.1,
    recur_3x3_768=12.6,
    recur_3x3_640=9.3,
    recur_3x3_1024=21.5,
    recur_4x3_768=16.5,
    recur_2x6_1024=14.7,
)
OF_PULL_REQUESTS = {"growing", "growing_live", "frontier"}


def config(**env: Any) -> tg.Config:
    return tg.Config.from_env({name: str(value) for name, value in env.items()})


def refused(**env: Any) -> str:
    """The message with which an environment is refused."""
    with pytest.raises(tg.InputError) as caught:
        config(**env)
    return str(caught.value)


def value_of(c: tg.Config, name: str) -> Any:
    return getattr(c, name.lower())


def published_values(run: dict[str, Any]) -> dict[str, Any]:
    given = PUBLISHED["common"] | run["env"]
    return (
        ALL_OFF
        | SHARED_BY_ALL_RUNS
        | {name: tg.parse(name, given[name], KINDS[name]) for name in given}
    )


def count(c: tg.Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in tg.GPT(c.architecture()).parameters())


# ---- Defaults and presets


def test_defaults_are_run_t_on_eight_gpus() -> None:
    c = config()
    for name, value in published_values(RUNS["T"]).items():
        assert value_of(c, name) == value, name
    assert (c.max_wallclock_seconds, c.iterations, c.dtype) == (600, 20000, "bfloat16")
    assert c.size_limit_bytes == 16_000_000
    assert asdict(c) | {"preset": "T"} == asdict(config(PRESET="T"))


@pytest.mark.parametrize("name", RUNS)
def test_preset_is_the_published_run(name: str) -> None:
    c, run = config(PRESET=name), RUNS[name]
    for variable, value in published_values(run).items():
        assert value_of(c, variable) == value, variable
    assert count(c) == run["model_params"]
    steps_cap = {"1xH100, 2000 steps": (2000, 0), "8xH100, 600 s": (20000, 600)}[run["hardware"]]
    assert (c.iterations, c.max_wallclock_seconds) == steps_cap
    # The published script brings the input norm back when both are on.
    assert c.unique_norms_input_norm == (c.use_peri_norm and c.use_unique_norms)


def test_every_published_run_has_a_preset() -> None:
    assert len(RUNS) == 21
    assert tg.SYSTEMS.keys() == {*RUNS, "naive", *REPORTED_MILLIONS, *OF_PULL_REQUESTS}


@pytest.mark.parametrize("name", REPORTED_MILLIONS)
def test_reported_parameter_counts(name: str) -> None:
    c = config(PRESET=name)
    assert round(count(c) / 1e6, 1) == REPORTED_MILLIONS[name]
    assert (c.max_wallclock_seconds, c.leaky_relu_slope) == (180, 0)
    kind, shape, width = name.split("_")
    layers, passes = (int(n) for n in shape.split("x"))
    assert c.model_dim == int(width)
    assert len(tg.make_plan(c)) == layers * passes
    assert c.num_shared == (layers if kind == "recur" else 0)


def test_naive_baseline() -> None:
    c = config(PRESET="naive")
    for variable, value in (
        ALL_OFF | SHARED_BY_ALL_RUNS | dict(NUM_LAYERS=9, LEAKY_RELU_SLOPE=0.0)
    ).items():
        assert value_of(c, variable) == value, variable


@pytest.mark.parametrize("name", RUNS)
def test_published_environment_is_accepted(name: str) -> None:
    """On a plain base, a run's variables give that run."""
    c, run = config(PRESET="Ap", **RUNS[name]["env"]), RUNS[name]
    for variable, value in published_values(run).items():
        assert value_of(c, variable) == value, variable


@pytest.mark.parametrize("name", [name for name in RUNS if name != "Ap"])
def test_published_environment_on_the_defaults(name: str) -> None:
    c = config(**PUBLISHED["common"], **RUNS[name]["env"])
    for variable, text in RUNS[name]["env"].items():
        assert value_of(c, variable) == tg.parse(variable, text, KINDS[variable])


def test_run_a_is_refused_on_the_looped_defaults() -> None:
    message = refused(**RUNS["Ap"]["env"])
    assert "NUM_LAYERS=8" in message and "NUM_SHARED=4" in message


# ---- Combination of presets, scales and variables


@pytest.mark.parametrize("system", ["", *tg.SYSTEMS])
def test_scale_keeps_the_shape(system: str) -> None:
    full, small = config(PRESET=system), config(PRESET=f"{system},tiny".lstrip(","))
    assert tg.make_plan(small) == tg.make_plan(full)
    assert small.num_heads / small.num_kv_heads == full.num_heads / full.num_kv_heads
    assert small.model_dim == full.model_dim // 4
    assert small.train_batch_tokens < full.train_batch_tokens
    scaled = {"vocab_size", "model_dim", "num_heads", "num_kv_heads", "train_seq_len", "dtype"}
    for f in fields(tg.Architecture):
        assert f.name in scaled or getattr(small, f.name) == getattr(full, f.name), f.name


def test_order_of_system_and_scale_is_free() -> None:
    assert asdict(config(PRESET="tiny,Q")) | {"preset": "Q,tiny"} == asdict(config(PRESET="Q,tiny"))


@pytest.mark.parametrize("system", tg.SYSTEMS)
def test_variables_win_over_presets(system: str) -> None:
    chosen = dict(
        ITERATIONS=77,
        MODEL_DIM=96,
        NUM_HEADS=6,
        NUM_KV_HEADS=3,
        USE_PERI_NORM=0,
        TRAIN_SEQ_LEN=64,
        USE_BIRKHOFF_MIX=0,
        MAX_WALLCLOCK_SECONDS=1.5,
        DEPTH_EMBED="learned",
        USE_TIMESTEP_SCALE=0,
        UNIQUE_NORMS_INPUT_NORM=0,
    )
    c = config(PRESET=f"{system},tiny", **chosen)
    for variable, value in chosen.items():
        assert value_of(c, variable) == value, variable
    changed = {name.lower() for name in chosen}
    for name, value in asdict(config(PRESET=f"{system},tiny")).items():
        assert name in changed or getattr(c, name) == value, name


@pytest.mark.parametrize(
    "preset", ["T,M", "tiny,tiny", "T,T", "nope", "t", "T,", ",tiny", " T", ","]
)
def test_malformed_presets(preset: str) -> None:
    message = refused(PRESET=preset)
    assert message.startswith("PRESET=") and preset in message
    assert "is not a preset" in message or "more than one" in message


def test_depth_embed_by_its_public_name() -> None:
    assert config(USE_DEPTH_EMBED=1, PRESET="Ap").depth_embed == "sinusoidal"
    assert config(USE_DEPTH_EMBED=0, PRESET="Q").depth_embed == "none"
    for value in ("none", "sinusoidal", "learned"):
        message = refused(USE_DEPTH_EMBED=1, DEPTH_EMBED=value)
        assert "USE_DEPTH_EMBED" in message and " DEPTH_EMBED" in message
    assert "USE_DEPTH_EMBED='yes'" in refused(USE_DEPTH_EMBED="yes")


# ---- Values that are refused

JUNK = {
    int: ["", "x", "1.5", "1e3", "0x10", "1,000", "--1"],
    float: ["", "x", "1,5", "--1", "1e"],
    bool: ["", "true", "False", "yes", "2", "-1", "01", " 1"],
    Literal: ["", "junk", "None", "NONE", "0"],
}


def junk(kind: Any) -> list[str]:
    return JUNK.get(Literal if get_origin(kind) is Literal else kind, [])


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if junk(kind)])
def test_junk_is_refused_by_name(name: str) -> None:
    for text in junk(KINDS[name]):
        message = refused(**{name: text})
        assert message.startswith(f"{name}={text!r}")
        assert all(choice in message for choice in get_args(KINDS[name]))


def test_every_option_has_a_checked_type() -> None:
    assert all(kind is str or junk(kind) for kind in KINDS.values())


def outside(name: str) -> list[str]:
    """Values of a numeric option that are beyond its bounds, or not finite."""
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    if KINDS[name] is int:
        return [str(low - 1), "-" + "9" * 30] + ([str(high + 1)] if high < float("inf") else [])
    below = [repr(low - 1e-3), "nan", "inf", "-inf", "1e999"]
    return below + ([repr(high * 1.001 + 1e-3)] if high < float("inf") else [])


@pytest.mark.parametrize("name", NUMBERS)
def test_out_of_range_is_refused_by_name(name: str) -> None:
    for text in outside(name):
        message = refused(**{name: text})
        assert message.startswith(f"{name}=") and "out of range" in message


@pytest.mark.parametrize("name", [name for name in NUMBERS if KINDS[name] is int])
def test_integers_beyond_floating_point(name: str) -> None:
    """A stuck key: such a number has no float to compare with a bound."""
    assert name in refused(**{name: "9" * 400})


@pytest.mark.parametrize(
    "env, names",
    [
        (dict(NUM_HEADS=8, NUM_KV_HEADS=3), ["NUM_HEADS=8", "NUM_KV_HEADS=3"]),
        (dict(NUM_HEADS=4, NUM_KV_HEADS=8), ["NUM_HEADS=4", "NUM_KV_HEADS=8"]),
        (dict(MODEL_DIM=513), ["MODEL_DIM=513", "NUM_HEADS=8"]),
        # A head of 63 has no pairs to rotate.
        (dict(MODEL_DIM=504), ["MODEL_DIM=504", "NUM_HEADS=8"]),
        # An MLP of width 0.
        (dict(MODEL_DIM=12, NUM_HEADS=2, NUM_KV_HEADS=1, MLP_MULT=0.01), ["MLP_MULT"]),
        (dict(SEED=2**64), ["SEED"]),  # more than the random generator takes
        (dict(PASSES_SCHEDULE="0:1,nan:3"), ["PASSES_SCHEDULE=0:1,nan:3"]),
        (dict(PASSES_SCHEDULE="0:1,inf:3"), ["PASSES_SCHEDULE=0:1,inf:3"]),
        (dict(RUN_ID=".."), ["RUN_ID=.."]),  # would write beside LOG_DIR
        (dict(RUN_ID="."), ["RUN_ID=."]),
        (dict(GPTQ_BATCHES=1, GPTQ_SECONDS=-0.5), ["GPTQ_SECONDS=-0.5", "-1"]),
        (dict(BETA1=1), ["BETA1"]),  # the mean of the gradients would never move
        (dict(BETA2=1), ["BETA2"]),
    ],
)
def test_values_that_cannot_work(env: dict[str, Any], names: list[str]) -> None:
    message = refused(**env)
    assert all(name in message for name in names), message


# ---- Options that cannot act

# Values that switch an option on where "1" is refused, or switches it off.
ON = dict(PASSES_SCHEDULE="0:1", BIGRAM_VOCAB_SIZE="2", CORE_BITS="4", ROPE_DIMS="2")
ON |= dict(
    PASS_SCALE_INIT="0.5", LOOP_LANES="2", LANE_WEIGHTS="token", MLP_POOL="4", VE_LAYERS="0,2-5"
)


def truthy(name: str) -> str:
    """A value with which the option acts."""
    kind, default = KINDS[name], FIELDS[name].default
    if name in ON:
        return ON[name]
    if choices := [choice for choice in get_args(kind) if choice != "none"]:
        return choices[0]
    return tg.show(default) if default and kind is not bool else "1"


def conditions(name: str) -> list[str]:
    return FIELDS[name].metadata["needs"].upper().split()


def named_in(condition: str) -> str:
    """The option that a condition is about: NUM_LOOPS of NUM_LOOPS>1, the last one of A|B."""
    return re.split("[>=]", condition.split("|")[-1].removeprefix("!"))[0]


def need(name: str, met: bool) -> dict[str, str]:
    """An environment in which all conditions of an option are met, or its first one is not.

    Of "a|b" the last one is met, or none.
    """
    env: dict[str, str] = {}
    chosen = [text.split("|") for text in conditions(name)]
    several = [either[-1] for either in chosen] if met else chosen[0]
    for condition in several:
        field = named_in(condition)
        if ">" in condition:
            values = "1", "2"
        elif "=" in condition:
            wanted = condition.split("=")[1].lower()
            values = next(choice for choice in get_args(KINDS[field]) if choice != wanted), wanted
        else:
            values = "" if KINDS[field] is str else "0", truthy(field)
        on = met != condition.startswith("!")
        env = need(field, True) | env | {field: values[1] if on else values[0]}
    return env


@pytest.mark.parametrize("name", [n for n in CONDITIONAL if n != "QAT_CORE_ONLY"])
def test_inert_option_is_refused(name: str) -> None:
    env, field = need(name, met=False), named_in(conditions(name)[0])
    message = refused(**env, **{name: truthy(name)})
    assert f"{name}=" in message and f"{field}={env[field]}" in message
    assert value_of(config(**need(name, met=True), **{name: truthy(name)}), name)


CAN_BE_OFF = [
    name
    for name in CONDITIONAL
    if FIELDS[name].metadata["low"] == 0
    and not FIELDS[name].metadata["zero_acts"]
    and "none" in (get_args(KINDS[name]) or ["none"])
]


@pytest.mark.parametrize("name", CAN_BE_OFF)
def test_off_is_accepted_where_it_cannot_act(name: str) -> None:
    off = "none" if get_args(KINDS[name]) else "" if KINDS[name] is str else "0"
    assert value_of(config(**need(name, met=False), **{name: off}), name) in (0, "none", "")


def test_conditions_name_fields() -> None:
    for name in CONDITIONAL:
        assert set(map(named_in, conditions(name))) <= FIELDS.keys()


def test_one_condition_of_two_is_enough() -> None:
    for name in ("WARMDOWN_ITERS", "WARMDOWN_FRACTION"):
        other = {"WARMDOWN_ITERS": "0"} if name == "WARMDOWN_FRACTION" else {}
        assert config(**other, **{name: 1}, LR_FLOOR=0.1).lr_floor == 0.1
    assert "WARMDOWN_ITERS or WARMDOWN_FRACTION." in tg.answer(["--help", "LR_FLOOR"])


# What the published script ignored in silence has to stay on this list.
@pytest.mark.parametrize(
    "env, other",
    [
        (dict(SHARE_ATTN_ONLY=1, PRESET="naive"), "NUM_SHARED=0"),
        (dict(NUM_LOOPS=3, PRESET="naive"), "NUM_SHARED=0"),
        (dict(NUM_LAYERS=12), "NUM_SHARED=4"),
        (dict(TIMESTEP_GAMMA_MAX=2, PRESET="G"), "USE_TIMESTEP_SCALE=0"),
        (dict(UNIQUE_NORMS_INPUT_NORM=1), "USE_UNIQUE_NORMS=0"),
        (dict(HEAD_LR=0.1), "TIE_EMBEDDINGS=1"),
        (dict(EMBED_LR=0.1), "TIE_EMBEDDINGS=1"),
        (dict(TIED_EMBED_LR=0.1, TIE_EMBEDDINGS=0), "TIE_EMBEDDINGS=0"),
        (dict(USE_UNIQUE_NORMS=1, UNIQUE_NORMS_INPUT_NORM=1, USE_PERI_NORM=0), "USE_PERI_NORM=0"),
        (dict(SHARE_ATTN_ONLY=1, NUM_LOOPS=1), "NUM_LOOPS=1"),
        (dict(PASS_SCALE_INIT=0.5, NUM_LOOPS=1), "NUM_LOOPS=1"),
        (dict(SWA_EVERY=2), "AVERAGE=none"),
        (dict(EMA_DECAY=0.5, AVERAGE="swa"), "AVERAGE=swa"),
        (dict(QAT_CORE_ONLY=1), "QAT_FRACTION"),
        (dict(QAT_FRACTION=0.1, MATRIX_BITS=0), "MATRIX_BITS=0"),
        (dict(WARMDOWN_ITERS=100, WARMDOWN_FRACTION=0.5), "WARMDOWN_FRACTION=0.5"),
        (dict(LR_FLOOR=0.1, WARMDOWN_ITERS=0), "WARMDOWN_ITERS=0 and WARMDOWN_FRACTION=0.0"),
        (dict(QAT_LR_FACTOR=0.1, LR_FLOOR=0.1), "LR_FLOOR=0.1"),
        (dict(AVERAGE="swa", SWA_LR_FACTOR=0.1, LR_FLOOR=0.2), "LR_FLOOR=0.2"),
        (
            dict(MUON_MOMENTUM_WARMUP_STEPS=9, MUON_MOMENTUM_WARMUP_FRACTION=0.3),
            "MUON_MOMENTUM_WARMUP_FRACTION=0.3",
        ),
        (dict(CORE_SKIPS="all", NUM_CODA=0), "NUM_CODA=0"),
        (dict(CORE_SKIPS="published", NUM_PRELUDE=0), "NUM_PRELUDE=0"),
        (dict(SKIP_GATES=1), "CORE_SKIPS=none"),
        (dict(VE_DIM=8), "VE_LAYERS="),
        (dict(NUM_SHARED=0, CORE_SKIPS="all"), "NUM_SHARED=0"),
        (dict(NUM_SHARED=0, PASS_SCALE_INIT=0.5), "NUM_SHARED=0"),
        (dict(NUM_SHARED=0, FEEDBACK_RANK=2), "NUM_SHARED=0"),
        (dict(NUM_SHARED=0, LOOP_LANES=2), "NUM_SHARED=0"),
        (dict(NUM_SHARED=0, INTERPASS_NORM=1), "NUM_SHARED=0"),
        (dict(NUM_SHARED=0, PASSES_SCHEDULE="0:1,0.5:3"), "NUM_SHARED=0"),
        (dict(PRESET="frontier", TRUNCATE_FRACTION=0.3), "PASSES_SCHEDULE=0:1,0.35:3"),
        (dict(AVERAGE="swa", WARMDOWN_ITERS=0), "WARMDOWN_ITERS=0"),
        (dict(PASS_SCALE_INIT=0, NUM_LOOPS=1), "NUM_LOOPS=1"),  # not off, which is 1
        (dict(TIMESTEP_GAMMA_MAX=0.5), "below gamma's start, 1"),
        (dict(JACOBIAN_PER_PASS=1, JACOBIAN_WEIGHT=0.1, NUM_LOOPS=1), "NUM_LOOPS=1"),
        (dict(TRUNCATE_FRACTION=0.5, QAT_FRACTION=1), "QAT_FRACTION=1.0"),
        (dict(QUANT_CLIP="sdclip", QUANT_CLIP_PERCENTILE=90), "QUANT_CLIP=sdclip"),
        (dict(SKIP_GATES=1, NUM_SHARED=0, NUM_LAYERS=1), "too few for a skip"),
        (
            dict(CORE_SKIPS="looped", NUM_PRELUDE=0, NUM_SHARED=1, NUM_CODA=0, NUM_LOOPS=1),
            "too few for a skip",
        ),
        (dict(AVERAGE="swa", SWA_LR_FACTOR=0), "SWA_LR_FACTOR=0"),
        # Not off: it asks for the fewest with which the artifact fits.
        (dict(MATRIX_CLIP_SIGMAS=0), "QUANT_CLIP=percentile"),
        (dict(MATRIX_CLIP_SIGMAS=0, QUANT_CLIP="row"), "QUANT_CLIP=row"),
    ],
)
def test_known_inert_combinations(env: dict[str, Any], other: str) -> None:
    message = refused(**env)
    assert other in message and any(f"{name}=" in message for name in env)


@pytest.mark.parametrize(
    "env",
    [
        dict(TIE_EMBEDDINGS=0, BIGRAM_VOCAB_SIZE=64, TIED_EMBED_LR=0.1),
        dict(TIE_EMBEDDINGS=0, VE_LAYERS="4", TIED_EMBED_LR=0.1),
        dict(PRESET="naive", SKIP_GATES=1),  # a flat U-Net has skips
        dict(PRESET="frontier", TRUNCATE_FRACTION=0.36),
        dict(CORE_SKIPS="looped", NUM_PRELUDE=0, NUM_CODA=0),
        dict(CORE_SKIPS="by_position", NUM_PRELUDE=0, NUM_CODA=0),
        dict(TRACKER="tensorboard", EVAL_ONLY="model.ptz"),  # scores are sent
        dict(QUANT_CLIP="sdclip", MATRIX_CLIP_SIGMAS=0),
        dict(QUANT_CLIP="sdclip", QUANT_CLIP_PERCENTILE=90, BIGRAM_VOCAB_SIZE=64),
        dict(MATRIX_BITS=0, CORE_BITS=6, QAT_CORE_ONLY=1, QAT_FRACTION=0.1),
        dict(PRESET="naive", EVAL_ONLY="model.ptz", EVAL_PASSES=2),  # the artifact may have a core
    ],
)
def test_what_acts_is_accepted(env: dict[str, Any]) -> None:
    for name in env.keys() - {"PRESET"}:
        assert value_of(config(**env), name) == tg.parse(name, str(env[name]), KINDS[name])


@pytest.mark.parametrize(
    ("env", "off"),
    [
        (dict(NUM_LOOPS=1), dict(PASSES_SCHEDULE="", PASS_SCALE_INIT=1, FEEDBACK_RANK=0)),
        (dict(NUM_SHARED=0, VE_LAYERS=""), dict(QAT_CORE_ONLY=0, JACOBIAN_WEIGHT=0)),
        (dict(QAT_LR_FACTOR=0), dict(QAT_CORE_ONLY=0)),
        (dict(WARMDOWN_ITERS=0), dict(QAT_LR_FACTOR=0, QAT_CORE_ONLY=0)),
    ],
)
def test_what_a_preset_sets_goes_where_it_cannot_act(
    env: dict[str, Any], off: dict[str, Any]
) -> None:
    """It would have parameters without a gradient, and graphs that are all alike."""
    found = config(PRESET="growing_live", **env)
    for name, value in off.items():
        assert value_of(found, name) == value, name
    assert value_of(found, "LN_SCALE"), "what acts stays"
    torch.manual_seed(0)
    small: dict[str, Any] = dict(model_dim=16, num_heads=4, num_kv_heads=2, vocab_size=64)
    small |= dict(rope_dims=2, train_seq_len=8, dtype="float32")
    model = tg.GPT(tg.replace(found.architecture(), **small), 0.1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ids = torch.randint(2, 64, (1, 8))
    modes = tg.training_modes(found)
    assert len({mode.passes for mode in modes}) == len(set(dict(found.schedule()).values()))
    for mode in modes:
        model(ids, ids.roll(-1, 1), mode).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [f.name.upper() for f in fields(tg.Architecture)])
def test_architecture_comes_from_the_artifact(name: str) -> None:
    env = need(name, met=True) if name in CONDITIONAL else {}
    message = refused(
        **env,
        **{name: truthy(name) if KINDS[name] is bool else tg.show(FIELDS[name].default)},
        EVAL_ONLY="model.ptz",
    )
    assert "EVAL_ONLY" in message and (name in message or any(other in message for other in env))


# ---- Typing errors

# Names that environments of shells, schedulers, containers and libraries hold.
REALISTIC = """
PATH HOME LANG LC_ALL LC_CTYPE PWD OLDPWD TERM SHELL USER LOGNAME HOSTNAME EDITOR PAGER TZ TMPDIR
DISPLAY SHLVL _ MAIL LS_COLORS COLORTERM COLUMNS LINES PS1 UID EUID PPID IFS LESS MANPATH HISTSIZE
SSH_TTY SSH_CONNECTION SSH_CLIENT SSH_AUTH_SOCK SUDO_USER DBUS_SESSION_BUS_ADDRESS XDG_RUNTIME_DIR
XDG_SESSION_ID XDG_DATA_DIRS XDG_CONFIG_HOME XDG_CACHE_HOME DEBIAN_FRONTEND LD_LIBRARY_PATH
LIBRARY_PATH CPATH PKG_CONFIG_PATH CC CXX CFLAGS RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT
OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS TORCHELASTIC_RUN_ID
TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE
TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_LOGS TORCHINDUCTOR_CACHE_DIR
TORCH_HOME TORCH_CUDA_ARCH_LIST TRITON_CACHE_DIR PYTORCH_CUDA_ALLOC_CONF CUDA_VISIBLE_DEVICES
CUDA_HOME CUDA_PATH CUDA_VERSION CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUBLAS_WORKSPACE_CONFIG
NVIDIA_VISIBLE_DEVICES NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_VERSION
SLURM_JOB_ID SLURM_JOBID SLURM_PROCID SLURM_NTASKS SLURM_NODEID SLURM_LOCALID SLURM_NNODES
SLURM_JOB_NAME SLURM_SUBMIT_DIR SLURM_TASK_PID PBS_JOBID LSB_JOBID PYTHONPATH PYTHONHOME
PYTHONUNBUFFERED PYTHONHASHSEED PYTHONDONTWRITEBYTECODE PYTHON_VERSION VIRTUAL_ENV
VIRTUAL_ENV_PROMPT CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_EXE CONDA_SHLVL UV_CACHE_DIR PIP_CACHE_DIR
HF_HOME HF_TOKEN HF_HUB_CACHE HF_DATASETS_CACHE TRANSFORMERS_CACHE WANDB_API_KEY WANDB_PROJECT
WANDB_MODE WANDB_RUN_ID KUBERNETES_PORT KUBERNETES_SERVICE_HOST POD_NAME NODE_NAME NODE_RANK
RUNPOD_POD_ID RUNPOD_GPU_COUNT PUBLIC_KEY JUPYTER_TOKEN CI GITHUB_ACTIONS GITHUB_RUN_ID
PYTEST_CURRENT_TEST TERM_PROGRAM VSCODE_PID GIT_PAGER JAVA_HOME http_proxy https_proxy no_proxy
NUM_GPUS NPROC_PER_NODE VAR SEEDS_DIR DATA_DIR LOG_LEVEL
"""


def test_realistic_environment_passes() -> None:
    assert config(**dict.fromkeys(REALISTIC.split(), "junk")) == config()


def test_a_variable_of_our_own_tools_does_not_stop_a_run() -> None:
    """Who exports a repository for data/fineweb.py can train in the same shell."""
    sources = [path.read_text() for path in (ROOT / "data").glob("*.py")]
    names = {name for s in sources for name in re.findall(r'environ\.get\("(\w+)"', s)}
    assert len(names) >= 3
    assert config(**dict.fromkeys(names, "junk")) == config()


# Names that are told apart from typing errors.
FOREIGN = tg.INSTEAD.keys() | tg.UNSUPPORTED | tg.ORDINARY


def typos(name: str) -> set[str]:
    """One letter dropped, doubled or added at an end, or two neighbours swapped."""
    found = {name + "S", name + "_", "_" + name}
    for i in range(len(name)):
        found |= {name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:]}
        found.add(name[:i] + name[i : i + 2][::-1] + name[i + 2 :])
    return found - KINDS.keys() - FOREIGN - {"USE_DEPTH_EMBED"}


def suggestion(typo: str) -> str:
    message = refused(**{typo: "1"})
    assert message.startswith(f"{typo} is not an option")
    return message.split("did you mean ")[1].split("?")[0]


def nearness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, b, a).ratio()


def check_typo(name: str, typo: str) -> None:
    """Refused with the option that was meant, or with one that is as near."""
    guess = suggestion(typo)
    assert guess == name or nearness(typo, guess) >= nearness(typo, name), (typo, guess)


CONFUSABLE = [
    name
    for name in KINDS
    if len(name) <= 6 or any(name != other and nearness(name, other) > 0.75 for other in KINDS)
]


@settings(max_examples=150)
@given(
    st.sampled_from([name for name in KINDS if name not in CONFUSABLE]).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(sorted(typos(name))))
    )
)
def test_typing_error_is_refused(pair: tuple[str, str]) -> None:
    check_typo(*pair)


@pytest.mark.parametrize("name", CONFUSABLE)
def test_every_typing_error_in_a_confusable_name(name: str) -> None:
    """Short names are what a tolerance for real environments gives up, similar ones mislead."""
    as_far_as_omp_num_threads_from_num_heads = {"ESED", "SEDE"}
    for typo in sorted(typos(name) - as_far_as_omp_num_threads_from_num_heads):
        check_typo(name, typo)


def test_names_of_other_scripts_are_refused_with_what_to_set() -> None:
    """A pasted command says what it was to do; what is named in its place is an option."""
    for name, instead in tg.INSTEAD.items():
        ours = set(re.findall(r"[A-Z][A-Z_0-9]+", instead))
        assert ours and ours <= KINDS.keys(), instead
        if name not in tg.ORDINARY:
            assert name in (message := refused(**{name: "1"})) and instead in message
    for name in tg.UNSUPPORTED - tg.ORDINARY:
        assert name in refused(**{name: "1"})
    assert not FOREIGN & KINDS.keys()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NUM_SHARED_LAYERS", "NUM_SHARED"),
        ("EMA_DECAY_RATE", "EMA_DECAY"),
        ("SEQ_LEN", "TRAIN_SEQ_LEN"),
        ("LOG_EVERY", "TRAIN_LOG_EVERY"),
    ],
)
def test_a_part_of_a_name_and_more_than_a_name_are_refused(name: str, meant: str) -> None:
    assert f"{name} is not an option; did you mean {meant}?" in refused(**{name: "8"})


def test_ordinary_names_are_a_warning() -> None:
    env = dict.fromkeys([*tg.ORDINARY, *REALISTIC.split()], "1")
    errors, warnings = tg.questionable_names(env)
    assert not errors and len(warnings) == 1
    assert config(**env) == config()


def test_public_depth_switch_is_guarded_too() -> None:
    assert "DEPTH_EMBED" in refused(USE_DEPTH_EMBD=1)


def test_a_speed_is_compared_with_that_of_the_same_work() -> None:
    """Of the default, too; not of another size or batch."""
    published = {
        name: tg.published_speed(config(PRESET=name)) for name in ("", "T", "frontier", "growing")
    }
    assert published == {
        "": 524288e3 / 58.86,
        "T": 524288e3 / 58.86,
        "frontier": 0.0,
        "growing": 0.0,
    }
    for other in (dict(PRESET="T,tiny"), dict(MODEL_DIM=256), dict(TRAIN_BATCH_TOKENS=65536)):
        assert tg.published_speed(config(**other)) == 0


def test_who_lacks_data_is_told_how_to_fetch_those_of_his_tokenizer(tmp_path: Path) -> None:
    for preset, variant in (("T", ""), ("frontier", " --variant sp8192")):
        given = config(PRESET=preset, DATA_PATH=tmp_path)
        with pytest.raises(tg.InputError, match=f"data/fineweb.py{variant}` .* holds no fineweb_"):
            tg.Tokens(given, "train")
        with pytest.raises(tg.InputError, match=f"data/fineweb.py{variant}` .* is not there"):
            tg.ByteCounter.from_sentencepiece(tmp_path / "none", given.vocab_size)


# ---- Round trips and documents


@settings(max_examples=100)
@given(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**12), 10**12), st.booleans()
)
def test_shown_values_are_parsed_back(x: float, n: int, b: bool) -> None:
    """What the log shows can be set again."""
    for value in (x, n, b):
        assert tg.parse("X", tg.show(value), type(value)) == value


def test_artifact_header_round_trip() -> None:
    for system in tg.SYSTEMS:
        a = config(PRESET=system).architecture()
        assert tg.Architecture.from_json(json.loads(json.dumps(asdict(a)))) == a


def test_help_explains_every_option_and_preset() -> None:
    """In sentences, and as wide as a terminal is."""
    text = tg.help_text(80)
    assert max(map(len, text.splitlines())) <= 80
    for name, f in FIELDS.items():
        assert f"  {name}={tg.show(f.default)}  (" in text
        if name in NUMBERS:  # its bounds are those of `outside`
            low, high = f.metadata["low"], f.metadata["high"]
            bounds = f"{low} to {high}" if high < math.inf else f"at least {low}"
            assert re.search(rf"^  {name}=.*, {re.escape(bounds)}\)$", text, re.MULTILINE), name
        assert re.fullmatch(r"\S.*[.]", f.metadata["help"]), name
        assert tg.answer(["--help", name.lower()]).startswith(f"  {name}=")
    for name in (*tg.SYSTEMS, *tg.SCALES):
        assert f"\n  {name} " in text
        differs = tg.Config(**tg.preset_values(name)) != tg.Config()
        assert tg.answer(["--help", name]).endswith("  none") != differs
    both = tg.answer(["--help", "K,tiny"])
    assert "MODEL_DIM=128 " in both and "USE_TIMESTEP_BIAS=0 " in both


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--help", "MATRIX_LRS"], ["MATRIX_LRS", "MATRIX_LR?"]),
        (["--help", "k"], ["k is neither an option nor a preset", "K?"]),
        (["--help", "Z"], ["Z is neither an option nor a preset", "--help lists"]),
        (["--help", "K,tinny"], ["tinny is not a preset", "tiny?"]),
        (["--hlep"], ["--hlep", "--help?"]),
        (["--matrix-lr", "0.02"], ["MATRIX_LR=0.02 python train_gpt.py", "--help"]),
        (["MATRIX_LR=0.02"], ["MATRIX_LR=0.02 python train_gpt.py"]),
    ],
)
def test_arguments_are_answered_with_what_to_type(words: list[str], parts: list[str]) -> None:
    with pytest.raises(tg.InputError) as caught:
        tg.answer(words)
    assert all(part in str(caught.value) for part in parts)


def test_without_its_packages_the_script_names_the_command() -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "train_gpt.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    told = r"No module named 'numpy': \S+ -m pip install -r requirements.txt\n"
    assert done.returncode == tg.EXIT_INPUT and re.fullmatch(told, done.stderr)


@pytest.mark.parametrize("text", ["", "{}", '{"config": {"data_path": "d"}}', '{"config": [1]}'])
def test_a_result_that_does_not_say_the_data_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    for artifact in (tmp_path, tmp_path / "model.ptz"):
        with pytest.raises(tg.InputError, match="result.json does not say .* set DATA_PATH"):
            tg.data_beside(artifact, {})
        assert tg.data_beside(artifact, {"DATA_PATH": "", "TOKENIZER_PATH": ""}) == {}


def test_commands_of_the_readme_are_accepted() -> None:
    """Every one that sets options of the script."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^(.*[A-Z_]+=\S+ .*)train_gpt[.]py", text, re.MULTILINE)
    assert len(commands) > 2
    assert any("for s in" in command for command in commands)  # the loop over seeds, of two lines
    for command in commands:
        env = dict(re.findall(r"\b([A-Z][A-Z_]+)=(\S+)", command.replace("$s", "1337")))
        assert set(env) <= KINDS.keys() | {"OMP_NUM_THREADS"}, command
        config(**env)


IMPORT = """
import os, sys
import numpy, sentencepiece, torch
import torch.distributed, torch.nn.functional
read, written = set(), set()
class Watched(type(os.environ)):
    def __getitem__(self, name):
        read.add(name)
        return super().__getitem__(name)
    def __iter__(self):
        read.add("PRESET")
        return super().__iter__()
os.environ.__class__ = Watched
def watch(event, args):
    opened = event == "open" and set(str(args[1])) & set("wax+")
    if opened or event in ("os.mkdir", "os.remove", "os.rename"):
        written.add(str(args))
sys.addaudithook(watch)
state = torch.get_rng_state().clone(), torch.get_default_dtype(), torch.get_num_threads()
import train_gpt
assert not read & {name.upper() for name in train_gpt.Config.__dataclass_fields__}, read
assert not written, written
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(torch.get_rng_state(), state[0])
assert (torch.get_default_dtype(), torch.get_num_threads()) == state[1:]
"""


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    env = dict(PRESET="junk", SEED="x", RANK="1", WORLD_SIZE="2")
    env |= dict(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-c", IMPORT]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""
    assert list(tmp_path.iterdir()) == []
