"""The processor of VILA and NVILA, which turns conversations and media into model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, SiglipImageProcessor

from tokencomp.errors import CheckpointError, MediaError, OptionError
from tokencomp.models.vila.config import VilaConfig
from tokencomp.models.vila.images import as_frames, opened, pad_square, tiles
from tokencomp.models.vila.root import read_config, read_root
from tokencomp.models.vila.tokens import IMAGE, VIDEO, chat_template, load_tokenizer

# Options of other processors with the values that this processor implements anyway. Videos are
# always reduced to `num_frames`, also if the caller sampled frames before.
AS_IS: dict[str, tuple[Any, ...]] = {
    "padding": (True, "longest"),
    "padding_side": ("left",),
    "truncation": (False,),
    "return_tensors": ("pt",),
    "return_dict": (True,),
    "do_sample_frames": (True, False),
    "continue_final_message": (False,),
}


class VilaProcessor:
    """Turn text with `<image>` and `<vila/video>`, and the media, into left-padded batches.

    Every image, tile and frame of a video becomes side² placeholders followed by its end tokens. A
    video is reduced to `num_frames` evenly spaced frames, at first `config.num_video_frames`.
    `tokenizer` belongs to the LLM, and `image_processor` to the tower.
    """

    image_token, video_token = IMAGE, VIDEO
    model_input_names = (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "pixel_values_videos",
        "video_frames",
    )

    def __init__(self, config: VilaConfig, tokenizer: Any, image_processor: Any) -> None:
        self.config, self.tokenizer, self.image_processor = config, tokenizer, image_processor
        self.num_frames = config.num_video_frames
        self.chat_template = chat_template(tokenizer, config.chat_template)
        self.decode, self.batch_decode = tokenizer.decode, tokenizer.batch_decode

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> VilaProcessor:
        """Load tokenizer, image processor and conversation format of a VILA folder.

        Raises `CheckpointError` if the variant is not supported, and the `OSError` of transformers
        if a part is missing.
        """
        folder = Path(folder)
        read_root(folder)
        tokenizer = load_tokenizer(folder)
        config = read_config(folder, tokenizer)
        images = SiglipImageProcessor.from_pretrained(folder / "vision_tower")
        if config.chat_template is not None:
            config.chat_template = chat_template(tokenizer, config.chat_template, folder)
        return cls(config, tokenizer, images)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the tokenizer to `llm/` and the image processor to `vision_tower/`."""
        self.tokenizer.save_pretrained(Path(folder) / "llm")
        self.image_processor.save_pretrained(Path(folder) / "vision_tower")

    # -- text -----------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turn one conversation or a batch of them into text or, if `tokenize`, into model inputs.

        The content of a message is a string, or a list of {"type": "text", "text": …},
        {"type": "image", "image": PIL image, array or path} and {"type": "video", "video": path
        or frames}. If the result is text, the media may be left out. `num_frames` and further
        options are those of `__call__`. Raises `CheckpointError` if the checkpoint names no
        conversation format, `MediaError` for a content part of unknown type or without its medium.
        """
        check_options(kwargs)
        if self.chat_template is None:
            raise CheckpointError(
                "this checkpoint has no conversation format. Set processor.chat_template to a "
                "jinja template, or chat_template in config.json to e.g. 'vicuna_v1'."
            )
        single = bool(conversation) and isinstance(conversation[0], dict)
        batch: Any = [conversation] if single else conversation
        texts: list[str] = []
        images: list[Any] = []
        videos: list[Any] = []
        for messages in batch:
            plain = [{**m, "content": flatten(m["content"], images, videos)} for m in messages]
            texts.append(
                self.tokenizer.apply_chat_template(
                    plain,
                    chat_template=self.chat_template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
            )
        for i, item in enumerate([*images, *videos] if tokenize else []):
            if item is None:
                raise MediaError(f"medium {i}: no image or video in its content part.")
        if not tokenize:
            return texts[0] if single else texts
        return self(texts, images=images or None, videos=videos or None, num_frames=num_frames)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        num_frames: int | None = None,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return the model inputs of one prompt or of a batch.

        Parameters
        ----------
        images
            Images of all prompts in order, as a flat list or as one list per prompt.
        videos
            Videos of all prompts in order. Each is a path, a list of frames, or a uint8 array
            (frames, H, W, 3).
        num_frames
            Number of frames per video, which overrides `self.num_frames`.
        add_special_tokens
            False: the texts are parts of prompts, which begin with no token of the tokenizer.
        **kwargs
            Options that this processor implements anyway, see `AS_IS`.

        Returns
        -------
        BatchFeature
            `input_ids` and `attention_mask` (B, L); where there are media also `pixel_values`
            (images, 3, S, S), `pixel_values_videos` (frames, 3, S, S) and `video_frames` (videos,).

        Raises
        ------
        OptionError
            If an option has another value or is unknown.
        MediaError
            If the numbers of placeholders and media differ, or a medium cannot be read.
        """
        check_options(kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        flat = listed(images)
        check_counts(texts, IMAGE, len(flat), "images")
        clips = [] if videos is None else [videos] if isinstance(videos, (str, Path)) else videos
        check_counts(texts, VIDEO, len(clips), "videos")
        limit = self.num_frames if num_frames is None else num_frames
        pixels: list[Image.Image] = []
        for b, prompt in enumerate(texts):
            n = prompt.count(IMAGE)
            prompt_images, flat = flat[:n], flat[n:]
            named = [opened(x, f"prompt {b}, image {i}") for i, x in enumerate(prompt_images)]
            parts = self._plain(named)
            if len(named) == 1 and self.config.image_aspect_ratio == "dynamic":
                if not add_special_tokens:
                    raise OptionError(
                        "this checkpoint cuts the only image of a prompt into tiles, and several "
                        "images not. A part of a prompt (add_special_tokens=False) does not say "
                        "how many there are. Set processor.config.image_aspect_ratio = 'resize' "
                        "for images without tiles."
                    )
                least, most = self.config.min_tiles, self.config.max_tiles
                parts = tiles(named[0], self.config.vision_config.image_size, least, most)
                texts[b] = prompt.replace(IMAGE, f"{IMAGE}\n" * len(parts))
            pixels += parts
        frames = [as_frames(v, f"video {i}", limit) for i, v in enumerate(clips)]
        out: dict[str, Tensor] = self._tokens(texts, [len(f) for f in frames], add_special_tokens)
        if pixels:
            out["pixel_values"] = self._pixels(pixels)
        if frames:
            out["pixel_values_videos"] = torch.cat(
                [self._pixels(self._plain(video)) for video in frames]
            )
            out["video_frames"] = torch.tensor([len(f) for f in frames])
        return BatchFeature(data=out)

    def _tokens(self, texts: list[str], frames: list[int], special: bool) -> dict[str, Tensor]:
        """Return left-padded ids and mask, in which each medium has all of its placeholders."""
        rows, pending = [], iter(frames)
        for prompt in texts:
            row: list[int] = []
            for token in self.tokenizer(prompt, add_special_tokens=special).input_ids:
                if token == self.config.image_token_id:
                    row += _block(token, self.config.side**2, self.config.image_ends)
                elif token == self.config.video_token_id:
                    t, h, w = self.config.video_pool
                    n = next(pending)
                    if n % t:
                        raise MediaError(
                            f"a video of {n} frames: this checkpoint averages {t} frames into one. "
                            f"Pass a multiple of {t} frames."
                        )
                    size = (self.config.side // h) * (self.config.side // w)
                    row += _block(token, size, self.config.video_ends) * (n // t)
                else:
                    row.append(token)
            rows.append(row)
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    # -- pixels ---------------------------------------------------------------------------------

    def _plain(self, images: list[Image.Image]) -> list[Image.Image]:
        """Return images as squares for the tower, padded or resized but not tiled."""
        size = self.config.vision_config.image_size
        if self.config.image_aspect_ratio == "pad":
            r, g, b = (int(255 * mean) for mean in self.image_processor.image_mean)
            return [pad_square(image, (r, g, b)) for image in images]
        return [image.resize((size, size)) for image in images]

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        size = self.config.vision_config.image_size
        return self.image_processor(
            images, size={"height": size, "width": size}, return_tensors="pt"
        )["pixel_values"]


def _block(token: int, n: int, ends: Sequence[list[int]]) -> list[int]:
    """Return `n` placeholders between their start and end tokens."""
    return [*ends[0], *[token] * n, *ends[1]]


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that would be ignored. None counts as an option that was not passed."""
    for name, value in options.items():
        if value is not None and value not in AS_IS.get(name, ()):
            raise OptionError(
                f"VILA's processor has no option {name}={value!r}. It has num_frames, and accepts "
                f"what it implements anyway: {AS_IS}."
            )


def listed(images: Any) -> list[Any]:
    """Return images as a flat list, from one image, a list, or a list per prompt."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [x for item in images for x in (item if isinstance(item, (list, tuple)) else [item])]


def check_counts(texts: list[str], token: str, total: int, what: str) -> None:
    """Require one medium (`what`) per placeholder `token`."""
    count = sum(prompt.count(token) for prompt in texts)
    if count != total:
        raise MediaError(f"{total} {what} for {count} {token} in the prompts. Pass one per token.")


def flatten(content: Any, images: list[Any], videos: list[Any]) -> str:
    """Return content parts as text with placeholders, and append the media to the lists."""
    if isinstance(content, str):
        return content.strip()
    text = ""
    for part in content:
        kind = part.get("type")
        if kind == "text":
            text += part["text"]
        elif kind in ("image", "video"):
            media = next((part[k] for k in (kind, "path", "url") if k in part), None)
            (images if kind == "image" else videos).append(media)
            text += IMAGE if kind == "image" else VIDEO
        else:
            raise MediaError(f"content part of type {kind!r}; allowed: text, image, video.")
    return text.strip()
