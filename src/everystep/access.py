"""Who may do what in a repository on S3 or Ceph: a policy for each role, ready to be set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everystep.errors import Unsupported, UsageError

ROLES = {
    "writer": "saves and resumes: creates objects, and deletes none",
    "reader": "lists and loads",
    "collector": "frees what nothing needs: deletes packs and receipts, and writes records that say so",
    "administrator": "everything",
}
STORES = ("s3", "ceph")
_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
_KEYS = ("format.json", "place.json")
_CREATED = ("runs/*/log/*", "runs/*/save/*", "runs/*/volumes/*")
"""Always with `If-None-Match`, so that it can be demanded."""
_PACKS = "runs/*/packs/*"
_PROBES = "probe-*"


@dataclass(frozen=True)
class AccessPolicy:
    """What a role may do, as the store wants to be told."""

    role: str
    store: str
    document: dict[str, Any]
    """A policy of AWS's language: of a bucket, where it names somebody, else of a user, group or role."""
    notes: tuple[str, ...]
    """What it cannot hold, and who sets it."""


def access_policy(place: str, role: str, *, store: str = "s3", to: Sequence[str] = ()) -> AccessPolicy:
    """The policy that lets somebody do what a role needs in a repository, and nothing else.

    Args:
        place: s3://bucket/prefix.
        role: "writer", "reader", "collector" or "administrator".
        store: "s3" for AWS, "ceph" for a gateway of Ceph, which knows fewer conditions.
        to: who gets it: names of users of Ceph, or ARNs. Then it is a policy of the bucket; without, one to attach.

    Raises:
        UsageError: for a role or store that is not known, or what is no address.
        Unsupported: for a place whose stores have no such policies.
    """
    if role not in ROLES:
        raise UsageError(f"no role {role!r}", do=f"one of {', '.join(ROLES)}")
    if store not in STORES:
        raise UsageError(f"no store {store!r}", do=f"one of {', '.join(STORES)}")
    bucket, prefix = _address(place)
    if store == "ceph" and not to:
        raise UsageError("a policy of Ceph is one of the bucket, and names users", do='to=["name"], or --to NAME')
    statements = _statements(bucket, prefix, role, conditions=store == "s3")
    if to:
        principal = {"AWS": [_principal(name, store) for name in to]}
        statements = [_granted(statement, principal) for statement in statements]
    return AccessPolicy(
        role, store, {"Version": "2012-10-17", "Statement": statements}, _notes(role, store, prefix, to)
    )


def _address(place: str) -> tuple[str, str]:
    """(bucket, prefix that is empty or ends with a slash)"""
    scheme = place.partition("://")[0] if "://" in place else ""
    if scheme != "s3":
        raise Unsupported(
            "policies are written for S3 and what speaks like it",
            where=_shown(place),
            do="s3://bucket/prefix; docs/access.md says what a writer needs elsewhere",
        )
    found = _ADDRESS.fullmatch(place.partition("?")[0])  # a policy is the same at any endpoint
    if found is None or "*" in (found[2] or ""):
        raise UsageError("not the address of a bucket", where=_shown(place), do="s3://bucket/prefix")
    prefix = (found[2] or "").strip("/")
    return found[1], f"{prefix}/" if prefix else ""


def _shown(place: str) -> str:
    """Without what may be a credential: before the host, and behind the path."""
    scheme, _, rest = place.partition("://")
    return f"{scheme}://…" if "@" in rest else place.partition("?")[0]


def _statements(bucket: str, prefix: str, role: str, *, conditions: bool) -> list[dict[str, Any]]:
    whole = f"arn:aws:s3:::{bucket}"

    def keys(*patterns: str) -> list[str]:
        return [f"{whole}/{prefix}{pattern}" for pattern in patterns]

    sid = f"Everystep{role.capitalize()}"
    if role == "administrator":
        return [_allow(f"{sid}Bucket", ["s3:*"], [whole]), _allow(f"{sid}Objects", ["s3:*"], keys("*"))]
    # A store answers 404, and not 403, for what is missing only to those who may list: the end of a log is such an
    # answer, and a question for one key has no prefix, which the condition must let pass.
    only = {"Condition": {"StringLikeIfExists": {"s3:prefix": [prefix, f"{prefix}*"]}}} if prefix else {}
    found = [
        {**_allow(f"{sid}Lists", ["s3:ListBucket"], [whole]), **only},
        _allow(f"{sid}Reads", ["s3:GetObject"], keys("*")),
    ]
    created = {"writer": (*_KEYS, *_CREATED), "collector": ("runs/*/log/*", "runs/*/volumes/*")}.get(role)
    if created is not None:
        demanded = {"Condition": {"Null": {"s3:if-none-match": "false"}}} if conditions else {}
        found.append({**_allow(f"{sid}Creates", ["s3:PutObject"], keys(*created)), **demanded})
    if role == "writer":
        actions = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
        found.append(_allow(f"{sid}Stores", actions, keys(_PACKS, _PROBES)))
        found.append(_allow(f"{sid}Tries", ["s3:DeleteObject"], keys(_PROBES)))
    if role == "collector":
        found.append(_allow(f"{sid}Frees", ["s3:DeleteObject"], keys(_PACKS, "runs/*/save/*", _PROBES)))
    return found


def _allow(sid: str, actions: list[str], resources: list[str]) -> dict[str, Any]:
    return {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}


def _granted(statement: dict[str, Any], principal: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in statement.items() if key not in ("Sid", "Effect")}
    return {"Sid": statement["Sid"], "Effect": statement["Effect"], "Principal": principal, **rest}


def _principal(name: str, store: str) -> str:
    if name.startswith("arn:"):
        return name
    if store != "ceph" or not re.fullmatch(r"[^\s/:*?\"\\]+", name):
        raise UsageError(f"{name!r} names nobody", do="an ARN: arn:aws:iam::123456789012:role/training")
    return f"arn:aws:iam:::user/{name}"


def _notes(role: str, store: str, prefix: str, to: Sequence[str]) -> tuple[str, ...]:
    notes = [
        "set it as the bucket's policy, with the statements of all roles in one document"
        if to
        else "attach it to the user, group or role that does this"
    ]
    if role in ("writer", "collector"):
        if store == "ceph":
            notes.append("Ceph cannot demand a create-only put: who may write may overwrite what is there")
        else:
            notes.append("records can be created and not replaced; packs could be overwritten")
        notes.append("versioning of the bucket keeps what is overwritten, out of this role's reach")
    if role != "administrator" and prefix:
        notes.append("it can list the names of the whole bucket, as far as it asks without a prefix; read only its own")
    return tuple(notes)
