"""One uncompressed forward call at the decoder: spans, layer inputs, layer-0 attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter, MediaCall
from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.prompt import build_prompts, real_columns
from tokencomp.engine.rowmap import RowMap
from tokencomp.engine.scores import StageScores
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.torchlib import compat

INPUT_ONLY = ("labels", "logits_to_keep", "use_cache")
NOT_KEPT = (*compat.CACHE_NAMES, "hidden_states", "use_cache")


@dataclass
class Capture:
    """Results of a forward call, without gradients. Only the first layer with `layers=False`."""

    adapter: Adapter
    spans: list[list[VisualSpan]] = field(default_factory=list)  # per sample
    width: int = 0  # columns
    lengths: list[int] = field(default_factory=list)  # real tokens per sample
    inputs: list[Tensor] = field(default_factory=list)  # of every layer, (B, width, d)
    arguments: list[dict[str, Any]] = field(default_factory=list)  # of every layer, without caches
    last: Tensor | None = None  # output of the last layer, (B, width, d), before the final norm

    def read_prompts(self, call: dict[str, Any], decoder_inputs: dict[str, Any]) -> None:
        """Find the spans of a batch, from the arguments of the body and of the decoder."""
        ids, positions = call["input_ids"], decoder_inputs.get("position_ids")
        modalities = self.adapter.modalities(call)
        assert modalities is not None  # `load_batch` refuses questions without media
        rows = None
        if self.adapter.mrope and positions is not None:
            rows = positions[-3:].expand(3, ids.shape[0], -1).cpu().numpy()
        self.width = ids.shape[1]
        self.lengths = real_columns(call.get("attention_mask"), ids.shape).sum(1).tolist()
        x, body = decoder_inputs["inputs_embeds"], self.adapter.body
        self.spans = self.adapter.spans(MediaCall(modalities.cpu(), x, rows, body, call))

    def attention_rows(self, answer: int) -> list[list[Tensor]]:
        """Layer-0 attention of the user's text to each span, by sample: the input of `selector`.

        The last `answer` columns do not vote.
        """
        tables = {"position_embeddings": self.arguments[0]["position_embeddings"]}
        columns = torch.arange(self.width)[None]
        real = columns >= self.width - torch.tensor(self.lengths)[:, None]
        prompts = build_prompts(real, self.spans, generated=answer)
        rows = RowMap.of_prompt(self.width, self.lengths, self.spans, prompts)
        scores, signal = StageScores(self.adapter.layers), Attention("text")
        scores.add(0, self.inputs[0], tables, signal, rows, None, RowMap(0))
        parts = iter(scores.spans[0].split([span.length for row in self.spans for span in row]))
        return [[next(parts) for _ in row] for row in self.spans]

    def features(self) -> list[list[Tensor]]:
        """Projected features of each span at the input of layer 0, (span.length, d), per sample."""
        x = self.inputs[0]
        return [[x[b, s.start : s.stop] for s in row] for b, row in enumerate(self.spans)]


class _Enough(Exception):
    """Ends the call at the first layer."""


@torch.no_grad()
def capture(model: nn.Module, inputs: dict[str, Any], layers: bool = True) -> Capture:
    """Run an unpatched `model` once on a left-padded batch, and store its decoder layers' inputs.

    With `layers=False` the call ends at the first layer.
    """
    adapter = adapter_for(model)
    seen = Capture(adapter)
    call = {k: v for k, v in inputs.items() if k not in INPUT_ONLY}

    def before_decoder(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.read_prompts(call, compat.bind(module, args, kwargs))

    def before_layer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = compat.bind(module, args, kwargs)
        seen.inputs.append(named["hidden_states"])
        seen.arguments.append({k: v for k, v in named.items() if k not in NOT_KEPT})
        if not layers:
            raise _Enough

    def after_layers(module: nn.Module, args: Any, out: Any) -> None:
        seen.last = out[0] if isinstance(out, tuple) else out

    before = {adapter.decoder: before_decoder, **dict.fromkeys(adapter.layers, before_layer)}
    with contextlib.ExitStack() as hooks, contextlib.suppress(_Enough):
        for module, hook in before.items():
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        hooks.enter_context(adapter.layers[-1].register_forward_hook(after_layers))
        adapter.body(**call, use_cache=False)
    return seen


@contextlib.contextmanager
def eager_attention(adapter: Adapter) -> Iterator[None]:
    """Eager attention in the decoder inside the block: the only backend that returns weights."""
    config = adapter.text_config
    before = compat.attention_implementation(config)
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
