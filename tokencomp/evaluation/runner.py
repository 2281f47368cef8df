"""Ask a model every example under every setting, and store the answers.

`sweep` is the only loop in the package that asks questions: benchmarks, training, the tiny models
and the command line use it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokencomp.adapters.registry import adapter_for, unwrap
from tokencomp.errors import MediaError, OptionError
from tokencomp.evaluation.batches import (
    OF_AN_ITEM,
    TOO_LARGE,
    Answerer,
    Answers,
    Around,
    Batch,
    Loaded,
    failed,
    right_answers,
)
from tokencomp.evaluation.environment import environment, model_identity, process_rank
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.evaluation.store import AnswerStore
from tokencomp.inputs.questions import Example, has_video
from tokencomp.inputs.video.frames import Frames, plain_frames
from tokencomp.inputs.video.scorer import with_scorer
from tokencomp.torchlib.compat import attention_implementation


def evaluate(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    reducer: str = FULL,
    ratio: float = 0.0,
    out_dir: str | Path | None = None,
    *,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> EvalRun:
    """Evaluate one setting; see `sweep` for `how`. `out_dir` is the folder of this run."""
    setting = Setting(reducer, ratio, options or {})
    folders = None if out_dir is None else {setting: Path(out_dir)}
    return sweep(model, processor, items, [setting], folders, **how)[setting]


def sweep(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    settings: Sequence[Setting],
    out_dir: str | Path | dict[Setting, Path] | None = None,
    *,
    batch_size: int = 16,
    frames: Frames = 8,
    max_new_tokens: int = 16,
    seed: int = 0,
    name: str = "",
    data: str = "",
    progress: bool | str = True,
    shard: bool = True,
    around: Around | None = None,
) -> dict[Setting, EvalRun]:
    """Evaluate several settings; every batch is decoded and preprocessed once for all of them.

    Parameters
    ----------
    model, processor
        A Hugging Face multimodal model and its processor; the model is left as it was. Or variants
        of one model by the `variant` of the settings: "" is the plain model, for which PEFT
        adapters are switched off.
    items
        Examples with distinct ids. Those whose media cannot be read, or are refused by the
        processor, are recorded as failed, and so are examples that the method cannot reduce. If the
        first ten all fail under a setting, it is not asked the others, which count as failed.
    settings
        See `tokencomp.evaluation.settings.grid`.
    out_dir
        Folder with one run folder per setting (or one folder per setting). Finished items are
        taken from there, unless their files, prompts or right answers have changed. None keeps
        everything in memory.
    batch_size
        Rows per batch; halved for good when the GPU runs out of memory, which the manifest notes.
    frames
        Which frames of each video are decoded, as in `load_media`. Records say which ones these
        were, unless `frames` is a number. A policy by scores without a scorer asks the model.
    max_new_tokens, seed
        Longest answer, and the seed of torch before every batch.
    name, data
        Of the model and of the items, for the manifest; answers about other data are not taken up.
    progress
        Whether to show a progress bar, or its title.
    shard
        Under `accelerate launch`, every process takes its share of `items`; False if they have
        been shared out already.
    around
        Called before every batch of every setting; the model answers inside the context manager
        that it returns.

    Returns
    -------
    dict
        `EvalRun` per setting, records in the order of `items`.

    Raises
    ------
    OptionError
        Two items of one id, or a batch size below 1; a folder of another run.
    """
    known = _by_id(items)
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}: expected one row or more.")
    answerer = Answerer(
        model if isinstance(model, dict) else {"": model},
        processor,
        {"frames": plain_frames(frames), "max_new_tokens": max_new_tokens, "seed": seed},
        isinstance(model, dict),
        around,
    )
    question = functools.cache(lambda name: _question(known[name]) if name in known else {})
    shared = {**model_identity(answerer.plain, processor, name), **answerer.how}
    shared |= {"data": data} if data else {}
    asked: list[_Asked] = []
    for setting in dict.fromkeys(settings):
        identity, store = {**shared, **setting.identity}, None
        if out_dir is not None:
            own = out_dir.get(setting) if isinstance(out_dir, dict) else None
            path = own or Path(str(out_dir)) / setting.label
            store = AnswerStore(path, identity, process_rank()[0], question)
        asked.append(_Asked(setting, identity, store))
    one = _Sweep(answerer, asked, items, with_scorer(frames, answerer.plain, processor))
    one.batch_size = batch_size
    one.run(progress, shard)
    return {ours.setting: ours.run for ours in asked}


def _by_id(items: Sequence[Example]) -> dict[str, Example]:
    """The examples by id; raise `OptionError` if an id occurs twice."""
    known = {e.id: e for e in items}
    if len(known) < len(items):
        (name, count), *_ = Counter(e.id for e in items).most_common(1)
        raise OptionError(
            f"{count} examples have the id {name!r}: answers are stored and paired by id. Give "
            "every example a different id."
        )
    return known


def _question(example: Example) -> dict[str, str]:
    """What an answer depends on besides the setting: `ASKED` of a record."""
    words = {"prompt": example.prompt, "answer": right_answers(example)}
    return {"media": example.contents(), **words}


IN_VAIN = 10
"""After this many failures and no answer, a setting is not asked any more."""
_FULL = Setting()
"""The full model, whose inputs most settings share."""


class _Asked:
    """One setting of a sweep: its answers so far, and the folder that stores them, if any."""

    def __init__(
        self, setting: Setting, identity: dict[str, Any], store: AnswerStore | None
    ) -> None:
        self.setting, self.identity, self.store = setting, identity, store
        self.run = EvalRun(setting, path=None if store is None else store.path)
        self.done = set() if store is None else store.done()
        self.answered, self.failures, self.reason = bool(self.done), 0, ""
        self.seconds = 0.0

    def fail(self, example: Example, reason: str) -> None:
        self.failures, self.reason = self.failures + 1, reason
        self.write([failed(example, reason)])

    def in_vain(self, example: Example) -> bool:
        """Whether the first ten questions have failed; `example` then fails without being asked."""
        if self.answered or self.failures < IN_VAIN:
            return False
        reason = f"not asked: the first {IN_VAIN} questions failed, the last because: {self.reason}"
        self.write([failed(example, reason)])
        return True

    def write(self, records: list[dict[str, Any]]) -> None:
        self.run.records += records
        self.done.update(r["id"] for r in records)
        if self.store is not None:
            self.store.append(records)

    def collect(self, order: dict[str, int], others: bool) -> None:
        """Order all records by item; includes records of `others`, if there are other processes."""
        if self.store is not None:
            if others:
                self.store.refresh()
            self.run.records = self.store.records
        self.run.records = [r for r in self.run.records if r["id"] in order]
        self.run.records.sort(key=lambda r: order[r["id"]])


class _Sweep:
    """One call of `sweep`."""

    batch_size, halved = 16, False

    def __init__(
        self, answerer: Answerer, asked: list[_Asked], items: Sequence[Example], frames: Frames
    ) -> None:
        self.answerer, self.asked, self.items, self.frames = answerer, asked, list(items), frames
        self.rank, self.world = process_rank()
        attention = attention_implementation(unwrap(answerer.plain).config)
        self.facts = {**environment(), "attention": attention}
        self.layers, self.steps = len(adapter_for(answerer.plain).layers), self._steps()

    def _steps(self) -> int:
        """Temporal steps of the videos, 0 if unknown; towers of Qwen read frames in pairs."""
        frames = self.answerer.how["frames"]
        if isinstance(frames, str) or not any(map(has_video, self.items)):
            return 0
        vision = getattr(self.answerer.plain.config, "vision_config", None)
        return -(-frames // getattr(vision, "temporal_patch_size", 1))

    def run(self, progress: bool | str, shard: bool) -> None:
        from tqdm.auto import tqdm

        share = self.items[self.rank :: self.world] if shard else self.items
        todo = [e for e in share if any(e.id not in ours.done for ours in self.asked)]
        todo.sort(key=has_video)
        self._write_manifests(finished=False)
        title = progress if isinstance(progress, str) else "answering"
        bar = tqdm(
            total=len(share), initial=len(share) - len(todo), disable=not progress, desc=title
        )
        with self.answerer.patches, bar:
            while todo:
                batch, todo = todo[: self.batch_size], todo[self.batch_size :]
                loaded = self._load(batch)
                if loaded and not self._answer(loaded):
                    todo = batch + todo
                    continue
                bar.update(len(batch))
        order = {e.id: k for k, e in enumerate(self.items)}
        for ours in self.asked:
            ours.collect(order, others=self.world > 1)
        self._write_manifests(finished=True)

    def _load(self, batch: list[Example]) -> list[Loaded]:
        """The examples whose media can be read; the others are recorded as failed."""
        loaded = []
        for example in batch:
            asked = [ours for ours in self.asked if example.id not in ours.done]
            asked = [ours for ours in asked if not ours.in_vain(example)]
            try:
                if asked:
                    loaded.append((example, example.load(self.frames)))
            except MediaError as error:
                for ours in asked:
                    ours.fail(example, str(error))
        return loaded

    def _answer(self, loaded: list[Loaded]) -> bool:
        """Answer one batch under every setting; False if it did not fit and batches were halved."""
        shared: dict[str, Any] | None = None
        answers: Answers = {}
        for ours in self.asked:
            setting = ours.setting
            rows = [pair for pair in loaded if pair[0].id not in ours.done]
            if not rows or (len(rows) == 1 and ours.in_vain(rows[0][0])):
                continue
            try:
                if setting.input_baseline or len(rows) < len(loaded):
                    inputs = self.answerer.inputs(rows, setting)
                else:
                    inputs = shared = shared or self.answerer.inputs(loaded, _FULL)
                batch = self.answerer.answer(setting, rows, inputs, answers)
            except OF_AN_ITEM as error:
                if len(rows) > 1:  # one of them may be at fault, or none where they differ in shape
                    return all([self._answer([row]) for row in loaded])
                ours.fail(rows[0][0], str(error))
            except torch.OutOfMemoryError:
                if len(rows) > 1:  # halve the batch for good, below what did not fit
                    self.batch_size = max(1, min(len(rows), self.batch_size) // 2)
                    self.halved = True
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    return False
                ours.fail(rows[0][0], TOO_LARGE)
            else:
                self._keep(ours, rows, batch)
        return True

    def _keep(self, ours: _Asked, rows: list[Loaded], batch: Batch) -> None:
        ours.answered = True
        ours.seconds += batch.seconds
        if not isinstance(self.answerer.how["frames"], int):
            for (_, media), record in zip(rows, batch.records, strict=True):
                videos = [m.sampling for m in media if hasattr(m, "sampling")]
                record["frames"] = [[s.rule, *s.indices] for s in videos]
        ours.write(batch.records)

    def _write_manifests(self, finished: bool) -> None:
        facts = {
            **self.facts,
            "processes": self.world,
            "batch_size": self.batch_size,
            "batch_halved_by_oom": self.halved,
            "finished": finished,
        }
        for ours in self.asked:
            deviation = ours.setting.deviation(self.layers, self.steps)
            manifest = {"identity": ours.identity, **facts, "deviation": deviation}
            stored = None if ours.store is None else ours.store.manifest
            if stored and stored.get("finished") and ours.done >= {e.id for e in self.items}:
                ours.run.manifest = stored  # of the command that asked
                continue
            if finished:
                every = ours.run.records if ours.store is None else ours.store.records
                summary = replace(ours.run, records=every).summary()
                manifest |= {"seconds": round(ours.seconds, 3), "summary": summary}
            ours.run.manifest = manifest
            if ours.store is not None and self.rank == 0:
                ours.store.write(manifest)
