"""tokencomp as a model of lmms-eval: `lmms-eval --model tokencomp --model_args pretrained=...`.

Imported by lmms-eval alone; nothing else in the package needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from tokencomp.errors import OptionError
from tokencomp.evaluation.examples import Example
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import FULL, Setting


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` hands to lmms-eval's registry."""
    return ModelManifest("tokencomp", simple_class_path="tokencomp.evaluation.lmms_model.TokenComp")


class TokenComp(lmms):
    """Any supported Hugging Face model under one setting.

    Parameters
    ----------
    pretrained
        Embedded model, local folder, or hub id.
    reducer, ratio
        A reducer name, "full", "downscale" or "fewer_frames"; fraction of visual-token work to
        remove.
    options
        Reducer options as JSON; any further `name=value` argument is an option, too.
    frames
        Frames read from each video.
    batch_size, device, dtype, attention
        As in `tokencomp eval`.
    results
        Folder for answers; an interrupted run goes on there.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "tiny-qwen2-vl",
        reducer: str = FULL,
        ratio: float = 0.0,
        options: str = "{}",
        frames: int = 8,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str = "auto",
        attention: str | None = None,
        results: str | None = None,
        loaded: tuple[Any, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        from tokencomp.evaluation.loading import load_model

        self._accelerate()
        if loaded is None:
            where = self._device_of(device)
            loaded = load_model(pretrained, device=where, dtype=dtype, attention=attention)
        self.model, self.processor = loaded
        more.pop("max_batch_size", None)
        self.setting = Setting(reducer, float(ratio), {**json.loads(options), **more})
        self.name, self.frames = pretrained, int(frames)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.results = None if results is None else Path(results)
        self.records: dict[str, dict[str, Any]] = {}
        self.run_manifest: dict[str, Any] = {}

    def _accelerate(self) -> None:
        """Data parallelism under `accelerate launch`."""
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes

    def _device_of(self, device: str | None) -> str:
        if self._world_size > 1:
            return str(self.accelerator.device)
        return device or "auto"

    @property
    def device(self) -> Any:
        return self.model.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise OptionError(
            "tokencomp answers by generation; choose a task with output_type generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise OptionError("multi-round tasks are not supported; choose single-round ones.")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, in the order of the requests; failed items give an empty answer."""
        told: dict[str, str] = {}
        for limit, examples, stops in _groups(self._examples(requests)):
            folders = None
            if self.results is not None:
                folders = {self.setting: self.results / f"answers-{limit}"}
            run = sweep(
                self.model,
                self.processor,
                examples,
                [self.setting],
                folders,
                batch_size=self.batch_size,
                frames=self.frames,
                max_new_tokens=limit,
                name=self.name,
                shard=False,
            )[self.setting]
            self.run_manifest = run.manifest
            for record in run.records:
                self.records[record["id"]] = record
                told[record["id"]] = _cut(record.get("prediction", ""), stops)
        return [told[_key(r)] for r in requests]

    def _examples(self, requests: list[Instance]) -> Iterator[tuple[int, Example, tuple[str, ...]]]:
        for request in requests:
            prompt, options, to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            media = _visuals(to_visual, doc)
            until = options.get("until") or ()
            stops = (until,) if isinstance(until, str) else tuple(until)
            example = Example(_key(request), prompt, "", media, task)
            yield int(options.get("max_new_tokens") or 16), example, stops


def _key(request: Instance) -> str:
    _, _, _, doc_id, task, _ = request.args
    return f"{task}/{doc_id}"


def _visuals(to_visual: Any, doc: Any) -> tuple[Any, ...]:
    """Paths and pictures of a document. Tasks that exit over a missing file give its path."""
    try:
        found = to_visual(doc) or []
    except SystemExit as leave:
        return (Path(str(leave.code)),)
    listed = found if isinstance(found, list | tuple) else [found]
    return tuple(Path(m).resolve() if isinstance(m, str) else m for m in listed)


def _groups(
    items: Iterator[tuple[int, Example, tuple[str, ...]]],
) -> Iterator[tuple[int, list[Example], tuple[str, ...]]]:
    """Examples that share a length limit and stop strings."""
    groups: dict[tuple[int, tuple[str, ...]], list[Example]] = {}
    for limit, example, stops in items:
        groups.setdefault((limit, stops), []).append(example)
    for (limit, stops), examples in groups.items():
        yield limit, examples, stops


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop and text:
            text = text.split(stop)[0]
    return text
