"""The adapter of all models without a family adapter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from tokencomp.adapters.base import ENCODED, Adapter
from tokencomp.adapters.encoded import EncodedMedia, Encoding, features_of, token_counts
from tokencomp.adapters.media_call import MediaCall
from tokencomp.adapters.spans import Medium, Size, cut_media, span_of, square
from tokencomp.adapters.structure import square_side
from tokencomp.adapters.towers.base import Tower
from tokencomp.adapters.towers.packed import PackedTower
from tokencomp.tokens.spans import Modality, VisualSpan
from tokencomp.torchlib.hooks import Hooked

PACKED = ("qwen3_5", "qwen3_5_moe")
"""Model types with the vision tower of Qwen3-VL, where the patches of a token are adjacent."""


class StructuralAdapter(Adapter, Hooked):
    """Finds parts, placeholders, spans and grids by structure.

    Spans are whole media if the token count of each is known, else runs of placeholders.
    """

    # Assumed, because it is unknown: Ministral 3, for example, scales queries by position.
    layers_read_positions = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._patches = self._patches_per_side()
        self._encoded = EncodedMedia()

    @property
    def family(self) -> str:  # type: ignore[override]  # a class variable elsewhere
        return type(self.model).__name__

    def tower_layout(self) -> Tower:
        if self.model.config.model_type not in PACKED:
            return super().tower_layout()
        return PackedTower(self.body.visual, self.model.config.vision_config.patch_size)

    @property
    def encodes_now(self) -> Modality | None:
        return self._encoded.running

    def install(self) -> None:
        self.uninstall()
        self._handles.extend(self._encoded.watch(self.body))

    def uninstall(self) -> None:
        self.remove()
        self._encoded.latest = {}

    def spans(self, call: MediaCall) -> list[list[VisualSpan]]:
        modalities: set[Modality] = {modality for runs in call.runs for _, _, modality in runs}
        encodings = {modality: self.encoding(modality, call) for modality in modalities}
        media = cut_media(call.runs, {modality: e.lengths for modality, e in encodings.items()})
        if media is None:
            media = [[Medium(modality, [(a, b)]) for a, b, modality in runs] for runs in call.runs]
        sizes = {
            modality: functools.cache(partial(sizes_of, e, modality, media))
            for modality, e in encodings.items()
        }
        numbers = {modality: itertools.count() for modality in modalities}
        spans: list[list[VisualSpan]] = [[] for _ in media]
        for b, row in enumerate(media):
            for medium in row:
                size = partial(_nth, sizes[medium.modality], next(numbers[medium.modality]))
                fallback = partial(self._fallback, medium, encodings[medium.modality])
                spans[b] += span_of(medium, b, call, size, fallback)
        return spans

    def encoding(self, modality: Modality, call: MediaCall) -> Encoding:
        """Encoded media of a modality that belong to a call.

        The last encoding belongs to a call with pixels or encoded features. The source of features
        inside `inputs_embeds` is unknown.
        """
        latest = self._encoded.latest.get(modality)
        if latest is None or not self.feature_modalities(call.inputs):
            latest = self.described(modality, call)
        handed = call.inputs.get(ENCODED)
        if not isinstance(handed, Mapping) or handed.get(modality) is None:
            return latest
        lengths = token_counts(features_of(handed[modality]))
        return replace(latest, lengths=lengths) if lengths else latest

    def described(self, modality: Modality, call: MediaCall) -> Encoding:
        """Sizes of media that the body did not encode, from arguments of the call."""
        grids = call.inputs.get(f"{modality}_grid_thw")  # (t, h, w) in patches
        side = getattr(getattr(self.config, "vision_config", None), "spatial_merge_size", None)
        if grids is None or side is None:
            return Encoding()
        return Encoding((grids.prod(-1) // side**2).tolist(), [grids])

    def _fallback(self, medium: Medium, encoding: Encoding) -> tuple[int, int, int] | None:
        """The grid of a medium if neither positions nor an image size give it."""
        start, stop = medium.pieces[0]
        return (1, *encoding.map) if encoding.map else square(stop - start, self._patches)

    def _patches_per_side(self) -> int | None:
        """Patches per side of the vision tower's input; None if it is not square."""
        vision = getattr(self.config, "vision_config", None)
        if vision is None or learned_queries(self.body):
            return None
        image, patch = (square_side(getattr(vision, n, None)) for n in ("image_size", "patch_size"))
        return image // patch if image and patch else None


def sizes_of(encoding: Encoding, modality: Modality, media: list[list[Medium]]) -> list[Size]:
    """Sizes of all media of a modality, in the order of the batch; empty if unknown.

    Beam search repeats the samples of a batch after encoding, copies of a sample being adjacent.
    """
    known, order, cursor = encoding.sizes, [], 0
    counts = [sum(medium.modality == modality for medium in row) for row in media]
    copies, rest = divmod(sum(counts), len(known) or 1)
    if not known or rest or len(counts) % copies:
        return []
    for count in counts[::copies]:
        order += known[cursor : cursor + count] * copies
        cursor += count
    return order if len(order) == sum(counts) else []


def _nth(sizes: Callable[[], list[Size]], number: int) -> Size | None:
    known = sizes()
    return known[number] if known else None


def learned_queries(body: nn.Module) -> bool:
    """Whether image tokens come from learned queries, which have no grid."""
    names = {name.rsplit(".", 1)[-1] for name, _ in body.named_parameters()}
    tables = {
        name.rsplit(".", 1)[-1]
        for name, module in body.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return bool(names & {"query", "queries", "latents", "query_tokens"}) or any(
        name.startswith("query") for name in tables
    )
