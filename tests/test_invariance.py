"""
A row's result depends on the row alone: not on its batch-mates, nor on any way of computing the same thing.

Hypothesis draws rows of text with images anywhere in them, and batches of such rows. What a row must give is computed
from the row alone: one forward without padding and cache and, for `generate`, one such forward per token. In float32:
within 1e-5 on logits of size 5, and the same tokens. The draws are derandomized: with new ones in every run, CI could
fail on a commit that changed nothing.
"""

import functools

import pytest
import torch
from conftest import BOS, PAD, TEXTS, difference, pad, pixels, tiny_lavin
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


TOLERANCE = 1e-5
NEW = 5
# No shrinking: what breaks one of these breaks many, and each would then look for smaller rows for minutes.
PHASES = (Phase.explicit, Phase.generate)
examples = functools.partial(settings, deadline=None, derandomize=True, database=None, phases=PHASES)

# A row: from 0 on a token, the pad token's id too, below 0 an image, and which. A third of the rows have no image.
ROWS = st.lists(st.integers(-9, 44), min_size=1, max_size=9).map(tuple)
BATCHES = st.lists(ROWS, min_size=1, max_size=4)
TEXT = st.sampled_from(list(TEXTS))
MORE_PADDING = st.integers(0, 5)


@functools.cache
def lavin(text: str = "llama2", attention: str = "sdpa", checkpointing: bool = False):
    model = tiny_lavin(text, mma={"dropout": 0.0})
    model.set_attn_implementation(attention)
    for tower in (model.model.vision_tower, model.model.language_model):
        assert tower.config._attn_implementation == attention
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    return model


def ids_of(row, config) -> torch.Tensor:
    image = [config.image_token_id] * config.num_image_tokens
    return torch.tensor([BOS, *(token for piece in row for token in (image if piece < 0 else [piece]))])


def pictures_of(*rows) -> torch.Tensor | None:
    pictures = [pixels(seed=piece) for row in rows for piece in row if piece < 0]
    return torch.cat(pictures) if pictures else None


def inputs_of(rows, config, side: str = "left", more: int = 0) -> dict:
    inputs = pad([ids_of(row, config) for row in rows], side)
    amount = (more, 0) if side == "left" else (0, more)
    inputs = {name: F.pad(x, amount, value=PAD) for name, x in inputs.items()}
    return {**inputs, "pixel_values": pictures_of(*rows)}


def positions_of(inputs) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def logits(model, inputs) -> list[torch.Tensor]:
    """Of each row, without its padding."""
    with torch.no_grad():
        out = model(**inputs, position_ids=positions_of(inputs)).logits
    return [x[mask.bool()] for x, mask in zip(out, inputs["attention_mask"], strict=True)]


@functools.lru_cache(512)
def alone(text: str, row: tuple) -> torch.Tensor:
    """The logits a row must have."""
    model = lavin(text)
    with torch.no_grad():
        return model(ids_of(row, model.config)[None], pixel_values=pictures_of(row), use_cache=False).logits[0]


@functools.lru_cache(512)
def answer(text: str, row: tuple, new: int = NEW) -> list[int]:
    """The tokens that must be generated after a row."""
    image, tokens = lavin(text).config.image_token_id, []
    for _ in range(new):
        scores = alone(text, (*row, *tokens))[-1].clone()
        scores[image : image + 1] = -torch.inf  # where a padded vocabulary holds it
        tokens.append(int(scores.argmax()))
    return tokens


def assert_as_alone(got, text, rows):
    for x, row in zip(got, rows, strict=True):
        assert difference(x, alone(text, row)) < TOLERANCE, row


def generate(model, inputs, new: int = NEW, **arguments) -> list[list[int]]:
    """The new tokens of each row."""
    out = model.generate(**inputs, do_sample=False, max_new_tokens=new, **arguments)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


# One forward


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", TEXTS)
@examples(max_examples=6)
@given(rows=BATCHES, more=MORE_PADDING, attention=st.sampled_from(["sdpa", "eager"]))
def test_batch_order_padding_and_attention(text, side, rows, more, attention):
    model = lavin(text, attention)
    for order in (rows, rows[::-1]):
        assert_as_alone(logits(model, inputs_of(order, model.config, side, more)), text, order)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("text", TEXTS)
@examples(max_examples=5)
@given(rows=BATCHES, more=MORE_PADDING, cuts=st.sets(st.integers(1, 20), max_size=20))
def test_cache_and_chunks_by_hand(text, kind, rows, more, cuts):
    """Cut anywhere, within an image too: a token at a time, in chunks, or all at once."""
    model = lavin(text)
    inputs = inputs_of(rows, model.config, more=more)
    mask, positions = inputs["attention_mask"], positions_of(inputs)
    is_image = inputs["input_ids"] == model.config.image_token_id
    length, decoder = mask.shape[1], model.config.text_config
    cache = StaticCache(decoder, max_cache_len=40) if kind == "static" else DynamicCache(config=decoder)
    steps = []
    with torch.no_grad():
        features = torch.zeros(*is_image.shape, decoder.hidden_size)
        if is_image.any():
            features[is_image] = model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        ends = [*sorted(cut for cut in cuts if cut < length), length]
        for start, end in zip([0, *ends], ends, strict=False):
            images = features[:, start:end][is_image[:, start:end]]
            out = model(
                input_ids=inputs["input_ids"][:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                modality_ids=None if start else is_image.any(1).long(),  # from then on the cache knows
                mm_encoder_outputs={"image": type("Images", (), {"pooler_output": images})} if len(images) else None,
            )
            steps.append(out.logits)
    got = torch.cat(steps, 1)
    assert_as_alone([x[m.bool()] for x, m in zip(got, mask, strict=True)], text, rows)


@examples(max_examples=12)
@given(text=TEXT, rows=BATCHES, more=MORE_PADDING)
def test_gradient_checkpointing(text, rows, more):
    """In training, with gradients on, as trainers call it."""
    model = lavin(text, checkpointing=True)
    inputs = inputs_of(rows, model.config, "right", more)
    out = model(**inputs).logits.detach()
    assert_as_alone([x[m.bool()] for x, m in zip(out, inputs["attention_mask"], strict=True)], text, rows)


# `generate`

WAYS = {
    "a batch": {},
    "one beam": {"num_beams": 1},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "empty cache object": {"past_key_values": DynamicCache},
    "in chunks": {"prefill_chunk_size": 3},
    "in chunks, static cache": {"prefill_chunk_size": 2, "cache_implementation": "static"},
    "eager attention": {},
    "gradient checkpointing": {},
}


def arguments_of(way: str, text: str) -> tuple:
    """The model and the arguments of a way to generate."""
    arguments = {name: value() if isinstance(value, type) else value for name, value in WAYS[way].items()}
    return lavin(text, "eager" if "eager" in way else "sdpa", "checkpointing" in way), arguments


@pytest.mark.parametrize("way", WAYS)
@examples(max_examples=12)
@given(text=TEXT, rows=BATCHES, more=MORE_PADDING, chunk=st.integers(1, 12))
def test_generate(way, text, rows, more, chunk):
    model, arguments = arguments_of(way, text)
    if "prefill_chunk_size" in arguments:
        arguments["prefill_chunk_size"] = chunk
    got = generate(model, inputs_of(rows, model.config, more=more), **arguments)
    assert got == [answer(text, row) for row in rows]


@functools.cache
def assistant(kind: str, text: str) -> dict:
    if kind == "prompt lookup":
        return {"prompt_lookup_num_tokens": 4}
    if kind == "lavin":
        return {"assistant_model": tiny_lavin(text, seed=5)}
    small = AutoModelForCausalLM.from_config(lavin(text).config.text_config).eval()
    small.get_decoder().load_state_dict(tiny_lavin(text, adapter=False).model.language_model.state_dict())
    small.generation_config.pad_token_id = PAD
    return {"assistant_model": small}


@pytest.mark.parametrize("kind", ["lavin", "text only", "prompt lookup"])
@examples(max_examples=15)
@given(text=TEXT, row=ROWS, repeated=st.integers(0, 2))
def test_assisted_decoding(kind, text, row, repeated):
    """The row ends as it began: what followed then, image tokens too, are candidates now."""
    row = (*row, BOS, *(piece for piece in row[:repeated] if piece >= 0))
    got = generate(lavin(text), inputs_of([row], lavin(text).config), **assistant(kind, text))
    assert got == [answer(text, row)]


# What it must depend on


def colours() -> list[torch.Tensor]:
    """A black, a white and a noise image, as CLIP's processor gives them."""
    like = pixels()
    return [torch.full_like(like, -1.8), torch.full_like(like, 2.1), pixels(seed=77)]


@pytest.mark.parametrize("way", WAYS)
@examples(max_examples=8)
@given(text=TEXT, rows=BATCHES, data=st.data())
def test_an_image_matters_to_its_row_and_to_no_other(way, text, rows, data):
    """The first scores in `generate`; which image of a row it is, and where, is drawn."""
    model, _ = arguments_of(way, text)
    owners = [i for i, row in enumerate(rows) for piece in row if piece < 0]
    if not owners:
        rows, owners = [(*rows[0], -1), *rows[1:]], [0]
    which = data.draw(st.integers(0, len(owners) - 1))
    inputs, scores = inputs_of(rows, model.config), []
    for picture in colours():
        inputs["pixel_values"][which] = picture[0]
        out = model.generate(
            **inputs, **arguments_of(way, text)[1], do_sample=False, max_new_tokens=1,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        scores.append(out.logits[0])
    others = [i for i in range(len(rows)) if i != owners[which]]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert difference(scores[a][owners[which]], scores[b][owners[which]]) > 1e-3
        assert not others or difference(scores[a][others], scores[b][others]) < TOLERANCE
