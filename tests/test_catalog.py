"""The catalog room alone: the query language, ranking, and files that are broken or of another time."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everystep.catalog import Absorbed, Catalog, Entry, parse
from everystep.errors import UsageError
from everystep.seam import REAL

ROWS: list[tuple[int, dict[str, Any]]] = [
    (100, {"val_loss": 0.5, "acc": 1, "lr": 1e-3}),
    (200, {"val_loss": 0.25, "acc": 2, "note": "warm"}),
    (300, {"val_loss": math.nan, "acc": 3}),
    (400, {"val_loss": 0.25, "val/loss": 7.5, "a.b": -1}),
    (500, {}),
]


def entry(step: int, metrics: dict[str, Any]) -> Entry:
    return Entry(
        f"id{step}", step // 100, step, step * 1.0, None, 1, "by hand", step == 300, step * 10, step, 0.1, metrics
    )


@pytest.fixture
def catalog() -> Catalog:
    made = Catalog(":memory:", REAL)
    entries = [entry(step, metrics) for step, metrics in ROWS]
    made.absorb("run", Absorbed(5, "head"), entries, [], {"best": "id200", "last": "id500"})
    made.absorb("other", Absorbed(1, "x"), [entry(100, {"val_loss": 0.0})], [], {"best": "id100"})
    return made


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("val_loss < 0.3", [200, 400]),
        ("val_loss < 0.3 and step > 250", [400]),
        ("0.2 < val_loss <= 0.5", [100, 200, 400]),
        ("0.3 > val_loss", [200, 400]),
        ("not val_loss < 0.3", [100, 300, 500]),
        ("val_loss == 0.25 or acc == 1", [100, 200, 400]),
        ("val/loss > 7", [400]),
        ("a.b == -1", [400]),
        ("acc > val_loss", [100, 200]),
        ('tag == "best"', [200]),
        ('tag != "best" and step > 300', [400, 500]),
        ('note == "warm"', [200]),
        ("step in [100, 500, 7]", [100, 500]),
        ("step not in (100, 500)", [200, 300, 400]),
        ("thin", [300]),
        ("not thin and step >= 300", [400, 500]),
        ("raw_bytes >= 4000", [400, 500]),
        ("step < 99999999999999999999999", [100, 200, 300, 400, 500]),
        ("step in []", []),
    ],
)
def test_queries(catalog: Catalog, text: str, steps: list[int]) -> None:
    assert catalog.query("run", parse(text)) == [f"id{step}" for step in steps]


@pytest.mark.parametrize(
    "text",
    ["", "step", "step >", "1 < 2", "f(step) > 1", "step > [1]", "tag > 'a'", "tag == 3", "step is 3", "lambda: 1",
     "__import__('os')", "step > step.__class__()", "not " * 60 + "step > 1", "step > 1\nstep > 2"],
)  # fmt: skip
def test_what_is_no_query_says_so(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the query"):
        parse(text)


def test_a_metric_that_nobody_has_names_the_near_ones(catalog: Catalog) -> None:
    with pytest.raises(UsageError) as caught:
        catalog.query("run", parse("val_los < 1"))
    assert "val_loss" in caught.value.do


@given(st.text(max_size=40))
def test_no_text_reaches_sql(text: str) -> None:
    try:
        condition = parse(text)
    except UsageError:
        return
    assert condition.sql.count("?") == len(condition.values)


def test_rank(catalog: Catalog) -> None:
    assert catalog.rank("run", "val_loss", "min", 9) == ["id200", "id400", "id100"]
    assert catalog.rank("run", "acc", "max", 2) == ["id300", "id200"]
    assert catalog.rank("run", "note", "max", 2) == []
    assert catalog.rank("nobody", "acc", "max", 2) == []


def test_absorbing_more(catalog: Catalog) -> None:
    changed = [entry(100, {"val_loss": 0.1}), entry(600, {"val_loss": 0.05})]
    catalog.absorb("run", Absorbed(7, "newer"), changed, ["id200"], {"best": "id600"})
    assert catalog.recall("run") == Absorbed(7, "newer")
    assert catalog.rank("run", "val_loss", "min", 9) == ["id600", "id100", "id400"]
    assert catalog.query("run", parse('tag == "best"')) == ["id600"]
    catalog.absorb("run", Absorbed(1, "anew"), [entry(700, {})], [], {}, anew=True)
    assert catalog.query("run", parse("step > 0")) == ["id700"]
    assert catalog.query("other", parse("step > 0")) == ["id100"]


def test_a_file_is_shared_and_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sqlite")
    first, second = Catalog(path, REAL), Catalog(path, REAL)
    first.absorb("run", Absorbed(1, "a"), [entry(100, {"acc": 1})], [], {})
    assert second.recall("run") == Absorbed(1, "a")
    first.close()
    second.close()
    assert Catalog(path, REAL).rank("run", "acc", "max", 1) == ["id100"]


def test_a_broken_file_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"this is not a database, and longer than a header of one hundred bytes" * 4)
    catalog = Catalog(str(path), REAL)
    assert catalog.recall("run") is None
    catalog.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert Catalog(str(path), REAL).recall("run") is None
