"""EIM's idea: each measure changes what it says alone, costs the same steps and no parameter, and is compared."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from trl.scripts.sft import make_parser

from lavin import LavinForConditionalGeneration
from lavin.recipes.compare.one import start_model
from lavin.recipes.compare.tiny import make_base
from lavin.recipes.eim.study import HERE, LABELS, OTHERS, rows_of, study_run
from lavin.recipes.eim.views import view, write_views
from lavin.recipes.quickstart.ablation import write_data


SIZES = {"train": (24, 12, 6, 6), "val": (1, 1, 1, 1), "test": (8, 8, 4, 4)}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A study's folder before its runs, with small data."""
    folder = tmp_path_factory.mktemp("eim")
    write_data(folder / "data-0", 0, SIZES)
    write_views(folder / "data-0" / "train.parquet", folder / "data-0" / "train-views.parquet", 0)
    make_base("lavin-tiny", folder)
    return folder


def settings(name: str, output) -> list[dict]:
    """The recipe of each segment, but for where it is written and what tells one recipe's segments from another's."""
    return study_run(name, 0, output).recipes


@pytest.mark.parametrize("name", [*LABELS, *OTHERS])
def test_all_runs_have_the_same_steps_and_batch(name, output):
    recipes = settings(name, output)
    assert sum(recipe["max_steps"] for recipe in recipes) == 150
    assert {recipe["per_device_train_batch_size"] for recipe in recipes} == {16}
    for recipe in recipes:
        make_parser().parse_dict(recipe)  # TRL knows every setting
    assert {path.stem for path in HERE.glob("*.yaml")} == {*LABELS, *OTHERS}


def test_each_measure_is_the_only_difference_to_plain_training(output):
    (plain,) = settings("plain", output)
    assert plain["model_init_kwargs"].keys() == {"mma"}
    for name in ("encoder", "language", "projector", "all"):
        *before, last = settings(name, output)
        other = {key for key in plain | last if plain.get(key) != last.get(key)} - {"output_dir"}
        views, noise, align = ("encoder", "all"), ("language", "all"), ("projector", "all")
        expected = {"datasets"} if name in views else set()
        expected |= {"neftune_noise_alpha"} if name in noise else set()
        expected |= {"max_steps", "warmup_steps", "model_name_or_path"} if name in align else set()
        assert other == expected
        assert last["datasets"][0]["data_files"]["train"].endswith("views.parquet") == (name in views)
        assert len(before) == (name in align)
        for first in before:
            assert first["model_init_kwargs"] == {"trainable": [r"multi_modal_projector\."]}
            assert first["output_dir"] == last["model_name_or_path"] and first["datasets"] == last["datasets"]


def test_no_measure_adds_a_parameter(output):
    (plain,) = settings("plain", output)
    everything = dict(start_model(plain).named_parameters())
    for name in ("encoder", "language", "all"):
        last = settings(name, output)[-1]
        base = {**last, "model_name_or_path": plain["model_name_or_path"]}
        found = {key: p.requires_grad for key, p in start_model(base).named_parameters()}
        assert found == {key: p.requires_grad for key, p in everything.items()}


def test_a_seed_is_the_rows_and_the_start(output):
    first, second = (study_run("all", seed, output) for seed in (0, 1))
    assert second.data == output / "data-1" and second.folder != first.folder
    assert [recipe["seed"] for recipe in second.recipes] == [1, 1]
    assert second.recipes[1]["model_init_kwargs"]["mma"]["init_seed"] == 1
    assert "data-1" in second.recipes[0]["datasets"][0]["data_files"]["train"]


def test_a_view_is_the_image_a_little_changed():
    image = Image.new("RGB", (64, 64), (200, 200, 200))
    image.paste((20, 20, 20), (24, 24, 40, 40))
    views = [np.asarray(view(image, random.Random(seed)), dtype=float) for seed in range(40)]
    assert all(some.shape == (64, 64, 3) for some in views)
    dark = [np.argwhere(some[..., 0] < some.max() / 2) for some in views]
    centres = np.array([places.mean(axis=0) for places in dark])
    sizes = np.array([len(places) for places in dark]) ** 0.5
    assert np.abs(centres - 31.5).max() < 7 and centres.std(axis=0).min() > 1
    assert sizes.min() > 16 * 0.85 and sizes.max() < 16 * 1.2 and sizes.std() > 0.3
    lights = np.array([some[0, 0, 0] for some in views])
    assert lights.std() > 5 and lights.min() >= 200 * 0.84 and lights.max() <= 200 * 1.16


def test_rows_with_views_are_the_same_rows(output):
    def rows(name):
        file = str(output / "data-0" / name)
        return load_dataset("parquet", data_files=file, split="train", cache_dir=str(output / "cache"))

    plain, views = rows("train.parquet"), rows("train-views.parquet")
    assert plain.features == views.features and len(plain) == len(views) == sum(SIZES["train"])
    changed = 0
    for a, b in zip(plain, views, strict=True):
        assert {**a, "images": None} == {**b, "images": None} and len(a["images"]) == len(b["images"])
        changed += any(one.tobytes() != other.tobytes() for one, other in zip(a["images"], b["images"], strict=True))
    assert changed == SIZES["train"][0] + SIZES["train"][1]


def test_the_gain_is_each_seeds_own_difference():
    def result(average):
        scores = dict.fromkeys(("drawings", "digits", "IMG", "TXT", "NO"), 50.0)
        return {"scores": {**scores, "AVG": average}, "text": {"skill": 99.0}, "cpu_seconds": 1.0}

    plain, other = [result(80.0), result(90.0)], [result(83.0), result(91.0)]
    rows = rows_of({"plain": plain, "all": other, "clipcap_plain": plain[:1], "clipcap_all": other[:1]})
    assert [row["gain, AVG"] for row in rows] == ["", "+2.0 ± 1.4", "", "+3.0"]


@pytest.mark.slow
def test_the_study_trains_segment_after_segment(output):
    command = [sys.executable, "-m", "lavin.recipes.eim", "--output", str(output), "--seeds", "1", "--max-steps", "2"]
    command += ["--only", "all"]
    result = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "2 runs, 0 of them finished before" in result.stdout and "step" in result.stderr
    report = json.loads((output / "report.json").read_text())
    assert list(report["runs"]) == ["plain", "all"]
    lines = (output / "eim.md").read_text().splitlines()
    assert len(lines) == 2 + 2 and all(line in result.stdout for line in lines) and "gain, AVG" in lines[0]

    def weights(folder):
        return LavinForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()

    base, aligned = weights(output / "lavin-tiny"), weights(output / "all-0" / "1-align")
    changed = {key for key in base if not torch.equal(base[key], aligned[key])}
    assert changed == {key for key in base if "multi_modal_projector" in key}
    # The adapter's base is what the segment before wrote, and the adapter left it as it was.
    last = weights(output / "all-0" / "2-train")
    kept = {key: last[key.replace("projector.", "projector.original_module.")] for key in changed}
    assert all(torch.equal(weight, aligned[key]) for key, weight in kept.items())
    assert any(not torch.equal(last[key], torch.zeros_like(last[key])) for key in last if "adapter_up" in key)
