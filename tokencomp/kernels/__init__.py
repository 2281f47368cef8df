"""Kernels that score and move visual tokens: plain PyTorch on a CPU, Triton on a GPU.

Every op has one folder. ``__init__.py`` has the public function with its checks, the plain form
``naive`` (PyTorch, which is both the CPU path and the reference of the tests) and a
:class:`tokencomp.kernels.dispatch.Op`, which chooses the form and works under ``torch.compile``.
``triton.py`` has the Triton form.

This package imports neither transformers nor the rest of tokencomp, and it imports Triton only
when an op runs there. ``TOKENCOMP_KERNELS`` chooses the form.
"""

from pathlib import Path

# The ops lie in the checkout's folder `kernels`, which has no `__init__.py`: where the checkout is
# on sys.path, `import kernels` then finds the installed distribution of that name (a dependency of
# transformers). An installed wheel has the folders of the ops here.
_OPS = Path(__file__).resolve().parents[2] / "kernels"
if not (Path(__file__).parent / "topk_stable").exists() and (_OPS / "topk_stable").exists():
    __path__.append(str(_OPS))

# ruff: noqa: E402
# Imported eagerly because the folders carry the names of their functions: a lazily resolved
# name would be shadowed by the submodule as soon as anything imported it.
from tokencomp.kernels.attention_colsum import attention_colsum, join_heads
from tokencomp.kernels.bipartite_match import bipartite_match
from tokencomp.kernels.ccam_attention import ccam_attention, visible_frames
from tokencomp.kernels.dispatch import prepare, status
from tokencomp.kernels.dpp_select import dpp_select
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.facility_select import facility_select
from tokencomp.kernels.frame_pool import frame_pool
from tokencomp.kernels.gather_rows import gather_rows
from tokencomp.kernels.maxmin_select import maxmin_select
from tokencomp.kernels.mean_distance import mean_distance
from tokencomp.kernels.merge_rows import MergedRows, merge_rows
from tokencomp.kernels.nearest_previous_frame import nearest_previous_frame
from tokencomp.kernels.topk_stable import topk_stable

__all__ = [
    "KernelError",
    "MergedRows",
    "attention_colsum",
    "bipartite_match",
    "ccam_attention",
    "dpp_select",
    "facility_select",
    "frame_pool",
    "gather_rows",
    "join_heads",
    "maxmin_select",
    "mean_distance",
    "merge_rows",
    "nearest_previous_frame",
    "prepare",
    "status",
    "topk_stable",
    "visible_frames",
]
