"""The same for optimum: an `OptimizedModel`. Needs `pip install 'blip2rt[optimum]'`."""

from pathlib import Path
from typing import Any, Self

from optimum.modeling_base import OptimizedModel

from ..pipeline import Pipeline
from .model import EngineModel


class Blip2rtModelForImageTextToText(EngineModel, OptimizedModel):  # type: ignore[misc]  # optimum is untyped
    """BLIP-2 as an engine; `export=True` builds the engine of a checkpoint first.

    In `pipeline("image-text-to-text", model=..., processor=...)` transformers logs that it does not know this class,
    and works all the same.
    """

    base_model_prefix = "blip2rt"

    def __init__(self, model: Pipeline, config: Any = None, preprocessors: Any = None):
        self.open(model)
        OptimizedModel.__init__(self, model, config or self.config, preprocessors)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        export: bool = False,
        output: str | Path | None = None,
        precision: str = "fp32",
        name: str | None = None,
        threads: int | None = None,
        **unused: Any,
    ) -> Self:
        """Open an engine directory, or with `export` build it first.

        Args:
            path: the engine directory; with `export` a checkpoint, as `blip2rt export --model` takes it.
            export: whether `path` is a checkpoint.
            output: where its engine goes (default: engines/<model>-<precision>-cpu).
            precision: of its engine.
            name, threads: as for `Pipeline`.

        Raises:
            EngineError: no engine there, damaged, or a retrieval engine.
            CheckpointError, ExportError: as `export_engine`.
        """
        if export:
            from ..export import export_engine

            path = export_engine(path, output, precision=precision)
        return cls(Pipeline(path, name=name, threads=threads))

    def _save_pretrained(self, save_directory: str | Path) -> None:
        self.save_pretrained(save_directory)
