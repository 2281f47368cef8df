"""Attention scores that reducers get, against the maps of the model's own eager attention."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from support import oracle
from support.families import END, FAMILIES, Family, text
from support.family.llava import LlavaOn
from support.family.mistral import Mistral3
from torch import Tensor, nn

import tokencomp
from tokencomp import Kept, Plan, Reducer, Stage, Tokens
from tokencomp.errors import UnsupportedModelError
from tokencomp.tokens.signals import Attention, Signal


@dataclass(frozen=True)
class Spy(Reducer):
    """Notes the scores of every span that it sees; keeps the last tokens."""

    signal: Attention
    seen: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.signal})

    def reduce(self, tokens: Tokens) -> Kept:
        self.seen.append(tokens.scores)
        (length,), (budget,) = tokens.lengths, tokens.budgets
        return Kept(torch.arange(length - budget, length))


class TwoTurns:
    """Two prompts of each of two samples, both padded on the left, the first one of text alone."""

    def __init__(self, family: Family, model: nn.Module, past: int) -> None:
        self.family, self.model = family, model
        torch.manual_seed(3)
        last = family.image(1)
        last = dataclasses.replace(last, ids=[i for i in last.ids if i != END])
        rows = [
            [text(3), family.image(0), family.image(1), text(5, 2), family.image(1), text(7, 3)],
            [text(4, 5), family.image(0), text(3, 6), last],
        ]
        self.turn = family.batch(rows)
        self.whole, self.past = self.turn, past
        if past:
            self.first = family.batch([[text(past, 8)], [text(past - 3, 9)]])
            names = [
                n for n in ("input_ids", "attention_mask", "mm_token_type_ids") if n in self.turn
            ]
            joined = {n: torch.cat([self.first[n], self.turn[n]], 1) for n in names}
            self.whole = {**self.turn, **joined}
        self.positions = family.positions(model, self.whole)

    def maps(self, masks: list[Tensor] | None = None, merged: Any = None) -> tuple[Tensor, ...]:
        """Attention (B, H, L, L) of every layer over both turns, with hidden columns if given.

        `merged` merges them into others first, see `oracle.Merged`.
        """
        given = {**self.whole, "position_ids": self.positions, "use_cache": False}
        real = self.whole["attention_mask"].bool()
        masks = masks or [real] * len(self.family.decoder(self.model).layers)
        if merged is not None:
            merged.sizes = torch.ones(real.shape)
        with torch.no_grad(), oracle.masked(self.model, self.family, masks, merged):
            return self.model(**given, output_attentions=True).attentions

    def run(self, plan: Plan) -> Any:
        """Statistics of the second turn under a plan, with the first one in the cache."""
        call = {**self.turn, "position_ids": self.positions[..., self.past :], "use_cache": True}
        with tokencomp.patch(self.model, plan=plan) as handle, torch.no_grad():
            if self.past:
                where = {"position_ids": self.positions[..., : self.past], "use_cache": True}
                out = self.model(**self.first, **where)
                call["attention_mask"] = self.whole["attention_mask"]
                call["past_key_values"] = oracle.cache_of(out)
            self.model(**call)
            return handle.stats

    def raters(self, stats: Any, b: int) -> list[int]:
        """Text after the last span that is rated at least as high as the mean, or the last token.

        Every visual token shares one rating among the text, by products of embeddings.
        """
        x = oracle.decoder_inputs(self.model, self.family, self.turn)["inputs_embeds"][b].tolist()
        words = list(range(stats.spans[b][-1].stop, len(x)))
        ratings = [0.0] * len(words)
        for column in (c for span in stats.spans[b] for c in range(span.start, span.stop)):
            logits = [sum(p * q for p, q in zip(x[column], x[m], strict=True)) for m in words]
            powers = [math.exp(v - max(logits)) for v in logits]
            ratings = [r + p / sum(powers) for r, p in zip(ratings, powers, strict=True)]
        mean = sum(ratings) / max(len(ratings), 1)
        return [m for m, r in zip(words, ratings, strict=True) if r >= mean] or [len(x) - 1]

    def expected(
        self, stats: Any, maps: Tensor, signal: Attention, left: Any = None
    ) -> list[Tensor]:
        """Scores of the patches of every span; `left` are offsets that are kept before."""
        found, end = [], self.turn["input_ids"].shape[1]
        for b, spans in enumerate(stats.spans):
            visual = {c for s in spans for c in range(s.start, s.stop)}
            real = self.turn["attention_mask"][b].nonzero()[:, 0].tolist()
            for j, span in enumerate(spans):
                words = [c for c in range(span.stop, end) if c not in visual] or [end - 1]
                voters = {"text": words, "last": [end - 1], "all": real}.get(signal.rows)
                rows = [self.past + v for v in voters or self.raters(stats, b)]
                offsets = range(span.length) if left is None else left[b][j]
                offsets = [o for o in offsets if not span.fixed_mask()[o]]
                columns = [self.past + span.start + o for o in offsets]
                heads = maps[b][:, rows][:, :, columns].mean(1)
                rms = heads.square().mean(0).sqrt()
                found.append(heads.mean(0) if signal.heads == "mean" else rms)
        return found


def check(seen: list[Tensor], expected: list[Tensor]) -> None:
    assert len(seen) == len(expected) > 0
    for found, want in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("past", [7, 0])
@pytest.mark.parametrize("heads", ["mean", "rms"])
@pytest.mark.parametrize("rows", ["text", "last", "raters", "all"])
def test_scores_at_entry(rows: Any, heads: Any, past: int) -> None:
    """Several spans, one right after another and one at the end of its prompt."""
    family = FAMILIES["qwen2_vl"]
    turns, spy = TwoTurns(family, family.build("eager"), past), Spy(Attention(rows, heads=heads))
    stats = turns.run(Plan((Stage(0, 0.5, spy),)))
    check(spy.seen, turns.expected(stats, turns.maps()[0], spy.signal))


@pytest.mark.parametrize("heads", ["mean", "rms"])
def test_pagerank_in_a_second_turn(heads: Any) -> None:
    """The graph has the rows of this turn alone, because earlier ones have no queries."""
    family, steps = FAMILIES["qwen2_vl"], 3
    model = family.build("eager")
    turns = TwoTurns(family, model, 7)
    spy = Spy(Attention("all", heads=heads, iterations=steps))
    stats = turns.run(Plan((Stage(0, 0.5, spy),)))
    real = turns.whole["attention_mask"].bool()
    real[:, : turns.past] = False
    maps, expected = turns.maps([real] * family.layers)[0][:, :, 7:, 7:], []
    for b, spans in enumerate(stats.spans):
        shown = turns.turn["attention_mask"][b].bool()
        matrix = maps[b][:, shown][:, :, shown]
        ranks = torch.ones(len(matrix), 1, matrix.shape[1])
        for _ in range(steps):
            ranks = ranks @ matrix
        means = ranks[:, 0] / matrix.shape[1]
        joined = means.mean(0) if heads == "mean" else means.square().mean(0).sqrt()
        first = int(shown.int().argmax())
        for span in spans:
            offsets = [o for o in range(span.length) if not span.fixed_mask()[o]]
            expected.append(joined[[span.start + o - first for o in offsets]])
    check(spy.seen, expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_lengths_of_keys_are_taken_before_rotation(name: str) -> None:
    """Of the keys that the projection makes of the normed rows, summed over heads."""
    family = FAMILIES[name]
    model = family.build()
    turns, spy = TwoTurns(family, model, 0), Spy(Attention("none"))
    stats = turns.run(Plan((Stage(0, 0.5, spy),)))
    layer = family.decoder(model).layers[0]
    x = oracle.decoder_inputs(model, family, turns.turn)["inputs_embeds"]
    with torch.no_grad():
        lengths = layer.self_attn.k_proj(layer.input_layernorm(x)).abs().sum(-1)
    expected = []
    for b, spans in enumerate(stats.spans):
        for span in spans:
            offsets = [o for o in range(span.length) if not span.fixed_mask()[o]]
            expected.append(lengths[b, [span.start + o for o in offsets]])
    check(spy.seen, [e.float() for e in expected])


@pytest.mark.parametrize("past", [7, 0])
@pytest.mark.parametrize("side", ["previous", "next"])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("qwen2_vl", "last"), ("qwen3_vl", "last"), ("llava_onevision", "last"),
        ("internvl", "last"), ("qwen2_vl", "raters"), ("llava_onevision", "raters"),
    ],
)  # fmt: skip
def test_scores_between_layers(name: str, rows: Any, side: Any, past: int) -> None:
    """Of the layer before or after the stage, among the tokens that have come as far as it."""
    family = FAMILIES[name]
    turns, spies = (
        TwoTurns(family, family.build("eager"), past),
        [Spy(Attention(rows, layer=side)) for _ in range(2)],
    )
    cuts = (2, 3)
    stats = turns.run(Plan(tuple(map(Stage, cuts, (0.6, 0.3), spies))))
    plain = turns.maps()
    check(
        spies[0].seen, turns.expected(stats, plain[1 if side == "previous" else 2], spies[0].signal)
    )
    real, gone = turns.whole["attention_mask"].bool(), turns.whole["attention_mask"].bool()
    for b, spans in enumerate(stats.spans):
        for span, kept in zip(spans, stats.kept(b)[0], strict=True):
            gone[b, past + span.start : past + span.stop] = False
            gone[b, [past + span.start + o for o in kept]] = True
    maps = turns.maps([real, real, gone, gone])[2 if side == "previous" else 3]
    left = [stats.kept(b)[0] for b in range(2)]
    check(spies[1].seen, turns.expected(stats, maps, spies[1].signal, left))


class AfterMerging(TwoTurns):
    """Two prompts of one sample. Tokens of the first one are merged."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        self.family, self.model = family, model
        torch.manual_seed(3)
        first = [text(3), family.image(0), text(5, 2)]
        turn = [text(3, 5), family.image(1), text(4, 3), family.image(0), text(7, 3)]
        self.first, self.turn = family.batch([first]), family.batch([turn])
        self.whole, self.past = family.batch([[*first, *turn]]), self.first["input_ids"].shape[1]
        self.positions = family.positions(model, self.whole)

    def run(self, plan: Plan) -> tuple[Any, list[Tensor], oracle.Merged]:
        """Statistics of the second turn, columns that stay of the first, and what it merges."""
        start, rest = self.positions[..., : self.past], self.positions[..., self.past :]
        setting = {"ratio": 0.7, "reducer": "kcenter", "merge": True}
        with tokencomp.patch(self.model, **setting) as handle, torch.no_grad():
            out = self.model(**self.first, position_ids=start, use_cache=True)
            merged = oracle.Merged(handle)
            kept = oracle.kept_columns(handle, self.first, self.family.layers)
            handle.set(plan=plan)
            call = {**self.turn, "attention_mask": self.whole["attention_mask"]}
            self.model(**call, position_ids=rest, past_key_values=oracle.cache_of(out))
            return handle.stats, kept, merged


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("rows", ["text", "last", "raters", "all"])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_merged_rows_of_earlier_turns_count_by_weight(name: str, rows: Any, layer: int) -> None:
    """As in attention: all that they represent takes its share."""
    family = FAMILIES[name]
    turns, spy = AfterMerging(family, family.build("eager")), Spy(Attention(rows))
    stats, kept, merged = turns.run(Plan((Stage(layer, 0.5, spy),)))
    ones = torch.ones_like(turns.turn["input_ids"]).bool()
    masks = [torch.cat([mask, ones], 1) for mask in kept]
    scorer = max(layer - 1, 0)
    expected, plain = (
        turns.expected(stats, turns.maps(masks, merges)[scorer], spy.signal)
        for merges in (merged, None)
    )
    check(spy.seen, expected)
    assert max(oracle.difference(*pair) for pair in zip(expected, plain, strict=True)) > 1e-4


LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
INDEXED = {**LATENT, "layer_types": ["indexed_attention"] * 2, "index_n_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "Qwen3": FULL,  # norms of queries and keys
    "Cohere2": FULL,  # no rotation in layers of this kind
    "DeepseekV3": LATENT,
    "Ministral3": {},  # scaled queries, line breaks in the spans
    "Gemma3Text": {**FULL, "query_pre_attn_scalar": 32},
    "Qwen3_5Text": FULL,  # the query projection makes a gate too
    "Glm4": {},  # pairs are interleaved, only a part is rotated
    "Dots3NoteText": {  # layers differ in their heads, and an indexer reads the mask
        **INDEXED,
        "layer_types": ["sliding_attention", "indexed_attention"],
        "per_layer_config": {
            "0": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
            | {"kv_lora_rank": 24}
        },
    },
    "MistralLarge4Text": {  # the last layer follows the indexer of the one before
        **INDEXED,
        "indexer_types": ["full", "shared"],
        "no_rope_layers": [1, 1],
    },
}


def on_decoder(name: str, **more: Any) -> LlavaOn:
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip("the release has no such decoder")
    sizes = {"head_dim": 16, "num_hidden_layers": 2}
    return LlavaOn(kind, **{**sizes, **DECODERS.get(name, {}), **more})


@pytest.mark.parametrize("past", [7, 0])
@pytest.mark.parametrize("name", DECODERS)
def test_scores_of_any_attention(name: str, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of layer 0, and of layer 1 before it runs; a cache may hold latents, not keys."""
    if name == "Qwen3_5Text":  # transformers 5.6 and 5.13 fail where no layer keeps a state
        monkeypatch.setattr(transformers.Cache, "has_previous_state", lambda *_: False)
    family = on_decoder(name) if name != "Ministral3" else Mistral3()
    model = family.build("eager")
    turns, seen = TwoTurns(family, model, past), list[Tensor]()
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        for layer in family.decoder(model).layers
    ]
    turns.maps()
    for hook in hooks:
        hook.remove()
    for layer, side in ((0, "previous"), (1, "previous"), (1, "next")):
        if layer and name == "MistralLarge4Text":
            continue  # its layers hold the same rows
        spy = Spy(Attention("text", layer=side))
        stats = turns.run(Plan((Stage(layer, 0.5, spy),)))
        check(spy.seen, turns.expected(stats, seen[1 if side == "next" else 0], spy.signal))


def test_logits_that_scores_do_not_know_are_refused() -> None:
    family = on_decoder("Gemma2", **FULL, attn_logit_softcapping=30.0)
    model, inputs = family.build("eager"), family.batch([[text(3), family.image(), text(5)]])
    with pytest.raises(UnsupportedModelError, match="softcap"):  # noqa: SIM117
        with tokencomp.patch(model, 0.5, reducer="condiv"):
            model(**inputs)
