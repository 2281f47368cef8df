"""Options of `tokencomp train ccam`, sizes of its media, and the held-out accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.prompts import to_model
from tokencomp.inputs.questions import Example
from tokencomp.tokens.spans import VisualSpan
from tokencomp.trained.ccam_config import ProjectorConfig
from tokencomp.training.capture import capture
from tokencomp.training.data import EMBEDDED, load_batch, questions
from tokencomp.training.loop import LoopConfig
from tokencomp.training.measure import Measurement

SAMPLE = 16
"""Questions whose media are counted before training and before an evaluation."""


@dataclass(frozen=True)
class CcamConfig(LoopConfig):
    """Options of the training of a projector, beside those of the loop.

    Attributes
    ----------
    queries, width, heads, mlp, causal, spatial
        Of the projector; 0 takes the model's hidden size (width), its heads, and twice the width
        (mlp).
    align
        Number of first steps that train every query to return the mean of its share of a single
        frame, so that the frozen model can read the queries from the start (ours).
    """

    queries: int = 32
    width: int = 0
    heads: int = 0
    mlp: int = 0
    causal: bool = True
    spatial: bool = True
    align: int = 200

    def sizes(self, model: Any) -> ProjectorConfig:
        """The projector for `model`."""
        config = adapter_for(model).text_config
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        width = self.width or hidden
        sizes = (self.queries, width, self.heads or heads, self.mlp or 2 * width, hidden, hidden)
        return ProjectorConfig(*sizes, causal=self.causal, spatial=self.spatial)


def check_media(spans: Sequence[VisualSpan], queries: int) -> None:
    """Raise `OptionError` unless `queries` are fewer than the patches of every image or video."""
    least = min((s.visual - len(s.special) for s in spans), default=queries + 1)
    if least <= queries:
        raise OptionError(
            f"queries={queries}: an image or video of the data has {least} visual tokens, so that "
            f"nothing would be saved. Ask for fewer than {least} queries, or give larger media."
        )


def comparison(weights: Path, queries: int, spans: Sequence[VisualSpan]) -> list[Setting]:
    """The projector, and pooling and random choice at as many tokens, on media like `spans`.

    All of them keep special tokens: the projector beside its queries, the others within their
    count.

    Raises
    ------
    OptionError
        The projector would save nothing, so that the uncompressed model would be measured.
    """
    check_media(spans, queries)
    kept = sum(queries + len(span.special) for span in spans)
    ratio = 1.0 - kept / sum(span.visual for span in spans)
    return [
        Setting("ccam", ratio, {"weights": str(weights)}),
        Setting("pool", ratio),
        Setting("random", ratio),
    ]


def held_out(data: str, config: CcamConfig) -> dict[str, Sequence[Example]]:
    """Held-out questions by kind; images and videos of the embedded benchmark apart."""
    both = config.kind == "both" and data == EMBEDDED
    kinds = ("image", "video") if both else (config.kind,)
    if not config.evaluate:
        return {}
    return {kind: questions(data, kind, config.evaluate, "validation") for kind in kinds}


def evaluate(
    model: Any, processor: Any, data: str, weights: Path, config: CcamConfig
) -> list[dict[str, Any]]:
    """Held-out accuracy against pooling and random choice at as many tokens.

    Media of different sizes are compared at the mean number of tokens of a sample.
    """
    rows = []
    for kind, source in held_out(data, config).items():
        measured = Measurement({"": model}, processor, config.frames, config.batch)
        spans = sample_spans(model, processor, source, config)
        settings = comparison(weights, config.queries, spans)
        measured.run(source, settings, f"evaluating ({kind})")
        rows += [{"kind": kind, **row} for row in measured.table(settings)]
    return rows


def sample_spans(
    model: Any, processor: Any, source: Sequence[Example], config: LoopConfig
) -> list[VisualSpan]:
    """Images and videos of questions spread evenly along the source."""
    sampled: list[VisualSpan] = []
    count = min(SAMPLE, len(source))
    for i in range(count):  # one at a time: a batch would be padded to its longest video
        inputs, _ = load_batch([source[i * len(source) // count]], processor, config.frames)
        (spans,) = capture(model, to_model(inputs, model), layers=False).spans
        sampled += spans
    return sampled
