"""What a client sends for a picture -> encoded bytes that are worth decoding."""

import base64
import binascii
import io
import re
import warnings

from PIL import Image, UnidentifiedImageError

from ..errors import ImageError
from .settings import ServerSettings

Image.init()  # else PIL does not know yet what it can read
# Whatever else PIL reads is not for strangers.
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)
DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)?((?:;[a-z0-9-]+=[^;,]*)*);base64,", re.IGNORECASE)


def check_picture(data: bytes, settings: ServerSettings) -> bytes:
    """`data`, when its header names a format and a size that the server takes. Nothing is decoded yet.

    Raises:
        ImageError: it does not.
    """
    if not data:
        raise ImageError("the picture is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
    except UnidentifiedImageError:
        raise ImageError(f"the picture is none of {', '.join(FORMATS)}: save it as JPEG or PNG") from None
    except Exception as error:  # PIL has no base class for it, see preprocess.py
        raise ImageError(f"the picture is damaged ({type(error).__name__}): save it again") from None
    if width * height > settings.max_pixels:
        raise ImageError(
            f"the picture has {width} x {height} pixels, more than {settings.max_pixels} in all: scale it down"
        )
    return data


def decode_base64(text: str) -> bytes:
    """Strictly: no character that does not belong there.

    Raises:
        ImageError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the picture is not base64 ({error})") from None


def decode_data_url(url: str) -> bytes:
    """The content of "data:image/png;base64,...". What the URL calls it does not matter: the content is looked at.

    Raises:
        ImageError: it is no such URL, or damaged.
    """
    match = DATA_URL.match(url[:300])
    if not match:
        raise ImageError("a data URL of a picture begins with data:image/...;base64,")
    return decode_base64(url[match.end() :])
