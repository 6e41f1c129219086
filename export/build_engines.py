"""Build engines: the same as `blip2rt export`. Without arguments it builds the bundled model."""

import sys

from blip2rt.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
