"""preprocess.py against a twin made of torch and PIL, our rules beyond it, and what happens to bad pictures."""

import io
import os
import random
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from blip2rt import preprocess as module
from blip2rt.errors import ImageError, InputError
from blip2rt.preprocess import ImageSource, load_image, preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Array = np.ndarray[Any, Any]

_draw = random.Random(7)
ODD_SIZES = [(1, 1), (1, 500), (500, 1), (333, 7), (2, 3), (224, 224), (640, 480), (13, 13)] + [
    (_draw.randint(1, 260), _draw.randint(1, 260)) for _ in range(36)
]


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Array:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng((width, height, seed)).integers(0, 256, shape, np.uint8)


def encode(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for what PIL does not write. `rows` has a filter byte in front of every row."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def pixels(source: Any) -> Array:
    picture = load_image(source)
    assert type(picture) is Image.Image
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def lavis(picture: Image.Image, size: int) -> Array:
    """What torchvision's Resize, ToTensor and Normalize compute for a PIL picture, operation by operation."""
    resized = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = torch.as_tensor(MEAN, dtype=torch.float32), torch.as_tensor(STD, dtype=torch.float32)
    return tensor.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1)).numpy()


# -- The LAVIS path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1"])
def test_bit_exact_with_the_twin(mode: str, tmp_path: Path) -> None:
    formats = {"CMYK": ["JPEG", "TIFF"], "P": ["PNG", "GIF", "BMP"], "1": ["PNG", "TIFF", "BMP"]}
    for place, (width, height) in enumerate(ODD_SIZES):
        picture = Image.fromarray(noise(width, height)).convert(mode)
        size = (224, 364, 14, 30)[place] if place < 4 else 30
        file_format = formats.get(mode, ["PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP"])[
            place % len(formats.get(mode, "123456"))
        ]
        encoded = encode(picture, format=file_format)
        path = tmp_path / f"{place}"  # no suffix: the content decides
        path.write_bytes(encoded)
        expected = lavis(Image.open(io.BytesIO(encoded)), size)
        sources: list[ImageSource] = [
            encoded,
            bytearray(encoded),
            memoryview(encoded),
            path,
            str(path),
            Image.open(path),
        ]
        for source in sources if place < 6 else sources[place % 6 : place % 6 + 1]:
            values = preprocess(source, size, MEAN, STD)
            assert values.dtype == np.float32
            assert values.flags.c_contiguous
            np.testing.assert_array_equal(values, expected, strict=True)
        np.testing.assert_array_equal(preprocess(picture, size, MEAN, STD), lavis(picture, size), strict=True)


def test_every_value_and_every_array_layout() -> None:
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for array in (ramp, ramp[::-1, ::-1], np.asfortranarray(ramp), ramp[:, :, ::-1], ramp[3:4, :5]):
        size = 16 if array.shape[0] == 16 else 9
        expected = lavis(Image.fromarray(np.ascontiguousarray(array)), size)
        np.testing.assert_array_equal(preprocess(array, size, MEAN, STD), expected, strict=True)


def test_float32_is_taken_as_pixel_values() -> None:
    values = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(preprocess(values, 8, MEAN, STD), values, strict=True)
    turned = preprocess(values.transpose(0, 2, 1), 8, MEAN, STD)
    np.testing.assert_array_equal(turned, values.transpose(0, 2, 1), strict=True)
    assert turned.flags.c_contiguous


# -- Our rules ---------------------------------------------------------------------------------------------------------

STORED: dict[int, Callable[[Array], Array]] = {  # orientation -> how an upright picture lies in the file
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int) -> None:
    upright = noise(5, 3).repeat(16, 0).repeat(16, 1)  # blocks, so that JPEG keeps them nearly
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for options in ({"format": "PNG"}, {"format": "TIFF"}, {"format": "WEBP", "lossless": True}):
        encoded = encode(stored, exif=exif, **options)
        for source in (encoded, Image.open(io.BytesIO(encoded))):
            np.testing.assert_array_equal(pixels(source), upright, err_msg=str(options))
    encoded = encode(stored, format="JPEG", exif=exif, quality=100, subsampling=0)
    assert np.abs(pixels(encoded) - upright).max() < 8
    opened = Image.open(io.BytesIO(encoded))
    np.testing.assert_array_equal(pixels(load_image(opened)), pixels(opened))  # never turned twice
    np.testing.assert_array_equal(pixels(opened.convert("L")), pixels(load_image(encoded).convert("L")))
    wide = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright[:, :, 0])).astype(np.uint16) * 257)
    np.testing.assert_array_equal(pixels(encode(wide, format="PNG", exif=exif))[:, :, 0], upright[:, :, 0])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_counts_as_none() -> None:
    picture = Image.fromarray(noise(9, 5))
    for block in (b"Exif\0\0", b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        np.testing.assert_array_equal(pixels(encode(picture, format="PNG", exif=block)), np.asarray(picture))


def transparent_pictures() -> dict[str, tuple[Any, Array, Array]]:
    """Name -> (source, colour [h,w,3], alpha [h,w])."""
    colour, gray, alpha = noise(64, 32), noise(64, 32, 1), noise(64, 32, 1, seed=1)
    hard = np.where(alpha > 99, 255, 0).astype(np.uint8)
    index = gray % 16
    palette = noise(16, 1)[0]  # [16, 3]
    strengths = noise(16, 1, 1, seed=2)[0]  # [16]
    strengths[:2] = 0, 255
    grays = gray[:, :, None].repeat(3, 2)
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    gray_alpha = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    hard_rgba = Image.fromarray(np.dstack([colour, hard]))
    hard_gray = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(hard)])

    indexed = Image.fromarray(index)
    indexed.putpalette(palette.tobytes())
    palette_rgba = Image.fromarray(index)
    palette_rgba.putpalette(np.hstack([palette, strengths[:, None]]).tobytes(), "RGBA")
    indexed_alpha = Image.merge("PA", [Image.fromarray(index), Image.fromarray(alpha)])
    indexed_alpha.putpalette(palette.tobytes())
    keyed_rgb, keyed_gray, keyed_bit = (Image.fromarray(colour), Image.fromarray(gray), Image.fromarray(gray > 99))
    keyed_rgb.info["transparency"] = tuple(colour[0, 0].tolist())
    keyed_gray.info["transparency"] = int(gray[0, 0])
    keyed_bit.info["transparency"] = 255
    bit = (gray > 99) * np.uint8(255)

    wide = (noise(64, 32, 1).astype(np.uint16) << 8) + noise(64, 32, 1, seed=3)
    wide_png = png(64, 32, 16, 0, _rows(wide.astype(">u2")), (b"tRNS", struct.pack(">H", wide[2, 3])))
    wide_8 = np.rint(wide * (255 / 65535)).astype(np.uint8)
    nibbles = gray >> 4
    packed = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    wide_rgb = (colour.astype(np.uint16) << 8) + 77
    wide_rgb_key = struct.pack(">HHH", *wide_rgb[0, 0])

    def key(values: Array, where: Any) -> Array:
        same = values == where
        return np.where(same.all(-1) if values.ndim == 3 else same, 0, 255)

    return {
        "RGBA": (rgba, colour, alpha),
        "RGBA in a PNG": (encode(rgba, format="PNG"), colour, alpha),
        "RGBA in a TIFF": (encode(rgba, format="TIFF"), colour, alpha),
        "LA": (gray_alpha, grays, alpha),
        "LA in a PNG": (encode(gray_alpha, format="PNG"), grays, alpha),
        "PA": (indexed_alpha, palette[index], alpha),
        "La": (hard_gray.convert("La"), grays, hard),
        "RGBa": (hard_rgba.convert("RGBa"), colour, hard),
        "P, alpha in the palette": (palette_rgba, palette[index], strengths[index]),
        "P, tRNS": (
            encode(indexed, format="PNG", transparency=strengths.tobytes()),
            palette[index],
            strengths[index],
        ),
        "P, one index": (encode(indexed, format="GIF", transparency=3), palette[index], key(index, 3)),
        "RGB, one colour": (keyed_rgb, colour, key(colour, colour[0, 0])),
        "RGB, tRNS": (encode(keyed_rgb, format="PNG"), colour, key(colour, colour[0, 0])),
        "L, one value": (keyed_gray, grays, key(gray, gray[0, 0])),
        "L, tRNS": (encode(keyed_gray, format="PNG"), grays, key(gray, gray[0, 0])),
        "1, one value": (keyed_bit, bit[:, :, None].repeat(3, 2), key(bit, 255)),
        "4 bit, tRNS": (
            png(64, 32, 4, 0, _rows(packed), (b"tRNS", struct.pack(">H", 9))),
            (nibbles * 17)[:, :, None].repeat(3, 2),
            key(nibbles, 9),
        ),
        "16 bit, tRNS": (wide_png, wide_8[:, :, None].repeat(3, 2), key(wide, wide[2, 3])),
        "16 bit RGB, tRNS": (
            png(64, 32, 16, 2, _rows(wide_rgb.astype(">u2")), (b"tRNS", wide_rgb_key)),
            colour,
            key(colour, colour[0, 0]),
        ),
    }


def _rows(values: Array) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


TRANSPARENT = transparent_pictures()


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_lies_on_white(name: str) -> None:
    source, colour, alpha = TRANSPARENT[name]
    weight = alpha[:, :, None].astype(int)
    assert 0 < (weight == 0).sum() < weight.size
    expected = (colour.astype(int) * weight + 255 * (255 - weight) + 127) // 255
    np.testing.assert_array_equal(pixels(source), expected)


def test_wide_gray_is_scaled_to_8_bit() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values * (255 / 65535))[:, :, None].repeat(3, 2)
    wide = Image.fromarray(values)
    sources: list[Any] = [wide, encode(wide, format="PNG"), encode(wide, format="TIFF"), encode(wide, format="PPM")]
    sources += [Image.frombytes(mode, (256, 256), values.astype(">u2").tobytes()) for mode in ("I;16B",)]
    sources += [Image.frombytes(mode, (256, 256), values.astype("<u2").tobytes()) for mode in ("I;16L", "I;16N")]
    sources.append(Image.fromarray(values.astype(np.int32)))
    for source in sources:
        np.testing.assert_array_equal(pixels(source), expected)
    clipped = Image.fromarray(np.array([[-5, 0, 65535, 70000, 2**31 - 1, -(2**31)]], np.int32))
    assert pixels(clipped)[0, :, 0].tolist() == [0, 0, 255, 255, 255, 0]
    assert pixels(Image.fromarray(np.array([[0, 0.4, 1.6, 254.6]], np.float32)))[0, :, 0].tolist() == [0, 0, 2, 255]
    assert not pixels(Image.new("F", (3, 2))).any()


def test_other_colour_spaces_go_through_pil() -> None:
    rgb = Image.fromarray(noise(31, 17))
    for mode in ("YCbCr", "LAB", "HSV", "CMYK", "RGBX"):
        picture = rgb.convert("RGBA").convert(mode) if mode == "RGBX" else rgb.convert(mode)
        np.testing.assert_array_equal(pixels(picture), np.asarray(picture.convert("RGB")))
    for file_format in ("JPEG", "JPEG2000", "TGA", "ICO", "PCX", "SGI", "DDS", "ICNS", "QOI", "AVIF"):
        if file_format in Image.SAVE or Image.init():
            encoded = encode(rgb.resize((32, 32)), format=file_format)
            np.testing.assert_array_equal(pixels(encoded), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    encoded = encode(frames[0], format=file_format, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(pixels(encoded), np.asarray(frames[0]))
    animation = Image.open(io.BytesIO(encoded))
    animation.seek(2)
    np.testing.assert_array_equal(pixels(animation), np.asarray(frames[2]))
    assert animation.tell() == 2  # a picture of the caller stays at its frame, and open


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of the test's own convert
def test_the_callers_image_stays_as_it_is(tmp_path: Path) -> None:
    for name, (source, _, _) in TRANSPARENT.items():
        picture = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        before = picture.copy()
        load_image(picture)
        assert (picture.mode, picture.info, picture.getpalette()) == (before.mode, before.info, before.getpalette()), (
            name
        )
        assert picture.tobytes() == before.tobytes(), name
        if picture.mode != "La":  # which PIL does not convert to RGB
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.asarray(before.convert("RGB")))
    path = tmp_path / "picture.gif"
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as opened:
        load_image(opened)
        opened.seek(1)  # still open


def test_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def recording_open(*args: Any) -> IO[bytes]:
        opened.append(open(*args))  # noqa: SIM115
        return opened[-1]

    monkeypatch.setattr(module, "open", recording_open, raising=False)
    for place, encoded in enumerate([*FORMATS.values(), FORMATS["PNG"][:300], b"", b"no picture"]):
        (tmp_path / str(place)).write_bytes(encoded)
        with suppress(ImageError):
            load_image(tmp_path / str(place))
    assert [file.closed for file in opened] == [True] * (len(FORMATS) + 3)


def test_one_lazy_image_in_many_threads() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(Image.fromarray(noise(300, 200)), format="PNG", exif=exif)
    expected, start = preprocess(encoded, 32, MEAN, STD), threading.Barrier(4)

    def together(source: Image.Image) -> Array:
        start.wait()
        return preprocess(source, 32, MEAN, STD)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            lazy = Image.open(io.BytesIO(encoded))
            for values in pool.map(together, [lazy] * 4):
                np.testing.assert_array_equal(values, expected)


# -- Bad pictures ------------------------------------------------------------------------------------------------------

RGB = Image.fromarray(noise(40, 30))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", r"'missing\.png' cannot be opened \(No such file"),
        ("", r"'' cannot be opened"),
        ("a\0b", r"cannot be opened \(embedded null byte"),
        ("x" * 5000, r"cannot be opened \(File name too long"),
        ("http://example.org/cat.jpg", r"is a URL.*does not download"),
        (Path("https://example.org/cat.jpg"), r"is a URL"),
        ("s3://bucket/cat.jpg", r"is a URL"),
        ("data:image/png;base64,AAAA", r"is a URL"),
        (".", r"'\.' is a directory"),
        ("/dev/null", r"is no file"),
        (b"", r"0 bytes is empty"),
        (bytearray(), r"is empty"),
        (b"GIF", r"no picture that PIL"),
        (b"\x00" * 999, r"no picture that PIL"),
        (b"<html><body>404 Not Found</body></html>", r"no picture.*<html><body>404"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", r"no picture.*save it as PNG"),
        (None, r"NoneType is no picture: pass a path, .*float32 array \[3, S, S\]"),
        (io.BytesIO(encode(RGB, format="PNG")), r"BytesIO is no picture"),
        (torch.zeros(3, 8, 8), r"torch\.Tensor is no picture"),
        ([[0]], r"builtins\.list is no picture"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 array \[8, 8, 4\] is no picture: pass a PIL image"),
        (np.zeros((8, 8), np.uint8), r"uint8 array \[8, 8\]"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 array \[3, 8, 8\]"),
        (np.zeros((8, 8, 3), bool), r"bool array"),
        (np.zeros((8, 8, 3), np.int16), r"int16 array"),
        (np.zeros((3, 8, 8), np.float64), r"float64 array \[3, 8, 8\].*float32"),
        (np.zeros((3, 8, 8), ">f4"), r">f4 array"),
        (np.zeros((8, 8, 3), np.float32), r"float32 array \[8, 8, 3\].*\[3, 8, 8\]"),
        (np.zeros((3, 9, 8), np.float32), r"float32 array \[3, 9, 8\]"),
        (np.full((3, 8, 8), np.nan, np.float32), r"192 float32 pixel values are NaN"),
        (np.zeros((0, 8, 3), np.uint8), r"no pixels \(8 x 0\)"),
        (Image.new("RGB", (0, 5)), r"no pixels \(0 x 5\)"),
        (np.broadcast_to(np.uint8(0), (20000, 10000, 3)), r"10000 x 20000 pixels, more than 178956970"),
        (Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), r"values 0\.0\.\.1\.0, not 0\.\.255"),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), r"not 0\.\.255"),
        (Image.fromarray(np.array([[-3, 100]], np.float32)), r"not 0\.\.255"),
    ],
    ids=lambda value: f"{value!r}"[:20],
)
def test_errors_say_what_is_wrong(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        preprocess(source, 8, MEAN, STD)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert caught.value.index is None


def test_other_arguments() -> None:
    for size, mean, std in ((0, MEAN, STD), (8, MEAN[:1], STD), (8, MEAN, (1, 1, 0)), (8, (0, 0, np.nan), STD)):
        with pytest.raises(InputError, match="size and std must be above 0") as caught:
            preprocess(RGB, size, mean, std)
        assert not isinstance(caught.value, ImageError)


def test_pipes_and_closed_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is no file"):  # and does not wait for a writer
        load_image(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png' is empty"):
        load_image(tmp_path / "empty.png")
    closed = Image.open(io.BytesIO(encode(RGB, format="JPEG")))
    closed.close()
    with pytest.raises(ImageError, match="PIL image of mode RGB, 40 x 30,"):
        load_image(closed)


FORMATS = {
    "PNG": encode(RGB, format="PNG"),
    "JPEG": encode(RGB, format="JPEG"),
    "progressive": encode(RGB, format="JPEG", progressive=True),
    "GIF": encode(RGB, format="GIF"),
    "BMP": encode(RGB, format="BMP"),
    "TIFF": encode(RGB, format="TIFF"),
    "deflated TIFF": encode(RGB, format="TIFF", compression="tiff_adobe_deflate"),
    "WEBP": encode(RGB, format="WEBP"),
    "PPM": encode(RGB, format="PPM"),
}
WHOLE = {name: pixels(encoded) for name, encoded in FORMATS.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's remarks on damaged tags
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.floats(0, 1, exclude_max=True), st.booleans())
def test_a_truncated_file_is_an_error_or_the_whole_picture(name: str, part: float, lazy: bool) -> None:
    encoded = FORMATS[name][: int(len(FORMATS[name]) * part)]  # what is cut may be an end mark that nobody needs
    source: Any = encoded
    if lazy:
        try:
            source = Image.open(io.BytesIO(encoded))
        except Exception:
            return  # the caller's own error
    for _ in range(2):  # a lazy image fails the second time as well
        try:
            picture = pixels(source)
        except ImageError:
            continue
        np.testing.assert_array_equal(picture, WHOLE[name])


def test_truncated_pictures_stay_errors_whatever_others_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES is set: set it to False"):
        load_image(FORMATS["JPEG"][:500])


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's remarks on damaged tags
@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.data()
)
def test_a_damaged_file_raises_image_errors_only(
    name: str, damage: list[tuple[float, int]], data: st.DataObject
) -> None:
    encoded = bytearray(FORMATS[name])
    front = data.draw(st.integers(1, len(encoded)))  # headers get their share
    for place, value in damage:
        encoded[int(place * (front - 1))] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_PIXELS", 1_000_000)  # a damaged size may be anything below the limit
        with suppress(ImageError):
            assert preprocess(encoded, 8, MEAN, STD).shape == (3, 8, 8)


def bombs() -> dict[str, bytes]:
    tiff = bytearray(FORMATS["TIFF"])
    for tag in (256, 257):  # width, length: little-endian entries of 12 bytes
        place = tiff.index(struct.pack("<H", tag) + struct.pack("<H", 4))
        tiff[place + 8 : place + 12] = struct.pack("<I", 15000)
    bmp = bytearray(FORMATS["BMP"])
    bmp[18:26] = struct.pack("<ii", 15000, 15000)
    return {
        "PNG": png(15000, 15000, 1, 0, b""),
        "GIF": b"GIF89a" + struct.pack("<HH", 15000, 15000) + FORMATS["GIF"][10:],
        "PPM": b"P6 15000 15000 255\n",
        "TIFF": bytes(tiff),
        "BMP": bytes(bmp),
    }


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (None, "has 15000 x 15000 pixels, more than 178956970"),
        (89_478_485, r"too large \(Image size \(225000000 pixels\)"),
    ],
)
def test_decompression_bombs(limit: int | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the header, by PIL where its limit comes first and by us where somebody has switched that off."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for encoded in bombs().values():
        with pytest.raises(ImageError, match=message):
            load_image(encoded)


def test_the_limit_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 1200)
    assert pixels(FORMATS["PNG"]).shape == (30, 40, 3)
    monkeypatch.setattr(module, "MAX_PIXELS", 1199)
    for source in (FORMATS["PNG"], RGB, np.asarray(RGB)):
        with pytest.raises(ImageError, match="more than 1199"):
            load_image(source)
