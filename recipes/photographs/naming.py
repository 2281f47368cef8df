"""What visual tokens are trained to say before the decoder sees them: names, places, letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.photographs.batches import Grids, StampBatches
from recipes.trainer import share_right
from tokencomp.zoo.shapesqa.lettering import WORDS

SHARPNESS = 14.0  # of the softmax over cosines of a visual token and the names' embeddings
PLACES = (("left", "center", "right"), ("top", "middle", "bottom"))
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
PLACE_WEIGHT = 0.5  # of a place's embedding beside a name's
BACKGROUND = "background"
BACKGROUND_WEIGHT = 0.3  # of a token that shows no thing: most tokens do

Note = Callable[[str, float], None]


class Names:
    """What visual tokens should look like to the decoder: the embeddings of words.

    A token that shows a thing or a word gets the embedding of its name, and half of those of the
    column and the row that it is in; the decoder reads text, so this is what it can read.
    """

    def __init__(self, maker: StampBatches, model: Any) -> None:
        table = model.get_input_embeddings().weight.detach().float()

        def embedded(words: tuple[str, ...]) -> torch.Tensor:
            return torch.stack([table[maker.packer.ids(f" {word}")[0]] for word in words])

        words = tuple(dict.fromkeys((BACKGROUND, *maker.library.names, *WORDS)))
        self.things = len(maker.library.names)
        self.index = {"": 0, **{word: k for k, word in enumerate(words)}}
        self.words, self.places = embedded(words), [embedded(one) for one in PLACES]

    def loss(self, tokens: Tensor, cells: Grids, note: Note) -> Tensor:
        """Classification of name, column and row by cosine, and distance to their sum.

        Parameters
        ----------
        tokens
            float32 (batch, rows × columns, hidden), projected.
        cells
            Per picture, row and column, what the token shows.
        note
            Called with the name and the value of each score.
        """
        names = torch.tensor([[self.index[n] for row in c for n in row] for c in cells]).flatten()
        tokens, shown, word = tokens.flatten(0, 1), names > 0, names > self.things
        weight = torch.where(shown, 1.0, BACKGROUND_WEIGHT)
        logits = cosines(tokens, self.words)
        loss = (F.cross_entropy(logits, names, reduction="none") * weight).sum() / weight.sum()
        for kind, those in (("name", shown & ~word), ("word", word)):
            if those.any():
                note(f"token {kind}", share_right(logits[those], names[those]))
        target, side = self.words[names], len(cells[0])
        thirds = torch.arange(side) * 3 // side
        rows = thirds[:, None].expand(side, side).flatten().repeat(len(cells))
        columns = thirds.expand(side, side).flatten().repeat(len(cells))
        places = (("column", columns), ("row", rows))
        for (what, numbers), table in zip(places, self.places, strict=True):
            by = cosines(tokens[shown], table)
            loss = loss + 0.3 * F.cross_entropy(by, numbers[shown])
            target = target + PLACE_WEIGHT * shown[:, None] * table[numbers]
            note(f"token {what}", share_right(by, numbers[shown]))
        distance = (tokens - target).square().mean(1) / self.words.square().mean()
        return loss + 0.5 * (distance * weight).sum() / weight.sum()


def cosines(tokens: Tensor, table: Tensor) -> Tensor:
    """Logits (n, rows of the table) of tokens (n, hidden) against embeddings."""
    return SHARPNESS * F.normalize(tokens, dim=-1) @ F.normalize(table, dim=-1).T


class Letters:
    """Makes the tower tell letters apart; the head serves training alone.

    A token shows about one letter of a word. Learned from names alone, words came out at chance.
    """

    def __init__(self, width: int) -> None:
        self.norm = torch.nn.BatchNorm1d(width, affine=False)
        self.head = torch.nn.Linear(width, len(ALPHABET))

    def loss(self, features: Tensor, letters: Grids, note: Note) -> Tensor:
        """Cross entropy of the letter at the middle of every cell that has one.

        Parameters
        ----------
        features
            float32 (batch, rows × columns, width), of the tower.
        letters
            Per picture, row and column, a letter or "".
        note
            As for names.
        """
        shown = [one for grid in letters for row in grid for one in row]
        at = [k for k, one in enumerate(shown) if one]
        logits = self.head(self.norm(features.flatten(0, 1)))[at]
        if not at:
            return logits.sum()
        wanted = torch.tensor([ALPHABET.index(shown[k]) for k in at])
        note("token letter", share_right(logits, wanted))
        return F.cross_entropy(logits, wanted)
