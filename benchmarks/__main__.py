"""All benchmarks, one after the other, and the report.

python -m benchmarks [--only whole,codec] [--quick] [--folder DIR]

Each is a process of its own; one that fails is named in the report, and the others go on. Results are kept in
bench-out/results, so that any of them can be run again alone; RESULTS.md and its plots are written at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report, results, timing

SECONDS_MAX = 3600.0
QUICK_FOLDER = results.FOLDER.parent / "quick"


@dataclass(frozen=True)
class Part:
    """One benchmark as a whole run has it."""

    name: str
    """The result's."""
    module: str
    options: str = ""
    quick: str = ""
    """The same in a minute at most: whether it works, not how fast anything is."""


PARTS = (
    Part("whole", "whole", quick="--count 3"),
    Part("history", "history", quick="--count 2"),
    Part("blocking-large", "blocking", "--mb 1500 --rounds 4", "--mb 1050 --rounds 1"),
    Part("blocking-small", "blocking", "--mb 0 --rounds 7", "--mb 0 --rounds 1"),
    Part("training-10", "training", "--every 10", "--every 10 --steps 2 --rounds 1"),
    Part("training-5", "training", "--every 5 --steps 5 --rounds 5", "--every 5 --steps 2 --rounds 1"),
    Part("training-1", "training", "--every 1 --steps 5 --rounds 4", "--every 1 --steps 2 --rounds 1"),
    Part("restore", "restore", quick="--count 10 --others 2 --rounds 1"),
    Part("ranks", "ranks", quick="--mb 0 --rounds 1"),
    Part("behind", "behind", quick="--rates 200 --rounds 1"),
    Part("codec", "codec", quick="--rounds 1 --passes 1"),
    Part("stages", "stages", quick="--rounds 2"),
    Part("depth", "depth", quick="--count 3 --rounds 1 --settings base_depth_max=0 base_depth_max=2"),
    Part("leaves", "leaves", quick="--leaves 1000 --rounds 1"),
    Part("scale", "scale", quick="--count 100 --rounds 1"),
    Part("ranks-at-scale", "ranks_at_scale", quick="--ranks 4 16 --checkpoints 1000 --leaves 1000"),
)


def run(part: Part, options: str, folder: str | None, kept: Path) -> bool:
    """Whether it ended well; if not, the report says so."""
    given = [*options.split(), "--results", str(kept), *(("--folder", folder) if folder else ())]
    command = [sys.executable, "-m", f"benchmarks.{part.module}", *given]
    try:
        code = subprocess.run(command, check=False, timeout=SECONDS_MAX).returncode
        reason = f"exit code {code}"
    except subprocess.TimeoutExpired:
        code, reason = 1, f"no end after {SECONDS_MAX:.0f} s"
    if code:
        timing.say(f"{part.name} failed: {reason}")
        results.fail(kept, part.name, results.command(f"benchmarks.{part.module}", given), reason)
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--only", help=f"by commas, of {names}")
    parser.add_argument("--quick", action="store_true", help="few rounds, into bench-out/quick: does everything work?")
    parser.add_argument("--folder", help="on the disk to measure; default: the system's folder for temporary files")
    given = parser.parse_args()
    wanted = set(given.only.split(",")) if given.only else {part.name for part in PARTS}
    if wanted - {part.name for part in PARTS}:
        parser.error(f"not known: {given.only}; there are {names}")
    chosen = [part for part in PARTS if part.name in wanted]
    kept, failed = QUICK_FOLDER if given.quick else results.FOLDER, []
    for number, part in enumerate(chosen, 1):
        timing.say(f"{number} of {len(chosen)}: {part.name}")
        if not run(part, part.quick if given.quick else part.options, given.folder, kept):
            failed.append(part.name)
    report.main(["--quick"] if given.quick else [])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
