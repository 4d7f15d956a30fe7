"""Train CNN image classifiers on one CPU, on many GPUs and on SLURM clusters, as the same run."""

__version__ = "0.1.0"
