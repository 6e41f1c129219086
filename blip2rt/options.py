"""How text is generated: names and meaning are those of transformers' `GenerationConfig`."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from .errors import InputError

RULES = ("transformers", "lavis")
SAMPLING_ONLY = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one call. A field left at None takes the default of the method that is called.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    num_beams: int | None = None  # 1: greedy or sampling
    max_new_tokens: int | None = None  # generated tokens, the stop token included
    min_new_tokens: int | None = None  # no stop token before this many
    length_penalty: float | None = None  # a sequence's score is its log-probability over length ** length_penalty
    early_stopping: bool | str | None = None  # True: at num_beams finished ones; False: a heuristic; "never": exact
    repetition_penalty: float | None = None  # > 1 discourages tokens already seen (arXiv 1909.05858)
    no_repeat_ngram_size: int | None = None  # no n-gram of this size twice; 0: off
    num_return_sequences: int | None = None  # how many sequences: the best one and its alternatives
    do_sample: bool | None = None  # draw tokens instead of taking the likeliest
    temperature: float | None = None  # sampling: logits are divided by this; 1
    top_k: int | None = None  # sampling: only the k likeliest tokens; 50, 0: off
    top_p: float | None = None  # sampling: only the likeliest tokens that sum up to p (arXiv 1904.09751); 1: off
    seed: int | None = None  # sampling: same seed, same text; None: a new one for every call
    rules: str | None = None  # whose beam search and penalties: "transformers" 5, or "lavis" (transformers 4.33)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, _CHECKS[field.name](field.name, value))


@dataclass(frozen=True)
class ResolvedOptions:
    """`GenerationOptions` with every value known and no contradictions."""

    num_beams: int = 1
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    rules: str = "transformers"

    @property
    def num_rows(self) -> int:
        """Rows of one image that are decoded side by side: beams, or sequences that are sampled."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


def resolve_options(
    defaults: Mapping[str, Any], options: GenerationOptions | None, keywords: Mapping[str, Any]
) -> ResolvedOptions:
    """Join a method's defaults, `options=` and keywords (the later win).

    Raises:
        InputError: an unknown name, a wrong value, or options that contradict each other.
    """
    known = [field.name for field in fields(GenerationOptions)]
    for name in keywords:
        if name == "max_length":
            raise InputError("there is no option max_length (its meaning changed too often): use max_new_tokens")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown option {name!r}; did you mean {nearest!r}?")
    if options is not None and not isinstance(options, GenerationOptions):
        raise InputError(f"options= takes a GenerationOptions, not {type(options).__name__}")
    given = replace(options or GenerationOptions(), **keywords)
    chosen = {name: getattr(given, name) for name in known if getattr(given, name) is not None}
    resolved = ResolvedOptions(**{**defaults, **chosen})
    _refuse_contradictions(resolved, chosen)
    return resolved


def _refuse_contradictions(options: ResolvedOptions, chosen: Mapping[str, Any]) -> None:
    o = options
    if o.do_sample and o.num_beams > 1:
        raise InputError(f"do_sample=True with num_beams={o.num_beams}: sampling has no beams, pass num_beams=1")
    if o.num_beams > 1 and o.num_return_sequences > o.num_beams:
        raise InputError(
            f"num_return_sequences={o.num_return_sequences} is more than num_beams={o.num_beams}: raise num_beams"
        )
    if o.num_beams == 1 and not o.do_sample and o.num_return_sequences > 1:
        raise InputError(
            f"num_return_sequences={o.num_return_sequences} with greedy search, which knows one sequence: "
            "raise num_beams or pass do_sample=True"
        )
    if o.min_new_tokens > o.max_new_tokens:
        raise InputError(f"min_new_tokens={o.min_new_tokens} is more than max_new_tokens={o.max_new_tokens}")
    if not o.do_sample:
        for name in SAMPLING_ONLY:
            if name in chosen:
                raise InputError(f"{name}={chosen[name]} has no effect without do_sample=True")


def _integer(least: int):  # type: ignore[no-untyped-def]
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        return int(value)

    return check


def _number(above: float = -math.inf, most: float = math.inf):  # type: ignore[no-untyped-def]
    def check(name: str, value: Any) -> float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not above < value <= most or math.isinf(value):  # float() would overflow first
            bounds = f" above {above:g}" * (above > -math.inf) + f" and at most {most:g}" * (most < math.inf)
            raise InputError(f"{name} must be a number{bounds}, not {value!r}")
        return float(value)

    return check


def _choice(*choices: Any):  # type: ignore[no-untyped-def]
    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise InputError(f"{name} must be {' or '.join(repr(c) for c in choices)}, not {value!r}")
        return value

    return check


_CHECKS = {
    "num_beams": _integer(1),
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "length_penalty": _number(above=-10, most=10),  # beyond it a length to this power leaves float32
    "early_stopping": _choice(True, False, "never"),
    "repetition_penalty": _number(above=1e-6, most=1e6),
    "no_repeat_ngram_size": _integer(0),
    "num_return_sequences": _integer(1),
    "do_sample": _choice(True, False),
    "temperature": _number(above=1e-6, most=1e6),
    "top_k": _integer(0),
    "top_p": _number(above=0, most=1),
    "seed": _integer(0),
    "rules": _choice(*RULES),
}
