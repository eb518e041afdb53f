"""The multi-domain archs: what all of them promise, and each against its formula written out row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_rec.config import from_mapping
from dist_rec.data.schema import DenseColumn, GroupColumn, LabelColumn, Schema, SparseColumn
from dist_rec.models import crocodile, me_mmoe, me_ple, mmoe, pepnet, ple, shared_bottom, star, stem
from dist_rec.nn.domains import DomainLinear
from dist_rec.settings import ConfigError

B, D, S = 9, 4, 3
DOMAIN = torch.tensor([0, 2, 1, 0, 2, 2, 0, 1, 0])
FEATURES = ("user", "item", "domain")

CONFIGS: dict[str, Any] = {
    "shared_bottom": shared_bottom.Config(dim=D, bottom=[6, 5], towers=[4]),
    "mmoe": mmoe.Config(dim=D, num_experts=3, experts=[6, 5], towers=[4]),
    "me_mmoe": me_mmoe.Config(dim=D, num_experts=3, experts=[6, 5], towers=[4]),
    "ple": ple.Config(dim=D, levels=2, own=2, experts=[6, 5], towers=[4]),
    "cgc": ple.Config(dim=D, levels=1, shared=2, experts=[6, 5], towers=[4]),
    "me_ple": me_ple.Config(dim=D, shared=2, experts=[6, 5], towers=[4]),
    "stem": stem.Config(dim=D, experts=[6, 5], towers=[4]),
    "pepnet": pepnet.Config(
        domain_features=["domain"], prior=["user", "item"], dim=D, prior_dim=3, widths=[6, 5], gate_hidden=7
    ),
    "star": star.Config(dim=D, widths=[6, 5], auxiliary=[4]),
    "crocodile": crocodile.Config(prior=list(FEATURES), dim=D, prior_dim=3, num_experts=3, experts=[6, 5], towers=[4]),
    "crocodile-no-peg": crocodile.Config(prior=[], gate="expert", dim=D, experts=[6, 5], towers=[]),
    "crocodile-single-set": crocodile.Config(
        prior=["user", "item"], dim=D, prior_dim=2, num_experts=2, single_set=True, experts=[6, 5], towers=[]
    ),
}
BY_DOMAIN = [name for name in CONFIGS if name != "pepnet"]
"""Those with parameters for each domain; PEPNet knows the domain by its features."""


def make_schema(num_dense: int = 2, labels: tuple[str, ...] = ("click",), group: GroupColumn | None = None) -> Schema:
    return Schema(
        labels={name: LabelColumn() for name in labels},
        sparse={name: SparseColumn(num_ids=10) for name in FEATURES},
        dense={f"d{i}": DenseColumn() for i in range(num_dense)},
        groups={"domain": group or GroupColumn("domain", num_ids=S)},
    )


def inputs(config: Any, schema: Schema, rows: int = B) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    dense = torch.randn(rows, len(schema.dense))
    tables = {s.name: torch.randn(rows, len(s.features), s.dim) for s in config.table_sets(schema)}
    return dense, tables, {"domain": DOMAIN[:rows]}


def build(name: str, **more: Any) -> tuple[nn.Module, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """An arch in evaluation mode with its inputs."""
    schema = make_schema(**more)
    torch.manual_seed(0)
    arch = CONFIGS[name].build(schema).eval()
    return (arch, *inputs(CONFIGS[name], schema))


def each_row() -> Iterator[tuple[int, int]]:
    return ((b, int(s)) for b, s in enumerate(DOMAIN))


def tower(towers: nn.Module, s: int, x: Tensor) -> Tensor:
    for layer in towers.deep.layers:
        x = torch.relu(layer.weight[s] @ x + layer.bias[s])
    return towers.head.weight[s] @ x + towers.head.bias[s]


def mlp(layers: nn.ModuleList, s: int, x: Tensor) -> Tensor:
    """The MLP of domain s."""
    for layer in layers:
        x = torch.relu(layer.weight[s] @ x + layer.bias[s])
    return x


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("labels", [("click",), ("click", "buy")])
def test_shapes_gradients_and_declarations(name: str, num_dense: int, labels: tuple[str, ...]) -> None:
    config, schema = CONFIGS[name], make_schema(num_dense, labels)
    assert list(config.check(schema)) == []
    torch.manual_seed(0)
    arch = config.build(schema)
    dense, tables, groups = inputs(config, schema)
    for rows in tables.values():
        rows.requires_grad_()
    output = arch(dense, tables, groups)
    assert output.predictions.shape == (B, len(labels))
    assert "shared" in arch.representation_dims
    assert {n: r.shape for n, r in output.representations.items()} == {
        n: (B, width) for n, width in arch.representation_dims.items()
    }
    output.predictions.square().sum().backward()
    for set_name, rows in tables.items():
        assert (rows.grad.abs().sum(dim=(0, 2)) > 0).all(), f"a feature of {set_name} does not reach the logits"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in arch.parameters()), "a dead parameter"


@pytest.mark.parametrize("name", CONFIGS)
def test_same_seed_same_arch_and_no_other_generator(name: str) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in CONFIGS[name].build(make_schema()).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_autocast_stays_close(name: str) -> None:
    arch, *rest = build(name)
    arch.train()
    exact = arch(*rest).predictions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = arch(*rest).predictions
    assert 0 < (narrow.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_do_not_see_each_other_in_evaluation_and_order_does_not_matter(name: str) -> None:
    arch, dense, tables, groups = build(name)
    whole = arch(dense, tables, groups).predictions
    order = torch.randperm(B)
    turned = {n: rows[order] for n, rows in tables.items()}
    torch.testing.assert_close(arch(dense[order], turned, {"domain": DOMAIN[order]}).predictions, whole[order])
    first = arch(dense[:2], {n: rows[:2] for n, rows in tables.items()}, {"domain": DOMAIN[:2]}).predictions
    torch.testing.assert_close(first, whole[:2])


@pytest.mark.parametrize("name", BY_DOMAIN)
def test_a_domain_alone_trains_no_other_domains_parameters_and_all_shared_tables(name: str) -> None:
    arch, dense, tables, _ = build(name)
    arch.train()
    for rows in tables.values():
        rows.requires_grad_()
    s, others = 1, [0, 2]
    output = arch(dense, tables, {"domain": torch.full((B,), s)})
    output.predictions.square().sum().backward()
    # the experts of all domains at an inner level of PLE feed its shared ones: that is the method
    own = [(n, p) for n, p in arch.named_parameters() if p.dim() > 1 and len(p) == S and "levels.0.own" not in n]
    if name == "ple":
        own = [(n, p) for n, p in own if "levels.0.gates" not in n]
    assert any("tower" in n or "head" in n for n, _ in own)
    for parameter_name, p in own:
        assert (p.grad[others] == 0).all(), f"{parameter_name} of another domain"
        assert p.grad[s].abs().sum() > 0, parameter_name
    for set_name, rows in tables.items():
        reached = rows.grad.abs().sum() > 0
        assert reached == (not set_name.startswith("domain_") or set_name == f"domain_{s}"), set_name


@pytest.mark.parametrize("name", BY_DOMAIN)
def test_the_group_and_what_it_lacks_are_named(name: str) -> None:
    config = CONFIGS[name]
    (unknown,) = config.check(make_schema(group=GroupColumn("domain")))
    assert unknown.key == "domain" and "set schema.groups.domain.num_ids" in unknown.text
    schema = make_schema()
    schema.groups = {"city": GroupColumn("city")}
    (missing,) = config.check(schema)
    assert missing.key == "domain" and "no group of the schema; known: city" in missing.text


@pytest.mark.parametrize("name", BY_DOMAIN)
def test_a_reserved_value_is_one_more_domain(name: str) -> None:
    schema = make_schema(group=GroupColumn("domain", num_ids=S - 1, out_of_range="reserved"))
    arch = CONFIGS[name].build(schema)
    output = arch(*inputs(CONFIGS[name], schema))
    assert output.predictions.shape == (B, 1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"dim": 0}, "dim", "is 0; use at least 1"),
        ({"prior_dim": -1}, "prior_dim", "is -1"),
        ({"dropout": 1.0}, "dropout", "is 1.0"),
        ({"num_experts": 0}, "num_experts", "is 0"),
        ({"experts": []}, "experts", "is empty"),
        ({"bottom": []}, "bottom", "is empty"),
        ({"widths": []}, "widths", "is empty"),
        ({"towers": [3, 0]}, "towers", "0 is not"),
        ({"auxiliary": [0]}, "auxiliary", "0 is not"),
        ({"levels": 0}, "levels", "is 0"),
        ({"own": 0}, "own", "is 0"),
        ({"shared": 0}, "shared", "is 0"),
        ({"gate_hidden": 0}, "gate_hidden", "is 0"),
        ({"prior": ["usr"]}, "prior", "'usr', which is no sparse feature of the schema; known: user, item, domain"),
        ({"prior": ["user", "user"]}, "prior", "names 'user' twice"),
        ({"domain_features": []}, "domain_features", "is empty"),
    ],
)
def test_bad_settings_are_named(name: str, changes: dict[str, Any], key: str, words: str) -> None:
    config = CONFIGS[name]
    if not hasattr(config, key):
        return
    (found,) = type(config)(**{**vars(config), **changes}).check(make_schema())
    assert found.key == key and words in found.text


def test_shared_bottom_equals_its_formula() -> None:
    arch, dense, tables, groups = build("shared_bottom")
    x = torch.cat([dense, tables["main"].reshape(B, -1)], 1)
    shared = arch.bottom(x)
    output = arch(dense, tables, groups)
    torch.testing.assert_close(output.representations["shared"], shared)
    for b, s in each_row():
        torch.testing.assert_close(output.predictions[b], tower(arch.towers, s, shared[b]))


def gated(arch: nn.Module, xs: list[Tensor], r: Tensor) -> list[Tensor]:
    """Logits of experts on `xs`, mixed by gates on `r`, element-wise if they are wide enough."""
    mixture, logits = arch.mixture, []
    experts = torch.stack([e(x) for e, x in zip(mixture.experts.experts, xs, strict=True)], 1)
    for b, s in each_row():
        gate = (mixture.gates.weight[s] @ r[b] + mixture.gates.bias[s]).view(len(xs), -1)
        logits.append(tower(mixture.towers, s, (torch.softmax(gate, 0) * experts[b]).sum(0)))
    return logits


@pytest.mark.parametrize("name", ["mmoe", "me_mmoe", "crocodile", "crocodile-no-peg", "crocodile-single-set"])
def test_mixtures_of_experts_equal_their_formulas(name: str) -> None:
    arch, dense, tables, groups = build(name)
    sets = [rows for n, rows in tables.items() if n != "prior"]
    xs = [torch.cat([dense, rows.reshape(B, -1)], 1) for rows in sets]
    r = tables["prior"].reshape(B, -1) if "prior" in tables else torch.cat(xs, 1)
    xs = xs * {"mmoe": 3, "crocodile-single-set": 2}.get(name, 1)
    wide = {"crocodile": 3 * 5, "crocodile-no-peg": 2, "crocodile-single-set": 2 * 5}.get(name, 3)
    assert arch.mixture.gates.weight.shape[1] == wide
    for found, wanted in zip(arch(dense, tables, groups).predictions, gated(arch, xs, r), strict=True):
        torch.testing.assert_close(found, wanted)


def test_crocodile_without_peg_is_me_mmoe() -> None:
    arch, dense, tables, groups = build("crocodile-no-peg")
    other = me_mmoe.Config(dim=D, num_experts=2, experts=[6, 5], towers=[])
    assert other.table_sets(make_schema()) == CONFIGS["crocodile-no-peg"].table_sets(make_schema())
    twin = other.build(make_schema())
    twin.load_state_dict(arch.state_dict())
    assert torch.equal(twin(dense, tables, groups).predictions, arch(dense, tables, groups).predictions)


def test_crocodile_with_one_set_is_shared_bottom() -> None:
    schema = make_schema()
    one = crocodile.Config(prior=list(FEATURES), dim=D, num_experts=1, experts=[6, 5], towers=[4]).build(schema)
    plain = CONFIGS["shared_bottom"].build(schema)
    plain.bottom.load_state_dict(one.mixture.experts.experts[0].state_dict())
    plain.towers.load_state_dict(one.mixture.towers.state_dict())
    config = crocodile.Config(prior=list(FEATURES), dim=D, num_experts=1, experts=[6, 5], towers=[4])
    dense, tables, groups = inputs(config, schema)
    mine, theirs = one(dense, tables, groups), plain(dense, {"main": tables["expert_0"]}, groups)
    torch.testing.assert_close(mine.predictions, theirs.predictions)


def test_ple_walks_through_its_levels() -> None:
    arch, dense, tables, groups = build("ple")
    x = torch.cat([dense, tables["main"].reshape(B, -1)], 1)
    first, last = arch.levels
    output = arch(dense, tables, groups)
    for b, s in each_row():
        of = [[mlp(e.layers, r, x[b]) for e in first.own] for r in range(S)]
        common = first.shared.experts[0](x[b])
        gate = torch.softmax(first.gates.weight[s] @ x[b] + first.gates.bias[s], 0)
        own = (gate[:, None] * torch.stack([*of[s], common])).sum(0)
        gate = torch.softmax(first.shared_gate(x[b]), 0)
        shared = (gate[:, None] * torch.stack([e for es in of for e in es] + [common])).sum(0)
        experts = [mlp(e.layers, s, own) for e in last.own] + [last.shared.experts[0](shared)]
        gate = torch.softmax(last.gates.weight[s] @ own + last.gates.bias[s], 0)
        mixed = (gate[:, None] * torch.stack(experts)).sum(0)
        torch.testing.assert_close(output.representations["shared"][b], mixed)
        torch.testing.assert_close(output.predictions[b], tower(arch.towers, s, mixed))


def test_me_ple_reads_the_domains_set_and_the_shared_ones() -> None:
    arch, dense, tables, groups = build("me_ple")
    assert list(tables) == ["shared_0", "shared_1", "domain_0", "domain_1", "domain_2"]
    output, level = arch(dense, tables, groups), arch.extraction
    for b, s in each_row():
        own = torch.cat([dense[b], tables[f"domain_{s}"][b].flatten()])
        experts = [mlp(level.own[0].layers, s, own)]
        experts += [level.shared.experts[m](torch.cat([dense[b], tables[f"shared_{m}"][b].flatten()])) for m in (0, 1)]
        gate = torch.softmax(level.gates.weight[s] @ own + level.gates.bias[s], 0)
        mixed = (gate[:, None] * torch.stack(experts)).sum(0)
        torch.testing.assert_close(output.predictions[b], tower(arch.towers, s, mixed))


def test_stem_reads_all_experts() -> None:
    arch, dense, tables, groups = build("stem")
    output = arch(dense, tables, groups)
    for b, s in each_row():
        rows = {n: rows[b].flatten() for n, rows in tables.items()}
        experts = [arch.shared(torch.cat([dense[b], rows["shared"]]))]
        experts += [mlp(arch.experts.layers, r, torch.cat([dense[b], rows[f"domain_{r}"]])) for r in range(S)]
        gate_input = torch.cat([dense[b], rows[f"domain_{s}"] + rows["shared"]])
        gate = torch.softmax(arch.gates.weight[s] @ gate_input + arch.gates.bias[s], 0)
        torch.testing.assert_close(output.predictions[b], tower(arch.towers, s, gate @ torch.stack(experts)))
        for m, expert in enumerate(experts):
            torch.testing.assert_close(output.representations[f"expert_{m}"][b], expert)


def test_pepnet_scales_embeddings_and_layers() -> None:
    arch, dense, tables, groups = build("pepnet", labels=("click", "buy"))
    x0 = torch.cat([dense, tables["main"].reshape(B, -1)], 1)
    x = x0 * arch.domain_gate(torch.cat([tables["domain"].reshape(B, -1), x0], 1))
    factors = arch.prior_gate(torch.cat([tables["prior"].reshape(B, -1), x], 1))
    output, width = arch(dense, tables, groups), x.shape[1]
    assert factors.shape[1] == 2 * (width + 6 + 5)
    for label in range(2):
        h, at = x, label * (width + 6 + 5)
        for i, size in enumerate([width, 6, 5]):
            layer = arch.layers[3 * label + i]
            h = (factors[:, at : at + size] * h) @ layer.weight.T + layer.bias
            h = torch.relu(h) if i < 2 else h
            at += size
        torch.testing.assert_close(output.predictions[:, label], h[:, 0])
    torch.testing.assert_close(output.representations["shared"], x)


def test_pepnets_gates_do_not_train_what_they_read_of_the_embeddings() -> None:
    arch, dense, tables, groups = build("pepnet")
    tables["main"].requires_grad_()
    x0 = torch.cat([dense, tables["main"].flatten(1)], 1)
    gate = arch.domain_gate(torch.cat([tables["domain"].flatten(1), x0.detach()], 1))
    upstream = torch.randn_like(x0)
    (found,) = torch.autograd.grad(arch(dense, tables, groups).representations["shared"], tables["main"], upstream)
    torch.testing.assert_close(found.flatten(1), (upstream * gate)[:, 2:])


def test_star_multiplies_shared_and_own_weights() -> None:
    arch, dense, tables, groups = build("star")
    torch.manual_seed(2)
    with torch.no_grad():
        for p in arch.parameters():
            p.copy_(torch.randn_like(p))
        for buffer in arch.buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    x, norm = torch.cat([dense, tables["main"].reshape(B, -1)], 1), arch.normalize
    output = arch(dense, tables, groups)
    for b, s in each_row():
        h = (x[b] - norm.mean[s]) / torch.sqrt(norm.variance[s] + 1e-5)
        h = norm.scale * norm.domain_scale[s] * h + norm.shift + norm.domain_shift[s]
        for layer in [*arch.layers, arch.head]:
            z = (layer.shared.weight * layer.weight[s]) @ h + layer.shared.bias + layer.bias[s]
            h = torch.relu(z) if layer is not arch.head else z
        beside = arch.auxiliary_head(arch.auxiliary(torch.cat([arch.indicator.weight[s], x[b]])))
        torch.testing.assert_close(output.predictions[b], h + beside, rtol=1e-4, atol=1e-4)


def test_star_normalises_each_domain_by_its_rows_and_padding_is_in_none() -> None:
    torch.manual_seed(0)
    norm = star.PartitionedNorm(S, 5)
    x, domain = 3 * torch.randn(40, 5) + 7, torch.arange(40) % 2  # nobody in domain 2
    domain[-4:] = -1
    x[-4:] = 1e6
    found = norm(x, star.Domains(domain, S))
    for s in (0, 1):
        here, rows = found[domain == s], x[domain == s]
        torch.testing.assert_close(here.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(here.var(0, unbiased=False), torch.ones(5), atol=1e-4, rtol=0)
        torch.testing.assert_close(norm.mean[s], rows.mean(0))
        torch.testing.assert_close(norm.variance[s], rows.var(0, unbiased=False))
    assert (norm.mean[2] == 0).all() and (norm.variance[2] == 1).all()
    assert torch.isfinite(found).all()
    # beside torch's own, for one domain
    both = [nn.BatchNorm1d(5), star.PartitionedNorm(1, 5)]
    upstream, gradients = torch.randn(40, 5), []
    for module in both:
        y = (3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) + 7).requires_grad_()
        z = module(y) if isinstance(module, nn.BatchNorm1d) else module(y, star.Domains(torch.zeros(40).long(), 1))
        gradients.append((z, *torch.autograd.grad(z, y, upstream)))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_star_keeps_the_mean_of_ten_steps_and_then_a_moving_one() -> None:
    torch.manual_seed(0)
    norm, batches = star.PartitionedNorm(2, 3), torch.randn(14, 20, 3) + torch.arange(14).view(-1, 1, 1)
    domains = star.Domains(torch.zeros(20).long(), 2)
    for rows in batches:
        norm(rows, domains)
    mean, variance = batches.mean(1), batches.var(1, unbiased=False)
    for running, of_steps in ((norm.mean, mean), (norm.variance, variance)):
        expected = of_steps[:10].mean(0)
        for value in of_steps[10:]:
            expected = 0.9 * expected + 0.1 * value
        torch.testing.assert_close(running[0], expected)
    assert norm.steps.flatten().tolist() == [14, 0]


def test_star_evaluates_a_column_that_a_domain_alone_decides_as_it_trains_it() -> None:
    torch.manual_seed(0)
    norm, domain = star.PartitionedNorm(S, 3), torch.arange(60) % S
    domains = star.Domains(domain, S)
    for step in range(30):
        x = torch.randn(60, 3)
        # an embedding of the domain's id, that moves; and beside it one that hardly differs between rows
        x[:, 1] = torch.tensor([0.3, -2.0, 4.0])[domain] * (1 + 0.01 * step)
        x[:, 2] = 1 + 1e-2 * x[:, 2]
        trained = norm(x, domains)
    assert trained[:, 1].abs().max() < 1e-2
    served = norm.eval()(x, domains)
    assert (served[:, 1] == 0).all()
    assert trained[:, 2].abs().max() > 2
    torch.testing.assert_close(served[:, [0, 2]], trained[:, [0, 2]], atol=0.5, rtol=0.5)


def test_an_arch_that_cannot_say_its_tables_is_a_complaint() -> None:
    values = {
        "schema": {"labels": {"y": None}, "sparse": {"u": {"num_ids": 3}}, "groups": {"domain": {"column": "u"}}},
        "data": {"train": "x", "batch_size": 2},
        "model": {"name": "me_ple", "shared": 0},
    }
    with pytest.raises(ConfigError, match=r"(?s)model.domain: names group 'domain'.*model.shared: is 0"):
        from_mapping(values)
    values["model"] = {"name": "crocodile", "prior": ["v"], "gate": "expert"}
    with pytest.raises(ConfigError, match=r"model.prior: names 'v', which is no sparse feature"):
        from_mapping(values)


def test_linear_layers_per_domain_are_found_by_their_first_axis() -> None:
    # what the test of foreign gradients relies on: S is no other size of these archs
    for name in BY_DOMAIN:
        arch, *_ = build(name)
        for module in arch.modules():
            if isinstance(module, DomainLinear | star.StarLinear):
                assert len(module.weight) == len(module.bias) == S
