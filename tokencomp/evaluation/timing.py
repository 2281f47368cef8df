"""Time or work of the parts of one prefill, measured with hooks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from tokencomp.adapters.registry import adapter_for
from tokencomp.torchlib.hooks import Hooked


@dataclass(frozen=True)
class Split:
    """Seconds of one forward pass over a prompt.

    `vision` is everything before the decoder: tower, projector, scatter, positions. `reduce` is the
    reducer at every stage, with the cache afterwards; `prefill` the layers without it; `total` the
    whole call with its head.
    """

    vision: float
    reduce: float
    prefill: float
    total: float

    @property
    def llm(self) -> float:
        """What the LLM costs with the reducer: prefill + reduce."""
        return self.prefill + self.reduce


Parts = TypeVar("Parts")
"""A dataclass whose fields are seconds."""


class _Seconds:
    """A clock whose marks are in the stream of the device; others may count FLOPs."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1e3 if self.cuda else stop - start

    def finish(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class _Watch(Hooked):
    """Marks before and after the hooks of tokencomp on the decoder and its layers.

    The reducer's time is between a hook registered first (`prepend`) and one registered last. The
    patch registers hooks on layers while the decoder is called, so those are enclosed then.
    """

    def __init__(self, model: Any, clock: Any) -> None:
        adapter = adapter_for(model)
        self.clock = clock or _Seconds(next(adapter.decoder.parameters()).device)
        self.marks: dict[str, Any] = {}
        self.pairs: list[list[Any]] = []
        self._layer_hooks: list[Any] = []
        self._layers = adapter.layers
        self._on(adapter.model, self._named("start"), self._named("stop"))
        self._on(adapter.body, self._named("body"), None)
        self._on(adapter.decoder, self._named("decoder"), self._named("decoded"), last=False)
        self._handles += self._enclosing(adapter.decoder, pre=True)
        self._handles += self._enclosing(adapter.decoder, pre=False)
        self._handles.append(adapter.decoder.register_forward_pre_hook(self._enclose_layers))

    def _named(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.marks[name] = self.clock.mark()

        return hook

    def _on(self, module: Any, pre: Any, post: Any, last: bool = True) -> None:
        self._handles.append(module.register_forward_pre_hook(pre, prepend=True))
        if post is not None:
            self._handles.append(module.register_forward_hook(post, prepend=not last))

    def _enclose_layers(self, *_: Any) -> None:
        self._leave_layers()
        for layer in self._layers:
            self._layer_hooks += self._enclosing(layer, pre=True)
            if hasattr(layer, "self_attn"):  # a linear layer has no scores that a stage could read
                self._layer_hooks += self._enclosing(layer.self_attn, pre=False)

    def _leave_layers(self) -> None:
        for hook in self._layer_hooks:
            hook.remove()
        self._layer_hooks.clear()

    def _enclosing(self, module: Any, pre: bool) -> list[Any]:
        def opened(*_: Any) -> None:
            self.pairs.append([self.clock.mark()])

        def closed(*_: Any) -> None:
            self.pairs[-1].append(self.clock.mark())

        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        return [register(opened, prepend=True), register(closed)]

    def split(self) -> Split:
        self.clock.finish()
        span, marks = self.clock.between, self.marks
        inside = sum(span(*pair) for pair in self.pairs)
        finishing = span(*self.pairs[-1])
        # the decoder's own forward hooks start when its forward is done: they come on top
        prefill = span(marks["decoder"], marks["decoded"]) - (inside - finishing)
        return Split(
            vision=span(marks["body"], marks["decoder"]),
            reduce=inside,
            prefill=prefill,
            total=span(marks["start"], marks["stop"]),
        )

    def remove(self) -> None:
        self._leave_layers()
        super().remove()


def seconds(
    call: Callable[[], Any], timer: Callable[[], float] | None = None, repeats: int = 1
) -> float:
    """Mean seconds of a call that is repeated, until the device has ended the last one.

    The default `timer` is `torch.utils.benchmark.timer`; `time.process_time` gives processor time.
    `torch.utils.benchmark.Timer` makes two calls more before every measurement, too many for long
    prefills that take turns.
    """
    if timer is None:
        from torch.utils import benchmark

        timer = benchmark.timer
    start = timer()
    for _ in range(repeats):
        call()
    return (timer() - start) / repeats


@torch.inference_mode()
def prefill_split(model: Any, inputs: dict[str, Any], clock: Any = None) -> Split:
    """Time one prefill (last logits only) on the model's device; `clock` may count other things."""
    with _Watch(model, clock) as watcher:
        model(**inputs, use_cache=True, logits_to_keep=1)
        return watcher.split()


def interleaved(
    variants: Mapping[Any, Callable[[], Parts]], rounds: int = 5, budget: float | None = None
) -> dict[Any, Parts]:
    """Run all variants in turn, `rounds` times after a warm-up, and take medians.

    A variant runs once and returns a dataclass of seconds, such as `Split`. After `budget` seconds
    and three rounds no further round is started.
    """
    for run in variants.values():
        run()
    samples: dict[Any, list[Parts]] = {key: [] for key in variants}
    start = time.perf_counter()
    for done in range(rounds):
        if budget is not None and done >= 3 and time.perf_counter() - start > budget:
            break
        for key, run in variants.items():
            samples[key].append(run())
    return {key: median(splits) for key, splits in samples.items()}


def median(splits: list[Parts]) -> Parts:
    """Median of every part."""
    kind: Any = type(splits[0])
    return kind(
        **{f.name: statistics.median(getattr(s, f.name) for s in splits) for f in fields(kind)}
    )
