"""What the recipes name: the quickstart's questions, its tiny pair, and that pair's tower with a GPT-2."""

import shutil
from pathlib import Path

from ..init import init_folder
from ..quickstart.ablation import write_data
from ..quickstart.data import SIZES
from ..quickstart.quickstart import TAPS, TINY
from .gpt2 import make_gpt2


PAIR, GPT2_PAIR = "lavin-tiny", "lavin-gpt2"
SEARCH_SEED = 100  # of the rows on which learning rates are looked for: none of the comparison's own
SEARCH_SIZES = {"train": SIZES["train"], "val": (160, 160, 80, 80)}


def make_base(name: str, output: Path):
    """
    Writes a light folder that recipes name, where it is not yet.

    Args:
        name (`str`): `"lavin-tiny"`, or `"lavin-gpt2"`, for which a GPT-2 is trained first (some 5 minutes).
        output (`Path`): The comparison's folder.
    """
    folder, text = output / name, TINY / "text"
    if folder.exists():
        return
    if name == GPT2_PAIR:
        text = output / "gpt2"
        if not text.exists():
            print(f"Training the tiny GPT-2 of {GPT2_PAIR}, once: some 5 minutes", flush=True)
            unfinished = output / "gpt2.part"
            shutil.rmtree(unfinished, ignore_errors=True)
            print(f"letters right: {make_gpt2(unfinished, TINY / 'text')}", flush=True)
            unfinished.rename(text)
    unfinished = folder.with_name(f"{name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    init_folder(TINY / "vision", text, unfinished, vision_feature_layers=TAPS)
    unfinished.rename(folder)


def make_data(output: Path, seed: int, search: bool = False) -> Path:
    """One seed's questions, where they are not yet, and their folder."""
    folder = output / ("data-search" if search else f"data-{seed}")
    write_data(folder, SEARCH_SEED if search else seed, SEARCH_SIZES if search else None)
    return folder
