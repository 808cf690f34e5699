"""Asks a LaVIN one question."""

import os

from .evaluate.answers import answer, read_image
from .load import load_model


def ask(
    folder: str | os.PathLike,
    question: str,
    images: list[str] | None = None,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> str:
    r"""
    Args:
        folder (`str` or `os.PathLike`): A LaVIN folder, or its name on the Hub.
        question (`str`): The user's text.
        images (`list[str]`, *optional*): Paths or URLs of images, shown before the question.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer.
        device, dtype (`str`, *optional*): As of [`~load.load_model`].

    Returns:
        `str`: the greedy answer.

    Raises:
        `OSError`, `ValueError`: if the model or an image cannot be read.
    """
    pictures = [read_image(image) for image in images or []]  # first: the model takes longest
    model, processor = load_model(folder, device, dtype)
    (text,) = answer(model, processor, [question], [pictures], max_new_tokens=max_new_tokens)
    return text.strip()
