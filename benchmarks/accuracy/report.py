"""Pages and plots of the accuracy benchmark, from its result files alone.

python -m benchmarks.accuracy.report    # → README.md, summary.md, results/*.svg
python -m benchmarks.accuracy.report --results benchmarks/accuracy/unseen
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from statistics import fmean

from benchmarks.accuracy.store import ACCURACY, BARS, KINDS, RESULTS, Results, read_all
from benchmarks.accuracy.summary import summary
from benchmarks.accuracy.tables import (
    BASELINES,
    compare_families,
    compared,
    family_table,
    kept,
    loss_table,
    lost_table,
    ratio_table,
    reaches,
    rivals,
    rivals_table,
    work_table,
)
from benchmarks.publishing import MARK, provenance
from benchmarks.stored import NOTE
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import DOWNSCALE, FULL
from tokencomp.pages.plots import COLORS, Point, lines


def plot(results: Results, kind: str) -> str:
    """Retention over ratio as SVG: the default, the best other methods and the baselines."""
    series: dict[str, list[Point]] = {}
    for label, setting in results.settings.items():
        plain = setting["ratio"] and not setting["options"]
        value = kept(results, label, kind) if plain else None
        if value is not None:
            series.setdefault(setting["reducer"], []).append(Point(setting["ratio"], value.value))
    order = sorted(series, key=lambda n: (n != results.default, -fmean(p.y for p in series[n])))
    methods = [n for n in order if n not in BASELINES][: len(COLORS)]
    shown = {n: series[n] for n in (*methods, *(n for n in order if n in BASELINES))}
    return lines(shown, x="ratio removed", y=f"accuracy kept, {kind}", reference=1.0)


def plotted(results: Results) -> list[str]:
    """Kinds with a learned family: the plots show retention on those."""
    return [kind for kind in results.kinds if results.select(kind, results.learned)]


def bars(results: Results, default: str) -> list[str]:
    """For every bar of the default reducer, whether it is met."""
    report = []
    for ratio, bar in BARS.items():
        for kind in KINDS:
            label = f"{default}-{ratio:g}"
            value = kept(results, label, kind) if label in results.settings else None
            if value is not None:
                state = "met" if value.value >= bar else "NOT met"
                text = f"- ratio {ratio:g}, {kind}: {value.value:.1%}, bar {bar:.0%}: {state}"
                report.append(text)
    return report + against_baselines(results, default)


def against_baselines(results: Results, default: str) -> list[str]:
    """Never below a baseline at the same ratio: on images, on videos, on every family."""
    report, below = out_of_reach(results), False
    for (ratio, base, *labels), kind in itertools.product(rivals(results, default), KINDS):
        values = [kept(results, label, kind) for label in labels]
        if values[0] and values[1] and values[0].value < values[1].value:
            test, below = compared(results, *labels, kind), True
            counts = f"{test.wins} items won, {test.losses} lost, p = {test.p:.2g}"
            report.append(f"- ratio {ratio:g}, {kind}: below {base} ({counts}): NOT met")
    if not below:
        report.append("- below no baseline on images or videos at any ratio: met")
    return report + against_baselines_by_family(results, default)


def against_baselines_by_family(results: Results, default: str) -> list[str]:
    """How often a baseline answered more correctly, and whether the default then lost anything."""
    report, comparisons = [], compare_families(results, default)
    for learned, title in ((True, "learned families"), (False, "families not learned")):
        group = [one for one in comparisons if one.learned is learned]
        losses = [one for one in group if one.lost]
        if not group:
            continue
        line = (
            f"- {title}: a baseline answered more questions correctly in {len(losses)} of "
            f"{len(group)} comparisons"
        )
        if losses:
            worse = sum(one.default < one.full for one in losses)
            line += f" (smallest p = {min(one.test.p for one in losses):.2g}); in {worse} of "
            line += "them the default is also below the full model"
        report.append(line)
    return report


def out_of_reach(results: Results) -> list[str]:
    """Where smaller media still give the processor too many tokens to be a baseline."""
    report = []
    for kind in results.kinds:
        misses = [
            f"{results.reached(label, kind):.2f} instead of {setting['ratio']:g}"
            for label, setting in results.settings.items()
            if setting["reducer"] == DOWNSCALE and not reaches(results, label, kind)
        ]
        if misses:
            report.append(f"- {DOWNSCALE} is no baseline on {kind}: it drops {', '.join(misses)}")
    return report


def sources(results: Results) -> str:
    """Provenance of every run; with several runs, which settings came from each of them."""
    report = []
    runs = results.manifest["runs"]
    for number, run in enumerate(runs):
        reducers = [s["reducer"] for s in results.settings.values() if s["run"] == number]
        which = f"{', '.join(dict.fromkeys(reducers))}: " if len(runs) > 1 else ""
        mark = "" if run.get(MARK, True) else " **Not for publication: uncommitted changes.**"
        report.append(f"- {which}{provenance(run)}.{mark}")
    return "\n".join(report)


def learned_sentence(results: Results) -> str:
    """Which of the families the model has learned."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for family in results.families:
        groups[family in results.learned].append(family)
    titles = {"Learned families": groups[True], "Not learned": groups[False]}
    return " ".join(f"{k}: {', '.join(names)}." for k, names in titles.items() if names)


def section(results: Results, default: str, pictures: str) -> str:
    """Everything about one model; its plots lie in the folder `pictures`."""
    m, model = results.manifest, results.manifest["model"]
    parts = [
        f"## {model}",
        f"{m['items']} questions of the {m['split']} split, greedy decoding.",
        sources(results),
        learned_sentence(results),
        "Bars for the default:",
        "\n".join(bars(results, default)),
        *(f"![{model}, {kind}]({pictures}/{model}-{kind}.svg)" for kind in plotted(results)),
    ]
    for ratio in results.ratios:
        parts += [f"### {model}, ratio {ratio:g}", ratio_table(results, ratio, default)]
        parts += further_tables(results, ratio, default, pictures)
    losses = [one for one in compare_families(results, default) if one.lost]
    if losses:
        title = f"### {model}, families where a baseline answered more correctly than the default"
        parts += [title, loss_table(losses)]
    shown = [FULL, *(f"{default}-{r:g}" for r in results.ratios), *(f"{b}-0.9" for b in BASELINES)]
    labels = [label for label in shown if label in results.settings]
    parts += [f"### {model}, accuracy per question family", family_table(results, labels)]
    return "\n\n".join(parts)


def further_tables(results: Results, ratio: float, default: str, pictures: str) -> list[str]:
    """Differences to full model and baselines, where the work goes, and what is lost."""
    tables = {
        "Against the full model and the baselines:": rivals_table(results, ratio, default),
        "Where the work goes (images / videos where they differ):": work_table(
            results, ratio, default
        ),
        f"What {default} loses, the first by id:": lost_table(results, ratio, default, pictures),
    }
    return [text for pair in tables.items() if pair[1] for text in pair]


RUN = "python -m benchmarks.accuracy.run"
INTROS = {
    "results": (
        "Accuracy under compression",
        "Every reducer at four ratios on the embedded models, on the first 60 test questions "
        f"of every ShapesQA family. `{RUN}` makes this page.",
    ),
    "unseen": (
        "The default on test questions that had no part in any choice",
        "The default and the baselines on the families that the models have learned: questions "
        "1500 to 1699 of each family, which nothing was chosen on.",
    ),
    "counting": (
        "Counting",
        "The default and the baselines on 1500 counting questions, for the two models that have "
        "not learned to count.",
    ),
    "hard": (
        "Hard scenes",
        "The default, two reducers beside it and the baselines where cameras pan, objects are "
        "coloured like their background, crowds are counted and text stands over textures. The "
        "scenes have seeds of their own in every split.",
    ),
    "long": (
        "Clips of 64 frames",
        "The default, other reducers and the baselines on clips of 64 frames, all of which the "
        "model sees: events of single frames, their order, slow motion, and repeated acts.",
    ),
    "chance": (
        "Families that the models have not learned",
        "The default and the baselines on 300 questions of every family on which the full model is "
        "near a blind guess.",
    ),
}


def page_folder(results: Path) -> Path:
    """Where the page goes: above the published results, beside all others."""
    return results.parent if results == RESULTS else results


def head(results: Path) -> str:
    """Title, what was run, and where the columns are explained."""
    name = "results" if results == RESULTS else results.name
    title, text = INTROS.get(name, ("Accuracy under compression", f"Results in `{name}`."))
    methods = os.path.relpath(ACCURACY / "METHODS.md", page_folder(results))
    index = os.path.relpath(ACCURACY.parent / "README.md", page_folder(results))
    links = f"[Methods and columns]({methods}). [All benchmark pages]({index})."
    return f"# {title}\n\n{text} The commands stand below, per model. {NOTE} {links}"


def text(results: Path) -> str:
    """The page on every model with test results."""
    pictures = os.path.relpath(results, page_folder(results))
    sections = [section(one, one.default, pictures) for one in read_all(results)]
    return "\n\n".join([head(results), *sections]) + "\n"


def write_report(results: Path) -> Path:
    """The page and its plots; of the published results also the summary."""
    for one in read_all(results):
        for kind in plotted(one):
            file = results / f"{one.manifest['model']}-{kind}.svg"
            file.write_text(plot(one, kind))
    page = page_folder(results) / "README.md"
    page.write_text(text(results))
    if results == RESULTS:
        (page.parent / "summary.md").write_text(summary(read_all(results)))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(write_report(parser.parse_args().results.resolve()))


if __name__ == "__main__":
    with one_message():
        main()
