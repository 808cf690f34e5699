"""Starts a LaVIN from a vision tower and a language model: a light folder, without loading any weights."""

import os
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from transformers import GenerationConfig

from lavin import LavinConfig, LavinForConditionalGeneration, LavinProcessor, MMAConfig
from lavin.adapters_lavin import default_target_modules
from lavin.configuration_lavin import OWN_FIELDS
from lavin.files_lavin import ADAPTER_NAME, BASE_WEIGHTS
from lavin.pair import TOKENIZER_FILES, config_of_pair, has_tokenizer
from lavin.saving_lavin import check_output_folder


def init_folder(
    vision: str | os.PathLike,
    text: str | os.PathLike,
    output: str | os.PathLike,
    full: bool = False,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    projector_hidden_size: int | None = None,
    vision_feature_layers: list[int] | None = None,
    preprocessing: str = "lavin",
    projector_type: str | None = None,
    pool_size: int | None = None,
    image_size: int | None = None,
    image_order: str = "first",
    **hub,
) -> Path:
    r"""
    Writes a LaVIN folder: configuration that names both checkpoints with their commits, code, processor, chat
    template, generation config and card.

    Args:
        vision (`str` or `os.PathLike`): Folder or Hub name of a CLIP or SigLIP tower, or of a whole checkpoint.
        text (`str` or `os.PathLike`): Folder or Hub name of a decoder-only language model.
        output (`str` or `os.PathLike`): A new or empty folder, or a light one without an adapter.
        full (`bool`, *optional*, defaults to `False`): Load both and write their weights as well.
        vision_revision, text_revision (`str`, *optional*): Branch, tag or commit; the commit is what is written.
        projector_hidden_size, projector_type, pool_size, image_size (*optional*): As in [`LavinConfig`].
        vision_feature_layers (`list[int]`, *optional*): Blocks whose class token is read, counted from 1.
        preprocessing (`str`, *optional*, defaults to `"lavin"`): `"lavin"` or `"clip"`, see [`LavinProcessor`].
        image_order (`str`, *optional*, defaults to `"first"`): `"first"` or `"interleaved"`, see [`LavinProcessor`].
        hub: `token`, `cache_dir` and the like.

    Returns:
        `Path`: the folder.

    Raises:
        `OSError`: if a checkpoint cannot be reached; the message says which.
        `ValueError`: if the output folder holds something else, or a checkpoint is not of its kind. Nothing has been
        written then.
    """
    check_new_folder(output)
    settings = {
        "projector_type": projector_type,
        "projector_hidden_size": projector_hidden_size,
        "vision_feature_layers": vision_feature_layers,
        "pool_size": pool_size,
        "image_size": image_size,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    config, generation_config = config_of_pair(vision, text, vision_revision, text_revision, hub=hub, **settings)
    processor = pair_processor(config, preprocessing, hub, image_order)
    if processor is None:
        raise ValueError(
            f"{text} has no tokenizer ({', '.join(TOKENIZER_FILES)}), which the processor needs: add one."
        )
    model = load_pair(config, hub) if full else meta_model(config, generation_config)
    default_target_modules(model.model, MMAConfig())  # before anything is written: are there modules to adapt?
    write_folder(model, processor, output, full)
    return Path(output)


def write_folder(model, processor, output, full: bool):
    """Processor first: the card and the code come with the model, and the model saves over nothing of it."""
    Path(output).mkdir(parents=True, exist_ok=True)
    if processor is not None:
        processor.save_pretrained(output)
    model.save_pretrained(output, full=full)


def check_new_folder(folder):
    """
    Raises:
        `ValueError`: if `folder` cannot be written, or holds anything but hidden files or a light LaVIN folder without
        an adapter: weights of another model beside a new configuration would load without an error.
    """
    check_output_folder(folder)
    path = Path(folder)
    names = {p.name for p in path.iterdir() if not p.name.startswith(".")} if path.is_dir() else set()
    way_out = "Name a new or an empty folder."
    if names and "config.json" not in names:
        raise ValueError(
            f"The output folder {folder} holds something else ({', '.join(sorted(names)[:3])}). {way_out}"
        )
    if held := names & {ADAPTER_NAME, *BASE_WEIGHTS}:
        raise ValueError(f"The output folder {folder} is a LaVIN with weights ({', '.join(sorted(held))}). {way_out}")


def pair_processor(
    config: LavinConfig, preprocessing: str, hub: dict, image_order: str = "first"
) -> LavinProcessor | None:
    """The processor of a configuration's two checkpoints; None where the language model has no tokenizer."""
    vision, text = config.vision_checkpoint, config.text_checkpoint
    if not has_tokenizer(text["name"], text["revision"], hub):
        return None
    return LavinProcessor.from_vision_text_pretrained(
        vision["name"],
        text["name"],
        num_image_tokens=config.num_image_tokens,
        preprocessing=preprocessing,
        image_size=config.image_size,
        image_order=image_order,
        vision_revision=vision["revision"],
        text_revision=text["revision"],
        **hub,
    )


def meta_model(
    config: LavinConfig, generation_config: GenerationConfig | None = None, adapter: MMAConfig | None = None
):
    """The [`LavinForConditionalGeneration`] without weights, in its language model's dtype; `adapter` in place."""
    with torch.device("meta"):
        model = LavinForConditionalGeneration._from_config(config, dtype=config.text_config.dtype or torch.float32)
    if generation_config is not None:
        model.generation_config = generation_config
    if adapter is not None:
        with torch.device("meta"):
            inject_adapter_in_model(adapter, model, ADAPTER_NAME)
    return model


def load_pair(config: LavinConfig, hub: dict) -> LavinForConditionalGeneration:
    """The model with the weights of both checkpoints."""
    vision, text = config.vision_checkpoint, config.text_checkpoint
    return LavinForConditionalGeneration.from_vision_text_pretrained(
        vision["name"],
        text["name"],
        vision_revision=vision["revision"],
        text_revision=text["revision"],
        **{name: getattr(config, name) for name in OWN_FIELDS},
        **hub,
    )
