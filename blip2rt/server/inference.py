"""An engine as the Open Inference Protocol 2 sees it, over HTTP and gRPC (github.com/kserve/open-inference-protocol).

Inputs: `image`, BYTES [B] or [B, 1], encoded pictures; `text`, BYTES of the same shape, the prompt or question; it may
be left out for captions. Outputs: `text` BYTES [B, n], `score` FP64 [B, n]. Parameters: `task` (caption, answer,
generate) and the generation options.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..tokenizer import CAPTION_PROMPT
from .answering import DEFAULTS, Answering, Client, read_prompt
from .engines import Engine, Engines
from .errors import HttpError

PLATFORM = "blip2rt_onnx"
VERSION = "1"  # of every model
INPUTS = ({"name": "image", "datatype": "BYTES", "shape": [-1]}, {"name": "text", "datatype": "BYTES", "shape": [-1]})
OUTPUTS = (
    {"name": "text", "datatype": "BYTES", "shape": [-1, -1]},
    {"name": "score", "datatype": "FP64", "shape": [-1, -1]},
)
OWN_PARAMETERS = ("task", "binary_data_output", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
DATATYPES = {str(output["name"]): str(output["datatype"]) for output in OUTPUTS}

Outputs = dict[str, list[Any]]  # values of every output, row by row


def named(engine: Engine, name: str, version: str) -> Engine:
    """The engine, where it is the model that was asked for.

    Raises:
        HttpError: 404, it is another one.
    """
    if name != engine.name or version != VERSION:
        raise HttpError(404, f"there is no model {name[:100]!r}, version {version[:20]!r}, only {engine.name!r}, '1'")
    return engine


class Inputs:
    """The inputs of a request, each checked as it comes."""

    def __init__(self) -> None:
        self._found: dict[str, list[bytes]] = {}

    def claim(self, name: Any, datatype: Any) -> str:
        """A name that is an input's, and comes for the first time.

        Raises:
            InputError: it is not.
        """
        if name not in ("image", "text") or name in self._found or datatype != "BYTES":
            raise InputError(f"inputs are `image` and `text`, once each, of datatype BYTES, not {name!r:.60}")
        return str(name)

    def add(self, name: str, shape: Any, values: list[bytes]) -> None:
        """Values of a claimed name.

        Raises:
            InputError: they do not have this shape.
        """
        if shape not in ([len(values)], [len(values), 1]):
            raise InputError(f"`{name}` has {len(values)} values and the shape {shape!r:.60}: one value a picture")
        self._found[name] = values

    def images(self) -> list[bytes]:
        """Encoded pictures.

        Raises:
            InputError: there are none.
        """
        if not self._found.get("image"):
            raise InputError("there is no input `image`, or it is empty")
        return self._found["image"]

    def texts(self, task: str) -> list[str]:
        """A text for every picture.

        Raises:
            InputError: they are missing, of another number, or not UTF-8.
        """
        count, texts = len(self.images()), self._found.get("text")
        if texts is None:
            if task != "caption":
                raise InputError(f"the task {task} needs an input `text`")
            return [CAPTION_PROMPT] * count
        if len(texts) != count:
            raise InputError(f"{len(texts)} texts for {count} pictures: give one for every picture")
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError:
            raise InputError("`text` is not UTF-8") from None


async def infer(
    engines: Engines, answering: Answering, client: Client, model: str, inputs: Inputs, parameters: Mapping[str, Any]
) -> tuple[Outputs, list[int]]:
    """Caption, answer or follow instructions: all outputs, and their shape [B, n].

    Raises:
        HttpError: no such model, no room, no time.
        InputError: wrong pictures, texts or parameters.
    """
    with engines.use() as engine:
        named(engine, model, VERSION)
        _ = engine.generative  # an error where there is none
        task = parameters.get("task", "caption")
        if task not in DEFAULTS:
            raise InputError(f"task {task!r:.60} is none of {', '.join(DEFAULTS)}")
        given = {name: value for name, value in parameters.items() if name not in OWN_PARAMETERS}
        options = answering.options(str(task), given)
        prompts = [read_prompt(engine, str(task), text, options) for text in inputs.texts(str(task))]
        jobs = await answering.jobs(engine, inputs.images(), prompts, options)
        results = await answering.results(client, engine, jobs)
    rows = [[result, *result.alternatives] for result in results]
    width = min(len(row) for row in rows)
    texts = [row.text for found in rows for row in found[:width]]
    scores = [row.score for found in rows for row in found[:width]]
    return {"text": texts, "score": scores}, [len(rows), width]


def wanted(names: Sequence[Any]) -> list[str]:
    """The outputs that a request names; all, where it names none.

    Raises:
        InputError: one that does not exist.
    """
    for name in names:
        if name not in DATATYPES:
            raise InputError(f"outputs are {', '.join(DATATYPES)}, not {name!r:.60}")
    return [str(name) for name in names] or list(DATATYPES)


def unpack(data: bytes, name: str) -> list[bytes]:
    """Binary data as values: each behind its length, 4 bytes, little-endian.

    Raises:
        InputError: it ends before they do.
    """
    values, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            raise InputError(f"the binary data of `{name}` is cut short")
        (length,) = struct.unpack_from("<I", data, at)
        if at + 4 + length > len(data):
            raise InputError(f"the binary data of `{name}` is cut short")
        values.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return values


def pack(values: Sequence[Any]) -> bytes:
    """An output's values as binary data."""
    return b"".join(_pack(value) for value in values)


def _pack(value: Any) -> bytes:
    if isinstance(value, float):
        return struct.pack("<d", value)
    data = encoded(value)
    return struct.pack("<I", len(data)) + data


def encoded(text: str) -> bytes:
    """A text as UTF-8; what no text can be becomes a question mark."""
    return text.encode("utf-8", "replace")
