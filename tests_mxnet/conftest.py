"""What holds for every test of MXNet: nothing is left in the user's cache folder, and sums round in one order."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when MXNet is imported


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["EVERYSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
