"""Training sequences about clips: a pure function of (seed, stage, step)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from recipes.packing import Packer, Placeholders, stacked
from recipes.sounds.model import AUDIO, TOKENS
from recipes.sounds.questions import FAMILIES, primers
from recipes.sounds.scenes import RATE, Clip, cell_names, render, sample
from tokencomp.zoo.shapesqa.items import stream

Segment = tuple[list[int], list[int]]
SHAPE = (1, 1, 1)  # of media; a clip has none


class SoundBatches:
    """Builds the batch of one step.

    Parameters
    ----------
    processor
        Of the model.
    seed
        Of the training run.
    """

    def __init__(self, processor: Any, seed: int = 0) -> None:
        self.packer = Packer(processor.tokenizer, Placeholders("audio", AUDIO, lambda _: TOKENS))
        self.extractor, self.seed = processor.feature_extractor, seed

    def clips(self, stage: int, step: int, batch: int) -> tuple[np.random.Generator, list[Clip]]:
        rng = stream("train", "sounds batches", self.seed, stage, step)
        return rng, [sample(rng) for _ in range(batch)]

    def features(self, clips: Sequence[Clip]) -> Tensor:
        """Spectrograms, float32 (batch, bins, frames)."""
        samples = [render(clip) for clip in clips]
        made = self.extractor(
            samples, sampling_rate=RATE, padding="max_length", return_tensors="pt"
        )
        return made["input_features"]

    def make(self, stage: int, step: int, batch: int, kind: str) -> dict[str, Any]:
        """The batch of one step.

        Returns
        -------
        dict
            `features`, and `cells`: what each token of each clip holds. Unless `kind` is "names",
            also rows as `Packer.pack` gives them, stacked, and the `names` of their segments.
        """
        rng, clips = self.clips(stage, step, batch)
        spectra = {
            "features": self.features(clips),
            "cells": [cell_names(clip, TOKENS) for clip in clips],
        }
        if kind == "names":
            return spectra
        filled = [self.segments(clip, kind == "questions", rng) for clip in clips]
        prefix = len(self.packer.prefix("audio", SHAPE)[0])
        longest = max(sum(len(s[0]) for _, s in one) for one in filled)
        rows = [
            self.packer.pack("audio", SHAPE, [s for _, s in one], prefix + longest)
            for one in filled
        ]
        return {**spectra, **stacked(rows), "names": [[name for name, _ in one] for one in filled]}

    def segments(
        self, clip: Clip, questions: bool, rng: np.random.Generator
    ) -> list[tuple[str, Segment]]:
        """Primers, and a question of every family, with the name under which each is scored."""
        out = [(name, self.packer.pair(key, value)) for name, key, value in primers(clip)]
        if questions:
            for family, ask in FAMILIES.items():
                query = ask(clip, rng)
                if query is not None:
                    segment = self.packer.segment("audio", query.text, f" {query.answer}")
                    out.append((family, segment))
        return [out[int(i)] for i in rng.permutation(len(out))]
