"""Where a model runs, and in which precision."""

import torch


def choose(device: str | None) -> torch.device:
    """The named device; without a name the GPU where there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is the hardware's own there (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products where the hardware has them; weights and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def together(device: torch.device) -> int | None:
    """Of texts in bfloat16, how many to a batch (see `TextEncoder`): on a CPU few, since a served chart has few; any number in float32."""
    return (4 if device.type == "cpu" else 64) if has_bf16(device) else None


def on(device: torch.device, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tokens where the model is."""
    return {name: tensor.to(device) for name, tensor in tokens.items()}
