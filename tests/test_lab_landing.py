"""records/tools/landing.py: an export of drawn weights, its bytes and its times."""

from dataclasses import replace

import pytest
import torch

import train_gpt as tg
from records.tools import landing
from records.tools.dryrun import roofline

SMALL = dict(PRESET="frontier,tiny", MODEL_DIM="64", NUM_HEADS="2", NUM_KV_HEADS="1")
SMALL |= dict(TRAIN_SEQ_LEN="32", MICRO_BATCH_TOKENS="128", TRAIN_BATCH_TOKENS="128")


def small(**values: str) -> tg.Config:
    return tg.Config.from_env(SMALL | values)


def test_matrices_are_drawn_by_law_and_seed() -> None:
    config = small()
    one, same, other = (landing.drawn(config, law) for law in ("student", "student", "normal"))
    for p, again, differs in zip(one.parameters(), same.parameters(), other.parameters()):
        assert torch.equal(p, again)
        assert torch.equal(p, differs) != bool(tg.role_of(p).bits)
    seeded = landing.drawn(replace(config, seed=1), "student")
    assert not torch.equal(one.tok_emb, seeded.tok_emb)


def test_every_product_of_a_forward_pass_is_counted() -> None:
    """Four matrices in each of 17 effective layers, the core's three times, and the head."""
    config = small()
    model = landing.drawn(config, "normal")
    calls = landing.calls_of(model, landing.zipf_tokens(config, 1)[0])
    assert calls == 17 * [(128, 64), (64, 64), (256, 64), (64, 256)]
    tokens = config.micro_batch_tokens
    sums = [roofline.matrix_product("float32", c, c, tokens, 1).seconds for _, c in calls]
    found = landing.calibration_seconds(model, config)
    assert found["sums"] == pytest.approx(sum(sums) + sums[0])
    without = landing.calibration_seconds(model, replace(config, gptq_embed=False))
    assert without["sums"] == pytest.approx(sum(sums))
    assert without["model"] == found["model"] > 0


def test_what_is_told_is_what_was_packed(capsys: pytest.CaptureFixture[str]) -> None:
    limit = len(tg.script_file()) + 300_000
    words = [f"{name}={value}" for name, value in SMALL.items()]
    words += [f"SIZE_LIMIT_BYTES={limit}", "CODEC=zlib"]
    assert landing.main(["--set", *words, "--tokens", "100"]) == 0
    said = capsys.readouterr().out.splitlines()
    trials = [line for line in said if line.startswith("packed matrix_clip_sigmas:")]
    found = dict(pair.split(":") for pair in said[2 + len(trials)].split())
    total = int(found["bytes_total"])
    assert f"total:{total} bytes" in trials[-1] and len(trials) == int(found["trials"])
    assert float(found["under_the_limit_percent"]) == pytest.approx(
        100 * (1 - total / limit), abs=1e-4
    )
    assert 0.997 * limit <= total <= limit
    assert 0 < float(found["solver_seconds_a_trial"]) < float(found["seconds_a_trial"])
    assert landing.main(["--set", *words, "--tokens", "0"]) == 2
