"""Binary cross-entropy with gradient surgery: on the dense parameters no cohort's gradient works against another's.

Source: PCGrad, Yu et al. 2020, arXiv 2001.06782, with the losses of the rows in the head, in the tail and in neither as
its tasks. Letters: B rows of this rank, P numbers in the arch's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.cohorts import Cohorts, CohortsConfig
from dist_rec.data.schema import Schema
from dist_rec.nn.collectives import num_ranks, total
from dist_rec.nn.gradients import gradient, split, without_conflicts
from dist_rec.nn.losses import bce_of_rows
from dist_rec.settings import Complaint


@dataclass(kw_only=True)
class Config(CohortsConfig):
    """What `objective:` takes with `name: pcgrad`."""

    seed: int = 0  # of the order in which conflicts are resolved, apart from all other random numbers

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> PCGrad:
        """The loss for the labels of `schema`; it uses no representation."""
        return PCGrad(self.found, self.seed)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `objective`."""
        yield from self.check_labels(schema)
        yield from self.check_cohorts(schema)
        if not 0 <= self.seed < 2**31:  # with the step it is the seed of a generator, an int64
            yield Complaint("seed", f"is {self.seed}; use a number >= 0 and < 2**31")


class PCGrad(nn.Module):
    """``(1/B) sum_b w_b * sum_t bce(z_bt, y_bt)``, whose gradient on the arch's parameters is PCGrad's.

    Tables (and two-layer tables' projections) get the gradient of the loss as it is: a fused optimiser updates them
    in the one backward there is. The gradients of the three losses on the arch's parameters are taken beside it, summed
    over the ranks, because surgery is not linear, and freed of conflicts; the difference to their sum, a constant
    vector delta, enters the loss as ``<theta, delta>`` less its value. So the loss keeps its value, the one backward
    gives PCGrad's gradient, and clipping and DDP see nothing unusual. Costs three more backwards through the dense
    part and one all-reduce of 3 P numbers a step.

    Attributes:
        steps: training steps so far; with the seed it gives the order of the next surgery. In every checkpoint.
    """

    steps: Tensor

    def __init__(self, cohorts: Cohorts, seed: int) -> None:
        """seed: of the order of the surgery."""
        super().__init__()
        self._cohorts, self._seed = cohorts, seed
        self._arch: list[nn.Module] = []  # in a list: its parameters are not this module's
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def bind(self, arch: nn.Module) -> None:
        """See `contract.LossTerms`."""
        self._arch = [arch]

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"bce": scalar float32}. Collective in training."""
        losses = bce_of_rows(output.predictions, batch.labels, batch.weights) / len(batch.weights)
        if not (self.training and torch.is_grad_enabled()):
            return {"bce": losses.sum()}
        parameters = [p for p in self._arch[0].parameters() if p.requires_grad]
        parts = self._cohorts.parts(batch.groups).to(losses.dtype) @ losses
        gradients = total(torch.stack([gradient(part, parameters) for part in parts])) / num_ranks()
        generator = torch.Generator().manual_seed(self._seed * 2**32 + int(self.steps))
        delta = without_conflicts(gradients, generator) - gradients.sum(dim=0)
        self.steps += 1
        linear = torch.stack([(p * d).sum() for p, d in zip(parameters, split(delta, parameters), strict=True)]).sum()
        return {"bce": losses.sum() + (linear - linear.detach())}
