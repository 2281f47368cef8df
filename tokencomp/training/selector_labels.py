"""Labels of the `selector` reducer: attention rows, and what the answers rest on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokencomp.evaluation.answering import generate, to_model
from tokencomp.evaluation.examples import Example
from tokencomp.training.data import answer_ids, append, data_identity, load_batch, order
from tokencomp.training.loop import check_same_run
from tokencomp.training.relevance import explain
from tokencomp.weights import model_card, write_json, write_tensors

if TYPE_CHECKING:
    from tokencomp.training.selector import SelectorConfig

Pair = tuple[Tensor, Tensor]
"""Attention row and relevance of the patches of one span, both float32 (n,)."""

SETTINGS = ("kind", "batch", "answers", "target", "frames", "max_new_tokens", "seed")
"""Of `SelectorConfig`: what the labels depend on."""


def label_identity(model: Any, data: str, config: SelectorConfig) -> dict[str, Any]:
    """What must be equal for labels to be used again: model, data, settings."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {**model_card(model), **data_identity(data), **settings}


def label(
    model: Any,
    processor: Any,
    source: Sequence[Example],
    folder: Path,
    config: SelectorConfig,
    identity: dict[str, Any],
) -> list[Pair]:
    """Explain every question; one file per batch, files that exist are read instead.

    Raises
    ------
    OptionError
        `folder` holds labels of another identity.
    """
    from safetensors.torch import load_file

    _same_run(folder / "identity.json", {**identity, "questions": len(source)})
    pairs: list[Pair] = []
    shuffled = order(len(source), config.seed)
    chosen = [next(shuffled) for _ in range(len(source))]
    starts = range(0, len(chosen), config.batch)
    for number, start in enumerate(tqdm(starts, desc=f"explaining ({folder.name})", mininterval=2)):
        file = folder / f"{number:06d}.safetensors"
        if not file.exists():
            examples = [source[i] for i in chosen[start : start + config.batch]]
            write_tensors(file, _flat(explain_batch(model, processor, examples, config)))
        pairs += _pairs(load_file(file))
    return pairs


def explain_batch(
    model: Any, processor: Any, examples: Sequence[Example], config: SelectorConfig
) -> list[Pair]:
    """Attention rows and relevance of all spans of a batch, special tokens left out."""
    inputs, answers = load_batch(examples, processor, config.frames)
    if config.answers == "generated":
        told = generate(model, processor, inputs, config.max_new_tokens)
        answers = [t or given for t, given in zip(told, answers, strict=True)]
    ids = answer_ids(processor, model, answers, end=False)
    forced, labels = append(inputs, ids)
    seen, found = explain(model, to_model(forced, model), labels.to(model.device), config.target)
    with torch.no_grad():
        rows = seen.attention_rows([len(i) for i in ids])
    pairs = []
    for spans, by_row, by_label in zip(seen.spans, rows, found, strict=True):
        for span, row, relevance in zip(spans, by_row, by_label, strict=True):
            patch = ~span.special_mask()
            pairs.append((row.float().cpu()[patch], relevance.float().cpu()[patch]))
    return pairs


def _same_run(file: Path, identity: dict[str, Any]) -> None:
    if file.exists():
        check_same_run(file.parent, json.loads(file.read_text()), identity)
    else:
        write_json(file, identity)


def _flat(pairs: list[Pair]) -> dict[str, Tensor]:
    return {
        "lengths": torch.tensor([len(row) for row, _ in pairs]),
        "rows": torch.cat([row for row, _ in pairs]),
        "labels": torch.cat([value for _, value in pairs]),
    }


def _pairs(flat: dict[str, Tensor]) -> list[Pair]:
    lengths = flat["lengths"].tolist()
    return list(zip(flat["rows"].split(lengths), flat["labels"].split(lengths), strict=True))
