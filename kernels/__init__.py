"""Kernels that score and move visual tokens; plain PyTorch on a CPU, Triton on a GPU.

Every op is one folder: the public function (a torch custom op with a fake implementation, so it
works under ``torch.compile``), ``naive.py`` (plain PyTorch: the CPU path and the reference) and
``triton.py``. Nothing here imports Triton, transformers or the rest of tokencomp until an op needs
Triton. ``TOKENCOMP_KERNELS`` chooses the implementation, see :mod:`tokencomp.kernels.dispatch`.
"""

# With the repository's root on sys.path (`python -m pytest`, a script or notebook started there)
# transformers' look-up of the Hugging Face package `kernels` imports this folder under that name.
# The ops must not be registered twice: there, the folder is empty.
if __name__ != "kernels":
    # Imported eagerly because the folders carry the names of their functions: a lazily resolved
    # name would be shadowed by the submodule as soon as anything imported it.
    from tokencomp.kernels.attention_colsum import attention_colsum, attention_lse, join_heads
    from tokencomp.kernels.bipartite_match import bipartite_match
    from tokencomp.kernels.ccam_attention import ccam_attention, visible_frames
    from tokencomp.kernels.dispatch import status, which
    from tokencomp.kernels.errors import KernelError
    from tokencomp.kernels.frame_pool import frame_pool
    from tokencomp.kernels.gather_rows import gather_rows
    from tokencomp.kernels.maxmin_select import maxmin_select, mean_distance
    from tokencomp.kernels.merge_rows import MergedRows, merge_rows
    from tokencomp.kernels.nearest_previous_frame import nearest_previous_frame
    from tokencomp.kernels.topk_stable import topk_stable

__all__ = [
    "KernelError",
    "MergedRows",
    "attention_colsum",
    "attention_lse",
    "bipartite_match",
    "ccam_attention",
    "frame_pool",
    "gather_rows",
    "join_heads",
    "maxmin_select",
    "mean_distance",
    "merge_rows",
    "nearest_previous_frame",
    "status",
    "topk_stable",
    "visible_frames",
    "which",
]
