"""The compression of a server: reducer, ratio, and what a request may change."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokencomp.errors import OptionError, RatioError
from tokencomp.method import FIELDS, Method
from tokencomp.plan.counts import MAX_RATIO, Budget, check_ratio
from tokencomp.plan.options import split
from tokencomp.serving import KEY, engines
from tokencomp.serving.load import Step, parse_steps

AMOUNTS = ("ratio", "budget", "speedup")
REQUEST_KEYS = ("reducer", "ratio", "options", *FIELDS)
SERVER_KEYS = ("max_ratio", "low_detail_ratio", "ratio_by_load", "per_request", "only_own")
OPERATOR_OPTIONS = ("weights",)  # paths: what they name, and whether it exists, is not for clients


@dataclass(frozen=True)
class ServerOptions:
    """Default of a server, and the bounds of what a request may ask for.

    Below a `max_ratio` of 0.95 a request may ask for no budget and no speedup, whose ratio is not
    known.
    """

    default: Method = field(default_factory=Method)
    max_ratio: float = MAX_RATIO  # of a request
    per_request: bool = True  # False refuses requests that bring options
    only_own: bool = False  # True refuses other processor options of vLLM, which can enlarge media
    low_detail_ratio: float | None = None  # of images of `detail` "low"; None: the default's
    merging: bool = False  # attention of vLLM has wider heads, so that requests may merge
    ratio_by_load: tuple[Step, ...] = ()  # of requests that name none, under load

    @classmethod
    def parse(cls, options: Any, engine: str = "vllm") -> ServerOptions:
        """Options from JSON or a mapping: `{"reducer": "divprune", "ratio": 0.5, "options": {}}`.

        Raises a `TokenCompError` for an unknown key, reducer, option or ratio, and for what the
        engine ("hf", "vllm" or "sglang") cannot run.
        """
        if options is None:
            return cls()
        values = as_mapping(options)
        asked = values.get("ratio", 0.0)
        by_modality = asked if isinstance(asked, Mapping) else {}
        ratio = max(map(check_ratio, by_modality.values())) if by_modality else check_ratio(asked)
        max_ratio = check_ratio(values.get("max_ratio", max(MAX_RATIO, ratio)))
        if ratio > max_ratio:
            raise RatioError(
                f"ratio={ratio} is above max_ratio={max_ratio}, so that no request could have the "
                "default. Lower one, or raise the other."
            )
        low = values.get("low_detail_ratio")
        # The ratio of `detail: "low"`, the only place where OpenAI's field has a meaning here.
        if low is not None:
            low = check_ratio(low, "low_detail_ratio")
        steps: tuple[Step, ...] = ()
        if (text := values.get("ratio_by_load")) is not None:
            if not values.keys().isdisjoint(("budget", "speedup")):
                raise OptionError(
                    "ratio_by_load with a budget or speedup: it raises a ratio. Give a ratio."
                )
            if by_modality:
                raise OptionError("ratio_by_load with ratios by modality: give one ratio.")
            steps = parse_steps(text, ratio)
            if steps[-1].ratio > max_ratio:
                raise RatioError(f"ratio_by_load={text!r} is above max_ratio={max_ratio}.")
        flags = {"per_request": True, "only_own": False}
        for name, default in flags.items():
            flags[name] = values.get(name, default)
            if not isinstance(flags[name], bool):
                raise OptionError(f"{name}={flags[name]!r}: expected true or false.")
        merging = bool(values.get("merge"))
        base = cls(Method(), max_ratio, merging=merging)
        request = as_changes({k: v for k, v in values.items() if k not in SERVER_KEYS})
        if request.keys().isdisjoint(("budget", "speedup")):
            request["ratio"] = asked
        return replace(
            base, default=base._resolved(request, engine), **flags, low_detail_ratio=low,
            ratio_by_load=steps,
        )  # fmt: skip

    def low_detail(self, details: Sequence[tuple[str, Any]]) -> Method | None:
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
            ratio = {"image": ratio, "video": self.default.ratios.get("video", self.default.ratio)}
        return self.default.override({"ratio": ratio})

    def of_request(
        self,
        given: Sequence[Any],
        details: Sequence[tuple[str, Any]],
        engine: str,
        ratio: float | None,
    ) -> tuple[Method, bool]:
        """The method of a request, and whether the load of the server may choose its ratio.

        `given` are its tokencomp options, in one field or two; `details` those of `low_detail`; a
        `ratio` by load replaces the default's. Raises as `parse`.
        """
        asked: list[Any] = [as_changes(options) for options in given]
        if not asked and (low := self.low_detail(details)) is not None:
            return low, False
        named = any(values.get(name) is not None for values in asked for name in AMOUNTS)
        by_load = bool(details) and not named
        # Options without an amount, such as a reducer, take the ratio by load too.
        if by_load and ratio is not None:
            if not asked:
                return self._resolved({"ratio": ratio}, engine), True
            asked = [{**values, "ratio": ratio} for values in asked]
        method, *others = [self.resolve(values, engine) for values in asked or [None]]
        if any(other != method for other in others):
            raise OptionError(f'two settings: "{KEY}" and "mm_processor_kwargs" differ. Send one.')
        return method, by_load

    def resolve(self, request: Any, engine: str = "vllm") -> Method:
        """The method of these tokencomp options (None: the server's default); raises as `parse`."""
        if request is None:
            return self.default
        if not self.per_request:
            raise OptionError(
                "this server was started with per_request=false: leave 'tokencomp' out of the "
                "request, or ask its operator."
            )
        values = as_changes(request)
        closed = [k for k in values["options"] if k.rpartition(".")[2] in OPERATOR_OPTIONS]
        if closed:
            raise OptionError(f"option {', '.join(closed)} is set by the server's operator only.")
        # A budget of one token is a ratio close to one, whatever the operator allows.
        for name in ("budget", "speedup"):
            if self.max_ratio < MAX_RATIO and values.get(name) is not None:
                raise RatioError(
                    f"{name}={values[name]!r}: this server allows ratios from 0 to "
                    f"{self.max_ratio}, and the ratio of a {name} depends on the media. Give a "
                    "ratio."
                )
        return self._resolved(values, engine)

    def _resolved(self, values: Mapping[str, Any], engine: str) -> Method:
        """The default with these values, within the bounds of the server and of the engine."""
        if "ratio" in values and values["ratio"] is None:
            check_ratio(None)
        if "budget" in values:
            Budget.of(values["budget"])
        method = self.default.override(values)
        largest = max([method.ratio, *method.ratios.values()])
        if largest > self.max_ratio:
            raise RatioError(
                f"ratio={largest}: this server allows ratios from 0 to {self.max_ratio}."
            )
        return engines.engine(engine, self.merging).fit(method)


def as_changes(value: Any) -> dict[str, Any]:
    """Options of a request as changes of `Method.override`; others are options of the reducer."""
    named, others = split(as_mapping(value), REQUEST_KEYS)
    moved, options = split({**others, **as_mapping(named.pop("options", None))}, FIELDS)
    return {**named, **moved, "options": options}


def as_mapping(value: Any) -> dict[str, Any]:
    """A dict with texts as keys, from None, a mapping, or JSON text."""
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
    return {str(name): field for name, field in value.items()}
