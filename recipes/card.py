"""Puts our model card back where a trainer wrote its own."""

import os
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import inject_adapter_in_model

from lavin import LavinConfig, MMAConfig
from lavin.card_lavin import BEGIN, write_card
from lavin.folder_lavin import ADAPTER_CONFIG, ADAPTER_NAME
from lavin.recipes.init import meta_model


def card_folder(folder: str | os.PathLike, push: str | None = None, token: str | None = None) -> Path:
    r"""
    Writes the card of a LaVIN folder from what is in it, over a trainer's card. What a user wrote around our facts
    stays. No weights are loaded.

    Args:
        folder (`str` or `os.PathLike`): A LaVIN folder, such as the output of `trl sft`.
        push (`str`, *optional*): Hub name of a repository: its `README.md`, and nothing else, is replaced.
        token (`str`, *optional*): For the Hub; the stored one by default.

    Returns:
        `Path`: the card.

    Raises:
        `OSError`: if the folder cannot be written or the Hub refuses.
        `ValueError`: if it is no LaVIN folder, or its `README.md` is somebody else's.
    """
    card = Path(folder, "README.md")
    if not Path(folder, "config.json").is_file():
        raise ValueError(
            f"{folder} is no LaVIN folder: it has no config.json. Name the output of `trl sft` or `lavin`."
        )
    config, unused = LavinConfig.get_config_dict(folder)
    if config.get("model_type") != LavinConfig.model_type:
        raise ValueError(f"{folder} is no LaVIN folder: its config.json is of type {config.get('model_type')!r}.")
    if not os.access(card if card.exists() else folder, os.W_OK):
        raise ValueError(f"{card} cannot be written: check its permissions.")
    model = meta_model(LavinConfig.from_pretrained(folder))
    if Path(folder, ADAPTER_NAME, ADAPTER_CONFIG).is_file():
        adapter = MMAConfig.from_pretrained(folder, subfolder=ADAPTER_NAME)
        with torch.device("meta"):
            inject_adapter_in_model(adapter, model, ADAPTER_NAME)
        model._hf_peft_config_loaded = True
    write_card(model, folder)
    if BEGIN not in card.read_text():
        raise ValueError(
            f"{card} was written by somebody else and is left alone: move it away, or put the two lines {BEGIN} and "
            f"{BEGIN.replace('lavin', '/lavin')} where the facts shall go."
        )
    if push is not None:
        HfApi(token=token).upload_file(
            path_or_fileobj=card, path_in_repo=card.name, repo_id=push, commit_message="Write the card of a LaVIN"
        )
    return card
