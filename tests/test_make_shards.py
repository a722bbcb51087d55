"""data/make_shards.py: no document lost or in both splits, no tokenizer that lies about bytes."""

import argparse
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import time
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

pytest.importorskip("tqdm", reason="data/requirements.txt is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="data/requirements.txt is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import make_shards as ms

SCRIPT = Path(ms.__file__)
STDLIB = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
SHORT = [text for text in STDLIB if 0 < len(text) < 20_000]
AWKWARD = [
    "  leading",
    "trailing  ",
    "\t\ttabs\t",
    "runs     of      spaces",
    " ",
    "\n",
    "\r\n\r\n",
    "\0",
    "a",
    "emoji \U0001f600\U0001f468\u200d\U0001f469",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0",
    "caf\u00e9 \u2026 \ufb01 \u00bd",
    "falls back \U0001f9ff\u16a0\u0b83",
    "<s> </s> <unk> <0x41>",
    "\u00a0\u3000wide",
    "x" * 3000,
]

# ---- Tokenizers


def learn(folder: Path, size: int, **options: object) -> Path:
    """A tokenizer trained by SentencePiece with its own defaults, apart from ids as shards have them."""
    path, lines = (
        folder / "given.model",
        [line for text in STDLIB[:20] for line in text.splitlines()],
    )
    with open(path, "wb") as file:
        spm.SentencePieceTrainer.train(
            **dict(
                sentence_iterator=iter(lines),
                vocab_size=size,
                model_writer=file,
                model_type="bpe",
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                byte_fallback=True,
                minloglevel=2,
                num_threads=1,
            )
            | options
        )
    return path


@pytest.fixture(scope="module", params=[1024, 8192])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ms.Encoder:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(ms.sample.train_tokenizer(STDLIB[:150], request.param))
    ms.refuse_liars(path)
    return ms.Encoder(path)


SPANS = st.sampled_from(
    [
        " ",
        "  ",
        "        ",
        "\t",
        "\n",
        "\r\n",
        "\U0001f600",
        "\u65e5\u672c",
        "\u16a0",
        "\0",
        "def f(x):",
    ]
)
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=tg.SPACE)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(
        st.one_of(st.text(CHARACTERS, min_size=1), st.lists(SPANS, min_size=1).map("".join)),
        min_size=1,
        max_size=4,
    )
)
def test_bytes_of_the_pieces_are_those_of_the_text(encoder: ms.Encoder, texts: list[str]) -> None:
    check_bytes(encoder, texts)


def test_bytes_of_awkward_documents(encoder: ms.Encoder) -> None:
    check_bytes(encoder, AWKWARD)
    fallback = encoder.sp.encode("\u16a0")
    assert sum(map(encoder.sp.is_byte, fallback)) == 3, "the case of bytes that fall back is met"


def check_bytes(encoder: ms.Encoder, texts: list[str]) -> None:
    """Three ways to the same number: the text, what the tokens decode to, what the scorer counts."""
    tokens, tally = encoder.encode(texts, "here")
    size = sum(len(text.encode()) for text in texts)
    assert (tally.bytes, tally.text_bytes, tally.changed_documents) == (size, size, 0)
    assert decoded(encoder.sp, tokens) == texts
    counter = tg.ByteCounter(*map(torch.from_numpy, encoder.counter))
    ids = torch.from_numpy(tokens.astype(np.int64))
    assert int(counter.count(ids[:-1], ids[1:]).sum()) == size


def decoded(sp: spm.SentencePieceProcessor, tokens: np.ndarray) -> list[str]:
    edges = [*np.flatnonzero(tokens == 1).tolist(), len(tokens)]
    return [sp.decode(tokens[start + 1 : end].tolist()) for start, end in pairwise(edges)]


def test_count_that_differs_is_refused(encoder: ms.Encoder) -> None:
    liar = ms.Encoder.__new__(ms.Encoder)
    liar.__dict__.update(encoder.__dict__)
    sizes = encoder.counter.size.copy()
    sizes[encoder.sp.encode("import")[0]] += 1
    liar.counter = encoder.counter._replace(size=sizes)
    with pytest.raises(
        tg.InputError, match="here: the pieces of 'import os' count 10 bytes, decode to 9"
    ):
        liar.encode(["fine", "import os"], "here")


def without_space(folder: Path) -> Path:
    """A model with another character as its standalone space piece, a record of length 3 in the file."""
    path = learn(folder, 400)
    content = path.read_bytes()
    assert content.count(b"\x0a\x03" + tg.SPACE.encode()) == 1
    path.write_bytes(
        content.replace(b"\x0a\x03" + tg.SPACE.encode(), b"\x0a\x03" + "\u2603".encode())
    )
    return path


def decodes_otherwise(folder: Path) -> Path:
    (folder / "rules.tsv").write_text("78\t79 79\n")  # x becomes yy
    return learn(folder, 400, denormalization_rule_tsv=str(folder / "rules.tsv"))


LIARS = {
    "no byte fallback": (
        lambda folder: learn(folder, 400, byte_fallback=False),
        "no byte piece <0x00>",
    ),
    "no space piece": (without_space, f"no piece '{tg.SPACE}'"),
    "decodes to other bytes": (
        decodes_otherwise,
        r"piece \d+ '.*x.*' counts \d+ bytes and decodes to .*yy",
    ),
    "space behind the word": (
        lambda folder: learn(folder, 400, treat_whitespace_as_suffix=True),
        "of 'a b'",
    ),
    "other ids": (lambda folder: learn(folder, 400, bos_id=2, eos_id=1), "BOS is 2"),
    "no model": (lambda folder: SCRIPT, "make_shards.py is not a SentencePiece model|given"),
}


@pytest.mark.parametrize("case", LIARS)
def test_lying_tokenizer_is_refused(tmp_path: Path, capsys, case: str) -> None:
    make, expected = LIARS[case]
    with pytest.raises(tg.InputError, match=expected):
        ms.refuse_liars(make(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", STDLIB[:5])
    assert run(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", str(make(tmp_path))) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folding_tokenizer_is_accepted_and_its_changes_told(tmp_path: Path, capsys) -> None:
    texts = [
        "plain",
        "two\nlines",
        "many   spaces  here",
        "\ufb01ve",
        *(f"clean {i}" for i in range(200)),
    ]
    write_jsonl(tmp_path / "a.jsonl", texts)
    model = learn(tmp_path, 400)
    assert (
        run(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", str(model), val_share=0.3) == 0
    )
    splits = json.loads((tmp_path / "out/manifest.json").read_text())["splits"].values()
    total = {
        key: sum(split[key] for split in splits)
        for key in ("documents", "bytes", "changed_documents", "changed_bytes")
    }
    sp = spm.SentencePieceProcessor(model_file=str(model))
    after = [sp.decode(sp.encode(text)) for text in texts]
    # the newline; 2 + 1 spaces; and the ligature, which becomes two letters
    assert total == dict(
        documents=len(texts),
        bytes=sum(len(text.encode()) for text in after),
        changed_documents=3,
        changed_bytes=1 + 3 + 3,
    )
    assert capsys.readouterr().out.count("CHANGED") >= 1


# ---- Shards


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    )


def run(source: Path, out: Path, *options: str, val_share: float = 0.1, workers: int = 1) -> int:
    return ms.main(
        [
            str(source),
            "--out",
            str(out),
            "--vocab-size",
            "600",
            "--val-share",
            str(val_share),
            "--workers",
            str(workers),
            *options,
        ]
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with files of every kind, and the documents in them, copies included."""
    folder, texts, rng = tmp_path_factory.mktemp("corpus"), SHORT[:90], random.Random(0)
    bag = ["alpha", "beta", "\u65e5\u672c", "\U0001f600", "  gap", "\ttab"]
    words = [" ".join(rng.choices(bag, k=9)) for _ in range(200)]
    groups = [texts[:40] + AWKWARD, words[:100], texts[40:60] + words[100:], texts[60:]]
    write_jsonl(folder / "a.jsonl", groups[0])
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n" + "".join(json.dumps({"text": text}) + "\n\n" for text in groups[1]))
    (folder / "deep").mkdir()
    pq.write_table(ms_table(groups[2]), folder / "deep/c.parquet", row_group_size=7)
    for i, text in enumerate(groups[3]):
        (folder / f"deep/{i:03}.txt").write_bytes(text.encode())
    (folder / "deep/notes.md").write_text("not one of the formats")
    write_jsonl(folder / "z.jsonl", words[:50] + AWKWARD)  # once more
    return folder, [text for group in groups for text in group] + words[:50] + AWKWARD


def ms_table(texts: list[str]) -> object:
    import pyarrow

    return pyarrow.table({"text": texts, "n": list(range(len(texts)))})


@pytest.fixture(scope="module")
def built(corpus: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    assert run(corpus[0], out, "--shard-tokens", "30000", workers=2) == 0
    return out


def splits_of(folder: Path) -> dict[str, list[str]]:
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    shards = {split: sorted(folder.glob(f"fineweb_{split}_*.bin")) for split in ms.SPLITS}
    return {
        split: decoded(sp, np.concatenate([tg.open_shard(path) for path in paths]))
        for split, paths in shards.items()
    }


def core(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def test_every_document_is_in_one_split(corpus: tuple[Path, list[str]], built: Path) -> None:
    splits = splits_of(built)
    assert Counter(splits["train"] + splits["val"]) == Counter(corpus[1])
    assert not {core(text) for text in splits["train"]} & {core(text) for text in splits["val"]}
    assert 0.05 < len(set(splits["val"])) / len(set(corpus[1])) < 0.2


def test_split_does_not_depend_on_folding_or_on_other_documents() -> None:
    for text in ("a b", " a  b\n", "a\u00a0b", "\uff41 b"):
        assert all(ms.split_of(f"{i}{text}", 0.5) == ms.split_of(f"{i}ab", 0.5) for i in range(20))
    share = np.mean([ms.split_of(str(i), 0.03) == "val" for i in range(20_000)])
    assert 0.025 < share < 0.035


def test_manifest_and_shards_are_true(corpus: tuple[Path, list[str]], built: Path) -> None:
    manifest, splits = json.loads((built / "manifest.json").read_text()), splits_of(built)
    assert manifest["tokenizer"]["sha256"] == ms.sha256(built / "tokenizer.model")
    assert manifest["tokenizer"]["vocab_size"] == 600
    for split, texts in splits.items():
        entry = manifest["splits"][split]
        size = sum(len(text.encode()) for text in texts)
        assert (entry["documents"], entry["bytes"], entry["changed_documents"]) == (
            len(texts),
            size,
            0,
        )
        config = replace(tg.Config(), data_path=str(built), vocab_size=600, train_seq_len=8)
        counts = [file["tokens"] for file in entry["files"].values()]
        assert tg.Tokens(config, split).total == entry["tokens"] == sum(counts)
        assert {path.name: ms.sha256(path) for path in built.glob(f"fineweb_{split}_*")} == {
            name: file["sha256"] for name, file in entry["files"].items()
        }
        assert set(counts[:-1]) <= {30_000} and 0 < counts[-1] <= 30_000
    assert len(manifest["splits"]["train"]["files"]) > 2
    assert str(built.parent) not in json.dumps(manifest)


def test_same_bytes_with_any_number_of_workers(
    corpus: tuple[Path, list[str]], built: Path, tmp_path: Path
) -> None:
    for workers in (1, 2):
        assert (
            run(corpus[0], tmp_path / str(workers), "--shard-tokens", "30000", workers=workers) == 0
        )
        assert content(tmp_path / str(workers)) == content(built)
    assert run(corpus[0], tmp_path / "seed", "--seed", "2", "--sample-bytes", "100000") == 0
    assert run(corpus[0], tmp_path / "other", "--seed", "3", "--sample-bytes", "100000") == 0
    models = {(tmp_path / name / "tokenizer.model").read_bytes() for name in ("1", "seed", "other")}
    assert len(models) == 3
    assert splits_of(tmp_path / "seed") == splits_of(built), (
        "the seed chooses the sample, not the split"
    )


def test_tokenizer_has_not_seen_validation(tmp_path: Path) -> None:
    marked = [f"{'qzxj' * 400} {i}" for i in range(300)]
    held_out = [text for text in marked if ms.split_of(text, 0.1) == "val"]
    write_jsonl(tmp_path / "a.jsonl", SHORT[:60] + held_out)
    assert run(tmp_path / "a.jsonl", tmp_path / "out") == 0
    assert set(held_out) <= set(splits_of(tmp_path / "out")["val"])
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    assert not any("qz" in sp.id_to_piece(i) for i in range(600))


def test_sample_is_bounded_and_without_regard_to_order() -> None:
    texts = [f"{i} " + "x" * (i % 50) for i in range(3000)]
    drawn = ms.draw(texts, 10_000, 1, 0.1)
    assert ms.draw(reversed(texts), 10_000, 1, 0.1) == drawn
    assert 9_800 < sum(map(len, drawn)) <= 10_000
    assert all(ms.split_of(text, 0.1) == "train" for text in drawn)
    places = [texts.index(text) for text in drawn]
    assert 1300 < np.mean(places) < 1700, "from all over"
    assert set(ms.draw(texts, 10_000, 2, 0.1)) != set(drawn)


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i}\nof two lines\n" for i in range(300)]
    (tmp_path / "a.txt").write_text("\n \n\n".join(paragraphs))
    assert run(tmp_path / "a.txt", tmp_path / "out", "--blank-lines", "--vocab-size", "300") == 0
    splits = splits_of(tmp_path / "out")
    assert sorted(splits["train"] + splits["val"]) == sorted(paragraphs)


def test_what_is_no_text_is_skipped_and_told(tmp_path: Path, capsys) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*STDLIB[:60], "", "half a pair \ud83d"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": null}\n')
    assert run(tmp_path, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["skipped"] == {
        "empty": 2,
        "not UTF-8": 2,
    }
    assert "skipped 2 documents: not UTF-8" in capsys.readouterr().out


# ---- What is refused


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    write_jsonl(folder / "good.jsonl", STDLIB[:60])
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (folder / "list.jsonl").write_text('{"text": ["a"]}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(1000))[:-20])
    (folder / "no.parquet").write_bytes(b"PAR1 no")
    (folder / "empty").mkdir()
    pq.write_table(ms_table(["a"]), folder / "n.parquet")
    return {
        "missing": (["nowhere.txt"], "nowhere.txt is not there"),
        "suffix": (["empty"], "holds no .jsonl"),
        "json": (["bad.jsonl"], "bad.jsonl, line 2"),
        "key": (["good.jsonl", "--key", "body"], "line 1.*body"),
        "list": (["list.jsonl"], r"line 1: 'text' is \['a'\]"),
        "gz": (["cut.jsonl.gz"], "cannot read.*cut"),
        "parquet": (["no.parquet"], "cannot read.*no.parquet"),
        "column": (
            ["n.parquet", "--key", "n"],
            "'n' is no column of text.*'text': 'string'.*--key",
        ),
        "vocabulary": (
            ["good.jsonl", "--vocab-size", "60000", "--sample-bytes", "9000"],
            "cannot learn 60000 pieces from .* documents",
        ),
        "no val": (["good.jsonl", "--val-share", "1e-9"], "no val documents among 60"),
        "out": (["good.jsonl", "--out", str(folder)], "exists"),
        "tokenizer": (["good.jsonl", "--tokenizer", "nothing.model"], "nothing.model"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing",
        "suffix",
        "json",
        "key",
        "list",
        "gz",
        "parquet",
        "column",
        "vocabulary",
        "no val",
        "out",
        "tokenizer",
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys, monkeypatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    options, expected = bad_inputs(tmp_path)[case]
    model = (
        () if case in ("vocabulary", "tokenizer") else ("--tokenizer", str(learn(tmp_path, 400)))
    )
    before = sorted(tmp_path.iterdir())
    code = ms.main(["--out", "new", "--workers", "1", "--val-share", "0.1", *model, *options])
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1
    assert re.search(expected, message), message
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


# ---- Memory and processes


class OnTheSpot:
    """Stands in for a pool of workers: the work is done when it is submitted."""

    def submit(self, function, item):
        result = function(item)
        return argparse.Namespace(result=lambda: result)


def test_only_so_many_blocks_are_under_way() -> None:
    drawn: list[int] = []
    taken = 0
    for i in ms.in_order(
        OnTheSpot(), lambda i: i, (drawn.append(i) or i for i in range(100)), ahead=5
    ):
        assert i == taken and len(drawn) - taken <= 5
        taken += 1
    assert taken == 100


def test_memory_does_not_grow_with_the_input(tmp_path: Path, monkeypatch) -> None:
    """Peak of what the main process holds, for a corpus and one ten times as large, sampling included."""
    monkeypatch.setattr(ms, "BLOCK", 1 << 12)
    monkeypatch.setattr(ms.sample, "train_tokenizer", lambda texts, size: model.read_bytes())
    model, peaks = learn(tmp_path, 400), []
    for factor in (1, 10):
        write_jsonl(
            tmp_path / "a.jsonl", [f"{i} {'some words ' * 200}" for i in range(40 * factor)]
        )
        tracemalloc.start()
        assert run(tmp_path / "a.jsonl", tmp_path / str(factor), "--sample-bytes", "20000") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks


def alive(mark: str) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_text():
                yield path.parent.name
        except (FileNotFoundError, ProcessLookupError):
            pass


def test_killed_run_leaves_nothing_and_nobody(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", STDLIB * 5)
    out, model = tmp_path / "out", learn(tmp_path, 400)
    command = [
        sys.executable,
        str(SCRIPT),
        str(tmp_path / "a.jsonl"),
        "--out",
        str(out),
        "--workers",
        "2",
        "--tokenizer",
        str(model),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not any(path.stat().st_size > 2000 for path in tmp_path.glob(".out.partial/*train*")):
        assert time.time() < deadline and process.poll() is None, "it should be encoding by now"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    while list(alive(str(out))):
        assert time.time() < deadline, "workers outlive the run"
        time.sleep(0.05)
    write_jsonl(tmp_path / "a.jsonl", SHORT[:60])
    assert run(tmp_path / "a.jsonl", out, "--tokenizer", str(model)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "given.model", "out"}
