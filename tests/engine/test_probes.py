"""Attention scores against the dense maps that the model's own eager attention returns."""

from __future__ import annotations

import math

import pytest
import tokencomp.kernels
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from tokencomp.engine.cache_special import compress_layer
from tokencomp.engine.rowmap import Prompt, RowMap
from tokencomp.engine.scores import input_scores, rater_weights
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.spans import VisualSpan

PAST, WIDTH, DRAFT = 7, 44, 2
LENGTHS = [44, 39]
# Three spans, the second right after the first; in sample 1 nothing follows the last one.
PLACES = [[(3, 8), (11, 6), (20, 12)], [(9, 6), (17, 5), (25, 17)]]


def spans() -> list[list[VisualSpan]]:
    return [[VisualSpan(at, n, (1, 1, n)) for at, n in row] for row in PLACES]


@pytest.fixture
def two_turns() -> tuple[LlamaModel, Tensor, Tensor]:
    """A tiny decoder, embeddings (2, PAST + WIDTH, d), their mask; each turn is left-padded."""
    config = LlamaConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=20, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    mask = torch.ones(2, PAST + WIDTH, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, PAST : PAST + WIDTH - LENGTHS[1]] = 0
    return model, torch.randn(2, PAST + WIDTH, 48) * 3, mask


def scores(
    model: LlamaModel, x: Tensor, mask: Tensor, signal: Attention, past: int = PAST
) -> list[list[Tensor]]:
    """What the probe finds in the second turn, with the first one in the cache, or alone."""
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    cache = DynamicCache() if past else None
    if cache is not None:
        first = {"inputs_embeds": x[:, :PAST], "position_ids": positions[:, :PAST]}
        model(**first, attention_mask=mask[:, :PAST], past_key_values=cache)
        compress_layer(cache.layers[0], RowMap(PAST, real=mask[:, :PAST].bool()), False)
    tables = {"position_embeddings": model.rotary_emb(x[:, PAST:], positions[:, PAST:])}
    prompts = [[Prompt(WIDTH - n, WIDTH, WIDTH - DRAFT)] for n in LENGTHS]
    rows = RowMap.of_prompt(WIDTH, LENGTHS, spans(), prompts)
    weights = rater_weights(x[:, PAST:], rows)
    flat = input_scores(model.layers[0], x[:, PAST:], tables, signal, rows, cache, raters=weights)
    parts = iter(flat.split([span.length for row in spans() for span in row]))
    return [[next(parts) for _ in row] for row in spans()]


def raters(x: Tensor, sample: int) -> list[int]:
    """Text behind the last span that is rated at least as high as the mean, or the last token."""
    row, end = x[sample, PAST:].double().tolist(), WIDTH - DRAFT
    text = list(range(spans()[sample][-1].stop, end))
    ratings = [0.0] * len(text)
    for span in spans()[sample]:
        for column in range(span.start, span.stop):
            logits = [sum(a * b for a, b in zip(row[column], row[m], strict=True)) for m in text]
            powers = [math.exp(v - max(logits)) for v in logits]
            ratings = [r + p / sum(powers) for r, p in zip(ratings, powers, strict=True)]
    chosen = [m for m, r in zip(text, ratings, strict=True) if r >= sum(ratings) / len(ratings)]
    return chosen or [end - 1]


def expected(maps: Tensor, sample: int, span: VisualSpan, signal: Attention, x: Tensor) -> Tensor:
    """Mean over the voters of one span, heads joined, from dense maps (heads, N, N)."""
    visual = {c for s in spans()[sample] for c in range(s.start, s.stop)}
    end = WIDTH - DRAFT
    voters = {
        "text": [c for c in range(span.stop, end) if c not in visual] or [end - 1],
        "last": [end - 1],
        "raters": raters(x, sample),
        "all": list(range(WIDTH - LENGTHS[sample], end)),
    }[signal.rows]
    columns = slice(PAST + span.start, PAST + span.stop)
    heads = maps[:, [PAST + v for v in voters], columns].mean(1)
    return heads.mean(0) if signal.heads == "mean" else heads.square().mean(0).sqrt()


@pytest.mark.parametrize("past", [PAST, 0])
@pytest.mark.parametrize("heads", ["mean", "rms"])
@pytest.mark.parametrize("rows", ["text", "last", "raters", "all"])
@torch.no_grad()
def test_scores_are_those_of_the_dense_map(two_turns, rows: str, heads: str, past: int) -> None:
    """Several spans, left-padded, drafts at the end; alone, or behind an earlier turn."""
    model, x, mask = two_turns
    x /= 3  # so that several tokens share the ratings
    if not past:
        mask[:, :PAST] = 0
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    dense = model(
        inputs_embeds=x, attention_mask=mask, position_ids=positions, output_attentions=True
    ).attentions[0]
    signal = Attention(rows, heads=heads)
    got = scores(model, x, mask, signal, past)
    for b, row in enumerate(spans()):
        for found, span in zip(got[b], row, strict=True):
            want = expected(dense[b], b, span, signal, x)
            torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_every_text_row_is_read_once(two_turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many spans a sample has; rows before its first span do not vote on any."""
    read: list[int] = []
    original = tokencomp.kernels.attention_colsum

    def spy(q: Tensor, *args: object, **kwargs: object) -> Tensor:
        read.append(q.shape[2])
        return original(q, *args, **kwargs)

    monkeypatch.setattr(tokencomp.kernels, "attention_colsum", spy)
    scores(*two_turns, Attention("text"))
    text = []
    for row in spans():
        visual = {c for s in row for c in range(s.start, s.stop)}
        text.append(sum(c not in visual for c in range(row[0].start, WIDTH - DRAFT)))
    # One more row: the last one of sample 1 votes on the span that ends it.
    assert sorted(read) == sorted([*text, 1])
