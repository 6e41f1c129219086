"""Stages compiled ahead of time by AOTInductor: fused kernels in a package each, weights from the engine's file.

A package is tied to the torch that compiled it and to the kind of processor; both stand in the manifest.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EngineError
from ..manifest import Manifest

COMPILED_BY = "compiled by"  # key of the manifest's toolchain


def package_name(stage: str) -> str:
    """The file of a stage."""
    return f"{stage}.pt2"


def compiler() -> str:
    """What compiles here, and for what."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        processor = f"CPUs with {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__} for {processor}"


def open_package(directory: Path, manifest: Manifest, stage: str, module: nn.Module) -> Any:
    """The compiled stage over the weights of its module, called as the module is.

    Raises:
        EngineError: it was compiled by another torch or for another processor.
    """
    known, here = manifest.toolchain.get(COMPILED_BY), compiler()
    if known != here:
        raise EngineError(
            f"{directory / package_name(stage)} was compiled by {known}, and this is {here}: build the engine here "
            "with `blip2rt export --device torch --compile`"
        )
    path = str(directory / package_name(stage))
    is_gpu = torch.cuda.is_available()  # where one thread at a time uses it (`GPU`), and launches are captured
    package = torch._inductor.aoti_load_package(path, run_single_threaded=is_gpu)
    # weights of equal values are one to the compiler
    weights: dict[str, torch.Tensor] = {name: module.get_parameter(name) for name in package.get_constant_fqns()}
    package.load_constants(weights, check_full_update=True, user_managed=True)
    return package
