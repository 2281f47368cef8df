"""Answers in JSON: a schema as a grammar that the tokens of an answer follow."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.serving.limits import RequestError

# Between the parts of a JSON text: nothing, a space, or a new line and its indentation. Some models
# write white space without an end where they may.
WHITE_SPACE = r"\n? {0,16}"


class Grammar:
    """The state of one answer, in a matcher of llguidance."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_stopped())

    def mask(self, scores: Tensor) -> None:
        """Exclude the tokens that cannot follow from the scores (vocabulary,), in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        excluded = torch.ones(len(scores), dtype=torch.bool)
        excluded[: len(allowed)] = ~allowed[: len(scores)]
        if not excluded.all():  # else the matcher has failed, which `accept` reports
            scores.masked_fill_(excluded.to(scores.device), -torch.inf)

    def accept(self, token: int) -> str:
        """Append the next token of the answer; return why it is not allowed, or ""."""
        if self._matcher.consume_token(token):
            return ""
        return self._matcher.get_error() or "no token can follow"


class Grammars:
    """Compiles the grammars of requests, if llguidance is installed. `of` is thread-safe."""

    def __init__(self, tokenizer: Any, ends: set[int]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def of(self, schema: str, count: int = 1, name: str = "response_format") -> list[Grammar]:
        """Return a grammar for each of `count` answers; `name` is the field that asks for it."""
        try:
            from llguidance import LLMatcher

            vocabulary = self._read_vocabulary()
        except ImportError:
            raise RequestError(
                f"this {name} is not served: the server has no llguidance (pip install llguidance)."
            ) from None
        except ValueError as error:
            raise RequestError(f"{name}: not for this model: {error}") from None
        options: Any = {"whitespace_pattern": WHITE_SPACE}
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults=options)
        matchers = [LLMatcher(vocabulary, grammar, log_level=0) for _ in range(count)]
        if matchers[0].is_error():
            raise RequestError(f"{name}: {matchers[0].get_error()}")
        return [Grammar(matcher) for matcher in matchers]

    def _read_vocabulary(self) -> Any:
        """Return llguidance's form of the tokenizer, which takes a second to build."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None:
                ends = sorted(self.ends) or None
                self._vocabulary = from_tokenizer(self.tokenizer, eos_token=ends)
            return self._vocabulary
