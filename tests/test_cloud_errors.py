"""What goes wrong in an object store: each in our words, with what to do, and never with a credential."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _fake_s3 import FakeS3, Fault, fake_s3

import everystep
from everystep.errors import (
    Error,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageFull,
    UnknownOutcome,
    Unreachable,
    UnsafeStore,
    UsageError,
)
from everystep.seam import Seam
from everystep.settings import Settings
from everystep.storage import open_storage
from everystep.storage.cloud import CloudStorage
from everystep.storage.cloud_errors import explain

KEY_ID, SECRET, TOKEN = "AKIAPLANTED00000001", "planted/secret+of/forty0characters0000000", "planted-session-token"
SIGNATURE = "planted%2Fsignature%3D"
PLANTED = (KEY_ID, SECRET, TOKEN, SIGNATURE, "planted/signature=")
QUICK = Settings(retry_seconds=0.001, outage_seconds=0.05, request_seconds=5)
# What a store may answer: the request as it was signed, with its headers.
CHATTY = f"""<Error><Code>SignatureDoesNotMatch</Code><Message>{SECRET}</Message>
<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId>
<CanonicalRequest>PUT /x x-amz-security-token:{TOKEN} ?sig={SIGNATURE}</CanonicalRequest></Error>"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    with fake_s3() as server:
        yield server


def bare(fake: FakeS3) -> CloudStorage:
    """Without the repeating."""
    return CloudStorage.open("s3", f"bucket/p?endpoint={fake.endpoint}", Seam(), QUICK)


def call(storage: Any, verb: str) -> Any:
    return {
        "get": lambda: storage.get("x"),
        "put": lambda: storage.put("x", [b"body"]),
        "put_new": lambda: storage.put_new("x", b"body"),
        "list": lambda: list(storage.list("")),
        "entries": lambda: list(storage.list("", deep=False)),
        "delete": lambda: storage.delete("x"),
        "stat": lambda: storage.stat("x"),
    }[verb]()


METHODS = {"put": "PUT", "put_new": "PUT", "delete": "DELETE", "stat": "HEAD"}


def raised(fake: FakeS3, verb: str, **fault: Any) -> Error:
    fake.faults.append(Fault(METHODS.get(verb, "GET"), **fault))
    with pytest.raises(Error) as caught:
        call(bare(fake), verb)
    assert not fake.faults, "nothing is asked twice in there"
    return caught.value


TABLE = [
    ("get", 404, "NoSuchKey", ObjectMissing, "no such object"),
    ("get", 404, "NoSuchBucket", StorageError, "there is no bucket 'bucket' at http"),
    ("put", 404, "NoSuchBucket", StorageError, "there is no bucket"),
    ("list", 404, "NoSuchBucket", StorageError, "there is no bucket"),
    ("entries", 404, "NoSuchBucket", StorageError, "there is no bucket"),
    ("put_new", 404, "ContainerNotFound", StorageError, "there is no bucket"),
    ("get", 403, "AccessDenied", StorageError, "does not let this process read"),
    ("stat", 403, "", StorageError, "does not let this process read"),
    ("put", 403, "AccessDenied", ReadOnly, "does not let this process write"),
    ("put_new", 403, "AccessDenied", ReadOnly, "does not let this process write: 403"),
    ("delete", 403, "AccessDenied", ReadOnly, "does not let this process delete"),
    ("get", 403, "InvalidAccessKeyId", StorageError, "does not accept the credentials: 403 InvalidAccessKeyId"),
    ("put", 403, "SignatureDoesNotMatch", StorageError, "does not accept the credentials"),
    ("get", 400, "ExpiredToken", StorageError, "does not accept the credentials"),
    ("list", 401, "", StorageError, "does not accept the credentials: 401"),
    ("get", 403, "RequestTimeTooSkewed", StorageError, "clock"),
    ("get", 301, "PermanentRedirect", StorageError, "another region"),
    ("put", 400, "AuthorizationHeaderMalformed", StorageError, "another region"),
    ("put", 403, "QuotaExceeded", StorageFull, "no space left: 403 QuotaExceeded"),
    ("put_new", 507, "", StorageFull, "no space left"),
    ("put", 507, "InsufficientStorage", StorageFull, "no space left"),
    ("get", 503, "SlowDown", Unreachable, "too busy"),
    ("put_new", 503, "SlowDown", Unreachable, "too busy"),
    ("put_new", 503, "", UnknownOutcome, "the store failed: 503"),
    ("put_new", 429, "", Unreachable, "too busy"),
    ("put", 500, "InternalError", Unreachable, "the store failed: 500 InternalError"),
    ("put_new", 500, "InternalError", UnknownOutcome, "the store failed"),
    ("put", 400, "RequestTimeout", Unreachable, "the store failed: 400 RequestTimeout"),
    ("get", 0, "", Unreachable, "connection to the store was lost"),
    ("list", 0, "", Unreachable, "connection to the store was lost"),
    ("put_new", 0, "", UnknownOutcome, "connection to the store was lost"),
    ("put_new", 501, "NotImplemented", UnsafeStore, "no create-only put"),
    ("put_new", 409, "OperationAborted", UnknownOutcome, "under way"),
    ("get", 400, "InvalidArgument", StorageError, "refused this: 400 InvalidArgument"),
    ("put", 418, "", StorageError, "refused this: 418"),
]


@pytest.mark.parametrize(("verb", "status", "code", "kind", "words"), TABLE)
def test_each_failure_has_its_class_and_words(
    fake: FakeS3, verb: str, status: int, code: str, kind: type[Error], words: str
) -> None:
    error = raised(fake, verb, status=status, code=code)
    assert type(error) is kind and words in error.what
    assert error.where == ("s3://bucket/p/" if verb in ("list", "entries") else "s3://bucket/p/x")
    assert error.do or kind is ObjectMissing


@pytest.mark.parametrize("verb", ["get", "put", "put_new", "list"])
def test_who_speaks_no_tls_is_told_apart_from_an_outage(fake: FakeS3, verb: str) -> None:
    """http:// and https:// are easily mixed up, and no waiting mends it."""
    endpoint = fake.endpoint.replace("http://", "https://")
    with pytest.raises(StorageError, match=f"what answers at {endpoint} does not speak TLS") as caught:
        call(CloudStorage.open("s3", f"bucket/p?endpoint={endpoint}", Seam(), QUICK), verb)
    assert type(caught.value) is StorageError and "begin with http://" in caught.value.do


@pytest.mark.parametrize(("verb", "status"), [("list", 404), ("get", 400), ("put", 400)])
def test_something_else_than_a_store_answers(fake: FakeS3, verb: str, status: int) -> None:
    error = raised(fake, verb, status=status, body="<html>nothing here</html>")
    assert error.what == f"what answers at {fake.endpoint} does not speak as a store does: {status}"
    assert "host and port" in error.do and type(error) is StorageError


def test_a_server_that_answers_everything_with_a_page_is_no_damage(fake: FakeS3) -> None:
    bare(fake).put("format.json", [b"<!doctype html><title>Sign in</title>"])
    with pytest.raises(everystep.ForeignRepository, match="a page of the web") as caught:
        everystep.open(f"s3://bucket/p?endpoint={fake.endpoint}", settings=QUICK).runs()
    assert "endpoint" in caught.value.do


def test_a_store_that_was_there_is_not_taken_for_something_else(fake: FakeS3) -> None:
    storage = bare(fake)
    storage.put("x", [b"body"])
    fake.faults.append(Fault("GET", 400, body="?"))
    with pytest.raises(StorageError, match="the store refused this: 400"):
        storage.get("x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ('Connect, ConnectError("dns error", Custom {', ": no such host is known"),
        ("Connect, ConnectError( Os { code: 111, kind: ConnectionRefused", ": nothing listens there"),
        ("Connect, TimedOut", ": it did not answer"),
        ("Connect, Other", ""),
    ],
)
def test_why_there_is_no_connection(fake: FakeS3, words: str, said: str) -> None:
    account = bare(fake)._account
    error = explain(OSError(f"HttpError {{ kind: Connect, source: {words}"), account, "get", "there", first=True)
    assert type(error) is Unreachable and error.what == f"no connection to {fake.endpoint}{said}"


def test_the_right_region_is_named(fake: FakeS3) -> None:
    body = "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"
    error = raised(fake, "put", status=400, body=body)
    assert "another region, eu-west-3" in error.what and "AWS_REGION=eu-west-3" in error.do


def test_an_unsafe_store_is_told_at_once(fake: FakeS3) -> None:
    fake.faults.append(Fault("PUT", 501, "NotImplemented"))
    with pytest.raises(UnsafeStore):
        open_storage(f"s3://bucket?endpoint={fake.endpoint}", Seam(), QUICK).put_new("x", b"")
    assert fake.count("PUT") == 1


def test_where_credentials_come_from_is_said(fake: FakeS3) -> None:
    assert "the environment (AWS_ACCESS_KEY_ID)" in raised(fake, "get", status=403, code="InvalidAccessKeyId").do


@pytest.mark.parametrize("status", [404, 403, 500])
def test_what_the_giver_of_credentials_says_is_no_word_of_the_store(
    fake: FakeS3, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine without a role answers 404; that is no missing object."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", fake.endpoint)
    fake.faults.append(Fault("PUT", status, part="/latest/api/token"))
    with pytest.raises(StorageError, match=f"no credentials were given out: {status}") as caught:
        bare(fake).get("x")
    assert type(caught.value) is StorageError and "this machine's role" in caught.value.do
    assert "or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in caught.value.do


# no credential in anything -------------------------------------------------------------------------------------------


def everything(error: BaseException) -> str:
    """All that a log, a traceback or a debugger would show of it, and of what it came from."""
    words = [str(error), repr(error), *traceback.format_exception(error)]
    for one in (error.__cause__, error.__context__):
        assert one is None or isinstance(one, Error), "the library's own error is carried on"
        words += [everything(one)] if one is not None else []
    return "\n".join(words)


@pytest.mark.parametrize("verb", ["get", "put", "put_new", "list", "entries", "delete", "stat"])
@pytest.mark.parametrize("status", [400, 403, 409, 500, 501])
def test_no_answer_of_the_store_is_repeated(
    fake: FakeS3, verb: str, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = everything(raised(fake, verb, status=status, body=CHATTY))
    out, err = capfd.readouterr()
    for secret in PLANTED:
        assert secret not in shown and secret not in caplog.text and secret not in out + err


def test_a_store_shows_no_credential(fake: FakeS3) -> None:
    url = f"s3://bucket/p?endpoint={fake.endpoint}"
    repo = everystep.open(url, settings=QUICK)
    repo.run("r").save(1, state={"w": b"x" * 100}).wait()
    storage = bare(fake)
    shown = [repr(storage), repr(vars(storage)), storage.url, storage.identity, repr(repo), repo.url]
    shown += [repr(open_storage(url, Seam())), *(body.decode("latin1") for body, _ in fake.objects.values())]
    for secret in PLANTED:
        assert all(secret not in text for text in shown)
    assert storage.identity == f"s3://bucket/p at {fake.endpoint}"


@pytest.mark.parametrize("status", [400, 403, 404, 409, 500, 0])
@pytest.mark.parametrize("verb", ["get", "put", "put_new", "list", "delete", "stat"])
def test_a_signed_url_is_not_repeated(
    fake: FakeS3, verb: str, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Azure's shared access signatures are a part of each request's address."""
    caplog.set_level(logging.DEBUG)
    connection = (
        f"BlobEndpoint={fake.endpoint}/account;AccountName=account;SharedAccessSignature=sv=2022&sig={SIGNATURE}"
    )
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    fake.faults.append(Fault(METHODS.get(verb, "GET"), status, body=CHATTY))
    with pytest.raises((Error, KeyError)) as caught:
        call(CloudStorage.open("az", "box/p", Seam(), QUICK), verb)
        assert (verb, status) == ("delete", 404)
        raise KeyError
    assert any("sig=" in path for _, path in fake.requests), "the signature was sent"
    shown = "" if isinstance(caught.value, KeyError) else everything(caught.value)
    assert all(secret not in shown + caplog.text for secret in PLANTED)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{KEY_ID}:{SECRET}@bucket/p",
        f"s3://bucket/p?secret_access_key={SECRET}",
        f"s3://bucket/p?endpoint=https://{KEY_ID}:{SECRET}@host",
        f"s3://bucket/p?style={SECRET}",
        f"az://box/p?account=a&endpoint=https://host/?sig={SIGNATURE}",
        f"az://box/p?account=a&sig={SIGNATURE}",
        f"gs://{TOKEN}@bucket",
        f"s4://{KEY_ID}:{SECRET}@bucket?sig={SIGNATURE}",
    ],
)
def test_a_url_that_holds_a_credential_is_refused_without_it(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_storage(url, Seam())
    assert all(secret not in everything(caught.value) for secret in PLANTED)


@pytest.mark.parametrize("text", [f"AccountKey={SECRET}", f"AccountName=a;AccountKey={SECRET}%%", SECRET])
def test_a_connection_string_that_makes_no_sense_is_not_repeated(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    with pytest.raises(UsageError) as caught:
        open_storage("az://box/p", Seam())
    assert SECRET not in everything(caught.value)
