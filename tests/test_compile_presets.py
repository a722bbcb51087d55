"""No preset compiles anything while its training or the scoring of its artifact is timed."""

from pathlib import Path
from typing import Any

import pytest
from helpers import run_here
from test_compile import counting

import train_gpt as tg

SMALL = dict(
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="128",
    MICRO_BATCH_TOKENS="128",
    VAL_BATCH_SIZE="1024",
    ITERATIONS="2",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="0",
    COMPILE="block",
)
# What a system that has the option is given besides.
BESIDES = {
    "passes_schedule": dict(ITERATIONS="5", PASSES_SCHEDULE="0:1,1:2,2:3", EVAL_STRIDE="16"),
    "qat_lr_factor": dict(WARMDOWN_ITERS="2", QAT_LR_FACTOR="0.6"),  # the last step rounds
    "ttt_lr": dict(TTT_CHUNK_TOKENS="64"),  # not as many as a step of training takes
    "gptq_batches": dict(GPTQ_BATCHES="1"),
}


def graph_kind(system: str) -> tuple[Any, ...]:
    """What tells the graphs of a system from those of another: not its size, layers, constants."""
    a = tg.Architecture(**tg.PLAIN | architecture_values(system))
    sizes = ("model_dim", "num_heads", "num_kv_heads", "mlp_mult")
    constants = ("rope_base", "timestep_gamma_max", "leaky_relu_slope")  # one operation, any value
    layers = ("num_layers", "num_prelude", "num_shared", "num_loops", "num_coda")
    kept = [f for f in tg.fields(a) if f.name not in sizes + constants + layers]
    return tuple(getattr(a, f.name) for f in kept) + (a.num_shared > 0,)


def architecture_values(system: str) -> dict[str, Any]:
    names = {f.name for f in tg.fields(tg.Architecture)}
    return {n: value for n, value in tg.SYSTEMS[system].values.items() if n in names}


KINDS = list({graph_kind(system): system for system in tg.SYSTEMS}.values())


@pytest.mark.parametrize("system", KINDS)
def test_nothing_is_compiled_on_the_clocks(
    system: str, few_tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps in every mode; the scores of the artifact, plain, sliding, with test-time training."""
    counter = counting(monkeypatch)
    graphs: dict[str, list[int]] = {"next_step": [], "score": []}

    def watch(owner: type, name: str) -> None:
        does = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = counter.frame_count
            result = does(*args, **kwargs)
            graphs[name].append(counter.frame_count - before)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(tg.Trainer, "next_step")
    watch(tg.Scorer, "score")
    values = tg.SYSTEMS[system].values
    env = few_tokens | SMALL | {"PRESET": f"{system},tiny"}
    for option, variables in BESIDES.items():
        env = env | (variables if values.get(option) else {})
    result = run_here(env, tmp_path)
    assert counter.frame_count > 0
    assert graphs["next_step"] == [0] * int(env["ITERATIONS"])
    scores = [name for name in ("roundtrip", "sliding", "ttt") if name in result]
    assert len(scores) == (2 if "EVAL_STRIDE" in env else 1)
    assert graphs["score"][-len(scores) :] == [0] * len(scores)
