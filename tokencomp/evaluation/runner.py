"""Ask a model every example under every setting, and keep the answers.

`sweep` is the only loop in the package that asks questions: the benchmarks, training, the tiny
models and the command line call it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from tokencomp.adapters.base import adapter_for
from tokencomp.errors import MediaError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.cost import Cost, prefill_costs
from tokencomp.evaluation.environment import attention_backend, environment, model_identity
from tokencomp.evaluation.patches import Patches
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.evaluation.store import AnswerStore
from tokencomp.inputs.media import is_video
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.inputs.questions import Example

Loaded = tuple[Example, list[Any]]
Answers = dict[Setting, list[str]]
Around = Callable[[Setting, dict[str, Any], Answers], AbstractContextManager[Any]]
"""Setting, inputs of a batch, and its answers so far → context in which the model answers."""
KEPT = "kept.jpg"
TOO_LARGE = "out of GPU memory with this item alone; give fewer frames or smaller media"


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


def sweep(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    settings: Sequence[Setting],
    out_dir: str | Path | dict[Setting, Path] | None = None,
    *,
    batch_size: int = 16,
    frames: int = 8,
    max_new_tokens: int = 16,
    seed: int = 0,
    name: str = "",
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
        Examples with distinct ids. Media that cannot be read are recorded as failed.
    settings
        See `tokencomp.evaluation.settings.grid`.
    out_dir
        Folder with one run folder per setting (or one folder per setting). Finished items are
        taken from there. None keeps everything in memory.
    batch_size
        Rows per batch; halved for good when the GPU runs out of memory, which the manifest notes.
    frames
        Frames read from each video.
    max_new_tokens
        Longest answer.
    seed
        Seeds torch before every batch.
    name
        Model name for the manifest; default `model.name_or_path`.
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
    """
    models = model if isinstance(model, dict) else {"": model}
    how = {"frames": frames, "max_new_tokens": max_new_tokens, "seed": seed}
    work = _Sweep(models, processor, items, settings, how, name)
    work.batch_size, work.shard, work.around = batch_size, shard, around
    work.disable_adapters = isinstance(model, dict)
    if out_dir is not None:
        work.open_stores(out_dir)
    return work.run(progress)


class _Sweep:
    """One call of `sweep`."""

    def __init__(
        self,
        models: dict[str, Any],
        processor: Any,
        items: Sequence[Example],
        settings: Sequence[Setting],
        how: dict[str, Any],
        name: str,
    ) -> None:
        self.models, self.processor, self.how = models, processor, how
        self.items, self.halved = list(items), False
        self.batch_size, self.shard, self.disable_adapters = 16, True, False
        self.around: Around | None = None
        self.rank, self.world = _process()
        self.runs = {s: EvalRun(s) for s in dict.fromkeys(settings)}
        self.seconds = dict.fromkeys(self.runs, 0.0)
        self.done: dict[Setting, set[str]] = {s: set() for s in self.runs}
        self.stores: dict[Setting, AnswerStore] = {}
        self.plain = next(iter(models.values()))
        adapter = adapter_for(self.plain)
        self.patches = Patches(models)
        ids = list(adapter.placeholder_ids())
        self.shrinkers = {
            s.reducer: EqualTokens(processor, ids, s.name) for s in self.runs if s.input_baseline
        }
        shared = {**model_identity(self.plain, processor, name), **how}
        self.identities = {s: {**shared, **s.identity} for s in self.runs}
        self.facts = {**environment(), "attention": attention_backend(self.plain)}

    def open_stores(self, out_dir: str | Path | dict[Setting, Path]) -> None:
        """Take finished answers from disk, and write new ones there."""
        paths = out_dir if isinstance(out_dir, dict) else {}
        for setting, run in self.runs.items():
            path = paths.get(setting) or Path(str(out_dir)) / setting.label
            self.stores[setting] = AnswerStore(path, self.identities[setting], self.rank)
            self.done[setting] = self.stores[setting].done()
            run.path = path

    # -- the loop -------------------------------------------------------------------------------

    def run(self, progress: bool | str) -> dict[Setting, EvalRun]:
        from tqdm.auto import tqdm

        share = self.items[self.rank :: self.world] if self.shard else self.items
        todo = [e for e in share if any(e.id not in done for done in self.done.values())]
        todo.sort(key=_has_video)
        self._write_manifests(finished=False)
        title = progress if isinstance(progress, str) else "answering"
        bar = tqdm(
            total=len(share), initial=len(share) - len(todo), disable=not progress, desc=title
        )
        with self.patches, bar:
            while todo:
                batch, todo = todo[: self.batch_size], todo[self.batch_size :]
                loaded = self._load(batch)
                if loaded and not self._batch(loaded):
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
                loaded.append((example, example.load(self.how["frames"])))
            except MediaError as error:
                for setting in self.runs:
                    if example.id not in self.done[setting]:
                        self._write(setting, [_failed(example, str(error))])
        return loaded

    def _batch(self, loaded: list[Loaded]) -> bool:
        """Ask one batch under every setting; False if memory ran out and the batch was halved."""
        shared: dict[str, Any] | None = None
        answers: Answers = {}
        for setting in self.runs:
            rows = [pair for pair in loaded if pair[0].id not in self.done[setting]]
            if not rows:
                continue
            try:
                if setting.input_baseline:
                    records = self._ask(setting, rows, self._shrunk(setting, rows), answers)
                elif len(rows) < len(loaded):
                    records = self._ask(setting, rows, self._inputs(rows), answers)
                else:
                    shared = shared or self._inputs(loaded)
                    records = self._ask(setting, rows, shared, answers)
            except torch.OutOfMemoryError:
                if len(rows) > 1:
                    self._halve(len(rows))
                    return False
                records = [_failed(rows[0][0], TOO_LARGE)]
            self._write(setting, records)
        return True

    def _halve(self, rows: int) -> None:
        """Halve the batch size for good, below the number of rows that did not fit."""
        self.batch_size, self.halved = max(1, min(rows, self.batch_size) // 2), True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- one batch, one setting -----------------------------------------------------------------

    def _inputs(self, rows: Sequence[Loaded]) -> dict[str, Any]:
        return build_inputs(self.processor, [m for _, m in rows], [e.prompt for e, _ in rows])

    def _shrunk(self, setting: Setting, rows: list[Loaded]) -> dict[str, Any]:
        shrink = self.shrinkers[setting.reducer].shrink
        return self._inputs([(e, [shrink(m, setting.ratio) for m in media]) for e, media in rows])

    def _ask(
        self, setting: Setting, rows: list[Loaded], inputs: dict[str, Any], answers: Answers
    ) -> list[dict[str, Any]]:
        """Records of one batch under one setting; its answers are added to `answers`."""
        model = self.models[setting.variant]
        torch.manual_seed(self.how["seed"])
        with ExitStack() as stack:
            if self.disable_adapters and not setting.variant and hasattr(model, "disable_adapter"):
                stack.enter_context(model.disable_adapter())
            handle = stack.enter_context(self.patches.applied(setting, [e.id for e, _ in rows]))
            context = self.around(setting, inputs, answers) if self.around else nullcontext()
            stack.enter_context(context)
            start = time.perf_counter()
            texts = generate(model, self.processor, inputs, self.how["max_new_tokens"])
            elapsed = time.perf_counter() - start
            self.seconds[setting] += elapsed
            costs = self._costs(setting, handle, inputs, rows)
            self._picture(setting, handle, rows)
        answers[setting] = texts
        return [
            {
                "id": e.id,
                "family": e.family,
                "prompt": e.prompt,
                "prediction": text,
                "answer": e.answer,
                "correct": e.correct(text),
                "seconds": elapsed / len(rows),
                **cost.record(),
            }
            for (e, _), text, cost in zip(rows, texts, costs, strict=True)
        ]

    def _picture(self, setting: Setting, handle: Any, rows: Sequence[Loaded]) -> None:
        """Keep a picture of the first item that shows which of its patches the layers saw."""
        store = self.stores.get(setting)
        if store is None or self.rank or handle is None or handle.stats is None:
            return
        path, (example, media) = store.path / KEPT, rows[0]
        if not path.exists() and media and handle.stats.spans[0]:
            from tokencomp.pages.pictures import group_spans, picture, survival

            shares = survival(handle.stats)
            groups = group_spans(handle.stats.spans[0], media)
            first = picture(media[0], [shares[j] for j in groups[0]])
            first.save(path, comment=f"{example.id}: {example.prompt}".encode())

    def _costs(
        self, setting: Setting, handle: Any, inputs: dict[str, Any], rows: list[Loaded]
    ) -> list[Cost]:
        full = None
        if setting.input_baseline:
            count = self.shrinkers[setting.reducer].tokens
            full = [sum(count(m) for m in media) for _, media in rows]
        return prefill_costs(self.plain, inputs, handle.stats if handle else None, full)

    # -- results --------------------------------------------------------------------------------

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
            }
            if finished:
                run.manifest["seconds"] = round(self.seconds[setting], 3)
                run.manifest["summary"] = run.summary()
            if setting in self.stores and self.rank == 0:
                self.stores[setting].write(run.manifest)


def _failed(example: Example, reason: str) -> dict[str, Any]:
    return {"id": example.id, "family": example.family, "error": reason}


def _has_video(example: Example) -> bool:
    """Whether a video is among the media; a batch of images and videos is padded to the videos."""
    return any(isinstance(m, list) or is_video(m) for m in example.media if not hasattr(m, "size"))


def _process() -> tuple[int, int]:
    """Rank and world size under `accelerate launch` or torchrun, else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
