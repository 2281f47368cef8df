"""Where the time of one answer goes, under a setting and under the full model in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tokencomp.inputs.prompts import to_model
from tokencomp.profiling.profiler import decode_seconds
from tokencomp.profiling.timing import interleaved, prefill_split

ROUNDS, DECODED = 3, 4


@dataclass(frozen=True)
class TimeParts:
    """Seconds of one answer.

    Attributes
    ----------
    preprocess
        The processor: resizing, patches, token ids.
    vision
        Vision tower and projector: everything in the model before the decoder.
    reduce
        The reducer at every stage.
    prefill
        The decoder over the prompt, without `reduce`.
    decode
        One further token.
    """

    preprocess: float
    vision: float
    reduce: float
    prefill: float
    decode: float


def time_parts(
    model: Any,
    make: Callable[[bool], dict[str, Any]],
    patched: Callable[[], AbstractContextManager[Any]],
    full: Callable[[], AbstractContextManager[Any]],
) -> dict[str, dict[str, float]]:
    """Medians of a setting and of the full model, A B A B in one process.

    Parameters
    ----------
    make
        Inputs of one prompt on the CPU: for the setting if True, for the full model otherwise.
    patched, full
        Contexts in which the model runs under the setting, and uncompressed.

    Returns
    -------
    dict
        "setting" and "full", each with the seconds of `TimeParts`.
    """

    def once(own: bool) -> Callable[[], TimeParts]:
        def run() -> TimeParts:
            start = time.perf_counter()
            inputs = make(own)
            preprocess = time.perf_counter() - start
            inputs = to_model(inputs, model)
            with patched() if own else full():
                split = prefill_split(model, inputs)
                decode = decode_seconds(model, inputs, DECODED)
            return TimeParts(preprocess, split.vision, split.reduce, split.prefill, decode)

        return run

    measured = interleaved({"setting": once(True), "full": once(False)}, ROUNDS)
    return {name: vars(parts) for name, parts in measured.items()}
