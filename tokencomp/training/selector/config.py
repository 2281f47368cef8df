"""Options of `tokencomp train selector`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokencomp.reducers.selector import Input
from tokencomp.training.checks import check_rate
from tokencomp.training.relevance import TARGET, Target
from tokencomp.validation import check_types


@dataclass(frozen=True)
class SelectorConfig:
    """Options of the training of a selector.

    Attributes
    ----------
    samples
        Questions to explain; the paper has 8 to 12 thousand per model and modality.
    kind
        "image", "video" or "both" of the embedded benchmark; files hold what they hold.
    batch
        Questions answered at once, and explained as far as memory allows.
    epochs, learning_rate, batch_spans
        Of the network.
    zeroed
        Share of each label's lowest values that is set to zero.
    answers
        "generated": explain what the model says (the paper); "given": the reference answer.
    target
        "logit" or "logprob" of the answer tokens.
    frames
        Frames read from video files.
    max_new_tokens
        Longest answer that is generated and explained.
    held_out, evaluate
        Held-out questions that are explained, and that are answered under compression.
    seed
        Of the order of the questions and spans, and of the network's first weights.
    input
        What the network reads: "attention" of the text in layer 0 (the paper), or the projected
        visual "features" (ours), of which labels hold two bytes per number.

    Raises
    ------
    OptionError
        A value of another type or name, or a learning rate outside (0, 1].
    """

    samples: int = 8000
    kind: str = "both"
    batch: int = 16
    epochs: int = 20
    learning_rate: float = 2e-3
    batch_spans: int = 64
    zeroed: float = 0.5
    answers: Literal["generated", "given"] = "generated"
    target: Target = TARGET
    frames: int = 8
    max_new_tokens: int = 16
    held_out: int = 500
    evaluate: int = 200
    seed: int = 0
    input: Input = "attention"

    def __post_init__(self) -> None:
        check_types("selector", self)
        check_rate(self.learning_rate)
