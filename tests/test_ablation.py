"""The ablation: each row trains what it says, "no router" is one expert, a stopped ablation goes on."""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import batch, tiny_lavin
from datasets import load_dataset
from peft import get_peft_model

from lavin import LavinForConditionalGeneration, LavinProcessor, MMAConfig
from lavin.adapters_lavin import MMAUp
from lavin.recipes.quickstart import ablation
from lavin.recipes.quickstart.ablation import LABELS, ROWS, count_acting, run_recipe, write_data
from lavin.recipes.quickstart.evaluate import load_questions
from lavin.recipes.quickstart.quickstart import make_model


SIZES = {"train": (24, 12, 6, 6), "val": (1, 1, 1, 1), "test": (8, 8, 4, 4)}
LANGUAGE = {"language_model adapter_down", "language_model adapter_up"}
VISION = {"vision_tower adapter_down", "vision_tower adapter_up"}
ROUTER = {"language_model adapter_router", "vision_tower adapter_router", "modality_embedding"}
ACTING = {
    "text": LANGUAGE,
    "image": LANGUAGE | {"multi_modal_projector"},
    "vision": LANGUAGE | {"multi_modal_projector"} | VISION,
    "router": LANGUAGE | {"multi_modal_projector"} | VISION | ROUTER,
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """An ablation's folder before its runs: a small data set, and the tiny pair joined."""
    folder = tmp_path_factory.mktemp("ablation")
    write_data(folder / "data-0", 0, SIZES)
    make_model(folder / "lavin-tiny")
    return folder


def part(name: str) -> str:
    """The part of the model that a weight belongs to."""
    found = re.search(r"multi_modal_projector|modality_embedding|(language_model|vision_tower).*(adapter_\w+)", name)
    assert found, name
    return " ".join(found.groups()) if found.group(1) else found.group()


def step(model, inputs, optimizer, ignored: int | None = None):
    labels = inputs["input_ids"]
    labels = labels.masked_fill((labels == model.config.image_token_id) | (labels == ignored), -100)
    loss = model(**inputs, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("row", ROWS)
def test_each_row_trains_what_it_says(output, tmp_path, row):
    """Also those weights that are in the file but cannot act (a router at the temperature of "no router") stay."""
    base = LavinForConditionalGeneration.from_pretrained(output / "lavin-tiny", dtype=torch.float32)
    frozen = {name: weight.clone() for name, weight in base.state_dict().items()}
    settings = run_recipe(row, 0, output)["model_init_kwargs"]["mma"]
    model = LavinForConditionalGeneration.from_pretrained(output / "lavin-tiny", dtype=torch.float32, mma=settings)
    processor = LavinProcessor.from_pretrained(output / "lavin-tiny")
    questions = load_questions(output / "data-0")[:12]
    images = [[] if row == "text" or question["image"] is None else [question["image"]] for question in questions]
    assert any(not some for some in images) and (row == "text" or any(images))
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * len(some) + [{"type": "text", "text": q["prompt"]}]}],
            add_generation_prompt=True,
        )
        for q, some in zip(questions, images, strict=True)
    ]
    inputs = processor(
        text=prompts, images=images if any(images) else None, padding=True, return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=6e-3, weight_decay=0.0)
    for _ in range(4):
        step(model.train(), inputs, optimizer, processor.tokenizer.pad_token_id)
    changed = {name: weight for name, weight in trained.items() if not torch.equal(weight, before[name])}
    assert {part(name) for name in changed} == ACTING[row]
    after = dict(model.get_base_model().named_parameters())
    kept = {name: weight for name, weight in frozen.items() if name in after}
    assert len(kept) > 50 and all(torch.equal(after[name], weight) for name, weight in kept.items())
    # Without a router both experts stay one, to the bit.
    experts = [name for name in trained if part(name) == "language_model adapter_up"]
    equal = [torch.equal(*trained[name]) for name in experts]
    assert len(equal) == 8 and all(equal) == any(equal) == (row != "router")
    table = model.get_base_model().eval().routing_table()
    assert bool((table == 0.5).all()) == (row != "router")
    assert any("vision_tower" in name and "adapter_router" in name for name in trained) == (row == "router")
    # What the table counts as trained is what acts.
    model.save_pretrained(tmp_path)
    acting = sum(w.numel() // (2 if row != "router" and name in experts else 1) for name, w in changed.items())
    assert count_acting(tmp_path / "mma" / "adapter_model.safetensors", row) == acting


def one_expert(model):
    """Rebuilds the language model's adapters with a single expert and no router at all."""
    for layer in model.model.routing.layers:
        del layer.adapter_router["mma"]
        layer.adapter_up["mma"] = MMAUp(layer.features, 8, 2, 1).to_empty(device="cpu")
        for weight in layer.adapter_up["mma"].parameters():
            torch.nn.init.zeros_(weight)
    model.model.routing.layers.clear()
    return model


def test_no_router_equals_one_expert():
    losses = []
    for rebuild in (lambda model: model, one_expert):
        model = tiny_lavin(adapter=False)
        config = MMAConfig(**ROWS["image"], dropout=0.0)
        model = rebuild(get_peft_model(model, config, adapter_name="mma").get_base_model()).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-3, weight_decay=0.0)
        losses.append([step(model, batch(model.config, (1, 0, 1), seed=i % 3), optimizer) for i in range(30)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.5, "it does not learn, so equal losses would show nothing"


def test_the_text_row_is_told_that_there_is_no_image(output):
    file = str(output / "data-0" / "train-text.parquet")
    rows = load_dataset("parquet", data_files=file, split="train", cache_dir=str(output / "cache"))
    processor = LavinProcessor.from_pretrained(output / "lavin-tiny")
    assert len(rows) == sum(SIZES["train"])
    for row in rows:
        assert row["images"] == []
        assert "Image: N/A" in processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    assert run_recipe("text", 0, output)["datasets"][0]["data_files"]["train"] == file
    assert run_recipe("image", 0, output)["datasets"][0]["data_files"]["train"].endswith("data-0/train.parquet")


def test_the_last_row_is_the_quickstarts_recipe_and_seeds_are_seeds(output):
    recipe, other = run_recipe("router", 0, output), run_recipe("router", 1, output)
    mma = recipe["model_init_kwargs"]["mma"]
    assert mma.pop("init_seed") == 0 and mma["router_temperature"] == 10 and "target_modules" not in mma
    assert other["seed"] == 1 and other["model_init_kwargs"]["mma"]["init_seed"] == 1
    assert "data-1" in other["datasets"][0]["data_files"]["train"]


def test_a_run_that_fails_is_shown_and_stops_the_others(tmp_path, monkeypatch):
    started = []

    def start(row, seed, output, max_steps):
        code = "import time; time.sleep(60)" if started else "print('no space left'); raise SystemExit(3)"
        (tmp_path / f"{row}-{seed}").mkdir()
        with open(tmp_path / f"{row}-{seed}" / "log.txt", "wb") as log:
            started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log))
        return started[-1]

    monkeypatch.setattr(ablation, "start_run", start)
    with pytest.raises(RuntimeError, match="(?s)text, seed 0.*no space left.*log.txt"):
        ablation.run_all([("text", 0), ("image", 0), ("vision", 0)], tmp_path)
    assert len(started) == 2 and started[1].stdin.closed
    started[1].kill()


@pytest.mark.slow
def test_a_killed_ablation_goes_on(output):
    """The real command, killed after its first run, leaves no process behind and does not repeat that run."""
    command = [sys.executable, "-m", "lavin.recipes.quickstart.ablation", "--output", str(output)]
    command += ["--seeds", "1", "--max-steps", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(output.glob("*/scores.json")):
        assert first.poll() is None, "it ended without a result"
        time.sleep(0.1)
    time.sleep(2)  # the next run begins
    below = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert below and not psutil.wait_procs(below, timeout=30)[1]
    times = {path: path.stat().st_mtime_ns for path in output.glob("*/scores.json")}
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    assert f"4 runs of 2 steps, {len(times)} of them finished before" in second.stdout
    assert "step" in second.stderr and "100%" in second.stderr
    report = json.loads((output / "report.json").read_text())
    assert [result["row"] for result in report["runs"]] == list(ROWS)
    for result in report["runs"]:
        scores = result["scores"]
        assert {"drawings", "digits", "IMG", "TXT", "NO", "AVG"} <= scores.keys()
        assert scores["IMG"] == pytest.approx((scores["drawings"] + scores["digits"]) / 2, abs=0.01)
        assert f"| {LABELS[result['row']]} | {result['trained']:,} | {scores['drawings']:.1f} |" in second.stdout
    assert (output / "ablation.png").read_bytes()[:4] == b"\x89PNG"
