"""The folders that TensorFlow calls SavedModel: of these, the variables. The program in them is not even read."""

from __future__ import annotations

from dataclasses import replace

from everystep.errors import NotFound
from everystep.formats import tf_bundle
from everystep.formats.content import Content
from everystep.formats.file import opened
from everystep.seam import Seam

_PROGRAMS = {"saved_model.pb", "saved_model.pbtxt"}


def owns_folder(seam: Seam, path: str) -> bool:
    return any(name in _PROGRAMS and not is_folder for name, is_folder in seam.files.names(path))


def read_folder(seam: Seam, path: str) -> Content:
    """
    Raises:
        NotFound: for a program without variables.
        Damaged, Unsupported, StorageError: see `everystep.formats.read`.
    """
    index = f"{path}/{tf_bundle.VARIABLES}{tf_bundle.EXTENSIONS[0]}"
    try:
        with opened(index, seam) as source:
            return replace(tf_bundle.read(source), format="saved_model")
    except NotFound as error:
        do = "export it with its variables: tf.saved_model.save(model, path)"
        raise NotFound("a SavedModel without variables", where=path, do=do) from error
