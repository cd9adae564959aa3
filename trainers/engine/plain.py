"""A step by PyTorch alone: one worker."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from contracts.errors import CxrayError
from trainers.engine.settings import TrainerConfig

STATE = "state.pt"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Plain:
    """A model, its AdamW, and a step: `model` for the task to call, `backward` once a micro-batch, `step` after the last."""

    def __init__(
        self, build: Callable[[], nn.Module], groups: Callable[[nn.Module], list[dict[str, Any]]], cfg: TrainerConfig, device: torch.device
    ) -> None:
        self.cfg, self.device = cfg, device
        self.module = build().to(device)
        self.optimizer = torch.optim.AdamW(groups(self.module), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        if cfg.precision != "fp32":  # of the forward pass alone, as DeepSpeed does
            self.module.forward = torch.autocast(device.type, DTYPES[cfg.precision])(self.module.forward)
        self.model = self.module

    @property
    def scale(self) -> float:
        """What the loss is multiplied by; 1 but in float16."""
        return self.scaler.get_scale()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> float:
        """Clip, update, forget the gradients. Returns the norm of the gradient before it was clipped."""
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.cfg.clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        """What trains, and the buffers, whole, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in kept(self.module).items()}

    def save(self, folder: Path) -> None:
        state = {"module": self.weights(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save(state, folder / STATE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def kept(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that train and buffers that are saved; what is frozen is what `build` makes."""
    saved = set(module.state_dict().keys())
    found = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return found | {n: b for n, b in module.named_buffers() if n in saved}


def outline(module: nn.Module) -> dict[str, list[int]]:
    """Names and whole shapes of what trains: two models with the same one can take each other's checkpoints."""
    return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters() if p.requires_grad}


def load_weights(module: nn.Module, file: Path) -> None:
    """Put trained weights into a fresh model. Raises CxrayError where they are another model's."""
    weights = load_file(file)
    wanted = kept(module)
    if {n: list(t.shape) for n, t in weights.items()} != {n: list(t.shape) for n, t in wanted.items()}:
        raise CxrayError(f"{file}: holds the weights of another model")
    module.load_state_dict(weights, strict=False)
