"""Which words of file names and dict keys mean a step, an epoch, a metric, a piece of a checkpoint: closed tables."""

from __future__ import annotations

import re

STEP_KEYS = (
    "global_step", "global_steps", "num_updates", "n_updates", "completed_steps", "train_steps", "train_step",
    "trained_steps", "global_iter", "global_iteration",
)  # fmt: skip
"""Keys that count updates from the beginning of training."""
COUNT_KEYS = (
    "step", "steps", "current_step", "cur_step", "iteration", "iterations", "iter", "iters", "iter_num", "itr", "it",
    "n_iter", "current_iter", "cur_iter",
)  # fmt: skip
"""Keys that count updates, but with some programs only those of the present epoch."""
OPTIMIZERS = ("optimizer", "optimizer_weights", "optim", "opt")
ITERATION_KEYS = ("iterations", "iteration", "_iterations", "iter")
"""Keys of those that count all the updates that an optimizer of TensorFlow or Keras made."""
EPOCH_KEYS = ("epoch", "current_epoch", "cur_epoch", "epoch_idx", "epoch_num")
STATE_TABLES = (
    "trainer_state", "trainer", "train_state", "training_state", "meta", "metadata", "extra_state", "extra", "info",
    "progress", "counters", "state", "train_iterator", "engine_state", "loop_state",
)  # fmt: skip
"""Keys of dicts that may hold the counts."""
METRIC_TABLES = (
    "metrics", "metric", "results", "result", "scores", "logs", "log", "stats", "measures", "performance",
    "val_metrics", "eval_metrics", "test_metrics", "train_metrics",
)  # fmt: skip
"""Keys of dicts in which every number is a metric."""
NAMED_TABLES = ("val", "valid", "validation", "eval", "evaluation", "test", "train", "training", "best", "losses")
"""Keys of dicts in which numbers with the name of a metric are one, of this part of the data."""
COUNTS_MAX = 15
"""Digits of a step or epoch: longer numbers are ids."""
METRICS = (
    "loss", "losses", "nll", "ce", "bce", "perplexity", "ppl", "bpb", "bpc", "kl", "mse", "mae", "rmse", "mape",
    "error", "err", "wer", "cer", "fid", "acc", "accuracy", "prec", "precision", "recall", "auc", "auroc", "map",
    "miou", "iou", "dice", "bleu", "rouge", "meteor", "cider", "psnr", "ssim", "lpips", "score", "fitness", "reward",
    "return", "elo", "mrr", "ndcg", "correlation", "pearson", "spearman", "f1", "r2", "top1", "top5", "metric",
)  # fmt: skip
_TAILS = ("epoch", "step", "avg", "mean", "value", "val", "ema", "total")
DELTA_KEYS = ("delta", "deltas", "delta_weights", "weight_delta", "weights_delta", "delta_state_dict", "delta_state")
INITIAL = ("initial", "init", "base", "pretrained")
COPIES = ("best", "last", "latest", "final", "current", "newest")
PIECES = {
    **dict.fromkeys(("optimizer", "optimizers", "optim", "opt"), "optimizer"),
    **dict.fromkeys(("scheduler", "schedulers", "sched", "lrscheduler"), "scheduler"),
    **dict.fromkeys(("scaler",), "scaler"),
    **dict.fromkeys(
        ("rng", "random", "ema", "g", "d", "netg", "netd", "gen", "disc", "generator", "discriminator", "critic",
         "actor", "encoder", "decoder"), ""
    ),
}  # fmt: skip
"""Words for a piece of a checkpoint -> its name in the state; where that is empty, what its file is called."""


def is_metric(name: str) -> bool:
    """Whether a number of this name is a metric: its last word says so, or its first is "best"."""
    words = [word for word in re.split(r"[^a-z0-9]+", _spread(name).lower()) if word]
    while len(words) > 1 and words[-1] in _TAILS:
        words.pop()
    return bool(words) and (words[0] == "best" or words[-1] in METRICS or words[-1].rstrip("0123456789") in METRICS)


def _spread(name: str) -> str:
    """valLoss as val_Loss; mAP stays one word."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name)
