"""The causal rule of cross-attention over frames, in one place."""


def visible_frames(query: int, queries: int, frames: int) -> int:
    """How many frames (from the first) query `query` of `queries` sees: ``floor(i·F/Q) + 1``.

    Block lower-triangular; one frame is seen by all queries. The last query sees every frame as
    long as there is a query for each; of more frames the last ⌈F/Q⌉ - 1 are seen by no query. Our
    reconstruction of Video-CCAM's rule (arXiv 2408.14023).
    """
    return min(frames, query * frames // queries + 1)


def runs(queries: int, frames: int) -> list[tuple[int, int, int]]:
    """Runs of queries that see the same frames: ``(first query, last + 1, frames seen)``."""
    found: list[tuple[int, int, int]] = []
    for query in range(queries):
        seen = visible_frames(query, queries, frames)
        if found and found[-1][2] == seen:
            found[-1] = (found[-1][0], query + 1, seen)
        else:
            found.append((query, query + 1, seen))
    return found
