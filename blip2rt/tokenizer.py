"""Text <-> token ids of the language model, and the prompts that BLIP-2 was trained with."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from .errors import EngineError, InputError
from .manifest import TokenSpec

CAPTION_PROMPT = "a photo of"
QUESTION_PROMPT = "Question: {} Answer:"  # for OPT: BLIP-2 paper, section 4.1
SHORT_QUESTION_PROMPT = "Question: {} Short answer:"  # for FLAN-T5: the same place


class _TokenizerFile:
    """The tokenizer of an engine directory."""

    def __init__(self, path: Path, tokens: TokenSpec, vocab_size: int, for_encoder: bool = False):
        """Read a `tokenizer.json`.

        Args:
            path: the file.
            tokens: ids of the language model.
            vocab_size: its embedding rows.
            for_encoder: prompts go to an encoder (T5), which wants the tokenizer's own end token and no BOS.

        Raises:
            EngineError: the file cannot be read.
        """
        self.tokens, self.vocab_size, self.for_encoder = tokens, vocab_size, for_encoder
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise EngineError(
                f"{path} cannot be read ({error}); build the engine anew with `blip2rt export`"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _ids(self, text: str, what: str, with_special: bool = False) -> list[int]:
        """Ids, with the tokenizer's own special tokens or without; `what` names the text in errors.

        Raises:
            InputError: not a string, not valid text, or text with an id beyond the embedding rows.
        """
        if not isinstance(text, str):
            raise InputError(f"{what} must be a string, not {type(text).__name__}")
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=with_special).ids
        except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair
            raise InputError(f"{what} {text!r} is not valid text") from error
        beyond = [i for i in ids if i >= self.vocab_size]
        if beyond:
            raise InputError(
                f"{what} {text!r} holds token {beyond[0]}, but the model has {self.vocab_size} embedding rows"
            )
        return ids


class Tokenizer(_TokenizerFile):
    """The language model's."""

    def encode(self, prompt: str) -> list[int]:
        """Prompt -> ids, with exactly one BOS in front; for an encoder as the tokenizer itself ends them.

        Raises:
            InputError: not a string, or text that stands for an image slot or for no embedding row.
        """
        ids = self._ids(prompt, "the prompt", with_special=self.for_encoder)
        if self.tokens.image is not None and self.tokens.image in ids:
            raise InputError(f"the prompt {prompt!r} holds the placeholder of the image, which blip2rt puts in itself")
        return ids if self.for_encoder else [self.tokens.bos, *ids]

    def cut(self, prompt: str, length: int) -> str:
        """The prompt, or what is left of it when only `length` of its tokens, BOS included, may stay.

        Raises:
            InputError: as `encode`.
        """
        ids = self.encode(prompt)
        return prompt if len(ids) <= length else self.decode(ids[:length])

    def encode_answer(self, text: str) -> list[int]:
        """An answer -> the ids that a model would generate for it, without the stop token.

        Raises:
            InputError: the model has no stop token, or text for no embedding row.
        """
        if not self.tokens.stop:
            raise InputError("this model has no stop token, and candidates are compared with it: generate the answer")
        return self._ids(text.strip() if self.for_encoder else f" {text.strip()}", "the candidate")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids -> text, special tokens skipped, not stripped."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class TextTokenizer(_TokenizerFile):
    """The Q-Former's, of texts that are compared with images, and of questions."""

    def __init__(self, path: Path, tokens: TokenSpec, vocab_size: int, num_positions: int):
        """Read a `tokenizer.json`; texts have `num_positions` tokens at most, the first and the last included.

        Raises:
            EngineError: the file cannot be read.
        """
        super().__init__(path, tokens, vocab_size)
        self.num_positions = num_positions

    def encode(self, text: str, what: str) -> list[int]:
        """Text -> ids, [CLS] first and [SEP] last; `what` names it in errors, as "text 3".

        Raises:
            InputError: not a string, empty, longer than the positions, or text for no embedding row.
        """
        ids = self._ids(text, what)
        if not ids:
            raise InputError(f"{what} is empty: {text!r}")
        if len(ids) + 2 > self.num_positions:
            raise InputError(
                f"{what} has {len(ids) + 2} tokens and the model {self.num_positions} positions: shorten it, "
                f"{text[:40]!r}..."
            )
        return [self.tokens.bos, *ids, *self.tokens.stop]
