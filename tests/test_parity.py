"""The model computes what the reference computes: loss and gradient norms of published runs.

GOLDEN names the file of golden numbers (default: the copy beside this file), GOLDEN_GROWING that of
the growing stack. Flags, dimensions and parameter shapes are read from it, so other cases can be
tried by pointing the variable elsewhere. Parameters are filled by name (`fill`), and
`reference_names` says where each of them lives in our model.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pytest
import torch
from helpers import noise_of
from torch import Tensor, nn

import train_gpt as tg

pytestmark = pytest.mark.quick


def golden(variable: str, name: str) -> dict[str, Any]:
    """The golden numbers that a variable names, or those beside this file."""
    return json.loads(Path(os.environ.get(variable) or Path(__file__).with_name(name)).read_text())


GOLDEN = golden("GOLDEN", "golden_forward.json")
GROWING = golden("GOLDEN_GROWING", "golden_growing_forward.json")


class Home(NamedTuple):
    """Where a reference parameter, or a row of one, lives in our model."""

    p: nn.Parameter
    index: Any = ...


Homes = dict[str, list[Home]]


def fill(name: str, shape: list[int]) -> Tensor:
    """The value of a reference parameter: a formula of its name and shape, nothing is stored."""
    noise, leaf = noise_of(name, shape), name.rsplit(".", 1)[-1]
    around_one = (
        "attn_scale",
        "mlp_scale",
        "skip_weights",
        "unique_attn_gains",
        "unique_mlp_gains",
    )
    if "gamma" in name:
        return 1 + 20 * noise
    if leaf in around_one:
        return 1 + noise
    if leaf == "resid_mix":
        return torch.tensor([[1.0], [0.0]]) + noise
    if leaf == "q_gain":
        return 1.5 + noise
    return noise


def fill_model(values: dict[str, Tensor], homes: Homes, by_row: tuple[str, ...] = ()) -> None:
    """Puts the reference's parameters into ours; those that have several homes row by row."""
    with torch.no_grad():
        for key, value in values.items():
            places = homes[key]
            rows = value if len(places) > 1 or key in by_row else [value]
            for row, home in zip(rows, places):
                home.p[home.index] = row


def count(shapes: dict[str, list[int]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def check_gradients(case: dict[str, Any], homes: Homes) -> None:
    for key, expected in case["grad_norm"].items():
        pieces = [
            home.p.grad[home.index].flatten() for home in homes[key] if home.p.grad is not None
        ]
        if expected is None:
            assert not pieces, key
        else:
            assert torch.cat(pieces).norm().item() == pytest.approx(expected, rel=1e-3), key


def batch(dims: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and targets."""
    draw = np.random.default_rng(7)
    ids = torch.tensor(draw.integers(0, dims["VOCAB_SIZE"], (2, dims["SEQ"] + 1)))
    return ids[:, :-1], ids[:, 1:]


def shared_dims(dims: dict[str, Any]) -> dict[str, Any]:
    """The dimensions that every case of a file has, as ours."""
    return dict(
        dtype="float32",
        train_seq_len=dims["SEQ"],
        vocab_size=dims["VOCAB_SIZE"],
        model_dim=dims["MODEL_DIM"],
        num_heads=dims["NUM_HEADS"],
        num_kv_heads=dims["NUM_KV_HEADS"],
        mlp_mult=float(dims["MLP_MULT"]),
    )


# ---- PR 855 and the naive baseline


def built(case: dict[str, Any]) -> dict[str, Any]:
    """What the reference built, by the shapes: it ignored some flags in silence."""
    names = " ".join(case["params"])
    depth = "none"
    if int(case["flags"].get("NUM_SHARED", 0)) and int(case["flags"].get("USE_DEPTH_EMBED", 0)):
        depth = "learned" if "depth_embeddings" in names else "sinusoidal"
    return dict(
        use_timestep_scale="gamma" in names,
        use_timestep_bias="beta" in names,
        use_unique_norms="unique_attn_gains" in names,
        use_birkhoff_mix="resid_mix_logit" in names,
        depth_embed=depth,
    )


def architecture(case: dict[str, Any]) -> tg.Architecture:
    """The case's flags as ours."""
    found, flags = built(case), case["flags"]
    core_only = {"USE_PERI_NORM", "NUM_PRELUDE", "NUM_LOOPS", "NUM_CODA", "SHARE_ATTN_ONLY"}
    ignored = {name.upper() for name in found} | {"USE_DEPTH_EMBED"}
    ignored |= {"NUM_LAYERS"} if int(flags.get("NUM_SHARED", 0)) else core_only
    if not found["use_timestep_scale"]:
        ignored.add("TIMESTEP_GAMMA_MAX")
    values = tg.PLAIN | found | shared_dims(GOLDEN["dims"])
    kinds = get_type_hints(tg.Architecture)
    for name in flags.keys() - ignored:
        kind, value = kinds[name.lower()], flags[name]
        values[name.lower()] = kind(value) if kind in (int, float) else bool(int(value))
    both = values["use_unique_norms"] and values.get("use_peri_norm", False)
    return tg.Architecture(**values, unique_norms_input_norm=both)


def reference_names(model: tg.GPT, a: tg.Architecture) -> Homes:
    """Reference parameter name -> where it lives."""
    cond = model.cond
    names: Homes = {"tok_emb.weight": [Home(model.tok_emb)]}
    if not a.tie_embeddings:
        names["lm_head.weight"] = [Home(model.lm_head)]
    if len(model.skip):
        names["skip_weights"] = [Home(p) for p in model.skip]
    tables: dict[str, Any] = dict(gamma=cond.gamma, beta=cond.beta, gains=cond.gain)
    for branch, which in ((0, "attn"), (1, "mlp")):
        at = slice(None), branch
        names[f"timestep_scale.{which}_gamma"] = [Home(tables["gamma"], at)]
        names[f"timestep_scale.{which}_beta"] = [Home(tables["beta"], at)]
        names[f"unique_{which}_gains"] = [Home(tables["gains"], at)]
    depth: Any = cond.depth
    names["depth_embeddings"] = [Home(depth)]
    core = "shared_attn_layers" if a.share_attn_only else "shared_blocks"
    for i, (attn, mix) in enumerate(zip(model.attn, model.mix)):
        names |= attention_names(block_name(a, i, a.num_shared, core), attn, mix)
    passes = a.num_loops if a.share_attn_only else 1
    core = "unique_mlps" if a.share_attn_only else "shared_blocks"
    for i, mlp in enumerate(model.mlp):
        names |= mlp_names(block_name(a, i, a.num_shared * passes, core), mlp)
    return names


def block_name(a: tg.Architecture, i: int, core: int, core_name: str) -> str:
    """What the reference calls our i-th attention or MLP; `core` of them are the core's."""
    first, end = a.num_prelude, a.num_prelude + core
    if not a.num_shared:
        return f"blocks.{i}"
    if i < first:
        return f"prelude_blocks.{i}"
    return f"{core_name}.{i - first}" if i < end else f"coda_blocks.{i - end}"


def attention_names(prefix: str, attn: tg.Attention, mix: tg.Mix) -> Homes:
    weight = attn.qkv.weight
    d, kv, _ = (len(part) for part in tg.parts_of(weight))
    mixed = "resid_mix_logit" if mix.convex else "resid_mix"
    return {
        f"{prefix}.attn_scale": [Home(attn.scale)],
        f"{prefix}.{mixed}": [Home(mix.weight)],
        f"{prefix}.attn.q_gain": [Home(attn.q_gain)],
        f"{prefix}.attn.proj.weight": [Home(attn.proj.weight)],
        f"{prefix}.attn.c_q.weight": [Home(weight, slice(0, d))],
        f"{prefix}.attn.c_k.weight": [Home(weight, slice(d, d + kv))],
        f"{prefix}.attn.c_v.weight": [Home(weight, slice(d + kv, d + 2 * kv))],
    }


def mlp_names(prefix: str, mlp: tg.MLP) -> Homes:
    return {
        f"{prefix}.mlp_scale": [Home(mlp.scale)],
        f"{prefix}.mlp.fc.weight": [Home(mlp.fc.weight)],
        f"{prefix}.mlp.proj.weight": [Home(mlp.proj.weight)],
    }


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_loss_and_gradients(name: str) -> None:
    case = GOLDEN["cases"][name]
    a = architecture(case)
    model = tg.GPT(a)
    homes = reference_names(model, a)
    fill_model({key: fill(key, shape) for key, shape in case["params"].items()}, homes)
    ours = sum(p.numel() for p in model.parameters())
    assert count(case["params"]) == ours, "the reference holds other parameters"
    loss = model(*batch(GOLDEN["dims"]), model.scoring)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    check_gradients(case, homes)


# ---- PR 1230: growing recurrence


def growing_architecture(case: dict[str, Any]) -> tg.Architecture:
    """A case of the growing-recurrence stack as ours."""
    flags, dims = case["flags"], GROWING["dims"]
    start, end = dims["CORE_START"], dims["CORE_END"]
    plan = tg.layers(start, end - start, dims.get("NUM_LOOPS", 3), dims["NUM_LAYERS"] - end)
    values = tg.PLAIN | plan | shared_dims(dims)
    values |= dict(
        core_skips="published",
        smear_gate="published",
        interpass_norm=flags["interpass_norm"],
        ln_scale=flags["ln_scale"],
        rope_dims=flags["rope_dims"],
        xsa_last_n=flags["xsa_last"],
        bigram_dim=dims["BIGRAM_DIM"],
        ve_dim=dims["VE_DIM"],
    )
    if flags["residual_scale"]:
        values["pass_scale_init"] = 0.5
    if flags["feedback"]:
        values["feedback_rank"] = dims["FEEDBACK_RANK"]
    if flags["bigram"]:
        values["bigram_vocab_size"] = dims["BIGRAM_VOCAB_SIZE"]
    if flags["value_embedding"]:
        values["ve_layers"] = dims["VE_LAYERS"]
    return tg.Architecture(**values)


def growing_names(model: tg.GPT, a: tg.Architecture) -> Homes:
    """Reference parameter name -> where its rows live, in order."""
    weights: list[nn.Parameter] = [attn.qkv.weight for attn in model.attn]
    d, kv, _ = (len(part) for part in tg.parts_of(weights[0]))
    q = [Home(w, slice(0, d)) for w in weights]
    k = [Home(w, slice(d, d + kv)) for w in weights]
    v = [Home(w, slice(d + kv, d + 2 * kv)) for w in weights]
    names: Homes = {
        "tok_emb.weight": [Home(model.tok_emb)],
        "smear.gate": [Home(model.smear_gate)],
        "qo_bank": q + [Home(attn.proj.weight) for attn in model.attn],
        "kv_bank": k + v,
        "mlp_up_bank": [Home(mlp.fc.weight) for mlp in model.mlp],
        "mlp_down_bank": [Home(mlp.proj.weight) for mlp in model.mlp],
        "skip_weights": [Home(p) for p in model.skip],
    }
    for i, (mix, attn, mlp) in enumerate(zip(model.mix, model.attn, model.mlp)):
        names |= {
            f"blocks.{i}.attn_scale": [Home(attn.scale)],
            f"blocks.{i}.mlp_scale": [Home(mlp.scale)],
            f"blocks.{i}.resid_mix": [Home(mix.weight)],
            f"blocks.{i}.attn.q_gain": [Home(attn.q_gain)],
        }
    if a.bigram_vocab_size:
        names |= side_names("bigram", model.bigram)
    if a.ve_layers:
        names |= side_names("ve_shared", model.value)
        for i in range(len(a.listed("ve_layers"))):
            names[f"ve_layer_scales.{i}"] = [Home(model.value_scale, slice(i, i + 1))]
    core = model.core
    if a.feedback_rank:
        names |= {
            "feedback.correction.d": [Home(core.diagonal)],
            "feedback.residual.U": [Home(core.u)],
            "feedback.residual.V": [Home(core.v)],
        }
    if a.pass_scale_init != 1:  # the reference's first entry, of the first pass, is not used
        unused = Home(nn.Parameter(torch.zeros(1)))
        passes = [Home(core.scale, slice(i, i + 1)) for i in range(a.num_loops - 1)]
        names["residual_scale.scales"] = [unused, *passes]
    return names


def side_names(prefix: str, side: tg.SideEmbedding) -> Homes:
    return {
        f"{prefix}.scale": [Home(side.scale, 0)],
        f"{prefix}.embed.weight": [Home(side.table)],
        f"{prefix}.proj.weight": [Home(side.proj)],
    }


def growing_fill(name: str, shape: list[int], flags: dict[str, Any]) -> Tensor:
    noise, dims = fill(name, shape), GROWING["dims"]
    if name.startswith("ve_layer_scales") or name == "feedback.correction.d":
        return 1 + noise
    if name == "residual_scale.scales":
        return 0.5 + noise
    if name in ("bigram.scale", "ve_shared.scale"):
        return torch.full_like(noise, 0.5)
    block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
    if name.endswith("mlp_scale") and dims["CORE_START"] <= block < dims["CORE_END"]:
        return noise - 1 + flags["core_mlp_scale"]
    return noise


@pytest.mark.parametrize("name", GROWING["cases"])
def test_growing_loss_and_gradients(name: str) -> None:
    case = GROWING["cases"][name]
    flags, shapes, a = case["flags"], case["params"], growing_architecture(case)
    model = tg.GPT(a)
    homes = growing_names(model, a)
    values = {key: growing_fill(key, shape, flags) for key, shape in shapes.items()}
    fill_model(values, homes, by_row=("skip_weights",))
    dead_skips, width = shapes["skip_weights"][0] - len(model.skip), a.model_dim
    unused = dead_skips * width + (1 if flags["residual_scale"] else 0)
    ours = sum(p.numel() for p in model.parameters())
    assert count(shapes) - unused == ours, "the reference holds other parameters"
    core = tg.Rounding(flags["core_qat_bits"], 1 / 127)
    mode = tg.Mode(flags["passes"], core=core, growth_weight=flags["jacobian_weight"])
    loss = model(*batch(GROWING["dims"]), mode)
    loss.backward()
    # The penalty makes it 46.6, of which 1e-5 is less than three of float32's steps.
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6, abs=1e-5)
    check_gradients(case, homes)
