"""Binary cross-entropy in which the rows of two cohorts weigh more, or less: sample re-weighting.

The simplest of what C2AL (arXiv 2510.02215) has to be compared with. Letters: B rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.cohorts import Cohorts, CohortsConfig
from dist_rec.data.schema import Schema
from dist_rec.nn.losses import bce_of_rows
from dist_rec.settings import Complaint


@dataclass(kw_only=True)
class Config(CohortsConfig):
    """What `objective:` takes with `name: reweighted`."""

    head: float = 2.0  # factor of the loss of rows in the head; rows in neither cohort have 1
    tail: float = 2.0
    keep_mean: bool = True  # divide by the mean factor of all rows, so that the gradients keep their size

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> Reweighted:
        """The loss for the labels of `schema`; it uses no representation."""
        cohorts = self.found
        mean = 1 + (self.head - 1) * cohorts.head_mass + (self.tail - 1) * cohorts.tail_mass
        return Reweighted(cohorts, self.head, self.tail, mean if self.keep_mean else 1.0)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `objective`."""
        yield from self.check_labels(schema)
        yield from self.check_cohorts(schema)
        for key in ("head", "tail"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                yield Complaint(key, f"is {value}; a factor of a loss must be finite and >= 0")


class Reweighted(nn.Module):
    """``(1/B) sum_b (a_c(b) / mean) * w_b * sum_t bce(z_bt, y_bt)``, with the factor a of the row's cohort, in nats."""

    def __init__(self, cohorts: Cohorts, head: float, tail: float, mean: float) -> None:
        """head, tail: the factors. mean: what all of them are divided by."""
        super().__init__()
        self._cohorts, self._head, self._tail, self._mean = cohorts, head, tail, mean

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"bce": scalar float32}, of the weighted rows."""
        head, tail = self._cohorts.masks(batch.groups)
        factors = 1 + (self._head - 1) * head + (self._tail - 1) * tail
        loss = bce_of_rows(output.predictions, batch.labels, batch.weights)
        return {"bce": (loss * factors / self._mean).sum() / len(loss)}
