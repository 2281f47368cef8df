"""Implementation of `tokencomp eval`: questions of a file, and tasks of lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencomp.cli import _parse as parse
from tokencomp.evaluation.environment import process_rank, public_name
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import RANDOM, Setting
from tokencomp.inputs.files import FileQuestions

TASKS = "mlvu_dev,mvbench"
Folders = Mapping[Setting, Path]
"""The run folder of every setting."""


def questions_in(data: str | None, limit: int | None) -> FileQuestions | None:
    """Questions of the file that --data names; None if it names data of tasks, or nothing."""
    path = Path(data or "").expanduser()
    own = path.is_file() or (path / "questions.jsonl").exists()
    own = own or path.suffix in (".jsonl", ".json") or (path.suffix != "" and not path.exists())
    return FileQuestions(path, count=limit) if data and own else None


def run_questions(
    loaded: tuple[Any, Any], name: str, questions: FileQuestions, folders: Folders, **how: Any
) -> list[EvalRun]:
    """Answer the questions under every setting, as `sweep` with `how`, and draw lost items."""
    from tokencomp.evaluation.runner import sweep
    from tokencomp.pages.lost import draw_lost, write_lost

    how |= {"name": public_name(name), "data": questions.label}
    runs = sweep(*loaded, questions, list(folders), dict(folders), **how)
    by_id, full = {e.id: e for e in questions}, next((s for s in folders if s.off), None)
    for setting, run in runs.items():
        if full and setting.active and setting.name != RANDOM and process_rank()[0] == 0:
            out = folders[setting]
            lost = draw_lost(*loaded, run, runs[full], by_id, out, frames=how["frames"])
            write_lost(out, lost)
    return list(runs.values())


def tasks_in(
    names: str | None, data: str | None, limit: int | None, home: Path, console: Any
) -> Sequence[Any]:
    """The tasks of lmms-eval that --tasks and --data name; `home` is its folder of media."""
    from tokencomp.lmms.data import PER_TASK, SHAPESQA, local_data
    from tokencomp.lmms.tasks import check_installed, find_tasks

    local = None if data in (None, SHAPESQA) else local_data(data)
    check_installed()
    names = names or (f"{SHAPESQA},{TASKS}" if data == SHAPESQA else TASKS)
    if data == SHAPESQA:
        console.print("[dim]rendering ShapesQA's images and videos, unless they are there …[/]")
        local = local_data(data, per_task=max(limit or 0, PER_TASK))
    return find_tasks(parse.names(names), local, home)


def run_tasks(
    loaded: tuple[Any, Any],
    name: str,
    tasks: Sequence[Any],
    folders: Folders,
    console: Any,
    **how: Any,
) -> list[EvalRun]:
    """Run tasks of lmms-eval, as `run_setting`; only the first process returns the runs, of all."""
    from tokencomp.evaluation.group_runs import find_runs
    from tokencomp.lmms.tasks import run_setting

    full = next((out for s, out in folders.items() if s.off), None)
    for k, (setting, out) in enumerate(folders.items()):
        console.print(f"[dim]{k + 1}/{len(folders)}[/] {setting.label}")
        run_setting(loaded, name, tasks, setting, out, full=full, **how)
    return find_runs(list(folders.values())) if process_rank()[0] == 0 else []
