"""The tiny VILA starts from the tiny LLaVA-OneVision: same decoder, same tower, other size."""

from types import SimpleNamespace

import torch

from recipes.tiny.export import export
from recipes.tiny.families import family
from recipes.tiny.tokenizer import load_tokenizer
from recipes.tiny.train import fit_positions, warm_start


def _made(name, folder):
    arch = family(name)
    arch.write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    return SimpleNamespace(arch=arch, tokenizer=tokenizer, model=arch.build(tokenizer))


def test_shared_parts_are_copied(tmp_path):
    source = _made("tiny-llava-onevision", tmp_path / "source")
    folder = export(source.model, source.arch, tmp_path / "export")
    new = _made("tiny-vila", tmp_path / "new")
    before = {k: v.clone() for k, v in new.model.mm_projector.state_dict().items()}
    warm_start(new.model, "tiny-vila", "tiny-llava-onevision", folder)
    theirs = source.model.model.language_model.state_dict()
    for name, value in new.model.llm.model.state_dict().items():
        assert torch.equal(value, theirs[name].half().float()), name
    assert torch.equal(new.model.llm.lm_head.weight, source.model.lm_head.weight.half().float())
    tower = source.model.model.vision_tower.state_dict()
    for name, value in new.model.vision_tower.state_dict().items():
        if not name.endswith("position_embedding.weight"):
            assert torch.equal(value, tower[name].half().float()), name
    for name, value in new.model.mm_projector.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_positions_are_interpolated():
    """Row, column and a constant: each table entry goes where its patch is in the new grid."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    table = torch.stack([rows, columns, torch.full_like(rows, 3.0)], -1)
    state = {"position_embedding.weight": table.view(144, 3)}
    fit_positions(state, {"position_embedding.weight": torch.zeros(196, 3)})
    got = state["position_embedding.weight"].view(14, 14, 3)
    places = (torch.arange(14) + 0.5) * 12 / 14 - 0.5  # centres of the patches, in old patches
    # torch's cubic kernel bends straight lines by less than 0.05 inside, more at the borders
    assert torch.allclose(got[2:12, 2:12, 0], places[2:12, None].expand(10, 10), atol=0.05)
    assert torch.allclose(got[2:12, 2:12, 1], places[None, 2:12].expand(10, 10), atol=0.05)
    assert torch.allclose(got[..., 2], torch.tensor(3.0))
