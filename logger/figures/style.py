"""How figures look: one palette, safe for colour-blind readers; SVG that follows a page's light or dark theme.

A figure is drawn once in light colours. In SVG each colour of `COLOURS` becomes the CSS variable of its name, so the
page decides; PNGs (for slides, TensorBoard) keep the light ones. pyplot isn't used: no state, no window, no leak.
"""
from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import atomic_write

#: name -> (light, dark). The three groups' colours stay apart for colour-blind eyes too.
COLOURS = {
    "ink": ("#1b1f27", "#e7e9ee"), "soft": ("#5d6675", "#a3abb9"), "grid": ("#e4e7ec", "#2c323d"),
    "surface": ("#fefefe", "#181b21"), "accent": ("#6b4fc4", "#b09cff"), "quiet": ("#8d96a6", "#7d8798"),
    "many": ("#2a6fb5", "#69a9ea"), "medium": ("#e0a020", "#f3c256"), "few": ("#c4433b", "#f2837a"),
    "right": ("#2f8f6b", "#5cc79d"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
GROUP_COLOURS = {name: LIGHT[name] for name in ("many", "medium", "few")}
GROUP_LABELS = {"many": "many-shot", "medium": "medium-shot", "few": "few-shot"}
ON_PICTURE = "#ffffff"  # text on strongly coloured cells, which are the same in light and dark
FULL, HALF = 9.2, 4.5  # widths in inches: of the page's column, and of half of it

STYLE = {
    "font.family": ["DejaVu Sans"], "font.size": 9, "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["soft"],
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9,
    "axes.titlecolor": LIGHT["ink"],
    "axes.labelsize": 8.5, "axes.edgecolor": LIGHT["grid"], "axes.linewidth": 0.9, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": LIGHT["grid"], "grid.linewidth": 0.8, "xtick.color": LIGHT["soft"], "ytick.color": LIGHT["soft"],
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "figure.facecolor": "none", "savefig.facecolor": "none",
    "text.parse_math": False,  # a class may be named $1 or a_b
    "figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "report",
}

#: For class names in other scripts.
OTHER_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "Hiragino Sans", "WenQuanYi Zen Hei",
               "Arial Unicode MS")


def new_figure(width: float = FULL, height: float = 3.0, columns: int = 1, **more: Any) -> tuple[Any, np.ndarray]:
    """(figure, its axes as an array [columns]), to be used inside `styled()`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns, squeeze=False, **more)[0]


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """A context in which our style holds, whatever the user's matplotlibrc says.

    Characters that DejaVu Sans lacks are drawn in another font if one is installed, else as boxes, without a warning
    for each (in SVG they are text, for which the browser finds a font).
    """
    import matplotlib
    from matplotlib import font_manager
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = STYLE["font.family"] + [name for name in OTHER_FONTS if name in known]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "font.family": fonts,
                                "backend": matplotlib.get_backend()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def bare(axes: Any) -> None:
    """No grid and no frame."""
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def short(name: str, most: int = 22) -> str:
    """A class's name, shortened to at most `most` characters."""
    return name if len(name) <= most else f"{name[:most - 1]}…"


def stacked_bars(axes: Any, rows: dict[str, Any], parts: list[tuple[str, Any, str]], least: float) -> None:
    """Draw one horizontal bar per row, from the top down, divided into shares. rows: name -> shares (0 to 1), one per
    part. parts: (label, colour, colour of the number). least: the smallest share in which its percentage is written."""
    for place, shares in enumerate(rows.values()):
        left = 0.0
        for share, (label, colour, ink) in zip(shares, parts):
            axes.barh(-place, 100 * share, left=left, height=0.58, color=colour, linewidth=1,
                      edgecolor=LIGHT["surface"], label="" if place else label)
            if share >= least:
                axes.text(left + 50 * share, -place, f"{100 * share:.0f}", ha="center", va="center", fontweight="bold",
                          fontsize=8.5, color=ink)
            left += 100 * share
    axes.set_yticks(range(0, -len(rows), -1), list(rows))
    axes.set(xlim=(0, 100))
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def to_svg(figure: Any, label: str) -> str:
    """The figure as an inline <svg> element whose colours are CSS variables; `label` is for screen readers."""
    from html import escape
    out = io.StringIO()
    with styled():
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Groups' ids (axes_1) would repeat from figure to figure; ids that are referenced have other names.
    svg = re.sub(r'<g id="[A-Za-z0-9]+_\d+">', "<g>", svg)
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    # Use the page's own font; Verdana and DejaVu Sans have the widths that the layout was computed with.
    svg = re.sub(r"'DejaVu Sans'(, *[^;\"]*)?", "var(--figure-font)", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)  # the page scales it; viewBox keeps the proportions
    return f'{head} role="img" aria-label="{escape(label, quote=True)}">{rest}'


def to_png(figure: Any, path: Path, dpi: int = 160) -> None:
    """Write the figure as a PNG on white."""
    with styled(), atomic_write(path) as handle:
        figure.savefig(handle, format="png", dpi=dpi, facecolor="white")


def to_array(figure: Any, dpi: int = 110) -> np.ndarray:
    """The figure as pixels on white, uint8 [H, W, 3], for TensorBoard."""
    from PIL import Image
    out = io.BytesIO()
    with styled():
        figure.savefig(out, format="png", dpi=dpi, facecolor="white")
    out.seek(0)
    return np.asarray(Image.open(out).convert("RGB"))
