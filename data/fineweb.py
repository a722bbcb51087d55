"""Fetches the published FineWeb export; a file appears under its name only after it was checked.

    python data/fineweb.py                                    # sp1024: validation, 80 train shards, tokenizer
    python data/fineweb.py --variant sp8192 --train-shards 10
    python data/fineweb.py --verify                           # read what is there again, mend what is broken

A run goes on where the last one stopped, file by file; one that has nothing left to do transfers nothing.
Every file must have the size and the digest that the hub lists for it, every shard a header that fits and
ids below the vocabulary, and the sizes must give the token counts of the export's manifest.

MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name a copy of the export; HF_ENDPOINT,
HF_TOKEN and the other variables of huggingface_hub act as usual. Exit codes: 0; 2 with one line for what the
user can mend.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

BOS = 1
CHUNK = 1 << 22  # tokens looked at together
STAGING = ".incoming"  # beside the destination: a rename only is atomic within a file system
PAUSES = (1, 2, 4)  # seconds before a request is repeated, on top of what the client repeats itself
READERS = 8  # threads that check files
ARRIVALS = 3  # times a file may arrive with wrong content
# PR 1289 decodes 151,073,604 bytes, PR 1804 counts 151,080,891: tokenizers fold text a little differently.
CANONICAL_DOCUMENTS, CANONICAL_BYTES, CANONICAL_SPREAD = 50_000, 151_080_891, 30_000


class File(NamedTuple):
    """One file of the export as the hub lists it."""

    local: str  # path below the root
    repo: str
    revision: str  # commit
    remote: str  # path in the repository
    size: int  # bytes
    digest: str  # "sha256:<hex>", or "git:<hex>" (a blob's SHA-1) where the hub keeps no SHA-256

    @property
    def tokens(self) -> int:
        return (self.size - 4 * tg.SHARD_HEADER_INTS) // 2


# ---- 1. The hub ------------------------------------------------------------------------------------------


def patient(what: str, call: Callable[[], Any]) -> Any:
    """call(), repeated while its failures look passing; else InputError, which says what to do."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except (
            OSError,
            HTTPError,
            json.JSONDecodeError,
        ) as error:  # requests and httpx share no other base
            status = getattr(getattr(error, "response", None), "status_code", 503)
            local = getattr(error, "errno", None) in (*FULL, errno.EACCES, errno.EPERM, errno.EROFS)
            if pause is None or local or (400 <= status < 500 and status not in (408, 429)):
                raise tg.InputError(f"{what}: {explain(error)}") from error
        time.sleep(pause)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: Exception) -> str:
    """One line on a failure and what to do about it."""
    reason = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    if isinstance(error, RepositoryNotFoundError):
        return "no such dataset, or a private one: check MATCHED_FINEWEB_REPO_ID, set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision: check --revision"
    if getattr(error, "errno", None) in FULL:
        return f"{reason}. No space: free some, or give --root another disk; whole files are kept"
    return (
        f"{reason}. Check the network (server: {endpoint()}; HF_ENDPOINT names another) and run this "
        "again: whole files are kept"
    )


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT)


class Hub:
    """A commit of a dataset repository, and the files below its `prefix`."""

    def __init__(self, repo: str, prefix: str, revision: str) -> None:
        self.repo, self.prefix, api = repo, prefix.strip("/"), HfApi(endpoint())
        what = f"dataset {repo} at {revision}"
        info = patient(what, lambda: api.dataset_info(repo, revision=revision, timeout=30))
        self.revision = info.sha
        entries = patient(
            what,
            lambda: list(
                api.list_repo_tree(
                    repo,
                    self.prefix or None,
                    recursive=True,
                    revision=self.revision,
                    repo_type="dataset",
                )
            ),
        )
        self.entries = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def path(self, name: str) -> str:
        return f"{self.prefix}/{name}".lstrip("/")

    def file(self, name: str, folder: str) -> File:
        """The file `name` below the prefix, to be kept in `folder` below the root."""
        if (entry := self.entries.get(self.path(name))) is None:
            raise tg.InputError(f"{self.repo} has no {self.path(name)} at {self.revision}")
        digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        local = f"{folder}/{Path(name).name}"
        return File(local, self.repo, self.revision, entry.path, entry.size, digest)


# ---- 2. What to fetch ------------------------------------------------------------------------------------
# Assumed of manifest.json, which upstream's exporter writes: `datasets`, each with `name`, `tokenizer_name`
# and `stats` (files_train, tokens_train, files_val, tokens_val); `tokenizers`, each with `name` and paths
# under `model_path`, `vocab_path` or `path`, below the prefix or anywhere if the file lies in `tokenizers/`;
# `shard_size`, the tokens of every shard but a split's last. Counts that are absent are not compared; the
# repository's listing says which files exist, and only the .model has to.

PREFIX = "fineweb10B_"  # of the data sets' names, in front of the variant
TOKENIZER_PATHS = ("model_path", "vocab_path", "path")


def choose(hub: Hub, manifest: dict[str, Any], variant: str) -> tuple[dict[str, Any], list[File]]:
    """The manifest's entry of a variant and its tokenizer's files; InputError says which variants exist."""
    named = {str(entry.get("name")): entry for entry in manifest.get("datasets", [])}
    there = [
        name for name in named if hub.path(f"datasets/{name}/fineweb_val_000000.bin") in hub.entries
    ]
    exist = f"{hub.repo} has {', '.join(name.removeprefix(PREFIX) for name in there) or 'none'}"
    if (dataset := named.get(PREFIX + variant)) is None:
        raise tg.InputError(f"--variant {variant} is not in manifest.json: {exist}")
    if dataset["name"] not in there:
        raise tg.InputError(f"--variant {variant} is in manifest.json but has no shards: {exist}")
    wanted = dataset.get("tokenizer_name")
    entries = [entry for entry in manifest.get("tokenizers", []) if entry.get("name") == wanted]
    paths = [Path(entry[key]) for entry in entries[:1] for key in TOKENIZER_PATHS if entry.get(key)]
    paths = [
        path if hub.path(str(path)) in hub.entries else Path("tokenizers") / path.name
        for path in paths
    ]
    if not any(path.suffix == ".model" for path in paths):
        raise tg.InputError(
            f"--variant {variant}: manifest.json names no SentencePiece model for its "
            f"tokenizer {wanted}, and train_gpt.py scores with one; {exist}"
        )
    return dataset, [
        hub.file(str(path), "tokenizers")
        for path in dict.fromkeys(paths)
        if path.suffix == ".model" or hub.path(str(path)) in hub.entries
    ]


def listed(hub: Hub, name: str, split: str) -> list[File]:
    """The shards of a split, in order and without a gap."""
    folder = f"datasets/{name}"
    pattern = re.compile(re.escape(hub.path(f"{folder}/fineweb_{split}_")) + r"\d{6}\.bin")
    count = sum(1 for path in hub.entries if pattern.fullmatch(path))
    return [hub.file(f"{folder}/fineweb_{split}_{i:06}.bin", folder) for i in range(count)]


def contradictions(
    manifest: dict[str, Any], dataset: dict[str, Any], shards: list[File], asked: int
) -> Iterator[str]:
    """Where the manifest's counts and the sizes of a split's shards, or of the first `asked`, disagree."""
    split = "val" if "_val_" in shards[0].local else "train"
    stats, full = dataset.get("stats") or {}, manifest.get("shard_size")
    files, tokens = stats.get(f"files_{split}"), stats.get(f"tokens_{split}")
    total = sum(file.tokens for file in shards)
    for file in shards[:asked]:
        if file.tokens < 1 or file.size % 2:
            yield f"{file.remote} has {file.size} bytes, which no shard has"
        elif full and (file.tokens > full or (file != shards[-1] and file.tokens < full)):
            yield f"{file.remote} has {file.tokens:,} tokens, a shard by manifest.json {full:,}"
    if files not in (None, len(shards)):
        if split == "val" or files < asked:
            yield f"manifest.json lists {files} {split} shards, the repository holds {len(shards)}"
    elif tokens not in (None, total):
        yield f"manifest.json lists {tokens:,} {split} tokens, the shards have {total:,}"


def plan(hub: Hub, manifest: dict[str, Any], args: argparse.Namespace) -> list[File]:
    """The tokenizer's files, the validation shards and the train shards asked for."""
    dataset, tokenizer = choose(hub, manifest, args.variant)
    train, val = listed(hub, dataset["name"], "train"), listed(hub, dataset["name"], "val")
    count = DEFAULT_SHARDS if args.train_shards is None else args.train_shards
    if count > len(train):
        raise tg.InputError(
            f"--train-shards {count}: {hub.repo} has {len(train)} of {args.variant}; "
            f"--train-shards {len(train)} takes them all"
        )
    problems = [
        *contradictions(manifest, dataset, val, len(val)),
        *(contradictions(manifest, dataset, train, count) if count else ()),
    ]
    if problems and not args.ignore_manifest:
        raise tg.InputError(
            f"{args.variant}: {problems[0]} (contradictions: {len(problems)}). The manifest is stale or the "
            "export damaged: try --revision with an earlier commit; --ignore-manifest does without counts"
        )
    return tokenizer + val + train[:count]


# ---- 3. Files and their record ---------------------------------------------------------------------------


def digest(path: Path, kind: str) -> str:
    """Hex digest of a file: its SHA-256, or for "git" the SHA-1 of the blob it would be in git."""
    start = (
        hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: start).hexdigest()


def check(path: Path, file: File, vocab_size: int) -> None:
    """InputError unless `path` has the content of `file` and, if a .bin, is a shard of the vocabulary."""
    if (size := path.stat().st_size) != file.size:
        raise tg.InputError(f"{path.name} has {size} bytes, the hub lists {file.size}")
    if path.suffix == ".bin":
        tokens = tg.open_shard(path)
        largest = max(int(tokens[i : i + CHUNK].max()) for i in range(0, len(tokens), CHUNK))
        if largest >= vocab_size:
            raise tg.InputError(
                f"{path.name} holds token {largest}, the tokenizer has {vocab_size} pieces"
            )
    kind, expected = file.digest.split(":")
    if (found := digest(path, kind)) != expected:
        raise tg.InputError(f"{path.name} has {kind} {found}, the hub lists {expected}")


class Store:
    """The files below a root, and fetched.json beside the shards: what is asked for, when it was checked.

    A file whose time of change is that of its last check is not read again, unless `reread`.
    """

    def __init__(self, root: Path, name: str, reread: bool) -> None:
        self.root, self.reread, self.path = root, reread, root / f"datasets/{name}/fetched.json"
        self.files: dict[str, File] = {}
        self.checked: dict[str, int | None] = {}  # st_mtime_ns of local files
        self.transferred = 0  # bytes
        if self.path.exists():
            for entry in json.loads(self.path.read_text()):
                self.checked[entry["local"]] = entry.pop("mtime_ns")
                self.files[entry["local"]] = File(**entry)

    def expect(self, files: list[File]) -> None:
        """Records that these files are asked for, and forgets checks against another content."""
        for file in files:
            if self.files.get(file.local, file).digest != file.digest:
                self.checked[file.local] = None
            self.files[file.local] = file
        self.save()

    def mark(self, file: File) -> None:
        """Records that a file is there and right."""
        self.checked[file.local] = (self.root / file.local).stat().st_mtime_ns
        if file.local in self.files:  # the manifest is not
            self.save()

    def save(self) -> None:
        entries = [
            file._asdict() | {"mtime_ns": self.checked.get(local)}
            for local, file in sorted(self.files.items())
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tg.write_atomically(self.path, json.dumps(entries, indent=1).encode())

    def missing(self, files: list[File], vocab_size: int) -> list[File]:
        """Those of `files` that are not there; what is there but wrong is removed, and said."""
        there = [file for file in files if (self.root / file.local).exists()]
        unread = [
            file
            for file in there
            if self.reread
            or self.checked.get(file.local) != (self.root / file.local).stat().st_mtime_ns
        ]

        def verdict(file: File) -> str:
            try:
                check(self.root / file.local, file, vocab_size)
            except tg.InputError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(READERS) as pool:
            for file, wrong in zip(unread, pool.map(verdict, unread), strict=True):
                if wrong:
                    print(f"broken  {wrong}: removed", flush=True)
                    (self.root / file.local).unlink()
                else:
                    self.mark(file)
        return [file for file in files if not (self.root / file.local).exists()]

    def obtain(self, files: list[File], vocab_size: int, jobs: int = 1) -> None:
        """Makes all `files` be there and right."""
        missing = self.missing(files, vocab_size)
        for folder in {(self.root / file.local).parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a run that was killed
        needed, free = sum(file.size for file in missing), shutil.disk_usage(self.root).free
        if needed > free:
            raise tg.InputError(
                f"no space: {len(missing)} files take {needed:,} bytes, {self.root} has "
                f"{free:,} free; ask for fewer --train-shards, or give --root another disk"
            )
        try:
            self.fetch_all(missing, vocab_size, jobs)
        finally:
            for folder in {(self.root / file.local).parent for file in files}:
                shutil.rmtree(folder / STAGING, ignore_errors=True)

    def fetch_all(self, files: list[File], vocab_size: int, jobs: int) -> None:
        """Fetches in parallel, with a bar that shows what has arrived, files in transit included."""
        pool, start = ThreadPoolExecutor(jobs), self.transferred
        todo: set[Future[File]] = {pool.submit(self.fetch, file, vocab_size) for file in files}
        total = sum(file.size for file in files)
        try:
            with tqdm(
                total=total, unit="B", unit_scale=True, disable=None if total > 1e6 else True
            ) as bar:
                while todo:
                    done, todo = wait(todo, timeout=0.5, return_when=FIRST_COMPLETED)
                    for file in (future.result() for future in done):
                        self.mark(file)
                        self.transferred += file.size
                    bar.n = min(total, self.transferred - start + self.in_transit())
                    bar.refresh()
        finally:
            interrupted = isinstance(sys.exception(), KeyboardInterrupt)
            pool.shutdown(wait=not interrupted, cancel_futures=True)

    def in_transit(self) -> int:
        """Bytes that have arrived of files that are not whole; fewer, if one goes while it looks."""
        size = 0
        with contextlib.suppress(FileNotFoundError):
            for path in self.root.glob(f"*/*/{STAGING}/**/*.incomplete"):
                size += path.stat().st_size
        return size

    def fetch(self, file: File, vocab_size: int) -> File:
        """Downloads one file beside its destination, checks it there and renames it."""
        target = self.root / file.local
        staging = target.parent / STAGING / target.name

        def download() -> Path:
            shutil.rmtree(staging, ignore_errors=True)
            return Path(
                hf_hub_download(
                    file.repo,
                    file.remote,
                    repo_type="dataset",
                    revision=file.revision,
                    local_dir=staging,
                    endpoint=endpoint(),
                )
            )

        for _ in range(ARRIVALS):
            arrived = patient(file.remote, download)
            try:
                check(arrived, file, vocab_size)
            except tg.InputError as error:
                wrong = error
                continue
            with open(arrived, "rb") as content:
                os.fsync(content.fileno())
            os.replace(arrived, target)
            return file
        raise tg.InputError(f"{file.remote} arrived wrong {ARRIVALS} times: {wrong}")


# ---- 4. The run ------------------------------------------------------------------------------------------

DEFAULT_SHARDS = 80  # of 10^8 tokens: what the published runs trained on


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Two runs into one root would remove each other's files in transit."""
    (root / "datasets").mkdir(parents=True, exist_ok=True)
    with open(root / "datasets/.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise tg.InputError(f"another fineweb.py is at work in {root}: wait for it") from None
        yield


def census(paths: Iterable[Path], model: Path, vocab_size: int) -> tuple[int, int, int]:
    """Tokens, documents and bytes of text of shards that follow each other."""
    counter, previous = tg.ByteCounter.from_sentencepiece(model, vocab_size), torch.tensor([BOS])
    tokens = documents = size = 0
    for shard in map(tg.open_shard, paths):
        for start in range(0, len(shard), CHUNK):
            ids = torch.from_numpy(shard[start : start + CHUNK].astype(np.int64))
            size += int(counter.count(torch.cat([previous, ids[:-1]]), ids).sum())
            tokens, documents, previous = (
                tokens + len(ids),
                documents + int((ids == BOS).sum()),
                ids[-1:],
            )
    return tokens, documents, size


def summary(store: Store, shards: list[File], model: Path, vocab_size: int, seconds: float) -> None:
    """What is there, whether validation is the split that scores are published on, how to train."""
    folder = (store.root / shards[0].local).parent
    train = [file for file in shards if "fineweb_train_" in file.local]
    val = [file for file in shards if "fineweb_val_" in file.local]
    tokens, documents, size = census((store.root / file.local for file in val), model, vocab_size)
    canonical = documents == CANONICAL_DOCUMENTS and abs(size - CANONICAL_BYTES) <= CANONICAL_SPREAD
    others = {path.name for path in folder.glob("fineweb_*.bin")} - {
        Path(file.local).name for file in shards
    }
    print(
        f"train   {len(train)} shards, {sum(f.tokens for f in train):,} tokens, "
        f"{sum(f.size for f in train):,} bytes on disk\n"
        f"val     {len(val)} shards, {tokens:,} tokens, {sum(f.size for f in val):,} bytes on disk\n"
        f"text    {documents:,} validation documents, {size:,} bytes: "
        + (
            "the canonical split"
            if canonical
            else f"NOT the canonical split ({CANONICAL_DOCUMENTS:,} documents, {CANONICAL_BYTES / 1e6:.2f} MB); "
            "a val_bpb on it compares with no published one"
        )
    )
    if others:
        print(
            f"others  {len(others)} more shards, not asked for and not checked; training reads them too"
        )
    print(
        f"took    {seconds:.1f} s, {store.transferred:,} bytes transferred\n"
        f"next    DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE={vocab_size} \\\n"
        "            torchrun --standalone --nproc_per_node=8 train_gpt.py"
    )


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
    store = Store(args.root, PREFIX + args.variant, args.verify)
    if (
        args.verify and args.train_shards is None and store.files
    ):  # the record says it all: no network needed
        files = list(store.files.values())
    else:
        hub = Hub(repo, prefix, args.revision)
        index = hub.file("manifest.json", "datasets")
        store.obtain([index], 0)
        files = plan(hub, json.loads((args.root / index.local).read_text()), args)
        store.expect(files)
    shards = [file for file in files if file.local.endswith(".bin")]
    tokenizer = [file for file in files if file not in shards]
    store.obtain(tokenizer, 0)
    model = next(args.root / file.local for file in tokenizer if file.local.endswith(".model"))
    vocab_size = spm.SentencePieceProcessor(model_file=str(model)).vocab_size()
    store.obtain(shards, vocab_size, args.jobs)
    summary(store, shards, model, vocab_size, time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variant", default="sp1024", help="sp1024, sp4096, sp8192, … (default: sp1024)"
    )
    parser.add_argument(
        "--train-shards", type=int, metavar="N", help=f"{DEFAULT_SHARDS}, 200 MB each"
    )
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parent, help="where files go"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every file again, replace broken ones"
    )
    parser.add_argument("--revision", default="main", help="branch or commit of the export")
    parser.add_argument(
        "--ignore-manifest", action="store_true", help="go on when its counts do not fit"
    )
    parser.add_argument("--jobs", type=int, default=8, help="files fetched at a time")
    args = parser.parse_args(argv)
    if args.jobs < 1 or (args.train_shards or 0) < 0:
        parser.error("--jobs is at least 1, --train-shards at least 0")
    disable_progress_bars()
    logging.set_verbosity_error()  # it warns about every request that it repeats
    try:
        with alone(args.root):
            run(args)
    except (
        tg.InputError,
        OSError,
    ) as error:  # the second is of the disk: the network's become the first
        print(f"fineweb.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fineweb.py: interrupted; run it again to go on", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # threads that wait for the network would keep the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
