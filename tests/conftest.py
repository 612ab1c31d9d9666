"""What holds for every test: nothing is left in the user's cache folder."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["EVERYSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
