"""The report as one page: numbers, categories, settings, lineage, gallery.

Comes in: the report's JSON value and the bytes of the pictures to show. Goes out: HTML that opens from disk: no script,
no outside request, all text escaped. Does not know how anything was measured.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SMALL = 256  # px: below, pixels are shown as squares


def report_html(report: Mapping[str, Any], pictures: Mapping[str, tuple[bytes, int]]) -> str:
    """The page. `pictures`: name -> (PNG bytes, width in px) of the entries of `report["pictures"]` that are shown."""
    css = resources.files(__package__).joinpath("report.css").read_text("utf-8")
    body = [
        f"<h1>{_text(report['title'])}</h1>",
        f'<p class="soft">{_text(report["summary"])}</p>',
        f'<div class="cards">{"".join(_card(result) for result in report["results"])}</div>',
        "".join(f'<p class="note">{_text(warning)}</p>' for warning in report["warnings"]),
        "".join(_categories(result["categories"]) for result in report["results"] if "categories" in result),
        _gallery(report["pictures"], pictures),
        _section("Settings", _table(report["settings"])),
        _section("Made from", _lineage(report["lineage"])),
        _section("The same again", f"<pre><code>{_text(report['command'])}</code></pre>"),
        _section("Measured with", _table(report["env"])),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report['title'])}</title><style>{css}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _text(value: Any) -> str:
    """Any value as escaped text; bytes that are no text, and control characters, become a replacement sign."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return escape("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text))


def _foreign(value: Any) -> str:
    """Text that somebody else wrote, in any script; it cannot turn round the words beside it."""
    return f'<bdi dir="auto">{_text(value)}</bdi>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


# ---------------------------------------------------------------- numbers


def _card(result: Mapping[str, Any]) -> str:
    number = _percent(result["value"]) if result["format"] == "share" else f"{result['value']:.4g}"
    lines = "<br>".join(_text(line) for line in (result["spread"], *result["details"]))
    return (
        f'<div class="card"><h2>{_text(result["label"])}</h2><div class="number">{number}</div>'
        f'<p>{lines}</p><p class="soft">{_text(result["sentence"])}</p></div>'
    )


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _categories(categories: Sequence[Mapping[str, Any]]) -> str:
    rows = ["<tr><th>Category</th><th>Right</th><th>95 % interval</th></tr>"]
    for row in categories:
        low, high = row["interval95"]
        plot = (
            f'<div class="plot"><i style="left:{low:.2%};width:{high - low:.2%}"></i>'
            f'<b style="left:{row["value"]:.2%}"></b></div>'
        )
        rows.append(
            f'<tr><th>{_text(row["name"].replace("_", " "))}</th><td>{_percent(row["value"])}<br>'
            f'<span class="soft">{row["right"]} of {row["count"]}</span></td>'
            f'<td>{plot}<span class="soft">{low:.1%} to {high:.1%}</span></td></tr>'
        )
    return _section("By category", f'<div class="wide"><table>{"".join(rows)}</table></div>')


# ---------------------------------------------------------------- pictures


def _gallery(entries: Sequence[Mapping[str, Any]], pictures: Mapping[str, tuple[bytes, int]]) -> str:
    shown = [entry for entry in entries if entry["name"] in pictures]
    if not shown:
        return ""
    more = "" if len(shown) == len(entries) else f" The first {len(shown)} of {len(entries)}, in order; none picked."
    judged = any(entry.get("right") is not None for entry in shown)
    choice = '<label class="filter"><input type="checkbox" id="wrong-only"> only those that are wrong</label>'
    cards = "".join(_picture(entry, *pictures[entry["name"]]) for entry in shown)
    note = f'<p class="soft">{_text(more)}</p>' if more else ""
    return _section("Pictures", f'{note}{choice if judged else ""}<ul class="gallery">{cards}</ul>')


def _picture(entry: Mapping[str, Any], png: bytes, width: int) -> str:
    verdict = {True: '<p class="right">\u2713 right</p>', False: '<p class="wrong">\u2717 wrong</p>'}
    large = "" if width <= SMALL else ' class="large"'
    alt = _text(entry.get("prompt") or entry["name"])
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    image = f'<img{large} loading="lazy" alt="{alt}" src="{source}">'
    lines = [verdict.get(entry.get("right"), "")]
    if entry.get("prompt"):
        lines.append(f"<p><b>{_foreign(entry['prompt'])}</b></p>")
    if entry.get("why") and not entry["right"]:
        lines.append(f"<p>{_foreign(entry['why'])}</p>")
    if entry.get("plan"):
        lines.append(f'<p class="soft">plan: {_foreign(entry["plan"])}</p>')
    seed = "" if entry.get("seed") is None else f", seed {_text(entry['seed'])}"
    lines.append(f'<p class="soft">{_foreign(entry["name"])}{seed}</p>')
    wrong = ' class="is-wrong"' if entry.get("right") is False else ""
    return f"<li{wrong}>{image}<div>{''.join(lines)}</div></li>"


# ---------------------------------------------------------------- where it comes from


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_foreign(value)}</td></tr>" for name, value in values.items())
    return f'<div class="wide"><table class="facts">{rows}</table></div>'


def _lineage(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<li style="padding-left:{1.25 * line["depth"]:.2f}rem"><code>{_text(line["id"])}</code>'
        f' <span class="soft">{_text(line["cost"])}</span></li>'
        for line in lines
    )
    return f'<div class="card"><ul class="lineage">{rows}</ul></div>'
