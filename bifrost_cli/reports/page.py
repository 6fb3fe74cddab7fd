"""Pieces of a page that opens from disk: text, tables, cards, galleries, lineage, and the frame around them.

Comes in: values and PNG bytes. Goes out: HTML with no outside request, all text escaped, and one line of script, which
lets Escape close an enlarged image; the page's own policy admits nothing else. Does not know what is reported.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from bifrost_cli.reports.lineage_graph import graph

SMALL = 256  # px: below, pixels are shown as squares
SCRIPT = (
    'addEventListener("keydown",e=>{if(e.key=="Escape")document.querySelectorAll(".gallery details[open]")'
    ".forEach(d=>{d.open=false;d.firstElementChild.focus()})})"
)
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"
Images = Mapping[str, tuple[bytes, int]]  # name -> (PNG bytes, width in px)


def page(title: str, summary: str, sections: Sequence[str]) -> str:
    """The whole page; empty sections are left out."""
    css = resources.files(__package__).joinpath("report.css").read_text("utf-8")
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{css}</style></head>\n"
        f'<body><main>\n<h1>{text(title)}</h1>\n<p class="soft">{text(summary)}</p>\n{body}\n</main>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def text(value: Any) -> str:
    """Any value as escaped text; bytes that are no text, and control characters, become a replacement sign."""
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return escape("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in plain))


def foreign(value: Any) -> str:
    """Text that somebody else wrote, in any script; it cannot turn round the words beside it."""
    return f'<bdi dir="auto">{text(value)}</bdi>'


def section(title: str, content: str) -> str:
    """A heading and what is under it; nothing under it is no section."""
    return f"<section><h2>{text(title)}</h2>{content}</section>" if content else ""


def note(line: str) -> str:
    return f'<p class="note">{text(line)}</p>'


def card(label: str, number: str, lines: Sequence[str], sentence: str = "") -> str:
    """A headline number with its uncertainty and what it is."""
    told = "<br>".join(text(line) for line in lines)
    return (
        f'<div class="card"><h2>{text(label)}</h2><div class="number">{text(number)}</div>'
        f'<p>{told}</p><p class="soft">{text(sentence)}</p></div>'
    )


def cards(found: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(found)}</div>' if found else ""


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one a row."""
    rows = "".join(f"<tr><th>{text(name)}</th><td>{foreign(value)}</td></tr>" for name, value in values.items())
    return f'<div class="wide"><table class="facts">{rows}</table></div>' if values else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with a heading a column; a row's first cell is its name."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{foreign(row[0])}</th>{"".join(f"<td>{foreign(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>' if rows else ""


def plot(svg: str, caption: str = "") -> str:
    return f'<figure class="wide">{svg}<figcaption class="soft">{text(caption)}</figcaption></figure>'


def image(png: bytes, width: int, alt: str) -> str:
    """An <img> that holds its own bytes."""
    large = "" if width <= SMALL else ' class="large"'
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return f'<img{large} loading="lazy" alt="{text(alt)}" src="{source}">'


def command(line: str) -> str:
    return f"<pre><code>{text(line)}</code></pre>"


# ---- images -------------------------------------------------------------------------------------------------------


def gallery(entries: Sequence[Mapping[str, Any]], images: Images, told: str = "") -> str:
    """Images with prompt, verdict and why, under what is `told` of all; Enter enlarges one, Escape closes it. Those
    not in `images` are only counted."""
    shown = [entry for entry in entries if entry["name"] in images]
    if not shown:
        return ""
    some = f"{len(shown)} of {len(entries)}, in order; none picked." if len(shown) < len(entries) else ""
    judged = any(entry.get("right") is not None for entry in shown)
    choice = '<label class="filter"><input type="checkbox" id="wrong-only"> only those that are wrong</label>'
    found = "".join(_image(entry, *images[entry["name"]]) for entry in shown)
    lines = [f'<p class="soft">{text(line)}</p>' for line in (told, some) if line]
    parts = [*lines, choice if judged else "", f'<ul class="gallery">{found}</ul>']
    return section("Pictures", "".join(parts))


def _image(entry: Mapping[str, Any], png: bytes, width: int) -> str:
    verdict = {True: '<p class="right">\u2713 right</p>', False: '<p class="wrong">\u2717 wrong</p>'}
    lines = [verdict.get(entry.get("right"), "")]
    if entry.get("prompt"):
        lines.append(f"<p><b>{foreign(entry['prompt'])}</b></p>")
    if entry.get("why") and not entry["right"]:
        lines.append(f"<p>{foreign(entry['why'])}</p>")
    if entry.get("plan"):
        lines.append(f'<p class="soft">plan: {foreign(entry["plan"])}</p>')
    seed = "" if entry.get("seed") is None else f", seed {text(entry['seed'])}"
    lines.append(f'<p class="soft">{foreign(entry["name"])}{seed}</p>')
    wrong = ' class="is-wrong"' if entry.get("right") is False else ""
    item = image(png, width, entry.get("prompt") or entry["name"])
    return f"<li{wrong}><details><summary>{item}</summary></details><div>{''.join(lines)}</div></li>"


# ---- where it comes from --------------------------------------------------------------------------------------------


def lineage(lines: Sequence[Mapping[str, Any]]) -> str:
    """What was made from what, as a graph, and what each step cost. `lines`: depth first, each with `depth`, `id`,
    `kind` and `cost` (a mapping, or None where the artifact is not here any more)."""
    if not lines:
        return ""
    once = {line["id"]: line for line in reversed(lines)}
    rows = [[name, *_cost(line["cost"])] for name, line in reversed(once.items())]
    columns = ("Made", "Wall time", "Device hours", "Device", "Samples")
    return section("Made from", plot(graph(_edges(lines))) + table(columns, rows))


def _edges(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """(what, what was made of it), from a list that is depth first; of a tree's root nothing was made here."""
    found: list[tuple[str, str | None]] = []
    above: list[str] = []
    for line in lines:
        del above[line["depth"] :]
        found.append((line["id"], above[-1] if above else None))
        above.append(line["id"])
    return list(dict.fromkeys(found))


def _cost(cost: Mapping[str, Any] | None) -> list[str]:
    if cost is None:
        return ["not here any more", "", "", ""]
    seconds = cost.get("seconds")
    time = "" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    hours = "" if seconds is None else f"{seconds / 3600 * cost.get('devices', 1):.3f}"
    return [time, hours, str(cost.get("device") or ""), str(cost.get("samples", ""))]
