"""The reference of all checks: the whole model at full length, without the package.

A dropped token is hidden from the layers after its stage, by layer type:

* attention (full, sliding, chunked, indexed): its column is hidden in the mask that transformers
builds for the full-length prompt, so windows are measured in original positions; * linear mixers
(recurrences, convolutions): the mixer runs only on the kept rows.

Tokens that are merged are averaged into kept ones before the first layer, and attention logits gain
the logarithm of how many tokens a column represents.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.engine.stats import Stats
from tokencomp.plan.plan import Plan
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.torchlib.compat import CACHE_NAMES, bind

CACHES = (*CACHE_NAMES, "cache_params")
CONVOLUTION_MASK = "conv_mask"
Gains = Callable[[], Tensor | None]
MASKS = ("attention_mask", CONVOLUTION_MASK, "mask", "padding_mask")


class OracleError(Exception):
    """A layer whose mask has a form that the reference cannot edit."""


def columns_left(stats: Stats, plan: Plan, real: Tensor, depth: int) -> list[Tensor]:
    """By layer of `depth`: the `real` columns (B, L) that are kept according to the stats."""
    numbers = {stage.layer: i for i, stage in enumerate(plan.stages)}
    current, left = real.clone(), []
    for row, spans in enumerate(stats.spans):
        _leave(current[row], spans, stats.tower_kept(row))
    for layer in range(depth):
        if layer in numbers:
            for row in range(len(stats.spans)):
                _leave(current[row], stats.spans[row], stats.kept(row)[numbers[layer]])
        left.append(current.clone())
    return left


def _leave(columns: Tensor, spans: Sequence[VisualSpan], kept: list[list[int]]) -> None:
    """Mark in `columns` (L,) the offsets that are kept of every span, and no others."""
    for span, offsets in zip(spans, kept, strict=True):
        columns[span.start : span.stop] = False
        columns[[span.start + offset for offset in offsets]] = True


def merged(embeds: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
    """Inputs of a decoder (B, L, d) in which tokens that left at entry are merged, by a plain loop.

    Also returns the logarithm of the number of tokens that every column represents, (B, L). A token
    goes to the kept patch of its span with the largest cosine.
    """
    result, sizes = embeds.clone(), torch.ones(embeds.shape[:2])
    for b, spans in enumerate(stats.spans):
        for span, kept in zip(spans, stats.kept(b)[0], strict=True):
            fixed = {*span.special, *span.text}
            targets = [span.start + o for o in kept if o not in fixed]
            groups = {column: [column] for column in targets}
            for o in set(range(span.stop - span.start)) - fixed - set(kept):
                x = embeds[b, span.start + o]
                near = torch.cosine_similarity(x, embeds[b, targets], dim=1)
                groups[targets[int(near.argmax())]].append(span.start + o)
            for column, members in groups.items():
                result[b, column] = embeds[b, members].mean(0)
                sizes[b, column] = len(members)
    return result, sizes.log()


@contextlib.contextmanager
def hidden(
    layers: Iterable[nn.Module], left: list[Tensor], gains: Gains = lambda: None
) -> Iterator[None]:
    """Hide dropped tokens from every decoder layer inside the block; attention must be eager.

    `left` (B, L): by layer, the columns that are real and not dropped before it; for layers that
    all attend also (B, L, L), by query and key. `gains` gives what attention logits gain, (B, L).
    """
    undo: list[Any] = []
    try:
        for layer, mask in zip(layers, left, strict=True):
            mixers = [m for m in layer.modules() if is_linear_mixer(m)]
            for mixer in mixers:
                mixer.forward = _on_rows(mixer.forward, mask)
                undo.append(lambda m=mixer: m.__dict__.pop("forward"))
            others = (m for m in layer.modules() if m is not layer and m not in mixers)
            hook = _hiding(mask, gains, required=any(_takes(m, "attention_mask") for m in others))
            undo.append(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
    finally:
        for step in undo:
            step()


def is_linear_mixer(module: nn.Module) -> bool:
    """Whether a module mixes tokens through a convolution (and a recurrence, if it has one)."""
    if any(isinstance(child, nn.Conv1d) for child in module.children()):
        return True
    return _takes(module, CONVOLUTION_MASK) and not any(
        _takes(inner, CONVOLUTION_MASK) for inner in module.modules() if inner is not module
    )


def _hiding(left: Tensor, gains: Gains, required: bool) -> Any:
    """A hook of a decoder layer: the mask hides the columns that are not `left`, and adds `gains`.

    If a mask is `required`, a call without a 4-D one raises `OracleError`.
    """

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = bind(module, args, kwargs)
        for name in list(kwargs)[: len(args[:1])]:
            del kwargs[name]  # hidden states stay positional: transformers records args[0]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            if (added := gains()) is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape).masked_fill(
                        ~mask, torch.finfo(torch.float32).min
                    )
                mask = mask + added[:, None, None, -mask.shape[-1] :]
            gone = ~(left if left.ndim == 3 else left[:, None])[:, None, :, -mask.shape[-1] :]
            if mask.dtype == torch.bool:
                mask = mask.masked_fill(gone, False)
            else:  # eager softmax is float32 even if the mask is float64
                low = max(torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min)
                mask = mask.masked_fill(gone, low).clamp(min=low)
            return args[:1], {**kwargs, "attention_mask": mask}
        if required:
            form = "none" if mask is None else f"{mask.ndim} dimensions"
            raise OracleError(f"{type(module).__name__} gets an attention mask of {form}")
        return None

    return hook


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _on_rows(forward: Any, left: Tensor) -> Any:
    """Forward of a mixer on the kept rows, sample by sample; one sample alone has its cache."""

    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        removed = MASKS if len(left) == 1 else (*CACHES, *MASKS)
        kwargs = {k: None if k in removed else v for k, v in kwargs.items()}
        # Of what is not named, only further hidden states count: weights of a convolution.
        args = tuple(a for a in args if isinstance(a, Tensor) and a.ndim == 3)
        result, rest = torch.zeros_like(hidden_states), None
        for row in range(hidden_states.shape[0]):
            rows = left[row, -hidden_states.shape[1] :].nonzero()[:, 0]

            def pick(value: Any, row: int = row, rows: Tensor = rows) -> Any:
                own = isinstance(value, Tensor) and value.shape[:2] == hidden_states.shape[:2]
                return value[row : row + 1, rows] if own else value

            named = {k: pick(v) for k, v in kwargs.items()}
            out = forward(pick(hidden_states), *map(pick, args), **named)
            if isinstance(out, tuple):
                out, rest = out[0], out[1:]
            result[row, rows] = out[0]
        return result if rest is None else (result, *rest)

    return run
