"""The frames of a video that a request may choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.inputs.frames import Choice, Scored, frame_policy
from tokencomp.inputs.packets import ClipIndex
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.media import Limits

FIELD = "media_io_kwargs"
POLICIES = '8 (evenly spaced), "1fps" (by time) or "stream:8" (by bursts)'
FORM = '{"video": {"frames": "stream:8"}}'


def with_request(options: Any, limits: Limits) -> Limits:
    """Limits with the policy of a request, whose field `media_io_kwargs` is `options`.

    vLLM has this field, too, and hands what is in it to the loader of videos.

    Raises
    ------
    RequestError
        The field names anything else, or a policy that this server does not have (400), or more
        frames than it allows (413).
    """
    if not options:
        return limits
    video = options.get("video") if isinstance(options, dict) and len(options) == 1 else None
    if not isinstance(video, dict) or list(video) != ["frames"]:
        raise RequestError(f"{FIELD} is open to requests for the frames of videos alone: {FORM}.")
    given = video["frames"]
    try:
        policy = frame_policy(given)
    except OptionError:
        raise RequestError(f"{FIELD}: frames={given!r}: expected {POLICIES}.") from None
    if isinstance(policy, Scored):
        raise RequestError(
            f'{FIELD}: frames="{policy}": servers decode a video before the model sees it, so '
            f"nothing can score its frames. Use {POLICIES}."
        )
    count = getattr(policy, "count", 1)
    if count > limits.frames:
        raise RequestError(f"{FIELD}: {count} frames; the limit is {limits.frames}.", 413)
    return replace(limits, policy=str(policy))


def chosen(index: ClipIndex, limits: Limits) -> Choice:
    """The frames that the policy of these limits takes."""
    policy = frame_policy(limits.policy or limits.frames)
    choice = policy.choose(index, lambda places: ([], []), "")  # only `Scored` decodes candidates
    if len(choice.places) > limits.frames:
        raise RequestError(f"{len(choice.places)} frames; the limit is {limits.frames}.", 413)
    return choice
