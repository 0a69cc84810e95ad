"""The demo's contact sheet, and the figure that is cut from it."""

import numpy as np
from PIL import Image

from demo.sheet import ABOVE, CELL, HEAD, IN_README, LABEL, ROW, Cell, contact_sheet, figure

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "black"]


def test_each_image_is_in_its_row_and_the_figure_has_the_rows_that_are_named():
    rows = [
        (
            f"row {number}",
            [Cell(Image.new("RGB", (64, 64), color), "base model", "a photo of a house on a blue background")] * 6,
        )
        for number, color in enumerate(COLORS)
    ]
    sheet = contact_sheet(rows)
    cut = figure(sheet)
    assert cut.size == (sheet.width, HEAD + len(IN_README) * ROW)
    for where, numbers in ((sheet, range(len(rows))), (cut, IN_README)):
        for place, number in enumerate(numbers):
            middle = (LABEL + CELL // 2, HEAD + place * ROW + ABOVE + CELL // 2)
            assert where.getpixel(middle) == Image.new("RGB", (1, 1), COLORS[number]).getpixel((0, 0))
    assert np.array_equal(np.asarray(cut)[:HEAD], np.asarray(sheet)[:HEAD])
