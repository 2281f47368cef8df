"""Conformance of many model types: two processes, a time limit each, one result per type."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from benchmarks.conformance.variants import variants
from tokencomp.conformance.build import BuildError, on_meta, quiet, tiny_model
from tokencomp.conformance.checks import Result, check_model
from tokencomp.conformance.configs import shallow, text_config
from tokencomp.conformance.variants import Variant
from tokencomp.errors import UnsupportedModelError, unknown_name

SECONDS = 90
"""Limit of processor time of one type, all its forms together."""
WORKERS, FEW = 2, 4
"""Processes, and how many types do not deserve them."""
RANK = ("exact", "entry only", "unverified", "refused")


class TimeLimitError(BaseException):
    """A type took longer than it may.

    No `Exception`, because building and checking a model catch those, and would go on.
    """


def model_classes() -> dict[str, str]:
    """Model type → class of every image-text-to-text and multimodal type of transformers."""
    from transformers.models.auto import modeling_auto

    names: dict[str, str] = {}
    for mapping in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT"):
        table = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        names |= {k: v if isinstance(v, str) else v[0] for k, v in dict(table).items()}
    return dict(sorted(names.items()))


def check_types(
    types: list[str] | None = None,
    done: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Results of model types, sorted by type; None: of all of the installed transformers.

    `done` is called with every type and its result as it comes.
    """
    known = model_classes()
    for name in types or ():
        if name not in known:
            raise unknown_name("model type", name, known)
    chosen = types or list(known)
    results: dict[str, dict[str, Any]] = {}
    for name, result in _run(chosen):
        results[name] = result
        if done is not None:
            done(name, result)
    return dict(sorted(results.items()))


def _run(types: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each type and its result as it comes: of a few in this process, of many in two."""
    if len(types) <= FEW:
        for name in types:
            yield name, check_type(name)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, initializer=_start_worker) as pool:
        jobs: dict[Future[Any], str] = {pool.submit(check_type, name): name for name in types}
        for job in as_completed(jobs):
            try:
                yield jobs[job], job.result()
            except Exception as error:  # the process died, of memory for example
                yield jobs[job], _row(Result("unverified", f"{type(error).__name__}: {error}"))


def _start_worker() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()


def check_type(model_type: str) -> dict[str, Any]:
    """The result of one type: that of the form that shows least, with errors of all."""
    from transformers.models.auto import modeling_auto

    start = time.perf_counter()
    results: dict[str, Result] = {}
    try:
        with _time_limit(SECONDS):
            for variant in variants(model_type):
                results[variant.name] = _check_variant(model_type, variant)
    except TimeLimitError as error:
        results["time"] = Result("unverified", str(error))
    name, worst = max(results.items(), key=lambda item: RANK.index(item[1].status))
    errors: dict[str, float] = {}
    refusals: dict[str, str] = {}
    unpatched: dict[str, str] = {}
    for result in results.values():
        errors |= {k: max(v, errors.get(k, 0.0)) for k, v in result.errors.items()}
        refusals |= result.refusals
        unpatched |= result.unpatched
    reason = f"{name}: {worst.reason}" if name and worst.reason else worst.reason
    row = _row(Result(worst.status, reason, errors, refusals, unpatched), list(results))
    seconds = round(time.perf_counter() - start, 1)
    image_text = model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {**row, "image_text": image_text, "seconds": seconds}


def _row(result: Result, forms: list[str] | None = None) -> dict[str, Any]:
    """A result as plain types, ready for JSON, with rounded numbers."""
    named = [form for form in forms or () if form]
    row = {**asdict(result), "errors": {k: float(f"{v:.2g}") for k, v in result.errors.items()}}
    row = {k: v for k, v in row.items() if k not in ("refusals", "unpatched") or v}
    return {**row, **({"forms": named} if named else {})}


def _check_variant(model_type: str, variant: Variant) -> Result:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        model_class = getattr(transformers, model_classes()[model_type])
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        return Result("unverified", f"no default config: {type(error).__name__}: {error}")
    try:
        tiny = tiny_model(model_class, config, variant)
    except BuildError as error:
        return _refusal(model_class, config) or Result("unverified", f"not built: {error}")
    return check_model(tiny, compress)


def bare_model(model_class: type, config: Any) -> Any:
    """A model without weights, to inspect its structure."""
    with quiet(), contextlib.suppress(Exception):
        return on_meta(model_class, shallow(config), text_config(config))
    with quiet():
        return on_meta(model_class, copy.deepcopy(config), text_config(config))


def _refusal(model_class: Any, config: Any) -> Result | None:
    """The reason for which `patch` refuses a type without a tiny model; None if it does not."""
    from tokencomp.plan.plan import Plan

    try:
        compress(bare_model(model_class, config), Plan()).remove()
    except UnsupportedModelError as error:
        return Result("refused", str(error))
    except Exception:
        return None
    return None


def compress(model: Any, plan: Any) -> Any:
    """`tokencomp.patch` with a plan, also for a model of an unverified type."""
    from tokencomp.adapters.verified import unverified_accepted
    from tokencomp.patching import patch

    with unverified_accepted():
        return patch(model, plan=plan)


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeLimitError` in the block when the time is over, where the system can.

    Time of this process counts, so that results do not depend on what else a machine does.
    """
    if not hasattr(signal, "SIGPROF"):
        yield
        return

    def over(*args: Any) -> None:
        raise TimeLimitError(f"not finished after {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
