"""`patch` and `unpatch` for models of mlx-vlm.

All of mlx-vlm gets the embeddings of a prompt from one method of the model. The patch wraps it to
drop rows, with their positions and DeepStack features. The Qwen families keep the original
positions: `rope_deltas`, the distance between row and position of the next token, grows by the
number of dropped tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_vlm.generate.ar import BatchGenerator
from mlx_vlm.models.base import InputEmbeddingsFeatures

from tokencomp.errors import OptionError, UnsupportedCacheError, UnsupportedModelError
from tokencomp.mlx.method import MlxMethod
from tokencomp.mlx.spans import Span, find_spans
from tokencomp.mlx.weights import LayerWeights, with_weights
from tokencomp.plan.counts import budget_shares
from tokencomp.plan.options import Merging, one_amount
from tokencomp.torchlib.replace import Installed, MethodReplacement

ATTRIBUTE = "_tokencomp_handle"
EMBED, SALT = "get_input_embeddings", "_apc_semantic_hash"
PIXELS = ("pixel_values", "pixel_values_videos")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
MODELS = (*QWEN, "llava", "llava_onevision")
REUSED = (
    "the prompt continues a cache, whose rows a compressed prompt does not have one for one. Leave "
    "out prompt_cache_state and apc_manager, or use the server, whose prefix cache knows what has "
    "left."
)


def check_model(model_type: Any) -> None:
    """Refuse unsupported model types."""
    if model_type not in MODELS:
        raise UnsupportedModelError(
            f"tokencomp.mlx cannot compress models of type {model_type!r}; it can "
            f"{', '.join(MODELS)}. Run it without patch()."
        )


def patch(
    model: Any,
    ratio: float | None = None,
    reducer: str = "auto",
    *,
    budget: int | None = None,
    merge: Merging | None = None,
    **options: Any,
) -> MlxHandle:
    """Compress the visual tokens of every later prompt of a model of mlx-vlm.

    Parameters
    ----------
    model
        As `mlx_vlm.load` returns it. Its weights and config are not changed.
    ratio
        Fraction of visual tokens dropped from every image and video before the first decoder layer,
        in [0, 1); 0 = off. None: 0.5, without a budget.
    budget
        Instead of `ratio`: the largest number of visual tokens of every image and video.
    reducer
        "auto" (the default), "kcenter", "divprune", "vidcom2", "uniform" and "random" only need
        MLX. Others that only read features run through torch, if it is installed.
    merge
        As in `tokencomp.patch`: average the other tokens into kept ones, which then weigh as much
        as the tokens that they represent (True), or drop them (False). "auto" merges in videos and
        in images that keep at least a tenth. None: "auto" for the reducer "auto", else False.
    **options
        Further options of the stages (`StageOptions`), through torch, and those of the reducer.

    Returns
    -------
    MlxHandle
        Undo with `handle.remove()`, `unpatch(model)`, or by leaving a `with` block. Patching a
        patched model replaces the earlier patch.

    Raises
    ------
    UnsupportedModelError
        No model of mlx-vlm, or one of another type than `MODELS`.
    RatioError, OptionError, UnknownNameError, MissingDependencyError
        As `MlxMethod`.
    """
    if not callable(getattr(model, EMBED, None)) or not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no model of mlx-vlm. Pass what mlx_vlm.load(name) returns "
            "first; for models of transformers use tokencomp.patch."
        )
    check_model(getattr(model.config, "model_type", None))
    amount = one_amount(ratio, budget) or {"ratio": 0.5}
    return apply(model, MlxMethod(reducer, options={"merge": merge, **options}, **amount))


def apply(model: Any, method: MlxMethod) -> MlxHandle:
    """`patch` with a ready method."""
    unpatch(model)
    return MlxHandle(model, method)


def unpatch(model: Any) -> None:
    """Undo `patch(model)`, if it was called."""
    handle = vars(model).get(ATTRIBUTE)
    if handle is not None:
        handle.remove()


class MlxHandle(Installed):
    """A patch in force. Use as a context manager, or call `remove()`.

    `tokens` counts those of the last prompt with media, text among them, before compression;
    `columns` are the ones that it kept, ascending, and `sizes` how many tokens each represents.
    """

    def __init__(self, model: Any, method: MlxMethod) -> None:
        self.model, self.method = model, method
        self.tokens, self.columns = 0, np.zeros(0, dtype=np.int64)
        self.sizes = np.ones(0, dtype=np.int64)
        self._last: tuple[mx.array, np.ndarray] | None = None
        self._handles.append(MethodReplacement(model, EMBED, self._embed))
        if model.config.model_type not in QWEN:
            self._handles.append(_ColdPrefill(model.language_model))
        if method.weighs:
            self._handles.append(LayerWeights(model.language_model.model))
        vars(model)[ATTRIBUTE] = self
        _insertion.add(self)

    def remove(self) -> None:
        """Restore the model. Safe to call twice."""
        super().remove()
        _insertion.discard(self)
        if vars(self.model).get(ATTRIBUTE) is self:
            del vars(self.model)[ATTRIBUTE]

    def __repr__(self) -> str:
        how = f"{self.method.asked}, {self.method.name}"
        return f"<tokencomp.mlx.MlxHandle {how}: {self.tokens} → {len(self.columns)} tokens>"

    def _embed(
        self,
        original: Callable[..., Any],
        input_ids: Any = None,
        pixel_values: Any = None,
        **inputs: Any,
    ) -> Any:
        """The embeddings of a prompt, without dropped tokens."""
        positions = inputs.get("position_ids")
        if positions is not None and positions.shape[-1] != input_ids.shape[-1]:
            raise UnsupportedCacheError(REUSED)
        features = original(input_ids, pixel_values, **inputs)
        inputs["pixel_values"] = pixel_values
        brought = [name for name, v in inputs.items() if name in PIXELS and v is not None]
        if not brought or self.method.off:
            return self._without_media(features)
        if len(input_ids) != 1:
            raise OptionError(
                f"{len(input_ids)} prompts with media came as one array, which cannot hold rows of "
                "different lengths. Generate them one at a time, or use the server, which batches "
                "prompts itself."
            )
        ids = np.array(input_ids[0])
        spans = find_spans(self.model, ids, features.inputs_embeds[0], inputs)
        return self._compress(features, spans, len(ids))

    def _without_media(self, features: Any) -> Any:
        """A text prompt, whose rows share caches with those of prompts that merge."""
        if not self.method.weighs:
            return features
        length = features.inputs_embeds.shape[1]
        embeds = with_weights(features.inputs_embeds, np.ones(length))
        self._last = embeds, np.arange(length)
        return dataclasses.replace(features, inputs_embeds=embeds)

    def _compress(self, features: Any, spans: list[Span], length: int) -> Any:
        embeds, stays = features.inputs_embeds, np.ones(length, dtype=bool)
        sizes = np.ones(length, dtype=np.int64)
        for span, share in zip(spans, budget_shares(spans), strict=True):
            kept = self.method.kept(span, share, embeds[0, mx.array(span.columns)])
            columns = span.columns[kept.offsets]
            stays[span.columns] = False
            stays[columns] = True
            if kept.features is not None:
                embeds[0, mx.array(columns)] = kept.features
            if kept.sizes is not None:
                sizes[columns] = kept.sizes
        if self.method.weighs:
            embeds = with_weights(embeds, sizes)
        features = shortened(dataclasses.replace(features, inputs_embeds=embeds), stays)
        self.tokens, self.columns = length, np.flatnonzero(stays)
        self.sizes, self._last = sizes[stays], (features.inputs_embeds, self.columns)
        return features

    def queued(self, ids: list[int], inputs: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """A queued prompt: its ids get the length of its embeddings.

        The method becomes a part of its key in the prefix cache.
        """
        if self._last is None or inputs.get("inputs_embeds") is not self._last[0]:
            return ids, inputs
        ids, self._last = [ids[i] for i in self._last[1]], None
        if SALT in inputs:
            inputs = {**inputs, SALT: inputs[SALT] ^ self.method.salt}
        return ids, inputs


def shortened(features: InputEmbeddingsFeatures, stays: np.ndarray) -> InputEmbeddingsFeatures:
    """Embeddings and related inputs of a prompt for the kept columns (L,).

    These are embeddings (1, L, d), and in the Qwen families positions (3, 1, L), a mask of visual
    columns (1, L) and DeepStack features (visual columns, d) by layer.
    """
    index = mx.array(np.flatnonzero(stays))
    new = {"inputs_embeds": features.inputs_embeds[:, index]}
    if features.position_ids is not None:
        new["position_ids"] = features.position_ids[..., index]
        new["rope_deltas"] = features.rope_deltas + int((~stays).sum())
    if features.visual_pos_masks is not None:
        new["visual_pos_masks"] = features.visual_pos_masks[:, index]
    if features.deepstack_visual_embeds is not None:
        rows = mx.array(np.flatnonzero(stays[np.array(features.visual_pos_masks[0])]))
        new["deepstack_visual_embeds"] = [x[rows] for x in features.deepstack_visual_embeds]
    return dataclasses.replace(features, **new)


class _ColdPrefill:
    """Makes mlx-vlm compute whole prompts of a model without M-RoPE instead of continuing its
    cache.

    Before it continues a cache it asks the language model for positions, if it has any, and
    computes the whole prompt if it gets none.
    """

    def __init__(self, language_model: Any) -> None:
        self._own = vars(language_model)
        self._own.update(get_rope_index=self._refuse, _position_ids=None)

    def _refuse(self, *args: Any) -> Any:
        raise UnsupportedCacheError(REUSED)

    def remove(self) -> None:
        for name in ("get_rope_index", "_position_ids"):
            self._own.pop(name, None)


class _Insertion:
    """Replaces `BatchGenerator.insert` while models are patched: ids with shorter embeddings."""

    def __init__(self) -> None:
        self._handles: WeakSet[MlxHandle] = WeakSet()
        self._original: Callable[..., Any] | None = None

    def add(self, handle: MlxHandle) -> None:
        self._handles.add(handle)
        if self._original is None:
            self._original = original = BatchGenerator.insert

            @functools.wraps(original)
            def insert(
                batch: Any,
                prompts: Any,
                max_tokens: Any = None,
                prompt_kwargs: Any = None,
                **options: Any,
            ) -> Any:
                prompts, prompt_kwargs = self.changed(prompts, prompt_kwargs, options)
                return original(batch, prompts, max_tokens, prompt_kwargs, **options)

            BatchGenerator.insert = insert

    def discard(self, handle: MlxHandle) -> None:
        self._handles.discard(handle)
        if not self._handles and self._original is not None:
            BatchGenerator.insert, self._original = self._original, None

    def changed(self, prompts: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """A prompt with as many ids as embeddings; its padding mask, all ones, is removed."""
        if inputs is None or len(prompts) != 1:
            return prompts, inputs  # arrays of several prompts are never compressed
        ids = prompts[0].tolist() if isinstance(prompts[0], mx.array) else list(prompts[0])
        for handle in self._handles:
            own, kwargs = handle.queued(ids, inputs[0])
            if kwargs is not inputs[0] or len(own) != len(ids):
                options.pop("attention_mask", None)
                return [own], [kwargs]
        return prompts, inputs


_insertion = _Insertion()
