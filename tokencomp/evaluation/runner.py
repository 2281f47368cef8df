"""Ask a model every example under every setting, and write down what it says."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tokencomp
from tokencomp.adapters.base import adapter_for, unwrap
from tokencomp.engine.flops import DecoderShape
from tokencomp.errors import MediaError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.cost import Cost, compressed_costs, plain_costs
from tokencomp.evaluation.environment import environment
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.evaluation.store import RunFolder, read_records
from tokencomp.evaluation.subsets import per_question
from tokencomp.inputs.prompts import build_inputs, generate, prompt_lengths
from tokencomp.inputs.questions import Example
from tokencomp.patching import unpatched
from tokencomp.trained.cards import weights_hash

Loaded = tuple[Example, list[Any]]
KEPT = "kept.jpg"
TOO_LARGE = "out of GPU memory with this item alone; give fewer frames or smaller media"


@dataclass
class Run:
    """Results of one setting.

    Attributes
    ----------
    setting
    records
        One dict per example: id, family, prediction, answer, correct, cost fields, or error.
    manifest
        What the numbers depend on.
    """

    setting: Setting
    records: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> list[dict[str, Any]]:
        return [r for r in self.records if not r.get("error")]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r.get("error")]

    def mean(self, name: str) -> float:
        """Mean of a field over the answered items; NaN without any."""
        values = [float(r[name]) for r in self.answered]
        return sum(values) / len(values) if values else float("nan")

    def summary(self) -> dict[str, Any]:
        """Counts and means, ready for JSON."""
        names = {"accuracy": "correct", "achieved_ratio": "ratio", "flops": "flops"}
        means = {k: self.mean(v) for k, v in {**names, "kv_bytes": "kv_bytes"}.items()}
        return {"items": len(self.answered), "failed": len(self.failed), **means}


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
) -> Run:
    """One setting of `sweep`, which see for `how`. `out_dir` holds this run alone."""
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
    progress: bool = True,
    shard: bool = True,
) -> dict[Setting, Run]:
    """Evaluate several settings; every batch is decoded and preprocessed once for all of them.

    Parameters
    ----------
    model, processor
        A Hugging Face multimodal model and its processor. The model is left as it was.
    items
        Examples with distinct ids. Media that cannot be read are recorded as failed.
    settings
        See `tokencomp.evaluation.settings.grid`.
    out_dir
        Folder with one run folder per setting (or one folder per setting). Finished items are
        taken from there. None keeps everything in memory.
    batch_size
        Rows per batch; halved for good when the GPU runs out of memory (said in the manifest).
    frames
        Frames read from each video.
    max_new_tokens
        Longest answer.
    seed
        Seeds torch before every batch.
    name
        Model name for the manifest; default `model.name_or_path`.
    shard
        Under `accelerate launch`, every process takes its share of `items`; False if they have
        been shared out already.

    Returns
    -------
    dict
        `Run` per setting, records in the order of `items`.
    """
    how = {"frames": frames, "max_new_tokens": max_new_tokens, "seed": seed}
    work = _Sweep(model, processor, items, settings, out_dir, batch_size, how, name, shard)
    return work.run(progress)


class _Sweep:
    def __init__(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Example],
        settings: Sequence[Setting],
        out_dir: str | Path | dict[Setting, Path] | None,
        batch_size: int,
        how: dict[str, Any],
        name: str,
        shard: bool,
    ) -> None:
        self.model, self.processor, self.how = model, processor, how
        self.items, self.batch_size, self.halved = list(items), batch_size, False
        (self.rank, self.world), self.shard = _process(), shard
        adapter = adapter_for(model)
        self.shape = DecoderShape.from_config(adapter.text_config, model.dtype.itemsize)
        self.runs = {s: Run(s) for s in dict.fromkeys(settings)}
        self.seconds = dict.fromkeys(self.runs, 0.0)
        ids = adapter.placeholder_ids()
        self.shrinkers = {
            s.reducer: EqualTokens(processor, list(ids), s.reducer)
            for s in self.runs
            if s.input_baseline
        }
        self.folders: dict[Setting, RunFolder] = {}
        self.identities = self._identities(name)
        if out_dir is not None:
            where = out_dir if isinstance(out_dir, dict) else {}
            for s in self.runs:
                path = where.get(s) or Path(str(out_dir)) / s.label
                self.folders[s] = RunFolder(path, self.identities[s], self.rank)

    def _identities(self, name: str) -> dict[Setting, dict[str, Any]]:
        """What the answers of a setting depend on."""
        base = unwrap(self.model)
        shared = {
            "model": name or _public_name(base),
            "model_type": base.config.model_type,
            "parameters": sum(p.numel() for p in base.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights": weights_hash(self.model),
            "pixels": _pixels(self.processor),
            **self.how,
        }
        fields = ("reducer", "ratio", "options", "method")
        return {s: {**shared, **{k: getattr(s, k) for k in fields}} for s in self.runs}

    # -- the loop -------------------------------------------------------------------------------

    def run(self, progress: bool) -> dict[Setting, Run]:
        from tqdm.auto import tqdm

        done = {s: f.done() for s, f in self.folders.items()}
        mine = self.items[self.rank :: self.world] if self.shard else self.items
        todo = [e for e in mine if any(e.id not in done.get(s, ()) for s in self.runs)]
        todo.sort(key=lambda e: _is_video(e))
        self._manifests(finished=False)
        told = tqdm(total=len(mine), initial=len(mine) - len(todo), disable=not progress)
        with unpatched(self.model), told as bar:
            bar.set_description("answering")
            while todo:
                batch, todo = todo[: self.batch_size], todo[self.batch_size :]
                loaded = self._load(batch, done)
                if loaded and not self._batch(loaded, done):
                    todo = batch + todo
                    continue
                bar.update(len(batch))
        self._collect()
        self._manifests(finished=True)
        return self.runs

    def _load(self, batch: list[Example], done: dict[Setting, set[str]]) -> list[Loaded]:
        loaded = []
        for example in batch:
            try:
                loaded.append((example, example.load(self.how["frames"])))
            except MediaError as error:
                for setting in self.runs:
                    if example.id not in done.get(setting, ()):
                        self._write(setting, [_failed(example, str(error))])
                        done.setdefault(setting, set()).add(example.id)
        return loaded

    def _batch(self, loaded: list[Loaded], done: dict[Setting, set[str]]) -> bool:
        """Ask one batch under every setting; False if memory ran out and the batch was halved."""
        inputs: dict[str, Any] | None = None
        for setting in self.runs:
            rows = [pair for pair in loaded if pair[0].id not in done.get(setting, ())]
            if not rows:
                continue
            try:
                if setting.input_baseline:
                    records = self._ask(setting, rows, self._shrunk(setting, rows), rows)
                elif len(rows) < len(loaded):
                    records = self._ask(setting, rows, self._inputs(rows))
                else:
                    inputs = inputs or self._inputs(loaded)
                    records = self._ask(setting, rows, inputs)
            except torch.OutOfMemoryError:
                if len(rows) > 1:
                    self._halve(len(rows))
                    return False
                records = [_failed(rows[0][0], TOO_LARGE)]
            self._write(setting, records)
            done.setdefault(setting, set()).update(r["id"] for r in records)
        return True

    def _halve(self, rows: int) -> None:
        """Half of what did not fit, for good."""
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
        self,
        setting: Setting,
        rows: list[Loaded],
        inputs: dict[str, Any],
        original: list[Loaded] | None = None,
    ) -> list[dict[str, Any]]:
        torch.manual_seed(self.how["seed"])
        start = time.perf_counter()
        with patched(self.model, setting, [e.id for e, _ in rows]) as handle:
            told = generate(self.model, self.processor, inputs, self.how["max_new_tokens"])
            elapsed = time.perf_counter() - start
            self.seconds[setting] += elapsed
            costs = self._costs(handle, inputs, original)
            self._picture(setting, handle, rows)
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
            for (e, _), text, cost in zip(rows, told, costs, strict=True)
        ]

    def _picture(self, setting: Setting, handle: Any, rows: Sequence[Loaded]) -> None:
        """Keep a picture of the first item: which of its patches the layers saw."""
        folder = self.folders.get(setting)
        if folder is None or self.rank or handle is None or handle.stats is None:
            return
        path, (example, media) = folder.path / KEPT, rows[0]
        if not path.exists() and media and handle.stats.spans[0]:
            from tokencomp.pages.pictures import group_spans, picture, survival

            shares = survival(handle.stats)
            groups = group_spans(handle.stats.spans[0], media)
            first = picture(media[0], [shares[j] for j in groups[0]])
            first.save(path, comment=f"{example.id}: {example.prompt}".encode())

    def _costs(
        self, handle: Any, inputs: dict[str, Any], original: list[Loaded] | None
    ) -> list[Cost]:
        if handle is not None and handle.stats is not None:
            return compressed_costs(handle.stats)
        full = None
        if original is not None:
            count = next(iter(self.shrinkers.values())).tokens
            full = [sum(count(m) for m in media) for _, media in original]
        return plain_costs(self.shape, prompt_lengths(self.model, inputs), full)

    # -- results --------------------------------------------------------------------------------

    def _write(self, setting: Setting, records: list[dict[str, Any]]) -> None:
        self.runs[setting].records += records
        if setting in self.folders:
            self.folders[setting].append(records)

    def _collect(self) -> None:
        order = {e.id: k for k, e in enumerate(self.items)}
        for setting, run in self.runs.items():
            if setting in self.folders:
                run.records = read_records(self.folders[setting].path)
            run.records = [r for r in run.records if r["id"] in order]
            run.records.sort(key=lambda r: order[r["id"]])

    def _manifests(self, finished: bool) -> None:
        shared = {**environment(), "attention": _attention(self.model), "processes": self.world}
        for setting, run in self.runs.items():
            run.manifest = {
                "identity": self.identities[setting],
                **shared,
                "batch_size": self.batch_size,
                "batch_halved_by_oom": self.halved,
                "finished": finished,
            }
            if finished:
                run.manifest["seconds"] = round(self.seconds[setting], 3)
                run.manifest["summary"] = run.summary()
            if setting in self.folders and self.rank == 0:
                self.folders[setting].write_manifest(run.manifest)


@contextlib.contextmanager
def patched(model: Any, setting: Setting, names: Sequence[str] | None = None) -> Iterator[Any]:
    """The model under a setting: a `Handle`, or None where the model itself is left alone.

    With the `names` of the questions asked, `random` gives each of them a subset of its own.
    """
    if not setting.compresses:
        yield None
        return
    request = setting.request if names is None else per_question(setting.request, names)
    with tokencomp.patch(model, **request) as handle:
        yield handle


def _failed(example: Example, reason: str) -> dict[str, Any]:
    return {"id": example.id, "family": example.family, "error": reason}


def _is_video(example: Example) -> bool:
    from tokencomp.inputs.media import is_video

    return any(isinstance(m, list) or is_video(m) for m in example.media if not hasattr(m, "size"))


def _process() -> tuple[int, int]:
    """Rank and world size under `accelerate launch` or torchrun, else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _public_name(model: Any) -> str:
    """The hub id, or the last part of a local path."""
    given = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return Path(given).name if Path(given).exists() else given


def _attention(model: Any) -> str:
    return str(getattr(unwrap(model).config, "_attn_implementation", "") or "sdpa")


def _pixels(processor: Any) -> dict[str, Any]:
    """Sizes that the image and video processors aim at."""
    found = {}
    for part in ("image_processor", "video_processor"):
        size = getattr(getattr(processor, part, None), "size", None)
        if size is not None:
            found[part] = {k: v for k, v in dict(size).items() if v is not None}
    return found
