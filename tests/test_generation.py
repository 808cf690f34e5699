"""Generation: a row's modality is fixed at prefill and goes with the cache, whatever the way of decoding."""

import copy
import pickle

import pytest
import torch
from conftest import TEXTS, VOCAB, batch, difference, pixels, row, tiny_lavin
from transformers import DynamicCache, QuantizedCache, StaticCache

from lavin.routing_lavin import carry_modality


TOLERANCE = 2e-5
NEW = 6
IMAGES = (1, 0, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_lavin()


def greedy(model, new=NEW, **inputs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=new)


def slow_greedy(model, new=NEW, **inputs) -> torch.Tensor:
    """Row by row, without a cache and without `generate`: what every way of decoding must equal."""
    counts = (inputs["input_ids"] == model.config.image_token_id).sum(1) // model.config.num_image_tokens
    pictures = inputs["pixel_values"].split(counts.tolist()) if counts.sum() else [None] * len(counts)
    answers = []
    for ids, mask, picture in zip(inputs["input_ids"], inputs["attention_mask"], pictures, strict=True):
        ids = ids[mask.bool()][None]
        with torch.no_grad():
            for _ in range(new):
                seen = picture if picture is not None and len(picture) else None
                scores = model(input_ids=ids, pixel_values=seen, use_cache=False).logits[:, -1]
                if model.config.image_token_id < VOCAB:
                    scores[:, model.config.image_token_id] = -torch.inf
                ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        answers.append(ids[0, -new:])
    return torch.stack(answers)


def assert_answers(got, inputs, expected):
    assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("text", TEXTS)
def test_every_architecture_generates(text):
    model = tiny_lavin(text)
    inputs = batch(model.config, IMAGES)
    assert_answers(greedy(model, **inputs), inputs, slow_greedy(model, **inputs))


def test_beams(model):
    """Each row's beams stay its own, in a batch as alone."""
    inputs = batch(model.config, IMAGES)
    together = model.generate(**inputs, num_beams=3, max_new_tokens=NEW, do_sample=False)
    pictures = inputs["pixel_values"].split(IMAGES)
    for i, count in enumerate(IMAGES):
        ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()][None]
        picture = {"pixel_values": pictures[i]} if count else {}
        alone = model.generate(input_ids=ids, **picture, num_beams=3, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(alone[0, -NEW:], together[i, -NEW:])
    several = model.generate(**inputs, num_beams=4, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    assert len(several) == 2 * len(IMAGES)


def test_sampling_is_reproducible_and_takes_several_answers(model):
    inputs = batch(model.config, IMAGES)
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=NEW))
    assert torch.equal(*answers) and len(answers[0]) == 2 * len(IMAGES)


def test_a_good_assistant_saves_forwards(model):
    """The draft is used: with itself as assistant, the model accepts everything."""
    inputs = batch(model.config, (1,))
    assistant, calls = copy.deepcopy(model), []
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0
    handle = model.model.language_model.register_forward_hook(lambda *a: calls.append(1))
    greedy(model, new=12, **inputs, assistant_model=assistant)
    handle.remove()
    assert len(calls) <= 4  # and the routing pass


# The cache


def test_the_modality_follows_the_rows_of_a_cache(model):
    ids, pictures = torch.stack([row(model.config, 1, 6), row(model.config, 0, 9)]), pixels()
    token = torch.tensor([[7], [7]])
    with torch.no_grad():
        prefill = model(input_ids=ids, pixel_values=pictures, use_cache=True).past_key_values
        expected = model(input_ids=token, past_key_values=copy.deepcopy(prefill)).logits
        assert difference(expected[:1], expected[1:]) > 1e-2
        order = torch.tensor([1, 0])
        for change in (lambda c: c.reorder_cache(order), lambda c: c.batch_select_indices(order)):
            cache = copy.deepcopy(prefill)
            change(cache)
            assert difference(model(input_ids=token, past_key_values=cache).logits, expected[order]) < TOLERANCE
        cache = pickle.loads(pickle.dumps(prefill))
        cache.batch_repeat_interleave(2)
        assert cache.modality_ids.tolist() == [1, 1, 0, 0]
        out = model(input_ids=token.repeat_interleave(2, 0), past_key_values=cache).logits
        assert difference(out, expected.repeat_interleave(2, 0)) < TOLERANCE
        assert prefill.modality_ids.tolist() == [1, 0] and isinstance(prefill, DynamicCache)
        with pytest.raises(ValueError, match="cache holds 2 rows, the input 1"):
            model(input_ids=token[:1], past_key_values=prefill)
        for empty in (lambda c: c.crop(-c.get_seq_length()), lambda c: c.reset()):
            cache = StaticCache(config=model.config.text_config, max_cache_len=24)
            if empty.__code__.co_names[0] == "crop":
                cache = copy.deepcopy(prefill)
            else:
                model(input_ids=ids, pixel_values=pictures, past_key_values=cache)
            empty(cache)
            assert cache.modality_ids is None
        fresh = model(input_ids=ids, pixel_values=pictures, past_key_values=cache).logits
        assert difference(fresh, model(input_ids=ids, pixel_values=pictures).logits) < TOLERANCE


def test_an_image_after_a_text_prefix_is_an_error(model):
    with torch.no_grad():
        cache = model(input_ids=row(model.config, 0)[None], use_cache=True).past_key_values
        turn = {"input_ids": row(model.config, 1)[None], "pixel_values": pixels()}
        with pytest.raises(ValueError, match="An image after a cached prefix without one"):
            model(**turn, past_key_values=copy.deepcopy(cache))
        with pytest.raises(ValueError, match="An image after a cached prefix without one"):
            embeds = model.get_input_embeddings()(row(model.config, 0)[None])
            model(inputs_embeds=embeds, modality_ids=torch.ones(1), past_key_values=copy.deepcopy(cache))
        ids = torch.cat([row(model.config, 0), row(model.config, 1)])[None]
        with pytest.raises(ValueError, match="An image after a cached prefix without one"):
            model.generate(ids, pixel_values=pixels(), past_key_values=copy.deepcopy(cache), max_new_tokens=2)
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(input_ids=turn["input_ids"], past_key_values=copy.deepcopy(cache))
        with pytest.raises(ValueError, match="An image after a cached prefix without one"):
            base = model.model.language_model
            model.model.routing.weights = {layer.key: torch.ones(1, 2) for layer in model.model.routing.layers}
            foreign = base(input_ids=row(model.config, 0)[None], use_cache=True).past_key_values
            model.model.routing.weights = None
            model(**turn, past_key_values=foreign)


@pytest.mark.parametrize("second_images", [0, 1])
@pytest.mark.parametrize("given", ["everything", "new images", "new tokens"])
def test_a_second_turn_on_a_kept_cache(model, second_images, given):
    """As a processor gives it: the ids of the whole conversation, with all its images or with the new ones."""
    first, second = row(model.config, 1, 5), row(model.config, second_images, 4, seed=8)
    pictures = pixels(1 + second_images)
    answered = model.generate(
        first[None], pixel_values=pictures[:1], max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    conversation = torch.cat([answered.sequences[0], second])[None]
    inputs = {"input_ids": conversation, "attention_mask": torch.ones_like(conversation), "pixel_values": pictures}
    expected = slow_greedy(model, **inputs)
    cache = answered.past_key_values
    turn = dict(inputs)
    if given != "everything":
        turn["pixel_values"] = pictures[1:] if second_images else None
    if given == "new tokens":
        turn["input_ids"] = conversation[:, cache.get_seq_length() :]
    got = greedy(model, **{k: v for k, v in turn.items() if v is not None}, past_key_values=cache)
    assert torch.equal(got[:, -NEW:], expected)


def test_a_second_turn_by_hand(model):
    first, second = row(model.config, 1, 5)[None], row(model.config, 1, 4, seed=8)[None]
    with torch.no_grad():
        whole = model(input_ids=torch.cat([first, second], 1), pixel_values=pixels(2)).logits
        cache = model(input_ids=first, pixel_values=pixels(2)[:1], use_cache=True).past_key_values
        out = model(input_ids=second, pixel_values=pixels(2)[1:], past_key_values=cache).logits
    assert difference(out, whole[:, first.shape[1] :]) < TOLERANCE


def test_generate_from_inputs_embeds(model):
    inputs = batch(model.config, (1,))
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids.masked_fill(ids == model.config.image_token_id, 0))
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[ids == model.config.image_token_id] = features.flatten(0, 1)
    got = greedy(model, inputs_embeds=embeds, modality_ids=torch.tensor([1]))
    assert torch.equal(got, slow_greedy(model, **inputs))
    beams = model.generate(inputs_embeds=embeds, modality_ids=torch.tensor([1]), num_beams=3, max_new_tokens=NEW)
    assert torch.equal(beams, model.generate(**inputs, num_beams=3, max_new_tokens=NEW)[:, -NEW:])


def test_any_cache_class_carries_the_modality():
    assert isinstance(carried := DynamicCache(), DynamicCache)
    carry_modality(carried)
    kind = type(carried)
    carry_modality(carried)
    assert type(carried) is kind and kind.__name__ == "DynamicCache" and isinstance(carried, DynamicCache)
    assert issubclass(QuantizedCache, DynamicCache.__mro__[1])


# The image token is never generated


@pytest.mark.parametrize("text", ["llama2_padded", "qwen2_padded"])
@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 3}]
)
def test_the_image_token_is_not_generated(text, way):
    model = tiny_lavin(text)
    with torch.no_grad():  # forced: the image token's score is the highest by far
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, VOCAB)
        model.lm_head.bias[model.config.image_token_id] = 1e4
    inputs = batch(model.config, (1,))
    with torch.no_grad():
        assert model(**inputs).logits[0, -1].argmax() == model.config.image_token_id
    got = model.generate(**inputs, **{"do_sample": False, **way}, max_new_tokens=NEW)
    assert (got[:, inputs["input_ids"].shape[1] :] != model.config.image_token_id).all()


@pytest.mark.parametrize("text", ["llama2", "llama2_padded"])
@pytest.mark.parametrize(
    "processor",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 4, "eos_token_id": 2},
        {"do_sample": True, "top_p": 0.75, "temperature": 0.1},
    ],
    ids=lambda p: next(iter(p)),
)
def test_logits_processors_cope_with_the_image_token(text, processor):
    model = tiny_lavin(text)
    inputs = batch(model.config, (1, 2))
    got = model.generate(**inputs, **{"do_sample": False, **processor}, max_new_tokens=NEW)
    assert got.shape[1] > inputs["input_ids"].shape[1]
    assert (got[:, inputs["input_ids"].shape[1] :] < VOCAB).all()
