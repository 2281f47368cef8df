"""Training of a `ccam` projector on a frozen model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.prompts import to_model
from tokencomp.inputs.questions import Example
from tokencomp.reducers.ccam import Ccam
from tokencomp.tokens.tokens import ModelFacts, VisualSpan
from tokencomp.trained.cards import model_card
from tokencomp.trained.ccam import CCAMProjector, ProjectorConfig
from tokencomp.training.capture import capture
from tokencomp.training.checks import without_patch
from tokencomp.training.data import EMBEDDED, load_batch, questions
from tokencomp.training.loop import Loop, LoopConfig, answer_loss
from tokencomp.training.measure import accuracy

SAMPLE = 16
"""Questions whose media are counted before training and before an evaluation."""


@dataclass(frozen=True)
class CcamConfig(LoopConfig):
    """Options of the training of a projector, in addition to those of the loop.

    For the first six see `ProjectorConfig`. The first `align` steps train every query to return the
    mean of its share of a single frame, so that the frozen model can read the queries from the
    start (ours).
    """

    queries: int = 32
    width: int = 0  # 0: the model's hidden size
    heads: int = 0  # 0: the model's
    mlp: int = 0  # 0: twice the width
    causal: bool = True
    spatial: bool = True
    align: int = 200

    def sizes(self, model: Any) -> ProjectorConfig:
        config = adapter_for(model).text_config
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        width = self.width or hidden
        sizes = (self.queries, width, self.heads or heads, self.mlp or 2 * width, hidden, hidden)
        return ProjectorConfig(*sizes, causal=self.causal, spatial=self.spatial)


@dataclass(frozen=True)
class Live(Ccam):
    """The reducer with a module in memory, gradients included.

    Its weights are fp32 in any model dtype: steps of AdamW vanish in bf16.
    """

    module: Any = None

    def bind(self, facts: ModelFacts) -> Live:
        return self

    def projector(self, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
        return self.module

    def queries(self) -> int:
        return self.module.config.queries


@without_patch
def train_ccam(model: Any, processor: Any, data: str, output: Path, config: CcamConfig) -> Path:
    """Train the projector on the answers of the frozen model to the training questions.

    Returns the path of `ccam.safetensors`, next to its card `ccam.json`. Raises `ScoreError` if
    training diverged, and `OptionError` for data without answers or media, media of no more tokens
    than queries, sizes that no projector can have, or a checkpoint of another run in `output`.
    """
    card = {**model_card(model), "data": data, "config": asdict(config)}
    source = questions(data, config.kind, config.samples)
    torch.manual_seed(config.seed)
    module = CCAMProjector(config.sizes(model)).to(model.device)
    for part in (source, *held_out(data, config).values()):
        check_media(sample_spans(model, processor, part, config), config.queries)
    live = Live(module=module)

    def loss(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        if loop.step < config.align:
            return align_loss(model, module, inputs)
        with tokencomp.patch(model, 0.5, reducer=live):
            return answer_loss(model, inputs, labels)

    loop = Loop(model, processor, module, source, config, output, card, loss)
    with frozen(model):
        loop.run()
    card |= loop.report()
    path = module.eval().save(output, card)
    if config.evaluate:
        rows = []
        for kind, held in held_out(data, config).items():
            spans = sample_spans(model, processor, held, config)
            settings, title = comparison(path, config.queries, spans), f"evaluating ({kind})"
            table = accuracy({"": model}, processor, held, settings, config, title)
            rows += [{"kind": kind, **row} for row in table]
        module.save(output, {**card, "accuracy": rows})
    return path


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Inside the block no parameter of `model` requires a gradient."""
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(needed)


def align_loss(model: Any, module: CCAMProjector, inputs: dict[str, Any]) -> Tensor:
    """Squared error to the mean features of the i-th of Q pieces of a frame, per frame.

    Relative to the variance of the features, so that a constant has error 1. Pieces overlap in
    frames of fewer than Q tokens.
    """
    seen = capture(model, inputs, layers=False)
    errors = []
    for b, row in enumerate(seen.spans):
        for span in row:
            x = seen.inputs[0][b, span.start : span.stop].float()
            x = x[~span.special_mask(x.device)]
            t, h, w = span.grid
            frames = x.view(t, h * w, -1)
            pooled = module(frames, 1, (h, w))
            pieces = F.adaptive_avg_pool1d(frames.transpose(1, 2), module.config.queries)
            target = pieces.transpose(1, 2)
            errors.append((pooled - target).square().mean() / frames.var().clamp(min=1e-12))
    return torch.stack(errors).mean()


def check_media(spans: Sequence[VisualSpan], queries: int) -> None:
    """Raise `OptionError` unless `queries` are fewer than the patches of every image or video."""
    least = min((s.visual - len(s.special) for s in spans), default=queries + 1)
    if least <= queries:
        raise OptionError(
            f"queries={queries}: an image or video of the data has {least} visual tokens, so that "
            f"nothing would be saved. Ask for fewer than {least} queries, or give larger media."
        )


def comparison(weights: Path, queries: int, spans: Sequence[VisualSpan]) -> list[Setting]:
    """The projector, and pooling and random choice with as many tokens, on media like `spans`.

    All keep special tokens: the projector in addition to its queries, the others within their
    count. Media for which the projector would save nothing are refused; different sizes are
    compared at their mean number of tokens.
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
    """Held-out questions by modality; images and videos of the embedded benchmark separately."""
    both = config.kind == "both" and data == EMBEDDED
    kinds = ("image", "video") if both else (config.kind,)
    if not config.evaluate:
        return {}
    return {kind: questions(data, kind, config.evaluate, "validation") for kind in kinds}


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
