"""The engine: one thread that batches waiting requests and generates."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.stats import Stats
from tokencomp.errors import ScoreError, TokenCompError, WeightsError
from tokencomp.handle import Handle
from tokencomp.inputs.prompts import chat_inputs, media_lengths, to_model
from tokencomp.method import Method
from tokencomp.patching import apply, check
from tokencomp.serving.hf.fields import SAMPLING
from tokencomp.serving.hf.grammar import Grammars
from tokencomp.serving.hf.logits import BatchLogits
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.hf.prompt import ChatPrompt, PromptText, processor_errors, too_long
from tokencomp.serving.hf.queue import Job, Usage, Waiting
from tokencomp.serving.limits import RequestError
from tokencomp.serving.saved import Saved
from tokencomp.serving.spec import ServerOptions

logger = logging.getLogger("tokencomp.serving")

PROBE_SECONDS = 5.0  # between probes of an engine that has failed
Counts = tuple[int, dict[str, int]]  # of an uncompressed prompt: all tokens, and by modality
Seen = dict[str, tuple[int, float]]  # by modality: tokens before, and seen by a layer on average
COLDEST = 1e-5  # logits divided by a smaller temperature overflow; such a request is greedy


class Engine:
    """Runs requests in batches of equal options; later requests wait for the next batch.

    The engine patches the model. `max_batch` is the largest number of requests per batch, for which
    it waits `wait` seconds; `max_model_len` bounds the uncompressed prompt and the answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: ServerOptions,
        metrics: Metrics,
        *,
        max_batch: int = 8,
        wait: float = 0.005,
        max_model_len: int | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.options, self.metrics = options, metrics
        self.waiting, self.wait = Waiting(max_batch), wait
        adapter = adapter_for(model)
        limit = int(getattr(adapter.text_config, "max_position_embeddings", None) or 1 << 20)
        self.max_model_len = min(max_model_len or limit, limit)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.text = PromptText(processor, self.max_model_len, adapter.placeholders)
        self.ends, self._penalty = take_end_tokens(model), take_penalty(model)
        self.grammars = Grammars(self.text.tokenizer, self.ends)
        check(model, options.default)
        self._handle: Handle = apply(model, Method())
        self._wake = threading.Condition()
        self._closed = False
        self._well = True
        self._thread = threading.Thread(target=self._loop, name="tokencomp-engine", daemon=True)
        self._thread.start()

    # -- from other threads ------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raise `RequestError` (503) when full or shut down."""
        self.waiting.check_room()
        if not self.alive:
            raise RequestError("the server shuts down.", 503)

    def submit(self, *jobs: Job) -> None:
        """Queue all answers to a request. Raises `RequestError` (503) when full or shut down."""
        with self._wake:
            self.check_room()
            self.waiting.check_room(len(jobs))
            self.waiting.jobs.extend(jobs)
            self.metrics.waiting.set(len(self.waiting))
            self._wake.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def healthy(self) -> bool:
        """Whether the engine runs, and has answered a request or a probe since its last failure."""
        return self.alive and self._well

    def close(self) -> None:
        """Stop after the running batch; waiting requests fail with 503."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=60)
        self._handle.remove()

    # -- the engine thread -------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            self._serve()
        finally:  # also after an error that ends the thread
            with self._wake:
                self._closed = True
            for job in self.waiting.jobs:
                job.send("error", RequestError("the server shuts down.", 503))

    def _serve(self) -> None:
        while True:
            with self._wake:
                pause = None if self._well else PROBE_SECONDS
                self._wake.wait_for(lambda: len(self.waiting) or self._closed, pause)
                if self._closed:
                    break
                # Some milliseconds for a fuller batch.
                deadline = time.monotonic() + self.wait
                while len(self.waiting) < self.waiting.max_batch and time.monotonic() < deadline:
                    self._wake.wait(timeout=max(deadline - time.monotonic(), 0))
                batch = self.waiting.take()
                self.metrics.waiting.set(len(self.waiting))
            if batch:
                self.metrics.running.set(len(batch))
                self._run(batch)
                self.metrics.running.set(0)
            elif not self._well:
                self._probe()

    def _run(self, batch: list[Job]) -> None:
        """Generate for a batch; if it fails, for its halves, down to single requests.

        A batch in which a request has sent text cannot start again, so it fails as a whole.
        """
        try:
            self._generate(batch)
            self._well = True
            return
        except BaseException as error:
            # Answers whose text has begun cannot start again.
            batch = [job for job in batch if not job.done]
            again = len(batch) > 1 and all(job.usage is None for job in batch)
            failed = False
            if not (again and isinstance(error, Exception)):
                failed, again = self._fail(batch, error), False
            if not isinstance(error, Exception):  # the thread ends
                raise
            memory = isinstance(error, torch.OutOfMemoryError)
        if memory:  # only here, where the error no longer keeps the tensors of its frames
            torch.cuda.empty_cache()
        if failed:
            self._probe()
        if again:
            # Halves find the request that fails, in log2(batch) steps, and the others get answers.
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._run(half)

    def _fail(self, batch: list[Job], error: BaseException) -> bool:
        """Log the failure of a batch, and answer its requests; return whether the server failed."""
        answer = for_client(error)
        if not isinstance(error, TokenCompError):
            logger.error("a batch of %d failed", len(batch), exc_info=error)
        elif isinstance(error, WeightsError) or answer.status >= 500:
            logger.error("%s", error)
        for job in batch:
            job.send("error", answer)
        return answer.status >= 500

    @torch.inference_mode()
    def _probe(self) -> None:
        """Test with a short text whether the model still works."""
        try:
            chat = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
            text = self.text.render(chat)
            inputs = to_model(chat_inputs(self.processor, [chat], [], [], [], [text]), self.model)
            with self._handle.disabled():
                self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            self._well = True
        except Exception as error:
            if self._well:
                logger.error("the model does not answer a short text", exc_info=error)
            self._well = False

    @torch.inference_mode()
    def _generate(self, batch: list[Job]) -> None:
        """Generate the answers of a batch, and stream them token by token."""
        batch = [job for job in batch if not job.cancelled]
        if not batch:
            return
        inputs = build_inputs(self.model, self.processor, [job.prompt for job in batch])
        lengths = inputs["attention_mask"].sum(1).tolist()
        if self._too_long(batch, lengths):
            self._generate([job for job in batch if not job.done])
            return
        counts = list(zip(lengths, media_lengths(self.model, inputs), strict=True))
        steps = BatchLogits(batch, inputs["attention_mask"], self._penalty, self.tokenizer)
        with self._compressed(batch[0].prompt.spec), seeded(batch[0].seed):
            self.model.generate(
                **inputs,
                max_new_tokens=max(job.max_tokens for job in batch),
                stopping_criteria=StoppingCriteriaList([Rows(self, batch, counts, steps)]),
                logits_processor=LogitsProcessorList([steps] if steps.needed else []),
                **sampling(batch[0].prompt.request, self.model.generation_config),
            )
        for job in batch:
            if not job.done:
                job.send("end", "abort" if job.cancelled else "length")

    def _too_long(self, batch: list[Job], lengths: list[int]) -> bool:
        """Limit answers to the length of the model; refuse prompts without room for an answer."""
        for job, length in zip(batch, lengths, strict=True):
            room = self.max_model_len - length
            if room < 1:
                job.send("error", too_long(length, self.max_model_len))
            job.max_tokens = min(job.max_tokens, max(room, 1))
        return any(job.done for job in batch)

    def _compressed(self, spec: Method) -> Any:
        """Set reducer and ratio of a batch inside the returned context."""
        if not spec.active:
            return self._handle.disabled()
        self._handle.change(spec)
        return contextlib.nullcontext()

    def started(self, batch: list[Job], counts: list[Counts]) -> None:
        """Store token counts after the prefill."""
        spec = batch[0].prompt.spec
        seen: list[Seen] = [{kind: (n, n) for kind, n in row.items()} for _, row in counts]
        before = [sum(media.values()) for _, media in counts]
        first = before  # visual tokens of the first decoder layer
        merged: list[int | None] = [None] * len(counts)
        stats = self._handle.stats if spec.active and any(before) else None
        if stats:
            first, seen = [row[0] for row in stats.tokens_after], seen_by_modality(stats)
            merged = stats.merged
            self.metrics.reduce.inc(stats.reduce_seconds)
        rows = zip(counts, before, first, seen, merged, strict=True)
        usages = [
            Usage(total - visual + entered, Saved.by(spec, tokens, layer is not None))
            for (total, _), visual, entered, tokens, layer in rows
        ]
        self.metrics.count_prefill(usages)
        for job, usage in zip(batch, usages, strict=True):
            job.usage, job.first = usage, time.monotonic()
            self.metrics.ttft.observe(job.first - job.arrived)
            job.send("start", usage)


class Rows(StoppingCriteria):
    """Stopping criterion, called after every step: streams new tokens, and ends rows."""

    def __init__(
        self, engine: Engine, batch: list[Job], counts: list[Counts], steps: BatchLogits
    ) -> None:
        self.engine, self.batch, self.counts, self.steps = engine, batch, counts, steps
        self.begun = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.begun:
            self.engine.started(self.batch, self.counts)
        self.begun, metrics = True, self.engine.metrics
        for row, (job, token) in enumerate(zip(self.batch, input_ids[:, -1].tolist(), strict=True)):
            if job.done:
                continue
            metrics.generated.inc()
            job.add(token, token in self.engine.ends, self.steps.entry(row, token))
            if job.done and job.usage is not None:
                seconds, first = time.monotonic() - job.arrived, job.first - job.arrived
                metrics.count_answer(seconds, first, job.usage.completion)
        done = [job.done or job.cancelled for job in self.batch]
        return torch.tensor(done, device=input_ids.device)


def seen_by_modality(stats: Stats) -> list[Seen]:
    # Stages at layers 0 and 4 of 16: widths 0, 4 and 12; 64 tokens, then 32, then 16 → mean 20.
    edges = [0, *stats.stage_layers, len(stats.layers)]
    widths = [stop - start for start, stop in itertools.pairwise(edges)]
    result = []
    for spans, counts, entering in zip(stats.spans, stats.counts, stats.entering, strict=True):
        row: Seen = {}
        for span, after, entered in zip(spans, counts, entering, strict=True):
            before, seen = row.get(span.modality, (0, 0.0))
            layers = zip([entered, *after], widths, strict=True)
            mean = sum(tokens * width for tokens, width in layers) / edges[-1]
            row[span.modality] = before + span.visual, seen + mean
        result.append(row)
    return result


# -- what `generate` gets --------------------------------------------------------------------------


def build_inputs(model: Any, processor: Any, prompts: list[ChatPrompt]) -> dict[str, Any]:
    """Return one left-padded batch of prompts with equal methods, on the model's device."""
    images = [image for prompt in prompts for image in prompt.images]
    videos = [video for prompt in prompts for video in prompt.videos]
    samplings = [sampling for prompt in prompts for sampling in prompt.samplings]
    chats, texts = [prompt.chat for prompt in prompts], [prompt.text for prompt in prompts]
    with processor_errors():
        inputs = chat_inputs(processor, chats, images, videos, samplings, texts)
    return to_model(inputs, model)


def sampling(request: Any, config: Any) -> dict[str, Any]:
    """Generation arguments; omitted fields have the value of the generation config.

    Without `top_k` in the config all tokens are sampled from, as in vLLM, not 50.
    """
    values = {name: getattr(request, name) for name in SAMPLING}
    values = {name: value for name, value in values.items() if value is not None}
    # Temperature 0 is greedy, as in OpenAI's API; a division by it would overflow.
    if values.get("temperature", 1.0) < COLDEST:
        return {"do_sample": False}
    if not values and not config.do_sample:
        return {}
    values["top_k"] = max(values.get("top_k", config.top_k or 0), 0)  # vLLM's -1 is 0 here
    return {"do_sample": True, **values}


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed all generators, on every device, for the block; afterwards they are seeded randomly."""
    if seed is None:
        yield
        return
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.seed()  # else requests without a seed would repeat what follows this one


def take_end_tokens(model: Any) -> set[int]:
    """Take the end tokens out of the generation config: `Rows` ends rows, as requests ask."""
    config = model.generation_config
    ends = getattr(config, "eos_token_id", None)
    if config.pad_token_id is None:  # generate would take the end token
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    config.eos_token_id = None
    return set([ends] if isinstance(ends, int) else ends or [])


def take_penalty(model: Any) -> float:
    """Take the repetition penalty out of the generation config: `BatchLogits` applies it."""
    config = model.generation_config
    penalty = getattr(config, "repetition_penalty", None)
    config.repetition_penalty = None if penalty is None else 1.0
    return 1.0 if penalty is None else float(penalty)


def for_client(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, WeightsError):  # its text names files of this machine
        return RequestError("this server has no trained weights for that reducer.")
    if isinstance(error, ScoreError):  # of the model in its dtype, not of the request
        return RequestError(f"the model cannot compress these media: {error}", 500)
    if isinstance(error, TokenCompError):
        return RequestError(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return RequestError("out of memory; send fewer or smaller media, or try again later.", 503)
    return RequestError(f"the model failed on this request ({type(error).__name__}).", 500)
