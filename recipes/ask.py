"""Asks a LaVIN one question."""

import os

import torch
from transformers import AutoModel, AutoProcessor

import lavin  # noqa: F401  (the Auto classes know LaVIN from here on)


def ask(folder: str | os.PathLike, question: str, images: list[str] | None = None, max_new_tokens: int = 64) -> str:
    r"""
    Args:
        folder (`str` or `os.PathLike`): A LaVIN folder, or its name on the Hub.
        question (`str`): The user's text.
        images (`list[str]`, *optional*): Paths or URLs of images, shown before the question.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer.

    Returns:
        `str`: the greedy answer.

    Raises:
        `OSError`, `ValueError`: if the model or an image cannot be read.
    """
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "path": os.fspath(image)} for image in images or []]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(folder).eval()  # last: it takes longest
    with torch.inference_mode():
        output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
