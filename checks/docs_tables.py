"""Tables in the pages of docs/, each between two markers: the inputs from the declared options, and what scripts measure."""

import re
from pathlib import Path

from pydantic import SecretStr

from demo.server import ROOT
from placeholder.options import Option
from placeholder.service.parser import INPUTS

DOCS = ROOT / "docs"
PAGES = {"train": DOCS / "train.md", "predict": DOCS / "predict.md"}
END = "<!-- end -->\n"
KINDS = {bool: "true, false", str: "text", Path: "file", SecretStr: "secret"}


def table(options: dict[str, Option]) -> str:
    """The options as a table in Markdown."""
    rows = [
        f"| `{option.name}` | {_default(option)} | {_range(option)} | {_code(option.description)} |"
        for option in options.values()
    ]
    return "\n".join(["| input | default | range | what it does |", "|---|---|---|---|", *rows]) + "\n"


def with_table(page: str, name: str, lines: str) -> str:
    """The text of a page with other lines between `<!-- table: name -->` and the end marker."""
    start = f"<!-- table: {name} -->\n"
    before, rest = page.split(start)
    return before + start + lines + END + rest.split(END, 1)[1]


def write_table(path: Path, name: str, lines: str) -> None:
    """Replace a table in the page at `path`; an output folder other than docs/ has no page."""
    if path.exists():
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, lines), encoding="utf-8")


def _default(option: Option) -> str:
    if option.default in (None, ""):
        return "required" if option.default is None and not option.blank else "blank"
    return _code(_number(option.default)) if not isinstance(option.default, bool) else str(option.default).lower()


def _range(option: Option) -> str:
    if option.low is not None:
        return f"{_number(option.low)} to {_number(option.high)}"
    return ", ".join(map(str, option.choices)) or KINDS[option.kind]


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    """The text with what looks like a tag of HTML as code."""
    return re.sub(r"<\w*>", r"`\g<0>`", text)


if __name__ == "__main__":
    for command, path in PAGES.items():
        write_table(path, "inputs", table(INPUTS[command]))
