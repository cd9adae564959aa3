"""A step by DeepSpeed: several workers, ZeRO stages 0 to 3. DeepSpeed is imported in here alone, in the worker."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contracts.errors import CxrayError
from trainers.engine.plain import STATE, kept
from trainers.engine.settings import TrainerConfig

TAG = "state"
FIRST_SCALE = 2.0**16  # as PyTorch's GradScaler


class Sharded:
    """The same face as `Plain`."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        groups: Callable[[nn.Module], list[dict[str, Any]]],
        cfg: TrainerConfig,
        device: torch.device,
        micros: int,
    ) -> None:
        """micros: backward passes a step."""
        os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"  # it would look for other makes
        import deepspeed
        import deepspeed.ops

        # Where there is a compiler it would build this when first started, for half a minute: sums between CPUs through shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        settings = config(cfg, micros)
        if cfg.zero_stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=settings):
                module = build()
        else:
            module = build().to(device)
        # PyTorch's own AdamW, on every device and offloaded too: DeepSpeed's wants a compiler.
        optimizer = torch.optim.AdamW(groups(module), lr=cfg.lr, weight_decay=cfg.weight_decay)
        self.optimizer: Any
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.model = self.engine
        self.module: nn.Module = self.engine.module
        self.micros, self.done, self.cfg = micros, 0, cfg
        self.scaler = self._scaler() if cfg.precision == "fp16" and cfg.zero_stage else None

    def _scaler(self) -> Any:
        """float16's loss scale at stages 1 to 3. DeepSpeed 0.19.8 clips the gradient there while it is still scaled, and after an overflow
        never lowers the scale; told a scale from outside it does both right, and leaves it to the caller when to change it."""
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        self.optimizer.torch_autocast_gradscaler = None
        self.optimizer.override_loss_scale(FIRST_SCALE)
        return DynamicLossScaler(FIRST_SCALE, scale_window=2000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False,
                                 raise_error_at_min_scale=False)  # fmt: skip

    @property
    def scale(self) -> float:
        """What the loss is multiplied by, so that small gradients do not vanish in float16."""
        if self.scaler:
            return self.scaler.cur_scale
        at_stage_0 = self.engine.torch_autocast_z0_gradscaler
        return at_stage_0.get_scale() if at_stage_0 else 1.0

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # the task has scaled it
        self.done += 1
        if self.done < self.micros:
            self.engine.step()  # counts the micro-batch; DeepSpeed updates after the last, which is for `step` to say

    def step(self) -> float:
        assert self.done == self.micros, "a task's step must call backward once a micro-batch"
        self.done = 0
        norm = self._norm() if self.cfg.zero_stage == 0 else None
        self.engine.step()
        if self.scaler:
            self.scaler.update_scale(self.optimizer.overflow)
            self.optimizer.override_loss_scale(self.scaler.cur_scale)
        return float(norm if norm is not None else self.engine.get_global_grad_norm() or 0.0)

    def _norm(self) -> Tensor:
        """Of the gradients as they stand after the last backward; at stage 0 DeepSpeed clips by it, and does not tell it."""
        return nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]) / self.scale

    def weights(self) -> dict[str, Tensor]:
        """What trains, and the buffers, whole, on the CPU of rank 0; every rank must call it."""
        import deepspeed

        whole = {}
        for name, tensor in kept(self.module).items():
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if self.engine.global_rank == 0:
                    whole[name] = tensor.detach().cpu().clone().contiguous()
        return whole

    def save(self, folder: Path) -> None:
        at_stage_0 = self.engine.torch_autocast_z0_gradscaler
        scaler = vars(self.scaler) if self.scaler else at_stage_0.state_dict() if at_stage_0 else {}
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state={"scaler": scaler}, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        state: Any
        if (folder / STATE).exists() and not (folder / TAG).exists():  # one worker wrote it, by PyTorch alone, at stage 0
            state = torch.load(folder / STATE, map_location=self.engine.device, weights_only=True)
            self.module.load_state_dict(state["module"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            path, state = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
            if path is None:
                raise CxrayError(f"{folder}: the checkpoint is not whole; delete it, and training goes on from the one before")
        if self.scaler:
            vars(self.scaler).update(state["scaler"])
            self.optimizer.override_loss_scale(self.scaler.cur_scale)
        elif at_stage_0 := self.engine.torch_autocast_z0_gradscaler:
            at_stage_0.load_state_dict(state["scaler"])


def config(cfg: TrainerConfig, micros: int) -> dict[str, Any]:
    """What DeepSpeed is told. Clipping is always said: left out, DeepSpeed 0.19.8 clips at 1."""
    zero: dict[str, Any] = {"stage": cfg.zero_stage, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    if cfg.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(cfg.precision)
    return {
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": micros,
        "gradient_clipping": cfg.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **({"torch_autocast": {"enabled": True, "dtype": autocast}} if autocast else {}),
        "steps_per_print": 1_000_000_000,
    }
