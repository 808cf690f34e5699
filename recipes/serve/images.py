"""The images of a request: from data URLs and from files below one folder, within limits."""

import base64
import binascii
import os
import stat
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from lavin.images_lavin import to_rgb

from .schema import Limits, Refused


FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")  # not all that Pillow can open: some start other programs
# Small files that cost much: one that is a line becomes a wide image where the shorter side is scaled to the tower's
# size, and a JPEG may pass over all its pixels again in every scan (a usual one has 10 at most).
SIDES, SCANS = 100, 100


def read_images(urls: list[tuple[str, str]], limits: Limits) -> list[Image.Image]:
    """
    The images of `data:` URLs, and of `file:` URLs below the allowed folder, as RGB.

    Args:
        urls (`list[tuple[str, str]]`): Each with the field of the request that it stands in.
        limits ([`Limits`]): Of their number, and of the sizes of each file and of all pictures together.

    Raises:
        [`Refused`]: if one is any other URL or no image, or there is too much of them.
    """
    if len(urls) > limits.images:
        raise Refused(f"The request holds {len(urls)} images; at most {limits.images} are read here.", "messages")
    images, pixels = [], 0
    for url, param in urls:
        image = _open(url, param, limits)
        pixels += image.width * image.height
        if pixels > limits.image_pixels:
            size = f"The image has {image.width} x {image.height} pixels"
            size += f", the images of the request up to it {pixels}" if images else ""
            raise Refused(f"{size}; at most {limits.image_pixels} are read here.", param)
        if max(image.size) > SIDES * min(image.size):
            size = f"{image.width} x {image.height} pixels"
            raise Refused(f"The image has {size}; no side may be more than {SIDES} times the other.", param)
        images.append(image)
    # Only now, that all of them are known to be small enough: opening reads the sizes alone.
    return [_decoded(image, param) for image, (_, param) in zip(images, urls, strict=True)]


def _open(url: str, param: str, limits: Limits) -> Image.Image:
    """An image whose pixels have not been read yet."""
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        data = _data_bytes(url, param, limits)
    elif scheme == "file":
        data = _file_bytes(url, param, limits)
    else:
        raise Refused(
            "Images are taken from data URLs (`data:image/png;base64,...`) and, where the server allows a folder, "
            "from `file://` URLs. Remote URLs are not fetched: send the image itself.",
            param,
        )
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > SCANS:
        raise Refused(f"The image is a JPEG of more than {SCANS} scans.", param)
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise _unreadable(error, param) from None


def _decoded(image: Image.Image, param: str) -> Image.Image:
    try:
        return to_rgb(image)
    except Exception as error:
        raise _unreadable(error, param) from None


def _unreadable(error: Exception, param: str) -> Refused:
    """For what Pillow raises on broken files, which is of many kinds."""
    reason = "not a PNG, JPEG, GIF, WebP or BMP file" if "cannot identify" in str(error) else str(error)
    return Refused(f"The image cannot be read: {reason}.", param)


def _too_large(size: int, param: str, limits: Limits) -> Refused:
    return Refused(f"The image has {size} bytes; at most {limits.image_bytes} are read here.", param)


def _data_bytes(url: str, param: str, limits: Limits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise Refused("A data URL must have the form `data:image/png;base64,...`.", param)
    if len(payload) * 3 // 4 - 2 > limits.image_bytes:
        raise _too_large(len(payload) * 3 // 4, param, limits)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"The data URL is no base64: {error}.", param) from None


def _file_bytes(url: str, param: str, limits: Limits) -> bytes:
    if limits.media_path is None:
        raise Refused("This server reads no local files (`--allowed-local-media-path` allows a folder).", param)
    # The same words whether a file outside exists or not.
    outside = Refused("The file does not lie below the folder that this server may read.", param, status=403)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise outside from None
    name = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not name.startswith("/") or "\0" in name:
        raise outside
    try:
        path = Path(name).resolve()  # links and `..` followed to the end
    except (OSError, RuntimeError):
        raise outside from None
    if not path.is_relative_to(limits.media_path.resolve()):
        raise outside
    try:
        # Not through a link that has appeared since, and never waiting for a pipe.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise Refused("The file is no regular file.", param)
            if status.st_size > limits.image_bytes:
                raise _too_large(status.st_size, param, limits)
            return file.read(limits.image_bytes + 1)
    except OSError as error:
        raise Refused(f"The file cannot be read: {error.strerror}.", param) from None
