"""`make tasks`: scenes whose boxes are where the things are, and both settings trained, asked and drawn."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lavin.recipes.data.captions import Captions
from lavin.recipes.data.grounding import Grounding
from lavin.recipes.evaluate.boxes import parse_box
from lavin.recipes.quickstart.world import BACKGROUNDS, COLOURS
from lavin.recipes.tasks.data import write_tasks
from lavin.recipes.tasks.scenes import draw_scene


def test_a_box_holds_its_thing_and_no_more():
    """Found again in the pixels: those that are nearest to the thing's colour, in its quarter of the image."""
    rng = random.Random("boxes")
    for _ in range(60):
        scene = draw_scene(rng)
        pixels = np.asarray(scene.image).astype(int)
        ground = np.array(BACKGROUNDS[scene.background])
        assert len({thing.phrase() for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            colour = np.array(COLOURS[thing.colour])
            near = ((pixels - colour) ** 2).sum(-1) < ((pixels - ground) ** 2).sum(-1)
            x1, y1, x2, y2 = thing.box
            left, top = 32 * ((x1 + x2) / 2 > 32), 32 * ((y1 + y2) / 2 > 32)
            down, across = np.nonzero(near[top : top + 32, left : left + 32])
            found = (across.min() + left, down.min() + top, across.max() + left + 1, down.max() + top + 1)
            assert found == pytest.approx(thing.box, abs=2.5), (thing, found)  # tips fade out


def test_files_are_of_the_published_forms_and_say_what_is_drawn(tmp_path):
    folder = write_tasks(tmp_path / "a", {"train": 12, "test": 5}, seed=3)
    again = write_tasks(tmp_path / "b", {"train": 12, "test": 5}, seed=3)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes()
    images = {split: {p.read_bytes() for p in (folder / "images" / split).iterdir()} for split in ("train", "test")}
    assert len(images["train"]) == 12 and not images["train"] & images["test"]
    asked = Captions(folder / "captions_test.json", folder / "images/test").questions()
    boxes = Grounding([folder / "grounding_test.jsonl"], folder / "images/test", 2).questions()
    assert len(asked) == 5 and all(len(question["expected"]) == 2 for question in asked)
    for question in boxes:
        caption = next(other["expected"][0] for other in asked if other["images"] == question["images"])
        assert (
            f" {question['phrase'].split(' on ')[0]}" in caption
            and question["prompt"] == f"<ref>{question['phrase']}</ref>"
        )


@pytest.mark.slow
def test_the_whole_run(tmp_path):
    """A few steps only, in a fresh process: everything is written, and says what it must; the settings differ."""
    command = [sys.executable, "-m", "lavin.recipes.tasks", "--output", tmp_path, "--max-steps", "3", "--scenes", "24"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    copied = "the most frequent caption"
    assert list(report["scores"]) == ["pool", "taps", copied] and report["scores"][copied]["IoU >= 0.5"] is None
    assert report["scores"][copied]["CIDEr"] > 0 and report["most_frequent_caption"]
    notes = json.loads((tmp_path / "data/captions_train.json").read_text())["annotations"]
    assert report["rows"] == len(notes) + len((tmp_path / "data/grounding_train.jsonl").read_text().splitlines())
    for name, tokens in (("pool", 16), ("taps", 6)):
        assert (
            json.loads((tmp_path / f"{name}-trained/processor_config.json").read_text())["num_image_tokens"] == tokens
        )
        results = json.loads((tmp_path / "eval" / name / "grounding/results.json").read_text())
        lines = (tmp_path / "eval" / name / "grounding/predictions.jsonl").read_text().splitlines()[1:]
        lost = sum(parse_box(json.loads(line)["answer"]) is None for line in lines)
        assert results["unparsable"] == report["scores"][name]["no box"] == lost
        for picture in (f"boxes-{name}.png", f"loss-{name}.png"):
            assert Image.open(tmp_path / picture).size[0] > 200
    assert (tmp_path / "report.md").read_text().count("\n") == 5 and "IoU >= 0.5" in done.stdout
