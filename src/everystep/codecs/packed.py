"""Residuals to a base in codes of their own for each exponent of the base, and only those of the words that changed.

Within .005 of raw of the entropy of the residual given the base's exponent, on weights of real trainings. The kernel
does it; where it could not be built, NumPy gives the same bytes, and the same words from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from everystep.codecs import packed_numpy
from everystep.codecs.delta import Form
from everystep.codecs.native import HAS_KERNEL, kernel
from everystep.errors import Damaged

Array = np.ndarray[Any, Any]
Piece = bytes | memoryview
_ROOM = 32 << 10  # beside the blocks: a header, and what the kernel wants free behind the last block


class Plan(NamedTuple):
    """What a sample of a chunk says, and the header with its codes."""

    form: Form
    header: bytes
    packed: float
    """Bytes as residuals."""
    alone: float
    """Bytes as planes of their own, byte by byte."""
    changed: float
    """Share of the words that differ from the base's."""


def plan(data: Array, base: Array, form: Form) -> Plan:
    found = kernel.plan(data, base, *_numbers(form)) if HAS_KERNEL else packed_numpy.plan(data, base, form)
    return Plan(form, *found)


def pack(plan: Plan, data: Array, base: Array) -> Piece | None:
    """The chunk as residuals to a base of equal length; None where that gains nothing."""
    if not HAS_KERNEL:
        body = packed_numpy.pack(plan.header, data, base)
        return body if len(body) < data.nbytes else None
    for room in (int(plan.packed * 1.02), data.nbytes):
        out = np.empty(room + _ROOM, np.uint8)
        size = kernel.pack(plan.header, data, base, out)
        if size is not None:
            return memoryview(out)[:size] if size < data.nbytes else None
    return None


def pack_sparse(data: Array, base: Array, form: Form, most: int) -> Piece | None:
    """Positions and residuals of the words that differ; None where they are more than `most`, or gain nothing."""
    if not HAS_KERNEL:
        body = packed_numpy.pack_sparse(data, base, form, most)
        return body if body is not None and len(body) < data.nbytes else None
    out = np.empty(most * (form.width + 4) + (most >> 5) + 2 * _ROOM, np.uint8)
    size = kernel.pack_sparse(data, base, *_numbers(form), most, out)
    return bytes(out[:size]) if size is not None and size < data.nbytes else None


def unpack(stored: memoryview, base: Array, out: Array, *, sparse: bool) -> None:
    """The inverse of both, into `out`, which may be `base`; time and memory are bounded by its length.

    Raises:
        Damaged: if the stored bytes cannot be what was made, or the base has another length.
    """
    if base.nbytes != out.nbytes:
        raise Damaged(f"a base of {base.nbytes} bytes for a chunk of {out.nbytes}", do="run fsck")
    if not HAS_KERNEL:
        (packed_numpy.unpack_sparse if sparse else packed_numpy.unpack)(stored, base, out)
        return
    wrong = (kernel.unpack_sparse if sparse else kernel.unpack)(stored, base, out)
    if wrong is not None:
        raise Damaged(f"a packed chunk is not one: {wrong}", do="run fsck")


def _numbers(form: Form) -> tuple[int, int, int]:
    return form.width, int(form.signed_magnitude), form.shift
