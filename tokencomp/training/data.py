"""Training questions with answers, and teacher-forced batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from tokencomp.engine.prompt import IGNORED
from tokencomp.errors import OptionError, unknown_name
from tokencomp.inputs.files import EMBEDDED, FileQuestions, questions_bytes, questions_file
from tokencomp.inputs.prompts import build_inputs, to_model
from tokencomp.inputs.questions import Deferred, Example, modality_of
from tokencomp.validation import check_choice


class ShapesQuestions(Sequence[Example]):
    """The embedded benchmark, rendered when its media are loaded.

    It has `count` items of a split, spread evenly over the families, which are all of images or all
    of videos. `scene` goes to `tokencomp.zoo.shapesqa.items.item`.
    """

    def __init__(
        self, families: Sequence[str], count: int, split: str = "train", **scene: Any
    ) -> None:
        from tokencomp.zoo.shapesqa.questions import FAMILIES

        wrong = [name for name in families if name not in FAMILIES]
        if wrong or not families:
            raise unknown_name("question family", wrong[0] if wrong else "", FAMILIES)
        self.families, self.total, self.split, self.scene = list(families), count, split, scene

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # of items of any type
        if not 0 <= index < self.total:
            raise IndexError(index)
        one = self.item(index)
        render = one.video if one.kind == "video" else one.image
        return Deferred(one.id, one.question, one.answer, (), one.family, lambda: (render(),))

    def item(self, index: int) -> Any:
        """The `tokencomp.zoo.shapesqa.items.Item` at `index`, not rendered."""
        from tokencomp.zoo.shapesqa.items import item

        family = self.families[index % len(self.families)]
        return item(self.split, family, index // len(self.families), **self.scene)


def data_identity(data: str) -> dict[str, Any]:
    """Identity of a data set: the name and, for files, a hash of the lines (not of media)."""
    if data.partition(":")[0] == EMBEDDED:
        return {"data": data}
    lines = questions_bytes(questions_file(Path(data)))
    return {"data": data, "content": hashlib.sha256(lines).hexdigest()}


def questions(data: str, kind: str, count: int, purpose: str = "train") -> Sequence[Example]:
    """What `--data` names, for training ("train") or for evaluation ("validation", "test").

    `data` is "shapesqa", "shapesqa:FAMILY,FAMILY,...", a JSON Lines file, or a folder with
    `questions.jsonl`. `kind` ("image", "video" or "both"; else `OptionError`) chooses among the
    embedded questions, if no families are named.
    """
    check_choice("data", "kind", kind, ("image", "video", "both"))
    name, _, chosen = data.partition(":")
    if name != EMBEDDED:
        return FileQuestions(Path(data), held_out=purpose != "train", count=count)
    from tokencomp.zoo.shapesqa.questions import IMAGE_FAMILIES, families

    names = [part.strip() for part in chosen.split(",")]
    if not chosen:
        names = [f for k in ("image", "video") if kind in (k, "both") for f in families(k)]
    groups = [[f for f in names if (f in IMAGE_FAMILIES) is image] for image in (True, False)]
    groups = [g for g in groups if g]
    # Named families have equal shares; else images and videos have.
    weights = [len(g) if chosen else 1 for g in groups]
    shares = [count * weight // sum(weights) for weight in weights]
    shares[0] += count - sum(shares)
    parts: list[Any] = [ShapesQuestions(g, n, purpose) for g, n in zip(groups, shares, strict=True)]
    joined: Any = ConcatDataset(parts)  # which is a sequence but for its type
    return parts[0] if len(parts) == 1 else joined


def order(count: int, seed: int) -> Iterator[int]:
    """Endless shuffled passes over `count` indices; the same for the same seed."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(count, generator=generator).tolist()
        epoch += 1


def batches(source: Sequence[Example], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices, each from one part of a source of parts.

    Images and videos in one batch would be padded to the longest video.
    """
    parts: list[Any] = source.datasets if isinstance(source, ConcatDataset) else [source]
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    orders = [order(len(part), seed + i) for i, part in enumerate(parts)]
    weights = torch.tensor([float(len(part)) for part in parts])
    generator = torch.Generator().manual_seed(seed)
    while True:
        i = int(torch.multinomial(weights, 1, generator=generator))
        yield [starts[i] + next(orders[i]) for _ in range(size)]


def load_batch(
    examples: Sequence[Example], processor: Any, frames: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Prompts of a batch, left-padded, and the answers."""
    media = [e.load(frames) for e in examples]
    kinds = {modality_of(m) for row in media for m in row}
    if not kinds:
        raise OptionError(f"question {examples[0].id!r} has no image or video to compress.")
    inputs = build_inputs(processor, media, [e.prompt for e in examples])
    return inputs, [e.answer for e in examples]


def answer_ids(processor: Any, model: Any, answers: Sequence[str], end: bool) -> list[list[int]]:
    """Token ids of the answers, with the end-of-turn token if `end`."""
    tokenizer = getattr(processor, "tokenizer", processor)
    stop = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    stop = stop[0] if isinstance(stop, list) else stop
    ids = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    if not all(ids):
        raise OptionError("an answer is empty; every training question needs one.")
    return [[*row, stop] if end else list(row) for row in ids]


def append(inputs: dict[str, Any], answers: Sequence[list[int]]) -> tuple[dict, Tensor]:
    """Teacher-forced batch: answers after the prompts, starting at the same column.

    Shorter answers are padded with their last token: attention is causal, so no answer token sees
    the padding, and all prompts end in the same column (ours). Returns the inputs, still
    left-padded, with every tensor along the sequence extended, and labels (B, L): the answer ids at
    their positions, -100 elsewhere.
    """
    ids, longest = inputs["input_ids"], max(map(len, answers))
    token_ids = torch.tensor([a + a[-1:] * (longest - len(a)) for a in answers])
    lengths = torch.tensor([[len(a)] for a in answers])
    new = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    out = dict(inputs)
    for key, old in inputs.items():
        if isinstance(old, Tensor) and old.shape == ids.shape:
            out[key] = torch.cat([old, new.get(key, torch.zeros_like(token_ids)).to(old)], 1)
    labels = token_ids.masked_fill(torch.arange(longest) >= lengths, IGNORED)
    return out, torch.cat([torch.full(ids.shape, IGNORED), labels], 1)


def answered(
    model: Any, processor: Any, inputs: dict[str, Any], answers: Sequence[str], end: bool
) -> tuple[dict[str, Any], Tensor]:
    """`append` of answers as text, on the device of the model; `end` as in `answer_ids`."""
    forced, labels = append(inputs, answer_ids(processor, model, answers, end))
    return to_model(forced, model), labels.to(model.device)
