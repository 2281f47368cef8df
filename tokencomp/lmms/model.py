"""A compressed model as lmms-eval asks it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from tokencomp.errors import OptionError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.store import read_records
from tokencomp.inputs.questions import Deferred, Example, Media
from tokencomp.inputs.video.frames import plain_frames

ANSWERS = "answers-"


class TokenComp(lmms):
    """A loaded model under one setting.

    Parameters
    ----------
    name
        Of the model, in the manifest.
    loaded
        Model and processor.
    results
        Folder for answers; an interrupted run continues there.
    frames, batch_size
        As in `tokencomp eval`.
    """

    is_simple = True

    def __init__(
        self,
        name: str,
        loaded: tuple[Any, Any],
        setting: Setting,
        results: Path,
        frames: int | str,
        batch_size: int,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        self.model, self.processor = loaded
        # Data parallelism under `accelerate launch`.
        self.accelerator = Accelerator(cpu=self.model.device.type == "cpu")
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.setting, self.results = setting, results
        self.name, self.frames, self.batch_size = name, plain_frames(frames), batch_size
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
            run = sweep(
                self.model,
                self.processor,
                examples,
                [self.setting],
                {self.setting: self.results / f"{ANSWERS}{limit}"},
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
        if self.world_size > 1:
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
