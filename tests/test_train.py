"""Whole runs: every preset trains, exports, reloads and scores; ranks, processes and compilers agree."""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

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
CALM = dict(
    MATRIX_LR="0.01", SCALAR_LR="0.01", TIED_EMBED_LR="0.02"
)  # batches this small need lower rates
CLEAN = {k: v for k, v in os.environ.items() if k.lower() not in tg.Config.__dataclass_fields__}


def run(env: dict[str, str], folder: Path) -> dict:
    """A run in this process; its result."""
    config = tg.Config.from_env(env | {"LOG_DIR": str(folder), "RUN_ID": env.get("RUN_ID", "run")})
    assert tg.run(config, tg.World({})) == 0
    return json.loads((folder / config.run_id / "result.json").read_text())


def start(env: dict[str, str], ranks: int = 1) -> subprocess.CompletedProcess:
    """A run in processes of its own, as a user starts it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(Path(tg.__file__))]
    return subprocess.run(command, env=CLEAN | env, capture_output=True, text=True, timeout=300)


def launch(env: dict[str, str], ranks: int = 1) -> None:
    done = start(env, ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [m["train_loss"] for m in metrics(folder) if "train_loss" in m]


@pytest.mark.parametrize("system", tg.SYSTEMS)
def test_every_preset_trains_exports_reloads_and_scores(
    system: str, corpus: dict, tmp_path: Path
) -> None:
    result = run(corpus | SMALL | {"PRESET": f"{system},tiny"}, tmp_path)
    assert result["steps"] == 2 and result["fits"]
    assert result["roundtrip"]["val_tokens"] == 5_000
    assert abs(losses(tmp_path / "run")[0] - math.log(1024)) < 0.2, (
        "an untrained model is near uniform"
    )
    assert result["roundtrip"]["val_loss"] == pytest.approx(
        result["pre_quant"]["val_loss"], abs=0.05
    )


def test_training_lowers_the_loss_and_health_is_true(corpus: dict, tmp_path: Path) -> None:
    env = {
        "PRESET": "T,tiny",
        "MODEL_DIM": "64",
        "ITERATIONS": "25",
        "VAL_LOSS_EVERY": "25",
        "WARMDOWN_ITERS": "15",
        "TRAIN_BATCH_TOKENS": "2048",
    } | CALM
    result = run(corpus | SMALL | env, tmp_path)
    rows = [m for m in metrics(tmp_path / "run") if "health" in m]
    assert [m["step"] for m in rows] == [0, 25]
    assert rows[1]["val_loss"] < rows[0]["val_loss"] - 1 and result["steps"] == 25
    start = rows[0]["health"]
    assert len(start) == 14, "one row for every effective layer"
    for row in start:  # the initial values, where everything is known
        assert row["mix"] == row["mix_x0"] == 0.5 and row["attn_shift"] == row["mlp_shift"] == 0
        assert row["attn_scale"] == row["mlp_scale"] == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.startswith(Path(tg.__file__).read_text()), "the log opens with the source"
    for line in (
        "step:25/25 train_loss:",
        "Total submission size int8+zlib: ",
        "final_int8_zlib_roundtrip_exact val_loss:",
    ):
        assert line in log
    assert f"val_bpb:{result['roundtrip']['val_bpb']:.8f}" in log


def test_health_measures_scales_and_growth() -> None:
    """RMS of scale times clamped gamma, and RMS after over RMS before, checked by hand on one layer."""
    config = tg.Config.from_env({"PRESET": "T,tiny", "DTYPE": "float32"})
    model = tg.GPT(config.architecture(), 0.02)
    with torch.no_grad():
        model.cond.gamma[3, 0] = 9.0  # beyond the cap of 4
        model.attn[3].scale.fill_(0.5)
        model.cond.beta[:, 0] = 0.0
        model.cond.beta[0, 1] = 2.0
        model.mlp[0].scale.zero_()
    rows = tg.recurrence_health(model, torch.arange(32)[None], model.scoring)
    assert rows[3]["attn_scale"] == pytest.approx(2.0) and rows[0]["mlp_shift"] == pytest.approx(
        2.0
    )
    x = (
        tg.rms_norm(model.tok_emb[:32]) + 2.0
    )  # in layer 0, mix, depth code and attention change nothing
    assert rows[0]["growth"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)


def test_one_rank_and_two_ranks_agree(corpus: dict, tmp_path: Path) -> None:
    env = (
        corpus
        | SMALL
        | CALM
        | dict(
            PRESET="T,tiny",
            DTYPE="float32",
            ITERATIONS="20",
            OMP_NUM_THREADS="1",
            LOG_DIR=str(tmp_path),
            MICRO_BATCH_TOKENS="128",
        )
    )
    for ranks in (1, 2):
        launch(env | {"RUN_ID": f"ranks{ranks}"}, ranks)
    one, two = losses(tmp_path / "ranks1"), losses(tmp_path / "ranks2")
    assert len(one) == 20 and one == pytest.approx(two, abs=1e-4)
    results = [json.loads((tmp_path / f"ranks{r}" / "result.json").read_text()) for r in (1, 2)]
    assert [r["world_size"] for r in results] == [1, 2]
    assert results[0]["roundtrip"]["val_bpb"] == pytest.approx(
        results[1]["roundtrip"]["val_bpb"], abs=1e-4
    )
    artifact = str(tmp_path / "ranks1" / "model.ptz")
    for ranks in (1, 2):  # a fresh process, told nothing about the model
        keep = {k: v for k, v in env.items() if k.lower() in tg.EVAL_OPTIONS and k != "PRESET"}
        launch(
            keep | {"OMP_NUM_THREADS": "1", "EVAL_ONLY": artifact, "RUN_ID": f"eval{ranks}"}, ranks
        )
        scored = json.loads((tmp_path / f"eval{ranks}" / "result.json").read_text())
        assert scored["roundtrip"]["val_bpb"] == pytest.approx(
            results[0]["roundtrip"]["val_bpb"], abs=1e-6
        )
        assert scored["artifact_sha256"] == results[0]["artifact_sha256"]


def test_ranks_fail_together(corpus: dict, tmp_path: Path) -> None:
    """Ranks that cannot share a batch; and a token id, in the middle of a run, that only the second meets."""
    env = (
        corpus
        | SMALL
        | dict(PRESET="T,tiny", LOG_DIR=str(tmp_path), OMP_NUM_THREADS="1", RUN_ID="run")
    )
    done = start(env | {"TRAIN_BATCH_TOKENS": "192"}, ranks=2)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert all(
        f"[rank {i}] WORLD_SIZE=2 does not divide the 3 sequences" in done.stderr for i in (0, 1)
    )
    folder = tmp_path / "bad"
    shutil.copytree(corpus["DATA_PATH"], folder)
    path = folder / "fineweb_train_000000.bin"
    data = bytearray(path.read_bytes())
    data[1024 + 2 * 400 : 1024 + 2 * 401] = (2000).to_bytes(
        2, "little"
    )  # step 0, second half: rank 1's
    path.write_bytes(data)
    done = start(env | {"DATA_PATH": str(folder)}, ranks=2)
    assert done.returncode != 0 and not (tmp_path / "run" / "model.ptz").exists()
    assert (
        f"[rank 1] {path} holds token 2000" in done.stderr and f"[rank 0] {path}" not in done.stderr
    )


def test_same_seed_same_losses_to_the_last_bit(corpus: dict, tmp_path: Path) -> None:
    env = corpus | SMALL | {"PRESET": "T,tiny", "ITERATIONS": "4"}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(env | {"RUN_ID": name, "SEED": seed}, tmp_path)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_gradient_accumulation_changes_nothing(corpus: dict, tmp_path: Path) -> None:
    env = corpus | SMALL | {"PRESET": "T,tiny", "DTYPE": "float32", "ITERATIONS": "5"}
    for micro in ("512", "64"):
        run(env | {"MICRO_BATCH_TOKENS": micro, "RUN_ID": micro}, tmp_path)
    assert losses(tmp_path / "512") == pytest.approx(losses(tmp_path / "64"), abs=1e-5)


def test_warm_up_leaves_no_trace(corpus: dict, tmp_path: Path) -> None:
    env = corpus | SMALL | {"PRESET": "Q,tiny", "ITERATIONS": "3"}
    for steps in ("0", "2"):
        run(env | {"WARMUP_STEPS": steps, "RUN_ID": steps}, tmp_path)
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


def test_warm_up_compiles_what_training_runs(corpus: dict) -> None:
    """No graph is left to compile on the clock."""
    config = tg.Config.from_env(corpus | SMALL | {"PRESET": "Bp,tiny", "WARMUP_STEPS": "1"})
    world, counter = tg.World({}), torch._dynamo.testing.CompileCounter()
    model = tg.GPT(config.architecture(), 0.005)
    batches = tg.Batches(tg.Tokens(config, "train"), config, world)
    trainer = tg.Trainer(config, world, model, batches)
    trainer.forward = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    trainer.warm_up()
    assert counter.frame_count == 1
    for step in range(2):
        trainer.train_step(step, 1.0, batches.micro(step))
    assert counter.frame_count == 1


def test_the_cap_ends_training_before_it_is_passed(corpus: dict, tmp_path: Path) -> None:
    env = corpus | SMALL | {"PRESET": "T,tiny", "ITERATIONS": "100000", "WARMDOWN_ITERS": "10"}
    result = run(env | {"MAX_WALLCLOCK_SECONDS": "4", "TRAIN_LOG_EVERY": "1000"}, tmp_path)
    assert 2.5 < result["train_seconds"] <= 4.2 and 10 < result["steps"] < 100000
    assert "stopping_early: wallclock_cap" in (tmp_path / "run" / "train.log").read_text()


def test_learning_rate_schedule() -> None:
    env = {"ITERATIONS": "100", "WARMDOWN_ITERS": "20", "MAX_WALLCLOCK_SECONDS": "1000"}
    config = tg.Config.from_env(env)
    assert [tg.lr_factor(config, s, 1.0 * s) for s in (0, 50, 80, 90, 100)] == [1, 1, 1, 0.5, 0]
    slow = [
        tg.lr_factor(config, s, 20.0 * s) for s in (1, 30, 40, 50)
    ]  # the clock ends it at step 50
    assert slow == pytest.approx([1, 1, 0.5, 0])
    assert tg.muon_momentum(config, 0) == 0.85 and tg.muon_momentum(config, 500) == 0.95
    assert tg.muon_momentum(config, 250) == pytest.approx(0.9)


def test_reference_bf16_rounds_tables_and_embedding(corpus: dict, tmp_path: Path) -> None:
    config = tg.Config.from_env(corpus | SMALL | {"PRESET": "T,tiny", "REFERENCE_BF16": "1"})
    world = tg.World({})
    model = tg.GPT(config.architecture(), 0.005)
    batches = tg.Batches(tg.Tokens(config, "train"), config, world)
    trainer = tg.Trainer(config, world, model, batches)
    for step in range(2):
        trainer.train_step(step, 1.0, batches.micro(step))
    rounded = {name: torch.equal(p, p.bfloat16().float()) for name, p in model.named_parameters()}
    assert rounded["tok_emb"] and rounded["cond.gamma"] and rounded["cond.beta"]
    assert not rounded["attn.0.qkv.weight"] and not rounded["mlp.0.scale"]


@pytest.mark.parametrize("system", ["T", "M", "naive"])
def test_one_graph_compiles_and_agrees(system: str) -> None:
    """Run M with its 12 MLPs, too; the compiled path, whose head takes all rows at once, equals the other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = tg.Config.from_env(
        {"PRESET": f"{system},tiny", "DTYPE": "float32", "TRAIN_SEQ_LEN": "32"}
    )
    torch.manual_seed(0)
    model = tg.GPT(config.architecture(), 0.02)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    ids = torch.randint(1024, (2, 33))
    gradients = {}
    for f in (model, compiled, compiled):
        model.zero_grad()
        loss = f(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients[f] = loss.item(), [p.grad.clone() for p in model.parameters()]
    assert gradients[compiled][0] == pytest.approx(gradients[model][0], abs=1e-5)
    for a, b in zip(gradients[compiled][1], gradients[model][1]):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-7
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def counting(monkeypatch: pytest.MonkeyPatch) -> torch._dynamo.testing.CompileCounter:
    """Counts the graphs that torch.compile makes, and compiles nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.mark.parametrize("system, loops", [("K", 2), ("K", 3), ("K", 6), ("M", 3)])
def test_blocks_are_one_graph_at_any_depth(
    system: str, loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all layers, of prelude, core and coda, one for the head; M has an MLP for every pass."""
    counter = counting(monkeypatch)
    config = tg.Config.from_env(
        {
            "PRESET": f"{system},tiny",
            "DTYPE": "float32",
            "TRAIN_SEQ_LEN": "32",
            "COMPILE": "block",
            "NUM_LOOPS": str(loops),
        }
    )
    torch.manual_seed(0)
    model = tg.GPT(config.architecture(), 0.02)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    forward, ids = tg.compiled(model, config, tg.World({})), torch.randint(1024, (2, 33))
    found = []
    for f in (model, forward, forward):
        model.zero_grad()
        loss = f(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append((loss.item(), model.tok_emb.grad.norm().item()))
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-4)
    assert counter.frame_count == 2


def test_rates_and_momentum_make_no_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counting(monkeypatch)
    params = [tg.parameter("matrix", torch.randn(shape)) for shape in ((8, 8), (8, 16), (16, 8))]
    muon = tg.Muon(params, 0.1, 0.9, 5)
    muon.iterate = torch.compile(tg.newton_schulz, dynamic=False)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        muon.param_groups[0].update(lr=0.1 / (step + 1), momentum=0.9 + 0.01 * step)
        muon.step()
    assert counter.frame_count == 2, "two shapes: wide and tall are one stack"


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_backends_agree(backend: str) -> None:
    config = tg.Config.from_env({"PRESET": "T,tiny", "DTYPE": "float32", "ATTN_BACKEND": backend})
    torch.manual_seed(0)
    model, ids = tg.GPT(config.architecture(), 0.02), torch.randint(1024, (2, 257))
    with torch.nn.attention.sdpa_kernel(tg.KERNELS[backend]), torch.no_grad():
        found = tg.compiled(model, config, tg.World({}))(ids[:, :-1], ids[:, 1:])
        assert found.item() == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item(), abs=1e-5)


def test_a_compiled_graph_of_another_attention_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch keeps compiled graphs on disk, by keys without the kernel that attention was given."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counts = torch._dynamo.utils.counters["aot_autograd"]
    counts.clear()
    for backend, hits in (("math", 0), ("flash", 0), ("math", 1)):
        torch._dynamo.reset()
        config = tg.Config.from_env(
            {
                "PRESET": "naive,tiny",
                "NUM_LAYERS": "1",
                "TRAIN_SEQ_LEN": "16",
                "DTYPE": "float32",
                "ATTN_BACKEND": backend,
                "COMPILE": "model",
            }
        )
        torch.manual_seed(0)
        model, ids = tg.GPT(config.architecture(), 0.02), torch.zeros(1, 16, dtype=torch.int64)
        with (
            torch.nn.attention.sdpa_kernel(tg.KERNELS[backend], set_priority=True),
            torch.no_grad(),
        ):
            tg.compiled(model, config, tg.World({}))(ids, ids.clone())
        assert counts["autograd_cache_hit"] == hits


# A rank whose compiler fails for whole models, on rank LAST for blocks, too; or, if that is "all", always.
FALLING = """
import os, sys, torch
import train_gpt as tg
build = torch.compile
def broken(f=None, **options):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")
    whole, last = isinstance(f, torch.nn.Module), os.environ["LAST"]
    fails = whole or last == "all" or last == os.environ.get("RANK", "0") and f is tg.block
    return fail if fails else build(f, backend="eager", **options)
torch.compile = broken
sys.exit(tg.main())
"""


@pytest.mark.parametrize(("ranks", "last", "steps"), [(1, "none", 1), (2, "1", 1), (1, "all", 0)])
def test_a_rung_that_fails_on_one_rank_is_left_by_all(
    ranks: int, last: str, steps: int, corpus: dict, tmp_path: Path
) -> None:
    (tmp_path / "rank.py").write_text(FALLING)
    env = (
        corpus
        | SMALL
        | dict(
            PRESET="Bp,tiny",
            LOG_DIR=str(tmp_path),
            RUN_ID="run",
            OMP_NUM_THREADS="1",
            COMPILE="model",
            WARMUP_STEPS=str(steps),
            LAST=last,
            MODEL_DIM="32",
            PYTHONPATH=str(Path(tg.__file__).parent),
        )
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(tmp_path / "rank.py")]
    done = subprocess.run(command, env=CLEAN | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    log = (tmp_path / "run" / "train.log").read_text()
    fallen = re.findall(r"^warning: COMPILE=(\w+) failed.*: Traceback", log, re.MULTILINE)
    assert (
        fallen == ["model", "block"][: 1 if last == "none" else 2]
        and "no compiler here" in done.stdout
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("system", ["T", "M"])
def test_trains_compiled_on_a_gpu(system: str, corpus: dict, tmp_path: Path) -> None:
    env = {"PRESET": f"{system},tiny", "COMPILE": "model", "ITERATIONS": "5"}
    result = run(corpus | SMALL | env, tmp_path)
    assert result["steps"] == 5 and math.isfinite(result["roundtrip"]["val_bpb"])
