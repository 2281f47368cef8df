"""Training of a `ccam` projector on a frozen model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokencomp
from tokencomp.errors import OptionError
from tokencomp.reducers.ccam import Ccam
from tokencomp.storage import write_json
from tokencomp.tokens.spans import ModelFacts, VisualSpan
from tokencomp.trained.cards import model_card
from tokencomp.trained.ccam import CCAMProjector
from tokencomp.trained.ccam_config import read_card
from tokencomp.training.capture import capture
from tokencomp.training.ccam_evaluation import (
    CcamConfig,
    check_media,
    evaluate,
    held_out,
    sample_spans,
)
from tokencomp.training.checks import without_patch
from tokencomp.training.data import data_identity, questions
from tokencomp.training.loop import Loop, answer_loss


@dataclass(frozen=True)
class Live(Ccam):
    """The reducer around a module in memory, gradients included.

    Its weights stay in fp32 whatever the model's dtype: AdamW's steps vanish in bf16.
    """

    module: Any = None

    def bind(self, facts: ModelFacts) -> Live:
        return self

    def projector(self, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
        return self.module

    def queries(self) -> int:
        return self.module.config.queries

    def keep_count(self, span: VisualSpan, fraction: float) -> int:
        check_media([span], self.queries())
        return super().keep_count(span, fraction)


@without_patch
def train_ccam(model: Any, processor: Any, data: str, output: Path, config: CcamConfig) -> Path:
    """Train the projector on the answers of the frozen model's own training questions.

    Returns
    -------
    Path of `ccam.safetensors`, beside its card `ccam.json`.

    Raises
    ------
    OptionError
        Data without answers or media, media of no more tokens than there are queries, sizes that
        no projector can have, or a checkpoint of another run in `output`.
    ScoreError
        Training diverged.
    """
    card = {**model_card(model), "data": data, "config": asdict(config)}
    source = questions(data, config.kind, config.samples)
    torch.manual_seed(config.seed)
    module = CCAMProjector(config.sizes(model)).to(model.device)
    for part in (source, *held_out(data, config).values()):
        check_media(sample_spans(model, processor, part, config), config.queries)
    identity = {"fingerprint": card["fingerprint"], **data_identity(data)}
    identity |= config.identity()
    live = Live(module=module)

    def loss(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        if loop.step < config.align:
            return align_loss(model, module, inputs)
        with tokencomp.patch(model, 0.5, reducer=live):
            return answer_loss(model, inputs, labels)

    file = output / "checkpoint.pt"
    loop = Loop(model, processor, module, source, config, file, identity, loss, "training ccam")
    with frozen(model):
        loop.run()
    card |= loop.report()
    path = module.eval().save(output, card)
    if config.evaluate:
        evaluated = evaluate(model, processor, data, path, config)
        write_json(path.with_suffix(".json"), {**read_card(path)[0], "accuracy": evaluated})
    return path


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter of `model` takes a gradient inside the block."""
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(needed)


def align_loss(model: Any, module: CCAMProjector, inputs: dict[str, Any]) -> Tensor:
    """Squared error to the mean features of the i-th of Q pieces of a frame, frame by frame.

    Relative to the variance of the features, so that 1 is the error of a constant. A frame of
    fewer than Q tokens has pieces that overlap.
    """
    seen = capture(model, inputs, layers=False)
    check_media([span for row in seen.spans for span in row], module.config.queries)
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
    if not errors:
        raise OptionError("a training batch has no image or video.")
    return torch.stack(errors).mean()
