"""Places in tf.data: iterators that are tracked, and epochs over a data set, gone on with in another program."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from _tensorflow import new_run

import everystep
from everystep import EverystepWarning, Mismatch, Unsupported

SIZE, EPOCHS = 14, 3


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    """Every shuffle mixes the global seed in, which other tests set."""
    tf.random.set_seed(1)


Make = Callable[[], tf.data.Dataset]


def numbers() -> Iterator[np.ndarray]:
    """What only Python can compute."""
    yield from (np.float64(number / 3) for number in range(SIZE))


def by_seed() -> tf.data.Dataset:
    tf.random.set_seed(1)
    return tf.data.Dataset.range(SIZE).shuffle(5).batch(3)


MAKES: dict[str, Make] = {
    "shuffled": lambda: tf.data.Dataset.range(SIZE).shuffle(SIZE, seed=1).batch(3),
    "shuffled by the global seed": by_seed,
    "read ahead": lambda: tf.data.Dataset.range(SIZE).shuffle(5, seed=2).batch(2).prefetch(4),
    "always in one order": lambda: tf.data.Dataset.range(SIZE).shuffle(5, seed=3, reshuffle_each_iteration=False),
    "shuffled twice": lambda: tf.data.Dataset.range(6).shuffle(6, seed=4).repeat(2).shuffle(3, seed=5).batch(3),
    "in parallel": lambda: (
        tf.data.Dataset.range(12)
        .shuffle(12, seed=6)
        .interleave(lambda n: tf.data.Dataset.range(n, n + 3), cycle_length=2, num_parallel_calls=2)
        .map(lambda n: n * 2, num_parallel_calls=2)
        .batch(4)
    ),
    "with random numbers": lambda: tf.data.Dataset.zip(
        tf.data.Dataset.range(SIZE).shuffle(5, seed=7), tf.data.Dataset.random(seed=8, rerandomize_each_iteration=True)
    ).map(lambda n, seed: tf.cast(n, tf.float32) + tf.random.stateless_uniform((), tf.stack([seed, seed]))),
    "cached": lambda: tf.data.Dataset.range(SIZE).cache().shuffle(5, seed=9).batch(4),
    "from a generator": lambda: (
        tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec((), tf.float64))
        .shuffle(4, seed=10)
        .batch(4)
    ),
}


def seen(run: everystep.Run, data: tf.data.Dataset, until: int | None = None, **options: Any) -> list[bytes]:
    """The batches that a run is given, up to a step."""
    found = []
    trained = tf.Variable(0.0)
    run.track(v=trained)
    for batch in run.batches(data, epochs=EPOCHS, save_on=everystep.every(1), **options):
        found.append(batch.numpy().tobytes())
        trained.assign_add(1.0)
        random.random(), np.random.rand()  # what training draws besides
        if run.step == until:
            break
    return found


@pytest.mark.parametrize("kind", [kind for kind in MAKES if kind != "shuffled twice"])
def test_epochs_of_a_data_set_go_on_where_they_were(tmp_path: Path, kind: str) -> None:
    make = MAKES[kind]
    random.seed(1)
    np.random.seed(1)
    with new_run(tmp_path, "whole") as run:
        whole = seen(run, make())
    length = len(whole) // EPOCHS
    assert len(whole) == length * EPOCHS
    if kind != "always in one order":
        assert whole[:length] != whole[length : 2 * length]
    for until in (2, length, length + 1, 2 * length + 2):  # in mid-epoch, and where one ends
        random.seed(1)
        np.random.seed(1)
        with new_run(tmp_path, f"until {until}") as run:
            first = seen(run, make(), until)
        random.seed(50)
        np.random.seed(50)
        done = len(first) - 1  # the step at which it was left was not saved
        with new_run(tmp_path, f"until {until}") as run:
            rest = seen(run, make())
            assert run.report is None or run.report.exact, run.report
        assert first[:done] + rest == whole, until


def test_an_epoch_that_is_resumed_twice(tmp_path: Path) -> None:
    make = MAKES["read ahead"]
    with new_run(tmp_path, "whole") as run:
        whole = seen(run, make())
    found: list[bytes] = []
    for until in (4, 5, 9, None):
        with new_run(tmp_path) as run:
            here = seen(run, make(), until)
        found = found[: len(found) - 1] + here if found else here
    assert found == whole


def test_what_cannot_be_exact_is_said(tmp_path: Path) -> None:
    tf.random.set_seed(None)

    def make() -> tf.data.Dataset:
        return tf.data.Dataset.range(SIZE).shuffle(SIZE).batch(3)

    with new_run(tmp_path) as run:
        seen(run, make(), 3)
    with new_run(tmp_path) as run, pytest.warns(EverystepWarning, match="the seed of a shuffle"):
        seen(run, make(), 4)


def test_a_shuffle_that_tensorflow_forgets_is_said(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        seen(run, MAKES["shuffled twice"](), 3)
    with new_run(tmp_path) as run, pytest.warns(EverystepWarning, match=r"a shuffle\(\) within the data set"):
        seen(run, MAKES["shuffled twice"](), 4)


def test_another_length_is_said(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        seen(run, tf.data.Dataset.range(9).batch(3), 3)
    with new_run(tmp_path) as run, pytest.warns(EverystepWarning, match="had 3 batches an epoch, has 4"):
        seen(run, tf.data.Dataset.range(12).batch(3), 4)


# ------------------------------------------------------------------------------------------------------ iterators


@pytest.mark.parametrize("kind", [kind for kind in MAKES if kind != "from a generator"])
@pytest.mark.parametrize("taken", [0, 2, 9])
def test_an_iterator_goes_on_in_another_program(tmp_path: Path, kind: str, taken: int) -> None:
    make: Make = lambda: MAKES[kind]().repeat()  # noqa: E731
    one = iter(make())
    for _ in range(taken):
        next(one)
    with new_run(tmp_path) as run:
        saved = run.track(data=one, v=tf.Variable(1.0)).save(1).wait()
    expected = [next(one).numpy().tobytes() for _ in range(25)]
    other = iter(make())
    next(other)
    report = saved.load(into={"data": other, "v": tf.Variable(0.0)})
    found = [next(other).numpy().tobytes() for _ in range(25)]
    # How far it had read ahead, the machine decides; where the end of an epoch was within that, it is said.
    assert report.complete and (found == expected or "read to its end" in report.inexact[0]), report


def test_an_iterator_in_the_middle_of_an_epoch_is_exact(tmp_path: Path) -> None:
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False

    def make() -> Iterator[tf.Tensor]:
        return iter(tf.data.Dataset.range(SIZE).shuffle(SIZE, seed=1).batch(3).repeat().with_options(options))

    one = make()
    for taken in range(12):
        with new_run(tmp_path, f"taken {taken}") as run:
            saved = run.track(data=one, v=tf.Variable(1.0)).save(1).wait()
        other = make()
        report = saved.load(into={"data": other, "v": tf.Variable(0.0)})
        assert report.exact == (taken not in (5, 10)), (taken, report)
        if report.exact:
            expected = [next(one).numpy().tolist() for _ in range(11)]
            assert [next(other).numpy().tolist() for _ in range(11)] == expected
            saved.load(into={"data": one, "v": tf.Variable(0.0)})
        next(one)


def test_an_iterator_of_numpy_arrays(tmp_path: Path) -> None:
    make: Make = MAKES["shuffled"]
    one = make().as_numpy_iterator()
    next(one)
    with new_run(tmp_path) as run:
        saved = run.track(data=one).save(1).wait()
    other = make().as_numpy_iterator()
    assert saved.load(into={"data": other}).exact
    assert [part.tobytes() for part in other] == [part.tobytes() for part in one]


def test_a_position_in_another_data_set_is_a_misfit(tmp_path: Path) -> None:
    one = iter(MAKES["shuffled"]())
    next(one)
    variable = tf.Variable(1.0)
    with new_run(tmp_path) as run:
        saved = run.track(data=one, v=variable).save(1).wait()
    with pytest.raises(Mismatch, match="does not fit this iterator") as caught:
        saved.load(into={"data": iter(tf.data.Dataset.from_tensors(1.0)), "v": variable})
    assert caught.value.where == "data"


def test_an_iterator_whose_functions_keep_state_is_refused(tmp_path: Path) -> None:
    random_map = tf.data.Dataset.range(5).map(lambda n: tf.random.uniform(()))
    generated = tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec((), tf.float64))
    for data in (random_map, generated):
        with new_run(tmp_path) as run:
            run.track(data=iter(data))
            with pytest.raises(Unsupported, match="cannot be kept") as caught:
                run.save(1)
            assert caught.value.where == "data" and "run.batches(" in str(caught.value)
    options = tf.data.Options()
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    with new_run(tmp_path) as run, pytest.warns(EverystepWarning, match="which its options say to leave out"):
        run.track(data=iter(random_map.with_options(options)))
        run.save(1).wait()
