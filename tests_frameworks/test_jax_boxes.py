"""Arrays over devices that one, two or four processes have: each process reads what its devices take, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _jax_programs import finish, free_port, start

import everystep

PROGRAM = "_jax_boxes.py"
RANKS = (1, 2, 4)
# Of its rows and of its columns, the share that lies on one of so many processes.
ROWS: dict[str, dict[int, float]] = {
    "rows": {1: 1, 2: 1 / 2, 4: 1 / 2}, "cols": {1: 1, 2: 1, 4: 1}, "both": {1: 1, 2: 1 / 2, 4: 1 / 2},
    "all": {1: 1, 2: 1 / 2, 4: 1 / 4}, "copied": {1: 1, 2: 1, 4: 1},
}  # fmt: skip
COLUMNS: dict[str, dict[int, float]] = {"cols": {1: 1, 2: 1 / 2, 4: 1 / 2}, "both": {1: 1, 2: 1, 4: 1 / 2}}


def together(verb: str, folder: Path, ranks: int) -> None:
    port = free_port()
    finish(*(start(PROGRAM, verb, folder, rank, ranks, port) for rank in range(ranks)))


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[tuple[int, int], Any]]]:
    """What one process and two saved, loaded by one, two and four: the folder; (processes, rank) -> what it asked for.

    The programs hold every bit against what was saved.
    """
    folder = tmp_path_factory.mktemp("boxes")
    for ranks in (1, 2):
        together("save", folder, ranks)
    for ranks in (2, 4, 1):
        together("load", folder, ranks)
    files = {(ranks, rank): folder / f"facts-{ranks}-{rank}.json" for ranks in RANKS for rank in range(ranks)}
    yield folder, {which: json.loads(file.read_text()) for which, file in files.items()}


def test_each_process_asks_for_the_chunks_of_its_shards(facts: tuple[Path, Any]) -> None:
    """By template. Chunks are rows, of each box that was saved: a process that takes columns of rows reads them all."""
    for (ranks, rank), found in facts[1].items():
        for saved_by, of_leaf in (("1", found["1"]), ("2", found["2"])):
            for saved, asked in of_leaf.items():
                in_columns = saved_by == "2" and saved == "cols"
                for target, share in asked.items():
                    expected = ROWS[target][ranks] * (COLUMNS.get(target, {}).get(ranks, 1) if in_columns else 1)
                    assert share == pytest.approx(expected, rel=0.01), (ranks, rank, saved_by, saved, target)


def test_each_process_asks_for_less_where_objects_are_filled(facts: tuple[Path, Any]) -> None:
    """A getter and setter, and a module and its optimizer of NNX: as saved, most arrays lie on every second device."""
    for (ranks, rank), found in facts[1].items():
        if ranks == 1:
            assert found["tracked"] == 1, "each byte once, on however many devices it goes"
        else:
            assert 0.5 < found["tracked"] < 0.65, (ranks, rank)


def test_a_process_without_a_device_of_an_array_asks_for_nothing_of_it(facts: tuple[Path, Any]) -> None:
    for (ranks, rank), found in facts[1].items():
        assert found["first"] == (1 if rank == 0 else 0), (ranks, rank)


def test_what_two_saved_goes_on_at_two_four_and_one(facts: tuple[Path, Any]) -> None:
    """Each resumed at shardings of its own what the one before had saved, and checked the bits of all of it."""
    past = everystep.open(str(facts[0] / "repo"))["tracked-2"]
    assert [(one.step, one.ranks) for one in past.checkpoints()] == [(1, 2), (2, 2), (3, 4), (4, 1)]
