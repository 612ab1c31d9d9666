"""Files of a folder that are no checkpoint by themselves: parts of one in several files, and descriptions of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from everystep.errors import Error
from everystep.formats import shards, tf_bundle
from everystep.formats.file import opened
from everystep.seam import Seam

STATE_BYTES_MAX = 1 << 20
_DATA = re.compile(r"(.+)\.data-(\d{5})-of-(\d{5})")
_INDEX = ".index.json"
_TF_STATE = "checkpoint"
_UNFINISHED = re.compile(r"\.orbax-checkpoint-tmp")
_DESCRIBES = "it describes the {}, and holds no state: keep it beside, or run.attach() it"
_ASIDE = (
    (re.compile(r".*-symbol\.json"), _DESCRIBES.format("network")),
    (re.compile(r"(?:.*[_-])?config\.json|special_tokens_map\.json|.*\.jinja"), _DESCRIBES.format("model")),
    (re.compile(r"(?:.*tokenizer.*|vocab|merges)\.(?:json|txt|model)"), _DESCRIBES.format("tokenizer")),
    (re.compile(r"events\.out\.tfevents\..*"), "a log of TensorBoard, which holds no state"),
)


@dataclass
class Sets:
    """What is known of a folder from its names.

    Attributes:
        parts: file that stands for a checkpoint -> the others that belong to it.
        missing: the same -> those that are not there.
        aside: file -> why it is none; empty where there is nothing to say.
    """

    parts: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)


def sets_of(folder: str, names: Collection[str], seam: Seam) -> Sets:
    """Which files of a folder others account for. Nothing that cannot be read is an error here."""
    found = Sets()
    for name in names:
        if name.endswith(_INDEX):
            _add(found, name, _shards(f"{folder}/{name}", seam), names)
    _bundles(found, names)
    if _TF_STATE in names:
        _tf_state(found, f"{folder}/{_TF_STATE}", names, seam)
    for name in names:
        why = next((text for pattern, text in _ASIDE if pattern.fullmatch(name)), None)
        if why is not None and name not in found.parts:
            found.aside[name] = why
    return found


def is_unfinished(folder: str) -> bool:
    """Whether a folder is one that Orbax had not finished."""
    return _UNFINISHED.search(folder) is not None


def _add(found: Sets, head: str, parts: Sequence[str], names: Collection[str]) -> None:
    missing = [part for part in parts if part not in names]
    if parts:
        found.parts[head] = [part for part in parts if part in names]
        found.aside |= dict.fromkeys(found.parts[head], "")
    if missing:
        found.missing[head] = missing


def _shards(path: str, seam: Seam) -> list[str]:
    try:
        with opened(path, seam) as source:
            return shards.files_of(source) if shards.owns(source) else []
    except (Error, OSError):
        return []  # its reader says what is wrong with it, once it is looked at


def _bundles(found: Sets, names: Collection[str]) -> None:
    """TensorFlow's: an index, and files of data that say how many they are."""
    data: dict[str, list[re.Match[str]]] = {}
    for name in names:
        match = _DATA.fullmatch(name)
        if match:
            data.setdefault(match[1], []).append(match)
    for prefix, parts in data.items():
        index = f"{prefix}.index"
        count = min(int(parts[0][3]), len(names) + 1)
        if index in names:
            wanted = [f"{prefix}.data-{number:05d}-of-{parts[0][3]}" for number in range(count)]
            _add(found, index, wanted, names)
        found.aside |= {
            part[0]: "" if index in names else f"a part of a checkpoint whose {index} is not here" for part in parts
        }


def _tf_state(found: Sets, path: str, names: Collection[str], seam: Seam) -> None:
    """The file in which TensorFlow's CheckpointManager keeps the names of its checkpoints."""
    try:
        told = tf_bundle.state_of(seam.files.read_text(path)) if seam.files.size(path) <= STATE_BYTES_MAX else []
    except (OSError, ValueError):
        return
    if not told:
        return
    gone = [name for name in (one.rpartition("/")[2] for one in told) if f"{name}.index" not in names]
    found.aside[_TF_STATE] = f"it names checkpoints that are not here: {', '.join(gone[:5])}" if gone else ""


def size_of(folder: str, parts: Mapping[str, Sequence[str]], name: str, seam: Seam) -> int:
    """Bytes of the files that belong to one."""
    return sum(seam.files.size(f"{folder}/{part}") for part in parts.get(name, ()))
