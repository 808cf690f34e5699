"""Boxes as text: written, read without misreading, compared, drawn."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lavin.recipes.evaluate.boxes import ANSWER, TRUTH, box_text, draw_boxes, iou, parse_box


@pytest.mark.parametrize(
    "text, box",
    [
        ("(0.012,0.501),(0.250,1.000)", (0.012, 0.501, 0.25, 1.0)),  # 0.012 is not 12
        ("[0.5012, 0.012, 0.75, 0.9]", (0.5012, 0.012, 0.75, 0.9)),
        ("[0, 0, 1, 1]", (0, 0, 1, 1)),
        ("[0., .25, 1., 1.0]", (0, 0.25, 1, 1)),
        ("0.1 0.2 0.3 0.4", (0.1, 0.2, 0.3, 0.4)),
        ("The box is <box>(0.1,0.2),(0.3,0.4)</box>.", (0.1, 0.2, 0.3, 0.4)),
        ("It is at [0.1, 0.2, 0.3, 0.4].", (0.1, 0.2, 0.3, 0.4)),
        ("(0.3,0.4),(0.1,0.2)", (0.1, 0.2, 0.3, 0.4)),  # corners in another order
        ("(0.3,0.2),(0.1,0.4)", (0.1, 0.2, 0.3, 0.4)),
        ("[-0.005, 0.2, 0.3, 1.005]", (0, 0.2, 0.3, 1)),  # rounding
        ("There are 2 dogs: (0.1,0.2),(0.3,0.4) and (0.5,0.6),(0.7,0.8)", (0.1, 0.2, 0.3, 0.4)),  # the first
        ("[[0.1,0.2,0.3,0.4],[0.5,0.6,0.7,0.8]]", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.1, 0.4]", (0.1, 0.2, 0.1, 0.4)),  # empty, but a box
        ("[0.1, 0.2, 0.3, 1.2]", None),  # out of range
        ("[10, 20, 30, 40]", None),  # pixels
        ("[0.1, 0.2, 0.3]", None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
        ("0.1x0.2, 0.3x0.4", None),
        ("10%, 20%, 30%, 40%", None),
        ("1.2.3.4, 0.1, 0.2, 0.3", None),
        ("I see no such thing.", None),
        ("", None),
    ],
)
def test_what_is_read(text, box):
    assert parse_box(text) == (None if box is None else pytest.approx(box))


share = st.floats(0, 1)


@given(st.tuples(share, share, share, share), st.integers(1, 6), st.sampled_from(["{}", "It is {}.", "<box>{}</box>"]))
@example((1.0, 0.0, 0.0, 1.0), 1, "{}")
def test_what_is_written_is_read(corners, decimals, sentence):
    found = parse_box(sentence.format(box_text(corners, decimals)))
    xs, ys = sorted(corners[::2]), sorted(corners[1::2])
    assert found == pytest.approx((xs[0], ys[0], xs[1], ys[1]), abs=0.51 * 10**-decimals)


def test_the_form_of_a_box():
    assert box_text((0.0123, 0.50149, 1.2, -0.1)) == "(0.012,0.501),(1.000,0.000)"
    assert box_text((0.014, 0.5, 0.996, 1), 2) == "(0.01,0.50),(1.00,1.00)"


def test_intersection_over_union():
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0  # they touch
    assert iou((0, 0, 0.4, 0.4), (0.2, 0.2, 0.6, 0.6)) == pytest.approx(0.04 / (0.16 + 0.16 - 0.04))
    assert iou((0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75)) == pytest.approx(0.25)  # one in the other
    assert iou((0, 0, 0.5, 1), None) == iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0


def test_boxes_are_drawn_on_their_images(tmp_path):
    """Of a picture twice as wide as high, each edge is where it must be, in its colour."""
    items = [
        {"image": Image.new("RGB", (80, 40), "white"), "phrase": "a very long phrase about the red thing " * 3,
         "truth": (0.25, 0.5, 0.75, 1.0), "box": box} for box in ((0.0, 0.0, 0.5, 0.25), None)
    ]  # fmt: skip
    sheet = Image.open(draw_boxes(items, tmp_path / "new" / "boxes.png")).convert("RGB")
    left, top, width, height = 8, 30, 200, 100
    for column in (0, 1):
        at = left + column * 208
        assert sheet.getpixel((at + 50, top + 75)) == sheet.getpixel((at + 150, top + 75)) == TRUTH
        drawn = [sheet.getpixel((at + 75, top + height // 4)), sheet.getpixel((at + 100, top + 10))]
        assert drawn == ([ANSWER, ANSWER] if column == 0 else [(255, 255, 255)] * 2)
    assert sheet.size == (2 * 208 + 8, 246 + 34) and width == 200
    many = draw_boxes(items * 40, tmp_path / "many.png", most=24)
    assert Image.open(many).size == (6 * 208 + 8, 4 * 246 + 34)
