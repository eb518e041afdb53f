"""Binary cross-entropy of every label, from logits: the mean over rows, or the sum of the means over groups of rows.

Letters: B rows of this rank, W ranks, T labels, S values of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from dist_rec.nn.collectives import num_ranks, total
from dist_rec.settings import Complaint, complain


@dataclass
class Config:
    """What `objective:` takes with `name: bce`."""

    label_weights: dict[str, float] = field(default_factory=dict)  # label -> factor of its loss; 1 where not named
    # group of the schema, with num_ids: the mean over each of its values, added up, so that a small domain weighs as
    # much as a large one (Crocodile, arXiv 2405.12706). Nothing: the mean over all rows
    mean_by: str | None = None

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> BCE | GroupedBCE:
        """The loss for the labels of `schema`; it uses no representation."""
        factors = [self.label_weights.get(name, 1.0) for name in schema.labels]
        return BCE(factors) if self.mean_by is None else GroupedBCE(factors, self.mean_by, schema)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `objective`."""
        if not schema.labels:
            yield Complaint("name", "is 'bce', but schema.labels is empty; name at least one label column")
        for name, label in schema.labels.items():
            if label.kind != "binary":
                text = f"is 'bce', a loss for labels 0 and 1, but label '{name}' has kind: {label.kind}"
                yield Complaint("name", f"{text}; declare it binary if it only holds 0 and 1, or choose another one")
        if self.mean_by is not None:
            yield from complain({"mean_by": schema.group_problem(self.mean_by)})
        for name, weight in self.label_weights.items():
            if name not in schema.labels:
                known = ", ".join(schema.labels)
                yield Complaint(f"label_weights.{name}", f"names no label of the schema; known: {known}")
            elif not (math.isfinite(weight) and weight >= 0):
                yield Complaint(f"label_weights.{name}", f"is {weight}; a factor of a loss must be finite and >= 0")


class BCE(nn.Module):
    """``sum_t a_t * (1/B) * sum_b w_b * bce(z_bt, y_bt)``, in nats, with the label factors a and sample weights w.

    The divisor is B, the rows of this rank's batch including padding, not the sum of the weights: B is the same on
    every rank, so that the mean over any number of ranks is exactly the loss that one rank would have computed.
    """

    factors: Tensor

    def __init__(self, factors: list[float]) -> None:
        """`factors`: a, one for each of the T labels."""
        super().__init__()
        self.register_buffer("factors", torch.tensor(factors, dtype=torch.float32), persistent=False)

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"bce": scalar float32}; under autocast too, where the logits may be narrower."""
        return {"bce": self.of_rows(output, batch).sum() / batch.labels.shape[0]}

    def of_rows(self, output: ArchOutput, batch: Batch) -> Tensor:
        """(B, T) float32: the loss of every row and label, times the label's factor and the row's weight."""
        loss = nn.functional.binary_cross_entropy_with_logits(
            output.predictions.float(), batch.labels, reduction="none"
        )
        return loss * batch.weights.unsqueeze(1) * self.factors


class GroupedBCE(BCE):
    """``sum_s (1/N_s) sum_{b in s} sum_t a_t * w_b * bce(z_bt, y_bt)`` over the values s of a group, in nats.

    N_s counts the rows of the value s in the batches of all ranks whose weight is not 0; a value without rows adds
    nothing. A rank's share is W times its own rows' part, so that the mean over ranks is the sum above.
    """

    def __init__(self, factors: list[float], group: str, schema: Schema) -> None:
        """`factors`: a, one for each of the T labels. `group`: of `schema`, with a declared number of values, S."""
        super().__init__(factors)
        self.group = group
        self.num_values = schema.num_values(group)

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"bce": scalar float32}. Collective."""
        value = batch.groups[self.group].clamp(min=0)  # -1 in padding rows, which count for nothing
        here = batch.weights.new_zeros(self.num_values).index_add(0, value, (batch.weights > 0).to(batch.weights.dtype))
        share = num_ranks() / total(here).clamp(min=1)
        return {"bce": (self.of_rows(output, batch) * share[value].unsqueeze(1)).sum()}
