"""Token counts of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Usage:
    """Token counts of one request.

    Attributes
    ----------
    prompt
        Tokens that entered the decoder: text tokens and the visual tokens that were kept.
    completion
        Generated tokens.
    visual_before, visual_after
        Visual tokens before compression, and visual tokens that a decoder layer sees on average.
    """

    prompt: int
    completion: int = 0
    visual_before: int = 0
    visual_after: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return OpenAI's usage object with the counts of compression under "tokencomp"."""
        after = self.visual_after
        ratio = 1 - self.visual_after / self.visual_before if self.visual_before else 0.0
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "tokencomp": {
                "visual_tokens_before": self.visual_before,
                "visual_tokens_after": int(after) if float(after).is_integer() else after,
                "ratio": ratio,
            },
        }
