"""Tasks of lmms-eval, prompts and scoring, on a compressed model."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.errors import MissingDependencyError, OptionError, install, unknown_name
from tokencomp.evaluation.environment import model_identity, public_name
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import RANDOM, Setting
from tokencomp.evaluation.store import AnswerStore
from tokencomp.lmms.data import LocalData, cache_dirs, data_set, use_home
from tokencomp.pages.lost import draw_lost, write_lost


@dataclass(frozen=True)
class Task:
    """A single task of lmms-eval: its data set or local copy, and changes of its configuration."""

    name: str
    data: str
    changes: dict[str, Any]


def find_tasks(names: Sequence[str], data: LocalData | None, home: Path) -> list[Task]:
    """The single tasks of names of tasks and groups; with local data, the tasks that it has."""
    if data is not None:
        use_home(home)
    manager, members = _manager(), list[str]()
    for name in names:
        if name not in manager.all_tasks:
            # A few names for the message: lmms-eval knows over a thousand.
            close = difflib.get_close_matches(name, manager.all_tasks, n=8, cutoff=0.4)
            raise unknown_name("task", name, close or ["mlvu_dev", "mvbench"])
        every = list(_members(manager, name))
        present = [m for m in every if data is None or data.has(manager._get_config(m))]
        if not present and data is not None:
            raise data.missing(name, manager._get_config(every[0]))
        members += present
    configs = {name: manager._get_config(name) for name in members}
    if data is None:
        return [Task(name, data_set(c), {}) for name, c in configs.items()]
    for name, config in configs.items():
        data.check_images(name, config)
    data.stage(home, cache_dirs(list(configs.values())))
    return [Task(name, data.label(data_set(c)), data.changes(c)) for name, c in configs.items()]


def check_installed() -> None:
    """Raise without lmms-eval, before anything is rendered or loaded."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise MissingDependencyError(
            "give your questions with --data: a JSON Lines file, or a folder with questions.jsonl. "
            f"Tasks need lmms-eval: {install('eval')}."
        )


def _manager() -> Any:
    import lmms_eval.tasks as tasks
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    return tasks.TaskManager("ERROR", include_path=str(Path(__file__).parent))


def _members(manager: Any, name: str) -> Iterator[str]:
    """Single tasks of a group, in order; a single task is a group of one."""
    listed = manager._get_config(name).get("task") if manager._name_is_group(name) else None
    if manager._name_is_tag(name):
        listed = manager._get_tasklist(name)
    if not isinstance(listed, list):
        yield name
        return
    for member in listed:
        yield from _members(manager, member if isinstance(member, str) else member["task"])


def run_setting(
    loaded: tuple[Any, Any],
    name: str,
    tasks: Sequence[Task],
    setting: Setting,
    out: Path,
    *,
    limit: int | None,
    frames: int | str,
    batch_size: int,
    full: Path | None = None,
) -> None:
    """Evaluate one setting, and write records and manifest to `out`.

    Answers are written as they come: an interrupted run continues, and a finished one asks again
    what failed. What a method loses against the run of the full model in `full` is drawn. The
    manifest has the scores of lmms-eval under "scores", counts under "summary".
    """
    facts = model_identity(*loaded, name=public_name(name))
    questions = {"tasks": [t.name for t in tasks], "data": sorted({t.data for t in tasks})}
    identity = {k: facts[k] for k in ("model", "dtype", "weights")} | setting.identity | questions
    store = AnswerStore(out, {**identity, "limit": limit, "frames": frames})
    if store.manifest.get("finished") and not store.manifest["summary"]["failed"]:
        return
    from lmms_eval.evaluator import simple_evaluate

    from tokencomp.lmms.model import TokenComp

    model = TokenComp(
        name, frames=frames, batch_size=batch_size, results=str(out), loaded=loaded, setting=setting
    )
    if model.rank == 0:
        store.write({"finished": False})
    results = simple_evaluate(
        model=model,
        tasks=[{"task": t.name, **t.changes} for t in tasks],
        task_manager=_manager(),
        limit=limit,
        batch_size=batch_size,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    if results is None:  # not the main process
        return
    answers = model.records
    records = [r for t in tasks for r in _records(t.name, results["samples"][t.name], answers)]
    run = EvalRun(setting, records)
    scores = _scores(results["results"])
    store.write({**model.run_manifest, "scores": scores, "summary": run.summary()}, records)
    if full is not None and setting.active and setting.name != RANDOM:
        lost = draw_lost(*loaded, run, EvalRun.read(full), model.examples, out, frames=frames)
        write_lost(out, lost)


def _records(
    task: str, samples: Sequence[dict[str, Any]], answers: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Costs and answers from the sweep, with the score that lmms-eval gave each of them."""
    for sample in {s["doc_id"]: s for s in samples}.values():
        record = dict(answers[f"{task}/{sample['doc_id']}"])
        doc = sample.get("doc") or {}
        kind = doc.get("task_type") or doc.get("family")
        record["family"] = f"{task} {kind}" if kind else task
        record["answer"] = str(sample.get("target", ""))
        if not record.get("error"):
            record["correct"] = item_score(sample)
        yield record


def item_score(sample: dict[str, Any]) -> float:
    """Score of one item in [0, 1], from what the task's `process_results` returned."""
    known = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "input")
    for name, value in sample.items():
        if name in known or name.endswith("_hash"):
            continue
        if isinstance(value, bool | int | float):
            return float(value)
        if isinstance(value, dict):
            if isinstance(value.get("score"), bool | int | float):
                return float(value["score"])
            right = value.get("answer", value.get("gt_answer"))
            for key in ("pred_answer", "parsed_pred", "pred"):
                if key in value and right is not None:
                    return float(value[key] == right)
    raise OptionError(
        f"this task gives no score per item that tokencomp can read (keys: {', '.join(sample)}); "
        "its overall score is in the manifest under 'scores'."
    )


def _scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """lmms-eval's scores per task, numbers only."""
    return {
        task: {
            k.split(",")[0]: float(v)
            for k, v in values.items()
            if isinstance(v, int | float) and "stderr" not in k and k != "samples"
        }
        for task, values in results.items()
    }
