"""Loads a LaVIN and asks it: greedy answers in batches, longest question first, stopping at EOS."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from lavin import LavinForConditionalGeneration, LavinProcessor


BATCH_SIZE = 16


def load_processor(name: str | os.PathLike) -> LavinProcessor:
    """
    The processor of a LaVIN folder or Hub name.

    Raises:
        `OSError`, `ValueError`: if there is no LaVIN, or it has no processor.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        _check_folder(Path(name))
    elif name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ValueError(f"There is no folder {name}. Name a LaVIN folder (the output of `trl sft`) or a Hub name.")
    return LavinProcessor.from_pretrained(name)


def load_model(
    name: str | os.PathLike, device: str | None = None, dtype: str | torch.dtype | None = None
) -> tuple[LavinForConditionalGeneration, LavinProcessor]:
    """
    Loads model and processor, ready to answer.

    Args:
        name (`str` or `os.PathLike`): A LaVIN folder or its name on the Hub.
        device (`str`, *optional*): By default the GPU where there is one, else the CPU.
        dtype (`str` or `torch.dtype`, *optional*): Of the frozen towers; what was trained stays float32. By default
            bfloat16 on a GPU and float32 on a CPU.

    Returns:
        `tuple(LavinForConditionalGeneration, LavinProcessor)`: the model in eval mode.

    Raises:
        `OSError`, `ValueError`: if it cannot be loaded; the message says why.
    """
    processor = load_processor(name)
    device = default_device() if device is None else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"There is no device {device!r} for torch here: {str(error).splitlines()[0]}") from error
    dtype = default_dtype(device) if dtype is None else dtype
    model = LavinForConditionalGeneration.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), processor


def default_device() -> str:
    """`"cuda"` where there is a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slow."""
    return "float32" if str(device).startswith("cpu") else "bfloat16"


def _check_folder(folder: Path):
    if not (folder / "config.json").is_file():
        checkpoints = sorted(folder.glob("checkpoint-*"))
        way_out = f"It holds {checkpoints[-1].name}: name that" if checkpoints else "Name the output of `trl sft`"
        raise ValueError(f"{folder} is no LaVIN folder: it has no config.json. {way_out}.")
    if not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} has no processor (processor_config.json): copy the processor's files from the folder that "
            "training started from, or save it there with `LavinProcessor.save_pretrained`."
        )


def read_image(image) -> Image.Image:
    """
    Opens an image in RGB.

    Args:
        image (`PIL.Image.Image`, `bytes`, `str` or `os.PathLike`): An image, an encoded file or its path.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return opened.convert("RGB")


def render(processor, prompt: str | list[dict], images: int) -> str:
    """
    The text a model reads, up to and with "Response:".

    Args:
        processor ([`LavinProcessor`]): Its chat template is used.
        prompt (`str` or `list[dict]`): The user's text, before which the images stand; or messages, whose content
            says where they stand.
        images (`int`): The number of images.
    """
    if isinstance(prompt, str):
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    return processor.apply_chat_template(prompt, add_generation_prompt=True)


def batches(
    processor, prompts: list[str | list[dict]], images: list[list], batch_size: int
) -> Iterator[tuple[list[int], dict]]:
    """
    Batches of rows of about one length, padded on the left. Longest first: what does not fit shows at once, and the
    time left is no underestimate.

    Yields:
        `tuple(list[int], BatchFeature)`: the rows' places among the prompts, and their tensors.
    """
    texts = [render(processor, prompt, len(row)) for prompt, row in zip(prompts, images, strict=True)]
    ids = processor.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    extra = processor.num_image_tokens - 1
    length = [len(row) + extra * len(pictures) for row, pictures in zip(ids, images, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: (-length[i], i))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        pictures = [[read_image(image) for image in images[i]] for i in rows]
        inputs = processor(
            text=[texts[i] for i in rows], images=pictures if any(pictures) else None, padding=True,
            padding_side="left", return_tensors="pt", add_special_tokens=False,
        )  # fmt: skip
        yield rows, inputs


def generate_batches(
    model, processor, prompts: list, images: list[list], batch_size: int, max_new_tokens: int
) -> Iterator[tuple[list[int], list[str]]]:
    """Yields the rows of each batch and their greedy answers; arguments as of [`answer`]."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    # What training wrote at the end of an answer; a base model's generation config may know others.
    ends = sorted({*ends, processor.tokenizer.eos_token_id} - {None})
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=processor.tokenizer.pad_token_id,
        # A base model's generation config may sample or punish repetition: said here, it does not.
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, temperature=1.0, top_p=1.0,
        top_k=50,
    )  # fmt: skip
    for rows, inputs in batches(processor, prompts, images, batch_size):
        with torch.inference_mode():
            output = model.generate(**inputs.to(model.device), generation_config=settings)
        new = output[:, inputs["input_ids"].shape[1] :]
        yield rows, processor.batch_decode(new, skip_special_tokens=True)


def answer(
    model,
    processor,
    prompts: list[str | list[dict]],
    images: list[list] | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = 64,
    progress: str | None = None,
) -> list[str]:
    """
    One greedy answer per prompt. Rows never influence each other, and any batch size gives the same answers (in
    bfloat16 a near tie may fall otherwise).

    Args:
        model ([`LavinForConditionalGeneration`]): The model, in eval mode.
        processor ([`LavinProcessor`]): Its processor.
        prompts (`list[str]` or `list[list[dict]]`): Each the user's text, or messages.
        images (`list[list]`, *optional*): The images of each prompt: PIL images, bytes of image files, or paths.
        batch_size (`int`, *optional*, defaults to 16): Prompts at once.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer, in tokens.
        progress (`str`, *optional*): Shows a progress bar of this name.

    Returns:
        `list[str]`: the new text of each prompt, in their order.
    """
    images = [[] for _ in prompts] if images is None else images
    texts: list[str] = [""] * len(prompts)
    with tqdm(total=len(prompts), desc=progress, unit="question", disable=progress is None) as bar:
        for rows, new in generate_batches(model, processor, prompts, images, batch_size, max_new_tokens):
            for row, text in zip(rows, new, strict=True):
                texts[row] = text
            bar.update(len(rows))
    return texts
