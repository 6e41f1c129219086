"""Examples become rows of numbers, and rows become batches: what each stage reads of a picture's texts.

A row is made in a worker thread from one example and its own random numbers, so it is the same in every run.
"""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.examples import Example
from ..errors import InputError
from ..export.tokenizer_files import DECODE, read_tokenizer
from ..model.config import OPTConfig, TextConfig, stop_token_ids
from ..tokenizer import QUESTION_PROMPT, SHORT_QUESTION_PROMPT
from .pictures import View, patch_labels
from .recipe import DataRecipe, TextRecipe

Row = dict[str, Any]
Batch = dict[str, Tensor]


class BadExampleError(Exception):
    """An example that a stage cannot learn from; it is counted and named."""


def padded(rows: Sequence[Sequence[int]], fill: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Ids of unequal lengths as [B, L], and which are no padding, [B, L]; L is the longest, at least `length`."""
    longest = max([length, *map(len, rows)])
    ids, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = True
    return ids, mask


def stack(rows: Sequence[Row], name: str) -> Tensor:
    """What every row has under a name, [B, ...]."""
    return torch.from_numpy(np.stack([row[name] for row in rows]))


class BertText:
    """Texts as the Q-Former reads them: [CLS] ... [SEP]."""

    def __init__(self, directory: Path, vocab_size: int, max_tokens: int):
        tokenizer = read_tokenizer(directory, "model.text_tokenizer")
        self._tokenizer, self.max_tokens = tokenizer.backend_tokenizer, max_tokens
        self._begin, self._end, self.pad = (getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad"))
        if None in (self._begin, self._end, self.pad):
            raise InputError(f"model.text_tokenizer {directory} has no [CLS], [SEP] or [PAD]: pass BERT's")
        # [DEC] is added behind BERT's words; a vocabulary without it has its row last
        known = tokenizer.get_vocab().get(DECODE)
        self.decode_id: int = vocab_size - 1 if known is None else known
        if max(len(tokenizer), self.decode_id + 1) > vocab_size:
            raise InputError(f"model.text_tokenizer {directory} has ids beyond the Q-Former's {vocab_size} rows")

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, cut to `max_tokens`."""
        inner = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._begin, *inner[: self.max_tokens - 2], self._end]


class LanguageText:
    """Texts as the language model reads and writes them."""

    def __init__(self, directory: Path, config: TextConfig, recipe: TextRecipe):
        tokenizer = read_tokenizer(directory, "model.tokenizer")
        self._tokenizer, self._config = tokenizer.backend_tokenizer, config
        stops = stop_token_ids(config)
        if not stops:
            raise InputError("the language model's configuration has no eos_token_id: a text could not end")
        self._stop, self.max_tokens = stops[0], recipe.max_tokens
        self.pad = config.pad_token_id or 0
        self.is_decoder_only = isinstance(config, OPTConfig)
        self.question = recipe.question or (QUESTION_PROMPT if self.is_decoder_only else SHORT_QUESTION_PROMPT)
        if self.question.count("{}") != 1:
            raise InputError(f"text.question is {self.question!r}: it needs one {{}}, where the question goes")

    def pair(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Decoder-only: the prompt, and prompt, text and stop token; else: the encoder's prompt, and the output.

        Raises:
            BadExampleError: the prompt leaves no room for the text.
        """
        if not self.is_decoder_only:
            given = self._tokenizer.encode(prompt).ids[: self.max_tokens]
            return given, [*self._encode(text)[: self.max_tokens - 1], self._stop]
        begin = [self._config.bos_token_id] if self._config.bos_token_id is not None else []
        given = begin + self._encode(prompt)
        whole = [*begin, *self._encode(f"{prompt} {text}".strip()), self._stop][: self.max_tokens]
        if len(given) >= len(whole):
            raise BadExampleError(f"{prompt!r} takes all text.max_tokens {self.max_tokens}")
        return given, whole

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class ContrastiveRows:
    """Stage 1 and retrieval: one of a picture's captions."""

    def __init__(self, text: BertText):
        self.text = text

    def row(self, example: Example, source: int, draw: np.random.Generator, view: View) -> Row:
        """The row of an example.

        Raises:
            BadExampleError: it has no caption.
        """
        if not example.captions:
            raise BadExampleError("it has no caption")
        caption = example.captions[int(draw.integers(len(example.captions)))]
        # 63 bits of its name: rows of one picture are no negatives of each other
        digest = int.from_bytes(blake2b(example.id.encode(), digest_size=8).digest(), "big") >> 1
        return {"ids": self.text.ids(caption), "image_id": np.int64(digest)}

    def batch(self, rows: Sequence[Row]) -> Batch:
        """text_ids, text_mask [B, L], the same L in every process, and image_ids [B]."""
        ids, mask = padded([row["ids"] for row in rows], self.text.pad, self.text.max_tokens)
        return {"text_ids": ids, "text_mask": mask, "image_ids": stack(rows, "image_id")}


class GenerativeRows:
    """Stage 2, captions and questions: up to `per_picture` texts behind one picture, each after its prompt."""

    def __init__(self, text: LanguageText, data: Sequence[DataRecipe], per_picture: int, question: BertText | None):
        self.text, self._prompts, self._per_picture = text, [source.prompt for source in data], per_picture
        self._question = question

    def row(self, example: Example, source: int, draw: np.random.Generator, view: View) -> Row:
        """The row of an example.

        Raises:
            BadExampleError: it has nothing to say, or its question is too long.
        """
        number = len(example.captions) * (self._question is None) + len(example.questions)
        if not number:
            raise BadExampleError(
                "it has no caption and no question" if self._question is None else "it has no question"
            )
        chosen = draw.permutation(number)[: self._per_picture]
        pairs, questions = [], []
        for i in chosen:
            if i < len(example.questions):
                question, answers = example.questions[i]
                pairs.append((self.text.question.format(question), answers[int(draw.integers(len(answers)))]))
                questions.append(self._question.ids(question) if self._question else [])
            else:
                pairs.append((self._prompts[source], example.captions[i - len(example.questions)]))
        return {"pairs": [self.text.pair(*pair) for pair in pairs], "questions": questions}

    def batch(self, rows: Sequence[Row]) -> Batch:
        """owner [R]: the picture of each text; prompt_ids, prompt_mask [R, P]; text_ids, text_mask [R, T]."""
        pairs = [pair for row in rows for pair in row["pairs"]]
        prompts, texts = zip(*pairs, strict=True)
        batch = {"owner": torch.tensor([i for i, row in enumerate(rows) for _ in row["pairs"]])}
        batch["prompt_ids"], batch["prompt_mask"] = padded(prompts, self.text.pad)
        batch["text_ids"], batch["text_mask"] = padded(texts, self.text.pad)
        if self._question is not None:
            questions = [ids for row in rows for ids in row["questions"]]
            batch["question_ids"], batch["question_mask"] = padded(questions, self._question.pad)
        return batch


class LanguageRows:
    """Documents for the language model alone."""

    def __init__(self, text: LanguageText):
        self.text = text

    def row(self, example: Example, source: int, draw: np.random.Generator, view: View) -> Row:
        """The row of a document; a long one is cut."""
        return {"ids": self.text.pair("", example.text)[1]}

    def batch(self, rows: Sequence[Row]) -> Batch:
        """text_ids, text_mask [B, T]."""
        ids, mask = padded([row["ids"] for row in rows], self.text.pad)
        return {"text_ids": ids, "text_mask": mask}


class VisionRows:
    """Pictures whose patches have a class each: that of the box they lie in, or the picture's background."""

    def __init__(self, backgrounds: set[str], things: set[str], side: int):
        self.num_backgrounds, self._side = len(backgrounds), side
        self._backgrounds = {name: i for i, name in enumerate(sorted(backgrounds))}
        self._things = {name: len(backgrounds) + i for i, name in enumerate(sorted(things))}
        self.num_classes = len(backgrounds) + len(things)

    def row(self, example: Example, source: int, draw: np.random.Generator, view: View) -> Row:
        """The row of an example."""
        background = self._backgrounds[example.background]
        return {"labels": patch_labels(example.boxes, background, self._things, view, self._side)}

    def batch(self, rows: Sequence[Row]) -> Batch:
        """labels and is_background, [B, N]."""
        labels = stack(rows, "labels")
        return {"labels": labels, "is_background": labels < self.num_backgrounds}


Rows = ContrastiveRows | GenerativeRows | LanguageRows | VisionRows
