"""Whole runs: every preset trains, exports, reloads and scores; ranks agree; warm-up, averages."""

import hashlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import (
    GROWTH,
    SCRIPT,
    flat,
    fork_ranks,
    let_steps_take,
    log_of,
    losses,
    metrics,
    real_trainer,
    result_of,
    run_here,
    shard_bytes,
    start,
    train_only,
    write_manifest,
    write_shards,
)
from torch import Tensor

import train_gpt as tg

SMALL = dict(
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
    VAL_BATCH_SIZE="1024",
    ITERATIONS="2",
    WARMDOWN_ITERS="0",
    TRAIN_LOG_EVERY="1",
    MAX_WALLCLOCK_SECONDS="0",
    WARMUP_STEPS="0",
)


NARROW = dict(MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1")
SHALLOW = dict(NUM_SHARED="1", NUM_LOOPS="2")  # a core of one layer, twice
CALM = dict(MATRIX_LR="0.01", SCALAR_LR="0.01", TIED_EMBED_LR="0.02")  # for batches this small


@pytest.mark.parametrize("system", tg.SYSTEMS)
def test_every_preset_trains_exports_reloads_and_scores(
    system: str, few_tokens: dict[str, str], tmp_path: Path
) -> None:
    """In the type of GPUs, in which a CPU takes long for a token."""
    env = {"PRESET": f"{system},tiny", "DTYPE": "bfloat16", "TRAIN_BATCH_TOKENS": "128"}
    result = run_here(few_tokens | SMALL | NARROW | env, tmp_path)
    assert result["steps"] == 2 and result["fits"]
    score = result["roundtrip"]
    assert score["val_tokens"] == 176
    first = losses(tmp_path / "run")[0]
    assert abs(first - math.log(1024)) < 0.2, "an untrained model is near uniform"
    assert score["val_loss"] == pytest.approx(result["pre_quant"]["val_loss"], abs=0.05)


@pytest.mark.parametrize(
    ("features", "dtype", "slow"),
    [
        (dict(avx2=True, avx512_bf16=False), "bfloat16", True),
        (dict(avx2=True, avx512_bf16=False), "float32", False),
        (dict(neon=True, bf16=True), "bfloat16", False),
        ({}, "bfloat16", False),  # what an older PyTorch tells
    ],
)
def test_a_cpu_without_bfloat16_is_a_warning(
    features: dict[str, bool],
    dtype: str,
    slow: bool,
    corpus: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of the scale for CPUs took 30 s on one (records/tiny_T/bfloat16), where 3 suffice."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    said: list[str] = []
    log: Any = said.append
    tg.log_setup(real_trainer(corpus | SMALL | NARROW | dict(PRESET="Bp,tiny", DTYPE=dtype)), log)
    assert any(line.startswith("warning: bfloat16 is slow") for line in said) == slow
    assert said[-1].startswith("tokenizer of the train shards: ")


def test_training_lowers_the_loss_and_health_is_true(
    more_validation: dict[str, str], tmp_path: Path
) -> None:
    env = {
        "PRESET": "T,tiny",
        "MODEL_DIM": "64",
        "DTYPE": "float32",
        "ITERATIONS": "25",
        "VAL_LOSS_EVERY": "25",
        "WARMDOWN_ITERS": "15",
        "TRAIN_BATCH_TOKENS": "1024",
    } | CALM
    result = run_here(more_validation | SMALL | SHALLOW | env, tmp_path)
    rows = [m for m in metrics(tmp_path / "run") if "health" in m]
    assert [m["step"] for m in rows] == [0, 25]
    assert rows[1]["val_loss"] < rows[0]["val_loss"] - 1 and result["steps"] == 25
    start = rows[0]["health"]
    assert len(start) == 4, "one row for every effective layer"
    for row in start:  # the initial values, where everything is known
        assert row["mix"] == row["mix_x0"] == 0.5 and row["attn_shift"] == row["mlp_shift"] == 0
        assert row["attn_scale"] == row["mlp_scale"] == 1
    head, _, rest = (tmp_path / "run" / "train.log").read_bytes().partition(b"\n")
    script, log = SCRIPT.read_bytes(), log_of(tmp_path / "run")
    sha256 = hashlib.sha256(script).hexdigest()
    assert head.decode() == f"script_bytes:{len(script)} script_sha256:{sha256}"
    assert rest.startswith(script + b"\n"), "the log opens with the script"
    assert "\nmodel_params:" in log, "what the setup says"
    assert "step:25/25 train_loss:" in log and "Total submission size int8+zlib: " in log
    assert "final_int8_zlib_roundtrip_exact val_loss:" in log
    assert f"val_bpb:{result['roundtrip']['val_bpb']:.8f}" in log


@pytest.mark.bits
def test_one_rank_and_two_ranks_agree(corpus: dict[str, str], tmp_path: Path) -> None:
    """Two ranks started by torchrun; the artifact scored by processes that are told no more."""
    env = corpus | SMALL | CALM | NARROW | SHALLOW | dict(PRESET="T,tiny", ITERATIONS="6")
    env |= dict(LOG_DIR=str(tmp_path), MICRO_BATCH_TOKENS="128")
    assert fork_ranks(env | {"RUN_ID": "one"}, 1).codes == [0]
    done = start(env | {"RUN_ID": "two"}, ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one == pytest.approx(two, abs=1e-4)
    results = [result_of(tmp_path / name) for name in ("one", "two")]
    assert [result["world_size"] for result in results] == [1, 2]
    bpb = results[0]["roundtrip"]["val_bpb"]
    assert results[1]["roundtrip"]["val_bpb"] == pytest.approx(bpb, abs=1e-4)
    told = ("LOG_DIR", "VAL_BATCH_SIZE", "MICRO_BATCH_TOKENS")  # data: by the result beside it
    again = {name: env[name] for name in told} | {"EVAL_ONLY": str(tmp_path / "one" / tg.ARTIFACT)}
    ended = fork_ranks(again | {"RUN_ID": "eval_one"}, 1)
    assert ended.codes == [0], ended.texts
    data = {name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    assert fork_ranks(again | data | {"RUN_ID": "eval_two"}, 2).codes == [0, 0]
    for name in ("eval_one", "eval_two"):
        scored = result_of(tmp_path / name)
        assert scored["roundtrip"]["val_bpb"] == pytest.approx(bpb, abs=1e-6)
        assert scored["artifact_sha256"] == results[0]["artifact_sha256"]


@pytest.mark.bits
def test_ranks_agree_where_some_parameters_have_no_gradient(
    corpus: dict[str, str], tmp_path: Path
) -> None:
    """With MLPs that only some passes use, a truncated gradient, and a refit of fewer passes."""
    env = corpus | SMALL | CALM | NARROW | SHALLOW | dict(PRESET="T,tiny", ITERATIONS="6")
    env |= dict(LOG_DIR=str(tmp_path), MICRO_BATCH_TOKENS="128", WARMUP_STEPS="1")
    env |= dict(SHARE_ATTN_ONLY="1", CORE_SKIPS="by_position", CORE_LR_POWER="1", MUON_WD="0.5")
    env |= dict(TRUNCATE_FRACTION="0.7", PASSES_SCHEDULE="0:1,2:2", SCALAR_WD="0.5")
    env |= dict(REFIT_STEPS="2", EVAL_PASSES="1")
    assert fork_ranks(env | {"RUN_ID": "one"}, 1).codes == [0]
    ended = fork_ranks(env | {"RUN_ID": "two"}, 2)
    assert ended.codes == [0, 0], ended.texts
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one == pytest.approx(two, abs=1e-4)
    scores = [result_of(tmp_path / name)["roundtrip"]["val_bpb"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.bits
def test_ranks_fail_together(corpus: dict[str, str], tmp_path: Path) -> None:
    """Ranks that cannot share a batch; a token id, amid a run, that only the second one meets."""
    env = corpus | SMALL | NARROW | SHALLOW | dict(PRESET="T,tiny", RUN_ID="run")
    env |= dict(LOG_DIR=str(tmp_path))
    ended = fork_ranks(env | {"TRAIN_BATCH_TOKENS": "192"}, 2)
    assert ended.codes == [tg.EXIT_INPUT] * 2 and not (tmp_path / "run").exists()
    for rank, text in enumerate(ended.texts):
        assert f"[rank {rank}] WORLD_SIZE=2 does not divide the 3 sequences" in text
    folder = tmp_path / "bad"
    shutil.copytree(corpus["DATA_PATH"], folder)
    path = folder / "fineweb_train_000000.bin"
    data = bytearray(path.read_bytes())
    at = 1024 + 2 * 2400  # step 5, second half: rank 1's; behind the sample that both look at
    data[at : at + 2] = (2000).to_bytes(2, "little")
    path.write_bytes(data)
    ended = fork_ranks(env | {"DATA_PATH": str(folder), "ITERATIONS": "6"}, 2)
    assert all(ended.codes) and not (tmp_path / "run" / tg.ARTIFACT).exists()
    assert f"[rank 1] {path} holds token 2000" in ended.texts[1]
    assert f"[rank 0] {path}" not in ended.texts[0]


@pytest.mark.bits
def test_same_seed_same_losses_to_the_last_bit(corpus: dict[str, str], tmp_path: Path) -> None:
    env = corpus | SMALL | NARROW | SHALLOW | {"PRESET": "T,tiny", "ITERATIONS": "4"}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_here(env | {"RUN_ID": name, "SEED": seed}, tmp_path)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_gradient_accumulation_changes_nothing(corpus: dict[str, str], tmp_path: Path) -> None:
    env = corpus | SMALL | NARROW | SHALLOW | {"PRESET": "T,tiny", "ITERATIONS": "5"}
    for micro in ("512", "64"):
        run_here(env | {"MICRO_BATCH_TOKENS": micro, "RUN_ID": micro}, tmp_path)
    assert losses(tmp_path / "512") == pytest.approx(losses(tmp_path / "64"), abs=1e-5)


def test_the_cap_ends_training_before_it_is_passed(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a quarter of a second under a cap of four: the 15th is the last, one is to spare."""
    let_steps_take(0.25, monkeypatch)
    env = {"PRESET": "T,tiny", "ITERATIONS": "100000", "WARMDOWN_ITERS": "10"}
    env |= {"MAX_WALLCLOCK_SECONDS": "4", "TRAIN_LOG_EVERY": "1000"}
    result = run_here(corpus | SMALL | NARROW | SHALLOW | env, tmp_path)
    assert (result["steps"], result["train_seconds"]) == (15, pytest.approx(15 * 0.25))
    assert "stopping_early: wallclock_cap" in log_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (dict(PASSES_SCHEDULE="0:1,0.6:2"), ["ends with 2 passes; NUM_LOOPS=3 are scored"]),
        (dict(PASSES_SCHEDULE="0:1,50:3"), ["never comes to its last entry: ITERATIONS=50"]),
        (dict(PASSES_SCHEDULE="0:1,49:3"), []),
        (dict(PASSES_SCHEDULE="0:1,0.6:2", EVAL_PASSES="2"), []),
        (dict(), []),
    ],
)
def test_passes_that_are_scored_untrained_are_told_before(
    env: dict[str, str], told: list[str]
) -> None:
    config = tg.Config.from_env({"NUM_LOOPS": "3", "ITERATIONS": "50"} | env)
    found = tg.schedule_warnings(config)
    assert len(found) == len(told) and all(b in a for a, b in zip(found, told)), found


@pytest.mark.parametrize(
    ("preset", "step", "told"),
    [("T", 8571, ""), ("S", 499, "MUON_MOMENTUM_WARMUP_STEPS=500"), ("frontier", 1000, "")],
)
def test_what_the_end_of_the_time_cut_off_is_told(preset: str, step: int, told: str) -> None:
    """A run on a slower node, 600 s of 70 ms, lacks nothing: its rates fell with the time."""
    lines: list[str] = []
    log = cast(tg.Log, lines.append)
    reporter = tg.Reporter(tg.Config.from_env({"PRESET": preset}), log)
    reporter.end(cast(tg.Trainer, SimpleNamespace(step=step, epochs=0.5)), 600.0, "wallclock_cap")
    warnings = [line for line in lines if "warning" in line.lower()]
    assert len(warnings) == bool(told) and told in "".join(warnings)


def test_training_tokens_that_come_again_are_told_once(
    corpus: dict[str, str], tmp_path: Path
) -> None:
    """And how often they came is in the result; the speed is also logged early."""
    env = corpus | SMALL | NARROW | SHALLOW | {"PRESET": "Bp,tiny", "TRAIN_LOG_EVERY": "2"}
    data = tmp_path / "data"
    shutil.copytree(env["DATA_PATH"], data)
    for path in data.glob("fineweb_train_*"):
        path.unlink()
    for steps in (5, 3):
        shard = shard_bytes([1] * (512 * steps))
        (data / "fineweb_train_000000.bin").write_bytes(shard)
        name = f"{steps} of 5"
        given = {"ITERATIONS": "5", "RUN_ID": name, "DATA_PATH": str(data)}
        result = run_here(env | given, tmp_path)
        log = log_of(tmp_path / name)
        told = f"\nwarning: all {512 * steps:,} training tokens were read, and are read again\n"
        assert log.count(told) == (steps < 5)
        assert result["epochs"] == 5 / steps
        assert log.count("\nspeed:") == 2


def test_a_warm_down_of_more_steps_than_a_run_has_is_told(
    corpus: dict[str, str], tmp_path: Path
) -> None:
    """But not where a fraction of the run takes its place."""
    env = corpus | SMALL | NARROW | SHALLOW | {"PRESET": "Bp,tiny"}
    del env["WARMDOWN_ITERS"]  # the scale's
    for name, options in (("steps", {}), ("fraction", {"WARMDOWN_FRACTION": "0.5"})):
        run_here(env | options | {"RUN_ID": name}, tmp_path)
    told = "warning: WARMDOWN_ITERS=50: the learning rate falls from step 0 on"
    assert told in log_of(tmp_path / "steps")
    assert "the learning rate falls" not in log_of(tmp_path / "fraction")


def test_reference_bf16_rounds_tables_and_embedding(corpus: dict[str, str]) -> None:
    env = corpus | SMALL | NARROW | SHALLOW | {"PRESET": "T,tiny", "REFERENCE_BF16": "1"}
    trainer = real_trainer(env)
    for step in range(2):
        trainer.train_step(step, 1.0, trainer.batches.micro(step))
    named = trainer.model.named_parameters()
    rounded = {name: torch.equal(p, p.bfloat16().float()) for name, p in named}
    assert rounded["tok_emb"] and rounded["cond.gamma"] and rounded["cond.beta"]
    assert not rounded["attn.0.qkv.weight"] and not rounded["mlp.0.scale"]


# ---- Warm-up


@pytest.mark.bits
def test_warm_up_leaves_no_trace(corpus: dict[str, str], tmp_path: Path) -> None:
    env = corpus | SMALL | NARROW | SHALLOW | {"PRESET": "Q,tiny", "ITERATIONS": "3"}
    for steps in ("0", "2"):
        run_here(env | {"WARMUP_STEPS": steps, "RUN_ID": steps}, tmp_path)
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


def state(trainer: tg.Trainer) -> list[Tensor]:
    """Copies of all that training changes, and of PyTorch's random state, which comes first."""
    kept = [torch.get_rng_state(), *trainer.state()]
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            kept.append(torch.tensor([x for x in group.values() if isinstance(x, float)]))
    return [t.detach().clone() for t in kept]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.bits
def test_warm_up_restores_every_state(corpus: dict[str, str]) -> None:
    trainer = real_trainer(corpus | GROWTH | {"AVERAGE": "ema"})
    draws, before = repr(np.random.get_state()), state(trainer)
    trainer.warm_up()
    assert same(before, state(trainer)) and repr(np.random.get_state()) == draws
    assert trainer.average.count == 0 and trainer.last_good == "none"
    assert same(trainer.average.weights, [p.data for p in trainer.params])
    trainer.train_step(0, 0.0, trainer.batches.micro(0))
    assert not same(before[1:], state(trainer)[1:])


# ---- Rounding pays, averages are what is exported


SMALL_T = dict(
    PRESET="T,tiny",
    NUM_SHARED="1",
    NUM_LOOPS="2",
    MODEL_DIM="64",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    DTYPE="float32",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="512",
    MICRO_BATCH_TOKENS="512",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="0",
    MATRIX_LR="0.02",
    SCALAR_LR="0.01",
    TIED_EMBED_LR="0.02",
    MUON_MOMENTUM_WARMUP_STEPS="20",
    SEED="1",
)


def test_training_on_rounded_matrices_shrinks_what_rounding_costs(
    corpus: dict[str, str], tmp_path: Path
) -> None:
    """At 2 bits, where the cost exceeds the noise of runs this small; the score gains, too.

    The text is drawn: that of the corpus differs by the version of Python.
    """
    draw = np.random.default_rng(0)
    follows, tokens = draw.integers(100, 164, (64, 3)), [100]
    for choice in draw.integers(0, 3, 60_500):
        tokens.append(follows[tokens[-1] - 100, choice])
    write_shards(tmp_path / "drawn", "train", tokens[:60_000])
    folder = write_shards(tmp_path / "drawn", "val", tokens[60_000:])
    write_manifest(folder, Path(corpus["TOKENIZER_PATH"]))
    env = corpus | SMALL_T | dict(ITERATIONS="60", WARMDOWN_ITERS="30", MATRIX_BITS="2")
    env |= dict(DATA_PATH=str(folder))
    off = run_here(env | {"RUN_ID": "off"}, tmp_path)
    on = run_here(env | {"RUN_ID": "on", "QAT_FRACTION": "0.5"}, tmp_path)
    cost, left = (r["roundtrip"]["val_loss"] - r["pre_quant"]["val_loss"] for r in (off, on))
    assert cost > 0.2 and left < cost - 0.2
    assert on["roundtrip"]["val_loss"] < off["roundtrip"]["val_loss"] - 0.1


def averaged(
    env: Mapping[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tg.Trainer, list[np.ndarray]]:
    """A trainer after a run, and the weights it had after every step."""
    weights: list[np.ndarray] = []
    update = tg.Average.update

    def record(average: tg.Average, params: list[Any], step: int, factor: float) -> None:
        weights.append(flat(params).double().numpy())
        assert step == len(weights)
        update(average, params, step, factor)

    monkeypatch.setattr(tg.Average, "update", record)
    trainer = real_trainer(env)
    train_only(trainer, folder)
    return trainer, weights


AVERAGING = GROWTH | dict(
    ITERATIONS="12",
    WARMDOWN_ITERS="10",
    MICRO_BATCH_TOKENS="256",
    PASSES_SCHEDULE="0:1",
    QAT_FRACTION="0",
    QAT_CORE_ONLY="0",
)


def test_moving_average_is_its_recurrence(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = corpus | AVERAGING | {"AVERAGE": "ema", "EMA_DECAY": "0.7"}
    trainer, weights = averaged(env, tmp_path, monkeypatch)
    expected = weights[0]
    for w in weights[1:]:
        expected = 0.7 * expected + 0.3 * w
    found = flat(trainer.average.weights).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert trainer.average.count == 12 and np.abs(found - weights[-1]).max() > 1e-3


def test_stochastic_average_is_the_mean_of_what_it_collects(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = corpus | AVERAGING | {"AVERAGE": "swa", "SWA_EVERY": "3", "SWA_LR_FACTOR": "0.65"}
    trainer, weights = averaged(env, tmp_path, monkeypatch)
    late = [step for step in range(1, 13) if step % 3 == 0 and (12 - step) / 10 < 0.65]
    assert late == [6, 9, 12] and trainer.average.count == 3
    expected = np.mean([weights[step - 1] for step in late], axis=0)
    found = flat(trainer.average.weights).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# AVERAGE: its options, and how many weights are in it at the end.
AVERAGES = {
    "ema": (dict(AVERAGE="ema", EMA_DECAY="0.7"), 12),
    "swa": (dict(AVERAGE="swa", SWA_EVERY="5", SWA_LR_FACTOR="0.9"), 2),
    "swa too late": (dict(AVERAGE="swa", SWA_EVERY="13", SWA_LR_FACTOR="0.9"), 0),
}


@pytest.mark.bits
@pytest.mark.parametrize("case", AVERAGES)
def test_the_average_is_exported_and_its_score_logged(
    case: str, corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the last weights, and the log says so, where nothing was collected."""
    packed: list[Tensor] = []
    last: list[Tensor] = []
    average: list[Tensor] = []
    pack, train = tg.pack, tg.Trainer.train

    def spy(model: tg.GPT, *rest: Any) -> bytes:
        packed.extend(p.detach().clone() for p in model.parameters())
        return pack(model, *rest)

    def kept(trainer: tg.Trainer, *rest: Any) -> Any:
        done = train(trainer, *rest)
        last.extend(p.detach().clone() for p in trainer.params)
        average.extend(trainer.average.weights)
        return done

    monkeypatch.setattr(tg, "pack", spy)
    monkeypatch.setattr(tg.Trainer, "train", kept)
    options, count = AVERAGES[case]
    result = run_here(corpus | AVERAGING | options | {"WARMUP_STEPS": "0"}, tmp_path)
    assert same(packed, average if count else last)
    assert same(packed, last) == (count == 0)
    before, after = (result[name]["val_loss"] for name in ("last_weights", "pre_quant"))
    assert (before == after) == (count == 0)
    kind = options["AVERAGE"]
    taken = f"the average of {count}" if count else "the last"
    assert f"\nAVERAGE={kind} exports {taken}\n" in log_of(tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["weights"] for row in rows if "weights" in row] == ["last", kind]


def test_nothing_is_averaged_unless_asked(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = corpus | AVERAGING | {"AVERAGE": "none", "ITERATIONS": "2"}
    trainer, weights = averaged(env, tmp_path, monkeypatch)
    assert len(weights) == 2 and not trainer.average.weights and trainer.average.count == 0
