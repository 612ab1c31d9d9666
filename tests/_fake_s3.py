"""An object store that speaks S3 and Google's XML in this process, and does whatever a test wants it to do wrong."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Fault:
    """What becomes of a request instead of its answer.

    Args:
        method: the first request of this method, and, given `part`, whose path or query contains that.
        status: answered with this status and `body`; 0: the connection is cut without an answer.
        applied: it takes effect first.
        stall: seconds before the answer.
    """

    method: str
    status: int = 0
    code: str = ""
    applied: bool = False
    stall: float = 0.0
    part: str = ""
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def document(self) -> bytes:
        return (self.body or f"<Error><Code>{self.code}</Code></Error>").encode()


class FakeS3:
    """Buckets appear when they are named. Ten keys a page, so that listings have many."""

    PAGE = 10

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        """(method, path with query) of each."""
        self.faults: deque[Fault] = deque()
        self.before: Callable[[str, str], None] = lambda method, path: None
        """Called at each request, on its own thread."""
        self.lock = threading.Lock()
        fake = self

        class Handler(_Handler):
            store = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def keys(self) -> list[str]:
        return sorted(self.objects)

    def count(self, method: str) -> int:
        return sum(one == method for one, _ in self.requests)

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for one in self.faults:
                if one.method == method and one.part in path:
                    self.faults.remove(one)
                    return one
        return None


@contextmanager
def fake_s3() -> Iterator[FakeS3]:
    server = FakeS3()
    try:
        yield server
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    store: FakeS3
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has gone: as it may

    def _run(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method, store = self.command, self.store
        with store.lock:
            store.requests.append((method, self.path))
        store.before(method, self.path)
        fault = store.fault(method, self.path)
        if fault is not None and not fault.applied:
            self._fail(fault)
            return
        status, headers, answer = self._apply(method, body)
        if fault is not None:
            self._fail(fault)
            return
        self._answer(status, headers, answer)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _run

    def _fail(self, fault: Fault) -> None:
        time.sleep(fault.stall)
        if fault.status:
            self._answer(fault.status, fault.headers, fault.document)
        else:
            self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        length = headers.pop("Content-Length", str(len(body)))
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _apply(self, method: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if "uploads" in query or "uploadId" in query:
            return self._upload(method, f"{bucket}/{key}", query, body)
        if not key and method == "GET":
            return 200, {}, self._listing(bucket, query)
        return {"PUT": self._put, "GET": self._get, "HEAD": self._get, "DELETE": self._delete}[method](
            f"{bucket}/{key}", body
        )

    def _put(self, key: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        create = self.headers.get("If-None-Match") == "*" or self.headers.get("x-goog-if-generation-match") == "0"
        with self.store.lock:
            if create and key in self.store.objects:
                return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
            self.store.objects[key] = body, time.time()
        return 200, _tags(body), b""

    def _get(self, key: str, _: bytes) -> tuple[int, dict[str, str], bytes]:
        if key not in self.store.objects:
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        data, at = self.store.objects[key]
        headers = {**_tags(data), "Last-Modified": formatdate(at, usegmt=True)}
        span = self.headers.get("Range")
        if span is None:
            return 200, {**headers, "Content-Length": str(len(data))}, data
        first, last = span.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return 416, {}, b"<Error><Code>InvalidRange</Code></Error>"
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return 206, headers, data[start:stop]

    def _delete(self, key: str, _: bytes) -> tuple[int, dict[str, str], bytes]:
        with self.store.lock:
            self.store.objects.pop(key, None)
        return 204, {}, b""

    def _listing(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix, after = f"{bucket}/{query.get('prefix', '')}", query.get("start-after", "")
        token, delimiter = query.get("continuation-token", ""), query.get("delimiter", "")
        cut = len(bucket) + 1
        with self.store.lock:
            keys = sorted(key[cut:] for key in self.store.objects if key.startswith(prefix) and key[cut:] > after)
        if delimiter:
            heads = [key[len(prefix) - cut :].partition("/") for key in keys]
            keys = sorted({prefix[cut:] + head + slash for head, slash, _ in heads})
        keys = [key for key in keys if key > token]
        page, rest = keys[: self.store.PAGE], keys[self.store.PAGE :]
        lines = ["<ListBucketResult>", f"<IsTruncated>{'true' if rest else 'false'}</IsTruncated>"]
        lines += [f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"] if rest else []
        for key in page:
            if delimiter and key.endswith("/"):
                lines.append(f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>")
                continue
            data, at = self.store.objects[f"{bucket}/{key}"]
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(at))
            lines.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><LastModified>{when}</LastModified>"
                f"<ETag>{_tags(data)['ETag']}</ETag></Contents>"
            )
        return "".join([*lines, "</ListBucketResult>"]).encode()

    def _upload(self, method: str, key: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        store, name = self.store, query.get("uploadId", "")
        with store.lock:
            if method == "POST" and "uploads" in query:
                name, kind = f"upload-{len(store.requests)}", "InitiateMultipartUploadResult"
                store.uploads[name] = {}
                return 200, {}, f"<{kind}><UploadId>{name}</UploadId></{kind}>".encode()
            if method == "PUT":
                store.uploads[name][int(query["partNumber"])] = body
                return 200, _tags(body), b""
            parts = store.uploads.pop(name, {})
            if method == "POST":
                store.objects[key] = b"".join(parts[number] for number in sorted(parts)), time.time()
                kind = "CompleteMultipartUploadResult"
                return 200, {}, f"<{kind}><ETag>&quot;whole&quot;</ETag></{kind}>".encode()
        return 204, {}, b""


def _tags(body: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"', "x-goog-generation": "1"}
