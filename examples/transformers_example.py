"""A Transformers Trainer that saves into a run. Kill it whenever you like and start it again: the same bits come out.

python examples/transformers_example.py --repo runs
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import everystep
from everystep.integrations.transformers import EverystepCallback

EPOCHS, BATCHES, SAVE_EVERY = 3, 8, 3


class Tokens(torch.utils.data.Dataset):
    """Short sequences, each the one before moved on."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) * 5 + index) % 31
        return {"input_ids": tokens, "labels": tokens}


class Told(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--run", default="transformers")
    parser.add_argument("--output", default="trainer-output", help="where the Trainer writes what is no checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    arguments = TrainingArguments(
        args.output, num_train_epochs=EPOCHS, per_device_train_batch_size=4, learning_rate=0.01,
        lr_scheduler_type="cosine", save_strategy="steps", save_steps=SAVE_EVERY, save_total_limit=4, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with everystep.open(args.repo).run(args.run) as run:
        callback = EverystepCallback(run)
        trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=[Told(), callback])
        folder = callback.resume_from(trainer)
        if folder is not None:
            print(f"goes on from step {run.latest.step}", flush=True)
        trainer.train(resume_from_checkpoint=folder)


if __name__ == "__main__":
    main()
