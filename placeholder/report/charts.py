"""The report's figures, drawn with Pillow: curves over the steps, and pictures side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = "#222222", "#dddddd", "#ffffff"
COLORS = ("#1f5fa8", "#c2571a")
SMOOTHING = 2  # drawn so many times as large and scaled down, because Pillow's lines have steps
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 260, 76, 24, 44, 34  # pixels of one panel and its margins
TICKS = 5
CELL = 192  # pixels: smaller pictures are enlarged, so that the labels fit
BAND = 26  # pixels, of a line of text
GAP = 6  # pixels between the columns, since neighbors often have the same background


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a title and curves by name, each as (step, value) pairs."""

    title: str
    curves: dict[str, list[tuple[float, float]]]


def draw_panels(panels: Sequence[Panel]) -> Image.Image:
    """The panels, one below the other, over the same kind of axis: training steps."""
    image = Image.new("RGB", (WIDTH * SMOOTHING, HEIGHT * len(panels) * SMOOTHING), PAPER)
    for number, panel in enumerate(panels):
        _draw_panel(ImageDraw.Draw(image), panel, number * HEIGHT)
    return image.resize((WIDTH, HEIGHT * len(panels)), Image.Resampling.LANCZOS)


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, offset: int) -> None:
    points = [point for curve in panel.curves.values() for point in curve]
    steps = ticks(0, max(step for step, _ in points))
    values = ticks(min(value for _, value in points), max(value for _, value in points))
    box = (LEFT, offset + TOP, WIDTH - RIGHT, offset + HEIGHT - BOTTOM)

    def place(step: float, value: float) -> tuple[float, float]:
        x = box[0] + (box[2] - box[0]) * step / steps[-1]
        y = box[3] - (box[3] - box[1]) * (value - values[0]) / (values[-1] - values[0])
        return x * SMOOTHING, y * SMOOTHING

    def write(x: float, y: float, text: str, anchor: str, color: str = INK, size: int = 12) -> None:
        draw.text((x * SMOOTHING, y * SMOOTHING), text, color, _font(size * SMOOTHING), anchor)

    for value in values:
        (start, y), (end, _) = place(0, value), place(steps[-1], value)
        draw.line((start, y, end, y), FAINT, SMOOTHING)
        write(box[0] - 8, y / SMOOTHING, f"{value:.4g}", "rm")
    for step in steps:
        write(place(step, values[0])[0] / SMOOTHING, box[3] + 6, f"{step:.6g}", "mt")
    write(box[2], box[3] + 20, "step", "rt", size=11)
    write(LEFT, offset + 12, panel.title, "lt", size=15)
    legend = LEFT + _font(15).getlength(panel.title)  # beside the title, where a narrow screen shows it too
    for number, (name, curve) in enumerate(panel.curves.items()):
        color = COLORS[number % len(COLORS)]
        if len(panel.curves) > 1:
            write(legend + 24, offset + 14, name, "lt", color)
            legend += 24 + _font(12).getlength(name)
        placed = [place(*point) for point in curve]
        draw.line(placed, color, 2 * SMOOTHING, joint="curve")
        if len(placed) <= 30:
            for x, y in placed:
                draw.circle((x, y), 2.5 * SMOOTHING, color)


def ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers, at equal distances, that enclose `low` and `high`."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / TICKS))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power * TICKS >= span * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [number * distance for number in range(first, max(last, first + 1) + 1)]


def draw_grid(columns: dict[str, list[Image.Image]], rows: Sequence[str]) -> Image.Image:
    """Square pictures in labeled columns; `rows` names what stands in each row, above it."""
    (side, _) = next(iter(columns.values()))[0].size
    cell = side * max(1, CELL // side)
    width = (cell + GAP) * len(columns) - GAP
    image = Image.new("RGB", (width, BAND + (BAND + cell) * len(rows)), PAPER)
    draw = ImageDraw.Draw(image)
    for x, (name, pictures) in enumerate(columns.items()):
        left = x * (cell + GAP)
        draw.text((left + cell / 2, BAND / 2), name, INK, _font(15), "mm")
        for y, picture in enumerate(pictures):
            resized = picture.resize((cell, cell), Image.Resampling.NEAREST) if cell != side else picture
            image.paste(resized, (left, 2 * BAND + y * (BAND + cell)))
    for y, name in enumerate(rows):
        draw.text((6, BAND + y * (BAND + cell) + BAND / 2), _fitting(name, y + 1, image.width - 12), INK, _font(13), "lm")
    return image


def _fitting(text: str, number: int, width: int) -> str:
    """The text cut to a width in pixels; its number where the font has no letters for it."""
    if not text.isascii() or not text.isprintable():
        return f"prompt {number}"
    while _font(13).getlength(text) > width:
        text = text[: -max(4, len(text) // 20)] + "..."
    return text


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # the one that Pillow brings
