"""The tiny VILA starts from the tiny LLaVA-OneVision: same decoder, same tower, other size."""

from types import SimpleNamespace

import pytest
import torch

from tokencomp import zoo
from tokencomp.errors import CheckpointError
from tokencomp.zoo.export import export
from tokencomp.zoo.families import family
from tokencomp.zoo.tokenizer import load_tokenizer, write_tokenizer
from tokencomp.zoo.train import fit_positions, warm_start


def _made(name, folder):
    arch = family(name)
    write_tokenizer(folder / "tokenizer", arch.chat_template, arch.special_tokens)
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


def test_vocabularies_agree(tmp_path):
    """One embedding table serves both, the video placeholder included."""
    other, vila = (_made(n, tmp_path / n) for n in ("tiny-llava-onevision", "tiny-vila"))
    ids = {**other.tokenizer.get_vocab()}
    ids["<vila/video>"] = ids.pop("<video>")
    assert vila.tokenizer.get_vocab() == ids


def test_positions_are_interpolated():
    """A table that is linear in row and column stays so; inside, by hand."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    state = {"position_embedding.weight": torch.stack([rows, columns], -1).view(144, 2)}
    fit_positions(state, {"position_embedding.weight": torch.zeros(196, 2)})
    got = state["position_embedding.weight"].view(14, 14, 2)
    places = (torch.arange(14) + 0.5) * 12 / 14 - 0.5
    assert torch.allclose(got[3:11, 7, 0], places[3:11], atol=1e-4)
    assert torch.allclose(got[7, 3:11, 1], places[3:11], atol=1e-4)


def test_missing_source_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "available_models", list)
    new = _made("tiny-vila", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokencomp\.zoo\.train tiny-llava-onevision"):
        warm_start(new.model, "tiny-vila", "tiny-llava-onevision")
