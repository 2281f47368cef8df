"""The least time an op can take: bytes over bandwidth, FLOPs over peak, the larger of the two."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Data-sheet rates (dense): bytes/s, FLOP/s of bf16 tensor cores and of fp32."""

    name: str
    bandwidth: float
    tensor_flops: float
    vector_flops: float


GPUS = (
    Gpu("A100 SXM 80 GB", 2.039e12, 312e12, 19.5e12),
    Gpu("H100 SXM", 3.352e12, 989.4e12, 66.9e12),
    Gpu("H200 SXM", 4.8e12, 989.4e12, 66.9e12),
)


def floor_seconds(flops: float, size: float, tensor_cores: bool, gpu: Gpu) -> float:
    """Roofline time in seconds."""
    peak = gpu.tensor_flops if tensor_cores else gpu.vector_flops
    return max(size / gpu.bandwidth, flops / peak)


def bound(flops: float, size: float, tensor_cores: bool, gpu: Gpu) -> str:
    """``"memory"`` or ``"compute"``: which of the two the roofline time is."""
    peak = gpu.tensor_flops if tensor_cores else gpu.vector_flops
    return "memory" if size / gpu.bandwidth >= flops / peak else "compute"


def find(name: str) -> Gpu | None:
    """The entry for a device name as CUDA reports it, e.g. ``NVIDIA H100 80GB HBM3``."""
    return next((gpu for gpu in GPUS if gpu.name.split()[0] in name), None)
