"""The small world of the quickstart: drawings, real handwritten digits, and questions about them and about text."""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


IMAGE_SIZE = 64

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (242, 205, 30),
    "purple": (142, 56, 180),
    "orange": (242, 130, 24),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (150, 150, 150), "black": (16, 16, 16)}
KINDS = ["circle", "square", "triangle", "star", "ring", "cross"]
SIZES = {"small": (6.0, 8.0), "large": (11.5, 14.5)}
COUNTS = ["one", "two", "three", "four"]
DIGITS = [str(digit) for digit in range(10)]

ATTRIBUTES = {
    "background": list(BACKGROUNDS),
    "colour": list(COLOURS),
    "size": list(SIZES),
    "count": COUNTS,
    "kind": KINDS,
    "digit": DIGITS,
}
QUESTIONS = {
    "background": ["What is the background?", "Which background is there?"],
    "colour": ["What colour is shown?", "Which colour is there?"],
    "size": ["What size is shown?", "How large is it?"],
    "count": ["What count is shown?", "How many are there?"],
    "kind": ["What shape is shown?", "Which shape is there?"],
    "digit": ["Which digit is shown?", "What digit is there?"],
}
OPPOSITES = [("small", "large"), ("hot", "cold"), ("day", "night"), ("up", "down"), ("young", "old"), ("wet", "dry"),
             ("fast", "slow"), ("open", "shut")]  # fmt: skip
SOUNDS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "horse": "neigh", "owl": "hoot",
          "bee": "buzz"}  # fmt: skip
NAMES = ["Ann", "Tom", "Eva", "Ben"]


@dataclass
class Drawing:
    """
    What is to be seen on a drawing.

    Args:
        kind (`str`): One of `KINDS`.
        colour (`str`): A key of `COLOURS`.
        size (`str`): A key of `SIZES`.
        count (`str`): One of `COUNTS`, as a word.
        background (`str`): A key of `BACKGROUNDS`.
    """

    kind: str
    colour: str
    size: str
    count: str
    background: str

    @classmethod
    def sample(cls, rng: random.Random) -> "Drawing":
        """Draws every attribute evenly and independently."""
        return cls(**{field: rng.choice(ATTRIBUTES[field]) for field in cls.__dataclass_fields__})

    def describe(self) -> str:
        """Returns one sentence that names every attribute."""
        plural = "" if self.count == "one" else ("es" if self.kind == "cross" else "s")
        return f"It shows {self.count} {self.size} {self.colour} {self.kind}{plural} on {self.background}."


def outline(kind: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a polygon; star and cross alternate between an outer and an inner radius."""
    if kind == "square":
        polar = [(1.1, 45 + 90 * k) for k in range(4)]
    elif kind == "triangle":
        polar = [(1.15, 120 * k - 90) for k in range(3)]
    elif kind == "star":
        polar = [(1.15 if k % 2 == 0 else 0.45, 36 * k - 90) for k in range(10)]
    else:  # a cross: arms of half-width 0.3
        arm = math.degrees(math.atan2(0.3, 1.0))
        corners = [(1.04, -arm), (1.04, arm), (0.42, 45)]
        polar = [(r, a + 90 * k) for k in range(4) for r, a in corners]
    return [
        (x + radius * r * math.cos(math.radians(a + angle)), y + radius * r * math.sin(math.radians(a + angle)))
        for r, a in polar
    ]


def draw(drawing: Drawing, rng: random.Random, size: int = IMAGE_SIZE) -> Image.Image:
    """
    Renders a drawing at random places, with a little jitter of colour, size and angle.

    Args:
        drawing ([`Drawing`]): What to draw.
        rng (`random.Random`): Source of the randomness.
        size (`int`, *optional*, defaults to 64): Width and height in pixels.

    Returns:
        `PIL.Image.Image`: an RGB image.
    """
    scale = 4  # drawn larger and shrunk: smooth edges
    unit = size * scale / IMAGE_SIZE

    def shade(colour: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in colour)

    ground = shade(BACKGROUNDS[drawing.background])
    image = Image.new("RGB", (size * scale, size * scale), ground)
    canvas = ImageDraw.Draw(image)
    number = COUNTS.index(drawing.count) + 1
    cells = rng.sample([(16, 16), (48, 16), (16, 48), (48, 48)], number)
    colour = shade(COLOURS[drawing.colour])
    for cx, cy in cells:
        radius = rng.uniform(*SIZES[drawing.size])
        room = max(0.0, 16 - radius * 1.1)
        x, y = cx + rng.uniform(-room, room), cy + rng.uniform(-room, room)
        box = [(x - radius) * unit, (y - radius) * unit, (x + radius) * unit, (y + radius) * unit]
        if drawing.kind == "circle":
            canvas.ellipse(box, fill=colour)
        elif drawing.kind == "ring":
            canvas.ellipse(box, outline=colour, width=round(radius * 0.36 * unit))
        else:
            corners = outline(drawing.kind, x, y, radius, rng.uniform(-14, 14))
            canvas.polygon([(a * unit, b * unit) for a, b in corners], fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's 1,797 real handwritten digits: scans `(1797, 8, 8)` in 0..16 and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def split_scans(seed: int = 0) -> dict[str, np.ndarray]:
    """Splits the scans' indices into `train` (1,197), `val` (260) and `test` (340), always alike for one seed."""
    order = np.random.default_rng(seed).permutation(1797)
    return {"test": order[:340], "val": order[340:600], "train": order[600:]}


def render_scan(scan: np.ndarray, size: int = IMAGE_SIZE) -> Image.Image:
    """Renders an 8x8 scan as dark ink on light paper, enlarged bicubically to `size` x `size`, RGB."""
    ink = Image.fromarray((255 - np.clip(scan / 16, 0, 1) * 235).astype(np.uint8))
    return ink.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def pick_choices(answer: str, others: list[str], rng: random.Random, most: int = 4) -> tuple[list[str], int]:
    """Returns 2 to `most` shuffled choices with `answer` among them, and its index."""
    others = [other for other in others if other != answer]
    choices = [answer] + rng.sample(others, min(len(others), rng.randint(1, most - 1)))
    rng.shuffle(choices)
    return choices, choices.index(answer)


def make_problem(question: str, answer: str, others: list[str], solution: str, rng: random.Random, **fields) -> dict:
    """Returns one question as a record of ScienceQA's `problems.json` (image and split are filled in later)."""
    choices, index = pick_choices(answer, others, rng)
    record = {"question": question, "choices": choices, "answer": index, "hint": "", "image": None,
              "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "quickstart",
              "category": "", "skill": "", "lecture": "", "solution": solution}  # fmt: skip
    return {**record, **fields}


def drawing_problem(drawing: Drawing, rng: random.Random) -> dict:
    """Asks for one attribute of a drawing."""
    attribute = rng.choice(["background", "colour", "size", "count", "kind"])
    return make_problem(
        rng.choice(QUESTIONS[attribute]), getattr(drawing, attribute), ATTRIBUTES[attribute], drawing.describe(), rng,
        category="drawing", skill=attribute,
    )  # fmt: skip


def digit_problem(digit: int, rng: random.Random) -> dict:
    """Asks which digit a scan shows."""
    return make_problem(
        rng.choice(QUESTIONS["digit"]), DIGITS[digit], DIGITS, f"It shows the digit {digit}.", rng,
        category="digit", skill="digit",
    )  # fmt: skip


def context_problem(rng: random.Random) -> dict:
    """A question without image whose answer stands in the hint (TXT)."""
    if rng.random() < 0.25:
        first, second = rng.sample(DIGITS, 2)
        name, other = rng.sample(NAMES, 2)
        facts = [(name, first), (other, second)]
        rng.shuffle(facts)
        hint = " ".join(f"{who} writes {what}." for who, what in facts)
        return make_problem(f"What does {name} write?", first, DIGITS, f"{name} writes {first}.", rng, hint=hint,
                            category="text", skill="names")  # fmt: skip
    drawing = Drawing.sample(rng)
    problem = drawing_problem(drawing, rng)
    return {**problem, "hint": drawing.describe(), "category": "text"}


def knowledge_problem(rng: random.Random) -> dict:
    """A question with neither image nor hint (NO)."""
    topic = rng.choice(["sound", "opposite", "after", "before", "sort"])
    if topic == "sound":
        animal, sound = rng.choice(list(SOUNDS.items()))
        parts = f"Which animal says {sound}?", animal, list(SOUNDS), f"The {animal} says {sound}."
    elif topic == "opposite":
        pair = rng.choice(OPPOSITES)
        word, other = rng.sample(pair, 2)
        words = [entry for both in OPPOSITES for entry in both if entry not in pair]
        parts = f"What is the opposite of {word}?", other, words, f"The opposite of {word} is {other}."
    elif topic == "sort":
        sort = rng.choice(["colour", "shape", "animal", "digit"])
        sorts = {"colour": list(COLOURS), "shape": KINDS, "animal": list(SOUNDS), "digit": DIGITS}
        word = rng.choice(sorts.pop(sort))
        article = "an" if sort == "animal" else "a"
        others = sum(sorts.values(), [])
        parts = f"Which word names {article} {sort}?", word, others, f"{word} names {article} {sort}."
    else:
        digit = rng.randint(1, 8)
        answer = str(digit + 1 if topic == "after" else digit - 1)
        others = [other for other in DIGITS if other != str(digit)]
        parts = f"Which digit comes {topic} {digit}?", answer, others, f"The digit {topic} {digit} is {answer}."
    return make_problem(*parts, rng, category="text", skill=topic)
