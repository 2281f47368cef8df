"""Which reducers servers can run."""

from __future__ import annotations

from typing import Any

from tokencomp.errors import OptionError, TokenCompError
from tokencomp.reducers.base import Reducer, counts_itself
from tokencomp.reducers.registry import available_reducers
from tokencomp.validation import choices, field_types

PROBE_RATIOS = (0.1, 0.5, 0.9)
PROBE_LAYERS = 32


def serving_safe(reducer: Reducer) -> bool:
    """Whether it runs inside engines that fix placeholder counts before the model runs.

    Its choice must depend on the media item only, as prefix caches share it between questions.
    Tests verify this for this package; other classes declare `Traits(per_item=True)`.
    """
    if reducer.needs or counts_itself(reducer):
        return False
    if not (reducer.traits.per_item or type(reducer).__module__.startswith("tokencomp.")):
        return False
    plans = [reducer.plan(ratio, PROBE_LAYERS).stages for ratio in PROBE_RATIOS]
    own = [[(stage.layer, stage.reducer) for stage in stages] for stages in plans]
    return all(stages == [(0, reducer)] for stages in own)


def servable() -> dict[str, str]:
    """Reducers that such an engine can run: name → "", or the option and values that make it so."""
    able = {}
    for name, cls in available_reducers().items():
        if _is_safe(cls):
            able[name] = ""
        elif values := _safe_choices(cls):
            able[name] = values
    return able


def _is_safe(cls: type[Reducer], **options: Any) -> bool:
    try:
        return serving_safe(cls(**options))
    except (TokenCompError, TypeError):  # it has required options, or refuses these
        return False


def _safe_choices(cls: type[Reducer]) -> str:
    """The first option that makes `cls` safe with some of its listed values, and these; or ""."""
    for option, hint in field_types(cls).items():
        values = [v for v in choices(hint) if _is_safe(cls, **{option: v})]
        if values:
            return f"{option}={' or '.join(map(str, values))}"
    return ""


def check_servable(reducer: Reducer) -> Reducer:
    """Return `reducer` if such an engine can run it; else `OptionError` lists all that can."""
    if serving_safe(reducer):
        return reducer
    able = ", ".join(f"{name} with {o}" if o else name for name, o in servable().items())
    raise OptionError(
        f"reducer {reducer.name!r} cannot run inside an engine that fixes placeholder counts "
        "before the vision tower runs and caches media across questions. These can: "
        f"{able}; and reducers of your package with `Traits(per_item=True)`. "
        f"Serve {reducer.name!r} with `--engine hf` instead."
    )
