"""Write down which tokens every reducer keeps, to compare two states of the repository.

    PYTHONPATH=tests python tests/golden/dump.py before.json   # in the one checkout
    PYTHONPATH=tests python tests/golden/dump.py after.json    # in the other
    cmp before.json after.json

The dump covers every case of the reducer matrix, every test family, two ratios and three prompts
(an image, a video, a padded batch of both). An error is recorded by its type.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from support import matrix
from support.families import FAMILIES, Family, text

import tokencomp

RATIOS = (0.5, 0.9)


def prompts(family: Family) -> dict[str, list[list[Any]]]:
    image, video = family.image(0), family.video(4)
    return {
        "image": [[text(3), image, text(5, 2)]],
        "video": [[text(4), video, text(3, 4)]],
        "batch": [[text(3), image, text(5, 2)], [video, text(3, 4), family.image(2), text(4, 5)]],
    }


def kept(model: Any, inputs: dict[str, Any], case: matrix.Case, ratio: float) -> Any:
    """Offsets that stay per sample, stage and span; or the name of the error."""
    name, options = matrix.on_model(case, model)
    try:
        with tokencomp.patch(model, ratio, reducer=name, **options) as handle:
            with torch.no_grad():
                model(**inputs)
            return [handle.stats.kept(b) for b in range(len(inputs["input_ids"]))]
    except (tokencomp.TokenCompError, NotImplementedError) as error:
        return type(error).__name__


def dump() -> dict[str, Any]:
    result = {}
    for family_name, family in sorted(FAMILIES.items()):
        torch.manual_seed(0)
        model = family.build()
        for prompt, rows in prompts(family).items():
            inputs = family.batch(rows)
            for case in matrix.cases():
                for ratio in RATIOS:
                    key = f"{family_name} {prompt} {matrix.case_id(case)} {ratio}"
                    result[key] = kept(model, inputs, case, ratio)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(dump(), indent=0) + "\n", encoding="utf-8")
