"""Stage options in tests: one value of each, and what a prompt keeps under them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from torch import Tensor

from support import oracle
from support.families import FAMILIES
from support.prompts import ragged
from tokencomp.plan.options import OPTIONS, type_of
from tokencomp.validation import choices


def example(name: str) -> tuple[str, Any]:
    """A value that is not off, as it is written on the command line and in Python."""
    kind, off = type_of(name), OPTIONS[name].off
    if bool in (kind, *get_args(kind)):
        return ("off", False) if off is True else ("on", True)
    for value in (*choices(kind), 1, 0.5, 2):
        if type(value) in (kind, *get_args(kind), str) and value != off:
            return str(value), value
    raise TypeError(f"{name}: add a value of type {kind} here")


EXAMPLES = {name: example(name) for name in OPTIONS}


class Choice(NamedTuple):
    """What an entry stage keeps of an image or a video.

    Attributes
    ----------
    features : Tensor, shape (t · h · w, d)
        Embeddings of the tokens of the span, which the reducer of an entry stage sees.
    grid
        (t, h, w).
    kept
        Numbers of the kept patches, ascending.
    """

    features: Tensor
    grid: tuple[int, int, int]
    kept: list[int]


def choices_of(name: str = "qwen2_vl", **setting: Any) -> Iterator[Choice]:
    """Run a ragged batch (an image; a video and an image; text) under `patch(model, **setting)`.

    The logits of its prefill and of three decode steps must equal those of a run of full length in
    which dropped patches are masked, or merged in loops where the stage merges.
    """
    family = FAMILIES[name]
    model, inputs = family.build(), ragged(family)
    embeds = oracle.decoder_inputs(model, family, inputs)["inputs_embeds"]
    handle, out, masks = oracle.generated(model, family, inputs, 3, **setting)
    merged = oracle.Merged(handle) if handle.plan.stages[0].merge else None
    assert oracle.deviation(model, family, inputs, out, masks, merged) < 1e-5
    for b, spans in enumerate(handle.stats.spans):
        for j, span in enumerate(spans):
            features = embeds[b, span.start : span.stop]
            yield Choice(features, span.grid, handle.stats.kept(b)[0][j])
