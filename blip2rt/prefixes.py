"""Beginnings that a reader does not want in every text: "a painting of", or the prompt once more."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .errors import InputError


def checked_prefixes(prefixes: Any) -> list[str]:
    """One text or several as a list.

    Raises:
        InputError: neither a string nor a list of strings.
    """
    listed = [prefixes] if isinstance(prefixes, str) else prefixes
    if not isinstance(listed, list | tuple) or not all(isinstance(prefix, str) for prefix in listed):
        raise InputError(f"strip_prefix must be a string or a list of strings, not {prefixes!r:.60}")
    return list(listed)


def without_prefix(results: Any, prefixes: Sequence[str]) -> Any:
    """A result or a list of them whose texts, also those of the alternatives, went through `strip_prefix`."""
    if not prefixes:
        return results
    if isinstance(results, list):
        return [without_prefix(result, prefixes) for result in results]
    alternatives = without_prefix(results.alternatives, prefixes)
    return replace(results, text=strip_prefix(results.text, prefixes), alternatives=alternatives)


def strip_prefix(text: str, prefixes: Sequence[str]) -> str:
    """`text` without the longest of `prefixes` that it begins with, as a whole word, whatever its case."""
    for prefix in sorted((p.strip() for p in prefixes), key=len, reverse=True):
        rest = text[len(prefix) :]
        if prefix and text.lower().startswith(prefix.lower()) and not (prefix[-1].isalnum() and rest[:1].isalnum()):
            return rest.strip()
    return text
