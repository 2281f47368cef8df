"""What records and tables of an evaluation ask of a published method."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers.base import Reducer


@dataclass(frozen=True)
class Published(Reducer):
    """A reducer whose choices have changed between releases, or may depart from its paper."""

    @property
    def revision(self) -> int:
        """Raised when the same options start to choose other tokens than in an earlier release.

        Stored answers of both are then not mixed.
        """
        return 1

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which the paper's own schedule cuts; () for methods without one.

        A ratio that this schedule cannot reach moves or adds cuts: see `deviation`.
        """
        return ()

    def deviation(self, ratio: float, num_layers: int, frames: int = 0) -> str:
        """How the plan for `ratio` departs from the paper's rule, in words; "" if it does not.

        Parameters
        ----------
        frames
            Steps in time of the videos that are asked about; 0 if unknown, or if there are none.
        """
        published = self.published_layers(num_layers)
        layers = [stage.layer for stage in self.plan(ratio, num_layers).stages]
        if not published or {*layers} <= {*published}:
            return ""
        ours, theirs = (", ".join(map(str, sorted(x))) for x in (layers, published))
        return f"cuts before layer {ours}; the paper's schedule: {theirs}"


def revision(reducer: Reducer) -> int:
    """`Published.revision`; 1 for other reducers."""
    return reducer.revision if isinstance(reducer, Published) else 1


def deviation(reducer: Reducer, ratio: float, num_layers: int, frames: int = 0) -> str:
    """`Published.deviation`; "" for other reducers."""
    if isinstance(reducer, Published):
        return reducer.deviation(ratio, num_layers, frames)
    return ""
