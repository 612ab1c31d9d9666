"""The door as its design shows it: the whole example, as it is written there, as one program."""

import os
import subprocess
import sys
from pathlib import Path

PRELUDE = """
import numpy as np, torch
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000, 0.9)
def train_step():
    optimizer.zero_grad()
    x = torch.randn(4, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward(); optimizer.step(); scheduler.step()
    return loss
def validate():
    with torch.no_grad():
        x = torch.linspace(-1, 1, 64).reshape(8, 8)
        return float((model(x) - x.sum(1, keepdim=True)).square().mean())
v, state = 0.5, {"params": np.arange(3.0), "opt_state": (np.zeros(3), 7)}
"""

EXAMPLE = """
import everystep

repo = everystep.open("runs")                        # folder or URL
run = repo.run("resnet", keep=everystep.last(10) | everystep.best(3, "val_loss") | everystep.every(1000),
               keep_full=everystep.last(2))          # created at the first save; default: keep everything, full
run.track(model=model, optimizer=optimizer, scheduler=scheduler)   # RNG states too, unless rng=False

for step in run.steps(10_000, save_every=100):       # resumes by itself; yields 1 … 10_000
    loss = train_step()                              # one step is one optimizer step
    run.record(loss=loss)                            # metrics of this step; detached at once, converted at the save
    if step % 937 == 0: run.record(val_loss=validate())
run.close()                                          # waits until all is durable; also a context manager
"""

BY_HAND = """
step = run.resume()                                  # newest durable checkpoint into what is tracked; its step or 0
assert step == 10_000
step += 1; train_step()
saved = run.save(step, metrics={"val_loss": v})      # returns at once; saved.wait() gives the durable Checkpoint
step += 1
saved = run.save(step, state=state)                  # an explicit nested state (JAX, NumPy: arrays that are rebound)
assert saved.wait().step == 10_002
run.close()
"""

TO_READ = """
import everystep
past = everystep.open("runs")["resnet"]              # to read: never takes the run over
steps = [c.step for c in past.checkpoints()]
past.latest;  past.best("val_loss", mode="min");  past.checkpoints();  past.query("val_loss < 0.6 and step > 500")
past.best("val_loss").tag("best_model_v1")
state  = past.at(10_001).load()                      # nested NumPy arrays; like="torch" for tensors
report = past.at(10_001).load(into={"model": model}, strict=False)   # LoadReport
past.at(10_001).export("model.safetensors", only="model")
"""

CHECKS = """
assert past.latest.step == 10_002 and [c.step for c in past.query("val_loss < 0.6 and step > 500")] == [10_001]
assert set(range(1000, 10_001, 1000)) <= set(steps) and steps[-10:] == [*range(9300, 10_001, 100), 10_001, 10_002]
assert len(steps) == 10 + 9, steps
assert [c.step for c in past.checkpoints() if not c.thin] == [10_001, 10_002]
assert past.tagged("best_model_v1").step == 10_001 and past.latest.load()["state"]["opt_state"][1] == 7
assert len(past.series("loss")) == 10_000 and len(past.series("val_loss")) == 10 + 1
assert isinstance(state["model"]["weight"], np.ndarray) and sorted(report.loaded) == ["model/bias", "model/weight"]
from safetensors.torch import load_file
assert torch.equal(load_file("model.safetensors")["weight"], model.weight)
try: everystep.open("runs")["resnt"]
except everystep.NotFound as error: assert "resnet" in str(error)
else: raise SystemExit("a name that is nearly right is no name")
assert everystep.open("runs").check().ok
"""


def test_the_whole_example(tmp_path: Path) -> None:
    program = PRELUDE + EXAMPLE + BY_HAND + TO_READ + CHECKS
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program], cwd=tmp_path, capture_output=True, text=True,
        timeout=250, env={**os.environ, "EVERYSTEP_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
