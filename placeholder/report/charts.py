"""The report's charts: loss curves by matplotlib, and a labeled grid of images by Pillow."""

import io
import logging
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from placeholder.training.progress import Point

COLORS = {"loss": "#1f5fa8", "preservation": "#c2571a", "row_norm": "#1f5fa8"}
CELL, BAND, GAP = 192, 26, 6  # pixels: the least width of a cell, the height of a line of text, the space between columns


def curves(points: Sequence[Point]) -> bytes:
    """A PNG of the losses over the steps and, below them, of the norm of the token embeddings where there are any.

    The same points give the same bytes.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # on its first use it warns of its font cache and folders
    from matplotlib.figure import Figure  # here, because only a report needs it; not pyplot, which is not thread-safe

    losses = [name for name in ("loss", "preservation") if any(getattr(point, name) is not None for point in points)]
    panels = {"Loss": losses} | ({"Norm of the token embedding": ["row_norm"]} if points[-1].row_norm is not None else {})
    figure = Figure(figsize=(8, 2.6 * len(panels)), dpi=100, layout="constrained")  # 800 pixels wide
    for axes, (title, names) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        for name in names:
            curve = [(point.step, value) for point in points if (value := getattr(point, name)) is not None]
            axes.plot(*zip(*curve, strict=True), COLORS[name], label=name, marker="." if len(curve) <= 30 else "")
        axes.set_title(title, loc="left")
        axes.set_xlim(left=0)
        axes.grid(color="#dddddd")
        axes.spines[:].set_visible(False)
        if len(names) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0.06, 0.97), ncols=len(names), frameon=False)  # next to the title
    axes.set_xlabel("step", loc="right")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def image_grid(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str]) -> Image.Image:
    """Square images in columns under their titles, each row under its label; small images are enlarged to CELL without blur."""
    side = next(iter(columns.values()))[0].width
    cell = side * max(1, CELL // side)
    grid = Image.new("RGB", ((cell + GAP) * len(columns) - GAP, BAND + (BAND + cell) * len(rows)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for x, (title, images) in enumerate(columns.items()):
        left = x * (cell + GAP)
        draw.text((left + cell / 2, BAND / 2), title, "#222222", ImageFont.load_default(15), "mm")
        for y, image in enumerate(images):
            grid.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left, 2 * BAND + y * (BAND + cell)))
    for y, label in enumerate(rows):
        if not (label.isascii() and label.isprintable()):
            label = f"prompt {y + 1}"  # Pillow's font has no other letters
        while font.getlength(label) > grid.width - 12:
            label = label[: -max(4, len(label) // 20)] + "..."
        draw.text((6, BAND * 1.5 + y * (BAND + cell)), label, "#222222", font, "lm")
    return grid
