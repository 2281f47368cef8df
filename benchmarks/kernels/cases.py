"""What is benchmarked: one setup function per op, at sizes of real models.

Each setup returns a :class:`~benchmarks.kernels.case.Case`: a call of the public function, the
straightforward PyTorch version of the same thing (``eager``: whole matrices, no blocking; also what
``torch.compile`` gets), and the bytes and FLOPs that the op cannot avoid. ``scale`` shrinks the
large dimension for runs without a GPU.
"""

from benchmarks.kernels.attention_cases import ccam, colsum
from benchmarks.kernels.case import Setup
from benchmarks.kernels.row_cases import gather, match, merge, nearest, pool
from benchmarks.kernels.selection_cases import dpp, facility, maxmin, topk, topk_spans

CASES: list[Setup] = [
    colsum("1 row x 16k keys, 28/4 heads of 128", 1, 16384, 28, 4, 128),
    colsum("16 rows x 16k keys, 28/4 heads of 128", 16, 16384, 28, 4, 128),
    colsum("64 rows x 16k keys, 28/4 heads of 128", 64, 16384, 28, 4, 128),
    colsum("64 rows x 16k keys, 14/2 heads of 64", 64, 16384, 14, 2, 64),
    colsum("64 rows x 16k keys, 32/32 heads of 80", 64, 16384, 32, 32, 80),
    colsum("8k rows x 8k keys causal, 28/4 heads of 128", 0, 8192, 28, 4, 128),
    colsum("PageRank, 5 steps, 8k x 8k causal, 28/4 heads of 128", 0, 8192, 28, 4, 128, 5),
    match("32 frames x 196 tokens x 3584", 32, 196, 3584),
    match("32 frames x 196 tokens x 896", 32, 196, 896),
    match("8 tiles x 729 tokens x 3584", 8, 729, 3584),
    nearest("32 frames x 14 x 14 x 3584, same place", 32, 14, 3584),
    merge("32 frames x 196 tokens x 3584, half kept", 32, 196, 3584),
    gather("7B layer, 8k rows, half kept", 1, 8192, 3584, 4, 128),
    gather("0.5B layer, 4 x 8k rows, half kept", 4, 8192, 896, 2, 64),
    pool("128 frames x 14 x 14 x 3584", 128, 14, 3584),
    pool("64 frames x 27 x 27 x 3584", 64, 27, 3584),
    ccam("1024 queries x 96 frames of 729, 16 heads of 64", 1024, 96, 729, 16, 64),
    ccam("1024 queries x 32 frames of 729, 9 heads of 128", 1024, 32, 729, 9, 128),
    maxmin("32 spans x 196 tokens x 3584, a quarter kept", 32, 196, 3584, 0.25),
    maxmin("1 span x 6272 tokens x 3584, a quarter kept", 1, 6272, 3584, 0.25),
    maxmin("1 span x 16384 tokens x 3584, 5 % kept", 1, 16384, 3584, 0.05),
    dpp("16 spans x 576 tokens x 3584, a quarter kept", 16, 576, 3584, 0.25),
    dpp("1 span x 4096 tokens x 3584, a tenth kept", 1, 4096, 3584, 0.1),
    facility("16 spans x 576 tokens x 3584, a quarter kept", 16, 576, 3584, 0.25),
    topk("8 x 8k scores", 8, 8192),
    topk_spans("16 spans of 576 and 729 scores", [576, 729] * 8),
]
