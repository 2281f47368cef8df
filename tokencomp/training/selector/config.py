"""Options of `tokencomp train selector`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokencomp.reducers.selector import Input
from tokencomp.training.loop import TrainingConfig
from tokencomp.training.relevance import TARGET, Target


@dataclass(frozen=True)
class SelectorConfig(TrainingConfig):
    """Options of the training of a selector; the paper explains 8 to 12 thousand `samples`.

    Attributes
    ----------
    epochs, batch_spans
        Of the network.
    zeroed
        Share of each label's lowest values that is set to zero.
    answers
        "generated": explain what the model says (the paper); "given": the reference answer.
    target
        "logit" or "logprob" of the answer tokens.
    max_new_tokens
        Longest answer that is generated and explained.
    held_out
        Held-out questions that are explained.
    input
        What the network reads: "attention" of the text in layer 0 (the paper), or the projected
        visual "features" (ours), two bytes per number in the labels.
    """

    learning_rate: float = 2e-3
    epochs: int = 20
    batch_spans: int = 64
    zeroed: float = 0.5
    answers: Literal["generated", "given"] = "generated"
    target: Target = TARGET
    max_new_tokens: int = 16
    held_out: int = 500
    input: Input = "attention"
