"""The tiny VILA starts from the tiny LLaVA-OneVision: same decoder, same tower, other size."""

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from recipes.tiny.export import export
from recipes.tiny.families import family
from recipes.tiny.recipes import RECIPES
from recipes.tiny.tokenizer import load_tokenizer
from recipes.tiny.train import app, copy_weights, finished, fit_positions, stages_from, warm_start
from tokencomp.errors import CheckpointError, UnknownNameError
from tokencomp.inputs import packaged
from tokencomp.storage import write_json


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


def test_vocabularies_agree(tmp_path):
    """One embedding table serves both, the video placeholder included."""
    other, vila = (_made(n, tmp_path / n) for n in ("tiny-llava-onevision", "tiny-vila"))
    ids = {**other.tokenizer.get_vocab()}
    ids["<vila/video>"] = ids.pop("<video>")
    assert vila.tokenizer.get_vocab() == ids


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


def test_missing_source_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "available_models", list)
    new = _made("tiny-vila", tmp_path)
    with pytest.raises(CheckpointError, match=r"recipes\.tiny\.train tiny-llava-onevision"):
        warm_start(new.model, "tiny-vila", "tiny-llava-onevision")


def test_training_goes_on_from_the_weights_of_a_finished_model(tmp_path):
    source = _made("tiny-gemma3", tmp_path / "source")
    folder = export(source.model, source.arch, tmp_path / "export")
    with pytest.raises(CheckpointError, match=r"has no metrics\.json"):
        finished(str(folder))
    write_json(folder / "metrics.json", {"training": {"steps": 7, "seconds": 2.5, "seed": 0}})
    assert finished(str(folder)) == {"steps": 7, "seconds": 2.5}
    new = _made("tiny-gemma3", tmp_path / "new")
    with torch.no_grad():
        for parameter in new.model.parameters():
            parameter.zero_()
    copy_weights(new.model, str(folder))
    theirs = source.model.state_dict()
    for name, value in new.model.state_dict().items():
        assert torch.equal(value, theirs[name].half().float()), name
    other = _made("tiny-llava-onevision", tmp_path / "other")
    with pytest.raises(CheckpointError, match="do not fit"):
        copy_weights(other.model, str(folder))


def test_a_recipe_can_start_at_a_stage():
    stages = RECIPES["tiny-gemma3"]
    assert stages_from(stages, None) == stages
    rest = [stage.name for stage in stages_from(stages, "balance")]
    assert rest == ["balance", "finish", "tallies"]
    with pytest.raises(UnknownNameError, match=r"no stage 'polish'.*'finish'"):
        stages_from(stages, "polish")


@pytest.mark.parametrize(("start", "stage"), [("nothing", "finish"), ("tiny-gemma3", "polish")])
def test_a_wrong_name_leaves_no_folder_behind(tmp_path, start, stage):
    out, start = tmp_path / "out", str(tmp_path / start) if start == "nothing" else start
    command = ["tiny-gemma3", "--out", str(out), "--from-stage", stage, "--start", start]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "error: " in result.output
    assert not out.exists()
