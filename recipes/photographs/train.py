"""Training of the tower's last blocks, the projector and low-rank adapters; resumable, seeded.

First the tower and the projector learn to give each visual token the embedding of what the token
shows (the decoder does not run, so this is cheap). Then projector and adapters (LoRA, arXiv
2106.09685) learn to answer; many short segments share the visual tokens of one picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from recipes.photographs.batches import Mixture, StampBatches
from recipes.photographs.naming import Letters, Names
from recipes.trainer import Trainer, text_inputs
from tokencomp.training.steps import Phase

RANK = 16


@dataclass(frozen=True)
class StampStage(Phase):
    """Optimizer steps of one kind.

    Attributes
    ----------
    mixture
        Of the sequences; None names visual tokens, without the decoder.
    projector_lr, adapter_lr, tower_lr
        Peaks of the rates; the tower is not trained at 0.
    words
        Pictures of a batch without a mixture that show nothing but words.
    """

    batch: int
    projector_lr: float
    mixture: Mixture | None = None
    adapter_lr: float = 0.0
    tower_lr: float = 0.0
    words: int = 0


RECIPE = (
    StampStage("names", 1000, 8, 3e-3, tower_lr=1e-3, words=4, end=0.05),
    StampStage("primers", 100, 4, 2e-4, Mixture(), 1e-3),
    StampStage("questions", 700, 4, 2e-4, Mixture(True, 6, 1), 1e-3, end=0.1),
)


def shortened(recipe: tuple[StampStage, ...], share: float) -> tuple[StampStage, ...]:
    """The recipe with a share of the steps of the stages in which the decoder runs."""
    return tuple(
        replace(s, steps=max(1, round(s.steps * share))) if s.mixture else s for s in recipe
    )


class StampTrainer(Trainer):
    """Trains the last blocks of the tower, the projector and adapters of a FastVLM.

    Batches depend on seed, stage and step alone.

    Parameters
    ----------
    model
        A FastVLM with bfloat16 or float32 weights; adapters are added to its decoder.
    maker
        Of the batches.
    tower
        Modules of the tower to train; norms keep their statistics.
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
        tower: Iterable[torch.nn.Module],
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
        self.tower = [*tower]
        self.letters = Letters(model.model.multi_modal_projector.linear_1.in_features)
        for module in (model.model.multi_modal_projector, *self.tower):
            module.float().requires_grad_(True)
        parts: dict[str, dict[str, torch.nn.Parameter]] = {
            "projector": {}, "adapter": {}, "tower": {}
        }  # fmt: skip
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kinds = {"lora_": "adapter", "vision_tower": "tower"}
                part = next((k for mark, k in kinds.items() if mark in name), "projector")
                parts[part][name] = parameter
        parts["projector"] |= {f"speller.{n}": p for n, p in self.letters.head.named_parameters()}
        groups = [{"params": list(p.values()), "part": name} for name, p in parts.items()]
        self.names = Names(maker, model)
        super().__init__(
            stages,
            parts["projector"] | parts["adapter"] | parts["tower"],
            [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)],
            folder / "checkpoint.pt",
            {"seed": maker.seed, "rank": rank, "stages": [asdict(stage) for stage in stages]},
            maker.seed,
            save_every,
        )

    def batches(self) -> Iterator[StampStage]:
        """The stage, for every step: what a batch holds is cheap to make."""
        for module in self.tower:
            module.requires_grad_(self.stage.tower_lr > 0)
        return itertools.repeat(self.stage, self.stage.steps - self.step)

    def stage_loss(self, batch: StampStage) -> torch.Tensor:
        return self._names_loss(batch) if batch.mixture is None else self._text_loss(batch)

    def _names_loss(self, stage: StampStage) -> torch.Tensor:
        pixels, names, letters = self.maker.cells(self.phase, self.step, stage.batch, stage.words)
        maps = self.model.model.vision_tower(pixels.to(self.model.dtype)).last_hidden_state
        features = maps.flatten(2).mT
        tokens = self.model.model.multi_modal_projector(features)
        loss = self.names.loss(tokens.float(), names, self.scores.note)
        return loss + self.letters.loss(features.float(), letters, self.scores.note)

    def _text_loss(self, stage: StampStage) -> torch.Tensor:
        assert stage.mixture is not None
        batch = self.maker.make(self.phase, self.step, stage.batch, stage.mixture)
        pixels = batch["pixels"].to(self.model.dtype)
        out = self.model.model(**text_inputs(batch), pixel_values=pixels, use_cache=False)
        return self.answer_loss(batch, out.last_hidden_state)

    def merged(self) -> Any:
        """The model with its adapters in its weights: a stock FastVLM again."""
        return self.adapted.merge_and_unload()
