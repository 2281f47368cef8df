"""NLVR as it lies in its repository (lil-lab/nlvr, CC-BY-4.0); nothing of it is copied here.

Suhr et al., "A Corpus of Natural Language for Visual Reasoning", ACL 2017.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tokencomp.errors import OptionError
from tokencomp.inputs.questions import Deferred

SPLITS = ("train", "dev", "test", "hidden")
ORDERS = 6
"""Pictures of every example: its boxes in all orders."""
SIZE = (448, 112)
"""Pixels at which a picture is shown: 16 by 4 visual tokens of 28 pixels a side."""
LISTED = re.compile(
    r'images/(\d+)/train-(\d+-\d+)-\d\.png"/><br />(.*?)<br />(true|false)<br />', re.DOTALL
)


@dataclass(frozen=True)
class Example:
    """A sentence about three boxes.

    Attributes
    ----------
    name
        Number of the sentence's presentation, "-", number of the picture in it.
    pictures
        Its six files, one per order of the boxes.
    """

    name: str
    sentence: str
    truth: bool
    pictures: tuple[Path, ...]

    @property
    def presentation(self) -> str:
        """Examples of one presentation share a sentence: they are drawn together in intervals."""
        return self.name.split("-")[0]

    @property
    def prompt(self) -> str:
        return plain(self.sentence)

    def question(self, order: int) -> Deferred:
        """One order of the boxes, for `tokencomp.evaluation`; "yes" is a true sentence."""
        path = self.pictures[order]
        answer = "yes" if self.truth else "no"
        name = f"{self.name}-{order}"
        return Deferred(name, self.prompt, answer, (), "statement", lambda: (picture(path),))


def plain(sentence: str) -> str:
    """Words in small letters, numbers, and commas."""
    return " ".join(re.sub(r"[^a-z0-9, ]", " ", sentence.lower()).split()).replace(" ,", ",")


def picture(path: Path, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture of (width, height) `size`, RGB."""
    return Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)


def examples(folder: Path, split: str) -> list[Example]:
    """The examples of a split whose pictures are in `folder`, the repository's folder `nlvr`.

    Without `train/train.json`, the training split is the 1,000 examples that
    `train/examples.html` lists with their labels.

    Raises
    ------
    OptionError
        There is no such split in `folder`.
    """
    found = folder / split / f"{split}.json"
    if found.exists():
        lines = [json.loads(line) for line in found.read_text().splitlines()]
        rows = [(x["identifier"], x["sentence"], x["label"], x.get("directory")) for x in lines]
    elif split == "train" and (folder / "train" / "examples.html").exists():
        text = (folder / "train" / "examples.html").read_text()
        rows = [(name, said, label, at) for at, name, said, label in LISTED.findall(text)]
    else:
        raise OptionError(
            f"{found} is missing: give the folder `nlvr` of the repository lil-lab/nlvr."
        )
    places = {p.name: p for p in (folder / split / "images").rglob(f"{split}-*-0.png")}
    out = []
    for name, sentence, label, _ in rows:
        first = places.get(f"{split}-{name}-0.png")
        if first is not None:
            files = tuple(first.with_name(f"{split}-{name}-{k}.png") for k in range(ORDERS))
            out.append(Example(name, sentence, label == "true", files))
    return out
