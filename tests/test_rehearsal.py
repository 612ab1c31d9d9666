"""Rehearsals: is a resumed run the one that was never interrupted, and what will a planned run need?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import process

import everystep
from everystep import rules
from everystep.forecast import by_hand, foresee
from everystep.rehearsal.cue import VARIABLE
from everystep.rehearsal.sight import in_sight

OBJECTS = """
import os, sys, time
import numpy as np
import everystep

open("starts", "a").write("x")

class Net:
    def __init__(self):
        self.w = np.full((30, 4), 0.5)
    def state_dict(self):
        return {"w": self.w}
    def load_state_dict(self, state):
        self.w = np.array(state["w"])

class Schedule:
    def __init__(self):
        self.n = 0
    def step(self):
        self.n += 1
        return 1 / (1 + self.n)
    def state_dict(self):
        return {"n": self.n}
    def load_state_dict(self, state):
        self.n = state["n"]

np.random.seed(3)
net, schedule = Net(), Schedule()
"""
LOOP = """
run = everystep.open("runs").run("small", keep=everystep.last(1))
run.track(net=net, schedule=schedule)
for step in run.steps(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, save_every=3):
    net.w = net.w * 0.9 + schedule.step() * np.random.normal(size=net.w.shape)
    run.record(loss=float(net.w.mean()))
run.close()
open("after", "w").write("the loop is over")
"""
BY_HAND = """
repository = everystep.open("runs")
run = repository.run("hand")
w, first = np.zeros((30, 4)), 0
if "forgetful" not in sys.argv and run.latest is not None:
    first, w = run.resume(), run.latest.load()["w"]
for step in range(first + 1, 1000):
    w = w * 0.9 + np.random.normal(size=w.shape)
    if step % 10 == 0:
        run.save(step, state={"w": w, "started": 0})
"""
MIXED = """
run = everystep.open("runs").run("mixed")
run.track(net=net)
steps = run.steps(1000)
extra = run.latest.load(only="state")["extra"] if steps.step else np.zeros(3)
for step in steps:
    net.w, extra = net.w * 0.9 + extra.sum(), extra + 1
    if step % 10 == 0:
        run.save(step, state={"extra": extra})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scripts run, beside a folder for the scratch, which must be empty again at the end."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def script_of(folder: Path, *parts: str, **replaced: str) -> str:
    text = "".join(parts)
    for before, after in replaced.items():
        assert before in text
        text = text.replace(before, after)
    (folder / "train.py").write_text(text)
    return "train.py"


def verify(folder: Path, script: str, *args: str, **named: Any) -> everystep.ResumeReport:
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    try:
        return everystep.verify_resume([sys.executable, script, *args], scratch=str(scratch), timeout=100, **named)
    finally:
        assert not list(scratch.iterdir())


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def content_of(place: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in place.rglob("*") if p.is_file()}


# verify-resume -------------------------------------------------------------------------------------------------------


def test_an_exact_script_is_said_to_be_exact_and_its_repository_is_not_touched(folder: Path) -> None:
    script = script_of(folder, OBJECTS, LOOP)
    subprocess.run([sys.executable, script, "7"], check=True)
    before = content_of(folder / "runs")
    assert before and everystep.open("runs")["small"].latest.step == 7
    (folder / "starts").unlink(), (folder / "after").unlink()
    done = process("verify-resume", "--json", script, "9", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"], found["exact"], found["differing"], found["causes"]) == ("exact", True, [], [])
    assert (found["run"], found["place"]) == ("small", str(folder / "runs"))
    assert (found["interrupted_at"], found["compared_at"]) == (2, 4)
    assert found["leaves"] >= 2 and found["nbytes"] > 30 * 4 * 8
    assert content_of(folder / "runs") == before
    assert starts(folder) == 2, "one run without an interruption, one that is resumed"
    assert not (folder / "after").exists(), "what follows the loop must not see a model of four steps"


def test_a_schedule_that_is_not_tracked_is_named(folder: Path) -> None:
    script = script_of(folder, OBJECTS, LOOP, **{", schedule=schedule": ""})
    done = process("verify-resume", script)
    assert done.returncode == everystep.Error.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[-1] == "the resumed run is not the run that was never interrupted"
    (row,) = [line.split() for line in lines if line.startswith("  net/w")]
    assert row[1:3] == ["other", "100.0%"] and float(row[3]) > 0
    assert "schedule (Schedule), which is not tracked: run.track(schedule=schedule)" in done.stdout
    assert starts(folder) == 3, "the third tells that the script is deterministic"


def test_a_generator_that_is_not_tracked_is_named(folder: Path) -> None:
    noise = "class Data:\n    noise = None\ndata = Data()\ndata.noise = np.random.default_rng(7)\n"
    script = script_of(folder, OBJECTS, noise, LOOP, **{"np.random.normal": "data.noise.normal"})
    report = verify(folder, script)
    assert report.verdict == "differs" and not report.exact
    assert [(one.path, one.role, one.kind) for one in report.differing] == [("net/w", "other", "changed")]
    assert report.differing[0].share == 1.0 and (report.differing[0].largest or 0) > 0
    assert report.causes[0].startswith("random numbers come from data.noise (Generator), which is not tracked")
    assert report.untracked == report.causes[:1]


def test_a_script_that_differs_from_itself_is_told_from_one_that_resumes_badly(folder: Path) -> None:
    script = script_of(folder, OBJECTS, LOOP, **{"self.n += 1": "self.n += os.getpid()"})
    report = verify(folder, script, after=1, steps=1)
    assert report.verdict == "not deterministic"
    assert report.compared == ("uninterrupted", "again, both at step 1")
    assert [(one.path, one.role) for one in report.differing] == [("net/w", "other"), ("schedule/n", "value")]
    assert any("PYTHONHASHSEED" in cause for cause in report.causes)
    assert verify(folder, script, after=1, steps=1, ignore=["net/*", "schedule/?"]).exact


def test_another_start_each_time_is_no_obstacle_and_what_made_no_difference_is_named(folder: Path) -> None:
    """Nobody seeds: the resumed run goes on from the checkpoint of the very run that it is compared with."""
    warm = "schedule=schedule)\nrun.start_from('teacher@best')"
    changed = {"np.random.seed(3)": "spare = Schedule()", "schedule=schedule)": warm}
    report = verify(folder, script_of(folder, OBJECTS, LOOP, **changed))
    assert report.exact and report.untracked == [
        "there is state in spare (Schedule), which is not tracked: run.track(spare=spare)"
    ]
    assert ["start_from('teacher@best') is left out" in text for text in report.warnings] == [True]


def test_saves_by_hand_count_as_they_come_and_the_real_place_is_not_even_read(folder: Path) -> None:
    """There is something in the place that no everystep opens."""
    (folder / "runs").mkdir()
    (folder / "runs" / "thesis.txt").write_text("not a repository")
    with pytest.raises(everystep.ForeignRepository):
        everystep.open("runs")
    report = verify(folder, script_of(folder, OBJECTS, BY_HAND))
    assert (report.verdict, report.interrupted_at, report.compared_at) == ("exact", 10, 20)
    assert content_of(folder / "runs").keys() == {str(folder / "runs" / "thesis.txt")}


def test_a_loop_with_saves_by_hand_in_it_can_be_left_alone(folder: Path) -> None:
    """Saves of the loop's own would lack the state that the script needs again."""
    script = script_of(folder, OBJECTS, MIXED)
    report = verify(folder, script, by_hand=True)
    assert (report.verdict, report.interrupted_at, report.compared_at) == ("exact", 10, 20)
    with pytest.raises(everystep.RehearsalFailed, match="--by-hand"):
        verify(folder, script)


def test_a_script_that_never_resumes_is_found_out(folder: Path) -> None:
    """It is deterministic, so that it comes to the same end: by starting over."""
    report = verify(folder, script_of(folder, OBJECTS, BY_HAND), "forgetful")
    assert report.verdict == "starts over" and "step 10 again" in report.causes[0]
    assert any("a new line begins" in text for text in report.warnings)


def test_a_place_with_a_chance_in_its_name_is_found_out(folder: Path) -> None:
    script = script_of(folder, OBJECTS, LOOP, **{'"runs"': 'f"runs-{os.getpid()}"'})
    report = verify(folder, script)
    assert report.verdict == "starts over" and "is a time or a chance in the name?" in report.causes[0]
    assert not list(folder.glob("runs*"))


FAILING = {
    "raises": ("raise ValueError('no data here')", "exit code 1: ValueError: no data here"),
    "no everystep": ("print('hello')", "never opens a repository"),
    "no save": ("everystep.open('runs').run('x')", "never saves"),
    "too short": (LOOP.replace("1000", "2"), "ends with its save at step 2"),
    "shorter": (LOOP.replace("1000", "1"), "ends at step 1, before the interruption"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_script_that_cannot_be_rehearsed(folder: Path, name: str) -> None:
    text, what = FAILING[name]
    script = script_of(folder, OBJECTS, text)
    with pytest.raises(everystep.RehearsalFailed) as caught:
        verify(folder, script)
    assert what in caught.value.what and caught.value.do


def test_a_script_that_fails_shows_what_it_printed_last(folder: Path) -> None:
    script = script_of(folder, "print('reading')\n", FAILING["raises"][0])
    done = process("doctor", script)
    assert done.returncode == everystep.RehearsalFailed.exit_code and done.stdout == ""
    assert "  reading\n" in done.stderr and "error: the script ended with exit code 1: ValueError" in done.stderr
    document = json.loads(process("doctor", "--json", script).stdout)
    assert document["error"]["kind"] == "rehearsal" and script in document["error"]["where"]


def test_a_script_that_takes_too_long_is_ended_with_all_it_started(folder: Path) -> None:
    endless = "import os, time\nos.fork()\nopen(f'pid{os.getpid()}', 'w').close()\nwhile True: time.sleep(0.05)\n"
    script = script_of(folder, endless)
    with pytest.raises(everystep.RehearsalFailed, match=r"ended after 2 s: no save yet"):
        everystep.verify_resume(script, timeout=2)
    pids = [int(path.name.removeprefix("pid")) for path in folder.glob("pid*")]
    limit = time.monotonic() + 60
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < limit, "a process was left behind"
        time.sleep(0.02)
    assert len(pids) == 2


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_a_cue_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("3", '{"folder": "/", "save_at": []}', json.dumps({"folder": f"{tmp_path}/gone", "save_at": [2]})):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(everystep.UsageError, match=f"unset {VARIABLE}"):
            everystep.open(str(tmp_path / "runs"))
    for wrong in ({"after": 0}, {"steps": 0}):
        with pytest.raises(everystep.UsageError):
            everystep.verify_resume("train.py", **wrong)


# doctor --------------------------------------------------------------------------------------------------------------


def test_doctor_says_what_a_run_is_made_of_and_what_it_needs(folder: Path) -> None:
    script = script_of(folder, OBJECTS, "rng = np.random.default_rng(0)\n", LOOP, **{"keep=everystep.last(1)": ""})
    done = process("doctor", "--json", script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["run"], found["loop"]) == (True, "small", "steps")
    sections = {one["name"]: one for one in found["sections"]}
    assert sections["net"] == {
        "name": "net", "kind": "Net", "leaves": 1, "nbytes": 960, "roles": ["other"], "dtypes": ["<f8"]
    }  # fmt: skip
    assert sections["schedule"]["nbytes"] == 0 and sections["rng"]["roles"] == ["rng"]
    assert [save["step"] for save in found["saves"]] == [3, 4, 5]
    assert all(save["stored_bytes"] > 0 and save["stall_seconds"] > 0 for save in found["saves"])
    planned = found["planned"]
    assert (planned["total"], planned["saves"], planned["kept"]) == (1000, 334, 334)
    assert found["disk_bytes"] == found["first"]["stored_bytes"] + 333 * found["later"]["stored_bytes"]
    assert found["free_bytes"] > 0 and found["step_seconds"] > 0
    texts = [finding["text"] for finding in found["findings"]]
    assert "random numbers come from rng (Generator), which is not tracked: run.track(rng=rng)" in texts
    assert not (folder / "runs").exists() and starts(folder) == 1


def test_doctor_counts_what_rules_keep_and_finds_a_disk_too_small(folder: Path) -> None:
    script = script_of(folder, OBJECTS, LOOP)
    found = everystep.examine(script, total_steps=600, save_every=100)
    assert (found.planned.saves, found.planned.kept, found.planned.drops) == (6, 1, True)
    assert found.disk_bytes == 2 * max(save.stored_bytes for save in found.saves)
    done = process("doctor", "--total-steps", str(10**15), "--save-every", "1", script_of(folder, OBJECTS, BY_HAND))
    assert done.returncode == 1 and done.stdout.endswith("not ready: the planned run would fail\n")
    assert "the disk is too small" in done.stdout


def test_doctor_sees_how_often_a_script_saves_by_hand(folder: Path) -> None:
    found = everystep.examine(script_of(folder, OBJECTS, BY_HAND), total_steps=100)
    assert found.loop == "by hand" and [save.step for save in found.saves] == [10, 20, 30]
    assert (found.planned.saves, found.planned.every) == (10, 10.0)
    assert found.ok


@pytest.mark.parametrize(
    ("rule", "total", "saves", "unforeseen"),
    [
        (everystep.every(100), 1000, 10, []),
        (everystep.every(100), 1050, 11, []),
        (everystep.every(epochs=2), 1000, 10, []),
        (everystep.every(seconds=60), 1000, 9, []),
        (everystep.every(100) | everystep.every(150), 600, 8, []),
        (everystep.every(500) | everystep.best("loss"), 1000, 2, ["best"]),
        (rules.AnyOf([]), 1000, 1, []),
        (everystep.every(1), 10**9, 10**9, []),
    ],
)
def test_saves_are_foreseen(rule: everystep.Rule, total: int, saves: int, unforeseen: list[str]) -> None:
    """At half a second a step, and 50 steps an epoch."""
    planned = foresee(rule, total, 50, 0.5, None, None)
    assert (planned.saves, planned.kept, planned.unforeseen) == (saves, saves, unforeseen)


def test_what_rules_keep_is_foreseen() -> None:
    keep = everystep.last(3) | everystep.best(2, "val_loss") | everystep.best(4, "accuracy")
    planned = foresee(everystep.every(10), 1000, None, None, keep, everystep.last(2))
    assert (planned.saves, planned.kept, planned.full) == (100, 3 + 4, 2), "the 2 best are among the 4 best"
    wrong = foresee(everystep.every(10), 100, None, None, everystep.when(lambda kept: kept.metrics["x"] > 1), None)
    assert wrong.kept is None and "KeyError" in wrong.unforeseen[0]
    assert foresee(everystep.every(10), None, None, None, None, None).saves is None
    assert by_hand([5, 10, 15, 40], None).due(rules.Moment(10, None, False, 0.0, {}, {})) == "every 5 steps"


# what is in sight ----------------------------------------------------------------------------------------------------


def names(tracked: dict[str, Any], loader: Any = None) -> set[tuple[str, str]]:
    """Of what lies in the variables of the test that calls this."""
    mine = ("tracked", "loader", "request", "item", "self")
    found = in_sight(list(tracked.values()), loader)
    return {(sight.name, sight.what) for sight in found if sight.name.split("[")[0].split(".")[0] not in mine}


def test_generators_in_variables_containers_and_objects_are_seen() -> None:
    class Held:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(1)

    deep = {"a": [np.random.RandomState(2)]}
    held, shared = Held(), np.random.default_rng(3)
    assert {("deep['a'][0]", "generator"), ("held.rng", "generator"), ("shared", "generator")} <= names({})
    pair = (lambda: shared.bit_generator.state, lambda state: setattr(shared.bit_generator, "state", state))
    left = names({"shared": pair, "deep": deep["a"][0]})
    assert ("held.rng", "generator") in left and isinstance(held.rng, np.random.Generator)
    assert not left & {("shared", "generator"), ("deep['a'][0]", "generator")}


def test_what_belongs_to_tracked_torch_objects_is_not_reported() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    first, wrapped, loss = model[0], torch.nn.Sequential(model), torch.nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm = torch.optim.lr_scheduler.ConstantLR(optimizer)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm], [])
    source = torch.Generator()
    loader_of_mine = torch.utils.data.DataLoader([1, 2], generator=source)
    mine = {"model": model, "optimizer": optimizer, "both": both}
    assert names(mine, loader_of_mine) == set(), (first, wrapped, loss, warm)
    assert names(mine) == {("source", "generator"), ("loader_of_mine", "loader")}
    del mine["optimizer"], mine["both"]
    seen = names(mine, loader_of_mine)
    assert ("optimizer", "state") in seen and ("both", "state") in seen
    model.own = np.random.default_rng(0)
    assert ("model.own", "generator") in names(mine, loader_of_mine), "a module's state_dict leaves it out"


# torch ---------------------------------------------------------------------------------------------------------------

TORCH = """
import torch, everystep
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
model.register_buffer("seen", torch.zeros(3), persistent=False)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
data = torch.utils.data.TensorDataset(torch.randn(24, 8), torch.randn(24, 1))
torch.manual_seed(1)
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
run = everystep.open("runs").run("resnet", keep_full=everystep.last(1))
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(loader, epochs=50, save_every=10):
    optimizer.zero_grad()
    (model(x) - y).pow(2).mean().backward()
    optimizer.step()
"""


def test_torch_with_a_shuffled_loader_is_exact_and_doctor_finds_what_is_left_out(folder: Path) -> None:
    pytest.importorskip("torch")
    fixed = {"torch.randn(24, 8), torch.randn(24, 1)": "torch.arange(192.0).reshape(24, 8) / 99, torch.ones(24, 1)"}
    script = script_of(folder, TORCH, **fixed)
    report = verify(folder, script, after=1, steps=6)
    assert report.exact and report.compared_at == 7, "over the end of an epoch of 6 batches"
    found = everystep.examine(script, steps=4)
    assert found.ok and found.loop == "batches"
    assert {s.name: (s.kind, s.roles) for s in found.sections} == {
        "model": ("Sequential", ("weights",)), "optimizer": ("Adam", ("optimizer",)), "rng": ("", ("rng",)),
    }  # fmt: skip
    planned = found.planned
    assert (planned.total, planned.saves, planned.kept, planned.full) == (300, 5, 5, 1)
    texts = [finding.text for finding in found.findings]
    assert any("scheduler (ExponentialLR), which is not tracked" in text for text in texts)
    assert any("model.seen: non-persistent buffer" in text for text in texts)
    assert found.surroundings["torch threads"] > 0 and os.path.basename(found.place) == "runs"
