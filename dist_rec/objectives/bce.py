"""Binary cross-entropy of every label, from logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from dist_rec.settings import Complaint


@dataclass
class Config:
    """What `objective:` takes with `name: bce`."""

    label_weights: dict[str, float] = field(default_factory=dict)  # label -> factor of its loss; 1 where not named

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> BCE:
        """The loss for the labels of `schema`; it uses no representation."""
        return BCE([self.label_weights.get(name, 1.0) for name in schema.labels])

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `objective`."""
        if not schema.labels:
            yield Complaint("name", "is 'bce', but schema.labels is empty; name at least one label column")
        for name, label in schema.labels.items():
            if label.kind != "binary":
                text = f"is 'bce', a loss for labels 0 and 1, but label '{name}' has kind: {label.kind}"
                yield Complaint("name", f"{text}; declare it binary if it only holds 0 and 1, or choose another one")
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
        loss = nn.functional.binary_cross_entropy_with_logits(
            output.predictions.float(), batch.labels, reduction="none"
        )
        return {"bce": (loss * batch.weights.unsqueeze(1) * self.factors).sum() / batch.labels.shape[0]}
