"""A training that saves without pause and says what it was told is durable, to be killed; see test_kill.py.

python kill_trainer.py FOLDER MARKS KIND [SAVE EVENT OPERATION]

MARKS gets a line for the first pack byte of each save and for its commit. Before operation number OPERATION after the
EVENT (byte or commit) of save number SAVE, both from 0, the store says "paused" there and stands still for ever.
"""

import hashlib
import os
import sys
import time
from typing import Any

import numpy as np

import everystep
from everystep.seam import Files, Seam

COUNTED = ("create", "write", "fsync", "close", "rename", "link", "unlink", "mkdir", "fsync_folder")


class MarkedFiles(Files):
    """The real files; what is done with them is marked in a file that outlives the process."""

    def __init__(self, marks: str, pause: tuple[int, str, int] | None) -> None:
        self._marks = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._pause = pause
        self._paths: dict[int, str] = {}
        self._saves, self._event, self._done = 0, "", 0

    def mark(self, line: str) -> None:
        os.write(self._marks, f"{line}\n".encode())

    def __getattribute__(self, name: str) -> Any:
        real = super().__getattribute__(name)
        if name not in COUNTED:
            return real
        return lambda *args: self._call(name, real, *args)

    def _call(self, verb: str, real: Any, *args: Any) -> Any:
        if self._pause == (self._saves, self._event, self._done):
            self.mark(f"paused {verb}")
            while True:
                time.sleep(60)
        self._done += 1
        result = real(*args)
        where = self._paths.get(args[0], "") if isinstance(args[0], int) else args[-1]
        if verb == "create":
            self._paths[result] = where
        elif verb == "write" and "/packs/" in where and self._event != "byte":
            self._event, self._done = "byte", 0
            self.mark(f"byte {self._saves}")
        elif verb == "link" and "/log/" in where and self._event == "byte":
            self.mark(f"commit {self._saves} {self._done}")
            self._event, self._done = "commit", 0
        elif verb == "fsync_folder" and where.endswith("/log") and self._event == "commit":
            self._event, self._saves = "", self._saves + 1
        return result


class MarkedSeam(Seam):
    """Says on stdout when somebody is made to wait."""

    def tell(self, line: str) -> None:
        say("waited", line)


def say(*words: object) -> None:
    print(*words, flush=True)


def state_of(step: int) -> dict[str, Any]:
    """Two leaves that move, one that stands still, random bytes among them."""
    random = np.random.default_rng(step)
    return {
        "weights": random.normal(size=3000).astype(np.float32),
        "count": np.full(100, step),
        "frozen": np.arange(2000.0),
        "optimizer": {"momentum": random.normal(size=3000), "step": step},
    }


def digest(state: Any) -> str:
    """Of every byte, dtype and plain value of a nested state."""
    hash = hashlib.sha256()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for name in sorted(value):
                hash.update(name.encode())
                visit(value[name])
        elif isinstance(value, np.ndarray):
            hash.update(f"{value.dtype.str} {value.shape}".encode() + value.tobytes())
        else:
            hash.update(repr(value).encode())

    visit(state)
    return hash.hexdigest()


def train_numpy(run: everystep.Run) -> None:
    run.track(rng=False)
    step = run.resume()
    say("resumed", step)
    while True:
        step += 1
        state = state_of(step)
        run.record(loss=1 / step, step=step)
        checkpoint = run.save(step, state=state).wait()
        say("durable", step, digest(state))
        if step % 5 == 0:
            checkpoint.tag(f"at{step}")
            say("tagged", step, f"at{step}")


def train_torch(run: everystep.Run) -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters())
    run.track(model=model, optimizer=optimizer)
    step = run.resume()
    say("resumed", step)
    while True:
        step += 1
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        run.save(step).wait()
        say("durable", step, digest({name: value.numpy() for name, value in model.state_dict().items()}))


def main() -> None:
    folder, marks, kind, *pause = sys.argv[1:]
    at = (int(pause[0]), pause[1], int(pause[2])) if pause else None
    run = everystep.open(folder, seam=MarkedSeam(MarkedFiles(marks, at))).run("a run")
    {"numpy": train_numpy, "torch": train_torch}[kind](run)


if __name__ == "__main__":
    main()
