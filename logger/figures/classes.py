"""Figures of classes and their groups, drawn from plain numbers: for the report, TensorBoard, anyone's own page.

Every function returns a matplotlib Figure. Accuracies come as fractions and are drawn in percent. Groups are "many",
"medium", "few" as in utils.class_counts. N images, C classes, E experts.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from logger.figures.style import (
    FULL,
    GROUP_COLOURS,
    GROUP_LABELS,
    HALF,
    LIGHT,
    bare,
    new_figure,
    short,
    stacked_bars,
    styled,
)
from logger.text import count_of, in_percent
from utils.class_counts import FEW, GROUPS, MANY

RELIABILITY_BINS = 15


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
                   names: Sequence[str] | None = None, many: float = MANY, few: float = FEW,
                   split: str = "test") -> Any:
    """One dot per class: training images (log axis) against accuracy on a split, which the axis names, with the trend.
    All sequences: [C]."""
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
                 ylabel=f"{split} accuracy, %")
        axes.xaxis.set_major_locator(_log_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="x", visible=False)
    return figure


def _name_dots(axes: Any, places: np.ndarray, xs: np.ndarray, ys: np.ndarray, names: Sequence[str]) -> None:
    """Write a name above, below or beside each dot, if possible where it covers no other name or dot. places: each x as
    a fraction of the axis. All [C]."""
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
    bars = [("all images", result.get("accuracy"), LIGHT["accent"], 0)]
    bars += [(GROUP_LABELS[g], result.get(f"{g}_shot_acc"), GROUP_COLOURS[g], result.get(f"{g}_class_num", 0))
             for g in GROUPS]
    with styled():
        figure, (axes,) = new_figure(HALF, 2.7)
        for place, (_, value, colour, number) in enumerate(bars):
            y = len(bars) - 1 - place
            axes.barh(y, 100, color=LIGHT["grid"], height=0.56, alpha=0.6)
            axes.barh(y, 100 * (value or 0), color=colour, height=0.56)
            none = "untested" if number else "no classes"
            axes.text(103, y, in_percent(value, none), va="center",
                      fontweight="bold" if value is not None else "normal", fontsize=9.5)
        axes.set_yticks(range(len(bars) - 1, -1, -1), ["all images", *(
            f"{name}\n{count_of(number, 'class', 'classes')}" for name, _, _, number in bars[1:])])
        axes.set(xlim=(0, 122), xticks=[])
        bare(axes)
    return figure


def group_confusion(flow: dict[str, dict[str, float]]) -> Any:
    """Where each group's images end up. flow: group -> {"right", "many", "medium", "few"} as shares of its images."""
    parts = [("right", LIGHT["right"], LIGHT["surface"])]
    parts += [(f"mistaken for a {GROUP_LABELS[g]} class", GROUP_COLOURS[g], "#221a05" if g == "medium" else
               LIGHT["surface"]) for g in GROUPS]
    with styled():
        figure, (axes,) = new_figure(HALF, 2.7)
        stacked_bars(axes, {GROUP_LABELS[group]: [flow[group][key] for key in ("right", *GROUPS)]
                            for group in GROUPS if group in flow}, parts, 0.09)
        axes.set_xlabel("% of the group's images")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=1,
                      handleheight=1, columnspacing=1.2, fontsize=7.6)
    return figure


def reliability(confidences: np.ndarray, right: np.ndarray, bins: int = RELIABILITY_BINS) -> Any:
    """Reliability diagram: how often predictions of a confidence were right, and how many images had it.
    confidences, right: [N]."""
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
