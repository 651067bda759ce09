"""Renders our HTML pages: one self-contained file each, light and dark, readable on a phone and on paper.

The jinja2 templates are in tools/templates; values put into them are escaped.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from logger.figures.style import COLOURS

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(template: str, **values: Any) -> str:
    """The HTML document made of the file `template` and `values`; a missing value raises jinja2's UndefinedError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                        keep_trailing_newline=True)
    themes = {name: "".join(f"--{key}:{pair[place]};" for key, pair in COLOURS.items())
              for place, name in enumerate(("light", "dark"))}
    return pages.get_template(template).render(**themes, **values)
