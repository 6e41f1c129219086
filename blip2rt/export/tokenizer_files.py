"""The checkpoint's tokenizer -> one tokenizer.json, which the runtime reads without transformers."""

from pathlib import Path

from ..errors import CheckpointError


def write_tokenizer(source: Path, directory: Path, vocab_size: int) -> None:
    """Write `tokenizer.json` into the engine directory.

    Args:
        source: directory with a tokenizer that transformers can read (tokenizer.json, or vocab.json and merges.txt).
        directory: the engine directory.
        vocab_size: embedding rows of the language model.

    Raises:
        CheckpointError: no tokenizer there, or one with ids beyond the embedding rows.
    """
    from transformers import AutoTokenizer

    hint = "pass its directory with --tokenizer"
    if not source.is_dir():
        raise CheckpointError(f"there is no tokenizer directory {source}")
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise CheckpointError(f"{source} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt): {hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises whatever its readers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the tokenizer of {source} cannot be read ({reason}): {hint}") from error
    beyond = {token: i for token, i in backend.get_vocab(with_added_tokens=True).items() if i >= vocab_size}
    if beyond:
        token, largest = max(beyond.items(), key=lambda item: item[1])
        raise CheckpointError(
            f"the tokenizer of {source} has id {largest} ({token!r}), but the language model has {vocab_size} "
            f"embedding rows: they do not belong together; {hint}"
        )
    backend.save(str(directory / "tokenizer.json"))
