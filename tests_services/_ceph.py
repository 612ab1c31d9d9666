"""A Ceph object gateway: one monitor, one object store in memory, one gateway, all of them real, on the loopback.

Debian: apt-get install ceph-mon ceph-osd ceph-common radosgw
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from _server import Place, Process, answers, free_ports

STORE_BYTES = 4 << 30
CONFIGURATION = """
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = v2:127.0.0.1:{mon}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
keyring = {folder}/keyring
run_dir = {folder}
admin_socket = {folder}/$name.asok
pid_file = {folder}/$name.pid
log_file = {folder}/log/$name.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = {nbytes}
ms_mon_client_mode = crc
ms_client_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
ms_bind_ipv4 = true
ms_bind_ipv6 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
setuser_match_path = {folder}
mon_data_avail_warn = 1
mon_data_avail_crit = 0
[mon.a]
mon_data = {folder}/mon
public_addr = v2:127.0.0.1:{mon}
[osd.0]
osd_data = {folder}/osd
[client.rgw.a]
rgw_data = {folder}/rgw
keyring = {folder}/keyring
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_thread_pool_size = 64
rgw_dns_name = localhost
rgw_s3_auth_use_sts = false
rgw_dynamic_resharding = false
rgw_bucket_quota_ttl = 0
"""


class Ceph:
    """Started when made. `stop` ends all of it; `kill_gateway` and `start_gateway` are an outage."""

    def __init__(self, folder: Path, store_bytes: int = STORE_BYTES) -> None:
        self.folder = folder
        for name in ("mon", "osd", "rgw", "log"):
            (folder / name).mkdir(parents=True)
        mon, self.port = free_ports(2)
        self.fsid = str(uuid.uuid4())
        configuration = CONFIGURATION.format(fsid=self.fsid, folder=folder, mon=mon, port=self.port, nbytes=store_bytes)
        (folder / "ceph.conf").write_text(configuration, encoding="ascii")
        self._environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}
        self._running: list[Process] = []
        self.gateway: Process | None = None
        try:
            self._start_monitor(mon)
            self._start_objects()
            self.start_gateway()
            self.key, self.secret = self.new_user("test")
        except BaseException:
            self.stop()
            raise

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "", secret: str = "") -> Any:
        """AWS's own client, for what everystep does not do itself: buckets, policies."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id=key or self.key, aws_secret_access_key=secret or self.secret,
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 3}),
        )  # fmt: skip

    def environment(self, key: str = "", secret: str = "") -> dict[str, str]:
        """What a program needs to come here as a user."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": key or self.key,
            "AWS_SECRET_ACCESS_KEY": secret or self.secret,
        }

    def place(self) -> Place:
        client = self.client()
        return Place(
            "Ceph", "s3", self.endpoint, self.environment(),
            lambda bucket: client.create_bucket(Bucket=bucket), (self.secret,),
        )  # fmt: skip

    def new_user(self, name: str) -> tuple[str, str]:
        """The key and secret of a user who has no rights but to buckets of his own."""
        key, secret = secrets.token_hex(10), secrets.token_hex(20)
        self.admin(
            "user", "create", f"--uid={name}", f"--display-name={name}", f"--access-key={key}", f"--secret={secret}"
        )
        return key, secret

    def admin(self, *arguments: str) -> Any:
        """What radosgw-admin answers."""
        text = self._run("radosgw-admin", *arguments)
        return json.loads(text) if text.strip() else None

    def start_gateway(self) -> None:
        """A gateway that was killed may find its old self still registered, and end: it is started once more then."""
        for attempt in range(3):
            self.gateway = self._start("radosgw", "-f", "-n", "client.rgw.a")
            try:
                self.gateway.wait_for(lambda: answers(self.port), 60)
                return
            except RuntimeError:
                self._running.remove(self.gateway)
                self.gateway.kill()
                if attempt == 2:
                    raise

    def kill_gateway(self) -> None:
        assert self.gateway is not None
        self.gateway.kill()
        self._running.remove(self.gateway)

    def stop(self) -> None:
        for process in reversed(self._running):
            process.kill()  # nothing that it keeps is wanted any more
        self._running.clear()

    def _start(self, *command: str) -> Process:
        process = Process(command, self.folder / "log" / f"{command[0]}.out", self._environment, self.folder)
        self._running.append(process)
        return process

    def _run(self, *command: str, seconds: float = 60) -> str:
        try:
            done = subprocess.run(
                command, env=self._environment, cwd=self.folder, capture_output=True, text=True, timeout=seconds
            )
        except FileNotFoundError:
            raise RuntimeError(f"{command[0]} is not installed: {(__doc__ or '').strip().splitlines()[-1]}") from None
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    def _start_monitor(self, port: int) -> None:
        keyring = str(self.folder / "keyring")
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
        self._run(
            "ceph-authtool", keyring, "--gen-key", "-n", "client.rgw.a", "--cap", "mon", "allow rwx",
            "--cap", "osd", "allow rwx",
        )  # fmt: skip
        monmap = str(self.folder / "monmap")
        self._run(
            "monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{port}]", "--fsid", self.fsid, monmap
        )  # fmt: skip
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._start("ceph-mon", "-f", "-i", "a")

    def _start_objects(self) -> None:
        own = str(uuid.uuid4())
        until = time.monotonic() + 30
        while True:
            try:
                self._run("ceph", "osd", "new", own, seconds=15)
                break
            except (RuntimeError, subprocess.TimeoutExpired):
                if time.monotonic() > until:
                    raise
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", own)
        self._start("ceph-osd", "-f", "-i", "0")
