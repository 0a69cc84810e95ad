"""The demo's contact sheet: rows of images with who drew them and what was asked for; and the README's figure, cut from it.

`python -m demo.sheet` cuts docs/demo.png from demo-output/contact-sheet.png.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from standin.world import SIDE

TITLE = f"Drawn by a small stand-in base model ({SIDE} pixels, synthetic shapes and ten photographs), not by Qwen-Image."
COLUMNS, CELL, GAP = 6, 128, 34  # pixels
LABEL = 170  # pixels: the rows' titles
HEAD, ABOVE, BELOW = 36, 22, 56  # pixels: the title, an image's first line, its caption
ROW = ABOVE + CELL + BELOW
LETTERS = 25  # of a caption's line
INK = {"base model": "dimgray", "LoRA for TOK": "firebrick", "LoRA for <zwx>": "navy", "data set": "darkgreen"}
IN_README = (0, 1, 2, 4, 5)  # the rows of the figure


@dataclass(frozen=True)
class Cell:
    """One image: who drew it, or that it was taught, and the prompt or caption."""

    image: Image.Image
    source: str
    text: str


def contact_sheet(rows: list[tuple[str, list[Cell]]]) -> Image.Image:
    """The rows with their titles, under a line that says what drew them."""
    sheet = Image.new("RGB", (LABEL + COLUMNS * (CELL + GAP), HEAD + len(rows) * ROW), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 10), TITLE, fill="black", font_size=15)
    for number, (title, cells) in enumerate(rows):
        top = HEAD + number * ROW
        pen.line((0, top, sheet.width, top), fill="lightgray")
        pen.multiline_text((10, top + ABOVE), textwrap.fill(title, 20), fill="black", font_size=15, spacing=5)
        for column, cell in enumerate(cells):
            left = LABEL + column * (CELL + GAP)
            pen.text((left, top + 4), cell.source, fill=INK[cell.source], font_size=13)
            sheet.paste(cell.image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + ABOVE))
            text = textwrap.fill(cell.text, LETTERS)
            pen.multiline_text((left, top + ABOVE + CELL + 3), text, fill="black", font_size=12, spacing=3)
    return sheet


def figure(sheet: Image.Image) -> Image.Image:
    """The title and the rows IN_README of a contact sheet."""
    parts = [(0, HEAD), *((HEAD + row * ROW, HEAD + (row + 1) * ROW) for row in IN_README)]
    cut = Image.new("RGB", (sheet.width, HEAD + len(IN_README) * ROW))
    top = 0
    for upper, lower in parts:
        cut.paste(sheet.crop((0, upper, sheet.width, lower)), (0, top))
        top += lower - upper
    return cut


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    figure(Image.open(root / "demo-output" / "contact-sheet.png")).save(root / "docs" / "demo.png", optimize=True)
