"""Options of `tokencomp train selector`, and its labels: inputs of the network, and relevance."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokencomp.inputs.prompts import generate
from tokencomp.inputs.questions import Example
from tokencomp.reducers.base import finite_values
from tokencomp.reducers.selector import Input, standardised
from tokencomp.storage import check_identity, read_object, write_json
from tokencomp.trained.cards import model_card, write_tensors
from tokencomp.training.data import answered, data_identity, load_batch, order
from tokencomp.training.loop import TrainingConfig
from tokencomp.training.relevance import TARGET, Target, attention_bytes, explain

Pair = tuple[Tensor, Tensor]
"""What the network reads of the patches of one span, and their relevance, float32 (n,).

The first is their attention row, float32 (n,), or their standardised features, float16 (n, d).
"""

MEMORY = 8 * 2**30
"""Bytes for the attention of the questions that are explained at once (ours)."""
IDENTITY = "identity.json"
SETTINGS = ("kind", "batch", "answers", "target", "frames", "max_new_tokens", "seed")
"""Of `SelectorConfig`: what the labels depend on."""


@dataclass(frozen=True)
class SelectorConfig(TrainingConfig):
    """Options of the training of a selector; the paper explains 8 to 12 thousand `samples`.

    `answers` that are explained are what the model says ("generated": the paper), or the reference
    ("given"). The network reads as `input` "attention" of the text in layer 0 (the paper), or the
    projected visual "features" (ours), two bytes per number in the labels.
    """

    learning_rate: float = 2e-3
    epochs: int = 20  # of the network
    batch_spans: int = 64  # of the network
    zeroed: float = 0.5  # share of each label's lowest values that is set to zero
    answers: Literal["generated", "given"] = "generated"
    target: Target = TARGET  # "logit" or "logprob" of the answer tokens
    max_new_tokens: int = 16  # longest answer that is generated and explained
    held_out: int = 500  # held-out questions that are explained
    input: Input = "attention"


def label_identity(model: Any, data: str, config: SelectorConfig) -> dict[str, Any]:
    """What labels must match to be reused: model, data, settings."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    if config.input != "attention":  # labels of earlier releases do not say it
        settings["input"] = config.input
    return {**model_card(model), **data_identity(data), **settings}


def label(
    model: Any,
    processor: Any,
    source: Sequence[Example],
    folder: Path,
    config: SelectorConfig,
    identity: dict[str, Any],
) -> tuple[list[Pair], float]:
    """Explain every question, one file per batch; existing files are read instead.

    Returns the labels, and the seconds they took over all sessions.
    """
    identity = {**identity, "questions": len(source)}
    if (folder / IDENTITY).exists():
        check_identity(folder, read_object(folder / IDENTITY), identity)
    pairs, seconds = list[Pair](), 0.0
    shuffled = order(len(source), config.seed)
    chosen = [next(shuffled) for _ in range(len(source))]
    starts = range(0, len(chosen), config.batch)
    for number, start in enumerate(tqdm(starts, desc=f"explaining ({folder.name})", mininterval=2)):
        file = folder / f"{number:06d}.safetensors"
        if not file.exists():
            begin = time.monotonic()
            examples = [source[i] for i in chosen[start : start + config.batch]]
            pairs_of_batch = explain_batch(model, processor, examples, config)
            # Only now, so that a first batch which fails leaves no file.
            if not (folder / IDENTITY).exists():
                write_json(folder / IDENTITY, identity)
            flat = {
                "lengths": torch.tensor([len(row) for row, _ in pairs_of_batch]),
                "rows": torch.cat([row for row, _ in pairs_of_batch]),
                "labels": torch.cat([value for _, value in pairs_of_batch]),
                "seconds": torch.tensor(time.monotonic() - begin),
            }
            write_tensors(file, flat)
        read, took = _pairs(file)
        pairs, seconds = pairs + read, seconds + took
    return pairs, seconds


def explain_batch(
    model: Any, processor: Any, examples: Sequence[Example], config: SelectorConfig
) -> list[Pair]:
    """Inputs and relevance of all spans of a batch, without special tokens.

    As many questions at once as `MEMORY` allows, at least one.
    """
    inputs, answers = load_batch(examples, processor, config.frames)
    tokens = inputs["input_ids"].shape[1] + config.max_new_tokens
    room = max(1, MEMORY // attention_bytes(model, tokens))
    if room < len(examples):
        parts = (examples[at : at + room] for at in range(0, len(examples), room))
        return [pair for part in parts for pair in explain_batch(model, processor, part, config)]
    if config.answers == "generated":
        replies = generate(model, processor, inputs, config.max_new_tokens)
        answers = [r or reference for r, reference in zip(replies, answers, strict=True)]
    forced, labels = answered(model, processor, inputs, answers, end=False)
    seen, relevances = explain(model, forced, labels, config.target)
    with torch.no_grad():
        if config.input == "features":
            rows = [[standardised(x) for x in row] for row in seen.features()]
        else:
            rows = seen.attention_rows(labels.shape[1] - inputs["input_ids"].shape[1])
    pairs = []
    for spans, by_row, by_label in zip(seen.spans, rows, relevances, strict=True):
        for span, row, relevance in zip(spans, by_row, by_label, strict=True):
            patch = ~span.special_mask()
            row = finite_values(row, "attention shares or features")
            relevance = finite_values(relevance, "relevances")
            row = row.half() if config.input == "features" else row
            pairs.append((row.cpu()[patch], relevance.cpu()[patch]))
    return pairs


def _pairs(file: Path) -> tuple[list[Pair], float]:
    from safetensors.torch import load_file

    flat = load_file(file)
    lengths = flat["lengths"].tolist()
    parts = (flat["rows"].split(lengths), flat["labels"].split(lengths))
    return list(zip(*parts, strict=True)), float(flat.get("seconds", 0.0))
