"""Covariance loss: keeps the outputs of experts apart, the CovLoss of Crocodile.

Source: Crocodile, arXiv 2405.12706: ``|(O_p - mean)^T (O_q - mean)|_1 / d^2``, summed over pairs of experts. Letters:
B rows of this rank, N rows of all ranks, M experts, d their width, W ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from dist_rec.nn.collectives import num_ranks, rank, sum_over_ranks, total
from dist_rec.settings import Complaint, ConfigError

_EXPERT = re.compile(r"expert_\d+")


@dataclass
class Config:
    """What `auxiliary:` takes with the key `covariance`."""

    # factor of the loss; 0: the baseline, bit for bit. The paper finds >= 2e-5 good for the literal form, with a batch
    # of about 4096: 2e-5 * 4095 = 0.08 for the normalised one, which means the same for every batch
    alpha: float = 0.08
    # true: divided by N - 1, a covariance. false: the paper's formula, a sum over rows: it grows with the batch, and
    # for independent experts as sqrt(N)
    normalize: bool = True
    # also p = q, each expert with itself, variances included; the paper's formula is unclear
    include_self: bool = False
    rows: int | None = None  # compute it on this many random rows of the global batch; nothing: on all

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> Covariance:
        """The loss on every representation "expert_<m>" of the arch; ConfigError if it has none, or of two widths."""
        names = [name for name in representation_dims if _EXPERT.fullmatch(name)]
        known = ", ".join(f"{name} ({width})" for name, width in representation_dims.items()) or "none"
        if len({representation_dims[name] for name in names}) != 1:
            text = "needs representations expert_0, expert_1, ... of one width, which this model does not have"
            raise ConfigError([Complaint("auxiliary.covariance", f"{text}; it has: {known}")])
        return Covariance(self, names, representation_dims[names[0]])

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `auxiliary.covariance`."""
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            yield Complaint("alpha", f"is {self.alpha}; a factor of a loss must be finite and >= 0")
        if self.rows is not None and self.rows < 2:
            yield Complaint("rows", f"is {self.rows}; a covariance needs at least 2 rows, or leave it out for all")


class Covariance(nn.Module):
    """``alpha * sum_{p > q} |C_pq|_1 / d^2``, C_pq (d, d) the cross-covariance of two experts over the global batch.

    Distinct pairs, so that it is 0 for one expert; C_pq is divided by N - 1 unless `normalize` is false. Only rows of
    positive weight count, each as one row: padding is not there. It is 0 in expectation for independent experts of many
    rows only when normalised, and it can be lowered by shrinking the outputs: look at their correlation beside it.

    Over ranks: C is that of the rows of all ranks together, from M d + 1 sums and M (M - 1) / 2 d^2 products, which are
    added up over the ranks; no activation travels. Two sums and not one, because centring comes first: products of
    outputs that are not centred would lose their digits to the mean. Everything is float32, under autocast too.

    With `rows`: positions are drawn without replacement from those of the global batch, W * B of them, rank after
    rank; every rank draws the same and uses those that fall to it, and padding among them drops out. The draws follow
    from the run's seed and the number of the step, which is a buffer: a resumed run draws what it would have drawn.
    """

    step: Tensor

    def __init__(self, config: Config, names: list[str], width: int) -> None:
        """`names`: the M representations. `width`: d."""
        super().__init__()
        self.config = config
        self._names = names
        self._width = width
        if config.rows is not None:
            # auxiliaries are built with a fork of the generator, which draws the same numbers on every rank
            self._seed = int(torch.randint(2**62, ()))
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"covariance": scalar float32}, the same on every rank; {} in evaluation. Collective."""
        if not self.training:
            return {}
        with torch.autocast(batch.dense.device.type, enabled=False):
            return {"covariance": self.config.alpha * self._loss(output, batch)}

    def _loss(self, output: ArchOutput, batch: Batch) -> Tensor:
        counts = batch.weights > 0
        experts = [output.representations[name] for name in self._names]
        if self.config.alpha == 0 or not (pairs := list(self._pairs())):
            return batch.weights.new_zeros(())
        if self.config.rows is not None:
            here = self._drawn(len(counts)).to(counts.device)
            counts, experts = counts[here], [expert[here] for expert in experts]
        # (B, M d); where and not times: whatever a padding row holds, NaN too, is not there
        outputs = torch.cat([expert.float() for expert in experts], dim=1).where(counts.unsqueeze(1), 0)
        sums = total(torch.cat([outputs.sum(dim=0), counts.sum().float().view(1)]))
        number = sums[-1].clamp(min=1)
        # no gradient flows to the mean: that of C is 0, as centred rows add up to 0
        centred = (outputs - sums[:-1] / number).where(counts.unsqueeze(1), 0)
        products = torch.cat([(centred[:, p].T @ centred[:, q]).flatten() for p, q in pairs])
        loss = sum_over_ranks(products, alike=True).abs().sum() / self._width**2
        return loss / (number - 1).clamp(min=1) if self.config.normalize else loss

    def _pairs(self) -> Iterator[tuple[slice, slice]]:
        """Columns of expert p, and those of all experts that it is paired with: one product for them together."""
        d = self._width
        for p in range(len(self._names)):
            last = (p + 1) * d if self.config.include_self else p * d
            if last:
                yield slice(p * d, (p + 1) * d), slice(0, last)

    def _drawn(self, batch_size: int) -> Tensor:
        """Which of this rank's rows are in the sample of this step."""
        rng = np.random.default_rng([self._seed, int(self.step)])
        self.step += 1
        rows = min(self.config.rows or 0, batch_size * num_ranks())
        drawn = np.sort(rng.choice(batch_size * num_ranks(), rows, replace=False, shuffle=False))
        first = rank() * batch_size
        return torch.from_numpy(drawn[(drawn >= first) & (drawn < first + batch_size)] - first)
