"""What `lavin serve` makes of a request's body and of its images, without a server."""

import io
import json

import pytest
from openai.types.chat import ChatCompletionMessage
from PIL import Image
from test_serve import data_url, picture

from lavin.recipes.serve.images import read_images
from lavin.recipes.serve.schema import OBJECTS, Limits, Refused, parse_request


LIMITS = Limits(context=100, images=4, image_pixels=100_000)


def body(messages) -> bytes:
    return json.dumps({"model": "tiny", "messages": messages}).encode()


def reason(call, *arguments) -> Refused:
    with pytest.raises(Refused) as error:
        call(*arguments)
    return error.value


def read(*pictures: bytes) -> list[Image.Image]:
    return read_images([(data_url(data), f"image {i}") for i, data in enumerate(pictures)], LIMITS)


def scans(data: bytes, more: int) -> bytes:
    """A progressive JPEG with its last scan so many times more."""
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * more + data[end:]


def test_one_wrong_message_is_enough():
    """What is wrong with the others is not looked for."""
    hello = {"role": "user", "content": "x"}
    assert reason(parse_request, body([hello, 1])).param == "messages.1"
    assert reason(parse_request, body([1] * 100_000)).message == reason(parse_request, body([1])).message
    many = reason(parse_request, body([hello] * (OBJECTS + 1)))
    assert many.status == 400 and f"more than {OBJECTS} objects" in many.message
    assert len(parse_request(body([hello] * 1000)).messages) == 1000


def test_an_answer_can_be_sent_back():
    """As the `openai` client gives it, with everything that is not in it as null; but a tool's call is not ignored."""
    answer = ChatCompletionMessage(role="assistant", content="Yes.")
    for said in (answer.model_dump(), {**answer.model_dump(), "tool_calls": [], "annotations": [], "name": "a"}):
        assert parse_request(body([{"role": "user", "content": "x"}, said])).messages[1].content[0].text == "Yes."
    called = {**answer.model_dump(), "tool_calls": [{"id": "1", "type": "function"}]}
    refused = reason(parse_request, body([called]))
    assert refused.param == "messages.0.tool_calls" and "is not supported" in refused.message
    assert "`mood` is not known" in reason(parse_request, body([{**answer.model_dump(), "mood": "good"}])).message


def test_images_are_counted_together():
    """Before any is decoded: what lies behind the sizes of the last, here nothing, is not looked at."""
    assert [image.size for image in read(picture("red", (200, 200)), picture("red", (200, 300)))] == [
        (200, 200),
        (200, 300),
    ]
    refused = reason(read, picture("red", (300, 300))[:60], picture("red", (200, 100)))
    assert "200 x 100 pixels, the images of the request up to it 110000; at most 100000" in refused.message
    assert refused.param == "image 1"
    assert "5 images; at most 4" in reason(read, *[picture("red", (1, 1))] * 5).message


def test_images_that_are_lines():
    """A processor that scales the shorter side to the tower's would make them huge."""
    assert [image.size for image in read(picture("red", (1, 100)), picture("red", (700, 7)))] == [(1, 100), (700, 7)]
    for size in ((1, 101), (900, 8)):
        assert "no side may be more than 100 times the other" in reason(read, picture("red", size)).message


def test_scans_of_a_jpeg():
    """Each passes over all pixels: a small file could keep a reader for hours."""
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "JPEG", progressive=True, exif=picture("red", (20, 20), format="JPEG"))
    usual = file.getvalue()
    assert 5 < usual.count(b"\xff\xda") < 20
    expected = Image.open(file).convert("RGB")
    for data in (usual, scans(usual, 50)):
        (found,) = read(data)
        assert found.size == expected.size
    assert read(usual)[0].tobytes() == expected.tobytes()
    assert "more than 100 scans" in reason(read, scans(usual, 100)).message
