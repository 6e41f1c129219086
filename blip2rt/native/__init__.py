"""The native kernels: where the library is, and which path of it runs here. Without it, engines use stock operators."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LIBRARY = "native/blip2rt_native.so"
PATHS = ("vnni", "avx2", "portable")  # BLIP2RT_KERNELS picks one by hand, `stock` goes without


def library_path() -> Path | None:
    """The library, or None where it was not built (no C++ compiler) or BLIP2RT_KERNELS=stock."""
    if os.environ.get("BLIP2RT_KERNELS") == "stock":
        return None
    import blip2rt  # an editable install has two folders: the sources' and the one that built files are put into

    folders: list[Path] = [PACKAGE, *map(Path, blip2rt.__path__)]
    candidates = (folder / LIBRARY for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


def native_path() -> str | None:
    """Which path of the library runs here, "vnni", "avx2" or "portable"; None where there is no library.

    Raises:
        EngineError: BLIP2RT_KERNELS names one that this processor cannot run.
    """
    from ..errors import EngineError

    path = library_path()
    if path is None:
        return None
    import ctypes

    library = ctypes.CDLL(str(path))
    library.blip2rt_path.restype = ctypes.c_char_p
    name = library.blip2rt_path()
    if name is None:
        raise EngineError(
            f"BLIP2RT_KERNELS={os.environ['BLIP2RT_KERNELS']!r} is not one of stock, {', '.join(PATHS)}, or this "
            "processor cannot run it: unset it, and the best one is taken"
        )
    return str(name.decode())
