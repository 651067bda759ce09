"""What is said about a run's test figures: those that its config adds, and what they mean for somebody with photos: how
far to trust it, and which classes need more of them."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from logger.figures.facts import RunFacts
from logger.text import count_of
from utils.config.outside import short_name
from utils.config.schema import COUNTED, TOP, defaults
from utils.errors import ConfigError

MOST = 5            # classes that are named
CLEARLY = 0.10      # how far under the accuracy of all photos a class must lie to be named
OFF = 0.05          # the calibration error (ECE) above which calibrating is suggested
IN_TABLE = ("accuracy", "top_k_acc", *COUNTED)      # metrics that every test shows or most configs name
Z = 1.96            # the normal quantile of a 95 % interval


def in_words(facts: RunFacts) -> list[str]:
    """Sentences on how far to trust the model, and on which photos are missing; [] where there are no test figures.

    The range is Wilson's 95 % interval of the share of right answers (Wilson, JASA 1927): what other photos of the
    same kind would give. A class is named where its own accuracy lies ten points under that of all photos, those with
    the fewest training photos first.
    """
    result = facts.result
    if not facts.classifies or not result.get("n_samples"):
        return []
    # A nearest class mean has distances, for which no temperature is kept.
    hint = not result.get("calibration") and result.get("classifier") != "ncm"
    return [_trust(result["accuracy"], int(result["n_samples"]), result.get("ece"), hint),
            *_photos(facts, result.get("per_class_acc") or [])]


def words_for(config: dict[str, Any], result: dict[str, Any], loader: Any) -> list[str]:
    """A line for each of the config's metrics that the table of accuracies lacks, then, where the images are a user's
    own, `in_words` of a split's figures."""
    names = [name for name in map(short_name, defaults(TOP, config)["metrics"]) if name not in IN_TABLE]
    lines = [f"{name:<16}{result[name]:>9.4f}" for name in names if isinstance(result.get(name), float)]
    if not getattr(loader, "own_images", False):
        return lines
    return lines + in_words(RunFacts(config, result, list(loader.cls_num_list), loader.class_names))


def refuse_nonfinite(result: dict[str, Any], checkpoint: Any) -> None:
    """Raise ConfigError where the model's outputs aren't finite: they would count as predictions of the first class."""
    if result.get("n_samples") and result.get("loss", 0.0) is None:
        raise ConfigError(f"-r {checkpoint}: its outputs aren't finite numbers; give a checkpoint from before its "
                          "training went wrong")


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (0 to 1) seen in `count` trials (1 or more): (low, high), 0 to 1."""
    middle = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max((middle - half) / (1 + Z * Z / count), 0.0), min((middle + half) / (1 + Z * Z / count), 1.0)


def _trust(accuracy: float, count: int, ece: float | None, hint: bool) -> str:
    """hint: whether --calibrate may be suggested."""
    low, high = (f"{100 * value:.0f}" for value in wilson(accuracy, count))
    text = (f"how far to trust it: of 100 photos like the {count:,} it was tested on it names {100 * accuracy:.0f} "
            f"right ({low} to {high})")
    if ece is None:
        return text + "."
    text += f"; its probabilities are {100 * ece:.0f} points off on average"
    return text + (" (python test.py -r CHECKPOINT --calibrate mends most of that)." if hint and ece > OFF else ".")


def _photos(facts: RunFacts, right: Sequence[float | None]) -> list[str]:
    """right: each class's accuracy on the test photos, None where it has none."""
    bar = facts.result["accuracy"] - CLEARLY
    weak = [label for label, value in enumerate(right) if value is not None and value < bar]
    weak.sort(key=lambda label: (facts.counts[label], right[label]))
    lines = []
    if weak:
        named = ", ".join(f"{facts.names[n]} ({count_of(facts.counts[n], 'training photo', 'training photos')}, "
                          f"{100 * right[n]:.0f} % right)" for n in weak[:MOST])
        more = f" and {len(weak) - MOST} more" if len(weak) > MOST else ""
        lines.append(f"more photos would help most for: {named}{more}.")
    else:
        lines.append("no class stands out as weak: more photos of any would do.")
    unknown = [label for label, value in enumerate(right) if value is None]
    if unknown:
        named = ", ".join(facts.names[label] for label in unknown[:MOST])
        more = f" and {len(unknown) - MOST} more" if len(unknown) > MOST else ""
        lines.append(f"nothing is known of {named}{more}: no test photo.")
    return lines
