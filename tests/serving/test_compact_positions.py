"""`positions="compact"` numbers kept tokens like an engine with one position per token."""

from __future__ import annotations

import pytest
import torch
from support import families as support
from support.families import FAMILIES

import tokencomp
from tokencomp.errors import OptionError

OV = FAMILIES["llava_onevision"]


def embeddings(model, inputs):
    """Return the decoder input of an unpatched call, shape (1, L, d)."""
    seen = {}

    def hook(module, args, kwargs):
        seen["x"] = kwargs["inputs_embeds"]

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    model(**inputs)
    handle.remove()
    return seen["x"]


def reference(model, x, steps):
    """Return the greedy tokens of a plain decoder on rows x (1, n, d) at positions 0, 1, 2, …"""
    tokens = []
    for _ in range(steps):
        hidden = model.model.language_model(inputs_embeds=x).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1)
        tokens.append(int(token))
        x = torch.cat([x, model.get_input_embeddings()(token)[:, None]], dim=1)
    return tokens


def prompts():
    return [
        [support.text(5), OV.image(1), support.text(7)],
        [support.text(3, 2), OV.video(4), support.text(4, 3), OV.image(2), support.text(6, 4)],
    ]


def kept_columns(stats, row):
    keep = torch.ones(stats.lengths[0], dtype=torch.bool)
    for span, kept in zip(stats.spans[row], stats.kept(row)[-1], strict=True):
        keep[span.start : span.stop] = False
        keep[span.start + torch.tensor(kept)] = True
    return keep


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_equals_a_plain_decoder_on_the_kept_rows(row, backend):
    model = OV.build(backend)
    inputs = OV.batch([prompts()[row]])
    x = embeddings(model, inputs)
    with tokencomp.patch(model, 0.6, reducer="uniform", positions="compact") as handle:
        out = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        keep = kept_columns(handle.stats, 0)
    with tokencomp.patch(model, 0.6, reducer="uniform"):
        original = model.generate(**inputs, max_new_tokens=8)
    expected = reference(model, x[:, keep], 8)
    assert int(keep.sum()) < 0.6 * keep.numel()
    assert out.tolist() == expected
    assert original[0, inputs["input_ids"].shape[1] :].tolist() != expected  # the test can fail


@torch.no_grad()
def test_ragged_batch_equals_singles():
    model = OV.build()
    rows, singles = prompts(), []
    with tokencomp.patch(model, 0.5, reducer="uniform", positions="compact"):
        for row in rows:
            inputs = OV.batch([row])
            out = model.generate(**inputs, max_new_tokens=8)
            singles.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        inputs = OV.batch(rows)
        both = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    assert both.tolist() == singles


@torch.no_grad()
def test_second_turn_on_the_cache_continues_the_positions():
    model = OV.build()
    first, second = [support.text(4), OV.image(1), support.text(5)], support.text(6, 9)
    inputs = OV.batch([first])
    whole = OV.batch([[*first, second]])
    x = embeddings(model, whole)
    with tokencomp.patch(model, 0.5, reducer="uniform", positions="compact") as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        keep = kept_columns(handle.stats, 0)
        keep = torch.cat([keep, torch.ones(6, dtype=torch.bool)])
        logits = model(input_ids=torch.tensor([second]), past_key_values=cache).logits[:, -1]
    expected = model.lm_head(model.model.language_model(inputs_embeds=x[:, keep])[0][:, -1])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_ratio_zero_changes_nothing():
    model = OV.build()
    inputs = OV.batch([[support.text(4), OV.image(1), support.text(5)]])
    plain = model.generate(**inputs, max_new_tokens=6)
    with tokencomp.patch(model, 0.0, positions="compact"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=6), plain)


def test_refused_for_mrope_and_for_unknown_values():
    qwen = FAMILIES["qwen2_vl"].build()
    with pytest.raises(OptionError, match="three rows of positions"):
        tokencomp.patch(qwen, 0.5, reducer="uniform", positions="compact")
    with pytest.raises(OptionError, match="'original', 'compact'"):
        tokencomp.patch(OV.build(), 0.5, reducer="uniform", positions="packed")
