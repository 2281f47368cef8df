"""Inference-time visual-token compression for open multimodal LLMs.

>>> handle = tokencomp.patch(model, ratio=0.5)      # doctest: +SKIP
>>> model.generate(**inputs)                        # doctest: +SKIP
>>> tokencomp.unpatch(model)                        # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_LAZY = {
    "patch": "tokencomp.patching",
    "unpatch": "tokencomp.patching",
    "Handle": "tokencomp.handle",
    "Session": "tokencomp.session.session",
    "extend_visual_context": "tokencomp.context_window",
    "Plan": "tokencomp.plan.plan",
    "Stage": "tokencomp.plan.plan",
    "TowerStage": "tokencomp.plan.plan",
    "Reducer": "tokencomp.reducers.base",
    "register_reducer": "tokencomp.reducers.registry",
    "available_reducers": "tokencomp.reducers.registry",
    "make_reducer": "tokencomp.reducers.registry",
    "plan_from_json": "tokencomp.reducers.plan_json",
    "plan_to_json": "tokencomp.reducers.plan_json",
    "available_models": "tokencomp.adapters.registry",
    "Kept": "tokencomp.tokens.tokens",
    "Tokens": "tokencomp.tokens.tokens",
    "TokenCompError": "tokencomp.errors",
}

__all__ = [
    "Handle",
    "Kept",
    "Plan",
    "Reducer",
    "Session",
    "Stage",
    "TokenCompError",
    "Tokens",
    "TowerStage",
    "__version__",
    "available_models",
    "available_reducers",
    "extend_visual_context",
    "make_reducer",
    "patch",
    "plan_from_json",
    "plan_to_json",
    "register_reducer",
    "unpatch",
]

if TYPE_CHECKING:
    from tokencomp.adapters.registry import available_models
    from tokencomp.context_window import extend_visual_context
    from tokencomp.errors import TokenCompError
    from tokencomp.handle import Handle
    from tokencomp.patching import patch, unpatch
    from tokencomp.plan.plan import Plan, Stage, TowerStage
    from tokencomp.reducers.base import Reducer
    from tokencomp.reducers.plan_json import plan_from_json, plan_to_json
    from tokencomp.reducers.registry import available_reducers, make_reducer, register_reducer
    from tokencomp.session.session import Session
    from tokencomp.tokens.tokens import Kept, Tokens


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tokencomp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
