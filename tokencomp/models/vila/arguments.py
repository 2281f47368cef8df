"""What callers give to the processor of VILA: options, media, and the parts of a message."""

from __future__ import annotations

from typing import Any

from tokencomp.errors import MediaError, OptionError
from tokencomp.models.vila.tokens import IMAGE, VIDEO

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
    """Require one medium per placeholder `token`; `what` names the media in the message."""
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
