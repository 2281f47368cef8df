"""Lost items: which ones are shown, and that reports show them."""

from __future__ import annotations

import json

from PIL import Image
from support.console import run

from tokencomp.evaluation import Setting, sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.pages.lost import draw_lost, lost_ids, read_lost, write_lost


def by_hand(scores: dict[str, int], kinds: dict[str, str]) -> EvalRun:
    records = [{"id": k, "correct": v, "kind": kinds[k]} for k, v in scores.items()]
    return EvalRun(None, records)


def test_lost_items_stand_in_their_natural_order():
    kinds = {"t/10": "image", "t/9": "image", "t/1": "video", "t/2": "image", "t/3": "image"}
    full = by_hand({"t/10": 1, "t/9": 1, "t/1": 1, "t/2": 0, "t/3": 1}, kinds)
    ours = by_hand({"t/10": 0, "t/9": 0, "t/1": 0, "t/2": 0, "t/3": 1}, kinds)
    assert lost_ids(ours, full) == ["t/1", "t/9", "t/10"]
    assert lost_ids(ours, full, "image") == ["t/9", "t/10"]


def test_pictures_of_images_and_videos_are_drawn_and_reported(loaded, examples, tmp_path, capsys):
    """Untrained models answer all alike, so the scores are written by hand."""
    setting = Setting("uniform", 0.75)
    runs = sweep(*loaded, examples, [Setting(), setting], tmp_path, max_new_tokens=2)
    for one in runs.values():
        for record in one.records:
            record["correct"] = one.setting.off
    folder = runs[setting].path
    by_id = {e.id: e for e in examples}
    shown = draw_lost(*loaded, runs[setting], runs[Setting()], by_id, folder, per_kind=2)
    write_lost(folder, shown)
    expected = sorted(e.id for e in examples if e.media[0].suffix != ".mp4")[:2]
    expected += sorted(e.id for e in examples if e.media[0].suffix == ".mp4")
    assert [item.id for item in shown] == expected and read_lost(folder) == shown
    sizes = [Image.open(folder / item.picture).size for item in shown]
    assert sizes[0] == (224, 224) and sizes[2][0] > 2 * sizes[2][1] * 0.9  # a sheet of frames
    for one in runs.values():
        lines = [json.dumps(r) + "\n" for r in one.records]
        (one.path / "records.jsonl").write_text("".join(lines))
    page = tmp_path / "r.html"
    assert run("report", tmp_path, "-o", page) == 0
    assert page.read_text().count("<figure><img") == len(shown)
    (folder / shown[0].picture).unlink()
    assert run("report", tmp_path, "-o", page) == 0
    assert page.read_text().count("<figure><img") == len(shown) - 1
