"""What a user gets to see: one line that names the culprit, an exit code, nothing left behind."""

import io
import json
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
import torch
from helpers import (
    EXACT,
    SCRIPT,
    parts_of,
    sealed,
    shard_bytes,
    start,
    tokenizer_bytes,
    write_manifest,
    write_shards,
)

import train_gpt as tg

# The smallest run that trains: three layers, 16 channels.
SMALL: dict[str, Any] = dict(
    MODEL_DIM=16,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    NUM_SHARED=1,
    NUM_LOOPS=1,
    DTYPE="float32",
    TRAIN_SEQ_LEN=16,
    TRAIN_BATCH_TOKENS=64,
    MICRO_BATCH_TOKENS=64,
    VAL_BATCH_SIZE=256,
    ITERATIONS=3,
    COMPILE="off",
    WARMUP_STEPS=0,
    VAL_LOSS_EVERY=0,
    WARMDOWN_ITERS=0,
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Shards and tokenizer, as the variables that point to them."""
    folder = tmp_path_factory.mktemp("corpus")
    model = folder / "x.model"
    model.write_bytes(tokenizer_bytes(**EXACT, add_dummy_prefix=True))
    size = spm.SentencePieceProcessor(model_file=str(model)).vocab_size()
    draw = np.random.default_rng(0)
    write_shards(folder / "data", "train", *draw.integers(0, size, (2, 500)))
    write_shards(folder / "data", "val", draw.integers(0, size, 100))
    write_manifest(folder / "data", model)
    return SMALL | dict(DATA_PATH=folder / "data", TOKENIZER_PATH=model, VOCAB_SIZE=size)


@pytest.fixture
def run(
    main_here: Callable[[dict[str, str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    """Runs the script in this process, in an empty folder, with the given variables."""
    monkeypatch.chdir(tmp_path)

    def start(**env: Any) -> Result:
        capsys.readouterr()
        code = main_here({name: str(value) for name, value in env.items()})
        return Result(code, *capsys.readouterr())

    return start


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
    }


def check_refused(result: Result, *names: object) -> None:
    """One line on stderr that names the culprit, nothing else, exit code 2."""
    assert result.code == 2, result
    assert result.out == ""
    assert re.fullmatch(r"\[rank \S+\] .+\n", result.err)
    for name in names:
        assert str(name) in result.err


# ---- Data and variables


def other_folder(tmp_path: Path, corpus: dict[str, Any], split: str, data: bytes | None) -> Path:
    """The corpus with the first shard of a split replaced."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in corpus["DATA_PATH"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    bad = folder / f"fineweb_{split}_000000.bin"
    bad.unlink()
    if data is not None:
        bad.write_bytes(data)
    return bad


WHOLE = shard_bytes([0] * 100)
BAD_SHARDS = {
    "truncated": WHOLE[:-20],
    "not a shard": b"<html>" * 999,
    "empty": b"",
    "count": shard_bytes([0] * 100, count=99),
    "version": shard_bytes([0] * 100, version=9),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shard(run: Run, corpus: dict[str, Any], tmp_path: Path, split: str, case: str) -> None:
    bad = other_folder(tmp_path, corpus, split, BAD_SHARDS[case])
    before = tree(tmp_path)
    check_refused(run(**corpus | dict(DATA_PATH=bad.parent)), bad)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_shard(run: Run, corpus: dict[str, Any], tmp_path: Path, split: str) -> None:
    """A link into a download cache that has been cleared; a folder."""
    bad = other_folder(tmp_path, corpus, split, None)
    bad.symlink_to(tmp_path / "gone")
    check_refused(run(**corpus | dict(DATA_PATH=bad.parent)), bad)
    bad.unlink()
    bad.mkdir()
    check_refused(run(**corpus | dict(DATA_PATH=bad.parent)), bad)
    assert not (tmp_path / "logs").exists()


def test_missing_and_empty_folders(run: Run, corpus: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    for folder in (tmp_path / "hollow", tmp_path / "none", corpus["TOKENIZER_PATH"]):
        check_refused(run(**corpus | dict(DATA_PATH=folder)), "DATA_PATH", folder, "data/README.md")
    check_refused(run(), "TOKENIZER_PATH", "fineweb_1024_bpe.model")
    assert sorted(tree(tmp_path)) == ["hollow"]


def test_missing_validation_split(run: Run, corpus: dict[str, Any], tmp_path: Path) -> None:
    bad = other_folder(tmp_path, corpus, "val", None)
    check_refused(
        run(**corpus | dict(DATA_PATH=bad.parent)), "DATA_PATH", bad.parent, "fineweb_val_"
    )
    assert not (tmp_path / "logs").exists()


def test_split_without_a_sequence(run: Run, corpus: dict[str, Any], tmp_path: Path) -> None:
    env = corpus | dict(TRAIN_SEQ_LEN=100, TRAIN_BATCH_TOKENS=400)
    check_refused(run(**env), "TRAIN_SEQ_LEN=100", corpus["DATA_PATH"], "val")
    assert tree(tmp_path) == {}


def test_validation_ids_beyond_the_vocabulary(
    run: Run, corpus: dict[str, Any], tmp_path: Path
) -> None:
    bad = other_folder(tmp_path, corpus, "val", shard_bytes([0] * 50 + [corpus["VOCAB_SIZE"]]))
    check_refused(run(**corpus | dict(DATA_PATH=bad.parent)), bad, "VOCAB_SIZE")
    assert not (tmp_path / "logs").exists()


def test_training_ids_beyond_the_vocabulary(
    run: Run, corpus: dict[str, Any], tmp_path: Path
) -> None:
    """Shards of another tokenizer; one bad id deep inside a shard is found when it is read."""
    bad = other_folder(tmp_path, corpus, "train", shard_bytes([0] * 150 + [60000] + [0] * 50))
    result = run(**corpus | dict(DATA_PATH=bad.parent))
    assert result.code == 2
    assert result.err.count("\n") == 1 and str(bad) in result.err and "60000" in result.err
    assert not list(tmp_path.rglob("model*"))


def test_bad_tokenizers(run: Run, corpus: dict[str, Any], tmp_path: Path) -> None:
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"not a model")
    before = tree(tmp_path)
    for path in (junk, tmp_path / "none.model", tmp_path):
        check_refused(run(**corpus | dict(TOKENIZER_PATH=path)), "TOKENIZER_PATH", path)
    check_refused(
        run(**corpus | dict(VOCAB_SIZE=1024)), corpus["TOKENIZER_PATH"], corpus["VOCAB_SIZE"], 1024
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "env, names",
    [
        (dict(PRESET="Z"), ["PRESET", "Z", "tiny"]),
        (dict(PRESET="T,M"), ["PRESET", "T,M"]),
        (dict(TRAIN_BATCH_TOKENS=72), ["TRAIN_BATCH_TOKENS=72", "TRAIN_SEQ_LEN=16"]),
        (dict(MATRIX_LRS=1), ["MATRIX_LRS", "MATRIX_LR?"]),
        (dict(MATRIX_LR="fast"), ["MATRIX_LR='fast'"]),
        (dict(NUM_LAYERS=12), ["NUM_LAYERS=12", "NUM_SHARED=1"]),
        (dict(NUM_KV_HEADS=3), ["NUM_KV_HEADS=3", "NUM_HEADS=2"]),
        (dict(SEED=2**64), ["SEED"]),
        (dict(BETA1=1), ["BETA1"]),
        (dict(MLP_MULT=0.01), ["MLP_MULT"]),
        (dict(EVAL_STRIDE=5), ["EVAL_STRIDE=5", "TRAIN_SEQ_LEN=16"]),
        (dict(MODEL_DIM=2048, TRAIN_SEQ_LEN=1 << 17), ["TRAIN_SEQ_LEN=131072", "1024 channels"]),
        (dict(RANK="x"), ["RANK"]),
        (dict(WORLD_SIZE="two"), ["WORLD_SIZE"]),
    ],
)
def test_bad_variables(
    run: Run, corpus: dict[str, Any], tmp_path: Path, env: dict[str, Any], names: list[str]
) -> None:
    check_refused(run(**corpus | env), *names)
    assert tree(tmp_path) == {}


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tg, "choose_cuda", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(tg.InputError, match="LOCAL_RANK=4, but this node has 4 GPUs"):
        tg.World(dict(LOCAL_RANK="4"))


@pytest.mark.parametrize(("chunk", "warned"), [(112, True), (96, False)])
def test_learning_from_a_chunk_that_is_the_whole_text_is_told(
    chunk: int, warned: bool, run: Run, corpus: dict[str, Any]
) -> None:
    """Nothing is scored after it was learnt from, here of 99 targets."""
    ttt = dict(TTT_LR=0.05, TTT_CHUNK_TOKENS=chunk, MICRO_BATCH_TOKENS=112)
    result = run(**corpus | ttt)
    assert result.code == 0 and ("TTT_CHUNK_TOKENS holds the whole text" in result.out) == warned


def test_a_model_that_no_artifact_holds_is_refused_before_it_is_trained(
    run: Run, corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT", 1000)
    check_refused(run(**corpus), "parameters: an artifact holds 500 at most")


def test_what_a_terminal_cannot_spell_is_printed_all_the_same() -> None:
    """The rest of the run has its lines, too."""
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")
    for text in ("logs/caf\u00e9", "the score"):
        tg.say(terminal, text)
    assert written.getvalue() == b"logs/caf\\xe9\nthe score\n"


def test_existing_run_is_left_alone(run: Run, corpus: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "mine"
    folder.mkdir(parents=True)
    for name in ("train.log", "model.ptz", "notes.txt"):
        (folder / name).write_text("precious")
    before = tree(tmp_path)
    check_refused(run(**corpus, RUN_ID="mine"), "RUN_ID", Path("logs/mine"))
    assert tree(tmp_path) == before


def test_log_folder_that_cannot_be_made(run: Run, corpus: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    check_refused(run(**corpus, LOG_DIR=tmp_path / "file"), tmp_path / "file")
    assert tree(tmp_path) == {"file": b"precious"}


# ---- Artifacts


@pytest.fixture(scope="module")
def artifact(corpus: dict[str, Any]) -> bytes:
    config = tg.Config.from_env({name: str(value) for name, value in corpus.items()})
    torch.manual_seed(0)
    return tg.pack(tg.GPT(config.architecture(), 0.1), config)


def evaluate(run: Run, corpus: dict[str, Any], path: Path, **env: Any) -> Result:
    places = {name: corpus[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    return run(EVAL_ONLY=path, VAL_BATCH_SIZE=256, **places, **env)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped bit": (lambda a: a[:500] + bytes([a[500] ^ 1]) + a[501:], "checksum"),
    "flipped last bit": (lambda a: a[:-1] + bytes([a[-1] ^ 1]), "checksum"),
    "flipped checksum": (lambda a: a[:20] + bytes([a[20] ^ 1]) + a[21:], "checksum"),
    "truncated": (lambda a: a[: len(a) // 2], "truncated"),
    "one byte more": (lambda a: a + b"\0", "checksum"),
    "other version": (lambda a: a[:7] + b"\x01" + a[8:], "version 1"),
    "only its beginning": (lambda a: a[:20], "not an artifact"),
    "empty": (lambda a: b"", "not an artifact"),
    "a pickle": (lambda a: b"\x80\x04" + a, "not an artifact"),
    "nothing behind the checksum": (lambda a: sealed(b""), "artifact"),
    "no zlib stream": (lambda a: sealed(a[40:56] + b"junk" * 9), "artifact"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_artifact(
    run: Run, corpus: dict[str, Any], artifact: bytes, tmp_path: Path, case: str
) -> None:
    damage, reason = DAMAGE[case]
    path = tmp_path / "model.ptz"
    path.write_bytes(damage(artifact))
    before = tree(tmp_path)
    check_refused(evaluate(run, corpus, path), path, reason)
    assert tree(tmp_path) == before


def repacked(
    artifact: bytes,
    change: Callable[[dict[str, Any]], object],
    tail: bytes = b"",
    longer: int = 0,
) -> bytes:
    """With another header and a checksum that fits: what a wrong or hostile writer makes.

    `tail` follows the values; `longer` is by how much the announced length is wrong.
    """
    header, values, _ = parts_of(artifact)
    change(header)
    text = json.dumps(header).encode()
    raw = struct.pack("<I", len(text)) + text + values + tail
    return sealed(struct.pack("<8sQ", b"zlib", len(raw) + longer) + zlib.compress(raw))


def first_tensor(header: dict[str, Any], rounded: bool) -> list[str]:
    """Name and storage of the first tensor that is, or is not, stored as integers."""
    return next(t for t in header["tensors"] if (t[1] == "int8") == rounded)


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no architecture": lambda h: h.pop("architecture"),
    "unknown field": lambda h: h["architecture"].update(more=1),
    "missing field": lambda h: h["architecture"].pop("num_heads"),
    "wider": lambda h: h["architecture"].update(model_dim=32),
    "wrong type": lambda h: h["architecture"].update(model_dim="wide"),
    "out of range": lambda h: h["architecture"].update(num_heads=0),
    "beyond floating point": lambda h: h["architecture"].update(num_heads=10**400),
    "architecture is a list": lambda h: h.update(architecture=[]),
    "no tensors": lambda h: h.update(tensors=[]),
    "matrix as float32": lambda h: first_tensor(h, rounded=True).__setitem__(1, "float32"),
    "vector as int8": lambda h: first_tensor(h, rounded=False).__setitem__(1, "int8"),
    "one tensor more": lambda h: h["tensors"].append(["more", "float16"]),
    "too deep": lambda h: h["architecture"].update(num_shared=256, num_loops=256),
    "unknown storage": lambda h: h["tensors"][0].__setitem__(1, "pickle"),
    "tensor twice": lambda h: h["tensors"].append(h["tensors"][0]),
    "renamed tensor": lambda h: h["tensors"][0].__setitem__(0, "other"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_artifact(artifact: bytes, case: str) -> None:
    with pytest.raises(tg.InputError, match="^the file is not a valid artifact: "):
        tg.load_model(repacked(artifact, FORGED[case]), "the file")


@pytest.mark.parametrize("tail, longer", [(b"\0", 0), (b"", 1), (b"", -1)])
def test_forged_length(artifact: bytes, tail: bytes, longer: int) -> None:
    with pytest.raises(tg.InputError, match="^the file is not a valid artifact: "):
        tg.load_model(repacked(artifact, lambda header: None, tail, longer), "the file")


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_no_more_is_unpacked_than_announced(length: int) -> None:
    """A file of 60 kB must not fill the memory."""
    bomb = sealed(struct.pack("<8sQ", b"zlib", length) + zlib.compress(bytes(60_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(tg.InputError, match="^the file is not a valid artifact: "):
            tg.load_model(bomb, "the file")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_repacked_artifact_is_fine(artifact: bytes) -> None:
    """Otherwise every forgery would be refused for the wrong reason."""
    model, *_ = tg.load_model(artifact, "the file")
    again, *_ = tg.load_model(repacked(artifact, lambda header: None), "the file")
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_artifact_meets_other_files(
    run: Run, corpus: dict[str, Any], artifact: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.ptz"
    check_refused(evaluate(run, corpus, path), path)
    assert tree(tmp_path) == {}
    path.write_bytes(artifact)
    before = tree(tmp_path)
    check_refused(evaluate(run, corpus | dict(DATA_PATH=tmp_path), path), "DATA_PATH", tmp_path)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_bytes(vocab_size=320))
    check_refused(evaluate(run, corpus | dict(TOKENIZER_PATH=other), path), "TOKENIZER_PATH", other)
    assert tree(tmp_path) == before | {"other.model": other.read_bytes()}


def test_good_artifact_is_scored(
    run: Run, corpus: dict[str, Any], artifact: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.ptz"
    path.write_bytes(artifact)
    result = evaluate(run, corpus, path)
    assert result.code == 0 and result.err == "" and "final_int8_zlib_roundtrip_exact" in result.out


# ---- Runs that fail late


@pytest.mark.parametrize("rate", ["SCALAR_LR", "MATRIX_LR", "TIED_EMBED_LR"])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_non_finite_loss(
    run: Run, corpus: dict[str, Any], tmp_path: Path, rate: str, iterations: int
) -> None:
    """Also when the last step alone ruined the weights, whose own loss was still finite."""
    result = run(**corpus | {rate: 1e38, "ITERATIONS": iterations, "RUN_ID": "x"})
    assert result.code == 3, result
    assert result.err.count("\n") == 1 and "step" in result.err and "finite" in result.err
    step, loss = re.findall(r"^step:(\d+)/\d+ train_loss:([\d.]+) ", result.out, re.M)[-1]
    assert f"step {step}, train_loss {loss}" in result.err
    assert sorted(tree(tmp_path / "logs/x")) == ["metrics.jsonl", "run.lock", "train.log"]


def test_non_finite_loss_at_once(run: Run, corpus: dict[str, Any]) -> None:
    result = run(**corpus, QK_GAIN_INIT=3e38, LOGIT_SOFTCAP=1e30, TIED_EMBED_INIT_STD=1e30)
    assert result.code == tg.EXIT_NON_FINITE and "skipped 3, last good: none" in result.err


def test_too_large_for_a_submission(run: Run, corpus: dict[str, Any], tmp_path: Path) -> None:
    """The work is not thrown away: artifact and score are there, only the verdict is negative."""
    script = SCRIPT.stat().st_size
    result = run(**corpus, RUN_ID="x", SIZE_LIMIT_BYTES=script + 1)
    assert result.code == 4 and result.err == ""
    assert "final_int8_zlib_roundtrip " in result.out and "SIZE_LIMIT_BYTES" in result.out
    figures = json.loads((tmp_path / "logs/x/result.json").read_text())
    size = (tmp_path / "logs/x/model.ptz").stat().st_size
    assert figures["fits"] is False
    assert (figures["bytes_code"], figures["bytes_model"]) == (script, size)
    assert figures["bytes_total"] == script + size


def test_size_limit_is_inclusive(
    run: Run, corpus: dict[str, Any], artifact: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.ptz"
    path.write_bytes(artifact)
    total = SCRIPT.stat().st_size + len(artifact)
    for limit, code in ((total, 0), (total - 1, 4)):
        assert evaluate(run, corpus, path, SIZE_LIMIT_BYTES=limit).code == code


# ---- The script itself


def test_script_reports_a_ruined_run(corpus: dict[str, Any], tmp_path: Path) -> None:
    ruined = corpus | dict(MATRIX_LR=1e38, ITERATIONS=5, LOG_DIR=tmp_path)
    done = start({name: str(value) for name, value in ruined.items()})
    assert done.returncode == tg.EXIT_NON_FINITE
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.ptz"))
