"""Azurite, Microsoft's emulator of Azure's blob storage. npm install --prefix tests_services --no-package-lock"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
from email.utils import formatdate
from pathlib import Path

from _server import Place, WebServer, free_ports

PROGRAM = Path(__file__).parent / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
ACCOUNT = "devstoreaccount1"
# The key of the emulator's own account, which is the same everywhere and printed in its manual.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2021-08-06"


class Azurite(WebServer):
    def __init__(self, folder: Path) -> None:
        if not PROGRAM.exists():
            raise RuntimeError(f"Azurite is not installed: {__doc__}")
        (port,) = free_ports(1)
        command = [
            "node", str(PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder),
            "--silent", "--skipApiVersionCheck", "--disableTelemetry",
        ]  # fmt: skip
        super().__init__(command, folder / "azurite.log", port)

    def place(self) -> Place:
        endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        connection = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        environment = {"AZURE_STORAGE_CONNECTION_STRING": connection}
        return Place("Azurite", "az", endpoint, environment, self._create, (KEY,))

    def _create(self, container: str) -> None:
        """One signed request, for which a library would be a heavy thing to install."""
        date = formatdate(usegmt=True)
        headers = f"x-ms-date:{date}\nx-ms-version:{VERSION}\n"
        resource = f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        signed = "PUT" + "\n" * 12 + headers + resource
        digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(
                "PUT", f"/{ACCOUNT}/{container}?restype=container",
                headers={
                    "x-ms-date": date,
                    "x-ms-version": VERSION,
                    "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
                    "Content-Length": "0",
                },
            )  # fmt: skip
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 201:
                raise RuntimeError(f"no container: {answer.status} {body[:500]!r}")
        finally:
            connection.close()
