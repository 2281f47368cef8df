"""The loss on answers, against a loop over the tokens that are labelled."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from recipes.trainer import Trainer
from tokencomp.engine.prompt import IGNORED
from tokencomp.training.steps import RunningScores


def test_answer_loss_is_the_mean_over_labelled_tokens() -> None:
    """A segment counts as right when all of its tokens are; what has no label counts nowhere."""
    head, hidden = torch.nn.Linear(6, 9), torch.randn(2, 5, 6)
    logits = head(hidden)
    best = logits.argmax(-1)
    labels, which = np.full((2, 5), IGNORED), np.full((2, 5), -1)
    for row, at, segment, right in ((0, 1, 0, True), (0, 2, 0, False), (1, 0, 0, True)):
        labels[row, at] = int(best[row, at]) if right else (int(best[row, at]) + 1) % 9
        which[row, at] = segment
    batch = {"labels": labels, "which": which, "names": [["place"], ["count"]]}
    run = SimpleNamespace(
        model=SimpleNamespace(get_output_embeddings=lambda: head), scores=RunningScores()
    )
    loss = Trainer.answer_loss(run, batch, hidden)
    each = [
        torch.logsumexp(logits[r, t], 0) - logits[r, t, labels[r, t]]
        for r, t in ((0, 1), (0, 2), (1, 0))
    ]
    torch.testing.assert_close(loss, sum(each) / 3)
    assert run.scores == {"place": 0.0, "count": 1.0}
