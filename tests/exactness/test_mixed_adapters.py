"""Batches whose samples have adapters of their own (PEFT), some of them without media."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, text

import tokencomp


@pytest.mark.parametrize("reducer", ["fastv", "condiv", "dart"])
@torch.no_grad()
def test_a_sample_has_the_scores_of_its_own_adapter(reducer: str) -> None:
    """Those of a batch in which it is alone."""
    peft = pytest.importorskip("peft")
    family = FAMILIES["qwen2_vl"]
    config = peft.LoraConfig(
        target_modules=r".*language_model.*(q_proj|k_proj|v_proj)", init_lora_weights=False
    )
    model: Any = peft.get_peft_model(family.build(), config)
    model.add_adapter("other", config)
    model.eval()
    prompt = [text(3), family.image(0), text(6, 3)]
    batch = family.batch([[text(9, 4)], prompt, prompt, [text(5)]])
    names = ["other", "default", "other", "default"]
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        logits = model(**batch, adapter_names=names).logits
        kept = [handle.stats.kept(b) for b in range(4)]
        for b in (1, 2):
            alone = model(**family.batch([prompt]), adapter_names=[names[b]]).logits
            assert handle.stats.kept(0) == kept[b]
            found = logits[b, -alone.shape[1] :]
            torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-5)
    assert kept[1] != kept[2] or not torch.equal(logits[1], logits[2])
