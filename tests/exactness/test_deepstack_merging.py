"""Merging with weights on Qwen3-VL against a decoder written out here, in float64.

The decoder runs on merged rows alone, without padding, cache or masks: a row is the mean of the
tokens that it stands for, the logarithm of their number is added to its attention logits, and it
has the position and the deepstack features of the token that has stayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import oracle
from support.families import FAMILIES, IMAGE, VIDEO, Family, text
from support.family.qwen import Qwen3VL
from torch import Tensor, nn

import tokencomp
from tokencomp import Plan, Stage, make_reducer

STEPS = 4
KCENTER = make_reducer("kcenter")
PLANS = {
    "entry": Plan((Stage(0, 0.25, KCENTER, merge=True),)),
    "layer": Plan((Stage(2, 0.25, KCENTER, merge=True),)),
    "both": Plan((Stage(0, 0.5, KCENTER, merge=True), Stage(3, 0.2, KCENTER, merge=True))),
}


class TwoLevels(Qwen3VL):
    """Features of two blocks of the tower are added, behind the first two decoder layers."""

    deepstack = (0, 1)


@dataclass
class Rows:
    """The rows of one sample: hidden states (n, d), positions (3, n), columns and sizes (n,)."""

    hidden: Tensor
    positions: Tensor
    columns: list[int]
    sizes: Tensor

    def merged(self, spans: list[tuple[list[int], list[int]]]) -> Rows:
        """Rows after a stage; `spans` has the visual columns of each span, and the kept ones."""
        hidden, sizes, gone = self.hidden.clone(), self.sizes.clone(), set()
        row = {column: i for i, column in enumerate(self.columns)}
        for visual, kept in spans:
            groups = {column: [column] for column in kept}
            for column in [c for c in visual if c in row and c not in groups]:
                x = self.hidden[row[column]]
                near = [torch.cosine_similarity(x, self.hidden[row[k]], dim=0) for k in kept]
                groups[kept[int(torch.stack(near).argmax())]].append(column)
                gone.add(column)
            for column, members in groups.items():
                own = [row[c] for c in members]
                weights = self.sizes[own]
                hidden[row[column]] = (weights[:, None] * self.hidden[own]).sum(0) / weights.sum()
                sizes[row[column]] = weights.sum()
        left = [i for i, column in enumerate(self.columns) if column not in gone]
        columns = [self.columns[i] for i in left]
        return Rows(hidden[left], self.positions[:, left], columns, sizes[left])


class Decoder:
    """The text decoder of Qwen3-VL in plain PyTorch, from the weights of a model."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.config = model.config.text_config
        self.weights = {k: v.double() for k, v in family.decoder(model).state_dict().items()}
        self.head = model.lm_head.weight.double()
        self.depth, self.dim = self.config.num_hidden_layers, self.config.head_dim

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (n, heads, dim): pair i turns by the axis t, h, w, t, h, w, … as far as they go."""
        half = self.dim // 2
        axis = [0] * half
        for number, length in ((1, 3), (2, 3)):  # mrope_section 2, 3, 3
            axis[number : length * 3 : 3] = [number] * len(axis[number : length * 3 : 3])
        turns = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = positions[axis].double().T * turns
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def layer(self, i: int, rows: Rows) -> Tensor:
        x, name, n = rows.hidden, f"layers.{i}", len(rows.hidden)
        h = self.norm(x, f"{name}.input_layernorm")
        q, k, v = (
            self.linear(h, f"{name}.self_attn.{p}_proj").view(n, -1, self.dim) for p in "qkv"
        )
        q = self.rotated(self.norm(q, f"{name}.self_attn.q_norm"), rows.positions)
        k = self.rotated(self.norm(k, f"{name}.self_attn.k_norm"), rows.positions)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q, k) * self.dim**-0.5 + rows.sizes.log()
        logits = logits.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
        out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1)
        x = x + self.linear(out, f"{name}.self_attn.o_proj")
        h = self.norm(x, f"{name}.post_attention_layernorm")
        gate, up = (self.linear(h, f"{name}.mlp.{p}_proj") for p in ("gate", "up"))
        return x + self.linear(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj")

    def logits(self, rows: Rows, deep: list[Tensor], stages: dict[int, Any]) -> Tensor:
        """Logits (n, V) of what is left; `deep` has features (L, d) of all columns, by layer."""
        for i in range(self.depth):
            if i in stages:
                rows = rows.merged(stages[i])
            rows.hidden = self.layer(i, rows)
            if i < len(deep):
                rows.hidden = rows.hidden + deep[i][rows.columns]
        return self.norm(rows.hidden, "norm") @ self.head.T


@contextlib.contextmanager
def decoder_inputs(model: nn.Module, family: Family) -> Iterator[dict[str, Any]]:
    """What the unpatched model hands to its decoder."""
    caught: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)

    hook = family.decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    yield caught
    hook.remove()


def batch(family: Family) -> dict[str, Tensor]:
    """Ragged: an image, two media, and text alone."""
    torch.manual_seed(7)
    return family.batch(
        [
            [text(3), family.image(0), text(9, 3)],
            [family.image(2), text(3, 4), family.video(4), text(5, 5)],
            [text(11, 6)],
        ]
    )


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("levels", [1, 2])
def test_merged_rows_with_deepstack_features(levels: int, plan: str, backend: str) -> None:
    """Prefill and decode steps of a ragged batch."""
    family = FAMILIES["qwen3_vl"] if levels == 1 else TwoLevels()
    model, inputs = family.build(backend), batch(family)
    with tokencomp.patch(model, plan=PLANS[plan]) as handle:
        out = oracle.generate(model, inputs, STEPS)
        stats, layers = handle.stats, [s.layer for s in handle.plan.stages]
    new = out.sequences[:, -STEPS:-1]
    with decoder_inputs(model, family) as caught, torch.no_grad():
        model(**inputs)
        more = model.get_input_embeddings()(new).double()
    embeddings, visual = caught["inputs_embeds"].double(), caught["visual_pos_masks"]
    positions, decoder = family.positions(model, inputs), Decoder(model, family)
    ids = inputs["input_ids"]
    for b, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        first = ids.shape[1] - length
        deep = []
        for features in caught["deepstack_visual_embeds"]:
            level = torch.zeros(*visual.shape, features.shape[1], dtype=torch.float64)
            level[visual] = features.double()
            level = torch.cat([level[b, first:], torch.zeros(STEPS, features.shape[1])])
            deep.append(level)
        x = torch.cat([embeddings[b, first:], more[b]])
        last = positions[:, b].max() + 1
        later = (last + torch.arange(STEPS - 1)).expand(3, -1)
        rows = Rows(
            x,
            torch.cat([positions[:, b, first:], later], 1),
            list(range(len(x))),
            torch.ones(len(x), dtype=torch.float64),
        )
        stages = {}
        for number, layer in enumerate(layers):
            stages[layer] = []
            for span, kept in zip(stats.spans[b], stats.kept(b)[number], strict=True):
                columns = range(span.start, span.stop)
                media = [c - first for c in columns if int(ids[b, c]) in (IMAGE, VIDEO)]
                stay = [span.start + o - first for o in kept]
                stages[layer].append((media, [c for c in stay if c in media]))
        expected = decoder.logits(rows, deep, stages)[-STEPS:]
        got = torch.stack(out.logits, 1)[b].double()
        assert (got - expected).abs().max() < 1e-5
        plain = Decoder.logits(decoder, Rows(x, rows.positions, rows.columns, rows.sizes), deep, {})
        if stats.spans[b]:
            assert (got - plain[-STEPS:]).abs().max() > 1e-3  # merging changes something
