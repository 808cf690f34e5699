"""Boxes as text: written, read, compared, and drawn on their images."""

import math
import os
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .answers import read_image


NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
BETWEEN = r"(?:[\s,;()\[\]{}]|<[^<>\d]*>)+"  # what may stand between two coordinates: brackets, commas, tags
NUMBERS = re.compile(rf"(?<![\w.+-]){NUMBER}(?:{BETWEEN}{NUMBER})*(?![\w%]|\.\d)")
SLACK = 0.01  # a coordinate so far outside of the image is a matter of rounding
TRUTH, ANSWER = (0, 170, 70), (220, 30, 30)
SHOWN, COLUMNS, TILE = 24, 6, 200  # pictures of a sheet, in a row, and their longer side in pixels


def box_text(box: tuple[float, float, float, float], decimals: int = 3) -> str:
    """
    A box as LaVIN writes it: `"(0.012,0.501),(0.250,1.000)"`, the corners above on the left and below on the right.

    Args:
        box (`tuple`): x1, y1, x2, y2, relative to the image, in [0, 1].
        decimals (`int`, *optional*, defaults to 3): Digits after the point.
    """
    x1, y1, x2, y2 = (f"{min(1.0, max(0.0, value)):.{decimals}f}" for value in box)
    return f"({x1},{y1}),({x2},{y2})"


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """
    Reads the box of an answer. Numbers with nothing but brackets, commas, spaces or tags between them belong together;
    the first such group of four, or of several fours, is taken, and its first four are the box.

    Corners may come in any order. A coordinate outside of [0, 1] by no more than 0.01 is moved to the border; further
    out it is no coordinate (pixels, say), and there is no box.

    Args:
        text (`str`): What a model has answered.

    Returns:
        `tuple`: x1 <= x2, y1 <= y2 in the order x1, y1, x2, y2; `None` where there is no box.
    """
    for found in NUMBERS.finditer(text):
        values = [float(number) for number in re.findall(NUMBER, re.sub(r"<[^<>\d]*>", " ", found[0]))]
        if len(values) % 4 == 0:
            break
    else:
        return None
    if any(not -SLACK <= value <= 1 + SLACK for value in values[:4]):
        return None
    xa, ya, xb, yb = (min(1.0, max(0.0, value)) for value in values[:4])
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def iou(a: tuple[float, float, float, float] | None, b: tuple[float, float, float, float] | None) -> float:
    """Intersection over union of two boxes; 0 where one is missing or both are empty."""
    if a is None or b is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both
    return both / either if either > 0 else 0.0


def draw_boxes(items: list[dict], path: str | os.PathLike, most: int = SHOWN) -> Path:
    """
    A sheet of pictures: the box that was wanted in green, the one that was answered in red, and their IoU.

    Args:
        items (`list[dict]`): Each with `image` (`PIL.Image.Image`, bytes or path), `phrase`, `truth` and `box` (as
            [`parse_box`] gives them; `box` may be `None`).
        path (`str` or `os.PathLike`): The PNG.
        most (`int`, *optional*, defaults to 24): So many are drawn, evenly chosen.

    Returns:
        `Path`: the PNG.
    """
    chosen = [items[i * len(items) // min(most, len(items))] for i in range(min(most, len(items)))]
    columns = min(COLUMNS, len(chosen))
    rows, height = math.ceil(len(chosen) / columns), TILE + 46
    sheet = Image.new("RGB", (columns * (TILE + 8) + 8, rows * height + 34), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    canvas.text((8, 8), "wanted", TRUTH, font)
    canvas.text((68, 8), "answered", ANSWER, font)
    canvas.text((140, 8), f"{len(chosen)} of {len(items)}", "black", font)
    for number, item in enumerate(chosen):
        left, top = 8 + number % columns * (TILE + 8), 30 + number // columns * height
        picture = read_image(item["image"])
        scale = TILE / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        sheet.paste(picture.resize(size), (left, top))
        for box, colour in ((item["truth"], TRUTH), (item["box"], ANSWER)):
            if box is not None:
                corners = [left + box[0] * size[0], top + box[1] * size[1], left + box[2] * size[0],
                           top + box[3] * size[1]]  # fmt: skip
                canvas.rectangle(corners, outline=colour, width=2)
        said = "no box" if item["box"] is None else f"IoU {iou(item['truth'], item['box']):.2f}"
        phrase = " ".join(item["phrase"].split())  # one line
        phrase = phrase.encode("latin-1", "replace").decode("latin-1")  # what the font has
        while canvas.textlength(phrase, font) > TILE:
            phrase = phrase[:-4] + "..."
        canvas.text((left, top + TILE + 4), phrase, "black", font)
        canvas.text((left, top + TILE + 20), said, ANSWER if said == "no box" else "black", font)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
