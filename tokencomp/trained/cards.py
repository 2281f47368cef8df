"""Trained parts on disk: a safetensors file, and a JSON card that names the model it belongs to.

When weights are loaded, the architecture on their card (type, layers, hidden size) is compared with
that of the model, and so is a fingerprint of the first layer's key projection. The fingerprint
tolerates changes of dtype and light fine-tuning, but differs between checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import WeightsError
from tokencomp.storage import replace_file, write_json
from tokencomp.tokens.tokens import ModelFacts

FINGERPRINT = 16
SAME = 0.9
SAMPLES = 64  # values of every parameter that enter the hash of the weights
SUBFOLDER = "tokencomp"  # subfolder of a model folder for trained parts of that model


def model_card(model: nn.Module) -> dict[str, Any]:
    """What identifies `model`: id, type, layers, hidden size, fingerprint; plain types."""
    facts = model_facts(adapter_for(model))
    name = facts.folder
    return {
        "model_id": Path(name).name if Path(name).is_absolute() else name,
        "model_type": facts.model_type,
        "num_layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "fingerprint": facts.fingerprint(),
    }


def model_facts(adapter: Adapter) -> ModelFacts:
    """What reducers may know of the adapter's model."""
    model: Any = adapter.model
    layers: Any = adapter.layers
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # The folder or hub name; VILA models have it on the model instead of on its config.
    names = (getattr(model.config, "_name_or_path", ""), getattr(model, "name_or_path", ""))
    return ModelFacts(
        mrope=adapter.mrope,
        model_type=model.config.model_type,
        num_layers=len(layers),
        hidden_size=int(adapter.text_config.hidden_size),
        folder=str(next(filter(None, names), "")),
        # While an offloading hook keeps the weights away, their device is not known yet.
        device=torch.device("cpu") if weight.is_meta else weight.device,
        dtype=weight.dtype,
        fingerprint=lambda: fingerprint(layers[0].self_attn.k_proj),
    )


@torch.no_grad()
def fingerprint(projection: Any) -> list[float] | None:
    """Return sixteen sums of the weights with fixed random signs, scaled to norm 1.

    The result is None, which matches every model, if the weights are quantized, offloaded and not
    accessible, or not finite.
    """
    weight = _weight(getattr(projection, "base_layer", projection))
    if weight is None or not weight.is_floating_point():
        return None
    flat = weight.detach().float().cpu().flatten()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (flat.numel(),), generator=generator) * 2.0 - 1.0
    slot = torch.randint(0, FINGERPRINT, (flat.numel(),), generator=generator)
    sums = torch.zeros(FINGERPRINT).index_add_(0, slot, flat * signs)
    if not bool(sums.isfinite().all()):
        return None
    return [round(v, 5) for v in (sums / sums.norm().clamp(min=1e-12)).tolist()]


def weights_hash(model: nn.Module) -> str:
    """Return a hash of samples of every parameter.

    Training changes the hash; the device does not. Parameters that an offloading hook loads only
    for their use are left out.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if not value.is_meta:
            flat = value.detach().flatten()
            some = flat[:: max(1, flat.numel() // SAMPLES)].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _weight(layer: Any) -> Tensor | None:
    """Return the weight of a linear layer, also if an offloading hook of accelerate stores it."""
    weight: Tensor = layer.weight
    if not weight.is_meta:
        return weight
    hook = getattr(layer, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        stored = getattr(one, "weights_map", None)
        if stored is not None and "weight" in stored:
            weight = stored["weight"]
            return weight
    return None


def check_card(card: dict[str, Any], facts: ModelFacts, path: Path, train: str) -> None:
    """Refuse weights of another model, by its type, layers, hidden size and fingerprint.

    `train` is the command that makes weights for the model of the `facts`.
    """
    fields = ("model_type", "num_layers", "hidden_size")
    expected = {name: getattr(facts, name) for name in fields}
    wrong = [name for name in fields if card.get(name) != expected[name]]
    if wrong:
        differences = ", ".join(f"{k} {card.get(k)!r} instead of {expected[k]!r}" for k in wrong)
        raise WeightsError(
            f"{path} was trained for {card.get('model_id') or 'another model'}: {differences}. "
            f"Train weights for this model: {train}"
        )
    stored, actual = card.get("fingerprint"), facts.fingerprint()
    if stored and actual and sum(a * b for a, b in zip(stored, actual, strict=True)) < SAME:
        raise WeightsError(
            f"{path} was trained for another checkpoint ({card.get('model_id') or 'unnamed'}) of "
            f"the same architecture. Train weights for this one: {train}"
        )


def locate(weights: str | None, facts: ModelFacts, kind: str, train: str) -> Path:
    """The weights file of `kind`: where the user says, else in the model's folder.

    A folder is searched itself, then its subfolder `tokencomp`: serving engines load every
    safetensors file next to a model's.
    """
    name = f"{kind}.safetensors"
    folder = facts.folder
    path = Path(weights or folder)
    for file in (path, path / name, path / SUBFOLDER / name) if weights or folder else ():
        if file.is_file():
            return file
    if path.is_dir():
        path = path / name
    where = f"{path} does not exist" if weights else f"the model's folder has no {name}"
    raise WeightsError(
        f"reducer={kind!r} needs trained weights, and {where}. Train them with `{train}`, then "
        f"patch(model, reducer={kind!r}, weights='FOLDER')."
    )


def read(path: Path, kind: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file and its card, whose kind ("selector", …), if any, is `kind`.

    Raises `WeightsError` if a file is missing, damaged or of another kind, or a tensor not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = path.with_suffix(".json")
    try:
        tensors, content = load_file(path), json.loads(card.read_text(encoding="utf-8"))
        stored_kind = content.get("kind", kind)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path} and its card {card.name} cannot be read ({error}). Copy both files of a "
            "finished training run."
        ) from error
    if kind and stored_kind != kind:
        raise WeightsError(f"{path} holds a {stored_kind!r}, not a {kind!r}. Give the other file.")
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise WeightsError(f"{path}: NaN or infinity in {', '.join(broken[:3])}. Train it again.")
    return tensors, content


def content_hash(path: Path) -> str:
    """Return a hash of a weights file, which is read once for every change of it."""
    return _content_hash(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _content_hash(path: Path, modified: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def write(path: Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> Path:
    """Write both files atomically, the card last."""
    write_tensors(path, tensors)
    write_json(path.with_suffix(".json"), card)
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write one safetensors file through a temporary one."""
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return replace_file(path, lambda part: save_file(plain, part, metadata={"format": "pt"}))
