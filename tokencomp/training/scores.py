"""Running scores of a training, for its progress bar and log."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

DECAY = 0.95


class RunningScores(dict[str, float]):
    """Name → mean of a score over the latest batches, older ones with exponentially less weight."""

    def note(self, name: str, value: float) -> None:
        self[name] = DECAY * self.get(name, value) + (1 - DECAY) * value

    def percent(self) -> dict[str, int]:
        """The scores in percent, by name."""
        return {name: round(100 * value) for name, value in sorted(self.items())}

    def note_answers(
        self, batch: dict[str, Any], is_answer: torch.Tensor, right: torch.Tensor
    ) -> None:
        """Share of segments whose every answer token was right, per name: batches never repeat.

        Parameters
        ----------
        batch
            Packed segments: `which` segment every token belongs to, and the `names` of segments.
        is_answer : Tensor, bool, shape (rows, tokens)
        right : Tensor, bool, shape (answer tokens,)
            In the order of `is_answer`.
        """
        rows = is_answer.nonzero()[:, 0].tolist()
        which = torch.as_tensor(batch["which"])[is_answer].tolist()
        whole: dict[tuple[int, int], bool] = defaultdict(lambda: True)
        for row, number, ok in zip(rows, which, right.tolist(), strict=True):
            whole[row, number] &= ok
        tally = defaultdict(list)
        for (row, number), ok in whole.items():
            tally[batch["names"][row][number]].append(ok)
        for name, oks in tally.items():
            self.note(name, float(np.mean(oks)))
