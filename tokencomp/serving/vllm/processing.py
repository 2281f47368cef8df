"""The processor's part of the plugin: it plans every media item and sizes its placeholders."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from cachetools import LRUCache
from transformers import BatchFeature
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails

import tokencomp
from tokencomp.errors import OptionError
from tokencomp.method import Method
from tokencomp.serving import ENV_RULES, ENV_UNTESTED, KEY
from tokencomp.serving.item_plan import (
    ItemPlan,
    ItemSize,
    cache_key,
    config_facts,
    field_name,
)
from tokencomp.serving.saved import process_metrics
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm import PIXELS
from tokencomp.serving.vllm.entry import configured_options
from tokencomp.serving.vllm.metrics import item_sizes, saved_by
from tokencomp.serving.vllm.repeats import Compared, KeptPixels, chained, compares, item_cells
from tokencomp.serving.vllm.roles import ALL, ENCODE
from tokencomp.serving.vllm.rules import handed
from tokencomp.tokens.tokens import LastKept, VisualSpan

logger = init_logger("vllm.tokencomp")
MODALITIES = ("image", "video")
DENSE_TOWER = (
    "its vision tower takes batches of pictures, and this plugin shortens packed towers only"
)
OFF = Method()
REMEMBERED = 16384  # sizes of media that may come from a cache


def server_options(model_config: Any) -> ServerOptions:
    """The options of the server, parsed once: vLLM makes a processor for every chat request."""
    options = configured_options(model_config)
    return _parsed(options if isinstance(options, str) else json.dumps(options))


@functools.cache
def _parsed(options: str) -> ServerOptions:
    return ServerOptions.parse(options)


class CompressingProcessor:
    """Mixin that precedes a multimodal processor of vLLM in the base classes.

    The plan of an item (spans, counts, reducer) is one field of the item. The placeholders in this
    process and the rows in the worker both follow it, so their numbers are equal. The parameter
    names are vLLM's, as vLLM passes arguments by keyword. `no_tower_stage` says why `tower_ratio`
    is refused for a family.
    """

    info: Any
    no_tower_stage: ClassVar[str] = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model_config = self.info.ctx.model_config
        self._options = server_options(model_config)
        self._facts = config_facts(model_config.hf_config, model_config.model)
        # Of all items, also uncompressed ones: what says how their rows are laid out.
        self._layout = {"version": tokencomp.__version__, "sizes": self._options.merging}
        self._check_tower(self._options.default)
        if self._options.default.active:  # weights that are missing end the start
            self._options.default.built_reducer.bind(self._facts)
        self._sizes: LRUCache[str, ItemSize] = LRUCache(REMEMBERED)
        self._kept, self._hashes = KeptPixels(), dict[str, list[str]]()  # of the last request
        self._latest = "", self._options.default  # options of a request as JSON, and their spec
        default = json.dumps(self._options.default.describe())
        logger.info_once("tokencomp %s: default %s", tokencomp.__version__, default)

    # -- per model ------------------------------------------------------------------------------

    def layouts(self, modality: str, items: Any, hf_inputs: BatchFeature) -> list[list[VisualSpan]]:
        """Return the uncompressed spans of every item of a modality."""
        raise OptionError(f"{type(self).__name__} does not define the layout of its media.")

    def extents(self, modality: str, layouts: Any, hf_inputs: BatchFeature) -> list[int]:
        """Return the positions of every uncompressed item; 0 if the engine renumbers tokens."""
        return [0] * len(layouts)

    def check_positions(self, sizes: list[ItemSize]) -> None:
        """Refuse a request whose positions exceed the model's rotary tables."""

    def needs_pixels(self, modality: str) -> str:
        """Why the grid alone does not give the positions of an item, or ""."""
        return ""

    def shorten(self, tokens: Any, plan: ItemPlan) -> Any:
        """Tokens of a compressed item: the first placeholders of every span, and all text."""
        ids, is_embed = getattr(tokens, "full", tokens), getattr(tokens, "is_embed", None)
        media = [True] * len(ids) if is_embed is None else is_embed(ids).tolist()
        if sum(media) != plan.full:
            raise RuntimeError(
                f"{plan.modality}: the engine expects {sum(media)} tokens, the plan {plan.full}"
            )
        spans = zip(plan.spans, plan.keep, strict=True)
        # Spans 4 and 4, keep 2 and 3: placeholders x x · · x x x ·; text between them stays.
        stays = iter([i < keep for span, keep in spans for i in range(span.length)])
        ids = [
            token for token, is_media in zip(ids, media, strict=True) if not is_media or next(stays)
        ]
        return PromptUpdateDetails(ids, is_embed) if is_embed is not None else ids

    # -- options --------------------------------------------------------------------------------

    def _spec(self, kwargs: Mapping[str, Any]) -> Method:
        options = kwargs.get(KEY)
        if isinstance(options, Method | Compared):
            return options if isinstance(options, Method) else options.spec
        if options is None:
            return self._options.default
        try:
            text = json.dumps(options, sort_keys=True)
        except (TypeError, ValueError, RecursionError):  # no JSON, which `resolve` refuses
            text = ""
        known, spec = self._latest
        if not text or text != known:  # several steps of a request ask, and often many requests
            spec = handed(text) or self._options.resolve(options)
            self._check_tower(spec)
            self._latest = text, spec
        return spec

    def _check_tower(self, spec: Method) -> None:
        """Refuse a stage in the vision tower where this engine cannot run it, with the reason."""
        if spec.tower_stage is None and spec.repeats is None:
            return
        if compares(spec) and getattr(self._multimodal, "mm_encoder_only", False):
            raise OptionError(
                f"reducer {spec.built_reducer.name!r} compares the pictures of a request, and an "
                "encoder in another process gets them one by one. Use a reducer that takes a "
                "ratio, or serve without --ec-transfer-config."
            )
        reason = self.no_tower_stage
        backend = getattr(self._multimodal, "mm_encoder_attn_backend", None)
        if "FLASHINFER" in str(backend):
            reason = reason or "FlashInfer takes the bounds of sequences in a form of its own"
        if getattr(self._multimodal, "mm_encoder_tp_mode", None) == "data":
            reason = reason or "--mm-encoder-tp-mode data divides the media over several towers"
        if reason:
            asked, fix = f"tower_ratio={spec.tower_ratio}", "tower_ratio=0"
            if spec.repeats is not None:
                asked, fix = f"reducer {spec.repeats.name!r}", "a reducer that takes a ratio"
            raise OptionError(f"{asked}: {reason}. Use {fix}, or serve with `--engine hf`.")

    @property
    def _multimodal(self) -> Any:
        return self.info.ctx.model_config.multimodal_config

    @staticmethod
    def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in kwargs.items() if k != KEY}

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return uncompressed inputs for memory profiling: requests may turn compression off."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]  # of vLLM's class
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, KEY: OFF}
        return inputs

    # -- vLLM's processing steps ----------------------------------------------------------------

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request, check its options and positions, and count its tokens."""
        # Options like `max_pixels` of a request would enlarge media beyond the limits.
        others = sorted(self._plain(inputs.hf_processor_mm_kwargs))
        if others and self._options.only_own:
            raise OptionError(
                f"mm_processor_kwargs {', '.join(others)}: this server takes only {KEY!r} there."
            )
        result = super().apply(inputs, timing_ctx)  # type: ignore[misc]  # of vLLM's class
        if inputs.hf_processor_mm_kwargs.get(KEY) is not OFF:
            sizes = item_sizes(result, self._sizes)
            items = itertools.chain(*sizes.values())
            self.check_positions([size for _, size in items if size is not None])
            # The front end of `tokencomp serve` takes it out again, and counts it by role.
            result[KEY] = saved = saved_by(self._spec(inputs.hf_processor_mm_kwargs), sizes)
            if ENV_RULES not in os.environ:
                encodes = getattr(self._multimodal, "mm_encoder_only", False)
                process_metrics().count(saved, ENCODE if encodes else ALL)
        return result

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Media hashes that depend on options, weights, release and layout of rows.

        They do not depend on the limit of pixels, which the other media of a request change:
        engines in other processes get other media with an item.
        """
        spec = self._spec(inputs.hf_processor_mm_kwargs)
        kwargs = self._plain(inputs.hf_processor_mm_kwargs)
        kwargs[KEY] = {**(cache_key(spec, self._facts) if spec.active else {}), **self._layout}
        # The part of the limit of pixels differs by request, and changes no pixel of an item.
        reading = {
            modality: {name: v for name, v in options.items() if name != PIXELS}
            for modality, options in inputs.media_io_kwargs.items()
        }
        hashes = super()._get_mm_hashes(  # type: ignore[misc]  # of vLLM's class
            replace(inputs, hf_processor_mm_kwargs=kwargs, media_io_kwargs=reading)
        )
        if compares(spec):
            self._hashes = hashes = {m: chained(h) for m, h in hashes.items()}
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        """Hand on the items that caches hold, if others are compared with them."""
        kwargs = super()._get_cache_missing_processor_kwargs(  # type: ignore[misc]  # of vLLM's class
            inputs, mm_is_cached
        )
        if not compares(spec := self._spec(kwargs)):
            return kwargs
        compared = Compared(spec, inputs.mm_data_items, mm_is_cached, self._hashes)
        return {**kwargs, KEY: compared.check(MODALITIES)}

    def _kept_cells(
        self, modality: str, data: BatchFeature, hf_kwargs: Mapping[str, Any], count: int
    ) -> Sequence[list[int] | None]:
        """Return the cells that pixels keep of `count` items in `data`; None: a ratio decides."""
        options, spec = hf_kwargs.get(KEY), self._spec(hf_kwargs)
        if spec.repeats is None:
            return [None] * count
        cached, memory = list[bool](), LastKept()
        # Items in caches are not processed again, but new ones are compared with them.
        if isinstance(options, Compared) and any(options.cached[modality]):
            if (known := self._kept.after(options.earlier(modality))) is not None:
                memory = known
            else:  # the pixels of all items
                cached = [*options.cached[modality]]
                items = type(options.items)({modality: options.items[modality]})
                data = super()._apply_hf_processor_main(  # type: ignore[misc]  # of vLLM's class
                    mm_items=items, hf_kwargs=self._plain(hf_kwargs)
                )
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        processor = getattr(self.info.get_hf_processor(), f"{modality}_processor")
        config = self.info.get_hf_config().vision_config
        grids = data[f"{modality}_grid_thw"]
        std = processor.image_std
        found = item_cells(spec.repeats, modality, data[name], grids, config, std, memory)
        if isinstance(options, Compared):
            self._kept.keep(options.hashes[modality][-1], memory)
        return [cells for i, cells in enumerate(found) if not (cached and cached[i])]

    def _check_given(self, modality: str, given: Mapping[str, Any], spec: Method) -> None:
        """Refuse media that came without pixels, unless their grid is enough to plan them.

        An engine after an encoder in another process gets `given`: the grid of all items, and the
        timestamps of clips of Qwen3-VL. The encoder has stored their rows under the same media
        hash.
        """
        if f"{modality}_embeds" in given:
            if spec.active:
                raise OptionError(
                    f"precomputed {modality} embeddings cannot be compressed; send pixels, or "
                    'request {"ratio": 0}.'
                )
            return
        reason = self.needs_pixels(modality)
        if spec.repeats is not None:
            reason = reason or f"reducer {spec.repeats.name!r} decides by pixels how many it keeps"
        elif spec.active and ENV_RULES not in os.environ and os.environ.get(ENV_UNTESTED) != "1":
            reason = reason or (
                "only `tokencomp serve` compares its hash with that of the encoder "
                f"({ENV_UNTESTED}=1 tries it)"
            )
        if reason:
            raise OptionError(f"a grid of modality {modality} without pixels: {reason}. Send them.")

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        """Run the processor and add the plan of every compressed item as a field."""
        spec = self._spec(hf_kwargs)
        data = super()._apply_hf_processor_main(  # type: ignore[misc]  # of vLLM's class
            mm_items=mm_items, hf_kwargs=self._plain(hf_kwargs)
        )
        for modality in MODALITIES:
            if modality not in mm_items or not len(mm_items[modality]):
                continue
            items = mm_items[modality]
            if given := items.get_passthrough_data():
                self._check_given(modality, given, spec)
            if not spec.active:
                continue
            layouts = self.layouts(modality, items, data)
            extents = self.extents(modality, layouts, data)
            cells = self._kept_cells(modality, data, hf_kwargs, len(layouts))
            plans = [
                ItemPlan.make(spans, spec, extent, self._facts, own)
                for spans, extent, own in zip(layouts, extents, cells, strict=True)
            ]
            data[field_name(modality)] = [plan.to_tensor() for plan in plans]
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """Declare the plans as one field per item, which stays on the CPU."""
        fields = dict(
            super()._get_mm_fields_config(  # type: ignore[misc]  # of vLLM's class
                hf_inputs, self._plain(hf_processor_mm_kwargs)
            )
        )
        for modality in MODALITIES:
            if field_name(modality) in hf_inputs:
                fields[field_name(modality)] = MultiModalFieldConfig.batched(
                    modality, keep_on_cpu=True
                )
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        """Return prompt updates whose placeholders have the number that the plans keep."""
        updates = super()._get_prompt_updates(  # type: ignore[misc]  # of vLLM's class
            mm_items=mm_items,
            hf_processor_mm_kwargs=self._plain(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        return [
            self._shortened(u, out_mm_kwargs) if u.modality in MODALITIES else u for u in updates
        ]

    def _shortened(self, update: Any, out_mm_kwargs: Any) -> Any:
        full, modality = update.replacement, update.modality

        def kept(index: int) -> Any:
            tokens = full(index)
            item = out_mm_kwargs[modality][index]
            if field_name(modality) not in item:
                return tokens
            return self.shorten(tokens, ItemPlan.from_tensor(item[field_name(modality)].data))

        return replace(update, replacement=kept)
