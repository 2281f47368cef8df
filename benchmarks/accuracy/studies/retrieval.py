"""What compression does to rankings and embeddings of pictures, on an embedded model.

    python -m benchmarks.accuracy.studies.retrieval            # retrieval.json and retrieval.md
    python -m benchmarks.accuracy.studies.retrieval --report   # only the page

Ranking has a ground truth: pictures of ShapesQA (validation) are ordered for "Is there a red
circle?" by the model's logits of yes and no, as a CrossEncoder does. Embeddings have none, because
no embedded model is trained to embed: the mean of the body's last hidden states is compared with
that of all tokens.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp import zoo
from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.inputs.prompts import build_inputs
from tokencomp.zoo.shapesqa.items import items
from tokencomp.zoo.shapesqa.scenes import COLORS, SHAPES

MODEL, PICTURES, QUERIES, BATCH = "tiny-qwen3-vl", 32, 8, 16
RATIOS, METHODS = (0.75, 0.9), ("kcenter", "random", "downscale")


class Pictures:
    """The gallery: pictures of different scenes, and what is in them."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        chosen = list(items("validation", PICTURES, ("existence",)))
        self.images = [item.image() for item in chosen]
        self.things = [{(t.color, t.shape) for t in item.scene.things} for item in chosen]
        self.equal = EqualTokens(processor, list(adapter_for(model).placeholders), "downscale")

    def queries(self) -> list[tuple[str, str]]:
        """The pairs of colour and shape that most pictures have, in a fixed order."""
        pairs = [(c, s) for c in COLORS for s in SHAPES]
        return sorted(pairs, key=lambda pair: -sum(pair in own for own in self.things))[:QUERIES]

    def small(self, ratio: float) -> list[Image.Image]:
        """The pictures with fewer pixels, in place of fewer tokens."""
        return [self.equal.shrink(image, ratio) for image in self.images]


@torch.inference_mode()
def scores(gallery: Pictures, images: list[Image.Image], query: tuple[str, str]) -> Tensor:
    """Logits of yes minus no for every picture."""
    color, shape = query
    text = f"Is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape}?"
    tokenizer = gallery.processor.tokenizer
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    rows = []
    for first in range(0, len(images), BATCH):
        part = [[image] for image in images[first : first + BATCH]]
        inputs = build_inputs(gallery.processor, part, [text] * len(part))
        logits = gallery.model(**inputs, logits_to_keep=1).logits[:, -1]
        rows.append(logits[:, yes] - logits[:, no])
    return torch.cat(rows)


@torch.inference_mode()
def vectors(gallery: Pictures, images: list[Image.Image], handle: Any) -> Tensor:
    """Unit vectors: the mean of the last hidden states of the tokens that are left."""
    rows = []
    for first in range(0, len(images), BATCH):
        part = [[image] for image in images[first : first + BATCH]]
        inputs = build_inputs(gallery.processor, part, ["Describe."] * len(part))
        states = gallery.model.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        if handle is not None:
            mask = handle.stats.pooling_mask(mask)
        weight = mask[..., None].to(states.dtype)
        rows.append((states * weight).sum(1) / weight.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows))


def average_precision(score: Tensor, relevant: list[bool]) -> float:
    """Mean, over relevant pictures, of the share of relevant ones among those ranked no lower."""
    order = score.argsort(descending=True, stable=True).tolist()
    hits, total = 0, 0.0
    for place, index in enumerate(order, 1):
        if relevant[index]:
            hits += 1
            total += hits / place
    return total / hits


def ranking(gallery: Pictures, images: list[Image.Image]) -> float:
    """Mean average precision over the queries."""
    values = [
        average_precision(scores(gallery, images, query), [query in own for own in gallery.things])
        for query in gallery.queries()
    ]
    return sum(values) / len(values)


def agreement(own: Tensor, whole: Tensor, neighbours: int = 5) -> dict[str, float]:
    """How compressed vectors find each other and themselves among the vectors of all tokens."""
    found = (own @ whole.T).argmax(1)
    return {
        "cosine": float((own * whole).sum(1).mean()),
        "self": float((found == torch.arange(len(own))).float().mean()),
        "neighbours": overlap(nearest(own, neighbours), nearest(whole, neighbours)),
    }


def nearest(x: Tensor, count: int) -> list[set[int]]:
    """The nearest other rows of every row."""
    table = (x @ x.T).fill_diagonal_(-torch.inf)
    return [set(row) for row in table.topk(count).indices.tolist()]


def overlap(a: list[set[int]], b: list[set[int]]) -> float:
    return sum(len(x & y) / len(y) for x, y in zip(a, b, strict=True)) / len(b)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per method and ratio; the first is without compression."""
    model, processor = zoo.load(MODEL)
    gallery = Pictures(model, processor)
    whole = vectors(gallery, gallery.images, None)
    rows = [{"method": "all tokens", "ratio": 0.0, "map": ranking(gallery, gallery.images)}]
    rows[0] |= agreement(whole, whole)
    for ratio in RATIOS:
        for method in METHODS:
            small = method == "downscale"
            images = gallery.small(ratio) if small else gallery.images
            patched = (
                contextlib.nullcontext() if small else tokencomp.patch(model, ratio, reducer=method)
            )
            with patched as handle:
                row = {"method": method, "ratio": ratio, "map": ranking(gallery, images)}
                rows.append(row | agreement(vectors(gallery, images, handle), whole))
            print(rows[-1], flush=True)
    yield {"rows": rows}


def page(report: dict[str, Any]) -> str:
    """Everything as a Markdown page."""
    head = ("ratio", "method", "ranking, mAP", "cosine", "finds itself", "5 neighbours")
    keys = ("map", "cosine", "self", "neighbours")
    rows = [
        [f"{row['ratio']:g}", row["method"], *(f"{row[key]:.3f}" for key in keys)]
        for row in report["rows"]
    ]
    case = (
        f"{PICTURES} pictures of ShapesQA (validation) and {MODEL}. Ranking: mean average "
        f'precision of {QUERIES} queries such as "Is there a red circle?", by the logits of yes '
        "and no; what is in a picture is known. The other columns compare embeddings with those of "
        "all tokens: their cosine, how many find themselves among those of all tokens, and how "
        "many of the 5 nearest pictures are the same. **The model is trained to answer, not to "
        "embed**, so these columns say how far vectors move, and nothing about retrieval. "
        "`downscale` gives pictures of as many tokens. [Embedding](../../docs/embedding.md) has "
        "the calls. [All benchmark pages](../README.md)."
    )
    title = "# What happens to rankings and embeddings?"
    parts = [title, publishing.table(head, rows, right=4), case]
    return "\n\n".join(parts)


EXPERIMENT = Experiment("accuracy/retrieval", measure, page)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
