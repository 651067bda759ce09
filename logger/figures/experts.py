"""Figures of models with several experts: what each knows alone, how often they differ, how many an image used."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from logger.figures.style import (
    FULL,
    GROUP_COLOURS,
    GROUP_LABELS,
    LIGHT,
    ON_PICTURE,
    bare,
    new_figure,
    stacked_bars,
    styled,
)
from utils.class_counts import GROUPS


def experts(accuracy: dict[str, Sequence[float | None]], together: dict[str, float | None],
            disagreement: np.ndarray | None, split: str = "test") -> Any:
    """Each expert's own accuracy by group beside all experts' together, and how often two of them differ.

    accuracy: "all" and groups -> [E]; together: the same keys -> the ensemble's; disagreement: [E, E] shares.
    split: whose images they are, for the axis.
    """
    shown = [key for key in ("all", *GROUPS) if together.get(key) is not None and accuracy.get(key) is not None]
    with styled():
        figure, axes = new_figure(FULL, 3.3, 2 if disagreement is not None else 1, width_ratios=[2.1, 1]
                                  if disagreement is not None else [1])
        left = axes[0]
        names = {"all": "all images", **GROUP_LABELS}
        for place, key in enumerate(shown):
            colour = {**GROUP_COLOURS, "all": LIGHT["accent"]}[key]
            values = [100 * value for value in accuracy[key]]
            y = len(shown) - 1 - place
            left.axhspan(y - 0.42, y + 0.42, color=LIGHT["grid"], alpha=0.35, linewidth=0)
            # One below the other, so that equal values all stay visible.
            heights = y + np.linspace(0.27, -0.27, len(values) + 1)
            left.scatter([100 * together[key]], heights[:1], s=70, color=colour, marker="D", linewidths=0, zorder=3)
            for number, (value, height) in enumerate(zip(values, heights[1:]), 1):
                left.scatter([value], [height], s=70, facecolors=LIGHT["surface"], edgecolors=colour, linewidths=1.3,
                             zorder=4 + number)
                left.annotate(str(number), (value, height), ha="center", va="center", fontsize=7, color=LIGHT["ink"],
                              zorder=4 + number, xytext=(0, -0.4), textcoords="offset points")
        left.set_yticks(range(len(shown) - 1, -1, -1), [names[key] for key in shown])
        left.set(ylim=(-0.6, len(shown) - 0.4),
                 xlabel=f"{split} accuracy, %  (numbered: one expert, diamond: all together)")
        left.margins(x=0.08)
        left.set_title("accuracy of each expert alone")
        left.spines["left"].set_visible(False)
        left.grid(axis="y", visible=False)
        if disagreement is not None:
            _draw_disagreement(axes[1], disagreement)
    return figure


def _draw_disagreement(axes: Any, disagreement: np.ndarray) -> None:
    from matplotlib.colors import to_rgb
    size = len(disagreement)
    picture = np.empty((size, size, 4))
    picture[..., :3] = to_rgb(LIGHT["accent"])
    picture[..., 3] = 0.85 * disagreement / max(disagreement.max(), 1e-9)
    axes.imshow(picture, interpolation="nearest")
    for (row, column), value in np.ndenumerate(disagreement):
        if row != column:
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8.5,
                      color=ON_PICTURE if picture[row, column, 3] > 0.45 else LIGHT["ink"])
    numbers = [str(i + 1) for i in range(size)]
    axes.set_xticks(range(size), numbers)
    axes.set_yticks(range(size), numbers)
    axes.set(xlabel="expert", ylabel="expert")
    axes.set_title("two experts differ, % of images")
    bare(axes)


def expert_shares(shares: dict[str, Sequence[float] | None]) -> Any:
    """How many experts the images of each group used. shares: "all" and groups -> [E] fractions of 1..E experts."""
    from matplotlib.colors import to_rgb
    names = {"all": "all images", **GROUP_LABELS}
    rows = {names[key]: shares[key] for key in ("all", *GROUPS) if shares.get(key)}
    size = len(next(iter(rows.values())))
    strengths = [0.3 + 0.7 * number / max(size - 1, 1) for number in range(size)]
    parts = [(f"{number} expert{'s' if number > 1 else ''}", (*to_rgb(LIGHT["accent"]), strength),
              LIGHT["surface" if strength > 0.55 else "ink"]) for number, strength in enumerate(strengths, 1)]
    with styled():
        figure, (axes,) = new_figure(FULL, 0.9 + 0.42 * len(rows))
        stacked_bars(axes, rows, parts, 0.05)
        axes.set_xlabel("% of images")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=size, handlelength=1,
                      handleheight=1)
    return figure
