"""A picture becomes pixel_values: path, encoded bytes, PIL image or array -> float32 [3, S, S].

This is LAVIS's evaluation path, bit for bit: `convert("RGB")`, PIL's bicubic resize to S x S whatever the aspect,
/ 255, (x - mean) / std in float32 (lavis/processors/blip_processors.py, BlipImageEvalProcessor). Where that path would
show the model something else than a viewer shows a person, blip2rt has rules of its own: they stand at `load_image`.
"""

import io
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL import __version__ as pil_version

from .errors import ImageError, InputError

Array = np.ndarray[Any, Any]
ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | Array

MAX_PIXELS = 178_956_970  # 2/3 GiB as PIL holds RGB; a larger picture is an accident or a decompression bomb

_ACCEPTED = "a path, encoded bytes, a PIL image, a uint8 array [h, w, 3] or a float32 array [3, S, S] of pixel values"
_REFUSED_FORMATS = {"EPS"}  # PIL would start Ghostscript on it: EPS is a program, not a picture
_ALPHA_MODES = {"RGBA", "RGBa", "LA", "La", "PA"}
_UPRIGHT = {  # value of EXIF tag 0x0112 -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PIL brings the pixels of these PNGs to 8 bit and leaves the transparent colour (tRNS) as it stands in the file.
_PNG_TRNS_SCALE = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
# One PIL image may stand several times in a list, and `load` and `getexif` of one object are not thread-safe.
_CALLERS_IMAGE = threading.Lock()


def preprocess(source: ImageSource, size: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The pixel values of one picture, float32 [3, S, S] with S = `size`, C-contiguous.

    `mean` and `std` are three numbers on the scale 0..1. A float32 array [3, S, S] is taken as pixel values that are
    already normalised: it is checked and handed back, copied only where it is not contiguous.
    Raises ImageError for the picture, InputError for the other arguments.
    """
    offset, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if size < 1 or offset.shape != (3,) or scale.shape != (3,) or not (np.isfinite(offset).all() and (scale > 0).all()):
        raise InputError(
            f"size {size}, mean {mean}, std {std}: size and std must be above 0, mean and std 3 numbers each"
        )
    if isinstance(source, np.ndarray) and source.dtype == np.float32:
        if source.shape != (3, size, size):
            accepted = f"float32 means normalised pixel values [3, {size}, {size}], pixels are uint8 [h, w, 3]"
            raise ImageError(f"{_describe(source)} does not fit: {accepted}")
        if not np.isfinite(source).all():
            raise ImageError(f"{np.sum(~np.isfinite(source))} float32 pixel values are NaN or infinite: mend them")
        return np.ascontiguousarray(source)
    picture = load_image(source).resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(picture, np.float32) / np.float32(255)  # [S, S, 3]; a division: * (1 / 255) rounds otherwise
    values = (values - offset) / scale
    return np.ascontiguousarray(values.transpose(2, 0, 1))  # [3, S, S]


def load_image(source: ImageSource) -> Image.Image:
    """The picture as a new 8-bit RGB image, upright, without metadata. A PIL image of the caller stays as it is.

    - Files with several frames: the first. A PIL image: the frame it stands at.
    - Transparency of any kind lies on white. EXIF orientation is applied; a damaged EXIF block counts as none.
    - 16-bit gray and mode I: round(value * 255 / 65535), after clipping to 0..65535.
    - Mode F: the scale is 0..255, as PIL's own conversions have it, rounded. Floats that plainly have another scale
      (outside 0..255, or none above 1) are refused: a guess would turn some of them black or white.

    Raises ImageError for whatever is not a whole, readable picture of 1 to MAX_PIXELS pixels.
    """
    name = _describe(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(f"{name} is no picture: pass a PIL image for other layouts, or {_ACCEPTED}")
        _check_size((source.shape[1], source.shape[0]), name)
        return Image.fromarray(source)
    try:
        if isinstance(source, Image.Image):
            with _CALLERS_IMAGE:
                picture, orientation = _decode(source, name)
        else:
            with _opened(source, name) as file:
                picture, orientation = _decode(_identify(file, name), name)
        picture = _to_rgb(picture, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # PIL's limit, which others may have set lower than ours
        raise ImageError(f"{name} is too large ({error}): scale it down first") from error
    except Exception as error:  # PIL has no base class for it: OSError, SyntaxError, struct.error, MemoryError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ImageError(f"{name} is damaged, cut short or unreadable ({reason}): replace it") from error
    picture.info = {}  # no orientation left that would be applied twice
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _describe(source: object) -> str:
    if isinstance(source, np.ndarray):
        return f"{source.dtype} array {list(source.shape)}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"encoded picture of {memoryview(source).nbytes} bytes"
    if isinstance(source, Image.Image):
        return f"PIL image of mode {source.mode}, {source.width} x {source.height},"
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return repr(path if len(path) <= 300 else path[:300] + "...")
    return f"{type(source).__module__}.{type(source).__qualname__}"


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}): pass a picture of at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS} in all: scale it down first")


@contextmanager
def _opened(source: object, name: str) -> Iterator[IO[bytes]]:
    """The encoded picture as a file, which is closed at the end."""
    if isinstance(source, bytes | bytearray | memoryview):
        if not memoryview(source).nbytes:
            raise ImageError(f"{name} is empty: pass the whole content of an image file")
        yield io.BytesIO(bytes(source))
        return
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"{name} is no picture: pass {_ACCEPTED}")
    try:
        status = os.stat(source)
        # Nothing but regular files is opened: a pipe would wait for ever.
        file = open(source, "rb") if stat.S_ISREG(status.st_mode) else None  # noqa: SIM115 (closed below)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if re.match(r"'(data:|[a-z][a-z0-9+.-]+:/)", name, re.IGNORECASE):
            raise ImageError(f"{name} is a URL, and blip2rt does not download: fetch it and pass its bytes") from None
        raise ImageError(f"{name} cannot be opened ({getattr(error, 'strerror', error)}): check the path") from None
    if file is None:
        mend = (
            "a directory: pass the files in it" if stat.S_ISDIR(status.st_mode) else "no file: read it, pass the bytes"
        )
        raise ImageError(f"{name} is {mend}")
    with file:
        if not status.st_size:
            raise ImageError(f"{name} is empty (0 bytes): replace it")
        yield file


def _identify(file: IO[bytes], name: str) -> Image.Image:
    """The header of an encoded picture; no pixel is decoded yet."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # any library may have set it: half a picture would pass for a whole one
        raise ImageError(f"{name} is not read while PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: set it to False")
    try:
        picture = Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
        raise ImageError(
            f"{name} is no picture that PIL {pil_version} reads (it starts {start!r}): save it as PNG or JPEG"
        ) from None
    if picture.format in _REFUSED_FORMATS:
        raise ImageError(f"{name} is no picture but a program ({picture.format}): save it as PNG or JPEG")
    return picture


def _decode(picture: Image.Image, name: str) -> tuple[Image.Image, object]:
    """A decoded copy of `picture`, and its EXIF orientation."""
    _check_size(picture.size, name)
    tiles = getattr(picture, "tile", None)
    trns_scale = _PNG_TRNS_SCALE.get(str(tiles[0][3])) if tiles and picture.format == "PNG" else None
    picture.load()
    _check_size(picture.size, name)  # an icon may turn out larger than it said
    orientation = None
    with suppress(Exception):  # a damaged EXIF block says nothing about the pixels
        orientation = picture.getexif().get(0x0112)
    copy = picture.copy()
    if trns_scale and "transparency" in copy.info:
        colour = [int(value * trns_scale) for value in np.atleast_1d(copy.info["transparency"])]
        copy.info["transparency"] = tuple(colour) if len(colour) == 3 else colour[0]
    return copy, orientation


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _to_8_bit(picture, name)
    if picture.mode in _ALPHA_MODES or (picture.mode in ("1", "L", "P", "RGB") and picture.has_transparency_data):
        # PIL knows no way from La to RGBA but the one over LA.
        alpha = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(alpha, mask=alpha)
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _to_8_bit(picture: Image.Image, name: str) -> Image.Image:
    values = np.asarray(picture)  # [h, w]: uint16 of either byte order, int32 (mode I) or float32 (mode F)
    if picture.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and (high == 0 or 1 < high <= 255)):  # NaN fails too
            raise ImageError(f"{name} has values {low}..{high}, not 0..255: scale it and convert it to mode L")
        gray = np.rint(values).astype(np.uint8)
    else:
        gray = ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    if (transparent := picture.info.get("transparency")) is not None:
        gray[values == transparent] = 255
    return Image.fromarray(gray)
