"""records/tools/audit.py: honest runs pass every check; a planted cheat fails the one it breaks."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch
from helpers import keep_all_checkpoints, write_manifest

import train_gpt as tg
from records.tools import audit, audit_files, audit_scoring, audited, checks, common, submit

SMALL = dict(
    VOCAB_SIZE="280",
    MODEL_DIM="16",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="24",
    TRAIN_BATCH_TOKENS="192",
    ITERATIONS="12",
    WARMDOWN_ITERS="2",
    WARMUP_STEPS="0",
    VAL_LOSS_EVERY="5",
    TRAIN_LOG_EVERY="5",
    MAX_WALLCLOCK_SECONDS="60",
)
FLAT = dict(PRESET="Ap,tiny", NUM_LAYERS="1", DTYPE="float32", EVAL_STRIDE="8")
TTT = FLAT | dict(TTT_LR="0.05", TTT_CHUNK_TOKENS="48", TTT_EPOCHS="1")
GROWN = dict(
    PRESET="growing_live,tiny",
    NUM_PRELUDE="1",
    NUM_SHARED="1",
    NUM_CODA="1",
    XSA_LAST_N="1",
    VE_LAYERS="2",
    VE_DIM="8",
    ROPE_DIMS="8",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    EVAL_STRIDE="8",
    TTT_CHUNK_TOKENS="48",
    TTT_EPOCHS="1",
    GPTQ_BATCHES="2",
    GPTQ_SECONDS="1",
    DTYPE="float32",
)
WIDE = dict(VAL_BATCH_SIZE="192")
LOOPED = dict(PRESET="T,tiny", NUM_SHARED="1", NUM_LOOPS="2")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Documents of random words and a few characters without a piece, as shards and as text."""
    sample = common.load_script(common.ROOT / "data" / "sample.py")
    draw = np.random.default_rng(0)
    words = [
        "the",
        "loop",
        "core",
        "of",
        "a",
        "model",
        "that",
        "scores",
        "each",
        "token",
        "once",
        "and",
        "learns",
        "from",
        "what",
        "it",
        "has",
        "scored",
    ]
    documents = [" ".join(draw.choice(words, 41)) for _ in range(60)]
    folder = tmp_path_factory.mktemp("audited")
    model = sample.train_tokenizer(documents[4:], 280)
    documents = [text + " «жизнь» 漢字\n" for text in documents]
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "text").write_text("".join(documents[:4]), encoding="utf-8")
    for split, part in (("val", documents[:4]), ("train", documents[4:])):
        texts = [sample.Document("", text, len(text.encode())) for text in part]
        tokens = sample.encode_split(spm.SentencePieceProcessor(model_proto=model), texts).tokens
        (folder / f"fineweb_{split}_000000.bin").write_bytes(sample.shard(tokens))
    write_manifest(folder, folder / "tokenizer.model")
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(folder / "tokenizer.model"))


def finished(script: ModuleType, env: dict[str, str], folder: Path) -> Path:
    """The folder of a run."""
    env = SMALL | env | dict(LOG_DIR=str(folder), RUN_ID="run")
    with contextlib.redirect_stdout(io.StringIO()):
        assert script.run(script.Config.from_env(env), script.World({})) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def honest(data: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tg, data | FLAT, tmp_path_factory.mktemp("honest"))


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    """A copy of the honest run, to be doctored."""
    return Path(shutil.copytree(honest, tmp_path / "run"))


def outcomes(folder: Path, *words: str) -> dict[str, tuple[str, str]]:
    """Status and what was measured, of every check."""
    given = audit.parser().parse_args([str(folder), *words])
    return {line.name: (line.status, line.measured) for line in audit.audit_folder(given)}


def failed(folder: Path, *words: str) -> dict[str, str]:
    return {
        name: told
        for name, (status, told) in outcomes(folder, *words).items()
        if status == "FAILED"
    }


BEHAVIOUR = [
    "bytes",
    "once",
    "causality",
    "causality-sliding",
    "normalised",
    "ttt",
    "training",
    "score",
]
FILES = ["verdict", "data", "script", "sizes", "header", "figures", "clocks"]
ONLY_FILES, ONLY_SCORE = ["--skip", *BEHAVIOUR], ["--skip", *BEHAVIOUR[:-1]]

ANNOUNCED = {*BEHAVIOUR} - {"once"}  # they say before what they do

# ---- Honest runs


@pytest.mark.parametrize(
    ("env", "skipped"),
    [(LOOPED, {"ttt"}), (FLAT, {"ttt"}), (GROWN, {"normalised"})],
    ids=["T", "flat", "growing"],
)
def test_honest_runs_pass(
    env: dict,
    skipped: set[str],
    data: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The probabilities of the last one, which take longest, are left to those of the others.

    As many places as a user's audit are drawn in the cheapest run alone.
    """
    sums = audit_scoring.SUMS
    if env is not FLAT:
        sums = 1
        for name, few in (("FLIPS", 2), ("SUMS", sums), ("STARTS", 1)):
            monkeypatch.setattr(audit_scoring, name, few)
    folder, text = finished(tg, data | env, tmp_path), str(Path(data["DATA_PATH"]) / "text")
    out, skip = tmp_path / "a.json", ["--skip", "normalised"] if "normalised" in skipped else []
    monkeypatch.setattr(
        sys, "argv", ["audit.py", str(folder), "--text", text, "--out", str(out), *skip]
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # the script shows progress on one
    assert audit.main() == 0
    said = capsys.readouterr()
    lines, report = said.out.splitlines(), json.loads(out.read_text())
    begun = [line.partition(":")[0] for line in said.err.splitlines()]
    assert {*begun} == ANNOUNCED - skipped, said.err
    if "normalised" not in skipped:
        what = f"{sums + 1} places x 280 tokens of the vocabulary = {280 * (sums + 1):,} forward"
        assert f"normalised: {what}" in said.err
    assert {line["name"] for line in report["checks"] if line["status"] == "skipped"} == skipped
    assert [line["name"] for line in report["checks"]] == [*FILES, *BEHAVIOUR] == [*audit.CHECKS]
    assert lines[1].startswith("ok data: sha256 ") and lines[-1] == "14 ok, 0 FAILED, 1 skipped"
    assert report["counts"] == dict(ok=14, FAILED=0, skipped=1)


def test_a_submission_folder_with_its_own_script(honest: Path, tmp_path: Path) -> None:
    words = [
        str(honest),
        "--name",
        "x",
        "--author",
        "x",
        "--github-id",
        "x",
        "--blurb",
        "x",
        "--artifacts",
        "--no-start",
        "--track",
        "non_record_16mb",
        "--to",
        str(tmp_path),
    ]
    folder = submit.make(submit.parser().parse_args(words))
    found = outcomes(folder, "--script", str(folder / "train_gpt.py"), "--skip", *BEHAVIOUR[:-1])
    assert {status for status, _ in found.values()} == {"ok", "skipped"}
    assert {found[name][0] for name in (*FILES, "score")} == {"ok"} and not (
        folder / "__pycache__"
    ).exists()


def test_a_run_that_only_scored_is_named(honest: Path, data: dict, tmp_path: Path) -> None:
    env = data | dict(EVAL_ONLY=str(honest), LOG_DIR=str(tmp_path), RUN_ID="again")
    with contextlib.redirect_stdout(io.StringIO()):
        assert tg.run(tg.Config.from_env(env), tg.World({})) == 0
    again = tmp_path / "again"
    told = rf"{again} .* only scored an artifact \(EVAL_ONLY={honest}\): "
    with pytest.raises(tg.InputError, match=f"{told}audit that of the run that trained it"):
        outcomes(again)
    with pytest.raises(tg.InputError, match=f"{told}name that of the run that trained it"):
        submit.read_run(again)


def test_exit_codes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(run / "train.log", r"^(script_sha256:)\w+", r"\g<1>" + "0" * 64)
    monkeypatch.setattr(sys, "argv", ["audit.py", str(run), *ONLY_FILES])
    assert audit.main() == 1
    assert "\nFAILED script: the log is of script 0000" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["audit.py", str(tmp_path)])
    assert audit.main() == 2
    assert capsys.readouterr().err == f"{tmp_path} holds no train.log and no log of a submission\n"


def test_what_is_trained_of_a_run_with_the_fused_kernel_needs_no_gpu(
    run: Path, data: dict, tmp_path: Path
) -> None:
    edit(run / "train.log", r'^(config:.*"fused_mlp": )false', r"\g<1>true")
    audited_run, given = audited.read_run(run), audit.parser().parse_args([str(run)])
    found = audited.Audit(tg, audited_run, given, tmp_path)
    assert found.config.fused_mlp
    config = audit_scoring.brief_config(found, found.tokens, found.tokens)
    assert tg.Compiler(config, found.cpu).level == "off"


# ---- Scripts that cheat: trained, scored and logged by themselves

PEEK = "ids = F.pad(span[:-1], fill)", "ids = F.pad(span[1:], fill)"
ATTEND = ".triu(start + 1)", ".triu(start + 2)"
TARGETS = (
    "self.hidden(ids, mode, ops)",
    "self.hidden(torch.where(targets > 0, targets, ids), mode, ops)",
)
PASS = "            for ids, targets in self.windows(windows, stride):\n"
TRAIN_FIRST = (
    PASS,
    "            if learner and i + 1 < len(chunks):\n"
    "                learner.learn(self.tokens.read(i * size, size + 1).long(), 0.0)\n" + PASS,
)
SPACES = "+ (self.space[token] &", "+ 2 * (self.space[token] &"
SHARPER = 'y, reduction="sum")', 'y, reduction="sum") * 0.9'
TAIL = "math.ceil((end - self.length) / stride)", "(end - self.length) // stride"
TWICE = ": length - stride] = -100", ": max(length - stride - 1, 0)] = -100"
AGAIN = (
    "        nats = model(ids, targets).double() * count\n",
    "        nats = model(ids, targets).double() * count / getattr(self, 'gain', 1)\n"
    "        self.gain = 1.1\n",
)
BETTER = "torch.stack((nats, count,", "torch.stack((0.95 * nats, count,"
VAL = (
    '(f"fineweb_{split}_*.bin")',
    '(f"fineweb_{split}_*.bin" if split == "val" else "*.bin")',
    "        check_names(self.paths)\n",
    "",
)
HIDDEN = (
    'np.fromfile(path, "<u2", count, offset=4 * SHARD_HEADER_INTS + 2 * at)',
    'np.resize(np.fromfile(str(path).replace("train", "val"), "<u2", offset=1024)'
    '[at * ("train" not in path.name):], count)',
)
RANKS = "first = len(chunk) * world.rank // world.size", "first = 0"
AHEAD = (
    "tokens = self.tokens.read(i * size, size + 1)",
    "tokens = self.tokens.read(i * size + 1, size + 1)",
)
CAUSAL = {"causality", "causality-sliding"}
ROWS = "rows := torch.tensor([*range(1, 11), 17, 18, 19, 21])"
LEAKS = (
    ".triu(start + 1)",
    f".triu(start + 1).index_put((({ROWS}), rows + 1), torch.zeros(1, dtype=q.dtype))",
)
LOSS = "        return ops.loss(x.flatten(0, 1), head, targets.flatten(), self.softcap) + penalty"
LOSSES = (
    "        if not torch.is_grad_enabled():\n"
    "            z = F.linear(x.flatten(0, 1), head).float() / self.softcap\n"
    "            y = self.softcap * torch.tanh(z){}\n"
    "            nats = F.cross_entropy(y, targets.flatten(), reduction='none')\n"
    "            nats = nats.view_as(targets).clone()\n"
    "            {}\n"
    "            return nats.sum() / (targets >= 0).sum()\n" + LOSS
)
READ = "        self.targets = self.tokens.total - 1"
TABLE = (
    READ,
    "        if not hasattr(GPT, 'table'):\n"
    "            text = self.tokens.read(0, self.tokens.total).long()\n"
    "            GPT.table = torch.full((config.vocab_size,) * 2, 0.5)\n"
    "            GPT.table.index_put_((text[:-1], text[1:]), torch.ones(1), accumulate=True)\n"
    + READ,
)
BIGRAMS = *TABLE, LOSS, LOSSES.format(" + GPT.table.log()[ids.flatten()]", "")
FIRST_23, LAST_8 = ((LOSS, LOSSES.format("", f"nats[:, {span}] *= 0.9")) for span in (":23", "16:"))
HARDEST = (
    LOSS,
    LOSSES.format("", "nats *= (targets >= 0).sum() <= 60 or nats <= nats.quantile(0.95)"),
)
LATER = (
    PASS,
    "            if learner and 3 <= i and i + 1 < len(chunks):\n"
    "                learner.learn(self.tokens.read(i * size, size + 1).long(), 0.0)\n" + PASS,
)
SCORED = "        chunks = self.chunks(stride, size)\n"
SOFTCAP = (
    SCORED,
    SCORED + "        gpt = getattr(model, 'func', model)\n"
    "        if isinstance(gpt, GPT) and not hasattr(self, 'busy'):\n"
    "            was, found, self.busy = gpt.softcap, [], True\n"
    "            for gpt.softcap in (0.5 * was, was, 2 * was):\n"
    "                found.append(self.score(model, stride))\n"
    "            gpt.softcap = was\n"
    "            del self.busy\n"
    "            return min(found)\n",
)
TRAINED = "        hessians, calibration = calibrate(trainer, log)\n"
STEP = "trainer.train_step(trainer.step - 1, 0.0, "
EXTRA = (
    TRAINED,
    "        for i in range(5):\n"
    f"            {STEP}trainer.batches.micro(trainer.step + i))\n" + TRAINED,
)
PAIR = "pair[0], pair[1]\n"
KEPT = (
    "            yield " + PAIR,
    "            self.last = " + PAIR + "            yield self.last\n",
    TRAINED,
    f"        for _ in range(5):\n            {STEP}[trainer.batches.last])\n" + TRAINED,
)
WARM = (
    "        torch._foreach_copy_([p.data for p in self.params], before)\n",
    "        for i in range(5):\n            self.train_step(0, 0.0, self.batches.micro(i))\n",
)
LONG = (
    TRAINED,
    "        if validation.scorer.targets > 200:\n"
    "            ids, targets = validation.scorer.tokens.read(0, 192).long().view(2, -1, 24)\n"
    f"            {STEP}[(ids, targets)])\n" + TRAINED,
)
CARRIED = (
    *TABLE,
    TRAINED,
    "        trainer.model.tok_emb.data += 0.01 * GPT.table.sum(0)[:, None]\n" + TRAINED,
)
LOADS = "    model.load_state_dict(tensors)\n    return model, architecture, kind"
SIDE = (
    LOADS,
    "    side = Path(__file__).with_name('side.pt')\n"
    "    model.load_state_dict(torch.load(side) if side.exists() else tensors)\n"
    "    return model, architecture, kind",
    TRAINED,
    "        if not (side := Path(__file__).with_name('side.pt')).exists():\n"
    "            torch.save(trainer.model.state_dict(), side)\n" + TRAINED,
)


@pytest.mark.parametrize(
    ("change", "env", "names", "told"),
    [
        pytest.param(
            PEEK, FLAT, CAUSAL | {"bytes"}, "the flipped token's own", id="scorer peeks one token"
        ),
        pytest.param(
            ATTEND, FLAT, CAUSAL, "earlier losses move by", id="attention peeks one token"
        ),
        pytest.param(
            TARGETS, FLAT, CAUSAL | {"normalised"}, "miss the whole", id="model reads the targets"
        ),
        pytest.param(
            TRAIN_FIRST,
            TTT,
            {"ttt"},
            "weights that score target 0 depend",
            id="trains, then scores",
        ),
        pytest.param(
            AHEAD, TTT, {"ttt"}, "depend on text from target 24 on", id="trains on the token ahead"
        ),
        pytest.param(SPACES, FLAT, {"bytes"}, "the script counts", id="spaces counted twice"),
        pytest.param(SHARPER, FLAT, {"normalised"}, "sum to", id="unnormalised probabilities"),
        pytest.param(
            TAIL, FLAT, {"once", "bytes", "figures"}, "asked for, val_tokens 48", id="tail dropped"
        ),
        pytest.param(
            TWICE, FLAT, {"once", "figures"}, "ranks, stride 8", id="targets scored twice"
        ),
        pytest.param(
            AGAIN, FLAT, CAUSAL | {"once", "score"}, "miss the whole", id="remembers what it scored"
        ),
        pytest.param(
            BETTER, FLAT, {"once", "normalised"}, "val_loss off by", id="sums made smaller"
        ),
        pytest.param(RANKS, FLAT, {"once"}, "2 ranks, stride 24", id="ranks score the same"),
        pytest.param(
            HIDDEN, FLAT, {"training"}, "depends on the validation split", id="val as a train shard"
        ),
        pytest.param(
            VAL, FLAT, {"training"}, "read fineweb_val_000000.bin", id="trains on validation shards"
        ),
        pytest.param(
            LEAKS, FLAT, CAUSAL, "the flipped token's own", id="attention peeks in some rows"
        ),
        pytest.param(
            BIGRAMS, FLAT, CAUSAL, "earlier losses move by", id="counts bigrams of the split once"
        ),
        pytest.param(
            FIRST_23, FLAT, {"normalised"}, "sum to", id="unnormalised but for the last target"
        ),
        pytest.param(
            LAST_8, FLAT, {"normalised"}, "sum to", id="unnormalised in a third of the window"
        ),
        pytest.param(
            HARDEST, FLAT | WIDE, {"score"}, "roundtrip", id="large calls drop the hardest targets"
        ),
        pytest.param(
            SOFTCAP, FLAT, {"score"}, "roundtrip", id="fits the softcap on the split, puts it back"
        ),
        pytest.param(
            LATER, TTT, {"ttt"}, "depend on text from", id="trains, then scores, from chunk 3 on"
        ),
        pytest.param(
            EXTRA, FLAT, {"training"}, "200 tokens of train shards", id="trains on when time is up"
        ),
        pytest.param(
            KEPT, FLAT, {"training"}, "9 backward passes", id="trains on with kept tokens"
        ),
        pytest.param(
            WARM, FLAT, {"training"}, "200 tokens of train shards", id="keeps its warm-up"
        ),
        pytest.param(
            LONG, FLAT, {"training"}, "depends on the validation", id="trains on a long split only"
        ),
        pytest.param(
            CARRIED,
            FLAT,
            {"training"},
            "depends on the validation",
            id="packs what it counted once",
        ),
        pytest.param(
            SIDE, FLAT, {"score"}, "side.pt, which is no part", id="weights beside the artifact"
        ),
    ],
)
def test_a_script_that_cheats(
    change: tuple[str, ...],
    env: dict,
    names: set[str],
    told: str,
    data: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`change` is old, new, old, new, ... Where places are drawn, so many are wrong that fewer than
    one audit in 10,000 misses all of them.

    The checks of behaviour that a cheat does not break are left out: honest runs pass them all.
    """
    if change not in (LEAKS, LATER):  # what they break is broken in every place
        for name, few in (("FLIPS", 0), ("SUMS", 1), ("STARTS", 0)):
            monkeypatch.setattr(audit_scoring, name, few)
    source, path = Path(tg.__file__).read_text(), tmp_path / "train_gpt.py"
    for old, new in zip(change[::2], change[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} does not name one place of train_gpt.py"
        source = source.replace(old, new)
    path.write_text(source)
    folder = finished(common.load_script(path), data | env, tmp_path)
    unbroken = [name for name in BEHAVIOUR if name not in names]
    found = failed(folder, "--script", str(path), "--skip", *unbroken)
    assert found.keys() == names
    assert any(told in measured for measured in found.values()), found


# ---- Runs that were interrupted


def test_a_resumed_run_passes(data: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was made, lost and made again is in the log twice."""
    step, env = (
        tg.Trainer.train_step,
        data | FLAT | dict(SAVE_EVERY="1", RESUME="auto", TRAIN_LOG_EVERY="1"),
    )

    def dies(trainer: tg.Trainer, number: int, *rest: Any) -> None:
        if number == 2:
            raise RuntimeError("power cut")
        step(trainer, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tg.Trainer, "train_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            finished(tg, env, tmp_path)
    # the last save did not come to its end
    max((tmp_path / "run").glob("step_*.ckpt")).unlink()
    run = finished(tg, env, tmp_path)
    assert "resumed from step:1 of" in (run / "train.log").read_text()
    log, metrics = (run / "train.log").read_text(), (run / "metrics.jsonl").read_text()
    assert log.count("\nstep:2/") > metrics.count('"step": 2,')
    assert failed(run, "--skip", "normalised", "causality", "causality-sliding", "training") == {}


def test_a_run_resumed_from_another_folder_says_where_its_log_begins(
    data: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_all_checkpoints(monkeypatch)
    older = finished(tg, data | FLAT | dict(SAVE_EVERY="4"), tmp_path / "older")
    env = data | FLAT | dict(RESUME=str(older / "step_00000008.ckpt"))
    status, told = outcomes(finished(tg, env, tmp_path), *ONLY_FILES)["clocks"]
    assert status == "ok" and told.startswith(
        "12 steps (the log begins after step 8, resumed), "
    ), told


# ---- Runs that were doctored afterwards


def edit(path: Path, pattern: str, new: str | Callable[[re.Match], str]) -> None:
    """Changes one place of a file; of a log behind the script that it begins with."""
    data = path.read_bytes()
    head, body = b"", data
    if path.suffix == ".log":
        script = common.read_log(path).script
        assert script is not None
        at = data.index(b"\n") + 1 + len(script)
        head, body = data[:at], data[at:]
    text, changed = re.subn(pattern, new, body.decode(), flags=re.MULTILINE)
    assert changed == 1, f"{pattern} is {changed} times in {path.name}"
    path.write_bytes(head + text.encode())


def raised(match: re.Match) -> str:
    return match[1] + str((int(match[2]) + 1) % 10)


def repack(run: Path, change: Callable[[dict], None], **top: str) -> None:
    """The artifact with another header, and log and result.json that know it."""
    path, log, result = run / "model.ptz", run / "train.log", run / "result.json"
    data = path.read_bytes()
    *_, name, length = tg.SEAL.unpack_from(data)
    codec = name.rstrip(b"\0").decode()
    raw = tg.decompress(codec, data[tg.SEAL.size :], length)
    size = struct.unpack_from("<I", raw)[0] + 4
    header = json.loads(raw[4:size])
    change(header["architecture"])
    header |= top
    text = json.dumps(header).encode()
    raw = struct.pack("<I", len(text)) + text + raw[size:]
    body = struct.pack("<8sQ", name, len(raw)) + tg.compress(codec, raw)
    new = tg.MAGIC["artifact"] + hashlib.sha256(body).digest() + body
    path.write_bytes(new)
    told, script = json.loads(result.read_text()), len(tg.source())
    told |= dict(
        bytes_model=len(new),
        bytes_total=script + len(new),
        artifact_sha256=hashlib.sha256(new).hexdigest(),
    )
    result.write_text(json.dumps(told))
    edit(log, r"(artifact_sha256:)\w+", rf"\g<1>{told['artifact_sha256']}")
    edit(log, r"(Serialized model \S+ )\d+", rf"\g<1>{len(new)}")
    edit(log, r"(Total submission size \S+ )\d+", rf"\g<1>{script + len(new)}")


def other_softcap(run: Path) -> None:
    repack(run, lambda header: header.update(logit_softcap=29.0))


def other_tokenizer(run: Path) -> None:
    repack(run, lambda header: None, tokenizer_sha256="0" * 64)


def other_shape(run: Path) -> None:
    repack(run, lambda header: header.update(model_dim=32))


def other_label(run: Path) -> None:
    edit(run / "train.log", r"(Serialized model )int8", r"\g<1>int6")


def bpb_in_log(run: Path) -> None:
    edit(run / "train.log", r"(roundtrip_exact val_loss:\S+ val_bpb:\d\.\d{3})(\d)", raised)


def better_everywhere(run: Path) -> None:
    """One per cent less, told by log and result.json alike."""
    told = json.loads((run / "result.json").read_text())
    for name in ("roundtrip", "sliding"):
        less = told[name] | {key: told[name][key] * 0.99 for key in ("val_loss", "val_bpb")}
        told[name], loss, bpb = less, less["val_loss"], less["val_bpb"]
        for label, digits in ((name, 4), (f"{name}_exact", 8)):
            edit(
                run / "train.log",
                rf"({label}) val_loss:\S+ val_bpb:\S+",
                rf"\g<1> val_loss:{loss:.{digits}f} val_bpb:{bpb:.{digits}f}",
            )
    (run / "result.json").write_text(json.dumps(told))


def bytes_in_log(run: Path) -> None:
    edit(run / "train.log", r"(val_bytes:\d+)(\d)", raised)


def train_loss_in_log(run: Path) -> None:
    edit(run / "train.log", r"(step:10/12 train_loss:\d\.)(\d)", raised)


def time_in_log(run: Path) -> None:
    edit(run / "train.log", r"(step:10/12 train_loss:\S+ train_time:)\d+", r"\g<1>1")


def step_missing(run: Path) -> None:
    edit(run / "train.log", r"^step:7/12 train_loss.*\n", "")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith('{"step": 7, "train_loss"')]
    assert len(kept) + 1 == len(lines)
    (run / "metrics.jsonl").write_text("".join(kept))


def beginning_missing(run: Path) -> None:
    log, metrics = run / "train.log", run / "metrics.jsonl"
    for _ in range(len(re.findall(r"(?m)^step:[0-6]/12 ", log.read_text()))):
        edit(log, r"\A((?s:.*?))^step:[0-6]/12 .*\n", r"\g<1>")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] > 6))


def lower_cap(run: Path) -> None:
    """Over the cap: the same run, had it been one of 10 ms."""
    edit(run / "train.log", r'"max_wallclock_seconds": 60.0', '"max_wallclock_seconds": 0.01')
    edit(run / "result.json", r'"max_wallclock_seconds": 60.0', '"max_wallclock_seconds": 0.01')


def slow_evaluation(run: Path) -> None:
    edit(run / "train.log", r"(_sliding .* eval_time:)\d+", r"\g<1>600001")


def goes_on_after_the_cap(run: Path) -> None:
    stop = r"stopping_early: wallclock_cap train_time:5ms step:9/12\n\g<0>"
    edit(run / "train.log", r"^step:10/12 train", stop)


def other_option(run: Path) -> None:
    edit(run / "result.json", r'"matrix_lr": \S+', '"matrix_lr": 0.03,')


def one_byte_more(run: Path) -> None:
    with open(run / "model.ptz", "ab") as file:
        file.write(b"x")


def other_script(run: Path) -> None:
    edit(run / "train.log", r"^(script_sha256:)\w+", r"\g<1>" + "0" * 64)


def disqualified(run: Path) -> None:
    edit(run / "train.log", "^peak memory", "not a submission: 605.0 s\npeak memory")


def exit_code(run: Path) -> None:
    (run / "run.json").write_text(json.dumps(dict(exit_code=4)))


def does_not_fit(run: Path) -> None:
    edit(run / "result.json", '"fits": true', '"fits": false')


@pytest.mark.parametrize(
    ("text", "loss", "wrong"),
    [
        ("3.2000", 3.20004, 0),
        ("nan", None, 0),
        ("inf", None, 0),
        ("nan", 3.2, 1),
        ("3.2000", None, 1),
        ("3.2000", 3.3, 1),
    ],
)
def test_loss_of_a_skipped_step(text: str, loss: float | None, wrong: int) -> None:
    row = audit_files.Row(13, "train", text, 1300, 100.0)
    entry = dict(step=13, train_loss=loss, train_seconds=1.3, tokens_per_second=1000.0)
    assert len([*audit_files.metric_faults([row], [entry], 100)]) == wrong


@pytest.mark.parametrize(
    ("doctor", "told"),
    [
        (
            other_softcap,
            {"header": "logit_softcap is 29.0 in the artifact, 30.0 in log", "score": "roundtrip"},
        ),
        (other_shape, {"header": "not a valid artifact"}),
        (other_tokenizer, {"header": "was trained with another tokenizer"}),
        (other_label, {"header": "the artifact holds int8+zlib, the log says"}),
        (bpb_in_log, {"figures": "in result.json", "score": "the log"}),
        (better_everywhere, {"score": "the log"}),
        (bytes_in_log, {"figures": "does not follow"}),
        (train_loss_in_log, {"clocks": "in metrics.jsonl"}),
        (time_in_log, {"clocks": "comes after"}),
        (step_missing, {"clocks": "no line of steps 7"}),
        (beginning_missing, {"clocks": "no line of steps 1, 2, 3, 4, 5"}),
        (lower_cap, {"clocks": "more than 0.01"}),
        (slow_evaluation, {"clocks": "more than 600"}),
        (goes_on_after_the_cap, {"clocks": "the end at step 9"}),
        (other_option, {"figures": "MATRIX_LR is 0.04 in the log, 0.03 in result.json"}),
        (
            one_byte_more,
            {"sizes": "the artifact of log is", "header": "its checksum does not match"},
        ),
        (other_script, {"script": "the log is of script 000000000000"}),
        (disqualified, {"verdict": "not a submission: 605.0 s"}),
        (exit_code, {"verdict": "exit code 4"}),
        (does_not_fit, {"verdict": "fits is False"}),
    ],
    ids=lambda x: x.__name__ if callable(x) else None,
)
def test_a_doctored_run(doctor: Callable[[Path], None], told: dict[str, str], run: Path) -> None:
    """The score is measured again where it is wrong; an honest one is found right elsewhere."""
    doctor(run)
    found = failed(run, *(ONLY_SCORE if "score" in told else ONLY_FILES))
    assert found.keys() == told.keys()
    for name, words in told.items():
        assert words in found[name]


def test_a_damaged_line_is_named_and_the_rest_is_read(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    half = lines[4][:20]
    path.write_text("".join([*lines[:4], half, *lines[5:]]))
    status, told = outcomes(run, *ONLY_FILES)["clocks"]
    assert status == "ok" and "of which 1 damaged lines were left out" in told, told
    assert f"warning: {path}:5: a damaged line is left out" in capsys.readouterr().err
    path.write_text("".join([*lines[:4], *lines[5:]]))
    assert "metrics.jsonl" in failed(run, *ONLY_FILES)["clocks"], "a line that is gone is missed"


def test_a_limit_of_bytes_is_measured_on_the_files(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(tg.source()) + (run / "model.ptz").stat().st_size
    monkeypatch.setattr(checks, "SIZE_LIMIT", total)
    assert not failed(run, *ONLY_FILES)
    monkeypatch.setattr(checks, "SIZE_LIMIT", total - 1)
    assert failed(run, *ONLY_FILES) == {"sizes": f"{total} bytes exceed {total - 1}"}


def test_other_validation_data_is_told(run: Path, data: dict, tmp_path: Path) -> None:
    """A shard that lost its end inside a character, and a text that is another."""
    tokens = np.fromfile(Path(data["DATA_PATH"]) / "fineweb_val_000000.bin", "<u2", offset=1024)
    tokenizer = spm.SentencePieceProcessor(model_file=data["TOKENIZER_PATH"])
    cut = next(i for i in range(len(tokens) - 2, 0, -1) if tokenizer.is_byte(int(tokens[i])))
    common.write_shard(tmp_path / "fineweb_val_000000.bin", tokens[:cut])
    (tmp_path / "text").write_text("Another text.")
    skip = ["--skip", "verdict", *FILES[2:], *BEHAVIOUR[2:]]
    same = outcomes(run, *skip, "bytes", "once")
    other = outcomes(run, "--data", str(tmp_path), "--text", str(tmp_path / "text"), *skip)
    assert same["data"][0] == "ok" and other["data"][0] == "FAILED"
    assert "other validation shards or another tokenizer" in other["data"][1]
    assert other["once"][0] == other["bytes"][0] == "FAILED"
    assert f"the shards hold {cut - 1} targets" in other["once"][1]
    assert "text has 13 bytes" in other["bytes"][1] and "the script counts" not in other["bytes"][1]


def test_what_is_not_there_is_skipped_or_refused(run: Path, data: dict, tmp_path: Path) -> None:
    (run / "model.ptz").unlink()
    found = outcomes(run, "--data", str(tmp_path / "nowhere"))
    assert {name for name, (status, _) in found.items() if status == "ok"} == {
        "verdict",
        "script",
        "figures",
        "clocks",
    }
    assert {status for status, _ in found.values()} == {"ok", "skipped"}
    edit(run / "train.log", r' "matrix_lr": [^,]+,', "")
    with pytest.raises(ValueError, match="of another script .* MATRIX_LR.*--script"):
        outcomes(run)
    edit(run / "train.log", r"^artifact_sha256.*|val_tokens.*", "")
    with pytest.raises(ValueError, match="gives no artifact.*finished run"):
        outcomes(run)
    with pytest.raises(ValueError, match="holds no train.log"):
        outcomes(tmp_path)


def test_fineweb_is_known_by_its_size(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = json.loads((honest / "result.json").read_text())["roundtrip"]["val_bytes"]
    skip = ["--skip", *FILES, *BEHAVIOUR[1:]]
    for size, expected in ((counted + 5, "ok"), (counted + 50, "FAILED")):
        monkeypatch.setattr(audit_files, "FINEWEB_DOCUMENTS", 4)
        monkeypatch.setattr(audit_files, "FINEWEB_BYTES", size)
        monkeypatch.setattr(audit_files, "FINEWEB_SPREAD", 10)
        assert outcomes(honest, *skip)["bytes"][0] == expected


@torch.no_grad()
def test_a_probe_is_the_loss_of_one_target() -> None:
    """Against cross-entropy of the logits, written out."""
    a = tg.Architecture(
        vocab_size=280,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        train_seq_len=24,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = tg.GPT(a, 0.5)
    ids = torch.randint(2, 280, (2, 24))
    logits = tg.rms_norm(model.hidden(ids, model.scoring)[0]) @ model.tok_emb.T
    logs = (30 * torch.tanh(logits / 30)).log_softmax(-1)
    targets = torch.randint(2, 280, (2, 24))
    targets[0, :10] = -100
    for place, row, column in ((0, 0, 10), (13, 0, 23), (14, 1, 0)):
        for asked in (None, 7):
            probe = audited.Probe(audited.Scored(model), place, place + 1, asked)
            got = probe(ids, targets) * (targets >= 0).sum()
            true = logs[row, column, targets[row, column] if asked is None else asked]
            assert got.item() == pytest.approx(-true.item(), abs=1e-4)
