"""The report as one HTML page that needs nothing but the files beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

MAX_CAPTIONS, MAX_SKIPPED = 1000, 200  # lines of the page
MAX_CAPTION = 500  # characters
# Light or dark as the reader's system is. On a narrow screen a wide table or curve scrolls by itself, and the page does not.
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --faint: #666; --note: #fff3d6; --code: #f5f5f5; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #17191c; --line: #3b3f45; --faint: #a2a6ac; --note: #43370f; --code: #23262a; --link: #8ab8ee; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1, p, li, th, td { overflow-wrap: anywhere; } a { color: var(--link); }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: 3px 12px 3px 0; }
th { font-weight: 600; min-width: 7em; } .samples th { min-width: 0; } td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; } .wide > img { min-width: 600px; }
.captions img { max-width: 64px; } .samples img { width: 192px; max-width: none; }
.note { background: var(--note); padding: .6em 1em; } .small { color: var(--faint); font-size: .9em; }
pre { background: var(--code); padding: 1em; overflow-x: auto; }
@media (max-width: 600px) { .samples img { width: 128px; } .captions td { min-width: 5em; } .captions td:first-child { min-width: 0; } }
"""


@dataclass(frozen=True)
class Contents:
    """What the page shows. Pictures are names of files beside it; all text may come from strangers.

    `captions` are the name of a picture, its caption and where that comes from, with a `captions_note` below; `thumbnails` the files of the
    first of them; `samples` holds for each step one file a prompt; `columns` names those of the grid; `missing` says which pictures are
    missing and why.
    """

    title: str
    notes: list[str]
    facts: dict[str, Any]
    diagnostics: list[str]
    prompts: list[str]
    drawing: str
    grid: str | None
    columns: list[str]
    samples: dict[int, list[str]]
    sample_prompts: list[str]
    curve: str
    data_set: dict[str, Any]
    captions: list[tuple[str, str, str]]
    thumbnails: list[str]
    skipped: dict[str, str]
    config: str
    captions_note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def page(contents: Contents) -> str:
    """The whole page."""
    parts = [
        f"<h1>{_text(contents.title)}</h1>",
        *(f'<p class="note">{_text(note)}</p>' for note in (*contents.notes, *contents.missing)),
        _pairs(contents.facts),
        *_pictures(contents),
        "<h2>Curves</h2>",
        f'<div class="wide">{_image(contents.curve, "loss and row norm over the steps")}</div>',
        '<p class="small">Every progress line of the training: <a href="curve.csv">curve.csv</a></p>',
        *_section("The token", _lines(contents.diagnostics) if contents.diagnostics else ""),
        *_data_set(contents),
        *_section("Time, in seconds", _pairs({name: f"{value:.1f}" for name, value in contents.seconds.items()})),
        *_section("Memory", _pairs(contents.memory)),
        *_section("Configuration", f"<pre>{_text(contents.config)}</pre>"),
        '<p class="small">To train so again, give <a href="config.yaml">config.yaml</a> as the input config.</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(contents.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _pictures(contents: Contents) -> Iterable[str]:
    if contents.grid:
        yield "<h2>Before and after</h2>"
        columns = "; ".join(contents.columns)
        yield _image(contents.grid, f"pictures of the same prompts and seed, from left to right: {columns}")
        yield f'<p class="small">{_text(contents.drawing)} The columns, from the left: {_text(columns)}. The rows, from above:</p>'
        yield _ordered(contents.prompts)
    if contents.samples:
        yield "<h2>Samples while training</h2>"
        yield f'<p class="small">{_text(contents.drawing)} The columns, from the left:</p>'
        yield _ordered(contents.sample_prompts)
        head = "".join(f"<th>{number}</th>" for number in range(1, len(contents.sample_prompts) + 1))
        rows = (
            f'<tr><td class="number">{step}</td>'
            + "".join(
                f"<td>{_image(name, f'{_cut(prompt)}, step {step}')}</td>"
                for name, prompt in zip(names, contents.sample_prompts, strict=True)
            )
            + "</tr>"
            for step, names in contents.samples.items()
        )
        yield f'<div class="wide"><table class="samples"><tr><th>step</th>{head}</tr>' + "\n".join(rows) + "</table></div>"


def _data_set(contents: Contents) -> Iterable[str]:
    yield "<h2>Data set</h2>"
    yield _pairs(contents.data_set)
    rows = []
    for number, (name, caption, source) in enumerate(contents.captions[:MAX_CAPTIONS]):
        image = _image(contents.thumbnails[number], "") if number < len(contents.thumbnails) else ""
        cells = (image, _text(name), _text(_cut(caption)), f'<span class="small">{_text(source)}</span>')
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    yield '<h3>Captions as trained</h3><table class="captions">' + "\n".join(rows) + "</table>"
    yield _more(len(contents.captions) - MAX_CAPTIONS)
    if contents.captions_note:
        yield f'<p class="small">{_text(contents.captions_note)}</p>'
    if contents.skipped:
        yield "<h3>Skipped files</h3>" + _pairs(dict(list(contents.skipped.items())[:MAX_SKIPPED]))
        yield _more(len(contents.skipped) - MAX_SKIPPED)


def _section(title: str, body: str) -> list[str]:
    """A section, unless it would be empty."""
    return [f"<h2>{title}</h2>", body] if body else []


def _pairs(pairs: dict[str, Any]) -> str:
    rows = (f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in pairs.items())
    return "<table>" + "\n".join(rows) + "</table>" if pairs else ""


def _lines(lines: Sequence[str]) -> str:
    return "<p>" + "<br>\n".join(map(_text, lines)) + "</p>"


def _ordered(items: Sequence[str]) -> str:
    return "<ol>" + "\n".join(f"<li>{_text(_cut(item)) or '(the empty prompt)'}</li>" for item in items) + "</ol>"


def _more(count: int) -> str:
    return f"<p>and {count} more</p>" if count > 0 else ""


def _image(name: str, description: str) -> str:
    return f'<img src="{escape(name)}" alt="{escape(description)}">'


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CAPTION else text[:MAX_CAPTION] + "..."


def _text(value: Any) -> str:
    """Text as HTML shows it; <bdi> keeps right-to-left text from turning what follows around."""
    text = str(value)
    return escape(text) if text.isascii() else f"<bdi>{escape(text)}</bdi>"
