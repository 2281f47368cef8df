"""Accuracy of many settings on the same questions, with paired intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import tokencomp
from tokencomp.evaluation.answering import generate, to_model
from tokencomp.evaluation.examples import Example
from tokencomp.evaluation.metrics import mcnemar, retention
from tokencomp.reducers.base import Reducer
from tokencomp.training.data import answer_ids, append, load_batch
from tokencomp.training.relevance import relevance

FULL = "full"


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
    """

    name: str
    ratio: float = 0.0
    reducer: str | Reducer | None = None
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""

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
    frames, batch, max_new_tokens
        Frames read from video files, questions at once, length of an answer.
    """

    def __init__(
        self,
        models: dict[str, Any],
        processor: Any,
        frames: int = 8,
        batch: int = 32,
        max_new_tokens: int = 4,
    ) -> None:
        self.models, self.processor = models, processor
        self.frames, self.batch, self.max_new_tokens = frames, batch, max_new_tokens
        self.records: list[dict[str, Any]] = []
        self.achieved: dict[str, list[float]] = {}
        self.tokens: dict[str, list[float]] = {}

    def run(self, examples: Sequence[Example], ways: Sequence[Way], title: str = "asking") -> None:
        """Answer every example in every way, the uncompressed model first."""
        ways = [Way(FULL), *(w for w in ways if w.name != FULL)]
        for start in tqdm(range(0, len(examples), self.batch), desc=title, mininterval=2):
            part = [examples[i] for i in range(start, min(start + self.batch, len(examples)))]
            inputs, _ = load_batch(part, self.processor, self.frames)
            answers: dict[str, list[str]] = {}
            truth = None
            for way in ways:
                if way.reducer == "oracle" and truth is None:
                    truth = self._relevance(inputs, answers[Way(FULL).key])
                answers[way.key] = self._answer(way, inputs, truth)
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

    def _answer(self, way: Way, inputs: dict[str, Any], truth: Any) -> list[str]:
        from tokencomp.reducers.oracle import truth as told

        model = self.models[way.model]
        with ExitStack() as stack:
            if way.model == "" and hasattr(model, "disable_adapter"):
                stack.enter_context(model.disable_adapter())
            handle = None
            if way.reducer is not None and (way.ratio > 0 or isinstance(way.reducer, Reducer)):
                handle = stack.enter_context(
                    tokencomp.patch(model, way.ratio, reducer=way.reducer, **way.options)
                )
                if way.reducer == "oracle":
                    stack.enter_context(told(truth))
            texts = generate(model, self.processor, inputs, self.max_new_tokens)
            if handle is not None and handle.stats is not None:
                after = handle.stats.tokens_after
                self.achieved.setdefault(way.key, []).append(handle.stats.ratio)
                mean = [sum(row) / len(row) for row in after]
                self.tokens.setdefault(way.key, []).append(sum(mean) / len(mean))
        return texts

    def _relevance(self, inputs: dict[str, Any], answers: list[str]) -> Any:
        model = self.models[""]
        ids = answer_ids(self.processor, model, [a or "?" for a in answers], end=False)
        forced, labels = append(inputs, ids)
        return relevance(model, to_model(forced, model), labels.to(model.device))

    def scores(self, key: str, keep: Callable[[dict], bool] = lambda r: True) -> list[float]:
        """Right (1) or wrong (0) per item."""
        return [float(r["correct"][key]) for r in self.records if keep(r)]

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

    def by_family(self) -> dict[str, dict[str, float]]:
        """Accuracy per question family and way."""
        found: dict[str, dict[str, float]] = {}
        for family in sorted({r["family"] for r in self.records}):
            mine = [r for r in self.records if r["family"] == family]
            keys = mine[0]["correct"]
            found[family] = {k: sum(r["correct"][k] for r in mine) / len(mine) for k in keys}
        return found

    def lines(self) -> Iterator[str]:
        """The records as JSON Lines."""
        for record in self.records:
            yield json.dumps(record) + "\n"

    def write(self, path: Path) -> Path:
        """Per-item records, whole or not at all."""
        from tokencomp.weights import replace_file

        replace_file(path, lambda part: part.write_text("".join(self.lines())))
        return path


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
