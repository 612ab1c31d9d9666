"""The closed table of codecs that a manifest may name."""

from __future__ import annotations

RAW = 0
PLANES = 1
DELTA = 2
PACKED = 3
SPARSE = 4
NAMES = {RAW: "raw", PLANES: "planes", DELTA: "delta", PACKED: "packed", SPARSE: "sparse"}
LEANING = (DELTA, PACKED, SPARSE)
"""Those that need a base to be decoded."""
