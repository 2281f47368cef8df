"""Typed errors. Every message says what was given, what is allowed, and the fix."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class TokenCompError(Exception):
    """Base class of every error that tokencomp raises on purpose."""


class RatioError(TokenCompError, ValueError):
    """A ratio outside [0, 1), or not a number."""


class RatioWarning(UserWarning):
    """A prompt whose achieved ratio differs from the requested one by more than rounding."""


class UncompressedWarning(UserWarning):
    """A prompt that may hold visual features, but whose places are not known."""


class FrameRateWarning(UserWarning):
    """A processor writes frame times, and assumes a frame rate because the video's is unknown."""


class FrameChoiceWarning(UserWarning):
    """Frames that a policy did not choose, that replace damaged ones, that are shown twice, or that
    a model reads as images.
    """


class MergeWarning(UserWarning):
    """A patch that drops tokens which `merge="auto"` would merge, because this model cannot."""


class PrefillWarning(UserWarning):
    """A prompt that runs in one pass although `prefill_chunk_size` was given."""


class OptionError(TokenCompError, ValueError):
    """An option that the reducer, schedule or command does not have, or a value it cannot take."""


class UnknownOptionError(OptionError):
    """An option that the named reducer does not have."""


class UnknownNameError(OptionError, LookupError):
    """A reducer, model, task or schedule name that is not registered."""


class NameTakenError(TokenCompError, ValueError):
    """A name for a reducer or model type that another class is already registered under."""


class PluginWarning(UserWarning):
    """An installed plugin that cannot be loaded; everything else works without it."""


class PlanError(TokenCompError, ValueError):
    """A plan that cannot be executed on this model."""


class UnsupportedModelError(TokenCompError, TypeError):
    """A model that no adapter knows, or a feature of it that cannot be compressed exactly."""


class NoDecoderError(UnsupportedModelError):
    """A model without a causal text decoder that reads features of media as tokens."""


class NoPlaceholderError(UnsupportedModelError):
    """A model whose config names no placeholder of images, videos or audio."""


class RowIndexedAttentionError(UnsupportedModelError):
    """Attention that depends on how many rows lie between two tokens, or on groups of rows."""


class UnverifiedModelError(UnsupportedModelError):
    """A model of a type that has not passed the check that dropping tokens equals masking them."""


class UntestedReleaseError(UnverifiedModelError):
    """A transformers release newer than the tested ones, where a check of the model failed."""


class UntestedReleaseWarning(UserWarning):
    """A release of transformers newer than the tested ones, allowed without a check."""


class UnsupportedCacheError(TokenCompError, TypeError):
    """A KV cache whose layout cannot hold rows of different logical and physical length."""


class CacheError(TokenCompError, RuntimeError):
    """A KV cache that tells transformers another length than its rows and dropped tokens have."""


class PaddingError(TokenCompError, ValueError):
    """An attention mask that hides a part of an image or video, or all of a sample."""


class SpanError(TokenCompError, ValueError):
    """Visual tokens in the prompt that do not form the grid the model should have produced."""


class UnknownGridError(SpanError):
    """A reducer that reads places in a grid, and a span whose grid is not known."""


class NoVisualInputError(TokenCompError, ValueError):
    """`strict=True` and a prompt without any image or video."""


class SessionError(TokenCompError, RuntimeError):
    """A session that cannot take what was given: too much for its budget, or closed."""


class AlreadyCompressedError(TokenCompError, RuntimeError):
    """Another method has already shortened the visual tokens of this model."""


class ModelInUseError(TokenCompError, RuntimeError):
    """A change of a patch while a call of the model is running."""


class CopyError(TokenCompError, TypeError):
    """A patched model that is to be copied or pickled."""


class ScoreError(TokenCompError, ValueError):
    """Scores that are not finite."""


class MediaError(TokenCompError, ValueError):
    """An image or video file that cannot be read, is empty, or is too small."""


class FrameOrderError(MediaError):
    """Frames of a session whose times do not ascend."""


class CheckpointError(TokenCompError, ValueError):
    """A model folder that lacks a part, or names one that this package cannot build."""


class WeightsError(TokenCompError, ValueError):
    """Reducer weights that are missing, or were trained for another model."""


class MissingDependencyError(TokenCompError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


INSTALL = {
    "extra": "pip install '.[{}]' in a checkout of tokencomp",
    "zoo": "pip install ./zoo in a checkout of tokencomp",
}
"""How parts of this project are installed while it is on no package index; a release changes it."""

EXTRAS = {
    "PIL": "media",
    "torchvision": "media",
    "av": "media",
    "typer": "cli",
    "rich": "cli",
    "tqdm": "cli",
    "jinja2": "cli",
    "matplotlib": "cli",
    "gradio": "play",
    "decord": "decord",
}
"""The extra that brings an optional package, by the name under which it is imported."""


def install(extra: str) -> str:
    """The command that installs an extra."""
    return INSTALL["extra"].format(extra)


def missing_package(error: ModuleNotFoundError) -> MissingDependencyError | None:
    """The typed error for an optional package that is not installed; None for other modules."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return MissingDependencyError(
        f"this needs {name}, which is not installed: {install(EXTRAS[name])}."
    )


def copy_error(model_name: str) -> CopyError:
    """Build the error for a copy of a patched model of that class."""
    return CopyError(
        f"{model_name} is patched: copy.deepcopy and pickle would copy hooks that act for the "
        "original (also under handle.disabled()). Call tokencomp.unpatch(model) first, and patch() "
        "the model and its copy afterwards."
    )


LEFT_OUT = ("prumerge", "prunevid", "ottvid", "framefusion", "echoprune", "f3a", "occamtoken")
"""Methods that docs/methods.md lists as left out, without hyphens."""


ELSEWHERE = {
    "image_max_tokens": ("llama.cpp", "budget=512"),
    "max_soft_tokens": ("Gemma 4", "budget=512"),
    "max_pixels": ("Qwen", "budget=512"),
    "video_pruning_rate": ("vLLM", "reducer='evs', ratio={'video': 0.5}"),
    "dominant": ("VisionZip", "reducer='visionzip', budget=64"),
    "contextual": ("VisionZip", "reducer='visionzip', budget=64"),
    "k": ("FastV", 'plan=[{"layer": 2, "fraction": 0.5, "reducer": "fastv"}]'),
    "r": ("ToMe", "reducer='bipartite', ratio=0.5"),
    "tome": ("ToMe", "reducer='bipartite'"),
}
"""Names of other libraries: whose they are, and the arguments of `patch` that come next to them."""


def hint(name: str, allowed: Iterable[str]) -> str:
    """What a wrong name may stand for, as a sentence after a space; "" if nothing is near."""
    plain = name.lower().replace("-", "_")
    if plain in ELSEWHERE:
        owner, here = ELSEWHERE[plain]
        return f" What {owner} calls {name!r} is {here} here (docs/coming-from.md)."
    if plain.replace("_", "").rstrip("+") in LEFT_OUT:
        return " This method is left out on purpose, docs/methods.md says why."
    lower = {one.lower(): one for one in sorted(allowed) if one != name}
    close = [lower[m] for m in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.7)]
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> UnknownNameError:
    """Build the error for an unknown `kind` ("reducer", "model", ...), with near misses, if any."""
    names = sorted(allowed)
    near = hint(name, names)
    return UnknownNameError(f"unknown {kind} {name!r}.{near} Available: {', '.join(names)}.")


def check_free(kind: str, name: str, old: type, new: type) -> None:
    """Raise `NameTakenError` if `new` shall have a `kind` of name that another class, `old`, has.

    A reloaded module, or a notebook cell that runs again, defines the same class anew.
    """
    old_class, new_class = (f"{c.__module__}.{c.__qualname__}" for c in (old, new))
    if old_class != new_class:
        raise NameTakenError(
            f"{kind} {name!r} is already registered by {old_class}, so {new_class} cannot take the "
            "name. Choose another name; register_reducer(..., override=True) replaces a reducer."
        )


def deprecated(old: str, new: str, gone_in: str) -> None:
    """Warn that a public name is deprecated; call it first in the function of the old name.

    `new` is the name to use. `gone_in` is the release that no longer has the old name: the next
    minor release but one at the earliest.
    """
    message = f"{old} is deprecated and goes in tokencomp {gone_in}; use {new}."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
