"""MXNet's sums round in one order."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when MXNet is imported
