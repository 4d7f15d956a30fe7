"""What an evaluation found, as drawings: confusion matrix, recall of each class, reliability. K classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from distcnn.outcome import Outcome
from distcnn.plotting import Draw, Style, drawable

MAX_CLASSES = 40  # drawn by name
MAX_NUMBERS = 12  # classes up to which each cell of the matrix has its count


def class_height(classes: int) -> float:
    """Inches of a chart with a line for each class."""
    return 0.9 + 0.27 * min(max(classes, 4), MAX_CLASSES)


def confusion_height(classes: int) -> float:
    """Inches of a confusion matrix: about square."""
    return 4.6 if classes <= MAX_NUMBERS else 5.2


def confusion(outcome: Outcome) -> Draw:
    """The confusion matrix, each row as shares of its class. For up to MAX_CLASSES classes."""
    matrix = outcome.confusion()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [drawable(name, label) for label, name in enumerate(outcome.classes)]

    def draw(axes: Any, style: Style) -> None:
        colors = LinearSegmentedColormap.from_list("shares", [style.card, style.color(0)])
        axes.imshow(shares, cmap=colors, vmin=0, vmax=1, aspect="auto", zorder=2)
        places = range(len(names))
        axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(places, names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if len(names) <= MAX_NUMBERS:
            for row, column in zip(*np.nonzero(matrix), strict=True):
                ink = style.card if shares[row, column] > 0.65 else style.ink
                text = f"{matrix[row, column]:,}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8, zorder=3)

    return draw


def class_bars(outcome: Outcome) -> Draw:
    """Recall of each class with its 95 % interval, the weakest first; of many classes, the weakest."""
    scores = [(score.recall, label, score) for label, score in enumerate(outcome.class_scores()) if score.samples]
    chosen = sorted(scores, key=lambda row: row[:2])[:MAX_CLASSES]
    recall = np.array([100 * value for value, _, _ in chosen])
    ends = 100 * np.array([score.interval for _, _, score in chosen]).reshape(-1, 2)
    names = [drawable(score.name, label) for _, label, score in chosen]

    def draw(axes: Any, style: Style) -> None:
        places = np.arange(len(chosen))
        axes.barh(places, recall, 0.72, color=style.color(0), alpha=0.75)
        axes.errorbar(recall, places, xerr=abs(ends.T - recall), fmt="none", ecolor=style.ink, elinewidth=1.2)
        axes.set_yticks(places, names)
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.set_xlim(0, 100.5)  # from 0: the length of a bar is what is read
        axes.set_xlabel("recall in %, with 95 % intervals")

    return draw


def reliability(outcome: Outcome) -> Draw:
    """Accuracy against confidence (Guo et al., 2017): on the diagonal a model is as often right as it is sure."""
    samples, _, right = np.array(outcome.bins, dtype=np.float64).reshape(-1, 3).T
    edges = np.linspace(0, 1, len(samples) + 1)
    held = samples > 0
    accuracy = right[held] / samples[held]
    middle = (edges[:-1] + edges[1:])[held] / 2

    def draw(axes: Any, style: Style) -> None:
        share = samples / max(samples.sum(), 1)
        axes.bar(middle, accuracy, 0.8 * edges[1], color=style.color(0), alpha=0.75, label="right")
        axes.plot([0, 1], [0, 1], color=style.ink, linewidth=1, linestyle="--", label="as sure as right")
        axes.stairs(share, edges, color=style.color(1), linewidth=1.8, label="share of samples")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share that is right")

    return draw
