"""`Session`: one cached conversation that takes images, frames and questions at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tokencomp.errors import OptionError, SessionError
from tokencomp.handle import handle_of
from tokencomp.inputs.images import as_image
from tokencomp.inputs.prompts import stacked
from tokencomp.inputs.questions import modality_of
from tokencomp.inputs.video.frame_times import reads_times
from tokencomp.session.conversation import Conversation, join
from tokencomp.session.items import FrameClock, item_inputs, warn_of_repeated
from tokencomp.session.turns import Turns
from tokencomp.validation import fits

_OPEN: WeakSet[Session] = WeakSet()


class Session:
    """Continue one cached conversation with new media, text and questions.

    Nothing in the cache is recomputed. A session equals one prompt of the same items at the same
    ratio; `ask` does not change it, unless `keep=True`. transformers cannot continue a cached
    conversation with new media, so a session is useful without a patch as well.

    Parameters
    ----------
    model
        A Hugging Face multimodal model, patched or not. A patch must choose tokens by the media
        only (`reducer="kcenter"`): questions come later. One session at a time per patched model.
    processor
        Its processor, with a chat template.
    budget
        Largest number of cache rows in the widest layer between calls. Above it, rows of media are
        evicted after every call; kept rows keep their positions, and text is never evicted. None:
        no limit. A call needs memory for its tokens in addition. A merged token uses one row, and
        with it all that it represents is evicted.
    policy
        Which rows of media are evicted first: "oldest", or "redundant": patches that look almost
        the same in the newest picture of their place, then the oldest.

    Raises
    ------
    OptionError
        Another budget or policy; no chat template, or one that cannot be split into turns.
    UnsupportedModelError
        A budget for a model from whose cache rows cannot be evicted exactly: with linear layers,
        convolutions or attention windows. Use budget=None there.
    SessionError
        The model is patched, and another session of it is open.

    Examples
    --------
    >>> tokencomp.patch(model, 0.75, reducer="kcenter")              # doctest: +SKIP
    >>> session = tokencomp.Session(model, processor)                # doctest: +SKIP
    >>> session.append(frames, seconds=0.5)                          # doctest: +SKIP
    >>> session.ask("What happens?")                                 # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        budget: int | None = 16_384,
        policy: Literal["oldest", "redundant"] = "oldest",
    ) -> None:
        self._conversation = Conversation(model, budget, policy)
        self._processor, self._turns = processor, Turns(processor)
        self._clock, self._closed = FrameClock(), False
        self._pieces: dict[str, str] = {}
        self._waiting: list[int] = self._turns.open  # written in front of what comes next
        self._conversation.check_text(len(self._waiting) + 1)
        self._check_alone()
        _OPEN.add(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        budget = self._conversation.budget
        limit = "no budget" if budget is None else f"budget {budget}"
        state = "closed" if self._closed else f"{self.rows} rows ({limit}), {self.tokens} tokens"
        return f"<tokencomp.Session: {state}>"

    @property
    def rows(self) -> int:
        """Rows in the widest layer of the cache."""
        return self._conversation.rows

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far, as they were before compression and eviction."""
        return self._conversation.tokens

    @property
    def cache(self) -> Any:
        """The KV cache, to be looked at."""
        return self._conversation.cache

    def close(self) -> None:
        """Free the cache, and the model for another session. Safe to call twice."""
        self._closed = True
        self._conversation.cache = None
        _OPEN.discard(self)

    def append(self, media: Any, *, seconds: float | Sequence[float] | None = None) -> Session:
        """Add an image, or frames of a video, to the user's turn.

        Parameters
        ----------
        media
            A PIL image or uint8 array (height, width, 3); or frames: a list of them, an array
            (n, height, width, 3), or a `tokencomp.inputs.video.Video`, which knows its times.
        seconds
            When the frames were shown: one time per frame, or the distance between them, from the
            last frame on. Needed for models that read times (Qwen3-VL), if `media` does not know.

        Raises
        ------
        MediaError
            No frames, frames of several sizes, or what is no image.
        FrameOrderError
            Times that do not ascend over all frames of the session.
        SessionError
            More rows than the budget can hold with the text.
        OptionError
            Times that are missing or do not fit; a patch that reads questions.

        Nothing is added to the conversation then.

        Warns
        -----
        FrameChoiceWarning
            The model joins frames into steps (two in the Qwen-VL family), and their number fills no
            whole step: its processor shows the last frame again.
        """
        self._check_open()
        modality, times = modality_of(media), None
        if modality == "image" and seconds is not None:
            raise OptionError(
                f"append(image, seconds={seconds!r}): times belong to frames. Leave seconds out, "
                "or give the image as a list of one frame."
            )
        if modality == "video":
            medium: Any = stacked([as_image(frame, "append") for frame in media])
            times = self._clock.times(media, seconds, reads_times(self._processor))
        else:
            medium = as_image(media, "append")
        piece = self._pieces.setdefault(modality, self._turns.media(modality))
        sampling = None if times is None else self._clock.sampling(times)
        inputs = item_inputs(self._processor, piece, modality, medium, sampling)
        self._add(inputs)
        self._clock.advance(times)
        if modality == "video":
            warn_of_repeated(self._processor, medium, inputs)
        return self

    def say(self, text: str) -> Session:
        """Add text to the user's turn. It always stays.

        Raises
        ------
        SessionError
            The budget cannot hold it and the text so far.
        OptionError
            No text, or one with a placeholder of media. Nothing is added then.
        """
        self._check_open()
        self._add(_ids(self._words(text, "say")))
        return self

    def ask(self, question: str, *, keep: bool = False, max_new_tokens: int = 64) -> str:
        """The greedy answer to a question about everything so far.

        Parameters
        ----------
        question
            Text that ends the user's turn.
        keep
            Whether question and answer stay in the conversation, as text. Otherwise the cache is
            afterwards what it was before.
        max_new_tokens
            The most tokens of an answer.

        Raises
        ------
        SessionError
            `keep=True`, and the budget cannot hold text so far, question and answer.
        """
        self._check_open()
        if not fits(max_new_tokens, int) or max_new_tokens < 1:
            raise OptionError(
                f"ask: max_new_tokens={max_new_tokens!r}; allowed: a whole number above 0."
            )
        ids = self._words(question, "ask") + self._turns.answer
        if keep:
            self._conversation.check_text(len(self._waiting) + len(ids) + max_new_tokens)
        rewind = self._conversation.mark()
        try:
            answer = self._answer(self._waiting + ids, max_new_tokens, keep)
        except BaseException:
            rewind()
            raise
        if keep:
            self._waiting = self._turns.reopen
            self._conversation.shrink()
        else:
            rewind()
        text: str = self._turns.tokenizer.decode(answer, skip_special_tokens=True)
        return text.strip()

    def _words(self, text: Any, where: str) -> list[int]:
        """Ids of text of the user, without placeholders of media."""
        if not isinstance(text, str) or not text:
            raise OptionError(f"{where}({text!r}): allowed is text that is not empty.")
        ids = self._turns.words(text)
        if wrong := sorted(set(ids) & self._conversation.adapter.placeholders.keys()):
            raise OptionError(
                f"{where}: the text has {self._turns.tokenizer.decode(wrong[:1])!r}, which stands "
                "for media. Take it out, and add media with session.append(...)."
            )
        return ids

    def _answer(self, ids: list[int], most: int, keep: bool) -> list[int]:
        """Ids of the answer; all of them are in the cache if they are to be kept."""
        run, stops = self._conversation.run, self._stops()
        answer: list[int] = []
        logits = run(_ids(ids), kept=keep)
        while len(answer) < most:
            token = int(logits.argmax())
            if token in stops:
                break
            answer.append(token)
            if keep or len(answer) < most:
                logits = run(_ids([token]), kept=keep)
        return answer

    def _stops(self) -> set[int]:
        """Ids that end an answer."""
        config = getattr(self._conversation.adapter.top, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        known = set(ends if isinstance(ends, list | tuple) else [ends])
        tokenizer, first = self._turns.tokenizer, self._turns.reopen[:1]
        special = set(getattr(tokenizer, "all_special_ids", ()))
        return (known | {tokenizer.eos_token_id} | (set(first) & special)) - {None}

    def _add(self, inputs: dict[str, Tensor]) -> None:
        parts = [_ids(self._waiting), inputs] if self._waiting else [inputs]
        self._conversation.add(join(parts))
        self._waiting = []
        self._conversation.shrink()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("this session is closed. Open another: Session(model, processor).")
        self._check_alone()

    def _check_alone(self) -> None:
        """Refuse another session of a patched model."""
        top = self._conversation.adapter.top
        others = [s for s in _OPEN if s is not self and s._conversation.adapter.top is top]
        if others and handle_of(self._conversation.adapter.model) is not None:
            raise SessionError(
                f"{type(top).__name__} is patched, and {len(others)} other session of it is open: "
                f"{others[0]!r}. A patch counts, and is set for, one conversation (handle.stats, "
                "handle.set). Close the other one (session.close(), or `with Session(...)`), "
                "unpatch the model, or load a second one."
            )


def _ids(ids: list[int]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([ids])}
