"""lmms-eval's own tasks, prompts and scoring, on a compressed model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.errors import MissingDependencyError, OptionError, unknown_name
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.store import MANIFEST, RECORDS, read_json, read_records
from tokencomp.lmms.data import LocalData, cache_dirs, use_home


@dataclass(frozen=True)
class Task:
    """A single task of lmms-eval.

    Attributes
    ----------
    name
    data
        Which data set, or which local copy of it.
    changes
        What differs from the task's own configuration.
    """

    name: str
    data: str
    changes: dict[str, Any]


def find_tasks(names: Sequence[str], data: LocalData | None, home: Path) -> list[Task]:
    """The single tasks behind names of tasks and groups.

    With local data, sub-tasks of a group whose data are not there are left out.

    Raises
    ------
    MissingDependencyError
        lmms-eval is not installed.
    UnknownNameError
        A name that lmms-eval does not know (close matches are named).
    OptionError
        Data that are not there.
    """
    if data is not None:
        use_home(home)
    manager, found = _manager(), []
    for name in names:
        if name not in manager.all_tasks:
            raise unknown_name("task", name, _close(name, manager.all_tasks))
        members = list(_members(manager, name))
        here = [m for m in members if data is None or data.has(_config(manager, m))]
        if not here and data is not None:
            raise data.missing(name, _config(manager, members[0]))
        found += here
    configs = {name: _config(manager, name) for name in found}
    if data is None:
        return [Task(name, str(c["dataset_path"]), {}) for name, c in configs.items()]
    data.stage(home, cache_dirs(list(configs.values())))
    return [_local(name, c["dataset_path"], data) for name, c in configs.items()]


def _local(name: str, dataset: str, data: LocalData) -> Task:
    changes = {"dataset_path": str(data.folder(dataset)), "dataset_kwargs": {}}
    return Task(name, data.label(dataset), changes)


def _manager() -> Any:
    try:
        import lmms_eval.tasks as tasks
    except ImportError as error:
        raise MissingDependencyError(
            f"running benchmarks needs lmms-eval ({error}): pip install 'tokencomp[eval]'."
        ) from error
    _quiet()
    return tasks.TaskManager("ERROR", include_path=str(Path(__file__).parent))


def _quiet() -> None:
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="ERROR")


def _close(name: str, known: Sequence[str]) -> list[str]:
    """A few names for the message: lmms-eval knows over a thousand."""
    import difflib

    return difflib.get_close_matches(name, known, n=8, cutoff=0.4) or ["mlvu_dev", "mvbench"]


def _config(manager: Any, name: str) -> dict[str, Any]:
    return manager._get_config(name)


def _members(manager: Any, name: str) -> Iterator[str]:
    """Single tasks of a group, in order; a single task is its own member."""
    listed = _config(manager, name).get("task") if manager._name_is_group(name) else None
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
    frames: int,
    batch_size: int,
) -> dict[str, Any]:
    """Evaluate one setting, and write records and manifest to `out`.

    Answers are written as they come; an interrupted run takes them up again.

    Returns
    -------
    dict
        The manifest: lmms-eval's own scores under "scores", counts under "summary".
    """
    from tokencomp.trained.cards import weights_hash

    identity = {
        "model": Path(name).name if Path(name).exists() else name,
        "dtype": str(loaded[0].dtype).removeprefix("torch."),
        "weights": weights_hash(loaded[0]),
        "reducer": setting.reducer,
        "ratio": setting.ratio,
        "options": setting.options,
        "method": setting.method,
        "tasks": [t.name for t in tasks],
        "data": sorted({t.data for t in tasks}),
        "limit": limit,
        "frames": frames,
    }
    known = _known(out, identity)
    if known.get("finished"):
        return known
    from lmms_eval.evaluator import simple_evaluate

    from tokencomp.lmms.model import TokenComp

    model = TokenComp(
        pretrained=name,
        reducer=setting.reducer,
        ratio=setting.ratio,
        options=json.dumps(setting.options),
        frames=frames,
        batch_size=batch_size,
        results=str(out),
        loaded=loaded,
    )
    if model.rank == 0:
        _write(out, {MANIFEST: _json({"identity": identity, "finished": False})})
    told = simple_evaluate(
        model=model,
        tasks=[{"task": t.name, **t.changes} for t in tasks],
        task_manager=_manager(),
        limit=limit,
        batch_size=batch_size,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    if told is None:  # not the main process
        return {}
    asked = {r["id"]: r for folder in model.answer_folders() for r in read_records(folder)}
    records = [r for t in tasks for r in _records(t.name, told["samples"][t.name], asked)]
    manifest = {
        **model.run_manifest,
        "identity": identity,
        "scores": _scores(told["results"]),
        "summary": _summary(records),
    }
    lines = "".join(json.dumps(r, default=str) + "\n" for r in records)
    _write(out, {RECORDS: lines, MANIFEST: _json(manifest)})
    return manifest


def _known(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest in `out`, if there is one; it must be of the same thing."""
    if not (out / MANIFEST).exists():
        return {}
    old, same = read_json(out / MANIFEST), json.loads(json.dumps(identity))
    changed = [k for k in same if old.get("identity", {}).get(k) != same[k]]
    if changed:
        raise OptionError(
            f"{out} holds another run (it differs in {', '.join(changed)}). Give another -o, or "
            "remove that folder."
        )
    return old


def _records(
    task: str, samples: Sequence[dict[str, Any]], asked: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Cost and answer from our side, right or wrong from lmms-eval's."""
    for sample in {s["doc_id"]: s for s in samples}.values():
        record = dict(asked[f"{task}/{sample['doc_id']}"])
        doc = sample.get("doc") or {}
        kind = doc.get("task_type") or doc.get("family")
        record["family"] = f"{task} {kind}" if kind else task
        record["answer"] = str(sample.get("target", ""))
        if not record.get("error"):
            record["correct"] = item_score(sample)
        yield record


def item_score(sample: dict[str, Any]) -> float:
    """Score of one item in [0, 1], from what the task's `process_results` returned.

    Tasks return a number, or a dict with "score" or with the answers to compare.

    Raises
    ------
    OptionError
        Nothing of that kind is in the sample.
    """
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


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [r for r in records if not r.get("error")]
    n = max(len(good), 1)
    return {
        "items": len(good),
        "failed": len(records) - len(good),
        "accuracy": sum(r["correct"] for r in good) / n,
        "achieved_ratio": sum(r["ratio"] for r in good) / n,
        "flops": sum(r["flops"] for r in good) / n,
        "kv_bytes": sum(r["kv_bytes"] for r in good) / n,
    }


def _write(out: Path, files: dict[str, str]) -> None:
    """Write files in order; a reader never sees half of one."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = out / f".{name}"
        temporary.write_text(text)
        temporary.replace(out / name)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"
