"""Kill a training run again and again, start it again each time, and compare its end with a run that nobody killed.

python examples/demo.py --out demo-out
python examples/demo.py --out demo-out --repo s3://bucket/prefix
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

import everystep
from everystep.seam import REAL
from everystep.storage import open_storage

TRAINER = Path(__file__).parent / "gpt.py"
STRAIGHT, KILLED = "straight", "killed"
console = Console()


@dataclass
class Life:
    """One process of the run: its steps and losses, and how it ended."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    killed: str | None = None


class Trainer:
    """The training script as a process of its own; what it prints is what the parent knows of it."""

    def __init__(self, repo: str, run: str, options: list[str], progress: Progress, bar: Any) -> None:
        command = [sys.executable, str(TRAINER), "--repo", repo, "--run", run, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.life, self._progress, self._bar = Life(), progress, bar

    def steps(self) -> Iterator[int]:
        """Each step as it is printed, until the process ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            _, step, _, loss = line.split()
            self.life.steps.append(int(step))
            self.life.losses.append(float(loss))
            self._progress.update(self._bar, completed=int(step))
            yield int(step)

    def finish(self) -> Life:
        for _ in self.steps():
            pass
        if self.process.wait() != 0 and self.life.killed is None:
            sys.exit(f"the trainer ended with {self.process.returncode}; its words are above")
        return self.life

    def kill(self, how: str) -> Life:
        self.life.killed = how
        self.process.kill()
        return self.finish()


def kill_at_random(trainer: Trainer, after: int, chance: random.Random) -> Life:
    """SIGKILL a random while after some step: no handler runs, nothing is flushed."""
    for step in trainer.steps():
        if step >= after:
            time.sleep(chance.random() * 0.1)
            return trainer.kill(f"at a random moment of step {step + 1}")
    return trainer.finish()


def kill_in_save(trainer: Trainer, after: int, repo: str) -> Life:
    """SIGKILL between the first byte of a save and its commit: a pack is there that no record names yet."""
    for step in trainer.steps():
        if step >= after:
            break
    while trainer.process.poll() is None:
        records, packs = count(repo, "log"), count(repo, "packs")
        while trainer.process.poll() is None and count(repo, "packs") == packs:
            time.sleep(0.0005)
        life = trainer.kill("in the middle of a save")
        if count(repo, "log") == records:
            return life
        life.killed = "just after a save"
        return life
    return trainer.finish()


def count(repo: str, part: str) -> int:
    """Files of the killed run in a folder, unfinished ones too; in a store those that have arrived."""
    if "://" in repo:
        return sum(1 for _ in open_storage(repo, REAL).list(f"runs/{KILLED}/{part}/"))
    folder = Path(repo) / "runs" / KILLED / part
    return sum(1 for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def new_prefix(url: str) -> str:
    """A place below a URL that no demo has used."""
    path, mark, options = url.partition("?")
    return f"{path.rstrip('/')}/demo-{REAL.token(4)}{mark}{options}"


def train_and_kill(repo: str, total: int, options: list[str], seed: int) -> list[Life]:
    """The run that dies: at random moments, and in the middle of a save; started again each time."""
    chance = random.Random(seed)
    lives: list[Life] = []
    quarter = total // 5
    with bars() as progress:
        bar = progress.add_task("the same run, killed", total=total, note="")
        while True:
            trainer = Trainer(repo, KILLED, options, progress, bar)
            random_kills = sum("random" in (life.killed or "") for life in lives)
            reached = max((life.steps[-1] for life in lives if life.steps), default=0)
            after = min(reached + 1 + chance.randrange(quarter), total - 12)
            if random_kills < 3:
                lives.append(kill_at_random(trainer, after, chance))
            elif not any("middle" in (life.killed or "") for life in lives):
                lives.append(kill_in_save(trainer, after, repo))
            else:
                lives.append(trainer.finish())
                return lives
            progress.update(bar, note=f"killed {len(lives)} times")
            progress.console.print(f"  SIGKILL {lives[-1].killed}; started again")


def train_straight(repo: str, total: int, options: list[str]) -> Life:
    with bars() as progress:
        bar = progress.add_task("a run that nobody kills", total=total, note="")
        return Trainer(repo, STRAIGHT, options, progress, bar).finish()


def bars() -> Progress:
    return Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"), console=console)


def differing(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Paths at which two states differ in type, shape or any bit."""
    if type(a) is not type(b):
        yield path
    elif isinstance(a, dict):
        for key in {**a, **b}:
            yield from differing(a.get(key), b.get(key), f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield path
        for index, (x, y) in enumerate(zip(a, b)):
            yield from differing(x, y, f"{path}/{index}")
    elif isinstance(a, np.ndarray):
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            yield path
    elif repr(a) != repr(b):
        yield path


def compare(repo: everystep.Repository) -> int:
    """Weights, optimizer, scheduler, random state and data position of both ends; the number of leaves compared."""
    ends = [repo[name].latest for name in (STRAIGHT, KILLED)]
    assert ends[0] is not None and ends[1] is not None
    states = [{**end.load(), "loop": end.load(only="loop")} for end in ends]
    found = [f"step {ends[0].step} and step {ends[1].step}"] if ends[0].step != ends[1].step else []
    found += list(differing(*states))
    if found:
        sys.exit(f"the two runs differ in {len(found)} places: {', '.join(found[:5])}")
    return len(ends[0].leaves())


def measure(checkpoint: everystep.Checkpoint, file: Path) -> dict[str, float]:
    """The same state as torch.save keeps it in a file, and both read back: bytes, and median seconds of five."""
    state = checkpoint.load(like="torch")
    times: dict[str, list[float]] = {"restore": [], "torch.save": [], "torch.load": []}
    for _ in range(5):
        for name, call in (
            ("torch.save", lambda: torch.save(state, file)),
            ("torch.load", lambda: torch.load(file)),
            ("restore", lambda: checkpoint.load(like="torch")),
        ):
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    size = file.stat().st_size
    file.unlink()
    return {"bytes": size, **{name: median(values) for name, values in times.items()}}


def report(repo: everystep.Repository, leaves: int, lives: list[Life], file: Path) -> Table:
    run = repo[KILLED]
    checkpoints = run.checkpoints()
    torch_way = measure(checkpoints[-1], file)
    stored = sum(checkpoint.cost["stored_bytes"] for checkpoint in checkpoints)
    stalls = [checkpoint.cost["stall_seconds"] for checkpoint in checkpoints]
    table = Table(title="what it cost", show_header=False, title_justify="left")
    for name, value in (
        ("killed with SIGKILL", f"{sum(life.killed is not None for life in lives)} times"),
        ("ends equal, bit for bit", f"{leaves} leaves: weights, optimizer, scheduler, random state, data position"),
        ("checkpoints kept", f"{len(checkpoints)} of {len(checkpoints)} saved"),
        ("bytes, all checkpoints", f"{stored / 1e6:.1f} MB"),
        ("the same with torch.save", f"{len(checkpoints) * torch_way['bytes'] / 1e6:.1f} MB"),
        ("share", f"{stored / (len(checkpoints) * torch_way['bytes']):.2f}"),
        ("stall per save, median", f"{1e3 * median(stalls):.1f} ms, durable and checked"),
        ("torch.save, not synced", f"{1e3 * torch_way['torch.save']:.1f} ms"),
        ("time to restore", f"{1e3 * torch_way['restore']:.1f} ms, every byte verified"),
        ("torch.load", f"{1e3 * torch_way['torch.load']:.1f} ms, none verified"),
    ):
        table.add_row(name, value)
    return table


def plot(path: Path, straight: Life, lives: list[Life], saved: list[int]) -> None:
    """Loss over steps: both runs, every checkpoint, every kill and what it cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5.5), dpi=110)
    axes.plot(straight.steps, straight.losses, color="#d0d4da", linewidth=6, label="never killed", zorder=1)
    for number, life in enumerate(lives):
        axes.plot(life.steps, life.losses, linewidth=1.4, color=f"C{number}", label=f"process {number + 1}", zorder=3)
    by_step = dict(zip(straight.steps, straight.losses))
    floor = min(straight.losses) * 0.86
    axes.scatter(saved, [floor] * len(saved), marker="|", s=60, color="#3a7d44", label="checkpoint", zorder=2)
    for number, life in enumerate(lives):
        if life.killed and life.steps:
            at = life.steps[-1]
            axes.scatter([at], [by_step[at]], marker="X", s=110, color="#c0392b", edgecolor="white", zorder=5,
                         label="killed" if number == 0 else None)  # fmt: skip
        if number and life.steps:
            first = life.steps[0]
            axes.scatter([first], [by_step[first]], marker="o", s=60, facecolor="white", edgecolor=f"C{number}",
                         linewidth=1.8, zorder=6, label="resumed" if number == 1 else None)  # fmt: skip
    axes.set(
        xlabel="step", ylabel="loss", yscale="log", title="Killed and resumed: every process lies on the same line"
    )
    axes.set_yticks([1.5, 2, 3, 4, 5], labels=["1.5", "2", "3", "4", "5"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    figure.tight_layout()
    figure.savefig(path)


def run_cli(*arguments: str) -> None:
    console.print(f"\n[bold]$ everystep {' '.join(arguments)}[/bold]")
    done = subprocess.run([sys.executable, "-m", "everystep", *arguments], check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--repo", help="a URL for the repository instead, as s3://bucket/prefix")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills; another each time")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10_000) if args.seed is None else args.seed
    shutil.rmtree(args.out / "runs", ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    options = ["--epochs", str(args.epochs), "--batches", str(args.batches)]
    total = args.epochs * args.batches

    place = new_prefix(args.repo) if args.repo else str(args.out / "runs")
    straight = train_straight(place, total, options)
    lives = train_and_kill(place, total, options, seed)
    repo = everystep.open(place)
    leaves = compare(repo)
    console.print(report(repo, leaves, lives, args.out / "same.pth"))
    run_cli("-r", place, "log", KILLED, "-n", "8")
    run_cli("-r", place, "fsck")
    plot(args.out / "loss.png", straight, lives, [checkpoint.step for checkpoint in repo[KILLED].checkpoints()])
    console.print(f"\nThe moments of the kills: --seed {seed}. The repository is {place}, the plot {args.out}/loss.png")


if __name__ == "__main__":
    main()
