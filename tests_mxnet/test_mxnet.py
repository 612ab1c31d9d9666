"""MXNet's arrays, its random numbers, its loss scale, and the example that is killed."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from _gluon import net_of, picture, scramble, step
from mxnet import gluon

import everystep
from everystep import EverystepWarning, adapters
from everystep.adapters.mxnet_arrays import same_bits
from everystep.errors import Damaged
from everystep.schema import Composite

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def saved(place: Path, state: Any) -> everystep.Checkpoint:
    with everystep.open(str(place)).run("r") as run:
        found = run.save(1, state=state).wait()
        assert isinstance(found, everystep.Checkpoint)
        return found


# -------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int8", "int32", "int64", "bool"])
def test_arrays_of_every_type(dtype: str, tmp_path: Path) -> None:
    raw = np.random.RandomState(3).randint(0, 256, 96 * np.dtype(dtype).itemsize, dtype=np.uint8)
    raw = raw % 2 if dtype == "bool" else raw
    values = raw.view(dtype).reshape(4, 24)
    array = mx.nd.array(values, dtype=dtype)
    checkpoint = saved(tmp_path, {"a": array, "b": array[1:3]})
    assert checkpoint.load(only="a").tobytes() == values.tobytes()
    found = checkpoint.load(like="saved")
    assert type(found["a"]) is mx.nd.NDArray and same_bits(found["a"], array) and same_bits(found["b"], array[1:3])


def test_bfloat16(tmp_path: Path) -> None:
    array = mx.nd.amp_cast(mx.nd.array([1.5, -2.25, 1e30, 0.1]), dtype="bfloat16")
    checkpoint = saved(tmp_path, [array])
    (host,) = checkpoint.load()
    assert host.dtype.name == "bfloat16" and host.astype("f4").tolist()[:2] == [1.5, -2.25]
    (found,) = checkpoint.load(like="saved")
    assert found.dtype == array.dtype and same_bits(found, array)


def test_arrays_like_those_of_numpy(tmp_path: Path) -> None:
    with mx.util.np_shape(True), mx.util.np_array(True):
        state = {"one": mx.np.array(2.5), "none": mx.np.zeros((0, 3)), "some": mx.np.arange(6).reshape(2, 3)}
        found = saved(tmp_path, state).load(like="saved")
        for name, value in state.items():
            assert type(found[name]) is mx.np.ndarray and found[name].shape == value.shape
            assert same_bits(found[name], value)


def test_what_is_written_later_is_not_in_the_snapshot(tmp_path: Path) -> None:
    array = mx.nd.ones((300, 300))
    with everystep.open(str(tmp_path)).run("r") as run:
        for _ in range(20):
            array *= 2  # the engine's threads may not have begun
        under_way = run.save(1, state=[array])
        array += 1
        assert (under_way.wait().load()[0] == 2**20).all()


def test_a_state_is_read_where_it_lies_without_room_for_a_copy(tmp_path: Path) -> None:
    array = mx.nd.arange(10_000_000).reshape((1000, 10_000))
    settings = everystep.Settings(memory_bytes_max=32 << 20)
    said = pytest.warns(EverystepWarning, match="no room for a copy")
    with everystep.open(str(tmp_path), settings=settings).run("r") as run, said:
        checkpoint = run.save(1, state=[array]).wait()
    assert same_bits(mx.nd.array(checkpoint.load()[0]), array)


def test_sparse_arrays(tmp_path: Path) -> None:
    state = {
        "rows": mx.nd.sparse.row_sparse_array(([[1.0, 2], [3, 4]], [1, 4]), shape=(6, 2)),
        "no rows": mx.nd.sparse.zeros("row_sparse", (6, 2)),
        "csr": mx.nd.sparse.csr_matrix(([1.0, 2, 3], [0, 2, 1], [0, 2, 2, 3]), shape=(3, 4)),
        "no values": mx.nd.sparse.zeros("csr", (3, 4), dtype="float64"),
    }
    checkpoint = saved(tmp_path, state)
    found = checkpoint.load(like="saved")
    for name, value in state.items():
        assert type(found[name]) is type(value) and found[name].dtype == value.dtype and same_bits(found[name], value)
        assert (found[name].asnumpy() == value.asnumpy()).all()
    assert checkpoint.load(only="rows/indices").tolist() == [1, 4]


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("row_sparse", {"indices": np.array([1, 9])}),
        ("row_sparse", {"indices": np.array([-1, 4])}),
        ("row_sparse", {"indices": np.array([4, 1])}),
        ("row_sparse", {"data": np.zeros((3, 2), "f4")}),
        ("csr", {"indices": np.array([0, 4, 1])}),
        ("csr", {"indptr": np.array([0, 3, 2, 3])}),
        ("csr", {"indptr": np.array([0, 2, 2, 99])}),
        ("csr", {"shape": [3]}),
        ("csr", {"dtype": "<u2"}),
    ],
)
def test_sparse_parts_that_do_not_fit_are_refused(kind: str, changed: dict[str, Any]) -> None:
    parts = {
        "row_sparse": {
            "shape": [6, 2], "dtype": "<f4", "indices": np.array([1, 4]), "data": np.zeros((2, 2), "f4"),
        },
        "csr": {
            "shape": [3, 4], "dtype": "<f4", "indptr": np.array([0, 2, 2, 3]), "indices": np.array([0, 2, 1]),
            "data": np.zeros(3, "f4"),
        },
    }[kind]  # fmt: skip
    adapters.compose(Composite(f"mxnet.{kind}", parts))
    with pytest.raises(Damaged, match="do not fit together"):
        adapters.compose(Composite(f"mxnet.{kind}", {**parts, **changed}))


def test_without_mxnet_its_arrays_are_numpy_arrays(tmp_path: Path) -> None:
    saved(tmp_path, {"w": mx.nd.arange(4), "rows": mx.nd.sparse.zeros("row_sparse", (6, 2))})
    program = f"""
import sys
sys.modules["mxnet"] = None
import everystep
latest = everystep.open({str(tmp_path)!r})["r"].latest
assert latest.load()["w"].tolist() == [0, 1, 2, 3] and latest.load()["rows"]["shape"] == [6, 2]
del sys.modules["mxnet"]
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
try: latest.load(like="saved")
except everystep.Unsupported as error: assert "mxnet is not installed here" in str(error)
else: raise SystemExit("loaded without it?")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- chance


def draws() -> list[float]:
    return mx.nd.random.uniform(shape=3).asnumpy().tolist() + mx.nd.random.normal(shape=3).asnumpy().tolist()


def test_random_numbers_go_on_whenever_it_was_stopped(tmp_path: Path) -> None:
    """Also where a save came that a run without an end to it would not have made."""

    def go(name: str, seed: int, stop_at: int | None) -> dict[int, list[float]]:
        scramble(seed)
        found = {}
        with everystep.open(str(tmp_path)).run(name).track(net=net_of()) as run:
            for at in run.steps(7, save_every=5):
                found[at] = draws()
                run._tracked["net"][0].weight.set_data(mx.nd.random.normal(shape=(16, 8)))
                if at == stop_at:
                    run.stop()
        return found

    whole = go("whole", 1, None)
    parts = {**go("parts", 1, 3), **go("parts", 2, 4), **go("parts", 3, None)}
    assert parts == whole and len({tuple(found) for found in whole.values()}) == 7
    past = everystep.open(str(tmp_path))
    assert picture(past["whole"], 7) == picture(past["parts"], 7)
    assert go("others", 9, None) != whole, "mx.random.seed says which numbers they are"


def test_each_run_has_a_seed_of_its_own(tmp_path: Path) -> None:
    def go(name: str, seed: int) -> list[float]:
        scramble(seed)
        with everystep.open(str(tmp_path)).run(name) as run:
            run.save(1, state=[np.ones(1)])
            return draws()

    one, other = go("a", 1), go("b", 2)
    assert one != other and go("c", 1) == one


def test_without_rng_nobody_touches_the_generators(tmp_path: Path) -> None:
    scramble(1)
    expected = [draws(), draws()]
    scramble(1)
    with everystep.open(str(tmp_path)).run("r").track(rng=False) as run:
        found = []
        for at in run.steps(2):
            found.append(draws())
            run.save(at, state=[np.full(1, at)])
    assert found == expected


# ------------------------------------------------------------------------------------------------------ the rest


def test_metrics_are_held_as_they_are_now(tmp_path: Path) -> None:
    loss = mx.nd.ones(1)
    with everystep.open(str(tmp_path)).run("r") as run:
        run.record(loss=loss)
        run.record(worker=True, loss=loss)
        loss += 5
        checkpoint = run.save(1, state=[loss]).wait()
    assert checkpoint.metrics == {"loss": 1.0} and checkpoint.workers[0]["loss"] == 1.0


def test_nothing_holds_on_to_a_trainer(tmp_path: Path) -> None:
    import weakref

    net = net_of()
    trainer = gluon.Trainer(net.collect_params(), "adam")
    with everystep.open(str(tmp_path)).run("r").track(net=net, trainer=trainer) as run:
        step(net, trainer, 1)
        run.save(1).wait()
    gone = weakref.ref(trainer)
    del run, trainer, net
    gc.collect()
    assert gone() is None


AMP = """
import sys
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.contrib import amp

import everystep

sys.path.insert(0, {here!r})
amp.init()
from _gluon import net_of, scramble

folder, name, total, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
scramble(seed)
net = gluon.nn.Dense(4, in_units=8)
net.initialize()
trainer = gluon.Trainer(net.collect_params(), "sgd", {{"momentum": 0.9}})
amp.init_trainer(trainer)
trainer._amp_loss_scaler._scale_seq_len = 2
with everystep.open(folder).run(name).track(net=net, trainer=trainer) as run:
    for at in run.steps(total, save_every=2):
        big = 1e38 if at == 3 else 1.0
        for param in net.collect_params().values():
            with amp.scale_loss(mx.nd.ones(1), trainer) as scaled:
                values = np.random.RandomState(at).normal(size=param.shape) * big
                param.grad()[:] = mx.nd.array(values) * scaled
                param.data()._fresh_grad = True
        trainer.step(1)
"""


def test_the_loss_scale_goes_on_exactly(tmp_path: Path) -> None:
    def go(name: str, total: int, seed: int) -> Any:
        program = AMP.format(here=str(HERE))
        command = [sys.executable, "-c", program, str(tmp_path / "runs"), name, str(total), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return everystep.open(str(tmp_path / "runs"))[name]

    whole = go("whole", 8, 1)
    go("parts", 5, 1)
    assert picture(whole, 8) == picture(go("parts", 8, 2), 8)
    scales = [whole.at(at).load(only="trainer/amp/scaler/_next_loss_scale") for at in (2, 4, 8)]
    assert scales[0] == 2.0**17 and scales[1] < scales[0], "it grew, and an overflow made it smaller"


def test_the_example_is_killed_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "exact.py"), "--only", "mxnet", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "yes" in done.stdout and "3 times" in done.stdout
