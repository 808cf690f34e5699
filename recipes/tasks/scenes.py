"""Scenes of the quickstart's things at places of their own: what a caption says and where a box lies."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..quickstart.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, KINDS, SIZES, outline


CELLS = [(16, 16), (48, 16), (16, 48), (48, 48)]  # as in the quickstart: one thing in a quarter of the image
MOST = 1  # things in a scene; to choose between two is learnt much more slowly (README.md)
MORE = 4  # drawn so many times larger and shrunk: smooth edges


@dataclass
class Thing:
    """
    One thing of a scene.

    Args:
        kind (`str`): One of `KINDS`.
        colour (`str`): A key of `COLOURS`.
        size (`str`): A key of `SIZES`.
        box (`tuple[float, float, float, float]`): Its corners x1, y1, x2, y2 in pixels.
    """

    kind: str
    colour: str
    size: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def phrase(self) -> str:
        """What it is called: no other thing of its scene is called so. Its size is to be seen."""
        return f"{self.colour} {self.kind}"


@dataclass
class Scene:
    """
    Args:
        image (`PIL.Image.Image`): 64 x 64, RGB.
        things (`list[Thing]`): In reading order: the upper ones first, from left to right.
        background (`str`): A key of `BACKGROUNDS`.
    """

    image: Image.Image
    things: list[Thing]
    background: str

    def captions(self) -> list[str]:
        """Two captions that say the same."""
        *others, last = [f"a {thing.size} {thing.phrase()}" for thing in self.things]
        said = f"{', '.join(others)} and {last}" if others else last
        return [f"It shows {said} on {self.background}.", f"{said.capitalize()} on {self.background}."]


def draw_scene(rng: random.Random) -> Scene:
    """
    Draws one thing (up to `MOST`, which differ in colour and kind), each at a random place of its own quarter.

    Args:
        rng (`random.Random`): Source of the randomness; the same gives the same scene.
    """
    cells = sorted(rng.sample(range(4), rng.randint(1, MOST)))
    background = rng.choice(list(BACKGROUNDS))
    image = Image.new("RGB", (IMAGE_SIZE * MORE, IMAGE_SIZE * MORE), _shade(BACKGROUNDS[background], rng))
    canvas, things = ImageDraw.Draw(image), []
    kinds, colours = rng.sample(KINDS, len(cells)), rng.sample(list(COLOURS), len(cells))
    for kind, colour, cell in zip(kinds, colours, cells, strict=True):
        thing = Thing(kind, colour, rng.choice(list(SIZES)))
        thing.box = _draw_thing(canvas, thing, CELLS[cell], rng)
        things.append(thing)
    return Scene(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), things, background)


def _shade(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in colour)


def _draw_thing(canvas, thing: Thing, cell: tuple[int, int], rng: random.Random) -> tuple[float, ...]:
    """Draws a thing as the quickstart does, and returns the box that holds it."""
    radius = rng.uniform(*SIZES[thing.size])
    room = max(0.0, 16 - radius * 1.1)
    x, y = (centre + rng.uniform(-room, room) for centre in cell)
    colour = _shade(COLOURS[thing.colour], rng)
    corners = [(x - radius, y - radius), (x + radius, y + radius)]
    if thing.kind not in ("circle", "ring"):
        corners = outline(thing.kind, x, y, radius, rng.uniform(-14, 14))
    points = [(a * MORE, b * MORE) for a, b in corners]
    if thing.kind == "circle":
        canvas.ellipse(points, fill=colour)
    elif thing.kind == "ring":
        canvas.ellipse(points, outline=colour, width=round(radius * 0.36 * MORE))
    else:
        canvas.polygon(points, fill=colour)
    across, down = zip(*corners, strict=True)
    return tuple(min(float(IMAGE_SIZE), max(0.0, side)) for side in (min(across), min(down), max(across), max(down)))
