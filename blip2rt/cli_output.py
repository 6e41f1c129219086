"""How commands tell their results: one line each, JSON for programs or words for people."""

import json
from collections.abc import Mapping
from typing import Any, TextIO


def write_line(row: Mapping[str, Any], shown: str, as_json: bool, stream: TextIO | None = None) -> None:
    """A row as JSON on stdout, or what people see of it on `stream` (None: stdout)."""
    if as_json:
        line = json.dumps(row, ensure_ascii=False)
        # a file name that is no UTF-8 is escaped, as Python's json reads it: each line stays valid JSON
        print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
    else:
        print(shown, file=stream, flush=True)
