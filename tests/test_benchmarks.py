"""The machinery of the benchmarks, not its figures: turns, peers of one file, processes of their own, the report."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # they are no part of the package

from benchmarks import (  # noqa: E402
    apart,
    blocking,
    bound,
    link,
    peers,
    report,
    results,
    sequences,
    timing,
    training,
    usage,
    whole,
    work,
)
from benchmarks.__main__ import PARTS, Part, run  # noqa: E402

PEERS = '''
"""Peers of one file each, as somebody would add them."""

import os

import torch

from benchmarks.peers import Peer


class Fake(Peer):
    name = "fake"

    def save(self, step):
        self.step = step
        torch.save(self.state, self.path(step))

    def load(self, step=None):
        return torch.load(self.path(step), weights_only=True)


class Forgetful(Fake):
    name = "fake, forgetful"

    def load(self, step=None):
        found = super().load(step)
        found["model"]["w"][0, 0] += 1
        return found


class Mortal(Fake):
    name = "fake, mortal"

    def save(self, step):
        os._exit(7)


class Absent(Fake):
    name = "fake, absent"
    needs = ("no_such_package_here=pip install it",)


PEERS = (Fake, Forgetful, Mortal, Absent)
'''


@pytest.fixture
def sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sequences.Sequence:
    """Six checkpoints of something small, under gpt's name: a weight of 8 × 4, and its average."""
    folder = tmp_path / "sequences" / "gpt"
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(6):
        (folder / f"{number:02}.bin").write_bytes(chance.standard_normal(64).astype(np.float32).tobytes())
    entry: dict[str, Any] = {"dtype": "<f4", "shape": [8, 4]}
    index = [
        {"name": "w", "role": "weights", "offset": 0, **entry},
        {"name": "w.exp_avg", "role": "exp_avg", "offset": 128, **entry},
    ]
    (folder / "index.json").write_text(json.dumps(index))
    monkeypatch.setattr(sequences, "FOLDER", tmp_path / "sequences")
    return sequences.load("gpt", 6)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of peers beside the usual one."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "fakes.py").write_text(PEERS)
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(tmp_path / "more")])
    yield
    sys.modules.pop("benchmarks.peers.fakes", None)


# turns ---------------------------------------------------------------------------------------------------------------


def test_every_contestant_has_its_turn_once_a_round_in_an_order_that_changes_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)

    def played(seed: int) -> tuple[list[str], timing.Samples]:
        calls: list[str] = []
        names = {name: lambda name=name: calls.append(name) or {"s": float(len(calls))} for name in "abcd"}
        return calls, timing.alternate(names, rounds=5, warmups=2, seed=seed, before=lambda: calls.append("|"))

    calls, samples = played(3)
    rounds = "".join(calls).split("|")[1:]
    assert len(rounds) == 7 and all(sorted(each) == list("abcd") for each in rounds) and len(set(rounds)) > 1
    assert all(len(samples.of(name, "s")) == 5 for name in "abcd"), "the warm-ups do not count"
    assert calls == played(3)[0] != played(4)[0]


def test_who_fails_is_named_and_the_others_go_on() -> None:
    def fail() -> dict[str, float]:
        raise OSError("no space left\nand more")

    samples = timing.alternate({"good": lambda: {"s": 1.0}, "bad": fail}, rounds=4)
    assert samples.failed == {"bad": "OSError: no space left"} and len(samples.of("good", "s")) == 4
    table = results.Table("t", ("", "s"), [["good", "1"]], results.left_out({"missing": {"c": "get it"}}, samples))
    assert "- failed, bad: OSError: no space left" in table.markdown() and "left out, c: get it" in table.text()


def test_a_contestant_that_has_used_up_its_time_rests_after_three_values() -> None:
    samples = timing.alternate({"slow": lambda: {"s": 1.0}}, rounds=9, seconds_max=0.0)
    assert len(samples.of("slow", "s")) == timing.VALUES_MIN


def test_ratios_are_of_medians_of_minima_and_within_a_round() -> None:
    samples = timing.Samples({"a": {"s": [2.0, 4.0, 30.0]}, "b": {"s": [1.0, 4.0, 10.0]}})
    assert samples.ratio("a", "b", "s") == 1.0 and samples.least_ratio("a", "b", "s") == 2.0
    assert samples.pairs("a", "b", "s") == [2.0, 1.0, 3.0]
    again = timing.Samples.from_dict(json.loads(json.dumps(samples.as_dict())))
    again.merge(samples)
    assert again.of("a", "s") == 2 * samples.of("a", "s")


def test_a_pause_is_no_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    watch = timing.Stopwatch()
    now[0] += 2
    with watch.paused():
        now[0] += 5
    now[0] += 1
    assert watch.seconds() == 3.0


# the state -----------------------------------------------------------------------------------------------------------


def test_a_replay_shows_the_checkpoints_in_the_same_memory_one_after_the_other_and_back(
    sequence: sequences.Sequence,
) -> None:
    replay = work.Replay(sequence)
    state = replay.memory.state()
    assert list(state) == ["model", "optimizer"] and list(state["optimizer"]) == ["w.exp_avg"]
    seen, addresses = [], {state["model"]["w"].data_ptr(), state["optimizer"]["w.exp_avg"].data_ptr()}
    assert len(addresses) == 2 and all(address % work.ALIGNED == 0 for address in addresses)
    assert state["model"]["w"].untyped_storage().nbytes() == 128, "torch.save writes a tensor's whole storage"
    for _ in range(12):
        replay.next()
        at = next(i for i in range(6) if (state["model"]["w"].numpy() == sequence[i]["w"]).all())
        assert (state["optimizer"]["w.exp_avg"].numpy() == sequence[at]["w.exp_avg"]).all()
        seen.append(at)
    assert seen == [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 1]
    replay.close()


def test_a_large_state_is_of_copies_no_two_of_which_have_the_same_bytes(sequence: sequences.Sequence) -> None:
    replay = work.Replay(sequence, mb=20 * 256 / 1e6)
    replay.show(2)
    values = [value for part in replay.memory.state().values() for value in part.values()]
    assert len(values) == 2 * work.GROUPS and replay.nbytes == 20 * 256
    weights = torch.cat([value for name, value in replay.memory.state()["model"].items() if name.endswith("w")])
    assert weights.shape == (20, 8, 4) and len({each.numpy().tobytes() for each in weights}) == 20
    assert (weights[0].numpy() == sequence[2]["w"]).all()
    replay.close()


def test_bytes_of_a_state_lie_end_to_end_and_come_back_as_tensors() -> None:
    state = {"model": {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()}, "optimizer": {"a": torch.arange(4)}}
    flat = peers.Flat(state)
    data = flat.fill()
    assert data.nbytes == 60 + 14 + 32 and flat.dtype == torch.float32
    back = flat.state(data)
    assert all(torch.equal(back[part][name], value) for part, values in state.items() for name, value in values.items())


@pytest.mark.parametrize("name", ["zstd per file", "XOR, planes, zstd", "float difference, gzip"])
def test_coded_peers_give_back_every_step_that_they_keep(name: str, tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(100, 10)}, "optimizer": {"w.exp_avg": torch.randn(100, 10)}}
    peer = next(peer for peer in peers.all_peers() if peer.name == name)(state, str(tmp_path))
    kept = []
    for step in range(4):
        state["model"]["w"] += 0.01
        kept.append(state["model"]["w"].clone())
        peer.save(step)
        peer.finish()
    close = torch.equal if peer.exact else torch.allclose
    assert all(close(peer.load(step)["model"]["w"], value) for step, value in enumerate(kept))
    assert peer.stored() == timing.folder_bytes(str(tmp_path)) > 0


# peers ---------------------------------------------------------------------------------------------------------------


def test_ours_comes_first_and_every_peer_has_a_name_of_its_own() -> None:
    found = list(peers.all_peers())
    assert found[0].name == "everystep" and len({peers.slug(peer.name) for peer in found}) == len(found)
    assert all(peer.where <= peers.BENCHMARKS for peer in found)


def test_peers_are_chosen_by_file_or_by_name_and_those_they_are_compared_with_come_along(fakes: None) -> None:
    chosen, missing = peers.choose("torch_save", "blocking", ("everystep",))
    assert [peer.name for peer in chosen] == ["everystep", "torch.save", "torch.save + fsync"] and not missing
    chosen, missing = peers.choose("fake,fake-absent", "blocking")
    assert [peer.name for peer in chosen] == ["fake"]
    assert missing == {"fake, absent": "no_such_package_here is not installed: pip install it"}
    with pytest.raises(SystemExit, match="not known: nobody"):
        peers.choose("nobody", "blocking")


def test_a_peer_in_one_file_is_in_the_tables_and_who_loses_bits_or_dies_is_named(
    sequence: sequences.Sequence, fakes: None, tmp_path: Path
) -> None:
    result = blocking.run(0, "gpt", 1, "fakes", str(tmp_path))
    save, load = blocking.tables(json.loads(json.dumps(result)))
    names = [row[0] for row in load.rows]
    assert "fake" in names and "everystep" in names and "fake, forgetful" not in names
    assert "fake, mortal" not in [row[0] for row in save.rows]
    notes = "\n".join(save.notes)
    assert "failed, fake, forgetful: 1 of 64 elements came back changed" in notes
    assert "failed, fake, mortal: its process ended in save (exit code 7)" in notes
    assert "left out, fake, absent: no_such_package_here is not installed" in notes
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("everystep-bench")] == []


def test_contestants_share_the_memory_in_heats_and_are_compared_within_their_own() -> None:
    def peer(title: str, states: float) -> type[peers.Peer]:
        return type(title, (peers.Peer,), {"name": title, "kept": states, "most": states + 1})

    chosen = [peer("everystep", 2), *(peer(title, 3) for title in "abc")]
    names = [[each.name for each in heat] for heat in blocking.heats(chosen, 1 << 30, 10.6 * 2**30)]
    assert names == [["everystep", "a", "b"], ["everystep", "c"]]
    alone = [[each.name for each in heat] for heat in blocking.heats(chosen, 1 << 30, 0.0)]
    assert alone == [["everystep", "a"], ["everystep", "b"], ["everystep", "c"]], "it is tried, one at a time"
    first = timing.Samples({"everystep": {"s": [2.0]}, "a": {"s": [4.0]}})
    second = timing.Samples({"everystep": {"s": [6.0]}, "c": {"s": [12.0]}})
    whole_of, homes = blocking.together({"heats": [first.as_dict(), second.as_dict()]})
    assert homes["a"].ratio("a", "everystep", "s") == homes["c"].ratio("c", "everystep", "s") == 2.0
    assert homes["everystep"].of("everystep", "s") == whole_of.of("everystep", "s") == [2.0, 6.0]


def test_sizes_are_those_of_all_files_after_each_checkpoint(
    sequence: sequences.Sequence, fakes: None, tmp_path: Path
) -> None:
    ways, missing = peers.choose("fake,fake-mortal", "whole", ("everystep", "everystep-keep-full-last-2"))
    row = whole.measure(whole.ROWS["gpt"], 6, ways, str(tmp_path), 1000.0)
    sizes = row["ways"]["fake"]["sizes"]
    assert len(sizes) == 6 and np.allclose(np.diff(sizes), sizes[0]) and not missing
    assert row["failed"] == {"fake, mortal": "its process ended in keep (exit code 7)"}
    assert whole.share(row["ways"]["fake"], row, 6) == sizes[-1] / 6 / 256
    assert whole.share(row["ways"]["fake"], row, 7) is None
    assert row["ways"]["everystep"]["wrong"] == 0 and row["ways"]["everystep"]["elements"] == 6 * 64
    first, second = whole.tables({"rows": [row], "missing": {}})
    assert "failed, fake, mortal: its process ended in keep (exit code 7)" in first.notes
    assert second.head[:3] == ("", "MB", "everystep")


def test_what_a_contestant_says_is_shown_where_it_fails(
    sequence: sequences.Sequence, fakes: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    replay = work.Replay(sequence)
    replay.show(0)
    (fake,) = (peer for peer in peers.all_peers() if peer.name == "fake")
    contestant = apart.Apart(fake, replay.memory, str(tmp_path / "fake"))
    with pytest.raises(apart.Failed, match="FileNotFoundError"):
        contestant.call("load", 5)
    assert "Traceback" in capfd.readouterr().err
    contestant.call("keep", 1)
    assert contestant.call("check", 1) == (0, 64)
    assert set(contestant.call("memory", 2)) == {"extra", "load_extra"}
    contestant.close()
    replay.close()


def test_memory_that_comes_and_goes_counts() -> None:
    before = usage.resident()
    with usage.peak() as most:
        held = np.ones(96 << 20, np.uint8)
        del held
    assert most[0] - before > 64 << 20
    assert usage.burnt() > 0


# bounds, links, schedules --------------------------------------------------------------------------------------------


def test_the_bound_of_what_did_not_change_is_nothing_and_of_noise_is_all_of_it() -> None:
    chance = np.random.default_rng(0)
    base = chance.standard_normal(1 << 16).astype(np.float32)
    flat = base.view(np.uint8)
    assert bound.of(flat, flat, "<f4") == 0.0
    noise = chance.integers(0, 256, flat.size, np.uint8)
    assert 0.97 * flat.size < bound.of(noise, flat, "<f4") <= flat.size
    near = (base * np.float32(1 + 2**-18)).view(np.uint8)
    assert 0 < bound.of(near, flat, "<f4") < 0.3 * flat.size < bound.of(near, None, "<f4")


def test_a_link_lets_so_many_bytes_a_second_by(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(link.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(link.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    slow = link.Link(1e6)
    for _ in range(20):
        slow.carry(500_000)
    assert now[0] == pytest.approx(10.0, abs=2 * link.BURST_SECONDS)
    now[0] += 100.0
    begun = now[0]
    slow.carry(1_000_000)
    assert now[0] - begun == pytest.approx(1.0, abs=2 * link.BURST_SECONDS), "an idle link saves nothing up"


def test_the_first_thirty_checkpoints_of_gpt_are_a_training_of_their_own() -> None:
    rates = [sequences._cosine(step) for step in range(10 * sequences.LONG_COUNT + 1)]
    ends = (10 * sequences.COUNT, 10 * sequences.LONG_COUNT)
    assert all(rates[end] == pytest.approx(0.05) for end in ends) and rates[ends[0] + 30] > 0.9
    assert (sequences.length("gpt"), sequences.length("cnn")) == (sequences.LONG_COUNT, sequences.COUNT)


# the report ----------------------------------------------------------------------------------------------------------


def recorded(name: str, result: dict[str, Any]) -> dict[str, Any]:
    return {"benchmark": name, "command": f"python -m benchmarks.{name}", "date": "2026-01-02 03:04",
            **results.surroundings(), "result": result}  # fmt: skip


def drawn_samples(names: list[str], *quantities: str) -> dict[str, Any]:
    chance = random.Random(0)
    values = {name: {quantity: [chance.uniform(1, 2) for _ in range(4)] for quantity in quantities} for name in names}
    return {"values": values, "failed": {}}


SAVED = ["everystep", "safetensors + fsync", "torch.save", "somebody"]
CANNED: dict[str, Callable[[], dict[str, Any]]] = {
    "whole": lambda: {
        "missing": {"zipnn": "pip install zipnn"},
        "most_held": 3.5,
        "rows": [{
            "row": "gpt", "later": False, "checkpoint_bytes": 1000, "count": 30, "failed": {},
            "ways": {name: {"sizes": [(900 - 50 * i) * n for n in range(1, 31)], "wrong": 0, "elements": 1}
                     for i, name in enumerate(SAVED)},
        }],
    },
    "blocking-small": lambda: {
        "nbytes": 68_000_000, "leaves": 267, "rounds": 4, "missing": {},
        "heats": [
            drawn_samples([*SAVED, "memcpy, one thread"], "blocking", "durable", "cpu", "load", "load_cpu"),
            drawn_samples([*SAVED[:3], "another", "memcpy, one thread"], "blocking", "durable", "cpu", "load"),
        ],
    },
    "training-10": lambda: {
        "nbytes": 68_000_000, "every": 10, "steps": 10, "rounds": 4, "batch": 8, "missing": {},
        "samples": {"failed": {}, "values": {
            **drawn_samples([training.NONE, training.NONE_AGAIN], "segment")["values"],
            **drawn_samples(["everystep", "somebody"], "segment", "blocking")["values"],
        }},
    },
    "restore": lambda: {
        "history": {"nbytes": 68_000_000, "counts": {"everystep": 30, "torch.save": 30}, "missing": {},
                    "samples": drawn_samples(["everystep|newest", "everystep|slowest 0", "torch.save|newest"], "load")},
        "links": {what: {"nbytes": 1_000_000, "samples": drawn_samples(["torch.save", "0", "1", "2"], "load")}
                  for what in ("weights", "whole state")},
    },
}  # fmt: skip


def test_the_report_is_made_of_what_was_kept(tmp_path: Path) -> None:
    kept, out, plots = tmp_path / "kept", tmp_path / "RESULTS.md", tmp_path / "docs" / "plots"
    kept.mkdir()
    for name, result in CANNED.items():
        (kept / f"{name}.json").write_text(json.dumps(recorded(name, result())))
    results.fail(kept, "codec", "python -m benchmarks.codec", "exit code 1")
    report.main(["--results", str(kept), "--out", str(out), "--plots", str(plots)])
    page = out.read_text("utf-8")
    for section in report.SECTIONS:
        part = page.partition(f"## {section.title}\n")[2].partition("\n## ")[0]
        if section.name in CANNED:
            assert f"`python -m benchmarks.{section.name}`, 2026-01-02 03:04" in part and "| everystep |" in part
        elif section.name == "codec":
            assert "failed, exit code 1" in part
        else:
            assert f"Not measured yet: `{section.command}`" in part
    assert "- left out, zipnn: pip install zipnn" in page and "nan" not in page and "None" not in page
    assert sorted(path.name for path in plots.iterdir()) == ["bytes.png", "depth.png", "speed.png", "training.png"]
    for path in plots.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and f"(docs/plots/{path.name})" in page


def test_a_part_of_the_contestants_is_printed_and_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = results.parser("benchmarks.some", "About it.")
    parser.add_argument("--peers")
    arguments = ["--peers", "fake", "--folder", "/x", "--results", str(tmp_path), "--json"]
    given, command = parser.parse_args(arguments), results.command("benchmarks.some", arguments)
    assert command == "python -m benchmarks.some --peers fake", "places of one machine are no part of the command"
    results.publish("some", {"a": 1}, [], given, command)
    assert json.loads(capsys.readouterr().out)["result"] == {"a": 1} and not list(tmp_path.iterdir())
    given.peers = None
    results.publish("some", {"a": 2}, [], given, command)
    found = results.read(tmp_path, "some")
    assert found is not None and found["result"] == {"a": 2} and results.read(tmp_path, "other") is None


def test_every_part_of_a_whole_run_has_its_section() -> None:
    assert {part.name for part in PARTS} == {section.name for section in report.SECTIONS if not section.store}
    for part in PARTS:
        (section,) = (section for section in report.SECTIONS if section.name == part.name)
        assert section.command == f"python -m benchmarks.{part.module} {part.options}".strip()


def test_a_part_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("gone", "no_such_module")
    assert not run(part, "--some 1", None, tmp_path)
    found = results.read(tmp_path, "gone")
    assert found is not None and found["failed"] == "exit code 1"
    assert found["command"] == "python -m benchmarks.no_such_module --some 1"
