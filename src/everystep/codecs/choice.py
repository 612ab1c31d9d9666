"""Which form a chunk takes, from slices spread over it: a few percent of what encoding costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard

from everystep.codecs import delta, planes

Array = np.ndarray[Any, Any]
# Below this share of raw it is not worth leaning on a base: 4 KiB of a chunk of 4 MiB.
_GAIN_MIN = 0.001
# Grouping costs as much time as all the rest.
_GROUPED_RATIO = 0.99


def delta_form(
    data: Array, base: Array, dtype: str, level: int, sample_bytes: int, base_ratio: float
) -> delta.Form | None:
    """How to encode against the base, or None where the delta's estimate is above `base_ratio` of standing alone."""
    form = delta.form_of(dtype, data.nbytes)
    words = planes.WORDS[form.width]
    count = sample_bytes // form.width
    sample, old = (planes.spread(each.view(words), count) for each in (data, base))
    compressor = planes.compressors(level)[0]
    alone = _size(compressor, planes.split(planes.turned(sample, planes.form_of(dtype, sample.nbytes))))
    residual = delta.residual(sample, old, form)
    rows = planes.split(residual)
    ungrouped = best = _size(compressor, rows)
    if form.grouped:
        best = min(ungrouped, _grouped_size(rows, delta.exponents(old, form)))
    if best > base_ratio * alone or alone - best < _GAIN_MIN * sample.nbytes:
        return None
    return form if best < _GROUPED_RATIO * ungrouped else form._replace(shift=delta.UNGROUPED)


def _size(compressor: zstandard.ZstdCompressor, rows: Array) -> float:
    return float(sum(min(len(compressor.compress(memoryview(row))), row.nbytes) for row in rows))


def _grouped_size(rows: Array, key: Array) -> float:
    """Bytes by the entropy of each group's symbols, as codes of its own would come to."""
    counts = np.bincount(key, minlength=256)
    used = np.flatnonzero(counts)
    group = np.zeros(256, np.int64)
    group[used] = np.arange(used.size) << 8
    first = group[key]
    bits = 0.0
    for row in rows:
        if not row.any():
            continue
        cells = np.bincount(first + row, minlength=used.size << 8).reshape(used.size, 256)
        seen = cells > 0
        here = cells[seen].astype(np.float64)
        own = np.zeros(cells.shape)
        own[seen] = here * np.log2(here)
        total = counts[used] * np.log2(counts[used]) - own.sum(1)
        # Miller and Madow: what a small sample lacks of its source's entropy.
        total += (seen.sum(1) - 1) / (2 * np.log(2))
        bits += float(np.minimum(total, 8 * counts[used]).sum())
    return bits / 8
