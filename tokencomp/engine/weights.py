"""Merging with weights: a merged token counts as much as the tokens that it replaces.

A merged token is the mean of n tokens. Proportional attention adds log(n) to its softmax logit
(ToMe, arXiv 2210.09461), which equals n identical keys:

    columns of the prompt   0  1  2  3  4  5  6  7
    rows, also in a cache   0  1        4     6  7      weights 1, 4, 1, 1, 1

The cache holds plain keys, so that layers of any class (quantized, static, offloaded) store them as
without a patch. The weights are in the row map of the layers (`RowMap.weights`).

    stage        `merge_rest` (`reducers/choice.py`) averages dropped patches into the nearest kept
    prefill      `RowWeights` widens queries and keys by a few dimensions, whose product is log(n).
                 SDPA, FlashAttention and eager attention run unchanged, without a mask
    later calls  `carrier` decides, for every call: a mask of numbers, which adds log(n) without
                 code per layer (`masks.py`; `RowMap.log_weights` for one token); or wider heads
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call import Call, CallHooks, RunningCalls
from tokencomp.engine.checks import refuse_recomputation
from tokencomp.errors import MergeWarning, UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat
from tokencomp.torchlib.checkpointing import checkpoint_functions
from tokencomp.torchlib.replace import AttributeView, MethodReplacement, shallow_copy

NAME = "tokencomp_proportional"
MULTIPLE = 8  # FlashAttention requires head dimensions that are multiples of 8
MOST_DIMS = 256  # largest head dimension of FlashAttention

# -- later calls: a mask of numbers, or wider heads ---------------------------------------------


class Carrier(NamedTuple):
    """How a later call adds log(weight) to the attention logits, and why so."""

    # Dtype of a mask of numbers; None: heads get wider, as in a prefill.
    numbers: torch.dtype | None
    reason: str


def carrier(
    backend: str, device: str, dtype: torch.dtype, masked: bool, copies_keys: bool
) -> Carrier:
    """Decide how calls after the prompt add log(weight).

    A mask of numbers adds no call per layer. In bfloat16 it would round log(weight) to 8 bits, so
    that it is float32 where attention takes that without a slower kernel.

    `backend` is that of attention, `device` a type such as "cuda", `dtype` that of queries and
    keys. `masked`: whether SDPA gets a mask in any case, as for several tokens and for a static
    cache. `copies_keys`: see `compat.copies_grouped_keys`.
    """
    if backend == "eager":
        return Carrier(dtype, "eager attention adds its masks to the logits in any case")
    if backend != "sdpa":
        return Carrier(None, f"{backend} takes no mask of numbers, or nobody has measured one")
    numbers = torch.float32 if device == "cpu" else dtype
    if masked:
        return Carrier(numbers, "SDPA gets a mask here in any case")
    if device != "cpu":
        return Carrier(None, f"on {device} a mask rules out the FlashAttention kernel of SDPA")
    if copies_keys:
        return Carrier(None, "SDPA of this transformers release copies grouped keys under a mask")
    return Carrier(numbers, "SDPA on a CPU is no slower with a mask")


# -- wider heads --------------------------------------------------------------------------------


class BiasDims(NamedTuple):
    """Additional dimensions of attention heads, see `bias_dims`."""

    of_queries: Tensor
    of_keys: Tensor


@dataclass
class Weighing:
    """What attention has requested of the weights of one call."""

    missing: set[int]  # decoder layers whose attention has not asked yet
    # By segment and form of the attention call.
    dims: dict[Any, BiasDims] = field(default_factory=dict)


class RowWeights(CallHooks):
    """Adds log(weight) to the attention logits of a call by wider heads.

    While such a call runs, the `config` of attention modules names a function that widens
    queries, keys and values and then calls the user's backend. Without weights, as in calls of
    other threads, it only calls the backend.

    A backward pass recomputes checkpointed layers after their call has ended. The functions by
    which transformers and torch's `CheckpointWrapper` checkpoint are therefore wrapped to restore
    the call; other kinds of checkpointing are refused.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        super().__init__(adapter, calls)
        self._handles = []  # created here, because calls of several threads append to it
        self._views: list[tuple[Any, AttributeView]] = []  # of the configs of attention modules
        self._backends: list[tuple[Any, str]] = []  # these configs, without repetition
        self._lock, self._running = threading.Lock(), 0

    def remove(self) -> None:
        """Remove all replacements; safe to call twice."""
        super().remove()
        self._views = []

    def begin(self) -> Weighing:
        """Widen attention for a call of this thread, until `end`.

        The first of several running calls sets `attend` in the attention modules, by views of their
        configs. Views are kept for later calls: under FlashAttention every decode step needs them.
        """
        state = self.calls.state
        state.weighs = True
        with self._lock:
            self._running += 1
            if self._running == 1:
                if not self._views_fit():
                    self._make_views()
                for module, view in self._views:
                    vars(view.tokencomp_module)["training"] = module.training
                    vars(module)["config"] = view
        if torch.is_grad_enabled() and state.recomputed is None:
            # Before every call, because gradient_checkpointing_enable replaces the functions.
            for module, name in checkpoint_functions(self.adapter.decoder):
                if not MethodReplacement.replaces(getattr(module, name)):
                    replaced = MethodReplacement(module, name, self._checkpoint)
                    self._handles.append(replaced)
        return Weighing({module.layer_idx for module, _ in self._views})

    def _views_fit(self) -> bool:
        """Whether the views are those of the modules' configs, and of the backends in use."""
        for module, view in self._views:  # a plain loop: runs for every token
            if vars(module).get("config") is not view.tokencomp_original:
                return False
        names = [compat.attention_implementation(config) == name for config, name in self._backends]
        return bool(self._views) and all(names)

    def _make_views(self) -> None:
        compat.register_attention(NAME, attend)
        self._views, configs = [], dict[int, Any]()
        for module in attention_modules(self.adapter.layers):
            view = AttributeView(
                module.config,
                _attn_implementation=NAME,
                tokencomp_bias_dims=self._bias_dims,
                tokencomp_module=shallow_copy(module),  # backends read its config
                tokencomp_backend=compat.attention_function(module, module.config),
            )
            self._views.append((module, view))
            configs[id(module.config)] = module.config
        self._backends = [(c, compat.attention_implementation(c)) for c in configs.values()]

    def end(self) -> None:
        """End the call of this thread, which `begin` has begun; the last restores the configs."""
        self.calls.state.weighs = False
        with self._lock:
            self._running -= 1
            if self._running:
                return
            for module, view in self._views:
                if vars(module).get("config") is view:
                    vars(module)["config"] = view.tokencomp_original

    def _checkpoint(
        self,
        original: Callable[..., Any],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Checkpoint (a part of) a layer with a function that restores its call when recomputed.

        The patch may be removed before the backward pass, so recomputation widens attention itself.
        """
        call = self.calls.state.recomputed or self.calls.state.call
        if call is None or call.weighing is None:
            return original(function, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            state = self.calls.state  # when recomputed: of the thread of the backward pass
            before, state.recomputed = (state.recomputed, state.weighs), call
            self.begin()
            try:
                return function(*args, **kwargs)
            finally:
                self.end()
                state.recomputed, state.weighs = before

        return original(run, *args, **kwargs)

    @compat.not_compiled
    def _bias_dims(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> BiasDims | None:
        """Additional dimensions of an attention call, cached by segment; None without weights."""
        state, rows = self.calls.state, key.shape[-2]
        call = state.recomputed or state.call
        if call is None or call.weighing is None:
            return None
        segment, weighing = call.segment_of[layer], call.weighing
        weighing.missing.discard(layer)
        if not segment.weighted:
            return None
        if state.noted.grad and state.recomputed is None:
            # The first run of reentrant checkpointing has no gradients.
            first, lost = not torch.is_grad_enabled(), "the weights of merged tokens"
            refuse_recomputation(self.adapter.decoder, lost, ", or use merge=False", first)
        case = segment.first, rows, query.shape[-1], query.dtype, key.dtype, key.device, scaling
        if case not in weighing.dims:
            layer_type, batch = call.layer_types.types[layer], key.shape[0]
            weights = call.key_weights(segment, layer_type, rows, batch, key.device)
            weighing.dims[case] = bias_dims(query, key, weights, scaling)
        found: BiasDims = weighing.dims[case]
        return found

    def check(self, call: Call) -> None:
        """Refuse a call if attention of some layers does not call the backend that its config
        names.
        """
        missing = {i for i in call.weighing.missing if call.segment_of[i].weighted}
        if missing:
            raise UnsupportedModelError(
                f"merge=True: the attention of layers {sorted(missing)} of "
                f"{type(self.adapter.decoder).__name__} has not asked for the weights of merged "
                "tokens, because it does not call the backend that its config names. Use "
                "merge=False."
            )


def attention_modules(layers: Iterable[nn.Module], known: bool = False) -> list[Any]:
    """Attention modules of decoder layers, whose configs name their backend.

    Refused are layers without one; and modules without a config, with capped logits (weights would
    be capped too), with an indexer, which adds its mask only under the backends that it knows, or
    (`known`) not known to call a backend.
    """
    # Wrappers, as of torch.compile, forward attributes of the inner module.
    modules = [m for layer in layers for m in layer.modules() if "layer_idx" in vars(m)]
    found: list[Any] = [m for m in modules if hasattr(m, "is_causal")]
    wrong = [m for m in found if getattr(m, "indexer", None) or getattr(m, "config", None) is None]
    wrong += [m for m in found if known and not reads_backend(m)]
    if wrong or not found:
        names = " and ".join(sorted({type(m).__name__ for m in wrong or modules}))
        raise UnsupportedModelError(
            f"merge=True: the weights of merged tokens do not reach the attention of {names}. "
            "Use merge=False."
        )
    for module in found:
        if getattr(module, "attn_logit_softcapping", None):
            raise UnsupportedModelError(
                f"merge=True: {type(module).__name__} caps its attention logits "
                "(attn_logit_softcapping of its config), and the weights of merged tokens would be "
                "capped with them. Use merge=False."
            )
    return found


def reads_backend(module: Any) -> bool:
    """Whether an attention module reads the backend of its config; remote code may not."""
    owners = [vars(module), *map(vars, type(module).__mro__)]
    for forward in (owner["forward"] for owner in owners if "forward" in owner):
        names = getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ())
        if "_attn_implementation" in names:
            return True
        if "super" not in names:
            return False
    return False


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function that widens the tensors and calls the user's backend.

    Takes queries (B, H, q, d), keys and values (B, kv heads, k, d); returns (B, q, H, d) and
    attention weights or None, as all attention functions of transformers.
    """
    config, dim, more = module.config, value.shape[-1], None
    if isinstance(config, AttributeView):
        module, backend = config.tokencomp_module, config.tokencomp_backend
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        more = config.tokencomp_bias_dims(module.layer_idx, query, key, scale)
    else:  # restored by another thread meanwhile
        backend = compat.attention_function(module, config)
    if more is not None:
        (query, key, value), scaling = widen(query, key, value, more), scale
    out, weights = backend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return out if more is None else out[..., :dim].contiguous(), weights


def bias_dims(query: Tensor, key: Tensor, weights: Tensor, scaling: float) -> BiasDims:
    """Dimensions that increase scaling · q·k by log(weight) of every key.

    The head dimension grows by at least two, to a multiple of 8. The first new dimension holds the
    logarithm in the dtype of the keys, the second its rounding error.

    Takes queries (B, H, q, d), keys (B, kv heads, k, d), and float32 (B, m): the number of tokens
    that each of the first m keys represents (of the first k, if m is greater); other keys represent
    one. Returns dimensions for all queries, (more,), and for every key, (B, 1, k, more).
    """
    rows, extra = key.shape[-2], extra_dims(query.shape[-1])
    factor = 2.0 ** round(-math.log2(scaling))  # a power of two is exact in every dtype
    logs = weights.to(key.device).float().log() / (scaling * factor)
    logs = nn.functional.pad(logs, (0, rows - logs.shape[1]))
    # scaling · factor · (high + low) = log(weight), with the rounding error of `high` in `low`.
    high = logs.to(key.dtype)
    of_keys = key.new_zeros(key.shape[0], 1, rows, extra)
    of_keys[:, 0, :, 0], of_keys[:, 0, :, 1] = high, logs - high.float()
    of_queries = query.new_zeros(extra)
    of_queries[:2] = factor
    return BiasDims(of_queries, of_keys)


def widen(
    query: Tensor, key: Tensor, value: Tensor, more: BiasDims
) -> tuple[Tensor, Tensor, Tensor]:
    """Append dimensions to queries and keys, and zeros to values: backends may need equal sizes."""
    query, key = appended(query, more.of_queries), appended(key, more.of_keys)
    return query, key, nn.functional.pad(value, (0, query.shape[-1] - value.shape[-1]))


def appended(x: Tensor, dims: Tensor) -> Tensor:
    """Append dimensions to the last axis of x; their other axes are expanded."""
    return torch.cat([x, dims.expand(*x.shape[:-1], dims.shape[-1])], dim=-1)


def extra_dims(dim: int) -> int:
    """Number of dimensions added to heads of `dim` dimensions: at least two."""
    return -(-(dim + 2) // MULTIPLE) * MULTIPLE - dim


def merging_where_possible(plan: Plan, adapter: Adapter) -> Plan:
    """Replace merge="auto" by merge=False if the model does not support merging.

    merge=True raises for attention without weights. For merge="auto" a `MergeWarning` says the
    reason, once per model class.
    """
    asked = any(stage.merge is True for stage in plan.stages)
    try:
        modules = attention_modules(adapter.layers, known=not asked)
        most = max(int(getattr(module, "head_dim", 0)) for module in modules)
        if not asked and most + extra_dims(most) > MOST_DIMS:
            raise UnsupportedModelError(
                f"merge=True: heads of {most} dimensions have no room for weights under "
                f"FlashAttention, which takes {MOST_DIMS}. Use merge=False."
            )
    except UnsupportedModelError as error:
        if asked:
            raise
        _warn_once(type(adapter.model).__qualname__, str(error))
        return plan.with_options(merge=False)
    return plan


@functools.cache
def _warn_once(model_class: str, reason: str) -> None:
    """Warn once per model class and process that it cannot merge: `patch` merges by default."""
    warnings.warn(f"merge='auto' drops here. {reason}", MergeWarning, stacklevel=6)
