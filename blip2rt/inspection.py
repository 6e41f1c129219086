"""What is in an engine directory, for people and for scripts. Needs no engine to be opened."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .engine_directory import find_engine, find_engines
from .manifest import CPU, CUDA, NATIVE, TENSORRT, TORCH, Manifest
from .native import native_path
from .stages import TensorSpec


@dataclass(frozen=True)
class Description:
    """An engine directory described: `str()` for people, `as_dict()` for scripts."""

    directory: Path
    manifest: Manifest

    def as_dict(self) -> dict[str, Any]:
        """The manifest's facts, with the bytes of every stage."""
        manifest = self.manifest
        return {
            "engine": str(self.directory),
            "kind": manifest.kind,
            "source": manifest.source_id,
            "source_sha256": manifest.source_sha256,
            "precision": manifest.precision,
            "device": manifest.device,
            "kernels": manifest.kernels,
            "path": self._path(),
            "parameters": manifest.parameters | {"total": sum(manifest.parameters.values())},
            "left_out": list(manifest.left_out),
            "reads_questions": manifest.question_tokens is not None,
            "bytes": {stage: self._bytes(stage) for stage in manifest.stages},
            "stages": {
                stage: {
                    "inputs": {t.name: [t.dtype, list(t.shape)] for t in entry.signature.inputs},
                    "outputs": {t.name: [t.dtype, list(t.shape)] for t in entry.signature.outputs},
                }
                for stage, entry in manifest.stages.items()
            },
            "parity": {stage: {"max_rel": p.max_rel, "cosine": p.cosine} for stage, p in manifest.parity.items()},
            "toolchain": manifest.toolchain,
        }

    def __str__(self) -> str:
        manifest = self.manifest
        total = sum(manifest.parameters.values())
        lines = [
            f"{self.directory}: {manifest.kind} engine, {manifest.precision} on {manifest.device}",
            f"source      {manifest.source_id} (sha256 {manifest.source_sha256[:16]}...)",
            f"kernels     {self._kernels()}",
            f"parameters  {total / 1e6:,.2f} M",
            f"image       {manifest.image.size} x {manifest.image.size} px",
            f"tokens      BOS {manifest.tokens.bos}, stop {list(manifest.tokens.stop)}, pad {manifest.tokens.pad}",
            *self._notes(),
            "",
            f"{'stage':<10}{'parameters':>14}{'MiB':>10}  {'max rel':>9}  inputs -> outputs",
        ]
        for stage, entry in manifest.stages.items():
            parity = manifest.parity.get(stage)
            signature = entry.signature
            shown = f"{_signature(signature.inputs)} -> {_signature(signature.outputs)}"
            lines.append(
                f"{stage:<10}{manifest.parameters.get(stage, 0):>14,}{self._bytes(stage) / 2**20:>10,.1f}  "
                f"{f'{parity.max_rel:.1e}' if parity else '':>9}  {shown}"
            )
        lines += ["", "built with  " + ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items())]
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        """What is not so in every engine."""
        names, notes = self.manifest.left_out, []
        if self.manifest.question_tokens:
            notes.append("questions   go to the Q-Former as well")
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            notes.append(f"left out    {len(names)} tensors that the checkpoint's own code does not use: {shown}")
        return notes

    def _kernels(self) -> str:
        """What computes here."""
        if self.manifest.device == TORCH:
            return "those of torch, on a GPU where there is one"
        if self.manifest.device == CUDA:
            return "ONNX Runtime's, on a GPU"
        if self.manifest.device == TENSORRT:
            built = self.manifest.toolchain
            return f"those of TensorRT {built.get('tensorrt')}, for {built.get('gpu')}"
        return self.manifest.kernels + (f", here: {self._path()}" if self.manifest.kernels == NATIVE else "")

    def _path(self) -> str | None:
        """Which path of the native kernels runs here; None for an engine without them."""
        if self.manifest.kernels != NATIVE:
            return None
        return native_path() or "missing, install blip2rt where there is a C++ compiler"

    def _bytes(self, stage: str) -> int:
        """Of the files of a stage; its share of the one file that all stages have on torch."""
        manifest, file = self.manifest, self.manifest.stages[stage].file
        if manifest.device == TORCH:
            share = manifest.parameters.get(stage, 0) / max(1, sum(manifest.parameters.values()))
            return round(share * manifest.files[file].size)
        both = (file, str(Path(file).with_suffix(".data")))  # of a plan there is one
        return sum(manifest.files[name].size for name in both if name in manifest.files)


def describe_engine(path: str | Path, name: str | None = None) -> Description:
    """Read the manifest of an engine directory, or of the one engine in a folder.

    Raises:
        EngineError: none there, several, or an unreadable manifest.
    """
    directory = find_engine(path, name)
    return Description(directory, Manifest.read(directory))


def gpus_needed(path: str | PathLike[str], name: str | None, available: float) -> int:
    """How many GPUs a process that opens these engines is to have for itself: 1, or 0 on the CPU.

    Args:
        path, name: as for `find_engines`.
        available: how many there are; without any, an engine of torch's modules runs on the CPU.

    Raises:
        EngineError: none there, or several of a kind.
    """
    devices = {Manifest.read(directory).device for directory in find_engines(path, name).values()}
    return int(devices != {CPU} and available >= 1)


def _signature(tensors: tuple[TensorSpec, ...]) -> str:
    """Names and shapes; the cache of many layers as its first tensor."""
    shown = [
        f"{t.name} {list(t.shape)}".replace("'", "") for t in tensors if not t.name.startswith(("past_", "present_"))
    ]
    cached = [t for t in tensors if t.name.startswith(("past_", "present_"))]
    if cached:
        shown.append(f"{len(cached)} x {cached[0].name.split('_')[0]} {list(cached[0].shape)}".replace("'", ""))
    return ", ".join(shown)
