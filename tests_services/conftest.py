"""Real servers, each started once for the tests of a process that need it. What does not start is a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from _azurite import Azurite
from _ceph import Ceph
from _moto import Moto
from _server import Place

CLOUDS = ("ceph", "moto", "azurite")
_THEIRS = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_HOST")


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    server = Ceph(tmp_path_factory.mktemp("ceph"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    server = Moto(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    server = Azurite(tmp_path_factory.mktemp("azurite"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def places() -> dict[str, Place]:
    """What each server has been asked for, so that no bucket is made twice."""
    return {}


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest, places: dict[str, Place], monkeypatch: pytest.MonkeyPatch) -> Place:
    """Each object store in turn; a program that is started here comes to it."""
    return at(request.param, request, places, monkeypatch)


@pytest.fixture
def on_ceph(request: pytest.FixtureRequest, places: dict[str, Place], monkeypatch: pytest.MonkeyPatch) -> Place:
    return at("ceph", request, places, monkeypatch)


def at(name: str, request: pytest.FixtureRequest, places: dict[str, Place], patch: pytest.MonkeyPatch) -> Place:
    server = request.getfixturevalue(name)
    place = places.setdefault(name, server.place())
    for variable in [*os.environ]:
        if variable.startswith(_THEIRS):
            patch.delenv(variable)
    for variable, value in place.environment.items():
        patch.setenv(variable, value)
    return place
