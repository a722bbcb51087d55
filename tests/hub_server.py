"""A stand-in for the Hugging Face hub: one dataset repository over HTTP on loopback, with faults.

It speaks what huggingface_hub asks for when it fetches files: the repository's commit, its tree in
pages, and files by HEAD and GET, large ones behind a redirect to a second address, with byte
ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 5  # entries of a tree in one answer
LARGE = (".bin", ".model")  # kept outside git, listed with a SHA-256


def etag(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves `files` (path -> content) as dataset `repo`; use as a context manager.

    faults: for a part of "METHOD /path", what happens to the next requests that have it, in order:
    "503" or "429 Retry-After=7" (a status and headers), "200 {}" (that body), "cut" (the connection
    ends in the middle), "flip" (one bit is wrong), "size" (the header says more than there is),
    "hang" (no answer until the server ends), "" (nothing). listed_sizes: sizes that the tree claims
    instead of the true ones.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], repo: str = "someone/export") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.repo, self.lock = files, repo, threading.Lock()
        self.ended = threading.Event()
        self.faults: dict[str, list[str]] = {}
        self.listed_sizes: dict[str, int] = {}
        self.halt_after = (
            0  # bytes of content after which the server stops and sets `halted`; 0: never
        )
        self.halted = threading.Event()
        self.sent: dict[str, int] = {}  # bytes of content by path
        self.slept: list[float] = []  # seconds that clients in this process wanted to wait
        self.ranges: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Another host, as far as clients can tell.
        self.large = f"http://localhost:{self.server_port}/large/"

    @property
    def commit(self) -> str:
        return hashlib.sha1(
            repr(sorted((p, etag(p, c)) for p, c in self.files.items())).encode()
        ).hexdigest()

    def fault(self, path: str) -> str:
        with self.lock:
            return next(
                (queue.pop(0) for key, queue in self.faults.items() if key in path and queue), ""
            )

    def __enter__(self) -> HubServer:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def count(self, size: int) -> None:
        """Goes on once so much was sent, unless that is where the server is to stop."""
        with self.lock:
            left, self.halt_after = self.halt_after, max(self.halt_after - size, 0)
        if left and not self.halt_after:
            self.halted.set()
            self.ended.wait()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        path, fault = unquote(url.path), hub.fault(f"{self.command} {unquote(url.path)}")
        api, resolve = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/"
        status, _, rest = fault.partition(" ")
        if status == "200":
            self.answer(200, rest.encode())
        elif status.isdigit():
            self.answer(int(status), b"", dict(pair.split("=", 1) for pair in rest.split()))
        elif fault == "hang":
            hub.ended.wait()
        elif path.startswith(f"{api}/tree/"):
            self.tree(path, api, int(parse_qs(url.query).get("cursor", ["0"])[0]))
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{hub.commit}"):
            self.answer(200, json.dumps({"id": hub.repo, "sha": hub.commit}).encode())
        elif path.startswith(api + "/"):
            self.answer(
                404,
                b"",
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"},
            )
        elif path.startswith(resolve):
            self.resolve(path.removeprefix(resolve).partition("/")[2], fault)
        elif path.startswith("/large/"):
            self.content(path.removeprefix("/large/"), fault)
        else:
            self.answer(
                404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}
            )

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tree(self, path: str, api: str, first: int) -> None:
        hub, folder = self.server, path.removeprefix(f"{api}/tree/").partition("/")[2]
        paths = sorted(p for p in hub.files if p.startswith(f"{folder}/") or not folder)
        entries = []
        for p in paths[first : first + PAGE]:
            size, tag = hub.listed_sizes.get(p, len(hub.files[p])), etag(p, hub.files[p])
            lfs = (
                {"lfs": {"oid": tag, "size": size, "pointerSize": 134}} if p.endswith(LARGE) else {}
            )
            entries.append({"type": "file", "path": p, "size": size, "oid": tag[:40], **lfs})
        more = first + PAGE < len(paths)
        following = f"{hub.url}{self.path.split('?')[0]}?recursive=True&cursor={first + PAGE}"
        link = {"Link": f'<{following}>; rel="next"'} if more else {}
        self.answer(200, json.dumps(entries).encode(), link)

    def resolve(self, path: str, fault: str) -> None:
        """A small file itself, or the address of a large one."""
        hub = self.server
        if path not in hub.files:
            self.answer(
                404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}
            )
        elif path.endswith(LARGE):
            size = len(hub.files[path]) + (1 if fault == "size" else 0)
            self.answer(
                302,
                b"",
                {
                    "Location": hub.large + path,
                    "X-Linked-Size": str(size),
                    "X-Repo-Commit": hub.commit,
                    "X-Linked-Etag": f'"{etag(path, hub.files[path])}"',
                },
            )
        else:
            self.content(path, fault)

    def content(self, path: str, fault: str) -> None:
        hub, body = self.server, self.server.files[path]
        tag, wanted = etag(path, body), self.headers.get("Range")
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        rest = body[first:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", hub.commit)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = rest[: len(rest) // 2] if fault == "cut" else rest
        with hub.lock:
            hub.ranges += [wanted] if wanted else []
            hub.sent[path] = hub.sent.get(path, 0) + len(sent)
        for start in range(0, len(sent), 1 << 11):
            piece = sent[start : start + (1 << 11)]
            self.wfile.write(piece)
            hub.count(len(piece))
        if fault == "cut":
            self.close_connection = True
