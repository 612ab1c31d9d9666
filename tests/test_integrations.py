"""What the door has for its guests: a loader that knows its place, a listener, random states, names of paths."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import Numbers, mixed_noise, scramble
from torch.utils.data import DataLoader

import everystep

GUESTS = {
    "lightning": "lightning",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "keras": "keras",
    "dcp": "torch",
}


@pytest.mark.parametrize("guest", GUESTS)
def test_a_missing_package_is_said_with_the_command_that_installs_it(guest: str) -> None:
    script = f"import sys; sys.modules[{GUESTS[guest]!r}] = None; import everystep.integrations.{guest}"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 1 and "everystep.errors.Unsupported: " in found.stderr
    assert f'do:    pip install "everystep[{GUESTS[guest]}]"' in found.stderr


def test_the_room_itself_imports_no_framework() -> None:
    script = "import sys, everystep, everystep.integrations; print(*sorted(m for m in sys.modules if '.' not in m))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "tensorflow", "keras", "jax", "lightning", "transformers", "accelerate"} & set(found)


# a loader that knows its place ---------------------------------------------------------------------------------------


def loader_of(workers: int = 0, **options: Any) -> everystep.ResumableLoader:
    defaults: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    return everystep.ResumableLoader(DataLoader(Numbers(mixed_noise), num_workers=workers, **{**defaults, **options}))


def draw(loader: everystep.ResumableLoader, epochs: int, seen: list[Any] | None = None) -> list[Any]:
    """Every batch, and what the training draws behind each; in `seen` the states there, too."""
    found = []
    while loader.epochs_done < epochs:
        for batch in loader:
            found.append((batch.numpy().tobytes(), random.random(), float(np.random.rand()), float(torch.rand(()))))
            if seen is not None:
                seen.append((loader.state_dict(), states()))
    return found


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_states(found: tuple[Any, ...]) -> None:
    random.setstate(found[0])
    np.random.set_state(found[1])
    torch.set_rng_state(found[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_from_any_batch(workers: int) -> None:
    scramble(1)
    seen: list[Any] = []
    whole = draw(loader_of(workers), 3, seen)
    length = len(loader_of())
    for at in (0, length // 2, length - 1, length, 2 * length + 1):
        scramble(99)
        again = loader_of(workers)
        again.load_state_dict(seen[at][0])
        set_states(seen[at][1])
        assert draw(again, 3) == whole[at + 1 :], at


def test_it_is_tracked_as_any_object(tmp_path: Path) -> None:
    def train(folder: str, seed: int, stop: int) -> list[Any]:
        scramble(seed)
        loader = loader_of()
        found: list[Any] = []
        with everystep.open(str(tmp_path / folder)).run("r") as run:
            run.track(loader=loader)
            batches = iter(loader)
            for step in run.steps(20, save_every=4):
                batch = next(batches, None)
                if batch is None:
                    batches = iter(loader)
                    batch = next(batches)
                found.append((step, batch.numpy().tobytes(), float(torch.rand(()))))
                if step == stop:
                    break
        return found

    whole = train("whole", 1, 20)
    first = train("broken", 1, 11)
    rest = train("broken", 99, 20)
    assert [step for step, *_ in rest] == list(range(9, 21)) and [*first[:8], *rest] == whole


def test_an_epoch_that_is_left_counts_as_done() -> None:
    loader = loader_of()
    next(iter(loader))
    assert (loader.epochs_done, loader.state_dict()["batch"]) == (0, 1)
    next(iter(loader))
    assert (loader.epochs_done, loader.state_dict()["batch"]) == (1, 1)


def test_it_looks_like_the_loader_inside() -> None:
    loader = loader_of(drop_last=True)
    assert loader.batch_size == 3 and loader.drop_last and len(loader) == len(loader.dataset) // 3
    assert not hasattr(loader, "_iterator") and not hasattr(loader, "nothing")


def test_a_different_loader_is_told() -> None:
    loader = loader_of()
    next(iter(loader))
    other = loader_of(batch_size=2)
    other.load_state_dict(loader.state_dict())
    with pytest.warns(everystep.EverystepWarning, match="batch size was 3, is 2"):
        next(iter(other))


def test_what_is_no_place_is_refused() -> None:
    with pytest.raises(everystep.UsageError, match="not the state"):
        loader_of().load_state_dict({"batch": 3})
    with pytest.raises(everystep.UsageError, match="knows its place already"):
        everystep.ResumableLoader(loader_of())
    with pytest.raises(TypeError, match="unknown length"):
        len(everystep.ResumableLoader(_Endless()))


class _Endless:
    def __iter__(self) -> Any:
        return iter(range(5))


def test_who_listens_hears_before_each_batch() -> None:
    loader = loader_of()
    heard: list[int] = []
    loader.before_batch(lambda: heard.append(loader.state_dict()["batch"]))
    count = sum(1 for _ in loader)
    assert heard == [*range(count), 0], "also before it finds that there is none left"


# the rest of the door ------------------------------------------------------------------------------------------------


def test_random_states_of_a_checkpoint_are_put_back_alone(tmp_path: Path) -> None:
    scramble(3)
    with everystep.open(str(tmp_path)).run("r") as run:
        run.save(1, state={"w": np.ones(3)})
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    scramble(4)
    assert everystep.open(str(tmp_path))["r"].at(1).set_random_state() == []
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn
    with everystep.open(str(tmp_path)).run("other").track(rng=False) as run:
        run.save(1, state={"w": np.ones(3)}).wait()
        assert run.at(1).set_random_state() == []


def test_a_scratch_folder_goes_with_all_in_it(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path)).run("r") as run:
        checkpoint = run.save(1, state={"w": np.ones(3)}).wait()
    with checkpoint.scratch_folder() as folder:
        Path(folder, "file").write_text("x")
        assert Path(folder).is_dir()
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    "keys", [("model", "fc.weight"), ("a/b", "%"), ("list", 0), ((1, "x"), None, 2.5), ("[0]", ""), ("ä\n",)]
)
def test_a_path_is_written_as_leaves_lists_it(tmp_path: Path, keys: tuple[Any, ...]) -> None:
    state: Any = np.arange(3)
    for key in reversed(keys):
        state = {key: state} if key != 0 else [state]
    with everystep.open(str(tmp_path)).run("r") as run:
        checkpoint = run.save(1, state=state).wait()
    path = everystep.path_to(*keys)
    assert path in [leaf.path for leaf in checkpoint.leaves()]
    assert np.array_equal(checkpoint.load(only=path), np.arange(3))
