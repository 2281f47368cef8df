"""The first hour on a GPU: one command, in order of worth, each part with a time limit.

    python -m benchmarks.gpu.hour --model FOLDER    # everything → results/hour/CARD-COMMIT/
    python -m benchmarks.gpu.hour                   # without real weights: shapes alone
    python -m benchmarks.gpu.hour --rehearse --out FOLDER    # small shapes on a CPU

It needs one GPU with 24 GB and a checkout without changes. FOLDER holds a model that `patch`
supports. Stop it at any time: the same command runs the parts that are not done. Every
part writes its files and a log into a folder of its own, and `manifest.json` says how each ended.
`docs/gpu.md` says what each part answers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.gpu.hour_file import MANIFEST, HourFile, PartRun, read_hour
from benchmarks.gpu.hour_parts import Part, parts
from benchmarks.gpu.load import stop
from benchmarks.publishing import changed_code, environment
from tokencomp.errors import OptionError, TokenCompError
from tokencomp.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
TAIL = 600  # characters of a log in the manifest


def run(part: Part, folder: Path, rehearse: bool) -> PartRun:
    """Run one part in a process of its own, and stop it when its time is over."""
    own = folder / part.name
    own.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (own / "log.txt").open("w") as log:
        process = subprocess.Popen(
            part.trial if rehearse else part.command,
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=60 * part.minutes)
            status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            stop(process)
    seconds = round(time.monotonic() - started, 1)
    end = "" if status == "done" else (own / "log.txt").read_text(errors="replace")[-TAIL:]
    return _ended(part, status, seconds, end)


def _ended(part: Part, status: str, seconds: float, note: str) -> PartRun:
    facts = {"name": part.name, "question": part.question, "minutes": part.minutes}
    return PartRun.model_validate({**facts, "status": status, "seconds": seconds, "note": note})


def hour(model: str | None, folder: Path, rehearse: bool) -> HourFile:
    """Run the parts that are not done; the manifest is written after each.

    Raises
    ------
    OptionError
        The folder holds another commit, model or card.
    """
    facts = environment()
    about = {k: facts.get(k) for k in ("date", "commit", "versions", "hardware")}
    about["model"] = Path(model).name if model else "random weights"
    if rehearse:  # its commit need not be one without changes
        about["commit"] = str(about["commit"] or "0" * 40)[:40]
    file = HourFile.model_validate({"about": about, "rehearsal": rehearse, "parts": []})
    done, every = _done(folder, file), parts(model, folder)
    ended = {part.name: done[part.name] for part in every if part.name in done}
    file = file.model_copy(update={"parts": [*ended.values()]})
    for part in every:
        if part.name in done:
            continue
        print(f"{part.name}: {part.question} (at most {part.minutes:g} minutes)", flush=True)
        if part.needs_model and not model and not rehearse:
            note = "no real weights: give --model"
            result = _ended(part, "left out", 0, note)
        else:
            result = run(part, folder, rehearse)
        print(f"{part.name}: {result.status} after {result.seconds:.0f} s", flush=True)
        ended[part.name] = result
        ordered = [ended[one.name] for one in every if one.name in ended]
        file = file.model_copy(update={"parts": ordered})
        write_text(folder / MANIFEST, file.model_dump_json(indent=1) + "\n")
    return file


def _done(folder: Path, file: HourFile) -> dict[str, PartRun]:
    """Parts that an earlier call has finished."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    known = HourFile.model_validate_json(path.read_text()) if file.rehearsal else read_hour(path)
    for name in ("commit", "model"):
        before, now = getattr(known.about, name), getattr(file.about, name)
        if before != now:
            raise OptionError(
                f"{folder} holds an hour of {name} {before}, and this one has {now}. "
                "Give another folder with --out."
            )
    return {part.name: part for part in known.parts if part.status == "done"}


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; 0 if every one is done or left out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub name of real weights")
    parser.add_argument("--out", type=Path, help="default: results/hour/CARD-COMMIT")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on a CPU")
    options = parser.parse_args(arguments)
    if options.rehearse and options.out is None:
        parser.error("a rehearsal measures nothing: name a folder for its files with --out")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is present. Use --rehearse to try the parts on a CPU")
    try:
        if not options.rehearse and (changed := changed_code(ROOT)):
            raise OptionError(f"{', '.join(changed[:3])} has uncommitted changes. Commit them.")
        folder = options.out or _folder()
        file = hour(options.model, folder.resolve(), options.rehearse)
    except TokenCompError as error:
        print(f"error: {error}")
        return 2
    print(f"{folder / MANIFEST}: see results/README.md")
    return int(any(part.status in ("failed", "out of time") for part in file.parts))


def _folder() -> Path:
    card = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "results" / "hour" / f"{card}-{str(environment()['commit'])[:9]}"


if __name__ == "__main__":
    raise SystemExit(main())
