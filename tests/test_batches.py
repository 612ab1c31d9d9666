"""Epochs over data, cut anywhere: the same batches, the same random numbers, the same bits as without a cut."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from _train import (
    LEAVES,
    Done,
    Job,
    Numbers,
    go,
    mixed_noise,
    new_repository,
    one_thread,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import everystep
from everystep import EverystepWarning, Repository, Run, UsageError

__all__ = ["one_thread"]
EPOCHS = 3
Make = Callable[[], Any]


class OwnSampler(Sampler[int]):
    """Draws as it goes, from all three global generators."""

    def __init__(self, size: int = 21) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield int(random.random() * 7 + np.random.rand() * 7 + float(torch.rand(())) * 7) % self.size


class Remembering(Sampler[int]):
    """Keeps a generator of its own, which goes on from epoch to epoch."""

    def __init__(self, size: int = 21) -> None:
        self.size, self.rng = size, np.random.default_rng(3)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield int(self.rng.integers(self.size))


class ByEpoch(Sampler[int]):
    """As a DistributedSampler: the order depends on the epoch that it was told."""

    def __init__(self, size: int = 21) -> None:
        self.size, self.epoch = size, -1
        self.told: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng(self.epoch).permutation(self.size).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)


class Endless(IterableDataset[Any]):
    """A stream that shuffles through a buffer, as data too large to index is shuffled."""

    def __init__(self, sized: bool = False) -> None:
        self.sized = sized

    def __len__(self) -> int:
        if self.sized:
            return 21
        raise TypeError

    def __iter__(self) -> Iterator[Any]:
        buffer = [float(n) for n in range(5)]
        for number in range(5, 21):
            at = random.randrange(5)
            yield torch.tensor([buffer[at], float(np.random.rand()), float(torch.rand(()))])
            buffer[at] = float(number)
        yield from (torch.tensor([number, 0.0, 0.0]) for number in buffer)


class OwnNoise(Numbers):
    """Augments from a generator that the data set keeps."""

    def __init__(self) -> None:
        super().__init__(lambda: float(self.rng.random()))
        self.rng = np.random.default_rng(5)


class Walk:
    """Not torch at all: an iterable that shuffles its batches at each start and draws more as it goes."""

    def __init__(self, sized: bool) -> None:
        if sized:
            self.size = 6

    def __iter__(self) -> Iterator[Any]:
        order = list(range(6))
        random.shuffle(order)
        for number in order:
            yield np.array([[number, np.random.rand(), random.random()]], np.float32)


class SizedWalk(Walk):
    def __len__(self) -> int:
        return 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(dataset: Any = None, **options: Any) -> Make:
    return lambda: DataLoader(dataset() if dataset else Numbers(mixed_noise), **{"batch_size": 4, **options})


def sampled(sampler: Callable[[], Any], **options: Any) -> Make:
    return lambda: DataLoader(Numbers(mixed_noise), **{"batch_size": 4, "sampler": sampler(), **options})


WEIGHTS = [1.0 + n % 3 for n in range(21)]
# Batches an epoch: at least four.
LOADERS: dict[str, Make] = {
    "in order": loader(),
    "shuffled": loader(shuffle=True),
    "drop last": loader(shuffle=True, drop_last=True),
    "no batches": loader(lambda: Numbers(mixed_noise, 6), shuffle=True, batch_size=None),
    "loader's generator": lambda: loader(shuffle=True, generator=generator(7))(),
    "sampler's generator": sampled(lambda: RandomSampler(range(21), generator=generator(8))),
    "with replacement": sampled(lambda: RandomSampler(range(21), replacement=True, num_samples=40), batch_size=8),
    "drawn as it goes": sampled(
        lambda: RandomSampler(range(21), replacement=True, num_samples=70, generator=generator(9)), batch_size=16
    ),
    "weighted": sampled(lambda: WeightedRandomSampler(WEIGHTS, 20)),
    "weighted, generator": sampled(lambda: WeightedRandomSampler(WEIGHTS, 20, generator=generator(3))),
    "subset": sampled(lambda: SubsetRandomSampler(range(3, 20))),
    "own sampler": sampled(OwnSampler),
    "remembering sampler": sampled(Remembering),
    "batch sampler": lambda: DataLoader(Numbers(mixed_noise), batch_sampler=BatchSampler(OwnSampler(), 5, True)),
    "by epoch": sampled(ByEpoch),
    "batches by epoch": lambda: DataLoader(Numbers(mixed_noise), batch_sampler=BatchSampler(ByEpoch(), 5, False)),
    "data set's generator": loader(OwnNoise, shuffle=True),
    "stream": loader(Endless),
    "stream with a length": loader(lambda: Endless(True)),
    "list": lambda: [np.full((2, 3), n, np.float32) for n in range(5)],
    "walk": lambda: Walk(False),
    "walk with a length": lambda: SizedWalk(True),
}
IN_WORKERS: dict[str, Make] = {
    "shuffled": loader(shuffle=True, num_workers=2),
    "no batches": loader(lambda: Numbers(mixed_noise, 6), shuffle=True, batch_size=None, num_workers=2),
    "persistent": loader(shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=3),
    "own generators": lambda: loader(shuffle=True, num_workers=2, persistent_workers=True, generator=generator(7))(),
    "own sampler": sampled(OwnSampler, num_workers=2),
    "drawn as it goes": sampled(
        lambda: RandomSampler(range(21), replacement=True, num_samples=70, generator=generator(9)),
        batch_size=16, num_workers=2,
    ),
    "data set's generator": loader(OwnNoise, shuffle=True, num_workers=2),
    "stream": loader(Endless, num_workers=2),
}  # fmt: skip


def train(
    repo: Repository,
    job: Job,
    make: Make,
    until: int | None = None,
    how: str = "stop",
    epochs: int = EPOCHS,
    **save: Any,
) -> Run:
    with repo.run("r").track(**job.tracked) as run:
        go(run, job, run.batches(make(), epochs=epochs, **save), until, LEAVES[how])
    return run


@cache
def whole(name: str, workers: bool = False) -> Done:
    """Never interrupted, and saved only at the end."""
    job = Job()
    train(new_repository(), job, (IN_WORKERS if workers else LOADERS)[name])
    return job.done()


def check_end(job: Job, reference: Done, from_step: int) -> None:
    end = job.done()
    assert end.seen == reference.seen[from_step:], "other batches"
    assert end.picture == reference.picture


def check_cut(name: str, workers: bool, cut: int, **save: Any) -> None:
    make, reference = (IN_WORKERS if workers else LOADERS)[name], whole(name, workers)
    repo, first = new_repository(), Job()
    train(repo, first, make, cut, **save)
    assert first.seen == reference.seen[:cut]
    resumed = Job(seed=70)
    run = train(repo, resumed, make, **save)
    assert run.report is not None and run.report.exact, run.report
    check_end(resumed, reference, cut)


@pytest.mark.parametrize("name", LOADERS)
def test_cut_after_every_batch_and_resumed(name: str) -> None:
    batches = len(whole(name).seen)
    assert batches >= 4 * EPOCHS
    for cut in range(1, batches + 1):
        check_cut(name, False, cut)


@pytest.mark.parametrize("name", IN_WORKERS)
def test_cut_in_the_middle_and_between_epochs_with_workers(name: str) -> None:
    batches = len(whole(name, True).seen)
    assert batches >= 4 * EPOCHS
    for cut in (1, batches // EPOCHS, batches // EPOCHS + 2, batches - 1):
        check_cut(name, True, cut)


@pytest.mark.parametrize("how", ["break", "error"])
@pytest.mark.parametrize("save", [{"save_every": 1}, {"save_on": everystep.every(1)}, {"save_on": everystep.every(4)}])
def test_left_in_the_middle_of_a_batch(save: dict[str, Any], how: str) -> None:
    """What was trained since the last save is trained again, just so."""
    for cut in (1, 5, 7, 12, 17):
        repo, first, reference = new_repository(), Job(), whole("shuffled")
        train(repo, first, LOADERS["shuffled"], cut, how, **save)
        saved = {id: c.step for id, c in enumerate(repo["r"].checkpoints())}
        resumed_from = max(saved.values(), default=0)
        every_steps = 6 if "save_every" in save else 1 if save["save_on"].steps == 1 else 4
        assert resumed_from == (cut - 1) // every_steps * every_steps
        resumed = Job(seed=70 if resumed_from else 1)
        train(repo, resumed, LOADERS["shuffled"], **save)
        check_end(resumed, reference, resumed_from)


def test_when_it_saves() -> None:
    repo, job = new_repository(), Job()
    train(repo, job, LOADERS["shuffled"], save_every=2, save_on=everystep.every(5), epochs=3)
    found = [(c.step, c.reason) for c in repo["r"].checkpoints()]
    assert found == [
        (5, "every 5 steps"), (10, "every 5 steps"), (12, "every 2 epochs"), (15, "every 5 steps"),
        (18, "the last step"),
    ]  # fmt: skip


def test_epochs_are_counted_and_can_grow() -> None:
    repo, job = new_repository(), Job()
    with repo.run("r").track(**job.tracked) as run:
        loop = run.batches(LOADERS["shuffled"](), epochs=2)
        epochs = []
        for batch in loop:
            assert run.step is not None
            job.train(run.step, batch)
            epochs.append(loop.epoch)
        assert epochs == [1] * 6 + [2] * 6 and loop.epoch == 2
        assert list(run.batches(LOADERS["shuffled"](), epochs=2)) == []
    grown = Job(seed=8)
    train(repo, grown, LOADERS["shuffled"])
    check_end(grown, whole("shuffled"), 12)


def test_in_pieces_and_as_one_object() -> None:
    job = Job()
    with new_repository().run("r").track(**job.tracked) as run:
        loop = run.batches(LOADERS["shuffled"](), epochs=EPOCHS)
        for _ in range(5):
            go(run, job, itertools.islice(loop, 4))
        assert list(loop) == []
    check_end(job, whole("shuffled"), 0)


def test_no_data_is_read_for_batches_that_were_consumed() -> None:
    repo, data = new_repository(), Numbers()
    train(repo, Job(), lambda: DataLoader(data, batch_size=4, shuffle=True), 11)
    assert data.read == 21 + 5 * 4
    data.read = 0
    train(repo, Job(), lambda: DataLoader(data, batch_size=4, shuffle=True))
    assert data.read == 1 + 21


def test_the_end_of_an_iteration_is_reached_before_the_save() -> None:
    """Loaders that count epochs by themselves do it behind their last batch."""

    class Counting(SizedWalk):
        rounds = 0

        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            self.rounds += 1

    rounds = []
    data, job = Counting(True), Job()
    with new_repository().run("r").track(**job.tracked) as run:
        rule = everystep.when(lambda moment: rounds.append((moment.epoch, data.rounds)))
        go(run, job, run.batches(data, epochs=3, save_on=rule))
    assert rounds == [(n // 6, n // 6) for n in range(1, 19)]


def test_a_length_that_is_not_true() -> None:
    class Boasting(Walk):
        claimed = 6

        def __len__(self) -> int:
            return self.claimed

    for claimed in (4, 9):
        data = Boasting(False)
        data.claimed = claimed
        job = Job()
        train(new_repository(), job, lambda data=data: data)
        reference = job.done()
        assert len(reference.seen) == 18
        for cut in (3, 4, 5, 6, 7, 9, 17):
            repo = new_repository()
            train(repo, Job(), lambda data=data: data, cut)
            resumed = Job(seed=3)
            train(repo, resumed, lambda data=data: data)
            check_end(resumed, reference, cut)


def test_an_empty_loader() -> None:
    repo, job = new_repository(), Job()
    train(repo, job, list)
    assert job.seen == []
    train(repo, job, lambda: DataLoader(Numbers(size=0), batch_size=4))
    assert job.seen == []


def test_a_generator_that_the_program_uses_too() -> None:
    """Tracked, given to the loader, and drawn from in the loop: its state at the save is the one that counts."""

    def run_with(repo: Repository, seed: int, until: int | None) -> list[Any]:
        shared, job, seen = generator(seed), Job(seed), []
        data = DataLoader(Numbers(), batch_size=4, shuffle=True, generator=shared)
        with repo.run("r").track(model=job.model, shared=shared) as run:
            for batch in run.batches(data, epochs=3):
                seen.append((batch.numpy().tobytes(), float(torch.rand((), generator=shared))))
                if run.step == until:
                    run.stop()
        return seen

    reference = run_with(new_repository(), 1, None)
    for cut in range(1, 18):
        repo = new_repository()
        assert run_with(repo, 1, cut) == reference[:cut]
        assert run_with(repo, 50, None) == reference[cut:]


class Witness(Numbers):
    """Says which number a worker drew; needs what `open_in_worker` sets on it."""

    handle: str | None = None

    def __getitem__(self, index: int) -> torch.Tensor:
        assert self.handle == f"opened in {torch.utils.data.get_worker_info().id}"
        return torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))], dtype=torch.float64)


def open_in_worker(number: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert type(info.dataset) is Witness
    info.dataset.handle = f"opened in {number}"


@pytest.mark.parametrize("persistent", [False, True])
def test_random_numbers_in_workers_differ_from_batch_to_batch(persistent: bool) -> None:
    data = DataLoader(
        Witness(size=8), batch_size=2, num_workers=2, worker_init_fn=open_in_worker, persistent_workers=persistent
    )
    job, drawn = Job(), []
    with new_repository().run("r").track(model=job.model) as run:
        for batch in run.batches(data, epochs=3):
            drawn += batch.flatten().tolist()
    assert len(set(drawn)) == len(drawn) == 3 * 8 * 3
    assert data._iterator is None, "the user's loader has workers of its own"


def test_workers_that_stay_end_with_the_loop() -> None:
    before = {child.pid for child in psutil.Process().children()}
    train(new_repository(), Job(), IN_WORKERS["persistent"])
    assert {child.pid for child in psutil.Process().children()} <= before


# ------------------------------------------------------------------------------------------ what cannot be, and is said


def said(repo: Repository, make: Make, epochs: int = EPOCHS) -> list[str]:
    job = Job(seed=9)
    with pytest.warns(EverystepWarning, match="not exact"):
        run = train(repo, job, make, epochs=epochs)
    assert run.report is not None and not run.report.exact
    return run.report.inexact


def test_another_loader_is_said() -> None:
    def saved(make: Make) -> Repository:
        repo = new_repository()
        train(repo, Job(), make, 2)
        return repo

    assert said(saved(loader()), loader(batch_size=5))[:2] == [
        "the loader had 6 batches an epoch, has 5", "the batch size was 4, is 5",
    ]  # fmt: skip
    assert said(saved(loader()), loader(num_workers=1)) == ["the loader had 0 workers, has 1"]
    assert said(saved(loader(Endless, num_workers=1)), loader(Endless, num_workers=2)) == [
        "the loader had 1 workers, has 2"
    ]
    for options in ({"persistent_workers": True}, {"in_order": False}):
        make = loader(Endless, num_workers=1, **options)
        assert any(name in said(saved(make), make)[0] for name in options)
    make = loader(num_workers=1, in_order=False)
    assert "in_order=False" in said(saved(make), make)[0]


def test_an_order_that_does_not_come_again_is_said() -> None:
    class Forgetful(Sampler[int]):
        """Its order comes from nowhere that could be kept."""

        count = 0

        def __len__(self) -> int:
            return 21

        def __iter__(self) -> Iterator[int]:
            Forgetful.count += 1
            return iter(np.random.default_rng(Forgetful.count).permutation(21).tolist())

    repo = new_repository()
    train(repo, Job(), sampled(Forgetful), 2)
    assert said(repo, sampled(Forgetful)) == [
        "the sampler does not give the 2 batches again that it gave before: what decides their order?"
    ]


def test_what_cannot_be_resumed_is_refused() -> None:
    repo, job = new_repository(), Job()
    run = repo.run("r").track(**job.tracked)
    for once in (iter([1]), (n for n in range(3)), zip([1], [2]), map(str, [1])):
        with pytest.raises(UsageError, match="only once"):
            run.batches(once, epochs=1)
    with pytest.raises(UsageError, match="no batches to go through"):
        run.batches(5, epochs=1)  # type: ignore[arg-type]
    for epochs in (-1, 1.5, True, None):
        with pytest.raises(UsageError, match="a count of passes"):
            run.batches([1], epochs=epochs)  # type: ignore[arg-type]
    assert not repo.exists, "a refused loop has taken the run"
    run.close()


class Stateful(DataLoader[Any]):
    """As torchdata's: a loader that keeps its own position."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_tracked_loader_is_refused() -> None:
    job, data = Job(), Stateful(Numbers(), batch_size=4)
    run = new_repository().run("r").track(model=job.model, data=data)
    with pytest.raises(UsageError, match="skip twice"):
        run.batches(data, epochs=1)
    run.close()


def test_loaders_that_iterate_in_their_own_way() -> None:
    """A subclass's own __iter__ is what runs."""

    class Doubling(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch * 2

    for kind in (Doubling, Stateful):
        make = lambda kind=kind: kind(Numbers(mixed_noise), batch_size=4, shuffle=True)  # noqa: E731
        job = Job()
        train(new_repository(), job, make)
        reference = job.done()
        if kind is Doubling:
            assert np.frombuffer(reference.seen[0][1], np.float32).reshape(-1, 3)[0, 2] == 2.0
        for cut in (3, 6, 8):
            repo = new_repository()
            train(repo, Job(), make, cut)
            resumed = Job(seed=3)
            train(repo, resumed, make)
            check_end(resumed, reference, cut)


def test_a_run_of_steps_does_not_go_on_as_batches() -> None:
    repo, job = new_repository(), Job()
    with repo.run("r").track(**job.tracked) as run:
        go(run, job, run.steps(3))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(UsageError, match="place in the data is unknown"):
            run.batches(LOADERS["shuffled"](), epochs=1)
        assert signal.getsignal(signal.SIGTERM) is before
        go(run, job, run.steps(5))
    assert len(job.seen) == 5


# ----------------------------------------------------------------------------------------------- in another process

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from _train import Job, go
from test_batches import IN_WORKERS, LOADERS
import everystep

kind, name, seed, until = sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
job = Job(seed)
run = everystep.open(sys.argv[2]).run("r").track(**job.tracked)
go(run, job, run.batches(globals()[kind][name](), epochs=3), until, lambda run, step: run.stop())
run.close()
assert run.report is None or run.report.exact, run.report
print(job.done().digest)
"""


@pytest.mark.parametrize(("kind", "name"), [("LOADERS", "remembering sampler"), ("IN_WORKERS", "persistent")])
def test_new_processes_go_on_as_one(kind: str, name: str, tmp_path: Path) -> None:
    out = ""
    for seed, until in ((1, 8), (40, 0)):
        args = [str(Path(__file__).parent), str(tmp_path), kind, name, str(seed), str(until)]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        out = done.stdout.strip()
    assert out == whole(name, kind == "IN_WORKERS").digest
