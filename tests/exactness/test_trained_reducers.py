"""Reducers with trained weights under random ragged batches, against references in plain code."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import matrix, oracle
from support.ccam import dense
from support.families import CORE, Family, text
from torch import Tensor, nn

import tokencomp
from tokencomp.reducers._trained import load
from tokencomp.reducers.ccam import Ccam

FAMILY_NAMES = CORE
STEPS = 4
SEEDS = range(5)


def batch(family: Family, seed: int) -> tuple[list[list[Any]], dict[str, Tensor]]:
    """Two to four rows with none to three media among words; some begin or end with media."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows: list[list[Any]] = []
    for number in range(draw.randint(2, 4)):
        row: list[Any] = []
        for _ in range(draw.choice([1, 1, 2, 3]) if number else 1):
            row += [text(draw.randint(1, 6), draw.randint(1, 99))] if draw.random() < 0.8 else []
            row += [family.video(4) if draw.random() < 0.4 else family.image(draw.randint(0, 2))]
        row += [text(draw.randint(1, 7), draw.randint(1, 99))] if draw.random() < 0.8 else []
        rows.append(row)
    rows[draw.randrange(1, len(rows))] = [text(draw.randint(3, 30), 5)]
    return rows, family.batch(rows)


def check(
    family: Family, seed: int, name: str, ratio: float, **more: Any
) -> tuple[Any, Any, Any, Any]:
    """Prefill and decode steps equal the masked run; returns what chose, and what it saw."""
    model = family.build("eager")
    _, options = matrix.on_model((name, {**matrix.row(name).options[0], **more}), model)
    inputs = batch(family, seed)[1]
    with tokencomp.patch(model, ratio, reducer=name, **options) as handle:
        out = oracle.generate(model, inputs, STEPS)
        masks, stats = oracle.kept_columns(handle, inputs, family.layers), handle.stats
    assert 0 < stats.ratio < 1
    replaced = contextlib.nullcontext()
    if name == "ccam":
        replaced = projected(model, family, stats, options["weights"])
    with replaced:
        new = out.sequences[:, -STEPS:-1]
        expected = oracle.masked_logits(model, family, inputs, masks, new)[:, -STEPS:]
    assert (torch.stack(out.logits, 1) - expected).abs().max() < 1e-5
    return model, inputs, stats, options["weights"]


@pytest.mark.thin(4)
@pytest.mark.parametrize("seed", SEEDS)
def test_selector(family: Family, seed: int) -> None:
    """Patches with the largest logits of the network, on layer 0's attention of the text."""
    model, inputs, stats, weights = check(family, seed, "selector", [0.3, 0.5, 0.8][seed % 3])
    positions = family.positions(model, inputs)
    with torch.no_grad():
        maps = model(**inputs, position_ids=positions, output_attentions=True).attentions[0]
    length = maps.shape[-1]
    for b, spans in enumerate(stats.spans):
        visual = {c for s in spans for c in range(s.start, s.stop)}
        for span, kept in zip(spans, stats.kept(b)[0], strict=True):
            voters = [c for c in range(span.stop, length) if c not in visual] or [length - 1]
            row = maps[b, :, voters, span.start : span.stop].mean((0, 1))
            fixed = [*span.special, *span.text]
            patches = [i for i in range(span.length) if i not in fixed]
            check_kept(kept, span, network(row[patches], weights), span.stop == length)


@pytest.mark.thin(4)
@pytest.mark.parametrize("seed", SEEDS)
def test_selector_of_features(family: Family, seed: int) -> None:
    """Patches with the largest logits of the network on their own embeddings, whatever the text."""
    ratio = [0.3, 0.5, 0.8][seed % 3]
    found = check(family, seed, "selector", ratio, input="features")
    model, inputs, stats, weights = found
    x = oracle.decoder_inputs(model, family, inputs)["inputs_embeds"]
    for b, spans in enumerate(stats.spans):
        for span, kept in zip(spans, stats.kept(b)[0], strict=True):
            fixed = [*span.special, *span.text]
            columns = [span.start + i for i in range(span.length) if i not in fixed]
            check_kept(kept, span, network(x[b, columns], weights), span.stop == x.shape[1])


def check_kept(kept: Any, span: Any, logits: Tensor, last: bool) -> None:
    """The patches of the largest logits are kept; at the end of a prompt its last token stays."""
    fixed = [*span.special, *span.text]
    patches = [i for i in range(span.length) if i not in fixed]
    order = sorted(range(len(patches)), key=lambda i: (-float(logits[i]), i))
    count = len(kept) - len(fixed)
    gap = float(logits[order[count - 1]] - logits[order[count]]) if count < len(patches) else 1.0
    best = sorted(patches[i] for i in order[:count])
    if last and span.length - 1 not in fixed:
        best[-1] = patches[-1]
    assert list(kept) == sorted([*fixed, *best]) or gap < 1e-4


def network(row: Tensor, weights: str) -> Tensor:
    """Logits (n,) of attention (n,) or features (n, d), layer by layer from the stored tensors."""
    stored = {k: v.double() for k, v in load_file(weights).items()}
    row = row.double()
    if row.ndim == 1:
        x = torch.log(row / row.mean() + 0.01)[None]
    else:
        centred = row - row.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        x = stored["stem.weight"] @ (centred / (variance + 1e-5).sqrt()).T
    for i in range(0, 4 * 2, 4):  # two blocks: depthwise, pointwise, batch norm, ReLU
        x = F.conv1d(x, stored[f"layers.{i}.weight"], padding=1, groups=len(x))
        x = F.conv1d(x, stored[f"layers.{i + 1}.weight"])
        mean, var, scale, shift = (
            stored[f"layers.{i + 2}.{part}"][:, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()
    return F.conv1d(x, stored["head.weight"], stored["head.bias"])[0]


@pytest.mark.thin(4)
@pytest.mark.parametrize("seed", SEEDS)
def test_ccam(family: Family, seed: int) -> None:
    """Every medium becomes as many rows as there are queries, each of the frames up to its time."""
    check(family, seed, "ccam", 0.5)


@contextlib.contextmanager
def projected(model: nn.Module, family: Family, stats: Any, weights: str) -> Iterator[None]:
    """Replace kept embeddings by what a dense projector makes of the span."""
    made = copy.deepcopy(load(Ccam, Path(weights))[0]).double()

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = kwargs["inputs_embeds"].clone()
        for b, spans in enumerate(stats.spans):
            for span, kept in zip(spans, stats.kept(b)[0], strict=True):
                fixed = [*span.special, *span.text]
                patches = [span.start + i for i in range(span.length) if i not in fixed]
                columns = [span.start + i for i in kept if i not in fixed]
                rows = dense(made, x[b, patches].double(), span.grid[0])
                assert len(columns) == len(rows) == matrix.QUERIES
                x[b, columns] = rows.to(x)
        return args, {**kwargs, "inputs_embeds": x}

    hook = family.decoder(model).register_forward_pre_hook(replace, with_kwargs=True)
    try:
        with torch.no_grad():
            yield
    finally:
        hook.remove()
