"""Writes scenes in two published forms: COCO's captions, and Qwen-VL's JSON Lines of phrases and boxes."""

import json
import random
from pathlib import Path

from ..quickstart.world import IMAGE_SIZE
from .scenes import draw_scene


SIZES = {"train": 4000, "test": 300}  # scenes


def write_tasks(folder: str | Path, sizes: dict[str, int] | None = None, seed: int = 0) -> Path:
    """
    Writes a data set of each task on the same scenes. The same seed gives the same files.

    Args:
        folder (`str` or `Path`): Where `captions_<split>.json`, `grounding_<split>.jsonl` and `images/<split>/` are
            written. Each scene has two captions, and a phrase and box for each of its things.
        sizes (`dict[str, int]`, *optional*, defaults to `SIZES`): Scenes of each split; none is in two of them.
        seed (`int`, *optional*, defaults to 0): Seed of everything that is drawn.

    Returns:
        `Path`: the folder.
    """
    folder = Path(folder)
    for split, number in (sizes or SIZES).items():
        rng = random.Random(f"tasks {split} {seed}")
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        images, captions, phrases = [], [], []
        for index in range(number):
            scene, name = draw_scene(rng), f"{index:06}.png"
            scene.image.save(folder / "images" / split / name)
            images.append({"id": index, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE})
            for text in scene.captions():
                captions.append({"id": len(captions), "image_id": index, "caption": text})
            for thing in scene.things:
                box = [round(side, 2) for side in thing.box]
                # Its words stand alone, so that the tiny tokenizer knows them; the last one touches InfMLLM's tag.
                sent = f"{thing.phrase()} on {scene.background}"
                phrases.append({"image": name, "sent": sent, "bbox": box, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        content = {"images": images, "annotations": captions}
        (folder / f"captions_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        lines = "".join(json.dumps(phrase) + "\n" for phrase in phrases)
        (folder / f"grounding_{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder
