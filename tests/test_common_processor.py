"""
transformers' processor and pipeline tests by their own names, on the processor and the model of a tiny pair. `make
conformance` runs the originals of the first kind; those of pipelines need model repositories.

| not here | because |
|---|---|
| templates, typed image tokens, assistant masks, rows without images, TRL's way | tests/test_processing.py |
| video, audio, tools | LaVIN has none |
"""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, pipeline

from lavin import LavinForConditionalGeneration, LavinProcessor


@pytest.fixture(scope="module")
def processor(pair):
    return LavinProcessor.from_vision_text_pretrained(pair / "vision", pair / "text")


@pytest.fixture
def folder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    return tmp_path


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(count)]


def texts(count):
    return [f"lower newer {'older ' * i}<image>" for i in range(count)]


# Saving and loading


def test_processor_to_json_string(processor):
    written = json.loads(processor.to_json_string())
    assert written["num_image_tokens"] == processor.num_image_tokens == 2
    assert written["image_token"] == "<image>" and written["processor_class"] == "LavinProcessor"


def test_processor_from_and_save_pretrained(processor, folder):
    """Saving changes neither the processor nor what a reloaded one is; only the processor names its code."""
    loaded = LavinProcessor.from_pretrained(folder)
    again = folder / "again"
    loaded.save_pretrained(again)
    for other in (loaded, LavinProcessor.from_pretrained(again)):
        assert other.to_dict() == processor.to_dict()
        assert repr(other.image_processor) == repr(processor.image_processor)
        assert other.chat_template == processor.chat_template
    written = json.loads((again / "processor_config.json").read_text())
    assert written["auto_map"] == {"AutoProcessor": "processing_lavin.LavinProcessor"}
    assert "auto_map" not in written["image_processor"]


def test_processor_from_and_save_pretrained_as_nested_dict(processor, folder):
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert image_processor.size == processor.image_processor.size
    assert image_processor.image_mean == processor.image_processor.image_mean
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab() and tokenizer.padding_side == "left"


def test_save_load_pretrained_additional_features(folder):
    loaded = LavinProcessor.from_pretrained(folder, cls_token="(CLS)", do_normalize=False)
    assert loaded.tokenizer.cls_token == "(CLS)" and loaded.image_processor.do_normalize is False
    other = AutoProcessor.from_pretrained(folder, num_image_tokens=5)
    inputs = other(text=texts(1), images=pictures(1))
    assert other.num_image_tokens == 5 == inputs.input_ids[0].count(other.image_token_id)


def test_chat_template_save_loading(processor, folder):
    assert (folder / "chat_template.jinja").read_text() == processor.chat_template
    assert "chat_template" not in json.loads((folder / "processor_config.json").read_text())
    assert LavinProcessor.from_pretrained(folder, chat_template="{{ bos_token }}").chat_template == "{{ bos_token }}"


# Calls


def test_model_input_names(processor):
    inputs = processor(text=texts(1), images=pictures(1), return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values"}


def test_subprocessor_defaults(processor):
    """Each kind of input alone is what its own part makes of it."""
    text, images = "lower newer", pictures(2)
    assert processor(text=text).input_ids == [processor.tokenizer(text).input_ids]
    expected = processor.image_processor(images, return_tensors="pt").pixel_values
    both = processor(text=texts(2), images=images, padding=True, return_tensors="pt")
    assert torch.equal(both.pixel_values, expected)


def test_tokenizer_decode_defaults(processor):
    ids = [[5, 30, 40, 1], [7, 8, 9, 2]]
    assert processor.batch_decode(ids) == processor.tokenizer.batch_decode(ids)
    assert processor.decode(ids[0], skip_special_tokens=True) == processor.tokenizer.decode(
        ids[0], skip_special_tokens=True
    )


def test_processor_with_multiple_inputs(processor):
    with pytest.raises((TypeError, ValueError)):
        processor()
    inputs = processor(text=texts(3), images=[[image] for image in pictures(3)], padding=True, return_tensors="pt")
    assert inputs.pixel_values.shape == (3, 3, 28, 28)
    assert (inputs.input_ids == processor.image_token_id).sum(1).tolist() == [2, 2, 2]


def test_if_input_has_mismatching_tokens_and_mm_data(processor):
    with pytest.raises(ValueError, match=" tokens in the prompts should be the same as the number of "):
        processor(text=texts(3), images=[[image] for image in pictures(4)], padding=True)


CALLS = {
    "flat": {"padding": "max_length", "max_length": 20, "do_rescale": True, "rescale_factor": -1.0},
    "structured": {
        "text_kwargs": {"padding": "max_length", "max_length": 20},
        "images_kwargs": {"do_rescale": True, "rescale_factor": -1.0},
    },
    "common": {
        "common_kwargs": {"return_tensors": "pt"},
        "text_kwargs": {"padding": "max_length", "max_length": 20},
        "images_kwargs": {"do_rescale": True, "rescale_factor": -1.0},
    },
}


@pytest.mark.parametrize("kwargs", CALLS.values(), ids=CALLS)
def test_structured_kwargs_nested(processor, kwargs):
    """Flat and structured arguments reach the same part, and win over its defaults."""
    inputs = processor(text=texts(2), images=pictures(2), **({"return_tensors": "pt"} | kwargs))
    assert inputs.input_ids.shape == (2, 20)
    default = processor(text=texts(2), images=pictures(2), padding=True, return_tensors="pt")
    assert inputs.pixel_values.mean() < -0.5 + default.pixel_values.mean()


def test_doubly_passed_kwargs(processor):
    with pytest.raises(ValueError):
        processor(text=texts(1), images=pictures(1), images_kwargs={"rescale_factor": -1.0}, rescale_factor=-1.0)


def test_kwargs_overrides_default_subprocessor_kwargs(processor, folder):
    loaded = LavinProcessor.from_pretrained(folder, rescale_factor=1.0)
    by_default = loaded(text=texts(1), images=pictures(1), return_tensors="pt").pixel_values
    at_call = loaded(text=texts(1), images=pictures(1), rescale_factor=-1.0, return_tensors="pt").pixel_values
    assert by_default.mean() > 50 and at_call.mean() < -50


def test_get_num_multimodal_tokens_matches_processor_call(processor):
    """What engines plan with is what a call gives, whatever the size."""
    sizes = [(100, 100), (300, 100), (5, 30)]
    images = [np.zeros((*size, 3), dtype=np.uint8) for size in sizes]
    inputs = processor(text=texts(3), images=images, padding=True, return_mm_token_type_ids=True, return_tensors="pt")
    planned = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert inputs.mm_token_type_ids.sum(-1).tolist() == planned["num_image_tokens"] == [2, 2, 2]
    assert planned["num_image_patches"] == [1, 1, 1]


def test_replacement_offsets(processor):
    inputs = processor(
        text=["a <image> b <image>"],
        images=[pictures(2)],
        return_text_replacement_offsets=True,
        add_special_tokens=False,
    )
    decoded = processor.decode(inputs.input_ids[0])
    (offsets,) = inputs["text_replacement_offsets"]
    assert len(offsets) == 2
    for entry in offsets:
        start, end = entry["new_span"]
        assert decoded[start:end] == entry["replacement"] == "<image><image>" and entry["type"] == "image"


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
@pytest.mark.parametrize("rows", [1, 2])
def test_apply_chat_template_image(processor, tmp_path, rows, return_tensors):
    """Images by path, in a batch, through the template and by hand: the same."""
    image = tmp_path / "picture.png"
    pictures(1)[0].save(image)
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "What is this?"}]
    messages = [[{"role": "user", "content": content}]] * rows
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": return_tensors}
    inputs = processor.apply_chat_template(messages, **kwargs)
    by_hand = processor(
        text=prompt, images=[[Image.open(image)]] * rows, add_special_tokens=False, return_tensors=return_tensors
    )
    assert set(inputs) == set(by_hand) and len(inputs["pixel_values"]) == rows
    for name, values in inputs.items():
        assert isinstance(values, torch.Tensor if return_tensors == "pt" else np.ndarray), name
        assert np.array_equal(np.asarray(values), np.asarray(by_hand[name])), name


def test_call_arguments_default_none():
    parameters = inspect.signature(LavinProcessor.__call__).parameters
    assert parameters["text"].default is None and parameters["images"].default is None


# The pipeline


@pytest.fixture(scope="module")
def pipe(pair, processor):
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text")
    return pipeline("image-text-to-text", model=model, processor=processor)


def user(*content):
    return [{"role": "user", "content": list(content)}]


QUESTION = {"type": "text", "text": "What is this?"}
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def test_pipeline_image_text_to_text(pipe):
    """Text with images, chats with and without, batched or not, and in full or only what is new."""
    first, second = pictures(2)
    chats = [user({"type": "image", "image": first}, QUESTION), user({"type": "image", "image": second}, QUESTION)]
    one = pipe(text=chats[0], **GREEDY)
    both = pipe(text=chats, **GREEDY)
    assert [answer[0]["generated_text"][-1]["role"] for answer in both] == ["assistant"] * 2
    assert both[0] == one
    assert pipe(text=chats, batch_size=2, **GREEDY) == both
    new = pipe(text=chats[0], return_full_text=False, **GREEDY)[0]["generated_text"]
    assert one[0]["generated_text"][-1]["content"] == new
    plain = pipe(text="Question: <image> what is this?", images=[first], **GREEDY)
    assert plain[0]["generated_text"].startswith("Question: ")


def test_pipeline_equals_generate(pipe):
    processor, model = pipe.processor, pipe.model
    chat = user({"type": "image", "image": pictures(1)[0]}, QUESTION)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, **GREEDY)
    answer = pipe(text=chat, return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    assert torch.equal(torch.as_tensor(answer), output[0])


def test_pipeline_text_only(pipe):
    answer = pipe(text=user(QUESTION), return_full_text=False, **GREEDY)[0]["generated_text"]
    assert isinstance(answer, str)
    with pytest.raises(ValueError, match="the same as the number of images"):
        pipe(text="<image> What is this?", **GREEDY)
