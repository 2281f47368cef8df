"""Quantized caches against the unpatched decoder on an equal cache that got the kept rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.caches import ENTRY, quantized_cache
from support.families import CORE, Family, text
from support.prompts import ragged, single
from torch import Tensor

import tokencomp

FAMILY_NAMES = CORE
STEPS = 8  # more than the rows that a cache keeps as they are


class KeptRows:
    """The decoder of an unpatched model on a cache, and the rows that calls have written to it.

    With `logs` (B, n), single tokens add them to the logits of the first n rows.
    """

    def __init__(self, model: Any, family: Family, cache: Any) -> None:
        self.model, self.family, self.cache = model, family, cache
        self.mask: Tensor | None = None
        self.logs: Tensor | None = None

    def turn(self, inputs: dict[str, Tensor], positions: Tensor, kept: Tensor) -> Tensor:
        """Last logits (B, V) of a prompt of which the columns `kept` (B, L) alone are given."""
        given = {**inputs, "position_ids": positions, "use_cache": False}
        caught = oracle.decoder_inputs(self.model, self.family, given)
        order = kept.long().argsort(dim=1, stable=True)[:, -int(kept.sum(1).max()) :]
        real = kept.gather(1, order)
        embeds = caught["inputs_embeds"]
        # As the rows of padding do not count, they may be zeros.
        embeds = (
            embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])) * real[..., None]
        )
        call = {"inputs_embeds": embeds}
        visual = caught.get("visual_pos_masks")
        if visual is not None:
            number = (visual.flatten().cumsum(0) - 1).view_as(visual)
            call["visual_pos_masks"] = visual.gather(1, order) & real
            rows = number.gather(1, order)[call["visual_pos_masks"]]
            call["deepstack_visual_embeds"] = [x[rows] for x in caught["deepstack_visual_embeds"]]
        index = order.expand(*positions.shape[:-2], -1, -1)
        return self._run(call, positions.gather(-1, index) * real, real)

    def word(self, token: Tensor, positions: Tensor) -> Tensor:
        """Last logits (B, V) behind one more token (B,), at `positions` (…, B, 1)."""
        call = {"inputs_embeds": self.model.get_input_embeddings()(token[:, None])}
        return self._run(call, positions, torch.ones(len(token), 1, dtype=torch.bool))

    @torch.no_grad()
    def _run(self, call: dict[str, Any], positions: Tensor, real: Tensor) -> Tensor:
        self.mask = real if self.mask is None else torch.cat([self.mask, real], 1)
        call |= {"attention_mask": self.mask.long(), "position_ids": positions}
        if self.logs is not None:
            more = self.mask.shape[1] - self.logs.shape[1]
            call["attention_mask"] = torch.nn.functional.pad(self.logs, (0, more))[:, None, None]
        decoder = self.family.decoder(self.model)
        hidden = decoder(**call, past_key_values=self.cache, use_cache=True)[0]
        return self.model.get_output_embeddings()(hidden[:, -1])


@pytest.mark.thin(2)
# The scale of fp8 values counts the whole batch, padding included: see docs/support.md.
@pytest.mark.parametrize(
    ("backend", "batch"),
    [("fp8", single), ("quanto", single), ("rounded", single), ("rounded", ragged)],
)
def test_prompts_and_words(family: Family, backend: str, batch: Any) -> None:
    model, inputs = family.build(), batch(family)
    cache, length = quantized_cache(backend, model), inputs["input_ids"].shape[1]
    call = {"past_key_values": cache}
    _, out, (kept, *_) = oracle.generated(model, family, inputs, STEPS, call, plan=ENTRY)
    assert cache.get_seq_length() == length + STEPS - 1
    positions = family.positions(model, inputs)
    rows = KeptRows(model, family, quantized_cache(backend, model))
    logits, later = [rows.turn(inputs, positions, kept)], oracle.following(positions, STEPS)
    for step, token in enumerate(out.sequences[:, length:-1].T):
        logits.append(rows.word(token, later[..., step : step + 1]))
    assert oracle.difference(torch.stack(out.logits), torch.stack(logits)) < 1e-5
    _, plain, _ = oracle.generated(model, family, inputs, STEPS, plan=ENTRY)
    assert oracle.difference(out.logits[1], plain.logits[1]) > 1e-3  # rounding changes something


@pytest.mark.thin(2)
@pytest.mark.parametrize("reducer", ["uniform", pytest.param(plans.RELEVANT, id="condiv")])
@pytest.mark.parametrize("backend", ["fp8", "quanto", "rounded"])
def test_a_second_image(family: Family, backend: str, reducer: Any) -> None:
    """Rows of the first turn are dequantized, to be scored against, and all are rounded again."""
    model = family.build()
    first = family.batch([[text(3), family.image(0), text(5, 3)]])
    second = family.batch([[text(2, 9), family.image(1), text(4, 8)]])
    n = first["input_ids"].shape[1]
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    turns = [(first, family.positions(model, first)), (second, family.positions(model, second) + n)]
    rows = KeptRows(model, family, quantized_cache(backend, model))
    got, kept, cache = [], [], quantized_cache(backend, model)
    later = oracle.following(turns[1][1], STEPS)
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle, torch.no_grad():
        for number, (inputs, positions) in enumerate(turns):
            call = {**inputs, "attention_mask": mask[:, : n if number == 0 else None]}
            call |= {"position_ids": positions, "past_key_values": cache}
            got.append(model(**call, use_cache=True, logits_to_keep=1).logits[:, -1])
            kept.append(oracle.kept_columns(handle, inputs, 1)[0])
        for step in range(STEPS):
            word = {"input_ids": torch.tensor([[7 + step]]), "past_key_values": cache}
            word["attention_mask"] = torch.ones(1, mask.shape[1] + step + 1, dtype=torch.long)
            word["position_ids"] = later[..., step : step + 1]
            got.append(model(**word, use_cache=True).logits[:, -1])
    expected = [rows.turn(*turn, columns) for turn, columns in zip(turns, kept, strict=True)]
    for step in range(STEPS):
        expected.append(rows.word(torch.tensor([7 + step]), later[..., step : step + 1]))
    assert all(int((~columns).sum()) for columns in kept)
    assert oracle.difference(torch.stack(got), torch.stack(expected)) < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("backend", ["fp8", "quanto", "rounded"])
def test_merged_rows(family: Family, backend: str) -> None:
    """They are rounded as those of a cache that got a row for every kept token, and weigh more."""
    model, inputs = family.build(), single(family)
    cache, length = quantized_cache(backend, model), inputs["input_ids"].shape[1]
    with tokencomp.patch(model, 0.75, reducer="kcenter", merge=True) as handle, torch.no_grad():
        out = oracle.generate(model, inputs, STEPS, past_key_values=cache)
        exact = oracle.cache_of(model(**inputs, use_cache=True))
        masks, merged = oracle.kept_columns(handle, inputs, family.layers), oracle.Merged(handle)
    oracle.masked_logits(model, family, inputs, masks, merged=merged)
    assert cache.get_seq_length() == length + STEPS - 1
    rows = KeptRows(model, family, quantized_cache(backend, model))
    for rounded, layer in zip(rows.cache.layers, exact.layers, strict=True):
        rounded.update(layer.keys, layer.values)
    later = oracle.following(family.positions(model, inputs), STEPS)
    rows.logs = merged.sizes[masks[0]].log().float()[None]
    rows.mask = torch.ones(1, rows.logs.shape[1]).bool()
    assert rows.logs.shape[1] < length and rows.logs.max() > 1
    for step, token in enumerate(out.sequences[:, length:-1].T):
        expected = rows.word(token, later[..., step : step + 1])
        assert oracle.difference(out.logits[step + 1], expected) < 1e-4
