"""S3 and what speaks like it: the endpoint, the region and the credentials, found as AWS's own tools find them."""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from everystep.errors import UsageError
from everystep.seam import Seam
from everystep.storage.cloud_account import Account, Address, parse, plain_endpoint

OPTIONS = ("endpoint", "region", "profile", "style")
STYLES = ("path", "virtual")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_KEY, _SECRET = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
_DELEGATED = (
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "the web identity of AWS_WEB_IDENTITY_TOKEN_FILE"),
    ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "the container's role"),
    ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "the container's role"),
)
# What a profile may say instead of keys; AWS's own library knows how to follow it.
_ELSEWHERE = (
    "role_arn",
    "sso_session",
    "sso_start_url",
    "credential_process",
    "web_identity_token_file",
    "login_session",
)
_DIRECTORY = "--x-s3"
"""The end of the names of directory buckets, which list in an order of their own."""


def account(rest: str, seam: Seam) -> Account:
    """
    Raises:
        UsageError: for a URL, profile or endpoint that makes no sense.
    """
    address = parse("s3", rest, OPTIONS)
    name = address.options.get("profile") or seam.environ("AWS_PROFILE") or seam.environ("AWS_DEFAULT_PROFILE")
    profile = _read_profile(name or "default", seam)
    if name and not profile:
        raise UsageError(
            f"there is no profile {name!r} in AWS's configuration",
            where=address.url,
            do="look at ~/.aws/config and ~/.aws/credentials, or unset AWS_PROFILE",
        )
    environment = next(filter(None, map(seam.environ, _ENDPOINTS)), None)
    endpoint = address.options.get("endpoint") or environment or profile.get("endpoint_url", "")
    if endpoint:
        endpoint = plain_endpoint(endpoint, address.url)
    regions = (seam.environ("AWS_REGION"), seam.environ("AWS_DEFAULT_REGION"), profile.get("region"))
    config: dict[str, Any] = {
        "bucket": address.bucket,
        "region": address.options.get("region") or next(filter(None, regions), "us-east-1"),
        "disable_bulk_delete": True,  # one key at a time is what we ask, and what every store knows
        **_where(address, endpoint, seam),
    }
    words, provider = _credentials(address, name, profile, seam)

    def connect(client: Mapping[str, Any], retry: Mapping[str, Any]) -> Any:
        from obstore import store

        make: Any = store.S3Store
        more = {"credential_provider": provider} if provider is not None else {}
        return make(config=config, client_options=client, retry_config=retry, **more)

    usual = f"{_KEY} and {_SECRET}, or a profile"
    return Account(address, endpoint, words, connect, not address.bucket.endswith(_DIRECTORY), usual)


def _where(address: Address, endpoint: str, seam: Seam) -> dict[str, Any]:
    """The part of the configuration that says to whom requests go."""
    wish = address.options.get("style") or ("virtual" if _is_true(seam, "AWS_VIRTUAL_HOSTED_STYLE_REQUEST") else "")
    if wish and wish not in STYLES:
        raise UsageError("this style is not known", where=address.url, do=f"one of {', '.join(STYLES)}")
    if address.bucket.endswith(_DIRECTORY):
        return {"s3_express": True}
    if not endpoint:  # a name with dots fits no certificate of AWS
        return {"virtual_hosted_style_request": wish == "virtual" or (not wish and "." not in address.bucket)}
    if wish == "virtual":
        parts = urlsplit(endpoint)
        if not parts.netloc.startswith(f"{address.bucket}."):
            endpoint = parts._replace(netloc=f"{address.bucket}.{parts.netloc}").geturl()
    # Under both names, for of those two the environment's would win.
    return {
        "endpoint": endpoint,
        "aws_endpoint_url_s3": endpoint,
        "virtual_hosted_style_request": wish == "virtual",
    }


def _credentials(address: Address, name: str | None, profile: Mapping[str, str], seam: Seam) -> tuple[str, Any]:
    """Where they come from, in words; and who gives them, where obstore does not find them by itself."""
    asked = "profile" in address.options
    if _is_true(seam, "AWS_SKIP_SIGNATURE") and not asked:
        return "none: AWS_SKIP_SIGNATURE is set", None
    pair = [name for name in (_KEY, _SECRET) if seam.environ(name)]
    if len(pair) == 1 and not asked:
        other = _SECRET if pair == [_KEY] else _KEY
        raise UsageError(f"{pair[0]} is set, and {other} is not", where=address.url, do="set both, or take a profile")
    if pair and not asked:
        return f"the environment ({_KEY})", None
    for variable, words in _DELEGATED:
        if seam.environ(variable) and not asked:
            return words, None
    shown = f"profile {name or 'default'!r} of AWS's configuration"
    if profile.get("aws_access_key_id") and profile.get("aws_secret_access_key"):
        return shown, _Keys(profile)
    if "aws_access_key_id" in profile:
        do = "give it aws_secret_access_key, in ~/.aws/credentials"
        raise UsageError(f"profile {name or 'default'!r} has a key and no secret", where=address.url, do=do)
    if any(key in profile for key in _ELSEWHERE):
        return shown, _follow(name, address)
    return "this machine's role (nothing in the environment, no keys in a profile)", None


class _Keys:
    """The keys of a profile. Nothing of them is in its repr."""

    def __init__(self, profile: Mapping[str, str]) -> None:
        self._profile = profile

    def __call__(self) -> dict[str, Any]:
        return {
            "access_key_id": self._profile["aws_access_key_id"],
            "secret_access_key": self._profile["aws_secret_access_key"],
            "token": self._profile.get("aws_session_token") or None,
            "expires_at": None,
        }


def _follow(name: str | None, address: Address) -> Any:
    """AWS's own library, for a profile that says where credentials are and not what they are."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise UsageError(
            f"profile {name or 'default'!r} takes its credentials from a role, a login or a program",
            where=address.url,
            do="pip install boto3",
        ) from None
    return Boto3CredentialProvider(boto3.Session(profile_name=name))


def _read_profile(name: str, seam: Seam) -> dict[str, str]:
    """What AWS's two files say of a profile; the file of credentials wins."""
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        path = seam.files.absolute(seam.environ(variable) or usual)
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string(seam.files.read_text(path))
        except FileNotFoundError:
            continue
        except (OSError, configparser.Error) as error:
            # The parser's own words hold lines of the file.
            what = error.strerror if isinstance(error, OSError) else "it is no configuration file"
            problem = UsageError(f"AWS's configuration cannot be read: {what}", where=path, do="correct this file")
        else:
            if parser.has_section(section):
                found.update(parser.items(section))
            continue
        raise problem
    return found


def _is_true(seam: Seam, name: str) -> bool:
    return (seam.environ(name) or "").lower() in ("1", "true", "yes", "on")
