"""Media that a body has encoded: token count and size of each."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.media_call import CODES
from tokencomp.tokens.spans import Modality
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import MethodReplacement

METHODS = "get_{}_features"  # methods of a body that encode media, since transformers 4.5x


@dataclass
class Encoding:
    """Media of one modality that a body has encoded in one call, in the order of the batch.

    Attributes
    ----------
    lengths
        Tokens of each medium, or of each tile if the body encodes tiles.
    tables
        Arguments of the call that may contain the sizes of the media.
    map : tuple of two int, or None
        Height and width of the feature map, for towers that return one.
    """

    lengths: list[int] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    map: tuple[int, int] | None = None

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(t, h, w) of each medium in the unit of the call, patches or pixels; empty if unknown.

        Computed on demand: it reads a table from the device, and positions often give the grid.
        """
        tables = (per_medium(sizes_in(table), self.lengths) for table in self.tables)
        return next(filter(None, tables), [])


class EncodedMedia(threading.local):
    """Stores, per thread, arguments and results of the last calls of a body's encoding methods.

    `generate` of transformers >= 5.18 encodes media before it calls the model, and drops arguments
    that only the encoder reads, which give the shape of images.

    Attributes
    ----------
    running : "image", "video", "audio" or None
        Modality that is being encoded in this thread.
    """

    def __init__(self) -> None:
        self.latest: dict[Modality, Encoding] = {}
        self.running: Modality | None = None

    def watch(self, body: Any) -> list[MethodReplacement]:
        """Wrap the encoding methods of `body` to store their calls."""
        return [
            MethodReplacement(
                body, METHODS.format(modality), functools.partial(self._call, modality)
            )
            for modality in CODES
        ]

    def _call(
        self, modality: Modality, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.running:  # the method for videos calls that for images (Qwen3.5)
            return original(*args, **kwargs)
        self.running = modality
        try:
            out = original(*args, **kwargs)
        finally:
            self.running = None
        self._note(modality, [*args, *kwargs.values()], out)
        return out

    @compat.not_compiled
    def _note(self, modality: Modality, arguments: list[Any], out: Any) -> None:
        last = getattr(out, "last_hidden_state", None)
        tables = [argument for argument in arguments if _may_be_table(argument)]
        encoding = Encoding(token_counts(features_of(out)), tables)
        if isinstance(last, Tensor) and last.ndim == 4:
            encoding.map = last.shape[-2], last.shape[-1]
        self.latest[modality] = encoding


def features_of(out: Any) -> Any:
    """The features in the result of an encoding method."""
    pooled = getattr(out, "pooler_output", None)
    if pooled is not None:
        return pooled
    last = getattr(out, "last_hidden_state", None)
    if last is not None:
        return last
    return out  # remote code returns only the features


def token_counts(features: Any) -> list[int]:
    """Tokens of every medium or tile in features (tiles, n, d), or in a list of (…, n, d).

    Empty for concatenated features (n, d), whose ends are unknown, and for features of single
    patches, (n, 1, d) (Inkling).
    """
    if isinstance(features, list | tuple):
        tensors = [item for item in features if isinstance(item, Tensor) and item.ndim >= 2]
    else:
        tensors = [features] if isinstance(features, Tensor) and features.ndim >= 3 else []
    counts = [n for item in tensors for n in [item.shape[-2]] * item.shape[:-2].numel()]
    return counts if max(counts, default=0) > 1 else []


def sizes_in(argument: Any) -> list[tuple[int, int, int]]:
    """Sizes (t, h, w) in an argument of an encoder; empty if it contains something else.

    An integer table with two or three columns contains sizes. With a further axis it contains patch
    coordinates, padded with -1, whose maximum gives the size.
    """
    if isinstance(argument, list | tuple):
        try:
            argument = torch.tensor(argument)
        except (TypeError, ValueError, RuntimeError):  # pictures, strings, rows of several lengths
            return []
    if not isinstance(argument, Tensor) or not _may_be_table(argument):
        return []
    if argument.ndim == 3:
        if argument.shape[-1] != 2:
            return []
        argument = (argument.amax(1) + 1).flip(-1)  # coordinates are (x, y)
    if argument.shape[1] not in (2, 3):
        return []
    rows = argument.tolist()
    return [(row[0] if len(row) == 3 else 1, row[-2], row[-1]) for row in rows]


def _may_be_table(argument: Any) -> bool:
    """Whether an argument can be a table of sizes or coordinates, see `sizes_in`."""
    if not isinstance(argument, Tensor):
        return isinstance(argument, list | tuple)
    return argument.dtype in (torch.int32, torch.int64) and argument.ndim in (2, 3)


def per_medium(sizes: list[tuple[int, int, int]], lengths: list[int]) -> list[tuple[int, int, int]]:
    """One size for each medium of `lengths` tokens, or none.

    A size per frame can stand for the video of these frames (Gemma 4).
    """
    if len(sizes) == len(lengths) or not sizes or not lengths:
        return sizes if len(sizes) == len(lengths) else []
    tokens, rest = divmod(sum(lengths), len(sizes))
    _, height, width = sizes[0]
    if rest or not tokens or any(size != (1, height, width) for size in sizes):
        return []
    if any(n % tokens for n in lengths):
        return []
    return [(n // tokens, height, width) for n in lengths]
