"""Answers of a model to one question at a time, as an oracle of batches and stored runs."""

from __future__ import annotations

import tokencomp
from tokencomp.inputs.prompts import build_inputs

HOW = {"max_new_tokens": 4, "progress": False}


def one_by_one(loaded, example, reducer=None, ratio=0.0):
    """The answer to a single prompt, straight through `generate`."""
    model, processor = loaded
    inputs = build_inputs(processor, [example.load(8)], [example.prompt])
    handle = tokencomp.patch(model, ratio, reducer=reducer) if reducer else None
    out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    if handle is not None:
        handle.remove()
    answer = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip()
