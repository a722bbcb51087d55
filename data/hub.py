"""A dataset repository on the Hugging Face hub: what lies in it, and what to do when it fails.

All requests of fineweb.py go through `patient`, which repeats what may pass, waits as the server
asks, and says the rest in one line.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import shards
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.hf_api import RepoFile
from shards import InputError, say

T = TypeVar("T")

# Seconds before a request is repeated, on top of the client's own repeats.
PAUSES: tuple[float, ...] = (1.0, 2.0, 4.0)
TOO_MANY = 429  # HTTP: too many requests
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait; its windows are five minutes
LISTING_LIMIT = 660.0  # seconds for a listing, in which the client may wait as the server asks
QUIET = 15.0  # seconds without an answer after which it is said that this waits
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)
# What huggingface_hub 1.0 to 2.4 and its hf_xet raise when network, server, answer or disk are at
# fault: OSError and HTTPError for most, ValueError for answers that are no JSON and for names that
# cannot be, KeyError and TypeError for JSON of another shape, the others in downloads.
CLIENT_ERRORS = (
    OSError,
    HTTPError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    XetDownloadError,
)


# ---- 1. Requests that fail ----------------------------------------------------------------------


def root_of(error: BaseException) -> BaseException:
    """What failed, which the client wraps into "cannot find the file in the local cache"."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int:
    """HTTP status that the server answered with; 0 if it was no answer that failed."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    local = getattr(error, "errno", None) in (*NO_SPACE, *NO_WRITING)
    refused = 400 <= status_of(error) < 500 and status_of(error) not in (408, TOO_MANY)
    return not (local or refused or isinstance(error, HFValidationError | OfflineModeIsEnabled))


def asked_wait(error: BaseException) -> float:
    """Seconds that the server asks to wait in its Retry-After or RateLimit header, or 0."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    after = headers.get("retry-after", "").strip()
    if after.isdigit():
        return float(after)
    # RateLimit: "api";r=0;t=55 (draft-ietf-httpapi-ratelimit-headers): 0 remain, 55 s to the reset
    reset = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(reset[1]) if reset else 0.0


def patient(what: str, call: Callable[[], T]) -> T:
    """call(), repeated while its failures look passing; else InputError, which says what to do."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except InputError:
            raise
        except CLIENT_ERRORS as failure:
            error = root_of(failure)
            asked = asked_wait(error)
            if pause is None or not may_pass(error) or asked > LONGEST_WAIT:
                raise InputError(f"{what}: {explain(error)}") from error
        if status_of(error) == TOO_MANY or asked:
            pause = asked + 1 if asked else 10 * pause
            say(f"waits   {pause:.0f} s: the server asks for a pause (HTTP {status_of(error)})")
        time.sleep(pause)
    raise AssertionError("the last round returns or raises")


def explain(error: BaseException) -> str:
    """One line on a failure and what to do about it."""
    status, asked = status_of(error), asked_wait(error)
    reason = first_line(error)
    if isinstance(error, HFValidationError):
        return f"{reason}. Check MATCHED_FINEWEB_REPO_ID: <user>/<name>"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be fetched: unset it"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision: check --revision"
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return refusal(error, status)
    if isinstance(error, RepositoryNotFoundError):
        return f"no such dataset, or a private one: check MATCHED_FINEWEB_REPO_ID; {token_advice()}"
    if status == TOO_MANY:
        wait = f"{asked:.0f} s" if asked else "some minutes"
        return (
            f"the server takes no more requests for now (HTTP {status}): wait {wait} and run this "
            "again; whole files are kept. HF_TOKEN raises the limit, fewer --jobs stay below it"
        )
    if status >= 500:
        return (
            f"the server {endpoint()} fails (HTTP {status}): run this again later; whole files are "
            "kept"
        )
    if getattr(error, "errno", None) in NO_SPACE:
        return f"{reason}. No space: free some, or give --root another disk; whole files are kept"
    if getattr(error, "errno", None) in NO_WRITING:
        return f"{reason}. Give --root a folder that can be written"
    return (
        f"{reason}. Check the network (server: {endpoint()}; HF_ENDPOINT names another) and run "
        "this again: whole files are kept"
    )


def first_line(error: BaseException) -> str:
    """The first line of a message that says something, with the kind of error if it is bare."""
    for line in str(error).splitlines():
        if line.strip():
            bare = isinstance(error, KeyError)
            return f"the answer lacks {line.strip()}" if bare else line.strip()
    return type(error).__name__


def refusal(error: BaseException, status: int) -> str:
    """What to do when the server knows the file and does not give it."""
    if isinstance(error, GatedRepoError) and get_token():
        return (
            f"access has to be granted (HTTP {status}): ask for it on the dataset's page with the "
            "account that HF_TOKEN belongs to"
        )
    if status == 401 and not get_token():
        return (
            "no such dataset, or a private one (HTTP 401): check MATCHED_FINEWEB_REPO_ID; "
            f"{token_advice()}"
        )
    return f"the server refuses this (HTTP {status}): {token_advice()}"


def token_advice() -> str:
    """What to do about HF_TOKEN."""
    if get_token():
        return (
            "the token that is set (HF_TOKEN, or `hf auth login`) may not read it or has expired: "
            "make one that may, or unset it, as the public export needs none"
        )
    return "set HF_TOKEN to a token that may read it (huggingface.co/settings/tokens)"


def endpoint() -> str:
    """Address of the server; InputError if HF_ENDPOINT is none."""
    address = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # of an unfinished IPv6 address
        valid = False
    if not valid:
        raise InputError(f"HF_ENDPOINT={address} is no address such as https://huggingface.co")
    return address.rstrip("/")


def within(seconds: float, call: Callable[[], T]) -> T:
    """call(), or InputError if it takes longer: the client lists files without a limit of time."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)  # raised below

    threading.Thread(target=work, daemon=True).start()  # one that hangs must not keep the process
    wait([answer], timeout=min(QUIET, seconds))
    if not answer.done():
        say("waits   for the server's list of files")
        wait([answer], timeout=max(seconds - QUIET, 0))
    if not answer.done():
        raise InputError(
            f"{endpoint()} gave no answer within {seconds:.0f} s: run this again later"
        )
    return answer.result()


# ---- 2. The repository --------------------------------------------------------------------------


class File(NamedTuple):
    """One file of the export as the hub lists it."""

    local: str  # path below the root
    repo: str
    revision: str  # commit
    remote: str  # path in the repository
    size: int  # bytes
    digest: str  # "sha256:<hex>", or "git:<hex>" (a blob's SHA-1) where the hub keeps no SHA-256

    @property
    def name(self) -> str:
        return Path(self.local).name

    @property
    def tokens(self) -> int:
        """Tokens of a shard of this size."""
        return (self.size - shards.HEADER_BYTES) // 2

    def is_of(self, split: str) -> bool:
        """Whether this is a shard of a split."""
        return self.name.startswith(f"fineweb_{split}_")


class Hub:
    """A commit of a dataset repository, and the files below its `prefix`."""

    def __init__(self, repo: str, prefix: str, revision: str) -> None:
        self.repo, self.prefix, api = repo, prefix.strip("/"), HfApi(endpoint())
        what = f"dataset {repo} at {revision}"
        info = patient(what, lambda: api.dataset_info(repo, revision=revision, timeout=30))
        if info.sha is None:
            raise InputError(f"{what}: {endpoint()} names no commit, so it is no hub")
        self.revision = commit = info.sha

        def list_files() -> list[RepoFile]:
            below = self.prefix or None
            tree = api.list_repo_tree(
                repo, below, recursive=True, revision=commit, repo_type="dataset"
            )
            return [entry for entry in tree if isinstance(entry, RepoFile)]

        entries = patient(what, lambda: within(LISTING_LIMIT, list_files))
        self.entries = {entry.path: entry for entry in entries}

    def path(self, name: str) -> str:
        """Path in the repository of a file below the prefix."""
        return f"{self.prefix}/{name}".lstrip("/")

    def has(self, name: str) -> bool:
        return self.path(name) in self.entries

    def file(self, name: str, folder: str) -> File:
        """The file `name` below the prefix, to be kept in `folder` below the root."""
        entry = self.entries.get(self.path(name))
        if entry is None:
            raise InputError(f"{self.repo} has no {self.path(name)} at {self.revision}")
        digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        local = f"{folder}/{Path(name).name}"
        return File(local, self.repo, self.revision, entry.path, entry.size, digest)
