"""A real HDFS: one NameNode and its DataNodes, on the loopback.

The jars are those of Hadoop 2.7.3 that PyPI's pyspark==2.4.8 brings along; they are fetched once, into the user's cache
folder. Debian: apt-get install openjdk-17-jdk-headless
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _server import Process, free_ports

RELEASE = "pyspark-2.4.8"
_NEEDED = (
    "hadoop-", "commons-", "guava-14", "protobuf-java-2.5", "htrace-core-3", "slf4j-", "log4j-1", "jetty-", "jackson-",
    "netty-", "leveldbjni", "xerc", "javax.servlet-api", "xml-apis", "jsr305", "httpclient-4", "httpcore-4", "jaxb-api",
    "activation", "stax-api", "javax.ws.rs-api",
)  # fmt: skip
# Web pages that nobody looks at here ask for a servlet of a library that is not among the jars.
_SERVLET = """\
package com.sun.jersey.spi.container.servlet;
public class ServletContainer extends javax.servlet.http.HttpServlet {}
"""
_OPEN = [
    "--add-opens=java.base/java.lang=ALL-UNNAMED", "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED", "--add-opens=java.base/java.net=ALL-UNNAMED",
    "--add-opens=java.base/java.util=ALL-UNNAMED", "--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
    "--add-opens=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
]  # fmt: skip
_LOGGING = """\
log4j.rootLogger=INFO,f
log4j.appender.f=org.apache.log4j.ConsoleAppender
log4j.appender.f.layout=org.apache.log4j.PatternLayout
log4j.appender.f.layout.ConversionPattern=%d{ISO8601} %p %c{1}: %m%n
"""


def jars() -> Path:
    """The folder of the jars; fetched if this machine has not got it.

    Raises:
        RuntimeError: if they cannot be had.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everystep-tests"
    folder = cache / RELEASE
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _download(Path(scratch))
        new = Path(scratch) / "jars"
        new.mkdir()
        with tarfile.open(Path(scratch) / f"{RELEASE}.tar.gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if f"{RELEASE}/deps/jars/" in member.name and name.startswith(_NEEDED):
                    with archive.extractfile(member) as source, (new / name).open("wb") as target:  # type: ignore[union-attr]
                        shutil.copyfileobj(source, target)
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    return folder


def _download(folder: Path) -> None:
    wanted = ["download", RELEASE.replace("-", "=="), "--no-deps", "--no-binary", ":all:", "-d", str(folder), "-q"]
    said = ""
    # Its setup.py asks for pypandoc, of which it needs a function that newer ones lack.
    (folder / "constraints.txt").write_text("pypandoc<1.8\n", encoding="ascii")
    environment = {**os.environ, "PIP_CONSTRAINT": str(folder / "constraints.txt")}
    for python in dict.fromkeys((sys.executable, getattr(sys, "_base_executable", sys.executable))):
        command = [python, "-m", "pip", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        if done.returncode == 0:
            return
        said = done.stderr[-1000:]
    raise RuntimeError(f"{RELEASE} cannot be fetched, and without its jars there is no HDFS:\n{said}")


class Hdfs:
    """Started when made. Users are whoever HADOOP_USER_NAME says; root may do everything."""

    def __init__(self, folder: Path, datanodes: int = 1) -> None:
        self.folder = folder
        self.port, self._http, *self._ports = free_ports(2 + 3 * datanodes)
        self._running: list[Process] = []
        self._environment = {**os.environ, "HADOOP_USER_NAME": "root"}
        for name in ("conf", "log", "webapps/hdfs", "webapps/datanode", "webapps/secondary", "webapps/static"):
            (folder / name).mkdir(parents=True)
        self._classpath = self._make_classpath()
        (folder / "conf" / "log4j.properties").write_text(_LOGGING, encoding="ascii")
        self._write("core-site", {"fs.defaultFS": f"hdfs://127.0.0.1:{self.port}", "hadoop.tmp.dir": f"{folder}/tmp"})
        self._write("hdfs-site", self._site(datanodes))
        try:
            self.run("org.apache.hadoop.hdfs.server.namenode.NameNode", "-format", "-nonInteractive")
            self.namenode = self._start("namenode", "org.apache.hadoop.hdfs.server.namenode.NameNode", [])
            self.datanodes = [self.start_datanode(number) for number in range(datanodes)]
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"hdfs://127.0.0.1:{self.port}"

    def start_datanode(self, number: int = 0) -> Process:
        """Returns once the NameNode knows of it."""
        address, ipc, http = (f"127.0.0.1:{port}" for port in self._ports[3 * number : 3 * number + 3])
        own = {
            "dfs.datanode.data.dir": f"file://{self.folder}/data-{number}", "dfs.datanode.address": address,
            "dfs.datanode.ipc.address": ipc, "dfs.datanode.http.address": http,
        }  # fmt: skip
        (self.folder / f"data-{number}").mkdir(exist_ok=True)
        arguments = [f"-D{name}={value}" for name, value in own.items()]
        log = self.folder / "log" / f"datanode-{number}.log"
        before = _registered(log)
        process = self._start(f"datanode-{number}", "org.apache.hadoop.hdfs.server.datanode.DataNode", arguments)
        process.wait_for(lambda: _registered(log) > before)
        return process

    def kill_datanode(self, number: int = 0) -> None:
        self.datanodes[number].kill()
        self._running.remove(self.datanodes[number])

    def admin(self, *arguments: str) -> str:
        """What `hdfs dfsadmin` answers."""
        return self.run("org.apache.hadoop.hdfs.tools.DFSAdmin", *arguments)

    def run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [*self._java(), program, *arguments],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
        return done.stdout

    def stop(self) -> None:
        for process in reversed(self._running):
            process.kill()  # nothing that it keeps is wanted any more
        self._running.clear()

    def _start(self, name: str, program: str, arguments: Sequence[str]) -> Process:
        process = Process(
            [*self._java(), program, *arguments], self.folder / "log" / f"{name}.log", self._environment, self.folder
        )
        self._running.append(process)
        return process

    def _java(self) -> list[str]:
        if shutil.which("java") is None or shutil.which("javac") is None:
            raise RuntimeError("there is no JDK: apt-get install openjdk-17-jdk-headless")
        options = ["-Xmx256m", *_OPEN, "-Djava.net.preferIPv4Stack=true", f"-Dhadoop.home.dir={self.folder}"]
        return ["java", *options, "-cp", self._classpath]

    def _make_classpath(self) -> str:
        source, found = self.folder / "stub", sorted(jars().glob("*.jar"))
        package = source / "com" / "sun" / "jersey" / "spi" / "container" / "servlet"
        package.mkdir(parents=True)
        (package / "ServletContainer.java").write_text(_SERVLET, encoding="ascii")
        servlet = next(jar for jar in found if jar.name.startswith("javax.servlet-api"))
        if shutil.which("javac") is None:
            raise RuntimeError("there is no JDK: apt-get install openjdk-17-jdk-headless")
        subprocess.run(
            ["javac", "-cp", str(servlet), "-d", str(source), str(package / "ServletContainer.java")], check=True
        )
        return ":".join(map(str, (self.folder / "conf", self.folder, *found, source)))

    def _site(self, datanodes: int) -> dict[str, str]:
        return {
            "dfs.namenode.name.dir": f"file://{self.folder}/name",
            "dfs.replication": str(datanodes),
            "dfs.namenode.http-address": f"127.0.0.1:{self._http}",
            "dfs.namenode.rpc-bind-host": "127.0.0.1",
            "dfs.datanode.hostname": "127.0.0.1",
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",
            "dfs.namenode.safemode.extension": "0",
            "dfs.webhdfs.enabled": "false",
            "dfs.permissions.enabled": "true",
            "dfs.namenode.fs-limits.min-block-size": "1024",
        }

    def _write(self, name: str, values: dict[str, str]) -> None:
        rows = [f"<property><name>{key}</name><value>{value}</value></property>\n" for key, value in values.items()]
        text = f"<configuration>\n{''.join(rows)}</configuration>\n"
        (self.folder / "conf" / f"{name}.xml").write_text(text, encoding="ascii")


def _registered(log: Path) -> int:
    """How often a DataNode said that the NameNode knows of it."""
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return said.count("successfully registered with NN")
