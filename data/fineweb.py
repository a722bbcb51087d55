"""Fetches the published FineWeb export; a file appears under its name only after it was checked.

    python data/fineweb.py                              # sp1024: validation, 80 train shards
    python data/fineweb.py --variant sp8192 --train-shards 10
    python data/fineweb.py --verify                     # read it all again, mend what is broken

A run goes on where the last one stopped, file by file; one that has nothing left to do transfers
nothing. Every file must have the size and the digest that the hub lists for it, every shard a
header that fits and ids below the vocabulary, and the sizes must give the token counts of the
export's manifest. What was found right is written into manifest.json beside the shards.

MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name a copy of the export;
HF_ENDPOINT, HF_TOKEN and the other variables of huggingface_hub act as usual. Exit codes: 0; 2 with
one line for what the user can mend; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for whoever imports this by its path
import packages

try:
    import numpy as np
    import shards
    from hub import NO_SPACE, NO_WRITING, File, Hub, endpoint, patient
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, logging
    from shards import BOS, InputError, say
    from tqdm import tqdm

    MISSING = ""
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    MISSING = str(error.name)  # which is told once --help has had its chance

T = TypeVar("T")

CHUNK = 1 << 22  # tokens looked at together
STAGING = ".incoming"  # beside the destination: a rename only is atomic within a file system
READERS = 8  # threads that check files
ARRIVALS = 3  # times a file may arrive with wrong content
DEFAULT_SHARDS = 80  # of 10^8 tokens: what most published runs trained on
# PR 1289 decodes 151,073,604 bytes, PR 1804 counts 151,080,891: tokenizers fold text a little
# differently.
CANONICAL_DOCUMENTS, CANONICAL_BYTES, CANONICAL_SPREAD = 50_000, 151_080_891, 30_000
DEFAULT_REPO = "willdepueoai/parameter-golf"
# The export of these vocabularies that published runs trained on (PR 1287 names it) is a copy.
REPOS = {
    "sp1024": DEFAULT_REPO,
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}


class Options(NamedTuple):
    """The command line."""

    variant: str
    train_shards: int | None  # None: DEFAULT_SHARDS, or with --verify what the record says
    root: Path
    verify: bool
    revision: str
    ignore_manifest: bool
    jobs: int


# ---- 1. What to fetch --------------------------------------------------------------------------
# Assumed of manifest.json, which upstream's exporter writes: `datasets`, each with `name`,
# `tokenizer_name` and `stats` (files_train, tokens_train, files_val, tokens_val); `tokenizers`,
# each with `name` and paths under `model_path`, `vocab_path` or `path`, below the prefix or
# anywhere if the file lies in `tokenizers/`; `shard_size`, the tokens of every shard but a split's
# last. Counts that are absent are not compared; the repository's listing says which files exist,
# and only the .model has to.

PREFIX = "fineweb10B_"  # of the data sets' names, in front of the variant
TOKENIZER_PATHS = ("model_path", "vocab_path", "path")
COUNTS = ("files_train", "tokens_train", "files_val", "tokens_val")


class Dataset(NamedTuple):
    """What the export's manifest says of a variant."""

    name: str
    tokenizer: str
    counts: dict[str, int]  # those of COUNTS that it gives


class Index(NamedTuple):
    """What the export's manifest says, as far as it matters here."""

    datasets: dict[str, Dataset]
    tokenizers: dict[str, list[Path]]  # files by name, as the exporter had them
    shard_size: int | None


class Reader:
    """Takes a JSON value apart; InputError says where it is not as expected."""

    def __init__(self, source: str) -> None:
        self.source = source

    def take(self, holder: Any, key: str, kind: type[T], default: T | None = None) -> T:
        """holder[key], if it is of the kind; `default` if it is absent or null."""
        if not isinstance(holder, dict):
            raise InputError(f"{self.source}: {str(holder)[:40]!r} is no object with {key!r}")
        value = holder.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{self.source}: {key!r} is {str(value)[:40]!r}, no {kind.__name__}")
        return value


def parse_json(text: bytes, source: str) -> Any:
    """A JSON value; InputError if the text is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is no JSON ({error})") from None


def read_index(text: bytes, source: str) -> Index:
    """The export's manifest; InputError if it is of another kind."""
    top, read = parse_json(text, source), Reader(source)
    datasets, tokenizers = {}, {}
    for entry in read.take(top, "datasets", list, []):
        name = read.take(entry, "name", str, "")
        stats = read.take(entry, "stats", dict, {})
        counts = {key: read.take(stats, key, int) for key in COUNTS if stats.get(key) is not None}
        datasets[name] = Dataset(name, read.take(entry, "tokenizer_name", str, ""), counts)
    for entry in read.take(top, "tokenizers", list, []):
        paths = [read.take(entry, key, str, "") for key in TOKENIZER_PATHS]
        tokenizers[read.take(entry, "name", str, "")] = [Path(path) for path in paths if path]
    return Index(datasets, tokenizers, read.take(top, "shard_size", int, 0) or None)


def choose(hub: Hub, index: Index, variant: str) -> tuple[Dataset, list[File]]:
    """A variant and its tokenizer's files; InputError says which variants exist."""
    there = [
        name.removeprefix(PREFIX)
        for name in index.datasets
        if hub.has(f"datasets/{name}/{shards.shard_name('val', 0)}")
    ]
    exist = f"{hub.repo} has {', '.join(there) or 'none'}"
    dataset = index.datasets.get(PREFIX + variant)
    if dataset is None:
        raise InputError(f"--variant {variant} is not in manifest.json: {exist}")
    if variant not in there:
        raise InputError(f"--variant {variant} is in manifest.json but has no shards: {exist}")
    paths = [
        path if hub.has(str(path)) else Path("tokenizers") / path.name
        for path in index.tokenizers.get(dataset.tokenizer, [])
    ]
    if not any(path.suffix == ".model" for path in paths):
        raise InputError(
            f"--variant {variant}: manifest.json names no SentencePiece model for its tokenizer "
            f"{dataset.tokenizer}, and train_gpt.py scores with one; {exist}"
        )
    return dataset, [
        hub.file(str(path), "tokenizers")
        for path in dict.fromkeys(paths)
        if path.suffix == ".model" or hub.has(str(path))
    ]


def listed(hub: Hub, name: str, split: str) -> list[File]:
    """The shards of a split, in order; InputError for a gap. Other names are said and left."""
    folder = f"datasets/{name}"
    start = hub.path(f"{folder}/fineweb_{split}_")
    names = [Path(path).name for path in hub.entries if path.startswith(start)]
    count = sum(1 for name in names if shards.SHARD_NAME.fullmatch(name))
    for other in names:
        if not shards.SHARD_NAME.fullmatch(other):
            say(f"ignored {hub.repo} also has {folder}/{other}, which is no shard's name")
    return [hub.file(f"{folder}/{shards.shard_name(split, i)}", folder) for i in range(count)]


def contradictions(index: Index, dataset: Dataset, files: list[File], asked: int) -> Iterator[str]:
    """Where the manifest's counts contradict a split's shards, or sizes of the first `asked`."""
    split, full = "val" if files[0].is_of("val") else "train", index.shard_size
    count, tokens = dataset.counts.get(f"files_{split}"), dataset.counts.get(f"tokens_{split}")
    total = sum(file.tokens for file in files)
    for file in files[:asked]:
        if file.tokens < 1 or file.size % 2:
            yield f"{file.remote} has {file.size} bytes, which no shard has"
        elif full and (file.tokens > full or (file != files[-1] and file.tokens < full)):
            yield f"{file.remote} has {file.tokens:,} tokens, a shard by manifest.json {full:,}"
    if count is not None and count != len(files):
        if split == "val" or count < asked:
            yield f"manifest.json lists {count} {split} shards, the repository holds {len(files)}"
    elif tokens is not None and tokens != total:
        yield f"manifest.json lists {tokens:,} {split} tokens, the shards have {total:,}"


def plan(hub: Hub, index: Index, options: Options) -> list[File]:
    """The tokenizer's files, the validation shards and the train shards asked for."""
    dataset, tokenizer = choose(hub, index, options.variant)
    train, val = (listed(hub, dataset.name, split) for split in shards.SPLITS)
    count = DEFAULT_SHARDS if options.train_shards is None else options.train_shards
    if count > len(train):
        raise InputError(
            f"--train-shards {count}: {hub.repo} has {len(train)} of {options.variant}; "
            f"--train-shards {len(train)} takes them all"
        )
    problems = list(contradictions(index, dataset, val, len(val)))
    if count:
        problems += contradictions(index, dataset, train, count)
    if problems and not options.ignore_manifest:
        raise InputError(
            f"{options.variant}: {problems[0]} (contradictions: {len(problems)}). The manifest is "
            "stale or the export damaged: try --revision with an earlier commit; --ignore-manifest "
            "does without counts"
        )
    return tokenizer + val + train[:count]


# ---- 2. Files and their record -----------------------------------------------------------------


def digest(path: Path, kind: str) -> str:
    """Hex digest of a file: its SHA-256, or for "git" the SHA-1 of the blob it would be in git."""
    if kind == "sha256":
        return shards.sha256(path)
    start = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: start).hexdigest()


def check(path: Path, file: File, vocab_size: int) -> None:
    """InputError unless `path` has the content of `file`, and a shard ids of the vocabulary."""
    size = path.stat().st_size
    if size != file.size:
        raise InputError(f"{path.name} has {size} bytes, the hub lists {file.size}")
    if path.suffix == ".bin":
        tokens = shards.open_shard(path)
        largest = max(int(tokens[i : i + CHUNK].max()) for i in range(0, len(tokens), CHUNK))
        if largest >= vocab_size:
            raise InputError(
                f"{path.name} holds token {largest}, the tokenizer has {vocab_size} pieces"
            )
    kind, expected = file.digest.split(":")
    found = digest(path, kind)
    if found != expected:
        raise InputError(f"{path.name} has {kind} {found}, the hub lists {expected}")


class Checked(NamedTuple):
    """A file that is asked for, and when its content was last found right."""

    file: File
    mtime_ns: int | None  # time of change that the local file had then; None: it was not


def read_record(path: Path, name: str) -> dict[str, Checked]:
    """fetched.json by local path; InputError if this tool cannot have written it.

    Local paths are kept to the folders of the data set `name`: what is found broken is removed.
    """
    read, record = Reader(str(path)), {}
    entries = parse_json(path.read_bytes(), str(path))
    if not isinstance(entries, list):
        raise InputError(f"{path} is no list")
    own = re.compile(rf"(datasets/{re.escape(name)}|tokenizers)/[^/]+")
    for entry in entries:
        file = File(
            local=read.take(entry, "local", str),
            repo=read.take(entry, "repo", str),
            revision=read.take(entry, "revision", str),
            remote=read.take(entry, "remote", str),
            size=read.take(entry, "size", int),
            digest=read.take(entry, "digest", str),
        )
        if not own.fullmatch(file.local) or file.name in (".", ".."):
            raise InputError(f"{path}: {file.local!r} is no file of {name}")
        if not re.fullmatch(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", file.digest):
            raise InputError(f"{path}: {file.digest!r} is no digest")
        mtime_ns = read.take(entry, "mtime_ns", int, -1)
        record[file.local] = Checked(file, None if mtime_ns < 0 else mtime_ns)
    return record


class Tokenizer(NamedTuple):
    """The tokenizer of a variant."""

    model: Path
    vocab_size: int
    table: shards.ByteTable


class Store:
    """The files below a root, and fetched.json: what is asked for, and when it was checked.

    A file whose time of change is that of its last check is not read again, unless `reread`.
    """

    def __init__(self, root: Path, name: str, reread: bool) -> None:
        self.root, self.reread, self.folder = root, reread, root / "datasets" / name
        self.path = self.folder / "fetched.json"
        self.record: dict[str, Checked] = {}
        self.tokenizer: Tokenizer | None = None
        self.transferred = 0  # bytes
        if self.path.exists():
            try:
                self.record = read_record(self.path, name)
            except InputError as error:
                say(f"record  {error}: it is made anew, and all files are checked again")

    def files(self) -> list[File]:
        """All that was ever asked for."""
        return [checked.file for checked in self.record.values()]

    def expect(self, files: list[File]) -> None:
        """Records that these files are asked for, and forgets checks against another content."""
        for file in files:
            known = self.record.get(file.local)
            same = known is not None and known.file.digest == file.digest
            self.record[file.local] = Checked(file, known.mtime_ns if known and same else None)
        self.save()

    def mark(self, file: File) -> None:
        """Records that a file is there and right."""
        if file.local in self.record:  # the export's manifest is not
            mtime_ns = (self.root / file.local).stat().st_mtime_ns
            self.record[file.local] = Checked(file, mtime_ns)
            self.save()

    def is_checked(self, file: File) -> bool:
        """Whether the file there is the one that was last found right."""
        checked, path = self.record.get(file.local), self.root / file.local
        return checked is not None and path.exists() and checked.mtime_ns == path.stat().st_mtime_ns

    def save(self) -> None:
        """Writes fetched.json, and manifest.json of what was found right."""
        entries = [
            checked.file._asdict() | {"mtime_ns": checked.mtime_ns}
            for _, checked in sorted(self.record.items())
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        shards.write_atomically(self.path, json.dumps(entries, indent=1).encode())
        if self.tokenizer is not None:
            model, vocab_size = self.tokenizer.model, self.tokenizer.vocab_size
            entry = shards.tokenizer_entry(model, self.folder, vocab_size)
            shards.write_manifest(self.folder, entry, self.splits())

    def splits(self) -> dict[str, Any]:
        """The manifest's entries of both splits: the shards that are there and were found right."""
        right = [file for file in sorted(self.files()) if self.is_checked(file)]
        entries = {}
        for split in shards.SPLITS:
            files: dict[str, dict[str, Any]] = {}
            for file in right:
                if file.is_of(split):
                    kind, expected = file.digest.split(":")
                    if kind != "sha256":
                        expected = shards.sha256(self.root / file.local)
                    files[file.name] = dict(tokens=file.tokens, sha256=expected)
            entries[split] = shards.split_entry(files)
        return entries

    def missing(self, files: list[File], vocab_size: int) -> list[File]:
        """Those of `files` that are not there; what is there but wrong is removed, and said."""
        there = [file for file in files if (self.root / file.local).exists()]
        unread = [file for file in there if self.reread or not self.is_checked(file)]

        def verdict(file: File) -> str:
            try:
                check(self.root / file.local, file, vocab_size)
            except InputError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(READERS) as pool:
            for file, wrong in zip(unread, pool.map(verdict, unread), strict=True):
                if not wrong:
                    self.mark(file)
                    continue
                known = file.local in self.record  # the export's manifest is not
                say(f"{'broken' if known else 'changed':7} {wrong}: removed")
                (self.root / file.local).unlink()
                if known:
                    self.save()
        return [file for file in files if not (self.root / file.local).exists()]

    def obtain(self, files: list[File], vocab_size: int, jobs: int = 1) -> None:
        """Makes all `files` be there and right."""
        missing = self.missing(files, vocab_size)
        folders = {(self.root / file.local).parent for file in files}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a run that was killed
        needed, free = sum(file.size for file in missing), shutil.disk_usage(self.root).free
        if needed > free:
            raise InputError(
                f"no space: {len(missing)} files take {needed:,} bytes, {self.root} has {free:,} "
                "free; ask for fewer --train-shards, or give --root another disk"
            )
        try:
            self.fetch_all(missing, vocab_size, jobs)
        finally:
            for folder in folders:
                shutil.rmtree(folder / STAGING, ignore_errors=True)

    def fetch_all(self, files: list[File], vocab_size: int, jobs: int) -> None:
        """Fetches in parallel, with a bar of what has arrived, files in transit included."""
        pool, start = ThreadPoolExecutor(jobs), self.transferred
        todo: set[Future[File]] = {pool.submit(self.fetch, file, vocab_size) for file in files}
        total = sum(file.size for file in files)
        quiet = total < 1e6 or not shards.watched()
        try:
            with tqdm(total=total, unit="B", unit_scale=True, disable=quiet) as bar:
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
        """Bytes that have arrived of files that are not whole; fewer, if one goes meanwhile."""
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
            arrived = hf_hub_download(
                file.repo,
                file.remote,
                repo_type="dataset",
                revision=file.revision,
                local_dir=staging,
                endpoint=endpoint(),
            )
            return Path(arrived)

        for attempt in range(1, ARRIVALS + 1):
            arrived = patient(file.remote, download)
            try:
                check(arrived, file, vocab_size)
            except InputError as wrong:
                if attempt < ARRIVALS:
                    continue
                raise InputError(f"{file.remote} arrived wrong {attempt} times: {wrong}") from None
            break
        with open(arrived, "rb") as content:
            os.fsync(content.fileno())
        os.replace(arrived, target)
        return file


# ---- 3. The run --------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Two runs into one root would remove each other's files in transit."""
    (root / "datasets").mkdir(parents=True, exist_ok=True)
    with open(root / "datasets/.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another fineweb.py is at work in {root}: wait for it") from None
        yield


class Census(NamedTuple):
    """What a split holds."""

    tokens: int
    documents: int
    size: int  # UTF-8 bytes of text

    @property
    def canonical(self) -> bool:
        """Whether this is the validation split that scores are published on."""
        near = abs(self.size - CANONICAL_BYTES) <= CANONICAL_SPREAD
        return self.documents == CANONICAL_DOCUMENTS and near


def census(paths: Iterable[Path], table: shards.ByteTable) -> Census:
    """Counts shards that follow each other."""
    tokens = documents = size = 0
    before = BOS
    for shard in map(shards.open_shard, paths):
        for start in range(0, len(shard), CHUNK):
            ids = shard[start : start + CHUNK].astype(np.int64)
            size += int(table.of_stream(ids, before).sum())
            tokens += len(ids)
            documents += int((ids == BOS).sum())
            before = int(ids[-1])
    return Census(tokens, documents, size)


def summarize(store: Store, files: list[File], tokenizer: Tokenizer) -> None:
    """Says what is there, and whether validation is the split that scores are published on."""
    train = [file for file in files if file.is_of("train")]
    val = [file for file in files if file.is_of("val")]
    counted = census((store.root / file.local for file in val), tokenizer.table)
    shards.check_split("val", counted.tokens, counted.size)
    say(
        f"train   {len(train)} shards, {sum(f.tokens for f in train):,} tokens, "
        f"{sum(f.size for f in train):,} bytes on disk\n"
        f"val     {len(val)} shards, {counted.tokens:,} tokens, {sum(f.size for f in val):,} bytes "
        "on disk"
    )
    verdict = "the canonical split"
    if not counted.canonical:
        verdict = (
            f"NOT the canonical split ({CANONICAL_DOCUMENTS:,} documents, "
            f"{CANONICAL_BYTES / 1e6:.2f} MB); a val_bpb on it compares with no published one"
        )
    say(f"text    {counted.documents:,} validation documents, {counted.size:,} bytes: {verdict}")
    others = sorted(set(shards.shards_in(store.folder)) - {file.name for file in files})
    unknown = [name for name in others if not is_known(store, name)]
    if others:
        say(f"others  {len(others)} more shards are there, and training reads them too")
    if unknown:
        say(f"others  {len(unknown)} of them were never checked, the first is {unknown[0]}")


def is_known(store: Store, name: str) -> bool:
    """Whether a shard was asked for by an earlier run and found right."""
    return any(file.name == name and store.is_checked(file) for file in store.files())


def say_next(store: Store, files: list[File], tokenizer: Tokenizer) -> None:
    """Says how to go on."""
    shortest = min(sum(f.tokens for f in files if f.is_of(split)) for split in shards.SPLITS)
    corpus = shards.Corpus(store.folder, tokenizer.model, tokenizer.vocab_size, shortest)
    script = shards.script_path()
    if any(name.startswith("fineweb_train_") for name in shards.shards_in(store.folder)):
        say(f"next    {corpus.variables()} \\\n            {shards.torchrun(8)} {script}")
    else:
        say(
            "next    there is no train shard: --train-shards fetches some; to score an artifact,\n"
            f"        EVAL_ONLY=<artifact> {corpus.variables()} {packages.python()} {script}"
        )


def files_wanted(store: Store, options: Options) -> list[File]:
    """The files to have: those of the record, for --verify without a number, or a new plan."""
    known = store.files()
    if options.verify and options.train_shards is None and any(f.is_of("val") for f in known):
        return known  # no network is needed
    own_repo = os.environ.get("MATCHED_FINEWEB_REPO_ID")
    repo = own_repo or REPOS.get(options.variant, DEFAULT_REPO)
    if not own_repo and options.variant not in REPOS:
        say(f"variant {options.variant} is none of {', '.join(REPOS)}; {repo} may have it")
    say(f"asking  {urlsplit(endpoint()).netloc} for the list of files of {repo}")
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
    hub = Hub(repo, prefix, options.revision)
    say(f"source  {hub.repo} at {hub.revision}")
    manifest = hub.file("manifest.json", "datasets")
    store.obtain([manifest], 0)
    text = (store.root / manifest.local).read_bytes()
    index = read_index(text, f"manifest.json of {hub.repo} at {hub.revision}")
    return plan(hub, index, options)


def open_tokenizer(store: Store, files: list[File]) -> Tokenizer:
    """The tokenizer among the files, whole and readable."""
    store.obtain(files, 0)
    models = [store.root / file.local for file in files if file.local.endswith(".model")]
    if not models:
        raise InputError(f"{store.path} names no tokenizer: remove it, and run this again")
    sp = shards.load_tokenizer(models[0])
    return Tokenizer(models[0], len(sp), shards.ByteTable.of(sp))


def run(options: Options) -> None:
    """Makes all files be there and right, and says so."""
    start = time.perf_counter()
    store = Store(options.root, PREFIX + options.variant, options.verify)
    files = files_wanted(store, options)
    bins = [file for file in files if file.local.endswith(".bin")]
    shards.refuse_strays(store.folder, [file.name for file in bins])
    store.expect(files)
    store.tokenizer = open_tokenizer(store, [file for file in files if file not in bins])
    store.save()
    store.obtain(bins, store.tokenizer.vocab_size, options.jobs)
    summarize(store, bins, store.tokenizer)
    seconds = time.perf_counter() - start
    say(f"took    {seconds:.1f} s, {store.transferred:,} bytes transferred")
    say_next(store, bins, store.tokenizer)


def work(options: Options) -> None:
    """The run, with the disk's errors explained; the network's already are."""
    try:
        with alone(options.root):
            run(options)
    except OSError as error:
        raise InputError(explain_disk(error, options.root)) from error


def explain_disk(error: OSError, root: Path) -> str:
    """One line on an error of the file system below the root."""
    if error.errno in NO_SPACE:
        return f"{error}. No space in {root}: free some, or give --root another disk"
    if error.errno in NO_WRITING:
        return f"{error}. Give --root a folder that can be written"
    return f"{error} (below --root {root})"


def command_line() -> argparse.ArgumentParser:
    """The options; `Options` has their types."""
    parser = argparse.ArgumentParser(
        description="Fetch the published FineWeb export and check every file of it.",
        epilog="It prints the command that trains on what was fetched. data/README.md has sizes.",
    )
    option = parser.add_argument
    variant = "Vocabulary: sp1024, sp4096, sp8192 or what the export has (default: %(default)s)."
    option("--variant", default="sp1024", help=variant)
    shards_help = f"Number of train shards, 200 MB each (default: {DEFAULT_SHARDS})."
    option("--train-shards", type=int, metavar="N", help=shards_help)
    root = "Folder in which datasets/ and tokenizers/ are made (default: %(default)s)."
    option("--root", type=Path, default=Path(__file__).resolve().parent, help=root)
    verify = "Read every file again and replace broken ones; needs the network only for those."
    option("--verify", action="store_true", help=verify)
    revision = "Branch or commit of the export (default: %(default)s)."
    option("--revision", default="main", help=revision)
    ignore = "Go on when the counts of the export's manifest do not fit its files."
    option("--ignore-manifest", action="store_true", help=ignore)
    jobs = "Number of files that are fetched at a time (default: %(default)s)."
    option("--jobs", type=int, default=8, help=jobs)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = command_line()
    options = Options(**vars(parser.parse_args(argv)))
    if options.jobs < 1 or (options.train_shards or 0) < 0:
        parser.error("--jobs is at least 1, --train-shards at least 0")
    if not re.fullmatch(r"[\w.-]+", options.variant):
        parser.error(f"--variant {options.variant!r} is no name such as sp1024")
    if MISSING:
        return packages.complain("fineweb.py", MISSING, packages.HERE / "requirements.txt")
    disable_progress_bars()
    logging.set_verbosity_error()  # it warns about every request that it repeats
    code = shards.attempt("fineweb.py", lambda: work(options))
    if code == shards.INTERRUPTED:
        sys.stderr.flush()
        os._exit(code)  # threads that wait for the network would keep the process
    return code


if __name__ == "__main__":
    sys.exit(main())
