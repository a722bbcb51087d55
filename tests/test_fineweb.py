"""data/fineweb.py against a stand-in for the hub, through the real client: whole, checked files or
none."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hub_server import HubServer

pytest.importorskip("huggingface_hub", reason="data/requirements.txt is not installed")
pytest.importorskip("tqdm", reason="data/requirements.txt is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import fineweb
import hub as client
import packages
import sample
import shards
from helpers import HANG
from huggingface_hub import constants
from huggingface_hub.errors import XetDownloadError

Capture = pytest.CaptureFixture[str]
Files = dict[str, bytes]  # content by path
SCRIPT = Path(fineweb.__file__)
FULL, VOCAB = 10_000, 320  # tokens of a full shard, pieces
TEXTS = [
    "A first line.\nA second.",
    " spaces   inside ",
    "\u00ef \U0001f600 \u65e5\u672c\u8a9e\ttabs",
] * 40
FOLDER = "datasets/fineweb10B_sp320"
MODEL = "tokenizers/fw_320.model"
TOKEN = "hf_" + "x" * 34


@pytest.fixture(scope="module")
def export() -> Files:
    """A small export: four train shards, a validation shard of TEXTS, tokenizer and manifest."""
    model = sample.train_tokenizer(
        [text + "the quick brown fox jumps over the dog" for text in TEXTS], VOCAB
    )
    sp = sample.spm.SentencePieceProcessor(model_proto=model)
    ids = np.random.default_rng(0).integers(4, VOCAB, 3 * FULL + 123)
    train = [ids[i : i + FULL] for i in range(0, len(ids), FULL)]
    val = np.array([token for text in TEXTS for token in (1, *sp.encode(text))])
    stats = {"files_train": 4, "tokens_train": len(ids), "files_val": 1, "tokens_val": len(val)}
    manifest = {
        "shard_size": FULL,
        "datasets": [
            {"name": f"fineweb10B_{name}", "tokenizer_name": f"{name}_bpe", "stats": stats}
            for name in ("sp320", "sp999", "byte260")
        ],
        "tokenizers": [
            {
                "name": "sp320_bpe",
                "model_path": MODEL,
                "vocab_path": "tokenizers/fw_320.vocab",
            },
            {"name": "byte260_bpe", "path": "tokenizers/bytes.json"},
        ],
    }
    files = {
        f"{FOLDER}/fineweb_train_{i:06}.bin": shards.encode_shard(tokens)
        for i, tokens in enumerate(train)
    }
    files |= {
        f"{FOLDER}/fineweb_val_000000.bin": shards.encode_shard(val),
        "manifest.json": json.dumps(manifest).encode(),
    }
    files |= {MODEL: model, "tokenizers/fw_320.vocab": b"pieces\n"}
    files |= {"tokenizers/bytes.json": b"{}"}
    files |= {"datasets/fineweb10B_byte260/fineweb_val_000000.bin": shards.encode_shard(val)}
    return {f"datasets/{path}": content for path, content in files.items()}


@pytest.fixture
def hub(export: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, this process pointed at it; waiting between requests is only written down."""
    sleep = time.sleep
    # The client loses up to a chunk (10 MB) when it is cut off; these files are smaller.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    with HubServer(dict(export)) as server:

        def nap(seconds: float) -> None:
            server.slept.append(seconds)
            sleep(min(seconds, 0.01))

        monkeypatch.setattr(time, "sleep", nap)
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


def environment(url: str) -> dict[str, str]:
    return dict(HF_ENDPOINT=url, MATCHED_FINEWEB_REPO_ID="someone/export", HF_HUB_DISABLE_XET="1")


def get(root: Path, *options: str, train_shards: int | None = 4) -> int:
    count = () if train_shards is None else ("--train-shards", str(train_shards))
    return fineweb.main(
        ["--root", str(root), "--variant", "sp320", "--jobs", "3", *count, *options]
    )


def wanted(export: Files) -> Files:
    """What a whole fetch puts below the root, records and manifests aside."""
    return {
        path.removeprefix("datasets/"): content
        for path, content in export.items()
        if "byte" not in path and not path.endswith("manifest.json")
    }


def there(root: Path) -> Files:
    """All that lies below the root but the record, the manifests and the lock."""
    other = ("fetched.json", "fetched.json.tmp", "manifest.json", "manifest.json.tmp", ".lock")
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name not in other
    }


def refused(capsys: Capture, code: int) -> str:
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1, message
    return message


def bins(hub: HubServer) -> list[str]:
    """The shards that were sent, by the end of their names."""
    return sorted(path[-10:] for path in hub.sent if path.endswith(".bin"))


# ---- What arrives


def test_whole_through_faults_and_nothing_twice(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture
) -> None:
    hub.faults = {
        "/revision/": ["503"],
        "/tree/": ["", "503"],
        "GET /large/datasets/tokenizers": ["cut", "503"],
        f"GET /datasets/someone/export/resolve/{hub.commit}/datasets/manifest.json": [
            "503",
            "cut",
            "flip",
        ],
        "HEAD /datasets/someone/export/resolve/": ["503", "", "503", "size"],
        f"GET /large/datasets/{FOLDER}/fineweb_train_000002.bin": ["cut", "cut", "503", "cut"],
        f"GET /large/datasets/{FOLDER}/fineweb_train_000000.bin": ["503", "cut", "flip"],
        f"GET /large/datasets/{FOLDER}/fineweb_val": ["flip", "cut"],
    }
    assert get(tmp_path) == 0, capsys.readouterr().err
    assert there(tmp_path) == wanted(export)
    assert hub.ranges, "a cut file goes on where it was cut"
    assert not any(hub.faults.values()), "every fault was met"
    out = capsys.readouterr().out
    tokens, size = 3 * FULL + 123, sum(len(text.encode()) for text in TEXTS)
    assert f"4 shards, {tokens:,} tokens, {4 * 1024 + 2 * tokens:,} bytes on disk" in out
    assert f"{len(TEXTS)} validation documents, {size:,} bytes: NOT the canonical split" in out
    hub.sent.clear()
    assert get(tmp_path) == 0
    assert hub.sent == {} and " 0 bytes transferred" in capsys.readouterr().out


def test_more_shards_and_fewer(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture
) -> None:
    assert get(tmp_path, train_shards=1) == 0
    hub.sent.clear()
    assert get(tmp_path, train_shards=3) == 0
    assert sorted(path[-10:] for path in hub.sent) == ["000001.bin", "000002.bin"]
    assert len(there(tmp_path)) == len(wanted(export)) - 1
    capsys.readouterr()
    assert get(tmp_path, train_shards=0) == 0
    out = capsys.readouterr().out
    assert "3 more shards" in out and "never checked" not in out


def test_canonical_split_is_recognised(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(text.encode()) for text in TEXTS)
    monkeypatch.setattr(fineweb, "CANONICAL_DOCUMENTS", len(TEXTS))
    for error, expected in (
        (30_000, "the"),
        (-30_000, "the"),
        (30_001, "NOT the"),
        (-30_001, "NOT the"),
    ):
        monkeypatch.setattr(fineweb, "CANONICAL_BYTES", size + error)
        assert get(tmp_path, train_shards=0) == 0
        assert f"{size:,} bytes: {expected} canonical" in capsys.readouterr().out


def test_repository_and_prefix_are_taken_from_the_environment(
    hub: HubServer, export: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repo, hub.files = (
        "me/copy",
        {path.removeprefix("datasets/"): c for path, c in export.items()},
    )
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "me/copy")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "")
    assert get(tmp_path) == 0
    assert there(tmp_path) == wanted(export)


def test_command_line(hub: HubServer, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--root",
        str(tmp_path),
        "--variant",
        "sp320",
        "--train-shards",
        "1",
    ]
    env = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"TOKENIZER_PATH={tmp_path}/tokenizers/fw_320.model VOCAB_SIZE=320" in result.stdout


# ---- What is there already


def flip(path: Path) -> None:
    """One wrong bit that leaves every id legal and the time of change as it was."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["train_000001", "val_000000"])
@pytest.mark.parametrize("count", [None, 4], ids=["by the record", "by the hub"])
def test_verify_finds_and_repairs(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture, name: str, count: int | None
) -> None:
    assert get(tmp_path) == 0
    hub.sent.clear()
    flip(tmp_path / FOLDER / f"fineweb_{name}.bin")
    assert get(tmp_path) == 0 and not hub.sent, "only --verify reads everything again"
    assert get(tmp_path, "--verify", train_shards=count) == 0
    assert list(hub.sent) == [f"datasets/{FOLDER}/fineweb_{name}.bin"]
    assert there(tmp_path) == wanted(export)
    out = capsys.readouterr().out
    assert f"fineweb_{name}.bin has sha256" in out and "removed" in out


def test_verify_needs_no_network_unless_it_repairs(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(tmp_path) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "asking" in capsys.readouterr().out
    assert get(tmp_path, "--verify", train_shards=None) == 0
    assert "asking" not in capsys.readouterr().out, "the server was not asked"
    broken = tmp_path / FOLDER / "fineweb_train_000003.bin"
    flip(broken)
    capsys.readouterr()
    message = refused(capsys, get(tmp_path, "--verify", train_shards=None))
    assert "fineweb_train_000003.bin" in message and "http://127.0.0.1:9" in message
    assert not broken.exists(), "a file known to be broken is not left for training"


def test_verify_repairs_from_where_it_came(
    hub: HubServer, export: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(tmp_path) == 0
    flip(tmp_path / FOLDER / "fineweb_train_000003.bin")
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/body")
    assert get(tmp_path, "--verify", train_shards=None) == 0
    assert there(tmp_path) == wanted(export)


def test_files_put_there_by_hand(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture
) -> None:
    """Right ones are kept, wrong ones replaced, without --verify."""
    for path, content in wanted(export).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    flip(tmp_path / FOLDER / "fineweb_train_000000.bin")
    (tmp_path / FOLDER / "fineweb_train_000001.bin").write_bytes(b"")
    (tmp_path / FOLDER / "fineweb_train_000002.bin").unlink()
    assert get(tmp_path) == 0
    assert sorted(path[-10:] for path in hub.sent if "bin" in path) == [
        f"00000{i}.bin" for i in range(3)
    ]
    assert there(tmp_path) == wanted(export)


def test_new_commit_replaces_what_changed(hub: HubServer, tmp_path: Path) -> None:
    assert get(tmp_path) == 0
    changed = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    hub.files[changed] = shards.encode_shard(np.full(FULL, 7))
    hub.sent.clear()
    assert get(tmp_path) == 0
    assert list(hub.sent) == [changed]
    assert (tmp_path / FOLDER / "fineweb_train_000000.bin").read_bytes() == hub.files[changed]


# ---- What is refused

ERRORS = {
    "unknown variant": (("--variant", "sp777"), "sp777.*someone/export has sp320, byte260"),
    "listed, not there": (("--variant", "sp999"), "sp999.*no shards.*has sp320"),
    "no SentencePiece": (("--variant", "byte260"), "byte260.*SentencePiece.*has sp320"),
    "too many shards": (
        ("--train-shards", "5"),
        "--train-shards 5.*has 4 of sp320.*--train-shards 4",
    ),
    "revision": (("--revision", "v9"), "v9.*--revision"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_named(hub: HubServer, tmp_path: Path, capsys: Capture, case: str) -> None:
    options, expected = ERRORS[case]
    message = refused(capsys, get(tmp_path, *options))
    assert re.search(expected, message), message
    assert there(tmp_path) == {}


def test_no_network_no_repository(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/body")
    message = refused(capsys, get(tmp_path))
    assert "some/body" in message and "MATCHED_FINEWEB_REPO_ID" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refused(capsys, get(tmp_path))
    assert "some/body" in message and "http://127.0.0.1:9" in message and "again" in message
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID")
    assert get(tmp_path, "--variant", "sp819") == 2
    asked, variants = capsys.readouterr().out.splitlines()[::-1]
    assert "sp819 is none of sp1024, sp4096, sp8192; willdepueoai/parameter-golf may" in variants
    assert asked == "asking  127.0.0.1:9 for the list of files of willdepueoai/parameter-golf"
    assert there(tmp_path) == {}


def edit(hub: HubServer, change: Callable[[dict], object]) -> None:
    manifest = json.loads(hub.files["datasets/manifest.json"])
    change(manifest)
    hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()


STALE = {
    "val tokens": (lambda m: m["datasets"][0]["stats"].update(tokens_val=77), "77 val tokens"),
    "val files": (lambda m: m["datasets"][0]["stats"].update(files_val=2), "2 val shards"),
    "train tokens": (
        lambda m: m["datasets"][0]["stats"].update(tokens_train=77),
        "77 train tokens",
    ),
    "train files": (lambda m: m["datasets"][0]["stats"].update(files_train=3), "3 train shards"),
    "shard size": (
        lambda m: m.update(shard_size=FULL + 1),
        f"{FULL:,} tokens, a shard by manifest.json {FULL + 1:,}",
    ),
}


@pytest.mark.parametrize("case", STALE)
def test_stale_manifest(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture, case: str
) -> None:
    change, expected = STALE[case]
    edit(hub, change)
    message = refused(capsys, get(tmp_path))
    assert expected in message and "--ignore-manifest" in message
    assert not [path for path in hub.sent if path.endswith(".bin")], (
        "nothing is fetched to find that out"
    )
    assert get(tmp_path, "--ignore-manifest") == 0
    assert there(tmp_path) == wanted(export)


def test_manifest_without_counts(hub: HubServer, export: Files, tmp_path: Path) -> None:
    edit(hub, lambda m: (m.pop("shard_size"), m["datasets"][0].pop("stats")))
    assert get(tmp_path) == 0
    assert there(tmp_path) == wanted(export)


def test_manifest_with_paths_of_another_machine(
    hub: HubServer, export: Files, tmp_path: Path
) -> None:
    elsewhere = {"model_path": "/home/me/fw_320.model", "vocab_path": "gone.vocab"}
    edit(hub, lambda m: m["tokenizers"][0].update(elsewhere))
    assert get(tmp_path) == 0
    assert there(tmp_path).keys() == wanted(export).keys() - {"tokenizers/fw_320.vocab"}


def test_repository_ahead_of_or_behind_the_manifest(
    hub: HubServer, tmp_path: Path, capsys: Capture
) -> None:
    """Fewer train shards than the manifest lists do, as long as those asked for are there."""
    del hub.files[f"datasets/{FOLDER}/fineweb_train_000003.bin"]
    assert "has 3 of sp320" in refused(capsys, get(tmp_path))
    assert get(tmp_path, train_shards=3) == 0


BAD = {
    "ids": (shards.encode_shard(np.full(FULL, VOCAB)), f"token {VOCAB}.*{VOCAB} pieces"),
    "header": (b"\1" + shards.encode_shard(np.full(FULL, 5))[1:], "not a token shard"),
    "count": (
        shards.encode_shard(np.full(FULL, 5))[:8]
        + b"\1"
        + shards.encode_shard(np.full(FULL, 5))[9:],
        "header says",
    ),
    "empty": (b"", "0 bytes"),
    "cut": (
        shards.encode_shard(np.full(FULL, 5))[:-2],
        f"{FULL - 1:,} tokens, a shard by manifest",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_export_never_gets_its_name(
    hub: HubServer, tmp_path: Path, capsys: Capture, case: str
) -> None:
    """The hub's own digest fits: what is damaged was uploaded so."""
    content, expected = BAD[case]
    hub.files[f"datasets/{FOLDER}/fineweb_train_000001.bin"] = content
    message = refused(capsys, get(tmp_path))
    assert re.search(expected, message) and "fineweb_train_000001.bin" in message
    assert not [path for path in there(tmp_path) if "train_000001" in path or "incoming" in path]


@pytest.mark.parametrize("fault", ["flip", "size", "503"])
def test_fault_that_does_not_pass(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture, fault: str
) -> None:
    hub.faults = {"train_000001.bin": [fault] * 200}
    message = refused(capsys, get(tmp_path))
    assert "fineweb_train_000001.bin" in message
    assert not [path for path in there(tmp_path) if "train_000001" in path or "incoming" in path]
    hub.faults.clear()
    assert get(tmp_path) == 0
    assert there(tmp_path) == wanted(export)


def test_no_space_is_known_before_anything_is_fetched(
    hub: HubServer, tmp_path: Path, capsys: Capture
) -> None:
    hub.listed_sizes[f"datasets/{FOLDER}/fineweb_train_000001.bin"] = 10**18
    message = refused(capsys, get(tmp_path, "--ignore-manifest"))
    assert "no space" in message and "--root" in message and "1,000,000,000," in message
    assert not [path for path in hub.sent if path.endswith(".bin")]


def test_root_that_cannot_be_written(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(capsys, get(tmp_path / "file"))


# ---- The record


OUTSIDE = "../../precious"
ENTRY = {
    "local": f"{FOLDER}/fineweb_train_000000.bin",
    "repo": "someone/export",
    "revision": "main",
    "remote": "x",
    "size": 7,
    "digest": "sha256:" + "0" * 64,
    "mtime_ns": None,
}
RECORDS = {
    "empty": "",
    "binary": "\0\1\2",
    "object": "{}",
    "of something else": '[{"name": "a"}]',
    "list of numbers": "[1, 2]",
    "nested": "[" * 200_000,
    "cut": json.dumps([ENTRY])[:-9],
    "size": json.dumps([ENTRY | {"size": "7"}]),
    "time": json.dumps([ENTRY | {"mtime_ns": True}]),
    "digest": json.dumps([ENTRY | {"digest": "md5:00"}]),
    "outside": json.dumps([ENTRY | {"local": OUTSIDE}]),
    "far outside": json.dumps([ENTRY | {"local": "/etc/passwd"}]),
    "other data set": json.dumps([ENTRY | {"local": "datasets/other/fineweb_val_000000.bin"}]),
}


@pytest.mark.parametrize("case", RECORDS)
def test_record_that_is_none_is_made_anew(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture, case: str
) -> None:
    """All files are checked again, none is transferred again, and nothing outside is touched."""
    root = tmp_path / "deep/root"
    assert get(root) == 0
    (tmp_path / "precious").write_text("mine")
    record = root / FOLDER / "fetched.json"
    right = record.read_bytes()
    record.write_text(RECORDS[case])
    hub.sent.clear()
    capsys.readouterr()
    assert get(root, "--verify", train_shards=None if case == "outside" else 4) == (
        2 if case == "outside" else 0
    )
    assert f"record  {record}" in capsys.readouterr().out
    assert (tmp_path / "precious").read_text() == "mine"
    if case != "outside":  # without a number it asks the hub, which has no 80 shards
        assert record.read_bytes() == right and hub.sent == {}
        assert there(root) == wanted(export)


def test_verify_without_record_or_network_is_one_line(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(tmp_path) == 0
    (tmp_path / FOLDER / "fetched.json").write_text("")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in refused(capsys, get(tmp_path, "--verify", train_shards=None))
    assert len(there(tmp_path)) == 7


# ---- The manifest


def manifest_of(root: Path) -> dict[str, Any]:
    return json.loads((root / FOLDER / "manifest.json").read_text())


def assert_true(root: Path, names: set[str]) -> None:
    """The manifest is of these shards, which are as it says, and of the tokenizer."""
    manifest = manifest_of(root)
    model = (root / FOLDER / manifest["tokenizer"]["file"]).resolve()
    assert model == (root / MODEL).resolve()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == VOCAB
    assert set(manifest["splits"]) == {"train", "val"}
    found: dict[str, Any] = {}
    for split in manifest["splits"].values():
        found |= split["files"]
        assert split["tokens"] == sum(file["tokens"] for file in split["files"].values())
    assert found.keys() == names
    for name, file in found.items():
        path = root / FOLDER / name
        assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert file["tokens"] == len(shards.open_shard(path))


def names(train: int) -> set[str]:
    return {"fineweb_val_000000.bin", *(f"fineweb_train_{i:06}.bin" for i in range(train))}


def test_manifest_is_of_what_was_found_right(hub: HubServer, tmp_path: Path) -> None:
    assert get(tmp_path, train_shards=1) == 0
    assert_true(tmp_path, names(1))
    assert get(tmp_path, train_shards=3) == 0
    assert_true(tmp_path, names(3))
    assert get(tmp_path, train_shards=0) == 0
    assert_true(tmp_path, names(3))
    hub.faults = {"train_000001.bin": ["503"] * 200}
    (tmp_path / FOLDER / "fineweb_train_000001.bin").unlink()
    assert get(tmp_path, train_shards=3) == 2
    assert_true(tmp_path, names(3) - {"fineweb_train_000001.bin"})


def test_manifest_follows_a_new_commit(hub: HubServer, tmp_path: Path) -> None:
    assert get(tmp_path) == 0
    changed = f"datasets/{FOLDER}/fineweb_train_000003.bin"
    hub.files[changed] = shards.encode_shard(np.full(99, 7))
    assert get(tmp_path, "--ignore-manifest") == 0
    assert_true(tmp_path, names(4))


# ---- Files that are not of the export


@pytest.mark.parametrize("name", ["fineweb_val_000000 (1).bin", "fineweb_val_000001.bin"])
def test_stray_validation_shard_is_refused_at_the_start(
    hub: HubServer, tmp_path: Path, capsys: Capture, name: str
) -> None:
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / name).touch()
    assert name in refused(capsys, get(tmp_path))
    assert not bins(hub)


def test_train_shard_of_elsewhere_is_said(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    assert get(tmp_path, train_shards=2) == 0
    (tmp_path / FOLDER / "fineweb_train_000002.bin").touch()
    capsys.readouterr()
    assert get(tmp_path, train_shards=2) == 0
    said = "1 of them were never checked, the first is fineweb_train_000002.bin"
    assert said in capsys.readouterr().out
    assert_true(tmp_path, names(2))


def test_other_names_in_the_repository_are_said(
    hub: HubServer, export: Files, tmp_path: Path, capsys: Capture
) -> None:
    hub.files[f"datasets/{FOLDER}/fineweb_val_000000 (1).bin"] = b"x"
    assert get(tmp_path) == 0
    said = f"ignored someone/export also has {FOLDER}/fineweb_val_000000 (1).bin"
    assert said in capsys.readouterr().out
    assert there(tmp_path) == wanted(export)


# ---- How to go on


def test_closing_command(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    """It is quoted for a shell. Without train shards there is nothing to train on."""
    root = tmp_path / "my data"
    assert get(root, train_shards=0) == 0
    out = capsys.readouterr().out
    assert "there is no train shard" in out and "torchrun" not in out
    assert f"EVAL_ONLY=<artifact> DATA_PATH='{root}/{FOLDER}'" in out
    assert f" {packages.python()} " in out
    assert get(root, train_shards=1) == 0
    out = capsys.readouterr().out
    assert f"next    DATA_PATH='{root}/{FOLDER}' TOKENIZER_PATH='{root}/{MODEL}'" in out
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=8"
    assert f"{packages.python()} {torchrun}" in out


@pytest.mark.parametrize("variant", ["sp1024", "sp4096", "sp8192", "sp320"])
def test_repository_of_a_variant(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """The stand-in knows neither: the error says which one was asked for."""
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID")
    expected = fineweb.REPOS.get(variant, fineweb.DEFAULT_REPO)
    message = refused(capsys, get(tmp_path, "--variant", variant))
    assert f"dataset {expected} at main: no such dataset" in message


@pytest.mark.parametrize("variant", ["../up", "a/b", ""])
def test_variant_is_a_name(capsys: Capture, variant: str) -> None:
    with pytest.raises(SystemExit):
        fineweb.main(["--variant", variant])
    assert "--variant" in capsys.readouterr().err


# ---- What the server may answer


class Answer(NamedTuple):
    fault: str
    token: str
    expected: str


ANSWERS = {
    "401": Answer("401", "", "HTTP 401.*MATCHED_FINEWEB_REPO_ID.*set HF_TOKEN"),
    "401 token": Answer("401", TOKEN, "HTTP 401.*HF_TOKEN.*expired"),
    "403": Answer("403", "", "HTTP 403.*set HF_TOKEN"),
    "403 token": Answer("403", TOKEN, "HTTP 403.*may not read"),
    "gated": Answer("403 X-Error-Code=GatedRepo", "", "HTTP 403.*set HF_TOKEN"),
    "gated token": Answer("403 X-Error-Code=GatedRepo", TOKEN, "HTTP 403.*ask for it.*HF_TOKEN"),
    "404 token": Answer("404 X-Error-Code=RepoNotFound", TOKEN, "no such dataset.*HF_TOKEN"),
    "429": Answer("429", "", "HTTP 429.*wait some minutes.*again.*HF_TOKEN.*--jobs"),
    "429 long": Answer("429 Retry-After=7200", "", "HTTP 429.*wait 7200 s"),
    "429 window": Answer('429 RateLimit="api";r=0;t=7200', "", "HTTP 429.*wait 7200 s"),
    "500": Answer("500", "", "fails .HTTP 500.*later.*whole files are kept"),
    "504": Answer("504", "", "fails .HTTP 504.*later"),
}
PLACES = {"commit": "/revision/", "a file": "fineweb_train_000001.bin"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", ANSWERS)
def test_answer_that_stays_is_explained(
    hub: HubServer,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    place: str,
) -> None:
    fault, token, expected = ANSWERS[case]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.faults = {PLACES[place]: [fault] * 200}
    message = refused(capsys, get(tmp_path))
    assert re.search(expected, message), message
    assert TOKEN not in message
    refuses = fault.startswith(("401", "403", "404"))
    asked = 200 - len(hub.faults[PLACES[place]])
    assert asked == 1 or not refuses, "what was refused is not asked for again"


@pytest.mark.parametrize("place", ["/revision/", "/tree/", "HEAD", "GET /large"])
def test_server_that_asks_to_wait_is_obeyed(
    hub: HubServer, export: Files, tmp_path: Path, place: str
) -> None:
    hub.faults = {place: ["429 Retry-After=37"] * 2}  # the client repeats the first HEAD at once
    assert get(tmp_path) == 0
    assert {seconds for seconds in hub.slept if seconds > 8} == {38}
    assert there(tmp_path) == wanted(export)


def test_waiting_is_said(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    hub.faults = {"/revision/": ["429 Retry-After=37", '429 RateLimit="api";r=0;t=55', "429"]}
    assert get(tmp_path) == 0
    out = capsys.readouterr().out
    assert re.findall(r"waits +(\d+) s: .*HTTP 429", out) == ["38", "56", "40"]


@pytest.mark.parametrize("body", ["{}", "[]", "[1]", '{"sha": null, "id": "a"}', "<html>", "null"])
@pytest.mark.parametrize("place", ["/revision/", "/tree/"])
def test_answer_of_something_else_is_one_line(
    hub: HubServer, tmp_path: Path, capsys: Capture, place: str, body: str
) -> None:
    """A proxy's page of greetings, or another service behind HF_ENDPOINT."""
    hub.faults = {place: [f"200 {body}"] * 50}
    message = refused(capsys, get(tmp_path))
    assert "someone/export" in message
    assert not bins(hub)


def test_server_that_does_not_answer_is_left(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself would wait for a list of files without end."""
    monkeypatch.setattr(client, "QUIET", 0.01)
    monkeypatch.setattr(client, "LISTING_LIMIT", 0.02)
    hub.faults = {"/tree/": ["hang"]}
    assert get(tmp_path) == 2
    out, err = capsys.readouterr()
    assert "waits   for the server's list" in out
    assert re.search(r"gave no answer within .*later\n$", err) and err.count("\n") == 1


class Raised(NamedTuple):
    error: BaseException
    expected: str


CLIENT = {
    "xet": Raised(XetDownloadError("broken chunk"), "broken chunk.*Check the network"),
    "native": Raised(RuntimeError("Data processing error: timeout"), "timeout.*Check the network"),
    "space": Raised(OSError(errno.ENOSPC, "No space left on device"), "No space.*--root"),
    "read-only": Raised(OSError(errno.EROFS, "Read-only file system"), "Read-only.*Give --root"),
    "bare": Raised(ConnectionResetError(), "ConnectionResetError.*Check the network"),
}


@pytest.mark.parametrize("case", CLIENT)
def test_client_that_fails_is_one_line(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise CLIENT[case].error

    monkeypatch.setattr(fineweb, "hf_hub_download", fail)
    assert re.search(CLIENT[case].expected, refused(capsys, get(tmp_path)))


VARIABLES = [
    ("HF_ENDPOINT", "huggingface.co", "is no address"),
    ("HF_ENDPOINT", "http://[", "is no address"),
    ("HF_ENDPOINT", "", "is no address"),
    ("HF_ENDPOINT", "ftp://huggingface.co", "is no address"),
    ("MATCHED_FINEWEB_REPO_ID", "a/b/c", "<user>/<name>"),
    ("MATCHED_FINEWEB_REPO_ID", "a b", "<user>/<name>"),
    ("MATCHED_FINEWEB_REPO_ID", "--", "<user>/<name>"),
]


@pytest.mark.parametrize(("name", "value", "expected"), VARIABLES)
def test_variable_that_cannot_be_is_named(
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    expected: str,
) -> None:
    monkeypatch.setenv(name, value)
    message = refused(capsys, get(tmp_path))
    assert name in message and expected in message


def test_offline_mode_is_named(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, get(tmp_path))


INDEXES = {
    "empty": b"",
    "list": b"[]",
    "nested": b"[" * 200_000,
    "names": b'{"datasets": ["sp320"]}',
    "datasets": b'{"datasets": {"sp320": 1}}',
    "count": b'{"datasets": [{"name": "fineweb10B_sp320", "stats": {"files_val": "1"}}]}',
    "stats": b'{"datasets": [{"name": "fineweb10B_sp320", "stats": [1]}]}',
    "path": b'{"tokenizers": [{"name": "sp320_bpe", "model_path": 7}]}',
    "shard size": b'{"shard_size": "all"}',
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_of_another_kind_is_one_line(
    hub: HubServer, tmp_path: Path, capsys: Capture, case: str
) -> None:
    hub.files["datasets/manifest.json"] = INDEXES[case]
    assert "manifest.json of someone/export" in refused(capsys, get(tmp_path))


def test_tokenizer_that_is_none_is_named(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    hub.files[f"datasets/{MODEL}"] = b"<html>"
    message = refused(capsys, get(tmp_path))
    assert f"{tmp_path / MODEL} is not a SentencePiece model" in message
    assert not bins(hub)


def test_validation_without_text_is_refused(
    hub: HubServer, tmp_path: Path, capsys: Capture
) -> None:
    hub.files[f"datasets/{FOLDER}/fineweb_val_000000.bin"] = shards.encode_shard(np.full(9, 1))
    message = refused(capsys, get(tmp_path, "--ignore-manifest"))
    assert "val has 9 tokens and not one byte of text" in message


# ---- The disk


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "No space.*--root"),
        (errno.EROFS, "Give --root a folder that can be written"),
        (errno.EACCES, "Give --root a folder that can be written"),
        (errno.EIO, "Input/output error.*below --root"),
    ],
)
def test_disk_that_cannot_take_the_record_is_named(
    hub: HubServer,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: str,
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(shards, "write_atomically", fail)
    message = refused(capsys, get(tmp_path))
    assert re.search(expected, message) and "fetched.json" in message


def test_folder_in_the_place_of_a_shard_is_named(
    hub: HubServer, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / FOLDER / "fineweb_val_000000.bin").mkdir(parents=True)
    assert "fineweb_val_000000.bin" in refused(capsys, get(tmp_path))


# ---- Processes: a server that imports once makes runs cheap to start and to kill


def child(root: Path, url: str, limit: int | None = None, step: int = 0) -> None:
    os.environ.update(environment(url))
    die_at(step)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.dup2(os.open(root / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    client.PAUSES = (0.01,)
    sys.exit(get(root))


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_fineweb"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def test_disk_that_fills_up(hub: HubServer, tmp_path: Path, processes: ForkServerContext) -> None:
    process = processes.Process(target=child, args=(tmp_path, hub.url, FULL))
    process.start()
    process.join()
    message = (tmp_path / "stderr").read_text()
    assert process.exitcode == 2 and message.count("\n") == 1
    assert "No space" in message and "--root" in message
    assert not [path for path in there(tmp_path) if re.search("train_00000[012]|incoming", path)]


def test_second_run_waits_its_turn(
    hub: HubServer, tmp_path: Path, capsys: Capture, processes: ForkServerContext
) -> None:
    with fineweb.alone(tmp_path):
        process = processes.Process(target=child, args=(tmp_path, hub.url))
        process.start()
        process.join()
    assert process.exitcode == 2 and "another fineweb.py" in (tmp_path / "stderr").read_text()


def die_at(event: int) -> None:
    """Lets this process kill itself at its so many-th step that changes files."""
    left = [event]

    def deadly(step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **options)

        return counted

    for module, name in ((os, "replace"), (os, "fsync"), (fineweb.shutil, "rmtree")):
        setattr(module, name, deadly(getattr(module, name)))


def assert_whole_or_absent(root: Path, files: Files) -> None:
    """What has a shard's name is that shard; the rest lies in the staging folder."""
    found = there(root)
    for path in found.keys() & files.keys():
        assert found[path] == files[path], path
    others = found.keys() - files.keys() - {"stderr"}
    assert [path for path in others if ".incoming/" not in path] == []
    if (root / FOLDER / "manifest.json").exists():
        listed = manifest_of(root)["splits"].values()
        right = {name: file for split in listed for name, file in split["files"].items()}
        for name, file in right.items():
            if f"{FOLDER}/{name}" in found:  # the test itself removes some
                content = found[f"{FOLDER}/{name}"]
                assert file["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("where", ["in a transfer", "at a step"])
def test_killed_at_any_point(
    hub: HubServer, export: Files, tmp_path: Path, processes: ForkServerContext, where: str
) -> None:
    """Ten runs, each killed with -9 after so many bytes, or at a step that changes files."""
    rng, files = random.Random(0), wanted(export)
    partial = 0
    for i in range(10):
        for path in [path for path in there(tmp_path) if rng.random() < 0.6]:
            (tmp_path / path).unlink()
        step = 1 + 3 * i if where == "at a step" else 0
        process = processes.Process(target=child, args=(tmp_path, hub.url, None, step))
        if not step:
            hub.halted.clear()
            hub.halt_after = rng.randrange(1, 2 * FULL)
        process.start()
        if not step:
            (tmp_path / FOLDER / "fineweb_train_000000.bin").unlink(missing_ok=True)
            assert hub.halted.wait(HANG)
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        partial += any("incoming" in path for path in there(tmp_path))
        assert_whole_or_absent(tmp_path, files)
    assert partial >= 3
    hub.halt_after = 0
    assert get(tmp_path) == 0
    (tmp_path / "stderr").unlink(missing_ok=True)  # of the children
    assert there(tmp_path) == files
    assert_true(tmp_path, names(4))
