"""records/tools/bench.py: it times only what computes the same, and it says what it measured."""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import set_up_forkserver

import train_gpt as tg
from records.tools import bench, race

SMALL = dict(
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    VOCAB_SIZE="64",
    TRAIN_SEQ_LEN="160",
    TRAIN_BATCH_TOKENS="640",
    MICRO_BATCH_TOKENS="320",
)
SHALLOW = dict(NUM_SHARED="1", NUM_LOOPS="2")  # a core of one layer, twice
TINY = dict(
    MODEL_DIM="8",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="128",
    MICRO_BATCH_TOKENS="64",
    NUM_PRELUDE="0",
    NUM_SHARED="1",
    NUM_LOOPS="2",
    NUM_CODA="0",
)
# All matrices of one shape: one graph of Newton-Schulz.
FEW_GRAPHS = dict(NUM_KV_HEADS="2", MLP_MULT="1")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("random")
    for split in ("train", "val"):
        bench.write_shard(folder, split, torch.randint(64, (4000,)).numpy())
    return {"DATA_PATH": str(folder)}


def pair(preset: str, tokens: dict[str, str], **variables: str) -> dict[str, race.Case]:
    env = {"PRESET": f"{preset},tiny"} | SMALL | tokens | variables
    return dict(ours=race.Case(env), plain=race.Case(env, plain=race.Plain()))


@pytest.mark.parametrize("preset", ["T", "K", "J", "Bp", "C", "E"])
def test_gate_passes_for_what_the_plain_model_implements(
    preset: str, tokens: dict[str, str]
) -> None:
    race.gate(pair(preset, tokens, **SHALLOW))


def other_softcap(plain: race.PlainTrainer) -> None:
    plain.model.a = tg.replace(plain.model.a, logit_softcap=15.0)


def other_weight(plain: race.PlainTrainer) -> None:
    block: Any = plain.model.blocks[0]
    block.up.weight.data[0, 0] += 0.1


def frozen_table(plain: race.PlainTrainer) -> None:
    assert plain.model.beta is not None
    plain.model.beta.register_hook(torch.zeros_like)


def not_finite(plain: race.PlainTrainer) -> None:
    assert plain.model.beta is not None
    plain.model.beta.register_hook(lambda gradient: gradient * float("nan"))


def other_iteration(plain: race.PlainTrainer) -> None:
    plain.muon.steps = 4


def other_rate(plain: race.PlainTrainer) -> None:
    plain.optimizers[0].param_groups[0]["lr"] *= 1.01


@pytest.mark.parametrize(
    "spoil", [other_softcap, other_weight, frozen_table, not_finite, other_iteration, other_rate]
)
def test_gate_fails_for_another_model_or_optimizer(
    spoil: Callable[[race.PlainTrainer], None],
    tokens: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled(case: race.Case, *args: Any, **kwargs: Any) -> race.Contestant:
        contestant = build(case, *args, **kwargs)
        if case.plain:
            spoil(contestant.trainer)
        return contestant

    build = race.build
    monkeypatch.setattr(race, "build", spoiled)
    with pytest.raises(race.Mismatch):
        race.gate(pair("T", tokens, **SHALLOW))


@pytest.mark.parametrize("preset", ["Ap", "L", "P", "S"])
def test_other_architectures_are_refused(preset: str, tokens: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="does not implement"):
        race.gate(pair(preset, tokens))


def run(monkeypatch: pytest.MonkeyPatch, *words: str, size: dict[str, str] = SMALL) -> int:
    """bench.py with these words; options of a small model and few steps are added."""
    variables = [f"{name}={value}" for name, value in size.items()]
    common = ["--set", *variables, "--steps", "2", "--warmup", "1"]
    named = bool(words) and not words[0].startswith("-")
    monkeypatch.setattr(sys, "argv", ["bench.py", *words[:named], *common, *words[named:]])
    return bench.main()


def test_command_prints_and_writes_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "x.json"
    words, size = ["--out", str(path), "--peak-tflops", "0.5", "--curve", "2"], SMALL | SHALLOW
    assert run(monkeypatch, *words, size=size) == 0
    result = json.loads(path.read_text())
    for figures in result["contestants"].values():
        speed = 640e3 / figures["step_ms"]["median"]
        assert figures["tokens_per_second"] == pytest.approx(speed, rel=0, abs=0.51)  # rounded
        assert figures["mfu"] == pytest.approx(speed * figures["mflop_per_token"] / 0.5e6, rel=0.01)
        assert figures["config"]["model_dim"] == 32
        assert len(figures["every_step_ms"]) == 2
    ours, plain = result["contestants"]["ours"], result["contestants"]["plain"]
    assert ours["last_loss"] == pytest.approx(plain["last_loss"], abs=0.1)
    assert (
        0 < result["curves"]["largest_difference"]["plain"] < 0.1
    )  # not 0: bfloat16 in other places
    assert 0 < result["seconds_of_steps"] <= result["wall_seconds"]
    assert "plain / ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--set", "NUM_HEAD=4"], "NUM_HEAD"),
        (["--set", "NO_SUCH_OPTION=4"], "NO_SUCH_OPTION"),
        (["--preset", "naive,tiny"], "NUM_SHARED"),
        (["ab", "--a", "COMPILE"], "KEY=VALUE"),
        (["ab", "--a", "COMPILE=never"], "COMPILE"),
        (["levers"], "--lever"),
        (["compile", "NUM_LOOPS=2,none"], "NUM_LOOPS"),
        (["--plain-attention", "flash"], "CUDA"),
        (["ab", "--b", "NUM_LOOPS=2"], "cond.gamma"),  # other shapes: not the same model
        (["ab", "--b", "MUON_BACKEND_STEPS=4"], "'update': 0."),
    ],
)
def test_command_times_nothing_it_was_not_asked_for(
    words: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "flash" in words and torch.cuda.is_available():
        pytest.skip("it can be had here")
    assert run(monkeypatch, *words) == (1 if "--b" in words else 2)
    out, error = capsys.readouterr()
    assert "step" not in out
    assert reason in error


def test_an_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(race, "gate", interrupt)
    assert run(monkeypatch, size=TINY) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_settings_of_the_same_mathematics_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, words = tmp_path / "x.json", ["--a", "DTYPE=float32", "--b", "MICRO_BATCH_TOKENS=640"]
    assert run(monkeypatch, "ab", *words, "--out", str(path), size=SMALL | SHALLOW) == 0
    result = json.loads(path.read_text())
    assert result["contestants"]["a"]["config"]["dtype"] == "float32"
    assert result["contestants"]["b"]["config"]["micro_batch_tokens"] == 640
    assert max(result["differences"]["b"].values()) < 1e-3


def test_commits_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (race.ROOT / "train_gpt.py").read_text()
    git = functools.partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    try:
        git(["git", "init"])
    except FileNotFoundError:
        pytest.skip("git is not installed")
    monkeypatch.setattr(race, "ROOT", tmp_path)
    other = script.replace("KELLER_JORDAN = ((3.4445", "KELLER_JORDAN = ((3.5")
    assert other != script
    for text in (script, script + "# the same\n", "x = 1\n", other):
        (tmp_path / "train_gpt.py").write_text(text)
        git(["git", "add", "train_gpt.py"])
        git(
            ["git", "-c", "user.name=n", "-c", "user.email=e", "commit", "--allow-empty", "-m", "m"]
        )
    assert run(monkeypatch, "revisions", "HEAD~3", "HEAD~2", size=TINY) == 0
    assert "HEAD~2 / HEAD~3" in capsys.readouterr().out
    assert run(monkeypatch, "revisions", "HEAD~3", "HEAD", size=TINY) == 1
    assert "update" in capsys.readouterr().err
    assert run(monkeypatch, "revisions", "HEAD~3", "HEAD~1", size=TINY) == 2
    assert "another interface" in capsys.readouterr().err
    assert run(monkeypatch, "revisions", "HEAD~3", "no-such", size=TINY) == 2
    assert "interface" not in capsys.readouterr().err
    assert (tmp_path / "train_gpt.py").read_text() == other  # what is checked out is left alone


def test_a_lever_is_kept_only_beyond_twice_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medians = {"baseline again": 0.995, "DTYPE=float32": 0.95, "MICRO_BATCH_TOKENS=640": 0.97}

    def measured(cases: dict[str, race.Case], args: argparse.Namespace) -> dict[str, Any]:
        assert list(cases) == ["baseline", *medians]
        ratios = {
            f"{name} / baseline": dict(p10=m - 0.015, median=m, p90=m + 0.01)
            for name, m in medians.items()
        }
        return dict(ratios=ratios, contestants={})

    monkeypatch.setattr(race, "run", measured)
    monkeypatch.setattr(bench, "show", lambda result: None)
    path, file = tmp_path / "x.json", tmp_path / "levers.txt"
    file.write_text("# a comment\n\nMICRO_BATCH_TOKENS=640\n")
    words = ["--lever", "DTYPE=float32", "--file", str(file), "--out", str(path)]
    assert run(monkeypatch, "levers", *words) == 0
    result = json.loads(path.read_text())
    assert result["spread_of_baseline"] == pytest.approx(0.02)
    assert {name: found["kept"] for name, found in result["verdicts"].items()} == {
        "DTYPE=float32": True,
        "MICRO_BATCH_TOKENS=640": False,
    }


def test_contestants_take_turns_on_the_same_steps() -> None:
    taken = []
    world = SimpleNamespace(on_cuda=False, synchronize=lambda: None)
    line = {
        name: SimpleNamespace(step=lambda step, name=name: taken.append((step, name)), world=world)
        for name in "abc"
    }
    rounds = race.measure(line, 3, 4)
    assert [step for step, _ in taken] == [3] * 3 + [4] * 3 + [5] * 3 + [6] * 3
    assert "".join(name for _, name in taken) == "abcbcacababc"
    assert {name: len(ms) for name, ms in rounds.ms.items()} == dict(a=4, b=4, c=4)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and guarded as ever, but run as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_what_is_compiled_after_the_warm_up_fails_the_run(
    quick_compiler: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(self: race.Contestant, number: int) -> None:
        micro = self.batches.micro(number)
        if number == 2 and not isinstance(self.trainer, race.PlainTrainer):
            micro = [(ids[:, :-1], targets[:, :-1]) for ids, targets in micro]  # another shape
        self.trainer.train_step(number, 0.0, micro)

    monkeypatch.setattr(race.Contestant, "step", step)
    path, words = tmp_path / "x.json", ["--plain", "compile", "--set", "COMPILE=model", "--out"]
    words += [str(path), "--preset", "Bp,tiny"]
    assert run(monkeypatch, *words, size=TINY | FEW_GRAPHS | {"NUM_LOOPS": "1"}) == 1
    assert "compiled after the warm-up: {'ours': 1}" in capsys.readouterr().err
    ours, plain = (json.loads(path.read_text())["contestants"][name] for name in ("ours", "plain"))
    assert (ours["graph_breaks"], ours["recompiles_after_warmup"]) == (0, 1)
    assert ours["graphs"] >= 1
    assert (plain["graph_breaks"], plain["recompiles_after_warmup"]) == (0, 0)
    assert plain["graphs"] > 1  # the model, and Newton-Schulz


@pytest.mark.parametrize("preset", ["T", "Ap", "L", "growing", "recur_3x3_768"])
def test_operations_of_a_step_are_those_of_the_weights_it_uses(preset: str) -> None:
    config = tg.Config.from_env(dict(PRESET=preset))
    with torch.device("meta"):
        model = tg.GPT(config.architecture())
    passes = config.schedule()[0][1]
    used = [
        m
        for layer in model.plans[passes if config.num_shared else config.num_loops]
        for m in (
            model.attn[layer.attn].qkv,
            model.attn[layer.attn].proj,
            model.mlp[layer.mlp].fc,
            model.mlp[layer.mlp].proj,
        )
    ]
    flop = race.flop_per_token(config)
    assert flop["matrices"] == 6 * sum(m.weight.numel() for m in used)
    assert flop["head"] == 6 * model.tok_emb.numel()
    if preset == "T":  # 14 layers at D 512, T 1024: worked out by hand
        assert sum(flop.values()) == pytest.approx(201.37e6, rel=1e-4)


def test_profile_tells_kinds_of_kernels_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    assert run(monkeypatch, "profile", "--with-plain", "--out", str(path), size=TINY) == 0
    for found in json.loads(path.read_text())["contestants"].values():
        kinds = found["kinds"]
        assert {
            "gemm",
            "attention",
            "optimizer",
            "elementwise/fused",
            "copies",
            "reductions",
        } <= kinds.keys()
        assert sum(ms for ms, _, _ in kinds.values()) == pytest.approx(found["kernels_ms"])
        assert 0 < found["kernels_ms"] < found["step_ms"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128",
            "attention",
        ),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("triton_poi_fused_add_mul_7", "elementwise/fused"),
        ("triton_red_fused__to_copy_mul_sum_3", "reductions"),
        ("triton_per_fused_rms_norm_1", "reductions"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise/fused"),
        ("aten::expand", "other"),
    ],
)
def test_kernels_are_known_by_name(name: str, kind: str) -> None:
    assert bench.kind_of(name) == kind


def test_idle_time_is_what_no_stream_fills() -> None:
    spans = (0.0, 4.0), (2.0, 4.0), (8.0, 2.0), (3.0, 1.0)  # start, length
    assert bench.idle([bench.Kernel("k", "gemm", *span) for span in spans]) == pytest.approx(0.2)


def test_bytes_between_ranks_are_those_of_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    set_up_forkserver()  # it has imported PyTorch, as no process has that is spawned
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    path = tmp_path / "x.json"
    assert run(monkeypatch, "ranks", "2", "--out", str(path), size=TINY) == 0
    result, model = (
        json.loads(path.read_text()),
        tg.GPT(tg.Config.from_env(dict(PRESET="F,tiny") | TINY)),
    )
    sizes = {p: p.numel() for p in model.parameters()}
    matrices = sum(size for p, size in sizes.items() if tg.role_of(p).optimizer == "muon")
    ours, plain = (result["contestants"][name]["collectives"] for name in ("ours", "plain"))
    assert ours["bytes"] == 4 * (sum(sizes.values()) + 1)  # the loss comes last
    assert (
        sum(count for kind, count in ours["kinds"].items() if "all_reduce" in kind) == ours["steps"]
    )
    # float32 gradients, bfloat16 updates, and whether time is up
    assert (plain["calls"], plain["bytes"]) == (3, 4 * sum(sizes.values()) + 2 * matrices + 4)
    assert ours["ms"] > 0 < plain["ms"]
    assert max(result["differences"]["plain"].values()) < 1e-3
    table = result["projected_step_ms"]
    assert all(table[name]["1"] > table[name]["8"] for name in table)


def test_projection_adds_up() -> None:
    one = dict(
        forward_backward_ms=dict(median=80.0), adam_ms=dict(median=1.0), muon_ms=dict(median=4.0)
    )
    comm, args = dict(bytes=300e6, calls=2), argparse.Namespace(link_gbs=300.0, call_us=50.0)
    assert bench.project(one, comm, 1, 1.0, args) == pytest.approx(85.0)
    assert bench.project(one, comm, 8, 0.25, args) == pytest.approx(10 + 1 + 1 + 1.75 + 0.1)


def test_compile_times_come_from_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def child(
        count: int, work: Callable[..., Any], env: dict[str, str], cache: str
    ) -> dict[str, Any]:
        assert (count, work, list(Path(cache).iterdir())) == (1, bench.compile_cold, [])
        seen.append((env["COMPILE"], env["NUM_LOOPS"], cache))
        return dict(compile_seconds=1.0, graphs=len(seen), recompiles=0, graph_breaks=0, modes=1)

    monkeypatch.setattr(bench, "in_children", child)
    path = tmp_path / "x.json"
    assert (
        run(monkeypatch, "compile", "COMPILE=model", "NUM_LOOPS=2,3", "--out", str(path), size=TINY)
        == 0
    )
    assert [case[:2] for case in seen] == [("model", "2"), ("model", "3")]
    assert len({cache for _, _, cache in seen}) == 2
    cases = json.loads(path.read_text())["cases"]
    assert {name: found["graphs"] for name, found in cases.items()} == {
        "COMPILE=model NUM_LOOPS=2": 1,
        "COMPILE=model NUM_LOOPS=3": 2,
    }
    assert "COMPILE=model NUM_LOOPS=3: 1.0 s, 2 graphs" in capsys.readouterr().out


def test_compile_times_count_graphs(
    quick_compiler: None, tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "restored")
    graphs, found = race.graphs, []
    env = dict(PRESET="Bp,tiny", VOCAB_SIZE="64", COMPILE="model") | TINY | FEW_GRAPHS | tokens
    for schedule in ("0:2", "0:1,0.5:2"):
        before = graphs()
        monkeypatch.setattr(race, "graphs", lambda before=before: graphs() - before)
        torch._dynamo.utils.clear_compilation_metrics()
        found.append(bench.compile_cold(0, env | dict(PASSES_SCHEDULE=schedule), str(tmp_path)))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    one, two = found
    assert (one["modes"], two["modes"]) == (1, 2)
    assert two["graphs"] == one["graphs"] + 1 > 1
    assert two["recompiles"] == one["recompiles"] + 1
    assert one["graph_breaks"] == two["graph_breaks"] == 0
    assert 0 < two["compile_seconds"] < sum(two["step_seconds"])


def test_export_times_packing_and_scoring(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    data = [f"{name}={value}" for name, value in corpus.items()]
    learning = ["EVAL_STRIDE=16", "TTT_LR=0.01", "TTT_CHUNK_TOKENS=64"]
    words = ["--val-tokens", "300", "--out", str(path), "--set", *data, *learning]
    assert run(monkeypatch, "export", *words, size=TINY) == 0
    result = json.loads(path.read_text())
    assert result["bytes"] > 1000
    assert all(seconds > 0 for seconds in result["seconds_on_one_core"].values())
    plain, sliding, ttt = (result["scored"][kind] for kind in ("plain", "sliding", "ttt"))
    for score in (plain, sliding, ttt):
        assert score["val_tokens"] == 299
        assert score["tokens_per_second"] == pytest.approx(299 / score["eval_seconds"])
    assert plain["val_loss"] != sliding["val_loss"] != ttt["val_loss"]


def test_export_without_a_tokenizer_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "export", "--set", "TOKENIZER_PATH=no-such.model", size=TINY) == 2
    assert "TOKENIZER_PATH=no-such.model" in capsys.readouterr().err
