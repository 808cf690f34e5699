"""The encoder's measure: every training image a little moved, resized and lit otherwise."""

import random
from pathlib import Path

from datasets import Image as ImageColumn
from datasets import List, load_dataset
from PIL import Image, ImageEnhance

from lavin.images_lavin import read_image


SHIFT, ZOOM, LIGHT = 4, 0.1, 0.15  # at most: of 64 pixels, of the size, of the brightness


def view(image: Image.Image, rng: random.Random) -> Image.Image:
    """
    A random view of an image: shifted, zoomed and lit otherwise; the margin gets the colour of the first pixel. Never
    mirrored or turned: a digit would become another.

    Args:
        image (`PIL.Image.Image`): An RGB image.
        rng (`random.Random`): Source of the randomness.

    Returns:
        `PIL.Image.Image`: of the same size.
    """
    width, height = image.size
    zoom = 1 + rng.uniform(-ZOOM, ZOOM)
    x = width / 2 * (1 - zoom) + rng.uniform(-SHIFT, SHIFT) * width / 64
    y = height / 2 * (1 - zoom) + rng.uniform(-SHIFT, SHIFT) * height / 64
    moved = image.transform(
        image.size, Image.Transform.AFFINE, (zoom, 0, x, 0, zoom, y), Image.Resampling.BICUBIC,
        fillcolor=image.getpixel((0, 0)),
    )  # fmt: skip
    return ImageEnhance.Brightness(moved).enhance(1 + rng.uniform(-LIGHT, LIGHT))


def write_views(source: Path, target: Path, seed: int):
    """
    Copies rows for `trl sft` with a view in place of every image.

    Args:
        source (`Path`): A Parquet file with a column `images`.
        target (`Path`): The file to write.
        seed (`int`): Of the views.
    """
    rng = random.Random(f"views {seed}")
    rows = load_dataset("parquet", data_files=str(source), split="train", cache_dir=str(target.parent / "cache"))
    rows = rows.map(
        lambda row: {"images": [view(read_image(image), rng) for image in row["images"]]},
        features=rows.features, desc="views", load_from_cache_file=False,
    )  # fmt: skip
    unfinished = target.with_name(target.name + ".part")
    rows.cast_column("images", List(ImageColumn())).to_parquet(unfinished)
    unfinished.rename(target)
