"""moto's S3 as a server of its own: what AWS's client is tested against in many projects. PyPI: moto[server]"""

from __future__ import annotations

import sys
from pathlib import Path

from _server import Place, WebServer, free_ports

SECRET = "a-secret-that-moto-does-not-look-at"


class Moto(WebServer):
    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        super().__init__(command, folder / "moto.log", port)

    def place(self) -> Place:
        import boto3

        endpoint = f"http://127.0.0.1:{self.port}"
        client = boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="moto", aws_secret_access_key=SECRET
        )
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "moto",
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        return Place("moto", "s3", endpoint, environment, lambda name: client.create_bucket(Bucket=name), (SECRET,))
