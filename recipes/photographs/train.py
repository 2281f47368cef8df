"""Training of the projector and of low-rank adapters in the decoder; resumable, seeded.

First the projector alone learns to give each visual token the embedding of what the token shows
(the decoder does not run, so this is cheap). Then projector and adapters (LoRA, arXiv 2106.09685)
learn to answer; many short segments share the visual tokens of one picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from recipes.photographs.batches import Mixture, StampBatches
from recipes.trainer import Trainer, share_right, text_inputs
from tokencomp.shapesqa.lettering import WORDS
from tokencomp.training.steps import Phase

RANK = 16
SHARPNESS = 14.0  # of the softmax over cosines of a visual token and the names' embeddings
PLACES = (("left", "center", "right"), ("top", "middle", "bottom"))
PLACE_WEIGHT = 0.5  # of a place's embedding beside a name's
BACKGROUND = "background"
BACKGROUND_WEIGHT = 0.15  # of a token that shows no thing: most tokens do


@dataclass(frozen=True)
class StampStage(Phase):
    """Optimizer steps of one kind.

    Attributes
    ----------
    mixture
        Of the sequences; None trains the projector alone.
    batches
        Distinct batches in a stage without a mixture, whose features are kept in memory.
    projector_lr, adapter_lr
        Peaks of the rates.
    """

    batch: int
    projector_lr: float
    mixture: Mixture | None = None
    adapter_lr: float = 0.0
    batches: int = 40


RECIPE = (
    StampStage("names", 400, 16, 2e-3, end=0.1),
    StampStage("primers", 400, 8, 2e-4, Mixture(), 1e-3),
    StampStage("questions", 1200, 8, 2e-4, Mixture(True, 6, 1), 1e-3, end=0.1),
)


def shortened(recipe: tuple[StampStage, ...], share: float) -> tuple[StampStage, ...]:
    """The recipe with a share of the steps of the stages in which the decoder runs."""
    return tuple(
        replace(s, steps=max(1, round(s.steps * share))) if s.mixture else s for s in recipe
    )


class StampTrainer(Trainer):
    """Trains the projector and adapters of a FastVLM, which stays as it is otherwise.

    Batches depend on seed, stage and step alone.

    Parameters
    ----------
    model
        A FastVLM with bfloat16 or float32 weights; adapters are added to its decoder.
    maker
        Of the batches.
    stages
        In order.
    folder
        Of the checkpoint.
    save_every
        Steps between checkpoints.
    rank
        Of the adapters.
    """

    def __init__(
        self,
        model: Any,
        maker: StampBatches,
        stages: tuple[StampStage, ...],
        folder: Path,
        save_every: int = 20,
        rank: int = RANK,
    ) -> None:
        torch.manual_seed(maker.seed)
        self.model, self.maker, self.bf16 = model.eval(), maker, True
        names = r".*language_model.*\.(q|k|v|o)_proj"
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        self.adapted = get_peft_model(model, adapters)
        projector = model.model.multi_modal_projector.float()
        for parameter in projector.parameters():
            parameter.requires_grad_(True)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        parts = {
            "projector": {n: p for n, p in trained.items() if "lora_" not in n},
            "adapter": {n: p for n, p in trained.items() if "lora_" in n},
        }
        groups = [{"params": list(p.values()), "part": name} for name, p in parts.items()]
        self.names = Names(maker, model)
        self._features: dict[int, tuple[torch.Tensor, list[list[list[str]]]]] = {}
        super().__init__(
            stages,
            parts["projector"] | parts["adapter"],
            [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)],
            folder / "checkpoint.pt",
            {"seed": maker.seed, "rank": rank, "stages": [asdict(stage) for stage in stages]},
            maker.seed,
            save_every,
        )

    def batches(self) -> Iterator[StampStage]:
        """The stage, for every step: what a batch holds is cheap to make, or kept in memory."""
        return itertools.repeat(self.stage, self.stage.steps - self.step)

    def stage_loss(self, batch: StampStage) -> torch.Tensor:
        return self._names_loss(batch) if batch.mixture is None else self._text_loss(batch)

    def _names_loss(self, stage: StampStage) -> torch.Tensor:
        number = self.step % stage.batches
        if number not in self._features:
            pixels, cells = self.maker.cells(self.phase, number, stage.batch)
            with torch.no_grad():
                maps = self.model.model.vision_tower(pixels.to(self.model.dtype)).last_hidden_state
            self._features[number] = maps.flatten(2).mT, cells
        features, cells = self._features[number]
        tokens = self.model.model.multi_modal_projector(features)
        return self.names.loss(tokens.float(), cells, self.scores.note)

    def _text_loss(self, stage: StampStage) -> torch.Tensor:
        assert stage.mixture is not None
        batch = self.maker.make(self.phase, self.step, stage.batch, stage.mixture)
        pixels = batch["pixels"].to(self.model.dtype)
        out = self.model.model(**text_inputs(batch), pixel_values=pixels, use_cache=False)
        return self.answer_loss(batch, out.last_hidden_state)

    def merged(self) -> Any:
        """The model with its adapters in its weights: a stock FastVLM again."""
        return self.adapted.merge_and_unload()


class Names:
    """What visual tokens should look like to the decoder: the embeddings of words.

    A token that shows a thing or a word gets the embedding of its name, and half of those of the
    column and the row that it is in; the decoder reads text, so this is what it can read.
    """

    def __init__(self, maker: StampBatches, model: Any) -> None:
        table = model.get_input_embeddings().weight.detach().float()

        def embedded(words: tuple[str, ...]) -> torch.Tensor:
            return torch.stack([table[maker.packer.ids(f" {word}")[0]] for word in words])

        words = (BACKGROUND, *maker.library.names, *WORDS)
        self.index = {"": 0, **{word: k for k, word in enumerate(words)}}
        self.words, self.places = embedded(words), [embedded(one) for one in PLACES]

    def loss(self, tokens: torch.Tensor, cells: list[list[list[str]]], note: Any) -> torch.Tensor:
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
        side = len(cells[0])
        names = torch.tensor([[self.index[n] for row in c for n in row] for c in cells]).flatten()
        thirds = torch.arange(side) * 3 // side
        rows = thirds[:, None].expand(side, side).flatten().repeat(len(cells))
        columns = thirds.expand(side, side).flatten().repeat(len(cells))
        tokens = tokens.flatten(0, 1)
        shown = names > 0
        weight = torch.where(shown, 1.0, BACKGROUND_WEIGHT)
        logits = SHARPNESS * F.normalize(tokens, dim=-1) @ F.normalize(self.words, dim=-1).T
        loss = (F.cross_entropy(logits, names, reduction="none") * weight).sum() / weight.sum()
        note("token name", share_right(logits[shown], names[shown]))
        target = self.words[names]
        for what, places, table in zip(
            ("column", "row"), (columns, rows), self.places, strict=True
        ):
            by = SHARPNESS * F.normalize(tokens[shown], dim=-1) @ F.normalize(table, dim=-1).T
            loss = loss + 0.3 * F.cross_entropy(by, places[shown])
            target = target + PLACE_WEIGHT * shown[:, None] * table[places]
            note(f"token {what}", share_right(by, places[shown]))
        distance = (tokens - target).square().mean(1) / self.words.square().mean()
        return loss + 0.5 * (distance * weight).sum() / weight.sum()
