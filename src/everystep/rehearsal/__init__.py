"""A rehearsal: a training script runs for a few steps in a scratch folder, and what came of it is looked at."""
