"""The prompts that every engine and the Hugging Face reference answer."""

from __future__ import annotations

from typing import Any

from tokencomp.serving.servable import servable

MARKS = {
    "llava_onevision": ("<image>", "<video>"),
    "glm4v": (
        "<|begin_of_image|><|image|><|end_of_image|>",
        "<|begin_of_video|><|video|><|end_of_video|>",
    ),
    "internvl": ("<IMG_CONTEXT>", "<video>"),
    "qwen2_vl": (
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    ),
}
QWEN = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
MARKS.update(dict.fromkeys(QWEN, MARKS["qwen2_vl"]))
TIMED = (*QWEN, "glm4v")  # positions or prompts depend on the frame rate
TURN = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
QUESTION = "What color is the small circle?"

# Reducers that engines can run with their default options.
SERVABLE = [name for name, option in servable().items() if not option]

IMAGE = ["image", 0, 300, 200]
OTHER = ["image", 4, 168, 280]
VIDEO = ["video", 1, 8, 112, 84]
ODD = ["video", 3, 7, 140, 84]


def job(
    model: str, media: list[list[Any]], ratio: float | None, question: str = QUESTION, **more: Any
) -> dict[str, Any]:
    """Return a job whose name lists its parts; with `ratio` None it has no options.

    `budget` takes the place of the ratio.
    """
    image, video = MARKS[model]
    marks = " then ".join(image if kind == "image" else video for kind, *_ in media)
    reducer = more.pop("reducer", "uniform")
    options = more.pop("options", {})
    budget = more.pop("budget", None)
    tower = {n: more.pop(n) for n in ("tower_ratio", "tower_reducer") if n in more}
    result: dict[str, Any] = {
        "prompt": TURN.format(marks, question),
        "media": media,
        "metadata": model in TIMED,
        **more,
    }
    label = "plain"
    if ratio is not None:
        amount = {"ratio": ratio} if budget is None else {"budget": budget}
        result["tokencomp"] = {"reducer": reducer, **amount, **tower}
        label = f"{reducer}@{ratio if budget is None else amount}" + (f" {tower}" if tower else "")
        if options:
            result["tokencomp"]["options"] = options
            label += f" {options}"
    name = "+".join("".join(map(str, item)) for item in media)
    result["name"] = f"{label} {name}{'' if question == QUESTION else ' ' + question}"
    return result


def matrix(model: str) -> list[dict[str, Any]]:
    """Return jobs that cover ratios, media and every reducer that can be served."""
    jobs = [job(model, [m], r) for m in (IMAGE, VIDEO) for r in (0.3, 0.9)]
    for name in SERVABLE:
        jobs += [job(model, [m], 0.5, reducer=name) for m in (IMAGE, VIDEO)]
        jobs.append(job(model, [IMAGE, VIDEO, OTHER], 0.75, reducer=name))
    jobs.append(job(model, [IMAGE, OTHER], 0.5))
    # A clip has one budget in vLLM. In `patch`, every frame of InternVL stands as an image and has
    # its own, so that they are compared on images.
    several = [IMAGE, OTHER] if model == "internvl" else [IMAGE, VIDEO, OTHER]
    jobs += [job(model, several, 0, reducer="divprune", budget=n) for n in (9, 21)]
    jobs.append(job(model, [["image", 2, 420, 112]], 0.6))
    jobs.append(job(model, [["image", 3, 60, 60]], 0.5))
    jobs.append(job(model, [IMAGE], 0.5, reducer="random", options={"seed": 3}))
    if model.startswith("qwen3"):  # frames without a kept token, and an odd number of frames
        jobs.append(job(model, [ODD], 0.95, reducer="divprune"))
        jobs.append(job(model, [VIDEO, IMAGE, ODD], 0.6, reducer="divprune"))
    return jobs


def plain(model: str) -> list[dict[str, Any]]:
    """Return jobs without compression."""
    return [job(model, [m], None) for m in (IMAGE, VIDEO)] + [job(model, [IMAGE, OTHER], None)]
