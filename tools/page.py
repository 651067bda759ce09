"""Our HTML pages: one file each, no network, light and dark, readable on a phone and on paper.

The templates are jinja2's, in tools/templates; what is put into them is escaped.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from logger.figures.style import COLOURS

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(template: str, **values: Any) -> str:
    """A template of ours with `values` as a whole HTML document."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                        keep_trailing_newline=True)
    themes = {name: "".join(f"--{key}:{pair[place]};" for key, pair in COLOURS.items())
              for place, name in enumerate(("light", "dark"))}
    return pages.get_template(template).render(**themes, **values)
