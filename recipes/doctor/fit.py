"""What a folder's configuration must agree with: the checkpoints it names, and its processor."""

import os
from collections.abc import Iterator

from huggingface_hub import constants
from PIL import Image

from lavin import LavinConfig, LavinProcessor
from lavin.configuration_lavin import vision_part
from lavin.files_lavin import find_file
from lavin.pair import tower_config
from lavin.towers_lavin import WEIGHT_FILES, shards_of

from .folder import AGAIN, Folder, has_file, local_file
from .report import FAIL, OK, SKIP, Finding, Line, said


SHAPES = {
    "vision": ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size"),
    "text": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"),
}


def check_checkpoints(folder: Folder) -> Iterator[Line]:
    """Whether a light folder's base can be reached, is of the shape that the folder says, and has weights."""
    if folder.base_index():
        raise Finding(SKIP, "a full folder needs none")
    config = folder.config
    sources = {"base": config.base_checkpoint}
    if config.base_checkpoint is None:
        sources = {"vision": config.vision_checkpoint, "text": config.text_checkpoint}
    for kind, source in sources.items():
        title = f"{kind} checkpoint"
        if source is None:
            do = f'Write it into config.json: `"{kind}_checkpoint": {{"name": NAME, "revision": null}}`. {AGAIN}'
            yield Line(FAIL, title, "there are neither weights nor the name of this checkpoint", do)
            continue
        do = _reach_again(source, kind)
        try:
            expected = config if kind == "base" else getattr(config, f"{kind}_config")
            found = _config_of(source, kind)
            missing, where = missing_weights(source["name"], source.get("revision"))
        except (OSError, ValueError) as error:
            yield Line(FAIL, title, said(error), do)
            continue
        if problem := _other_shape(expected, found, kind):
            again = f"Name the checkpoint that the folder was made with in config.json, `{kind}_checkpoint`."
            yield Line(FAIL, title, f"{source['name']} is another one: {problem}", again)
        elif missing:
            yield Line(FAIL, title, f"{source['name']} lacks {missing}", do)
        else:
            yield Line(OK, title, f"{source['name']}{where}")


def _config_of(source: dict, kind: str):
    if kind == "base":
        return LavinConfig.from_pretrained(source["name"], revision=source.get("revision") or "main")
    config, _ = tower_config(source["name"], source.get("revision"), kind, {})
    return vision_part(config) if kind == "vision" else config.get_text_config(decoder=True)


def _other_shape(expected, found, kind: str) -> str | None:
    """What differs between the configuration in the folder and that of the checkpoint."""
    if kind == "base":
        return _other_shape(expected.vision_config, found.vision_config, "vision") or _other_shape(
            expected.text_config, found.text_config, "text"
        )
    for name in ("model_type", *SHAPES[kind]):
        a, b = getattr(expected, name, None), getattr(found, name, None)
        if a != b:
            return f"its {name} is {b}, the folder's {a}"
    return None


def _reach_again(source: dict, kind: str) -> str:
    name, revision = source["name"], source.get("revision")
    if os.path.isabs(name) or os.path.isdir(name):
        do = "Put the checkpoint there"
    else:
        do = f"`hf download {name}{f' --revision {revision}' if revision else ''}` (gated: `hf auth login` first)"
        if constants.HF_HUB_OFFLINE:
            do += " without HF_HUB_OFFLINE"
    return f"{do}; or name another place in config.json, `{kind}_checkpoint`."


def missing_weights(name: str, revision: str | None) -> tuple[str, str]:
    """
    Which weights a checkpoint lacks. Of the Hub nothing large is downloaded.

    Returns:
        `tuple[str, str]`: what is missing, empty if nothing is; and what is to be said of where it is.
    """
    here = [file for file in WEIGHT_FILES if local_file(name, revision, file)]  # first: the Hub may not answer
    file = next(iter(here), None) or next((file for file in WEIGHT_FILES if has_file(name, revision, file)), None)
    if file is None:
        return f"weights ({', '.join(WEIGHT_FILES)})", ""
    shards = [file]
    if file.endswith(".json"):
        shards = shards_of(find_file(name, file, {"revision": revision or "main"}))
    if missing := [shard for shard in shards if not has_file(name, revision, shard)]:
        return ", ".join(missing), ""
    cached = all(local_file(name, revision, shard) for shard in shards)
    return "", "" if cached else " (on the Hub; its weights are still to be downloaded)"


def check_processor(folder: Folder) -> str | list[Line]:
    """Against the configuration: image tokens, their id, the images' size, the vocabulary, the template."""
    if folder.missing_of_processor():
        raise Finding(SKIP, "not checked: its files are missing (see above)")
    config = folder.config
    try:
        processor = LavinProcessor.from_pretrained(folder.name)
    except Exception as error:  # of several libraries
        raise Finding(FAIL, f"cannot be read: {said(error)}", folder.processor_again()) from error
    lines = []
    for name in ("num_image_tokens", "image_token_id"):
        if (found := getattr(processor, name)) != getattr(config, name):
            lines.append(f"{name} is {found}, the model's {getattr(config, name)}")
    pixels = processor.image_processor([Image.new("RGB", (37, 23))], return_tensors="pt").pixel_values
    size, wanted = tuple(pixels.shape[-2:]), config.image_shape[-2:]
    if size != wanted:
        lines.append(f"images of {size[0]} x {size[1]} pixels, the model's are {wanted[0]} x {wanted[1]}")
    vocabulary = {token: i for token, i in processor.tokenizer.get_vocab().items() if token != processor.image_token}
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= config.text_config.vocab_size:
        lines.append(f"token {token!r} has the id {highest}, the embedding {config.text_config.vocab_size} rows")
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if (count := text.count(processor.image_token)) != 1:
        lines.append(f"the chat template writes {count} image tokens for one image")
    fits = f"fits: {processor.num_image_tokens} image tokens of id {processor.image_token_id}, images of "
    fits += f"{size[0]} x {size[1]} pixels, chat template"
    return [Line(FAIL, "processor", found, folder.processor_again()) for found in lines] or fits
