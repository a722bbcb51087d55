"""The network of PR 1720 against a second one, written down plainly; and every part by itself.

Nothing here uses the plan: the order of layers and their skips are the tables of the published
networks, with a prime for every visit of a layer after the first.
"""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fineweb
import pytest
import torch
from helpers import DIMS, check_resume, check_stored, drawn, noisy_model, stub_trainer
from test_components import without_gradient
from torch import Tensor

import train_gpt as tg

pytestmark = pytest.mark.quick

# PR 1493 and 1720, with one pass and with three; and PR 1394 with three.
ONE_PASS = "0 1 2 3 4 5<4 6<3 7<2 8<1 9<0 10"
LOOPED = "0 1 2 3 4 5 3' 4' 5'<4' 3''<3' 4''<5 5''<4 6<3 7<2 8<1 9<0 10"
# With other numbers of passes no network was published. Pairs keep partners that are there: sources
# by their first visits, targets by their last. Places are taken from the middle outwards.
ORDERS = {
    ("looped", 1): ONE_PASS,
    ("looped", 2): "0 1 2 3 4 5 3' 4'<5 5'<4 6<3 7<2 8<1 9<0 10",
    ("looped", 3): LOOPED,
    ("looped", 4): "0 1 2 3 4 5 3' 4' 5' 3'' 4'' 5''<4' 3'''<3' 4'''<5 5'''<4 6<3 7<2 8<1 9<0 10",
    ("by_position", 1): ONE_PASS,
    ("by_position", 2): "0 1 2 3 4 5 3' 4'<3' 5'<5 6<4 7<3 8<2 9<1 10<0",
    ("by_position", 3): LOOPED,
    ("by_position", 4): (
        "0 1 2 3 4 5 3' 4' 5' 3'' 4''<3'' 5''<5' 3'''<4' 4'''<3' 5'''<5 6<4 7<3 8<2 9 10"
    ),
}
LOOPED_1394 = "0 1 2 3 4 5 4' 5'<4' 4''<5 5''<4 6<3 7<2 8<1 9<0 10"
# By pairs, a row of skip weights has its partners whatever the number of visits in between.
ROWS = ["5'<4'", "3''<3'", "4''<5", "5''<4", "6<3", "7<2", "8<1", "9<0"]

FULL = tg.Config.from_env(dict(PRESET="frontier"))
SMALL: dict[str, Any] = DIMS | dict(rope_dims=4, ve_dim=6)
EVERY_PART: dict[str, Any] = dict(attn_gate_width=12, ve_layers="4,9,10")


def small(**values: Any) -> tg.Architecture:
    """The network at the smallest size."""
    return replace(FULL.architecture(), **SMALL | values)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(seed))


# ---- The network written down


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1.1920929e-07).sqrt()


def rotated(x: Tensor) -> Tensor:
    """x [B, T, heads, 8]: channels j and j + 2 of the first four by t 10000^(-j/2)."""
    pieces = list(x.unbind(-1))
    for j in (0, 1):
        angle = torch.arange(x.shape[1]).double() * 10000.0 ** (-j / 2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = pieces[j], pieces[j + 2]
        pieces[j], pieces[j + 2] = a * cos + b * sin, b * cos - a * sin
    return torch.stack(pieces, dim=-1)


class Plain:
    """PR 1720's forward pass in float64: 4 query and 2 key heads of 8 channels, D 32."""

    def __init__(self, model: tg.GPT, by_position: bool = False) -> None:
        self.by_position = by_position
        self.w = {
            name: p.detach().double().requires_grad_() for name, p in model.named_parameters()
        }

    def skip(self, x: Tensor, kept: Tensor, pair: str, place: int) -> Tensor:
        """Half current, half kept at first. `place` counts the layers that take a skip."""
        row = place if self.by_position else row_of(pair)
        share = torch.sigmoid(self.w[f"skip_gate.{row}"])
        return share * x + (1 - share) * (self.w[f"skip.{row}"] * kept)

    def attention(self, n: Tensor, i: int, value: Tensor | None) -> Tensor:
        B, T, _ = n.shape
        wq, wk, wv = self.w[f"attn.{i}.qkv.weight"].split([32, 16, 16])
        q = rotated(rms((n @ wq.T).view(B, T, 4, 8))) * self.w[f"attn.{i}.q_gain"][:, None]
        k = rotated(rms((n @ wk.T).view(B, T, 2, 8)))
        v = (n @ wv.T if value is None else n @ wv.T + value).view(B, T, 2, 8)
        future = torch.ones(T, T).triu(1).bool()
        opened = 2 / (1 + torch.exp(-(n[..., :12] @ self.w[f"attn.{i}.gate"].T)))
        heads = []
        for h in range(4):
            mine = v[:, :, h // 2]
            scores = q[:, :, h] @ k[:, :, h // 2].transpose(1, 2) / math.sqrt(8)
            y = scores.masked_fill(future, -math.inf).softmax(-1) @ mine
            unit = mine / mine.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
            heads.append(y * opened[:, :, h : h + 1])
        return torch.cat(heads, dim=-1) @ self.w[f"attn.{i}.proj.weight"].T

    def mlp(self, n: Tensor, i: int) -> Tensor:
        inner = n @ self.w[f"mlp.{i}.fc.weight"].T
        return torch.where(inner > 0, inner, inner / 2) ** 2 @ self.w[f"mlp.{i}.proj.weight"].T

    def layer(self, x: Tensor, x0: Tensor, i: int, value: Tensor | None) -> Tensor:
        w, s = self.w, 1 / math.sqrt(i + 1)
        z = w[f"mix.{i}.weight"][0] * x + w[f"mix.{i}.weight"][1] * x0
        u = z + w[f"attn.{i}.scale"] * self.attention(s * rms(z), i, value)
        read = z if i >= 7 else u
        return u + w[f"mlp.{i}.scale"] * self.mlp(s * rms(read), i)

    def loss(self, ids: Tensor, targets: Tensor, order: str) -> Tensor:
        w = self.w
        x = x0 = rms(w["tok_emb"][ids])
        lookup = (w["value.table"] @ w["value.proj"].T * w["value.scale"])[ids]
        values = {i: w["value_scale"][row] * lookup for row, i in enumerate((4, 9, 10))}
        kept: dict[str, Tensor] = {}
        place = 0
        for step in order.split():
            name, _, source = step.partition("<")
            if source:
                x = self.skip(x, kept[source], step, place)
                place += 1
            i = int(name.strip("'"))
            x = kept[name] = self.layer(x, x0, i, values.get(i))
        logits = 30 * torch.tanh(rms(x) @ w["tok_emb"].T / 30)
        logs = logits - logits.logsumexp(-1, keepdim=True)
        return -logs.gather(-1, targets[..., None]).mean()


def row_of(pair: str) -> int:
    """The row of ROWS; at other numbers of passes, the last visit of a target has other primes."""
    return [re.sub("'+<", "<", known) for known in ROWS].index(re.sub("'+<", "<", pair))


@pytest.mark.parametrize("kind, passes", ORDERS)
def test_loss_and_gradients_are_those_written_down(kind: str, passes: int) -> None:
    """With every part on, before and after the onset of the loop and beyond, of all parameters."""
    model = noisy_model(small(core_skips=kind, eval_passes=4, **EVERY_PART))
    plain = Plain(model, by_position=kind == "by_position")
    model.double().dtype = torch.float64
    ids, targets = tokens(0), tokens(1)
    loss = model(ids, targets, tg.Mode(passes))
    expected = plain.loss(ids, targets, ORDERS[kind, passes])
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    idle = {id(p) for p in model.idle(tg.Mode(passes))}
    for name, p in model.named_parameters():
        gradient = plain.w[name].grad
        assert (id(p) in idle) == (gradient is None) == (p.grad is None), name
        if p.grad is not None and gradient is not None:
            # Rotary angles, heads' norms and logits are float32.
            assert (p.grad - gradient).norm() <= 2e-5 * gradient.norm(), name


# ---- The plan


def written(plan: tuple[tg.Layer, ...]) -> str:
    """A plan as the tables above have it."""
    visits: dict[int, int] = {}
    kept: list[str] = []
    steps = []
    for layer in plan:
        visits[layer.attn] = visits.get(layer.attn, -1) + 1
        name = f"{layer.attn}" + "'" * visits[layer.attn]
        steps.append(name if layer.skip < 0 else f"{name}<{kept.pop()}")
        if layer.push:
            kept.append(name)
    assert not kept
    return " ".join(steps)


@pytest.mark.parametrize("kind, passes", ORDERS)
def test_skips_are_those_of_the_tables(kind: str, passes: int) -> None:
    assert written(tg.make_plan(small(core_skips=kind), passes)) == ORDERS[kind, passes]


@pytest.mark.parametrize("kind", ["looped", "by_position"])
def test_skips_are_the_published_ones(kind: str) -> None:
    assert written(tg.make_plan(small(core_skips=kind))) == LOOPED
    of_1394 = small(core_skips=kind, **tg.layers(4, 2, 3, 5))
    assert written(tg.make_plan(of_1394, 1)) == ONE_PASS
    assert written(tg.make_plan(of_1394)) == LOOPED_1394


@pytest.mark.parametrize("passes", [1, 2, 3, 4, 7])
def test_a_row_has_the_same_partners_at_any_number_of_passes(passes: int) -> None:
    """Sources by their first visits, targets by their last; so nothing new is joined."""
    partners = {row: (int(pair[0]), int(pair.split("<")[1][0])) for row, pair in enumerate(ROWS)}
    plan = tg.make_plan(small(), passes)
    sources: list[int] = []
    taken = {}
    for layer in plan:
        if layer.skip >= 0:
            taken[layer.skip] = (layer.attn, sources.pop())
        if layer.push:
            sources.append(layer.attn)
    assert taken == {row: partners[row] for row in taken} and not sources
    expected = {1: range(3, 8), 2: [2, 3, 4, 5, 6, 7]}.get(passes, range(8))
    assert sorted(taken) == list(expected)


def test_places_change_their_partners() -> None:
    """What `looped` mends: of PR 1720's five trained rows, four get other partners."""
    plans = [tg.make_plan(small(core_skips="by_position"), passes) for passes in (1, 3)]
    first, then = ({x.skip: x.attn for x in plan if x.skip >= 0} for plan in plans)
    assert first == {0: 5, 1: 6, 2: 7, 3: 8, 4: 9}
    assert then == {0: 5, 1: 3, 2: 4, 3: 5, 4: 6, 5: 7, 6: 8, 7: 9}


@pytest.mark.parametrize("prelude", range(5))
@pytest.mark.parametrize("core", [1, 2, 3])
@pytest.mark.parametrize("coda", range(5))
def test_skips_of_any_shape_are_nested(prelude: int, core: int, coda: int) -> None:
    """`written` pops what was pushed last and leaves nothing; no output is taken before it is."""
    for loops in (1, 2, 3):
        a = small(**tg.layers(prelude, core, loops, coda), parallel_layers="")
        for kind in ("looped", "by_position"):
            a = replace(a, core_skips=kind)
            n = prelude + core * loops + coda
            assert written(tg.make_plan(a)).count("<") == n // 2
            with torch.device("meta"):
                assert len(tg.GPT(a).skip) == len(tg.GPT(a).skip_gate) == n // 2
            for passes in range(1, loops + 3):
                written(tg.make_plan(a, passes))
                rows = [layer.skip for layer in tg.make_plan(a, passes)]
                assert max(rows, default=0) < max(n // 2, 1)


def test_lists_of_layers() -> None:
    assert small(ve_layers="9,10").listed("ve_layers") == (9, 10)
    assert small(parallel_layers="0,3-5,10").listed("parallel_layers") == (0, 3, 4, 5, 10)
    assert small(ve_layers="0-0").listed("ve_layers") == (0,)
    flat = small(**tg.layers(0, 0, 1, 0), num_layers=8, parallel_layers="7")
    assert [layer.parallel for layer in tg.make_plan(flat)] == [False] * 7 + [True]


@pytest.mark.parametrize(
    "text",
    [
        "11",
        "9,9",
        "10,9",
        "9-8",
        "9,",
        ",9",
        "-1",
        "a",
        "9 10",
        "9--10",
        "0-9,9",
        "1,5-3",
        " ",
        "1e1",
    ],
)
@pytest.mark.parametrize("name", ["PARALLEL_LAYERS", "VE_LAYERS"])
def test_malformed_lists_are_named(name: str, text: str) -> None:
    with pytest.raises(tg.InputError) as caught:
        tg.Config.from_env({"PRESET": "frontier", name: text})
    message = str(caught.value)
    assert message.startswith(f"{name}={text}") and "from 0 to 10" in message


def test_gates_wider_than_the_stream_are_refused() -> None:
    with pytest.raises(tg.InputError, match="ATTN_GATE_WIDTH=33 .* MODEL_DIM=32"):
        small(attn_gate_width=33)


# ---- The preset


def test_it_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = tg.GPT(FULL.architecture())
    assert sum(p.numel() for p in model.parameters()) == 35_944_536
    published = dict(
        matrix=31_719_424,
        embedding=8192 * 512,
        skips=2 * 8 * 512,
    )
    found = dict(
        matrix=sum(p.numel() for p in model.parameters() if tg.role_of(p).optimizer == "muon"),
        embedding=model.tok_emb.numel(),
        skips=sum(p.numel() for p in (*model.skip, *model.skip_gate)),
    )
    assert found == published


def test_its_data_are_what_the_data_tool_fetches() -> None:
    """python data/fineweb.py --variant sp8192, into its default folder."""
    assert "sp8192" in fineweb.REPOS and FULL.vocab_size == 8192
    root = Path("./data")
    assert Path(FULL.data_path) == root / "datasets" / f"{fineweb.PREFIX}sp8192"
    assert Path(FULL.tokenizer_path) == root / "tokenizers" / "fineweb_8192_bpe.model"


def test_it_starts_as_published() -> None:
    config = replace(FULL, vocab_size=64, model_dim=128, num_heads=4, num_kv_heads=2)
    model = drawn(config, 0)
    assert model.tok_emb.std().item() == pytest.approx(0.005, rel=0.05)
    for i, (attn, mlp, mix) in enumerate(zip(model.attn, model.mlp, model.mix)):
        for w in (*tg.parts_of(attn.qkv.weight), mlp.fc.weight):
            square = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            torch.testing.assert_close(square, torch.eye(len(square)), rtol=0, atol=1e-4)
        assert not attn.proj.weight.any() and not mlp.proj.weight.any(), i
        assert (attn.q_gain == 5.25).all() and (attn.scale == 1).all() and (mlp.scale == 1).all()
        assert (mix.weight[0] == 1).all() and (mix.weight[1] == 0).all()
    for weight, gate in zip(model.skip, model.skip_gate):
        assert (weight == 1).all() and (gate == 0).all()


def test_its_loop_begins_at_a_fraction_of_the_time_of_all_ranks() -> None:
    """And both states are among the modes that are compiled before the clock starts."""
    begin = 0.35 * FULL.training_seconds
    passes = [tg.training_mode(FULL, 100, begin + d).passes for d in (-0.1, 0.1)]
    assert passes == [1, 3]
    assert [mode.passes for mode in tg.training_modes(FULL)] == [1, 3]
    assert tg.GPT(small()).scoring.passes == 3


def test_its_stream_has_the_type_of_the_products() -> None:
    """The embedding is float32, but what a layer takes and gives is not."""
    types = set()

    def watched(
        layer: tg.LayerModules,
        x: Tensor,
        x0: Tensor,
        cond: tg.LayerConditioning,
        context: tg.Context,
    ) -> Tensor:
        out = tg.block(layer, x, x0, cond, context)
        types.update({x.dtype, x0.dtype, out.dtype})
        return out

    model = noisy_model(small(dtype="bfloat16", **EVERY_PART), 0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(tokens(), tokens(1), tg.Mode(3), tg.Ops(block=watched))
    assert types == {torch.bfloat16}


# ---- Every part by itself

# What switches a part on, where all others are off; and words in the names of its parameters.
PARTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "looped": (dict(core_skips="looped"), ["skip."]),
    "by_position": (dict(core_skips="by_position"), ["skip."]),
    "gates": (dict(core_skips="looped", skip_gates=True), ["skip.", "skip_gate."]),
    "parallel": (dict(parallel_layers="1,3-4"), []),
    "xsa": (dict(xsa_last_n=6), []),
    "attention gate": (dict(attn_gate_width=12), [".gate"]),
    "values": (dict(ve_layers="1,4"), ["value"]),
    "ln_scale": (dict(ln_scale=True), []),
    "rope": (dict(rope_dims=4), []),
}
BARE: dict[str, Any] = tg.PLAIN | tg.layers(1, 2, 3, 3) | DIMS | dict(ve_dim=6)


def bare(**values: Any) -> tg.Architecture:
    return tg.Architecture(**BARE | values)


def of_part(model: tg.GPT, part: str) -> list[str]:
    """Names of the parameters that belong to a part."""
    words = PARTS[part][1]
    return [name for name, _ in model.named_parameters() if any(word in name for word in words)]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_off_is_not_there(part: str) -> None:
    """The header of an artifact from before the part, and its off value, are the same model."""
    on, words = PARTS[part]
    before = {name: value for name, value in asdict(bare()).items() if name not in on}
    off = tg.Architecture.from_json(json.loads(json.dumps(before)))
    assert off == bare() != bare(**on)
    without, having = noisy_model(bare()), noisy_model(bare(**on))
    assert not of_part(without, part) and bool(of_part(having, part)) == bool(words)
    losses = [model(tokens(), tokens(1), tg.Mode(3)).item() for model in (without, having)]
    assert losses[0] != losses[1], "the part does something"


# At these values of its parameters a part is what is computed without it.
NEUTRAL = {
    "looped": {"skip": 0.0},
    "by_position": {"skip": 0.0},
    "gates": {"skip_gate": 40.0},
    "attention gate": {"gate": 0.0},
    "values": {"value_scale": 0.0},
    "parallel": {"attn.1.proj": 0.0, "attn.3.proj": 0.0, "attn.4.proj": 0.0},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("part", NEUTRAL)
def test_a_neutral_part_is_none_to_the_last_bit(part: str, passes: int, dtype: str) -> None:
    model = noisy_model(bare(dtype=dtype, **PARTS[part][0]))
    for words, value in NEUTRAL[part].items():
        for name, p in model.named_parameters():
            if words in name:
                p.data.fill_(value)
    without = tg.GPT(bare(dtype=dtype))
    without.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        expected = without.hidden(tokens(), tg.Mode(passes))[0]
        assert torch.equal(model.hidden(tokens(), tg.Mode(passes))[0], expected)


@pytest.mark.parametrize("part", [part for part, (_, names) in PARTS.items() if names])
def test_gradients_reach_a_part(part: str) -> None:
    """Within three steps, from the published start: of every vector, every entry."""
    values = BARE | PARTS[part][0] | dict(train_seq_len=64)
    config = tg.Config(**values, iterations=100, max_wallclock_seconds=0.0)
    model = drawn(config, 0)
    assert of_part(model, part)
    assert not without_gradient(model, config)


@pytest.mark.parametrize("kind, idle", [("looped", {0, 1, 2}), ("by_position", {5, 6, 7})])
def test_rows_that_wait_for_the_loop_do_not_decay(kind: str, idle: set[int]) -> None:
    """Before the onset they have no gradient; an optimizer that saw 0 would shrink them."""
    values = SMALL | dict(core_skips=kind, scalar_wd=0.5, scalar_lr=0.1)
    config = replace(FULL, **values)
    trainer = stub_trainer(config)
    model = trainer.model
    for passes, still in ((1, idle), (3, set())):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for step in range(2):
            trainer.train_step(step, 0.0, [(tokens(step), tokens(9))], tg.Mode(passes))
        for rows in ("skip", "skip_gate"):
            stays = [before[f"{rows}.{i}"].equal(p) for i, p in enumerate(getattr(model, rows))]
            assert stays == [i in still for i in range(8)], rows
        assert trainer.gradients.complete()


# ---- What carries it


def tiny_run(corpus: dict[str, str], **values: str) -> dict[str, str]:
    """A run of the preset with every part, whose loop begins after two of four steps."""
    return (
        corpus
        | dict(PRESET="frontier,tiny", MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1")
        | dict(ATTN_GATE_WIDTH="12", VE_LAYERS="9,10", VE_DIM="8", PASSES_SCHEDULE="0:1,0.5:3")
        | dict(TRAIN_SEQ_LEN="32", TRAIN_BATCH_TOKENS="128", MICRO_BATCH_TOKENS="64")
        | dict(ITERATIONS="4", DEVICE="cpu")
        | values
    )


@pytest.mark.parametrize("kind", ["looped", "by_position"])
def test_an_artifact_carries_every_part(kind: str, corpus: dict[str, str]) -> None:
    """What comes back is scored with three passes, and every parameter has its say in it."""
    given = dict(CORE_SKIPS=kind, DTYPE="float32", QUANT_CLIP="percentile")
    config = tg.Config.from_env(tiny_run(corpus, **given))
    model = noisy_model(config.architecture(), 0.1)
    ids = torch.randint(1024, (2, 32), generator=torch.Generator().manual_seed(0))
    read = check_stored(model, config, ids)
    assert read.plans == model.plans
    read(ids, ids.roll(-1, 1), read.scoring).backward()
    for name, stored in read.named_parameters():
        assert stored.grad is not None and stored.grad.any(), name


def test_an_artifact_with_the_last_layers_of_values_is_read() -> None:
    """Value embeddings were once a number of last layers."""
    a = bare(ve_layers="4-5")
    header = asdict(a)
    del header["ve_layers"]
    for last, layers in ((2, "4-5"), (0, ""), (9, "0-5")):
        found = tg.Architecture.from_json(header | dict(ve_last_n=last))
        assert found == replace(a, ve_layers=layers)


@pytest.mark.parametrize("kind", ["looped", "by_position"])
def test_a_checkpoint_carries_every_part(kind: str, corpus: dict[str, str], tmp_path: Path) -> None:
    """Saved at the onset of the loop, a run goes on to the last bit."""
    check_resume(tg.Config.from_env(tiny_run(corpus, CORE_SKIPS=kind)), tmp_path, 2, 4)
