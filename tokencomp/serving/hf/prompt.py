"""From the body of a request to a prompt: bounded text, decoded media."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from tokencomp.inputs.prompts import Chat, takes_videos
from tokencomp.method import Method
from tokencomp.serving.hf.fields import HfChat, HfMessage
from tokencomp.serving.hf.grammar import Grammar, Grammars
from tokencomp.serving.hf.text import CallForm
from tokencomp.serving.limits import Deadline, Limits, RequestError
from tokencomp.serving.media import check_media, load_image
from tokencomp.serving.request import read_request
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.video import decode_apart, load_video, with_request

MAX_CHARACTERS = 4 << 20
TOKEN_PIXELS = 28 * 28  # of a visual token, where the processor cannot count them
MARKED = ("image", "video")


@dataclass
class ChatPrompt:
    """A checked request with decoded media."""

    request: HfChat
    chat: list[dict[str, Any]]  # messages in the form that chat templates expect
    spec: Method
    alone: bool = False  # in its batch, as nobody can count its placeholders
    images: list[Any] = field(default_factory=list)  # RGB
    videos: list[Any] = field(default_factory=list)  # uint8 (frames, height, width, 3)
    samplings: list[Any] = field(default_factory=list)  # when frames were shown
    grammars: list[Grammar | None] = field(default_factory=list)  # one per answer
    text: str = ""  # what the chat template makes of the messages
    text_tokens: int = 0
    calls: CallForm | None = None  # how the model writes calls, if it may
    limits: Limits = field(default_factory=Limits)  # with the frames that the request chooses
    by_load: bool = False  # the load of the server chooses the ratio
    visual_tokens: int = 0  # before compression

    @property
    def pixels(self) -> int:
        images = sum(image.width * image.height for image in self.images)
        return images + sum(video[..., 0].size for video in self.videos)

    @property
    def bytes(self) -> int:
        return 3 * self.pixels


def too_long(tokens: int, limit: int) -> RequestError:
    return RequestError(
        f"the prompt has {tokens} tokens before compression; this model takes {limit}, answer "
        "included. Send less text, or fewer or smaller media."
    )


@contextlib.contextmanager
def processor_errors() -> Iterator[None]:
    """Blame the prompt for errors of the processor, whose types no documentation names."""
    try:
        yield
    except Exception as error:
        raise RequestError(f"the model's processor refuses the prompt: {error}") from error


class PromptText:
    """Refuses texts that are too long, and placeholders of media written by the client.

    Thread-safe; one text is tokenised at a time. The tokenizer is a copy, because the engine
    changes the padding of the original while it uses it. `placeholders` are tokens that the model
    replaces by media: some processors (Gemma 3) write other ones than the chat template. Longer
    texts than `max_characters` are refused without tokenisation: no token has more characters than
    the longest entry of the vocabulary. `calls` is how the chat template writes calls of tools.
    """

    def __init__(
        self, processor: Any, max_model_len: int, placeholders: Collection[int] = ()
    ) -> None:
        self.processor, self.max_model_len = processor, max_model_len
        self.tokenizer = copy.deepcopy(getattr(processor, "tokenizer", processor))
        self._lock = threading.Lock()
        # No token has more characters than the longest entry: longer texts cannot fit.
        longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        self.max_characters = min(longest * max_model_len, MAX_CHARACTERS)
        self._added = set(self.tokenizer.added_tokens_encoder.values())
        self.markers = {kind: self._marker(kind) for kind in MARKED}
        self._special = {token for marker in self.markers.values() for token in marker}
        self._special |= self._added & set(placeholders)
        self.calls = CallForm.of(self.render, self._visible)

    def check_size(self, characters: int, parts: int) -> None:
        """Refuse a conversation by its number of characters, and of message parts."""
        if characters > self.max_characters or parts > self.max_model_len:
            raise RequestError(
                f"the prompt has {characters} characters in {parts} parts, which cannot fit: this "
                f"model takes {self.max_model_len} tokens, answer included, and this server "
                f"{self.max_characters} characters. Send less text."
            )

    def render(self, chat: Chat, tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the prompt that the chat template makes, with one placeholder per medium."""
        options = {"tools": list(tools)} if tools else {}
        with processor_errors():
            text = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **options
            )
            return str(text)

    def check(self, chat: Chat, text: str) -> int:
        """Tokenise a rendered conversation, check it, and return its number of tokens.

        A prompt with another number of placeholders than media would use the media of another
        request of its batch.
        """
        kinds = [p["type"] for m in chat if isinstance(m["content"], list) for p in m["content"]]
        if "video" in kinds and not takes_videos(self.processor):
            raise RequestError("this model takes no videos. Send frames of it as images.")
        tokens = self._tokens(text)
        if len(tokens) >= self.max_model_len:
            raise too_long(len(tokens), self.max_model_len)
        # A client that writes placeholders itself would take the features of another request.
        expected: Counter[int] = Counter()
        for kind in kinds:
            expected.update(self.markers.get(kind, {}))
        present = Counter(token for token in tokens if token in self._special)
        if present != expected:
            raise RequestError(
                "the prompt does not have one placeholder per image and video: its text contains "
                "placeholder tokens, or the model's chat template leaves media of this role out."
            )
        return len(tokens)

    def check_images(self, text_tokens: int, images: Sequence[Image.Image]) -> int | None:
        """Refuse images with too many tokens before the processor makes arrays of them.

        Returns their number; None where a processor cannot count, and the engine does afterwards.
        """
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None or not images:
            return None
        try:
            counts = count(image_sizes=[(image.height, image.width) for image in images])
            visual = int(sum(counts["num_image_tokens"]))
        except Exception:  # a size that the processor will refuse, with a better message
            return None
        # Each image had one placeholder in the text.
        total = text_tokens - len(images) + visual
        if total >= self.max_model_len:
            raise too_long(total, self.max_model_len)
        return visual

    def _tokens(self, text: str) -> list[int]:
        with processor_errors(), self._lock:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _visible(self, text: str) -> bool:
        """Whether a text survives decoding of an answer, which removes special tokens."""
        return text in self.tokenizer.decode(self._tokens(text), skip_special_tokens=True)

    def _marker(self, kind: str) -> Counter[int]:
        """Return the special tokens that the chat template writes for one medium of that kind."""
        text = {"type": "text", "text": "a"}
        try:
            plain, marked = (
                Counter(self._tokens(self.render([{"role": "user", "content": content}])))
                for content in ([text], [{"type": kind}, text])
            )
        except RequestError:  # a model without this modality
            return Counter()
        return Counter({t: n for t, n in (marked - plain).items() if t in self._added})


# -- from body to prompt ---------------------------------------------------------------------------


def parse(
    content: bytes | bytearray,
    options: ServerOptions,
    limits: Limits,
    text: PromptText,
    grammars: Grammars,
    ratio: float | None = None,
) -> ChatPrompt:
    """Check a JSON body: its form, then the amount of text, then its tokens. `load` decodes media.

    `ratio`: under load, for requests with media that name none. Raises `RequestError`.
    """
    request = read_request(HfChat, content, limits)
    spec, by_load = request.method(options, "hf", ratio)
    prompt = ChatPrompt(request, [], spec, by_load=by_load)
    _check_amount(request, text)
    prompt.chat = [_message(message) for message in request.messages]
    prompt.calls = _call_form(request, text)
    tools = [tool.model_dump(exclude_none=True) for tool in request.offered]
    begun = prompt.calls.opening if prompt.calls and request.must_call else ""
    prompt.text = text.render(prompt.chat, tools) + begun
    prompt.text_tokens = text.check(prompt.chat, prompt.text)
    prompt.grammars = [None] * request.n
    if schema := request.answer_schema:
        name = "tool_choice" if request.must_call else "response_format"
        prompt.grammars = [*grammars.of(schema, request.n, name)]
    prompt.alone = not all(text.markers[p.kind] for p in request.media)
    prompt.limits = with_request(request.media_io_kwargs, limits)
    return prompt


def load(prompt: ChatPrompt, text: PromptText, deadline: Deadline) -> None:
    """Check and decode the media of a prompt, and count the tokens of its images."""
    deadline.start()
    check_media(prompt.request.media, prompt.limits, deadline)
    for part in prompt.request.media:
        deadline.check()
        left = prompt.limits.max_total_pixels - prompt.pixels  # video files may take all of them
        limits, url = replace(prompt.limits, max_total_pixels=left), part.medium.url
        if part.kind == "image":
            prompt.images.append(load_image(url, limits, deadline))
        else:
            frames, sampling = load_video(url, limits, deadline, decode_apart)
            prompt.videos.append(frames)
            prompt.samplings.append(sampling)
    counted = text.check_images(prompt.text_tokens, prompt.images)
    pixels = sum(video[..., 0].size for video in prompt.videos)
    pixels += sum(i.width * i.height for i in prompt.images) if counted is None else 0
    prompt.visual_tokens = (counted or 0) + pixels // TOKEN_PIXELS


def _check_amount(request: HfChat, text: PromptText) -> None:
    """Refuse a request by the amount of its text, before it is tokenised."""
    texts = [tool.model_dump_json() for tool in request.tools or []]
    for tokens in (request.max_tokens, request.max_completion_tokens):
        if tokens is not None and tokens > text.max_model_len:
            raise RequestError(
                f"an answer of {tokens} tokens: this model takes {text.max_model_len}, prompt "
                "included. Lower max_tokens."
            )
    for message in request.messages:
        texts += [part.words or "" for part in message.parts]
        texts += [call.model_dump_json() for call in message.tool_calls or []]
    names = sum(len(message.name or "") for message in request.messages)
    text.check_size(sum(map(len, texts)) + names, len(texts))


def _message(message: HfMessage) -> dict[str, Any]:
    """Return a message in the form that chat templates expect."""
    if message.content is None and message.role != "assistant":
        raise RequestError(f"a message of role {message.role!r} needs a content.")
    content: Any = [
        {"type": p.kind} if p.words is None else {"type": p.kind, "text": p.words}
        for p in message.parts
    ]
    if message.role == "tool" and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    known: dict[str, Any] = {"role": message.template_role, "content": content}
    if message.name is not None:
        known["name"] = message.name
    if message.tool_calls:
        known["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    return known


def _call_form(request: HfChat, text: PromptText) -> CallForm | None:
    """Return how calls are written, if the request has tools to call."""
    called = any(message.tool_calls or message.role == "tool" for message in request.messages)
    if (request.offered or called) and text.calls is None:
        raise RequestError(
            "not served: tools. This model's chat template has no place for them, or writes calls "
            "in a form that is not known here. Describe the calls in the prompt and ask for JSON: "
            '"response_format": {"type": "json_schema", ...}; or use the vLLM engine.'
        )
    return text.calls if request.offered else None
