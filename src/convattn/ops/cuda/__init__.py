"""The kernels of `kernels.py`, in Triton, as `fused` asks for them: whole passes, in the order of `plans.py`."""

import contextlib
import functools
import importlib.util
from typing import Any

import torch

from convattn.ops.gates import Gates, Kept, Norm, Normed, Window, is_last

Tensor = torch.Tensor
Maybe = Any
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# samples are counted along a side of a grid that has no more, and places in four poolings in 32 bits
SAMPLES, POOLED = 65535, 1 << 28


def why_not_for(x: Tensor) -> str | None:
    """Why a map is not served; None where it is."""
    if x.device.type != "cuda":
        return f"it is for maps on a CUDA device, not on {x.device.type}"
    if not _there():
        return "it takes the package triton"
    if x.dtype not in DTYPES:
        return f"it is for float32, float16 and bfloat16, not for {str(x.dtype).removeprefix('torch.')}"
    if x.shape[0] > SAMPLES:
        return f"it is for batches of at most {SAMPLES:,}, not of {x.shape[0]:,}"
    if x.shape[0] * x.shape[1] >= POOLED:
        return "places in its poolings are counted in 32 bits"
    return "the map is empty" if x.numel() == 0 else None


@functools.cache
def _there() -> bool:
    """Whether Triton is there; to look takes longer than a kernel."""
    return importlib.util.find_spec("triton") is not None


class Kernels:
    """See `gates.Kernels`. Where maxima are is asked of the map again; what is kept is in how many places each is."""

    def __init__(self, x: Tensor) -> None:
        # imported where they are needed: it takes time, and Triton is not there for every system
        from convattn.ops.cuda import kernels, plans

        self.kernels, self.plans = kernels, plans
        self.device = x.device
        self.form = (x.shape[0], x.shape[1], tuple(x.shape[2:]), not x.is_contiguous(), x.device.index)

    @staticmethod
    def follows(norm: Norm | Window | None) -> bool:
        """See `gates.Kernels`."""
        if norm is None or norm.mean is None or norm.tracked is None or norm.momentum is None or not norm.training:
            return False
        for one in (norm.mean, norm.var, norm.tracked):
            if type(one) is not Tensor or not one.is_contiguous() or one.is_inference():
                return False
        return True

    @classmethod
    def at_once(
        cls, x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe, norm: Norm | None
    ) -> tuple[Tensor, Maybe, Kept, Normed | None]:
        """See `gates.Kernels`."""
        self = cls(x)
        window = gates.spatial
        tensors = {"x": x, "shortcut": shortcut, "strength": strength} | _tensors(gates, norm)
        moments = of_norm = None
        followed: list[Tensor] = []
        if window is not None:
            tensors |= {"mean": window.mean, "var": window.var}
            if window.training and window.mean is not None:
                moments = tensors["moments"] = self._empty(2)
            if self.follows(window):
                tensors["tracked"] = window.tracked
                followed += window.mean, window.var, window.tracked
        if norm is not None:
            of_norm = tensors["bn_moments"] = self._empty(2, x.shape[1])
            tensors |= {"bn_mean": norm.mean, "bn_var": norm.var}
            if self.follows(norm):
                tensors["bn_tracked"] = norm.tracked
                followed += norm.mean, norm.var, norm.tracked
        y = tensors["y"] = torch.empty_like(x)
        kept = self._run(self.plans.forward, tensors, gates, norm)
        if followed:
            # whoever has kept one for a gradient is told that it has changed
            torch.autograd.graph.increment_version(followed)
        return y, moments, Kept(together=kept), None if of_norm is None else Normed(None, of_norm, None)

    @classmethod
    def grad_at_once(
        cls,
        x: Tensor,
        dy: Tensor,
        gates: Gates,
        strength: Maybe,
        kept: Kept,
        needs_map: bool,
        norm: Norm | None,
        normed: Normed | None,
    ) -> tuple[Maybe, Maybe, tuple[Maybe, ...]]:
        """See `gates.Kernels`."""
        given = _tensors(gates, norm)
        # written in one piece, however a weight lies
        grads = {
            f"grad_{name}": torch.empty_like(one, memory_format=torch.contiguous_format)
            for name, one in given.items()
            if one is not None
        }
        if strength is not None:
            grads["grad_strength"] = torch.empty_like(strength)
        dx = torch.empty_like(x) if needs_map else None
        tensors = {"x": x, "dy": dy, "strength": strength, "dx": dx} | given | grads
        self = cls(x)
        self._run(self.plans.backward, tensors, gates, norm, kept.together)
        return dx, grads.get("grad_strength"), tuple([grads.get(f"grad_{name}") for name in given])

    def pool(self, x: Tensor, mean: bool, maximum: bool) -> Tensor:
        """Means and maxima over positions (pools, B, C)."""
        found: Tensor = self._run(self.plans.pooling, {"x": x}, Gates(None, None), None)
        found = found[: 2 * x.shape[0] * x.shape[1]].view(2, *x.shape[:2])
        return found[0 if mean else 1 : 2 if maximum else 1]

    def grad_pool(self, x: Tensor, pooled: Tensor, dpooled: Tensor) -> Tensor:
        """The gradient of the map by means and maxima (2, B, C)."""
        dx = torch.empty_like(x)
        tensors = {"x": x, "top": pooled[1].contiguous(), "dpools": dpooled, "dx": dx}
        self._run(self.plans.grad_pooling, tensors, Gates(None, None), None)
        return dx

    def _run(self, planned: Any, tensors: dict[str, Maybe], gates: Gates, norm: Norm | None, kept: Maybe = None) -> Any:
        """Compute by a plan; what is kept."""
        mlp, window, plans = gates.channel, gates.spatial, self.plans
        tensors = {name: one for name, one in tensors.items() if one is not None}
        of_mlp = of_window = of_norm = None
        if mlp is not None:
            tensors["first"], tensors["second"] = mlp.first.contiguous(), mlp.second.contiguous()
            of_mlp = plans.Mlp(mlp.pools, mlp.activation, mlp.gate, len(mlp.first))
        if window is not None:
            tensors["weight"], strides = _window(window.weight)
            sides, normed = tuple(window.weight.shape[2:]), window.mean is not None
            of_window = plans.Window(sides, strides, normed, window.training, window.eps, window.momentum or 0.0)
        if norm is not None:
            of_norm = plans.Norm(norm.training, norm.eps, norm.momentum or 0.0)
        plan = planned(plans.Form(*self.form, _kinds(tensors), of_mlp, of_window, gates.parallel, of_norm))
        tensors["kept"] = self._empty(plan.sizes["kept"] or 1) if kept is None else kept
        tensors["scratch"] = self._empty(plan.sizes["scratch"] or 1)
        with _on(self.device):
            plan.run(tensors, self.kernels)
        return tensors["kept"]

    def _empty(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=self.device)


def _kinds(tensors: dict[str, Tensor]) -> tuple[tuple[str, torch.dtype], ...]:
    return tuple([(name, one.dtype) for name, one in tensors.items()])


def _tensors(gates: Gates, norm: Norm | None) -> dict[str, Maybe]:
    """All that gradients are computed for, by name, in the order of `Gates.tensors` and `Norm.tensors`."""
    names = ["first", "first_bias", "second", "second_bias", "weight", "norm_weight", "norm_bias"]
    found = dict(zip(names, gates.tensors(), strict=True))
    return found if norm is None else found | {"bn_weight": norm.weight, "bn_bias": norm.bias}


def _window(weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A window's weight and the strides of its planes and taps."""
    if not weight.is_contiguous() and is_last(weight):
        return weight, (1, 2)
    return weight.contiguous(), (weight.shape[2:].numel(), 1)


_NOTHING = contextlib.nullcontext()


def _on(device: torch.device) -> Any:
    """The device on which Triton starts its kernels."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
