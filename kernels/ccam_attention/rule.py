"""The causal rule of cross-attention over frames, which mask, kernel and tests share."""


def visible_frames(query: int, queries: int, frames: int) -> int:
    """Return how many frames, from the first on, query `query` sees: ``floor(i·F/Q) + 1``.

    The mask is block lower-triangular, and a single frame is visible to all queries. If there are
    at least as many queries as frames, the last query sees every frame; otherwise no query sees the
    last ⌈F/Q⌉ - 1 frames. This is our reconstruction of the rule of Video-CCAM (arXiv 2408.14023).
    """
    return min(frames, query * frames // queries + 1)


def runs(queries: int, frames: int) -> list[tuple[int, int, int]]:
    """Group consecutive queries that see the same frames.

    Returns
    -------
    list of tuple
        ``(first query, last query + 1, number of visible frames)`` per group, in order.
    """
    groups: list[tuple[int, int, int]] = []
    for query in range(queries):
        visible = visible_frames(query, queries, frames)
        if groups and groups[-1][2] == visible:
            groups[-1] = (groups[-1][0], query + 1, visible)
        else:
            groups.append((query, query + 1, visible))
    return groups
