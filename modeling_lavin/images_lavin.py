"""Reads images: files, URLs, bytes, arrays, tensors and what PIL has opened already, always to the same RGB."""

import base64
import binascii
import http.client
import io
import os
import sys
import time
import urllib.error
import urllib.request as web

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


SILENCE = 10  # seconds without a byte after which a URL is given up
DOWNLOAD = 60  # seconds in which an image must have arrived
DOWNLOAD_BYTES = 100_000_000


def read_image(image, data_format: str | None = None) -> Image.Image:
    """
    Reads an image to its last row.

    Args:
        image (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike`, `np.ndarray` or `torch.Tensor`):
            An image, the bytes of an image file, the path of one, its URL (`http`, `https`, `data`), its base64 text,
            or its values, `(height, width)` or with 1 to 4 channels first or last.
        data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"`, of values whose shape does not show it.

    Returns:
        `PIL.Image.Image`: in RGB, turned as its EXIF orientation says: as in training. Of several frames the first;
        of 16 bits the upper 8, of 10, 12 or 14 bits in 16 those; of floats in [0, 1] as of those times 255; without
        its alpha channel, as the reference reads it.

    Raises:
        `ValueError`, `OSError`: if it cannot be read, is empty, does not arrive in time, or its values or its shape
            do not show what is meant.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if hasattr(image, "shape") and not isinstance(image, (str, bytes)):
        return _from_values(image, data_format)
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


def to_rgb(image: Image.Image) -> Image.Image:
    """An image that PIL has opened, in RGB and upright; see [`read_image`]."""
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels: there is nothing to see")
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise ValueError("PostScript is a program, not an image: convert it to PNG")
    lower, channels = _lower_bytes(image)
    image = ImageOps.exif_transpose(image)
    if lower is not None:
        lower = np.asarray(ImageOps.exif_transpose(lower))[..., channels]
        image = Image.fromarray(_eight_bits(np.asarray(image).astype(np.uint16) << 8 | lower))
    elif image.mode == "F" or image.mode.startswith("I"):  # Pillow would cut them off at 255
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return image.convert("RGB")


def _lower_bytes(image: Image.Image) -> tuple[Image.Image | None, list[int]]:
    """
    The lower 8 of 16 bits of a colour image that has been opened, as an image and its channels: Pillow gives the upper
    8 only, and those of a file that uses 12 are nearly black. None where there are none, or they are lost already.
    """

    def kind(tile) -> str:
        return tile[3] if isinstance(tile[3], str) else (tile[3] or [""])[0]

    def with_kind(tile, new: str):
        return (*tile[:3], new if isinstance(tile[3], str) else (new, *tile[3][1:]))

    tiles = getattr(image, "tile", None) or []
    if not any(str(kind(tile)).startswith(("RGB;16", "RGBA;16", "RGBX;16", "LA;16")) for tile in tiles):
        return None, []
    grey = kind(tiles[0]).startswith("LA")
    # The kind whose upper byte stands where the lower one is; a grey pixel is read as its four bytes.
    swapped = {"B": "L", "L": "B", "N": "L" if sys.byteorder == "big" else "B"}
    place = image.fp.tell()
    try:
        image.fp.seek(0)
        lower = Image.open(image.fp, formats=[image.format])
        lower._mode = "RGBA" if grey else lower.mode
        lower.tile = [
            with_kind(tile, "RGBA" if grey else kind(tile)[:-1] + swapped[kind(tile)[-1]]) for tile in lower.tile
        ]
        lower.load()
    except Exception:  # a kind of file in which this does not work
        return None, []
    finally:
        image.fp.seek(place)
    return lower, [1, 1, 1, 3][-4 if image.mode == "RGBA" else -2 :] if grey else list(range(len(image.getbands())))


def _from_values(values, data_format: str | None) -> Image.Image:
    """An array or a tensor as an image."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    values = np.asarray(values)
    shape = values.shape
    if 0 in shape:
        raise ValueError(f"its shape is {shape}: there is nothing to see")
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim == 3:
        # Three channels are likelier than four, these than one or two, and all likelier than so few pixels on a side.
        first, last = ({1: 1, 2: 1, 3: 3, 4: 2}.get(side, 0) for side in (values.shape[0], values.shape[-1]))
        if data_format is not None:
            first, last = data_format == "channels_first", data_format == "channels_last"
        if first == last and set(values.shape) != {1}:
            way_out = "has no side of 1 to 4 channels"
            if first:
                way_out = "may have its channels first or last: say which with `input_data_format`"
            raise ValueError(f"its shape {shape} {way_out}")
        values = np.moveaxis(values, 0, -1) if first > last else values
        channels = values.shape[-1]
        if channels > 4:
            raise ValueError(f"its shape {shape} has {channels} channels")
        # Together with its alpha channel, which shows the scale too.
        values = _eight_bits(values)[..., : 3 if channels > 2 else 1]
        values = values if channels > 2 else values[..., 0]
    elif values.ndim == 2:
        values = _eight_bits(values)
    else:
        raise ValueError(f"its shape {shape} is not (H, W), (H, W, C) or (C, H, W), of one image")
    return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """
    Values of any kind in [0, 255], by the scale that they show: floats in [0, 1], or whole numbers of so many bits as
    the largest needs. Of 16 bits are also those that only 8 bits made wider give.

    Raises:
        `ValueError`: if they are on none of these scales, as after a normalisation.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "uif":
        raise ValueError(f"its values are of the type {values.dtype}")
    floats = values.dtype.kind == "f"
    values = values.astype(np.float32 if floats else np.int64)
    low, high = values.min().item(), values.max().item()
    if not np.isfinite([low, high]).all():
        raise ValueError("its values are not all finite (NaN or infinity)")
    level = 1 / 255  # what rounding may have added
    if floats and -level <= low and high <= 1 + level:
        return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    # Parts of a level in a picture that is all but black are no levels: it has another scale.
    other = floats and high <= 16 and bool((values != np.rint(values)).any())
    if other or high > 65535 or low < (-1 if floats and high > 16 else 0):
        raise ValueError(
            f"its values go from {low:.4g} to {high:.4g}, and what is black and white is not to be seen (those of a "
            "picture go from 0 to 1 as floats, to 255, or to 65535; undo a normalisation)"
        )
    if high <= (256 if floats else 255):
        return np.rint(values.clip(0, 255)).astype(np.uint8)
    values = np.rint(values).astype(np.int64).clip(0)
    widened = not (values % 257).any() or (low != high and not (values % 256).any())
    bits = int(high).bit_length()
    return (values >> (8 if widened else bits + bits % 2 - 8)).astype(np.uint8)


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
