"""Draw the artwork of the scenes: OUTPUT/STYLE/NAME.png, transparent, for the things and styles of `sprites.toml`.

    npm packages -> SVG -> resvg -> cut to what is drawn -> a square of SIZE pixels

Things that come in colours are `red car.png`, `blue car.png` ... The artwork belongs to its makers: OUTPUT/CREDITS.md
says whose it is and under which licence. Needs npm, or the packages as `npm pack` leaves them (`--packages DIR`), and
resvg (`pip install 'blip2rt[artwork]'`).
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from blip2rt import Blip2rtError
from blip2rt.progress import progress

TABLE = Path(__file__).with_name("sprites.toml")
SIZE = 128
FINISH = {  # how a style draws its shapes: {c} the colour, {d} a darker one, {l} a lighter one
    "twemoji": '<path d="{path}" fill="{c}"/>',
    "noto": '<linearGradient id="g" x2="0" y2="1"><stop stop-color="{l}"/><stop offset=".6" stop-color="{c}"/>'
    '<stop offset="1" stop-color="{d}"/></linearGradient><path d="{path}" fill="url(#g)"/>',
    "fluent": '<radialGradient id="g" cx=".3" cy=".25" r=".9"><stop stop-color="{l}"/>'
    '<stop offset=".5" stop-color="{c}"/><stop offset="1" stop-color="{d}"/></radialGradient>'
    '<path d="{path}" fill="url(#g)"/>',
    "emojione": '<path d="{path}" fill="{d}"/><path d="{path}" fill="{c}" transform="translate(9 9) scale(.82)"/>',
    "openmoji": '<path d="{path}" fill="{c}" stroke="#000" stroke-width="5" stroke-linejoin="round"/>',
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the artwork of the scenes from npm packages.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="of .tgz files (default: fetched with npm)")
    parser.add_argument("--size", type=int, default=SIZE, help="of a sprite in pixels (default: %(default)s)")
    args = parser.parse_args(argv)
    table = tomllib.loads(TABLE.read_text("utf-8"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            packages = args.packages or fetch(table["styles"].values(), Path(scratch))
            credits_ = [draw_style(style, packages, table, args.output, args.size) for style in table["styles"]]
    except Blip2rtError as error:
        print(f"make_sprites: {error}", file=sys.stderr)
        return 1
    (args.output / "CREDITS.md").write_text("\n".join(["# Whose artwork this is", "", *credits_, ""]), "utf-8")
    return 0


def fetch(packages: Iterable[str], folder: Path) -> Path:
    """`npm pack` of every package."""
    try:
        subprocess.run(["npm", "pack", "--silent", *packages], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Blip2rtError(
            f"npm could not fetch the artwork ({error}): pass --packages DIR with the .tgz files"
        ) from None
    return folder


def draw_style(style: str, packages: Path, table: dict[str, Any], output: Path, size: int) -> str:
    """Write the sprites of one style; returns its line of the credits."""
    icons, info = read_package(packages, table["styles"][style])
    (output / style).mkdir(parents=True, exist_ok=True)
    sprites = dict(drawings(style, icons, table, size))
    for name, image in sprites.items():
        image.save(output / style / f"{name}.png")
    print(f"{style}: {len(sprites)} sprites", file=sys.stderr)
    return f"- {style}: {info['name']} by {info['author']['name']}, {info['license']['title']}, {info['author']['url']}"


def read_package(packages: Path, package: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`icons.json` and `info.json` of a package's tarball."""
    stem = package.removeprefix("@").replace("/", "-").replace("@", "-")
    path = packages / f"{stem}.tgz"
    try:
        with tarfile.open(path) as archive:
            found = [
                json.load(archive.extractfile(f"package/{name}.json") or io.BytesIO()) for name in ("icons", "info")
            ]
    except (OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise Blip2rtError(f"{path} cannot be read ({error}): make it with `npm pack {package}`") from None
    return found[0], found[1]


def drawings(style: str, icons: dict[str, Any], table: dict[str, Any], size: int) -> Iterator[tuple[str, Image.Image]]:
    """Every sprite that the style has, by name."""
    for name, icon in progress(table["things"].items(), style, len(table["things"])):
        markup = svg(icons, icon)
        if markup:
            yield name, rasterise(markup, size)
    for name, icon in table["colored"].items():
        markup = svg(icons, icon)
        if markup:
            image = rasterise(markup, size)
            yield from ((f"{color} {name}", recolored(image, code)) for color, code in table["colors"].items())
    for name, path in table["shapes"].items():
        for color, code in table["colors"].items():
            yield f"{color} {name}", rasterise(shape(style, path, code), size)


def svg(icons: dict[str, Any], name: str) -> str | None:
    """An icon as a file; None: the style has none."""
    icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return wrapped(icon["body"], f"{left} {top} {width} {height}")


def shape(style: str, path: str, color: str) -> str:
    """A plain shape, finished as the style draws."""
    shades = {"c": color, "d": mixed(color, 0, 0.35), "l": mixed(color, 255, 0.35)}
    return wrapped(FINISH[style].format(path=path, **shades), "-4 -4 108 108")


def wrapped(body: str, box: str) -> str:
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} width="512" height="512" viewBox="{box}">{body}</svg>'


def rasterise(markup: str, size: int) -> Image.Image:
    """RGBA [size, size]: what is drawn, as large as fits, in the middle."""
    image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=markup, width=4 * size))).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def recolored(image: Image.Image, color: str) -> Image.Image:
    """The saturated pixels near the most frequent hue take the colour's hue; light and shade stay."""
    alpha = image.getchannel("A")
    hsv = np.array(image.convert("RGB").convert("HSV"), np.int16)
    vivid = (hsv[..., 1] > 90) & (hsv[..., 2] > 60) & (np.asarray(alpha) > 128)
    base = np.bincount(hsv[vivid][:, 0], minlength=256).argmax()
    away = (hsv[..., 0] - base + 128) % 256 - 128
    chosen = (abs(away) < 28) & (hsv[..., 1] > 60)
    target = np.array(Image.new("RGB", (1, 1), color).convert("HSV"), np.int16)[0, 0]
    level = np.median(hsv[vivid & chosen][:, 1:], axis=0)
    hsv[chosen, 0] = target[0]
    hsv[chosen, 1:] = np.clip(hsv[chosen, 1:] * (target[1:] / level), 0, 255)
    result = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
    result.putalpha(alpha)
    return result


def mixed(color: str, other: int, part: float) -> str:
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + part * (other - c)):02x}" for c in channels)


if __name__ == "__main__":
    sys.exit(main())
