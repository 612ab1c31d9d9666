"""Keras's .weights.h5 files: HDF5 with a group for each layer, and numbers for its variables."""

from __future__ import annotations

from everystep.formats import hdf5
from everystep.formats.content import Content
from everystep.formats.file import Source
from everystep.formats.keras_file import ATTACHMENTS
from everystep.formats.keras_file import write_weights as write

__all__ = ["ATTACHMENTS", "EXTENSIONS", "owns", "read", "write"]

EXTENSIONS: tuple[str, ...] = (".weights.h5",)


def owns(source: Source) -> bool:
    """Its bytes are those of any HDF5 file, whose reader reads it."""
    return False


def read(source: Source) -> Content:
    return hdf5.read(source)
