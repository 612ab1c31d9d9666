"""What is declared frozen is neither copied nor hashed while it stands still, and is saved right whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from _train import new_repository, one_thread
from torch import nn

import everystep
from everystep import EverystepWarning, UsageError
from everystep.save import part as part_module
from everystep.save.arena import Copier

__all__ = ["one_thread"]
WIDTH = 600
LEAF = WIDTH * WIDTH * 4
"""Bytes of one weight, more than the 1 MiB from which on a leaf has chunks of its own."""


class Net(nn.Module):
    """Two layers that stand still, one that trains, and statistics that move without anybody asking."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.encoder.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.encoder(x)))


class Job:
    """Trains, saves, and remembers what should be there."""

    def __init__(self, frozen: Any = "trusted", **settings: Any) -> None:
        self.net = Net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.repo = new_repository(**settings)
        self.run = self.repo.run("r").track(net=self.net, optimizer=self.optimizer, frozen=frozen)
        self.expected: dict[int, dict[str, bytes]] = {}

    @property
    def weight(self) -> nn.Parameter:
        return self.net.encoder[0].weight

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.net(torch.randn(4, WIDTH)).square().sum().backward()
        self.optimizer.step()

    def save(self, step: int) -> None:
        self.step()
        self.expected[step] = picture(self.net)
        self.run.save(step).wait()

    def check(self) -> None:
        """Every checkpoint, bit for bit, in what was written and by what the store checks itself."""
        self.run.close()
        for step, expected in self.expected.items():
            loaded = self.repo["r"].at(step).load(only="net")
            assert {name: value.tobytes() for name, value in loaded.items()} == expected, f"step {step}"
        assert self.repo.check().ok


def picture(net: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in net.state_dict().items()}


class Work:
    """Bytes that were copied, compared and hashed since the last look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copied = self.compared = self.hashed = 0
        copy, differs, blake3 = Copier.copy, Copier.differs, part_module.blake3

        def copying(copier: Copier, pairs: Any) -> None:
            self.copied += sum(target.nbytes for target, _ in pairs)
            copy(copier, pairs)

        def comparing(copier: Copier, one: Any, other: Any) -> bool:
            self.compared += one.nbytes
            return differs(copier, one, other)

        def hashing(data: Any) -> Any:
            self.hashed += len(data)
            return blake3(data)

        monkeypatch.setattr(Copier, "copy", copying)
        monkeypatch.setattr(Copier, "differs", comparing)
        monkeypatch.setattr(part_module, "blake3", hashing)

    def take(self) -> tuple[int, int, int]:
        """In leaves of the model, rounded down."""
        found = self.copied // LEAF, self.compared // LEAF, self.hashed // LEAF
        self.copied = self.compared = self.hashed = 0
        return found


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    yield Work(monkeypatch)


FROZEN, TRAINED = 2, 2  # the head and its momentum; all else is small


def test_what_stands_still_is_neither_copied_nor_hashed(work: Work) -> None:
    job = Job(frozen_check_every=100)
    job.save(1)
    assert work.take() == (FROZEN + TRAINED, 0, FROZEN + TRAINED)
    for step in range(2, 6):
        job.save(step)
        assert work.take() == (TRAINED, 0, TRAINED)
    stored = [checkpoint.cost["stored_bytes"] for checkpoint in job.run.checkpoints()]
    assert max(stored[1:]) < stored[0] - 0.9 * FROZEN * LEAF * 0.8
    job.check()


def test_undeclared_it_is_copied_and_hashed_like_all_else(work: Work) -> None:
    job = Job(frozen=None)
    for step in range(1, 4):
        job.save(step)
        assert work.take() == (FROZEN + TRAINED, 0, FROZEN + TRAINED)
    job.check()


def test_each_leaf_is_compared_in_full_every_few_saves(work: Work) -> None:
    job = Job(frozen_check_every=3)
    seen = []
    for step in range(1, 11):
        job.save(step)
        seen.append(work.take())
    assert [copied for copied, _, _ in seen] == [FROZEN + TRAINED] + [TRAINED] * 9
    assert sum(compared for _, compared, _ in seen) == FROZEN * 3
    assert max(compared for _, compared, _ in seen) == 1, "not all at the same save"
    job.check()


# changes -------------------------------------------------------------------------------------------------------------


def by_copy(job: Job) -> None:
    with torch.no_grad():
        job.weight.copy_(torch.randn(WIDTH, WIDTH))


def by_item(job: Job) -> None:
    with torch.no_grad():
        job.weight[3, 4] += 1


def by_load(job: Job) -> None:
    job.net.load_state_dict({name: torch.full_like(value, 2) for name, value in job.net.state_dict().items()})


def by_init(job: Job) -> None:
    nn.init.normal_(job.weight)


def by_another_parameter(job: Job) -> None:
    job.net.encoder[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)


def by_data_pointer(job: Job) -> None:
    job.weight.data = torch.randn(WIDTH, WIDTH)


def by_turning(job: Job) -> None:
    """The same memory, read in another order."""
    job.weight.data = job.weight.data.t()


def by_optimizer(job: Job) -> None:
    """Thawed: from here on it trains."""
    job.net.encoder.requires_grad_(True)
    job.step()


def by_fused_optimizer(job: Job) -> None:
    """As above, by what counts nothing, with the momentum of a step before."""
    job.net.encoder.requires_grad_(True)
    job.optimizer = torch.optim.SGD(job.net.parameters(), lr=0.1, momentum=0.9, fused=True)
    job.run.track(optimizer=job.optimizer)
    job.step()


SHOWN: list[Callable[[Job], None]] = [
    by_copy, by_item, by_load, by_init, by_another_parameter, by_data_pointer, by_turning, by_optimizer,
    by_fused_optimizer,
]  # fmt: skip


@pytest.mark.parametrize("change", SHOWN, ids=lambda change: change.__name__)
def test_a_change_that_shows_is_saved_at_once(change: Callable[[Job], None]) -> None:
    job = Job(frozen_check_every=1000)
    job.save(1)
    job.save(2)
    before = job.expected[2]["encoder.0.weight"]
    change(job)
    job.save(3)
    job.save(4)
    assert job.expected[3]["encoder.0.weight"] != before
    job.check()


def test_an_address_is_not_taken_for_what_lay_there_before() -> None:
    """Parameters that are freed and made anew: the allocator would give the same address, and the count begins at 0."""
    job = Job(frozen_check_every=1000)
    for step in range(1, 6):
        job.net.encoder[0].weight = None
        job.net.encoder[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        job.save(step)
    job.check()


def by_data(job: Job) -> None:
    job.weight.data.mul_(1.5)


def by_numpy(job: Job) -> None:
    job.weight.detach().numpy()[0, 0] = 7


def by_its_last_byte(job: Job) -> None:
    job.weight.detach().numpy().reshape(-1).view(np.uint8)[-1] ^= 1


@pytest.mark.parametrize("change", [by_data, by_numpy, by_its_last_byte], ids=lambda change: change.__name__)
@pytest.mark.parametrize("every", [1, 4])
def test_a_change_that_does_not_show_is_found_and_said(change: Callable[[Job], None], every: int) -> None:
    """At the next full look: until then checkpoints hold what was there, and from then on what is there."""
    job = Job(frozen_check_every=every)
    job.save(1)
    before = job.expected[1]["encoder.0.weight"]
    change(job)
    found = None
    for step in range(2, 2 + every):
        with _listening() as said:
            job.save(step)
        if said and found is None:
            found = step
            assert "net/encoder.0.weight was declared frozen, and something has changed it" in said[0]
        assert bool(said) == (step == found)
        if found is None:
            job.expected[step]["encoder.0.weight"] = before
    assert found is not None and found <= 1 + every
    assert job.expected[found]["encoder.0.weight"] != before
    job.save(2 + every)
    job.check()


class _listening:
    """What is warned of."""

    def __enter__(self) -> list[str]:
        import warnings

        self._caught = warnings.catch_warnings(record=True)
        self._records = self._caught.__enter__()
        warnings.simplefilter("always", EverystepWarning)
        self.said: list[str] = []
        return self.said

    def __exit__(self, *error: Any) -> None:
        self.said += [str(record.message) for record in self._records]
        self._caught.__exit__(*error)


def test_frozen_again_after_it_has_trained(work: Work) -> None:
    """What a gradient is left of may still be trained; without one it stands still again."""
    job = Job(frozen_check_every=1000)
    job.optimizer = torch.optim.SGD(job.net.parameters(), lr=0.1, fused=True)
    job.run.track(optimizer=job.optimizer)
    job.save(1)
    job.net.encoder.requires_grad_(True)
    job.save(2)
    job.net.encoder.requires_grad_(False)
    for step in (3, 4):
        job.optimizer.step()  # with the gradient of before, and without counting it
        job.expected[step] = picture(job.net)
        work.take()
        job.run.save(step).wait()
        assert work.take()[0] == FROZEN + 1, "the optimizer still has gradients for both"
    for parameter in job.net.encoder.parameters():
        parameter.grad = None
    for step in range(5, 8):
        job.save(step)
    work.take()
    job.save(8)
    assert work.take()[0] == 1
    job.check()


def test_what_cannot_be_viewed_is_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, from which bytes are only copied; a transposed weight is copied whole."""
    monkeypatch.setattr("everystep.adapters.torch.view", lambda payload: None)
    monkeypatch.setattr("everystep.save.frozen.PREPARED_BYTES", 1 << 18)
    job = Job(frozen_check_every=2)
    job.net.encoder[1].weight.data = torch.randn(WIDTH, WIDTH).t()
    for step in range(1, 5):
        job.save(step)
    job.weight.data[-1, -1] += 1
    job.net.encoder[1].weight.data[-1, 0] += 1
    with pytest.warns(EverystepWarning, match="was declared frozen") as said:
        for step in (5, 6):
            job.save(step)
    assert sorted(str(one.message).split(": ")[1].split()[0] for one in said) == [
        "net/encoder.0.weight", "net/encoder.1.weight"
    ]  # fmt: skip
    del job.expected[5]
    job.check()


# what the declaration covers -----------------------------------------------------------------------------------------


def test_a_tied_weight_that_trains_under_another_name_is_copied(work: Work) -> None:
    """In one module, in another that is tracked, and as a part of a larger one."""
    job = Job(frozen_check_every=1000)
    other = nn.Linear(WIDTH, WIDTH, bias=False)
    other.weight = nn.Parameter(job.weight.data)  # the same memory, with a count of its own
    whole = nn.Parameter(torch.randn(2 * WIDTH, WIDTH))
    third = nn.Linear(WIDTH, WIDTH, bias=False)
    third.weight = nn.Parameter(whole.data[WIDTH:], requires_grad=False)
    other.whole = whole
    job.run.track(other=other, third=third)
    for step in range(1, 4):
        job.save(step)
        with torch.no_grad():
            other.weight.mul_(2)
            whole.add_(1)
    for step in range(1, 4):
        loaded = job.run.at(step).load(only="third")
        job.expected[step]["third"] = loaded["weight"].tobytes()
    assert len({expected.pop("third") for expected in job.expected.values()}) == 3
    job.check()


def test_only_below_the_names_that_are_given(work: Work) -> None:
    job = Job(frozen=("net.encoder.1",), frozen_check_every=100)
    job.save(1)
    work.take()
    job.save(2)
    assert work.take() == (TRAINED + 1, 0, TRAINED + 1)
    job.run.track(frozen=["net.encoder"])
    job.save(3)
    work.take()
    job.save(4)
    assert work.take() == (TRAINED, 0, TRAINED)
    job.check()


def test_a_name_is_not_the_beginning_of_another(work: Work) -> None:
    job = Job(frozen=("net.enc", "ne"), frozen_check_every=100)
    for step in (1, 2):
        work.take()
        job.save(step)
    assert work.take() == (TRAINED + FROZEN, 0, TRAINED + FROZEN)
    job.check()


@pytest.mark.parametrize("frozen", ["yes", "net.encoder", True, (), [""], [1], 3])
def test_what_is_no_declaration_is_refused(frozen: Any) -> None:
    run = new_repository().run("r")
    with pytest.raises(UsageError, match=r"frozen=.* is not known") as caught:
        run.track(net=nn.Linear(2, 2), frozen=frozen)
    assert 'frozen="trusted"' in caught.value.do and not run._tracked


class Arrays:
    """State of NumPy, which counts nothing."""

    def __init__(self) -> None:
        self.big = np.zeros(LEAF, np.uint8)

    def state_dict(self) -> dict[str, Any]:
        return {"big": self.big}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.big[:] = state["big"]


def test_arrays_of_numpy_and_explicit_states_are_copied_as_before(work: Work) -> None:
    arrays, given = Arrays(), np.zeros(LEAF, np.uint8)
    run = new_repository().run("r").track(arrays=arrays, pair=(lambda: {"n": arrays.big[:9]}, print), frozen="trusted")
    for step in range(1, 4):
        arrays.big[:] = step
        given[:] = 10 + step
        run.save(step, state={"given": given}).wait()
        assert work.take() == (2, 0, 2)
    for step in range(1, 4):
        loaded = run.at(step).load()
        assert (loaded["arrays"]["big"] == step).all() and (loaded["state"]["given"] == 10 + step).all()
    run.close()


def test_statistics_are_never_frozen() -> None:
    """BatchNorm's averages move while every parameter stands still."""
    job = Job(frozen_check_every=1000, small_leaf_bytes=0)
    job.net.requires_grad_(False)
    averages = []
    for step in range(1, 4):
        job.net(torch.randn(4, WIDTH))
        job.expected[step] = picture(job.net)
        averages.append(job.expected[step]["norm.running_mean"])
        job.run.save(step).wait()
    assert len(set(averages)) == 3
    job.check()


def test_small_and_strided_leaves() -> None:
    """All leaves have chunks of their own; one lies across its memory."""
    job = Job(frozen_check_every=2, small_leaf_bytes=0, chunk_bytes_max=1 << 16)
    job.weight.data = torch.randn(WIDTH, WIDTH).t()
    for step in range(1, 6):
        job.save(step)
    with torch.no_grad():
        job.net.encoder[1].bias.add_(1)
    job.save(6)
    job.weight.data[1, 1] = 5
    with pytest.warns(EverystepWarning, match=r"encoder\.0\.weight was declared frozen"):
        for step in (7, 8):
            job.save(step)
    job.expected[7] = {**job.expected[7], "encoder.0.weight": job.run.at(7).load()["net"]["encoder.0.weight"].tobytes()}
    job.check()


# with all else -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, everystep.last(3)], ids=["chain", "anchors"])
def test_bases_and_anchors_over_many_saves(keep: Any) -> None:
    """With frozen leaves that change now and then: an earlier snapshot still shows the old bytes."""
    job = Job(frozen_check_every=5, base_depth_max=3, anchor_every=4)
    job.run = job.repo.run("s", keep=keep).track(net=job.net, optimizer=job.optimizer, frozen="trusted")
    for step in range(1, 20):
        if step % 6 == 0:
            with torch.no_grad():
                job.weight.mul_(1 + 1e-6)
        job.step()
        job.expected[step] = picture(job.net)
        job.run.save(step).wait()
    job.run.close()
    past = job.repo["s"]
    kept = past.checkpoints()
    assert len(kept) == (19 if keep is None else 3)
    for checkpoint in kept:
        loaded = checkpoint.load(only="net")
        assert {name: value.tobytes() for name, value in loaded.items()} == job.expected[checkpoint.step]
    assert job.repo.check().ok


class Quiet(Net):
    """Fills its weights in a way that counts nothing."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        for name, value in self.state_dict().items():
            value.numpy()[...] = state[name].numpy()


def test_a_resume_is_written_over_what_stood_still(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever fills the weights may count that or not: after a resume all is copied anew."""
    monkeypatch.setitem(globals(), "Net", Quiet)
    job = Job(frozen_check_every=1000)
    job.save(1)
    with torch.no_grad():
        job.weight.add_(1)
    job.save(2)
    job.run.rewind(1)
    work.take()
    job.save(3)
    assert work.take()[0] == FROZEN + TRAINED
    assert job.expected[3]["encoder.0.weight"] == job.expected[1]["encoder.0.weight"]
    job.run.close()

    again = Job(frozen_check_every=1000)
    again.repo, again.expected = job.repo, job.expected
    again.run = job.repo.run("r").track(net=again.net, optimizer=again.optimizer, frozen="trusted")
    assert again.run.resume() == 3 and picture(again.net) == job.expected[3]
    work.take()
    for step in (4, 5):
        again.save(step)
    assert work.take()[0] == FROZEN + 2 * TRAINED
    again.check()


def test_a_save_that_failed_leaves_nothing_untrue_behind() -> None:
    """The chunks of a save that came to nothing are stored with the next one."""
    from everystep.errors import StorageFull
    from everystep.storage import MemoryStorage
    from everystep.storage.faulty import FaultyStorage

    storage = FaultyStorage(MemoryStorage(), 0, lambda: StorageFull("full", where="here"), verbs=("put",))
    job = Job()
    job.repo = new_repository(storage=storage)
    job.run = job.repo.run("r").track(net=job.net, optimizer=job.optimizer, frozen="trusted")
    with pytest.raises(StorageFull):
        job.save(1)
    del job.expected[1]
    storage.fail_at = None
    job.save(2)
    job.save(3)
    job.check()


def test_without_room_for_a_copy_nothing_is_kept_of_it(work: Work) -> None:
    job = Job(memory_bytes_max=1 << 20, chunk_bytes_max=1 << 16)
    with pytest.warns(EverystepWarning, match="no room for a copy"):
        job.save(1)
    job.save(2)
    assert work.take()[0] == 0
    job.weight.data.add_(1)
    job.save(3)
    job.check()


def test_a_checkpoint_does_not_tell_what_was_declared() -> None:
    declared, plain = Job(), Job(frozen=None)
    for job in (declared, plain):
        torch.manual_seed(9)
        for step in (1, 2, 3):
            job.save(step)
        job.check()
    for one, other in zip(declared.run.checkpoints(), plain.run.checkpoints()):
        ours, theirs = (
            job.run._vault.manifest(found._commit).views[0] for job, found in ((declared, one), (plain, other))
        )
        assert ours.tree == theirs.tree and ours.layout == theirs.layout
        hashes = [[view.spot(index).hash for index in range(len(view.layout.chunks))] for view in (ours, theirs)]
        assert hashes[0] == hashes[1]
