"""What the vision tower's own attention knows of a visual token, without touching its backend.

One block of the tower is watched: its keys, or the attention that every patch receives in it, are
recomputed from the input of the block's attention and carried along to the decoder's visual tokens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import TowerCall
from tokencomp.adapters.instance_method import MethodReplacement
from tokencomp.engine import compat
from tokencomp.engine.parallel import gather_heads
from tokencomp.errors import OptionError, SpanError
from tokencomp.tokens import TOWER_ATTENTION, TOWER_KEYS, TOWER_SIGNALS, Signal, VisualSpan

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tokencomp.adapters.base import Adapter
    from tokencomp.plan import Plan


@dataclass
class _Seen(threading.local):
    grids: Tensor | None = None
    calls: deque[TowerCall] = field(default_factory=lambda: deque(maxlen=2))


class TowerProbe:
    """Watches the last block but one of the vision tower for the signals that a plan needs.

    The last but one, as AIM (arXiv 2412.03248) and VisionZip (arXiv 2412.04467) do: the last block
    of many towers is not used, and its attention serves pooling. While `off` says so, nothing is
    computed or kept.
    """

    def __init__(
        self, adapter: Adapter, wanted: frozenset[Signal], off: Callable[[], bool] = lambda: False
    ) -> None:
        self.adapter, self.wanted, self.off = adapter, wanted, off
        self._seen = _Seen()
        self._handles: list[RemovableHandle | MethodReplacement] = []

    def install(self) -> None:
        tower, packer = self.adapter.tower, self.adapter.packer
        blocks = attention_blocks(tower)
        block = blocks[max(len(blocks) - 2, 0)]
        self._handles += [
            tower.register_forward_pre_hook(self._tower, with_kwargs=True),
            block.register_forward_pre_hook(self._block, with_kwargs=True),
        ]
        if packer:
            self._handles.append(MethodReplacement(self.adapter.body, packer, self._pack))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable
    def _tower(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # torch leaves kwargs out if another thread removes the hook while this one is called
        kwargs = kwargs or {}
        self._seen.grids = compat.bind(tower, args, kwargs).get("grid_thw")

    @torch.compiler.disable
    @torch.no_grad()
    def _block(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.off():
            return
        given = compat.bind(attn, args, kwargs)
        q, k = queries_and_keys(attn, given)
        values: dict[Signal, Tensor] = {}
        if TOWER_KEYS in self.wanted:
            values[TOWER_KEYS] = k.flatten(-2).float()
        if TOWER_ATTENTION in self.wanted:
            received = attention_received(
                *_rotated(attn, q, k, given), given.get("cu_seqlens"), self.adapter.class_token
            )
            values[TOWER_ATTENTION] = received[..., None]
        self._seen.calls.append(TowerCall(values, self._seen.grids))

    def _pack(self, original: Callable[..., Any], features: Any, *args: Any, **kwargs: Any) -> Any:
        if self._seen.calls:
            kwargs_now = {k: v for k, v in kwargs.items() if k != "image_newline"}
            self._seen.calls[-1].packing = [len(f) for f in features], args, kwargs_now
        return original(features, *args, **kwargs)

    def collect(self, spans: list[list[VisualSpan]]) -> dict[Signal, list[list[Tensor]]]:
        """Values of every span by signal: float32 (length, d), 0 at tokens that carry no patch.

        Parameters
        ----------
        spans
            Of every row of the batch; the latest calls of the tower encoded them.

        Raises
        ------
        SpanError
            The tower was not called for this prompt (features made outside of the model), or for
            other media.
        """
        kinds = [k for k in ("image", "video") if any(s.kind == k for row in spans for s in row)]
        calls = list(self._seen.calls)[len(self._seen.calls) - len(kinds) :]
        self._seen.calls.clear()
        if len(calls) < len(kinds):
            raise SpanError(
                "the reducer reads the vision tower's attention, but the tower did not run for "
                "this prompt. Pass pixels, not precomputed features, or use another signal."
            )
        found = {}
        for name in self.wanted:
            tokens = {
                kind: self.adapter.tower_tokens(call.values[name], kind, call)
                for kind, call in zip(kinds, calls, strict=True)
            }
            found[name] = _spread(spans, tokens)
        return found


def check_signals(plan: Plan, adapter: Adapter) -> frozenset[Signal]:
    """Signals of the vision tower that the reducers of `plan` need.

    Raises
    ------
    OptionError
        The family does not say how patches become tokens.
    """
    reducers = {n: s.reducer.name for s in plan.stages for n in TOWER_SIGNALS & s.reducer.needs}
    if reducers and "tower" not in adapter.signals:
        raise OptionError(
            f"reducer {next(iter(reducers.values()))!r} asks for the vision tower's attention, "
            f"which {adapter.family} does not offer here. Use another signal or metric."
        )
    return frozenset(reducers)


def attention_blocks(tower: nn.Module) -> list[nn.Module]:
    """Self-attention modules of a tower, in order: those with a fused or separate q and k."""
    return [
        m
        for m in tower.modules()
        if hasattr(m, "qkv") or (hasattr(m, "q_proj") and hasattr(m, "k_proj"))
    ]


def queries_and_keys(attn: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """q and k of all heads before any rotation, shape (B, S, heads, head_dim)."""
    x = given["hidden_states"]
    x = x[None] if x.ndim == 2 else x
    if hasattr(attn, "qkv"):
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
        return q, k
    q, k = attn.q_proj(x), attn.k_proj(x)
    q, k = getattr(attn, "q_norm", nn.Identity())(q), getattr(attn, "k_norm", nn.Identity())(k)
    # A sharded tower has some of the heads here, and `num_heads` may count all of them.
    heads = (-1, attn.head_dim)
    q, k = q.unflatten(-1, heads), k.unflatten(-1, heads)
    return gather_heads(attn, q, dim=-2), gather_heads(attn, k, dim=-2)


def _rotated(attn: Any, q: Tensor, k: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    tables = given.get("position_embeddings")
    return (q, k) if tables is None else compat.rotate_vision(attn, q, k, *tables)


def attention_received(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, class_token: bool
) -> Tensor:
    """Attention that every patch receives, mean over heads, float32.

    From the class token where there is one (FasterVLM, arXiv 2412.01818), else the mean over all
    patches that may attend to it (VisionZip, arXiv 2412.04467).

    Parameters
    ----------
    q, k : Tensor, shape (B, S, heads, head_dim)
        B = 1 with `cu_seqlens`, the bounds of independent sequences.

    Returns
    -------
    Tensor, shape (B, S)
    """
    from tokencomp.kernels import attention_colsum

    if cu_seqlens is not None:
        bounds = cu_seqlens.to(torch.int32)
        lengths = bounds.diff().long()
        weights = (1.0 / lengths.float()).repeat_interleave(lengths)
        return attention_colsum(
            q[0], k[0], weights, cu_seqlens_q=bounds, cu_seqlens_k=bounds, causal=False
        )[None]
    rows = 1 if class_token else q.shape[1]
    weights = torch.full((rows,), 1.0 / rows, device=q.device)
    q, k = q[:, :rows].transpose(1, 2), k.transpose(1, 2)
    return attention_colsum(
        q, k, weights, q_index=torch.arange(rows, device=q.device), causal=False
    )


def _spread(spans: list[list[VisualSpan]], tokens: dict[str, Tensor]) -> list[list[Tensor]]:
    """Hand out values of patches, in order, to spans; beams repeat rows one after the other."""
    total = {
        kind: sum(s.grid[0] * s.grid[1] * s.grid[2] for row in spans for s in row if s.kind == kind)
        for kind in tokens
    }
    copies = {kind: n / max(len(tokens[kind]), 1) for kind, n in total.items()}
    times = next(iter(copies.values()), 1.0)
    if times != int(times) or len(spans) % int(times or 1) or len(set(copies.values())) > 1:
        told = ", ".join(f"{len(tokens[k])} {k} patches for {n} tokens" for k, n in total.items())
        raise SpanError(
            f"the vision tower encoded {told}: not the media of this prompt. Let one call encode "
            "and read them, or use a reducer that does not ask for the tower's attention."
        )
    at, found = dict.fromkeys(tokens, 0), []
    for row in spans[:: int(times) or 1]:
        values = []
        for span in row:
            source, start = tokens[span.kind], at[span.kind]
            patches = ~span.special_mask(source.device)
            table = source.new_zeros(span.length, source.shape[-1])
            at[span.kind] = start + int(patches.sum())
            table[patches] = source[start : at[span.kind]]
            values.append(table)
        found += [values] * (int(times) or 1)
    return found
