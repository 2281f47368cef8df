"""One batch of questions under one setting: inputs, answers, records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import MediaError, ScoreError, SpanError
from tokencomp.evaluation.baselines import EqualTokens, native_budget
from tokencomp.evaluation.cost import Cost, prefill_costs
from tokencomp.evaluation.patches import PatchedModels
from tokencomp.evaluation.settings import NATIVE, Setting
from tokencomp.inputs.prompts import build_inputs, generate, to_model
from tokencomp.inputs.questions import Example, modality_of

if TYPE_CHECKING:
    from tokencomp.engine.stats import Stats

Loaded = tuple[Example, list[Any]]
"""A question and its media, decoded."""
Answers = dict[Setting, list[str]]
Around = Callable[[Setting, dict[str, Any], Answers], AbstractContextManager[Any]]
"""Setting, inputs of a batch, and its answers so far → context in which the model answers."""

TOO_LARGE = "out of GPU memory with this item alone; give fewer frames or smaller media"
OF_AN_ITEM = (MediaError, SpanError, ScoreError)
"""Errors by which an item fails: the processor refuses its media, or the method what they become.

Others, such as of plans, weights and models, concern every item and end the run.
"""


@dataclass(frozen=True)
class Batch:
    """A record and a cost per question of one batch, seconds, and stats, if patched."""

    records: list[dict[str, Any]]
    costs: list[Cost]
    seconds: float
    stats: Stats | None


@dataclass(eq=False)
class Answerer:
    """Answers batches of questions with the variants of one model, inside the context of `patches`.

    The first of `models`, named as in `sweep`, measures the costs of input baselines. `how` has
    `frames`, `max_new_tokens` and `seed`. With `disable_adapters`, the PEFT adapters of the variant
    "" are switched off. For `around` see `sweep`.
    """

    models: dict[str, Any]
    processor: Any
    how: dict[str, Any]
    disable_adapters: bool = False
    around: Around | None = None

    def __post_init__(self) -> None:
        self.patches = PatchedModels(self.models)
        self.plain = next(iter(self.models.values()))
        self._equal_tokens: dict[str, EqualTokens] = {}

    def equal_tokens(self, setting: Setting) -> EqualTokens:
        """The (cached) token counter of an input baseline."""
        if setting.name not in self._equal_tokens:
            placeholders = list(adapter_for(self.plain).placeholders)
            counter = EqualTokens(self.processor, placeholders, setting.name)
            self._equal_tokens[setting.name] = counter
        return self._equal_tokens[setting.name]

    def shrunk(self, setting: Setting, rows: Sequence[Loaded]) -> list[list[Any]]:
        """The media of every row: shrunk under an input baseline, unchanged otherwise."""
        if not setting.input_baseline or setting.reducer == NATIVE:
            return [media for _, media in rows]
        shrink = self.equal_tokens(setting).shrink
        return [[shrink(m, setting.ratio) for m in media] for _, media in rows]

    def inputs(self, rows: Sequence[Loaded], setting: Setting) -> dict[str, Any]:
        """Inputs of the model, under an input baseline of shrunk media."""
        native = setting.reducer == NATIVE
        budget = native_budget(self.processor, setting.ratio) if native else nullcontext()
        try:
            media = self.shrunk(setting, rows)
            with budget:
                return build_inputs(self.processor, media, [e.prompt for e, _ in rows])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # PyTorch refuses to stack media of different shapes
            raise MediaError(f"the model's processor fails: {error}") from error

    def answer(
        self, setting: Setting, rows: Sequence[Loaded], inputs: dict[str, Any], answers: Answers
    ) -> Batch:
        """Answer one batch under one setting; its answers are added to `answers`.

        Raises `SpanError` or `ScoreError` for an item that the method cannot reduce.
        """
        model = self.models[setting.variant]
        torch.manual_seed(self.how["seed"])
        with ExitStack() as stack:
            if self.disable_adapters and not setting.variant and hasattr(model, "disable_adapter"):
                stack.enter_context(model.disable_adapter())
            handle = stack.enter_context(self.patches.applied(setting, [e.id for e, _ in rows]))
            if self.around is not None:
                stack.enter_context(self.around(setting, inputs, answers))
            start = time.perf_counter()
            texts = generate(model, self.processor, inputs, self.how["max_new_tokens"])
            seconds = time.perf_counter() - start
            stats = handle.stats if handle is not None else None
            costs = self._costs(setting, stats, inputs, rows)
        answers[setting] = texts
        records = [
            _record(row, text, seconds / len(rows), cost)
            for row, text, cost in zip(rows, texts, costs, strict=True)
        ]
        return Batch(records, costs, seconds, stats)

    def prefill(self, setting: Setting, rows: Sequence[Loaded]) -> tuple[Stats | None, list[Cost]]:
        """`stats` of the prefill of a batch, as in `Batch`, and the cost of each row."""
        model = self.models[setting.variant]
        inputs = to_model(self.inputs(rows, setting), model)
        names = [e.id for e, _ in rows]
        with self.patches.applied(setting, names) as handle, torch.inference_mode():
            model(**inputs, use_cache=True, logits_to_keep=1)
            stats = handle.stats if handle is not None else None
        return stats, self._costs(setting, stats, inputs, rows)

    def _costs(
        self, setting: Setting, stats: Stats | None, inputs: dict[str, Any], rows: Sequence[Loaded]
    ) -> list[Cost]:
        full = None
        if setting.input_baseline:
            count = self.equal_tokens(setting).tokens
            full = [sum(count(m) for m in media) for _, media in rows]
        return prefill_costs(self.plain, inputs, stats, full)


def kind_of(row: Loaded) -> str:
    """The first of "video", "image" and "audio" among the media of a question, or ""."""
    modalities = {modality_of(media) for media in row[1]}
    return next((kind for kind in ("video", "image", "audio") if kind in modalities), "")


def _record(row: Loaded, text: str, seconds: float, cost: Cost) -> dict[str, Any]:
    example, _ = row
    return {
        "id": example.id,
        "kind": kind_of(row),
        "family": example.family,
        "prompt": example.prompt,
        "prediction": text,
        "answer": right_answers(example),
        **_score(example, text),
        "seconds": seconds,
        **cost.record(),
    }


def _score(example: Example, text: str) -> dict[str, Any]:
    """Whether an answer is right; of facts, the share that it has, each of them, and others."""
    if example.facts is None:
        return {"correct": example.correct(text)}
    found = example.facts.found(text)
    kept = [int(one) for one in found.kept]
    return {"correct": sum(kept) / len(kept), "facts": kept, "invented": found.invented}


def right_answers(example: Example) -> str:
    """All answers that count as right, as stored in records."""
    if example.facts is not None:
        return str(example.facts)
    return " / ".join((example.answer, *example.also))


def failed(example: Example, reason: str) -> dict[str, Any]:
    """The record of a question that could not be answered."""
    return {"id": example.id, "family": example.family, "error": reason}
