"""The hooks: the only code that touches arguments of Hugging Face modules.

top       notes `labels` / `logits_to_keep`: must the output have full length?
body      notes where visual placeholders are, if this call carries visual features
decoder   entry stage, masks, positions; afterwards the cache layers and the output length
rotary    (one position per token only) original positions of the kept tokens
layer k   layer stage, and the mask of layers that hold fewer rows
attention scores for the layer stage that follows
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter, Call
from tokencomp.context_window import check_window
from tokencomp.engine import compat
from tokencomp.engine.batching import BatchGuard
from tokencomp.engine.cache import CompressedLayer, check_cache
from tokencomp.engine.decode import (
    LaterTokens,
    begins_prompt,
    compact_cache,
    first_layer,
    plain_mask,
)
from tokencomp.engine.forward import ForwardPass, build_segments
from tokencomp.engine.gate import CallGate
from tokencomp.engine.layout import RowLayout, full_layout
from tokencomp.engine.outputs import restore
from tokencomp.engine.packing import sequence_lengths, text_positions
from tokencomp.engine.padding import aligned_layout, left_padded, real_columns
from tokencomp.engine.parallel import refuse_replica
from tokencomp.engine.prefill import ChunkedPrefill, whole_output
from tokencomp.engine.proportional import ProportionalAttention
from tokencomp.engine.question import (
    PromptLength,
    build_prompts,
    packed_starts,
    starts_from_lengths,
)
from tokencomp.engine.refusals import check_prefill
from tokencomp.engine.stats import Stats, collect, warn_if_ratio_missed
from tokencomp.engine.tower import TowerProbe, check_signals
from tokencomp.engine.window import check_attention_window
from tokencomp.errors import (
    NoVisualInputError,
    TokenCompError,
    UncompressedWarning,
    copy_error,
)
from tokencomp.plan import Plan
from tokencomp.tokens import Attention

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tokencomp.tokens import VisualSpan


class Hooks:
    """Installs and removes the hooks of one patched model.

    What belongs to a running call lives in thread-local storage; `stats` is shared: the counts of
    the prefill that ended last, in whichever thread. Dynamo cannot trace the callbacks, so they
    run between the graphs of a compiled model.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        strict: bool,
        compact_positions: bool = False,
        proportional: bool = False,
    ) -> None:
        self.adapter, self.plan, self.strict = adapter, plan, strict
        self.compact_positions = compact_positions
        self.proportional = (
            ProportionalAttention(adapter.layers, self._sizes) if proportional else None
        )
        self.stats: Stats | None = None
        self._told: set[str] = set()  # plans whose missed ratio was told
        self._local = threading.local()
        self._later = LaterTokens(
            adapter, self._local, compact_positions, proportional, self._install_layers
        )
        self._batches = BatchGuard(adapter, self._compresses, strict)
        self._prefill = ChunkedPrefill(adapter, self._local, self._compresses, self._forget_stats)
        self._prompt_length = PromptLength()
        self._warned_hidden = False
        self.gate = CallGate(type(adapter.model).__name__)
        self._handles: list[RemovableHandle] = []
        self._plan_handles: list[RemovableHandle] = []
        self._layered = False
        self._tower: TowerProbe | None = None
        self._lock = threading.Lock()
        # Qwen2-VL before transformers 5 swallows the argument and returns all logits
        forward = type(adapter.top).forward  # the instance's may be wrapped by accelerate
        self._slices = "logits_to_keep" in inspect.signature(forward).parameters

    # -- installation ---------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the model; what depends on the plan is hooked apart, see `change`."""
        a, add = self.adapter, self._handles.append
        self.gate.install(a.top, a.body)  # first, so that a waiting call has run no other hook
        for module, pre, post in (
            (a.top, self._top, self._top_done),
            (a.body, self._body, self._body_done),
            (a.decoder, self._decoder, self._decoder_done),
        ):
            add(module.register_forward_pre_hook(pre, with_kwargs=True))
            add(module.register_forward_hook(post, with_kwargs=True, always_call=True))
        if not a.mrope:
            add(a.decoder.rotary_emb.register_forward_pre_hook(self._rotary, with_kwargs=True))
        self._install_plan()
        if self.proportional is not None:
            self.proportional.install()
        self._prefill.install()
        self._batches.install()
        self._prompt_length.install(a.top)
        a.install()

    def change(self, plan: Plan) -> None:
        """Put another plan in force, between the calls of all threads.

        Only hooks inside of the decoder and the tower change. A call that waits meanwhile has
        already read the list of the hooks around it, which therefore must stay.
        """
        with self.gate.change():
            self._remove_plan()
            self.plan, self.stats = plan, None
            self._install_plan()

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._remove_plan()
        self.gate.remove()
        if self.proportional is not None:
            self.proportional.remove()
        self._prefill.remove()
        self._batches.remove()
        self._prompt_length.remove(self.adapter.top)
        self.adapter.uninstall()

    def _install_plan(self) -> None:
        self._install_scores()
        signals = check_signals(self.plan, self.adapter)
        if signals:
            self._tower = TowerProbe(self.adapter, signals, off=lambda: self.disabled)
            self._tower.install()
        if self.plan.layer_stages:
            self._install_layers()

    def _remove_plan(self) -> None:
        for handle in self._plan_handles:
            handle.remove()
        self._plan_handles.clear()
        self._layered = False
        if self._tower is not None:
            self._tower.remove()
            self._tower = None

    def _install_scores(self) -> None:
        for stage in self.plan.layer_stages:
            for signal in stage.reducer.needs if stage.fraction > 0 else ():
                if isinstance(signal, Attention) and signal.layer == "previous":
                    attn: Any = self.adapter.layers[stage.layer - 1].self_attn
                    score = functools.partial(self._attention, stage.layer, signal)
                    self._plan_handles.append(attn.register_forward_hook(score, with_kwargs=True))

    def _install_layers(self) -> None:
        """Hook every decoder layer, once: some hold other rows than the first.

        Entry plans pay for these hooks only when an earlier, staged patch left such a cache.
        """
        with self._lock:
            if self._layered:
                return
            self._layered = True
            for i, layer in enumerate(self.adapter.layers):
                hook = functools.partial(self._layer, i)
                self._plan_handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(type(self.adapter.model).__name__)

    @property
    def disabled(self) -> bool:
        return getattr(self._local, "disabled", 0) > 0

    def disable(self, by: int) -> None:
        """Count calls of `Handle.disabled()` in this thread up or down."""
        self._local.disabled = getattr(self._local, "disabled", 0) + by

    def _compresses(self) -> bool:
        """Whether prompts with media are compressed in this thread."""
        return bool(self.plan.stages) and not self.disabled

    def _forget_stats(self) -> None:
        self.stats = None

    # -- top and body ---------------------------------------------------------------------------

    def _traced(self, inputs: dict[str, Any]) -> bool:
        """Whether Dynamo may trace through a hook: it does nothing, or tensor operations."""
        kinds = getattr(self._local, "kinds", None)
        return kinds is None and self._later.traceable(inputs, bool(self.plan.stages))

    def _busy(self, *names: str) -> bool:
        """Whether this thread notes something for the running call; Dynamo guards on it."""
        return any(getattr(self._local, name, None) is not None for name in names)

    def _top(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        refuse_replica(module)
        named = compat.bind(module, args, kwargs)
        if not self._traced(named):
            self._note_call(named)

    @torch.compiler.disable
    def _note_call(self, named: dict[str, Any]) -> None:
        """Note labels, and which logits the call must return."""
        keep, labels = named.get("logits_to_keep", 0), named.get("labels")
        if labels is not None or not isinstance(keep, int):
            keep = 0
        self._local.labels = labels
        self._local.draft = max(keep - 1, 0)  # assisted decoding: speculative tokens at the end
        self._local.logits = keep if self._slices else 0

    def _top_done(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not self._traced(compat.bind(module, args, kwargs)):
            self._forget_call()

    @torch.compiler.disable
    def _forget_call(self) -> None:
        self._local.logits = self._local.draft = 0
        self._local.labels = None

    def _body(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = compat.bind(module, args, kwargs)
        if not self._traced(named):
            self._note_prompt(named)
        elif compat.get_cache(named) is None or self.adapter.carries_features(named):
            self.stats = None  # a compiled prompt at ratio 0, which nobody has counted

    @torch.compiler.disable
    def _note_prompt(self, named: dict[str, Any]) -> None:
        """Note where the visual features of this call go."""
        self._local.kinds = self._local.inputs = self._local.forward = None
        if self.disabled:
            return
        kinds = self.adapter.kinds(named)
        if kinds is not None:
            self._local.kinds, self._local.inputs = kinds.cpu(), named
        elif begins_prompt(named):
            self.stats = None  # not those of another prompt
            if self.plan.stages:
                self._without_features(named)

    def _without_features(self, inputs: Mapping[str, Any]) -> None:
        """A prompt that brings no features: refused if strict, and never silently uncompressed."""
        hidden = self.adapter.hides_features(inputs)
        if self.strict:
            raise NoVisualInputError(
                "strict=True and this prompt brings no image or video, so nothing can be "
                "compressed. Pass pixel_values / pixel_values_videos; beside inputs_embeds with "
                "features in place pass mm_token_type_ids (0 text, 1 image, 2 video) too; or use "
                "patch(..., strict=False)."
            )
        if hidden and not self._warned_hidden:
            self._warned_hidden = True
            warnings.warn(
                "a prompt came as inputs_embeds without pixels. If image or video features already "
                "stand in it, they run uncompressed: nothing says where. Pass mm_token_type_ids "
                "(0 text, 1 image, 2 video) beside it. This is said once per patch.",
                UncompressedWarning,
                stacklevel=2,
            )

    def _body_done(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self._busy("inputs", "forward"):
            self._forget_prompt()

    @torch.compiler.disable
    def _forget_prompt(self) -> None:
        self._local.kinds = self._local.inputs = self._local.forward = None

    # -- decoder --------------------------------------------------------------------------------

    def _decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = compat.bind(module, args, kwargs)
        if not self._traced(kwargs):
            return self._decoder_call(module, kwargs)
        cache = compat.get_cache(kwargs)
        if not isinstance(first_layer(cache), CompressedLayer):
            return None
        kwargs = dict(kwargs)
        self._later.prepare(kwargs, cache.layers)
        return (), kwargs

    @torch.compiler.disable
    def _decoder_call(self, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        """Arguments of a decoder call; None where they stay as they are."""
        kinds, cache = getattr(self._local, "kinds", None), compat.get_cache(kwargs)
        if kinds is not None and bool(kinds.any()):
            if self.plan.stages:
                check_cache(cache, bool(self.plan.layer_stages))
                kwargs = plain_mask(kwargs, cache)
                self._compress(kwargs, kinds, cache)
                keep = getattr(self._local, "logits", 0)
                return (), self._prefill.advance(module, kwargs, self._local.forward, keep)
            self._count(kwargs, kinds, cache)
        if isinstance(first_layer(cache), CompressedLayer):
            kwargs = dict(kwargs)
            self._later.prepare(kwargs, cache.layers)
            return (), kwargs
        return None

    def _count(self, kwargs: dict[str, Any], kinds: Tensor, cache: Any) -> None:
        """Stats of a prefill at ratio 0, which stays as it is; None where it cannot be read."""
        try:
            forward = self._read(plain_mask(kwargs, cache), kinds, cache)[0]
            self.stats = collect(forward, cache)
        except TokenCompError:
            self.stats = None

    def _read(
        self, kwargs: dict[str, Any], kinds: Tensor, cache: Any
    ) -> tuple[ForwardPass, Tensor]:
        """The forward pass of a prefill with visual tokens, and its positions."""
        x, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        layered, proportional = bool(self.plan.layer_stages), self.proportional is not None
        check_prefill(self.adapter, kwargs, kinds, layered, proportional)
        positions, text = self._positions(kwargs, cache)
        rows = positions.cpu() if self.adapter.mrope else None
        spans = self.adapter.spans(Call(kinds, x, rows, self.adapter.body, self._local.inputs))
        check_window(self.adapter, kinds, cache)
        layout = self._layout(kwargs, spans, mask, text, _length(cache))
        forward = ForwardPass(self.adapter, self.plan, spans, layout, x.shape[1])
        forward.segments = build_segments(forward, cache, mask)
        return forward, positions

    def _layout(
        self,
        kwargs: dict[str, Any],
        spans: list[list[VisualSpan]],
        mask: Tensor | None,
        text: Tensor | None,
        past: int,
    ) -> RowLayout:
        """Where the tokens of a prefill stand: real columns, prompts, and the end of questions."""
        shape = kwargs["inputs_embeds"].shape[:2]
        real, starts = real_columns(mask, shape), None
        if mask is None and past == 0:  # the only case in which transformers looks for packing
            starts = packed_starts(None if text is None else text.cpu())
            starts = starts or starts_from_lengths(kwargs.get("cu_seq_lens_q"), *shape)
        generated = self._prompt_length.generated(past, shape[1])
        if generated is None:
            # Whoever asks for logits of visual columns has no draft tokens in mind.
            tail = min((shape[1] - row[-1].stop for row in spans if row), default=0)
            draft = getattr(self._local, "draft", 0)
            generated = draft if draft <= tail else 0
        labels = getattr(self._local, "labels", None)
        prompts = build_prompts(real, spans, starts, labels, generated)
        if left_padded(real):
            return full_layout(shape[1], real.sum(1).tolist(), spans, prompts)
        return aligned_layout(real, spans, prompts)

    def _compress(self, kwargs: dict[str, Any], kinds: Tensor, cache: Any) -> None:
        """Prefill with visual tokens: plan, reduce at entry, positions, masks."""
        forward, positions = self._read(kwargs, kinds, cache)
        x, spans = kwargs["inputs_embeds"], forward.spans
        if self._tower is not None:
            forward.tower = self._tower.collect(spans)
        if len(forward.segments) > 1:
            self._install_layers()
        x, positions, index = forward.entry(x, positions, cache)
        valid = forward.layout.valid(x.device)
        if index is not None:
            self.adapter.gather_extra(kwargs, index, valid)
        if forward.layout.packed:
            kwargs.update(sequence_lengths(forward.layout, kwargs))
            if cache is None and not kwargs.get("use_cache"):
                valid = None  # padding is kept apart like a prompt of its own
        kwargs["inputs_embeds"] = x
        if self.compact_positions:
            positions = self._compact_positions(forward, valid, x)
        self._set_positions(kwargs, forward, positions)
        first = forward.segments[0]
        compact = self.compact_positions
        length = first.physical + x.shape[1] if compact else first.logical + forward.width
        # A decode step on a static cache reads no length on the host, so its whole length counts.
        length = max(length, getattr(first_layer(cache), "max_cache_len", 0))
        check_attention_window(self.adapter.text_config, cache, length)
        kwargs["attention_mask"] = first.padding_mask(valid, x.shape[0], x.device)
        compat.set_cache_position(kwargs, first.logical, x.shape[1])
        self._local.forward = forward

    @torch.compiler.disable
    def _sizes(self, layer: int) -> Tensor | None:
        """How many tokens the first rows of `layer` stand for in the call that runs now."""
        forward: ForwardPass | None = getattr(self._local, "forward", None)
        if forward is not None:
            return forward.segment_of(layer).all_sizes()
        cached = getattr(self._local, "cached", None)
        return cached[layer].sizes if cached else None

    def _decoder_done(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        return self._finish_decoder(kwargs, out) if self._busy("forward", "cached") else None

    @torch.compiler.disable
    def _finish_decoder(self, kwargs: dict[str, Any], out: Any) -> Any:
        forward: ForwardPass | None = getattr(self._local, "forward", None)
        self._local.forward = self._local.cached = None
        if forward is None or out is None:
            return None
        cache = compat.get_cache(kwargs, out)
        if not forward.compresses:
            forward.extend_valid(cache)
            if getattr(out, "attentions", None) is None:
                return None
            out.attentions = forward.full_maps(out.attentions)
            return out
        compact_cache(forward, cache, self.proportional is not None)
        out = whole_output(out, forward.earlier)
        self.stats = stats = collect(forward, cache)
        warn_if_ratio_missed(stats, forward.plan, self._told)
        return self._restored(forward, out)

    def _restored(self, forward: ForwardPass, out: Any) -> Any:
        """Give the output full length unless only text after the last span is asked for."""
        states = getattr(out, "hidden_states", None)
        if states is not None:
            layers = [0, *range(len(states) - 1)]  # the input of the first, then what each returns
            layouts = [forward.segment_of(layer).layout for layer in layers]
            out.hidden_states = tuple(
                s if s is None else restore(s, f.to(s.device), forward.width)
                for s, f in zip(states, layouts, strict=True)
            )
        if getattr(out, "attentions", None) is not None:
            out.attentions = forward.full_maps(out.attentions)
        keep = getattr(self._local, "logits", 0)
        if 0 < keep <= forward.tail:
            return out
        if isinstance(out, tuple):
            return (restore(out[0], forward.layout, forward.width), *out[1:])
        last = out.last_hidden_state
        out.last_hidden_state = restore(last, forward.layout, forward.width)
        if states is not None and states[-1] is last:  # one tensor, so that both carry gradients
            out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
        return out

    # -- positions ------------------------------------------------------------------------------

    def _positions(self, kwargs: dict[str, Any], cache: Any) -> tuple[Tensor, Tensor | None]:
        """Positions of the uncompressed call, and those by which packed prompts are told apart.

        Returns
        -------
        Tensor
            (3, B, L) for M-RoPE, else (B, L).
        Tensor or None
            (B, L) or (1, L); None where the caller gave none.
        """
        x, given = kwargs["inputs_embeds"], kwargs.get("position_ids")
        batch, n = x.shape[:2]
        if given is None:
            start = _length(cache)
            own = torch.arange(start, start + n, device=x.device)[None]
            return own.expand(*((3,) if self.adapter.mrope else ()), batch, -1), None
        if not self.adapter.mrope:
            return given.expand(batch, -1), given
        if given.ndim == 2:
            given = given[None]
        # Three rows are time, height and width alone; a fourth before them counts tokens.
        text = given[0] if given.shape[0] == 4 else None
        return given[-3:].expand(3, batch, -1), text

    def _set_positions(
        self, kwargs: dict[str, Any], forward: ForwardPass, positions: Tensor
    ) -> None:
        # Gaps in text positions look like packed prompts to mask code and FlashAttention: those
        # get positions without gaps, the rotary embedding alone the true ones.
        text = text_positions(forward.layout, positions.device)
        if self.adapter.mrope:
            text = text.expand(positions.shape[1], -1)[None]
            kwargs["position_ids"] = torch.cat([text, positions])
        else:
            forward.rotary, kwargs["position_ids"] = positions, text

    def _compact_positions(self, forward: ForwardPass, valid: Tensor | None, x: Tensor) -> Tensor:
        """Positions (B, n) without gaps; they begin again in every prompt of a packed row."""
        if forward.layout.packed:
            return text_positions(forward.layout, x.device).expand(x.shape[0], -1)
        return forward.segments[0].contiguous(valid, x)

    def _rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._true_positions(args, kwargs) if self._busy("forward") else None

    @torch.compiler.disable
    def _true_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward: ForwardPass | None = getattr(self._local, "forward", None)
        if forward is None or forward.rotary is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": forward.rotary}
        hidden, _, *rest = args
        return (hidden, forward.rotary, *rest), kwargs

    # -- layers ---------------------------------------------------------------------------------

    @torch.compiler.disable
    def _layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward: ForwardPass | None = getattr(self._local, "forward", None)
        return None if forward is None else forward.before_layer(i, args, kwargs)

    @torch.compiler.disable
    def _attention(
        self, stage: int, signal: Any, module: nn.Module, args: Any, kwargs: Any, out: Any
    ) -> None:
        forward: ForwardPass | None = getattr(self._local, "forward", None)
        if forward is not None and forward.compresses:
            forward.score(stage, module, compat.bind(module, args, kwargs), signal)


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0
