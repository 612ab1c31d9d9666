"""All benchmarks, one after the other: python -m benchmarks [--folder DIR] [--json]."""

from __future__ import annotations

import argparse

from benchmarks import blocking, leaves, restore, timing, training, whole

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--folder", help="on the disk to measure; default: the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    options = [*(("--folder", given.folder) if given.folder else ()), *(("--json",) if given.json else ())]
    for part in (blocking, leaves, training, restore, whole):
        timing.say(f"{part.__name__} …")
        part.main(options)
