"""The kernel in C, where it could be built."""

from __future__ import annotations

from typing import Any

from everystep.seam import REAL

kernel: Any = None
try:
    from everystep.codecs import _kernel
except ImportError:  # no compiler where it was installed
    HAS_KERNEL = False
else:
    kernel = _kernel
    HAS_KERNEL = REAL.environ("EVERYSTEP_KERNEL") != "0"
KERNEL = "C" if HAS_KERNEL else "NumPy"
