"""Released gradients: what ``p.grad`` is between the early step of ``p`` and optimizer.step()."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor


class ReleasedGradient(Tensor):
    """Stands for a gradient that was used and freed: every operation of torch on it is an error.

    With None in its place, ``clip_grad_norm_`` would clip nothing, and say nothing; a second
    backward pass would begin a new gradient.
    """

    @staticmethod
    def __new__(cls, p: Tensor) -> ReleasedGradient:
        return Tensor._make_wrapper_subclass(
            cls, p.shape, p.stride(), dtype=p.dtype, device=p.device
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "ReleasedGradient()"

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "this gradient was used by step_in_backward during backward, and freed. For a clip or "
            "a norm set max_grad_norm, and run a norm_pass(). To accumulate gradients, run all "
            "backward passes of a step but the last under accumulate(). A parameter whose gradient "
            "is needed after backward, or arrives in several parts, belongs into except_for"
        )


def is_released(gradient: Any) -> bool:
    """Whether a gradient was used and freed."""
    return isinstance(gradient, ReleasedGradient)
