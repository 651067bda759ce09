"""How training went: figures of metrics.csv over epochs."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logger.figures.style import FULL, GROUP_COLOURS, LIGHT, new_figure, styled
from utils.class_counts import GROUPS

History = Sequence[dict[str, float | None]]


def _points(history: History, key: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of a metrics.csv column, without its empty fields."""
    pairs = [(row["epoch"], row[key]) for row in history if row.get("epoch") is not None and row.get(key) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _draw_lines(axes: Any, history: History, lines: Sequence[tuple[str, str, str]], scale: float = 1.0) -> None:
    """Lines of metrics.csv columns, (column, name, colour), each named at its end: no legend to look up."""
    ends = []
    for key, name, colour in lines:
        xs, ys = _points(history, key)
        if xs:
            ys = [scale * y for y in ys]
            axes.plot(xs, ys, color=colour, marker="o" if len(xs) < 3 else None, markersize=4)
            ends.append([ys[-1], xs[-1], name, colour])
    axes.margins(x=0.02)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    # Names that would overlap are moved apart, in order of the lines' ends, and not above the panel.
    low, high = axes.get_ylim()
    gap, heights = (high - low) * 0.085, []
    for end in sorted(ends):
        heights.append(end[0] if not heights else max(end[0], heights[-1] + gap))
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], high - gap * (len(heights) - place - 0.7))
    for (_, x, name, colour), y in zip(sorted(ends), heights):
        axes.annotate(name, (x, y), xytext=(5, 0), textcoords="offset points", color=colour, va="center", fontsize=8.5,
                      annotation_clip=False)


def curves(history: History) -> Any:
    """Loss, accuracy (a detector's AP) and validation accuracy by group over epochs. history: rows of metrics.csv."""
    pair = (("", "training", LIGHT["quiet"]), ("val_", "validation", LIGHT["accent"]))
    panels = [("loss", [(f"{prefix}loss", name, colour) for prefix, name, colour in pair], 1),
              ("accuracy, %", [(f"{prefix}accuracy", name, colour) for prefix, name, colour in pair], 100),
              ("validation AP, %", [("val_bbox_AP", "box", LIGHT["accent"]),
                                    ("val_segm_AP", "mask", LIGHT["right"])], 100),
              ("validation by group, %", [(f"val_{g}_shot_acc", g, GROUP_COLOURS[g]) for g in GROUPS], 100)]
    panels = [panel for panel in panels if any(_points(history, key)[0] for key, _, _ in panel[1])]
    with styled():
        figure, axes = new_figure(FULL, 2.7, max(len(panels), 1))
        for place, (title, lines, scale) in zip(axes, panels):
            _draw_lines(place, history, lines, scale)
            place.set_title(title)
    return figure
