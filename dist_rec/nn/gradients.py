"""Gradients of several losses on the same parameters, as flat vectors: taken, compared, freed of conflicts.

For dense parameters only. Fused table optimisers update in every backward, and `torch.autograd.grad` with respect to
dense parameters runs none through the tables. Letters: L losses, P numbers in all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """(P,) float32: d loss / d parameters, 0 where the loss does not depend on one. The graph is kept."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return torch.cat([part.flatten().float() for part in parts])


def decompose(gradient: Tensor, primary: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of `gradient` along `primary` and orthogonal to it: ``(<g, p> / |p|^2) p`` and the rest, both (P,).

    The sum of the two is `gradient`, and so are their squared norms. Along a `primary` of 0 there is nothing.

    Source: C2AL, arXiv 2510.02215, equation 5, which calls the second part of the auxiliary gradient its functional
    regulariser.
    """
    square = primary @ primary
    parallel = (gradient @ primary / square.clamp(min=torch.finfo(square.dtype).tiny)) * primary
    return parallel, gradient - parallel


def without_conflicts(gradients: Tensor, generator: torch.Generator) -> Tensor:
    """(P,): the sum of L gradients, each freed of its components against the others.

    From each gradient in turn, the part along another one is taken away if it points against it; the others are gone
    through in random order. Without conflicts this is the sum of the gradients.

    Args:
        gradients: (L, P). generator: draws the orders; on the CPU.
    Source: PCGrad, Yu et al. 2020, arXiv 2001.06782, algorithm 1.
    """
    result = torch.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            # decided without looking at the value: a GPU would have to be waited for at every pair
            if j != i:
                own = torch.where(own @ gradients[j] < 0, decompose(own, gradients[j])[1], own)
        result += own
    return result


def split(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """(P,) -> one tensor in the shape of each parameter."""
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
