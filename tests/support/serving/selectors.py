"""Trained selectors of features for servers, with random weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from support.matrix import small_weights


def selector(
    folder: Path, card: dict[str, Any], sign: float = 1.0, time: int = 0
) -> dict[str, Any]:
    """Write a selector into `folder`, and return the options of the reducer that reads it.

    Parameters
    ----------
    card
        Of the model; its "hidden_size" is the width of the features.
    sign
        Factor of what the network reads: another one stands for another training.
    time
        When the file was written, in nanoseconds: two trainings may share a tick of the clock.
    """
    stored = Path(small_weights("selector", card["hidden_size"], card, "features"))
    tensors, file = load_file(stored), folder / "selector.safetensors"
    tensors["stem.weight"] *= sign
    save_file(tensors, file)
    os.utime(file, ns=(time, time))
    file.with_suffix(".json").write_text(stored.with_suffix(".json").read_text())
    return {"input": "features", "weights": str(folder)}
