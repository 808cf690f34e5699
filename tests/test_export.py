"""`lavin export`: plain checkpoints that load and answer where LaVIN is not installed."""

import json
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import difference, fill
from PIL import Image
from test_folders import run
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GenerationConfig, LlamaConfig

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.images_lavin import to_rgb
from lavin.recipes import export, prompt_embeds
from lavin.recipes.export import compare, export_folder


pytestmark = pytest.mark.slow
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
    folder, _ = exported
    side = prompt_embeds.load_image_side(folder / "image")
    processor = LavinProcessor.from_pretrained(trained)
    model = LavinForConditionalGeneration.from_pretrained(trained).eval()
    images = [Image.new("RGB", (9, 9), color) for color in ("red", "blue", "green")]
    embeds = prompt_embeds.prompt_embeds(side, QUESTION, images)
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
        prompt_embeds.prompt_embeds(side, QUESTION, [])


def test_questions_and_pictures_are_read_as_lavin_reads_them(exported, trained):
    """Special tokens that are typed stay text; of 16 bits the upper 8 count."""
    folder, _ = exported
    side = prompt_embeds.load_image_side(folder / "image")
    processor = LavinProcessor.from_pretrained(trained)
    deep = Image.fromarray((np.arange(40 * 30).reshape(40, 30) * 50).astype(np.uint16))
    paletted = Image.linear_gradient("L").resize((40, 30)).convert("P")
    plain = Image.new("I", (9, 9), 200), Image.new("I", (9, 9), 2000)
    for image in (deep, paletted, paletted.convert("RGBA"), *plain):
        assert prompt_embeds.to_rgb(image).tobytes() == to_rgb(image).tobytes()
    for question in ("Say </s> now", "<s><unk></s>", "What is <image> for?", "<image><image>"):
        content = [{"type": "image", "image": deep}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = inputs["input_ids"][0]
        found = prompt_embeds.prompt_embeds(side, question, [deep])
        is_image = ids == processor.image_token_id
        assert len(found) == len(ids), question
        assert torch.equal(found[~is_image], side.embedding[ids[~is_image]])
        with torch.no_grad():
            expected = side.image_tokens(inputs["pixel_values"]).flatten(0, 1)
        assert torch.equal(found[is_image], expected)


def test_the_image_side_asks_for_no_code(exported):
    """Its tokenizer does not name LaVIN's processor."""
    folder, _ = exported
    written = (folder / "image" / "tokenizer_config.json").read_text()
    assert not {"auto_map", "processor_class"} & set(json.loads(written)) and "lavin" not in written.lower()


def test_nothing_is_left_of_what_was_stopped(trained, tmp_path, monkeypatch):
    """Ctrl-C or a full disk in the middle, or a fold that is another model; then the same command again."""
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(export, "write_image_side", Mock(side_effect=error))
            with pytest.raises(type(error)):
                export_folder(trained, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(export, "compare", lambda *args: {**compare(*args), "same_next_token": 0.04})
        with pytest.raises(ValueError, match="text side is not the same model: .* at 4% of"):
            export_folder(trained, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    export_folder(trained, tmp_path / "out", "text")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["text"]


def small_lavin(pair, folder, config=None, generation=None, **mma):
    """A light folder with a filled adapter on a text checkpoint of its own."""
    text = shutil.copytree(pair / "text", folder / "text")
    if config is not None:
        AutoModelForCausalLM.from_config(config).save_pretrained(text)
    if generation is not None:
        (text / "generation_config.json").write_text(json.dumps(generation))
    names = str(pair / "vision"), str(text)
    fill(LavinForConditionalGeneration.from_vision_text_pretrained(*names, mma=mma)).save_pretrained(folder / "lavin")
    LavinProcessor.from_vision_text_pretrained(*names).save_pretrained(folder / "lavin")
    return folder / "lavin"


@pytest.mark.parametrize("trained_module", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_weights_was_trained(pair, tmp_path, trained_module):
    """The fold unties them."""
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(pair / "text", tie_word_embeddings=True, initializer_range=0.2)
    source = small_lavin(pair, tmp_path, config, modules_to_save=[trained_module])
    for found in export_folder(source, tmp_path / "out").values():
        assert found["largest_difference"] < 1e-4 * found["largest_logit"] and found["same_next_token"] == 1


def test_embeddings_that_are_scaled(pair, tmp_path):
    """Gemma's: what an engine gets is what the embedding gives, not the table."""
    torch.manual_seed(0)
    vocab_size = LlamaConfig.from_pretrained(pair / "text").vocab_size
    config = GemmaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2, attention_bias=True,
    )  # fmt: skip
    (found,) = export_folder(small_lavin(pair, tmp_path, config), tmp_path / "out", "image").values()
    assert found["largest_difference"] < 1e-4 * found["largest_logit"] and found["same_next_token"] == 1


def test_generation_settings_that_contradict_each_other(pair, tmp_path):
    """A temperature without sampling is what the base came with (Vicuna's), and no reason not to export it."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = {**ends, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    try:
        GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    except ValueError:
        pytest.skip("this transformers saves no such settings at all")
    source = small_lavin(pair, tmp_path, generation=settings)
    export_folder(source, tmp_path / "out", "text")
    assert json.loads((tmp_path / "out" / "text" / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_chat_template_of_another_is_refused_before_anything_is_written(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "trained")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ValueError, match="chat template is not LaVIN's"):
        export_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
