"""The report's HTML, from top to bottom: headline, figures with their captions, hard images, how to reproduce it."""
from __future__ import annotations

import base64
import datetime
import io
import json
import platform
import shlex
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image

from base.run_paths import RunPaths
from logger.figures.drawings import Drawing
from logger.figures.facts import BY_IMAGE, RunFacts
from logger.figures.style import to_svg
from logger.text import count_of, duration, in_percent, percent
from tools.page import render
from tools.runs import RunRecord, data_of, evaluation_flags, experts_of, model_of
from utils.errors import ConfigError

LARGEST_IMAGE = 320  # pixels of the longer side of a photo in the page, shown at about a third of that


def report_name(split: str, run: Any) -> str:
    """The name of a page and of its figures' folder. It differs for validation and for other data, so that none passes
    for the test on the run's own."""
    return ".".join(["report" if split == "test" else f"{split}_report", *run.about()])


def report_page(facts: RunFacts, run: Any, paths: RunPaths, shown: list[tuple[Drawing, Any]], loader: Any) -> str:
    """The whole page. shown: the drawings and their figures; loader: of the split that `facts` are about."""
    record = RunRecord(paths, facts.config, facts.result)
    pairs = [(facts.names[true], facts.names[said], f"{images} of {total}")
             for true, said, images, total in facts.confused_pairs(10)] if facts.by_image else []
    left_out = (*BY_IMAGE, "per_class_acc", "detections")
    figures = {key: value for key, value in facts.result.items() if key not in left_out}
    return render("report.html", title=f"{record.method} on {data_of(facts.config)}", lead=_lead(facts),
                  tiles=_tiles(facts), facts=_facts(facts, run, record), sections=_sections(shown), pairs=pairs,
                  images_name=facts.images_name, pictures=report_name(facts.split, run), **_images(facts, loader),
                  commands=_commands(facts, run, paths),
                  config=json.dumps(run.config, indent=2), figures=json.dumps(figures, indent=2, default=str),
                  written=f"{datetime.datetime.now():%Y-%m-%d %H:%M} with PyTorch {torch.__version__}, "
                          f"Python {platform.python_version()} on {run.device}")


def _facts(facts: RunFacts, run: Any, record: RunRecord) -> dict[str, Any]:
    """What was trained: label -> value, None where it isn't known."""
    epoch = run.checkpoint.get("epoch")
    return {"run": record.name, "checkpoint": run.path.name,
            "epochs": None if epoch is None else f"{epoch} of {run.config['trainer']['epochs']}",
            "seed": run.config.get("seed", 0), "model": model_of(run.config), "experts": experts_of(run.config),
            "parameters": f"{run.model.num_parameters():,}" if hasattr(run.model, "num_parameters") else None,
            "data": data_of(run.config), "classes": len(facts.counts),
            f"training {'images' if facts.classifies else 'instances'}": f"{sum(facts.counts):,}",
            "imbalance": _imbalance(facts.counts), facts.images_name: _count(facts.result.get("n_samples")),
            "training time": None if record.seconds is None else duration(record.seconds),
            "speed": None if record.images_per_second is None else f"{record.images_per_second:,.0f} images/s"}


def _count(number: Any) -> str | None:
    return None if number is None else f"{number:,}"


def _imbalance(counts: Sequence[int]) -> str | None:
    there = [count for count in counts if count]
    return f"{max(there):,} to {min(there):,} a class" if there else None


def _lead(facts: RunFacts) -> str:
    result = facts.result
    if not facts.classifies:
        return "A detector: its training curves, figures and config."
    text = f"Of 100 {facts.images_name} this model names {100 * result['accuracy']:.0f} right."
    few, many = result.get("few_shot_acc"), result.get("many_shot_acc")
    if few is not None:
        text += f" For classes with fewer than {facts.few} training images it's {in_percent(few)}"
        text += f", for those with more than {facts.many} it's {in_percent(many)}." if many is not None else "."
    return text


def _tiles(facts: RunFacts) -> list[tuple[str, str, str, str, str]]:
    """The headline numbers: (name, value, unit, note, tone)."""
    result = facts.result

    def headline(key: str) -> tuple[str, str]:
        value = result.get(key)
        return ("–", "") if value is None else (percent(value), "%")
    if not facts.classifies:
        rows = [(key, key.replace("_", " "), "", "accent")
                for key in ("bbox_AP", "bbox_AP50", "bbox_AP75", "segm_AP", "segm_AP50", "segm_AP75")]
        rows += [(f"{kind}_AP_{group}", f"{kind} AP {group}-shot",
                  count_of(result.get(f"{group}_class_num") or 0, "class", "classes"), group)
                 for kind in ("bbox", "segm") for group in ("many", "medium", "few")
                 if result.get(f"{kind}_AP_{group}") is not None]
    else:
        sizes = {g: count_of(result[f"{g}_class_num"], "class", "classes") for g in ("many", "medium", "few")}
        rows = [("accuracy", "All", f"of the {facts.images_name}", "accent"),
                ("many_shot_acc", "Many-shot", f"{sizes['many']}, over {facts.many} images", "many"),
                ("medium_shot_acc", "Medium-shot", f"{sizes['medium']}, between", "medium"),
                ("few_shot_acc", "Few-shot", f"{sizes['few']}, under {facts.few} images", "few"),
                ("macro_f1", "Macro-F1", "all classes alike", "quiet"),
                ("ece", "ECE", "calibration error, 0 is best", "quiet")]
    return [(name, *headline(key), note, tone) for key, name, note, tone in rows]


def _sections(shown: list[tuple[Drawing, Any]]) -> list[tuple[str, bool, list[dict[str, Any]]]]:
    """(heading, whether its figures stand side by side, its figures)."""
    return [(heading, together[0][0].half, [
        {"key": drawing.key, "half": drawing.half, "text": drawing.text,
         "width": round(figure.get_size_inches()[0] * 104), "svg": Markup(to_svg(figure, heading))}
        for drawing, figure in together])
        for heading, group in groupby(shown, lambda pair: pair[0].heading) for together in [list(group)]]


def _images(facts: RunFacts, loader: Any) -> dict[str, Any]:
    """The images with the most confident mistakes, and what to look for in them."""
    images = []
    for index in facts.hardest() if facts.by_image and hasattr(loader, "raw_image") else ():
        said, true = (facts.names[int(facts.image(key)[index])] for key in ("predictions", "labels"))
        try:
            source, small = data_uri(loader.raw_image(index))
        except (OSError, ConfigError):  # moved or deleted since the evaluation
            continue
        images.append({"label": true, "said": said, "source": source, "small": small,
                       "sure": f"{100 * float(facts.image('confidences')[index]):.0f}"})
    wrong = int((~facts.right).sum()) if images else 0
    return {"images": images, "images_text": (
        f"Of {count_of(wrong, 'mistake', 'mistakes')}, those the model was surest of, a few of each kind. Look for "
        "wrong labels, look-alikes and odd photos." if wrong else
        "No image was wrong; these it was least sure of.")}


def data_uri(picture: Any) -> tuple[str, bool]:
    """(a picture, uint8 [H, W, 3], as a data URI, scaled down if large; whether no side is over 64 pixels)."""
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


def _commands(facts: RunFacts, run: Any, paths: RunPaths) -> list[str]:
    """The commands that reproduce this run and its figures."""
    extra = " -r STAGE1_CHECKPOINT" if run.config.get("resume_state_dict_only") else ""
    how = evaluation_flags(facts.result) + (f" --split {facts.split}" if facts.split != "test" else "")
    changed = ", ".join(map(str, facts.result.get("changed") or ()))
    checkpoint = shlex.quote(str(paths.models / run.path.name))
    evaluate = f"python test.py -r {checkpoint}{how}"
    return [f"python train.py -c {shlex.quote(str(paths.config))}{extra}",
            *([f"{evaluate} --report" + (f"  # and with {changed}" if changed else "")] if how or changed else
              [evaluate, f"python -m tools.report {checkpoint}"]),
            f"tensorboard --logdir {shlex.quote(str(paths.log))}"]
