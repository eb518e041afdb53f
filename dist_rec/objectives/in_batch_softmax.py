"""Softmax of each query over the items of the global batch: its own is the positive, all others are negatives.

Sources: Yao et al. 2021, arXiv 2007.12865, equation 11; the correction for how often an item is a negative: Yi et al.
2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations". Letters: B rows of this rank, W
ranks, V width of a vector, H buckets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.join import ITEM
from dist_rec.data.schema import Schema
from dist_rec.nn.gather import gather, rank
from dist_rec.nn.softmax import softmax_loss
from dist_rec.settings import Complaint


@dataclass
class Config:
    """What `objective:` takes with `name: in_batch_softmax`."""

    temperature: float = 0.07
    # leave out the other rows whose item is the row's own: they are no negatives. Equation 11 leaves them in
    mask_same_item: bool = True
    # subtract log of the item's share of all rows so far from its logit, as popular items are negatives more often
    log_q: bool = False
    half_life: float | None = None  # steps after which a row counts half in that share; nothing: all count alike
    # counters of that share, 16 bytes each on every rank; beyond as many ids several share a counter
    buckets: int = 2**22
    max_logits: int = 2**24  # logits in memory at a time, 4 bytes each; speed and memory only

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> InBatchSoftmax:
        """The loss between the representations "query" and "item"."""
        missing = {"query", "item"} - set(representation_dims)
        if missing:
            known = ", ".join(representation_dims) or "none"
            raise ValueError(f"in_batch_softmax needs representation '{min(missing)}'; the model declares: {known}")
        assert schema.items is not None
        ids = schema.sparse[schema.items.feature].num_rows
        return InBatchSoftmax(self, Shares(min(ids, self.buckets), self.half_life) if self.log_q else None)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `objective`."""
        if schema.items is None:
            yield Complaint(
                "name", "is 'in_batch_softmax', which needs to know the item of a row; declare schema.items"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            yield Complaint("temperature", f"is {self.temperature}; logits are divided by it, so it must be > 0")
        if self.half_life is not None and not self.half_life > 0:
            yield Complaint("half_life", f"is {self.half_life}; use a number of steps > 0, or leave it out")
        for key in ("buckets", "max_logits"):
            if getattr(self, key) < 1:
                yield Complaint(key, f"is {getattr(self, key)}; use at least 1")


class Shares(nn.Module):
    """A running estimate of each item's share of all rows. It is part of the checkpoint, the same on every rank.

    The share of item j is n_j / n, its rows among all rows so far, both decaying with age if there is a half-life. (The
    estimator of Yi et al. is of the steps between two occurrences, which is 1 for every item that is in most batches;
    counts keep their order at any batch size.)
    """

    counts: Tensor
    steps: Tensor
    total: Tensor
    step: Tensor

    def __init__(self, buckets: int, half_life: float | None) -> None:
        """buckets: H counters; item id i uses counter i mod H."""
        super().__init__()
        self._decay = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        self.register_buffer("counts", torch.zeros(buckets, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(buckets, dtype=torch.int64))  # at which `counts` was right
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """ids: the items of one step's rows, of all ranks; negative ones are left out."""
        # counted with a fixed shape, so that nothing has to be fetched from a GPU
        bucket = torch.where(ids >= 0, ids % len(self.counts), 0)
        once = (ids >= 0).double()
        self.step += 1
        fresh = self._now(bucket)
        self.counts[bucket] = fresh
        self.steps[bucket] = self.step
        self.counts.index_add_(0, bucket, once)  # ones: the sum does not depend on their order
        self.total.mul_(self._decay).add_(once.sum())

    @torch.no_grad()
    def log_share(self, ids: Tensor) -> Tensor:
        """The natural logarithm of the share of each id, float32; of one not seen yet as if seen once."""
        bucket = torch.where(ids >= 0, ids % len(self.counts), 0)
        seen = self._now(bucket)
        return (torch.where(seen > 0, seen, 1.0) / self.total.clamp(min=1)).log().float()

    def _now(self, bucket: Tensor) -> Tensor:
        return self.counts[bucket] * self._decay ** (self.step - self.steps[bucket]).double()


class InBatchSoftmax(nn.Module):
    """Mean over the rows of -log softmax(<query, item> / temperature), over the items of all ranks' rows.

    Each rank takes its own rows against everybody's items, which are gathered with their gradient; the divisor is B, as
    it is the same everywhere, so that the mean over ranks is one rank's loss. Rows of weight 0 are neither positives
    nor negatives.
    """

    def __init__(self, config: Config, shares: Shares | None) -> None:
        """shares: the estimate of `log_q`."""
        super().__init__()
        self._config = config
        self.shares = shares

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"in_batch_softmax": scalar float32}."""
        query, item = (output.representations[name].float() for name in ("query", "item"))
        counts = batch.weights > 0
        ids = torch.where(counts, batch.groups[ITEM], -1)
        items, everyone = gather(item), gather(ids)
        bias = torch.zeros(len(items), device=item.device)
        if self.shares is not None:
            self.shares.update(everyone)
            bias -= self.shares.log_share(everyone)
        losses = softmax_loss(
            query,
            items,
            torch.arange(len(ids), device=ids.device) + rank() * len(ids),
            temperature=self._config.temperature,
            bias=bias.masked_fill(everyone < 0, -torch.inf),
            row_ids=ids if self._config.mask_same_item else None,
            column_ids=everyone if self._config.mask_same_item else None,
            max_logits=self._config.max_logits,
        )
        # the positive of a row that does not count is left out too, so its loss is infinite
        return {"in_batch_softmax": (losses.masked_fill(~counts, 0) * batch.weights).sum() / len(ids)}
