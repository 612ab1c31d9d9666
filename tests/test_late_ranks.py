"""A rank that comes late, or stays longer than rank 0: it is told at once what the log knows, and else what it waits
for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _train import WithoutGit
from test_ranks import together

import everystep
from everystep import Repository, Run, SaveAbandoned, Settings
from everystep.save import owner
from everystep.storage import MemoryStorage
from everystep.vault import Place

# Nothing here is to wait for it: whoever does fails by the time limit of its test.
DEADLINE = 600.0


class Told(WithoutGit):
    """Keeps what the person at the terminal is told; a process that began at another time, if it is told so."""

    def __init__(self, began: float | None = None) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._began = began

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def began(self) -> float:
        return super().began() if self._began is None else self._began


def run_of(storage: MemoryStorage, rank: int, seam: Told | None = None, **settings: Any) -> Run:
    chosen = Settings(**{"poll_seconds": 0.01, "rank_deadline_seconds": DEADLINE, **settings})
    repo = Repository(Place(storage, seam or Told(), chosen))
    return repo.run("r", rank=rank, ranks=2, launch="job").track(rng=False)


def state_of(rank: int, step: int) -> dict[str, Any]:
    return {f"of{rank}": np.full(3, step)}


def trained(storage: MemoryStorage) -> None:
    """Both ranks save step 1, in processes that are gone."""
    runs = [run_of(storage, rank) for rank in range(2)]
    together(lambda rank: runs[rank].save(1, state=state_of(rank, 1)).wait(), range(2))
    together(lambda rank: runs[rank].close(), range(2))
    owner._JOINED.clear()


LATE = """
import sys
import numpy as np
import everystep

settings = everystep.Settings(poll_seconds=0.01)
run = everystep.open(sys.argv[1], settings=settings).run("r", rank=1, ranks=2, launch="job").track(rng=False)
print("ready", flush=True)
sys.stdin.readline()
print(run.resume(), len(run.steps(1)), flush=True)
try:
    run.save(2, state={"of1": np.ones(3)}).wait()
except everystep.SaveAbandoned as error:
    print(error.missing, error.what, flush=True)
run.close()
"""


def test_a_process_that_comes_when_rank_0_has_closed_the_run(tmp_path: Path) -> None:
    """As where nothing was left to train: it gets the checkpoint, and a save of its own is refused at once."""
    late = subprocess.Popen(
        [sys.executable, "-c", LATE, str(tmp_path / "runs")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert late.stdout is not None and late.stdout.readline() == "ready\n"
        repo = everystep.open(str(tmp_path / "runs"), settings=Settings(poll_seconds=0.01))
        for job in ("an earlier one", "job"):
            runs = [repo.run("r", rank=rank, ranks=2, launch=job).track(rng=False) for rank in range(2)]
            if job == "job":
                assert runs[0].resume() == 1
                runs[0].close()
                continue
            together(lambda rank, runs=runs: runs[rank].save(1, state=state_of(rank, 1)).wait(), range(2))
            together(lambda rank, runs=runs: runs[rank].close(), range(2))
        out, err = late.communicate("\n", timeout=60)
    finally:
        late.kill()
        late.wait()
    assert out.splitlines() == ["1 0", "(0,) step 2: rank 0 has closed the run without saving it"], err
    assert late.returncode == 0 and "rank 1 comes when rank 0 has closed run 'r' already" in err
    past = everystep.open(str(tmp_path / "runs"))["r"]
    past.prune(now=True)
    assert [c.step for c in past.checkpoints()] == [1] and everystep.open(str(tmp_path / "runs")).check().ok


def test_a_launch_id_that_is_used_again_is_waited_for() -> None:
    """The term of an earlier start is none to join, whoever was in it."""
    storage = MemoryStorage()
    trained(storage)
    seam = Told(began=1e12)
    with pytest.raises(
        SaveAbandoned, match=r"not opened the run; the last to open it was launch 'job', of 2 ranks, on .* and closed"
    ):
        run_of(storage, 1, seam, rank_deadline_seconds=0.1).resume()
    first, second = run_of(storage, 0), run_of(storage, 1, seam)
    assert together(lambda rank: (first, second)[rank].resume(), range(2)) == [1, 1]
    ids = together(lambda rank: (first, second)[rank].save(2, state=state_of(rank, 2)).wait().id, range(2))
    assert len(set(ids)) == 1, ids
    together(lambda rank: (first, second)[rank].close(), range(2))
    assert [c.term for c in Repository(Place(storage, Told(), Settings()))["r"].checkpoints()] == [1, 2]


def test_another_number_of_ranks_is_another_start() -> None:
    storage = MemoryStorage()
    trained(storage)
    repo = Repository(Place(storage, Told(), Settings(poll_seconds=0.01, rank_deadline_seconds=0.1)))
    with pytest.raises(SaveAbandoned, match="has not opened the run"):
        repo.run("r", rank=1, ranks=3, launch="job").track(rng=False).resume()


def test_one_loop_after_another_in_the_same_processes() -> None:
    """Rank 1 is first at the second: it waits for rank 0, as it has had the term that is closed."""
    storage = MemoryStorage()
    seam = Told()
    for step in (1, 2, 3):
        runs = [run_of(storage, 0), run_of(storage, 1, seam)]

        def work(rank: int, runs: list[Run] = runs, step: int = step) -> str:
            if rank == 0:  # comes when the other waits already
                while f"open run 'r', up to {DEADLINE:g} s" not in "".join(seam.lines):
                    runs[0]._vault.seam.sleep(0.001)
            runs[rank].resume()
            return str(runs[rank].save(step, state=state_of(rank, step)).wait().id)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(owner, "SILENT_SECONDS", 0.0)
            ids = together(work, range(2))
        assert len(set(ids)) == 1, ids
        together(lambda rank, runs=runs: runs[rank].close(), range(2))
        (line,) = seam.lines
        assert ("nobody has opened it yet" in line) == (step == 1) and ("and closed it" in line) == (step > 1)
        seam.lines.clear()


def test_a_rank_that_stays_longer_than_rank_0_is_told_at_once() -> None:
    storage = MemoryStorage()
    runs = [run_of(storage, rank) for rank in range(2)]
    together(lambda rank: runs[rank].save(1, state=state_of(rank, 1)).wait(), range(2))
    saved = runs[1].save(2, state=state_of(1, 2))
    runs[0].close()
    with pytest.raises(SaveAbandoned, match="step 2: rank 0 has closed the run without saving it") as caught:
        saved.wait()
    assert caught.value.missing == (0,)
    runs[1].close()
    assert [c.step for c in Repository(Place(storage, Told(), Settings()))["r"].checkpoints()] == [1]


def test_what_is_waited_for_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "SILENT_SECONDS", 0.0)
    seam = Told()
    with pytest.raises(SaveAbandoned, match="nobody has opened it yet"):
        run_of(MemoryStorage(), 1, seam, rank_deadline_seconds=0.2).resume()
    (line,) = seam.lines
    assert line.startswith("everystep: rank 1 waits for rank 0 of launch 'job' to open run 'r', up to 0.2 s")


def test_when_a_process_began_is_known() -> None:
    seam = WithoutGit()
    began = seam.began()
    code = "from everystep.seam import REAL; print(REAL.began())"
    before = seam.now()
    found = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert began < before and before - 0.1 <= found <= seam.now() + 0.1
