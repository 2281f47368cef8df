"""Accuracy of many settings on the same questions, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

import tokencomp
from tokencomp.evaluation.metrics import mcnemar, retention
from tokencomp.evaluation.subsets import per_question
from tokencomp.inputs.prompts import generate, to_model
from tokencomp.inputs.questions import Example
from tokencomp.patching import unpatched
from tokencomp.reducers.base import Reducer
from tokencomp.training.data import Joined, ShapesQuestions, answer_ids, append, load_batch
from tokencomp.training.relevance import TARGET, Target, relevance

FULL = "full"
REPLY = 4
"""Tokens that every answer may have, so that "(B)." fits where the reference is "B"."""


@dataclass(frozen=True)
class Way:
    """One way to answer: a reducer at a ratio, on the model as it is or on a variant of it.

    Attributes
    ----------
    name
        Row label; ways of equal name and other ratios form a curve.
    reducer, ratio, options
        As for `tokencomp.patch`; no reducer runs the model uncompressed.
    model
        Key of the variant in `Measurement.models`.
    target
        What of the answer `oracle` explains, see `tokencomp.training.relevance.relevance`.
    """

    name: str
    ratio: float = 0.0
    reducer: str | Reducer | None = None
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    target: Target = TARGET

    @property
    def key(self) -> str:
        return f"{self.name}@{self.ratio:g}"


class Measurement:
    """Asks every question in every way; each batch is loaded once.

    Parameters
    ----------
    models
        Variants of one model by name; "" is the plain one (PEFT adapters are switched off for
        it), whose uncompressed answers are the reference and are what `oracle` explains.
    processor
        Shared by all variants.
    frames, batch
        Frames read from video files, questions at once.
    max_new_tokens
        Where answers are cut; None: the longest reference answer of the questions.
    """

    def __init__(
        self,
        models: dict[str, Any],
        processor: Any,
        frames: int = 8,
        batch: int = 32,
        max_new_tokens: int | None = None,
    ) -> None:
        self.models, self.processor = models, processor
        self.frames, self.batch = frames, batch
        self.max_new_tokens = max_new_tokens
        self.records: list[dict[str, Any]] = []
        self.achieved: dict[str, list[float]] = {}
        self.tokens: dict[str, list[float]] = {}

    def run(self, examples: Sequence[Example], ways: Sequence[Way], title: str = "asking") -> None:
        """Answer every example in every way, the uncompressed model first."""
        ways = [Way(FULL), *(w for w in ways if w.name != FULL)]
        limit = self.max_new_tokens or max(
            REPLY, longest_answer(self.processor, self.models[""], examples)
        )
        for start in tqdm(range(0, len(examples), self.batch), desc=title, mininterval=2):
            part = [examples[i] for i in range(start, min(start + self.batch, len(examples)))]
            inputs, _ = load_batch(part, self.processor, self.frames)
            answers: dict[str, list[str]] = {}
            truth: dict[Target, Any] = {}
            for way in ways:
                if way.reducer == "oracle" and way.target not in truth:
                    said = answers[Way(FULL).key]
                    truth[way.target] = self._relevance(inputs, said, way.target)
                told_truth = truth.get(way.target)
                names = [example.id for example in part]
                answers[way.key] = self._answer(way, inputs, limit, told_truth, names)
            for b, example in enumerate(part):
                told = {key: row[b] for key, row in answers.items()}
                right = {key: example.correct(text) for key, text in told.items()}
                self.records.append(
                    {
                        "id": example.id,
                        "family": example.family,
                        "answer": example.answer,
                        "told": told,
                        "correct": right,
                    }
                )

    def _answer(
        self, way: Way, inputs: dict[str, Any], limit: int, truth: Any, names: Sequence[str]
    ) -> list[str]:
        from tokencomp.reducers.oracle import truth as told

        model = self.models[way.model]
        with ExitStack() as stack:
            stack.enter_context(unpatched(model))
            if way.model == "" and hasattr(model, "disable_adapter"):
                stack.enter_context(model.disable_adapter())
            handle = None
            if way.reducer is not None and (way.ratio > 0 or isinstance(way.reducer, Reducer)):
                request = {"ratio": way.ratio, "reducer": way.reducer, **way.options}
                request = per_question(request, names)
                handle = stack.enter_context(tokencomp.patch(model, **request))
                if way.reducer == "oracle":
                    stack.enter_context(told(truth))
            texts = generate(model, self.processor, inputs, limit)
            if handle is not None and handle.stats is not None:
                after = handle.stats.tokens_after
                self.achieved.setdefault(way.key, []).append(handle.stats.ratio)
                mean = [sum(row) / len(row) for row in after]
                self.tokens.setdefault(way.key, []).append(sum(mean) / len(mean))
        return texts

    def _relevance(self, inputs: dict[str, Any], answers: list[str], target: Target) -> Any:
        model = self.models[""]
        ids = answer_ids(self.processor, model, [a or "?" for a in answers], end=False)
        forced, labels = append(inputs, ids)
        with unpatched(model):
            return relevance(model, to_model(forced, model), labels.to(model.device), target)

    def scores(self, key: str) -> list[float]:
        """Right (1) or wrong (0) per item."""
        return [float(r["correct"][key]) for r in self.records]

    def table(self, ways: Sequence[Way], baseline: str = "random") -> list[dict[str, Any]]:
        """One row per way: accuracy, retention with its paired interval, McNemar vs `baseline`."""
        full = self.scores(Way(FULL).key)
        rows = [{"name": FULL, "ratio": 0.0, "accuracy": sum(full) / len(full), "items": len(full)}]
        for way in ways:
            mine = self.scores(way.key)
            kept = retention(mine, full)
            row: dict[str, Any] = {
                "name": way.name,
                "ratio": way.ratio,
                "achieved_ratio": _mean(self.achieved.get(way.key)),
                "tokens": _mean(self.tokens.get(way.key)),
                "accuracy": sum(mine) / len(mine),
                "retention": _finite(kept.value),
                "interval": [_finite(kept.low), _finite(kept.high)],
            }
            other = f"{baseline}@{way.ratio:g}"
            if way.name != baseline and self.records and other in self.records[0]["correct"]:
                test = mcnemar(mine, self.scores(other))
                row[f"vs_{baseline}"] = {"wins": test.wins, "losses": test.losses, "p": test.p}
            rows.append(row)
        return rows


def longest_answer(processor: Any, model: Any, source: Sequence[Example]) -> int:
    """Tokens of the longest reference answer, the end-of-turn token included."""
    return max(map(len, answer_ids(processor, model, _answers(source), end=True)), default=0)


def _answers(source: Sequence[Example]) -> list[str]:
    """Reference answers; what is rendered when asked for stays unrendered."""
    if isinstance(source, Joined):
        return [answer for part in source.parts for answer in _answers(part)]
    if isinstance(source, ShapesQuestions):
        return [source.item(i).answer for i in range(len(source))]
    return [example.answer for example in source]


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
