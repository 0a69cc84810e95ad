"""Writes the tables of inputs into docs/train.md and docs/predict.md, from the options as they are declared."""

import re
from pathlib import Path

from pydantic import SecretStr

from demo.server import ROOT
from placeholder.options import Option
from placeholder.service.parser import INPUTS

PAGES = {"train": ROOT / "docs" / "train.md", "predict": ROOT / "docs" / "predict.md"}
START, END = "<!-- inputs, written by make docs -->\n", "<!-- end of inputs -->\n"
KINDS = {bool: "true, false", str: "text", Path: "file", SecretStr: "secret"}


def table(options: dict[str, Option]) -> str:
    """The options as a table in Markdown."""
    rows = [
        f"| `{option.name}` | {_default(option)} | {_range(option)} | {_code(option.description)} |"
        for option in options.values()
    ]
    return "\n".join(["| input | default | range | what it does |", "|---|---|---|---|", *rows]) + "\n"


def with_table(page: str, options: dict[str, Option]) -> str:
    """The text of a page with the table between its two markers."""
    before, rest = page.split(START)
    return before + START + table(options) + END + rest.split(END)[1]


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
        path.write_text(with_table(path.read_text(encoding="utf-8"), INPUTS[command]), encoding="utf-8")
