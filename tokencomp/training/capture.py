"""One uncompressed forward call at the decoder: spans, layer inputs, layer-0 attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.media_call import MediaCall
from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.prompt import build_prompts, real_columns
from tokencomp.engine.rowmap import RowMap
from tokencomp.engine.scores import input_scores
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.spans import VisualSpan
from tokencomp.torchlib import compat

INPUT_ONLY = ("labels", "logits_to_keep", "use_cache")


@dataclass
class Capture:
    """Results of a forward call, without gradients.

    Attributes
    ----------
    spans
        Visual spans per sample.
    width, lengths
        Columns, and real tokens per sample.
    inputs
        Input of every layer, (B, width, d); with `layers=False` only of the first.
    arguments
        Keyword arguments of every captured layer, without a cache.
    last
        Output of the last layer, (B, width, d), before the final norm.
    """

    adapter: Adapter
    spans: list[list[VisualSpan]] = field(default_factory=list)
    width: int = 0
    lengths: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    last: Tensor | None = None

    def attention_rows(self, answer: int) -> list[list[Tensor]]:
        """Layer-0 attention of the user's text to each span, by sample: the input of `selector`.

        The last `answer` columns do not vote.
        """
        tables = {"position_embeddings": self.arguments[0]["position_embeddings"]}
        columns = torch.arange(self.width)[None]
        real = columns >= self.width - torch.tensor(self.lengths)[:, None]
        prompts = build_prompts(real, self.spans, generated=answer)
        rows = RowMap.of_prompt(self.width, self.lengths, self.spans, prompts)
        layer, signal = self.adapter.layers[0], Attention("text")
        scores = input_scores(layer, self.inputs[0], tables, signal, rows)
        parts = iter(scores.split([span.length for row in self.spans for span in row]))
        return [[next(parts) for _ in row] for row in self.spans]

    def features(self) -> list[list[Tensor]]:
        """Projected features of each span at the input of layer 0, (span.length, d), per sample."""
        x = self.inputs[0]
        return [[x[b, s.start : s.stop] for s in row] for b, row in enumerate(self.spans)]


@torch.no_grad()
def capture(model: nn.Module, inputs: dict[str, Any], layers: bool = True) -> Capture:
    """Run `model` once and store the inputs of the decoder layers.

    `inputs` are a left-padded batch, and the model must not be patched. With `layers=False` the
    call ends at the first layer.
    """
    adapter = adapter_for(model)
    captured = Capture(adapter)
    call = {k: v for k, v in inputs.items() if k not in INPUT_ONLY}
    before = {adapter.decoder: _spans_of(captured, call)}
    before |= {
        layer: _input_of(captured, stop=not layers)
        for layer in (adapter.layers if layers else adapter.layers[:1])
    }
    with contextlib.ExitStack() as hooks, contextlib.suppress(_Enough):
        for module, hook in before.items():
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        hooks.enter_context(adapter.layers[-1].register_forward_hook(_output_of(captured)))
        adapter.body(**call, use_cache=False)
    return captured


class _Enough(Exception):
    """Ends the call at the first layer."""


def _spans_of(captured: Capture, call: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = compat.bind(module, args, kwargs)
        ids, x, positions = call["input_ids"], named["inputs_embeds"], named.get("position_ids")
        modalities = captured.adapter.modalities(call)
        assert modalities is not None  # `load_batch` refuses questions without media
        rows = None
        if captured.adapter.mrope and positions is not None:
            rows = positions[-3:].expand(3, ids.shape[0], -1).cpu().numpy()
        captured.width = ids.shape[1]
        captured.lengths = real_columns(call.get("attention_mask"), ids.shape).sum(1).tolist()
        captured.spans = captured.adapter.spans(
            MediaCall(modalities.cpu(), x, rows, captured.adapter.body, call)
        )

    return hook


def _input_of(captured: Capture, stop: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = dict(compat.bind(module, args, kwargs))
        captured.inputs.append(named.pop("hidden_states"))
        for name in (*compat.CACHE_NAMES, "use_cache"):
            named.pop(name, None)
        captured.arguments.append(named)
        if stop:
            raise _Enough

    return hook


def _output_of(captured: Capture) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        captured.last = out[0] if isinstance(out, tuple) else out

    return hook


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
