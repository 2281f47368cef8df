"""What the processor makes of media and prompts under a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.native import budget_of
from tokencomp.evaluation.settings import NATIVE, Setting
from tokencomp.inputs.prompts import build_inputs


class SettingInputs:
    """Builds the prompts of a setting for the variants of one model.

    Parameters
    ----------
    model
        Any of the variants; its placeholder ids tell visual tokens from text.
    processor
        A Hugging Face processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.processor = processor
        self._placeholders = list(adapter_for(model).placeholders)
        self._equal_tokens: dict[str, EqualTokens] = {}

    def equal_tokens(self, setting: Setting) -> EqualTokens:
        """What counts tokens and shrinks media for an input baseline; it remembers both."""
        name = setting.name
        if name not in self._equal_tokens:
            self._equal_tokens[name] = EqualTokens(self.processor, self._placeholders, name)
        return self._equal_tokens[name]

    def shrunk(self, setting: Setting, media: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        """The media of every row: smaller under an input baseline, unchanged otherwise."""
        if not setting.input_baseline or setting.reducer == NATIVE:
            return media
        shrink = self.equal_tokens(setting).shrink
        return [[shrink(m, setting.ratio) for m in row] for row in media]

    def build(
        self, setting: Setting, media: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """The inputs of one batch on the CPU.

        Parameters
        ----------
        media
            Per row, as `shrunk` returns them.
        """
        with budget_of(self.processor, setting):
            return build_inputs(self.processor, media, prompts)
