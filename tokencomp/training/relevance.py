"""Which visual tokens an answer rests on: explainability labels for the selector.

Relevance propagation (Chefer et al., arXiv 2103.15679, as used by arXiv 2506.01097): with A_l the
attention of layer l and y_t the logit of answer token t,

    R ← R + mean_h (A_l ⊙ ∂y_t/∂A_l)⁺ · R        from the first layer to the last, R = I at first,

and the row of R at the place that predicts y_t says how much every token contributed. Only that
row is needed, so it is carried from the *last* layer to the first instead (ours):

    r ← r + r · mean_h (A_l ⊙ ∂y_t/∂A_l)⁺        r = e_t at first.

The state is a vector of N numbers, and gradients go backwards in the same order, so each layer is
run again from its saved input, differentiated, and its attention freed before the next one.

Memory in addition to the model, for B samples of N tokens, T answer tokens, L layers of width d and
H heads: layer inputs L·B·N·d, gradients T·B·N·d, rows T·B·N, and the attention of one layer with
its gradient, about 6·B·H·N² (see `attention_bytes`). The plain product needs L·B·H·N² and T·B·N²
more.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.prompt import IGNORED
from tokencomp.errors import UnsupportedModelError
from tokencomp.training.capture import Capture, capture, eager_attention

Target = Literal["logit", "logprob"]
TARGET: Target = "logit"
"""What is explained by default, for labels and for the oracle."""
BYTES = 24
"""Per attention weight, at the peak: measured 23 in float32, 20 in bfloat16 (softmax is fp32)."""


def explain(
    model: nn.Module, inputs: dict[str, Any], labels: Tensor, target: Target = TARGET
) -> tuple[Capture, list[list[Tensor]]]:
    """Relevance of every visual token for the answers of a batch, by an unpatched `model`.

    `inputs` are a left-padded batch whose `input_ids` end with the answers; `labels`, int64 (B, L),
    are the answer tokens at their places, at least one per sample, and -100 elsewhere. Relevance is
    averaged over them. What is explained is the `target` of an answer token: its "logit", or its
    log-probability ("logprob").

    Returns the forward call, and per sample and span a float32 tensor (span.length,), non-negative.
    Raises `UnsupportedModelError` if attention modules of the decoder do not return their weights.
    """
    with eager_attention(adapter_for(model)):
        seen = capture(model, inputs)
        rows = propagate(seen, labels, target)
    answers = (labels != IGNORED).sum(1)
    mean = rows.sum(0) / answers[:, None].to(rows)
    relevances = [[mean[b, s.start : s.stop] for s in row] for b, row in enumerate(seen.spans)]
    return seen, relevances


def attention_bytes(model: nn.Module, tokens: int) -> int:
    """Memory for the attention of one layer when a question of `tokens` tokens is explained.

    For 28 heads and 6,400 tokens 28 GB: the largest part after the model.
    """
    heads = int(adapter_for(model).text_config.num_attention_heads)
    return BYTES * heads * tokens**2


def propagate(seen: Capture, labels: Tensor, target: Target) -> Tensor:
    """Rows r of every answer token after the first layer, float32 (T, B, N); 0 if there is none."""
    rows, grads = _start(seen, labels, target)
    for i in reversed(range(len(seen.inputs))):
        layer, x = seen.adapter.layers[i], seen.inputs[i].detach().requires_grad_()
        with torch.enable_grad():
            out, weights = _run(layer, x, seen.arguments[i])
        for t in range(len(rows)):
            keep = t < len(rows) - 1
            by_weights, grads[t] = torch.autograd.grad(
                out, (weights, x), grads[t], retain_graph=keep
            )
            mean = (weights.detach() * by_weights).clamp_(min=0).mean(1, dtype=torch.float32)
            rows[t] += torch.bmm(rows[t, :, None], mean)[:, 0]
        seen.inputs[i] = x.detach()
    return rows


def _start(seen: Capture, labels: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Unit rows at the predicting positions, and gradients of targets by the last hidden state."""
    assert seen.last is not None  # all layers were captured
    batch, width = labels.shape
    places = [(row != IGNORED).nonzero()[:, 0].tolist() for row in labels]
    steps = max(map(len, places))
    rows = torch.zeros(steps, batch, width, device=seen.last.device)
    grads = torch.zeros(steps, *seen.last.shape, dtype=seen.last.dtype, device=seen.last.device)
    top: Any = seen.adapter.top
    decoder: Any = seen.adapter.decoder
    head, norm = top.get_output_embeddings(), decoder.norm
    for t in range(steps):
        tokens = [(b, p[t]) for b, p in enumerate(places) if t < len(p)]
        b, at = torch.tensor(tokens, device=seen.last.device).T
        hidden = seen.last[b, at - 1].detach().requires_grad_()
        with torch.enable_grad():
            logits = head(norm(hidden[:, None]))[:, 0].float()
            if target == "logprob":
                logits = logits.log_softmax(-1)
            value = logits.gather(1, labels[b, at][:, None]).sum()
        grads[t, b, at - 1] = torch.autograd.grad(value, hidden)[0]
        rows[t, b, at - 1] = 1.0
    return rows, grads


def _run(layer: Any, x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output of a decoder layer, and its attention weights, in one graph."""
    weights: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, tuple) and len(out) > 1 and out[1] is not None:
            weights.append(out[1])

    with layer.self_attn.register_forward_hook(hook):
        out = layer(x, **arguments)
    if not weights:
        raise UnsupportedModelError(
            f"{type(layer.self_attn).__name__} does not return its attention weights with eager "
            "attention, so answers of this model cannot be explained."
        )
    return (out[0] if isinstance(out, tuple) else out), weights[0]
