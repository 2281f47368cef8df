"""Compression for models of mlx-vlm, on Macs and elsewhere. Needs no torch.

>>> import mlx_vlm, tokencomp.mlx               # doctest: +SKIP
>>> model, processor = mlx_vlm.load(name)       # doctest: +SKIP
>>> handle = tokencomp.mlx.patch(model, 0.5)    # doctest: +SKIP
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from tokencomp.errors import MissingDependencyError, install


def version() -> str:
    """The installed release of mlx-vlm."""
    return importlib.metadata.version("mlx-vlm")


if importlib.util.find_spec("mlx_vlm") is None:
    raise MissingDependencyError(f"tokencomp.mlx needs mlx-vlm: {install('mlx')}.")
try:
    from tokencomp.mlx.patching import MODELS, MlxHandle, patch, unpatch
except ImportError as error:
    raise MissingDependencyError(
        f"mlx-vlm {version()} is not laid out as tokencomp.mlx knows it ({error}). It is tested "
        f"with 0.7: {install('mlx')}."
    ) from error

__all__ = ["MODELS", "MlxHandle", "patch", "unpatch", "version"]
