"""Conformance of one given model: the same checks on a shrunken copy of its own config."""

from __future__ import annotations

from typing import Any

from tokencomp.adapters.registry import available_models
from tokencomp.adapters.verified import verified_types
from tokencomp.conformance.build import BuildError, tiny_model
from tokencomp.conformance.checks import Compress, Result, check_model
from tokencomp.conformance.variants import OF_CHECKPOINTS, PLAIN
from tokencomp.errors import UnsupportedModelError, UnverifiedModelError

_passed: dict[tuple[type, str], Result] = {}


def verify_model(model: Any, compress: Compress) -> Result:
    """Check that compression is exact on a tiny random model with the config of `model`.

    The tiny model has the layers, positions, masks and caches of the given one; its sizes are small
    and its tower does not run. It takes about a second, and nothing for a config that has passed.
    `compress` must take models of unverified types.

    Raises
    ------
    UnverifiedModelError
        A check fails, no tiny model can be built, or the model generates no text.
    UnsupportedModelError
        The model is refused by its structure.
    """
    own = type(model)
    if not hasattr(model, "generate"):
        raise UnverifiedModelError(
            f"{own.__name__} is a body, and only models that generate can be checked. Check the "
            "one around it, or call patch() without verify=True, which takes bodies of types that "
            "have passed."
        )
    key = own, str(model.config.to_json_string(use_diff=False))
    if key in _passed:
        return _passed[key]
    form = OF_CHECKPOINTS.get(model.config.model_type, PLAIN)
    try:
        result = check_model(tiny_model(own, model.config, form), compress)
    except BuildError as error:
        result = Result("unverified", f"no tiny model of its config can be built: {error}")
    if result.status == "refused":
        raise UnsupportedModelError(result.reason)
    if result.status == "unverified":
        known = {*available_models(), *verified_types()}
        if not result.errors and model.config.model_type in known:  # no check has begun
            raise UnverifiedModelError(
                f"{own.__name__} cannot be checked on a tiny model with its config: "
                f"{result.reason}. patch() takes its type without verify=True."
            )
        raise UnverifiedModelError(
            f"{own.__name__} was checked on a tiny model with its config, and is not served: "
            f"{result.reason} Run it without patch()."
        )
    _passed[key] = result
    return result
