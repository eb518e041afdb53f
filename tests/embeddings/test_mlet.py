"""The projection at a lookup: packing of bags, values and gradients, on tensors alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.embeddings.mlet import _LookupHooks, _Packing, _Product

TABLES = [("a", 5), ("plain", 3), ("b", 4), ("a", 5)]  # one per feature; the first and the last share one
LAYERS = {"a": (5, 2), "b": (4, 3), "elsewhere": (6, 2)}


def _hooks(dtype: torch.dtype = torch.float32) -> _LookupHooks:
    generator = torch.Generator().manual_seed(0)
    layers = {n: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for n, shape in LAYERS.items()}
    return _LookupHooks(TABLES, layers, scale=1)


def _reference(pooled: torch.Tensor, layers: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = pooled.split([width for _, width in TABLES], dim=1)
    return torch.cat([x @ layers[n] if n in layers else x for (n, _), x in zip(TABLES, parts, strict=True)], dim=1)


def test_every_feature_is_projected_by_its_tables_second_layer():
    hooks, pooled = _hooks(), torch.randn(7, 17)
    features = KeyedJaggedTensor(keys=list("wxyz"), values=torch.empty(0), lengths=torch.zeros(28, dtype=torch.int32))
    found = hooks.project(nn.Identity(), (features,), pooled)
    torch.testing.assert_close(found, _reference(pooled, dict(hooks._projections)))


@pytest.mark.parametrize("rows", [None, [[0, 3], [], [1, 2, 4], [4]]])
def test_its_gradients(rows):
    """Also of the second layer of a table that this rank does not hold: zero, and not nothing."""
    hooks = _hooks(torch.float64)
    packing = None if rows is None else _Packing.of(torch.tensor([[b in r for b in range(5)] for r in rows]).int())
    pooled = torch.randn(5 if rows is None else 3, 17, dtype=torch.float64)
    # packed bags beyond a feature's own are empty: nothing depends on what they hold
    for f, row in enumerate(rows or []):
        pooled[len(row) :, hooks._columns[f].inner] = 0
    arguments = (pooled.requires_grad_(), *hooks._projections.values())
    product = partial(_product, hooks, packing)
    assert torch.autograd.gradcheck(product, arguments)
    product(*arguments).sum().backward()
    assert torch.equal(hooks._projections["elsewhere"].grad, torch.zeros(LAYERS["elsewhere"], dtype=torch.float64))


def _product(
    hooks: _LookupHooks, packing: _Packing | None, pooled: torch.Tensor, *layers: torch.Tensor
) -> torch.Tensor:
    return _Product.apply(pooled, hooks._columns, packing, hooks._width, list(hooks._projections), *layers)


@pytest.mark.parametrize("weighted", [False, True])
def test_packing_changes_no_value(weighted):
    """Bags without ids are left out of the look-up and come back as zeros."""
    generator, names, batch = torch.Generator().manual_seed(1), list("wxyz"), 50
    lengths = torch.randint(-3, 3, (4, batch), generator=generator, dtype=torch.int32).clamp(min=0)
    lengths[1] = 0
    count = int(lengths.sum())
    features = KeyedJaggedTensor(
        keys=names,
        values=torch.randint(0, 20, (count,), generator=generator),
        weights=torch.rand(count, generator=generator) if weighted else None,
        lengths=lengths.view(-1),
    )
    configs = [EmbeddingBagConfig(name=f"{n}{f}", num_embeddings=20, embedding_dim=width, feature_names=[f])
               for (n, width), f in zip(TABLES, names, strict=True)]  # fmt: skip
    lookup, hooks = EmbeddingBagCollection(tables=configs, is_weighted=weighted), _hooks()
    expected = _reference(lookup(features).values(), dict(hooks._projections))
    (packed,) = hooks.pack(lookup, (features,))
    longest = int((lengths > 0).sum(1).max())
    assert packed.stride() == longest < batch
    assert torch.equal(packed.values(), features.values())
    assert [packed[n].lengths().sum() for n in names] == [features[n].lengths().sum() for n in names]
    found = hooks.project(lookup, (packed,), lookup(packed).values())
    assert found.shape == (batch, hooks._width)
    torch.testing.assert_close(found, expected)


def test_a_batch_with_a_feature_that_is_mostly_filled_is_not_packed():
    lengths = torch.zeros(4 * 10, dtype=torch.int32)
    lengths[-9:] = 1
    features = KeyedJaggedTensor(keys=list("wxyz"), values=torch.zeros(9, dtype=torch.long), lengths=lengths)
    assert _hooks().pack(nn.Identity(), (features,)) is None
