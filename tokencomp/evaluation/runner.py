"""Ask a model every example under every setting, and keep the answers.

`sweep` is the only loop in the package that asks questions: the benchmarks, training, the tiny
models and the command line call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import MediaError
from tokencomp.evaluation.batches import (
    TOO_LARGE,
    Answerer,
    Answers,
    Around,
    Batch,
    Loaded,
    failed,
    kind_of,
)
from tokencomp.evaluation.environment import (
    attention_backend,
    environment,
    model_identity,
    process_rank,
)
from tokencomp.evaluation.patches import PatchedModels
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.evaluation.store import AnswerStore
from tokencomp.inputs.frames import Frames, plain_frames
from tokencomp.inputs.questions import Example, has_video
from tokencomp.inputs.scorer import with_scorer

Draw = Callable[[Path, Example, list[Any], Any], None]
"""Run folder, a question, its media, and `handle.stats` of a batch that begins with it."""


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
    """Evaluate one setting; see `sweep` for `how`. `out_dir` is the folder of this run alone."""
    setting = Setting(reducer, ratio, options or {})
    folders = None if out_dir is None else {setting: Path(out_dir)}
    return sweep(model, processor, items, [setting], folders, **how)[setting]


_FULL = Setting()
"""The full model, whose inputs most settings share."""


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
    draw: Draw | None = None,
    times: bool = False,
    work: bool = False,
) -> dict[Setting, EvalRun]:
    """Evaluate several settings; every batch is decoded and preprocessed once for all of them.

    Parameters
    ----------
    model, processor
        A Hugging Face multimodal model and its processor; the model is left as it was. Or variants
        of one model by the `variant` of the settings: "" is the plain model, for which PEFT
        adapters are switched off.
    items
        Examples with distinct ids. Media that cannot be read, or that the processor refuses, are
        recorded as failed.
    settings
        See `tokencomp.evaluation.settings.grid`.
    out_dir
        Folder with one run folder per setting (or one folder per setting). Finished items are
        taken from there, unless their files have changed. None keeps everything in memory.
    batch_size
        Rows per batch; halved for good when the GPU runs out of memory, which the manifest notes.
    frames
        Which frames of each video are decoded, as in `load_media`. Records say which ones these
        were, unless `frames` is a number. A policy by scores without a scorer asks the model.
    max_new_tokens
        Longest answer.
    seed
        Seeds torch before every batch.
    name
        Model name for the manifest; default `model.name_or_path`.
    data
        What the items are, for the manifest: answers about other data are not taken up.
    progress
        Whether to show a progress bar, or its title.
    shard
        Under `accelerate launch`, every process takes its share of `items`; False if they have
        been shared out already.
    around
        Called before every batch of every setting; the model answers inside the context manager
        that it returns.
    draw
        Called by the first process with the first question of every compressed batch, to keep a
        picture in the run folder: `tokencomp.pages.pictures.save_kept` draws what reports show.
    times
        Whether the first answer of each setting is timed in parts, in turn with the full model;
        the manifest keeps the result under "times".
    work
        Whether the work of the first answer about an image, and of the first about a video, is
        counted in parts; the manifest keeps it under "work", by the kind of media.

    Returns
    -------
    dict
        `EvalRun` per setting, records in the order of `items`.
    """
    models = model if isinstance(model, dict) else {"": model}
    how = {"frames": plain_frames(frames), "max_new_tokens": max_new_tokens, "seed": seed}
    distinct, patches = list(dict.fromkeys(settings)), PatchedModels(models)
    answerer = Answerer(models, processor, patches, how, isinstance(model, dict), around)
    one = _Sweep(answerer, items, distinct, name, data)
    one.frames = with_scorer(frames, answerer.plain, processor)
    one.batch_size, one.shard, one.draw = batch_size, shard, draw
    one.timed, one.counted = times, work
    try:
        if out_dir is not None:
            one.open_stores(out_dir)
        return one.run(progress)
    except BaseException:
        for store in reversed(one.stores.values()):
            store.leave_nothing()
        raise


class _Sweep:
    """One call of `sweep`."""

    def __init__(
        self,
        answerer: Answerer,
        items: Sequence[Example],
        settings: Sequence[Setting],
        name: str,
        data: str,
    ) -> None:
        self.answerer, self.items, self.halved = answerer, list(items), False
        self.batch_size, self.shard = 16, True
        self.frames: Frames = answerer.how["frames"]
        self.draw: Draw | None = None
        self.timed = self.counted = False
        self.times: dict[Setting, dict[str, dict[str, float]]] = {}
        self.rank, self.world = process_rank()
        self.runs = {s: EvalRun(s) for s in settings}
        self.work: dict[Setting, dict[str, Any]] = {s: {} for s in settings}
        self.seconds = dict.fromkeys(self.runs, 0.0)
        self.done: dict[Setting, set[str]] = {s: set() for s in self.runs}
        self.stores: dict[Setting, AnswerStore] = {}
        plain = answerer.plain
        shared = {**model_identity(plain, answerer.processor, name), **answerer.how}
        shared |= {"data": data} if data else {}
        self.identities = {s: {**shared, **s.identity} for s in self.runs}
        self.facts = {**environment(), "attention": attention_backend(plain)}
        self.layers = len(adapter_for(plain).layers)
        self.steps = self._steps(answerer.how["frames"], plain.config)

    def _steps(self, frames: int | str, config: Any) -> int:
        """Steps in time of the videos, 0 if unknown; towers of Qwen read frames in pairs."""
        vision = getattr(config, "vision_config", None)
        if isinstance(frames, str) or not any(map(has_video, self.items)):
            return 0
        return -(-frames // getattr(vision, "temporal_patch_size", 1))

    def open_stores(self, out_dir: str | Path | dict[Setting, Path]) -> None:
        """Take finished answers from disk, and write new ones there."""
        paths = out_dir if isinstance(out_dir, dict) else {}
        items = {e.id: e for e in self.items}
        contents = functools.cache(lambda name: items[name].contents() if name in items else "")
        for setting, run in self.runs.items():
            path = paths.get(setting) or Path(str(out_dir)) / setting.label
            self.stores[setting] = AnswerStore(path, self.identities[setting], self.rank, contents)
            if known := self.stores[setting].manifest.get("times"):
                self.times[setting] = known
            self.work[setting] = self.stores[setting].manifest.get("work", {})
            self.done[setting] = self.stores[setting].done()
            run.path = path

    def run(self, progress: bool | str) -> dict[Setting, EvalRun]:
        from tqdm.auto import tqdm

        share = self.items[self.rank :: self.world] if self.shard else self.items
        todo = [e for e in share if any(e.id not in done for done in self.done.values())]
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
        self._collect()
        self._write_manifests(finished=True)
        return self.runs

    def _load(self, batch: list[Example]) -> list[Loaded]:
        """The examples whose media can be read; the others are recorded as failed."""
        loaded = []
        for example in batch:
            try:
                loaded.append((example, example.load(self.frames)))
            except MediaError as error:
                for setting in self.runs:
                    if example.id not in self.done[setting]:
                        self._write(setting, [failed(example, str(error))])
        return loaded

    def _answer(self, loaded: list[Loaded]) -> bool:
        """Answer one batch under every setting; False if it did not fit and batches were halved."""
        shared: dict[str, Any] | None = None
        answers: Answers = {}
        for setting in self.runs:
            rows = [pair for pair in loaded if pair[0].id not in self.done[setting]]
            if not rows:
                continue
            try:
                if setting.input_baseline or len(rows) < len(loaded):
                    inputs = self.answerer.inputs(rows, setting)
                else:
                    inputs = shared = shared or self.answerer.inputs(loaded, _FULL)
                batch = self.answerer.answer(setting, rows, inputs, answers)
            except MediaError as error:
                if len(rows) > 1:  # one of them may be at fault, or none where they differ in shape
                    return all([self._answer([row]) for row in loaded])
                self._write(setting, [failed(rows[0][0], str(error))])
            except torch.OutOfMemoryError:
                if len(rows) > 1:
                    self._halve(len(rows))
                    return False
                self._write(setting, [failed(rows[0][0], TOO_LARGE)])
            else:
                self._keep(setting, rows, batch)
        return True

    def _halve(self, rows: int) -> None:
        """Halve the batch size for good, below the number of rows that did not fit."""
        self.batch_size, self.halved = max(1, min(rows, self.batch_size) // 2), True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _keep(self, setting: Setting, rows: list[Loaded], batch: Batch) -> None:
        self.seconds[setting] += batch.seconds
        if not isinstance(self.answerer.how["frames"], int):
            for (_, media), record in zip(rows, batch.records, strict=True):
                videos = [m.sampling for m in media if hasattr(m, "sampling")]
                record["frames"] = [[s.rule, *s.indices] for s in videos]
        self._write(setting, batch.records)
        if self.draw and setting in self.stores and not self.rank and batch.stats:
            self.draw(self.stores[setting].path, *rows[0], batch.stats)
        if self.timed and not self.rank and setting not in self.times:
            self.times[setting] = self.answerer.time_parts(setting, rows[0])
        if self.counted and not self.rank:
            self._count(setting, rows)

    def _count(self, setting: Setting, rows: list[Loaded]) -> None:
        """Count the work of the first answer about every kind of media."""
        for row in rows:
            kind = kind_of(row)
            if kind and kind not in self.work[setting]:
                self.work[setting][kind] = self.answerer.work_parts(setting, row)

    def _write(self, setting: Setting, records: list[dict[str, Any]]) -> None:
        self.runs[setting].records += records
        self.done[setting].update(r["id"] for r in records)
        if setting in self.stores:
            self.stores[setting].append(records)

    def _collect(self) -> None:
        """Put all records into the order of the items, those of other processes included."""
        order = {e.id: k for k, e in enumerate(self.items)}
        for setting, run in self.runs.items():
            if setting in self.stores:
                if self.world > 1:
                    self.stores[setting].refresh()
                run.records = self.stores[setting].records
            run.records = [r for r in run.records if r["id"] in order]
            run.records.sort(key=lambda r: order[r["id"]])

    def _write_manifests(self, finished: bool) -> None:
        for setting, run in self.runs.items():
            run.manifest = {
                "identity": self.identities[setting],
                **self.facts,
                "processes": self.world,
                "batch_size": self.batch_size,
                "batch_halved_by_oom": self.halved,
                "finished": finished,
                "moved": setting.moved(self.layers, self.steps),
            }
            if setting in self.times:
                run.manifest["times"] = self.times[setting]
            if self.work[setting]:
                run.manifest["work"] = self.work[setting]
            if finished:
                run.manifest["seconds"] = round(self.seconds[setting], 3)
                run.manifest["summary"] = run.summary()
            if setting in self.stores and self.rank == 0:
                self.stores[setting].write(run.manifest)
