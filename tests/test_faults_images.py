"""Bad and unusual images, on every way in: the processor, `lavin ask` and `eval`, `lavin data`, `lavin serve`."""

import base64
import io
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from faults import chat, folder, happened, inputs_of, lavin, refused  # noqa: F401
from PIL import Image

from lavin import LavinProcessor, images_lavin
from lavin.recipes.cli import main
from lavin.recipes.data.rows import BadRow, check_image
from lavin.recipes.evaluate.answers import read_image
from lavin.recipes.serve import images as serve_images
from lavin.recipes.serve.schema import Limits, Refused


AREA = "images"
RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int = 8, rows: bytes = b"") -> bytes:
    """A PNG with this header, whatever it says."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def colour(*values, size=(8, 8)) -> np.ndarray:
    return np.broadcast_to(np.array(values, np.uint8), (size[1], size[0], 3))


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def rotated() -> bytes:
    """A ramp whose camera lay on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    return encoded(Image.fromarray(RAMP), exif=exif)


def frames(format: str) -> bytes:
    pictures = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    return encoded(pictures[0], format, save_all=True, append_images=pictures[1:], duration=9, lossless=True)


def palette() -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(image)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
DEEP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
DEEP_COLOUR = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(DEEP, 3, axis=1))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"

GOOD = {  # name: the file, the pixels that are meant, what happens
    "1 x 1": (encoded(Image.new("RGB", (1, 1), (9, 99, 199))), colour(9, 99, 199, size=(1, 1)), "read"),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), colour(254, 0, 0), "read in RGB"),
    "palette": (palette(), colour(200, 100, 50), "read in RGB"),
    "16-bit grey": (encoded(Image.fromarray(DEEP)), grey((DEEP >> 8).astype(np.uint8)), "read, its upper 8 bits"),
    "16-bit colour": (png(8, 8, 16, DEEP_COLOUR), grey((DEEP >> 8).astype(np.uint8)), "read, its upper 8 bits"),
    "alpha": (
        encoded(Image.new("RGBA", (8, 8), (10, 20, 30, 0))), colour(10, 20, 30),
        "read without its alpha channel, as the reference does",
    ),
    "grey with alpha": (
        encoded(Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (8, 8), 7)])), grey(RAMP),
        "read without its alpha channel",
    ),
    "animated GIF": (frames("GIF"), colour(255, 0, 0), "its first frame is read"),
    "animated PNG": (frames("PNG"), colour(255, 0, 0), "its first frame is read"),
    "animated WebP": (frames("WEBP"), colour(255, 0, 0), "its first frame is read"),
    "EXIF-rotated": (rotated(), grey(np.rot90(RAMP, -1)), "read upright, from a file and from an open PIL image"),
}  # fmt: skip
BAD = {  # name: the file, the reason
    "truncated": (encoded(NOISE)[:2000], "truncated"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:-300], "truncated|broken"),
    "empty": (b"", "the file is empty"),
    "0 x 0": (png(0, 0), "no image that Pillow can decode"),
    "20,000 x 20,000 (50 kB of zeros)": (None, r"400000000 pixels\) exceeds limit .*Shrink it"),
    "20,000 x 20,000 in the header only": (png(20_000, 20_000), r"400000000 pixels\) exceeds limit .*Shrink it"),
    "SVG": (SVG, "of an SVG, make a PNG"),
    "text named .png": (b"It is a picture.", "no image that Pillow can decode"),
    "PostScript named .png": (EPS, "PostScript is a program"),
}
LIMITS = Limits(context=1000)


@pytest.fixture(scope="module")
def processor(folder):  # noqa: F811
    return LavinProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", GOOD)
def test_every_way_in_reads_what_is_meant(processor, tmp_path, name):
    data, pixels, outcome = GOOD[name]
    file = tmp_path / "image.png"
    file.write_bytes(data)
    read = read_image(file)
    assert read.mode == "RGB" and np.abs(np.asarray(read).astype(int) - pixels).max() <= 1
    expected = inputs_of(processor, chat("What?", Image.fromarray(pixels.copy())))["pixel_values"]
    base64_text = base64.b64encode(data).decode()
    for image in (str(file), data, Image.open(file), Image.open(io.BytesIO(data)), base64_text):
        found = inputs_of(processor, chat("What?", image))["pixel_values"]
        assert (found - expected).abs().max() < 0.02, image
    assert check_image(data, name) == data
    (served,) = serve_images.read_images([("data:image/png;base64," + base64_text, "x")], LIMITS)
    assert np.array_equal(served, read)
    happened(AREA, name, outcome)


@pytest.mark.parametrize("name", BAD)
def test_every_way_in_says_what_is_wrong(processor, folder, tmp_path, monkeypatch, capsys, name):  # noqa: F811
    data, reason = BAD[name]
    if data is None:
        data = encoded(Image.new("1", (20_000, 20_000)))
    file = tmp_path / "image.png"
    file.write_bytes(data)
    monkeypatch.setattr("subprocess.Popen", None)  # nothing is started to read an image
    with refused(AREA, name, rf"Cannot read image 0 of row 0 \('.*image.png'\): .*({reason}).*repair the file"):
        inputs_of(processor, chat("What?", str(file)))
    with pytest.raises(ValueError, match=reason):
        processor(text="<image>", images=[data])
    with pytest.raises(BadRow, match=rf"image unreadable: .*({reason})"):
        check_image(data, name)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    with pytest.raises(Refused, match="The image cannot be read|no base64|has 20000 x 20000 pixels"):
        serve_images.read_images([(url, "x")], LIMITS)
    assert main(["ask", str(folder), "What?", "--image", str(file)]) == 2
    assert f"error: The image {file} cannot be read: " in capsys.readouterr().err


def test_images_in_memory(processor):
    for what, image, reason in (
        ("PIL image of 0 x 0", Image.new("RGB", (0, 0)), "0 x 0 pixels: there is nothing to see"),
        ("PIL image of 0 x 5", Image.new("L", (0, 5)), "0 x 5 pixels: there is nothing to see"),
    ):
        with refused(AREA, what, reason):
            inputs_of(processor, chat("What?", image))
    for mode in ("I", "I;16"):  # what Pillow makes of 16 bits, by version and format
        found = processor(text="<image>", images=[Image.fromarray(DEEP).convert(mode)], return_tensors="pt")
        meant = processor(text="<image>", images=[Image.fromarray((DEEP >> 8).astype(np.uint8))], return_tensors="pt")
        assert torch.equal(found["pixel_values"], meant["pixel_values"])


class Server:
    """Accepts on a port of its own and answers with the bytes it is given, one part after another; None: refuses."""

    def __init__(self, parts=(), pause: float = 0.0):
        self.parts, self.pause = parts, pause
        self.socket, self.open = socket.socket(), []
        self.socket.bind(("127.0.0.1", 0))
        if parts is not None:
            self.socket.listen()
            threading.Thread(target=self.accept, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/picture.png"

    def accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.open.append(connection)  # never closed: a client that waits for the end waits for ever
            threading.Thread(target=self.answer, args=[connection], daemon=True).start()

    def answer(self, connection):
        try:
            for part in self.parts:
                connection.sendall(part)
                time.sleep(self.pause)
        except OSError:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in (self.socket, *self.open):
            one.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 99999999\r\n\r\n"
URLS = {
    "URL that never answers": ((), 0, "the server did not answer for 0.4 seconds"),
    "URL that sends a byte now and then": ([OK, *[b"x"] * 500], 0.05, "it did not arrive within 0.8 seconds"),
    "URL that sends without end": ([OK, *[bytes(10**6)] * 50], 0, "it is larger than 3 MB"),
    "URL of nothing": (
        [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"], 0, "the server answered 404 Not Found",
    ),
    "URL of a web page": (
        [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"], 0, "it is no image that Pillow can decode",
    ),
    "URL that leads to a file": (
        [b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\nContent-Length: 0\r\n\r\n"],
        0,
        "the server answered 302 Found .* not allowed",
    ),
    "URL of no server": (None, 0, "it cannot be fetched"),
}  # fmt: skip


@pytest.mark.parametrize("name", URLS)
def test_urls(processor, monkeypatch, name):
    parts, pause, reason = URLS[name]
    monkeypatch.setattr(images_lavin, "SILENCE", 0.4)
    monkeypatch.setattr(images_lavin, "DOWNLOAD", 0.8)
    monkeypatch.setattr(images_lavin, "DOWNLOAD_BYTES", 3 * 10**6)
    with Server(parts, pause) as server:
        with refused(AREA, name, rf"Cannot read image 0 of row 0 \('http.*picture.png'\): {reason}"):
            inputs_of(processor, chat("What?", server.url))
        with pytest.raises(ValueError, match=rf"The image http.*picture.png cannot be read: {reason}"):
            read_image(server.url)
    if name == "URL that never answers":
        with pytest.raises(Refused, match="Remote URLs are not fetched"):
            serve_images.read_images([(server.url, "x")], LIMITS)


def test_a_url_that_answers(processor):
    data = encoded(NOISE)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data)
    with Server([head, data[:900], data[900:]], 0.05) as server:
        found = inputs_of(processor, chat("What?", server.url))["pixel_values"]
    assert torch.equal(found, inputs_of(processor, chat("What?", NOISE))["pixel_values"])


@pytest.mark.slow
def test_a_url_that_never_answers_ends_the_command(folder):  # noqa: F811
    """With the limits as they are; the process's end is the proof, and the time limit of `lavin` bounds it."""
    with Server() as server:
        done = lavin("ask", folder, "What?", "--image", server.url)
    assert done.returncode == 2 and "the server did not answer for 10 seconds. Repair it" in done.stderr
    assert "Traceback" not in done.stderr
    happened(AREA, "`lavin ask --image URL`, URL never answers", "exit code 2 after 10 s of silence, with the URL")
