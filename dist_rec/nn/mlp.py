"""Multi-layer perceptron, and the complaints about its widths that every arch shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

Activation = Literal["relu", "gelu", "silu", "tanh"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Linear, activation and dropout, once per width; the last layer is activated too.

    Attributes:
        out_width: width of the result: the last of `widths`, or `in_width` if there are none.

    Example::

        MLP(13, [64, 16])(torch.randn(8, 13)).shape  # (8, 16)
    """

    def __init__(
        self, in_width: int, widths: Sequence[int], *, activation: Activation = "relu", dropout: float = 0.0
    ) -> None:
        """Layers from `in_width` through `widths`, initialised as `nn.Linear` does.

        Args:
            in_width: columns of the input, >= 1.
            widths: columns after each layer, each >= 1; none makes this the identity.
            activation: applied after every linear layer.
            dropout: probability in [0, 1) that a unit is set to 0 in training, after each activation.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip([in_width, *widths], widths, strict=False):
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
            # An idle Dropout module would still be a layer to read past in every printed model.
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers)
        self.out_width = widths[-1] if widths else in_width

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_width). Returns (B, out_width)."""
        return self.layers(x)


def widths_problem(widths: Sequence[int], *, needed: bool = False) -> str | None:
    """What is wrong with the widths of an MLP and how to fix it, or None. `needed`: whether none is wrong too."""
    if needed and not widths:
        return "is empty; give at least one layer width"
    bad = [w for w in widths if w < 1]
    return f"is {list(widths)}; every layer width must be >= 1, {bad[0]} is not" if bad else None


def size_problem(size: int) -> str | None:
    """What is wrong with a width or a number of parts, and how to fix it, or None."""
    return None if size >= 1 else f"is {size}; use at least 1"


def dropout_problem(dropout: float) -> str | None:
    """What is wrong with a dropout probability and how to fix it, or None."""
    if math.isfinite(dropout) and 0 <= dropout < 1:
        return None
    return f"is {dropout}; a probability of dropping a unit must be >= 0 and < 1"
