"""Reads the pool-adapter of an InfMLLM checkpoint (arXiv 2311.06791) into a LaVIN folder."""

import os
from pathlib import Path

import torch
from transformers.utils import logging

from lavin import MMAConfig
from lavin.files_lavin import ADAPTER_NAME
from lavin.pair import config_of_pair
from lavin.projector_lavin import LavinPoolAdapter
from lavin.tuner_lavin import MMALayer

from .init import load_pair, meta_model, pair_processor, write_folder


logger = logging.get_logger(__name__)

# The release's names (infly-ai/INF-MLLM, `infmllm/models`: the model's `ln_vision`, and `pooler.mlp`, a sequence of
# Linear, GELU and Linear), and ours inside `multi_modal_projector.pool`.
POOL_KEYS = {
    "ln_vision.weight": "layer_norm.weight",
    "ln_vision.bias": "layer_norm.bias",
    "pooler.mlp.0.weight": "linear_1.weight",
    "pooler.mlp.0.bias": "linear_1.bias",
    "pooler.mlp.2.weight": "linear_2.weight",
    "pooler.mlp.2.bias": "linear_2.bias",
}
TOWERS = ("visual_encoder.", "lm_model.")  # beside them in a whole checkpoint; the pair has its own
STORED = {"pool_size": "pool_out_size", "image_size": "img_size"}  # the release's arguments


def has_pool_adapter(weights: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict holds InfMLLM's pool-adapter."""
    return any(key.startswith("pooler.mlp.") for key in weights)


def convert_pool(
    weights: dict[str, torch.Tensor],
    stored: dict,
    checkpoint: str | os.PathLike,
    text_model: str | os.PathLike,
    vision_model: str | os.PathLike,
    output: str | os.PathLike,
    full: bool = False,
    text_revision: str | None = None,
    vision_revision: str | None = None,
    preprocessing: str = "lavin",
    pool_size: int | None = None,
    image_size: int | None = None,
    **hub,
) -> tuple[Path, bool]:
    r"""
    Writes a LaVIN folder with `projector_type` "pool". The base itself is the pair's: a pool-adapter that was trained
    together with its towers needs a pair with their weights.

    Args:
        weights (`dict[str, torch.Tensor]`): With the names of `POOL_KEYS`.
        stored (`dict`): The arguments stored in the file, if any.
        pool_size, image_size (`int`, *optional*): As in [`LavinConfig`]; by default what is stored, else its defaults.
            They do not show in the weights.
        checkpoint, text_model, vision_model, output, full, text_revision, vision_revision, preprocessing, hub:
            As of [`convert_checkpoint`]. A light folder holds the pool-adapter beside an MMA adapter that is the
            identity until it is trained; a full one holds it among its base weights, without an adapter.

    Returns:
        `tuple`: the folder, and whether a processor was written.

    Raises:
        `ValueError`: if names or shapes are others than this pair's pool-adapter has; lists them. Nothing has been
            written then.
    """
    given = {"pool_size": pool_size, "image_size": image_size}
    settings = {key: stored.get(STORED[key]) if value is None else value for key, value in given.items()}
    config, generation_config = config_of_pair(
        vision_model,
        text_model,
        vision_revision,
        text_revision,
        hub=hub,
        projector_type="pool",
        **{key: value for key, value in settings.items() if value is not None},
    )
    processor = pair_processor(config, preprocessing, hub)
    adapter = MMAConfig()
    model = meta_model(config, generation_config, None if full else adapter)
    tensors = renamed_pool(weights, model, f"{checkpoint} does not fit {text_model} and {vision_model}:")
    if full:
        model = load_pair(config, hub)
        model.model.multi_modal_projector.pool.load_state_dict(tensors)
    else:
        embedding = model.model.modality_embedding.modules_to_save[ADAPTER_NAME].to_empty(device="cpu")
        model._init_weights(embedding)
        for module in model.modules():
            if isinstance(module, MMALayer):
                for part in module.adapter_layer_names:
                    getattr(module, part).to_empty(device="cpu")
                module.reset_parameters(ADAPTER_NAME, adapter.init_seed)
        projector = model.model.multi_modal_projector.modules_to_save[ADAPTER_NAME]
        projector.pool.load_state_dict(tensors, assign=True)
    write_folder(model, processor, output, full)
    if beside := sum(key.startswith(TOWERS) for key in weights):
        logger.warning(
            f"{checkpoint} holds {beside} weights of its own towers too, which are not read: the folder's base is "
            f"{vision_model} and {text_model}. Where those are not the weights that the pool-adapter was trained "
            "with, train it further before you use it."
        )
    return Path(output), processor is not None


def renamed_pool(weights: dict[str, torch.Tensor], model, problem: str) -> dict[str, torch.Tensor]:
    """
    The pool-adapter's weights in float32, by the names they have in `multi_modal_projector.pool`.

    Raises:
        `ValueError`: lists what is missing, unexpected, or of another shape, under the file's names.
    """
    pool = next(module for module in model.modules() if isinstance(module, LavinPoolAdapter))
    shapes = {name: parameter.shape for name, parameter in pool.named_parameters()}
    lines = [f"missing: {key}" for key in POOL_KEYS if key not in weights]
    lines += [f"unexpected: {key}" for key in weights if key not in POOL_KEYS and not key.startswith(TOWERS)]
    lines += [
        f"shape: {key}: {tuple(weights[key].shape)} in the file, {tuple(shapes[name])} in this base"
        for key, name in POOL_KEYS.items()
        if key in weights and weights[key].shape != shapes[name]
    ]
    if lines:
        way_out = "Name the base that it was trained on: from its vision tower's width to its language model's."
        raise ValueError("\n  ".join([problem, *lines]) + "\n" + way_out)
    return {name: weights[key].float().contiguous() for key, name in POOL_KEYS.items()}
