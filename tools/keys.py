"""Prints the reference of a config's keys that docs/config.md contains.

    python -m tools.keys
"""
from __future__ import annotations

import json

from utils.config.schema import GROUPS, REQUIRED, TOP, TRAINER, Row


def reference(rows: tuple[Row, ...] = TRAINER, prefix: str = "trainer.") -> str:
    """The rows as a Markdown table."""
    lines = ["| key | default | |", "| --- | --- | --- |"]
    for row in rows:
        default = "(must be given)" if row.default is REQUIRED else f"`{json.dumps(row.default)}`"
        lines.append(f"| `{prefix}{row.name}` | {default} | {row.doc} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(TOP, ""), reference(GROUPS, "groups."), reference(), sep="\n\n")
