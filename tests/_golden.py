"""Files that the frameworks wrote, and what they said is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from everystep import formats
from everystep.schema import join

FILES = Path(__file__).parent / "golden" / "formats"


def expected(folder: str) -> dict[str, Any]:
    found = json.loads((FILES / folder / "expected.json").read_text())
    return {
        path: np.frombuffer(bytes.fromhex(data), getattr(ml_dtypes, name, name)).reshape(shape)
        for path, (name, shape, data) in found.items()
    }


def arrays_of(state: Any, path: str = "") -> dict[str, Any]:
    """Every array of a state by its path."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        here = join(path, key)
        if isinstance(value, dict):
            found |= arrays_of(value, here)
        elif isinstance(value, np.ndarray):
            found[here] = value
    return found


def same(state: Any, wanted: dict[str, Any]) -> None:
    got = arrays_of(state)
    assert sorted(got) == sorted(wanted)
    for path, array in wanted.items():
        assert (got[path].dtype, got[path].shape) == (array.dtype, array.shape), path
        assert got[path].tobytes() == array.tobytes(), path


def reads_as_told(path: Path, folder: str, format: str) -> formats.Content:
    content = formats.read(path)
    assert content.format == format
    same(content.understood(), expected(folder))
    return content
