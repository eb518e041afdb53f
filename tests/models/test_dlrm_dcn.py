"""DLRM and DCN: what they compute, what they declare, and what their settings refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_rec.data.schema import DenseColumn, LabelColumn, Schema, SparseColumn
from dist_rec.models import dcn, dlrm

B, D = 5, 4


def make_schema(num_dense: int, num_sparse: int = 3, labels: tuple[str, ...] = ("click",)) -> Schema:
    return Schema(
        labels={name: LabelColumn() for name in labels},
        sparse={f"s{i}": SparseColumn(num_ids=10) for i in range(num_sparse)},
        dense={f"d{i}": DenseColumn() for i in range(num_dense)},
    )


def inputs(schema: Schema) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return torch.randn(B, len(schema.dense)), {"main": torch.randn(B, len(schema.sparse), D)}, {}


CONFIGS: list[Any] = [
    dlrm.Config(dim=D),
    dcn.Config(dim=D),
    dcn.Config(dim=D, structure="parallel", rank=2, dropout=0.1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["dlrm", "dcn", "dcn-parallel"])
@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("labels", [("click",), ("click", "buy")])
def test_shapes_gradients_and_declarations(config: Any, num_dense: int, labels: tuple[str, ...]) -> None:
    schema = make_schema(num_dense, labels=labels)
    assert list(config.check(schema)) == []
    (table_set,) = config.table_sets(schema)
    assert (table_set.name, table_set.features, table_set.dim) == ("main", ("s0", "s1", "s2"), D)
    arch = config.build(schema)
    dense, tables, groups = inputs(schema)
    tables["main"].requires_grad_()
    output = arch(dense, tables, groups)
    assert output.predictions.shape == (B, len(labels))
    assert {n: r.shape for n, r in output.representations.items()} == {
        n: (B, width) for n, width in arch.representation_dims.items()
    }
    output.predictions.square().sum().backward()
    assert (tables["main"].grad.abs().sum(dim=(0, 2)) > 0).all(), "a feature does not reach the logits"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in arch.parameters()), "a dead parameter"


@pytest.mark.parametrize("config", CONFIGS, ids=["dlrm", "dcn", "dcn-parallel"])
def test_same_seed_same_arch_and_no_other_generator(config: Any) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in config.build(make_schema(2)).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("config", CONFIGS, ids=["dlrm", "dcn", "dcn-parallel"])
def test_bfloat16_autocast_stays_close(config: Any) -> None:
    schema = make_schema(2)
    arch = config.build(schema).eval()
    exact = arch(*inputs(schema)).predictions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = arch(*inputs(schema)).predictions
    assert 0 < (narrow.float() - exact).abs().max() < 0.05


@pytest.mark.parametrize("num_dense", [0, 2])
def test_dlrm_equals_the_paper(num_dense: int) -> None:
    schema = make_schema(num_dense)
    arch = dlrm.Config(dim=D, bottom=[6], top=[7]).build(schema)
    dense, tables, groups = inputs(schema)
    vectors, beside = list(tables["main"].unbind(1)), []
    if num_dense:
        w1, b1, w2, b2 = arch.bottom.parameters()
        z = torch.relu(torch.relu(dense @ w1.T + b1) @ w2.T + b2)
        vectors, beside = [z, *vectors], [z]
    dots = [(vectors[i] * vectors[j]).sum(1) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    x = torch.cat([*beside, torch.stack(dots, 1)], 1)
    w, b = arch.top.parameters()
    shared = torch.relu(x @ w.T + b)
    output = arch(dense, tables, groups)
    torch.testing.assert_close(output.representations["shared"], shared)
    torch.testing.assert_close(output.predictions, shared @ arch.head.weight.T + arch.head.bias)


def test_dcn_stacked_and_parallel_wire_the_parts_differently() -> None:
    schema = make_schema(2)
    dense, tables, groups = inputs(schema)
    x0 = torch.cat([dense, tables["main"].reshape(B, -1)], 1)
    stacked = dcn.Config(dim=D).build(schema)
    torch.testing.assert_close(
        stacked(dense, tables, groups).representations["shared"], stacked.deep(stacked.cross(x0))
    )
    parallel = dcn.Config(dim=D, structure="parallel").build(schema)
    torch.testing.assert_close(
        parallel(dense, tables, groups).representations["shared"],
        torch.cat([parallel.cross(x0), parallel.deep(x0)], 1),
    )
    assert parallel.representation_dims == {"shared": 2 + 3 * D + 64}


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        (dlrm.Config(dim=0), "dim", "is 0"),
        (dlrm.Config(bottom=[8, -1]), "bottom", "-1"),
        (dlrm.Config(top=[]), "top", "is empty"),
        (dlrm.Config(dropout=1.0), "dropout", "is 1.0"),
        (dcn.Config(dim=-2), "dim", "is -2"),
        (dcn.Config(cross_layers=0), "cross_layers", "is 0"),
        (dcn.Config(dim=4, rank=14), "rank", "N = 14"),
        (dcn.Config(rank=0), "rank", "is 0"),
        (dcn.Config(deep=[]), "deep", "is empty"),
    ],
)
def test_bad_settings_are_named(config: Any, key: str, words: str) -> None:
    found = {c.key: c.text for c in config.check(make_schema(2))}
    assert words in found[key]


def test_dlrm_needs_a_pair() -> None:
    (complaint,) = dlrm.Config().check(make_schema(0, num_sparse=1))
    assert complaint.key == "name" and "'dcn'" in complaint.text
    assert list(dlrm.Config().check(make_schema(1, num_sparse=1))) == []
