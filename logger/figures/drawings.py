"""The figures that a run gets, each with a sentence in plain words: for the report and for TensorBoard."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from logger.figures import classes as figures
from logger.figures import experts as expert_figures
from logger.figures import matrices, training
from logger.figures import norms as norm_figures
from logger.figures.facts import RunFacts
from logger.figures.style import GROUP_LABELS, to_array
from logger.text import count_of, in_percent
from utils.class_counts import GROUPS

MATRIX_CLASSES = 100  # with more classes than this no full confusion matrix is drawn


@dataclass
class Drawing:
    """A figure (drawn when asked for), the heading of its section, and what it shows in a sentence or two."""

    key: str                      # its file name, and its tag in TensorBoard
    heading: str                  # drawings under one heading stand together
    text: str
    draw: Callable[[], Any]
    half: bool = False


def drawings(facts: RunFacts) -> Iterator[Drawing]:
    """The figures of a run, in the order in which a reader wants them; those without data are left out."""
    result = facts.result
    if facts.classifies:
        yield Drawing("groups", "Common and rare classes", _groups_text(facts),
                      lambda: figures.group_bars(result), True)
    if facts.by_image:
        flow = facts.flow()
        yield Drawing("group_confusion", "Common and rare classes", _flow_text(flow),
                      lambda: figures.group_confusion(flow), True)
    if facts.classifies and result.get("per_class_acc"):
        yield Drawing("classes", "Every class by its training images", _classes_text(facts),
                      lambda: figures.class_accuracy(facts.counts, result["per_class_acc"], facts.groups, facts.names,
                                                     facts.many, facts.few, facts.split_name))
    if facts.history:
        yield Drawing("training", "How training went", _training_text(facts), lambda: training.curves(facts.history))
    if facts.by_image:
        if len(facts.counts) <= MATRIX_CLASSES:
            yield Drawing("confusion", "What is taken for what", _confusion_text(facts),
                          lambda: _matrix(facts))
        yield Drawing("reliability", "Confidence and mistakes", _reliability_text(facts),
                      lambda: figures.reliability(facts.image("confidences"), facts.right), True)
    own = facts.expert_accuracy()
    if own:
        yield Drawing("experts", "The experts", _experts_text(facts, own), lambda: expert_figures.experts(
            own, facts.together(), facts.disagreement(), facts.split_name))
    if result.get("expert_share"):
        yield Drawing("expert_share", "How many experts an image needed", _share_text(result["expert_share"]),
                      lambda: expert_figures.expert_shares(result["expert_share"]))
    if facts.norms.get("nbn"):
        yield Drawing("nbn", "Normalised batch norm", "NBN scales every channel vector to length 1 and learns one "
                      "scale for all of an expert's layers. A scale above 1 strengthens features, one below 1 damps "
                      "them. The lengths on the right don't change the result, but the longer a vector, the slower "
                      "its direction still turns.",
                      lambda: norm_figures.nbn_scales(facts.norms["nbn"]))
    if facts.norms.get("mabn"):
        yield Drawing("mabn", "Moving-average batch norm", "The statistics MABN averages over steps, from the first "
                      "layer to the last: the line is the median channel, the band holds 80 % of them. Smooth lines "
                      "without jumps to 0 or infinity are healthy.",
                      lambda: norm_figures.mabn_statistics(facts.norms["mabn"]))


def _matrix(facts: RunFacts) -> Any:
    """The confusion matrix; if there are many classes, in the order of their training images."""
    order = np.arange(len(facts.counts))
    if len(order) > matrices.NAMED_CLASSES:
        order = np.argsort(-np.array(facts.counts), kind="stable")
    return matrices.confusion_matrix(facts.confusion()[np.ix_(order, order)], [facts.names[i] for i in order],
                                    [facts.groups[i] for i in order])


def figures_to_tensorboard(writer: Any, facts: RunFacts, epoch: int) -> None:
    """Add the run's figures as images `report/<key>` at `epoch`; nothing is drawn for a `NoWriter`."""
    if writer:
        for drawing in drawings(facts):
            writer.add_image(f"report/{drawing.key}", to_array(drawing.draw(), dpi=90), epoch, dataformats="HWC")


# ---------------------------------------------------------------------- the sentences

def _groups_text(facts: RunFacts) -> str:
    return (f"Accuracy on the {facts.images_name}. Many-shot classes have more than {facts.many} training images, "
            f"few-shot ones fewer than {facts.few}. A group's bar is the mean over its classes, so each class "
            "counts the same.")


def _flow_text(flow: dict[str, dict[str, float]]) -> str:
    rarest = next((group for group in reversed(GROUPS) if group in flow), "few")
    wrong = {group: flow[rarest][group] for group in GROUPS}
    total = sum(wrong.values())
    if not total:
        return "Where each group's images end up. Nothing is mistaken here."
    into = max(wrong, key=lambda group: wrong[group])
    return (f"Where each group's images end up. Of the {GROUP_LABELS[rarest]} images that are wrong, "
            f"{100 * wrong[into] / total:.0f} % are taken for a {GROUP_LABELS[into]} class.")


def _classes_text(facts: RunFacts) -> str:
    known = [(acc, i) for i, acc in enumerate(facts.result["per_class_acc"]) if acc is not None]
    worst = min(known)[1]
    line = " The line is the trend." if len(known) >= 12 else ""
    images = count_of(facts.counts[worst], "training image", "training images")
    return (f"Each dot is a class, rare ones on the left.{line} The weakest is “{facts.names[worst]}” "
            f"({images}) with {in_percent(min(known)[0])}.")


def _training_text(facts: RunFacts) -> str:
    rows = [row for row in facts.history if row.get("val_accuracy") is not None]
    if not rows:
        return "The figures after each epoch."
    best, last = max(rows, key=lambda row: row["val_accuracy"]), rows[-1]
    end = f"Validation accuracy ended at {in_percent(last['val_accuracy'])} after epoch {last['epoch']:.0f}"
    more = "." if best["val_accuracy"] <= last["val_accuracy"] else \
        f"; its best was {in_percent(best['val_accuracy'])} in epoch {best['epoch']:.0f}."
    losses = ("The training loss is the gates', the validation loss the cross-entropy of what they choose, which can't "
              "be compared." if facts.result.get("expert_share") else
              "The training loss may have terms that the validation loss hasn't.")
    return end + more + (" A training accuracy far above the validation accuracy means that the model knows its images "
                         f"by heart. {losses}")


def _confusion_text(facts: RunFacts) -> str:
    text = ("A row is a true class (in its group's colour), a column what the model said; green is right, red a "
            "mistake, in percent of the row.")
    if len(facts.counts) > matrices.NAMED_CLASSES:
        text = ("Rows are true classes, columns what the model said, both from common to rare; green is right, red a "
                "mistake, in percent of the row.")
    pairs = facts.confused_pairs(1)
    if not pairs:
        return text
    true, said, images, total = pairs[0]
    return f"{text} The most frequent mistake: “{facts.names[true]}” taken for “{facts.names[said]}”, " \
           f"{images} of {total} images."


def _reliability_text(facts: RunFacts) -> str:
    sure, right = float(facts.image("confidences").mean()), float(facts.right.mean())
    gap = sure - right
    verdict = "about as sure as it should be" if abs(gap) < 0.02 else \
        f"{'over' if gap > 0 else 'under'}confident by {100 * abs(gap):.0f} points"
    return (f"It is sure to {in_percent(sure)} on average and right in {in_percent(right)}: {verdict}. A dot under the "
            "dashed line is overconfidence; bigger dots hold more images.")


def _experts_text(facts: RunFacts, own: dict[str, list[float | None]]) -> str:
    together, best = facts.together()["all"], max(own["all"])
    gain = 100 * (together - best)
    text = (f"All {len(own['all'])} experts together get {in_percent(together)} right, "
            f"{abs(gain):.1f} points {'more' if gain >= 0 else 'less'} than the best one alone.")
    differ = facts.result.get("expert_disagreement")
    if differ is None:
        return text
    why = ": what one misses another may know." if gain > 0 else "."
    return f"{text} Two of them differ on {in_percent(differ)} of the images{why}"


def _share_text(shares: dict[str, list[float] | None]) -> str:
    def mean(key: str) -> float | None:
        return None if not shares.get(key) else float(np.dot(shares[key], np.arange(1, len(shares[key]) + 1)))
    text = f"{in_percent(shares['all'][0])} of the images were settled by one expert; the mean is {mean('all'):.2f}."
    groups = [f"{GROUP_LABELS[group]} {mean(group):.2f}" for group in GROUPS if mean(group) is not None]
    return f"{text} By group: {', '.join(groups)}. Rare classes should need more."
