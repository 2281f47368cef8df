"""Training of a `ccam` projector on a frozen model."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokencomp
from tokencomp.adapters.base import adapter_for
from tokencomp.errors import OptionError
from tokencomp.projectors.ccam import CCAMConfig, CCAMProjector
from tokencomp.reducers.ccam import Ccam
from tokencomp.training.capture import capture
from tokencomp.training.data import questions
from tokencomp.training.loop import Loop, LoopConfig, answer_loss
from tokencomp.training.measure import Measurement, Way
from tokencomp.weights import model_card, write_json

SAMPLE = 16
"""Questions whose media are counted before an evaluation."""


@dataclass(frozen=True)
class CcamConfig(LoopConfig):
    """What `tokencomp train ccam` can be told beyond the loop.

    Attributes
    ----------
    queries, width, heads, mlp, causal, spatial
        Of the projector; 0 takes the model's hidden size (width), its heads, and twice the width
        (mlp).
    align
        First steps that only ask every query for the mean of its share of a single frame, so that
        the frozen model is given something it can read from the start (ours).
    """

    queries: int = 32
    width: int = 0
    heads: int = 0
    mlp: int = 0
    causal: bool = True
    spatial: bool = True
    align: int = 200

    def sizes(self, model: Any) -> CCAMConfig:
        """The projector for `model`."""
        config = adapter_for(model).text_config
        width = self.width or int(config.hidden_size)
        return CCAMConfig(
            queries=self.queries,
            width=width,
            heads=self.heads or int(config.num_attention_heads),
            mlp=self.mlp or 2 * width,
            kv_dim=int(config.hidden_size),
            out_dim=int(config.hidden_size),
            causal=self.causal,
            spatial=self.spatial,
        )


@dataclass(frozen=True)
class Live(Ccam):
    """The reducer around a module in memory, gradients included."""

    module: Any = None

    def for_model(self, model: Any) -> Live:
        return self

    def projector(self, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
        return self.module


def train_ccam(model: Any, processor: Any, data: str, output: Path, config: CcamConfig) -> Path:
    """Train the projector on the answers of the frozen model's own training questions.

    Returns
    -------
    Path of `ccam.safetensors`, beside its card `ccam.json`.

    Raises
    ------
    OptionError
        Data without answers or media, or a checkpoint of another run in `output`.
    """
    begin = time.time()
    card = {**model_card(model), "data": data, "config": asdict(config)}
    source = questions(data, config.kind, config.samples)
    torch.manual_seed(config.seed)
    module = CCAMProjector(config.sizes(model)).to(model.device)
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    skip = ("evaluate", "save_every")
    identity = {"fingerprint": card["fingerprint"], "data": data}
    identity |= {k: v for k, v in asdict(config).items() if k not in skip}
    loop = Loop(model, processor, module, source, config, output / "checkpoint.pt", identity)
    live = Live(module=module)

    def loss(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        if loop.step < config.align:
            return align_loss(model, module, inputs)
        with tokencomp.patch(model, 0.5, reducer=live):
            return answer_loss(model, inputs, labels)

    try:
        module.train()
        loop.run(lambda step: None, loss, "training ccam")
    finally:
        for parameter, needed in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(needed)
    card["loss"] = [round(v, 4) for v in loop.history[:: max(1, len(loop.history) // 50)]]
    card["seconds"] = round(time.time() - begin, 1)
    path = module.eval().save(output, card)
    if config.evaluate:
        evaluated = evaluate(model, processor, data, path, config)
        write_json(path.with_suffix(".json"), {**_card(path), "accuracy": evaluated})
    return path


def _card(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.with_suffix(".json").read_text())


def align_loss(model: Any, module: CCAMProjector, inputs: dict[str, Any]) -> Tensor:
    """Squared error to the mean features of the i-th of Q pieces of a frame, frame by frame.

    Relative to the variance of the features, so that 1 is the error of a constant.
    """
    seen = capture(model, inputs, layers=False)
    errors = []
    for b, row in enumerate(seen.spans):
        for span in row:
            x = seen.inputs[0][b, span.start : span.stop]
            x = x[~span.special_mask(x.device)]
            t, h, w = span.grid
            frames = x.view(t, h * w, -1)
            made = module(frames, 1, (h, w))
            pieces = F.adaptive_avg_pool1d(frames.transpose(1, 2), module.config.queries)
            target = pieces.transpose(1, 2)
            errors.append((made - target).square().mean() / frames.var().clamp(min=1e-12))
    if not errors:
        raise OptionError("a training batch has no image or video.")
    return torch.stack(errors).mean()


def ways(weights: Path, tokens: int, of: float) -> list[Way]:
    """The projector, and pooling and random choice at its number of tokens of `of`."""
    ratio = 1.0 - tokens / of
    return [
        Way("ccam", ratio, "ccam", {"weights": str(weights)}),
        Way("pool", ratio, "pool"),
        Way("random", ratio, "random"),
    ]


def evaluate(
    model: Any, processor: Any, data: str, weights: Path, config: CcamConfig
) -> list[dict[str, Any]]:
    """Held-out accuracy against pooling and random choice at as many tokens.

    Media of different sizes are compared at the mean number of tokens of a sample.
    """
    rows = []
    for kind in (
        ("image", "video") if config.kind == "both" and data == "shapesqa" else (config.kind,)
    ):
        source = questions(data, kind, config.evaluate, "validation")
        measured = Measurement({"": model}, processor, config.frames, config.batch)
        asked = ways(weights, config.queries, visual_tokens(model, processor, source, config))
        measured.run(source, asked, f"evaluating ({kind})")
        rows += [{"kind": kind, **row} for row in measured.table(asked)]
    return rows


def visual_tokens(model: Any, processor: Any, source: Any, config: LoopConfig) -> float:
    """Mean visual tokens of an image or video, over questions spread evenly along the source."""
    from tokencomp.evaluation.answering import to_model
    from tokencomp.training.data import load_batch

    found = []
    count = min(SAMPLE, len(source))
    for i in range(count):  # one at a time: a batch would be padded to its longest video
        inputs, _ = load_batch([source[i * len(source) // count]], processor, config.frames)
        (spans,) = capture(model, to_model(inputs, model), layers=False).spans
        found += [span.visual for span in spans]
    return sum(found) / len(found)
