"""Where an object store is and who asks: the parts of a URL, and what it takes to connect. Holds no credential."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from everystep.errors import UsageError

Connect = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Address:
    """A URL in its parts: scheme://bucket/prefix?option=value."""

    scheme: str
    bucket: str
    prefix: str
    """Empty, or ending in '/'."""
    options: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True)
class Account:
    """A bucket at an endpoint, and how to connect to it."""

    address: Address
    endpoint: str
    """Empty where the cloud's own is used."""
    credentials: str
    """Where they come from, in words."""
    connect: Connect
    """Makes a store of obstore's from client options and a retry configuration."""
    is_sorted: bool = True
    """Whether the store lists by name."""
    usual: str = "others"
    """What gives credentials to most people, in words."""

    @property
    def identity(self) -> str:
        """The same for the same bucket alone, whoever asks."""
        return f"{self.address.url} at {self.endpoint}" if self.endpoint else self.address.url


def parse(scheme: str, rest: str, options: tuple[str, ...]) -> Address:
    """The parts of a URL, given what comes behind '://'.

    Args:
        options: that this scheme knows.

    Raises:
        UsageError: which repeats nothing that may be a secret.
    """
    path, _, query = rest.partition("?")
    bucket, _, prefix = path.partition("/")
    a_url = f"{'a' if scheme == 'gs' else 'an'} {scheme}:// URL"
    if "@" in bucket or ":" in bucket:  # a secret may have slashes in it
        raise UsageError(
            f"{a_url} must not hold a credential",
            where=f"{scheme}://…",
            do="begin with the bucket's name, and give credentials as that cloud does; see docs/storage.md",
        )
    parts = [part for part in prefix.split("/") if part]
    if not bucket or any(part in (".", "..") or any(ord(c) < 32 for c in part) for part in parts):
        raise UsageError(
            f"{a_url} needs a bucket and plain names",
            where=f"{scheme}://{repr(path)[1:-1]}",
            do=f"for example everystep.open('{scheme}://bucket/runs')",
        )
    given = dict(parse_qsl(query, keep_blank_values=True))
    for name in given:
        if name not in options:
            raise UsageError(
                f"{a_url} has no option {name[:40]!r}",
                where=f"{scheme}://{path}",
                do=f"options are {', '.join(options)}; credentials do not belong into a URL",
            )
    return Address(scheme, bucket, "".join(f"{part}/" for part in parts), given)


def plain_endpoint(endpoint: str, where: str) -> str:
    """An endpoint's URL without a slash at its end.

    Raises:
        UsageError: if it is none, or holds a credential.
    """
    try:
        parts = urlsplit(endpoint)
        plain = not (parts.query or parts.fragment or "@" in parts.netloc) and (parts.port is None or parts.port > 0)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and plain
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(
            "the endpoint of this store is no plain URL",
            where=where,
            do="give scheme, host and port alone, for example https://ceph.example.org:7480",
        )
    return endpoint.rstrip("/")
