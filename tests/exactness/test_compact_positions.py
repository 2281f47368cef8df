"""`positions="compact"` numbers kept tokens like an engine with one position per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.families import FAMILIES, text

import tokencomp
from tokencomp.errors import OptionError

OV = FAMILIES["llava_onevision"]
ROWS = [
    [text(5), OV.image(1), text(7)],
    [text(3, 2), OV.video(4), text(4, 3), OV.image(2), text(6, 4)],
]


def greedy(model: Any, x: torch.Tensor, steps: int, logs: torch.Tensor | None = None) -> list[int]:
    """Return the greedy tokens of a plain decoder on rows x (1, n, d) at positions 0, 1, 2, …

    With `logs` (n,), attention adds them to the logits of these rows.
    """
    tokens: list[int] = []
    for _ in range(steps):
        mask = None
        if logs is not None:
            n = x.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool).tril()
            added = torch.nn.functional.pad(logs, (0, n - len(logs)))
            mask = torch.where(seen, added, torch.finfo(x.dtype).min)[None, None]
        decoder = model.model.language_model
        hidden = decoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1)
        tokens.append(int(token))
        x = torch.cat([x, model.get_input_embeddings()(token)[:, None]], dim=1)
    return tokens


def generated(model: Any, rows: list[Any], **call: Any) -> list[list[int]]:
    inputs = OV.batch(rows)
    ids = model.generate(**inputs, max_new_tokens=8, **call)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_equals_a_plain_decoder_on_the_kept_rows(backend: str) -> None:
    """Alone and in a ragged batch."""
    model, expected = OV.build(backend), []
    for row in ROWS:
        inputs = OV.batch([row])
        x = oracle.decoder_inputs(model, OV, inputs)["inputs_embeds"]
        with tokencomp.patch(model, 0.6, reducer="uniform", positions="compact") as handle:
            alone = generated(model, [row])
            keep = oracle.kept_columns(handle, inputs, OV.layers)[-1][0].bool()
        expected += [greedy(model, x[:, keep], 8)]
        assert alone == expected[-1:] and keep.sum() < 0.6 * keep.numel()
    with tokencomp.patch(model, 0.6, reducer="uniform"):
        assert generated(model, ROWS) != expected  # original positions
    with tokencomp.patch(model, 0.6, reducer="uniform", positions="compact"):
        assert generated(model, ROWS) == expected


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_merged_rows_count_once_in_positions_and_by_weight_in_attention(
    backend: str, static: bool
) -> None:
    """Alone and in a ragged batch."""
    model, expected = OV.build(backend), []
    setting = {"ratio": 0.7, "reducer": "kcenter", "merge": True, "positions": "compact"}
    call = {"cache_implementation": "static"} if static else {}
    for row in ROWS:
        inputs = OV.batch([row])
        x = oracle.decoder_inputs(model, OV, inputs)["inputs_embeds"]
        with tokencomp.patch(model, **setting) as handle:
            alone = generated(model, [row], **call)
            keep = oracle.kept_columns(handle, inputs, OV.layers)[-1][0].bool()
            merged = oracle.Merged(handle)
        merged.sizes = torch.ones(keep[None].shape)
        x, logs = merged(0, x)
        expected += [greedy(model, x[:, keep], 8, logs[0, keep])]
        assert alone == expected[-1:] and logs.max() > 1
        assert alone != [greedy(model, x[:, keep], 8)]
    with tokencomp.patch(model, **setting):
        assert generated(model, ROWS, **call) == expected


@torch.no_grad()
def test_second_turn_on_the_cache_continues_the_positions() -> None:
    model, second = OV.build(), text(6, 9)
    inputs = OV.batch([ROWS[0]])
    x = oracle.decoder_inputs(model, OV, OV.batch([[*ROWS[0], second]]))["inputs_embeds"]
    with tokencomp.patch(model, 0.5, reducer="uniform", positions="compact") as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        keep = oracle.kept_columns(handle, inputs, OV.layers)[-1][0].bool()
        logits = model(input_ids=torch.tensor([second]), past_key_values=cache).logits[:, -1]
    rows = x[:, torch.cat([keep, torch.ones(6, dtype=torch.bool)])]
    expected = model.lm_head(model.model.language_model(inputs_embeds=rows)[0][:, -1])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_refused_for_mrope() -> None:
    with pytest.raises(OptionError):
        tokencomp.patch(FAMILIES["qwen2_vl"].build(), 0.5, positions="compact")
