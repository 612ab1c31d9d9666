"""Google Cloud Storage: the endpoint and the credentials, found as Google's own tools find them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from everystep.seam import Seam
from everystep.storage.cloud_account import Account, parse, plain_endpoint

OPTIONS = ("endpoint",)
_SOURCES = (
    ("GOOGLE_SERVICE_ACCOUNT_KEY", "the environment (GOOGLE_SERVICE_ACCOUNT_KEY)"),
    ("GOOGLE_SERVICE_ACCOUNT", "the file of GOOGLE_SERVICE_ACCOUNT"),
    ("GOOGLE_SERVICE_ACCOUNT_PATH", "the file of GOOGLE_SERVICE_ACCOUNT_PATH"),
    ("GOOGLE_APPLICATION_CREDENTIALS", "the file of GOOGLE_APPLICATION_CREDENTIALS"),
)
_LOGIN = "~/.config/gcloud/application_default_credentials.json"
# An emulator asks for no token; without this one is fetched all the same.
_NOBODY = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
EMULATOR = "STORAGE_EMULATOR_HOST"


def account(rest: str, seam: Seam) -> Account:
    """
    Raises:
        UsageError: for a URL or endpoint that makes no sense.
    """
    address = parse("gs", rest, OPTIONS)
    emulator = seam.environ(EMULATOR) or ""
    if emulator and "://" not in emulator:
        emulator = f"http://{emulator}"
    endpoint = address.options.get("endpoint") or emulator
    config: dict[str, Any] = {"bucket": address.bucket}
    if endpoint:
        config["base_url"] = endpoint = plain_endpoint(endpoint, address.url)
    words = next((words for variable, words in _SOURCES if seam.environ(variable)), None)
    if words is None and emulator:
        config["service_account_key"] = json.dumps({**_NOBODY, "gcs_base_url": endpoint})
        words = f"none: {EMULATOR} is set"
    if words is None:
        words = f"{_LOGIN}, or this machine's service account"

    def connect(client: Mapping[str, Any], retry: Mapping[str, Any]) -> Any:
        from obstore import store

        make: Any = store.GCSStore
        return make(config=config, client_options=client, retry_config=retry)

    return Account(address, endpoint, words, connect, usual="GOOGLE_APPLICATION_CREDENTIALS")
