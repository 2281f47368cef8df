"""Every family that `tokencomp serve` lists, with media of equal and different sizes in a batch.

An engine encodes neighbouring items of one modality in one call, also those of several requests.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from support.serving import cases, hf_reference
from support.serving.checks import POSITIONS, check

MODELS = [
    "qwen2_vl", "llava_onevision", "internvl", "glm4v", "qwen2_5_vl", "qwen3_vl", "qwen3_5",
    pytest.param("qwen3_vl_moe", marks=pytest.mark.long),
    pytest.param("qwen3_5_moe", marks=pytest.mark.long),
]  # fmt: skip
IMAGES = {
    "equal": [["image", 0, 168, 112], ["image", 1, 168, 112]],
    "different": [["image", 0, 168, 112], ["image", 2, 112, 196]],
}
CLIPS = {
    "equal": [["video", 1, 4, 112, 84], ["video", 2, 4, 112, 84]],
    "different": [["video", 1, 4, 112, 84], ["video", 3, 8, 112, 84], ["video", 4, 2, 84, 112]],
}
MEDIA = [*IMAGES.values(), *CLIPS.values(), *(IMAGES[n] + CLIPS[n] for n in IMAGES)]
RATIOS: list[Any] = [0, 0.5, {"image": 0.5}, {"video": 0.75}]


def taken(model: str, media: list[list[Any]]) -> list[list[Any]]:
    """Return the media that a prompt may have: vLLM's GLM-4.1V takes one clip."""
    clips = [item for item in media if item[0] == "video"]
    return [item for item in media if model != "glm4v" or item not in clips[1:]]


def jobs_of(model: str) -> dict[str, list[dict[str, Any]]]:
    """Return the requests to a model by how they are sent: several media, or one each."""
    several = [
        cases.job(model, taken(model, media), ratio)
        for media in MEDIA
        for ratio in (RATIOS if media in MEDIA[-2:] else RATIOS[:2])
    ]
    items = [*IMAGES["equal"], IMAGES["different"][1], *CLIPS["equal"], *CLIPS["different"][1:]]
    single = {ratio: [cases.job(model, [item], ratio) for item in items] for ratio in RATIOS[:2]}
    mixed = [single[0.5 if i % 3 == 0 else 0][i] for i in range(len(items))]
    return {"several": several, "whole": single[0], "half": single[0.5], "mixed": mixed}


def wanted(folder: Any, model: str, job: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of the patched model, or of the decoder on the kept rows.

    Processors of families with tiles take no clips of different lengths in a prompt, and GLM-4.1V
    of transformers no images with clips.
    """
    if model in ("llava_onevision", "internvl", "glm4v"):
        return hf_reference.answer_of_pieces(folder, job, cases.MARKS[model])
    if model.startswith("qwen3_5"):
        return hf_reference.answer_of_kept(folder, job)
    times = model == "qwen2_5_vl"  # transformers has other positions of its videos
    with hf_reference.with_true_positions(folder, job) if times else contextlib.nullcontext():
        return hf_reference.answer(folder, job, POSITIONS.get(model, "original"))


@pytest.mark.parametrize("model", MODELS)
def test_media_of_any_sizes_share_an_engine(model: str, tiny_folder: Any, run_engine: Any) -> None:
    """One request after the other, and all at once."""
    folder, jobs = tiny_folder(model), jobs_of(model)
    runs = [[{**job, "reset": True}] for job in jobs["several"]]
    every = [*jobs["several"], *jobs["whole"], *jobs["half"]]
    for name, group in [*jobs.items(), ("all", every)]:
        runs.append([{**job, "name": f"{job['name']} {name}", "reset": True} for job in group])
    engine: dict[str, Any] = {"limit_mm_per_prompt": {"image": 4, "video": 4}}
    engine |= {"mm_processor_cache_gb": 0, "enable_prefix_caching": False}
    if hybrid := model.startswith("qwen3_5"):  # bfloat16 only
        engine["dtype"] = "bfloat16"
    results = run_engine(folder, runs, **engine)
    references: dict[str, Any] = {}
    for sent, group in jobs.items():
        for job in group:
            if job["name"] not in references:
                references[job["name"]] = wanted(folder, model, job)
            want = references[job["name"]]
            for suffix in ("", f" {sent}", " all") if sent == "several" else (f" {sent}", " all"):
                if not hybrid:
                    check(results, [job], folder, model, suffix, lambda *_, want=want: want)
                    continue
                got = results[job["name"] + suffix]
                assert "error" not in got and got["prompt"] == want["prompt"], (job["name"], got)
                assert abs(got["logprobs"][0] - want["logprobs"][0]) < 0.1
