"""A LaVIN made of two checkpoints. Folders do not carry this file: who loads, trains or saves one needs none of it."""

import os

from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .configuration_lavin import (
    LavinConfig,
    check_image_size,
    default_vision_feature_layers,
    sides,
    vision_part,
)
from .files_lavin import find_file, one_line
from .fit_lavin import check_text, check_vision
from .processing_lavin import DEFAULT_CHAT_TEMPLATE, LavinProcessor, broken
from .tokenizer import without_word_start
from .towers_lavin import named_base


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def tower_config(name, revision: str | None, kind: str, hub: dict):
    """
    A tower's configuration, and how to name its checkpoint.

    Raises:
        `OSError`: if the checkpoint cannot be reached.
        `ValueError`: if transformers does not know its type. The message says which of the two, `kind`, it is.
    """
    name = os.fspath(name)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise OSError(
            f"The {kind} checkpoint {name} has no config.json: it is not in transformers' format. Convert it "
            "first, or name one that is."
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main", **hub)
    except OSError as error:
        at = f" at revision {revision}" if revision else ""
        raise OSError(
            f"The {kind} checkpoint {name}{at} cannot be reached: {one_line(error)} Check the name, the network "
            "and, for a gated checkpoint, `hf auth login`; or name a folder with the checkpoint in it."
        ) from error
    except ValueError as error:  # a type that transformers does not know, or a config.json that is none
        raise ValueError(
            f"The {kind} checkpoint {name} is no model that transformers knows: {one_line(error)}"
        ) from error
    return config, named_base(name, revision, hub)


def has_tokenizer(name, revision: str | None, hub: dict) -> bool:
    """Whether the checkpoint has a tokenizer; without its files transformers makes an empty one of some types."""
    return find_file(name, TOKENIZER_FILES, {**hub, "revision": revision or "main"}) is not None


def config_of_pair(vision, text, vision_revision=None, text_revision=None, hub=None, **overrides):
    """
    The configuration of a LaVIN made of two checkpoints, which it names with their commits, and the generation
    configuration that belongs to it.

    Returns:
        `tuple(LavinConfig, GenerationConfig)`
    """
    hub = {key: value for key, value in (hub or {}).items() if key != "revision"}
    vision_config, vision_checkpoint = tower_config(vision, vision_revision, "vision", hub)
    text_config, text_checkpoint = tower_config(text, text_revision, "text", hub)
    check_vision(vision_part(vision_config), vision)
    check_text(text_config.get_text_config(decoder=True), text)
    tokenizer = None
    if has_tokenizer(text, text_revision, hub):
        processor = LavinProcessor.from_vision_text_pretrained(
            vision, text, vision_revision=vision_revision, text_revision=text_revision, **hub
        )
        tokenizer = processor.tokenizer
        overrides.setdefault("image_token_id", processor.image_token_id)
    config = LavinConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_checkpoint=vision_checkpoint,
        text_checkpoint=text_checkpoint,
        **overrides,
    )
    try:
        generation = GenerationConfig.from_pretrained(text, revision=text_revision or "main", **hub)
    except OSError:
        generation = GenerationConfig.from_model_config(text_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(tokenizer, name, None))
    return config, generation


def processor_of_pair(
    processor_class: type,
    vision: str,
    text: str,
    num_image_tokens: int | None,
    preprocessing: str,
    image_token: str,
    chat_template: str | None,
    vision_revision: str | None,
    text_revision: str | None,
    image_size: int | None,
    image_order: str,
    **kwargs,
):
    """See [`LavinProcessor.from_vision_text_pretrained`], which has the defaults."""
    revision = kwargs.pop("revision", None) or "main"
    config = vision_part(AutoConfig.from_pretrained(vision, revision=vision_revision or revision, **kwargs))
    for field in ("image_size", "num_hidden_layers"):
        if getattr(config, field, None) is None:
            raise ValueError(f"{vision} is no vision tower: a {config.model_type} has no `{field}`.")
    image_size = config.image_size if image_size is None else image_size
    check_image_size(*sides(image_size), config)
    if num_image_tokens is None:
        num_image_tokens = len(default_vision_feature_layers(config.num_hidden_layers))
    tokenizer = AutoTokenizer.from_pretrained(text, revision=text_revision or revision, **kwargs)
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {text} has no EOS token: the model could not learn to end an answer.")
    tokenizer = without_word_start(tokenizer)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(image_token, special=True, normalized=False)]},
        replace_extra_special_tokens=False,
    )
    if chat_template is None:
        chat_template = DEFAULT_CHAT_TEMPLATE.replace("<image >", broken(image_token))
        chat_template = chat_template.replace("<image>", image_token)
    tokenizer.chat_template = chat_template  # not the base model's: a reloaded folder has one template for both
    return processor_class(
        image_processor=_image_processor(image_size, preprocessing),
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
        image_token=image_token,
        chat_template=chat_template,
        image_order=image_order,
    )


def _image_processor(image_size, preprocessing: str) -> CLIPImageProcessorPil:
    height, width = sides(image_size)
    square = {"height": height, "width": width}
    if preprocessing == "lavin":
        imagenet = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
        return CLIPImageProcessorPil(size=square, do_center_crop=False, **imagenet)
    if preprocessing == "clip":  # mean and deviation are the class's defaults, as is bicubic for both
        return CLIPImageProcessorPil(size={"shortest_edge": min(height, width)}, crop_size=square)
    raise ValueError(f'`preprocessing` must be "lavin" or "clip", got {preprocessing!r}.')
