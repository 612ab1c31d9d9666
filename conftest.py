"""What holds for every test: nothing is left in the user's cache folder, and Ctrl-C arrives."""

import os
import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["EVERYSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell that starts something in the background has it ignore Ctrl-C, and all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
