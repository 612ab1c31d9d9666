"""A Lightning Trainer that saves into a run. Kill it whenever you like and start it again: it ends with the same bits.

python examples/lightning_example.py --repo runs
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep.integrations.lightning import EverystepCheckpoint
from everystep.integrations.logs import log_saves

EPOCHS, BATCHES, SAVE_EVERY = 3, 8, 3


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        print(f"step {self.global_step + 1} loss {loss.item():.6f}", flush=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders() -> tuple[everystep.ResumableLoader, DataLoader]:
    """An ordinary shuffled DataLoader, which then knows its place; and one to validate with."""
    x = torch.randn(BATCHES * 4 + 8, 8, generator=torch.Generator().manual_seed(7))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    train = DataLoader(torch.utils.data.Subset(data, range(BATCHES * 4)), batch_size=4, shuffle=True)
    return everystep.ResumableLoader(train), DataLoader(
        torch.utils.data.Subset(data, range(BATCHES * 4, BATCHES * 4 + 8)), batch_size=8
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--run", default="lightning")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("everystep").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    with everystep.open(args.repo).run(args.run) as run:
        log_saves(run)
        checkpoint = EverystepCheckpoint(run, save_top_k=-1, every_n_train_steps=SAVE_EVERY)
        if checkpoint.ckpt_path is not None:
            print(f"goes on from {checkpoint.ckpt_path}", flush=True)
        trainer = pl.Trainer(
            max_epochs=EPOCHS, callbacks=[checkpoint], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(Model(), *loaders(), ckpt_path=checkpoint.ckpt_path)


if __name__ == "__main__":
    main()
