"""
Where a turn's images stand: before its text in every way in, whatever order the messages have, unless the processor
says that its model was trained with both interleaved.
"""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline

from lavin import LavinForConditionalGeneration, LavinProcessor


RED, BLUE = Image.new("RGB", (20, 12), "red"), Image.effect_noise((30, 9), 90).convert("RGB")
NAMES = {"R": RED, "B": BLUE}
# Parts as they come (R and B are images), and the same with the images first.
ORDERS = {
    "text first": (["what is this?", "R"], ["R", "what is this?"]),
    "text between": (["R", "what is", "B", "this?"], ["R", "B", "what is this?"]),
    "image between": (["what is", "B", "this?", "R"], ["B", "R", "what is this?"]),
    "own spaces": (["what is ", "R", "this", "B", " Image?"], ["R", "B", "what is this Image?"]),
    "empty texts": (["", "R", "what is this?", "B", ""], ["R", "B", "what is this?"]),
    "a token in two": (["<ima", "R", "ge> this"], ["R", "<ima ge> this"]),
    "images first": (["R", "B", "what is this?"], ["R", "B", "what is this?"]),
}


def user(parts, key="image", none=False):
    content = [
        {"type": "image", **({} if key is None else {key: NAMES[part]}), **({"text": None} if none else {})}
        if part in NAMES
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def said(text="It is a B."):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def pictures(*turns):
    return [NAMES[part] for parts in turns for part in parts if part in NAMES]


def inputs(processor, chat, **kwargs):
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(chat, **kwargs)


def same(a, b):
    assert sorted(a) == sorted(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def processor(pair):
    return LavinProcessor.from_vision_text_pretrained(pair / "vision", pair / "text")


@pytest.fixture(scope="module")
def folder(pair, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lavin")
    processor.save_pretrained(folder)
    LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ORDERS)
def test_processor(processor, name):
    """One turn, several, a batch; the pixels go with their places, and the messages stay as they were."""
    mixed, first = ORDERS[name]
    chat = [user(mixed)]
    before = repr(chat)
    same(inputs(processor, chat), inputs(processor, [user(first)]))
    assert repr(chat) == before
    turns = [
        [user(parts), said(), user(["why?"]), said("No."), user(parts), *more]
        for parts, more in ((mixed, []), (first, []), (mixed, [said()]))
    ]
    same(inputs(processor, turns[0]), inputs(processor, turns[1]))
    same(inputs(processor, [turns[0]]), inputs(processor, [turns[1]]))
    text = processor.apply_chat_template(turns[0], add_generation_prompt=True)
    assert processor.apply_chat_template(turns[2], add_generation_prompt=False).startswith(text)


def test_other_forms(processor):
    """OpenAI's parts, paths, what `datasets` makes of rows, a template of another's, several messages of one turn."""
    expected = inputs(processor, [user(["R", "why?"])])
    file = io.BytesIO()
    RED.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    openai = [{"type": "text", "text": "why?"}, {"type": "image_url", "image_url": {"url": url}}]
    same(inputs(processor, [{"role": "user", "content": openai}]), expected)
    same(inputs(processor, [user(["why?", "R"], none=True)]), expected)
    same(inputs(processor, ({"role": "user", "content": tuple(user(["why?", "R"])["content"])},)), expected)
    same(inputs(processor, [{"role": "user", "content": "why?"}, user(["R"])]), expected)
    same(inputs(processor, [user(["R"]), {"role": "user", "content": "why?"}]), expected)
    other = "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    assert processor.apply_chat_template([user(["a", "R", "b"], key=None)], other) == "<image>a b"
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    same(inputs(processor, [system, user(["why?", "R"])]), inputs(processor, [system, user(["R", "why?"])]))


def test_interleaved_where_the_processor_says_so(pair, processor, tmp_path):
    interleaved = LavinProcessor.from_vision_text_pretrained(pair / "vision", pair / "text", image_order="interleaved")
    mixed = user(["what is", "R", "this?", "B"], key=None)
    assert interleaved.apply_chat_template([mixed]).endswith(" Image: what is <image> this? <image>")
    interleaved.save_pretrained(tmp_path / "interleaved")
    processor.save_pretrained(tmp_path / "first")
    for name in ("interleaved", "first"):
        file = tmp_path / name / "processor_config.json"
        assert json.loads(file.read_text())["image_order"] == name
        assert AutoProcessor.from_pretrained(tmp_path / name).image_order == name
    written = json.loads(file.read_text())
    del written["image_order"]  # a folder of before
    file.write_text(json.dumps(written))
    old = AutoProcessor.from_pretrained(tmp_path / "first")
    assert old.image_order == "first"
    same(inputs(old, [user(["why?", "R"])]), inputs(processor, [user(["R", "why?"])]))
    with pytest.raises(ValueError, match='must be "first" or "interleaved", got "last"|got \'last\''):
        LavinProcessor.from_vision_text_pretrained(pair / "vision", pair / "text", image_order="last")


def test_init_writes_it(pair, tmp_path):
    from lavin.recipes.cli import main

    command = ["init", "--vision", str(pair / "vision"), "--text", str(pair / "text"), "--output"]
    for order in ("interleaved", "first"):
        arguments = ["--image-order", order] if order == "interleaved" else []
        assert main([*command, str(tmp_path / order), *arguments]) == 0
        assert LavinProcessor.from_pretrained(tmp_path / order).image_order == order


@pytest.mark.parametrize("name", ORDERS)
def test_training(processor, name):
    """Through TRL's collator, prompt and completion apart and as one talk."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    mixed, first = ORDERS[name]
    rows = [{"images": pictures(p), "prompt": [user(p, None)], "completion": [said()]} for p in (mixed, first)]
    collate = sft.DataCollatorForVisionLanguageModeling(processor=processor, completion_only_loss=True)
    same(collate(rows[:1]), collate(rows[1:]))
    rows = [
        {"images": pictures(p, p), "messages": [user(p, None), said(), user(p, None), said("No.")]}
        for p in (mixed, first)
    ]
    collate = sft.DataCollatorForVisionLanguageModeling(processor=processor)
    same(collate(rows[:1]), collate(rows[1:]))


@pytest.mark.parametrize("name", ORDERS)
def test_serve(processor, name):
    pytest.importorskip("fastapi")
    from lavin.recipes.serve.prompts import read_prompt
    from lavin.recipes.serve.schema import Limits, parse_request

    def request(parts):
        content = []
        for part in parts:
            if part in NAMES:
                file = io.BytesIO()
                NAMES[part].save(file, "PNG")
                url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
                content.append({"type": "image_url", "image_url": {"url": url}})
            else:
                content.append({"type": "text", "text": part})
        message = {"role": "user", "content": content}
        return parse_request(json.dumps({"model": "x", "messages": [message]}).encode())

    mixed, first = (read_prompt(processor, request(parts), Limits(context=200)) for parts in ORDERS[name])
    expected = inputs(processor, [user(ORDERS[name][1])])
    for prompt in (mixed, first):
        assert torch.equal(prompt.input_ids, expected["input_ids"][0])
        assert torch.equal(prompt.pixel_values, expected["pixel_values"])


def test_answers(folder):
    """`lavin eval`'s and `lavin ask`'s way, and the pipeline's."""
    from lavin.recipes.ask import ask
    from lavin.recipes.evaluate.answers import answer
    from lavin.recipes.load import load_model

    model, processor = load_model(folder, device="cpu")
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    mixed, first = ORDERS["text between"]
    prompts = [[user(parts, None)] for parts in (mixed, first)] + [first[-1]]
    texts = answer(model, processor, prompts, [pictures(first)] * 3, max_new_tokens=5)
    assert texts[0] == texts[1] == texts[2]
    RED.save(folder / "R.png")
    BLUE.save(folder / "B.png")
    asked = ask(folder, first[-1], [str(folder / f"{name}.png") for name in "RB"], max_new_tokens=5, device="cpu")
    assert asked == texts[0].strip()
    kwargs = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    piped = [pipe(text=[user(parts)], **kwargs)[0]["generated_text"] for parts in (mixed, first)]
    assert piped[0] == piped[1] == texts[0]
