"""GroupDRO: the loss of the cohort that fares worst, by weights that grow with each cohort's loss.

Source: Sagawa et al. 2020, arXiv 1911.08731, algorithm 1 (online optimisation). The groups are the rows in the head, in
the tail, and in neither. Letters: B rows of this rank, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.cohorts import PARTS, Cohorts, CohortsConfig
from dist_rec.data.schema import Schema
from dist_rec.nn.collectives import num_ranks, total
from dist_rec.nn.losses import bce_of_rows
from dist_rec.settings import Complaint


@dataclass(kw_only=True)
class Config(CohortsConfig):
    """What `objective:` takes with `name: group_dro`."""

    step_size: float = 0.01  # eta_q: how fast a group's weight follows its loss; 0: the mean of the groups' losses

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> GroupDRO:
        """The loss for the labels of `schema`; it uses no representation."""
        return GroupDRO(self.found, self.step_size)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `objective`."""
        yield from self.check_labels(schema)
        yield from self.check_cohorts(schema)
        if not (math.isfinite(self.step_size) and self.step_size >= 0):
            yield Complaint("step_size", f"is {self.step_size}; use a finite number >= 0")


class GroupDRO(nn.Module):
    """``sum_g q_g * l_g`` with ``q_g <- q_g * exp(step_size * l_g)``, normalised, before each training step's loss.

    l_g is the weighted mean BCE of the group's rows in the batches of all ranks; a group without a row there adds
    nothing and keeps its weight up to the normalisation. The gradient goes through the losses and not through q.

    Attributes:
        log_weights: (3,) natural logarithms of q, in every checkpoint. Of a group that has long been the easiest, q is
            too small for a float32, and from 0 it would never come back. Each q starts at 1/3.
    """

    log_weights: Tensor

    def __init__(self, cohorts: Cohorts, step_size: float) -> None:
        """step_size: eta_q."""
        super().__init__()
        self._cohorts, self._step_size = cohorts, step_size
        self.register_buffer("log_weights", torch.full((len(PARTS),), -math.log(len(PARTS))))

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"group_dro/head": scalar float32, "group_dro/tail": ..., "group_dro/rest": ...}. Collective."""
        inside = self._cohorts.parts(batch.groups).to(batch.weights.dtype)
        sums = inside @ bce_of_rows(output.predictions, batch.labels, batch.weights)
        both = total(torch.stack([sums.detach(), inside @ batch.weights]))
        size = torch.where(both[1] > 0, both[1], 1)  # of a group without rows, whose sum is 0
        if self.training:
            self.log_weights.copy_(torch.log_softmax(self.log_weights + self._step_size * both[0] / size, dim=0))
        terms = self.log_weights.exp() * sums * num_ranks() / size
        return {f"group_dro/{name}": term for name, term in zip(PARTS, terms, strict=True)}
