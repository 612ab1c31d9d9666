"""Hostile .keras files: code in a configuration, archives and weights that lie."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from _attacks import every_damage_is_an_error, nothing_happens, refused
from _formats import check
from _golden import FILES

from everystep import formats
from everystep.formats.keras_layout import layers_of

pytestmark = pytest.mark.timeout(120)


def weights(tree: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    with h5py.File(out, "w") as made:
        for path, value in tree.items():
            made[path] = value
    return out.getvalue()


GOOD = {"layers/dense/vars/0": np.ones((2, 2), "f4"), "layers/lambda/vars/0": np.ones(1)}


def keras(config: Any, body: bytes | None = None, method: int = zipfile.ZIP_STORED, **files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("metadata.json", b"{}")
        archive.writestr("config.json", config if isinstance(config, bytes) else json.dumps(config).encode())
        archive.writestr("model.weights.h5", weights(GOOD) if body is None else body)
        for name, data in files.items():
            archive.writestr(name.replace("__", "/"), data)
    return out.getvalue()


def stack(*layers: Any) -> dict[str, Any]:
    return {"class_name": "Sequential", "module": "os", "registered_name": "system", "config": {"layers": list(layers)}}


DENSE = {"class_name": "Dense", "config": {"name": "dense", "use_bias": False}}
CODE = base64.b64encode(b"\xe3" + b"\0" * 50).decode()
LAMBDA = {
    "class_name": "Lambda", "module": "keras.layers",
    "config": {"name": "lambda", "function": {"class_name": "__lambda__", "config": {"code": CODE, "defaults": None}}},
}  # fmt: skip


def test_code_in_a_configuration_stays_text(tmp_path: Path) -> None:
    data = keras(stack(DENSE, LAMBDA, {"class_name": "os.system", "config": {"name": f"touch {tmp_path / 'ran'}"}}))
    with nothing_happens():
        content = formats.read(data, strict=True)
    assert CODE in content.metadata["keras/config.json"]
    check({"model": {"dense": {"kernel": np.ones((2, 2), "f4")}, "lambda": {"0": np.ones(1)}}}, content.state)
    assert not (tmp_path / "ran").exists()


def test_what_else_lies_in_it_is_named_and_left() -> None:
    evil = pickle.dumps({"a": 1})
    content = formats.read(keras(stack(DENSE), assets__evil=evil, x=b"y", **{"..__..__up": b"z"}))
    assert {note.text for note in content.changed} == {
        "the file 'assets/evil' in it is left out", "the file 'x' in it is left out",
        "the file '../../up' in it is left out",
    }  # fmt: skip


CONFIGS: dict[str, Any] = {
    "empty": {}, "a list": [1], "a number": 3, "null": None, "no layers": stack(), "layers of numbers": stack(1, 2),
    "layers without a class": stack({}), "layers without a name": stack({"class_name": "Dense"}),
    "a class of numbers": stack({"class_name": 3, "config": 4}),
    "config of text": {"class_name": "Sequential", "config": "x"},
    "layers that are no list": {"class_name": "Sequential", "config": {"layers": {"a": 1}}},
    "options of other kinds": stack({"class_name": "Dense", "config": {"name": ["dense"], "use_bias": {}}}),
    "an optimizer of text": {**stack(DENSE), "compile_config": {"optimizer": "adam"}},
    "compiled with a number": {**stack(DENSE), "compile_config": 7},
    "a thousand layers of one name": stack(*[DENSE] * 1000),
    "layers within layers": stack({**stack(DENSE), "config": {"name": "dense", "layers": [DENSE]}}),
    "a strange name": stack({"class_name": "D" * 10_000 + "((", "config": {"name": "x" * 10_000}}),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_strange_configurations_lose_no_array(config: Any) -> None:
    with nothing_happens():
        content = formats.read(keras(config), strict=True)
    arrays: list[Any] = []

    def collect(part: Any) -> None:
        for value in part.values():
            collect(value) if isinstance(value, dict) else arrays.append(value)

    collect(content.state)
    assert sorted(array.shape for array in arrays) == [(1,), (2, 2)]


def test_names_that_a_pattern_could_take_long_for() -> None:
    with nothing_happens():
        assert len(layers_of(stack(*({"class_name": "A" * 2000 + "b" * n, "config": {}} for n in range(200))))) == 200


def growing(data: bytes) -> bytes:
    """The same archive, whose directory claims more than a gigabyte for its weights."""
    at = data.rfind(b"PK\1\2")
    return data[: at + 24] + ((1 << 30) + 1).to_bytes(4, "little") + data[at + 28 :]


WHOLE = weights({"layers/dense/vars/0": np.ones(2)})
ATTACKS: dict[str, tuple[bytes, str]] = {
    "no JSON": (keras(b"{"), "unsupported"),
    "JSON that nests": (keras(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "unsupported"),
    "a number without end": (keras(b'{"a":' + b"1" * 10_000 + b"}"), "unsupported"),
    "weights that are no HDF5": (keras(stack(DENSE), b"PK\3\4" + bytes(200)), "damaged"),
    "weights that are cut off": (keras(stack(DENSE), WHOLE[: len(WHOLE) // 2]), "damaged"),
    "weights that are empty": (keras(stack(DENSE), b""), "damaged"),
    "an archive that grows": (growing(keras(stack(DENSE), method=zipfile.ZIP_DEFLATED)), "unsupported"),
}  # fmt: skip


@pytest.mark.parametrize("data, kind", ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused(data: bytes, kind: str, tmp_path: Path) -> None:
    refused(data, kind, tmp_path / "old", "model.keras")


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("metadata.json", b"{}")
        archive.writestr("config.json", b"{}")
        archive.writestr("model.weights.npz", b"")
    error = refused(out.getvalue(), "unsupported", tmp_path / "old", "model.keras")
    assert "pickle" in error.what


def test_every_damage_is_seen() -> None:
    data = (FILES / "keras" / "model.keras").read_bytes()
    want = formats.read(data)

    def same(got: Any) -> bool:
        check(want.state, got.state)
        return True

    every_damage_is_an_error(data, lambda body: formats.read(body, format="keras", strict=True), same, tries=300)


def test_damage_within_an_archive_that_claims_to_be_whole() -> None:
    """With a CRC made anew, whatever the weights have become: an error, or arrays."""
    body = (FILES / "keras" / "model.weights.h5").read_bytes()
    every_damage_is_an_error(
        body, lambda damaged: formats.read(keras(stack(DENSE), damaged)), lambda got: True, tries=200, checked=False
    )
