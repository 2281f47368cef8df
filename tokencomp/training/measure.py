"""Accuracy of trained methods and baselines on the same questions, with paired intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokencomp.errors import MediaError
from tokencomp.evaluation.batches import Around
from tokencomp.evaluation.metrics import mcnemar, retention
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.inputs.questions import Example
from tokencomp.storage import finite
from tokencomp.training.data import answer_ids
from tokencomp.training.loop import TrainingConfig

REPLY = 4
"""Least number of tokens that an answer may have, so that "(B)." fits where "B" is expected."""


@dataclass
class Measurement:
    """Answers of many settings to the same questions, and the table of their accuracy.

    `models` are variants of one model by name, see `sweep`; the uncompressed answers of "" are the
    reference. For `around` see `sweep`.
    """

    models: dict[str, Any]
    processor: Any
    frames: int = 8
    batch: int = 32
    around: Around | None = None
    runs: dict[str, EvalRun] = field(default_factory=dict)  # by `Setting.key`

    def run(
        self, examples: Sequence[Example], settings: Sequence[Setting], title: str = "asking"
    ) -> None:
        """Answer every example under every setting, and by the uncompressed model.

        Answers are cut at the length of the longest reference answer, with its end-of-turn token.
        Raises `MediaError` if an image or video cannot be read.
        """
        answers = [example.answer for example in examples]
        ids = answer_ids(self.processor, self.models[""], answers, end=True)
        runs = sweep(
            self.models,
            self.processor,
            examples,
            [Setting(), *(s for s in settings if s.name != FULL)],
            batch_size=self.batch,
            frames=self.frames,
            max_new_tokens=max([REPLY, *map(len, ids)]),
            progress=title,
            around=self.around,
        )
        failed = [record for run in runs.values() for record in run.failed]
        if failed:
            raise MediaError(f"question {failed[0]['id']!r}: {failed[0]['error']}")
        self.runs |= {setting.key: run for setting, run in runs.items()}

    def scores(self, key: str) -> list[float]:
        """Right (1) or wrong (0) per question."""
        return [float(r["correct"]) for r in self.runs[key].answered]

    def table(self, settings: Sequence[Setting], baseline: str = "random") -> list[dict[str, Any]]:
        """One row per setting, with the paired interval of its retention and McNemar's test.

        The test compares it with `baseline` at the same ratio.
        """
        full = self.scores(Setting().key)
        rows = [{"name": FULL, "ratio": 0.0, "accuracy": sum(full) / len(full), "items": len(full)}]
        for setting in settings:
            scores, run = self.scores(setting.key), self.runs[setting.key]
            kept = retention(scores, full)
            row: dict[str, Any] = {
                "name": setting.name,
                "ratio": setting.ratio,
                "achieved_ratio": finite(run.mean("ratio")) if setting.ratio else None,
                "tokens": finite(run.mean_tokens) if setting.ratio else None,
                "accuracy": sum(scores) / len(scores),
                "retention": finite(kept.value),
                "interval": [finite(kept.low), finite(kept.high)],
            }
            rival = f"{baseline}@{setting.ratio:g}"
            if setting.name != baseline and rival in self.runs:
                test = mcnemar(scores, self.scores(rival))
                row[f"vs_{baseline}"] = {"wins": test.wins, "losses": test.losses, "p": test.p}
            rows.append(row)
        return rows


def accuracy(
    models: dict[str, Any],
    processor: Any,
    source: Sequence[Example],
    settings: Sequence[Setting],
    config: TrainingConfig,
    title: str = "evaluating",
) -> list[dict[str, Any]]:
    """`Measurement.table` of held-out questions, in the batches and frames of a training."""
    measured = Measurement(models, processor, config.frames, config.batch)
    measured.run(source, settings, title)
    return measured.table(settings)
