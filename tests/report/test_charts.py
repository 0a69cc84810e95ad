"""The report's figures: ticks that enclose what is drawn, curves where they belong, pictures in their places."""

import numpy as np
import pytest
from PIL import Image

from placeholder.report.charts import BAND, COLORS, GAP, HEIGHT, WIDTH, Panel, draw_grid, draw_panels, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.49, [0.3, 0.35, 0.4, 0.45, 0.5]),
        (0, 15, [0, 5, 10, 15]),
        (2, 2, [2, 2.5]),
        (0, 0, [0, 0.2]),
        (1e-5, 3e-3, [0, 0.001, 0.002, 0.003]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_curve_is_drawn_in_its_color_from_low_to_high():
    image = draw_panels(
        [Panel("Loss", {"loss": [(step, step / 100) for step in range(1, 101)]}), Panel("Norm", {"n": [(1, 0.5)]})]
    )
    assert image.size == (WIDTH, 2 * HEIGHT)
    color = np.array([int(COLORS[0][start : start + 2], 16) for start in (1, 3, 5)])
    rows, columns = np.nonzero((np.abs(np.asarray(image)[:HEIGHT].astype(int) - color) < 40).all(axis=2))
    assert columns.max() - columns.min() > 0.9 * (WIDTH - 100)
    assert rows[columns.argmin()] - rows[columns.argmax()] > HEIGHT / 2  # from below on the left to above on the right


def test_the_names_of_the_curves_stand_beside_the_title_in_their_colors():
    curve = [(1, 0.5), (2, 0.4)]
    both = np.asarray(draw_panels([Panel("Loss", {"loss": curve, "preservation": curve})]))[:40, : WIDTH // 2].astype(int)
    one = np.asarray(draw_panels([Panel("Loss", {"loss": curve})]))[:40].astype(int)
    for color in COLORS:
        ink = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
        assert (np.abs(both - ink) < 60).all(axis=2).any()
        assert not (np.abs(one - ink) < 60).all(axis=2).any()


def test_pictures_stand_in_their_columns_and_rows_enlarged_without_blur():
    colors = {"a": ["red", "lime"], "b": ["blue", "white"]}
    columns = {name: [Image.new("RGB", (64, 64), color) for color in row] for name, row in colors.items()}
    image = draw_grid(columns, ["one", "zwölf " * 50])
    assert image.size == (2 * 192 + GAP, BAND + 2 * (BAND + 192))
    centers = [[image.getpixel((96 + (192 + GAP) * x, 2 * BAND + 96 + y * (BAND + 192))) for x in (0, 1)] for y in (0, 1)]
    assert centers == [[(255, 0, 0), (0, 0, 255)], [(0, 255, 0), (255, 255, 255)]]
    assert (np.asarray(image)[2 * BAND :, 192 : 192 + GAP] == 255).all()
    assert np.asarray(image)[BAND : 2 * BAND].min() < 100  # the first row's name


def test_a_long_name_is_cut_to_the_width():
    columns = {"a": [Image.new("RGB", (64, 64))]}
    assert draw_grid(columns, ["w" * 20_000]).size[0] == 192
