"""The hooks of a patched model: what is installed, and what they note about a call.

generate
    Notes where the prompt ends, and counts as one call; requests of `generate_batch` are checked.
top
    Notes `labels` and `logits_to_keep`, which decide whether the output needs full length.
body
    Notes where visual placeholders are, if the call has visual features.
decoder
    Compresses, see `tokencomp.engine.decoder`.

`generate`, top and body each run with a copy of the notes (`Noted`) of the call around them, to
which they add theirs. When they end, by an error too, the earlier notes are restored.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import TYPES, Adapter
from tokencomp.adapters.registry import DATA_PARALLEL
from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.cache import CacheOwner
from tokencomp.engine.call import CallHooks, Noted, RunningCalls
from tokencomp.engine.checks import FeaturelessPrompts, refuse_recomputation
from tokencomp.engine.decoder import DecoderHooks
from tokencomp.engine.later import ANY, ChunkedPrefill, begins_prompt, media_apart
from tokencomp.engine.layer_types import LayerTypes
from tokencomp.engine.layers import RelativePositions
from tokencomp.errors import (
    ModelInUseError,
    NoVisualInputError,
    OptionError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat
from tokencomp.torchlib.hooks import forget_compiled
from tokencomp.torchlib.replace import MethodReplacement

# One gate per model for all of its patches, one after the other; weak, so that models can be freed.
_GATES: WeakKeyDictionary[nn.Module, CallGate] = WeakKeyDictionary()
_CREATING = threading.Lock()


class CallGate:
    """Allows concurrent calls of a patched model, and refuses to change its patch meanwhile.

    Calls of a model without hooks are not counted, so the first `patch` does not see a call that is
    already running. That call stays uncompressed.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # changes can be nested
        self._running = 0

    @classmethod
    def of(cls, model: nn.Module) -> CallGate:
        """The gate of a model (unwrapped), shared by all of its patches."""
        with _CREATING:
            return _GATES.setdefault(model, cls())

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Block in which the patch changes; calls that begin meanwhile wait, and none may be
        running.
        """
        with self._lock:
            if self._running:
                raise ModelInUseError(
                    f"patch, set and unpatch change a model, and {self._running} of its calls are "
                    "running. Wait until they have returned, or use handle.disabled() to run a "
                    "prompt of one thread uncompressed."
                )
            yield

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count the block as a running call."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1


def with_types(arguments: dict[str, Any], types: Tensor) -> dict[str, Any]:
    """Add the modalities of features in `inputs_embeds` to the arguments of the body.

    `types` (B, L) is by sample and column of the caller of `generate`. Beams repeat samples, and
    the body gets only the columns that are not in the cache yet.
    """
    embeds = arguments.get("inputs_embeds")
    if embeds is None or arguments.get("input_ids") is not None:
        return arguments
    rows = types.repeat_interleave(embeds.shape[0] // types.shape[0], 0)
    return {**arguments, TYPES: rows[:, -embeds.shape[1] :]}


class Hooks(CallHooks):
    """Installs and removes the hooks of one patched model.

    State of a running call is thread-local; `stats`, the counts of the latest prefill, is shared.
    Dynamo cannot trace most hooks, so they run between the graphs of a compiled model.

    A plan without stages needs no hooks, unless caches or features of an earlier plan may still be
    used. With `strict`, prompts without media are refused.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        strict: bool,
        compact_positions: bool = False,
    ) -> None:
        LayerTypes.of(adapter.decoder)  # raises for unknown layer types
        super().__init__(adapter, RunningCalls())
        calls, self.compact_positions = self.calls, compact_positions
        self.gate = CallGate.of(adapter.model)
        self._owner, self._compressed = CacheOwner(compact_positions), False
        self._featureless = FeaturelessPrompts(adapter, strict)
        self.decoder = DecoderHooks(adapter, calls, plan, self._owner, self._featureless)
        prefill = ChunkedPrefill(adapter, calls, self.decoder.compresses)
        self._parts: list[Any] = [self.decoder, RelativePositions(adapter, calls), prefill]
        # The thinkers of Qwen-Omni ignore the argument and return all logits.
        self._slices = "logits_to_keep" in parameters_of(adapter.top)

    # -- installation ---------------------------------------------------------------------------

    def install(self) -> None:
        """Install the hooks of the plan; no call may be running."""
        if self._needed():
            self._hook()

    def change(self, plan: Plan) -> None:
        """Replace the plan; no call may be running."""
        self.decoder.change(plan)
        # No stage is left; or hooks are installed, and only those of stages change; or the first
        # stages.
        if not self._needed():
            self.remove()
        elif self._handles:
            self.decoder.put_in_force()
            forget_compiled()
        else:
            self._hook()

    def _needed(self) -> bool:
        """Whether hooks are needed: for prompts, or for caches and features of earlier plans."""
        self._compressed |= self.decoder.plan.active
        return self._compressed or self.decoder.tower.had_stage

    def _hook(self) -> None:
        top = self.adapter.top
        self._handles += [
            MethodReplacement(top, "generate", self._generate),
            MethodReplacement(top, "generate_batch", self._generate_batch),
            MethodReplacement(top, "_replicate_for_data_parallel", _refuse_copies),
        ]
        for module in dict.fromkeys((top, self.adapter.body)):
            # Instead of hooks, which torch skips when `forward` is called directly.
            run = functools.partial(self._forward, module)
            self._handles.append(MethodReplacement(module, "forward", run))
        for part in (*self._parts, self.adapter):
            part.install()
        forget_compiled()
        self._owner.active = True

    def remove(self) -> None:
        """Remove all hooks, while no call is running; safe to call twice."""
        if not self._handles:
            return
        # First of all: compressed caches raise from here on, also if a removal below fails.
        self._owner.active = False
        super().remove()
        for part in reversed(self._parts):
            part.remove()
        self.adapter.uninstall()
        forget_compiled()

    # -- running calls --------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces `generate`, which calls the model with the prompt and drafted or new tokens.

        Only here is the end of the prompt known. Media are encoded before the model is called, so
        the whole of it counts as one call: features of one setting must not be used with the plan
        of another.
        """
        state, types = self.calls.state, None
        if TYPES in kwargs and TYPES not in parameters_of(self.adapter.top):
            # transformers would raise for it
            types, embeds = kwargs.pop(TYPES), kwargs.get("inputs_embeds")
            if embeds is not None and types.shape != embeds.shape[:2]:
                raise OptionError(
                    f"{TYPES} of shape {tuple(types.shape)} with inputs_embeds of shape "
                    f"{tuple(embeds.shape)}: expected one number per column, "
                    f"{tuple(embeds.shape[:2])}."
                )
        # `generate` takes ids by two names and as its first argument.
        ids = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
        arguments = {**kwargs, "input_ids": next((x for x in ids if x is not None), None)}
        shown = [arguments.get(name) for name in ("inputs_embeds", "input_ids")]
        columns = next((int(x.shape[1]) for x in shown if isinstance(x, Tensor)), None)
        earlier = state.noted
        state.noted = replace(
            earlier, columns=columns, types=types, arguments=arguments, encoded=[]
        )
        try:
            with self.gate.call():
                return original(*args, **kwargs)
        finally:
            state.noted = earlier

    def _generate_batch(
        self,
        original: Callable[..., Any],
        inputs: Sequence[Sequence[int]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Replaces `generate_batch` (continuous batching), which takes only token ids.

        Text runs as without a patch. Media, or placeholders that none would fill, are refused here:
        requests run in another thread, where an error only ends them.
        """
        if self.decoder.compresses():
            names = self.adapter.placeholders
            placeholders = any(token in names for prompt in inputs for token in prompt)
            if placeholders or self.adapter.feature_modalities(kwargs):
                raise UnsupportedCacheError(
                    "continuous batching takes token ids alone, and this call brings images or "
                    "videos, or placeholders for them, which the model would not see. Use "
                    "model.generate(...), one prompt or a padded batch at a time, or "
                    "handle.disabled()."
                )
            if self._featureless.strict:
                raise NoVisualInputError(
                    "strict=True, and continuous batching takes token ids alone, so that no prompt "
                    "brings an image or video. Use model.generate(...), or patch(..., "
                    "strict=False)."
                )
        return original(inputs, *args, **kwargs)

    def _forward(
        self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Replaces `forward` of the model and of its body: runs it with notes for the decoder.

        If there is nothing to note, Dynamo traces it; else it runs between compiled graphs.
        """
        if torch.compiler.is_compiling() and not self.decoder.breaks_graph(module, args, kwargs):
            return original(*args, **kwargs)
        state, arguments = self.calls.state, compat.bind(module, args, kwargs)
        earlier, state.call = state.noted, None
        state.noted = replace(earlier, encoded=[*(earlier.encoded or ())])
        try:
            with self.gate.call():
                if module is self.adapter.top:
                    self._note_call(arguments, state.noted)
                if module is self.adapter.body:
                    self._note_media(arguments, state.noted)
                return original(*args, **kwargs)
        finally:
            state.noted, state.call = earlier, None
            if state.weighs:
                self.decoder.weights.end()  # torch runs no hook after a KeyboardInterrupt

    @compat.not_compiled
    def _note_call(self, arguments: dict[str, Any], noted: Noted) -> None:
        """Note the labels, and which logits the call must return."""
        keep, labels = arguments.get("logits_to_keep", 0), arguments.get("labels")
        # A loss reads the logits of all columns, and a tensor of indices can name any of them.
        if labels is not None or not isinstance(keep, int):
            keep = 0
        noted.grad = torch.is_grad_enabled()
        noted.labels, noted.logits = labels, keep if self._slices else 0
        noted.drafts = max(keep - 1, 0)  # assisted decoding: speculative tokens at the end

    @compat.not_compiled
    def _note_media(self, arguments: dict[str, Any], noted: Noted) -> None:
        """Note where the visual features of a call go."""
        noted.in_body, noted.mask = True, arguments.get("attention_mask")
        noted.inputs = noted.modalities = None
        noted.apart = frozenset()
        # At ratio 0 or in `disabled()` media enter whole, and `delta` cannot compare later ones
        # with them.
        if not self.decoder.compresses():
            noted.inputs, noted.apart = arguments, media_apart(self.adapter, arguments)
            return
        if noted.types is not None:
            arguments = with_types(arguments, noted.types)
        modalities = self.adapter.modalities(arguments)
        if modalities is not None:
            # Labels and drafts determine where the question ends.
            if noted.grad and (noted.labels is not None or noted.drafts):
                refuse_recomputation(self.adapter.top, "its labels")
            noted.grad = torch.is_grad_enabled()
            noted.inputs, noted.modalities = arguments, modalities.cpu()
            return
        # Embeddings without types: any modality may be among them.
        if arguments.get("input_ids") is None:
            noted.apart = ANY
        if begins_prompt(arguments):
            self.decoder.stats = None  # those of an earlier prompt
            self._featureless.meet(arguments)


def _refuse_copies(original: Callable[..., Any]) -> Any:
    raise UnsupportedModelError(DATA_PARALLEL)
