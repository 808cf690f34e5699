"""Asks a LaVIN: greedy answers in batches, longest question first, stopping at EOS."""

import os
import sys
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from lavin import images_lavin

from ..load import eos_token_ids, is_full


BATCH_SIZE = 16


def read_image(image) -> Image.Image:
    """
    Opens an image in RGB, turned as its EXIF orientation says: as it was in training.

    Args:
        image (`PIL.Image.Image`, `bytes`, `str` or `os.PathLike`): An image, an encoded file, its path or URL.

    Raises:
        `ValueError`: if it cannot be read.
    """
    name = f" {os.fspath(image)}" if isinstance(image, (str, os.PathLike)) else ""
    if name and not name.startswith((" http://", " https://")) and not os.path.isfile(image):
        raise ValueError(f"There is no image{name}.")
    try:
        return images_lavin.read_image(image)
    except Exception as error:  # Pillow and the client for URLs raise many kinds
        raise ValueError(f"The image{name} cannot be read: {error}. Repair it or leave it out.") from error


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


def run_batches(
    model, processor, prompts: list[str | list[dict]], images: list[list], batch_size: int, run: Callable
) -> Iterator[tuple[list[int], list]]:
    """
    Runs batches of rows of about one length, padded on the left. Longest first: what does not fit shows at once, and
    the time left is no underestimate. Where the memory does not hold a batch, it and those after it are halved.

    Args:
        run (`Callable`): Takes the rows' places among the prompts and their tensors, on the model's device; returns a
            list of what it found, one for each row.

    Yields:
        `tuple(list[int], list)`: the rows' places, and what was found.

    Raises:
        `ValueError`: if the memory does not hold a single row.
    """
    texts = [render(processor, prompt, len(row)) for prompt, row in zip(prompts, images, strict=True)]
    ids = processor.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    extra = processor.num_image_tokens - 1
    length = [len(row) + extra * len(pictures) for row, pictures in zip(ids, images, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: (-length[i], i))
    while order:
        rows = order[:batch_size]
        pictures = [[read_image(image) for image in images[i]] for i in rows]
        inputs = processor(
            text=[texts[i] for i in rows], images=pictures if any(pictures) else None, padding=True,
            padding_side="left", return_tensors="pt", add_special_tokens=False,
        )  # fmt: skip
        try:
            found, full = run(rows, inputs.to(model.device)), None
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            found, full = None, (str(error).splitlines() or ["out of memory"])[0]
        if full is None:
            order = order[len(rows) :]
            yield rows, found
            continue
        del inputs  # and, this being outside of `except`, the tensors of the failed step
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            raise ValueError(
                f"The memory of {model.device} does not hold a single question of {length[rows[0]]} tokens and its "
                f"answer ({full}): choose a smaller --dtype, shorter answers, or a device with more memory."
            )
        batch_size = len(rows) // 2
        tqdm.write(f"The memory does not hold {len(rows)} questions at once: going on with {batch_size}.", sys.stderr)


def decode(tokenizer, tokens: list[int]) -> str:
    """The text of an answer's tokens, for `lavin ask`, `eval` and `serve` alike."""
    return tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""


def before_end(tokens: list[int], ends: list[int]) -> list[int]:
    """The tokens of an answer without that which ends it, which need not be a special one."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def generate_batches(
    model, processor, prompts: list, images: list[list], batch_size: int, max_new_tokens: int, **decoding
) -> Iterator[tuple[list[int], list[str]]]:
    """
    Yields the rows of each batch and their greedy answers; arguments as of [`answer`]. `decoding` are further fields
    of `GenerationConfig`, such as `num_beams`.
    """
    ends = eos_token_ids(model, processor) or None
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends,
        pad_token_id=processor.tokenizer.pad_token_id, **decoding,
    )  # fmt: skip
    own = model.generation_config

    def run(rows, inputs):
        # A base model's generation config may sample or punish repetition, which is not what the adapter was trained
        # for, and `generate` takes from it what it is not told.
        model.generation_config = settings
        try:
            with torch.inference_mode():
                output = model.generate(**inputs)
        finally:
            model.generation_config = own
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [decode(processor.tokenizer, before_end(row, ends or [])) for row in new]

    yield from run_batches(model, processor, prompts, images, batch_size, run)


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
        images (`list[list]`, *optional*): The images of each prompt: PIL images, bytes of image files, paths or
            URLs.
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
