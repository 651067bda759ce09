"""The look of our HTML pages: one file each, no network, light and dark, readable on a phone and on paper."""
from __future__ import annotations

from html import escape as escape  # the pages' makers need it
from typing import Any

from logger.figures.style import COLOURS

_STYLE = """
:root{color-scheme:light dark;--figure-font:"DejaVu Sans",Verdana,"Segoe UI",sans-serif;--page:#f5f6f8;%(light)s}
@media (prefers-color-scheme:dark){:root{--page:#101216;%(dark)s}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",sans-serif;-webkit-text-size-adjust:100%%}
main{max-width:1020px;margin:0 auto;padding:40px 24px 64px}
main.wide{max-width:1500px}
h1{font-size:1.95rem;line-height:1.2;margin:0 0 .35em;letter-spacing:-.015em}
h2{font-size:1.22rem;margin:2.6em 0 .2em;letter-spacing:-.01em}
p{margin:.3em 0 .9em;max-width:76ch}
.lead{font-size:1.08rem;color:var(--ink)}
.kind{color:var(--soft);font-size:.86rem;margin:0 0 .5em}
.note,figcaption,.facts dt{color:var(--soft)}
.note{font-size:.88rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;margin:26px 0 14px}
.tile{background:var(--surface);border:1px solid var(--grid);border-radius:10px;padding:13px 16px 12px;
border-top:4px solid var(--tone)}
.tile b{display:block;font-size:1.72rem;line-height:1.15;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile b small{font-size:.58em;font-weight:500;color:var(--soft);margin-left:.15em}
.tile span{display:block;font-weight:600;font-size:.86rem}
.tile i{display:block;font-style:normal;font-size:.78rem;color:var(--soft);line-height:1.35}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(262px,1fr));gap:2px 28px;margin:18px 0 0;
font-size:.9rem}
.facts div{display:flex;gap:.6em;justify-content:space-between;border-bottom:1px solid var(--grid);padding:5px 0}
.facts dd{margin:0;text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
figure{margin:12px 0 0;background:var(--surface);border:1px solid var(--grid);border-radius:10px;padding:18px 20px 14px;
overflow-x:auto}
figure.wide svg{min-width:600px}
figure svg{display:block;width:100%%;height:auto;max-width:var(--width,100%%);margin:0 auto}
figcaption{font-size:.9rem;margin-top:10px;max-width:82ch}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%%,400px),1fr));gap:14px}
.pair>*{min-width:0}
table{border-collapse:collapse;width:100%%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--soft);font-weight:600}
.num{text-align:right}
.scroll{overflow-x:auto;background:var(--surface);border:1px solid var(--grid);border-radius:10px;padding:8px 18px}
.runs{white-space:nowrap;font-size:.83rem}
.runs th,.runs td{padding-right:11px}
.runs tr:last-child td{border-bottom:0}
.runs .mean td{font-weight:650;background:color-mix(in srgb,var(--accent) 8%%,transparent)}
.runs .published td{color:var(--soft);font-style:italic}
.runs td.best{color:var(--right);font-weight:700}
.images{display:grid;grid-template-columns:repeat(auto-fill,minmax(98px,1fr));gap:14px 12px}
.images div{font-size:.78rem;line-height:1.35;color:var(--soft);overflow-wrap:anywhere}
.images img{display:block;width:100%%;aspect-ratio:1;object-fit:contain;background:var(--page);border-radius:6px;
margin-bottom:5px}
.images img.small{image-rendering:pixelated}
.images b{color:var(--ink)}
.images em{font-style:normal;font-weight:600;color:var(--few)}
pre{background:var(--surface);border:1px solid var(--grid);border-radius:10px;padding:12px 16px;overflow-x:auto;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:10px 0}
details summary{cursor:pointer;color:var(--soft);padding:6px 0}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:48px;color:var(--soft);font-size:.84rem;border-top:1px solid var(--grid);padding-top:14px}
@media print{body{background:#fff}figure,.tile{break-inside:avoid}}
"""


def page(title: str, body: str, wide: bool = False) -> str:
    """A whole HTML document around `body`."""
    themes = {name: "".join(f"--{key}:{pair[place]};" for key, pair in COLOURS.items())
              for place, name in enumerate(("light", "dark"))}
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(title)}</title><style>{_STYLE % themes}</style></head>"
            f'<body><main{" class=wide" if wide else ""}>{body}</main></body></html>\n')


def tile(name: str, value: str, unit: str, note: str, tone: str) -> str:
    """A headline number. tone: a name of plot_style.COLOURS."""
    return (f'<div class="tile" style="--tone:var(--{tone})"><span>{escape(name)}</span>'
            f"<b>{escape(value)}<small>{escape(unit)}</small></b><i>{escape(note)}</i></div>")


def facts(pairs: dict[str, Any]) -> str:
    """A list of small facts; None is left out."""
    return '<dl class="facts">' + "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>"
                                          for key, value in pairs.items() if value is not None) + "</dl>"


def table(heads: list[str], rows: list[list[str]], numeric: set[int] = frozenset()) -> str:
    """A plain table; `numeric` are the columns set flush right."""
    def line(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f'<{tag} class="{"num" if i in numeric else ""}">{escape(text)}</{tag}>'
                                for i, text in enumerate(cells)) + "</tr>"
    return f"<table><thead>{line('th', heads)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"
