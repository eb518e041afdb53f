"""C2AL: two heads on the shared representation that learn, in training only, the positives of two cohorts.

``y_head = y * 1[row in head]`` and ``y_tail = y * 1[row in tail]`` over all rows: the positives of every other row are
negatives of both heads, and that is the mechanism. Nothing of it is served.

Source: arXiv 2510.02215, equations 2 and 3. `dist-rec cohorts` finds the cohorts (its stage 1). Letters: B rows,
d width of the representation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode
from dist_rec.data.batch import Batch
from dist_rec.data.cohorts import Cohorts, CohortsConfig, Masks
from dist_rec.data.schema import Schema
from dist_rec.nn.mlp import MLP, widths_problem
from dist_rec.settings import Complaint, ConfigError

Members = Callable[[Mapping[str, Tensor]], Masks]
"""groups, name -> (B,) int64 -> which rows are in the head and which in the tail."""


@dataclass
class RandomCohorts:
    """The control that tells whether the cohorts matter: in their place, the same share of the group's values."""

    group: str  # rows with one value of this group are drawn together: a row id draws rows, a user id users
    seed: int = 0  # of this draw alone; who is in depends on the group's value and on nothing else


@dataclass(kw_only=True)
class Config(CohortsConfig):
    """What `auxiliary: {c2al: ...}` takes."""

    lambda_head: float = 0.1  # weight of the head's loss; 0: there is no such head
    lambda_tail: float = 0.1
    representation: str = "shared"  # of the arch
    hidden: list[int] = field(default_factory=list)  # widths of each head's hidden layers; none: logits at once
    label: str | None = None  # y; default: the cohorts' label, or the schema's only one
    head_rate: float | None = None  # share of rows with y_head = 1, at whose logit the head starts; default: the file's
    tail_rate: float | None = None
    random: RandomCohorts | None = None  # draw the rows of both cohorts instead, as a control

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> C2AL:
        """The heads; ConfigError for a representation that the arch does not have."""
        if self.representation not in representation_dims:
            text = f"is '{self.representation}', which the model does not have; known: {', '.join(representation_dims)}"
            raise ConfigError([Complaint("auxiliary.c2al.representation", text)])
        cohorts = self._drawn()
        return C2AL(
            representation_dims[self.representation],
            self.hidden,
            factors={"head": self.lambda_head, "tail": self.lambda_tail},
            rates={"head": cohorts.head_rate, "tail": cohorts.tail_rate},
            members=cohorts.masks if self.random is None else drawn(cohorts, self.random),
            representation=self.representation,
            label=list(schema.labels).index(self._label(schema)),
        )

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `auxiliary.c2al`."""
        for key in ("lambda_head", "lambda_tail"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                yield Complaint(key, f"is {value}; the weight of a loss must be finite and >= 0")
        if problem := widths_problem(self.hidden):
            yield Complaint("hidden", problem)
        if self.random is not None and self.random.group not in schema.groups:
            known = ", ".join(schema.groups) or "none"
            yield Complaint(
                "random.group", f"is '{self.random.group}', which is no group of the schema; known: {known}"
            )
        if self.random is not None and not -(2**63) <= self.random.seed < 2**63:
            yield Complaint("random.seed", f"is {self.random.seed}, which does not fit int64; use a smaller one")
        problems = list(self.check_cohorts(schema))
        yield from problems or self._check_label(schema)

    def _label(self, schema: Schema) -> str:
        """The label's name, "" where nothing says which of several it is."""
        only = next(iter(schema.labels)) if len(schema.labels) == 1 else ""
        return self.label or self.found.label or only

    def _check_label(self, schema: Schema) -> Iterator[Complaint]:
        label, known, cohorts = self._label(schema), ", ".join(schema.labels), self._drawn()
        if not label:
            yield Complaint("label", f"is needed where the schema has several labels: choose one of {known}")
        elif label not in schema.labels:
            yield Complaint("label", f"is '{label}', which is no label of the schema; known: {known}")
        elif schema.labels[label].kind != "binary":
            yield Complaint("label", f"is '{label}' of kind {schema.labels[label].kind}; C2AL needs a binary label")
        elif cohorts.label not in (None, label) and (self.head_rate is None or self.tail_rate is None):
            text = f"is '{label}', but the rates of the cohorts count '{cohorts.label}'"
            yield Complaint("label", f"{text}; set head_rate and tail_rate, or find the cohorts for '{label}'")
        for name in ("head", "tail"):
            rate = getattr(cohorts, f"{name}_rate")
            if getattr(self, f"lambda_{name}") and not 0 < rate < 1:  # a head that is off starts nowhere
                text = f"is {rate}: a head starts at its logit, so it must be > 0 and < 1"
                yield Complaint(f"{name}_rate", f"{text}; set it, or choose cohorts that have positive rows")

    def _drawn(self) -> Cohorts:
        """The cohorts with the rates that the heads start at.

        Random cohorts have no rates in the file: they are drawn at the head's and the tail's together.
        """
        cohorts = self.found
        rates = {"head_rate": cohorts.head_rate, "tail_rate": cohorts.tail_rate}
        if self.random is not None:
            mass = cohorts.head_mass + cohorts.tail_mass
            of_a_row = (cohorts.head_rate + cohorts.tail_rate) / mass if mass else 0.0
            rates = {"head_rate": of_a_row * cohorts.head_mass, "tail_rate": of_a_row * cohorts.tail_mass}
        chosen = {key: getattr(self, key) for key in rates if getattr(self, key) is not None}
        return replace(cohorts, **{**rates, **chosen})


class C2AL(nn.Module):
    """``sum_c lambda_c * (1/B) * sum_b w_b * bce(g_c(h_b), y_b * 1[b in c])`` over c = head, tail; in nats.

    The divisor and the sample weights are those of the objective `bce`. A head whose factor is 0 is not built: it has
    no parameters, draws no random numbers, and leaves the loss and every gradient as they were.

    Attributes:
        heads: name -> g_c, from the representation to one logit.
    """

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        *,
        factors: Mapping[str, float],
        rates: Mapping[str, float],
        members: Members,
        representation: str,
        label: int,
    ) -> None:
        """Heads that start from the logit of their rates.

        Args:
            width: d. hidden: widths of each head's hidden layers.
            factors, rates: "head" and "tail" -> lambda, and the share of rows that are positive for this head.
            representation: the name of h among the arch's. label: the column of y.
        """
        super().__init__()
        self.heads = nn.ModuleDict({n: _head(width, hidden, rates[n]) for n, factor in factors.items() if factor})
        self._factors, self._members = dict(factors), members
        self._representation, self._label = representation, label

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"c2al/head": scalar float32, "c2al/tail": ...}, without the heads that are off."""
        if not self.heads:
            return {}
        # in float32 under autocast too: the heads' targets are so rare that their logits lie far from 0
        h = output.representations[self._representation].float()
        labels = auxiliary_labels(batch.labels[:, self._label], self._members(batch.groups))
        terms = {}
        for name, head in self.heads.items():
            loss = nn.functional.binary_cross_entropy_with_logits(head(h).squeeze(1), labels[name], reduction="none")
            terms[f"c2al/{name}"] = self._factors[name] * (loss * batch.weights).sum() / len(loss)
        return terms


def auxiliary_labels(labels: Tensor, masks: Masks) -> dict[str, Tensor]:
    """labels: (B,) y. Returns "head" and "tail" -> (B,), y where the row is in the cohort and 0 elsewhere (eq. 2)."""
    return {"head": labels * masks.head, "tail": labels * masks.tail}


def drawn(cohorts: Cohorts, random: RandomCohorts) -> Members:
    """Members of random cohorts with the masses of `cohorts`: the share of the group's values, not of rows.

    A value's place in [0, 1) is a hash of it and of the seed: below the head's mass it is in the head, in the next
    interval of the tail's mass in the tail. So it is the same in every epoch, on every rank and in every order.
    """
    head, both = cohorts.head_mass, cohorts.head_mass + cohorts.tail_mass

    def members(groups: Mapping[str, Tensor]) -> Masks:
        place = _uniform(groups[random.group], random.seed)
        return Masks(place < head, (place >= head) & (place < both))

    return members


def _head(width: int, hidden: Sequence[int], rate: float) -> nn.Module:
    layers = MLP(width, hidden)
    last = nn.Linear(layers.out_width, 1)
    with torch.no_grad():
        last.bias.fill_(math.log(rate / (1 - rate)))
    return nn.Sequential(layers, last)


def _uniform(values: Tensor, seed: int) -> Tensor:
    """(B,) int64 -> (B,) float64 in [0, 1): the upper 53 bits of SplitMix64 of the value, moved by the seed's own."""
    x = _mixed(_mixed(torch.tensor(seed, device=values.device)) + values)
    return _shifted(x, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele et al. 2014) on int64, whose products wrap around as uint64's do."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in, which int64 does not have."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
