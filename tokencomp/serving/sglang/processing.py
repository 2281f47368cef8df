"""The processor's part of the SGLang plugin: fewer placeholders, and a plan for every item."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.method import Method
from tokencomp.serving import ENV_OPTIONS, KEY
from tokencomp.serving.item_plan import ItemPlan, cache_key, config_facts, item_span
from tokencomp.serving.offsets import MAX_OFFSET
from tokencomp.serving.spec import ServerOptions
from tokencomp.tokens.tokens import ModelFacts

PLAN, OFFSETS, TEXT = "tokencomp_plan", "tokencomp_offsets", "tokencomp_text"
MODELS = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)


@cache
def server_options() -> ServerOptions:
    return ServerOptions.parse(os.environ.get(ENV_OPTIONS), "sglang")


async def around_processor(
    original: Callable[..., Any], self: Any, image_data: Any, input_text: Any, request_obj: Any,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Run SGLang's processor and compress what it returns."""
    check_server(self.hf_config, self.server_args)
    request = (getattr(request_obj, "mm_processor_kwargs", None) or {}).get(KEY)
    spec = server_options().resolve(request, "sglang")
    output = await original(self, image_data, input_text, request_obj, *args, **kwargs)
    facts = config_facts(self.hf_config, getattr(self.server_args, "model_path", ""))
    return compress(output, spec, self.hf_config.vision_config.spatial_merge_size, facts)


def check_server(hf_config: Any, server_args: Any) -> None:
    """Refuse models and settings that this plugin cannot serve."""
    names = list(hf_config.architectures or [])
    if not set(names) & set(MODELS):
        raise UnsupportedModelError(
            f"tokencomp cannot compress {', '.join(names)} in SGLang; it can "
            f"{', '.join(MODELS)}. Use `tokencomp serve --engine hf`, or unset {ENV_OPTIONS}."
        )
    off = {
        "speculative_algorithm": None, "pp_size": 1, "disaggregation_mode": "null",
        "mm_enable_dp_encoder": False,
    }  # fmt: skip
    wrong = [name for name, value in off.items() if getattr(server_args, name, value) != value]
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        wrong.append("SGLANG_RUST_SERVER, which bypasses the processor")
    if wrong:
        raise UnsupportedModelError(
            f"tokencomp cannot compress in SGLang with {', '.join(wrong)}: it was not tested, or "
            f"moves media past the plugin. Start without, or unset {ENV_OPTIONS}."
        )


def compress(output: Any, spec: Method, merge: int, facts: ModelFacts | None = None) -> Any:
    """Shorten the media of a request in `output`, which SGLang's processor has returned.

    Rows of compressed items get the base position of their item. At ratio 0 all stays as it is,
    hashes too. `merge` is the number of patches per side of a token.
    """
    if output is None or not spec.active or not output.mm_items:
        return output
    ids = torch.as_tensor(output.input_ids).flatten().tolist()
    stays = torch.ones(len(ids), dtype=torch.bool)
    positions = output.mrope_positions.clone()
    items = []
    for item in output.mm_items:
        modality, grid = _grid(item, merge)
        # Frames of a video may have text between them. How many tokens of a frame stay depends on
        # the pixels, so all tokens from the first frame to the last become placeholders.
        start, stop = item.offsets[0][0], item.offsets[-1][1] + 1
        text = _text(ids, item.offsets)
        base = positions[:, start].clone()
        offsets = positions[:, start:stop] - base[:, None]
        extent = int(offsets.max()) + 1
        if extent > MAX_OFFSET:
            raise OptionError(f"one of the media spans more than {MAX_OFFSET} positions.")
        plan = ItemPlan.make([item_span(modality, grid)], spec, extent, facts)
        if plan.full != int((text < 0).sum()):
            raise RuntimeError(f"{int((text < 0).sum())} placeholders for a grid of {grid}")
        if plan.kept == plan.full:
            items.append(_moved(item, int((~stays[:start]).sum())))
            continue
        length = plan.kept + int((text >= 0).sum())
        stays[start + length : stop] = False
        positions[:, start : start + length] = base[:, None]
        first = int(stays[:start].sum())
        fields = {PLAN: plan.to_tensor(), OFFSETS: offsets.to(torch.int32), TEXT: text}
        items.append(_planned(item, (first, first + length - 1), fields, cache_key(spec, facts)))
    output.input_ids = [token for token, stay in zip(ids, stays.tolist(), strict=True) if stay]
    output.mm_items = items
    output.mrope_positions = positions[:, stays]
    output.mrope_position_delta = output.mrope_position_delta + int((~stays).sum())
    output.padded_input_ids = type(output).build_padded_input_ids(output.input_ids, items)
    return output


def _grid(item: Any, merge: int) -> tuple[str, tuple[int, int, int]]:
    if not (item.is_image() or item.is_video()):
        raise OptionError("audio together with images or videos cannot be compressed in SGLang.")
    modality = "image" if item.is_image() else "video"
    grid = item.model_specific_data.get(f"{modality}_grid_thw")
    if item.precomputed_embeddings is not None or grid is None or len(grid) != 1:
        raise OptionError(
            f"a precomputed {modality} cannot be compressed; send pixels, or request "
            f'{{"ratio": 0}}.'
        )
    t, h, w = (int(n) for n in grid[0])
    return modality, (t, h // merge, w // merge)


def _text(ids: list[int], spans: list[tuple[int, int]]) -> torch.Tensor:
    """Return the token ids from the first span to the last; placeholders are -1."""
    first = spans[0][0]
    text = torch.tensor(ids[first : spans[-1][1] + 1], dtype=torch.int32)
    for start, last in spans:
        text[start - first : last + 1 - first] = -1
    return text


def _moved(item: Any, removed: int) -> Any:
    """Return a copy of an item that loses nothing, with `removed` tokens fewer before it."""
    result = copy.copy(item)
    result.offsets = [(start - removed, last - removed) for start, last in item.offsets]
    return result


def _planned(item: Any, span: tuple[int, int], fields: dict[str, Any], key: dict[str, Any]) -> Any:
    """Return a copy of an item with its plan, and with a hash that depends on `key`.

    SGLang's cache of processed images may share the item with other requests.
    """
    from sglang.srt.multimodal.cache import resolve_multimodal_item_hash

    result = copy.copy(item)
    result.offsets = [span]
    result.model_specific_data = {**item.model_specific_data, **fields}
    text = json.dumps(key, sort_keys=True)
    namespace = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    item.set_pad_value()  # computes the hash of the pixels if it is missing
    result.set_hash(resolve_multimodal_item_hash(existing_hash=item.hash, namespace=namespace))
    return result
