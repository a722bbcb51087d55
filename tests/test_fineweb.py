"""data/fineweb.py against a stand-in for the hub, through the real client: whole, checked files or none."""

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
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer

huggingface_hub = pytest.importorskip(
    "huggingface_hub", reason="data/requirements.txt is not installed"
)
pytest.importorskip("tqdm", reason="data/requirements.txt is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import fineweb
import hub as hub_module
import sample
import shards

SCRIPT = Path(fineweb.__file__)
FULL, VOCAB = 50_000, 320  # tokens of a full shard, pieces
TEXTS = [
    "A first line.\nA second.",
    " spaces   inside ",
    "\u00ef \U0001f600 \u65e5\u672c\u8a9e\ttabs",
] * 40
FOLDER = "datasets/fineweb10B_sp320"


def shard(tokens: np.ndarray) -> bytes:
    return shards.encode_shard(tokens)


@pytest.fixture(scope="module")
def export() -> dict[str, bytes]:
    """A small export: four train shards, a validation shard of TEXTS, tokenizer and manifest, by path."""
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
                "model_path": "tokenizers/fw_320.model",
                "vocab_path": "tokenizers/fw_320.vocab",
            },
            {"name": "byte260_bpe", "path": "tokenizers/bytes.json"},
        ],
    }
    files = {f"{FOLDER}/fineweb_train_{i:06}.bin": shard(tokens) for i, tokens in enumerate(train)}
    files |= {
        f"{FOLDER}/fineweb_val_000000.bin": shard(val),
        "manifest.json": json.dumps(manifest).encode(),
    }
    files |= {"tokenizers/fw_320.model": model, "tokenizers/fw_320.vocab": b"pieces\n"}
    files |= {"tokenizers/bytes.json": b"{}"}
    files |= {"datasets/fineweb10B_byte260/fineweb_val_000000.bin": shard(val)}
    return {f"datasets/{path}": content for path, content in files.items()}


@pytest.fixture
def hub(export: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, this process pointed at it, and all waiting between repeated requests shortened."""
    sleep = time.sleep
    # The client loses up to a chunk (10 MB) when it is cut off; these files are smaller.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with HubServer(dict(export)) as server:
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


def wanted(export: dict[str, bytes]) -> dict[str, bytes]:
    """What a whole fetch puts below the root, fetched.json aside."""
    return {
        path.removeprefix("datasets/"): content
        for path, content in export.items()
        if "byte" not in path and not path.endswith("manifest.json")
    }


def there(root: Path) -> dict[str, bytes]:
    """All that lies below the root but the record, the manifest and the lock."""
    other = ("fetched.json", "fetched.json.tmp", "manifest.json", "manifest.json.tmp", ".lock")
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name not in other
    }


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1, message
    return message


# ---- What arrives


def test_whole_through_faults_and_nothing_twice(
    hub: HubServer, export: dict, tmp_path: Path, capsys
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


def test_more_shards_and_fewer(hub: HubServer, export: dict, tmp_path: Path, capsys) -> None:
    assert get(tmp_path, train_shards=1) == 0
    hub.sent.clear()
    assert get(tmp_path, train_shards=3) == 0
    assert sorted(path[-10:] for path in hub.sent) == ["000001.bin", "000002.bin"]
    assert len(there(tmp_path)) == len(wanted(export)) - 1
    capsys.readouterr()
    assert get(tmp_path, train_shards=0) == 0
    assert "3 more shards" in capsys.readouterr().out


def test_canonical_split_is_recognised(hub: HubServer, tmp_path: Path, capsys, monkeypatch) -> None:
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
    hub: HubServer, export: dict, tmp_path: Path, monkeypatch
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
    hub: HubServer, export: dict, tmp_path: Path, capsys, name, count
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
    hub: HubServer, tmp_path: Path, capsys, monkeypatch
) -> None:
    assert get(tmp_path) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert get(tmp_path, "--verify", train_shards=None) == 0
    broken = tmp_path / FOLDER / "fineweb_train_000003.bin"
    flip(broken)
    capsys.readouterr()
    message = refused(capsys, get(tmp_path, "--verify", train_shards=None))
    assert "fineweb_train_000003.bin" in message and "http://127.0.0.1:9" in message
    assert not broken.exists(), "a file known to be broken is not left for training"


def test_verify_repairs_from_where_it_came(
    hub: HubServer, export: dict, tmp_path: Path, monkeypatch
) -> None:
    assert get(tmp_path) == 0
    flip(tmp_path / FOLDER / "fineweb_train_000003.bin")
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/body")
    assert get(tmp_path, "--verify", train_shards=None) == 0
    assert there(tmp_path) == wanted(export)


def test_files_put_there_by_hand(hub: HubServer, export: dict, tmp_path: Path, capsys) -> None:
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
    hub.files[changed] = shard(np.full(FULL, 7))
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
def test_mistakes_are_named(hub: HubServer, tmp_path: Path, capsys, case: str) -> None:
    options, expected = ERRORS[case]
    message = refused(capsys, get(tmp_path, *options))
    assert re.search(expected, message), message
    assert there(tmp_path) == {}


def test_no_network_no_repository(hub: HubServer, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/body")
    message = refused(capsys, get(tmp_path))
    assert "some/body" in message and "MATCHED_FINEWEB_REPO_ID" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refused(capsys, get(tmp_path))
    assert "some/body" in message and "http://127.0.0.1:9" in message and "again" in message
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
        "50,000 tokens, a shard by manifest.json 50,001",
    ),
}


@pytest.mark.parametrize("case", STALE)
def test_stale_manifest(hub: HubServer, export: dict, tmp_path: Path, capsys, case: str) -> None:
    change, expected = STALE[case]
    edit(hub, change)
    message = refused(capsys, get(tmp_path))
    assert expected in message and "--ignore-manifest" in message
    assert not [path for path in hub.sent if path.endswith(".bin")], (
        "nothing is fetched to find that out"
    )
    assert get(tmp_path, "--ignore-manifest") == 0
    assert there(tmp_path) == wanted(export)


def test_manifest_without_counts(hub: HubServer, export: dict, tmp_path: Path) -> None:
    edit(hub, lambda m: (m.pop("shard_size"), m["datasets"][0].pop("stats")))
    assert get(tmp_path) == 0
    assert there(tmp_path) == wanted(export)


def test_manifest_with_paths_of_another_machine(
    hub: HubServer, export: dict, tmp_path: Path
) -> None:
    elsewhere = {"model_path": "/home/me/fw_320.model", "vocab_path": "gone.vocab"}
    edit(hub, lambda m: m["tokenizers"][0].update(elsewhere))
    assert get(tmp_path) == 0
    assert there(tmp_path).keys() == wanted(export).keys() - {"tokenizers/fw_320.vocab"}


def test_repository_ahead_of_or_behind_the_manifest(hub: HubServer, tmp_path: Path, capsys) -> None:
    """Fewer train shards than the manifest lists do, as long as those asked for are there."""
    del hub.files[f"datasets/{FOLDER}/fineweb_train_000003.bin"]
    assert "has 3 of sp320" in refused(capsys, get(tmp_path))
    assert get(tmp_path, train_shards=3) == 0


BAD = {
    "ids": (shard(np.full(FULL, VOCAB)), f"token {VOCAB}.*{VOCAB} pieces"),
    "header": (b"\1" + shard(np.full(FULL, 5))[1:], "not a token shard"),
    "count": (shard(np.full(FULL, 5))[:8] + b"\1" + shard(np.full(FULL, 5))[9:], "header says"),
    "empty": (b"", "0 bytes"),
    "cut": (shard(np.full(FULL, 5))[:-2], "49,999 tokens, a shard by manifest"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_export_never_gets_its_name(
    hub: HubServer, tmp_path: Path, capsys, case: str
) -> None:
    """The hub's own digest fits: what is damaged was uploaded so."""
    content, expected = BAD[case]
    hub.files[f"datasets/{FOLDER}/fineweb_train_000001.bin"] = content
    message = refused(capsys, get(tmp_path))
    assert re.search(expected, message) and "fineweb_train_000001.bin" in message
    assert not [path for path in there(tmp_path) if "train_000001" in path or "incoming" in path]


@pytest.mark.parametrize("fault", ["flip", "size", "503"])
def test_fault_that_does_not_pass(
    hub: HubServer, export: dict, tmp_path: Path, capsys, fault: str
) -> None:
    hub.faults = {"train_000001.bin": [fault] * 200}
    message = refused(capsys, get(tmp_path))
    assert "fineweb_train_000001.bin" in message
    assert not [path for path in there(tmp_path) if "train_000001" in path or "incoming" in path]
    hub.faults.clear()
    assert get(tmp_path) == 0
    assert there(tmp_path) == wanted(export)


def test_no_space_is_known_before_anything_is_fetched(
    hub: HubServer, tmp_path: Path, capsys
) -> None:
    hub.listed_sizes[f"datasets/{FOLDER}/fineweb_train_000001.bin"] = 10**18
    message = refused(capsys, get(tmp_path, "--ignore-manifest"))
    assert "no space" in message and "--root" in message and "1,000,000,000," in message
    assert not [path for path in hub.sent if path.endswith(".bin")]


def test_root_that_cannot_be_written(hub: HubServer, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(capsys, get(tmp_path / "file"))


# ---- Processes: a server that imports once makes runs cheap to start and to kill


def child(root: Path, url: str, limit: int | None = None) -> None:
    os.environ.update(environment(url))
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.dup2(os.open(root / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    hub_module.PAUSES = (0.01,)
    sys.exit(get(root))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_fineweb"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def test_disk_that_fills_up(hub: HubServer, tmp_path: Path, processes) -> None:
    process = processes.Process(target=child, args=(tmp_path, hub.url, FULL))
    process.start()
    process.join()
    message = (tmp_path / "stderr").read_text()
    assert process.exitcode == 2 and message.count("\n") == 1
    assert "No space" in message and "--root" in message
    assert not [path for path in there(tmp_path) if re.search("train_00000[012]|incoming", path)]


def test_second_run_waits_its_turn(hub: HubServer, tmp_path: Path, capsys, processes) -> None:
    with fineweb.alone(tmp_path):
        process = processes.Process(target=child, args=(tmp_path, hub.url))
        process.start()
        process.join()
    assert process.exitcode == 2 and "another fineweb.py" in (tmp_path / "stderr").read_text()


def test_killed_at_any_point(hub: HubServer, export: dict, tmp_path: Path, processes) -> None:
    """Twenty runs, killed with -9 at random points: what has a shard's name is that shard, whole."""
    rng, files, killed, partial = random.Random(0), wanted(export), 0, 0
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    hub.pause = 0.01
    for i in range(20):
        for path in [path for path in there(tmp_path) if rng.random() < 0.6]:
            (tmp_path / path).unlink()
        process = processes.Process(target=child, args=(tmp_path, hub.url))
        process.start()
        while i % 2 and process.is_alive() and not any(tmp_path.glob("datasets/*/.incoming/*")):
            process.join(0.005)  # every other run is sure to be met in the middle
        process.join(rng.uniform(0.0, 0.5))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        found = there(tmp_path)
        partial += any("incoming" in path for path in found)
        for path in found.keys() & files.keys():
            assert hashlib.sha256(found[path]).hexdigest() == digests[path], path
        unknown = [
            path for path in found.keys() - files.keys() - {"stderr"} if ".incoming/" not in path
        ]
        assert unknown == []
    assert killed >= 10 and partial >= 5, (killed, partial)
    hub.pause = 0.0
    assert get(tmp_path) == 0
    (tmp_path / "stderr").unlink(
        missing_ok=True
    )  # gone if the last run was killed before it began to write
    assert there(tmp_path) == files
