"""A vision tower's row: the family with a tiny Llama, against the tower itself."""

import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lavin import LavinForConditionalGeneration

from .shrink import TOWER_HINTS, randomised, tiny
from .texts import Side, checkpointed, difference, fill, gradients, reloaded, unequal
from .verdicts import NOT_APPLICABLE, RIGHT, WRONG, Row, attempt, judge, place, refusal


COLUMNS = ("off", "adapter", "gradients", "checkpointing", "batch", "left", "right", "cached", "save")


def write_tower(family: str, folder):
    """A tiny random checkpoint of a tower, as its own class saves it; returns its configuration."""
    config = tiny(CONFIG_MAPPING[family], TOWER_HINTS.get(family), AutoModel.from_config)
    torch.manual_seed(0)
    randomised(AutoModel.from_config(config)).save_pretrained(folder)
    return config


def images(config, count: int = 2) -> torch.Tensor:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.empty(count, channels, height, width).normal_(generator=torch.Generator().manual_seed(3))


def tower_row(family: str, text, folder) -> Row:
    """
    Args:
        family (`str`): model type of a vision tower.
        text (`Path`): checkpoint of a language model.
        folder (`Path`): an empty folder.
    """
    row, vision = Row(family), folder / "vision"
    try:
        config = write_tower(family, vision)
        tower = AutoModel.from_pretrained(vision).eval()
    except Exception as error:
        row.set(COLUMNS, NOT_APPLICABLE, f"transformers alone: {place(error)}")
        return row
    off, error = attempt(lambda: LavinForConditionalGeneration.from_vision_text_pretrained(vision, text).eval())
    if error is not None:
        row.set(COLUMNS, *refusal(error))
        return row
    pixels, error = attempt(lambda: images(config))
    if error is not None:
        row.set(COLUMNS, WRONG, place(error))
        return row

    @torch.no_grad()
    def own(x):
        return tower(x).last_hidden_state

    def exact():
        return 9 * unequal(off.get_image_features(pixels, return_dict=True).last_hidden_state, own(pixels))

    judge(row, "off", torch.no_grad()(exact), lambda: unequal(own(pixels), own(pixels)))
    mma = {"dropout": 0.0}
    model, error = attempt(
        lambda: LavinForConditionalGeneration.from_vision_text_pretrained(vision, text, mma=dict(mma))
    )
    if error is not None:
        row.set(COLUMNS, *refusal(error))
        return row
    fill(model)
    ours = Side(model.get_base_model(), pixels[:1])

    def acts():
        features = [each.get_image_features(pixels).pooler_output for each in (off, ours.model)]
        black = Side(ours.model, pixels[:1] * 0)
        seen = difference(ours.logits((0,)), black.logits((0,)))
        return 0.0 if min(seen, difference(*features)) > 1e-3 else 1.0

    def batch():
        together = ours.model.get_image_features(pixels).pooler_output
        alone = [ours.model.get_image_features(pixels[i : i + 1]).pooler_output[0] for i in (0, 1)]
        return max(difference(a, b) for a, b in zip(together, alone, strict=True))

    def base_batch():
        return difference(own(pixels)[0], own(pixels[:1])[0])

    judge(row, "adapter", torch.no_grad()(acts))
    grads, error = attempt(lambda: gradients(model, ours))
    row.set("gradients", *((RIGHT, "") if error is None else (WRONG, place(error))))
    if error is None:
        judge(row, "checkpointing", lambda: checkpointed(model, ours, grads))
    row.set("checkpointing", NOT_APPLICABLE, "no gradients")
    judge(row, "batch", torch.no_grad()(batch), base_batch)
    judge(row, "left", lambda: ours.padding("left"))
    judge(row, "right", lambda: ours.padding("right"))
    judge(row, "cached", ours.cached)
    judge(row, "save", lambda: reloaded(model, ours, folder))
    return row
