"""Bodies of requests as the server on transformers reads them, before its engine runs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from tokencomp.serving.hf.grammar import Grammars
from tokencomp.serving.hf.prompt import ChatPrompt, load, parse
from tokencomp.serving.limits import Deadline, Limits
from tokencomp.serving.spec import ServerOptions

ANY_TEXT: Any = SimpleNamespace(
    tokenizer=None,
    calls=None,
    max_model_len=1 << 20,
    check_size=lambda *amount: None,
    render=lambda *chat: "",
    check=lambda *chat: 0,
    check_images=lambda *images: None,
    markers={"image": True, "video": True},
)
"""In place of a `PromptText`: a model that takes any text and any media."""


def read(
    body: Any,
    text: Any = ANY_TEXT,
    options: ServerOptions | None = None,
    limits: Limits | None = None,
) -> ChatPrompt:
    """Return the prompt of a body, JSON or bytes of it, with its media decoded."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    options, limits = options or ServerOptions.parse({}, "hf"), limits or Limits()
    prompt = parse(content, options, limits, text, Grammars(text.tokenizer, set()))
    load(prompt, text, Deadline(limits.decode_seconds))
    return prompt
