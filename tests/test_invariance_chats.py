"""
Chats of up to three turns, through the processor and `generate`: alone or in a batch, from the start or on a kept
cache, a turn's scores are the same; and every image of every turn matters to them. Drawn as in `test_invariance.py`.
"""

import functools

import pytest
import torch
from conftest import difference, fill
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_invariance import TOLERANCE, examples
from transformers import AutoModel

from lavin import LavinForConditionalGeneration, LavinProcessor


NEW = 4
COLOURS = {
    "black": Image.new("RGB", (28, 28), "black"),
    "white": Image.new("RGB", (28, 28), "white"),
    "noise": Image.effect_noise((28, 28), 200).convert("RGB"),
    "a gradient": Image.radial_gradient("L").convert("RGB"),
}
# A user's turn: its images, whether they come before the text, and the text.
PICTURES = st.lists(st.sampled_from(list(COLOURS)), max_size=2).map(tuple)
TURNS = st.tuples(PICTURES, st.booleans(), st.sampled_from(["what is this?", "The answer is B", "why?"]))
CHATS = st.lists(TURNS, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def model(pair):
    """The tiny pair with an adapter, its weights so large that everything matters."""
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text", mma={})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".mma." not in name:
                parameter.mul_(6)
    model = fill(model).eval().get_base_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def processor(pair):
    return LavinProcessor.from_vision_text_pretrained(str(pair / "vision"), str(pair / "text"))


def messages(chat) -> list[dict]:
    """Up to the last turn's question; what was answered before is given."""
    said = []
    for i, (pictures, before, text) in enumerate(chat):
        images = [{"type": "image", "image": COLOURS[name]} for name in pictures]
        words = [{"type": "text", "text": text}]
        said += [{"role": "assistant", "content": [{"type": "text", "text": "It is a B."}]}] * (i > 0)
        said.append({"role": "user", "content": images + words if before else words + images})
    return said


def prepare(processor, *chats) -> dict:
    return dict(
        processor.apply_chat_template(
            [messages(chat) for chat in chats],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    )  # fmt: skip


def answer(model, inputs, **arguments):
    """Scores of each new token, `(rows, tokens, vocabulary)`, and the tokens."""
    out = model.generate(
        **inputs, **arguments, do_sample=False, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits, 1), out.sequences[:, inputs["input_ids"].shape[1] :].tolist()


def kept_cache(model, inputs):
    """The cache of a prompt that was answered."""
    return model.generate(**inputs, do_sample=False, max_new_tokens=1, return_dict_in_generate=True).past_key_values


@examples(max_examples=12)
@given(chats=st.lists(CHATS, min_size=2, max_size=4))
def test_chats_in_a_batch(model, processor, chats):
    together, tokens = answer(model, prepare(processor, *chats))
    for i, chat in enumerate(chats):
        alone, (expected,) = answer(model, prepare(processor, chat))
        assert difference(together[i], alone[0]) < TOLERANCE and tokens[i] == expected


@examples(max_examples=15)
@given(chat=st.lists(TURNS, min_size=2, max_size=3))
def test_turns_on_a_kept_cache(model, processor, chat):
    """Each turn reads its own tokens only; an image after turns without one is refused."""
    first = prepare(processor, chat[:1])
    cache = kept_cache(model, first)
    seen = first["input_ids"].shape[1]
    assert cache.get_seq_length() == seen
    inputs = prepare(processor, chat)
    assert torch.equal(inputs["input_ids"][:, :seen], first["input_ids"])
    if not chat[0][0] and any(pictures for pictures, _, _ in chat[1:]):
        with pytest.raises(ValueError, match="An image after a cached prefix without one"):
            answer(model, inputs, past_key_values=cache)
        return
    if len(chat) == 3:
        second = prepare(processor, chat[:2])
        cache = model.generate(
            **second, past_key_values=cache, do_sample=False, max_new_tokens=1, return_dict_in_generate=True
        ).past_key_values
    scores, tokens = answer(model, inputs, past_key_values=cache)
    expected, expected_tokens = answer(model, inputs)
    assert difference(scores, expected) < TOLERANCE and tokens == expected_tokens


@pytest.mark.parametrize("shown, asked", [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)])
@examples(max_examples=5)
@given(chat=st.lists(TURNS, min_size=3, max_size=3), keep=st.booleans())
def test_every_image_matters_in_every_turn(model, processor, shown, asked, chat, keep):
    """An image in one turn, black, white or noise, and the first scores of the same or a later turn's answer."""
    scores = []
    for colour in ("black", "white", "noise"):
        pictures, before, text = chat[shown - 1]
        changed = [*chat[: shown - 1], ((colour, *pictures), before, text), *chat[shown:]][:asked]
        inputs, arguments = prepare(processor, changed), {}
        if keep and changed[0][0] and asked > 1:
            arguments["past_key_values"] = kept_cache(model, prepare(processor, changed[:1]))
        scores.append(answer(model, inputs, **arguments)[0][0, 0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert difference(scores[a], scores[b]) > 1e-3


def test_a_light_folder_through_bfloat16_is_exact(pair, processor, tmp_path):
    """Its base comes from its own checkpoints again, and what is trained stays in float32."""
    model = fill(LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text", mma={}))
    model.save_pretrained(tmp_path / "float32")
    AutoModel.from_pretrained(tmp_path / "float32", mma={}, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    inputs = prepare(processor, [(("noise",), True, "why?")], [((), True, "what is this?")])
    load = functools.partial(AutoModel.from_pretrained, dtype=torch.float32)
    expected, again = (answer(load(tmp_path / name), inputs)[0] for name in ("float32", "again"))
    assert torch.equal(again, expected)
    assert not torch.equal(answer(load(tmp_path / "again").to(torch.bfloat16), inputs)[0].float(), expected)
