"""data/make_shards.py: no document lost or in both splits, no tokenizer that lies about bytes."""

import errno
import gzip
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tqdm", reason="data/requirements.txt is not installed")
pytest.importorskip("pyarrow", reason="data/requirements.txt is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import make_shards as ms
import pyarrow as pa
import pyarrow.parquet as pq
import sample
import shards
from helpers import HANG
from shards import InputError

Capture = pytest.CaptureFixture[str]
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


def learn(folder: Path, size: int, **options: Any) -> Path:
    """A tokenizer trained with SentencePiece's own defaults, apart from ids as shards have them."""
    path = folder / "given.model"
    lines = [line for text in STDLIB[:20] for line in text.splitlines()]
    recipe: dict[str, Any] = dict(
        vocab_size=size,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    with open(path, "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, **recipe | options
        )
    return path


@pytest.fixture(scope="module")
def folding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 pieces that folds text as the competition's does."""
    return learn(tmp_path_factory.mktemp("folding"), 400)


@pytest.fixture(scope="module", params=[1024, 8192])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ms.Encoder:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(sample.train_tokenizer(STDLIB[:150], request.param))
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
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=shards.SPACE)


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
    """Three ways to the same number: the text, what the tokens decode to, what the rule counts."""
    tokens, tally = encoder.encode(texts, "here")
    size = sum(len(text.encode()) for text in texts)
    assert (tally.bytes, tally.text_bytes, tally.changed_documents) == (size, size, 0)
    assert decoded(encoder.sp, tokens) == texts
    assert int(encoder.table.of_stream(tokens).sum()) == size


def decoded(sp: spm.SentencePieceProcessor, tokens: np.ndarray) -> list[str]:
    edges = [*np.flatnonzero(tokens == 1).tolist(), len(tokens)]
    return [sp.decode(tokens[start + 1 : end].tolist()) for start, end in pairwise(edges)]


def test_count_that_differs_is_refused(encoder: ms.Encoder) -> None:
    liar = ms.Encoder.__new__(ms.Encoder)
    liar.__dict__.update(encoder.__dict__)
    sizes = encoder.table.size.copy()
    sizes[encoder.sp.encode("import")[0]] += 1
    liar.table = encoder.table._replace(size=sizes)
    expected = "here: the pieces of 'import os' count 10 bytes, decode to 9"
    with pytest.raises(InputError, match=expected):
        liar.encode(["fine", "import os"], "here")


def without_space(folder: Path) -> Path:
    """A model whose space piece is another character; in the file it is a record of length 3."""
    path = learn(folder, 400)
    content = path.read_bytes()
    record = b"\x0a\x03" + shards.SPACE.encode()
    assert content.count(record) == 1
    path.write_bytes(content.replace(record, b"\x0a\x03" + "\u2603".encode()))
    return path


def decodes_otherwise(folder: Path) -> Path:
    (folder / "rules.tsv").write_text("78\t79 79\n")  # x becomes yy
    return learn(folder, 400, denormalization_rule_tsv=str(folder / "rules.tsv"))


class Liar(NamedTuple):
    make: Callable[[Path], Path]
    expected: str


LIARS = {
    "no byte fallback": Liar(
        lambda folder: learn(folder, 400, byte_fallback=False), "no byte piece <0x00>"
    ),
    "no space piece": Liar(without_space, f"no piece '{shards.SPACE}'"),
    "decodes to other bytes": Liar(
        decodes_otherwise, r"piece \d+ '.*x.*' counts \d+ bytes and decodes to .*yy"
    ),
    "space behind the word": Liar(
        lambda folder: learn(folder, 400, treat_whitespace_as_suffix=True), "of 'a b'"
    ),
    "other ids": Liar(lambda folder: learn(folder, 400, bos_id=2, eos_id=1), "BOS is 2"),
    "no model": Liar(lambda folder: SCRIPT, "make_shards.py is not a SentencePiece model"),
}


@pytest.mark.parametrize("case", LIARS)
def test_lying_tokenizer_is_refused(tmp_path: Path, capsys: Capture, case: str) -> None:
    model = LIARS[case].make(tmp_path)
    with pytest.raises(InputError, match=LIARS[case].expected):
        ms.refuse_liars(model)
    write_jsonl(tmp_path / "a.jsonl", STDLIB[:5])
    assert run(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", str(model)) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folding_tokenizer_is_accepted_and_its_changes_told(
    tmp_path: Path, capsys: Capture, folding: Path
) -> None:
    texts = ["plain", "two\nlines", "many   spaces  here", "\ufb01ve"]
    texts += [f"clean {i}" for i in range(200)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    options = "--tokenizer", str(folding)
    assert run(tmp_path / "a.jsonl", tmp_path / "out", *options, val_share=0.3) == 0
    splits = manifest_of(tmp_path / "out")["splits"].values()
    keys = ("documents", "bytes", "changed_documents", "changed_bytes")
    sp = spm.SentencePieceProcessor(model_file=str(folding))
    after = [sp.decode(sp.encode(text)) for text in texts]
    # the newline; 2 + 1 spaces; and the ligature, which becomes two letters
    assert {key: sum(split[key] for split in splits) for key in keys} == dict(
        documents=len(texts),
        bytes=sum(len(text.encode()) for text in after),
        changed_documents=3,
        changed_bytes=1 + 3 + 3,
    )
    assert capsys.readouterr().out.count("CHANGED") >= 1


# ---- Shards


def write_jsonl(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines))


def arguments(source: Path, out: Path, val_share: float = 0.1, workers: int = 1) -> list[str]:
    numbers = ["--vocab-size", "600", "--val-share", str(val_share), "--workers", str(workers)]
    return [str(source), "--out", str(out), *numbers]


def run(source: Path, out: Path, *options: str, val_share: float = 0.1, workers: int = 1) -> int:
    return ms.main([*arguments(source, out, val_share, workers), *options])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def write_parquet(path: Path, texts: Any, **options: Any) -> None:
    table = pa.table({"text": texts, "n": list(range(len(texts)))})
    pq.write_table(table, path, **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with files of every kind, and the documents in them, copies included."""
    folder, texts, rng = tmp_path_factory.mktemp("corpus"), SHORT[:90], random.Random(0)
    bag = ["alpha", "beta", "\u65e5\u672c", "\U0001f600", "  gap", "\ttab"]
    words = [" ".join(rng.choices(bag, k=9)) for _ in range(200)]
    groups = [texts[:40] + AWKWARD, words[:100], texts[40:60] + words[100:], texts[60:]]
    write_jsonl(folder / "a.jsonl", groups[0])
    with gzip.open(folder / "b.JSONL.gz", "wt") as file:
        lines = [json.dumps({"text": text}) + "\n\n" for text in groups[1]]
        file.write("\n" + "".join(lines))
    (folder / "deep").mkdir()
    write_parquet(folder / "deep/c.parquet", groups[2], row_group_size=7)
    for i, text in enumerate(groups[3]):
        (folder / f"deep/{i:03}.txt").write_bytes(text.encode())
    (folder / "deep/notes.md").write_text("not one of the formats")
    write_jsonl(folder / "z.jsonl", words[:50] + AWKWARD)  # once more
    return folder, [text for group in groups for text in group] + words[:50] + AWKWARD


@pytest.fixture(scope="module")
def built(corpus: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    assert run(corpus[0], out, "--shard-tokens", "30000", workers=2) == 0
    return out


def splits_of(folder: Path) -> dict[str, list[str]]:
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = {}
    for split in shards.SPLITS:
        opened = [shards.open_shard(path) for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
        found[split] = decoded(sp, np.concatenate(opened))
    return found


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
    manifest, splits = manifest_of(built), splits_of(built)
    assert manifest["tokenizer"]["file"] == "tokenizer.model"
    assert manifest["tokenizer"]["sha256"] == shards.sha256(built / "tokenizer.model")
    assert manifest["tokenizer"]["vocab_size"] == 600
    for split, texts in splits.items():
        entry = manifest["splits"][split]
        size = sum(len(text.encode()) for text in texts)
        found = entry["documents"], entry["bytes"], entry["changed_documents"]
        assert found == (len(texts), size, 0)
        counts = [file["tokens"] for file in entry["files"].values()]
        assert counts == [len(shards.open_shard(built / name)) for name in entry["files"]]
        assert entry["tokens"] == sum(counts)
        assert {path.name: shards.sha256(path) for path in built.glob(f"fineweb_{split}_*")} == {
            name: file["sha256"] for name, file in entry["files"].items()
        }
        assert set(counts[:-1]) <= {30_000} and 0 < counts[-1] <= 30_000
    names = list(manifest["splits"]["train"]["files"])
    assert len(names) > 2
    assert names == [f"fineweb_train_{i:06}.bin" for i in range(len(names))]
    assert str(built.parent) not in json.dumps(manifest)


def test_same_bytes_with_any_number_of_workers(
    corpus: tuple[Path, list[str]], built: Path, tmp_path: Path
) -> None:
    assert run(corpus[0], tmp_path / "1", "--shard-tokens", "30000", workers=1) == 0
    assert content(tmp_path / "1") == content(built), "which two workers made"
    for seed in ("2", "3"):
        options = "--seed", seed, "--sample-bytes", "100000"
        assert run(corpus[0], tmp_path / f"seed{seed}", *options) == 0
    models = {(tmp_path / x / "tokenizer.model").read_bytes() for x in ("1", "seed2", "seed3")}
    assert len(models) == 3
    assert splits_of(tmp_path / "seed2") == splits_of(built), "the seed chooses the sample alone"


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


def test_blank_lines_separate_documents(tmp_path: Path, folding: Path) -> None:
    paragraphs = [f"paragraph {i} of one line" for i in range(300)]
    (tmp_path / "a.txt").write_text("\n\n \n\n".join(paragraphs))
    model = "--tokenizer", str(folding)
    assert run(tmp_path / "a.txt", tmp_path / "out", "--blank-lines", *model) == 0
    splits = splits_of(tmp_path / "out")
    assert sorted(splits["train"] + splits["val"]) == sorted(paragraphs)


# ---- What is left out is told


def test_documents_that_are_no_text_are_counted_and_the_first_is_named(
    tmp_path: Path, capsys: Capture, folding: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*SHORT[:60], "", "half a pair \ud83d"])
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"text": null}\n{"text": "caf\xe9"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write_parquet(
        tmp_path / "p.parquet", pa.array([b"fine", b"caf\xe9"]).cast("string", safe=False)
    )
    assert run(tmp_path, tmp_path / "out", "--tokenizer", str(folding)) == 0
    assert manifest_of(tmp_path / "out")["skipped"] == {"empty": 2, "not UTF-8": 4}
    out = capsys.readouterr().out
    assert f"skipped 4 documents: not UTF-8, the first is {tmp_path}/a.jsonl, line 62" in out
    assert f"skipped 2 documents: empty, the first is {tmp_path}/a.jsonl, line 61" in out


def test_nothing_but_skipped_documents_says_why(
    tmp_path: Path, capsys: Capture, folding: Path
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(b"caf\xe9")
    for options in ([], ["--tokenizer", str(folding)]):
        assert run(tmp_path, tmp_path / "out", *options) == 2
        message = capsys.readouterr().err
        assert f"skipped 3 documents: not UTF-8, the first is {tmp_path}/0.txt" in message
        assert message.count("\n") == 1


def found_below(*inputs: Path) -> tuple[list[str], shards.Skipped]:
    skipped = shards.Skipped("files")
    return [path.name for path in ms.find(inputs, skipped)], skipped


def test_links_are_followed_once(tmp_path: Path) -> None:
    books, elsewhere = tmp_path / "books", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    books.mkdir()
    (books / "a.txt").touch()
    (elsewhere / "b.txt").touch()
    (elsewhere / "deep/c.txt").touch()
    (books / "one").symlink_to(elsewhere)
    (books / "two").symlink_to(elsewhere)  # again
    (elsewhere / "deep/up").symlink_to(books)  # a cycle
    (books / "z.txt").symlink_to(elsewhere / "b.txt")  # a file again
    names, skipped = found_below(books)
    assert names == ["a.txt", "b.txt", "c.txt"]
    assert skipped.counts == {ms.READ_ALREADY: 3}
    names, skipped = found_below(elsewhere / "deep/c.txt", elsewhere, books / "one")
    assert names == ["c.txt", "b.txt", "a.txt"]
    assert skipped.counts[ms.READ_ALREADY] >= 2


def test_every_file_that_is_not_read_has_a_reason(tmp_path: Path, capsys: Capture) -> None:
    for name in ("notes.md", "notes.rst", "a.TXT", "b.Jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    names, skipped = found_below(tmp_path)
    assert names == ["a.TXT", "b.Jsonl"], "capitals are no other kind"
    lines = list(skipped.lines())
    assert len(lines) == 3
    assert f"2 files: a link that leads nowhere, the first is {tmp_path}/gone.txt" in lines[0]
    assert f"1 files: no regular file, the first is {tmp_path}/pipe.txt" in lines[1]
    assert "2 files: none of .jsonl, .jsonl.gz, .parquet, .txt, .py, the first is" in lines[2]
    assert lines[2].endswith(f"{tmp_path}/notes.md")


def test_files_left_out_are_told_at_the_start_and_in_the_manifest(
    tmp_path: Path, capsys: Capture, folding: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", SHORT[:60])
    (tmp_path / "notes.md").touch()
    assert run(tmp_path, tmp_path / "out", "--tokenizer", str(folding)) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("skipped 1 files or folders: none of")
    assert first.endswith(f"{tmp_path}/notes.md")
    assert list(manifest_of(tmp_path / "out")["skipped_files"].values()) == [1]


def test_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").touch()
    scan = os.scandir

    def closed(path: Any) -> Any:  # root may read any folder
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match="cannot read the folder .*/closed: Permission denied"):
        found_below(tmp_path)


def test_names_that_are_not_utf8_can_be_told(tmp_path: Path, folding: Path) -> None:
    """With a terminal that takes ASCII only, too."""
    write_jsonl(tmp_path / "a.jsonl", SHORT[:60])
    (tmp_path / os.fsdecode(b"caf\xe9.md")).touch()
    (tmp_path / "\u65e5\u672c.txt").write_bytes(b"\xff")
    result = script(tmp_path, tmp_path / "out", "--tokenizer", str(folding), locale="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "caf\\udce9.md" in result.stdout and "\\u65e5\\u672c.txt" in result.stdout


# ---- What is refused


def nested(depth: int) -> str:
    return '{"text": ' + "[" * depth + "]" * depth + "}\n"


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    write_jsonl(folder / "good.jsonl", SHORT[:60])
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (folder / "list.jsonl").write_text('{"text": ["a"]}\n')
    (folder / "deep.jsonl").write_text('{"text": "a"}\n' + nested(200_000))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(1000))[:-20])
    (folder / "no.parquet").write_bytes(b"PAR1 no")
    (folder / "empty").mkdir()
    (folder / "notes.md").touch()
    os.mkfifo(folder / "pipe.txt")
    write_parquet(folder / "n.parquet", ["a"])
    write_parquet(folder / "list.parquet", [["a"], ["b"]])
    write_parquet(folder / "struct.parquet", [{"a": "b"}])
    return {
        "missing": (["nowhere.txt"], "nowhere.txt is not there"),
        "suffix": (["empty"], "empty holds no .jsonl"),
        "other kind": (["notes.md"], "notes.md holds no .jsonl.*none of.*notes.md"),
        "pipe": (["pipe.txt"], "pipe.txt holds no .*no regular file"),
        "json": (["bad.jsonl"], "bad.jsonl, line 2"),
        "deep": (["deep.jsonl"], "deep.jsonl, line 2 is no JSON.*recursion"),
        "key": (["good.jsonl", "--key", "body"], "line 1.*body"),
        "list": (["list.jsonl"], r"line 1: 'text' is \['a'\]"),
        "gz": (["cut.jsonl.gz"], "cannot read.*cut"),
        "parquet": (["no.parquet"], "cannot read.*no.parquet"),
        "column": (
            ["n.parquet", "--key", "n"],
            r"'n' is no column of text.*text \(string\).*--key",
        ),
        "list column": (["list.parquet"], r"list.parquet: 'text' is no column.*list<.*string>"),
        "struct column": (["struct.parquet"], r"'text' is no column of text.*struct<a: string>"),
        "vocabulary": (
            ["good.jsonl", "--vocab-size", "60000", "--sample-bytes", "9000"],
            "cannot learn 60000 pieces from .* documents",
        ),
        "no val": (["good.jsonl", "--val-share", "1e-9"], "no val documents among 60"),
        "out": (["good.jsonl", "--out", str(folder)], "exists"),
        "long name": (["good.jsonl", "--out", "x" * 300], "File name too long"),
        "tokenizer": (["good.jsonl", "--tokenizer", "nothing.model"], "nothing.model"),
    }


CASES = (
    "missing, suffix, other kind, pipe, json, deep, key, list, gz, parquet, column, list column, "
    "struct column, vocabulary, no val, out, long name, tokenizer"
)


@pytest.mark.parametrize("case", CASES.split(", "))
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, folding: Path, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options, expected = bad_inputs(tmp_path)[case]
    model = () if case in ("vocabulary", "tokenizer") else ("--tokenizer", str(folding))
    before = sorted(tmp_path.iterdir())
    code = ms.main(["--out", "new", "--workers", "1", "--val-share", "0.1", *model, *options])
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1
    assert re.search(expected, message), message
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_columns_of_text_are_read(tmp_path: Path, kind: str) -> None:
    column = pa.array(["a", None, "\u65e5"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    write_parquet(tmp_path / "a.parquet", column)
    assert list(ms.rows(tmp_path / "a.parquet", "text")) == ["a", "", "\u65e5"]


OPTIONS = {
    "vocab-size": ("260", "65537"),
    "val-share": ("0", "1", "nan"),
    "workers": ("0",),
    "sample-bytes": ("0",),
    "shard-tokens": ("0", str(2**31)),  # a header's count is an int32
    "seed": (str(2**64), "9" * 80),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_out_of_range_is_named(capsys: Capture, option: str) -> None:
    for value in OPTIONS[option]:
        with pytest.raises(SystemExit):
            ms.main(["a.txt", "--out", "new", f"--{option}", value])
        assert f"--{option}" in capsys.readouterr().err


def test_validation_without_text_is_refused(tmp_path: Path, capsys: Capture, folding: Path) -> None:
    """A folding tokenizer makes nothing of white space: the split would be BOS tokens only."""
    spaces = [" " * i for i in range(1, 5)]
    held_out = ms.split_of(" ", 0.5)
    write_jsonl(
        tmp_path / "a.jsonl", spaces + [t for t in SHORT if ms.split_of(t, 0.5) != held_out]
    )
    assert (
        run(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", str(folding), val_share=0.5) == 2
    )
    message = capsys.readouterr().err
    assert f"{held_out} has 4 tokens and not one byte of text" in message
    assert message.count("\n") == 1 and not (tmp_path / "out").exists()


# ---- Processes


def script(
    source: Path, out: Path, *options: str, locale: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONIOENCODING": locale}
    command = [sys.executable, str(SCRIPT), *arguments(source, out), *options]
    return subprocess.run(command, env=env, text=True, capture_output=True)


def closing_command(folder: Path, held_out: list[str], folding: Path, capsys: Capture) -> str:
    """The command in the closing line of a run with these documents for validation."""
    train = [text for text in SHORT if ms.split_of(text, 0.1) == "train"]
    write_jsonl(folder / "a.jsonl", train[:40] + held_out)
    assert run(folder / "a.jsonl", folder / "out", "--tokenizer", str(folding)) == 0
    command = re.search(r"^next    (PRESET=tiny .*)$", capsys.readouterr().out, re.MULTILINE)
    assert command
    return command[1]


TINY_RUN = dict(
    ITERATIONS="1",
    WARMUP_STEPS="0",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    TRAIN_BATCH_TOKENS="512",
)


def test_the_closing_line_is_a_command_that_works(
    tmp_path: Path, folding: Path, capsys: Capture
) -> None:
    """From a folder with a space in its name."""
    folder = tmp_path / "my corpus"
    folder.mkdir()
    held_out = [text for text in SHORT if ms.split_of(text, 0.1) == "val"]
    command = closing_command(folder, held_out[:3], folding, capsys)
    assert "TRAIN_SEQ_LEN=" not in command
    env = os.environ | TINY_RUN | dict(LOG_DIR=str(tmp_path / "logs"))
    env |= dict(PATH=os.defpath)  # where no virtual environment is activated
    trained = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    assert "final_int8_zlib_roundtrip_exact" in trained.stdout


def test_a_short_split_is_trained_on_in_shorter_sequences(
    tmp_path: Path,
    folding: Path,
    capsys: Capture,
    main_here: Callable[[dict[str, str]], int],
) -> None:
    short = next(text for i in range(99) if ms.split_of(text := f"few words {i}", 0.1) == "val")
    words = shlex.split(closing_command(tmp_path, [short], folding, capsys))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert "TRAIN_SEQ_LEN" in given
    assert main_here(given | TINY_RUN | dict(LOG_DIR=str(tmp_path / "logs"))) == 0
    assert "final_int8_zlib_roundtrip_exact" in capsys.readouterr().out


STREAMS = {
    "a full disk": ">/dev/full",
    "a reader that has gone": "| true",
    "no stdout": ">&-",
    "no stderr": "2>&-",
    "no stream at all": "<&- >&- 2>&-",
}


@pytest.mark.parametrize("case", STREAMS)
def test_output_that_cannot_be_written_ends_nothing(
    tmp_path: Path, folding: Path, case: str
) -> None:
    """What is printed is lost, no file is, and nothing is printed into a file."""
    write_jsonl(tmp_path / "a.jsonl", SHORT[:60])
    options = [*arguments(tmp_path / "a.jsonl", tmp_path / "out"), "--tokenizer", str(folding)]
    command = shlex.join([sys.executable, str(SCRIPT), *options])
    shell = ["bash", "-o", "pipefail", "-c", f"{command} {STREAMS[case]}"]
    result = subprocess.run(shell, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    manifest = manifest_of(tmp_path / "out")
    for split in shards.SPLITS:
        for name, file in manifest["splits"][split]["files"].items():
            assert shards.sha256(tmp_path / "out" / name) == file["sha256"]


def test_complaint_that_cannot_be_written_leaves_the_exit_code() -> None:
    for stream in ("2>/dev/full", "2>&-"):
        command = shlex.join([sys.executable, str(SCRIPT), "nothing", "--out", "nowhere"])
        result = subprocess.run(["bash", "-c", f"{command} {stream}"], stdout=subprocess.DEVNULL)
        assert result.returncode == 2


def test_killed_worker_is_one_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, folding: Path
) -> None:
    """The kernel does so when memory runs out."""

    def die(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ms, "encoder_of", die)  # in the workers, which are forked
    write_jsonl(tmp_path / "a.jsonl", SHORT[:60])
    assert run(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", str(folding)) == 2
    message = capsys.readouterr().err
    assert "a worker was killed" in message and "--workers" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_a_second_run_does_not_touch_what_the_first_makes(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, folding: Path
) -> None:
    words = tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", str(folding)
    write_jsonl(words[0], SHORT[:60])
    fill = ms.fill

    def meanwhile(options: Any, folder: Path, *rest: Any) -> Any:
        monkeypatch.setattr(ms, "fill", fill)
        assert run(*words) == 2
        assert "another make_shards.py is making --out" in capsys.readouterr().err
        assert folder.exists()
        return fill(options, folder, *rest)

    monkeypatch.setattr(ms, "fill", meanwhile)
    assert run(*words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out"}


class OnTheSpot:
    """Stands in for work in another process: it is done when it is submitted."""

    def __init__(self, item: int) -> None:
        self.item = item

    def result(self) -> int:
        return self.item


def test_only_so_many_blocks_are_under_way() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            drawn.append(i)
            yield i

    taken = 0
    for i in ms.in_order(OnTheSpot, items(), ahead=5):
        assert i == taken and len(drawn) - taken <= 5
        taken += 1
    assert taken == 100


def test_memory_does_not_grow_with_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folding: Path
) -> None:
    """Peak of the main process, for a corpus and one ten times as large, sampling included."""

    def given(texts: list[str], size: int) -> bytes:
        return folding.read_bytes()

    monkeypatch.setattr(ms, "BLOCK", 1 << 12)
    monkeypatch.setattr(sample, "train_tokenizer", given)
    peaks = []
    for factor in (1, 10):
        texts = [f"{i} {'some words ' * 200}" for i in range(20 * factor)]
        write_jsonl(tmp_path / "a.jsonl", texts)
        tracemalloc.start()
        assert run(tmp_path / "a.jsonl", tmp_path / str(factor), "--sample-bytes", "20000") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks


STOPS = """
import sys
sys.path.insert(0, sys.argv[1])
import make_shards as ms
add = ms.ShardWriter.add
def stop(self, tokens):
    add(self, tokens)
    print("written", flush=True)
    sys.stdin.read()
ms.ShardWriter.add = stop
sys.exit(ms.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_run_that_ends_early_leaves_nothing_and_nobody(
    tmp_path: Path, folding: Path, number: signal.Signals
) -> None:
    """The run stops after its first write; all its processes hold the pipe that is read here."""
    write_jsonl(tmp_path / "a.jsonl", STDLIB)
    out, model = tmp_path / "out", ["--tokenizer", str(folding)]
    options = [*arguments(tmp_path / "a.jsonl", out, workers=2), *model]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS, str(SCRIPT.parent), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "written\n"
    if number == signal.SIGINT:  # as a terminal does it: to all processes
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, stderr = process.communicate(timeout=HANG)  # ends when nobody holds the pipes any more
    assert not out.exists()
    if number == signal.SIGINT:
        assert process.returncode == shards.INTERRUPTED
        assert stderr == "make_shards.py: interrupted; run it again\n"
    write_jsonl(tmp_path / "a.jsonl", SHORT[:60])
    assert run(tmp_path / "a.jsonl", out, *model) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out"}
