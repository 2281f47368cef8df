"""Decoders whose layers scale queries by their row number, which dropping rows changes."""

from __future__ import annotations

from typing import Any

from tokencomp.adapters.structure import parameters_of


def row_scales(decoder: Any) -> dict[str, float | None]:
    """Field of the config → first scaled row, None if the config does not name it.

    Empty for decoders that do not scale queries, or scale them by position.
    """
    config, names = decoder.config, parameters_of(decoder.layers[0])
    found: dict[str, float | None] = {}
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4
        found["floor_scale"] = getattr(config, "floor_scale", None)
    floor = getattr(config, "log_scaling_n_floor", None)
    if floor and "relative_distance" not in names:  # Inkling; Inkling 2 scales by position
        found["log_scaling_n_floor"] = floor
    return found
