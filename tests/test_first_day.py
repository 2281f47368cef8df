"""What a new user prints, misspells and passes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.family
import torch
from PIL import Image
from support.console import run
from support.embedded import folder, loaded
from support.family.base import Family

import tokencomp
from tokencomp.cli._catalogue import MAKERS
from tokencomp.errors import MediaError, OptionError, UnsupportedModelError
from tokencomp.inputs import loading
from tokencomp.inputs.media import is_video, load_media
from tokencomp.inputs.prompts import build_inputs
from tokencomp.reducers.registry import ARGUMENTS
from tokencomp.zoo import SAMPLES

__all__ = ["folder", "loaded"]
USAGE = Path(__file__).parents[1] / "docs" / "usage.md"


@pytest.fixture
def inputs(loaded: Any) -> dict[str, Any]:
    image = Image.fromarray(np.arange(112 * 112 * 3, dtype=np.uint8).reshape(112, 112, 3))
    return build_inputs(loaded[1], [[image]], ["What is it?"])


def test_a_handle_says_what_was_asked_for_and_what_happened(loaded, inputs):
    model = loaded[0]
    placeholder = model.config.image_token_id
    visual = int((inputs["input_ids"] == placeholder).sum())
    layers = model.config.get_text_config().num_hidden_layers
    with tokencomp.patch(model, 0.75, reducer="kcenter") as handle, torch.no_grad():
        assert "ratio 0.75 (kcenter at entry): no prompt" in repr(handle)
        model(**inputs)
        assert f"ratio 0.75 (kcenter at entry): {visual} → {visual // 4} visual tokens" in repr(
            handle
        )
        stats = handle.stats
        work = round(100 * stats.flops_after / stats.flops_before)
        assert str(stats).startswith(f"{visual} → {visual // 4} visual tokens, LLM work {work} %")
        assert 25 < work < 90 and str(stats) in repr(handle) and len(repr(stats)) < 120
        handle.set(ratio={"image": "0.5"})
        model(**inputs)
        assert f"ratio image=0.5 (kcenter at entry): {visual} → {visual // 2}" in repr(handle)
        handle.set(budget=8)
        model(**inputs)
        assert f"budget=8 (kcenter at entry): {visual} → 8 visual tokens" in repr(handle)
        plan = [{"layer": k, "fraction": 1 - k / 4, "reducer": "prune"} for k in (1, 2)]
        handle.set(plan=plan)
        model(**inputs)
        left = [visual] + [visual * 3 // 4] + [visual // 2] * (layers - 2)
        shown = f"{visual} → {sum(left) / layers:.0f} visual tokens in the mean layer"
        assert f"plan (prune before layers 1, 2): {shown}" in repr(handle)
    assert "removed" in repr(handle)


def test_stats_of_a_prompt_of_text_are_empty(loaded, inputs):
    model, processor = loaded
    with tokencomp.patch(model, 0.5) as handle, torch.no_grad():
        assert not handle.stats and handle.stats.summary()["tokens_before"] == []
        model(**inputs)
        assert handle.stats
        model(**processor(text=["hello"], return_tensors="pt"))
        assert not handle.stats
        empty = handle.stats.summary()
        assert (empty["ratio"], empty["flops_before"], empty["tokens_after"]) == (0.0, 0, [])


@pytest.mark.parametrize(
    "given, meant",
    [
        ({"ration": 0.5}, "Did you mean ratio?"),
        ({"keep_ratio": 0.5}, "Did you mean ratio? It is the share that is removed"),
        ({"max_tokens": 512}, "Did you mean budget?"),
        ({"method": "divprune"}, "Did you mean reducer?"),
        ({"postions": "compact"}, "Did you mean positions?"),
        ({"merg": True}, "Did you mean merge?"),
        ({"zzz": 1}, "has no option 'zzz'. It has: "),
    ],
)
def test_misspelt_arguments(loaded, given, meant):
    model = loaded[0]
    with pytest.raises(OptionError, match=re.escape(meant)):
        tokencomp.patch(model, **given)
    with tokencomp.patch(model, 0.5) as handle, pytest.raises(OptionError, match=re.escape(meant)):
        handle.set(**given)


def test_the_arguments_that_are_suggested_exist():
    assert set(ARGUMENTS) <= set(inspect.signature(tokencomp.patch).parameters)


def test_what_is_no_model_says_what_to_pass(loaded):
    class Pipeline:
        model = loaded[0]

    with pytest.raises(UnsupportedModelError, match=r"`\.model` of a pipeline"):
        tokencomp.patch(Pipeline(), 0.5)
    with pytest.raises(UnsupportedModelError, match="Load 'some/model' first"):
        tokencomp.patch("some/model", 0.5)


def test_a_huge_picture_is_one_message(tmp_path, monkeypatch):
    Image.new("1", (400, 400)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # more than twice as many are refused
    assert not is_video(tmp_path / "huge.png")
    with pytest.raises(MediaError, match=r"huge\.png: the image is too large; make it smaller"):
        load_media(tmp_path / "huge.png")


def test_the_lines_about_a_video_run_as_they_stand(loaded, tmp_path, monkeypatch):
    pages = re.findall(r"```python\n(.*?)```", USAGE.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = [code for code in pages if "clip.mp4" in code]
    sample = SAMPLES / "test-needle-00001.mp4"
    (tmp_path / "clip.mp4").write_bytes(sample.read_bytes())
    monkeypatch.chdir(tmp_path)
    known = {"tokencomp": tokencomp, "model": loaded[0], "processor": loaded[1]}
    exec(lines, known)
    assert len(known["clip"]) == 8 and "pixel_values_videos" in known["inputs"]
    with tokencomp.patch(loaded[0], 0.5) as handle:
        loaded[0].generate(**known["inputs"], max_new_tokens=2)
        assert handle.stats.ratio == pytest.approx(0.5, abs=0.05)


def test_every_family_of_the_tests_is_listed_in_a_suite():
    """A subclass of `Family` that is in no list runs no test."""
    for module in pkgutil.iter_modules(support.family.__path__):
        importlib.import_module(f"support.family.{module.name}")
    tests = "\n".join(f.read_text() for f in Path(__file__).parent.rglob("*.py"))
    classes, named = list(Family.__subclasses__()), set()
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if cls.__module__.startswith("support.family.") and "name" in vars(cls):
            named.add(cls.__name__)
    assert len(named) > 20
    assert not {name for name in named if not re.search(rf"\b{name}\(\)", tests)}


def test_a_folder_that_is_not_there_is_called_so(capsys):
    for name in ("./nofolder", "/no/folder", "~/no/folder"):
        assert run("inspect", "--model", name, "--image", SAMPLES / "test-position-00003.jpg") == 2
        assert f"model '{name}': no such folder." in capsys.readouterr().err


def test_a_file_in_place_of_a_folder_is_called_so(capsys):
    file = SAMPLES / "test-position-00003.jpg"
    assert run("inspect", "--model", file, "--image", file) == 2
    assert "is a file. Give the folder" in capsys.readouterr().err


@pytest.mark.parametrize(("proxies", "local"), [({}, True), ({"https": "http://proxy:1"}, False)])
def test_a_hub_without_address_is_not_tried_again_and_again(monkeypatch, proxies, local):
    def no_address(*args: Any) -> None:
        raise socket.gaierror

    asked: list[dict[str, Any]] = []

    def load(path: str, dtype: torch.dtype, **options: Any) -> None:
        asked.append(options)
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(loading, "getproxies", lambda: proxies)
    monkeypatch.setattr(loading, "load_folder", load)
    with pytest.raises(UnsupportedModelError, match="'owner/name' cannot be loaded"):
        loading.load_model("owner/name")
    assert asked == [{"local_files_only": True} if local else {}]


@pytest.mark.parametrize("command", ["demo", "inspect", "profile", "eval"])
def test_the_help_of_a_command_begins_with_the_model(capsys, command):
    run(command, "--help")
    options = re.findall(r"^│[ *]+(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert options[0] == "--model" and "--ratio" in options[1:7]


def test_ctrl_c_leaves_a_word(monkeypatch, capsys):
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(MAKERS, "reducers", stop)
    assert run("list", "reducers") == 130
    assert capsys.readouterr().err.startswith("stopped. ")
