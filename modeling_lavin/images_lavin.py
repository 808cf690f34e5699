"""Reads images: files, URLs, bytes and what PIL has opened already, always to the same RGB."""

import base64
import binascii
import http.client
import io
import os
import time
import urllib.error
import urllib.request as web

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


SILENCE = 10  # seconds without a byte after which a URL is given up
DOWNLOAD = 60  # seconds in which an image must have arrived
DOWNLOAD_BYTES = 100_000_000


def read_image(image) -> Image.Image:
    """
    Reads an image to its last row.

    Args:
        image (`PIL.Image.Image`, `bytes`, `str` or `os.PathLike`): An image, the bytes of an image file, the path of
            one, its URL (`http`, `https`, `data`) or its base64 text.

    Returns:
        `PIL.Image.Image`: in RGB, turned as its EXIF orientation says: as in training. Of several frames the first;
        of 16 bits the upper 8; without its alpha channel, as the reference reads it.

    Raises:
        `ValueError`, `OSError`: if it cannot be read, is empty, or does not arrive in time.
    """
    if not isinstance(image, Image.Image):
        data = image if isinstance(image, bytes) else _source(os.fspath(image))
        if not (data if isinstance(data, bytes) else os.path.getsize(data)):
            raise ValueError("the file is empty")
        try:
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
                return to_rgb(opened)
        except UnidentifiedImageError:
            raise ValueError("it is no image that Pillow can decode (of an SVG, make a PNG)") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error} Shrink it, or set `PIL.Image.MAX_IMAGE_PIXELS`") from None
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image that PIL has opened, in RGB and upright; see [`read_image`]."""
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels: there is nothing to see")
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise ValueError("PostScript is a program, not an image: convert it to PNG")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16: Pillow would make everything from 256 on white
        values = np.asarray(image)
        shift = 8 if image.mode != "I" or values.max() > 255 else 0
        image = Image.fromarray((values.clip(0, 65535) >> shift).astype(np.uint8))
    return image.convert("RGB")


def _source(name: str) -> bytes | str:
    """The path of a file, or the bytes of what is none."""
    if name.startswith(("http://", "https://")):
        return _download(name)
    if os.path.isfile(name):
        return name
    payload = name.partition(",")[2] if name.startswith("data:") else name
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise FileNotFoundError("there is no such file, and it is neither a URL nor base64 text") from None


def _download(url: str) -> bytes:
    end, data = time.monotonic() + DOWNLOAD, bytearray()
    try:
        with _web_only().open(url, timeout=SILENCE) as response:
            while part := response.read1(1 << 20):
                data += part
                if len(data) > DOWNLOAD_BYTES:
                    raise OSError(f"it is larger than {DOWNLOAD_BYTES // 1_000_000} MB")
                if time.monotonic() > end:
                    raise OSError(f"it did not arrive within {DOWNLOAD} seconds")
    except urllib.error.HTTPError as error:
        raise OSError(f"the server answered {error.code} {error.reason}".rstrip()) from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise OSError(f"the server did not answer for {SILENCE} seconds") from error
        raise OSError(f"it cannot be fetched ({str(reason) or type(error).__name__})") from error
    return bytes(data)


def _web_only() -> web.OpenerDirector:
    """Python's own client for the web and nothing else: a redirect to a file or to FTP is refused."""
    opener = web.OpenerDirector()
    handlers = (web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler, web.HTTPRedirectHandler)
    for handler in (*handlers, web.HTTPDefaultErrorHandler, web.HTTPErrorProcessor, web.UnknownHandler):
        opener.add_handler(handler())
    return opener
