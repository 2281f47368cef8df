"""Accuracy of a model on ShapesQA, through real files, the HF processor and ``generate``."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from tokencomp.inputs.media import load_media
from tokencomp.inputs.questions import Example
from tokencomp.shapesqa.items import FRAMES, Item
from tokencomp.shapesqa.layouts import write_media
from tokencomp.shapesqa.questions import mlvu_prompt, mvbench_prompt

FORMS = {
    "free": lambda item: item.question,
    "mvbench": lambda item: mvbench_prompt(item.asked),
    "mlvu": lambda item: mlvu_prompt(item.asked),
}


def wanted(item: Item, form: str) -> str:
    """The text that counts as right: the word, or the letter in multiple-choice forms."""
    return item.answer if form == "free" else item.letter


@torch.inference_mode()
def answer(
    model, processor, media: Sequence[Image.Image | list[Image.Image]], prompts: Sequence[str]
) -> list[str]:
    """Greedy answers to one batch of prompts, each about one image or one video (list of frames).

    Returns the generated text of each row, stripped.
    """
    kinds = ["video" if isinstance(m, list) else "image" for m in media]
    texts = []
    for kind, prompt in zip(kinds, prompts, strict=True):
        content = [{"type": kind}, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    images = [m for m in media if not isinstance(m, list)]
    videos = [m for m in media if isinstance(m, list)]
    inputs = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        padding=True,
        return_tensors="pt",
    ).to(model.device)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    told = out[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(told, skip_special_tokens=True)]


def evaluate(
    model,
    processor,
    items: Iterable[Item],
    form: str = "free",
    frames: int = FRAMES,
    batch: int = 16,
) -> list[dict]:
    """Ask every item once. Images go through JPEG, videos through mp4 files and back.

    Returns
    -------
    list of dict
        ``id``, ``family``, ``prediction``, ``answer``, ``correct`` per item.
    """
    items = list(items)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for start in tqdm(range(0, len(items), batch), desc=f"answering ({form})", mininterval=2):
            part = items[start : start + batch]
            part = [one if one.media else write_media(one, Path(folder)) for one in part]
            media = [load_media(one.media, frames) for one in part if one.media]
            told = answer(model, processor, media, [FORMS[form](one) for one in part])
            for one, text in zip(part, told, strict=True):
                right = Example(one.id, "", wanted(one, form)).correct(text)
                rows.append(
                    {
                        "id": one.id,
                        "family": one.family,
                        "prediction": text,
                        "answer": wanted(one, form),
                        "correct": right,
                    }
                )
    return rows


def blind_guess(items: Iterable[Item]) -> dict[str, float]:
    """Score of a model that sees nothing: the commonest answer, or one of the options at random."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.family, []).append(item)
    scores = {}
    for name, group in groups.items():
        commonest = max(Counter(item.answer for item in group).values())
        at_random = sum(1 / len(item.options) for item in group)
        scores[name] = max(commonest, at_random) / len(group)
    return scores


def by_family(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """Accuracy and item count per question family."""
    out: dict[str, dict[str, float]] = {}
    for row in rows:
        score = out.setdefault(row["family"], {"correct": 0, "items": 0})
        score["correct"] += bool(row["correct"])
        score["items"] += 1
    return {k: {**v, "accuracy": v["correct"] / v["items"]} for k, v in out.items()}
