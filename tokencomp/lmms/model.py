"""tokencomp as a model of lmms-eval: `lmms-eval --model tokencomp --model_args pretrained=...`.

Imported by lmms-eval alone; nothing else in the package needs it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from tokencomp.errors import OptionError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.evaluation.store import read_records
from tokencomp.inputs.packaged import DEFAULT_MODEL
from tokencomp.inputs.questions import Deferred, Example, Media
from tokencomp.inputs.video.frames import plain_frames

ANSWERS = "answers-"


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` returns to lmms-eval's registry."""
    return ModelManifest("tokencomp", simple_class_path="tokencomp.lmms.model.TokenComp")


class TokenComp(lmms):
    """Any supported Hugging Face model under one setting; lmms-eval passes all arguments as text.

    `reducer`, `ratio` and `options` are those of `Setting`, options as JSON; any further
    `name=value` argument is an option, too. The others are those of `tokencomp eval`. Answers are
    written to the folder `results`, where an interrupted run continues. Callers in the same process
    give `loaded` (model and processor) and `setting` instead of their names.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        reducer: str = FULL,
        ratio: float = 0.0,
        options: str = "{}",
        frames: int | str = 8,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str = "auto",
        attention: str | None = None,
        results: str | None = None,
        loaded: tuple[Any, Any] | None = None,
        setting: Setting | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        from tokencomp.inputs.loading import load_model

        # Every process uses one GPU, although lmms-eval passes one device to all of them.
        many = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if device is None or (many and device.startswith("cuda")):
            device = "auto"
        self.model, self.processor = loaded or load_model(
            pretrained, device=device, dtype=dtype, attention=attention
        )
        # Data parallelism under `accelerate launch`.
        self.accelerator = Accelerator(cpu=self.model.device.type == "cpu")
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        more.pop("max_batch_size", None)
        all_options = {**json.loads(options), **more}
        self.setting = setting or Setting(reducer, float(ratio), all_options)
        self.name, self.frames = pretrained, plain_frames(frames)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.results = None if results is None else Path(results)
        self.run_manifest: dict[str, Any] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self.examples: dict[str, Example] = {}

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
        answers: dict[str, str] = {}
        groups: dict[tuple[int, tuple[str, ...]], list[Example]] = {}
        for limit, example, stops in self._examples(requests):
            groups.setdefault((limit, stops), []).append(example)
        for (limit, stops), examples in groups.items():
            self.examples |= {example.id: example for example in examples}
            folder = None if self.results is None else self.results / f"{ANSWERS}{limit}"
            run = sweep(
                self.model,
                self.processor,
                examples,
                [self.setting],
                None if folder is None else {self.setting: folder},
                batch_size=self.batch_size,
                frames=self.frames,
                max_new_tokens=limit,
                name=self.name,
                shard=False,
            )[self.setting]
            self._note(run.manifest)
            for record in run.records:
                self._records[record["id"]] = record
                answers[record["id"]] = _cut(record.get("prediction", ""), stops)
        return [answers[_key(r)] for r in requests]

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """The records of all items by id; those of other processes are read from their folders."""
        if self.world_size > 1 and self.results is not None:
            for folder in sorted(self.results.glob(f"{ANSWERS}*")):
                self._records |= {r["id"]: r for r in read_records(folder)}
        return self._records

    def _note(self, manifest: dict[str, Any]) -> None:
        """Keep the latest manifest, with an earlier out-of-memory flag and smallest batch size."""
        before = self.run_manifest or manifest
        halved = before["batch_halved_by_oom"] or manifest["batch_halved_by_oom"]
        size = min(before["batch_size"], manifest["batch_size"])
        self.run_manifest = {**manifest, "batch_halved_by_oom": halved, "batch_size": size}

    def _examples(self, requests: list[Instance]) -> Iterator[tuple[int, Example, tuple[str, ...]]]:
        """Every item once: lmms-eval fills the shorter shares with copies of their last item."""
        for request in {_key(r): r for r in requests}.values():
            prompt, options, to_visual, doc_id, task, split = request.args
            media = functools.partial(_visuals, to_visual, self.task_dict[task][split], doc_id)
            until = options.get("until") or ()
            stops = (until,) if isinstance(until, str) else tuple(until)
            example = Deferred(_key(request), prompt, "", family=task, source=media)
            yield int(options.get("max_new_tokens") or 16), example, stops


def _key(request: Instance) -> str:
    _, _, _, doc_id, task, _ = request.args
    return f"{task}/{doc_id}"


def _visuals(to_visual: Any, docs: Any, doc_id: int) -> tuple[Media, ...]:
    """Paths and pictures of a document. Some tasks exit with the path of a file that is missing."""
    try:
        visuals = to_visual(docs[doc_id]) or []
    except SystemExit as leave:
        return (Path(str(leave.code)),)
    listed = visuals if isinstance(visuals, list | tuple) else [visuals]
    return tuple(Path(m).resolve() if isinstance(m, str) else m for m in listed)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop and text:
            text = text.split(stop)[0]
    return text
