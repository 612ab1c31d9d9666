"""Trainings of TensorFlow, killed with SIGKILL from outside in mid-epoch, end as the run that was not killed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tf_trainer import make_model, make_optimizer

import everystep

HERE = Path(__file__).parent
TRAINER = HERE / "tf_trainer.py"
EXAMPLE = HERE.parent / "examples" / "tensorflow_example.py"
STEPS = 21
KILL_AT = 11


def start(*arguments: object, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=HERE
    )


def kill_at(processes: "list[subprocess.Popen[str]]", step: int) -> None:
    """Reads until a step is done by all, then SIGKILL to each."""
    for process in processes:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {step}"):
                break
        else:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read()[-3000:])
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()


def finish(processes: "list[subprocess.Popen[str]]") -> list[dict[str, str]]:
    """What each said, by its first word."""
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
        found.append({line.partition(" ")[0]: line.partition(" ")[2] for line in out.splitlines()})
    return found


def plain_model() -> Any:
    """The trainer's model in a program without a strategy, and not trained."""
    keras.utils.set_random_seed(77)
    return make_model(mixed=False)


def digest_of_weights(model: Any) -> str:
    from tf_trainer import digest

    return digest(model.weights)


def test_a_tracked_iterator_with_mixed_precision(tmp_path: Path) -> None:
    whole = finish([start(TRAINER, tmp_path / "a", "iterator", STEPS)])
    kill_at([start(TRAINER, tmp_path / "b", "iterator", STEPS)], KILL_AT)
    kept = everystep.open(str(tmp_path / "b"))["r"]
    assert kept.latest is not None and 0 < kept.latest.step <= KILL_AT
    resumed = finish([start(TRAINER, tmp_path / "b", "iterator", STEPS, OTHER_LAYERS="7")])
    assert resumed == whole and "exact" in whole[0]
    change = everystep.open(str(tmp_path / "a"))["r"].at(STEPS).diff(kept.at(STEPS))
    assert not change.changed and not change.values
    scale = kept.at(STEPS).load(only="optimizer/dynamic_scale")
    assert float(scale) != 2.0**15  # the scale moved, so that it was worth keeping


def test_the_example(tmp_path: Path) -> None:
    def example(folder: str) -> "subprocess.Popen[str]":
        return start(EXAMPLE, "--runs", tmp_path / folder, "--run", "r", "--steps", 50, "--save-every", 4)

    whole = finish([example("a")])[0]
    kill_at([example("b")], 15)
    kill_at([example("b")], 33)
    resumed = finish([example("b")])[0]
    assert resumed == whole
    one, other = (everystep.open(str(tmp_path / name))["r"].latest for name in ("a", "b"))
    assert one is not None and other is not None and one.step == other.step == 50
    change = one.diff(other)
    assert not change.changed and not change.values


def test_mirrored_on_two_devices(tmp_path: Path) -> None:
    whole = finish([start(TRAINER, tmp_path / "a", "mirrored", STEPS)])
    kill_at([start(TRAINER, tmp_path / "b", "mirrored", STEPS)], KILL_AT)
    resumed = finish([start(TRAINER, tmp_path / "b", "mirrored", STEPS)])
    assert resumed == whole and "exact" in whole[0]

    past = everystep.open(str(tmp_path / "b"))["r"]
    paths = {leaf.path for leaf in past.latest.leaves()}
    assert "model/dense/kernel" in paths  # mirrored: once
    for name in ("model/batch_normalization/moving_mean", "model/dropout/seed_generator", "losses/total"):
        assert {f"{name}/per_replica/0", f"{name}/per_replica/1"} <= paths, paths
    replicas = past.latest.load(only="model/batch_normalization/moving_mean/per_replica")
    assert replicas["0"].tobytes() != replicas["1"].tobytes()

    model = plain_model()
    report = past.latest.load(into={"model": model})
    assert report.complete and not report.exact
    assert digest_of_weights(model) == whole[0]["weights"]
    seen = past.latest.load(only="model/shift/seen/per_replica")
    assert np.allclose(model.layers[3].seen.numpy(), (seen["0"] + seen["1"]) / 2)  # as aggregation=MEAN says
    losses = keras.metrics.Mean()
    past.latest.load(into={"losses": losses})
    totals = past.latest.load(only="losses/total/per_replica")
    assert np.isclose(losses.total.numpy(), totals["0"] + totals["1"])  # as SUM says


def test_data_that_the_strategy_distributes(tmp_path: Path) -> None:
    whole = finish([start(TRAINER, tmp_path / "a", "mirrored", 14, "distributed")])
    kill_at([start(TRAINER, tmp_path / "b", "mirrored", 14, "distributed")], KILL_AT)
    assert finish([start(TRAINER, tmp_path / "b", "mirrored", 14, "distributed")]) == whole


def cluster(count: int) -> list[str]:
    """TF_CONFIG of each worker of a cluster here."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return [
        json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})
        for index in range(count)
    ]


def launch(folder: Path, name: str) -> "list[subprocess.Popen[str]]":
    return [start(TRAINER, folder, "workers", STEPS, name, TF_CONFIG=config) for config in cluster(2)]


def test_two_workers(tmp_path: Path) -> None:
    whole = finish(launch(tmp_path / "a", "first"))
    kill_at(launch(tmp_path / "b", "first"), KILL_AT)
    resumed = finish(launch(tmp_path / "b", "second"))
    assert resumed == whole
    assert all("exact" in said for said in whole)
    assert whole[0]["digest"] != whole[1]["digest"]  # each has random numbers, and statistics, of its own
    assert whole[0]["counted"] == str(21 * 8) and whole[1]["counted"] == str(100 + 21 * 8)

    past = everystep.open(str(tmp_path / "b"))["r"]
    assert past.latest.ranks == 2 and past.latest.step == STEPS
    paths = {leaf.path for leaf in past.latest.leaves()}
    assert {"counted/per_worker/0", "counted/per_worker/1", "model/dense/kernel"} <= paths
    by_rank = past.latest._open()
    held = [{leaf.path for leaf in view.tree.leaves} for view in by_rank.manifest.views]
    assert "model/dense/kernel" in held[0] and "model/dense/kernel" not in held[1]  # mirrored: by one of them

    assert [row["rank"] for row in past.latest.workers] == [0, 1]
    assert past.latest.workers[0]["loss"] != past.latest.workers[1]["loss"]
    shown = subprocess.run(
        [sys.executable, "-m", "everystep", "-r", str(tmp_path / "b"), "show", f"r@{STEPS}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "examples" in shown and "loss" in shown

    model, optimizer = plain_model(), make_optimizer(mixed=False)
    with everystep.open(str(tmp_path / "b")).run("r") as run:
        run.track(model=model, optimizer=optimizer, losses=keras.metrics.Mean(), counted=tf.Variable(0, dtype=tf.int64))
        run.track(generator=tf.random.Generator.from_seed(1))
        with pytest.warns(everystep.EverystepWarning, match="saved by 2 ranks"):
            assert run.resume() == STEPS
    assert digest_of_weights(model) == whole[0]["weights"]
    assert int(optimizer.iterations) == STEPS
