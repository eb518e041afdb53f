"""DHEN: what its layers compute, what it declares, and what its settings refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_rec.data.schema import DenseColumn, LabelColumn, Schema, SparseColumn
from dist_rec.models.dhen import Config

B, D = 5, 4
EVERY: list[Any] = ["attention_fm", "dot", "cross", "linear"]


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
    Config(dim=D),
    Config(dim=D, layers=[EVERY], ensemble="concat", rank=3, dropout=0.1),
    Config(dim=D, layers=[EVERY, ["dot"], ["attention_fm"]], gram="dimensions", attention_hidden=[], bottom=[]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "concat", "gram"])
@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("labels", [("click",), ("click", "buy")])
def test_shapes_gradients_and_declarations(config: Config, num_dense: int, labels: tuple[str, ...]) -> None:
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
    assert all(p.grad is not None and p.grad.norm() > 1e-6 for p in arch.parameters()), "a dead parameter"


def test_same_seed_same_arch_and_no_other_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in CONFIGS[1].build(make_schema(2)).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_bfloat16_autocast_stays_close() -> None:
    schema = make_schema(2)
    arch = Config(dim=D, layers=[EVERY, EVERY]).build(schema).eval()
    exact = arch(*inputs(schema)).predictions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = arch(*inputs(schema)).predictions
    assert 0 < (narrow.float() - exact).abs().max() < 0.05


@pytest.mark.parametrize("ensemble", ["sum", "concat"])
def test_a_layer_is_the_norm_of_ensemble_and_residual(ensemble: Any) -> None:
    schema = make_schema(2)  # M = 4
    arch = Config(dim=D, layers=[EVERY, ["linear"]], ensemble=ensemble, bottom=[]).build(schema)
    dense, tables, groups = inputs(schema)
    x = torch.cat([torch.relu(arch.bottom.layers[0](dense))[:, None], tables["main"]], 1)
    attention, dot, cross, linear = arch.layers[0].interactions.values()
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    dots = torch.stack([(x[:, i] * x[:, j]).sum(1) for i, j in pairs], 1)
    flat = x.flatten(1)
    w, b = cross.cross.parameters()
    parts = [
        attention(x),  # held to its formula in tests/nn/test_attention_fm.py
        (dots @ dot.fm.weight.T + dot.fm.bias).view(B, 4, D),
        (flat * (flat @ w.reshape(16, 16).T + b.flatten()) + flat).view(B, 4, D),
        torch.einsum("nm,bmd->bnd", linear.linear.weight, x),
    ]
    if ensemble == "concat":
        mix = arch.layers[0].mix
        combined = torch.einsum("nm,bmd->bnd", mix.weight, torch.cat(parts, 1))
    else:
        combined = sum(parts)
    x1 = torch.nn.functional.layer_norm(combined + x, (D,))
    torch.testing.assert_close(arch.layers[0](x), x1)
    output = arch(dense, tables, groups)
    torch.testing.assert_close(output.representations["shared"], arch.top(arch.layers[1](x1).flatten(1)))


def test_each_layer_has_the_modules_it_names_and_diagnostics_find_them_by_name() -> None:
    arch = Config(dim=D, layers=[["dot", "attention_fm"], ["cross"], ["linear", "attention_fm"]]).build(make_schema(2))
    assert [list(layer.interactions) for layer in arch.layers] == [
        ["dot", "attention_fm"],
        ["cross"],
        ["linear", "attention_fm"],
    ]
    of_layer = [
        [n for n, _ in arch.named_parameters() if part in n.split(".")]
        for part in ("attention", "post_attention", "fm")
    ]
    assert [len(names) for names in of_layer] == [2 * 4, 2, 2]


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        (Config(dim=0), "dim", "is 0"),
        (Config(dim=1), "dim", "is 1; a layer norms every feature over its columns"),
        (Config(layers=[]), "layers", "is empty"),
        (Config(layers=[["dot"], []]), "layers[1]", "is []"),
        (Config(layers=[["dot", "dot"]]), "layers[0]", "different"),
        (Config(attention_columns=0), "attention_columns", "is 0"),
        (Config(attention_hidden=[0]), "attention_hidden", "0 is not"),
        (Config(dim=4, rank=16), "rank", "M * D = 16"),
        (Config(top=[]), "top", "is empty"),
        (Config(bottom=[-1]), "bottom", "-1"),
        (Config(dropout=1.0), "dropout", "is 1.0"),
    ],
)
def test_bad_settings_are_named(config: Config, key: str, words: str) -> None:
    found = {c.key: c.text for c in config.check(make_schema(2))}
    assert words in found[key]


def test_dot_needs_a_pair() -> None:
    config = Config(layers=[["linear"], ["dot"]])
    (complaint,) = config.check(make_schema(0, num_sparse=1))
    assert complaint.key == "layers" and "'dot'" in complaint.text
    assert list(config.check(make_schema(1, num_sparse=1))) == []
