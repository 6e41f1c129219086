"""Modules of an engine -> packages of compiled kernels (`backends/packages.py`), each proven against its module."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..backends.packages import COMPILED_BY, compiler, open_package, package_name
from ..backends.torch_modules import DTYPES, build
from ..errors import ExportError
from ..manifest import Manifest
from ..progress import progress
from ..stages import StageSpec

SETTINGS = {
    "aot_inductor.package_constants_in_so": False,  # the engine has the weights already
    "cpp.march": "",  # nothing beyond the instructions that the manifest names
    "cpp.dynamic_threads": True,
}
EXAMPLES, OTHERS = 2, (1, 3)  # pictures that a stage is traced with, and that it is tried with


def can_be_compiled(spec: StageSpec) -> bool:
    """Whether a stage reads pictures alone: of the others, sizes may be zero or a cache is written in place."""
    return all(set(map(type, tensor.shape[1:])) <= {int} for tensor in spec.inputs)


def write_packages(directory: Path, manifest: Manifest) -> Manifest:
    """Compile what can be, for this machine.

    Args:
        directory: with the engine's weights, where the packages go.
        manifest: of the engine.

    Returns:
        The manifest, which says what compiled them.

    Raises:
        ExportError: torch cannot compile here, or a package differs from its module.
    """
    manifest = replace(manifest, toolchain=manifest.toolchain | {COMPILED_BY: compiler()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name, entry in manifest.stages.items() if can_be_compiled(entry.signature)]
    for name in progress(names, "compiling", total=len(names)):
        entry = manifest.stages[name]
        with safe_open(directory / entry.file, "pt", device=str(device)) as file:
            module = build(manifest, file.get_tensor, name).get_submodule(name)
        dtype = DTYPES[manifest.precision]
        inputs = random_inputs(entry.signature, dtype, device, EXAMPLES)
        with quiet(), torch.no_grad():
            try:
                dims = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
                program = torch.export.export(module, inputs, dynamic_shapes=dims)
                path = str(directory / package_name(name))
                torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=SETTINGS)
            except Exception as error:  # torch's own and those of its compilers share no base class
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise ExportError(
                    f"stage {name!r} cannot be compiled here ({reason}): install a C++ compiler, or leave --compile out"
                ) from error
        prove(directory, manifest, name, module)
    return manifest


@torch.inference_mode()
def prove(directory: Path, manifest: Manifest, name: str, module: nn.Module) -> None:
    """Compare a package with its module, for one picture and for several.

    Raises:
        ExportError: they differ by more than roundings in another order.
    """
    package, dtype = open_package(directory, manifest, name, module), DTYPES[manifest.precision]
    device = next(module.parameters()).device
    for batch in (EXAMPLES, *OTHERS):
        inputs = random_inputs(manifest.stages[name].signature, dtype, device, batch)
        pairs = zip(outputs_of(package(*inputs)), outputs_of(module(*inputs)), strict=True)
        error = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
        if not error <= (limit := 4 * torch.finfo(dtype).eps ** 0.75):
            raise ExportError(
                f"the compiled stage {name!r} is {error:.1e} away from its module, more than {limit:.1e}: leave "
                "--compile out, and report this with the versions of torch and of the compiler"
            )


def outputs_of(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a module or a package, which gives one by itself."""
    return (found,) if isinstance(found, Tensor) else tuple(found)


def random_inputs(spec: StageSpec, dtype: torch.dtype, device: torch.device, batch: int) -> tuple[Tensor, ...]:
    """Normal noise for a batch of pictures."""
    generator = torch.Generator().manual_seed(batch)
    shapes = [(batch, *(int(size) for size in tensor.shape[1:])) for tensor in spec.inputs]
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remarks about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
