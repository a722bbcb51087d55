"""The model computes what the reference computes: loss and every gradient norm of published configurations.

GOLDEN names the file of golden numbers (default: the copy beside this file). Flags, dimensions and parameter
shapes are read from it, so other cases can be tried by pointing the variable elsewhere. Its parameters are
filled by name (`fill`), and `reference_names` says where each of them lives in our model.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as tg

FILE = os.environ.get("GOLDEN") or Path(__file__).with_name("golden_forward.json")
GOLDEN = json.loads(Path(FILE).read_text())
DIMS = GOLDEN["dims"]


def fill(name: str, shape: list[int]) -> torch.Tensor:
    """The value of a reference parameter: a formula of its name and shape, nothing is stored."""
    noise = 0.15 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if "gamma" in name:
        noise = 1 + 20 * noise
    elif leaf in (
        "attn_scale",
        "mlp_scale",
        "skip_weights",
        "unique_attn_gains",
        "unique_mlp_gains",
    ):
        noise = 1 + noise
    elif leaf == "resid_mix":
        noise = np.array([[1.0], [0.0]]) + noise
    elif leaf == "q_gain":
        noise = 1.5 + noise
    return torch.tensor(noise, dtype=torch.float32)


def architecture(case: dict) -> tg.Architecture:
    """The case's flags as ours. Where the reference ignored one in silence, the shapes say what it built."""
    flags, names = dict(case["flags"]), " ".join(case["params"])
    looped = int(flags.get("NUM_SHARED", 0)) > 0
    has = {
        "use_timestep_scale": "gamma" in names,
        "use_timestep_bias": "beta" in names,
        "use_unique_norms": "unique_attn_gains" in names,
        "use_birkhoff_mix": "resid_mix_logit" in names,
    }
    depth = "learned" if "depth_embeddings" in names else "sinusoidal"
    values = (
        tg.PLAIN
        | has
        | dict(
            dtype="float32",
            train_seq_len=DIMS["SEQ"],
            vocab_size=DIMS["VOCAB_SIZE"],
            model_dim=DIMS["MODEL_DIM"],
            num_heads=DIMS["NUM_HEADS"],
            num_kv_heads=DIMS["NUM_KV_HEADS"],
            mlp_mult=float(DIMS["MLP_MULT"]),
            depth_embed=depth if looped and int(flags.pop("USE_DEPTH_EMBED", 0)) else "none",
        )
    )
    flags.pop("USE_DEPTH_EMBED", None)
    for name in [n for n in flags if n.lower() in has]:
        flags.pop(name)
    core_only = ["USE_PERI_NORM", "NUM_PRELUDE", "NUM_LOOPS", "NUM_CODA", "SHARE_ATTN_ONLY"]
    inert = ["NUM_LAYERS"] if looped else core_only
    for name in inert + ([] if has["use_timestep_scale"] else ["TIMESTEP_GAMMA_MAX"]):
        flags.pop(name, None)
    kinds = tg.get_type_hints(tg.Architecture)
    for name, value in flags.items():
        text = (
            f"{value:g}"
            if isinstance(value, float) and kinds[name.lower()] is int
            else tg.show(value)
        )
        values[name.lower()] = tg.parse(name, text, kinds[name.lower()])
    both = values["use_unique_norms"] and values.get("use_peri_norm", False)
    return tg.Architecture(**values, unique_norms_input_norm=both)


def reference_names(
    model: tg.GPT, a: tg.Architecture
) -> dict[str, list[tuple[torch.nn.Parameter, object]]]:
    """Reference parameter name -> the parameters of ours (with an index into each) that hold it, in order."""
    names = {"tok_emb.weight": [(model.tok_emb, ...)]}
    if not a.tie_embeddings:
        names["lm_head.weight"] = [(model.lm_head, ...)]
    if len(model.skip):
        names["skip_weights"] = [(p, ...) for p in model.skip]
    cond = model.cond
    for branch, which in ((0, "attn"), (1, "mlp")):
        names[f"timestep_scale.{which}_gamma"] = [(cond.gamma, (slice(None), branch))]
        names[f"timestep_scale.{which}_beta"] = [(cond.beta, (slice(None), branch))]
        names[f"unique_{which}_gains"] = [(cond.gain, (slice(None), branch))]
    names["depth_embeddings"] = [(cond.depth, ...)]
    first, end = a.num_prelude, a.num_prelude + a.num_shared
    for i, (attn, mix) in enumerate(zip(model.attn, model.mix)):
        prefix = (
            f"blocks.{i}"
            if not a.num_shared
            else f"prelude_blocks.{i}"
            if i < first
            else f"shared_blocks.{i - first}"
            if i < end
            else f"coda_blocks.{i - end}"
        )
        if a.share_attn_only and first <= i < end:
            prefix = f"shared_attn_layers.{i - first}"
        names |= attention_names(prefix, attn, mix)
    passes = a.num_shared * a.num_loops if a.share_attn_only else a.num_shared
    for i, mlp in enumerate(model.mlp):
        prefix = (
            f"blocks.{i}"
            if not a.num_shared
            else f"prelude_blocks.{i}"
            if i < first
            else f"coda_blocks.{i - first - passes}"
            if i >= first + passes
            else f"{'unique_mlps' if a.share_attn_only else 'shared_blocks'}.{i - first}"
        )
        names |= {
            f"{prefix}.mlp_scale": [(mlp.scale, ...)],
            f"{prefix}.mlp.fc.weight": [(mlp.fc.weight, ...)],
            f"{prefix}.mlp.proj.weight": [(mlp.proj.weight, ...)],
        }
    return names


def attention_names(prefix: str, attn: tg.Attention, mix: torch.nn.Module) -> dict:
    d, kv = attn.qkv.weight.parts[:2]
    mixed = "resid_mix_logit" if mix.convex else "resid_mix"
    rows = {"c_q": slice(0, d), "c_k": slice(d, d + kv), "c_v": slice(d + kv, d + 2 * kv)}
    return {
        f"{prefix}.attn_scale": [(attn.scale, ...)],
        f"{prefix}.{mixed}": [(mix.weight, ...)],
        f"{prefix}.attn.q_gain": [(attn.q_gain, ...)],
        f"{prefix}.attn.proj.weight": [(attn.proj.weight, ...)],
        **{f"{prefix}.attn.{n}.weight": [(attn.qkv.weight, r)] for n, r in rows.items()},
    }


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_loss_and_gradients(name: str) -> None:
    case = GOLDEN["cases"][name]
    a = architecture(case)
    model = tg.GPT(a)
    homes = reference_names(model, a)
    with torch.no_grad():
        for key, shape in case["params"].items():
            value = fill(key, shape)
            places = homes[key]
            for piece, (p, index) in zip([value] if len(places) == 1 else value, places):
                p[index] = piece
    held = sum(np.prod(shape, dtype=int) for shape in case["params"].values())
    assert held == sum(p.numel() for p in model.parameters()), (
        "the reference holds other parameters"
    )
    ids = torch.tensor(
        np.random.default_rng(7).integers(0, DIMS["VOCAB_SIZE"], (2, DIMS["SEQ"] + 1))
    )
    loss = model(ids[:, :-1], ids[:, 1:], model.scoring)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    for key, expected in case["grad_norm"].items():
        norm = torch.cat([p.grad[index].flatten() for p, index in homes[key]]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-3), key


GROWING_FILE = os.environ.get("GOLDEN_GROWING") or Path(__file__).with_name(
    "golden_growing_forward.json"
)
GROWING = json.loads(Path(GROWING_FILE).read_text())


def growing_architecture(case: dict, dims: dict) -> tg.Architecture:
    """A case of the growing-recurrence stack as ours."""
    flags, start, end = case["flags"], dims["CORE_START"], dims["CORE_END"]
    on = lambda name, value: value if flags[name] else 0  # noqa: E731
    values = tg.PLAIN | tg.layers(
        start, end - start, dims.get("NUM_LOOPS", 3), dims["NUM_LAYERS"] - end
    )
    return tg.Architecture(
        **values
        | dict(
            dtype="float32",
            train_seq_len=dims["SEQ"],
            vocab_size=dims["VOCAB_SIZE"],
            model_dim=dims["MODEL_DIM"],
            num_heads=dims["NUM_HEADS"],
            num_kv_heads=dims["NUM_KV_HEADS"],
            mlp_mult=float(dims["MLP_MULT"]),
            core_skips="published",
            smear_gate="published",
            pass_scale_init=0.5 if flags["residual_scale"] else 1.0,
            feedback_rank=on("feedback", dims["FEEDBACK_RANK"]),
            interpass_norm=flags["interpass_norm"],
            ln_scale=flags["ln_scale"],
            rope_dims=flags["rope_dims"],
            xsa_last_n=flags["xsa_last"],
            bigram_vocab_size=on("bigram", dims["BIGRAM_VOCAB_SIZE"]),
            bigram_dim=dims["BIGRAM_DIM"],
            ve_last_n=on("value_embedding", len(dims["VE_LAYERS"].split(","))),
            ve_dim=dims["VE_DIM"],
        )
    )


def growing_names(
    model: tg.GPT, a: tg.Architecture
) -> dict[str, list[tuple[torch.nn.Parameter, object]]]:
    """Reference parameter name -> the parameters of ours that hold its rows, in order."""
    d, kv = model.attn[0].qkv.weight.parts[:2]
    rows = slice(0, d), slice(d, d + kv), slice(d + kv, d + 2 * kv)
    q, k, v = ([(attn.qkv.weight, r) for attn in model.attn] for r in rows)
    names = {
        "tok_emb.weight": [(model.tok_emb, ...)],
        "smear.gate": [(model.smear_gate, ...)],
        "qo_bank": q + [(attn.proj.weight, ...) for attn in model.attn],
        "kv_bank": k + v,
        "mlp_up_bank": [(mlp.fc.weight, ...) for mlp in model.mlp],
        "mlp_down_bank": [(mlp.proj.weight, ...) for mlp in model.mlp],
        "skip_weights": [(p, ...) for p in model.skip],
    }
    for i, (mix, attn, mlp) in enumerate(zip(model.mix, model.attn, model.mlp)):
        names |= {
            f"blocks.{i}.attn_scale": [(attn.scale, ...)],
            f"blocks.{i}.mlp_scale": [(mlp.scale, ...)],
            f"blocks.{i}.resid_mix": [(mix.weight, ...)],
            f"blocks.{i}.attn.q_gain": [(attn.q_gain, ...)],
        }
    for ours, theirs in (("bigram", "bigram"), ("value", "ve_shared")):
        if side := getattr(model, ours, None):
            names |= {
                f"{theirs}.scale": [(side.scale, 0)],
                f"{theirs}.embed.weight": [(side.table, ...)],
                f"{theirs}.proj.weight": [(side.proj, ...)],
            }
    if a.ve_last_n:
        names |= {
            f"ve_layer_scales.{i}": [(model.value_scale, slice(i, i + 1))]
            for i in range(a.ve_last_n)
        }
    if a.feedback_rank:
        core = model.core
        names |= {
            "feedback.correction.d": [(core.diagonal, ...)],
            "feedback.residual.U": [(core.u, ...)],
            "feedback.residual.V": [(core.v, ...)],
        }
    return names


def growing_fill(name: str, shape: list[int], dims: dict, flags: dict) -> torch.Tensor:
    noise = fill(name, shape)
    block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
    if name.startswith("ve_layer_scales") or name == "feedback.correction.d":
        return 1 + noise
    if name in ("residual_scale.scales", "bigram.scale", "ve_shared.scale"):
        return 0.5 + (noise if name == "residual_scale.scales" else 0 * noise)
    if name.endswith("mlp_scale") and dims["CORE_START"] <= block < dims["CORE_END"]:
        return noise - 1 + flags["core_mlp_scale"]
    return noise


@pytest.mark.parametrize("name", GROWING["cases"])
def test_growing_loss_and_gradients(name: str) -> None:
    case, dims = GROWING["cases"][name], GROWING["dims"]
    flags, a = case["flags"], growing_architecture(case, dims)
    model = tg.GPT(a)
    homes = growing_names(model, a)
    if flags["residual_scale"]:  # the reference's first entry, of the first pass, is not used
        homes["residual_scale.scales"] = [(torch.nn.Parameter(torch.zeros(1)), ...)] + [
            (model.core.scale, slice(i, i + 1)) for i in range(a.num_loops - 1)
        ]
    with torch.no_grad():
        for key, shape in case["params"].items():
            value, places = growing_fill(key, shape, dims, flags), homes[key]
            whole = len(places) == 1 and key != "skip_weights"
            for piece, (p, index) in zip([value] if whole else value, places):
                p[index] = piece
    unused = {
        "skip_weights": case["params"]["skip_weights"][0] - len(model.skip),
        "residual_scale.scales": 1,
    }
    held = sum(
        np.prod(s, dtype=int) - unused.get(k, 0) * np.prod(s[1:], dtype=int)
        for k, s in case["params"].items()
    )
    assert held == sum(p.numel() for p in model.parameters()), (
        "the reference holds other parameters"
    )
    ids = torch.tensor(
        np.random.default_rng(7).integers(0, dims["VOCAB_SIZE"], (2, dims["SEQ"] + 1))
    )
    core = tg.Rounding(flags["core_qat_bits"], 1 / 127)
    mode = tg.Mode(flags["passes"], core=core, growth_weight=flags["jacobian_weight"])
    loss = model(ids[:, :-1], ids[:, 1:], mode)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    for key, expected in case["grad_norm"].items():
        pieces = [p.grad[index].flatten() for p, index in homes[key] if p.grad is not None]
        norm = torch.cat(pieces).norm().item() if pieces else None
        assert norm == (expected if expected is None else pytest.approx(expected, rel=1e-3)), key
