"""Teacher forcing: every setting continues the full model's own answer, token by token.

What a setting gets wrong here is not the consequence of an earlier mistake. The same is done with
the full cache, of which a step reads few rows (`READERS`): a bound for methods that keep all rows
and choose again what they read. They are masked runs, which save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.run import tower_once, usable
from benchmarks.long.answers import KINDS, RATIOS, method_of, unpack
from benchmarks.publishing import table
from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.metrics import difference
from tokencomp.evaluation.patches import PatchedModels
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.inputs.prompts import build_inputs, to_model
from tokencomp.zoo.shapesqa.long_scenes import LongItem

READERS = ("question", "answer", "fact", "token")
"""Whose attention in the full run chooses the rows that are read: that of the last token of the
question, once; the sum over the whole answer, once; that over a fact, for each; and of each token.
"""
GRIDS = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids")


def answer_ids(processor: Any, text: str) -> list[int]:
    """Tokens of an answer and its end."""
    tokenizer = processor.tokenizer
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def facts_of(processor: Any, family: str, text: str) -> list[int]:
    """For every token of an answer the number of its fact; -1 for the end."""
    tokens = answer_ids(processor, text)
    out, fact = [], 0
    for number, token in enumerate(tokens[:-1]):
        word = processor.tokenizer.decode([token])
        if family == "read" and number and word[:1].isspace():
            fact += 1
        out.append(fact)
        if word.strip() == ";":
            fact += 1
    return [*out, -1]


def prompt_of(processor: Any, model: Any, one: LongItem) -> tuple[dict[str, Any], int]:
    """Inputs of one question, and the position of the first token of its answer."""
    inputs = to_model(build_inputs(processor, [list(one.media())], [one.question]), model)
    grids = {name: inputs[name] for name in GRIDS if name in inputs}
    positions, _ = model.model.get_rope_index(inputs["input_ids"], **grids)
    return {**inputs, "position_ids": positions}, int(positions.max()) + 1


@torch.inference_mode()
def agreement(
    model: Any,
    processor: Any,
    items: Sequence[LongItem],
    texts: Sequence[str],
    settings: Sequence[Setting],
) -> dict[str, list[list[int]]]:
    """By label: per item, for every token of its text, whether the setting would write it."""
    settings, _ = usable(model, settings)
    found: dict[str, list[list[int]]] = {s.label: [] for s in settings}
    patches = PatchedModels({"": model})
    with patches:
        for one, text in zip(items, texts, strict=True):
            ids = torch.tensor([answer_ids(processor, text)])
            inputs, start = prompt_of(processor, model, one)
            for setting in settings:
                with patches.applied(setting, [one.id]):
                    said = _continued(model, inputs, ids, start).argmax(-1)
                found[setting.label].append((said == ids)[0].int().tolist())
    return found


def _continued(model: Any, inputs: dict[str, Any], ids: Tensor, start: int) -> Tensor:
    """Logits (1, tokens, words) of every token of an answer, after a prefill of the prompt alone.

    The answer must not be part of the prompt: methods score visual tokens by its last token.
    """
    prompt = {name: value for name, value in inputs.items() if name != "position_ids"}
    first = model(**prompt, use_cache=True, logits_to_keep=1)
    count = ids.shape[1] - 1
    if not count:
        return first.logits
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, :-1])], 1)
    more = model(
        input_ids=ids[:, :-1],
        attention_mask=mask,
        position_ids=(start + torch.arange(count)).expand(3, 1, -1),
        past_key_values=first.past_key_values,
        use_cache=True,
    )
    return torch.cat([first.logits, more.logits], 1)


@torch.inference_mode()
def readers(
    model: Any,
    processor: Any,
    items: Sequence[LongItem],
    texts: Sequence[str],
    ratios: Sequence[float],
) -> dict[str, list[list[int]]]:
    """As `agreement`, for a full cache of which each token of the answer reads 1 - ratio."""
    found: dict[str, list[list[int]]] = {f"{r} {q}": [] for r in READERS for q in ratios}
    placeholders = torch.tensor([*adapter_for(model).placeholders])
    with tower_once(model):
        for one, text in zip(items, texts, strict=True):
            ids = torch.tensor([answer_ids(processor, text)])
            groups = torch.tensor(facts_of(processor, one.family, text))
            inputs, start = prompt_of(processor, model, one)
            prompt = inputs["input_ids"].shape[1]
            visual = torch.isin(inputs["input_ids"][0], placeholders).nonzero()[:, 0]
            whole = _whole(inputs, ids, start)
            scores = _attention(model, whole, prompt, visual)
            for reader in READERS:
                chosen = _pooled(scores, groups, reader)
                for ratio in ratios:
                    count = max(1, round((1 - ratio) * len(visual)))
                    mask = reading_mask(chosen, visual, prompt, count)
                    logits = model(**{**whole, "attention_mask": mask}, use_cache=False).logits
                    said = logits[0, prompt - 1 :].argmax(-1)
                    found[f"{reader} {ratio}"].append((said == ids[0]).int().tolist())
    return found


def _whole(inputs: dict[str, Any], ids: Tensor, start: int) -> dict[str, Any]:
    """Prompt and answer, without its end, as one sequence."""
    count = ids.shape[1] - 1
    positions = (start + torch.arange(count)).expand(3, 1, -1)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], ids[:, :-1]], 1),
        "position_ids": torch.cat([inputs["position_ids"], positions], 2),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + count, dtype=torch.long),
    }
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, count)], 1)
    return {**inputs, **longer}


def _attention(model: Any, whole: dict[str, Any], prompt: int, visual: Tensor) -> Tensor:
    """Attention of the full run, mean over layers and heads: (tokens of the answer, visual).

    Row t is that of the token before token t of the answer, which predicts it.
    """
    decoder = model.model.language_model
    usual = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    try:
        weights = model(**whole, use_cache=False, output_attentions=True).attentions
    finally:
        decoder.config._attn_implementation = usual
    return torch.stack([w[0, :, prompt - 1 :][..., visual].mean(0) for w in weights]).mean(0)


def _pooled(scores: Tensor, groups: Tensor, reader: str) -> Tensor:
    """Scores by which each token of the answer chooses its rows, (tokens, visual)."""
    if reader == "question":
        return scores[:1].expand_as(scores)
    if reader == "answer":
        return scores.sum(0, keepdim=True).expand_as(scores)
    if reader == "fact":
        return torch.stack([scores[groups == g].sum(0) for g in groups])
    return scores


def reading_mask(scores: Tensor, visual: Tensor, prompt: int, count: int) -> Tensor:
    """Causal mask, bool (1, 1, all, all), in which a token of the answer sees few visual tokens.

    The prompt is read in full, so the first token of the answer is predicted by the full model.

    Parameters
    ----------
    scores : Tensor
        float (tokens of the answer, visual tokens); row t is for the prediction of token t.
    visual : Tensor
        int64 (visual tokens,): their places in the sequence.
    prompt
        Tokens before the answer.
    count
        Visual tokens that a token of the answer sees.
    """
    length = prompt + len(scores) - 1
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    kept = scores.topk(count, dim=-1).indices
    for row in range(1, len(scores)):
        hidden = torch.ones(len(visual), dtype=torch.bool)
        hidden[kept[row]] = False
        mask[prompt - 1 + row, visual[hidden]] = False
    return mask[None, None]


TOKENS = ((1, 8), (9, 24), (25, 48), (49, 96), (97, 400))
"""Places of tokens in an answer."""


def kept_facts(agrees: Sequence[int], facts: Sequence[int]) -> list[int]:
    """For every fact of an answer: whether all of its tokens agree, the end left out."""
    return [
        int(all(a for a, g in zip(agrees, facts, strict=True) if g == fact))
        for fact in sorted({g for g in facts if g >= 0})
    ]


def section(forced: dict[str, Any]) -> str:
    """The section, in Markdown."""
    held = unpack(forced["packed"])
    parts = [HEAD]
    for kind in KINDS:
        parts += [f"**{kind.capitalize()}**, agreement by place of the token, ratio 0.75:\n"]
        parts += [_by_token(held[kind]), ""]
    parts += [ROOM]
    for kind in KINDS:
        parts += [f"**{kind.capitalize()}** ({len(held[kind]['facts'])} answers)\n"]
        parts += [_room(held[kind]), ""]
    return "\n".join([*parts, _meaning(held), ""])


def _meaning(held: dict[str, Any]) -> str:
    """What the tables say of room above the default, at the largest ratio."""
    ratio, found = RATIOS[-1], {}
    for kind in KINDS:
        facts, readers = held[kind]["facts"], held[kind]["readers"]
        default = held[kind]["settings"][f"auto-{ratio}"]
        every = (default, readers[f"fact {ratio}"], readers[f"question {ratio}"])
        found[kind] = [f"{np.mean(_shares(one, facts)):.1%}" for one in every]
    return MEANING.format(ratio=ratio, **found)


def _by_token(held: dict[str, Any]) -> str:
    lines = []
    for label, agrees in held["settings"].items():
        if label == FULL or "0.75" not in label:
            continue
        cells = []
        for first, last in TOKENS:
            some = [a for one in agrees for a in one[first - 1 : last]]
            cells.append(f"{np.mean(some):.1%}" if some else "–")
        lines.append([method_of(label), *cells])
    lines.sort(key=lambda line: line[1:], reverse=True)
    some = next(iter(held["settings"].values()))
    counts = [str(sum(len(one[first - 1 : last]) for one in some)) for first, last in TOKENS]
    lines.insert(0, ["tokens", *counts])
    names = [f"{a} to {b}" if b < 400 else f"{a} and more" for a, b in TOKENS]
    return table(["method", *names], lines)


def _shares(agrees: Sequence[Sequence[int]], facts: Sequence[Sequence[int]]) -> list[float]:
    """Share of facts kept, per item."""
    return [float(np.mean(kept_facts(a, f))) for a, f in zip(agrees, facts, strict=True)]


def _room(held: dict[str, Any]) -> str:
    """Facts kept under teacher forcing: of settings, and of readers of the full cache."""
    facts = held["facts"]
    lines = []
    names = dict.fromkeys(method_of(label) for label in held["settings"] if label != FULL)
    for name in names:
        cells = []
        for ratio in RATIOS:
            label = next(
                k for k in held["settings"] if method_of(k) == name and str(ratio) in k.split("-")
            )
            cells.append(f"{np.mean(_shares(held['settings'][label], facts)):.1%}")
        lines.append([name, *cells])
    lines.sort(key=lambda line: [float(c[:-1]) for c in line[1:]], reverse=True)
    for reader in READERS:
        cells = [
            f"{np.mean(_shares(held['readers'][f'{reader} {ratio}'], facts)):.1%}"
            for ratio in RATIOS
        ]
        lines.append([f"*full cache, rows by {reader}*", *cells])
    gaps = []
    for ratio in RATIOS:
        again, once = (_shares(held["readers"][f"{r} {ratio}"], facts) for r in ("fact", "answer"))
        gaps.append(str(difference(again, once)))
    lines.append(["*rows by fact minus by answer, points*", *gaps])
    return table(["facts that agree", *(f"ratio {r}" for r in RATIOS)], lines)


MEANING = """At ratio {ratio}, rows chosen again for every fact keep {images[1]} of the facts on
images, the default {images[0]}, and rows chosen once by the question {images[2]}. There a method
that keeps all rows and reads few of them has room, if it knows which. On clips they keep
{clips[1]}, the default {clips[0]}: next to merging there is little room.
"""
HEAD = """## Token by token

Teacher forcing: a setting continues the answer of the full model, so what it gets wrong is not the
consequence of an earlier mistake.
"""
ROOM = """## Choosing again for every fact

Would it help to keep all rows and to read few of them per step? Facts all of whose tokens agree,
under teacher forcing. In italics: the prompt is read in full, and each token of the answer sees
1 − ratio of the visual tokens, those with the largest attention of the full run (mean over layers
and heads), chosen once for the whole answer by the last token of the question or by the answer
itself, or again for every fact or every token. These are masked runs that know the answer; they
save nothing, and bound what choosing again can bring.
"""
