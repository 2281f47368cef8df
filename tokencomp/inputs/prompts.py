"""From examples to model inputs to greedy answers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import FrameChoiceWarning, MediaError, OptionError
from tokencomp.inputs.questions import frames_apart, modality_of
from tokencomp.inputs.sounds import RATE
from tokencomp.inputs.video import Sampling, Video, sampling_of
from tokencomp.inputs.video.frame_times import frame_times, whole_steps
from tokencomp.tokens.tokens import MODALITIES

Chat = list[dict[str, Any]]
"""Messages as chat templates take them: role, and content with text and media placeholders."""
MARK = "<image>"
"""Marks an image in a prompt of interleaved text and images."""


def media_chat(media: Sequence[Any], prompt: str) -> Chat:
    """One user message: the media, then the prompt.

    If a prompt has as many marks `<image>` as there are images, and no video, every image is at its
    mark. Other marks are removed, because processors take them for missing images.
    """
    shown = [{"type": modality_of(m)} for m in media]
    texts = prompt.split(MARK) if media else [prompt]
    content: list[dict[str, Any]] = [*shown, {"type": "text", "text": "".join(texts)}]
    if len(texts) == len(shown) + 1 and {"type": "video"} not in shown:
        between = [{"type": "text", "text": text} if text else None for text in texts]
        pairs = itertools.zip_longest(between, shown)
        content = [part for pair in pairs for part in pair if part]
    return [{"role": "user", "content": content}]


def chat_inputs(
    processor: Any,
    chats: Sequence[Chat],
    images: Sequence[Any],
    videos: Sequence[Any],
    samplings: Sequence[Sampling] = (),
    texts: Sequence[str] = (),
    sounds: Sequence[np.ndarray] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """One left-padded batch of conversations that end where the answer begins, on the CPU.

    `images` are PIL images, `videos` uint8 arrays (frames, height, width, 3), and `sounds` mono
    samples at 16 kHz, float (n,), of all rows in prompt order. `samplings` say when the frames of
    each video were shown, for processors that write their times. `texts` are the rendered chats, if
    they are known; `options` go to the processor. Raises `MediaError` if it takes no sounds.
    """
    texts = [*texts] or [
        processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    media: dict[str, Any] = {"images": list(images)} if images else {}
    if videos:
        whole = [whole_steps(processor, video) for video in videos]
        media.update(videos=whole, do_sample_frames=False)
        media.update(frame_times(processor, samplings))
    if sounds:
        if not hasattr(processor, "feature_extractor"):  # it would leave them out
            raise MediaError(
                f"{type(processor).__name__} takes no sounds. Use a model that listens, such as "
                "Qwen2-Audio."
            )
        media.update(audio=list(sounds), sampling_rate=RATE)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"

    def call(**inputs: Any) -> dict[str, Tensor]:
        inputs |= options
        return dict(processor(text=texts, padding=True, return_tensors="pt", **inputs))

    try:
        return call(**media)
    except ValueError:
        if not images or len(chats) < 2:
            raise
        # Gemma 3's processor takes a list of images per prompt.
        left, rows = iter(images), []
        for chat in chats:
            contents = [m["content"] for m in chat if not isinstance(m["content"], str)]
            parts = [part for content in contents for part in content]
            rows.append([next(left) for part in parts if part["type"] == "image"])
        return call(**{**media, "images": rows})


def build_inputs(
    processor: Any, media: Sequence[Sequence[Any]], prompts: Sequence[str]
) -> dict[str, Tensor]:
    """One left-padded batch of single questions, on the CPU.

    Parameters
    ----------
    processor
        A Hugging Face processor with a chat template.
    media
        Per row: PIL images, lists of PIL images (videos), and arrays of samples (sounds), in
        prompt order. A `tokencomp.inputs.video.Video` says when its frames were shown. To a model
        that takes no videos, such as Gemma 3, they are several images.
    prompts
        Per row: the text after the media.

    Raises
    ------
    MediaError
        Media that are no list of rows, or paths; the processor refuses them, or a video has no
        frames, or frames of several sizes.
    OptionError
        Not one question per row.
    """
    _check_rows(media, prompts)
    if any(modality_of(one) == "video" for row in media for one in row):
        media = media if takes_videos(processor) else _as_images(processor, media)
    chats = [media_chat(m, p) for m, p in zip(media, prompts, strict=True)]
    flat = [one for row in media for one in row]
    images = [m for m in flat if modality_of(m) == "image"]
    clips = [m for m in flat if modality_of(m) == "video"]
    videos = [stacked(m) for m in clips]
    sounds = [m for m in flat if modality_of(m) == "audio"]
    try:
        samplings = [*map(sampling_of, clips)]
        return chat_inputs(processor, chats, images, videos, samplings, sounds=sounds)
    except ValueError as error:
        sizes = ", ".join(f"{image.width}×{image.height}" for image in images) or "no images"
        others = f"{len(videos)} videos" + (f"; {len(sounds)} sounds" if sounds else "")
        raise MediaError(
            f"the model's processor refuses the prompt ({sizes}; {others}): {error}"
        ) from error


def _as_images(processor: Any, media: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows whose videos are images, with a warning of what that means for a budget."""
    warnings.warn(
        f"{type(processor).__name__} takes no videos: every frame becomes an image, so budget=N is "
        "per frame. budget={'prompt': N} and ratio= count the whole clip.",
        FrameChoiceWarning,
        stacklevel=3,
    )
    return [frames_apart(row) for row in media]


def _check_rows(media: Any, prompts: Any) -> None:
    """Say what is wrong with media or questions that are not one list, and one text, per row."""
    rows = media if _is_row(media) else [media]
    listed = [one for row in rows for one in (row if _is_row(row) else [row])]
    for path in (one for one in listed if isinstance(one, str | PathLike)):
        raise MediaError(
            f"build_inputs: {str(path)!r} is a path, or another text. Read a file first: "
            f"tokencomp.inputs.media.load_media({str(path)!r})."
        )
    for row in (row for row in rows if not _is_row(row)):
        raise MediaError(
            f"build_inputs: media {type(row).__name__} where a row was expected, the list of all "
            f"media of one question. As in {EXAMPLE}."
        )
    if isinstance(prompts, str) or len(prompts) != len(media):
        given = "one text" if isinstance(prompts, str) else f"{len(prompts)} texts"
        raise OptionError(
            f"build_inputs: {given} for {len(media)} rows of media. Give a list with one question "
            f"per row, as in {EXAMPLE}."
        )


EXAMPLE = 'build_inputs(processor, [[picture]], ["What is shown?"])'


def _is_row(value: Any) -> bool:
    """Whether a value is a list of media; a clip that knows its times is one medium."""
    return isinstance(value, list | tuple) and not isinstance(value, Video)


def stacked(clip: Sequence[Any]) -> np.ndarray:
    """The frames of a video as one array (n, height, width, channels)."""
    frames = [np.asarray(frame) for frame in clip]
    shapes = sorted({frame.shape for frame in frames})
    if len(shapes) != 1:
        raise MediaError(
            f"a video of {len(frames)} frames of shapes {shapes} (height, width, channels). Give "
            "one or more frames, resized and converted to one size and mode."
        )
    return np.stack(frames)


def takes_videos(processor: Any) -> bool:
    """Whether the chat template has placeholders for videos; other templates ignore them."""
    if hasattr(processor, "video_processor"):
        return True
    text = {"type": "text", "text": "?"}
    video, *others = (
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for content in ([{"type": "video"}, text], [{"type": "image"}, text], [text])
    )
    return video not in others


def to_model(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Move a batch to the model's device, floating inputs to its dtype."""
    device, dtype = model.device, model.dtype
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() else None)
        moved[name] = value
    return moved


@torch.inference_mode()
def generate(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
    """Greedy answers, one per row, without the prompt and special tokens."""
    inputs = to_model(inputs, model)
    out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    token_ids = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(token_ids, skip_special_tokens=True)]


def prompt_lengths(model: Any, inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """(all tokens, visual tokens) of every row of an uncompressed batch."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    visual = [sum(row.values()) for row in media_lengths(model, inputs)]
    return list(zip(real.sum(1).tolist(), visual, strict=True))


def media_lengths(model: Any, inputs: dict[str, Any]) -> list[dict[str, int]]:
    """Modality of the placeholders → their number, of every row of an uncompressed batch."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    rows: list[dict[str, int]] = [{} for _ in ids]
    for token, code in adapter_for(model).placeholders.items():
        found = ids == token if mask is None else (ids == token) & mask.bool()
        for row, count in zip(rows, found.sum(1).tolist(), strict=True):
            row[MODALITIES[code]] = row.get(MODALITIES[code], 0) + count
    return rows
