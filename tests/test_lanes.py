"""LOOP_LANES=2: the plain loop at first, its formula after that, carried wherever a model goes."""

import json
import math
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import check_stored, make_steps, score_of
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402

SMALL: dict[str, Any] = dict(
    vocab_size=32,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    num_shared=2,
    train_seq_len=12,
    dtype="float32",
)
BETWEEN: dict[str, Any] = dict(interpass_norm=True, feedback_rank=2, pass_scale_init=0.5)
FORMS = ["scalar", "channel", "token"]


def lane_names(form: str) -> list[str]:
    """The parameters of lanes with LANE_WEIGHTS=form."""
    parts = ["read", "mix", "write", "coda"] + ["proj"] * (form == "token")
    return [f"core.lanes.{part}" for part in parts]


def architecture(**values: Any) -> tg.Architecture:
    return tg.Architecture(**SMALL | dict(loop_lanes=2) | values)


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(2, 32, (rows, 12), generator=torch.Generator().manual_seed(5))


def fresh_model(a: tg.Architecture) -> tg.GPT:
    torch.manual_seed(0)
    return tg.GPT(a, 0.05)


def shaken_model(a: tg.Architecture, start: int = 1) -> tg.GPT:
    """A model none of whose parameters is at its start, so that every branch has a say."""
    model = fresh_model(a)
    generator = torch.Generator().manual_seed(start)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def lanes_of(model: tg.GPT) -> tg.Lanes:
    assert model.core.lanes is not None
    return model.core.lanes


def gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


# ---- The function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, BETWEEN, dict(num_prelude=0, num_coda=0), dict(core_skips="looped", skip_gates=True)],
)
@pytest.mark.parametrize("passes", [1, 2, 3, 5])
@pytest.mark.parametrize("form", FORMS)
def test_it_starts_as_the_plain_loop(
    form: str, passes: int, options: dict[str, Any], dtype: str
) -> None:
    """To the last bit, whatever the other parameters are, in either type of the stream."""
    a = architecture(dtype=dtype, eval_passes=5, lane_weights=form, **options)
    plain = shaken_model(tg.replace(a, loop_lanes=1, lane_weights="channel"))
    lanes = fresh_model(a)
    missing, unexpected = lanes.load_state_dict(plain.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (sorted(lane_names(form)), [])
    with torch.no_grad():
        expected = plain.hidden(tokens(), tg.Mode(passes))[0]
        assert lanes.hidden(tokens(), tg.Mode(passes))[0].equal(expected)


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()


def turn(x: Tensor) -> Tensor:
    """Rotary embedding of x [T, E]: channels i and i + E/2 by the angle t 10000^(-2i/E)."""
    half = x.shape[1] // 2
    turned = torch.empty_like(x)
    for i in range(half):
        angle = torch.arange(len(x)).double() * 10000.0 ** (-i / half)
        turned[:, i] = x[:, i] * angle.cos() + x[:, i + half] * angle.sin()
        turned[:, i + half] = x[:, i + half] * angle.cos() - x[:, i] * angle.sin()
    return turned


class Written:
    """The model of one sequence in float64, written down from its formulas.

    `skips` are by the row of the layer that takes one: the row whose output it is, that of weights.
    """

    def __init__(
        self, model: tg.GPT, a: tg.Architecture, skips: Mapping[int, tuple[int, int]] | None = None
    ) -> None:
        self.a, self.skips = a, skips or {}
        self.kept: dict[int, Tensor] = {}  # outputs by row
        self.w = {name: p.detach().double() for name, p in model.named_parameters()}

    def mixed(self, x: Tensor, x0: Tensor, stored: int) -> Tensor:
        """The stream before a layer, from itself and the embedding."""
        share = torch.sigmoid(self.w[f"mix.{stored}.weight"])
        return share * x + (1 - share) * x0

    def layer(self, x: Tensor, x0: Tensor, stored: int, row: int) -> Tensor:
        w, D = self.w, self.a.model_dim
        code = torch.tensor([math.sin(row / 10000 ** (i / D)) for i in range(D)])
        x = self.mixed(x, x0, stored) + code.double()
        gamma, beta = w["cond.gamma"][row].clamp(-4, 4), w["cond.beta"][row]
        scale = w[f"attn.{stored}.scale"] * gamma[0]
        x = x + scale * self.attention(norm(x), stored) + beta[0]
        inner = x @ w[f"mlp.{stored}.fc.weight"].T
        inner = torch.where(inner > 0, inner, 0.5 * inner) ** 2
        scale = w[f"mlp.{stored}.scale"] * gamma[1]
        return x + scale * norm(inner @ w[f"mlp.{stored}.proj.weight"].T) + beta[1]

    def attention(self, x: Tensor, stored: int) -> Tensor:
        w, H, K = self.w, self.a.num_heads, self.a.num_kv_heads
        heads = (x @ w[f"attn.{stored}.qkv.weight"].T).chunk(H + 2 * K, dim=1)
        out = []
        for h in range(H):
            q = turn(norm(heads[h])) * w[f"attn.{stored}.q_gain"][h]
            k, v = turn(norm(heads[H + h // (H // K)])), heads[H + K + h // (H // K)]
            scores = q @ k.T / math.sqrt(q.shape[1])
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
            out.append(scores.softmax(1) @ v)
        return torch.cat(out, dim=1) @ w[f"attn.{stored}.proj.weight"].T

    def core_pass(self, x: Tensor, x0: Tensor, number: int) -> Tensor:
        """A pass with what it does to the state before and behind it."""
        a, w, known = self.a, self.w, min(number, self.a.num_loops - 1)
        if known and a.interpass_norm:
            x = norm(x)
        if known and a.feedback_rank:
            x = x + w["core.diagonal"] * (x @ w["core.v"] @ w["core.u"].T)
        begun = x
        for i in range(a.num_prelude, a.num_prelude + a.num_shared):
            row = i + a.num_shared * known
            # A skip into the first layer of a pass comes before all that happens between passes.
            x = self.visit(x if i == a.num_prelude else self.with_skip(x, row), x0, i, row)
        if known and a.pass_scale_init != 1:
            x = begun + w["core.scale"][known - 1] * (x - begun)
        return x

    def with_skip(self, x: Tensor, row: int) -> Tensor:
        """What the layer of a row takes: the stream, and with it what is kept for that layer."""
        if row not in self.skips:
            return x
        source, weight = self.skips[row]
        return x + self.w[f"skip.{weight}"] * self.kept[source]

    def visit(self, x: Tensor, x0: Tensor, stored: int, row: int) -> Tensor:
        """A layer whose output is kept."""
        self.kept[row] = self.layer(x, x0, stored, row)
        return self.kept[row]

    def lanes_pass(self, lanes: list[Tensor], x0: Tensor, number: int) -> list[Tensor]:
        """The lanes after a pass over the core; one lane is the state itself."""
        if len(lanes) == 1:
            return [self.core_pass(lanes[0], x0, number)]
        p = min(number, self.a.num_loops - 1)
        read, mix, write = (self.w[f"core.lanes.{name}"][p] for name in ("read", "mix", "write"))
        given = [torch.zeros(len(x0), 4, 1).double() for _ in lanes]  # for read, write, two lanes
        if self.a.lane_weights == "token":
            of_pass = self.w["core.lanes.proj"][4 * p : 4 * p + 4]
            given = [
                torch.tanh(norm(lane) @ of_pass.T / math.sqrt(self.a.model_dim))[:, :, None]
                for lane in lanes
            ]
        x = (read[0] + given[0][:, 0]) * lanes[0] + (read[1] + given[1][:, 0]) * lanes[1]
        change = self.core_pass(x, x0, number) - x
        return [
            (mix[i, 0] + given[0][:, 2 + i]) * lanes[0]
            + (mix[i, 1] + given[1][:, 2 + i]) * lanes[1]
            + (write[i] + given[i][:, 1]) * change
            for i in (0, 1)
        ]

    def hidden(self, ids: Tensor, passes: int, truncated: bool = False) -> Tensor:
        """The last state, if `truncated` with a gradient around all passes but the last."""
        a, first = self.a, self.a.num_prelude
        x = x0 = norm(self.w["tok_emb"])[ids]
        for i in range(first):
            x = self.visit(x, x0, i, i)
        begun, lanes = x, [x] * a.loop_lanes
        for number in range(passes):
            lanes = [self.with_skip(lane, first + a.num_shared * number) for lane in lanes]
            if truncated and number == passes - 1:
                path = begun  # through all passes but the last, if only their mixes act
                for stored in [*range(first, first + a.num_shared)] * number:
                    with torch.no_grad():
                        of_x = self.mixed(torch.ones_like(x0), 0 * x0, stored)
                        of_x0 = self.mixed(0 * x0, torch.ones_like(x0), stored)
                    path = of_x * path + of_x0 * x0
                lanes = [path + (lane - path).detach() for lane in lanes]
                for row in range(first, first + a.num_shared * number):
                    self.kept[row] = path + (self.kept[row] - path).detach()
            lanes = self.lanes_pass(lanes, x0, number)
            x = lanes[0]
            if a.loop_lanes > 1:
                x = self.w["core.lanes.coda"][0] * x + self.w["core.lanes.coda"][1] * lanes[1]
            # A skip takes of a pass's last layer what the coda would take of the pass.
            known = min(number, a.num_loops - 1)
            self.kept[first + a.num_shared * (known + 1) - 1] = x
        for stored in range(first + a.num_shared, a.stored_layers):
            row = stored + a.num_shared * (a.num_loops - 1)
            x = self.visit(self.with_skip(x, row), x0, stored, row)
        return norm(x)


@pytest.mark.parametrize("options", [{}, BETWEEN])
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_its_formula(form: str, passes: int, options: dict[str, Any]) -> None:
    """At fewer, as many and more passes than trained, alone and with the rest of the boundary."""
    a = architecture(eval_passes=4, lane_weights=form, **options)
    model = shaken_model(a)
    written = Written(model, a)
    expected = torch.stack([written.hidden(row, passes) for row in tokens()])
    with torch.no_grad():
        found = model.hidden(tokens(), tg.Mode(passes))[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter(form: str) -> None:
    """From the first step on, every pass and lane of every weight; no lane shadows the other."""
    model = fresh_model(architecture(lane_weights=form))
    model(tokens(), tokens().roll(-1, 1), tg.Mode(3)).backward()
    lanes = lanes_of(model)
    assert [f"core.lanes.{name}" for name, _ in lanes.named_parameters()] == lane_names(form)
    for name, p in lanes.named_parameters():
        assert p.dtype == torch.float32
        assert (gradient(p).abs().amax(-1) > 0).all(), name
    assert not gradient(lanes.write)[:, 0].equal(gradient(lanes.write)[:, 1])


# ---- What carries it


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A run on 2,000 made-up tokens, two passes after one."""
    header = np.zeros(256, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, 2000
    ids = np.random.default_rng(0).integers(2, 32, 2000).astype("<u2")
    (tmp_path / "fineweb_train_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
    sizes = {name.upper(): str(value) for name, value in SMALL.items()}
    return sizes | dict(
        DATA_PATH=str(tmp_path),
        TOKENIZER_PATH=str(tmp_path / "none.model"),
        TRAIN_BATCH_TOKENS="24",
        MICRO_BATCH_TOKENS="24",
        NUM_LOOPS="2",
        LOOP_LANES="2",
        PASSES_SCHEDULE="0:1,2:2",
        ITERATIONS="4",
        MAX_WALLCLOCK_SECONDS="0",
        DEVICE="cpu",
    )


def trainer_of(config: tg.Config) -> tg.Trainer:
    return tg.make_trainer(config, tg.World({}, device="cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_one_pass_trains_the_lanes_and_nothing_else_of_the_boundary(
    form: str, env: dict[str, str]
) -> None:
    """With one pass lanes are written and read already, so their gradients go to all ranks."""
    others = dict(
        LANE_WEIGHTS=form, PASS_SCALE_INIT="0.5", FEEDBACK_RANK="2", ADAM_WD="0.1", SCALAR_WD="0.1"
    )
    trainer = trainer_of(tg.Config.from_env(env | others))
    core = trainer.model.core
    before = {name: p.detach().clone() for name, p in core.named_parameters()}
    make_steps(trainer, 1)
    moved = {name for name, p in core.named_parameters() if not p.equal(before[name])}
    assert moved == {name.removeprefix("core.") for name in lane_names(form)}
    shared = trainer.gradients.flat.untyped_storage().data_ptr()
    for p in lanes_of(trainer.model).parameters():
        assert gradient(p).untyped_storage().data_ptr() == shared
    make_steps(trainer, 4)
    moved = {name for name, p in core.named_parameters() if not p.equal(before[name])}
    assert moved == set(before)


def test_every_lane_weight_has_an_optimizer(env: dict[str, str]) -> None:
    trainer = trainer_of(tg.Config.from_env(env | dict(LANE_WEIGHTS="token")))
    groups = trainer.optimizers.adam.param_groups
    for p in lanes_of(trainer.model).parameters():
        (group,) = [g for g in groups if any(p is member for member in g["params"])]
        assert (group["lr"], group["weight_decay"]) == (0.04, 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_an_artifact_carries_it(form: str, env: dict[str, str]) -> None:
    """And the loss of the reloaded model depends on all that was stored."""
    config = tg.Config.from_env(env | dict(LANE_WEIGHTS=form))
    read = check_stored(shaken_model(config.architecture()), config, tokens())
    loss = score_of(read, tokens())
    for name in lane_names(form):
        stored = read.get_parameter(name)
        stored.data.mul_(1.5)
        assert score_of(read, tokens()) != loss, name
        stored.data.div_(1.5)


def test_an_artifact_from_before_is_read(env: dict[str, str]) -> None:
    """Its header knows nothing of lanes, so it has none; or not of what weighs them."""
    config = tg.Config.from_env(env | dict(LOOP_LANES="1"))
    model = shaken_model(config.architecture())
    data = tg.pack(model, config)
    header, raw, codec = tg.unseal("artifact", data, "here", 1 << 28, lambda *parts: parts)
    assert header["architecture"].pop("loop_lanes") == 1
    read, found, _ = tg.load_model(b"".join(tg.seal("artifact", codec, header, raw)), "here")
    assert (found, read.core.lanes) == (config.architecture(), None)


def test_health_and_help_name_what_is_there(env: dict[str, str]) -> None:
    model = shaken_model(architecture())
    health = tg.recurrence_health(model, tokens(1), tg.Mode(3))
    assert [row["layer"] for row in health] == list(range(8))
    assert all(math.isfinite(value) for row in health for value in row.values())
    assert json.loads(json.dumps(health)) == health
    text = " ".join(tg.answer(["--help", "LOOP_LANES"]).split())
    assert "LOOP_LANES=1" in text and "Acts only with NUM_SHARED and NUM_LOOPS>1." in text
    assert "LOOP_LANES=1" in tg.help_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(LOOP_LANES="2", NUM_LOOPS="1"), "LOOP_LANES=2 cannot act here: NUM_LOOPS=1"),
        (dict(LOOP_LANES="3"), "LOOP_LANES=3 is out of range: 1 to 2"),
        (dict(LOOP_LANES="0"), "LOOP_LANES=0 is out of range: 1 to 2"),
        (dict(LANE_WEIGHTS="token"), "LANE_WEIGHTS=token cannot act here: LOOP_LANES=1"),
    ],
)
def test_it_is_refused_where_it_cannot_act(values: dict[str, str], message: str) -> None:
    with pytest.raises(tg.InputError, match=message):
        tg.Config.from_env(values)


@pytest.mark.parametrize("name", ["LOOP_LANES", "PASS_SCALE_INIT"])
def test_off_may_be_said_anywhere(name: str) -> None:
    assert tg.Config.from_env({name: "1", "NUM_LOOPS": "1"}) == tg.Config.from_env(
        dict(NUM_LOOPS="1")
    )


def test_it_has_a_row_in_the_table_of_runs() -> None:
    table = tomllib.loads((ROOT / "records" / "runs.toml").read_text(encoding="utf-8"))["run"]
    row = table["loop_lanes"]
    assert row["series"] == "components"
    values = {name: str(value) for name, value in row["set"].items()}
    config = tg.Config.from_env(values)
    (baseline,) = row["baselines"]
    off = {name: str(value) for name, value in table[baseline]["set"].items()}
    assert config.loop_lanes == 2
    assert tg.replace(config, loop_lanes=1) == tg.Config.from_env(off)
