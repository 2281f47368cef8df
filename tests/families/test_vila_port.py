"""Models of VILA's remote code, by a stand-in that shares its parts with our own class."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.families import FAMILIES, IMAGE, NO_EOS, PAD, VIDEO, text
from support.family.vila_port import VilaPort

import tokencomp
from tokencomp.errors import NoVisualInputError, SpanError

FAMILY = FAMILIES["vila"]
OPTIONS = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=PAD)


def both() -> tuple[Any, dict[str, Any], VilaPort, tuple[Any, ...]]:
    """The same ragged batch for our class and for the stand-in."""
    model = FAMILY.build()
    model.llm.generation_config.eos_token_id = NO_EOS
    one, two, video = FAMILY.image(0), FAMILY.image(0), FAMILY.video(4)
    inputs = FAMILY.batch(
        [[text(3), one, text(4, 2)], [text(2, 3), video, text(2), two, text(9, 4)], [text(5, 6)]]
    )
    rows = [
        [*text(3), IMAGE, *text(4, 2)],
        [*text(2, 3), VIDEO, *text(2), IMAGE, *text(9, 4)],
        text(5, 6),
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    stills = [p.inputs["pixel_values"][0] for p in (one, two)]
    media = {"image": stills, "video": [video.inputs["pixel_values_videos"]]}
    return model, inputs, VilaPort(model, IMAGE, VIDEO).eval(), (ids, media, mask)


@pytest.mark.parametrize("reducer", ["merge", "aim", "prune", "uniform"])
@pytest.mark.parametrize("beams", [1, 2])
def test_like_our_class(reducer: str, beams: int) -> None:
    model, inputs, port, prompt = both()
    with tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        expected = model.generate(**inputs, **OPTIONS, num_beams=beams)[:, -6:]
        stats = handle.stats
    with tokencomp.patch(port, 0.6, reducer=reducer) as handle:
        found = port.generate(*prompt, **OPTIONS, num_beams=beams)[:, -6:]
        assert handle.stats.tokens_before == stats.tokens_before
        assert handle.stats.tokens_after == stats.tokens_after
        assert [[s.grid for s in row] for row in handle.stats.spans] == [
            [s.grid for s in row] for row in stats.spans
        ]
    assert found.tolist() == expected.tolist()


def test_forward_has_full_length() -> None:
    model, inputs, port, prompt = both()
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform"):
        expected = model(**inputs).logits
    with torch.no_grad(), tokencomp.patch(port, 0.5, reducer="uniform"):
        found = port(*prompt).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_removed() -> None:
    _, _, port, prompt = both()
    with torch.no_grad():
        before = port(*prompt).logits
        handle = tokencomp.patch(port, 0.5)
        assert not torch.equal(port(*prompt).logits, before)
        handle.remove()
        assert torch.equal(port(*prompt).logits, before)
    assert "_embed" not in port.__dict__
    assert not port.encoders["image"]._forward_hooks
    assert "_prefill" not in port.llm.__dict__


def test_text_only_after_an_image() -> None:
    """An earlier prompt leaves nothing behind."""
    _, _, port, (ids, media, mask) = both()
    with torch.no_grad(), tokencomp.patch(port, 0.5, strict=True) as handle:
        port(ids, media, mask)
        assert handle.stats
        with pytest.raises(NoVisualInputError):
            port(ids[2:], {}, mask[2:])
        assert not handle.stats


def test_unknown_layout_is_refused() -> None:
    _, _, port, prompt = both()
    port.encoders["image"].end_tokens = None  # 17 embeddings are no square
    with tokencomp.patch(port, 0.5), pytest.raises(SpanError, match="image of 17"):
        port(*prompt)


def test_two_threads() -> None:
    """Every thread finds the media of its own prompt, whatever another embeds meanwhile."""
    _, _, port, (ids, media, mask) = both()
    jobs = [(ids[:1], {"image": media["image"][:1]}, mask[:1]), (ids[2:], {}, mask[2:])]
    with torch.no_grad(), tokencomp.patch(port, 0.5, reducer="uniform"):
        expected = port(*jobs[0]).logits
        embed = port._embed

        def interrupted(*args: Any) -> Any:
            out = embed(*args)
            other = threading.Thread(target=embed, args=(*jobs[1][:2], None, None, jobs[1][2]))
            other.start()
            other.join()
            return out

        port.__dict__["_embed"] = interrupted
        assert torch.equal(port(*jobs[0]).logits, expected)
