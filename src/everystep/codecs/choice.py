"""Which form a chunk takes, from slices spread over it: a few percent of what encoding costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard

from everystep.codecs import delta, packed, planes
from everystep.codecs.kinds import DELTA, PACKED, SPARSE
from everystep.codecs.native import HAS_KERNEL

Array = np.ndarray[Any, Any]
# Below this share of raw it is not worth leaning on a base: 4 KiB of a chunk of 4 MiB.
_GAIN_MIN = 0.001
# Grouping costs as much time as all the rest. It takes 3 to 60 % off weights, and nothing off Adam's second average.
_GROUPED_RATIO = 0.99


# Above that the places of the changed words cost more than a code for those that stand still.
_CHANGED_MAX = 0.25


def against(
    data: Array, base: Array, dtype: str, level: int, sample_bytes: int, worth_ratio: float, base_ratio: float
) -> tuple[int, list[Any]] | None:
    """(codec, pieces) of the smallest form against the base; None where standing alone costs about as little."""
    form = delta.form_of(dtype, data.nbytes)
    plan = packed.plan(data, base, form)
    limit = min(base_ratio * plan.alone, plan.alone - _GAIN_MIN * data.nbytes)
    if plan.changed <= _CHANGED_MAX:
        sparse = packed.pack_sparse(data, base, form, int(_CHANGED_MAX * data.nbytes) // form.width)
        if sparse is not None and len(sparse) <= min(limit, plan.packed):
            return SPARSE, [sparse]
    if HAS_KERNEL and (form.width > 1 or form.grouped):
        body = packed.pack(plan, data, base) if plan.packed <= limit else None
        return (PACKED, [body]) if body is not None else None
    # Bytes of which nothing is known may repeat in ways that only zstd sees; and it is NumPy's fastest way.
    found = delta_form(data, base, dtype, level, sample_bytes, base_ratio)
    pieces = delta.encode(data, base, found, level, sample_bytes, worth_ratio) if found is not None else None
    return (DELTA, pieces) if pieces is not None else None


def delta_form(
    data: Array, base: Array, dtype: str, level: int, sample_bytes: int, base_ratio: float
) -> delta.Form | None:
    """How to encode against the base, or None where the delta's estimate is above `base_ratio` of standing alone."""
    form = delta.form_of(dtype, data.nbytes)
    words = planes.WORDS[form.width]
    count = planes.share_of(data.nbytes, sample_bytes) // form.width
    sample, old = (planes.spread(each.view(words), count) for each in (data, base))
    if not sample.size:
        return None
    compressor = planes.compressors(level)[0]
    alone = sum(_sizes(compressor, planes.split(planes.turned(sample, planes.form_of(dtype, sample.nbytes)))))
    rows = planes.split(delta.residual(sample, old, form))
    sizes = _sizes(compressor, rows)
    ungrouped: float = sum(sizes)
    grouped = _grouped_size(rows, sizes, delta.exponents(old, form)) if form.grouped else ungrouped
    best = min(ungrouped, grouped)
    if best > base_ratio * alone or alone - best < _GAIN_MIN * sample.nbytes:
        return None
    if form.grouped:
        # zstd takes less of a sample than of a chunk: only estimates of one kind say what grouping alone gains.
        ungrouped = min(ungrouped, _grouped_size(rows, sizes, np.zeros(old.size, np.uint8)))
    return form if grouped < _GROUPED_RATIO * ungrouped else form._replace(shift=delta.UNGROUPED)


def _sizes(compressor: zstandard.ZstdCompressor, rows: Array) -> list[int]:
    return [min(len(compressor.compress(memoryview(row))), row.nbytes) for row in rows]


def _grouped_size(rows: Array, sizes: list[int], key: Array) -> float:
    """Bytes by the entropy of each group's symbols, as codes of its own would come to."""
    counts = np.bincount(key, minlength=256)
    used = np.flatnonzero(counts)
    group = np.zeros(256, np.int64)
    group[used] = np.arange(used.size) << 8
    first, total = group[key], 0.0
    for row, size in zip(rows, sizes):
        if not 0.002 * row.nbytes < size < 0.995 * row.nbytes:  # empty, or noise: grouping changes nothing
            total += size
            continue
        cells = np.bincount(first + row, minlength=used.size << 8).reshape(used.size, 256)
        seen = cells > 0
        here = cells[seen].astype(np.float64)
        own = np.zeros(cells.shape)
        own[seen] = here * np.log2(here)
        bits = counts[used] * np.log2(counts[used]) - own.sum(1)
        # Miller and Madow: what a small sample lacks of its source's entropy.
        bits += (seen.sum(1) - 1) / (2 * np.log(2))
        total += float(np.minimum(bits, 8 * counts[used]).sum()) / 8
    return total
