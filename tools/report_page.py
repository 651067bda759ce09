"""The report's HTML, from top to bottom: headline, figures with their sentences, hard images, how to do it again."""
from __future__ import annotations

import base64
import datetime
import io
import json
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from base.run_paths import RunPaths
from logger.figures.drawings import Drawing, points
from logger.figures.facts import BY_IMAGE, RunFacts
from logger.figures.style import count_of, to_svg
from tools.page import escape, page, table, tile
from tools.page import facts as fact_list
from tools.run_table import clock
from tools.runs import RunRecord, data_of, experts_of, model_of
from utils.errors import ConfigError

LARGEST_IMAGE = 320  # pixels of the longer side of a photo in the page, shown at about a third of that


def report_page(facts: RunFacts, run: Any, paths: RunPaths, shown: list[tuple[Drawing, Any]], loader: Any) -> str:
    """The whole page. shown: the drawings and their figures; loader: of the split that `facts` are about."""
    record = RunRecord(paths, facts.config, facts.result)
    title = f"{record.method} on {data_of(facts.config)}"
    body = _head(facts, run, record, title) + _sections(facts, shown) + _images(facts, loader) \
        + _recipe(facts, run, paths)
    return page(title, body)


def _head(facts: RunFacts, run: Any, record: RunRecord, title: str) -> str:
    """The title, a sentence that says it all, the headline numbers, and what was trained."""
    epoch = run.checkpoint.get("epoch")
    pairs = {"run": record.name, "checkpoint": run.path.name,
             "epochs": None if epoch is None else f"{epoch} of {run.config['trainer']['epochs']}",
             "seed": run.config.get("seed", 0), "model": model_of(run.config), "experts": experts_of(run.config),
             "parameters": f"{run.model.num_parameters():,}" if hasattr(run.model, "num_parameters") else None,
             "data": data_of(run.config), "classes": len(facts.counts),
             "training images": f"{sum(facts.counts):,}",
             "imbalance": _imbalance(facts.counts), "test images": _count(facts.result.get("n_samples")),
             "training time": None if record.seconds is None else clock(record.seconds),
             "speed": None if record.images_per_second is None else f"{record.images_per_second:,.0f} images/s"}
    return (f'<header><p class="kind">Training report</p><h1>{escape(title)}</h1>'
            f'<p class="lead">{escape(_lead(facts))}</p></header>{_tiles(facts)}{fact_list(pairs)}')


def _count(number: Any) -> str | None:
    return None if number is None else f"{number:,}"


def _imbalance(counts: Sequence[int]) -> str | None:
    there = [count for count in counts if count]
    return f"{max(there):,} to {min(there):,} a class" if there else None


def _lead(facts: RunFacts) -> str:
    result = facts.result
    if not facts.classifies:
        return "A detector: its training curves, figures and config."
    text = f"Of 100 test images this model names {100 * result['accuracy']:.0f} right."
    few, many = result.get("few_shot_acc"), result.get("many_shot_acc")
    if few is not None:
        text += f" For classes with fewer than {facts.few} training images it's {points(few)}"
        text += f", for those with more than {facts.many} it's {points(many)}." if many is not None else "."
    return text


def _tiles(facts: RunFacts) -> str:
    result = facts.result

    def percent(key: str) -> tuple[str, str]:
        value = result.get(key)
        return ("–", "") if value is None else (f"{100 * value:.1f}", "%")
    if not facts.classifies:
        rows = [(key, key.replace("_", " "), "", "accent") for key in ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50")]
    else:
        sizes = {g: count_of(result[f"{g}_class_num"], "class", "classes") for g in ("many", "medium", "few")}
        rows = [("accuracy", "All", "of the test images", "accent"),
                ("many_shot_acc", "Many-shot", f"{sizes['many']}, over {facts.many} images", "many"),
                ("medium_shot_acc", "Medium-shot", f"{sizes['medium']}, between", "medium"),
                ("few_shot_acc", "Few-shot", f"{sizes['few']}, under {facts.few} images", "few"),
                ("macro_f1", "Macro-F1", "all classes alike", "quiet"),
                ("ece", "ECE", "calibration error, 0 is best", "quiet")]
    return '<div class="tiles">' + "".join(tile(name, *percent(key), note, tone) for key, name, note, tone in rows) + \
        "</div>"


def _sections(facts: RunFacts, shown: list[tuple[Drawing, Any]]) -> str:
    """Headings with their figures; halves stand side by side, the calibration beside the most confused pairs."""
    parts, heading = [], None
    for drawing, figure in shown:
        if drawing.heading != heading:
            parts += ["</div>" if heading else "", f"<h2>{escape(drawing.heading)}</h2>",
                      '<div class="pair">' if drawing.half else "<div>"]
            heading = drawing.heading
        width = figure.get_size_inches()[0] * 104
        wide = "" if drawing.half else " class=wide"
        parts.append(f'<figure{wide} style="--width:{width:.0f}px">{to_svg(figure, drawing.heading)}'
                     f"<figcaption>{escape(drawing.text)}</figcaption></figure>")
        if drawing.key == "reliability":
            parts.append(_pairs(facts))
    return "".join(parts) + ("</div>" if heading else "")


def _pairs(facts: RunFacts) -> str:
    pairs = facts.confused_pairs(10)
    if not pairs:
        return ""
    rows = [[facts.names[true], facts.names[said], f"{images} of {total}"] for true, said, images, total in pairs]
    return "<figure>" + table(["true class", "taken for", "test images"], rows, {2}) + \
        "<figcaption>The most frequent mistakes.</figcaption></figure>"


def _images(facts: RunFacts, loader: Any) -> str:
    """The images that were wrong with the greatest confidence."""
    if not facts.by_image or not hasattr(loader, "raw_image"):
        return ""
    cells = []
    for index in facts.hardest():
        said, true = (int(facts.image(key)[index]) for key in ("predictions", "labels"))
        try:
            source, small = data_uri(loader.raw_image(index))
        except (OSError, ConfigError):  # moved or deleted since the evaluation
            continue
        sure = 100 * float(facts.image("confidences")[index])
        true, said = escape(facts.names[true]), escape(facts.names[said])
        cells.append(f'<div><img {"class=small " if small else ""}src="{source}" alt="{true}">'
                     f"<b>{true}</b> taken for <em>{said}</em>, {sure:.0f}&nbsp;%&nbsp;sure</div>")
    wrong = int((~facts.right).sum())
    text = (f"Of {count_of(wrong, 'mistake', 'mistakes')}, those the model was surest of, a few of each kind. Look for "
            "wrong labels, look-alikes and odd photos."
            if wrong else "No image was wrong; these it was least sure of.")
    return (f'<h2>The hardest images</h2><p class="note">{text}</p>'
            f'<figure><div class="images">{"".join(cells)}</div></figure>')


def data_uri(picture: Any) -> tuple[str, bool]:
    """A picture (uint8 [H, W, 3]) as a data URI, large ones made smaller; and whether it is a tiny one."""
    image = Image.fromarray(picture)
    small = max(image.size) <= 64
    out = io.BytesIO()
    if small:
        image.save(out, "PNG", optimize=True)
    else:
        image.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
        image.save(out, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", small


def _recipe(facts: RunFacts, run: Any, paths: RunPaths) -> str:
    """The commands that make this run and its figures again, all figures, and the config."""
    extra = " -r STAGE1_CHECKPOINT" if run.config.get("resume_state_dict_only") else ""
    tau = f" --tau {facts.result.get('tau', 0):g}"
    how = {"ncm": " --classifier ncm", "tau": tau, "la": f" --classifier la{tau}"} \
        .get(facts.result.get("classifier", "joint"), "")
    commands = [f"python train.py -c {shlex.quote(str(paths.config))}{extra}",
                f"python test.py -r {shlex.quote(str(paths.models / run.path.name))}{how}",
                f"python -m tools.report {shlex.quote(str(paths.models))}",
                f"tensorboard --logdir {shlex.quote(str(paths.log))}"]
    left_out = (*BY_IMAGE, "per_class_acc", "detections")
    figures = {key: value for key, value in facts.result.items() if key not in left_out}
    return ("<h2>Do it again</h2><p class='note'>Train anew, evaluate, write this page, see the curves live:</p>"
            f"<pre>{escape(chr(10).join(commands))}</pre>"
            f"<details><summary>Config</summary><pre>{escape(json.dumps(run.config, indent=2))}</pre></details>"
            f"<details><summary>All figures</summary><pre>{escape(json.dumps(figures, indent=2, default=str))}</pre>"
            f"</details><footer>Written {datetime.datetime.now():%Y-%m-%d %H:%M} with PyTorch {torch.__version__}, "
            f"Python {platform.python_version()} on {escape(str(run.device))}. The figures are also in "
            f"<code>report/</code> as PNGs.</footer>")
