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
    ITERATIONS="8",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="0",
    COMPILE="block",
)
GROWTH = dict(PASSES_SCHEDULE="0:1,2:2,4:3", EVAL_STRIDE="16")


def graph_kind(system: str) -> tuple[Any, ...]:
    """What tells the graphs of a system from those of another, its size and layers left out."""
    a = tg.Architecture(**tg.PLAIN | architecture_values(system))
    sizes = ("model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_base")
    layers = ("num_layers", "num_prelude", "num_shared", "num_loops", "num_coda")
    kept = [f for f in tg.fields(a) if f.name not in sizes + layers]
    return tuple(getattr(a, f.name) for f in kept) + (a.num_shared > 0,)


def architecture_values(system: str) -> dict[str, Any]:
    names = {f.name for f in tg.fields(tg.Architecture)}
    return {n: value for n, value in tg.SYSTEMS[system].values.items() if n in names}


KINDS = list({graph_kind(system): system for system in tg.SYSTEMS}.values())


@pytest.mark.parametrize("system", KINDS)
def test_nothing_is_compiled_on_the_clocks(
    system: str, corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    growth = GROWTH if values.get("passes_schedule") else {}
    if values.get("ttt_lr"):
        growth = growth | {"TTT_CHUNK_TOKENS": "128"}
    if not values.get("warmdown_fraction"):
        growth = growth | {"WARMDOWN_ITERS": "4"}
    result = run_here(corpus | SMALL | growth | {"PRESET": f"{system},tiny"}, tmp_path)
    assert counter.frame_count > 0
    assert graphs["next_step"] == [0] * 8
    scores = [name for name in ("roundtrip", "sliding", "ttt") if name in result]
    assert len(scores) == (2 if "EVAL_STRIDE" in growth else 1)
    assert graphs["score"][-len(scores) :] == [0] * len(scores)
