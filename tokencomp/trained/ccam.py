"""A learned projector with causal cross-attention over frames (Video-CCAM, arXiv 2408.14023)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencomp.errors import OptionError
from tokencomp.validation import check_types


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of a projector; the defaults are those of Video-CCAM-7B v1.2 (SigLIP and Qwen2-7B).

    `causal`: query i of Q sees the frames up to floor(i·F/Q); with more frames than queries, no
    query sees the last ⌈F/Q⌉ - 1 frames. Otherwise every query sees every frame. `spatial`: fixed
    2-D sine positions of the cells in a frame are added to the keys (ours), which is needed if
    features do not encode their place, as after towers with rotary positions.

    Raises `OptionError` if a value has another type, a size is below one, or `heads` does not
    divide `width`.
    """

    queries: int = 1024  # output tokens, for an input of any length
    width: int = 1024  # inside
    heads: int = 16
    mlp: int = 4096  # hidden size of the SwiGLU
    kv_dim: int = 1152  # of the visual tokens
    out_dim: int = 3584  # of the language model
    causal: bool = True
    spatial: bool = False
    eps: float = 1e-5  # of the layer norms

    def __post_init__(self) -> None:
        check_types("ccam", self)
        if min(self.queries, self.width, self.heads, self.mlp) < 1 or self.width % self.heads:
            raise OptionError(f"ccam: {self}; sizes above 0, and a width that heads divides.")


class CCAMProjector(nn.Module):
    """Learned queries attend to the frames that they see: one block and a linear layer.

    The mask over frames is the only signal of time. It is never stored, because queries that see
    the same frames attend to them in one call (`tokencomp.kernels.ccam_attention`). Memory
    therefore grows with the sum of keys and queries instead of their product.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config, c = config, config
        self.query = nn.Parameter(torch.randn(c.queries, c.width) * 0.02)
        self.norm_query = nn.LayerNorm(c.width, eps=c.eps)
        self.norm_key = nn.LayerNorm(c.kv_dim, eps=c.eps)
        self.q_proj = nn.Linear(c.width, c.width)
        self.k_proj = nn.Linear(c.kv_dim, c.width)
        self.v_proj = nn.Linear(c.kv_dim, c.width)
        self.o_proj = nn.Linear(c.width, c.width)
        self.norm_mlp = nn.LayerNorm(c.width, eps=c.eps)
        self.gate_proj = nn.Linear(c.width, c.mlp)
        self.up_proj = nn.Linear(c.width, c.mlp)
        self.down_proj = nn.Linear(c.mlp, c.width)
        self.output = nn.Linear(c.width, c.out_dim)

    def forward(self, x: Tensor, frames: int, grid: tuple[int, int] | None = None) -> Tensor:
        """The tokens (B, Q, out_dim) for the language model, in the dtype of `x`.

        `x` (B, F·P, kv_dim) are visual tokens, P per frame and frame after frame. They are cast to
        the dtype of the weights, so that fp32 weights can be trained on a bf16 model. F is
        `frames`; `grid`, (rows, columns) of a frame with rows·columns = P, is only needed if
        `config.spatial`.
        """
        from tokencomp.kernels import ccam_attention

        keys = self.norm_key(x.to(self.query.dtype))
        k = self.k_proj(keys)
        if self.config.spatial:
            assert grid is not None
            places = places_2d(*grid, self.config.width, k.device).to(k.dtype)
            k = k + places.repeat(k.shape[1] // places.shape[0], 1)
        query = self.query.expand(len(x), -1, -1)
        q, k, v = map(self._heads, (self.q_proj(self.norm_query(query)), k, self.v_proj(keys)))
        attended = ccam_attention(q, k, v, frames, causal=self.config.causal)
        hidden = query + self.o_proj(attended.transpose(1, 2).flatten(2))
        normed = self.norm_mlp(hidden)
        hidden = hidden + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        output: Tensor = self.output(hidden)
        return output.to(x.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        """Split (B, n, width) into heads (B, H, n, width / H)."""
        heads: Tensor = x.unflatten(2, (self.config.heads, -1))
        return heads.transpose(1, 2)

    def save(self, path: str | Path, card: dict[str, Any] | None = None) -> Path:
        """Write `ccam.safetensors` (or the file at `path`) and its card, both atomically."""
        from tokencomp.trained.cards import write

        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / "ccam.safetensors"
        state = {k: v.float() for k, v in self.state_dict().items()}
        return write(path, state, {**(card or {}), "kind": "ccam", "ccam": asdict(self.config)})


def places_2d(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Return the sine positions (rows·columns, width) of the cells of a frame.

    Half of the columns encode the row and half the column of a cell. Positions are relative to the
    side of the frame (0 … 1, times 64), so that different grids sample the same curves.
    """
    quarter = width // 4
    scale = 64.0 * 64.0 ** -(torch.arange(quarter, device=device) / max(quarter, 1))
    row = (torch.arange(rows, device=device) + 0.5) / rows
    column = (torch.arange(columns, device=device) + 0.5) / columns
    parts = []
    for place in (row[:, None].expand(rows, columns), column[None].expand(rows, columns)):
        angle = place.flatten()[:, None] * scale
        parts += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, 1), (0, width - 4 * quarter))
