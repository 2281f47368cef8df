"""What a patch does before, within and after a call of the decoder: the order of the passes.

    before   read ─► (plan) ─► checks ─► score ─► choose ─► gather        `_compress`
    within   layers: rows, masks and tables of their segment             `LayerHooks`
    after    restore: columns in the cache, output of full length        `_leave`

Each pass is a module of this name; `Call` is what they hand on.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structure import scales_queries
from tokencomp.engine.cache import CacheOwner, CompressedLayer, first_layer
from tokencomp.engine.call import Call, CallHooks, RunningCalls, ThreadState
from tokencomp.engine.checks import (
    TRACED,
    FeaturelessPrompts,
    check_cache,
    check_entered,
    check_prompt,
    check_ragged_turn,
    check_windows,
    refuse_missing,
    refuse_recomputation,
    rotary_modules,
)
from tokencomp.engine.choose import enter
from tokencomp.engine.gather import gather_arguments, sequence_lengths, text_positions
from tokencomp.engine.later import ChunkedPrefill, LaterTokens, begins_prompt
from tokencomp.engine.layers import LayerHooks
from tokencomp.engine.masks import Masks, split_mask
from tokencomp.engine.prompt import read_prompt, with_embeddings
from tokencomp.engine.restore import (
    note_padding,
    note_prompt,
    restore_maps,
    restore_states,
    whole_output,
)
from tokencomp.engine.stats import RatioCheck, Stats
from tokencomp.engine.tower.stage import TowerHooks
from tokencomp.engine.weights import RowWeights
from tokencomp.errors import UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat


class DecoderHooks(CallHooks):
    """Compresses what the decoder gets, and puts the plan in force on its layers and the tower.

    Attributes
    ----------
    plan
        The plan in force.
    stats
        Counts of the compressed prefill that ended last, in whichever thread.
    """

    def __init__(
        self,
        adapter: Adapter,
        calls: RunningCalls,
        plan: Plan,
        owner: CacheOwner,
        prefill: ChunkedPrefill,
        featureless: FeaturelessPrompts,
    ) -> None:
        super().__init__(adapter, calls)
        self.plan = plan
        self.stats: Stats | None = None
        self._owner, self._prefill, self._featureless = owner, prefill, featureless
        self._ratios = RatioCheck()
        self._weights = RowWeights(adapter, calls)
        self._later = LaterTokens(adapter, calls, owner.compact)
        self._layers = LayerHooks(adapter, calls)
        self.tower = TowerHooks(adapter, self.is_off)

    # -- installation ---------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the decoder, and its rotary modules where they must get other positions."""
        a = self.adapter
        before = a.decoder.register_forward_pre_hook(self._decoder, with_kwargs=True)
        self._handles.append(before)
        self._after(a.decoder, self._leave, self._has_call, always_call=True)
        for module in rotary_modules(a.decoder):
            if not a.mrope:
                self._before(module, self._true_positions, self._has_call)
        self.put_in_force()

    def put_in_force(self) -> None:
        """Hook what the stages of the plan need inside of the decoder and the tower."""
        self._layers.install(self.plan)
        self.tower.install(self.plan)

    def change(self, plan: Plan) -> None:
        """Undo `put_in_force`, and take another plan."""
        self._layers.withdraw()
        self.tower.remove()
        self.plan, self.stats = plan, None

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        super().remove()
        for part in (self._weights, self._layers, self.tower):
            part.remove()

    def is_off(self) -> bool:
        """Whether compression is off in this thread."""
        return self.calls.state.disabled > 0

    def compresses(self) -> bool:
        """Whether prompts with media are compressed in this thread."""
        return self.plan.active and self.calls.state.disabled == 0

    # -- before a call --------------------------------------------------------------------------

    def apart(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether a call that Dynamo traces is prepared between the graphs of a compiled model.

        Elsewhere there is nothing to do, or Dynamo traces what is done to the decoder. The call is
        one of the model, its body or its decoder.
        """
        if self.calls.state.noted.modalities is not None:
            return True
        arguments = compat.bind(module, args, kwargs)
        return not self._later.traceable(arguments, self.plan.active)

    def _decoder(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """A hook that Dynamo traces: it sets the mask of a step on a static cache."""
        if kwargs is None:  # see `tokencomp.torchlib.hooks`
            return None
        arguments = compat.bind(module, args, kwargs)
        if not torch.compiler.is_compiling() or self.apart(module, args, kwargs):
            return self._enter(module, arguments)
        return self._continue(arguments, compat.get_cache(arguments))

    def _continue(self, arguments: dict[str, Any], cache: Any) -> Any:
        """Arguments of later tokens; None where they stay as they are."""
        first = first_layer(cache)
        if not isinstance(first, CompressedLayer):
            return None
        arguments = dict(arguments)
        self._later.prepare(arguments, cache.layers, first)
        return (), arguments

    @compat.not_compiled
    def _enter(self, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Arguments of a decoder call; None where they stay as they are."""
        noted, cache = self.calls.state.noted, compat.get_cache(arguments)
        try:
            media = noted.modalities is not None and noted.modalities.numpy().any()
        except RuntimeError:  # of a tensor without values
            raise UnsupportedModelError(TRACED) from None
        if media:
            if torch.jit.is_tracing():
                raise UnsupportedModelError(TRACED)
            return self._compress(module, arguments, cache, self.calls.state)
        if not noted.in_body and self.compresses() and begins_prompt(arguments):
            self._featureless.meet(arguments)  # the decoder was called alone
        if self.tower.had_stage:
            self._refuse_missing(arguments)
        return self._continue(arguments, cache)

    def _compress(
        self, module: nn.Module, arguments: dict[str, Any], cache: Any, state: ThreadState
    ) -> Any:
        """Arguments of a prefill with visual tokens, of which the entry stage keeps some."""
        noted, plan = state.noted, self.plan.dropping if state.drops else self.plan
        if noted.grad:
            refuse_recomputation(self.adapter.body, "the places of its media")
        noted.grad = torch.is_grad_enabled()
        # Embeddings, with features in place, and a 2-D mask of padding.
        if arguments.get("inputs_embeds") is None:
            arguments = with_embeddings(module, arguments)
        if plan.tower is None and self.tower.had_stage:
            self._refuse_missing(arguments)
        check_cache(cache, bool(plan.layer_stages))
        if isinstance(first := first_layer(cache), CompressedLayer):
            first.check_patch()
        arguments, mask, prepared = dict(arguments), arguments.get("attention_mask"), None
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            arguments, prepared = split_mask(arguments, cache, noted.mask)
        # Read: spans, row map, counts of the plan. Nothing has changed yet.
        call, positions = read_prompt(self.adapter, arguments, cache, noted, plan)
        call.prepared, call.by_column = prepared, not self._owner.compact
        check_prompt(call)
        self._layers.follow_wrappers()
        state.call = call
        if call.merges:
            self._weights.begin()
        if self.tower.drop is not None or self.tower.probe is not None:
            self.tower.collect(call, noted.inputs or {})
        # Score, choose, gather: the rows that are kept.
        x, positions, columns = enter(call, arguments["inputs_embeds"], positions)
        if columns is not None:
            gather_arguments(arguments, columns, call.map.mask(x.device), call.width)
        set_arguments(call, arguments, x, positions)
        whole = len(call.segments) > 1 or not 0 < noted.logits <= call.tail
        if whole and "logits_to_keep" in arguments:
            # Decoders with shared keys (Gemma 4) cut their hidden states to these rows.
            arguments["logits_to_keep"] = 0
        if noted.chunk is not None:
            arguments = self._prefill.advance(module, arguments, call, noted.logits)
        return (), arguments

    def _refuse_missing(self, arguments: dict[str, Any]) -> None:
        """Refuse features of a tower stage in a call whose plan, or lack of one, has none.

        NaN in features that this call has encoded itself comes from the model.
        """
        if arguments.get("inputs_embeds") is None:
            return
        noted = self.calls.state.noted
        if not (noted.encodes or self.adapter.encodes(noted.inputs or {})):
            refuse_missing(arguments["inputs_embeds"])

    # -- within and after a call ----------------------------------------------------------------

    def _true_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Arguments of a rotary module, with the original positions of the kept tokens."""
        call: Any = self.calls.state.call
        if call.rotary is None:
            return None
        if self.calls.state.noted.grad:
            refuse_recomputation(self.adapter.decoder, "the positions of kept tokens")
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": call.rotary}
        hidden, _, *rest = args
        return (hidden, call.rotary, *rest), kwargs

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """The output of a decoder call with full length; None where it stays as it is."""
        state = self.calls.state
        call, state.call = state.call, None
        if state.weighs:
            self._weights.end()
        if call is None or out is None:
            return None
        if len(call.segments) > 1:
            check_entered(call.segments, module)
        cache = compat.get_cache(kwargs, out)
        if getattr(out, "attentions", None) is not None:
            out.attentions = restore_maps(out.attentions, call, getattr(cache, "layers", ()))
        if not call.compresses:
            note_padding(call, cache)
            return out
        if call.merges:
            self._weights.check(call)
        layer = note_prompt(call, cache, self._owner)
        if call.earlier:
            out = whole_output(out, call.earlier)
        self.stats = stats = Stats.of_call(call, layer)
        self._ratios.look(stats, call.plan)
        text_only = 0 < state.noted.logits <= call.tail
        if text_only and "logits_to_keep" in kwargs:
            # Where a decoder may cut its last state, the model takes a short one as it is.
            out.last_hidden_state = out.last_hidden_state[:, -state.noted.logits :]
        return restore_states(out, call.segments, call.width, text_only)


# -- arguments of the decoder for the rows of segment 0 -----------------------------------------


def set_arguments(call: Call, arguments: dict[str, Any], x: Tensor, positions: Tensor) -> None:
    """Set embeddings, positions and mask of a decoder call in place.

    Parameters
    ----------
    x : Tensor, shape (B, n, d)
        Embeddings of the rows that are kept.
    positions : Tensor of int64, shape (3, B, n) for M-RoPE, else (B, n)
        Their original positions.
    """
    first, rows = call.segments[0], call.map
    mask = rows.mask(x.device)
    if rows.packed:
        arguments.update(sequence_lengths(rows, arguments))
        if call.cache is None and not arguments.get("use_cache"):
            mask = None  # padding is kept apart like one more prompt
    arguments["inputs_embeds"] = x
    if not call.by_column:
        positions = _compact_positions(call, mask, x)
        check_windows(call)
    true_ids = _set_positions(call, arguments, positions)
    check_ragged_turn(call, mask)
    if true_ids and mask is None:  # with a mask, transformers looks for no packed prompts
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    layers = list(getattr(call.cache, "layers", None) or ())
    arguments["attention_mask"] = Masks(call, mask, layers).decoder_mask(x)
    compat.set_cache_position(arguments, first.past.length, x.shape[1])


def _set_positions(call: Call, arguments: MutableMapping[str, Any], positions: Tensor) -> bool:
    """Write the positions of a compressed call to the arguments of the decoder.

    Text positions of kept tokens have gaps, which FlashAttention, and mask code where there is no
    mask, take for the begin of another packed prompt. There they get positions without gaps, and
    the rotary embedding alone gets the true `positions`, (3, B, n) for M-RoPE, else (B, n).

    Returns
    -------
    bool
        Whether `position_ids` are the true positions, so that the call needs a mask.
    """
    adapter = call.adapter
    text = text_positions(call.map, positions.device)
    if adapter.mrope_rows > 3:  # HunyuanVL takes no row for text
        arguments["position_ids"] = positions
        return False
    if adapter.mrope:
        text = text.expand(positions.shape[1], -1)[None]
        arguments["position_ids"] = torch.cat([text, positions])
        return False
    flash = "flash" in compat.attention_implementation(adapter.text_config)
    if adapter.layers_read_positions and not flash and not call.map.packed:
        arguments["position_ids"] = positions
        return True
    if adapter.rotary is None or scales_queries(adapter.text_config):
        raise UnsupportedModelError(
            f"the layers of {type(adapter.decoder).__name__} read positions themselves, and "
            "FlashAttention and packed prompts need positions without gaps there. Use "
            'attn_implementation="sdpa" and one prompt per row.'
        )
    call.rotary, arguments["position_ids"] = positions, text
    return False


def _compact_positions(call: Call, mask: Tensor | None, x: Tensor) -> Tensor:
    """Positions (B, n) without gaps, which begin again in every packed prompt.

    `x` (B, n, d) are the rows that are kept, and `mask` (B, n) is False at padding.
    """
    if call.map.packed:
        return text_positions(call.map, x.device).expand(x.shape[0], -1)
    return call.segments[0].contiguous_positions(mask, x)
