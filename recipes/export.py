"""Exports a LaVIN as plain language models for engines that know nothing of it, and measures what that changes."""

import copy
import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lavin import images_lavin
from lavin.files_lavin import staged

from . import prompt_embeds as image_side
from .init import check_new_folder
from .load import load_model, load_processor


MODALITIES = ("text", "image")
QUESTIONS = (
    "What is this?",
    "Name the largest planet.\nResponse:",
    "Question: Which of these is a solid?\nContext: A solid keeps its own shape.\nOptions: (A) tea (B) ice\nResponse:",
    "Describe, in one or two sentences, what can be seen, and say how sure you are of each part of it.",
)


class ImageTokens(nn.Module):
    """Pixels of images, `(num_images, 3, height, width)`, to image tokens, `(num_images, num_image_tokens, d)`."""

    def __init__(self, model):
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        object.__setattr__(self, "features", model.get_image_features)  # not a submodule: no language model in here

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.features(pixel_values).pooler_output


def export_folder(
    model: str | os.PathLike, output: str | os.PathLike, modality: str = "both", revision: str | None = None
) -> dict[str, dict]:
    r"""
    Writes plain language models, one per modality, each with the adapter folded into its weights.

    `text/` is a complete checkpoint of the text architecture (a Llama with `attention_bias=True`), with a tokenizer
    and LaVIN's chat template. `image/` is the same for prompts that hold an image, and has the image side beside it:
    `image_tokens.pt2` (a `torch.export` program, pixels to image tokens), the image preprocessing, the input
    embeddings and `prompt_embeds.py`, which turns a prompt into embeddings. All of it appears at the end: whoever
    stops it before that leaves nothing.

    Args:
        model (`str` or `os.PathLike`): A LaVIN with an MMA adapter: folder or Hub name.
        output (`str` or `os.PathLike`): A new or empty folder.
        modality (`str`, *optional*, defaults to `"both"`): `"text"`, `"image"` or `"both"`.
        revision (`str`, *optional*): Branch, tag or commit of a Hub name.

    Returns:
        `dict[str, dict]`: by modality, what [`compare`] measured on what was written.

    Raises:
        `OSError`: if a checkpoint cannot be reached or the folder cannot be written.
        `ValueError`: if the architecture's maps take no bias, the base is quantised, there is no adapter, the chat
            template is another's, the output folder holds something, or what was written is another model than the one
            with the adapter attached.
    """
    check_new_folder(output)
    if Path(output, "config.json").exists():
        raise ValueError(f"The output folder {output} holds a LaVIN. Name a new or an empty folder.")
    wanted = MODALITIES if modality == "both" else (modality,)
    tokenizer = text_tokenizer(load_processor(model, revision)) if "text" in wanted else None
    # On the CPU, for which the image side's program is then made; an engine moves it where it likes.
    lavin_model, processor = load_model(model, device="cpu", dtype="auto", revision=revision)
    measured = {}
    Path(output).mkdir(parents=True, exist_ok=True)
    with staged(output) as place:
        for name in wanted:
            folder = place / name
            lavin_model.merge_modality(name).save_pretrained(folder)
            if name == "text":
                tokenizer.save_pretrained(folder)
            else:
                write_image_side(lavin_model, processor, folder)
            measured[name] = found = compare(lavin_model, processor, folder, name)
            if found["same_next_token"] < 0.5:
                raise ValueError(
                    f"The folded {name} side is not the same model: the likeliest next token is the same at "
                    f"{found['same_next_token']:.0%} of {found['positions']} positions only, and a logit differs by "
                    f"{found['largest_difference']:.2g}. Nothing was written; please report this architecture."
                )
            source = str(model) if not os.path.exists(model) else Path(model).resolve().name
            (folder / "README.md").write_text(card(source, name, found), encoding="utf-8")
    return measured


def text_tokenizer(processor) -> PreTrainedTokenizerFast:
    """The tokenizer without the image token, which lies beyond the plain model's embedding."""
    tokenizer = processor.tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != processor.image_token]
    slot = f"{{{{- (' ' if seen.last != 'image' else '') + '{processor.image_token}' -}}}}"
    if slot not in processor.chat_template:
        raise ValueError(
            "This processor's chat template is not LaVIN's, so its image slots cannot be taken out for the text side. "
            "Export `--modality image`, or give it `DEFAULT_CHAT_TEMPLATE`."
        )
    refusal = "{{- raise_exception('These weights are folded for text: prompts with images go to the image side.') -}}"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=processor.chat_template.replace(slot, refusal),
        **{name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )


def write_image_side(model, processor, folder: Path):
    """Writes what turns images into image tokens, and prompts into embeddings."""
    blank = Image.new("RGB", (64, 64))  # of the size that the processor makes
    pixels = processor.image_processor([blank, blank], return_tensors="pt").pixel_values
    images = torch.export.Dim("images", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(
            ImageTokens(model).eval(), (pixels.to(model.device),), dynamic_shapes=({0: images},), strict=False
        )
    torch.export.save(program, folder / "image_tokens.pt2", extra_files={"image_token": processor.image_token})
    tokenizer = copy.deepcopy(processor.tokenizer)
    for name in ("auto_map", "processor_class"):  # they would ask for LaVIN's processor
        tokenizer.init_kwargs.pop(name, None)
    tokenizer._processor_class = None
    tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    embedding = model.get_input_embeddings()
    with torch.no_grad():  # through the module: some scale what they look up
        table = embedding(torch.arange(model.config.text_config.vocab_size, device=model.device))
    torch.save(table.clone().cpu(), folder / image_side.EMBEDDINGS)
    shutil.copyfile(image_side.__file__, folder / "prompt_embeds.py")
    shutil.copyfile(images_lavin.__file__, folder / "images_lavin.py")


def sample_images(size: int = 64) -> list[Image.Image]:
    """Four images to measure on: black, white, a gradient, seeded noise."""
    noise = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    gradient = Image.linear_gradient("L").resize((size, size)).convert("RGB")
    flat = [Image.new("RGB", (size, size), color) for color in ("black", "white")]
    return [*flat, gradient, Image.fromarray(noise.numpy())]


@torch.inference_mode()
def compare(model, processor, folder: str | os.PathLike, modality: str) -> dict:
    """
    Compares a written export with the model it came from, at every position of some prompts.

    Args:
        model ([`LavinForConditionalGeneration`]): With its adapter.
        processor ([`LavinProcessor`]): Its processor.
        folder (`str` or `os.PathLike`): What was written for the modality; it is loaded again.
        modality (`str`): `"text"` or `"image"`.

    Returns:
        `dict`: `largest_difference` and `largest_logit` (absolute), `same_next_token` (share of positions whose
        likeliest token is the same), `positions` and `dtype`.
    """
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=model.get_input_embeddings().weight.dtype)
    plain = plain.eval().to(model.device)
    side = image_side.load_image_side(folder) if modality == "image" else None
    if side is not None:
        side.image_tokens.to(model.device)
    difference = largest = 0.0
    same = positions = 0
    for question in QUESTIONS:
        for image in sample_images() if side else [None]:
            content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": question}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(
                text=[text], images=[[image]] if image else None, add_special_tokens=False, return_tensors="pt"
            )
            expected = model(**inputs.to(model.device)).logits.float()
            if side is None:
                found = plain(input_ids=inputs["input_ids"])
            else:
                found = plain(inputs_embeds=image_side.prompt_embeds(side, question, [image])[None].to(model.device))
            found = found.logits.float()
            difference = max(difference, (found - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
            positions += expected.shape[1]
    return {
        "largest_difference": difference,
        "largest_logit": largest,
        "same_next_token": same / positions,
        "positions": positions,
        "dtype": str(plain.dtype).removeprefix("torch."),
    }


USAGE = {
    "text": """\
Any engine that knows the architecture serves it. It reads text only: prompts with images belong to the image side.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
messages = [{"role": "user", "content": "Name the largest planet."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```""",
    "image": """\
The language model takes the prompt as embeddings; `prompt_embeds.py` in this repository makes them (torch and
transformers only). An engine that takes prompt embeddings is fed the same tensor.

```python
import sys

sys.path.insert(0, "FOLDER")
from PIL import Image
from prompt_embeds import load_image_side, prompt_embeds
from transformers import AutoModelForCausalLM

side = load_image_side("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
embeds = prompt_embeds(side, "What is this?", [Image.open("picture.png")])
output = model.generate(inputs_embeds=embeds[None], max_new_tokens=32, do_sample=False)
print(side.tokenizer.decode(output[0], skip_special_tokens=True))
```""",
}


def card(source: str, modality: str, measured: dict) -> str:
    """The model card of one exported folder."""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [lavin, mma]
---

# {source}, folded for {"text" if modality == "text" else "prompts with an image"}

A plain language model: LaVIN's adapter for this modality is folded into its weights by `lavin export`.

| at {measured["positions"]} positions of {len(QUESTIONS)} questions, {measured["dtype"]} | |
|---|---|
| largest difference of a logit from the model with its adapter attached | {measured["largest_difference"]:.2g} |
| largest logit | {measured["largest_logit"]:.3g} |
| same likeliest next token | {100 * measured["same_next_token"]:.2f}% |

## Use

{USAGE[modality]}
"""
