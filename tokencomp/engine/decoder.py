"""Hooks of a patch around the decoder: the order of the passes.

    before   read ─► (plan) ─► checks ─► score ─► choose ─► gather        `_compress`
    within   layers: rows, masks and tables of their segment             `LayerHooks`
    after    restore: columns in the cache, output of full length        `_leave`

Modules of the passes: `prompt.py` (read), `call.py` (plan), `scores.py`, `choose.py`, `gather.py`
(gather and restore). They share one `Call`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structure import scales_queries
from tokencomp.engine.cache import (
    CacheOwner,
    CompressedLayer,
    first_layer,
    forget,
    note_prompt,
    note_turn,
)
from tokencomp.engine.call import Call, CallHooks, Noted, RunningCalls, ThreadState
from tokencomp.engine.checks import (
    PROMPT_CHECKS,
    TRACED,
    FeaturelessPrompts,
    check_cache,
    check_entered,
    check_ragged_turn,
    check_windows,
    refuse_missing,
    refuse_recomputation,
    rotary_modules,
)
from tokencomp.engine.choose import enter
from tokencomp.engine.gather import (
    gather_arguments,
    restore_maps,
    restore_states,
    sequence_lengths,
    text_positions,
    whole_output,
)
from tokencomp.engine.later import (
    LaterTokens,
    begins_prompt,
    chunk_arguments,
    in_chunks,
    media_apart,
)
from tokencomp.engine.layers import LayerHooks
from tokencomp.engine.lengths import check_prompt, check_turn
from tokencomp.engine.masks import Masks, read_mask
from tokencomp.engine.prompt import read_prompt, with_embeddings
from tokencomp.engine.stats import Stats, warn_of_missed_ratio
from tokencomp.engine.tower.stage import TowerHooks
from tokencomp.engine.weights import RowWeights
from tokencomp.errors import UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat


class DecoderHooks(CallHooks):
    """Compresses the input of the decoder, and applies the plan to its layers and the tower."""

    def __init__(
        self,
        adapter: Adapter,
        calls: RunningCalls,
        plan: Plan,
        owner: CacheOwner,
        featureless: FeaturelessPrompts,
    ) -> None:
        super().__init__(adapter, calls)
        self.plan = plan
        self.stats: Stats | None = None  # of the latest compressed prefill, in any thread
        self._owner, self._featureless = owner, featureless
        self._missed: set[str] = set()  # plans that a prompt has missed
        self.weights = RowWeights(adapter, calls)
        self._later = LaterTokens(adapter, calls, owner.compact, self.weights)
        self._layers = LayerHooks(adapter, calls)
        self.tower = TowerHooks(adapter, calls)

    # -- installation ---------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the decoder, and its rotary modules if they need other positions."""
        a = self.adapter
        before = a.decoder.register_forward_pre_hook(self._decoder, with_kwargs=True)
        self._handles.append(before)
        self._after(a.decoder, self._leave, traced=self._has_call, always_call=True)
        for module in rotary_modules(a.decoder):
            if not a.mrope:
                self._before(module, self._true_positions, traced=self._has_call)
        self.put_in_force()

    def put_in_force(self) -> None:
        """Install the hooks that stages need inside of the decoder and the tower."""
        self._layers.install(self.plan)
        self.tower.install(self.plan)

    def change(self, plan: Plan) -> None:
        """Remove these hooks, and replace the plan."""
        self._layers.withdraw()
        self.tower.remove()
        self.plan, self.stats = plan, None

    def remove(self) -> None:
        """Remove all hooks; safe to call twice."""
        super().remove()
        for part in (self.weights, self._layers, self.tower):
            part.remove()

    def compresses(self) -> bool:
        return self.plan.active and self.calls.state.disabled == 0

    # -- before a call --------------------------------------------------------------------------

    def breaks_graph(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """While Dynamo traces: whether this call must be prepared outside of the compiled graphs.

        False if nothing is to be done, or if Dynamo can trace it. For calls of the model, its body
        or its decoder.
        """
        if self.calls.state.noted.modalities is not None:
            return True
        arguments = compat.bind(module, args, kwargs)
        return not self._later.traceable(arguments, self.plan.active)

    def _decoder(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Hook that Dynamo traces: sets the mask of a decode step on a static cache."""
        if kwargs is None:  # see `tokencomp.torchlib.hooks`
            return None
        arguments = compat.bind(module, args, kwargs)
        if not torch.compiler.is_compiling() or self.breaks_graph(module, args, kwargs):
            return self._enter(module, arguments)
        return self._later_tokens(arguments, compat.get_cache(arguments))

    def _later_tokens(self, arguments: dict[str, Any], cache: Any) -> Any:
        """Arguments of later tokens; None if they do not change."""
        first = first_layer(cache)
        if not isinstance(first, CompressedLayer):
            return None
        arguments = dict(arguments)
        self._later.prepare(arguments, cache.layers, first)
        return (), arguments

    @compat.not_compiled
    def _enter(self, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Arguments of a decoder call; None if they do not change."""
        noted, cache = self.calls.state.noted, compat.get_cache(arguments)
        # `modalities` are on the CPU, so that this waits for no device.
        try:
            media = noted.modalities is not None and noted.modalities.numpy().any()
        except RuntimeError:  # a tensor without values
            raise UnsupportedModelError(TRACED) from None
        if media:
            if torch.jit.is_tracing():
                raise UnsupportedModelError(TRACED)
            return self._compress(module, arguments, cache, self.calls.state)
        if not noted.in_body and self.compresses() and begins_prompt(arguments):
            self._featureless.meet(arguments)  # the decoder was called without the body
        # Features that were encoded under an earlier tower stage can lack tokens.
        if self.tower.had_stage:
            refuse_missing(self.adapter, arguments, noted)
        # Media that no stage sees: `delta` must not compare later pictures with older ones.
        apart = noted.apart if noted.in_body else media_apart(self.adapter, arguments)
        if apart:
            forget(cache, apart)
        return self._later_tokens(arguments, cache)

    def _compress(
        self, module: nn.Module, arguments: dict[str, Any], cache: Any, state: ThreadState
    ) -> Any:
        """Arguments of a prefill with visual tokens, after the entry stage."""
        noted, plan = state.noted, self.plan
        if noted.grad:
            refuse_recomputation(self.adapter.body, "the places of its media")
        noted.grad = torch.is_grad_enabled()
        # Inputs: embeddings that contain the features, and a 2-D padding mask.
        if arguments.get("inputs_embeds") is None:
            arguments = with_embeddings(module, arguments)
        if plan.tower is None and self.tower.had_stage:
            refuse_missing(self.adapter, arguments, noted)
        check_cache(cache, bool(plan.layer_stages))
        first = first_layer(cache)
        if isinstance(first, CompressedLayer):
            check_turn(cache, first, arguments)
        arguments, mask, prepared = dict(arguments), arguments.get("attention_mask"), None
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            padding, prepared = read_mask(arguments, first, noted.mask)
            arguments["attention_mask"] = padding
        # Read and plan: spans, row map, counts. Checks run before anything changes.
        options = {"by_column": not self._owner.compact, "prepared": prepared}
        call, positions = read_prompt(self.adapter, arguments, cache, noted, plan, **options)
        for check in PROMPT_CHECKS:
            check(call)
        # From here on the hooks of layers, attention and tower act on this call.
        if self._layers.hooked not in ([], list(self.adapter.layers)):
            self._layers.follow_wrappers()
        state.call = call
        if call.weighted or call.merges:
            call.weighing = self.weights.begin()
        self.tower.collect(call, noted.inputs or {})
        # Score, choose, gather: only kept rows enter the decoder.
        x, positions, columns = enter(call, arguments["inputs_embeds"], positions)
        kept = call.map.mask(x.device)
        if columns is not None:
            gather_arguments(arguments, columns, kept, call.width)
        set_arguments(call, arguments, x, positions, kept)
        # Only logits of the text after the last picture: every stage keeps these rows in place.
        whole = len(call.segments) > 1 or not 0 < noted.logits <= call.tail
        if whole and "logits_to_keep" in arguments:
            # Decoders with shared keys (Gemma 4) would return only these rows.
            arguments["logits_to_keep"] = 0
        forget(cache, call.modalities)  # until `_leave`: a call that fails can have written rows
        if noted.chunk is not None and in_chunks(call, arguments, noted.chunk):
            arguments = self._run_chunks(module, arguments, call, noted)
        return (), arguments

    def _run_chunks(
        self, decoder: nn.Module, arguments: dict[str, Any], call: Call, noted: Noted
    ) -> dict[str, Any]:
        """Run all chunks of a prompt but the last, whose arguments are returned.

        Earlier chunks fill the cache. Their hidden states are kept if the call must return them.
        """
        size, width, rotary = noted.chunk, call.map.rows, call.rotary
        assert size is not None
        last = (width - 1) // size * size  # first row of the last chunk
        needed = not 0 < noted.logits <= min(call.tail, width - last)
        call.chunk = size
        for start in range(0, width, size):
            call.rotary = None if rotary is None else rotary[:, start : start + size]
            chunk = chunk_arguments(arguments, start, min(start + size, width))
            if start < last:
                out = decoder.forward(**chunk)
                call.earlier += [out[0]] if needed else []
        return chunk

    # -- within and after a call ----------------------------------------------------------------

    def _true_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Arguments of a rotary module, with the original positions of the kept tokens."""
        call: Any = self.calls.state.call
        if call is None or call.rotary is None:
            return None
        if self.calls.state.noted.grad:
            refuse_recomputation(self.adapter.decoder, "the positions of kept tokens")
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": call.rotary}
        hidden, _, *rest = args
        return (hidden, call.rotary, *rest), kwargs

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Restore the output of a decoder call to full length; None if it does not change."""
        state = self.calls.state
        call, state.call = state.call, None
        if state.weighs:
            self.weights.end()
        if call is None or out is None:
            return None
        if len(call.segments) > 1:
            check_entered(call.segments, module)
        cache = compat.get_cache(kwargs, out)
        if getattr(out, "attentions", None) is not None:
            out.attentions = restore_maps(out.attentions, call, getattr(cache, "layers", ()))
        if call.weighing is not None:
            self.weights.check(call)
        if not call.spans:  # later tokens
            note_turn(call, cache)
            return out
        if cache is not call.cache:  # the decoder has made it
            check_cache(cache, bool(call.plan.layer_stages))
        layer = note_prompt(call, cache, self._owner)
        if layer is not None:
            check_prompt(cache, call.length)
        # A chunked prefill: the states of its earlier chunks precede those of the last.
        if call.earlier:
            out = whole_output(out, call.earlier)
        self.stats = stats = Stats.of_call(call, layer)
        warn_of_missed_ratio(stats, call.plan, self._missed)
        text_only = 0 < state.noted.logits <= call.tail
        if text_only and "logits_to_keep" in kwargs:
            # The model needs only the rows of these logits.
            out.last_hidden_state = out.last_hidden_state[:, -state.noted.logits :]
        return restore_states(out, call.segments, call.width, text_only)


# -- arguments of the decoder for the rows of segment 0 -----------------------------------------


def set_arguments(
    call: Call, arguments: dict[str, Any], x: Tensor, positions: Tensor, mask: Tensor | None
) -> None:
    """Set embeddings, positions and mask of a decoder call in place.

    Of the kept rows: embeddings x (B, n, d), original positions, (3, B, n) for M-RoPE, else (B, n),
    and a mask (B, n), which is False at padding rows; None: all are real.
    """
    first, rows = call.segments[0], call.map
    if rows.packed:
        arguments.update(sequence_lengths(rows, arguments))
        if call.cache is None and not arguments.get("use_cache"):
            mask = None  # padding is separated like one more packed prompt
    arguments["inputs_embeds"] = x
    if not call.by_column:
        # positions="compact": kept rows are counted.
        if rows.packed:  # they restart at every prompt
            positions = text_positions(rows, x.device).expand(x.shape[0], -1)
        else:
            positions = first.contiguous_positions(mask, x)
        check_windows(call)
    true_ids = _set_positions(call, arguments, positions)
    if mask is not None:
        check_ragged_turn(call)
    if true_ids and mask is None:  # given a mask, transformers does not infer packed prompts
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    arguments["attention_mask"] = Masks(call, mask).decoder_mask(x)
    if (old := arguments.get("cache_position")) is not None:  # remote code may use it
        stop = first.past.length + x.shape[1]
        arguments["cache_position"] = torch.arange(first.past.length, stop, device=old.device)


def _set_positions(call: Call, arguments: MutableMapping[str, Any], positions: Tensor) -> bool:
    """Set the positions of a compressed call.

    Original positions of kept tokens have gaps. FlashAttention, and mask functions if there is no
    mask, take a gap for the start of another packed prompt. They get positions without gaps, and
    only the rotary embedding gets the original `positions`. Returns whether `position_ids` are the
    original positions, so that the call needs a mask.
    """
    adapter = call.adapter
    text = text_positions(call.map, positions.device)
    if adapter.mrope_rows > 3:  # HunyuanVL has no row of text positions
        arguments["position_ids"] = positions
        return False
    if adapter.mrope:
        text = text.expand(positions.shape[1], -1)[None]
        arguments["position_ids"] = torch.cat([text, positions])
        return False
    # Layers that read positions themselves get the original ones, and a mask, so that transformers
    # takes no gap for the start of a packed prompt.
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
