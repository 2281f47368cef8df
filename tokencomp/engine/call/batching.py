"""Continuous batching (`generate_batch`) of a patched model: text runs as without a patch.

Transformers takes token ids alone there and runs them in a thread of its own, where an error only
ends the request. What cannot be served is therefore refused before the thread starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokencomp.adapters.base import Adapter
from tokencomp.errors import NoVisualInputError, UnsupportedCacheError
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

BATCH = "generate_batch"  # the method of transformers' generation that runs it
FIX = "Use model.generate(...), one prompt or a padded batch at a time, or handle.disabled()."


class BatchGuard(Hooked):
    """Looks at the requests of `generate_batch` while prompts are compressed.

    Parameters
    ----------
    active
        Whether prompts with media are compressed in the calling thread.
    strict
        Whether prompts without media are refused.
    """

    def __init__(self, adapter: Adapter, active: Callable[[], bool], strict: bool) -> None:
        self.adapter, self.active, self.strict = adapter, active, strict

    def install(self) -> None:
        """Replace `model.generate_batch`, where the release has it."""
        self._handles.append(MethodReplacement(self.adapter.top, BATCH, self._generate))

    def _generate(
        self,
        original: Callable[..., Any],
        inputs: Sequence[Sequence[int]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.active():
            self._check(inputs, kwargs)
        return original(inputs, *args, **kwargs)

    def _check(self, inputs: Sequence[Sequence[int]], kwargs: dict[str, Any]) -> None:
        """Refuse requests that ask for media, which transformers would leave out.

        Raises
        ------
        UnsupportedCacheError
            Features among the arguments, or placeholders of media in a prompt.
        NoVisualInputError
            `strict=True`: no request can bring media.
        """
        if self.adapter.feature_kinds(kwargs):
            raise UnsupportedCacheError(
                "continuous batching takes token ids alone, and this call brings images or videos, "
                f"which the model would never see. {FIX}"
            )
        names = self.adapter.placeholder_ids()
        for i, prompt in enumerate(inputs):
            count = sum(token in names for token in prompt)
            if count:
                raise UnsupportedCacheError(
                    f"prompt {i} has {count} placeholders of images or videos, and continuous "
                    f"batching takes token ids alone, so no media would fill them. {FIX}"
                )
        if self.strict:
            raise NoVisualInputError(
                "strict=True, and continuous batching takes token ids alone, so that no prompt "
                "brings an image or video. Use model.generate(...), or patch(..., strict=False)."
            )
