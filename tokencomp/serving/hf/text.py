"""Bounds of a prompt's text, checked before the engine's thread tokenises it."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from PIL import Image

from tokencomp.inputs.prompts import Chat, takes_videos
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.tools import CallForm

MAX_CHARACTERS = 4 << 20
MARKED = ("image", "video")


def too_long(tokens: int, limit: int) -> RequestError:
    """Return the error for a prompt of that many tokens."""
    return RequestError(
        f"the prompt has {tokens} tokens before compression; this model takes {limit}, answer "
        "included. Send less text, or fewer or smaller media."
    )


class PromptText:
    """Refuses texts that are too long, and placeholders of media that the client wrote itself.

    Any thread may call the methods; one text is tokenised at a time. The tokenizer is a copy,
    because the engine changes the padding of the original while it uses it.

    Parameters
    ----------
    processor
        A Hugging Face processor with a chat template.
    max_model_len
        Prompt and answer together, in tokens.
    placeholders
        Tokens that the model replaces by media. Some processors (Gemma 3) write other ones than the
        chat template.

    Attributes
    ----------
    max_characters : int
        Longer texts are refused without being tokenised. No token stands for more characters than
        the longest entry of the vocabulary has, so they cannot fit.
    calls : CallForm or None
        How the chat template writes calls of tools.
    """

    def __init__(
        self, processor: Any, max_model_len: int, placeholders: Collection[int] = ()
    ) -> None:
        self.processor, self.max_model_len = processor, max_model_len
        self.tokenizer = copy.deepcopy(getattr(processor, "tokenizer", processor))
        self._lock = threading.Lock()
        longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        self.max_characters = min(longest * max_model_len, MAX_CHARACTERS)
        self._added = set(self.tokenizer.added_tokens_encoder.values())
        self._markers = {kind: self._marker(kind) for kind in MARKED}
        self._special = {token for marker in self._markers.values() for token in marker}
        self._special |= self._added & set(placeholders)
        self.calls = CallForm.of(self.render, self._visible)

    def verifies(self, kind: str) -> bool:
        """Whether `check` can count the placeholders of "image" or "video"."""
        return bool(self._markers[kind])

    def check_size(self, characters: int, parts: int) -> None:
        """Refuse a conversation by the number of its characters, and of its messages' parts."""
        if characters > self.max_characters or parts > self.max_model_len:
            raise RequestError(
                f"the prompt has {characters} characters in {parts} parts, which cannot fit: this "
                f"model takes {self.max_model_len} tokens, answer included, and this server "
                f"{self.max_characters} characters. Send less text."
            )

    def render(self, chat: Chat, tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the prompt that the chat template makes, with one placeholder per medium."""
        try:
            return str(
                self.processor.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False,
                    **({"tools": list(tools)} if tools else {}),
                )
            )  # fmt: skip
        except Exception as error:  # templates raise undocumented types
            raise RequestError(f"the model's processor refuses the prompt: {error}") from error

    def check(self, chat: Chat, text: str) -> int:
        """Tokenise a rendered conversation, and check the result.

        The engine puts the media of several requests into one list, in the order of their
        placeholders. A prompt with another number of placeholders than media would take the media
        of another request.

        Returns
        -------
        int
            Number of tokens.
        """
        kinds = [p["type"] for m in chat if isinstance(m["content"], list) for p in m["content"]]
        if "video" in kinds and not takes_videos(self.processor):
            raise RequestError("this model takes no videos. Send frames of it as images.")
        tokens = self._tokens(text)
        if len(tokens) >= self.max_model_len:
            raise too_long(len(tokens), self.max_model_len)
        expected: Counter[int] = Counter()
        for kind in kinds:
            expected.update(self._markers.get(kind, {}))
        present = Counter(token for token in tokens if token in self._special)
        if present != expected:
            raise RequestError(
                "the prompt does not have one placeholder per image and video: its text contains "
                "placeholder tokens, or the model's chat template leaves media of this role out."
            )
        return len(tokens)

    def check_images(self, text_tokens: int, images: Sequence[Image.Image]) -> None:
        """Refuse images with too many tokens before the processor makes arrays of them.

        Images pass if the processor cannot count the tokens of a size. The engine counts all
        tokens after the processor has run.
        """
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None or not images:
            return
        try:
            counts = count(image_sizes=[(image.height, image.width) for image in images])
            visual = sum(counts["num_image_tokens"])
        except Exception:  # a size that the processor will refuse, with a better message
            return
        total = text_tokens - len(images) + visual
        if total >= self.max_model_len:
            raise too_long(total, self.max_model_len)

    def _tokens(self, text: str) -> list[int]:
        try:
            with self._lock:
                return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # tokenizers raise undocumented types
            raise RequestError(f"the model's processor refuses the prompt: {error}") from error

    def _visible(self, text: str) -> bool:
        """Whether a text survives the decoding of an answer, which leaves special tokens out."""
        return text in self.tokenizer.decode(self._tokens(text), skip_special_tokens=True)

    def _marker(self, kind: str) -> Counter[int]:
        """Return the special tokens that the chat template writes for one medium of that kind."""
        text = {"type": "text", "text": "a"}
        try:
            plain, marked = (
                Counter(self._tokens(self.render([{"role": "user", "content": content}])))
                for content in ([text], [{"type": kind}, text])
            )
        except RequestError:  # a model without this kind of media
            return Counter()
        return Counter({t: n for t, n in (marked - plain).items() if t in self._added})
