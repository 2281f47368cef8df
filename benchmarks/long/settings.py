"""What is asked: methods by what they read, with ratios, merged and dropped."""

from __future__ import annotations

from collections.abc import Sequence

from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES, MERGE, RANDOM, UNIFORM, Setting

MIDDLE = 0.75
RATIOS = (0.5, MIDDLE, 0.9)
CHOICE_RATIOS = (*RATIOS, 0.95)
"""Those of the rule that chooses the default (docs/decisions/0001), asked on validation."""
IMAGE_FAMILIES = ("describe", "count", "read", "compare")
CLIP_FAMILIES = ("follow",)
KINDS = {"images": IMAGE_FAMILIES, "clips": CLIP_FAMILIES}
DEFAULT = "auto"
QUESTION = ("condiv", "cdpruner", "mmtok", "anchorprune", "fastv", "pyramiddrop", "sparsevlm")
"""Reducers whose choice depends on the question."""
COVERING = ("kcenter", "divprune", "scope", "vidcom2", "bipartite")
"""Those that spread over the picture, whatever is asked."""
MERGED = ("kcenter", "condiv")
"""Those asked with `merge=True` as well."""
STEPS = ("kcenter", {"step_weight": 4.0, MERGE: True})
"""Asked about clips."""
ONCE = ("cdpruner", "mmtok", "anchorprune", "scope", "vidcom2", "bipartite", "flashvid")
"""Those asked at `MIDDLE` alone."""
OPTIONS = {"scope": {"saliency": "none"}}
BASELINES = (RANDOM, UNIFORM, DOWNSCALE)
CLIPS_ONLY = (FEWER_FRAMES, "flashvid")


def methods(kind: str, ratios: Sequence[float] = RATIOS) -> list[Setting]:
    """All settings for "images" or "clips", the full model first."""
    names = (DEFAULT, *QUESTION, *COVERING, "visionzip", *BASELINES)
    names += CLIPS_ONLY if kind == "clips" else ()
    each = [(name, OPTIONS.get(name, {})) for name in names]
    each += [(name, {MERGE: True}) for name in MERGED] + [(RANDOM, {"seed": 1})]
    each += [STEPS] if kind == "clips" else []
    asked = [
        Setting(name, ratio, options)
        for name, options in each
        for ratio in ((MIDDLE,) if name in ONCE else ratios)
    ]
    # A picture of another size replaces what the tower gave, so these come last.
    return [Setting(), *sorted(asked, key=lambda s: s.input_baseline)]


def method_of(label: str) -> str:
    """Name of the method in tables: the label of a setting without its ratio."""
    name, *rest = label.split("-")
    options = ", ".join(part for part in rest if not part.replace(".", "").isdigit())
    return f"{name} ({options})" if options else name


def group_name(method: str) -> str:
    """What a method reads, in words."""
    name = method.split(" ")[0]
    if name == DEFAULT:
        return "default"
    if name in (*BASELINES, FEWER_FRAMES):
        return "baseline"
    if name in QUESTION:
        return "question"
    return "covering" if name in COVERING else "tower"
