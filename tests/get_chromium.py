"""A headless Chromium for the tests of the server's page, with what it needs to run, from npm.

python tests/get_chromium.py DIR    -> DIR/chromium, DIR/lib, DIR/fonts
"""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import brotli

PACKAGE = "@sparticuz/chromium@147.0.0"  # MIT; Chromium as a single file, built for machines without a screen
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""


def main(arguments: list[str]) -> int:
    target = Path(arguments[0]).absolute()
    target.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=target, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    with tarfile.open(target / packed) as package:
        for member in package.getmembers():
            name = Path(member.name).name
            if not name.endswith(".br"):
                continue
            data = brotli.decompress(package.extractfile(member).read())  # type: ignore[union-attr]
            if name == "chromium.br":
                (target / "chromium").write_bytes(data)
                (target / "chromium").chmod(0o755)
            else:
                with tarfile.open(fileobj=io.BytesIO(data)) as inner:
                    inner.extractall(target, filter="data")
    (target / packed).unlink()
    (target / "fonts.conf").write_text(FONTS.format(fonts=target / "fonts", cache=target / "cache"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
