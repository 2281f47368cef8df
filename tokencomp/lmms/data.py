"""Data sets of lmms-eval tasks on a local disk, in the layout of the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.errors import MediaError, OptionError

SHAPESQA = "shapesqa"
SHAPESQA_ID = "tokencomp/ShapesQA"
PER_TASK = 25
MARKED_IMAGES = {"ZhaoweiWang/MMLongBench": ("MMLONGBENCH_IMAGE_ROOT", "mmlb_image")}
"""Data set → where its task looks for images, and the folder of the data set that has them."""
IMAGE_LISTS = ("image_list", "needle_image_list", "choices_image")
"""Where a question of such a data set names its images."""
_FILE = re.compile(r"https://huggingface\.co/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)")


def named_file(config: dict[str, Any]) -> tuple[str, str] | None:
    """Data set and file of a task that names a file on the hub, not a data set."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    match = _FILE.fullmatch(files) if isinstance(files, str) else None
    return (match[1], match[2]) if match else None


def data_set(config: dict[str, Any]) -> str:
    """Id of the data set of a task on the hub."""
    named = named_file(config)
    return named[0] if named else str(config["dataset_path"])


@dataclass(frozen=True)
class LocalData:
    """A folder `root/<owner>/<name>` per data set, as on the hub.

    lmms-eval looks for videos in `$HF_HOME/<cache_dir of the task>`; `stage` makes that place point
    into the copy. A task that names a file on the hub, as `mmlongbench`, finds it there too.
    """

    root: Path

    def label(self, dataset: str) -> str:
        """The identity of this copy, independent of its path."""
        return f"{self.root.resolve().name}/{dataset}"

    def stage(self, home: Path, links: dict[str, str]) -> None:
        """Link `home/<cache_dir>` to the media of every data set of `links`."""
        home.mkdir(parents=True, exist_ok=True)
        for cache, dataset in links.items():
            folder = self.root / dataset
            target = folder / "video" if cache.startswith("mvbench") else folder
            link = home / cache
            if link.is_symlink() or not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(target.resolve(), target_is_directory=True)
        for dataset, (variable, images) in MARKED_IMAGES.items():
            if (self.root / dataset / images).is_dir():
                os.environ[variable] = str((self.root / dataset / images).resolve())

    def changes(self, config: dict[str, Any]) -> dict[str, Any]:
        """Changes of a task's configuration for this copy."""
        named = named_file(config)
        if named is None:
            return {"dataset_path": str(self.root / data_set(config)), "dataset_kwargs": {}}
        files = {config["test_split"]: str((self.root / named[0] / named[1]).resolve())}
        return {"dataset_kwargs": {"data_files": files}}

    def has(self, config: dict[str, Any]) -> bool:
        """Whether the annotations of a task exist, and the images that they name."""
        folder, name = self.root / data_set(config), config.get("dataset_name")
        if not folder.is_dir():
            return False
        if named := named_file(config):
            images = MARKED_IMAGES.get(named[0], ("", ""))[1]
            return (folder / named[1]).is_file() and (folder / images).is_dir()
        return name is None or any(folder.glob(f"**/{name}.json*")) or (folder / name).is_dir()

    def check_images(self, task: str, config: dict[str, Any]) -> None:
        """Refuse missing images of a marked data set, whose task would ask without them."""
        named = named_file(config)
        if named is None or named[0] not in MARKED_IMAGES:
            return
        folder = self.root / named[0] / MARKED_IMAGES[named[0]][1]
        lines = (self.root / named[0] / named[1]).read_text().splitlines()
        lists = [json.loads(line).get(key) or [] for line in lines for key in IMAGE_LISTS]
        names = dict.fromkeys(name for one in lists for name in one)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise MediaError(
                f"task {task!r}: {len(absent)} of {len(names)} images are not in {folder}, the "
                f"first is {absent[0]}. Unpack all image archives of {named[0]} there."
            )

    def missing(self, task: str, config: dict[str, Any]) -> OptionError:
        """Which files to put where, in words."""
        dataset, name, named = data_set(config), config.get("dataset_name"), named_file(config)
        folder = self.root / dataset
        what = f"the file {named[1]}" if named else f"configuration {name!r}" if name else "data"
        return OptionError(
            f"task {task!r} needs {what} of {dataset} in {folder}. On a machine with network: "
            f"`hf download --repo-type dataset {dataset} --local-dir {folder}`, unpack its "
            f"archives there, and copy the folder over. Or use --data {SHAPESQA}."
        )


def local_data(data: str, per_task: int = PER_TASK) -> LocalData:
    """A local copy: a folder, or "shapesqa", which is written on first use."""
    if data == SHAPESQA:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return LocalData(write_shapesqa(Path(cache) / "tokencomp", per_task))
    root = Path(data).expanduser()
    if not root.is_dir():
        raise OptionError(
            f"--data {data}: no such folder. Expected a .jsonl file with your questions, a folder "
            "of <owner>/<name> folders as on the hub, e.g. OpenGVLab/MVBench and sy1998/MLVU_dev, "
            "or the word shapesqa."
        )
    return LocalData(root)


def write_shapesqa(cache: Path, per_task: int) -> Path:
    """ShapesQA's test split in words, and in the layouts of MVBench and MLVU, written once."""
    from filelock import FileLock

    from tokencomp import __version__
    from tokencomp.zoo.shapesqa.items import items
    from tokencomp.zoo.shapesqa.layouts import write_freeform, write_mlvu, write_mvbench

    root = cache / f"shapesqa-{__version__}-{per_task}"
    done = root / ".complete"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        if not done.exists():
            mixed = [one for k in range(per_task) for one in items("test", 1, start=k)]
            write_freeform(mixed, root / SHAPESQA_ID)
            write_mvbench(root / "OpenGVLab" / "MVBench", "test", per_task)
            write_mlvu(root / "sy1998" / "MLVU_dev", "test", per_task)
            done.touch()
    return root


def use_home(home: Path) -> None:
    """Set `HF_HOME`, keep the cache of models, and go offline, before lmms-eval is imported."""
    from huggingface_hub import constants

    os.environ.setdefault("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    os.environ["HF_HOME"] = str(home)
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(home / "datasets")


def cache_dirs(configs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """cache_dir → data set of the given task configurations."""
    return {
        c["dataset_kwargs"]["cache_dir"]: c["dataset_path"]
        for c in configs
        if (c.get("dataset_kwargs") or {}).get("cache_dir")
    }
