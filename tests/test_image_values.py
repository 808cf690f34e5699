"""
The same picture as a file, a PIL image, an array or a tensor of any kind gives the same pixels; what cannot be read is
refused, by its place and with its range.
"""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lavin import LavinProcessor
from lavin.images_lavin import read_image


SIZE = (20, 12)  # height and width
PICTURE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
PICTURE[0, 0], PICTURE[0, 1] = 0, 255
GREY = PICTURE[..., 0]
ALPHA = np.full((*SIZE, 1), 255, np.uint8)
UNIT, FIRST = PICTURE / 255, np.moveaxis(PICTURE, -1, 0)
TENSOR = torch.tensor(UNIT).permute(2, 0, 1)  # as `ToTensor()` gives it, in float64


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits with 1 (grey), 2, 3 or 4 channels."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[-1]]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(values: np.ndarray, big: bool) -> bytes:
    """A TIFF of 16 bits in colour, which Pillow reads but does not write."""
    order = ">" if big else "<"
    height, width, channels = values.shape
    data = values.astype(f"{order}u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14)]
    tags += [(277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))]
    head = (b"MM" if big else b"II") + struct.pack(f"{order}HIHHH", 42, 14 + len(data), 16, 16, 16)
    table = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        packed = struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value)
        table += struct.pack(f"{order}HHI", tag, kind, count) + packed
    return head + data + table + bytes(4)


def deep(values: np.ndarray, bits: int) -> np.ndarray:
    """8 bits as a camera of so many would have taken them, the lower ones not all the same."""
    noise = np.random.default_rng(1).integers(0, 1 << bits - 8, values.shape)
    return ((values.astype(np.uint16) << bits - 8) + noise).astype(np.uint16)


COLOUR = {
    "uint8": PICTURE,
    "uint8, channels first": FIRST,
    "uint8, with alpha": np.concatenate([PICTURE, ALPHA], -1),
    "a view": np.asfortranarray(PICTURE[::-1])[::-1],
    "int64": PICTURE.astype(np.int64),
    "float32 in [0, 1]": UNIT.astype(np.float32),
    "float64 in [0, 1], channels first": FIRST / 255,
    "float16 in [0, 1]": UNIT.astype(np.float16),
    "float32 in [0, 255]": PICTURE.astype(np.float32),
    "float16 in [0, 255]": PICTURE.astype(np.float16),
    "rounded a little": UNIT * 1.001 - 0.0005,
    "floats in [0, 65535]": PICTURE.astype(np.float32) * 257,
    "uint16, 16 bits": PICTURE.astype(np.uint16) * 257,
    "int32, 16 bits": deep(PICTURE, 16).astype(np.int32),
    "uint16, 14 bits": deep(PICTURE, 14),
    "uint16, 12 bits": deep(PICTURE, 12),
    "uint16, 10 bits": deep(PICTURE, 10),
    "uint16, 8 bits": PICTURE.astype(np.uint16),
    "big-endian": deep(PICTURE, 12).astype(">u2"),
    "a tensor": TENSOR.float(),
    "a tensor, float16": TENSOR.half(),
    "a tensor, bfloat16": TENSOR.bfloat16(),
    "a tensor, uint8": torch.tensor(FIRST),
    "a tensor, channels last": torch.tensor(UNIT),
    "a tensor, of a batch of one": TENSOR[None],
    "a tensor with a gradient": TENSOR.float().requires_grad_(),
    "a tensor, with alpha": torch.cat([TENSOR, torch.ones(1, *SIZE)]),
    "an array of a batch of one": UNIT[None],
    "a PNG": encoded(Image.fromarray(PICTURE), "PNG"),
    "a PNG of 16 bits": png(PICTURE.astype(np.uint16) * 257),
    "a PNG of 12 bits": png(deep(PICTURE, 12)),
    "a PNG of 12 bits, with alpha": png(deep(np.concatenate([PICTURE, ALPHA], -1), 12)),
    "a TIFF of 16 bits": tiff(deep(PICTURE, 16), True),
    "a TIFF of 12 bits": tiff(deep(PICTURE, 12), False),
    "a TIFF of 12 bits, big-endian": tiff(deep(PICTURE, 12), True),
}
GREYS = {
    "(H, W)": GREY,
    "(H, W) in [0, 1]": GREY / 255,
    "(H, W, 1)": GREY[..., None],
    "(1, H, W)": GREY[None],
    "(1, 1, H, W)": torch.tensor(GREY / 255)[None, None],
    "(H, W, 2)": np.stack([GREY, ALPHA[..., 0]], -1),
    "(2, H, W) in [0, 1]": np.stack([GREY, ALPHA[..., 0]]) / 255,
    "a tensor (H, W)": torch.tensor(GREY),
    "uint16, 12 bits": deep(GREY, 12),
    "mode F in [0, 1]": Image.fromarray((GREY / 255).astype(np.float32)),
    "mode F in [0, 255]": Image.fromarray(GREY.astype(np.float32)),
    "mode I": Image.fromarray(GREY.astype(np.int32)),
    "mode I, 16 bits": Image.fromarray(deep(GREY, 16).astype(np.int32)),
    "mode I;16": Image.fromarray(deep(GREY, 16)),
    "mode I;16, 12 bits": Image.fromarray(deep(GREY, 12)),
    "mode I;16, 8 bits": Image.fromarray(GREY.astype(np.uint16)),
    "mode LA": Image.fromarray(np.stack([GREY, GREY], -1)),
    "a float TIFF": encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
    "a TIFF of 12 bits": encoded(Image.fromarray(deep(GREY, 12)), "TIFF"),
    "a PNG of 12 bits": encoded(Image.fromarray(deep(GREY, 12)), "PNG"),
    "a PNG of 12 bits, with alpha": png(deep(np.stack([GREY, ALPHA[..., 0]], -1), 12)),
}
BITS = {
    "bool": GREY > 99,
    "a bool tensor": torch.tensor(GREY > 99),
    "mode 1": Image.fromarray(GREY > 99),
    "0 and 1 as floats": (GREY > 99).astype(np.float32),
}
MEANT = {
    **{f"colour: {name}": (image, PICTURE) for name, image in COLOUR.items()},
    **{f"grey: {name}": (image, np.stack([GREY] * 3, -1)) for name, image in GREYS.items()},
    **{f"bits: {name}": (image, np.stack([(GREY > 99) * 255] * 3, -1)) for name, image in BITS.items()},
    "black": (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3))),
    "white": (torch.ones(3, 4, 4), np.full((4, 4, 3), 255)),
    "grey of 12 bits all over": (np.full((5, 5), 2048, np.uint16), np.full((5, 5, 3), 128)),
    "dark, 16 bits": (GREY.astype(np.uint16) // 20 * 257, np.stack([GREY // 20] * 3, -1)),
    "dark, 16 bits by shifting": (GREY.astype(np.uint16) // 5 << 8, np.stack([GREY // 5] * 3, -1)),
    "one pixel": (np.array([[[9, 99, 199]]], np.uint8), np.array([[[9, 99, 199]]])),
    "one row": (PICTURE[:1], PICTURE[:1]),
    "two columns": (FIRST[:, :, :2], PICTURE[:, :2]),
}
NORMAL = (TENSOR - 0.45) / 0.225
REFUSED = {
    "normalised": (NORMAL, r"its values go from -2 to 2\.444"),
    "from -1 to 1": (UNIT * 2 - 1, "go from -1 to 1,"),
    "not on any scale": (UNIT * 3, "go from 0 to 3,"),
    "NaN": (np.where(GREY > 9, GREY, np.nan), "not all finite"),
    "infinity": (np.where(GREY > 9, GREY, np.inf), "not all finite"),
    "int16 below 0": (GREY.astype(np.int16) - 9, "go from -9 to 246"),
    "beyond 16 bits": (GREY.astype(np.int64) * 1000, "go from 0 to 2.55e.05"),
    "mode F, NaN": (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "not all finite"),
    "mode I below 0": (Image.fromarray(GREY.astype(np.int32) - 300), "go from -300 to -45"),
    "a float TIFF": (encoded(Image.fromarray(NORMAL[0].float().numpy()), "TIFF"), "its values go from"),
    "empty": (np.zeros((0, 5, 3)), r"its shape is \(0, 5, 3\)"),
    "no channels": (np.zeros((7, 7, 7)), r"its shape \(7, 7, 7\) has no side of 1 to 4 channels"),
    "first or last": (np.zeros((3, 9, 3)), r"its shape \(3, 9, 3\) may have its channels first or last"),
    "a line": (np.zeros(9), r"its shape \(9,\) is not"),
    "a batch of rows": (np.zeros((1, 2, 3, 9, 9)), r"its shape \(1, 2, 3, 9, 9\) is not"),
    "words": (np.array([["a", "b"]]), "of the type <U1"),
    "complex": (GREY.astype(np.complex64), "of the type complex64"),
}


@pytest.fixture(scope="module")
def processor(pair):
    return LavinProcessor.from_vision_text_pretrained(pair / "vision", pair / "text")


def pixels(processor, images, slots=1, **kwargs):
    text = ["<image>" * n for n in ([slots] if isinstance(slots, int) else slots)]
    return processor(text=text, images=images, padding=True, return_tensors="pt", **kwargs)["pixel_values"]


@pytest.mark.parametrize("name", MEANT)
def test_read_as_meant(processor, name):
    image, meant = MEANT[name]
    read = read_image(image)
    assert read.mode == "RGB" and read.size == meant.shape[1::-1]
    worst = 1 if "float16" in name or "rounded" in name else 0
    assert np.abs(np.asarray(read).astype(int) - meant).max() <= worst
    expected = pixels(processor, Image.fromarray(meant.astype(np.uint8)))
    for images in (image, [image], [[image]]):
        assert (pixels(processor, images) - expected).abs().max() <= 0.05 * worst
    chat = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": image}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["pixel_values"] - expected).abs().max() <= 0.05 * worst


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_place_and_range(processor, name):
    image, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"Cannot read image 1 of row 2: .*{reason}"):
        pixels(processor, [[], [PICTURE], [PICTURE, image]], [0, 1, 2])
    with pytest.raises(ValueError, match=f"Cannot read image 0: .*{reason}"):
        pixels(processor, image)


def test_batches_are_lists_of_their_images(processor):
    other = TENSOR.flip(-1)
    both = torch.stack([TENSOR, other])
    expected = torch.cat([pixels(processor, TENSOR), pixels(processor, other)])
    assert torch.equal(pixels(processor, both, [1, 1]), expected)
    assert torch.equal(pixels(processor, both, 2), expected)
    assert torch.equal(pixels(processor, [both], 2), expected)
    assert torch.equal(pixels(processor, both.permute(0, 2, 3, 1).numpy(), 2), expected)
    assert torch.equal(pixels(processor, [TENSOR[None], other[None]], [1, 1]), expected)
    three = pixels(processor, [TENSOR[None], both], [1, 2])
    assert torch.equal(three, torch.cat([expected[:1], expected]))
    with pytest.raises(ValueError, match="Row 0 has 2 image slots .* but 1 images"):
        pixels(processor, [TENSOR[None], both], [2, 1])
    with pytest.raises(ValueError, match="image 0 of row 1.*go from"):
        pixels(processor, [both, NORMAL[None]], [2, 1])


def test_what_the_caller_says(processor):
    """Which side the channels are on, and that the values need no scale."""
    narrow = np.ascontiguousarray(FIRST[:, :, :3])
    expected = pixels(processor, Image.fromarray(PICTURE[:, :3]))
    assert torch.equal(pixels(processor, narrow, input_data_format="channels_first"), expected)
    assert torch.equal(pixels(processor, narrow, images_kwargs={"input_data_format": "channels_first"}), expected)
    with pytest.raises(ValueError, match="may have its channels first or last"):
        pixels(processor, narrow)
    square = np.random.default_rng(0).random((28, 28, 3))
    raw = pixels(processor, square, do_rescale=False, do_resize=False, do_normalize=False)
    assert torch.equal(raw[0], torch.tensor(square).permute(2, 0, 1))


def test_server_reads_the_same(processor):
    serve = pytest.importorskip("lavin.recipes.serve.images")
    from lavin.recipes.serve.schema import Limits, Refused

    def served(data):
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        return serve.read_images([(url, "x")], Limits(context=99))[0]

    for name in ("a PNG", "a PNG of 16 bits", "a PNG of 12 bits", "a PNG of 12 bits, with alpha"):
        assert np.array_equal(served(COLOUR[name]), PICTURE)
    assert np.array_equal(np.asarray(served(GREYS["a PNG of 12 bits"]))[..., 0], GREY)
    with pytest.raises(Refused, match="not a PNG"):
        served(GREYS["a float TIFF"])
