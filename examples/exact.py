"""Train the example of each framework twice: left alone, and killed with SIGKILL again and again. Compare their ends.

python examples/exact.py --out exact-out
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from rich.console import Console
from rich.table import Table

import everystep

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = [HERE.parent / name / "bin" / "python" for name in (".venv", ".venv-frameworks", ".venv-mxnet")]
WHOLE, KILLED = "whole", "killed"
SHARES = (0.3, 0.55, 0.8)
"""Of its steps, after which a run is killed, each time."""
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Example:
    """A script, the package that it needs, and how it is told where to train and for how long."""

    framework: str
    package: str
    script: str
    told: Callable[[str, str, int], list[str]]
    factor: int = 1
    """So many times the steps: one that is quick is over before it can be killed."""


def usual(runs: str, run: str, steps: int) -> list[str]:
    return ["--runs", runs, "--run", run, "--steps", str(steps)]


def in_mixed_precision(runs: str, run: str, steps: int) -> list[str]:
    return [*usual(runs, run, steps), "--amp"]


def by_repo(runs: str, run: str, steps: int) -> list[str]:
    return ["--repo", runs, "--run", run, "--steps", str(steps)]


def by_epochs(runs: str, run: str, steps: int) -> list[str]:
    """Of two epochs."""
    return ["--repo", runs, "--run", run, "--epochs", "2", "--batches", str(-(-steps // 2)), "--save-every", "3"]


EXAMPLES = [
    Example("PyTorch", "torch", "gpt.py", by_epochs),
    Example("TensorFlow", "tensorflow", "tensorflow_example.py", usual),
    Example("JAX", "jax", "jax_example.py", by_repo, factor=3),
    Example("MXNet", "mxnet", "mxnet_example.py", in_mixed_precision),
    Example("NumPy", "numpy", "numpy_example.py", usual, factor=10),
]


@dataclass
class Outcome:
    """What came of one framework's two runs."""

    version: str
    steps: int
    resumed_at: list[int]
    leaves: int
    digest: str
    differing: list[str]


def find_python(package: str) -> tuple[str, str] | None:
    """(interpreter, version) of the first environment that has a package."""
    ask = f"import importlib.metadata as m; print(m.version({package!r}))"
    for python in [Path(sys.executable), *ENVIRONMENTS]:
        if python.exists():
            done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True)
            if done.returncode == 0:
                return str(python), done.stdout.strip()
    return None


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def latest_step(repo: everystep.Repository) -> int:
    try:
        latest = repo[KILLED].latest
    except everystep.NotFound:
        return 0
    return latest.step if latest is not None else 0


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"{' '.join(map(str, process.args))} ended with {process.returncode}:\n{log.read_text()[-2000:]}")


def kill_after(process: subprocess.Popen[bytes], repo: everystep.Repository, step: int, log: Path) -> None:
    """SIGKILL, from outside, some time after the checkpoint of a step is there: in the middle of an epoch and of a
    step, perhaps of a save."""
    while latest_step(repo) < step:
        if process.poll() is not None:
            finish(process, log)
            sys.exit(f"{' '.join(map(str, process.args))} was too quick to be killed at step {step}; try more --steps")
        time.sleep(0.002)
    time.sleep(0.01)
    process.kill()
    process.wait()


def digest(checkpoint: everystep.Checkpoint) -> str:
    """Of every byte of its leaves, and of what they are."""
    found = blake3()
    leaves = checkpoint.leaves()
    arrays = checkpoint.load(only=[leaf.path for leaf in leaves])
    for leaf in sorted(leaves, key=lambda leaf: leaf.path):
        value = arrays[leaf.path]
        found.update(f"{leaf.path} {leaf.dtype} {leaf.shape}".encode())
        found.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
    return found.hexdigest()


def compare(repo: everystep.Repository) -> tuple[str, int, list[str]]:
    """(digest, leaves, what differs): weights, optimizer, schedule, random states, place in the data."""
    whole, killed = repo[WHOLE].latest, repo[KILLED].latest
    assert whole is not None and killed is not None
    change = whole.diff(killed)
    differing = [leaf.path for leaf in change.changed] + [value.path for value in change.values]
    differing += ["the last step"] * (whole.step != killed.step) + ["digest"] * (digest(whole) != digest(killed))
    return digest(killed), len(killed.leaves()), differing


def try_out(example: Example, python: str, version: str, folder: Path, steps: int) -> Outcome:
    runs, log = str(folder / "runs"), folder / "log.txt"
    command = [python, str(HERE / example.script)]
    finish(start([*command, *example.told(runs, WHOLE, steps)], log), log)
    repo = everystep.open(runs)
    whole = repo[WHOLE].latest
    assert whole is not None
    resumed_at = []
    for share in SHARES:
        process = start([*command, *example.told(runs, KILLED, steps)], log)
        kill_after(process, repo, max(1, int(share * whole.step)), log)
        resumed_at.append(latest_step(repo))
    finish(start([*command, *example.told(runs, KILLED, steps)], log), log)
    ended = [session["ended"] for session in repo[KILLED].sessions()]
    assert ended == ["died"] * len(SHARES) + ["closed"], f"the processes of the killed run ended {ended}"
    return Outcome(version, whole.step, resumed_at, *_told(compare(repo)))


def _told(found: tuple[str, int, list[str]]) -> tuple[int, str, list[str]]:
    return found[1], found[0], found[2]


def run_all(chosen: Sequence[Example], out: Path, steps: int) -> bool:
    table = Table(title="left alone, and killed again and again: the same end?", title_justify="left")
    for name in ("framework", "version", "steps", "killed", "resumed at", "leaves", "BLAKE3 of the end", "equal bits"):
        table.add_column(name, justify="right" if name in ("steps", "killed", "leaves") else "left")
    good = True
    for example in chosen:
        found = find_python(example.package)
        if found is None or not (HERE / example.script).exists():
            table.add_row(example.framework, "not installed", *[""] * 5, "no")
            good = False
            continue
        console.print(f"{example.framework} {found[1]} …")
        folder = out / example.package
        folder.mkdir(parents=True)
        outcome = try_out(example, *found, folder, steps * example.factor)
        equal = "yes" if not outcome.differing else f"no: {', '.join(outcome.differing[:3])}"
        good = good and not outcome.differing
        table.add_row(
            example.framework, outcome.version, str(outcome.steps), f"{len(outcome.resumed_at)} times",
            ", ".join(map(str, outcome.resumed_at)), str(outcome.leaves), outcome.digest[:16], equal,
        )  # fmt: skip
    console.print(table)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a new folder for the runs and what the examples print")
    parser.add_argument("--only", nargs="+", choices=[example.package for example in EXAMPLES], metavar="PACKAGE")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    chosen = [example for example in EXAMPLES if args.only is None or example.package in args.only]
    if args.out is not None:
        good = run_all(chosen, args.out, args.steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            good = run_all(chosen, Path(folder), args.steps)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
