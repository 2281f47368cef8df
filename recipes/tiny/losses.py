"""Training-only heads on visual tokens and hidden states, and their losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.tiny.labels import GLYPHS, PLACES, UNCLEAR
from recipes.trainer import share_right
from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.scenes import COLORS, DIRECTIONS, SHAPES

# Outputs per frame of a token: colour, shape, mask, box, centre, column, row.
FRAME_PARTS = (len(COLORS) + 1, len(SHAPES) + 1, 49, 3, 1, PLACES, PLACES)
# Outputs per token: motion, character, word.
TOKEN_PARTS = (len(DIRECTIONS) + 1, len(GLYPHS) + 1, len(WORDS) + 1)
PAIRS = 8  # pairs of frames among which the clock head chooses

Note = Callable[[str, float], None]


class Heads(nn.Module):
    """Heads of the losses beside that of the answers; they are not exported.

    Parameters
    ----------
    width : int
        Hidden size of the decoder.
    """

    def __init__(self, width: int):
        super().__init__()
        self.cell = nn.Linear(width, 2 * sum(FRAME_PARTS) + sum(TOKEN_PARTS))
        self.clock = nn.Linear(width, PAIRS)
        self.letter = nn.Linear(width, 5)
        self.digits = nn.Linear(width, 20)

    def vision_loss(self, tokens: Tensor, batch: dict, note: Note) -> Tensor:
        """What every token's cell shows, for both frames of the token. See `cell_labels`.

        Masks and boxes are there because they need the same features whatever the colour;
        without them shapes are learnt several times more slowly.

        Parameters
        ----------
        tokens : Tensor
            Projected tokens (batch, rows, columns, hidden).
        batch : dict
            Tensors of `cell_labels` (batch, 2, rows, columns, …) and `text_labels`.
        """
        media = batch["media"]
        frame = sum(FRAME_PARTS)
        first, second, rest = self.cell(tokens).float().split((frame, frame, sum(TOKEN_PARTS)), -1)
        loss = torch.zeros(())
        for k, out in enumerate((first, second)):
            labels = {name: batch[name][:, k] for name in ("words", "mask", "box", "place")}
            loss = loss + _frame_loss(out, labels, media, note)
        motion, glyph, word = rest.split(TOKEN_PARTS, -1)
        if media == "video":
            loss = loss + class_loss(motion, batch["motion"][:, 0], "motion", note)
        elif bool((batch["glyph"] > 0).any()):
            loss = loss + class_loss(glyph, batch["glyph"], "glyph", note, 0.02)
            loss = loss + class_loss(word, batch["word"], "word", note, 0.02)
            loss = loss + self._digits_loss(tokens, batch["digits"], note)
        return loss

    def _digits_loss(self, tokens: Tensor, digits: Tensor, note: Note) -> Tensor:
        """Both digits of the number in the middle of a cell: a cell may hold the two of them."""
        at = digits[..., 0] >= 0
        if not bool(at.any()):
            return torch.zeros(())
        guess = self.digits(tokens[at]).float().unflatten(-1, (2, 10))
        note("digits", share_right(guess, digits[at]))
        return F.cross_entropy(guess.flatten(0, 1), digits[at].flatten())

    def clock_loss(self, hidden: Tensor, visual: Tensor, pairs: int, note: Note) -> Tensor:
        """Which pair of frames each visual token belongs to; `visual` is bool (batch, length)."""
        guess = self.clock(hidden[visual]).float()
        rows = visual.shape[0]
        each = len(guess) // (rows * pairs)
        target = torch.arange(pairs).repeat_interleave(each).repeat(rows)
        note("clock", share_right(guess, target))
        return F.cross_entropy(guess, target)

    def letter_loss(self, hidden: Tensor, letters: Tensor, note: Note) -> Tensor:
        """Which letter each option word has: int64 (batch, length), -100 elsewhere."""
        at = letters >= 0
        if not bool(at.any()):
            return torch.zeros(())
        guess = self.letter(hidden[at]).float()
        note("option", share_right(guess, letters[at]))
        return F.cross_entropy(guess, letters[at])


def _frame_loss(out: Tensor, labels: dict[str, Tensor], media: str, note: Note) -> Tensor:
    color, shape, mask, boxes, centre, *places = out.split(FRAME_PARTS, -1)
    box, share = labels["box"], labels["box"][..., 3]
    on = share > 0
    loss = 2 * F.binary_cross_entropy_with_logits(mask, labels["mask"])
    for k, (name, logits) in enumerate((("color", color), ("shape", shape))):
        loss = loss + _word_loss(f"{media}-{name}", logits, labels["words"][..., k], share, note)
    near = (boxes - box[..., :3]).abs().mean(-1) * on
    loss = loss + 0.5 * near.sum() / on.sum().clamp(min=1)
    loss = loss + 2 * F.binary_cross_entropy_with_logits(centre[..., 0], box[..., 4])
    if bool(on.any()):
        middle = box[..., 4] > 0
        if bool(middle.any()):
            note("centre", (centre[..., 0] > 0)[middle].float().mean().item())
        for k, (name, logits) in enumerate(zip(("column", "row"), places, strict=True)):
            target = labels["place"][..., k][on]
            loss = loss + 0.5 * F.cross_entropy(logits[on], target)
            note(name, share_right(logits[on], target))
    return loss


def _word_loss(name: str, logits: Tensor, targets: Tensor, share: Tensor, note: Note) -> Tensor:
    """Cross entropy over tokens; those that hold little of their object weigh little."""
    each = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=UNCLEAR, reduction="none"
    ).view_as(share)
    weight = torch.where(targets > 0, share, 0.1) * (targets != UNCLEAR)
    main = share == 1.0
    if bool(main.any()):
        note(name, share_right(logits[main], targets[main]))
    return (each * weight).sum() / weight.sum().clamp(min=1)


def class_loss(
    logits: Tensor, targets: Tensor, name: str, note: Note, background: float = 1.0
) -> Tensor:
    """Cross entropy over tokens, where class 0 weighs ``background``."""
    logits, targets = logits.flatten(0, -2), targets.flatten()
    each = F.cross_entropy(logits, targets, ignore_index=UNCLEAR, reduction="none")
    weight = torch.where(targets > 0, 1.0, background) * (targets != UNCLEAR)
    if bool((targets > 0).any()):
        note(name, share_right(logits[targets > 0], targets[targets > 0]))
    return (each * weight).sum() / weight.sum().clamp(min=1)
