"""Time to the first token, memory and decoding of whole models: real shapes, random weights.

    python -m benchmarks.models.tower --headline           # whole models, in less than 8 minutes
    python -m benchmarks.models.tower --towers             # towers alone, in about 6 minutes
    python -m benchmarks.models.tower                      # all cases → tower.jsonl, tower.md
    python -m benchmarks.models.tower --cases qwen-image --rounds 1 --part 4
    python -m benchmarks.models.tower --device cuda --dtype bfloat16 --attention flash_attention_2
    python -m benchmarks.models.tower --report             # only rebuilds the page

Two kinds of cases. Towers alone, at several tower ratios: which share of the speed-up that FLOPs
allow is reached, and what choosing costs. Whole models: everything between a decoded picture and
the first token, the KV cache after it, and a few later tokens; full against ratio 0.75 with and
without merging, and with tower ratio 0.6 as well. With `--part` above 1, another run per variant on
the CPU measures peak memory. Times of one CPU thread are processor time, which other programs on
the machine change less; times of several threads and of a GPU are elapsed time. Every round of a
whole model runs all variants, in turning order, and is a pair of its own: the page shows the median
and the range of its speed-ups. Records of other cases stay in the file, so the benchmark can be run
in pieces.

`--headline` runs the two whole models at full depth, two rounds or as many as fit into `--minutes`,
with two threads. It needs about 14 GB of memory and an otherwise idle machine. `--towers` runs the
two towers alone at full depth, one round on one thread. Every row of a tower is stored as soon as
it is measured, and the same command measures only the rows that are missing; with `--again` it
measures all of them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.models.prefill import peak_of
from benchmarks.models.tower_parts import (
    STEPS,
    UNIT,
    Marks,
    Timed,
    build,
    cache_bytes,
    clock_of,
    later_token,
    qwen_inputs,
)
from tokencomp.plan.plan import Plan, TowerStage

MIB = 2**20
RATIO = 0.75
SHARES = {"recommended": 0.4, "both": 0.6}
"""Tower ratios: what the frontier recommends for images, and more."""
CASES = {
    "qwen-tower": "tower of Qwen2-VL-2B and 7B, one image of 1,024 tokens",
    "siglip-tower": "SigLIP-so400m, 384 px, one frame of LLaVA-OneVision",
    "qwen-image": "Qwen2-VL-2B, one image of 1,024 tokens",
    "qwen-video": "Qwen2-VL-2B, a video of 32 frames",
}
LABELS = {
    "full": "full",
    "decoder": f"ratio {RATIO}",
    **{key: f"ratio {RATIO}, tower ratio {share}" for key, share in SHARES.items()},
}
BELOW = f"""Time to the first token of real shapes with random weights. Patches are dropped before
block 0 of the tower, chosen by k-center on pixels; the decoder keeps {1 - RATIO:g} of the visual
tokens with the default method, which merges the rest of what the tower has computed. The KV cache
holds a merged token once.
Per later token: median of {STEPS} single-token steps, each of which reads all weights of the
decoder and the KV cache, the smaller part at this length. Peak memory: what is allocated during the
prefill at most, tower included and weights not; measured in a run of its own, and only with a part
of the blocks. Times of one CPU thread are processor time, of several elapsed time; brackets: the
smallest and largest speed-up of a round. "1/4 of the blocks": of tower and decoder, at their full
width. –: not measured. [Every part, and towers alone](../README.md#tables-as-csv). `python -m
benchmarks.models.tower`, at full depth with `--headline`, towers alone with `--towers`."""
PARTS = ("preprocess", "tower", "choose", "rest", "reduce", "prefill", "total")


def page(records: list[dict[str, Any]]) -> str:
    """The page of the benchmark."""
    rows = []
    for r in (r for r in in_order(records) if "parts" in r):
        for key, parts in r["parts"].items():
            pairs = r.get("pairs", {}).get(key, ())
            spread = f" [{min(pairs):.2f}, {max(pairs):.2f}]" if len(pairs) > 1 else ""
            times = [f"{parts[part]:.2f} s" for part in ("tower", "prefill", "total")]
            facts = [f"{r['speedup'][key]:.2f}×{spread}", *after(parts)]
            facts += [str(r["rounds"]), r["machine"]]
            rows.append([f"{CASES[r['case']]}", LABELS[key], *times, *facts])
    head = ["prompt", "", "tower", "prefill", "total", "speed-up"]
    head += ["KV cache", "peak memory", "per later token", "rounds", "machine"]
    title = "# How much sooner is the first token, and what happens to memory and decoding?"
    return "\n\n".join([title, publishing.table(head, rows), BELOW.replace("\n", " ")])


def after(parts: dict[str, float]) -> list[str]:
    """KV cache, peak memory and time per later token, where they were measured."""
    cells = {"kv_bytes": (MIB, ".1f", "MiB"), "peak_bytes": (MIB, ".0f", "MiB")}
    cells["later_token"] = (1e-3, ".0f", "ms")
    return [
        f"{parts[name] / unit:{digits}} {word}" if name in parts else "–"
        for name, (unit, digits, word) in cells.items()
    ]


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the CSV file, in seconds and MiB: whole models by part, and towers alone."""
    records = in_order(records)
    rows = [
        {"case": CASES[r["case"]], "tokens": r["tokens"], "setting": LABELS[key]}
        | {part: parts[part] for part in PARTS}
        | {"speedup": r["speedup"][key], "later_token": parts.get("later_token")}
        | {f"{k}_mib": (size := parts.get(f"{k}_bytes")) and size / MIB for k in ("kv", "peak")}
        | {"rounds": r["rounds"], "machine": r["machine"]}
        for r in records
        if "parts" in r
        for key, parts in r["parts"].items()
    ]
    for r in compared(records):
        setting = f"tower alone, tower ratio {r['tower_ratio']:g}"
        facts = {"case": CASES[r["case"]], "setting": setting, "tower": r["seconds"]}
        facts |= {"choose": r["choose_s"], "full_tower": r["full_s"], "flop_limit": r["flop_limit"]}
        rows.append(facts | {k: r[k] for k in ("speedup", "rounds", "machine")})
    return rows


HEADLINE = {"cases": ["qwen-image", "qwen-video"], "rounds": 2, "threads": 2, "minutes": 7.5}
TOWERS = {"cases": ["qwen-tower", "siglip-tower"], "rounds": 1, "minutes": 7.5}
VARIANTS = ("full", "decoder", "recommended", "both")


class ModelCase:
    """A whole model and its prompt: full, the decoder alone compressed, and both compressed.

    The tower drops the share that the frontier recommends for images, or more.
    """

    def __init__(self, name: str, model: Any, args: argparse.Namespace) -> None:
        self.name, self.model = name, model
        self.clock = clock_of(args.device, args.threads)
        self.peaks = args.part > 1 and args.device == "cpu"
        self.side = args.side if name == "qwen-video" else 32 * UNIT
        self.prompt = qwen_inputs(model, 32 if name == "qwen-video" else 0, self.side, args)
        self.spent: list[float] = []
        timed = Timed(clock=self.clock, spent=self.spent)
        self.variants: dict[str, dict[str, Any]] = {
            "full": {},
            "decoder": {"ratio": RATIO},
            **{
                key: {"ratio": RATIO, "tower_ratio": share, "tower_reducer": timed}
                for key, share in SHARES.items()
            },
        }
        self.rows: dict[str, list[dict[str, float]]] = {}

    def round(self, number: int, variants: Sequence[str]) -> None:
        """Run every variant of this case once; odd rounds in reverse order."""
        own = [key for key in variants if key in self.variants]
        for key in own if number % 2 == 0 else reversed(own):
            self.rows.setdefault(key, []).append(self.run(key))
            total = self.rows[key][-1]["total"]
            print(f"{self.name}, round {number + 1}: {key}, {total:.1f} s", flush=True)

    def run(self, key: str) -> dict[str, float]:
        """Seconds of the parts of one prefill and of a later token, and bytes of memory."""
        self.spent.clear()
        model, options, inputs = self.model, self.variants[key], self.prompt["inputs"]
        before = self.prompt["preprocess"]
        patched = tokencomp.patch(model, **options) if options else torch.no_grad()
        with patched as handle, torch.inference_mode():
            with Marks(model, self.clock) as marks:
                start = self.clock()
                output = model(**inputs, use_cache=True, logits_to_keep=1)
                total = self.clock() - start
            chosen = sum(self.spent)
            reduce = handle.stats.reduce_seconds if options else 0.0
            held = cache_bytes(output.past_key_values)  # later tokens add rows
            later = later_token(model, output, self.clock)
            first = self.peaks and not self.rows.get(key)
            peak = {"peak_bytes": peak_of(model, inputs)} if first else {}
        return {
            "tower": marks.seconds("tower") - chosen, "choose": chosen, "reduce": reduce,
            "prefill": marks.seconds("decoder") - reduce,
            "rest": total - marks.seconds("tower") - marks.seconds("decoder"),
            "total": total + before, "preprocess": before,
            "later_token": later, "kv_bytes": held, **peak,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Medians of what `run` returns, and the speed-up of every round."""
        rows = {key: self.rows[key] for key in VARIANTS if key in self.rows}
        full = [row["total"] for row in rows["full"]]
        medians = {
            key: {part: statistics.median(r[part] for r in row if part in r) for part in row[0]}
            for key, row in rows.items()
        }
        pairs = {
            key: [whole / row["total"] for whole, row in zip(full, row_of, strict=True)]
            for key, row_of in rows.items()
        }
        return {
            "case": self.name, "tokens": self.prompt["tokens"], "side": self.side,
            "rounds": len(full), "parts": medians, "pairs": pairs,
            "speedup": {key: statistics.median(values) for key, values in pairs.items()},
        }  # fmt: skip


def model_cases(names: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of whole models after every round, while the time allows another one."""
    started = time.perf_counter()
    model = build("qwen2-vl-2b", args)
    variants = ("full", *SHARES) if args.headline else VARIANTS
    cases = [ModelCase(name, model, args) for name in names]
    warm = argparse.Namespace(**{**vars(args), "side": 2 * UNIT})
    ModelCase("qwen-video", model, warm).run("both")
    ready = time.perf_counter()
    print(f"the model is built and warm after {ready - started:.0f} s", flush=True)
    for number in range(args.rounds):
        for case in cases:
            case.round(number, variants)
            yield case.record()
        now = time.perf_counter()
        if now + (now - ready) / (number + 1) > started + 60 * args.minutes:
            break


def fresh(
    towers: Sequence[str],
    whole: Sequence[str],
    args: argparse.Namespace,
    records: list[dict[str, Any]],
    extra: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """What is measured now: towers alone that `records` lack, and whole models."""
    for name in towers:
        yield from tower_rows(name, args, records, extra)
    for record in model_cases(whole, args) if whole else ():
        yield {**record, **extra}


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a new record replaces: the same case on the same machine."""
    return tuple(record.get(name) for name in ("case", "tokens", "tower_ratio", "machine"))


def in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records as the page has them."""
    order = list(CASES)
    return sorted(
        records,
        key=lambda r: (r["machine"], order.index(r["case"]), r.get("tower_ratio", math.nan)),
    )


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The stored records, those of the chosen cases replaced as they come."""
    preset = HEADLINE if args.headline else TOWERS if args.towers else {}
    for name, value in preset.items():  # other options count as they are given
        given = OPTIONS[name]
        if getattr(args, name) == (given[0] if isinstance(given, tuple) else given):
            setattr(args, name, value)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    threads = "one CPU thread" if args.threads == 1 else f"{args.threads} CPU threads, elapsed time"
    own = threads if args.device == "cpu" else torch.cuda.get_device_name()
    machine = f"{own}, {args.dtype}, {args.attention}"
    machine += f", 1/{args.part} of the blocks" if args.part > 1 else ""
    towers = [name for name in args.cases if name.endswith("tower")]
    whole = [name for name in args.cases if name not in towers]
    facts = publishing.published_from(args.out, args.allow_dirty)
    extra = {"machine": machine, "environment": {**publishing.environment(), **facts}}
    records = publishing.read_lines(args.out)
    for record in fresh(towers, whole, args, records, extra):
        records = [r for r in records if _key(r) != _key(record)] + [record]
        yield records


TOWER_RATIOS = (0.0, 0.25, 0.5, 0.6, 0.75)

Record = dict[str, Any]


class TowerCase:
    """A tower, its input, and what one run of it costs.

    Parameters
    ----------
    name
        "qwen-tower" or "siglip-tower".
    side
        Pixels per side of the picture of "qwen-tower".
    """

    def __init__(self, name: str, args: argparse.Namespace, side: int = 32 * UNIT) -> None:
        self.name, self.clock = name, clock_of(args.device, args.threads)
        frames = name == "siglip-tower"
        self.model = build("llava-onevision-0.5b" if frames else "qwen2-vl-2b", args, layers=1)
        # The method is looked up by name in every call, because a patch replaces it.
        self.encode = "get_video_features" if frames else "get_image_features"
        if frames:
            pixels = torch.randn(1, 1, 3, 384, 384, dtype=getattr(torch, args.dtype))
            self.inputs: dict[str, Any] = {
                "pixel_values_videos": pixels.to(args.device),
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
            }
        else:
            inputs = qwen_inputs(self.model, 0, side, args)["inputs"]
            self.inputs = {n: inputs[n] for n in ("pixel_values", "image_grid_thw")}

    def run(self, ratio: float) -> tuple[float, float, float]:
        """Seconds of one call, seconds of choosing among them, and the speed-up by FLOPs."""
        if not ratio:
            return self._seconds(), 0.0, 1.0
        spent: list[float] = []
        plan = Plan((), TowerStage(0, 1 - ratio, Timed(clock=self.clock, spent=spent)))
        with tokencomp.patch(self.model, plan=plan) as handle:
            seconds = self._seconds()
            # The tower ran alone, so there is no prefill whose stats would say this.
            (cost,) = handle._hooks.decoder.tower.drop.collect(1)
        before, after = zip(cost.tower_flops, cost.projector_flops, strict=True)
        return seconds, sum(spent), sum(before) / sum(after)

    @torch.inference_mode()
    def _seconds(self) -> float:
        start = self.clock()
        getattr(self.model.model, self.encode)(**self.inputs)
        return self.clock() - start


def tower_rows(
    name: str, args: argparse.Namespace, records: list[Record], facts: Record
) -> Iterator[Record]:
    """Records of one tower, each with one more round than it had, until none is missing.

    Parameters
    ----------
    records
        What is stored. Rounds of other machines, hardware or versions do not count, and with
        `args.again` none does.
    facts
        `machine` and `environment` of this run.
    """
    rows = {r: _started(name, r, records, facts) for r in TOWER_RATIOS}
    if args.again:
        rows = {r: _started(name, r, [], facts) for r in TOWER_RATIOS}
    case: TowerCase | None = None
    for number in range(args.rounds):
        for ratio, row in rows.items():
            if len(row["seconds"]) > number:
                continue
            if case is None:
                case = TowerCase(name, args)
                case.run(TOWER_RATIOS[-1])  # warm-up, on the smallest
            seconds, chosen, row["flop_limit"] = case.run(ratio)
            row["seconds"].append(seconds)
            row["choose_s"].append(chosen)
            print(f"{name}: tower ratio {ratio:g}, {seconds:.2f} s", flush=True)
            yield {**row, **facts}


def _started(name: str, ratio: float, records: list[Record], facts: Record) -> Record:
    """The row that is stored, if it can go on here, or an empty one."""
    fresh: Record = {"case": name, "tower_ratio": ratio, "seconds": [], "choose_s": []}
    made = {**fresh, **facts}
    return next((r for r in records if _place(r) == _place(made)), fresh)


def _place(record: Record, alike: tuple[str, ...] = ("case", "tower_ratio", "machine")) -> Record:
    """What two measurements share that belong together."""
    made = record.get("environment", {})
    return {
        **{name: record.get(name) for name in alike},
        **{name: made.get(name) for name in ("versions", "hardware")},
    }


def compared(records: list[Record]) -> list[Record]:
    """Rows with a tower stage, and the full tower that was measured in the same place.

    Returns
    -------
    list of dict
        case, tower_ratio, rounds, machine; medians full_s, seconds, choose_s; speedup, flop_limit.
    """
    result, alike = [], ("case", "machine")
    whole = [r for r in records if r.get("tower_ratio") == 0]
    for row in (r for r in records if r.get("tower_ratio")):
        for full in (r for r in whole if _place(r, alike) == _place(row, alike)):
            medians = {k: statistics.median(row[k]) for k in ("seconds", "choose_s")}
            before = statistics.median(full["seconds"])
            result.append(
                {
                    **{k: row[k] for k in ("case", "tower_ratio", "machine", "flop_limit")},
                    **medians, "full_s": before, "speedup": before / medians["seconds"],
                    "rounds": min(len(row["seconds"]), len(full["seconds"])),
                }
            )  # fmt: skip
    return result


OPTIONS: dict[str, Any] = {
    "cases": (list(CASES), "", CASES),
    "rounds": 3,
    "side": (224, "pixels per side of a video frame"),
    "threads": (1, "CPU threads"),
    "minutes": (math.inf, "no round of whole models begins that would end later than this"),
    "headline": (
        False,
        "whole models at full depth on two threads, full and both compressed, within 7.5 minutes",
    ),
    "towers": (False, "towers alone at full depth, one round on one thread"),
    "again": (False, "measure towers alone anew, stored rows included"),
    "part": (1, "4: a quarter of the blocks of tower and decoder"),
    "device": "cpu",
    "dtype": "float32",
    "attention": "sdpa",
}
EXPERIMENT = Experiment("models/tower", measure, page, rows_of, OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
