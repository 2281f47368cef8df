"""Training sequences about sessions of screens, and the training of a tiny model on them.

Every sequence shows one to four screenshots and asks many questions about the last, each in a
segment of its own. With `delta`, what the method drops is masked: in the tower and in the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.packing import Packer, attention_mask, stacked
from recipes.screens.questions import QUALITIES, ask, kinds_of, pairs
from recipes.screens.scenes import CELL, SIDE, Screen, kept_by_delta, pixels, sequence
from recipes.tiny.families.qwen3_vl import TinyQwen3VL
from recipes.trainer import Trainer, attend, share_right
from tokencomp.training.steps import Phase
from tokencomp.zoo.shapesqa.items import stream
from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.scenes import COLORS

GRID = SIDE // CELL
NAMES = ("", *WORDS, *(f"{color} icon" for color in COLORS))
HELP = 0.3  # weight of the loss on what tokens show
ROOM, PAIRS_ROOM = 150, 60  # tokens for the questions about a session
BACKGROUND = 0.05  # weight of tokens that show no widget


class Screens(TinyQwen3VL):
    """Tiny Qwen3-VL with several pictures before the question."""

    def expand(self, ids, kind, shape, encode, fps):
        """One run of placeholders per picture, each with marks around it."""
        *before, start, pad, end = ids
        tokens, positions = [*before], [np.tile(np.arange(len(before)), (3, 1))]
        at = len(before)
        for _ in range(shape[0]):
            tokens += [start, *[pad] * GRID**2, end]
            grid = np.indices((1, GRID, GRID)).reshape(3, -1) + at + 1
            mark = np.full((3, 1), at)
            positions += [mark, grid, mark + GRID + 1]
            at += GRID + 2
        return np.asarray(tokens, np.int64), np.concatenate(positions, 1).astype(np.int64)


@dataclass(frozen=True)
class ScreenStage(Phase):
    """Optimizer steps of one kind.

    Attributes
    ----------
    batch, steps_of
        Sessions, and how many screenshots they have; all sessions of a batch have as many.
    chat
        Share of batches whose questions come in the form of a chat, not as pairs.
    delta
        Share of batches from which `delta` has dropped its cells, at a threshold of 0 or 8.
    colors
        Whether visual tokens have to tell the colour of their widget too: without, a colour that
        names a text is not learned.
    """

    batch: int
    steps_of: tuple[int, ...]
    chat: float
    vision_lr: float = 8e-4
    text_lr: float = 1.5e-3
    delta: float = 0.0
    colors: bool = False


def widget_labels(screen: Screen) -> np.ndarray:
    """What every cell shows a good part of, int64 (rows, columns, 2); 0: no widget.

    An index into `NAMES`, and 1 + the index of the widget's colour in `COLORS`.
    """
    out = np.zeros((GRID, GRID, 2), np.int64)
    for widget in screen.widgets:
        left, top, right, bottom = widget.box
        if widget.word:  # the ink is in the middle half of the height
            top, bottom = top + 6, bottom - 6
            left, right = left + 8, right - 8
        name = NAMES.index(widget.word or f"{widget.color} icon")
        label = name, 1 + COLORS.index(widget.color)
        for row in range(GRID):
            for column in range(GRID):
                wide = min(right, (column + 1) * CELL) - max(left, column * CELL)
                high = min(bottom, (row + 1) * CELL) - max(top, row * CELL)
                if wide >= 8 and high >= 0.6 * (bottom - top):
                    out[row, column] = label
    return out


class ScreenBatches:
    """Builds the batch of one step, a pure function of (seed, stage, step)."""

    def __init__(self, packer: Packer, seed: int = 0) -> None:
        self.packer, self.seed = packer, seed

    def make(self, number: int, step: int, stage: ScreenStage) -> dict[str, Any]:
        rng = stream("train", "screens batches", self.seed, number, step)
        steps = int(rng.choice(stage.steps_of))
        chat, delta = bool(rng.random() < stage.chat), bool(rng.random() < stage.delta)
        threshold = int(rng.choice((0, 8)))
        frames, rows, names, labels, kept = [], [], [], [], []
        room = ROOM if chat else PAIRS_ROOM
        length = len(self.packer.prefix("image", (steps, SIDE, SIDE))[0]) + room
        for _ in range(stage.batch):
            screens = sequence(rng, steps)
            shown = pixels(screens, QUALITIES[int(rng.integers(len(QUALITIES)))])
            named = self.segments(screens[-1], steps - 1, chat, rng)
            rows.append(
                self.packer.pack("image", (steps, SIDE, SIDE), [s for _, s in named], length)
            )
            names.append([name for name, _ in named])
            frames.append(shown)
            labels.append(np.stack([widget_labels(screen) for screen in screens]))
            whole = np.ones((steps, GRID, GRID), bool)
            kept.append(kept_by_delta(shown, threshold) if delta else whole)
        return {
            **stacked(rows),
            "names": names,
            "frames": np.stack(frames),
            "widgets": np.stack(labels),
            "kept": np.stack(kept),
        }

    def segments(
        self, screen: Screen, last: int, chat: bool, rng: np.random.Generator
    ) -> list[Any]:
        """All questions about a screen in random order, or all pairs, with names for scores."""
        if chat:
            out = [
                (f"{kind}{'' if w.since == last else '-old'}", ask(kind, w))
                for w in screen.widgets
                for kind in kinds_of(w)
            ]
            made = [(n, self.packer.segment("image", q, a)) for n, (q, a) in out]
        else:
            made = [(n, self.packer.pair(k, v)) for n, k, v in pairs(screen)]
        return [made[i] for i in rng.permutation(len(made))]


class ScreenTrainer(Trainer):
    """Trains all of a tiny Qwen3-VL on sessions of screens."""

    def __init__(
        self,
        model: Any,
        packer: Packer,
        stages: tuple[ScreenStage, ...],
        folder: Path,
        seed: int = 0,
        save_every: int = 100,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.bf16 = model.float().train(), True
        self.maker, self.family = ScreenBatches(packer, seed), packer.family
        self.names = nn.Linear(model.config.text_config.hidden_size, len(NAMES) + 1 + len(COLORS))
        (self.pad,) = packer.ids("<|image_pad|>")
        attend_among_kept(model.model.visual)
        heads = {"names": self.names}
        self.prepare(stages, heads, model.model.visual.parameters(), folder, seed, save_every)

    def batches(self) -> Iterator[dict[str, Any]]:
        stage = self.stage
        for step in range(self.step, stage.steps):
            yield self.maker.make(self.phase, step, stage)

    def stage_loss(self, batch: dict[str, Any]) -> Tensor:
        ids = torch.as_tensor(batch["ids"])
        kept = torch.as_tensor(batch["kept"]).flatten(1)  # (batch, cells of all pictures)
        visible = torch.ones_like(ids, dtype=torch.bool)
        visible[ids == self.pad] = kept.flatten()
        mask = attention_mask(torch.as_tensor(batch["segment"]))
        eye = torch.eye(ids.shape[1], dtype=torch.bool)
        mask = mask & (visible[:, None, None, :] | eye)
        frames = torch.as_tensor(batch["frames"]).flatten(0, 1)[:, None]
        inputs = self.family.pixels(frames, "image")
        tower = self.model.model.visual
        tower.kept = None if bool(kept.all()) else kept.view(len(frames), -1)
        tokens: list[Tensor] = []
        hook = tower.register_forward_hook(lambda m, i, out: tokens.append(out.pooler_output))
        hidden = self.model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.as_tensor(batch["positions"]).transpose(0, 1),
            use_cache=False,
            **inputs,
        ).last_hidden_state
        hook.remove()
        return self.answer_loss(batch, hidden) + HELP * self._names_loss(tokens[0], batch)

    def _names_loss(self, tokens: Tensor, batch: dict[str, Any]) -> Tensor:
        """Which word or icon each kept token shows, and of which colour."""
        kept = torch.as_tensor(batch["kept"]).flatten()
        targets = torch.as_tensor(batch["widgets"]).flatten(0, -2)[kept].T
        logits = self.names(tokens[kept]).float().split((len(NAMES), 1 + len(COLORS)), -1)
        on, losses = targets[0] > 0, []
        weight = torch.where(on, 1.0, BACKGROUND)
        for name, answer, target in zip(("token", "color"), logits, targets, strict=True):
            self.scores.note(name, share_right(answer[on], target[on]))
            each = F.cross_entropy(answer, target, reduction="none")
            losses.append((each * weight).sum() / weight.sum())
        return losses[0] + losses[1] if self.stage.colors else losses[0]


def attend_among_kept(tower: Any) -> None:
    """Let a tower attend within all pictures of a batch at once, to `tower.kept` cells alone."""
    tower.kept = None
    for block in tower.blocks:
        block.attn.forward = MethodType(_attention, block.attn)
        block.attn.__dict__["tower"] = tower


def _attention(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    n, length = len(hidden_states), int(cu_seqlens[1])
    qkv = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1)
    query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (
        x.reshape(n // length, length, self.num_heads, -1).transpose(1, 2)
        for x in (query, key, value)
    )
    kept, mask = self.tower.kept, None
    if kept is not None:  # four patches make a cell
        patches = kept.repeat_interleave(length // kept.shape[1], 1)
        mask = patches[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    out = attend(query, key, value, mask)
    return self.proj(out.transpose(1, 2).reshape(n, -1))
