"""tokencomp as a model of lmms-eval: `lmms-eval --model tokencomp --model_args pretrained=...`.

Imported by lmms-eval alone; nothing else in the package needs it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from tokencomp.errors import OptionError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.inputs.questions import Example, Media

ANSWERS = "answers-"


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` hands to lmms-eval's registry."""
    return ModelManifest("tokencomp", simple_class_path="tokencomp.lmms.model.TokenComp")


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
        from tokencomp.inputs.loading import load_model

        self.model, self.processor = loaded or load_model(
            pretrained, device=self._local(device), dtype=dtype, attention=attention
        )
        self._accelerate()
        more.pop("max_batch_size", None)
        self.setting = Setting(reducer, float(ratio), {**json.loads(options), **more})
        self.name, self.frames = pretrained, int(frames)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.results = None if results is None else Path(results)
        self.run_manifest: dict[str, Any] = {}

    def _accelerate(self) -> None:
        """Data parallelism under `accelerate launch`."""
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=self.model.device.type == "cpu")
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes

    def _local(self, device: str | None) -> str:
        """Every process takes the GPU of its own, whatever number lmms-eval hands to all."""
        many = int(os.environ.get("WORLD_SIZE", 1)) > 1
        return "auto" if device is None or (many and device.startswith("cuda")) else device

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
            folders = None if self.results is None else {self.setting: self._folder(limit)}
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
            self._note(run.manifest)
            for record in run.records:
                told[record["id"]] = _cut(record.get("prediction", ""), stops)
        return [told[_key(r)] for r in requests]

    def _folder(self, limit: int) -> Path:
        return Path(str(self.results)) / f"{ANSWERS}{limit}"

    def answer_folders(self) -> list[Path]:
        """Where the answers of all processes are, one folder per length limit."""
        return [] if self.results is None else sorted(self.results.glob(f"{ANSWERS}*"))

    def _note(self, manifest: dict[str, Any]) -> None:
        """The last manifest stands for all, but memory that ran out is never forgotten."""
        before = self.run_manifest or manifest
        halved = before["batch_halved_by_oom"] or manifest["batch_halved_by_oom"]
        size = min(before["batch_size"], manifest["batch_size"])
        self.run_manifest = {**manifest, "batch_halved_by_oom": halved, "batch_size": size}

    def _examples(self, requests: list[Instance]) -> Iterator[tuple[int, Example, tuple[str, ...]]]:
        """Every item once: lmms-eval evens out the processes with copies."""
        for request in {_key(r): r for r in requests}.values():
            prompt, options, to_visual, doc_id, task, split = request.args
            media = functools.partial(_visuals, to_visual, self.task_dict[task][split], doc_id)
            until = options.get("until") or ()
            stops = (until,) if isinstance(until, str) else tuple(until)
            example = Document(_key(request), prompt, "", family=task, source=media)
            yield int(options.get("max_new_tokens") or 16), example, stops


@dataclass(frozen=True)
class Document(Example):
    """An item of a task; its media are opened when its turn comes."""

    source: Callable[[], tuple[Media, ...]] = tuple

    def load(self, frames: int) -> list[Any]:
        return Example(self.id, self.prompt, "", self.source()).load(frames)


def _key(request: Instance) -> str:
    _, _, _, doc_id, task, _ = request.args
    return f"{task}/{doc_id}"


def _visuals(to_visual: Any, docs: Any, doc_id: int) -> tuple[Media, ...]:
    """Paths and pictures of a document. Tasks that exit over a missing file give its path."""
    try:
        found = to_visual(docs[doc_id]) or []
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
