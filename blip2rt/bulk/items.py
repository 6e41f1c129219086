"""One input of a collection."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """A picture of a source, not opened yet; or, with `error`, an input that cannot even be named properly.

    `id` is the same in every run over the source. `members` are the other files of a WebDataset sample, by ending.
    """

    id: str
    path: Path | None = None  # where the picture lies
    data: bytes | None = None  # or its encoded bytes
    text: str | None = None  # the question or prompt that came with it
    error: str | None = None
    ending: str = ""  # of the picture's name in its sample: "jpg"
    members: Mapping[str, bytes] = field(default_factory=dict)
