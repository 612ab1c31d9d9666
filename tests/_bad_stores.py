"""Small servers that speak S3, each wrong in a way that real ones are: what a probe must find out."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

GOOD, IGNORES, REFUSES, RACY, FORGETS, LATE = "good", "ignores", "refuses", "racy", "forgets", "late"
"""ignores: a put with a condition is carried out in any case. refuses: it is answered with 501. racy: looks, waits, and
writes, so that only writers at the same time see it. forgets: an object is readable after a while only. late: it is
listed after a while only."""
WHILE = 0.3


class Store:
    """The objects of one bucket, and how it treats them."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []

    def put(self, key: str, body: bytes, conditional: bool) -> int:
        """The answer's status."""
        if conditional and self.how == REFUSES:
            return 501
        if conditional and self.how == RACY:
            if key in self.objects:
                return 412
            time.sleep(0.05)
        with self.lock:
            if conditional and self.how not in (IGNORES, RACY) and key in self.objects:
                return 412
            self.objects[key] = body, time.time()
        return 200

    def get(self, key: str) -> tuple[bytes, float] | None:
        found = self.objects.get(key)
        if found is not None and self.how == FORGETS and time.time() - found[1] < WHILE:
            return None
        return found

    def list(self, prefix: str, delimiter: str, after: str) -> tuple[list[str], list[str]]:
        """Keys, and what stands for those behind a delimiter."""
        keys, folders = [], []
        for key in sorted(self.objects):
            if not key.startswith(prefix) or key <= after:
                continue
            if self.how == LATE and time.time() - self.objects[key][1] < WHILE:
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if found:
                folders.append(prefix + head + found)
            else:
                keys.append(key)
        return keys, sorted(set(folders))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).partition("/")[2].partition("/")[2]

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return body

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.store.requests.append((self.command, self.path))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def do_PUT(self) -> None:
        body = self._body()
        status = self.store.put(self._key(), body, self.headers.get("If-None-Match") == "*")
        if status == 501:
            self._refuse(501, "NotImplemented")
        elif status == 412:
            self._refuse(412, "PreconditionFailed")
        else:
            self._answer(200, ETag=_etag(body))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(query)
            return
        found = self.store.get(self._key())
        if found is None:
            self._refuse(404, "NoSuchKey")
            return
        body, at = found
        headers = {"ETag": _etag(body), "Last_Modified": formatdate(at, usegmt=True), "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._answer(200, body, **headers)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(body)) + 1, len(body))
        if start >= len(body):
            self._refuse(416, "InvalidRange")
            return
        self._answer(206, body[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(body)}", **headers)

    def _list(self, query: dict[str, list[str]]) -> None:
        def said(name: str) -> str:
            return query.get(name, [""])[0]

        page = int(said("max-keys") or 1000)
        after = max(said("start-after"), said("continuation-token"))
        keys, folders = self.store.list(said("prefix"), said("delimiter"), after)
        more = len(keys) > page
        rows = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size><ETag>{_etag(body)}</ETag>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(at))}</LastModified></Contents>"
            for key in keys[:page]
            for body, at in [self.store.objects[key]]
        ]
        rows += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders]
        if more:
            rows.append(f"<NextContinuationToken>{escape(keys[page - 1])}</NextContinuationToken>")
        text = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{''.join(rows)}</ListBucketResult>"
        self._answer(200, text.encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:
        with self.store.lock:
            self.store.objects.pop(self._key(), None)
        self._answer(204)

    def do_POST(self) -> None:
        """Several deletes in one."""
        keys = re.findall(r"<Key>(.*?)</Key>", self._body().decode())
        with self.store.lock:
            for key in keys:
                self.store.objects.pop(key, None)
        rows = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{rows}</DeleteResult>".encode(), Content_Type="application/xml")


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@contextmanager
def serving(how: str) -> Iterator[tuple[Store, dict[str, str]]]:
    """A bucket, and the environment in which `s3://bucket/…` is in it."""
    store = Store(how)
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-somebody",
    }
    try:
        yield store, environment
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
