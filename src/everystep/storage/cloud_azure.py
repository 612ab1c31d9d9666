"""Azure's blob storage: the account, the endpoint and the credentials, found as Azure's own tools find them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everystep.errors import UsageError
from everystep.seam import Seam
from everystep.storage.cloud_account import Account, Address, parse, plain_endpoint

OPTIONS = ("account", "endpoint")
CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
_ACCOUNTS = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")
_SOURCES = (
    ("AZURE_STORAGE_ACCOUNT_KEY", "account_key"),
    ("AZURE_STORAGE_ACCESS_KEY", "account_key"),
    ("AZURE_STORAGE_KEY", "account_key"),
    ("AZURE_STORAGE_SAS_TOKEN", "sas_key"),
    ("AZURE_STORAGE_SAS_KEY", "sas_key"),
    ("AZURE_STORAGE_TOKEN", "token"),
    ("AZURE_STORAGE_CLIENT_SECRET", ""),
    ("AZURE_FEDERATED_TOKEN_FILE", ""),
)
_EMULATOR = "UseDevelopmentStorage"


def account(rest: str, seam: Seam) -> Account:
    """
    Raises:
        UsageError: for a URL, connection string or endpoint that makes no sense, or if no account is named.
    """
    address = parse("az", rest, OPTIONS)
    text = seam.environ(CONNECTION)
    if text and not address.options:
        config, words = _of_connection_string(text, address), f"the environment ({CONNECTION})"
    else:
        config, words = _of_environment(address, seam)
    config["container_name"] = address.bucket
    name, endpoint = config.get("account_name", ""), config.get("endpoint", "")
    if endpoint:
        config["endpoint"] = endpoint = plain_endpoint(endpoint, address.url)
    elif "use_emulator" in config:
        endpoint = "http://127.0.0.1:10000/devstoreaccount1"
    else:
        endpoint = f"https://{name}.blob.core.windows.net"

    def connect(client: Mapping[str, Any], retry: Mapping[str, Any]) -> Any:
        from obstore import store

        make: Any = store.AzureStore
        return make(config=config, client_options=client, retry_config=retry)

    return Account(address, endpoint, words, connect, usual=f"{_SOURCES[0][0]} or {CONNECTION}")


def _of_environment(address: Address, seam: Seam) -> tuple[dict[str, Any], str]:
    name = address.options.get("account") or next(filter(None, map(seam.environ, _ACCOUNTS)), None)
    endpoint = address.options.get("endpoint") or seam.environ("AZURE_STORAGE_ENDPOINT")
    if not name:
        raise UsageError(
            "an az:// URL needs a storage account",
            where=address.url,
            do=f"set {_ACCOUNTS[0]} or {CONNECTION}, or add ?account=… to the URL",
        )
    config: dict[str, Any] = {"account_name": name, **({"endpoint": endpoint} if endpoint else {})}
    for variable, key in _SOURCES:
        value = seam.environ(variable)
        if value:
            config.update({key: value} if key else {})
            return config, f"the environment ({variable})"
    return config, "this machine's managed identity (nothing in the environment)"


def _of_connection_string(text: str, address: Address) -> dict[str, Any]:
    pairs = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    found = {name.strip().lower(): value.strip() for name, value in pairs.items()}
    if found.get(_EMULATOR.lower(), "").lower() == "true":
        return {"use_emulator": True}
    name, endpoint = found.get("accountname", ""), found.get("blobendpoint", "")
    if not endpoint and name:
        protocol = found.get("defaultendpointsprotocol", "https")
        endpoint = f"{protocol}://{name}.blob.{found.get('endpointsuffix', 'core.windows.net')}"
    if not name:  # https://<account>.blob.…: all that a string with a signature alone says of it
        name = endpoint.partition("://")[2].partition(".")[0]
    config = {"account_name": name, "endpoint": endpoint}
    if found.get("accountkey"):
        config["account_key"] = found["accountkey"]
    elif found.get("sharedaccesssignature"):
        config["sas_key"] = found["sharedaccesssignature"].lstrip("?")
    if not name or len(config) < 3:
        raise UsageError(
            f"{CONNECTION} is no connection string",
            where=address.url,
            do="copy it whole from the account's access keys: AccountName=…;AccountKey=…;…",
        )
    return config
