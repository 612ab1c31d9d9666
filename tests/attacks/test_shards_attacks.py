"""Hostile indexes of sharded weights, and what they name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _attacks import imported, nothing_happens, refused
from _formats import check
from safetensors.numpy import save_file

from everystep import exchange, formats
from everystep.errors import Error
from everystep.seam import Seam

pytestmark = pytest.mark.timeout(60)

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


def index(places: Any, metadata: Any = None) -> bytes:
    return json.dumps({"metadata": metadata or {}, "weight_map": places}).encode()


def folder(path: Path) -> Path:
    """One whole shard, and beside the folder a file that nothing in it may reach."""
    inner = path / "old"
    inner.mkdir()
    save_file({"w": np.ones(2, "f4"), "v": np.zeros(3)}, inner / SHARD)
    save_file({"w": np.full(2, 7, "f4")}, path / "secret.safetensors")
    return inner


BOTH = {"w": SHARD, "v": SHARD}
ATTACKS: dict[str, bytes] = {
    "a file above the folder": index({"w": "../secret.safetensors"}),
    "a file of the system": index({"w": "/etc/passwd"}),
    "a file in a folder": index({"w": "a/b.safetensors"}),
    "a file of Windows": index({"w": "..\\secret.safetensors"}),
    "the folder itself": index({"w": "."}),
    "the folder above": index({"w": ".."}),
    "no name": index({"w": ""}),
    "a name with a zero": index({"w": f"{SHARD}\0.safetensors"}),
    "a name of a megabyte": index({"w": "a" * (1 << 20)}),
    "itself": index({"w": INDEX}),
    "another index": index({"w": "other.safetensors.index.json"}),
    "a file that is missing": index({"w": "model-00002-of-00002.safetensors"}),
    "a name that the shard has not": index({**BOTH, "u": SHARD}),
    "a file of another kind": index({"w": "notes.txt"}),
    "a place that is a number": index({"w": 5}),
    "a place that is a list": index({"w": [SHARD]}),
    "a name twice": b'{"weight_map": {"w": "a", "w": "b"}}',
    "a table that is a list": index([SHARD]),
    "metadata that is a list": index(BOTH, [1]),
    "lists in lists": b'{"weight_map": ' + b"[" * 100_000,
    "no JSON": b'{"weight_map": {',
    "not UTF-8": b'{"weight_map": {"\xff": "a"}}',
    "a number of a million digits": b'{"metadata": {"total_size": ' + b"9" * 1_000_000 + b'}, "weight_map": {}}',
    "a table that makes no sense": index(BOTH, {"everystep": "{}"}),
    "a table of other arrays": index(
        BOTH,
        {
            "everystep": json.dumps(
                {"format": 1, "nodes": [["leaf", 0]], "values": [], "leaves": [["x", "<f4", "array"]]}
            )
        },
    ),
}
KINDS = {"a file that is missing": "not-found"}
"""Of those that are not called damaged."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack: str, tmp_path: Path) -> None:
    data, kind = ATTACKS[attack], KINDS.get(attack, "damaged")
    old = folder(tmp_path)
    (old / "notes.txt").write_text("nothing")
    (old / "other.safetensors.index.json").write_bytes(index(BOTH))
    (old / INDEX).write_bytes(data)
    refused(old / INDEX, kind)
    for got in imported(old):
        assert "7." not in str(got.state), "what lies outside of the folder came in"


def test_the_index_above_is_whole_but_for_one_thing(tmp_path: Path) -> None:
    old = folder(tmp_path)
    (old / INDEX).write_bytes(index(BOTH))
    check({"w": np.ones(2, "f4"), "v": np.zeros(3)}, formats.read(old / INDEX, strict=True).state)
    check({"w": np.ones(2, "f4"), "v": np.zeros(3)}, formats.read(old, strict=True).state)


def test_an_index_alone_opens_nothing(tmp_path: Path) -> None:
    with pytest.raises(Error) as caught:
        formats.read(index(BOTH))
    assert caught.value.kind == "unsupported"


def test_a_pipe_and_a_folder_in_place_of_a_shard(tmp_path: Path) -> None:
    """Whoever opened the pipe would wait for ever."""
    old = folder(tmp_path)
    os.mkfifo(old / "pipe.safetensors")
    (old / "folder.safetensors").mkdir()
    for name, kind in (("pipe.safetensors", "damaged"), ("folder.safetensors", "storage|damaged")):
        (old / INDEX).write_bytes(index({"w": name}))
        refused(old / INDEX, kind)


class Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


def test_a_shard_that_is_a_pickle_with_a_program(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "evil": Runs(tmp_path / "ran")}, tmp_path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(
        index(dict.fromkeys(("w", "evil"), "pytorch_model-00001-of-00001.bin"))
    )
    with nothing_happens():
        content = formats.read(tmp_path / "pytorch_model.bin.index.json")
    assert [opaque.class_name for opaque in content.not_understood] == ["posix.system"]
    assert list(content.understood()) == ["w"] and not (tmp_path / "ran").exists()
    refused(tmp_path / "pytorch_model.bin.index.json", "unsupported")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(index({"w": "plain.bin"}))
    refused(tmp_path / "pytorch_model.bin.index.json", "damaged")
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_leads_into_itself(tmp_path: Path) -> None:
    old = folder(tmp_path)
    os.symlink(old, old / "again")
    os.symlink("nowhere", old / "step_5.safetensors")
    with nothing_happens():
        seen = exchange.survey(str(old), Seam())
    assert {Path(one.path).name for one in seen.skipped} >= {"again", "step_5.safetensors"}
