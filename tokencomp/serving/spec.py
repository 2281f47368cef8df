"""The compression of a server: reducer, ratio, and what a request may change."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokencomp.errors import OptionError, RatioError, hint
from tokencomp.method import MethodSpec, resolve_auto
from tokencomp.plan.counts import MAX_RATIO, Budget, check_ratio
from tokencomp.plan.options import OPTIONS, check_option, one_amount
from tokencomp.reducers._repeats import DropsRepeats
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import make_reducer, options_of
from tokencomp.serving.load import Step, parse_steps
from tokencomp.serving.servable import check_name, check_servable

TOWER_KEYS = ("tower_ratio", "tower_reducer")
AMOUNTS = ("ratio", "budget")
FOR_PATCH = "; arguments of patch"  # from where on an error is not for requests
REQUEST_KEYS = ("reducer", *AMOUNTS, "options", *OPTIONS, *TOWER_KEYS)
OPERATOR_OPTIONS = ("weights",)  # paths: what they name, and whether it exists, is not for clients
SERVER_KEYS = (
    *REQUEST_KEYS, "max_ratio", "low_detail_ratio", "ratio_by_load", "per_request", "only_own",
)  # fmt: skip


@dataclass(frozen=True)
class ServerOptions:
    """Default of a server, and the bounds of what a request may ask for.

    Attributes
    ----------
    max_ratio : float
        Largest ratio of a request; below 0.95 it may ask for no budget, whose ratio is not known.
    per_request : bool
        False refuses requests that bring options.
    only_own : bool
        True refuses other processor options, which vLLM hands through: they can enlarge media.
    low_detail_ratio : float or None
        Ratio of images of `detail` "low"; None: the default's.
    merging : bool
        Whether attention of vLLM has wider heads, so that requests may merge.
    ratio_by_load : tuple of Step
        Higher ratios of requests that name none, under load.
    """

    default: MethodSpec = field(default_factory=MethodSpec)
    max_ratio: float = MAX_RATIO
    per_request: bool = True
    only_own: bool = False
    low_detail_ratio: float | None = None
    merging: bool = False
    ratio_by_load: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, options: Any, engine: str = "vllm") -> ServerOptions:
        """Options from JSON or a mapping: `{"reducer": "divprune", "ratio": 0.5, "options": {}}`.

        Raises a `TokenCompError` for an unknown key, reducer, option or ratio, and for what the
        engine ("hf", "vllm" or "sglang") cannot run.
        """
        if options is None:
            return cls()
        values = as_mapping(options, SERVER_KEYS)
        ratio = check_ratio(values.get("ratio", 0.0))
        max_ratio = check_ratio(values.get("max_ratio", max(MAX_RATIO, ratio)))
        if ratio > max_ratio:
            raise RatioError(
                f"ratio={ratio} is above max_ratio={max_ratio}, so that no request could have the "
                "default. Lower one, or raise the other."
            )
        low = values.get("low_detail_ratio")
        if low is not None:
            low = check_ratio(low, "low_detail_ratio")
        steps: tuple[Step, ...] = ()
        if (text := values.get("ratio_by_load")) is not None:
            if "budget" in values:
                raise OptionError("ratio_by_load with a budget: it raises a ratio. Give a ratio.")
            steps = parse_steps(text, ratio)
            if steps[-1].ratio > max_ratio:
                raise RatioError(f"ratio_by_load={text!r} is above max_ratio={max_ratio}.")
        flags = {"per_request": True, "only_own": False}
        for name, default in flags.items():
            flags[name] = values.get(name, default)
            if not isinstance(flags[name], bool):
                raise OptionError(f"{name}={flags[name]!r}: expected true or false.")
        merging = bool(values.get("merge"))
        base = cls(max_ratio=max_ratio, merging=merging)
        request = {k: v for k, v in values.items() if k in REQUEST_KEYS}
        if "budget" not in request:
            request["ratio"] = ratio
        spec = base._resolve(request, engine)
        return cls(
            spec, max_ratio, **flags, low_detail_ratio=low, merging=merging, ratio_by_load=steps
        )

    def low_detail(self, details: Sequence[tuple[str, Any]]) -> MethodSpec | None:
        """The default with the ratio of images in low detail; None if none is. Videos keep theirs.

        `details` are "image_url" or "video_url" and `detail` of all media of a request. Without a
        ratio of the operator, `detail` has no meaning.
        """
        if self.low_detail_ratio is None or "low" not in [detail for _, detail in details]:
            return None
        low = [detail == "low" for modality, detail in details if modality == "image_url"]
        if ("video_url", "low") in details or not all(low):
            raise OptionError('detail "low": for all images of a request, and for no video.')
        ratio: Any = self.low_detail_ratio
        if len(low) < len(details):
            if self.default.built_budget is not None:
                raise OptionError(
                    'detail "low" with a video: the default of this server is '
                    f"{self.default.built_budget}, which videos cannot have with a ratio of "
                    "images. Send them apart."
                )
            ratio = {"image": ratio, "video": self.default.ratio}
        asked = {"ratio": ratio, **self.default.given_options}
        return self._with_tower(self._reducer({}), asked, {})

    def resolve(self, request: Any, engine: str = "vllm", ratio: float | None = None) -> MethodSpec:
        """The spec of a request with these tokencomp options (None: the server's default).

        A `ratio` by load replaces the default's where the request names none. Raises as `parse`.
        """
        if request is None:
            return self.default if ratio is None else self._resolve({"ratio": ratio}, engine)
        if not self.per_request:
            raise OptionError(
                "this server was started with per_request=false: leave 'tokencomp' out of the "
                "request, or ask its operator."
            )
        values = with_ratio(as_mapping(request, REQUEST_KEYS), ratio)
        options = as_mapping(values.get("options"), None)
        closed = [k for k in options if str(k).rpartition(".")[2] in OPERATOR_OPTIONS]
        if closed:
            raise OptionError(f"option {', '.join(closed)} is set by the server's operator only.")
        if self.max_ratio < MAX_RATIO and values.get("budget") is not None:
            raise RatioError(
                f"budget={values['budget']!r}: this server allows ratios from 0 to "
                f"{self.max_ratio}, and the ratio of a budget depends on the media. Give a "
                "ratio."
            )
        return self._resolve(values, engine)

    def _resolve(self, values: Mapping[str, Any], engine: str) -> MethodSpec:
        asked = {key: values[key] for key in AMOUNTS if key in values}
        one_amount(asked.get("ratio"), asked.get("budget"))
        asked = asked or dict(self.default.requested)
        if "budget" in asked:
            _check_budget(asked["budget"])
        if "ratio" in asked:
            asked["ratio"] = self._checked_ratio(asked["ratio"], engine)
        reducer = self._reducer(values)
        asked |= {name: self._stage_option(name, values, reducer, engine) for name in OPTIONS}
        tower = [key for key in TOWER_KEYS if values.get(key)]
        if engine == "sglang" and tower:
            raise OptionError(
                f"{tower[0]}={values[tower[0]]!r}: the SGLang plugin has no stage in the vision "
                "tower. Leave it out, or serve with vLLM or `--engine hf`."
            )
        if engine == "hf":
            return self._with_tower(reducer, asked, values)
        if isinstance(reducer, DropsRepeats) and engine == "vllm":
            check_servable(reducer.later)
        else:
            check_servable(reducer)
        spec = self._with_tower(reducer, asked, values)
        if spec.tower_stage is not None:
            check_servable(spec.built_tower_reducer)
            spec.stages(num_layers=1, first_layer_stage=1)  # raises if they do not fit together
        return spec

    def _stage_option(
        self, name: str, values: Mapping[str, Any], reducer: Reducer, engine: str
    ) -> Any:
        """The value of a stage option: the request's, else the default's if the reducer allows it.

        A default of "auto" is for the default reducer only. Of options with weights, engines whose
        attention has none turn "auto" off, and refuse other values.
        """
        known, value = OPTIONS[name], values.get(name)
        if value is None:
            usual = values.get("reducer") in (None, "auto")
            value = getattr(self.default, name)
            if value is None and usual:
                value = known.meaning(self.default.reducer)
            if (value == "auto" and not usual) or not _allowed(name, value, reducer):
                value = None
        able = not known.weighs or engine == "hf" or (engine == "vllm" and self.merging)
        if able or value is None or value == known.off:
            return value
        if value != "auto":
            raise OptionError(
                f"{name}={json.dumps(value)}: rows that represent several tokens need weights in "
                "attention, which SGLang, and vLLM without --merge, do not support. Leave it out, "
                "or serve with `--engine hf`."
            )
        return known.off

    def _checked_ratio(self, ratio: Any, engine: str) -> Any:
        """A ratio, or ratios by modality, within the bound of the server."""
        if isinstance(ratio, Mapping) and engine == "sglang":
            raise OptionError(f"ratio={ratio!r}: the SGLang plugin has no ratios by modality.")
        by_modality = ratio if isinstance(ratio, Mapping) else {"": ratio}
        checked = {
            k: check_ratio(v, f"ratio of {k}" if k else "ratio") for k, v in by_modality.items()
        }
        if (largest := max(checked.values(), default=0.0)) > self.max_ratio:
            raise RatioError(
                f"ratio={largest}: this server allows ratios from 0 to {self.max_ratio}."
            )
        return checked if isinstance(ratio, Mapping) else checked[""]

    def _with_tower(
        self, reducer: Reducer, asked: dict[str, Any], values: Mapping[str, Any]
    ) -> MethodSpec:
        """The spec with the tower stage of a request, else what fits of the default's."""
        tower, ratio = values.get("tower_ratio"), asked.get("ratio", 0.0)
        if tower is None:
            tower = self.default.tower_ratio
            if not ratio and ("budget" not in asked or tower != "auto"):
                tower = 0.0
            elif tower != "auto" and not isinstance(ratio, dict):
                tower = min(tower, ratio)
        name = self.default.tower_reducer if tower else "auto"
        if values.get("tower_reducer") is not None:
            name = check_name("tower_reducer", values["tower_reducer"])
        stage: dict[str, Any] = {"tower_ratio": tower, "tower_reducer": name}
        try:  # the options of the default may have no effect at the ratio of a request
            return MethodSpec(reducer, **asked, **stage, inherited=frozenset(OPTIONS))
        except TypeError as error:  # it has required options
            raise OptionError(f"tower_reducer={name!r}: {error}") from None

    def _reducer(self, values: Mapping[str, Any]) -> Reducer:
        own_options = options = as_mapping(values.get("options"), None)
        old = self.default.reducer if isinstance(self.default.reducer, Reducer) else None
        name = values.get("reducer")
        if name is None:
            name = old.name if old is not None else "auto"
        name = check_name("reducer", resolve_auto(name, "server"))
        if old is not None and name == old.name:
            options = {**options_of(old), **options}
        try:
            reducer = make_reducer(name, **options)
            if isinstance(reducer, DropsRepeats):
                reducer = replace(reducer, then=str(resolve_auto(reducer.then, "server")))
            return reducer
        except (TypeError, ValueError, OverflowError) as error:
            reason = str(error).partition(FOR_PATCH)[0].rstrip(".")
            raise OptionError(f"reducer {name!r}, options {own_options}: {reason}.") from None


def _allowed(name: str, value: Any, reducer: Reducer) -> bool:
    """Whether an option of the stages may have a value with a reducer."""
    try:
        check_option(name, value, reducer)
    except OptionError:
        return False
    return True


def _check_budget(budget: Any) -> None:
    """Raise `RatioError` for a bad budget, or `OptionError` for one of a whole prompt."""
    if Budget.of(budget).whole_prompt:
        raise OptionError(
            f"budget={budget!r}: servers treat every image and clip by itself, so that caches stay "
            "valid. Give a number, which is for each of them."
        )


def names_amount(options: Any) -> bool:
    """Whether the options of a request, or JSON of them, name a ratio or budget."""
    values = as_mapping(options, None)
    return any(values.get(name) is not None for name in AMOUNTS)


def with_ratio(values: dict[str, Any], ratio: float | None) -> dict[str, Any]:
    """Add a ratio by load to the options of a request, unless they name a ratio or budget."""
    if ratio is None or names_amount(values):
        return values
    return {**values, "ratio": ratio}


def as_mapping(value: Any, allowed: tuple[str, ...] | None) -> dict[str, Any]:
    """A dict with checked keys, from None, a mapping, or JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # also numbers of very many digits
            raise OptionError(
                f"tokencomp options are not JSON ({error}): {reprlib.repr(value)}."
            ) from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(
            f"tokencomp={reprlib.repr(value)}: expected an object such as "
            '{"reducer": "divprune", "ratio": 0.5, "options": {}} or {"budget": 512}.'
        )
    wrong = [k for k in value if allowed is not None and k not in allowed]
    if wrong:
        raise OptionError(
            f"tokencomp options have no {', '.join(map(repr, wrong))}."
            f"{hint(str(wrong[0]), allowed or ())} Allowed: {', '.join(allowed or ())}; options of "
            "the reducer itself go under 'options'."
        )
    return dict(value)
