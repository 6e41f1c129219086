"""The checkpoint's tokenizer -> one tokenizer.json, which the runtime reads without transformers."""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..manifest import TokenSpec

FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
DECODE = "[DEC]"  # begins a caption in stage 1
QUESTION_FOLDER = "qformer_tokenizer"  # in a checkpoint: where transformers' InstructBLIP keeps its Q-Former's


def write_tokenizer(source: Path, directory: Path, vocab_size: int) -> None:
    """Write `tokenizer.json` into the engine directory.

    Args:
        source: directory with a tokenizer that transformers can read (tokenizer.json, or vocab.json and merges.txt).
        directory: the engine directory.
        vocab_size: embedding rows of the language model.

    Raises:
        CheckpointError: no tokenizer there, or one with ids beyond the embedding rows.
    """
    tokenizer = read_tokenizer(source, "--tokenizer")
    _refuse_ids_beyond(tokenizer, source, vocab_size, "the language model", "--tokenizer")
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))


def write_text_tokenizer(source: Path, file: Path, vocab_size: int) -> TokenSpec:
    """Write the tokenizer of the Q-Former, which is BERT's with [DEC] behind its last word.

    Args:
        source: directory with BERT's tokenizer; where it has no [DEC] (vocab.txt alone), the last row is taken for it.
        file: where to, in the engine directory.
        vocab_size: embedding rows of the Q-Former.

    Returns:
        The ids that begin, end and pad a text.

    Raises:
        CheckpointError: no tokenizer there, not BERT's, or one with ids beyond the embedding rows.
    """
    tokenizer = read_tokenizer(source, "--text-tokenizer")
    if DECODE not in tokenizer.get_vocab() and len(tokenizer) == vocab_size - 1:
        tokenizer.add_special_tokens({"bos_token": DECODE})
    _refuse_ids_beyond(tokenizer, source, vocab_size, "the Q-Former", "--text-tokenizer")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
    absent = [f"[{name.upper()}]" for name, i in ids.items() if i is None]
    if absent:
        raise CheckpointError(
            f"the tokenizer of {source} has no {', '.join(absent)}: a Q-Former reads texts with BERT's "
            "tokenizer; pass its directory with --text-tokenizer"
        )
    tokenizer.backend_tokenizer.save(str(file))
    return TokenSpec(ids["cls"], ids["pad"], (ids["sep"],), None)


def read_tokenizer(source: Path, option: str) -> Any:
    """The tokenizer of a directory, as transformers reads it.

    Raises:
        CheckpointError: no tokenizer there; the message names `option`.
    """
    from transformers import AutoTokenizer

    hint = f"pass its directory with {option}"
    if not source.is_dir():
        raise CheckpointError(f"there is no tokenizer directory {source}")
    if not any((source / name).is_file() for name in FILES):
        raise CheckpointError(f"{source} holds no tokenizer ({', '.join(FILES[:-1])} or {FILES[-1]}): {hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.backend_tokenizer  # noqa: B018  # raises where there is none
    except Exception as error:  # transformers raises whatever its readers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the tokenizer of {source} cannot be read ({reason}): {hint}") from error
    return tokenizer


def _refuse_ids_beyond(tokenizer: Any, source: Path, vocab_size: int, owner: str, option: str) -> None:
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    beyond = {token: i for token, i in vocabulary.items() if i >= vocab_size}
    if beyond:
        token, largest = max(beyond.items(), key=lambda item: item[1])
        raise CheckpointError(
            f"the tokenizer of {source} has id {largest} ({token!r}), but {owner} has {vocab_size} "
            f"embedding rows: they do not belong together; pass its directory with {option}"
        )
