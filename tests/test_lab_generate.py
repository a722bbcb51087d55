"""records/tools/generate.py: what a model says, and that a mistake is one line."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F
from helpers import nobody_reads

import train_gpt as tg
from records.tools import common, generate

SMALL = dict(
    PRESET="Bp,tiny",
    MODEL_DIM="32",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
    ITERATIONS="4",
    WARMDOWN_ITERS="2",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="0",
)


@pytest.fixture(scope="module")
def artifact(corpus: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a finished run, in its folder."""
    folder = tmp_path_factory.mktemp("runs")
    env = corpus | SMALL | dict(LOG_DIR=str(folder), RUN_ID="run")
    assert tg.run(tg.Config.from_env(env), tg.World({})) == 0
    return folder / "run" / tg.ARTIFACT


def test_logits_are_those_that_are_scored(artifact: Path) -> None:
    model, *_ = tg.load_model(artifact.read_bytes(), "it")
    ids = torch.randint(1024, (33,), generator=torch.Generator().manual_seed(0))
    logits = torch.stack([generate.next_logits(model, ids[: i + 1].tolist()) for i in range(32)])
    with torch.inference_mode():
        scored = model(ids[None, :-1], ids[None, 1:], model.scoring)
    assert F.cross_entropy(logits, ids[1:]).item() == pytest.approx(
        scored.item(), abs=2e-2
    )  # bfloat16


def test_draws_follow_temperature_top_k_and_seed() -> None:
    logits, random = torch.tensor([0.0, 1.0, 3.0, 2.0]), torch.Generator().manual_seed(0)
    assert generate.draw(logits, 0.0, 0, random) == 2
    assert {generate.draw(logits, 5.0, 2, random) for _ in range(200)} == {2, 3}
    counts = torch.bincount(
        torch.tensor([generate.draw(logits, 2.0, 0, random) for _ in range(4000)])
    )
    assert torch.allclose(counts / 4000, (logits / 2).softmax(-1), atol=0.03)


def test_command_streams_the_same_text_for_the_same_seed(
    artifact: Path,
    corpus: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(*words: str, path: Path = artifact) -> str:
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "generate.py",
                str(path),
                "def main",
                "--tokens",
                "20",
                *words,
            ],
        )
        assert generate.main() == 0
        return capsys.readouterr().out

    again = say("--seed", "1", path=artifact.parent)  # the run's folder
    assert say("--seed", "1") == again != say("--seed", "2")
    assert say("--seed", "1").startswith("def main")
    assert say("--top-k", "1") == say("--temperature", "0")


def test_text_is_streamed_whole_characters_at_a_time(corpus: dict) -> None:
    tokenizer = spm.SentencePieceProcessor(model_file=corpus["TOKENIZER_PATH"])
    ids = tokenizer.encode("x = 1  # \N{SNOWMAN} \N{GRINNING FACE} y")
    pieces = list(generate.stream(tokenizer, ids[:3], iter(ids[3:])))
    assert "".join(pieces) == tokenizer.decode(ids) and not any(
        "\ufffd" in piece for piece in pieces
    )
    assert len(pieces) > 3


def empty_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.write_bytes(b"no model"), "x.ptz"),
        (lambda path: path.unlink(), "x.ptz is not there: give the folder of a finished run"),
        (empty_folder, "x.ptz holds no model.ptz: give the folder of a finished run"),
    ],
    ids=["another file", "nothing", "a folder without"],
)
def test_what_is_no_artifact_is_one_line(
    spoil: Callable[[Path], None],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.ptz"
    path.touch()
    spoil(path)
    monkeypatch.setattr(sys, "argv", ["generate.py", str(path), "hello"])
    assert generate.main() == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


BAD = {
    "temperature nan": ["--temperature", "nan"],
    "temperature inf": ["--temperature", "inf"],
    "temperature below 0": ["--temperature", "-1"],
    "seed beyond 64 bits": ["--seed", str(2**64)],
    "seed below 0": ["--seed", "-1"],
    "top-k below 0": ["--top-k", "-1"],
    "tokens below 0": ["--tokens", "-5"],
    "no such tokenizer": ["--tokenizer", "nowhere.model"],
    "no model": ["--tokenizer", "README.md"],
    "prompt not UTF-8": ["\udcff\udcfe"],
}


@pytest.mark.parametrize("words", BAD.values(), ids=BAD)
def test_a_mistake_is_one_line(
    words: list[str],
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", str(artifact), *words])
    assert generate.main() == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "Traceback" not in error


def test_another_tokenizer_is_refused(
    artifact: Path,
    corpus: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of as many pieces, which would say something else."""
    text = tmp_path / "text"
    text.write_text("\n".join(f"word{i} of {i * i}" for i in range(3000)))
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "t"),
        vocab_size=1024,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    words = ["generate.py", str(artifact), "x", "--tokenizer", str(tmp_path / "t.model")]
    monkeypatch.setattr(sys, "argv", words)
    assert generate.main() == 2
    error = capsys.readouterr().err
    assert "was trained with another tokenizer" in error and error.count("\n") == 1


def test_the_largest_seed_draws(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate.py", str(artifact), "x", "--seed", str(2**64 - 1), "--tokens", "3"]
    monkeypatch.setattr(sys, "argv", words)
    assert generate.main() == 0 and capsys.readouterr().out.startswith("x")


def test_the_tokenizer_is_that_of_the_result(
    artifact: Path, corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate.find_tokenizer(artifact, None) == Path(corpus["TOKENIZER_PATH"])
    assert generate.find_tokenizer(artifact, tmp_path / "x") == tmp_path / "x"
    alone = Path(shutil.copy(artifact, tmp_path))
    contest = common.ROOT / tg.Config().tokenizer_path
    assert generate.find_tokenizer(alone, None) == contest, "the contest's, without a result"
    config = '{"config": {"tokenizer_path": "x/t.model"}}'
    (tmp_path / "result.json").write_text(config)
    with pytest.raises(tg.InputError, match="x/t.model, the tokenizer in .*--tokenizer"):
        generate.find_tokenizer(alone, None)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "t.model").touch()
    assert generate.find_tokenizer(alone, None) == tmp_path / "x" / "t.model"


@pytest.mark.parametrize(
    ("full", "told"),
    [(True, "No space left on device"), (False, "Broken pipe")],
    ids=["full disk", "closed pipe"],
)
def test_output_that_cannot_be_written_is_one_line(
    full: bool,
    told: str,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", str(artifact), "x", "--tokens", "4"])
    with open(nobody_reads(full), "w") as out:  # whose end says whether anything is left unwritten
        monkeypatch.setattr(sys, "stdout", out)
        assert generate.main() == 2
    assert capsys.readouterr().err == f"the output cannot be written: {told}\n"


def test_a_terminal_that_knows_no_such_character_gets_another(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["generate.py", str(artifact), "\N{SNOWMAN}", "--tokens", "0"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert generate.main() == 0
    assert shown.getvalue() == b"?\n"
