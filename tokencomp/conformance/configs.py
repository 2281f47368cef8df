"""Configs of whole models: the text config inside, shallow towers, token ids that fit it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from tokencomp.adapters.structure import IDS
from tokencomp.conformance.shrink import DEPTHS, VOCABULARY, tiny_text_config

FIRST_SPECIAL = VOCABULARY - 32
"""Token ids from here on are those of placeholders and markers; below are words."""


def shallow(config: Any, text: Any = None) -> Any:
    """A copy of a config with towers of two layers, which are faster to create.

    The config `text` inside keeps its depth.
    """
    config = copy.deepcopy(config, {} if text is None else {id(text): text})
    for owner in configs_in(config):
        for name in (*DEPTHS, "depth", "encoder_layers", "num_encoder_layers"):
            value = getattr(owner, name, None)
            if owner is not text and isinstance(value, int) and value > 2:
                with contextlib.suppress(Exception):
                    setattr(owner, name, 2)
    return config


def replace_text_config(config: Any, mrope: bool, overrides: dict[str, Any]) -> Any:
    """Shrink the text config inside `config`, and sizes that `config` repeats."""
    old = text_config(config)
    new = tiny_text_config(old, mrope, **overrides)
    if old is config:
        for name, value in new.to_dict().items():
            if not hasattr(getattr(config, name, None), "to_dict"):
                with contextlib.suppress(Exception):
                    setattr(config, name, value)
        return config
    for owner in configs_in(config):
        for name, value in list(vars(owner).items()):
            if value is old:
                setattr(owner, name, new)
    for name in ("hidden_size", "vocab_size"):
        if name in vars(config):
            setattr(config, name, getattr(new, name))
    return new


def text_config(config: Any) -> Any:
    """The config of the text decoder inside a composite config."""
    own = config.get_text_config(decoder=True)
    if own is not config:
        return own
    for name in ("llm_config", "language_config", "thinker_config"):
        inner = getattr(config, name, None)
        if inner is not None:
            return text_config(inner)
    return config


def configs_in(config: Any) -> Iterator[Any]:
    """A config and all configs inside of it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from configs_in(value)


def move_token_ids(config: Any, vocabulary: int) -> dict[str, int]:
    """Give token ids beyond the vocabulary, and placeholders, ids at its end.

    Returns these ids by the name of their field.
    """
    moved: dict[int, int] = {}
    names: dict[str, int] = {}

    def place(value: int) -> int:
        if FIRST_SPECIAL <= value < vocabulary:
            return value
        moved.setdefault(value, FIRST_SPECIAL + len(moved))
        return moved[value]

    for owner in configs_in(config):
        for name, value in list(vars(owner).items()):
            if not name.endswith(("_token_id", "_token_index", "_token_ids", "_patch_id")):
                continue
            if value is None and name in (*IDS["image"], *IDS["audio"]):
                value = 0  # checkpoints have one
            visual = not name.startswith(("pad_", "bos_", "eos_", "decoder_start"))
            if isinstance(value, int) and (visual or value >= vocabulary):
                with contextlib.suppress(Exception):
                    setattr(owner, name, place(value or -1))
                    names[name] = place(value or -1)
            elif _ids(value) and (visual or max(value) >= vocabulary):
                setattr(owner, name, [place(v) for v in value])
    return names


def _ids(value: Any) -> bool:
    """Whether a field holds a list of token ids."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, int) for v in value)


def spatial_merge(config: Any) -> int:
    """Patches of the tower along one side of a visual token."""
    for owner in (config, getattr(config, "vision_config", None)):
        for name in ("spatial_merge_size", "merge_size", "downsample_factor"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 1
