"""What shapesqa.yaml names. lmms-eval loads this file alone, not as part of the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def visuals(doc: dict[str, Any]) -> list[str]:
    """The image or video of an item, below `$HF_HOME/shapesqa`."""
    return [str(Path(os.environ["HF_HOME"]) / "shapesqa" / doc["media"])]
