"""Optimizers and the learning rate schedule: Muon for the blocks' matrices, AdamW for the rest, or AdamW alone."""

import functools
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from kernels import cpu
from kernels.cpu.bindings import muon_step
from training.config import OptimConfig
from training.distributed import local
from training.matrix_owners import by_owner


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest matrix with all singular values near 1, for a batch (N, rows, columns), in its own dtype.

    Five Newton-Schulz steps with the odd quintic of Jordan et al. 2024 ("Muon"), whose coefficients trade exactness
    for speed: singular values end between about 0.7 and 1.2. Computed in `dtype`: bf16 will do where it is fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)  # wide: the matmuls below are over the short side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # every singular value is at most 1 now
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalized update, which moves every direction of a matrix alike (Jordan et al. 2024).

    The step is scaled to a root mean square of 0.2, AdamW's usual size, whatever the shape (Liu et al. 2025, arXiv
    2502.16982, section 2.2), and weight decay is decoupled. Matrices of one shape are handled as one batch.
    torch.optim.Muon has no batches and always computes in bf16, which many CPUs only emulate. On a CPU a step is one
    call of kernels/cpu/muon.cpp, where there is a C++ compiler. Of matrices that are divided among processes
    (training/distributed.py), each is orthogonalized by one of them.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        matrices = [p for group in self.param_groups for p in group["params"]]
        self.mesh = getattr(matrices[0], "device_mesh", None)  # among which they are divided
        whole = self.mesh is None
        self.fused = whole and cpu.trains(dtype) and all(p.is_cpu and p.dtype == torch.float32 for p in matrices)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
                    if p not in self.state:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            everything = [p for params in by_shape.values() for p in params]
            if self.fused:
                buffers = [self.state[p]["momentum"] for p in everything]
                muon_step(everything, buffers, self.dtype, group["lr"], group["momentum"], group["weight_decay"])
                continue
            if self.mesh:
                ahead = [rows.to(self.dtype) for rows in self._ahead(everything, group["momentum"])]
                function = functools.partial(orthogonalize, dtype=self.dtype)
                rows = by_owner(function, ahead, [p.shape for p in everything], self.mesh)
                steps = {p: step.to(p.dtype) for p, step in zip(everything, rows, strict=True)}
            for shape, params in by_shape.items():
                if self.mesh:
                    step = [steps[p] for p in params]
                else:  # (N, rows, columns)
                    step = list(orthogonalize(torch.stack(self._ahead(params, group["momentum"])), self.dtype).unbind())
                weights = [local(p) for p in params]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, step, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _ahead(self, params: list[Tensor], momentum: float) -> list[Tensor]:
        """Update the momentum of matrices of this process, and look one step further (Nesterov)."""
        gradients = [local(p.grad) for p in params if p.grad is not None]
        buffers = [local(self.state[p]["momentum"]) for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))


def by_muon(name: str, p: Tensor, config: OptimConfig) -> bool:
    """Whether Muon takes a parameter: a matrix of a block."""
    return config.optimizer == "muon" and p.ndim == 2 and ".layers." in name


def build_optimizers(model: nn.Module, config: OptimConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The optimizers of a run. Every parameter is in exactly one group, with its name; gains have no weight decay.

    dtype: of Muon's matmuls.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [(name, p) for name, p in named if by_muon(name, p, config)]
    matrices = [(name, p) for name, p in named if p.ndim == 2 and not by_muon(name, p, config)]
    gains = [(name, p) for name, p in named if p.ndim != 2]  # and the decays and convolutions of zoo/
    if sorted(name for name, _ in muon + matrices + gains) != sorted(name for name, _ in named):
        raise AssertionError("a parameter is in no group, or in two")

    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-10, fused=True)
    built: list[torch.optim.Optimizer] = [adamw]
    if muon:
        built.append(Muon(muon, config.muon_lr, config.muon_momentum, config.weight_decay, dtype))
    for optimizer in built:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return built


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Factor on the peak learning rates at `step` (from 0) of `steps`: linear warmup, constant, linear decay to 0.

    The decay takes the last `lr_decay_frac` of all steps, so it can be decided late (Hägele et al. 2024, arXiv
    2405.18392). While the number of steps is unknown (steps = 0), it has not begun.
    """
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if steps == 0 or config.lr_decay_frac == 0:
        return rise
    return min(rise, (steps - step) / (config.lr_decay_frac * steps), 1.0)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every group to factor times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
