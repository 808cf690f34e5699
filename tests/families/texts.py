"""A language model's row: the family with a tiny CLIP, against the family's own causal language model."""

import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lavin import LavinForConditionalGeneration

from .shrink import TEXT_HINTS, TEXT_TARGETS, VOCAB, randomised, tiny
from .verdicts import NOT_APPLICABLE, RIGHT, TOLERANCE, WRONG, Row, attempt, is_ours, judge, place, refusal


COLUMNS = (
    "off",
    "adapter",
    "gradients",
    "checkpointing",
    "batch",
    "left",
    "right",
    "cached",
    "beams",
    "sampling",
    "lookup",
    "assisted",
    "static",
    "save",
    "fold",
)
NEW = 5


def write_text(family: str, folder) -> None:
    """A tiny random checkpoint of a family, as its own class saves it."""
    config = tiny(CONFIG_MAPPING[family], TEXT_HINTS.get(family))
    torch.manual_seed(0)
    model = randomised(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    model.save_pretrained(folder)


def fill(model, seed: int = 7):
    """Seeded noise in an adapter, which starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mma." in name:
                noise = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.add_(noise * (3.0 if "adapter_router" in name else 0.2))
    return model.eval()


def ids_of(length: int, seed: int) -> torch.Tensor:
    ids = torch.randint(3, VOCAB - 6, (length,), generator=torch.Generator().manual_seed(seed))
    ids[-3:] = ids[2:5]  # something to look up
    return ids


def with_image(ids: torch.Tensor, config) -> torch.Tensor:
    """The same length, its second tokens in place of an image."""
    ids = ids.clone()
    ids[1 : 1 + config.num_image_tokens] = config.image_token_id
    return ids


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the largest entry; infinite where there is NaN."""
    if a.shape != b.shape:
        return float("inf")
    off = ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1)).item()
    return off if off == off else float("inf")


def unequal(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.shape != b.shape or bool((a != b).any()))


class Side:
    """A model and rows for it: LaVIN's, of which every other has an image, or the base's, which are text."""

    def __init__(self, model, pixels=None, seed: int = 0):
        self.model, self.pixels, self.greedy = model, pixels, {}
        lengths = (12, 12, 9, 12)
        rows = [ids_of(length, seed + i) for i, length in enumerate(lengths)]
        self.rows = [
            with_image(ids, model.config) if pixels is not None and i % 2 == 0 else ids for i, ids in enumerate(rows)
        ]

    def images(self, chosen) -> dict:
        count = sum(i % 2 == 0 for i in chosen)
        return {"pixel_values": self.pixels.repeat(count, 1, 1, 1)} if self.pixels is not None and count else {}

    def inputs(self, chosen, side="left") -> dict:
        return {**padded([self.rows[i] for i in chosen], side), **self.images(chosen)}

    @torch.no_grad()
    def logits(self, chosen, side="left", **kwargs) -> torch.Tensor:
        return self.model(**self.inputs(chosen, side), **kwargs).logits

    @torch.no_grad()
    def generate(self, chosen, **kwargs) -> torch.Tensor:
        kwargs = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **kwargs}
        torch.manual_seed(5)
        return self.model.generate(**self.inputs(chosen), **kwargs)

    def worst(self, measure: str, *args, **kwargs) -> float:
        """A measure over several draws of the rows: what depends on ties and thresholds does not show on all."""
        off = 0.0
        for seed in range(0, 40, 10):
            off = max(off, getattr(Side(self.model, self.pixels, seed), measure)(*args, **kwargs))
            if off > TOLERANCE:
                break
        return off

    def batch(self) -> float:
        together = self.logits((0, 1))
        return max(difference(together[i], self.logits((i,))[0]) for i in (0, 1))

    def padding(self, side: str) -> float:
        chosen, off = (2, 3, 0), 0.0
        together = self.logits(chosen, side)
        for place_, i in enumerate(chosen):
            alone, length = self.logits((i,))[0], len(self.rows[i])
            seen = together[place_, -length:] if side == "left" else together[place_, :length]
            off = max(off, difference(seen, alone))
        return off

    def cached(self) -> float:
        off = 0.0
        for i in (0, 1):
            out = self.generate((i,), return_dict_in_generate=True, output_logits=True)
            ids = out.sequences
            with torch.no_grad():
                whole = self.model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **self.images((i,))
                )
            off = max(off, difference(torch.stack(out.logits, 1)[0], whole.logits[0, -NEW - 1 : -1]))
        return off

    def beams(self) -> float:
        together = self.generate((0, 1), num_beams=3)
        return max(unequal(together[i : i + 1], self.generate((i,), num_beams=3)) for i in (0, 1))

    def sampling(self) -> float:
        return unequal(self.generate((0, 1), do_sample=True), self.generate((0, 1), do_sample=True))

    def like_greedy(self, chosen=((0,), (1,)), **kwargs) -> float:
        for rows in chosen:
            if rows not in self.greedy:
                self.greedy[rows] = self.generate(rows)
        return max(unequal(self.generate(rows, **kwargs), self.greedy[rows]) for rows in chosen)

    def logits_like_greedy(self, **kwargs) -> float:
        """What may lie behind an answer that is the same by chance."""
        asked = {"return_dict_in_generate": True, "output_logits": True}
        pairs = [[self.generate((i,), **asked, **extra) for extra in ({}, kwargs)] for i in (0, 1)]
        found = [[torch.stack(out.logits, 1) for out in pair] for pair in pairs]
        return max(max(unequal(a.argmax(-1), b.argmax(-1)), difference(a, b)) for a, b in found)


def gradients(model, side: Side, all_trained: bool = True) -> dict[str, torch.Tensor]:
    """Of all parameters after the backward of one batch; with `all_trained` those that are trained must have one."""
    model.train()
    torch.manual_seed(0)  # some routers draw
    inputs = side.inputs((2, 3), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    try:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        for name, parameter in model.named_parameters():
            if all_trained and parameter.requires_grad and (name not in found or not found[name].any()):
                raise AssertionError(f"no gradient for {name}")
            if not parameter.requires_grad and name in found:
                raise AssertionError(f"a gradient for the frozen {name}")
        return found
    finally:
        model.zero_grad()
        model.eval()


def largest(a: dict, b: dict) -> float:
    scale = max(x.abs().max().item() for x in b.values())
    return max((a[key] - b[key]).abs().max().item() for key in b) / max(scale, 1e-6)


def text_row(family: str, tower, folder) -> Row:
    """
    Args:
        family (`str`): model type of a causal language model.
        tower (`Path`): checkpoint of a vision tower.
        folder (`Path`): an empty folder.
    """
    row, text = Row(family), folder / "text"
    try:
        config = CONFIG_MAPPING[family]()
        part = config.get_text_config(decoder=True)
        if type(part) is not type(config):
            row.set(COLUMNS, NOT_APPLICABLE, f"the text part is {part.model_type}")
            return row
        write_text(family, text)
        base = AutoModelForCausalLM.from_pretrained(text).eval()
        theirs = Side(base)
        theirs.logits((1,))
    except Exception as error:
        row.set(COLUMNS, NOT_APPLICABLE, f"transformers alone: {place(error)}")
        return row
    off, error = attempt(lambda: LavinForConditionalGeneration.from_vision_text_pretrained(tower, text).eval())
    if error is not None:
        row.set(COLUMNS, *refusal(error))
        return row

    def exact():
        plain = Side(off)
        return (
            max(
                unequal(plain.logits((1,)), theirs.logits((1,))),
                unequal(plain.logits((2, 3)), theirs.logits((2, 3))),
                unequal(plain.generate((1,)), theirs.generate((1,))),
            )
            * 9
        )

    judge(row, "off", exact)
    mma = {"dropout": 0.0}

    def adapted():
        return LavinForConditionalGeneration.from_vision_text_pretrained(tower, text, mma=dict(mma))

    model, error = attempt(adapted)
    if error is not None and is_ours(error) and family in TEXT_TARGETS:  # which it asks for
        row.set("adapter", *refusal(error))
        mma["target_modules"] = rf".*(vision_tower.*self_attn|language_model.*\.{TEXT_TARGETS[family]})"
        model, error = attempt(adapted)
    if error is not None:
        row.set(COLUMNS, *refusal(error))
        return row
    fill(model)
    lavin = model.get_base_model()
    size = lavin.config.vision_config.image_size
    pixels = torch.empty(1, 3, size, size).normal_(generator=torch.Generator().manual_seed(1))
    ours = Side(lavin, pixels)

    def acts():
        with_text = difference(ours.logits((1,)), theirs.logits((1,)))
        black = Side(lavin, pixels * 0)
        with_picture = difference(ours.logits((0,)), black.logits((0,)))
        return 0.0 if min(with_text, with_picture) > 1e-3 else 1.0

    judge(row, "adapter", acts)
    grads, error = attempt(lambda: gradients(model, ours))
    row.set("gradients", *((RIGHT, "") if error is None else (WRONG, place(error))))
    if error is None:
        judge(row, "checkpointing", lambda: checkpointed(model, ours, grads), lambda: checkpointed(base, theirs))
    row.set("checkpointing", NOT_APPLICABLE, "no gradients")
    judge(row, "batch", ours.batch, lambda: theirs.worst("batch"))
    judge(row, "left", lambda: ours.padding("left"), lambda: theirs.worst("padding", "left"))
    judge(row, "right", lambda: ours.padding("right"), lambda: theirs.worst("padding", "right"))
    judge(row, "cached", ours.cached, lambda: theirs.worst("cached"))
    judge(row, "beams", ours.beams, lambda: theirs.worst("beams"))
    judge(row, "sampling", ours.sampling, theirs.sampling)
    modes = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": base},
        "static": {"cache_implementation": "static"},
    }
    plain = Side(off)
    for column, arguments in modes.items():
        for ours_ in (ours, plain):
            judge(
                row,
                column,
                lambda ours_=ours_, a=arguments: ours_.like_greedy(**a),
                # A draft is several tokens in one forward: where that differs from single steps, answers do.
                lambda a=arguments: max(theirs.worst("logits_like_greedy", **a), theirs.worst("cached")),
                refuses=lambda a=arguments: theirs.generate((1,), **a),
            )
    judge(row, "save", lambda: reloaded(model, ours, folder))
    for modality, rows in (("text", (1,)), ("image", (0,))):
        judge(row, "fold", lambda m=modality, r=rows: merged(lavin, ours, m, r))
    judge(row, "fold", lambda: folded(lavin, ours))
    return row


def checkpointed(model, side, expected=None) -> float:
    """How far the gradients are off with gradient checkpointing."""
    if expected is None:
        expected = gradients(model, side, all_trained=False)
    model.gradient_checkpointing_enable()
    try:
        return largest(gradients(model, side, all_trained=False), expected)
    finally:
        model.gradient_checkpointing_disable()


def reloaded(model, side: Side, folder) -> float:
    off = 0.0
    for name, full in (("light", False), ("full", True)):
        side.model.save_pretrained(folder / name, full=full)
        again = Side(AutoModel.from_pretrained(folder / name).eval(), side.pixels)
        off = max(off, unequal(again.logits((0, 1)), side.logits((0, 1))))
    return off


@torch.no_grad()
def merged(lavin, side: Side, modality: str, rows) -> float:
    plain = lavin.merge_modality(modality)
    inputs = side.inputs(rows)
    images = inputs.pop("pixel_values", None)
    ids = inputs["input_ids"]
    embedded = lavin.get_input_embeddings()(ids.masked_fill(ids >= VOCAB, 0))
    if images is not None:
        tokens = lavin.get_image_features(images, return_dict=True).pooler_output
        embedded = embedded.masked_scatter((ids == lavin.config.image_token_id)[..., None], tokens)
    got = plain(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    return difference(got, side.logits(rows))


def folded(lavin, side: Side) -> float:
    expected = side.logits((2, 3)), side.logits((0,)), side.logits((1,))
    lavin.fold()
    got = side.logits((2, 3)), side.logits((0,)), side.logits((1,))
    mask = side.inputs((2, 3))["attention_mask"][..., None]
    off = difference(got[0] * mask, expected[0] * mask)
    return max(off, *(difference(a, b) for a, b in zip(got[1:], expected[1:], strict=True)))
