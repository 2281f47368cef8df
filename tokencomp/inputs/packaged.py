"""Names and folders of the embedded models, which are a separate distribution."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tokencomp.errors import INSTALL, MissingDependencyError, UnsupportedModelError, unknown_name

DEFAULT_MODEL = "tiny-qwen3-vl-hard"
CHECKOUT = Path(__file__).parents[2] / "zoo" / "tokencomp_zoo"


def zoo_folder() -> Path | None:
    """Folder of the package `tokencomp_zoo`: next to this one in a checkout, else as installed."""
    if CHECKOUT.is_dir():
        return CHECKOUT
    spec = importlib.util.find_spec("tokencomp_zoo")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def zoo_part(name: str) -> Path:
    """The folder "models" or "samples"."""
    folder = zoo_folder()
    if folder is None:
        raise MissingDependencyError(
            f"the embedded models and questions are not installed: {INSTALL['zoo']}."
        )
    return folder / name


def available_models() -> list[str]:
    """Names of the embedded models; none if their package is not installed."""
    folder = zoo_folder()
    configs = () if folder is None else folder.glob("models/*/config.json")
    return sorted(config.parent.name for config in configs)


def model_path(name: str) -> Path:
    """Folder of an embedded model."""
    models = zoo_part("models")
    if name not in available_models():
        raise unknown_name("embedded model", name, available_models())
    return models / name


def resolve(name_or_path: str | Path) -> str:
    """The folder of an embedded model, or a path; a hub id is returned unchanged.

    A bare name that resembles an embedded model raises instead of being looked up on the hub, and a
    path that does not exist raises `UnsupportedModelError`.
    """
    name = str(name_or_path)
    if name in available_models():
        return str(model_path(name))
    if name.startswith("tiny-") and "/" not in name and not Path(name).exists():
        model_path(name)
    if not name.startswith((".", "/", "~")):  # no hub id does
        return name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UnsupportedModelError(
            f"model {name!r}: no such folder. Give one in the Hugging Face layout, the id of a hub "
            "model, or an embedded model (`tokencomp list models`)."
        )
    return str(folder)
