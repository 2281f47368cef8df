"""What evaluation tables and stored answers need to know of a published method."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.plan.plan import from_profile
from tokencomp.reducers.base import Reducer


@dataclass(frozen=True)
class Published(Reducer):
    """A reducer with a paper, from whose schedule it may depart, and with a revision."""

    @property
    def revision(self) -> int:
        """Version of the method: raised when the same options begin to choose other tokens.

        Stored answers of different revisions are not mixed.
        """
        return 1

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which the paper's schedule cuts; () for methods without one.

        At ratios that this schedule cannot reach, cuts move or are added: see `deviation`.
        """
        return ()

    def deviation(self, ratio: float, num_layers: int, frames: int = 0) -> str:
        """How the plan for `ratio` departs from the paper's rule, in words; "" if it does not.

        Parameters
        ----------
        frames
            Temporal steps of the videos; 0 if unknown, or if there are no videos.
        """
        published = self.published_layers(num_layers)
        layers = [stage.layer for stage in self.plan(ratio, num_layers).stages]
        if not published or {*layers} <= {*published}:
            return ""
        ours, theirs = (", ".join(map(str, sorted(x))) for x in (layers, published))
        return f"cuts before layer {ours}; the paper's schedule: {theirs}"


def cut_layers(profile: list[float], reducer: Reducer) -> tuple[int, ...]:
    """Layers before which the fraction of tokens that layers see falls."""
    return tuple(stage.layer for stage in from_profile(profile, reducer).stages)


def revision(reducer: Reducer) -> int:
    """`Published.revision`; 1 for other reducers."""
    return reducer.revision if isinstance(reducer, Published) else 1


def deviation(reducer: Reducer, ratio: float, num_layers: int, frames: int = 0) -> str:
    """`Published.deviation`; "" for other reducers."""
    if isinstance(reducer, Published):
        return reducer.deviation(ratio, num_layers, frames)
    return ""
