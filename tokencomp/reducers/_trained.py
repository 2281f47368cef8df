"""Reducers with a trained module, which `patch` loads."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from tokencomp.errors import OptionError, WeightsError
from tokencomp.reducers.base import Reducer
from tokencomp.tokens.tokens import ModelFacts

Card = dict[str, Any]


@dataclass(frozen=True)
class TrainedReducer(Reducer):
    """Base of reducers whose weights are in a file `NAME.safetensors` with a card `NAME.json`.

    Attributes
    ----------
    weights : str or None
        The file, or the folder that holds it. None: in the model's folder or its subfolder
        `tokencomp`.
    """

    weights: str | None = None

    train: ClassVar[str]
    """The command that makes weights."""

    def __post_init__(self) -> None:
        if isinstance(self.weights, PathLike):  # text, so that options are ready for JSON
            object.__setattr__(self, "weights", fspath(self.weights))
        super().__post_init__()

    @classmethod
    @abstractmethod
    def module_of(cls, card: Card, path: Path) -> nn.Module:
        """The module that a card describes, before its weights are loaded."""

    def bind(self, facts: ModelFacts) -> Reducer:
        from tokencomp.trained.cards import check_card, locate

        path = locate(self.weights, facts, self.name, self.train).absolute()
        module, card = load(type(self), path)
        check_card(card, facts, path, self.train)
        bound = self.with_weights(path, card)
        vars(bound)["_module"] = module  # which was checked, even if its file changes later
        return bound

    def with_weights(self, path: Path, card: Card) -> TrainedReducer:
        return replace(self, weights=str(path))

    @cached_property
    def _module(self) -> Any:
        """The trained module on the CPU."""
        return self._loaded()[0]

    def _loaded(self) -> tuple[nn.Module, Card]:
        if self.weights is None:
            raise OptionError(
                f"{self.name}: weights=None, which only patch() can resolve. Give the path of "
                f"trained weights, or train some: {self.train}"
            )
        return load(type(self), Path(self.weights))


def load(kind: type[TrainedReducer], path: Path) -> tuple[Any, Card]:
    """The trained module of a file on the CPU, in evaluation mode, and its card.

    A file is read once for every change of it.
    """
    path = path.absolute()
    files = path, path.with_suffix(".json")
    return _load(kind, path, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=8)
def _load(kind: type[TrainedReducer], path: Path, _: tuple[int, ...]) -> tuple[nn.Module, Card]:
    from tokencomp.trained.cards import read

    tensors, card = read(path, kind.name)
    try:
        module = kind.module_of(card, path)
        module.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, OptionError) as error:
        raise WeightsError(
            f"{path} does not hold a {kind.name} ({error}). Train one: {kind.train}"
        ) from error
    return module.eval().requires_grad_(False), card


@lru_cache(maxsize=8)
def moved(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A module on a device; a copy for another device or dtype is made once."""
    weight = next(module.parameters())
    if (weight.device, weight.dtype) == (device, dtype):
        return module
    return copy.deepcopy(module).to(device, dtype)
