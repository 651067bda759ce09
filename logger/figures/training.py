"""How training went: figures of metrics.csv over epochs."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logger.figures.style import FULL, GROUP_COLOURS, LIGHT, new_figure, styled
from utils.class_counts import GROUPS

History = Sequence[dict[str, float | None]]
MOST_NAMED = 7      # lines that are named at their ends, where names still find room


def _points(history: History, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """(epochs, values times `scale`) of a metrics.csv column, without its empty fields."""
    pairs = [(row["epoch"], row[key]) for row in history if row.get("epoch") is not None and row.get(key) is not None]
    return [epoch for epoch, _ in pairs], [scale * value for _, value in pairs]


def _draw_lines(axes: Any, lines: Sequence[tuple]) -> None:
    """Lines (epochs, values, name, colour, style), each named at its end; more than MOST_NAMED in a legend beside the
    panel, in order of their last values."""
    ends = []
    for xs, ys, name, colour, style in lines:
        axes.plot(xs, ys, color=colour, linestyle=style, marker="o" if len(xs) < 3 else None, markersize=4, label=name)
        ends.append([ys[-1], xs[-1], name, colour])
    axes.margins(x=0.02)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(lines) > MOST_NAMED:
        for y, x, _, colour in ends:
            axes.plot(x, y, color=colour, marker="o", markersize=5)
        drawn = sorted(zip(ends, axes.get_lines()), key=lambda pair: -pair[0][0])
        axes.legend(handles=[line for _, line in drawn], loc="center left", bbox_to_anchor=(1.02, 0.5),
                    borderaxespad=0, handlelength=2.4, labelspacing=0.55)
        return
    # Names that would overlap are moved apart, in order of the lines' ends, and not above the panel.
    low, high = axes.get_ylim()
    ends.sort()
    gap, near = (high - low) * 0.085, 0.3 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    heights: list[float] = []
    for number, (y, x, *_) in enumerate(ends):
        below = [heights[other] + gap for other in range(number) if abs(ends[other][1] - x) < near]
        heights.append(max([y, *below]))
    for place in reversed(range(len(ends))):
        above = [heights[other] for other in range(place + 1, len(ends)) if abs(ends[other][1] - ends[place][1]) < near]
        heights[place] = min([heights[place], high - 0.3 * gap, *(height - gap for height in above)])
    last = max(x for _, x, *_ in ends)
    for (_, x, name, colour), y in zip(ends, heights):
        # Where a line ends before the others, its name is written over them.
        behind = {"facecolor": LIGHT["surface"], "alpha": 0.8, "edgecolor": "none", "pad": 0.8} if x < last else None
        axes.annotate(name, (x, y), xytext=(5, 0), textcoords="offset points", color=colour, va="center", fontsize=8.5,
                      annotation_clip=False, bbox=behind, zorder=3)


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
            points = [(*_points(history, key, scale), name, colour, "-") for key, name, colour in lines]
            _draw_lines(place, [line for line in points if line[0]])
            place.set_title(title)
    return figure


#: The candidates for comparing runs: the first two of those that the largest number of runs have are drawn.
_COMPARED = (("val_accuracy", "validation accuracy, %"), ("val_few_shot_acc", "validation, few-shot classes, %"),
             ("accuracy", "accuracy in training, %"))


def compared(runs: dict[str, Sequence[History]]) -> Any:
    """Accuracy over epochs of several methods. runs: name -> the histories of its seeds, whose mean is drawn."""
    names = ("accent", "few", "many", "right", "medium", "ink", "quiet")
    panels = []
    for key, title in _COMPARED:
        lines = []
        for number, (name, histories) in enumerate(runs.items()):
            seeds = [dict(zip(*_points(history, key, 100))) for history in histories]
            epochs = sorted(set.intersection(*map(set, seeds)))
            if epochs:
                means = [sum(seed[epoch] for seed in seeds) / len(seeds) for epoch in epochs]
                lines.append((epochs, means, name, LIGHT[names[number % len(names)]],
                              ("-", "--", ":")[number // len(names) % 3]))
        if lines:
            panels.append((title, lines))
    most = max((len(lines) for _, lines in panels), default=0)
    panels = [panel for panel in panels if len(panel[1]) == most]
    with styled():
        figure, axes = new_figure(FULL, 3.4, max(len(panels[:2]), 1))
        for place, (title, lines) in zip(axes, panels):
            _draw_lines(place, lines)
            place.set_title(title)
    return figure
