"""Matrices of classes: confusion, and attention between classes. C classes."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from logger.figures.style import FULL, GROUP_COLOURS, GROUP_LABELS, LIGHT, ON_PICTURE, bare, new_figure, short, styled

NAMED_CLASSES = 40  # with more classes than this a matrix names only their groups


def confusion_matrix(matrix: np.ndarray, names: Sequence[str], groups: Sequence[str]) -> Any:
    """Rows: the true class, columns: the predicted one, in percent of the row. matrix: [C, C] images, C <= 100.

    Up to NAMED_CLASSES classes are named; of more, in order of their training images, only the groups are.
    """
    from matplotlib.colors import to_rgb
    size = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # Colour on a transparent background: the page's shows through, whether light or dark.
    picture = np.empty((size, size, 4))
    picture[..., :3], picture[..., 3] = to_rgb(LIGHT["few"]), shares ** 0.7
    picture[np.arange(size), np.arange(size), :3] = to_rgb(LIGHT["right"])
    with styled():
        figure, (axes,) = new_figure(min(FULL, 4.2 + 0.05 * size + 0.16 * min(size, 12)),
                                     min(7.6, 2.4 + 0.05 * size + 0.17 * min(size, 12)))
        axes.imshow(picture, aspect="auto", interpolation="nearest")
        _name_classes(axes, names, groups)
        if size <= 15:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                              color=LIGHT["ink"] if share < 0.5 else ON_PICTURE)
        axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def _name_classes(axes: Any, names: Sequence[str], groups: Sequence[str]) -> None:
    """Label both axes of a matrix [C, C] with the classes' names, or with their groups' if there are more
    than NAMED_CLASSES."""
    size, marked = len(names), groups
    if size <= NAMED_CLASSES:
        names = [short(name) for name in names]
        axes.set_xticks(range(size), names, rotation=90 if size > 12 or max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(size), names)
    else:
        marked = list(dict.fromkeys(groups))
        middles = [np.mean([i for i, group in enumerate(groups) if group == name]) for name in marked]
        axes.set_xticks(middles, [GROUP_LABELS[name] for name in marked])
        axes.set_yticks(middles, [GROUP_LABELS[name] for name in marked])
        for edge in (i - 0.5 for i in range(1, size) if groups[i] != groups[i - 1]):
            axes.axhline(edge, color=LIGHT["quiet"], linewidth=0.8)
            axes.axvline(edge, color=LIGHT["quiet"], linewidth=0.8)
    for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
        for tick, group in zip(labels, marked):
            tick.set_color(GROUP_COLOURS[group])
    bare(axes)


def attention(relative: np.ndarray, names: Sequence[str], groups: Sequence[str]) -> Any:
    """How much images of a class (row) attend to those of another (column) in BatchFormer. relative: [C, C] mean
    attention of one image to another, relative to the mean over all pairs (1: uniform); NaN for classes that
    never shared a batch."""
    from matplotlib.colors import LogNorm
    size = len(relative)
    seen = relative[np.isfinite(relative) & (relative > 0)]
    reach = min(max([2.0, *seen, *(1 / seen)]), 100.0)       # 1 is in the middle
    with styled():
        figure, (axes,) = new_figure(5.2 + 0.12 * min(size, 12), 4.0 + 0.12 * min(size, 12))
        shown = axes.imshow(np.where(relative > 0, relative, np.nan), aspect="auto", interpolation="nearest",
                            cmap="RdBu_r", norm=LogNorm(1 / reach, reach))
        _name_classes(axes, names, groups)
        if size <= 15:
            for (row, column), value in np.ndenumerate(relative):
                if np.isfinite(value):
                    strong = abs(np.log(max(value, 1e-9))) > 0.6 * np.log(reach)
                    axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8,
                              color=ON_PICTURE if strong else LIGHT["ink"])
        bar = figure.colorbar(shown, ax=axes, label="attention, 1 is even")
        bar.set_ticks(np.geomspace(1 / reach, reach, 5), minor=False)
        bar.set_ticks([], minor=True)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        bar.outline.set_visible(False)
        axes.set(xlabel="images looked at, by class", ylabel="images that look, by class")
    return figure
