"""Conditional diversity: relevance × distance from what is already kept. Ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokencomp.reducers._batch import Patches, segment, spread
from tokencomp.reducers._merging import merge_dropped
from tokencomp.reducers._rows import finite_features, supplied_scores
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import Attention, Signal
from tokencomp.tokens.spans import SpanBatch
from tokencomp.validation import check_range

FLOOR = 1e-3
STILL_POWER, VIDEO_POWER = 0.35, 1.0  # chosen on validation: docs/decisions/0001-default-reducer.md


@register_reducer("condiv")
@dataclass(frozen=True)
class ConDiv(Reducer):
    r"""Greedy choice of tokens that are unlike those already kept and, on videos, relevant.

    .. math:: next = \arg\max_i \; r_i^p \cdot (m \bar d + \min_{j \in kept} (1 - \cos(x_i, x_j)))

    On images, unless a power is given, it is the greedy k-centre of `kcentre` instead, which reads
    no attention. Attention alone keeps many copies of one thing, and diversity alone keeps
    outliers; the product does neither. With a margin, the second and third of several similar
    things (objects to be counted, for instance) still rank above faint background. Ours; related to
    DivPrune (arXiv 2503.02175) and CDPruner (arXiv 2506.10967).

    Attributes
    ----------
    power
        p, 0 to 8; 0 is plain max-min diversity. None depends on the kind of media. On videos it is
        1: what happens again looks like what is already kept, so that relevance has to speak for
        it. On images attention has no part, because that of early layers leans towards the end of a
        picture (arXiv 2412.13180): tokens are compared by the root mean square of their
        differences, as in `kcentre`, and `margin` has no effect. On audio it is 0.35.
        Relevance r is layer 0's attention of the text after the span, mean over heads and tokens,
        divided by its largest value and floored at 1e-3, so that the distance matters at every p.
    margin
        m, 0 to 8: share of the span's mean distance d̄ (over all pairs, those of a token with
        itself included) that is added to every distance. Without effect at power 0.
    merge_rest
        Kept tokens become the mean of themselves and the dropped tokens nearest to them, of
        cosine at least this (-1: of all of them); None leaves kept tokens as they are. With
        `patch(..., proportional_attention=True)` a mean counts in attention as often as the tokens
        it stands for, so that the background keeps its share of the attention.
    """

    power: float | None = None
    margin: float = 0.2
    merge_rest: float | None = None

    summary = "greedy: k-centre on images, relevance × diversity on videos (ours)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power is not None:
            check_range("condiv", "power", self.power, 0, 8)
        check_range("condiv", "margin", self.margin, 0, 8)
        if self.merge_rest is not None:
            check_range("condiv", "merge_rest", self.merge_rest, -1, 1)

    def idle(self, pixels: bool) -> dict[str, str]:
        return (
            {"margin": "with power=0, which makes all tokens equally relevant"}
            if self.power == 0
            else {}
        )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset() if self.power == 0 else frozenset({Attention("text")})

    def needs_for(self, kinds: Collection[str]) -> frozenset[Signal]:
        return frozenset() if all(map(self._by_looks, kinds)) else self.needs

    @property
    def revision(self) -> int:
        """Since revision 2 images are compared by looks alone where no power is given."""
        return 2 if self.power is None else 1

    @property
    def merges(self) -> bool:
        return self.merge_rest is not None

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        patches = Patches.of(batch, keeps)
        looks = [self._by_looks(kind) for kind in batch.kinds]
        parts = []
        if any(looks):
            parts.append(_centres(_only(patches, looks)))
        if not all(looks):
            parts.append(self._relevant(_only(patches, [not one for one in looks])))
        chosen = parts[0] if len(parts) == 1 else torch.cat(parts).sort().values
        if self.merge_rest is None:
            return patches.kept(chosen)
        return merge_dropped(patches, chosen, self.merge_rest)

    def _by_looks(self, kind: str) -> bool:
        """Whether tokens of this kind of media are compared without relevance."""
        return kind == "image" and self.power is None

    def _relevant(self, patches: Patches) -> Tensor:
        """Patches that are chosen by relevance and distance, ascending."""
        from tokencomp.kernels import maxmin_select, mean_distance

        scores = weights = margin = None
        if self.power != 0:
            scores = patches.of_patches(supplied_scores(patches.batch, "condiv"))
        x = finite_features(patches.features, scores)
        if scores is not None:
            weights = self._weights(patches, scores)
            if self.margin:  # under equal weights a margin would change no choice
                margin = self.margin * mean_distance(x, spans=patches.lengths)
        chosen: Tensor = maxmin_select(
            x, patches.budgets, weights, spans=patches.lengths, margin=margin
        )
        return chosen

    def _weights(self, patches: Patches, scores: Tensor) -> Tensor:
        """Relevance to the power p of every patch, float32."""
        lengths = patches.lengths
        owners = patches.owners() if len(lengths) > 1 else None
        relevance = scores.clamp(min=0)
        most = segment(relevance, lengths, "max").clamp(min=1e-30)
        relevance = (relevance / spread(most, lengths, owners)).clamp(min=FLOOR)
        power = self.power
        if power is None:
            return relevance.pow(usual_power(patches, relevance, owners))
        return relevance.pow(power)


def _only(patches: Patches, chosen: list[bool]) -> Patches:
    """The same patches with a budget of 0 for the spans that are not chosen."""
    if all(chosen):
        return patches
    budgets = [n if one else 0 for n, one in zip(patches.budgets, chosen, strict=True)]
    return replace(patches, budgets=budgets)


def _centres(patches: Patches) -> Tensor:
    """Patches of a greedy k-centre, ascending: see `KCentre`."""
    from tokencomp.kernels import maxmin_select

    x = finite_features(patches.features)
    chosen: Tensor = maxmin_select(x, patches.budgets, spans=patches.lengths, metric="rms")
    return chosen


def usual_power(patches: Patches, relevance: Tensor, owners: Tensor | None) -> Tensor | float:
    """The power of every patch by its kind of media; a number where all have the same."""
    powers = [VIDEO_POWER if kind == "video" else STILL_POWER for kind in patches.batch.kinds]
    if len({*powers}) == 1:
        return powers[0]
    return spread(relevance.new_tensor(powers), patches.lengths, owners)
