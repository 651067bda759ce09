"""The figures of a run, drawn from plain numbers: for the report, for TensorBoard, for anyone's own page.

Every function returns a matplotlib Figure. Accuracies come as fractions and are drawn in percent. Groups are "many",
"medium", "few" as in utils.class_counts. N images, C classes, E experts.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from logger.figures.style import FULL, GROUP_COLOURS, HALF, LIGHT, new_figure, styled
from utils.class_counts import FEW, GROUPS, MANY

GROUP_LABELS = {"many": "many-shot", "medium": "medium-shot", "few": "few-shot"}
RELIABILITY_BINS = 15
NAMED_CLASSES = 40      # a confusion matrix names its classes up to here
ON_PICTURE = "#ffffff"  # on strong cells of a picture, which is the same in light and dark
History = Sequence[dict[str, float | None]]


def count_of(number: int, one: str, several: str) -> str:
    """1 class, 5 classes."""
    return f"{number:,} {one if number == 1 else several}"


def short(name: str, most: int = 22) -> str:
    """A class's name, cut where it would take the room of the figure."""
    return name if len(name) <= most else f"{name[:most - 1]}…"


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


def _shade_groups(axes: Any, low: float, high: float, many: float, few: float) -> None:
    """The three groups as bands of the (logarithmic) axis of training counts."""
    edges = {"few": (low, few), "medium": (few, many), "many": (many, high)}
    for group, (start, stop) in edges.items():
        start, stop = max(start, low), min(stop, high)
        if stop > start:
            axes.axvspan(start, stop, color=GROUP_COLOURS[group], alpha=0.09, linewidth=0)
            axes.text((start * stop) ** 0.5, 1.02, GROUP_LABELS[group] if stop / start > 1.6 else group, ha="center",
                      transform=axes.get_xaxis_transform(), color=GROUP_COLOURS[group], fontweight="bold", fontsize=8.5)


def class_accuracy(counts: Sequence[int], class_acc: Sequence[float | None], groups: Sequence[str],
                   names: Sequence[str] | None = None, many: float = MANY, few: float = FEW) -> Any:
    """A dot a class: training images (log axis) against test accuracy, with the trend. All sequences: [C]."""
    there = [i for i, acc in enumerate(class_acc) if acc is not None]
    xs = np.array([max(counts[i], 0.5) for i in there], dtype=float)
    ys = np.array([100 * class_acc[i] for i in there])
    with styled():
        figure, (axes,) = new_figure(FULL, 3.3)
        low, high = (xs.min() / 1.25, xs.max() * 1.25) if len(xs) else (1, 10)
        _shade_groups(axes, low, high, many, few)
        size = float(np.clip(3000 / max(len(xs), 1), 8, 46))
        axes.scatter(xs, ys, s=size, c=[GROUP_COLOURS[groups[i]] for i in there], alpha=0.9 if len(xs) < 300 else 0.5,
                     linewidths=0, zorder=3)
        if len(xs) >= 12:
            axes.plot(*_trend(xs, ys), color=LIGHT["ink"], linewidth=1.6, zorder=4)
        if names is not None and len(xs) <= 20:
            _name_dots(axes, np.log(xs / low) / np.log(high / low), xs, ys, [short(names[i]) for i in there])
        axes.set(xscale="log", xlim=(low, high), ylim=(-4, 107), xlabel="training images of the class (log scale)",
                 ylabel="test accuracy, %")
        axes.xaxis.set_major_locator(_log_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="x", visible=False)
    return figure


def _name_dots(axes: Any, places: np.ndarray, xs: np.ndarray, ys: np.ndarray, names: Sequence[str]) -> None:
    """A name at each dot, above or below it or beside it: where it lies on no other name or dot, if there is such a
    place. places: each x as a fraction of the axis. All [C]."""
    wide, high = 8.3 * 72, 2.6 * 72 / 111  # points: the axes' width, and one percent of its height
    dots = [(place * wide, y * high) for place, y in zip(places, ys)]
    taken = [(x - 4, x + 4, y - 4, y + 4) for x, y in dots]
    for (x, y), at, name in zip(dots, zip(xs, ys), names):
        length = 4.7 * len(name)
        around = [(0, 7, "center", "bottom"), (0, -7, "center", "top"), (7, 0, "left", "center"),
                  (-7, 0, "right", "center"), (0, -17, "center", "top"), (0, 17, "center", "bottom")]
        around = around if at[1] < 90 else around[1:]

        def box(dx: float, dy: float, ha: str, va: str, x: float = x, y: float = y, length: float = length) -> tuple:
            left = x + dx - length * {"center": 0.5, "left": 0, "right": 1}[ha]
            bottom = y + dy - 9 * {"center": 0.5, "bottom": 0, "top": 1}[va]
            return left, left + length, bottom, bottom + 9

        def hidden(spot: tuple) -> int:
            left, right, bottom, top = box(*spot)
            return sum(left < r and l < right and bottom < t and b < top for l, r, b, t in taken) \
                + (left < 0) + (right > wide) + (top > 107 * high)
        dx, dy, ha, va = spot = min(around, key=hidden)
        taken.append(box(*spot))
        axes.annotate(name, at, xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, color=LIGHT["soft"],
                      fontsize=8)


def _log_ticks() -> Any:
    from matplotlib.ticker import LogLocator
    return LogLocator(subs=(1, 2, 5))


def _trend(xs: np.ndarray, ys: np.ndarray, points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracy along log(count), a Gaussian as wide as an eighth of the axis. xs, ys: [C] -> [points] x 2."""
    logs = np.log(xs)
    at = np.linspace(logs.min(), logs.max(), points)
    width = max((at[-1] - at[0]) / 8, 1e-6)
    weights = np.exp(-0.5 * ((at[:, None] - logs) / width) ** 2)   # [points, C]
    return np.exp(at), (weights @ ys) / weights.sum(1)


def group_bars(result: dict[str, Any]) -> Any:
    """All images, and the class means of the three groups. result: test_metrics.json's figures."""
    bars = [("all images", result.get("accuracy"), LIGHT["accent"], "")]
    bars += [(GROUP_LABELS[g], result.get(f"{g}_shot_acc"), GROUP_COLOURS[g],
              count_of(result.get(f"{g}_class_num", 0), "class", "classes")) for g in GROUPS]
    with styled():
        figure, (axes,) = new_figure(HALF, 2.7)
        for place, (_, value, colour, _) in enumerate(bars):
            y = len(bars) - 1 - place
            axes.barh(y, 100, color=LIGHT["grid"], height=0.56, alpha=0.6)
            axes.barh(y, 100 * (value or 0), color=colour, height=0.56)
            axes.text(103, y, "no classes" if value is None else f"{100 * value:.1f} %", va="center",
                      fontweight="bold" if value is not None else "normal", fontsize=9.5)
        axes.set_yticks(range(len(bars) - 1, -1, -1), [f"{n}\n{s}" if s else n for n, _, _, s in bars])
        axes.set(xlim=(0, 122), xticks=[])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def group_confusion(flow: dict[str, dict[str, float]]) -> Any:
    """Where each group's images end up. flow: group -> {"right", "many", "medium", "few"} as shares of its images."""
    shown = [group for group in GROUPS if group in flow]
    parts = [("right", "right", LIGHT["right"])] + [(g, f"mistaken for a {GROUP_LABELS[g]} class", GROUP_COLOURS[g])
                                                   for g in GROUPS]
    with styled():
        figure, (axes,) = new_figure(HALF, 2.7)
        for place, group in enumerate(shown):
            left, y = 0.0, len(shown) - 1 - place
            for key, _, colour in parts:
                width = 100 * flow[group][key]
                axes.barh(y, width, left=left, color=colour, height=0.56, linewidth=1, edgecolor=LIGHT["surface"])
                if width >= 9:
                    axes.text(left + width / 2, y, f"{width:.0f}", ha="center", va="center", fontweight="bold",
                              color=LIGHT["surface"] if key != "medium" else "#221a05", fontsize=8.5)
                left += width
        axes.set_yticks(range(len(shown) - 1, -1, -1), [GROUP_LABELS[group] for group in shown])
        axes.set(xlim=(0, 100), xlabel="% of the group's test images")
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        handles = [patch(colour) for _, _, colour in parts]
        figure.legend(handles, [name for _, name, _ in parts], loc="outside upper left", ncols=2, handlelength=1,
                      handleheight=1, columnspacing=1.2, fontsize=7.6)
    return figure


def patch(colour: str) -> Any:
    from matplotlib.patches import Patch
    return Patch(color=colour)


def confusion_matrix(matrix: np.ndarray, names: Sequence[str], groups: Sequence[str]) -> Any:
    """Rows: the true class, columns: the predicted one, in percent of the row. matrix: [C, C] images, C <= 100.

    Up to NAMED_CLASSES classes are named; of more, in order of their training images, only the groups are.
    """
    from matplotlib.colors import to_rgb
    size = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # Colour on nothing: the page's background shows through, whether it is light or dark.
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
    """Both axes of a matrix of classes [C, C]: the classes' names, or from NAMED_CLASSES on those of their groups."""
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
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def attention(relative: np.ndarray, names: Sequence[str], groups: Sequence[str]) -> Any:
    """How much images of a class (row) attend to those of another (column) in BatchFormer. relative: [C, C] mean
    attention of one image to another over that of all pairs, so 1 is even; NaN where two classes never met."""
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


def reliability(confidences: np.ndarray, right: np.ndarray, bins: int = RELIABILITY_BINS) -> Any:
    """Confidence against how often it was right, with how many images had it. confidences, right: [N]."""
    place = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(place, minlength=bins)
    share = np.bincount(place, right, bins) / np.maximum(images, 1)
    sure = np.bincount(place, confidences, bins) / np.maximum(images, 1)
    with styled():
        figure, (axes,) = new_figure(HALF, 3.2)
        ideal, = axes.plot([0, 100], [0, 100], color=LIGHT["quiet"], linestyle=(0, (4, 3)), linewidth=1.2)
        figure.legend([ideal], ["as sure as it is right"], loc="outside upper left", fontsize=7.6)
        held = images > 0
        largest = max(images.max(), 1)
        axes.plot(100 * sure[held], 100 * share[held], color=LIGHT["accent"], alpha=0.45, linewidth=1.4)
        axes.scatter(100 * sure[held], 100 * share[held], s=12 + 130 * images[held] / largest, color=LIGHT["accent"],
                     linewidths=0, zorder=3)
        axes.set(xlim=(0, 103), ylim=(-3, 106), xlabel="the model's confidence, %", ylabel="right, %")
    return figure
