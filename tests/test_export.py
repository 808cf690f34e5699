"""`lavin export`: plain checkpoints that load and answer where LaVIN is not installed."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import difference, fill
from PIL import Image
from test_folders import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.recipes.export import compare, export_folder


QUESTION = "What is this?"


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """A light folder with a filled adapter."""
    folder = tmp_path_factory.mktemp("trained")
    names = str(pair / "vision"), str(pair / "text")
    light = LavinForConditionalGeneration.from_vision_text_pretrained(*names)
    light.save_pretrained(folder / "light", full=False)
    LavinProcessor.from_vision_text_pretrained(*names).save_pretrained(folder / "light")
    peft = fill(LavinForConditionalGeneration.from_pretrained(folder / "light", mma={}))
    peft.save_pretrained(folder / "trained")
    LavinProcessor.from_vision_text_pretrained(*names).save_pretrained(folder / "trained")
    return folder / "trained"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    return folder, export_folder(trained, folder)


def test_differences_are_measured_and_in_the_cards(exported):
    folder, measured = exported
    for modality, found in measured.items():
        assert found["largest_difference"] < 1e-4 * found["largest_logit"] and found["same_next_token"] == 1
        card = (folder / modality / "README.md").read_text()
        assert f"{found['largest_difference']:.2g}" in card and f"{found['positions']} positions" in card


def test_the_other_modality_differs(exported, trained):
    """The measurement itself sees a wrong fold."""
    folder, measured = exported
    model = LavinForConditionalGeneration.from_pretrained(trained).eval()
    processor = LavinProcessor.from_pretrained(trained)
    wrong = compare(model, processor, folder / "image", "text")
    assert wrong["largest_difference"] > 100 * measured["text"]["largest_difference"]


@pytest.mark.slow
def test_cards_run_where_lavin_is_not_installed(exported, trained, tmp_path):
    folder, _ = exported
    Image.new("RGB", (40, 20), (200, 30, 30)).save(tmp_path / "picture.png")
    model = LavinForConditionalGeneration.from_pretrained(trained).eval()
    processor = LavinProcessor.from_pretrained(trained)
    for modality in ("text", "image"):
        card = (folder / modality / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", card, flags=re.S)[1].replace("FOLDER", str(folder / modality))
        assert "output" in code
        run(f"import os\nos.chdir({str(tmp_path)!r})\n{code}\nimport torch\ntorch.save(output, 'output.pt')")
        found = torch.load(tmp_path / "output.pt")
        question = QUESTION if modality == "image" else "Name the largest planet."
        content = [{"type": "text", "text": question}]
        images = [Image.open(tmp_path / "picture.png")] if modality == "image" else []
        content = [{"type": "image"}] * len(images) + content
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(
            text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
        expected = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert found[0].tolist()[-len(expected) :] == expected.tolist()


def test_text_side_knows_no_image_token(exported, trained):
    folder, _ = exported
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    plain = AutoModelForCausalLM.from_pretrained(folder / "text")
    ids = tokenizer("look: <image> there", add_special_tokens=False).input_ids
    assert max(ids) < plain.config.vocab_size
    processor = LavinProcessor.from_pretrained(trained)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == processor.apply_chat_template(messages)
    with pytest.raises(Exception, match="folded for text"):
        content = [{"type": "image"}, {"type": "text", "text": "Who?"}]
        tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_image_side_takes_several_images_and_refuses_none(exported, trained):
    from lavin.recipes.prompt_embeds import load_image_side, prompt_embeds

    folder, _ = exported
    side = load_image_side(folder / "image")
    processor = LavinProcessor.from_pretrained(trained)
    model = LavinForConditionalGeneration.from_pretrained(trained).eval()
    images = [Image.new("RGB", (9, 9), color) for color in ("red", "blue", "green")]
    embeds = prompt_embeds(side, QUESTION, images)
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output.flatten(0, 1)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * 3 + [{"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    ids = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert len(ids) == len(embeds)
    assert difference(embeds[ids == processor.image_token_id], expected) < 1e-5
    with pytest.raises(ValueError, match="send text to the text side"):
        prompt_embeds(side, QUESTION, [])


def test_a_chat_template_of_another_is_refused_before_anything_is_written(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "trained")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ValueError, match="chat template is not LaVIN's"):
        export_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_commands(trained, tmp_path):
    lavin = [sys.executable, "-m", "lavin.recipes.cli", "export", str(trained)]
    done = subprocess.run(
        [*lavin, "--modality", "image", "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout and not (tmp_path / "out" / "text").exists()
    assert json.loads((tmp_path / "out" / "image" / "config.json").read_text())["attention_bias"] is True
    again = subprocess.run([*lavin, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert again.returncode == 2 and "holds something else" in again.stderr
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    run(
        f"""
        import runpy
        sys.argv = ["prompt_embeds.py", {str(tmp_path / "out" / "image")!r}, "What is this?",
                    "--image", {str(tmp_path / "a.png")!r}, "--output", {str(tmp_path / "prompt.pt")!r}]
        runpy.run_path({str(tmp_path / "out" / "image" / "prompt_embeds.py")!r}, run_name="__main__")
        """
    )
    assert torch.load(tmp_path / "prompt.pt").ndim == 2
