"""A vision tower alone, at several tower ratios: the rows of "towers alone" of the benchmark.

Every row is measured and stored by itself, so that a run which stops goes on where it was. Rows are
compared with the full tower of the same machine, hardware and versions of packages.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch

import tokencomp
from benchmarks.models.tower_parts import UNIT, Timed, build, clock_of, qwen_inputs
from tokencomp.plan.plan import Plan, TowerStage

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
    own = {**fresh, **facts}
    return next((r for r in records if _place(r) == _place(own)), fresh)


def _place(record: Record, alike: tuple[str, ...] = ("case", "tower_ratio", "machine")) -> Record:
    """What two measurements share that belong together."""
    made = record.get("environment", {})
    return {
        **{name: record.get(name) for name in alike},
        **{name: made.get(name) for name in ("versions", "hardware")},
    }


def compared(records: list[Record]) -> list[Record]:
    """Rows with a tower stage beside the full tower that was measured in the same place.

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
