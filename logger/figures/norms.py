"""Figures of what special norms have learned: NBN's shared scales, MABN's moving averages."""
from __future__ import annotations

from typing import Any

import numpy as np

from logger.figures.style import FULL, LIGHT, new_figure, styled


def norm_facts(model: Any) -> dict[str, Any]:
    """What a model's norms have learned: {"nbn": {...}} or {"mabn": {...}}, or {} if there are only plain norms.

    nbn: `scales` [E] and, one value per layer, `expert` (from 0), `weight`, `bias` (lengths of the vectors before they
    are normalised). mabn: one row per layer, `second` and `gradient` [layers, 3]: the 10th, 50th and 90th percentiles
    over channels of the second moment, and of the size of the backward statistic.
    """
    # Recognised by their attributes, not by their class, so that drawing needs no model code.
    nbn = [m for m in model.modules() if hasattr(m, "shared_scale") and m.weight is not None]
    if nbn:
        owners = [m.shared_scale for m in nbn if m.shared_scale is not None]
        scales = owners[0][0].scale_factor.detach().flatten().tolist() if owners else [1.0]
        return {"nbn": {"scales": scales, "expert": [m.shared_scale[1] if m.shared_scale else 0 for m in nbn],
                        "weight": [float(m.weight.detach().norm()) for m in nbn],
                        "bias": [float(m.bias.detach().norm()) for m in nbn]}}
    mabn = [m for m in model.modules() if hasattr(m, "buffer_gz")]
    if mabn:
        def spread(tensor: Any) -> list[float]:
            values = tensor.detach().float().flatten().cpu().numpy()
            return np.percentile(values, (10, 50, 90)).tolist() if values.size else [float("nan")] * 3
        return {"mabn": {"second": [spread(m.running_var) for m in mabn],
                         "gradient": [spread(m.buffer_gz.mean(0).abs()) for m in mabn]}}
    return {}


def nbn_scales(facts: dict[str, Any]) -> Any:
    """The learned scale of each expert, and the lengths of w and b that it replaces. facts: norm_facts' `nbn`."""
    with styled():
        figure, (left, right) = new_figure(FULL, 2.7, 2, width_ratios=[1, 1.6])
        scales = facts["scales"]
        left.axhline(1, color=LIGHT["quiet"], linestyle=(0, (4, 3)), linewidth=1.2)
        left.annotate("start: 1", (0, 1), xycoords=("axes fraction", "data"), xytext=(4, 4), fontsize=8,
                      textcoords="offset points", color=LIGHT["soft"])
        left.bar(range(1, len(scales) + 1), scales, width=0.5, color=LIGHT["accent"])
        for number, value in enumerate(scales, 1):
            left.text(number, max(value, 0), f"{value:.3g}", ha="center", va="bottom", fontweight="bold")
        left.set(xlabel="expert", xticks=range(1, len(scales) + 1), xlim=(0.3, len(scales) + 0.7))
        left.margins(y=0.15)
        left.grid(axis="x", visible=False)
        left.set_title("the learned scale a")
        places = range(1, len(facts["weight"]) + 1)
        for key, name, colour in (("weight", "w, before it is normalised", LIGHT["accent"]),
                                  ("bias", "b, before it is normalised", LIGHT["medium"])):
            right.plot(places, facts[key], color=colour, marker="o", markersize=4, label=name)
        lengths = [value for key in ("weight", "bias") for value in facts[key] if value > 0]
        if lengths and max(lengths) > 30 * min(lengths):
            _log_axis(right)
        else:
            right.set_ylim(0, None)
        right.set_xlabel("NBN layer")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_title("length of each layer's vectors")
        right.legend(loc="best")
    return figure


def _log_axis(axes: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def mabn_statistics(facts: dict[str, Any]) -> Any:
    """MABN's two statistics through the network's depth. facts: norm_facts' `mabn`."""
    with styled():
        figure, axes = new_figure(FULL, 2.7, 2)
        for place, key, title in ((0, "second", "forward: running second moment"),
                                  (1, "gradient", "backward: size of the averaged gradient statistic")):
            rows = np.array(facts[key], dtype=float)                       # [layers, 3]
            layers = np.arange(1, len(rows) + 1)
            axes[place].fill_between(layers, rows[:, 0], rows[:, 2], color=LIGHT["accent"], alpha=0.18, linewidth=0)
            axes[place].plot(layers, rows[:, 1], color=LIGHT["accent"], marker="o", markersize=3)
            if (rows[:, 1] > 0).any():
                _log_axis(axes[place])
            axes[place].set_title(title)
            axes[place].set_xlabel("norm layer, from input to output")
            axes[place].xaxis.get_major_locator().set_params(integer=True)
    return figure
