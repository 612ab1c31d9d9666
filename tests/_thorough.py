"""How much of what can be tried one after the other is tried: EVERYSTEP_THOROUGH=1 has all of it (`make long`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
THOROUGH = os.environ.get("EVERYSTEP_THOROUGH") == "1"


def examples(all_of_them: int) -> int:
    """Of a property: a quarter of them at a desk."""
    return all_of_them if THOROUGH else -(-all_of_them // 4)


def some_of(cases: Sequence[T], share: int = 4) -> Sequence[T]:
    """One case in `share` at a desk, from the first to the last."""
    return cases if THOROUGH else cases[::share]
