"""Page, plots and the README's table of the accuracy benchmark, from its result files alone.

python benchmarks/accuracy/report.py             # → README.md, results/*.svg
python benchmarks/accuracy/report.py --readme    # prints the tables of the project's README
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path

from readme import readme
from results import BARS, KINDS, RESULTS, Results
from tables import (
    BASELINES,
    compare_families,
    compared,
    family_table,
    kept,
    loss_table,
    ratio_table,
    reaches,
    rivals,
)

from tokencomp.cli import one_message
from tokencomp.evaluation.environment import provenance
from tokencomp.evaluation.settings import DOWNSCALE, FULL
from tokencomp.pages.plots import Point, lines
from tokencomp.patching import DEFAULT_REDUCER


def plot(results: Results, kind: str) -> str:
    """Retention over ratio, one line per method, as SVG."""
    series: dict[str, list[Point]] = {}
    for label, one in results.settings.items():
        found = kept(results, label, kind) if one["ratio"] and not one["options"] else None
        if found is not None:
            series.setdefault(one["reducer"], []).append(Point(one["ratio"], found.value))
    order = sorted(series, key=lambda n: (n in BASELINES, -sum(p.y for p in series[n])))
    chosen = {n: series[n] for n in order}
    return lines(chosen, x="ratio removed", y=f"accuracy kept, {kind}", reference=1.0)


def plotted(results: Results) -> list[str]:
    """Kinds with a learned family: plots show what is kept of those."""
    return [kind for kind in results.kinds if results.of(kind, results.learned)]


def bars(results: Results, default: str) -> list[str]:
    """The bars of the default reducer, met or not."""
    told = []
    for ratio, bar in BARS.items():
        for kind in KINDS:
            label = f"{default}-{ratio:g}"
            found = kept(results, label, kind) if label in results.settings else None
            if found is not None:
                state = "met" if found.value >= bar else "NOT met"
                told.append(f"- ratio {ratio:g}, {kind}: {found.value:.1%}, bar {bar:.0%}: {state}")
    return told + against_baselines(results, default)


def against_baselines(results: Results, default: str) -> list[str]:
    """Never below a baseline at the same ratio: on images, on videos, on every family."""
    told, below = out_of_reach(results), False
    for (ratio, base, mine, other), kind in itertools.product(rivals(results, default), KINDS):
        found = [kept(results, label, kind) for label in (mine, other)]
        if found[0] and found[1] and found[0].value < found[1].value:
            test, below = compared(results, mine, other, kind), True
            counts = f"{test.wins} items won, {test.losses} lost, p = {test.p:.2g}"
            told.append(f"- ratio {ratio:g}, {kind}: below {base} ({counts}): NOT met")
    if not below:
        told.append("- below no baseline on images or videos at any ratio: met")
    return told + against_baselines_by_family(results, default)


def against_baselines_by_family(results: Results, default: str) -> list[str]:
    """How often a baseline got more right, and whether the default then lost anything itself."""
    told, every = [], compare_families(results, default)
    for learned, title in ((True, "learned families"), (False, "families not learned")):
        mine = [one for one in every if one.learned is learned]
        lost = [one for one in mine if one.lost]
        if not mine:
            continue
        line = f"- {title}: a baseline got more right in {len(lost)} of {len(mine)} comparisons"
        if lost:
            worse = sum(one.default < one.full for one in lost)
            line += f" (smallest p = {min(one.test.p for one in lost):.2g})"
            line += f", in {worse} of them the default got less right than the full model"
        told.append(line)
    return told


def out_of_reach(results: Results) -> list[str]:
    """Where smaller media give the processor too many tokens to be a baseline."""
    told = []
    for kind in results.kinds:
        far = [
            f"{results.reached(label, kind):.2f} instead of {one['ratio']:g}"
            for label, one in results.settings.items()
            if one["reducer"] == DOWNSCALE and not reaches(results, label, kind)
        ]
        if far:
            told.append(f"- {DOWNSCALE} is no baseline on {kind}: it drops {', '.join(far)}")
    return told


def made_by(results: Results) -> str:
    """What the answers depend on; with several runs, which settings each of them asked."""
    told = []
    runs = results.manifest["runs"]
    for number, run in enumerate(runs):
        mine = [s["reducer"] for s in results.settings.values() if s["run"] == number]
        which = f"{', '.join(dict.fromkeys(mine))}: " if len(runs) > 1 else ""
        told.append(f"- {which}{provenance(run)}.")
    return "\n".join(told)


def families_told(results: Results) -> str:
    """Which of the families were learned."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for family in results.families:
        groups[family in results.learned].append(family)
    told = {"Learned families": groups[True], "Not learned": groups[False]}
    return " ".join(f"{k}: {', '.join(names)}." for k, names in told.items() if names)


def section(results: Results, default: str, pictures: str) -> str:
    """Everything about one model; its plots lie in `pictures`."""
    m, model = results.manifest, results.manifest["model"]
    parts = [
        f"## {model}",
        f"{m['items']} items of the {m['split']} split, greedy.",
        made_by(results),
        families_told(results),
        "Bars for the default:",
        "\n".join(bars(results, default)),
        *(f"![{model}, {kind}]({pictures}/{model}-{kind}.svg)" for kind in plotted(results)),
    ]
    for ratio in results.ratios:
        parts += [f"### {model}, ratio {ratio:g}", ratio_table(results, ratio, default)]
    losses = [one for one in compare_families(results, default) if one.lost]
    if losses:
        title = f"### {model}, families where a baseline got more right than the default"
        parts += [title, loss_table(losses)]
    shown = [FULL, *(f"{default}-{r:g}" for r in results.ratios), *(f"{b}-0.9" for b in BASELINES)]
    labels = [label for label in shown if label in results.settings]
    parts += [f"### {model}, accuracy per question family", family_table(results, labels)]
    return "\n\n".join(parts)


HEAD = """# Accuracy under compression

Made by `python benchmarks/accuracy/run.py` (`report.py` rebuilds it from `results/`). Packaged tiny
models on ShapesQA's test split. Cells: accuracy as a fraction of the full model's on the same
items, with paired bootstrap 95 % intervals. Images, videos, both: over the question families that
the model has learned, which the validation split decides (25 points above a blind guess: the
commonest answer or one of the options, as on the model's card); the others say little about
compression and count in "all families" alone. p: exact McNemar tests against `random` and the
default over the learned families, + where better, − where worse (p < 0.05). `downscale`: the full
model on smaller pictures or fewer frames that give as many tokens; – where the processor does not
give so few (achieved ratio: images / videos). FLOPs: the decoder's prefill, the reducer's own work
not counted. Every question gets a random subset of its own. FastV's and PyramidDrop's cuts move
earlier where the ratio asks for it: above 5/7 FastV cuts before the first of six layers.

How the default (bold) was chosen, on the validation split: [CHOICE.md](CHOICE.md). Test answers had
a say once, about [its margin](margin.md); so the default was asked again on test questions that
nobody had asked before: [unseen](unseen/README.md). The default against the baselines on every
family, with 200 to 1500 questions of each: [baselines](baselines.md). What training and more frames
do: [ADSC](adsc.md), [selector](selector.md), [ccam](ccam.md), videos longer than trained with
[M-RoPE](long_video-tiny-qwen2-vl.md) and [1-D positions](long_video-tiny-llava-onevision.md)."""


def read_all(results: Path, split: str = "test") -> list[Results]:
    return [Results.read(f.parent, split) for f in sorted(results.glob(f"*/{split}.json"))]


def home(results: Path) -> Path:
    """Where pages go: above the published results, beside others."""
    return results.parent if results == RESULTS else results


def head(results: Path) -> str:
    """The page's opening, with links that work from where it lies."""
    if results == RESULTS:
        return HEAD
    here = os.path.relpath(Path(__file__).parent, home(results))
    return HEAD.replace("](", f"]({here}/")


def text(results: Path) -> str:
    """The page on every model with test results."""
    where = os.path.relpath(results, home(results))
    sections = [section(found, DEFAULT_REDUCER, where) for found in read_all(results)]
    return "\n\n".join([head(results), *sections]) + "\n"


def write_report(results: Path) -> Path:
    """The page and its plots."""
    for found in read_all(results):
        for kind in plotted(found):
            file = results / f"{found.manifest['model']}-{kind}.svg"
            file.write_text(plot(found, kind))
    page = home(results) / "README.md"
    page.write_text(text(results))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true", help="print the README's tables instead")
    args = parser.parse_args()
    if args.readme:
        print(readme(read_all(args.results), DEFAULT_REDUCER))
    else:
        print(write_report(args.results))


if __name__ == "__main__":
    with one_message():
        main()
