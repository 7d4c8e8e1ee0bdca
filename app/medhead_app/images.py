"""Images of requests: data URLs are decoded within limits, and nothing is fetched from a network or read from a disk."""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import dataclass
from typing import Any

from medhead.errors import MedheadError, one_line

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
MAX_IMAGES = 8  # of one request
MAX_BYTES = 4 * 2**20  # of one image's file
MAX_PIXELS = 16 * 2**20  # of one image
_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ImageFile:
    """An image whose format and size are allowed, not decoded yet.

    Raises:
        MedheadError: the content is no such image.
    """

    content: bytes

    def __post_init__(self) -> None:
        with self._open() as image:  # reads the header alone
            width, height = image.size
        if width * height > MAX_PIXELS:
            raise MedheadError(
                f"the image has {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed, scale it down"
            )

    def decode(self) -> Any:
        """Return a `PIL.Image.Image` in RGB, turned as its EXIF data says; of an animation the first frame.

        Raises:
            MedheadError: the file is damaged, or has 32 bits a channel.
        """
        from PIL import ImageOps

        try:
            with self._open() as image:
                image.seek(0)
                shown = ImageOps.exif_transpose(image)
                if shown.mode.startswith("I;16") or (shown.mode, image.format) == ("I", "PNG"):  # "I" before Pillow 11
                    shown = _from_16_bits(shown)
                elif shown.mode in ("I", "F"):
                    raise MedheadError("the image has 32 bits a channel: save it with 8 or 16")
                elif shown.mode != "RGB":
                    shown = _on_white(shown.convert("RGBA"))
        except MedheadError:
            raise
        except Exception as error:  # damaged files raise anything
            raise MedheadError(f"the image cannot be decoded: {one_line(error, 100)}") from None
        return shown

    def _open(self) -> Any:
        from PIL import Image

        try:
            return Image.open(io.BytesIO(self.content), formats=tuple(FORMATS.values()))
        except Image.DecompressionBombError:
            raise MedheadError(
                f"the image has too many pixels; at most {MAX_PIXELS:,} are allowed, scale it down"
            ) from None
        except Exception:  # damaged files raise anything
            raise MedheadError(f"the image is not a file of the kind {', '.join(FORMATS.values())}") from None


def read_data_url(url: str) -> ImageFile:
    """Return the image of a data URL.

    Raises:
        MedheadError: it is no data URL of an allowed image, or is too large.
    """
    found = _DATA_URL.match(url)
    if found is None:
        scheme = re.match(r"[a-z][a-z0-9+.-]*:", url, re.IGNORECASE)
        given = (
            f"a URL that begins with {scheme.group()[:20]!r}" if scheme and scheme.group() != "data:" else "no data URL"
        )
        raise MedheadError(
            f"this server fetches nothing: an image must be a data URL (data:image/png;base64,...), got {given}"
        )
    if found.group(1).lower() not in FORMATS:
        raise MedheadError(f"an image must be one of {', '.join(FORMATS)}, got {found.group(1)[:40]}")
    if (len(url) - found.end()) * 3 // 4 > MAX_BYTES + 2:
        raise MedheadError(f"the image is larger than {MAX_BYTES:,} bytes; scale it down")
    try:
        return ImageFile(base64.b64decode(url[found.end() :], validate=True))
    except binascii.Error:
        raise MedheadError("the data URL of the image is not valid base64") from None


def _from_16_bits(image: Any) -> Any:
    """Return a greyscale image of 16 bits in RGB; its transparent grey, if there is one, is white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Any) -> Any:
    """Return an RGBA image in RGB, on a white background."""
    from PIL import Image

    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
