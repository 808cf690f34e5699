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


def read_image(url: str, param: str, limits: Limits) -> Image.Image:
    """
    The image of a `data:` URL, or of a `file:` URL below the allowed folder, as RGB.

    Raises:
        [`Refused`]: if it is any other URL, too large, or no image.
    """
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
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > limits.image_pixels:
            raise Refused(
                f"The image has {width} x {height} pixels; at most {limits.image_pixels} are read here.", param
            )
        return to_rgb(image)
    except Refused:
        raise
    except Exception as error:  # Pillow raises many kinds on broken files
        reason = "not a PNG, JPEG, GIF, WebP or BMP file" if "cannot identify" in str(error) else str(error)
        raise Refused(f"The image cannot be read: {reason}.", param) from None


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
    parts = urlsplit(url)
    name = unquote(parts.path)
    # The same words whether a file outside exists or not.
    outside = Refused("The file does not lie below the folder that this server may read.", param, status=403)
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
