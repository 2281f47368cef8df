"""The training of a tiny model that clicks: instructions about views of screens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.clicks.screens import BINS, CELL, SCREEN, Box, Pages, bins, view
from recipes.packing import Packer, stacked
from recipes.tiny.families.qwen3_vl import TinyQwen3VL, batch_tower_attention
from recipes.trainer import Trainer, attend, text_inputs
from tokencomp.engine.prompt import IGNORED
from tokencomp.inputs.zoom import Region
from tokencomp.training.steps import Phase
from tokencomp.zoo.shapesqa.items import stream

LOOK = (7, 10)  # decoder layers whose first head learns to look at the target
PLACED = 6  # decoder layer after which visual tokens learn to tell their coordinates
NEAR = 1.0  # bins; standard deviation of a target distribution
ROOM = 150  # tokens of questions about one view
NEARBY = torch.softmax(
    -((torch.arange(BINS)[:, None] - torch.arange(BINS)) ** 2) / (2 * NEAR**2), -1
)
"""Target distribution of every bin, float32 (BINS, BINS)."""
COORDINATES = tuple(f"<{axis}{k}>" for axis in "xy" for k in range(BINS))


@dataclass(frozen=True)
class ClickStage(Phase):
    """Optimizer steps of one kind.

    Attributes
    ----------
    batch
        Views of at most 150 visual tokens; larger views come in smaller batches.
    views
        (share of batches, visual tokens a side, side of the region in sides of a screen).
    look, placed
        Weights of the losses on attention and on the coordinates of visual tokens.
    """

    batch: int
    views: tuple[tuple[float, int, float], ...]
    look: float = 1.0
    placed: float = 0.5
    vision_lr: float = 8e-4
    text_lr: float = 1.5e-3


class ClickBatches:
    """Builds the batch of one step, a pure function of (seed, stage, step)."""

    def __init__(self, packer: Packer, pages: Pages, seed: int) -> None:
        self.packer, self.pages, self.seed = packer, pages, seed

    def make(self, number: int, step: int, stage: ClickStage) -> dict[str, Any]:
        rng = stream("train", "clicks batches", self.seed, number, step)
        shares = np.array([share for share, *_ in stage.views])
        _, cells, part = stage.views[int(rng.choice(len(shares), p=shares / shares.sum()))]
        shape = (1, cells * CELL, cells * CELL)
        length = len(self.packer.prefix("image", shape)[0]) + ROOM
        rows, names, frames, targets = [], [], [], []
        count = max(2, round(stage.batch * min(1.0, 200 / (cells**2 + 50))))
        while len(rows) < count:
            screen = self.pages.random(rng)
            region = _region(part, rng)
            asked = [*screen.questions, *rng.permutation(np.array(screen.others, object))]
            inside = [q for q in asked if all(_within(b, region) for b in q.boxes)]
            if not inside:
                continue
            answers = [bins(q.boxes[0], region) for q in inside]
            made = [
                self.packer.segment("image", q.text, f"<x{x}><y{y}>")
                for q, (x, y) in zip(inside, answers, strict=True)
            ]
            row = self.packer.pack("image", shape, made, length)
            rows.append(row)
            names.append([q.task for q in inside])
            frames.append(np.asarray(view(region.cut(screen.image), cells))[None])
            targets.append([y * cells // BINS * cells + x * cells // BINS for x, y in answers])
        return {**stacked(rows), "names": names, "frames": np.stack(frames), "targets": targets}


def _region(part: float, rng: np.random.Generator) -> Region:
    """A square part of a screen; half of the quarters show one page whole."""
    side = round(part * SCREEN)
    if part == 0.5 and rng.random() < 0.5:
        left, top = (int(v) * side for v in rng.integers(0, 2, 2))
    else:
        left, top = (int(v) for v in rng.integers(0, SCREEN - side + 1, 2))
    return Region(left, top, side, side)


def _within(box: Box, region: Region) -> bool:
    right, bottom = region.left + region.width, region.top + region.height
    return region.left <= box[0] and region.top <= box[1] and box[2] < right and box[3] < bottom


class ClickTrainer(Trainer):
    """Trains all of a tiny Qwen3-VL."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pages: Pages,
        stages: tuple[ClickStage, ...],
        folder: Path,
        seed: int = 0,
        save_every: int = 50,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.bf16 = model.float().train(), True
        self.family = TinyQwen3VL()
        self.maker = ClickBatches(Packer(tokenizer, self.family), pages, seed)
        batch_tower_attention(model.model.visual)
        self.looks: dict[int, Tensor] = {}
        decoder = model.model.language_model
        look_along(decoder, self.looks)
        self.placed: list[Tensor] = []
        decoder.layers[PLACED].register_forward_hook(lambda m, i, out: self.placed.append(out))
        self.coordinates = nn.Linear(model.config.text_config.hidden_size, 2 * BINS)
        (self.pad,) = self.maker.packer.ids("<|image_pad|>")
        self.first = tokenizer.convert_tokens_to_ids(COORDINATES[0])
        self.soft = soft_targets(len(model.get_output_embeddings().weight), self.first)
        heads = {"coordinates": self.coordinates}
        self.prepare(stages, heads, model.model.visual.parameters(), folder, seed, save_every)

    def batches(self) -> Iterator[dict[str, Any]]:
        for step in range(self.step, self.stage.steps):
            yield self.maker.make(self.phase, step, self.stage)

    def stage_loss(self, batch: dict[str, Any]) -> Tensor:
        frames = torch.as_tensor(batch["frames"])
        hidden = self.family.hidden(
            self.model, {**text_inputs(batch), **self.family.pixels(frames, "image")}
        )
        labels = torch.as_tensor(batch["labels"])
        at = (labels >= self.first) & (labels < self.first + 2 * BINS)
        end = (labels != IGNORED) & ~at
        logits = self.model.get_output_embeddings()(hidden[at]).float()
        loss = -(self.soft[labels[at] - self.first] * logits.log_softmax(-1)).sum(-1).mean()
        last = self.model.get_output_embeddings()(hidden[end]).float()
        loss = loss + 0.1 * F.cross_entropy(last, labels[end])
        near = (logits.argmax(-1) - labels[at]).abs() <= 1
        self._note(batch, at, near)
        loss = loss + self.stage.placed * self._placed_loss(batch)
        return loss + self.stage.look * self._look_loss(batch, at)

    def _placed_loss(self, batch: dict[str, Any]) -> Tensor:
        """Cross entropy of the coordinates of every visual token's middle."""
        ids = torch.as_tensor(batch["ids"])
        visual = self.placed.pop()[ids == self.pad]
        visual = F.rms_norm(visual, visual.shape[-1:])
        logits = self.coordinates(visual).float().view(-1, 2, BINS)
        cells = round((len(logits) / len(ids)) ** 0.5)
        middles = (BINS * (torch.arange(cells) + 0.5) / cells).long()
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        targets = torch.stack([x, y], -1).view(1, -1, 2).expand(len(ids), -1, 2).reshape(-1, 2)
        close = (logits.argmax(-1) - targets).abs() <= 1
        self.scores.note("placed", close.float().mean().item())
        return -(NEARBY[targets] * logits.log_softmax(-1)).sum(-1).mean()

    def _note(self, batch: dict[str, Any], at: Tensor, near: Tensor) -> None:
        which = torch.as_tensor(batch["which"])[at].tolist()
        both = near.view(-1, 2).all(1).tolist()
        rows = at.nonzero()[::2, 0].tolist()
        for row, number, ok in zip(rows, which[::2], both, strict=True):
            self.scores.note(batch["names"][row][number], float(ok))
            self.scores.note("all", float(ok))

    def _look_loss(self, batch: dict[str, Any], at: Tensor) -> Tensor:
        """−log of the attention of the answer's tokens to the target's visual token."""
        rows, places = at.nonzero().T
        which = torch.as_tensor(batch["which"])[at].tolist()
        start = int((torch.as_tensor(batch["ids"])[0] == self.pad).nonzero()[0])
        cells = [batch["targets"][r][n] for r, n in zip(rows.tolist(), which, strict=True)]
        keys = start + torch.tensor(cells)
        losses = []
        for probabilities in self.looks.values():  # (batch, queries, keys)
            p = probabilities[rows, places, keys].float()
            self.scores.note("look", p.mean().item())
            losses.append(-(p + 1e-4).log().mean())
        return torch.stack(losses).mean()


def soft_targets(vocabulary: int, first: int) -> Tensor:
    """Target distributions of all coordinates, float32 (2 · BINS, vocabulary)."""
    out = torch.zeros(2 * BINS, vocabulary)
    for axis in range(2):
        tokens = slice(first + axis * BINS, first + (axis + 1) * BINS)
        out[axis * BINS : (axis + 1) * BINS, tokens] = NEARBY
    return out


def look_along(decoder: Any, looks: dict[int, Tensor]) -> None:
    """Let a decoder attend by products, and note the weights of the first head in `LOOK`."""
    from transformers import AttentionInterface

    def noting(module, query, key, value, mask, scaling=None, **_):
        batch, heads, length, width = query.shape
        folded = batch, key.shape[1], heads // key.shape[1] * length, width
        if mask is not None:
            mask = mask.repeat(1, 1, heads // key.shape[1], 1)
        query = query.reshape(folded)
        if module.layer_idx in LOOK:
            scores = (query[:, 0, :length] @ key[:, 0].mT).float() * width**-0.5
            looks[module.layer_idx] = scores.masked_fill(~mask[:, 0, :length], -1e9).softmax(-1)
        out = attend(query, key, value, mask)
        return out.view(batch, heads, length, width).transpose(1, 2), None

    AttentionInterface.register("noting", noting)
    decoder.config._attn_implementation = "noting"


def start(name: str) -> tuple[Any, Any]:
    """An embedded model with a token for every coordinate, and its processor."""
    from tokencomp import zoo

    torch.manual_seed(0)
    model, processor = zoo.load(name)
    processor.tokenizer.add_tokens([*COORDINATES])
    size = (len(processor.tokenizer) + 63) // 64 * 64
    model.resize_token_embeddings(size, mean_resizing=False)
    return model, processor
