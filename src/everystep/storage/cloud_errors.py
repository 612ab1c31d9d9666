"""What went wrong in an object store, in our words: its own hold addresses, headers and signatures, and stay behind."""

from __future__ import annotations

import re
from typing import NamedTuple

from everystep.errors import (
    AlreadyExists,
    Damaged,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageFull,
    UnknownOutcome,
    Unreachable,
    UnsafeStore,
)
from everystep.storage.cloud_account import Account

_STATUS = re.compile(r"non-2xx status code: ([0-9]{3})|\bstatus: ([0-9]{3})\b")
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9._-]{1,80})\s*</Code>")
_KIND = re.compile(r"HttpError \{\s*kind: ([A-Za-z]+)")
_REGION = re.compile(r"<Region>\s*([a-z0-9-]{1,40})\s*</Region>")
_IDENTITY = re.compile(r"169\.254\.|metadata\.google|/latest/api/token|token request|CreateSession|access token")

_NO_TLS = re.compile(r"InvalidContentType|WRONG_VERSION_NUMBER", re.IGNORECASE)
"""A connection of TLS to somebody who speaks something else, in the words of the libraries beneath."""
_WHY_NOT = (
    (re.compile(r"dns error"), "no such host is known"),
    (re.compile(r"ConnectionRefused|Connection refused"), "nothing listens there"),
    (re.compile(r"TimedOut|timed out"), "it did not answer"),
    (_NO_TLS, "what answers does not speak TLS"),
)

# How Azure answers where a range begins at the very end, and of an empty object: with no bytes, and so badly put.
_NOTHING = re.compile(r"InvalidRangeRequest|bytes 0--1/0")

_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "InvalidBucketName", "ContainerBeingDeleted", "ContainerDisabled"}
_ELSEWHERE = {
    "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
}  # fmt: skip
_FULL = {"QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "AccountQuotaExceeded"}
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired"}
_BUSY = {"SlowDown", "ServerBusy", "TooManyRequests", "RequestLimitExceeded", "ThrottlingException"}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "AuthenticationFailed", "InvalidAuthenticationInfo", "UnauthorizedAccess", "InvalidClientTokenId",
}  # fmt: skip
_FAILED = {"InternalError", "InternalServerError", "OperationTimedOut", "RequestTimeout"}
_TAKEN = {"PreconditionFailed", "BlobAlreadyExists", "ConditionNotMet", "TargetConditionNotMet"}
_WRITES = {"put": "write", "put_new": "write", "delete": "delete"}
_OF_ONE = ("get", "stat", "delete")


class _Answer(NamedTuple):
    """What can be told of a failure without repeating its words."""

    status: int
    """Of HTTP; 0 where there was no answer."""
    code: str
    """The store's own name for the failure, or empty."""
    kind: str
    """What became of the connection: Connect, Timeout, Request, Interrupted … or empty."""
    text: str

    @property
    def shown(self) -> str:
        return " ".join(filter(None, (str(self.status or ""), self.code))) or self.kind or "no reason"


def _read(error: Exception) -> _Answer:
    text = str(error)
    status, code, kind = _STATUS.search(text), _CODE.search(text), _KIND.search(text)
    number = int(status[1] or status[2]) if status else 0
    if not number and isinstance(error, FileNotFoundError):
        number = 404
    return _Answer(number, code[1] if code else "", kind[1] if kind else "", text)


def explain(
    error: Exception, account: Account, verb: str, where: str, *, first: bool = False
) -> StorageError | Damaged:
    """The error to raise for one of obstore's: outside of its handler, so that nothing of it is carried on.

    Args:
        verb: of the storage; what is not known of a `put_new` becomes `UnknownOutcome`.
        first: nothing was ever answered: who has no credentials then will not have them in a minute.
    """
    answer, name = _read(error), type(error).__name__
    return (
        _of_identity(answer, account, where, first)
        or _of_the_endpoint(answer, account, verb, where, first)
        or _of_the_object(answer, name, verb, where)
        or _of_the_bucket(answer, account, where)
        or _of_rights(answer, account, verb, where)
        or _of_the_moment(answer, account, verb, where)
        or StorageError(
            f"the store refused this: {answer.shown}" if answer.status else f"the store was not understood ({name})",
            where=where,
            do=f"check {_at(account)}, and look this up in the store's documentation; earlier checkpoints are whole",
        )
    )


def _at(account: Account) -> str:
    return f"the endpoint {account.endpoint}" if account.endpoint else "the address"


def _is_no_store(answer: _Answer, verb: str) -> bool:
    """Every store names what it refuses; of an object that is missing it need not."""
    return not answer.code and (answer.status == 400 or (answer.status == 404 and verb not in _OF_ONE))


def _of_the_endpoint(answer: _Answer, account: Account, verb: str, where: str, first: bool) -> StorageError | None:
    """Where something else than a store may answer: a wrong port, a wrong scheme."""
    if not (first and account.endpoint):
        return None
    other = "http://" if account.endpoint.startswith("https:") else "https://"
    if answer.kind == "Connect" and _NO_TLS.search(answer.text):
        what = f"what answers at {account.endpoint} does not speak TLS"
    elif verb not in ("stat", "put_new") and _is_no_store(answer, verb):
        what = f"what answers at {account.endpoint} does not speak as a store does: {answer.status}"
    else:
        return None
    do = f"check the endpoint: its host and port, and whether it should begin with {other}"
    return StorageError(what, where=where, do=do)


def _of_the_object(answer: _Answer, name: str, verb: str, where: str) -> StorageError | Damaged | None:
    status, code = answer.status, answer.code
    if status == 404 and code not in _NO_BUCKET and verb in _OF_ONE:
        return ObjectMissing("no such object", where=where)
    if verb == "put_new":
        if status in (412, 304) or code in _TAKEN:
            return AlreadyExists("the key is taken", where=where)
        if status == 409 and code not in _NO_BUCKET:  # two at once: who has the key is known only when both are over
            return UnknownOutcome("another put to this key is under way", where=where, do="save again")
        if status in (501, 405) or (status == 400 and code in ("NotImplemented", "UnsupportedHeader")):
            return UnsafeStore(
                f"this store has no create-only put: {answer.shown}",
                where=where,
                do="use a store that has one, as S3, GCS, Azure, Ceph and MinIO do; or write with one process alone",
            )
    if name == "ValueError" or name == "InvalidPathError":
        return StorageError("not a key that this store takes", where=where, do="give another name")
    if status == 416 or (not status and _NOTHING.search(answer.text)):
        return Damaged("the object ends before the bytes that were asked for", where=where, do="run fsck")
    return None


def _of_the_bucket(answer: _Answer, account: Account, where: str) -> StorageError | None:
    bucket, at = account.address.bucket, f" at {account.endpoint}" if account.endpoint else ""
    if answer.code in _NO_BUCKET or answer.status == 404:
        return StorageError(
            f"there is no bucket {bucket!r}{at}: {answer.shown}",
            where=where,
            do="create it, or check its name, the endpoint and the account",
        )
    if answer.code in _ELSEWHERE or answer.status in (301, 302, 307, 308) or "redirect without LOCATION" in answer.text:
        region = _REGION.search(answer.text)
        return StorageError(
            f"the bucket {bucket!r} lies in another region{f', {region[1]}' if region else ''}",
            where=where,
            do=f"set AWS_REGION{f'={region[1]}' if region else ' to the bucket’s own'}, or the endpoint of that region",
        )
    if answer.code in _FULL or answer.status == 507:
        return StorageFull(
            f"no space left: {answer.shown}",
            where=where,
            do="free space or raise the quota of the bucket; every earlier checkpoint is whole",
        )
    return None


def _of_identity(answer: _Answer, account: Account, where: str, first: bool) -> StorageError | None:
    """What the giver of credentials answered, which says nothing of the store."""
    if not _IDENTITY.search(answer.text.partition("Server returned")[0]):
        return None
    kind = StorageError if first else Unreachable
    asked = f"they come from {account.credentials}: check that, or set {account.usual}"
    return kind(f"no credentials were given out: {answer.shown}", where=where, do=asked)


def _of_rights(answer: _Answer, account: Account, verb: str, where: str) -> StorageError | None:
    if answer.code in _SKEWED:
        return StorageError("this machine's clock and the store's differ too much", where=where, do="set the clock")
    if "certificate" in answer.text and answer.kind == "Connect":
        return StorageError(
            "the store's certificate is not trusted here",
            where=where,
            do="install the certificate of its authority, or check the endpoint's name",
        )
    asked = f"credentials come from {account.credentials}"
    if answer.status == 401 or answer.code in _BAD_CREDENTIALS:
        return StorageError(
            f"the store does not accept the credentials: {answer.shown}", where=where, do=f"{asked}: check them"
        )
    if answer.status == 403:
        if verb in _WRITES:
            return ReadOnly(
                f"the store does not let this process {_WRITES[verb]}: {answer.shown}",
                where=where,
                do=f"{asked}: check what they may do with this bucket",
            )
        return StorageError(
            f"the store does not let this process read: {answer.shown}",
            where=where,
            do=f"{asked}: check what they may do; who may not list is told this of what is missing, too",
        )
    return None


def _of_the_moment(answer: _Answer, account: Account, verb: str, where: str) -> StorageError | None:
    """What another attempt may mend."""
    busy = answer.status == 429 or answer.code in _BUSY
    if busy:
        return Unreachable(
            f"the store is too busy: {answer.shown}",
            where=where,
            do="save less often, or spread runs over more prefixes",
        )
    if answer.kind == "Connect":
        why = next((f": {words}" for pattern, words in _WHY_NOT if pattern.search(answer.text)), "")
        return Unreachable(
            f"no connection to {account.endpoint or 'the store'}{why}",
            where=where,
            do="check the network and the endpoint; earlier checkpoints are whole",
        )
    if answer.status not in (0, 408) and answer.status < 500 and answer.code not in _FAILED:
        return None
    at = f": {account.endpoint}" if account.endpoint else ""
    if answer.status:
        what = f"the store failed: {answer.shown}"
    elif answer.kind == "Timeout":
        what = f"the store did not answer in time{at}"
    elif answer.kind:
        what = f"the connection to the store was lost{at}"
    else:
        return None
    if verb == "put_new":
        return UnknownOutcome(what, where=where, do="save again: the next save finds out whether this one landed")
    return Unreachable(
        what, where=where, do="check the network and the state of the store; earlier checkpoints are whole"
    )
