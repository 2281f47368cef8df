"""Positions of the installed release, by a layout made by hand."""

from __future__ import annotations

from support.families import FAMILIES


def test_positions_of_a_video_scale_with_its_seconds() -> None:
    """2 frames of 4×8 patches, 2 s apart."""
    family = FAMILIES["qwen2_5_vl"]
    inputs = family.batch([[family.video(4), [5]]])
    positions = family.positions(family.build(), inputs)[:, 0]
    assert positions[0, 1:17].tolist() == [1] * 8 + [1 + 2 * 2] * 8
    assert positions[1, 1:17].tolist() == ([1] * 4 + [2] * 4) * 2
    assert positions[2, 1:17].tolist() == [1, 2, 3, 4] * 4
