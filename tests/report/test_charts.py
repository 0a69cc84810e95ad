"""The report's charts: curves where they belong, images in their cells."""

import io

import numpy as np
from PIL import Image

from placeholder.report.charts import BAND, CELL, COLORS, GAP, curves, image_grid
from placeholder.training.progress import Point

FALLING = [Point(step, 1 - step / 100, None, None) for step in range(1, 101)]
FULL = [Point(step, 0.5, 0.4, step / 100) for step in range(1, 101)]


def pixels(points: list[Point]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(curves(points))).convert("RGB")).astype(int)


def colored(image: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels in the color of a curve."""
    color = np.array([int(COLORS[name][start : start + 2], 16) for start in (1, 3, 5)])
    return np.nonzero((np.abs(image - color) < 30).all(axis=2))


def test_a_falling_loss_is_plotted_from_the_upper_left_to_the_lower_right():
    image = pixels(FALLING)
    rows, columns = colored(image, "loss")
    assert columns.max() - columns.min() > 0.85 * 800
    assert rows[columns.argmax()] - rows[columns.argmin()] > image.shape[0] / 2


def test_preservation_and_the_norm_are_plotted_only_where_there_are_any():
    without, full = pixels(FALLING), pixels(FULL)
    assert full.shape == (2 * without.shape[0], *without.shape[1:])
    assert colored(full, "preservation")[0].size and not colored(without, "preservation")[0].size
    assert colored(full[without.shape[0] :], "row_norm")[0].size
    assert pixels([Point(1, 0.5, None, None)]).any()


def test_the_same_curve_gives_the_same_bytes_without_the_name_of_a_program():
    assert curves(FULL) == curves(FULL)
    assert "Software" not in Image.open(io.BytesIO(curves(FULL))).info


def test_images_are_in_their_columns_and_rows_and_enlarged_without_blur():
    colors = {"a": ["red", "lime"], "b": ["blue", "white"]}
    columns = {name: [Image.new("RGB", (64, 64), color) for color in row] for name, row in colors.items()}
    image = image_grid(columns, ["one", "zwölf " * 50])
    assert image.size == (2 * CELL + GAP, BAND + 2 * (BAND + CELL))
    centers = [[image.getpixel((96 + (CELL + GAP) * x, 2 * BAND + 96 + y * (BAND + CELL))) for x in (0, 1)] for y in (0, 1)]
    assert centers == [[(255, 0, 0), (0, 0, 255)], [(0, 255, 0), (255, 255, 255)]]
    assert (np.asarray(image)[2 * BAND :, CELL : CELL + GAP] == 255).all()
    assert np.asarray(image)[BAND : 2 * BAND].min() < 100  # the label of the first row


def test_a_long_label_is_cut_to_the_width():
    assert image_grid({"a": [Image.new("RGB", (64, 64))]}, ["w" * 20_000]).width == CELL
