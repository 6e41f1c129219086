"""Write scenes in the formats of COCO, VQAv2 and Karpathy: `python training/make_scenes.py --sprites DIR --output DIR`.

`training/make_sprites.py` draws the sprites. The readers of `blip2rt.data` and `blip2rt eval` take the folder as it is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from blip2rt import Blip2rtError
from blip2rt.data.scenes import Scenes, Sprites, write_scenes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write composed scenes as a data set.")
    parser.add_argument("--sprites", type=Path, required=True, metavar="DIR", help="of STYLE/NAME.png")
    parser.add_argument("--styles", nargs="+", metavar="STYLE", help="art styles (default: all)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--count", type=int, default=2000, help="pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=112, help="of a picture in pixels (default: %(default)s)")
    parser.add_argument(
        "--unique", action="store_true", help="for retrieval: only scenes whose texts are true of no other one"
    )
    args = parser.parse_args(argv)
    if args.count < 1 or args.size < 16:
        parser.error(f"--count must be at least 1 and --size at least 16, not {args.count} and {args.size}")
    try:
        scenes = Scenes(Sprites.open(args.sprites, args.styles), args.split, args.seed, args.size)
        write_scenes(scenes, args.output, args.count, args.unique)
    except Blip2rtError as error:
        print(f"make_scenes: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.count} scenes to {args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
