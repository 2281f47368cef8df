"""What is chosen does not depend on the last bits of features, which differ with the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.families import FAMILIES, IMAGE, text

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer

ROUNDING = 2e-7  # relative


@pytest.mark.parametrize("reducer", ["kcenter", "divprune"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl"])
def test_the_first_of_two_tokens_stays(name: str, reducer: str) -> None:
    """The tower leaves two tokens of an image, each as far from the other, and one is kept.

    The same in a single prompt, in a batch, and in a second turn.
    """
    family = FAMILIES[name]
    model, image = family.build(), family.image(1)
    count = image.ids.count(IMAGE)
    plan = Plan(
        (Stage(0, 1 / count, make_reducer(reducer)),),
        TowerStage(0, 2 / count, make_reducer("random")),
    )
    rows = [text(3), image, text(4)]
    other = [text(2), family.image(0), text(9, 2)]
    alone, batch = family.batch([rows]), family.batch([rows, other])
    both = family.batch([[*other, *rows]])
    positions = family.positions(model, both)

    def rounded(module: Any, args: Any, kwargs: Any) -> Any:
        x = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": x * (1 + ROUNDING * torch.randn_like(x))}

    def kept(inputs: dict[str, Any], **call: Any) -> list[int]:
        model(**inputs, **call)
        offsets: list[int] = handle.stats.kept(0)[0][-1]
        return offsets

    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        decoder = family.decoder(model)
        hook = decoder.register_forward_pre_hook(rounded, with_kwargs=True, prepend=True)
        found, n = [], family.batch([other])["input_ids"].shape[1]
        for _ in range(6):
            found += [kept(alone), kept(batch), kept(both, position_ids=positions)]
            first = model(**family.batch([other]), position_ids=positions[..., :n], use_cache=True)
            turn = {**alone, "attention_mask": both["attention_mask"]}
            turn["past_key_values"] = oracle.cache_of(first)
            found.append(kept(turn, position_ids=positions[..., n:], use_cache=True))
        hook.remove()
        left = handle.stats.tower_kept(0)[-1]
    assert len(left) == 2 and found == [left[:1]] * 24
