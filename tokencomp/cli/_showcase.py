"""One prompt with and without compression: answers, cost, time and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokencomp.evaluation.cost import Cost, prefill_costs
from tokencomp.evaluation.patches import patched
from tokencomp.evaluation.profiler import time_prefills
from tokencomp.evaluation.setting_inputs import SettingInputs
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.timing import Split
from tokencomp.inputs.prompts import generate, prompt_lengths, to_model
from tokencomp.inputs.questions import media_kind
from tokencomp.pages.demo import Answer
from tokencomp.pages.pictures import kept_tiles, plain_tiles, strip


class PromptMaker:
    """The inputs of one batch under any setting; input baselines shrink the media."""

    def __init__(
        self, model: Any, processor: Any, media: Sequence[Sequence[Any]], texts: Sequence[str]
    ) -> None:
        self.model, self.media, self.texts = model, media, list(texts)
        self._setting_inputs = SettingInputs(model, processor)
        self._inputs: dict[Any, dict[str, Any]] = {}

    def media_for(self, setting: Setting) -> Sequence[Sequence[Any]]:
        return self._setting_inputs.shrunk(setting, self.media)

    def inputs(self, setting: Setting) -> dict[str, Any]:
        key = setting if setting.input_baseline else None
        if key not in self._inputs:
            media = self.media_for(setting)
            inputs = self._setting_inputs.build(setting, media, self.texts)
            self._inputs[key] = to_model(inputs, self.model)
        return self._inputs[key]

    def prefill(self, setting: Setting) -> list[Cost]:
        """Cost per row of one prefill."""
        with patched(self.model, setting) as handle, torch.inference_mode():
            self.model(**self.inputs(setting), use_cache=True, logits_to_keep=1)
            return self.costs(setting, handle)

    def costs(self, setting: Setting, handle: Any) -> list[Cost]:
        """Cost per row of the call that has just run."""
        full = [visual for _, visual in prompt_lengths(self.model, self.inputs(Setting()))]
        stats = handle.stats if handle else None
        return prefill_costs(self.model, self.inputs(setting), stats, full)


def answer_prompt(
    model: Any,
    processor: Any,
    media: Sequence[Any],
    question: str,
    settings: Sequence[Setting],
    max_new_tokens: int = 64,
) -> list[Answer]:
    """Answer one question about some media under every setting."""
    maker, answers = PromptMaker(model, processor, [media], [question]), []
    for setting in settings:
        with patched(model, setting) as handle:
            text = generate(model, processor, maker.inputs(setting), max_new_tokens)[0]
            cost = maker.costs(setting, handle)[0]
            stats = handle.stats if handle is not None else None
        pictures = _pictures(stats, media, maker.media_for(setting)[0])
        answers.append(Answer(setting, text, cost, *pictures))
    return answers


def _pictures(
    stats: Any, media: Sequence[Any], shrunk: Sequence[Any]
) -> tuple[list[Any], list[tuple[int, list[Any]]], list[list[Any]]]:
    """The fields `pictures`, `layers` and `clips` of an answer."""
    stages = []
    if stats and media:
        drawn = kept_tiles(media, stats)
        for layer in stats.stage_layers:
            stages.append((layer, [strip(t) for _, t in kept_tiles(media, stats, layer)]))
    else:
        drawn = [(m, plain_tiles(m)) for m in shrunk]
    clips = [t for m, t in drawn if media_kind(m) == "video"]
    return [strip(t) for _, t in drawn], stages, clips


def time_prefill(
    maker: PromptMaker, settings: Sequence[Setting], budget: float
) -> dict[Setting, Split]:
    """Median split of one prefill per setting, settings interleaved in one process, with a bar."""
    from tqdm.auto import tqdm

    inputs_of = {setting: maker.inputs(setting) for setting in settings}
    with tqdm(desc="timing", unit=" prefills") as bar:
        return time_prefills(maker.model, inputs_of, bar, budget=budget)
