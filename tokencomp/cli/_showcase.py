"""One prompt with and without compression: answers, cost, time and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from tokencomp.errors import OptionError
from tokencomp.evaluation.batches import Answerer, Loaded
from tokencomp.evaluation.coverage import Box, words_kept
from tokencomp.evaluation.profiler import time_prefills
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.timing import Split
from tokencomp.inputs.prompts import to_model
from tokencomp.inputs.questions import Example
from tokencomp.pages.demo import Answer
from tokencomp.pages.pictures import LARGE, SIDE, kept_tiles, plain_tiles, strip, survival


def prompt(media: Sequence[Any], question: str) -> Loaded:
    """A question about decoded media, without a reference answer."""
    return Example("prompt", question, ""), [*media]


def answer_prompt(
    model: Any,
    processor: Any,
    row: Loaded,
    settings: Sequence[Setting],
    max_new_tokens: int = 64,
    boxes: Sequence[Box] = (),
) -> list[Answer]:
    """Answer one question under every setting; with `boxes` of words, about one picture."""
    answerer = Answerer({"": model}, processor, {"max_new_tokens": max_new_tokens, "seed": 0})
    answers = []
    with answerer.patches:
        for setting in settings:
            batch = answerer.answer(setting, [row], answerer.inputs([row], setting), {})
            (shrunk,) = answerer.shrunk(setting, [row])
            text, pictures = batch.records[0]["prediction"], _pictures(batch.stats, row[1], shrunk)
            words = _words(batch.stats, boxes, row[1][0].size) if boxes else None
            answers.append(Answer(setting, text, batch.costs[0], *pictures, words))
    return answers


def _words(stats: Any, boxes: Sequence[Box], size: tuple[int, int]) -> float | None:
    """Share of words with half of their cells in the last layer; None if nothing is dropped."""
    if stats is None:
        return None
    shares = survival(stats, len(stats.layers) - 1)
    if len(shares) > 1 or len(shares[0]) > 1:
        raise OptionError(
            f"--boxes: this model splits the picture into {len(shares)} grids of tokens, and boxes "
            "are of one. Choose a model that reads a picture as one grid, such as Qwen-VL."
        )
    return words_kept(shares[0][0] == 1, boxes, size)


def _pictures(
    stats: Any, media: Sequence[Any], shrunk: Sequence[Any]
) -> tuple[list[Any], list[tuple[int, list[Any]]]]:
    """The fields `pictures` and `layers` of an answer."""
    stages, side = [], SIDE  # of drawn pictures: small where there are clips
    if all(isinstance(one, Image.Image) for one in media):
        side = min(max([SIDE, *(max(one.size) for one in media)]), LARGE)
    if stats and media:
        drawn = kept_tiles(media, stats, side=side)
        for layer in stats.stage_layers:
            sheets = kept_tiles(media, stats, layer, side)
            stages.append((layer, [strip(tiles) for _, tiles in sheets]))
    else:
        drawn = [(m, plain_tiles(m, side)) for m in shrunk]
    return [strip(t) for _, t in drawn], stages


def time_prefill(
    model: Any, processor: Any, rows: Sequence[Loaded], settings: Sequence[Setting], budget: float
) -> dict[Setting, Split]:
    """Median split of one prefill per setting, interleaved in one process, with a progress bar."""
    from tqdm.auto import tqdm

    answerer = Answerer({"": model}, processor, {})
    full = to_model(answerer.inputs(rows, Setting()), model)
    inputs_of = {
        s: to_model(answerer.inputs(rows, s), model) if s.input_baseline else full for s in settings
    }
    with tqdm(desc="timing", unit=" prefills") as bar:
        return time_prefills(model, inputs_of, bar, budget=budget)
