"""Quantized weights and offloaded layers, loaded as transformers loads them.

The oracle is the same quantized model, unpatched, whose dropped columns are masked. Quantizers that
look at all rows of a call (int8 of bitsandbytes) round differently with other rows, hence their
tolerance; float32 layers on disk or in torchao's int8 leave rounding of sums alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import oracle
from support.families import FAMILIES, text
from transformers import AutoModelForImageTextToText

import tokencomp

NAMES = ("qwen2_vl", "llava_onevision")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def nf4(device: str) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    # On a CPU it packs layers whose input has a multiple of 64 features.
    narrow = [r".*\.(mlp|visual|vision_tower|multi_modal_projector)", "lm_head"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=narrow
    )
    return {"quantization_config": quantization, "device_map": device}


def int8(device: str) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": device}


def torchao(device: str) -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": device}


def quanto(device: str) -> dict[str, Any]:
    from transformers import QuantoConfig

    return {"quantization_config": QuantoConfig(weights="int8"), "device_map": device}


def offloaded(device: str) -> dict[str, Any]:
    """Half of the decoder layers on disk; the hooks of accelerate are those of two devices."""
    return {"device_map": "auto", "max_memory": {0 if device == "cuda" else device: 500_000}}


FORMATS: dict[str, tuple[str, Callable[[str], dict[str, Any]], float]] = {
    "nf4": ("bitsandbytes", nf4, 2e-2),
    "int8": ("bitsandbytes", int8, 5e-2),
    "torchao": ("torchao", torchao, 2e-5),
    "quanto": ("optimum.quanto", quanto, 2e-5),
    "disk": ("accelerate", offloaded, 2e-5),
}


def present(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_dropping_equals_masking(name: str, form: str, device: str, tmp_path: Path) -> None:
    """Also: ratio 0 and `unpatch` change no bit, and the default runs."""
    package, options, tolerance = FORMATS[form]
    if not present(package) or not present("accelerate"):
        pytest.skip(f"{package} is not installed")
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "model")
    offload = {"offload_folder": tmp_path / "offload"} if form == "disk" else {}
    model: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float32, **options(device), **offload
    ).eval()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with torch.no_grad():
        full = model(**inputs).logits
        for reducer in ("kcenter", "condiv", "fastv"):
            with tokencomp.patch(model, 0.5, reducer=reducer, merge=False) as handle:
                found = model(**inputs).logits[:, -1]
                masks = oracle.kept_columns(handle, inputs, family.layers)
                assert handle.stats.ratio > 0.4
            expected = oracle.masked_logits(model, family, inputs, masks)[:, -1]
            assert (found - expected).abs().max() < tolerance
        with tokencomp.patch(model, 0.0):
            assert torch.equal(model(**inputs).logits, full)
        with tokencomp.patch(model, 0.75):
            assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > 2
        assert torch.equal(model(**inputs).logits, full)
