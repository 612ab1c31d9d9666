"""Who asks, and whom: URLs with their options, endpoints, regions and credentials, found as each cloud's tools do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from _fake_s3 import fake_s3

import everystep
from everystep.errors import UsageError
from everystep.seam import Files, Seam
from everystep.settings import Settings
from everystep.storage import cloud_azure, cloud_gcs, cloud_s3
from everystep.storage.cloud import CloudStorage

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
CREDENTIALS = """
[default]
aws_access_key_id = default-id
aws_secret_access_key = default-secret
[ceph]
aws_access_key_id = ceph-id
aws_secret_access_key = ceph-secret
aws_session_token = ceph-token
"""
CONFIG = """
[default]
region = eu-central-1
[profile ceph]
region = here
endpoint_url = https://ceph.example.org:7480/
[profile role]
role_arn = arn:aws:iam::1:role/x
source_profile = default
"""


class Told(Seam):
    """An environment and AWS's two files as a test has them."""

    def __init__(self, environment: Mapping[str, str], folder: Path | None = None) -> None:
        super().__init__(_Home(folder))
        self.environment = environment

    def environ(self, name: str) -> str | None:
        return self.environment.get(name)


class _Home(Files):
    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def absolute(self, path: str) -> str:
        return f"{self.folder or '/nowhere'}/{path.removeprefix('~/')}" if path.startswith("~/") else path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws" / "config").write_text(CONFIG)
    return tmp_path


def config_of(account: Any) -> dict[str, Any]:
    """What obstore is given, but for the credentials that it is given apart."""
    return dict(
        next(cell.cell_contents for cell in account.connect.__closure__ if isinstance(cell.cell_contents, dict))
    )


def keys_of(account: Any) -> Any:
    provider = next(cell.cell_contents for cell in account.connect.__closure__ if callable(cell.cell_contents))
    return provider()


# URLs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "bucket", "prefix", "url"),
    [
        ("bucket", "bucket", "", "s3://bucket"),
        ("bucket/", "bucket", "", "s3://bucket"),
        ("bucket/runs", "bucket", "runs/", "s3://bucket/runs"),
        ("bucket//a//b c/é/", "bucket", "a/b c/é/", "s3://bucket/a/b c/é"),
        ("my.bucket/50%/#1?region=x", "my.bucket", "50%/#1/", "s3://my.bucket/50%/#1"),
    ],
)
def test_the_parts_of_a_url(rest: str, bucket: str, prefix: str, url: str) -> None:
    address = cloud_s3.account(rest, Told(KEYS)).address
    assert (address.bucket, address.prefix, address.url) == (bucket, prefix, url)


@pytest.mark.parametrize("rest", ["", "/", "/x", "b/../c", "b/./c", "b/a\nb", "b?color=red", "b?region"])
def test_a_url_that_makes_no_sense(rest: str) -> None:
    if rest == "b?region":
        assert cloud_s3.account(rest, Told(KEYS)).endpoint == ""
        return
    with pytest.raises(UsageError):
        cloud_s3.account(rest, Told(KEYS))


@pytest.mark.parametrize(
    "endpoint", ["ceph.example.org", "ftp://host", "http://", "https://u:p@host", "https://host/?a=b", "http://h:port"]
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    for account, rest, more in (
        (cloud_s3.account, f"b?endpoint={endpoint}", KEYS),
        (cloud_gcs.account, f"b?endpoint={endpoint}", {}),
        (cloud_azure.account, f"b?account=a&endpoint={endpoint}", {"AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}),
    ):
        with pytest.raises(UsageError, match="no plain URL"):
            account(rest, Told(more))


@pytest.mark.parametrize("place", ["s3:/bucket/runs", "S3:bucket", "gs:/b", "az:/c", "hdfs:/host:8020/x"])
def test_a_url_that_lost_a_slash_is_no_folder(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from `pathlib.Path("s3://bucket/runs")`: a training would save into a folder called "s3:"."""
    monkeypatch.chdir(tmp_path)
    for given in (place, Path(place)):
        with pytest.raises(UsageError, match="and this would be a folder") as caught:
            everystep.open(given)
        assert "not through a Path" in caught.value.do
    assert everystep.open(f"./{place}").url == str(tmp_path / place)


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("s3a://bucket/x", "s3://bucket/prefix"), ("gcs://bucket", "gs://bucket/prefix"),
        ("abfss://c@account/x", "az://container/prefix"), ("webhdfs://h:1/x", "hdfs://host:port/path"),
        ("https://host/bucket", "s3://bucket/prefix?endpoint=https://host:port"),
    ],
)  # fmt: skip
def test_how_everystep_writes_what_others_write_otherwise(place: str, meant: str) -> None:
    with pytest.raises(UsageError, match="no storage for") as caught:
        everystep.open(place)
    assert caught.value.do == f"write {meant}"


def test_a_scheme_in_capitals() -> None:
    assert everystep.open("MEMORY://capitals").url == "memory://capitals"


# S3 ------------------------------------------------------------------------------------------------------------------


def test_the_nearest_word_on_the_endpoint_counts(home: Path) -> None:
    told = {**KEYS, "AWS_ENDPOINT_URL": "http://two", "AWS_PROFILE": "ceph"}
    assert cloud_s3.account("b?endpoint=http://one/", Told(told, home)).endpoint == "http://one"
    assert cloud_s3.account("b", Told(told, home)).endpoint == "http://two"
    assert cloud_s3.account("b", Told({**told, "AWS_ENDPOINT_URL_S3": "http://s3"}, home)).endpoint == "http://s3"
    assert cloud_s3.account("b", Told({"AWS_PROFILE": "ceph"}, home)).endpoint == "https://ceph.example.org:7480"
    assert cloud_s3.account("b?profile=ceph", Told({}, home)).endpoint == "https://ceph.example.org:7480"
    assert cloud_s3.account("b", Told({}, home)).endpoint == ""


def test_the_nearest_word_on_the_region_counts(home: Path) -> None:
    def region(rest: str, told: dict[str, str], folder: Path | None = home) -> str:
        return str(config_of(cloud_s3.account(rest, Told(told, folder)))["region"])

    assert region("b?region=r1", {"AWS_REGION": "r2"}) == "r1"
    assert region("b", {"AWS_REGION": "r2", "AWS_DEFAULT_REGION": "r3"}) == "r2"
    assert region("b", {"AWS_DEFAULT_REGION": "r3"}) == "r3"
    assert region("b", {}) == "eu-central-1" and region("b?profile=ceph", {}) == "here"
    assert region("b", KEYS, None) == "us-east-1"


def test_buckets_are_named_in_the_path_or_in_the_host() -> None:
    def style(rest: str, **told: str) -> tuple[Any, Any]:
        config = config_of(cloud_s3.account(rest, Told({**KEYS, **told})))
        return config.get("virtual_hosted_style_request"), config.get("endpoint")

    assert style("bucket") == (True, None) and style("my.bucket") == (False, None)
    assert style("bucket?style=path") == (False, None)
    assert style("bucket?endpoint=http://host:1") == (False, "http://host:1")
    assert style("bucket?endpoint=http://host:1&style=virtual") == (True, "http://bucket.host:1")
    assert style("bucket?endpoint=http://bucket.host&style=virtual") == (True, "http://bucket.host")
    assert style("bucket?endpoint=http://host", AWS_VIRTUAL_HOSTED_STYLE_REQUEST="true") == (True, "http://bucket.host")
    assert config_of(cloud_s3.account("x--use1-az4--x-s3", Told(KEYS)))["s3_express"] is True
    assert (
        not cloud_s3.account("x--use1-az4--x-s3", Told(KEYS)).is_sorted and cloud_s3.account("x", Told(KEYS)).is_sorted
    )
    with pytest.raises(UsageError, match="this style is not known"):
        style("bucket?style=odd")


def test_where_keys_are_looked_for(home: Path) -> None:
    def words(rest: str = "b", folder: Path | None = home, **told: str) -> str:
        return cloud_s3.account(rest, Told(told, folder)).credentials

    assert words(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="y") == "the environment (AWS_ACCESS_KEY_ID)"
    assert words() == "profile 'default' of AWS's configuration"
    assert words(AWS_PROFILE="ceph") == "profile 'ceph' of AWS's configuration"
    assert words("b?profile=ceph", AWS_ACCESS_KEY_ID="x") == "profile 'ceph' of AWS's configuration"
    assert "web identity" in words(AWS_WEB_IDENTITY_TOKEN_FILE="/t", AWS_ROLE_ARN="r")
    assert "container" in words(AWS_CONTAINER_CREDENTIALS_FULL_URI="http://x")
    assert "machine's role" in words(folder=None) and "none" in words(AWS_SKIP_SIGNATURE="true")
    account = cloud_s3.account("b?profile=ceph", Told({}, home))
    assert keys_of(account) == {
        "access_key_id": "ceph-id", "secret_access_key": "ceph-secret", "token": "ceph-token", "expires_at": None,
    }  # fmt: skip
    assert "ceph-secret" not in repr(account)


@pytest.mark.parametrize(("there", "missing"), [(0, 1), (1, 0)])
def test_half_a_pair_of_keys_is_said(home: Path, there: int, missing: int) -> None:
    names = list(KEYS)
    told = {names[there]: "planted", names[missing]: ""}
    with pytest.raises(UsageError, match=f"{names[there]} is set, and {names[missing]} is not") as caught:
        cloud_s3.account("b", Told(told, home))
    assert "planted" not in str(caught.value)
    assert "'ceph'" in cloud_s3.account("b?profile=ceph", Told(told, home)).credentials
    with (home / ".aws" / "credentials").open("a") as file:
        file.write("[half]\naws_access_key_id = planted\n")
    with pytest.raises(UsageError, match="profile 'half' has a key and no secret") as caught:
        cloud_s3.account("b?profile=half", Told({}, home))
    assert "planted" not in str(caught.value)


def test_profiles_that_cannot_be_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there is no profile 'cephh'"):
        cloud_s3.account("b?profile=cephh", Told({}, home))
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(UsageError, match="a role, a login or a program") as caught:
        cloud_s3.account("b?profile=role", Told({}, home))
    assert caught.value.do == "pip install boto3"
    (home / ".aws" / "credentials").write_text("[default\naws_secret_access_key = very-secret")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        cloud_s3.account("b", Told({}, home))
    assert "very-secret" not in str(caught.value) and caught.value.__context__ is None


def test_the_keys_of_a_profile_are_what_is_sent(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment has others, with a token that does not belong to them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "other-token")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    seen: list[dict[str, str]] = []
    with fake_s3() as server:
        handler = server._server.RequestHandlerClass
        monkeypatch.setattr(handler, "do_PUT", lambda self: (seen.append(dict(self.headers)), self._run())[1])
        rest = f"bucket?profile=default&endpoint={server.endpoint}"
        storage = CloudStorage(cloud_s3.account(rest, Told({}, home)), Seam(), Settings())
        storage.put("x", [b"body"])
    headers = {name.lower(): value for name, value in seen[0].items()}
    assert "Credential=default-id/" in headers["authorization"] and "x-amz-security-token" not in headers


# Google and Azure ----------------------------------------------------------------------------------------------------


def test_google() -> None:
    account = cloud_gcs.account("b/p", Told({"GOOGLE_APPLICATION_CREDENTIALS": "/key.json"}))
    assert account.credentials == "the file of GOOGLE_APPLICATION_CREDENTIALS" and account.endpoint == ""
    assert "application_default_credentials.json" in cloud_gcs.account("b", Told({})).credentials
    emulated = cloud_gcs.account("b", Told({"STORAGE_EMULATOR_HOST": "127.0.0.1:4443"}))
    assert (
        emulated.endpoint == "http://127.0.0.1:4443" and "disable_oauth" in config_of(emulated)["service_account_key"]
    )
    assert emulated.identity == "gs://b at http://127.0.0.1:4443"


def test_azure_by_connection_string() -> None:
    def account(text: str) -> Any:
        return cloud_azure.account("box/p", Told({"AZURE_STORAGE_CONNECTION_STRING": text}))

    found = account("DefaultEndpointsProtocol=https;AccountName=a;AccountKey=a2V5PT0=;EndpointSuffix=x.net")
    assert found.endpoint == "https://a.blob.x.net" and found.identity == "az://box/p at https://a.blob.x.net"
    assert config_of(found)["account_key"] == "a2V5PT0=" and "a2V5" not in repr(found)
    found = account("BlobEndpoint=https://a.blob.core.windows.net/;SharedAccessSignature=?sv=1&sig=x%3D")
    assert (config_of(found)["account_name"], config_of(found)["sas_key"]) == ("a", "sv=1&sig=x%3D")
    assert account("UseDevelopmentStorage=true").endpoint == "http://127.0.0.1:10000/devstoreaccount1"


def test_azure_by_the_environment() -> None:
    for variable, key in (("AZURE_STORAGE_ACCOUNT_KEY", "account_key"), ("AZURE_STORAGE_SAS_TOKEN", "sas_key")):
        account = cloud_azure.account("box", Told({"AZURE_STORAGE_ACCOUNT_NAME": "a", variable: "a2V5"}))
        assert config_of(account)[key] == "a2V5" and account.credentials == f"the environment ({variable})"
    account = cloud_azure.account("box?account=other", Told({"AZURE_STORAGE_ACCOUNT": "a"}))
    assert account.endpoint == "https://other.blob.core.windows.net" and "managed identity" in account.credentials
    with pytest.raises(UsageError, match="needs a storage account"):
        cloud_azure.account("box", Told({}))
