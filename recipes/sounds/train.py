"""Training of a tiny model that listens, from scratch; resumable, seeded.

First the encoder and the projector learn to give each token the embedding of the word for what is
heard (the decoder does not run). Then the decoder learns from one-hop pairs and questions; many
short segments share the tokens of one clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.sounds.batches import SoundBatches
from recipes.sounds.model import AUDIO, audio_tokens, listening_parts
from recipes.sounds.scenes import NAMES
from recipes.tiny.muon import optimizers
from recipes.trainer import Trainer, share_right, text_inputs
from tokencomp.training.steps import Phase

SHARPNESS = 14.0  # of the softmax over cosines of a token and the words' embeddings
SILENCE = "noise"
NAMES_WEIGHT = 0.3  # of the loss on names, beside that on answers


@dataclass(frozen=True)
class SoundStage(Phase):
    """Optimizer steps of one kind.

    Attributes
    ----------
    batch
        Clips.
    vision_lr, text_lr
        Peaks of the rates of encoder and projector, and of the decoder.
    kind
        "names" (without the decoder), "primers" or "questions".
    """

    batch: int
    vision_lr: float
    text_lr: float = 0.0
    kind: str = "questions"


RECIPE = (
    SoundStage("names", 160, 16, 2e-3, kind="names", end=0.2),
    SoundStage("primers", 200, 16, 5e-4, 1.5e-3, "primers"),
    SoundStage("questions", 1200, 16, 5e-4, 1.5e-3, end=0.04),
)


class SoundTrainer(Trainer):
    """Trains all of a Qwen2-Audio model. Batches depend on seed, stage and step alone."""

    def __init__(
        self,
        model: Any,
        maker: SoundBatches,
        stages: tuple[SoundStage, ...],
        folder: Path,
        save_every: int = 50,
    ) -> None:
        torch.manual_seed(maker.seed)
        self.model, self.maker, self.bf16 = model.train(), maker, True
        self.words = [maker.packer.ids(f" {word}")[0] for word in (SILENCE, *NAMES)]
        self.index = {"": 0, **{name: k for k, name in enumerate(NAMES, 1)}}
        (self.audio,) = maker.packer.ids(AUDIO)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            stages,
            trained,
            optimizers(model, listening_parts(model)),
            folder / "checkpoint.pt",
            {"seed": maker.seed, "stages": [asdict(stage) for stage in stages]},
            maker.seed,
            save_every,
        )

    def batches(self) -> Iterator[dict[str, Any]]:
        """Those of the stage, made outside of `loss`: spectrograms need float32."""
        stage = self.stage
        for step in range(self.step, stage.steps):
            yield self.maker.make(self.phase, step, stage.batch, stage.kind)

    def stage_loss(self, batch: dict[str, Any]) -> Tensor:
        tokens = audio_tokens(self.model, batch["features"])
        names = self._names_loss(tokens, batch["cells"])
        if "ids" not in batch:
            return names
        inputs = text_inputs(batch)
        ids = inputs.pop("input_ids")
        embeds = self.model.get_input_embeddings()(ids)
        at = (ids == self.audio)[:, :, None]
        embeds = embeds.masked_scatter(at, tokens.to(embeds.dtype))
        out = self.model.model.language_model(inputs_embeds=embeds, use_cache=False, **inputs)
        return self.answer_loss(batch, out.last_hidden_state) + NAMES_WEIGHT * names

    def _names_loss(self, tokens: Tensor, cells: list[list[str]]) -> Tensor:
        """Cross entropy of the word for what each token (batch, tokens, hidden) holds."""
        names = torch.tensor([[self.index[n] for n in row] for row in cells]).flatten()
        table = self.model.get_input_embeddings().weight.detach()[self.words].float()
        tokens = tokens.flatten(0, 1).float()
        logits = SHARPNESS * F.normalize(tokens, dim=-1) @ F.normalize(table, dim=-1).T
        self.scores.note("token name", share_right(logits[names > 0], names[names > 0]))
        size = (tokens.square().mean() / table.square().mean()).log().square()
        return F.cross_entropy(logits, names) + 0.1 * size
