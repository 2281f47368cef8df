"""Names and folders of the models that ship with the package."""

from __future__ import annotations

from pathlib import Path

from tokencomp.errors import unknown_name

DEFAULT_MODEL = "tiny-qwen3-vl"
MODELS = Path(__file__).parents[1] / "zoo" / "models"


def available_models() -> list[str]:
    """Names of the packaged models."""
    return sorted(config.parent.name for config in MODELS.glob("*/config.json"))


def model_path(name: str) -> Path:
    """Folder of a packaged model.

    Raises
    ------
    UnknownNameError
        No model of that name is packaged; the message names close matches.
    """
    if name not in available_models():
        raise unknown_name("embedded model", name, available_models())
    return MODELS / name


def resolve(name_or_path: str | Path) -> str:
    """A packaged model's folder for its name; anything else (path, hub id) unchanged.

    A bare name that looks like a packaged model but is none raises instead of going to the hub.
    """
    name = str(name_or_path)
    if name in available_models():
        return str(MODELS / name)
    if name.startswith("tiny-") and "/" not in name and not Path(name).exists():
        model_path(name)
    return name
