"""What the columns of an item table say about each other, and the verb that writes it down.

test_5 are of property 5 in the list that test_ssl.py numbers its tests by.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec import correlation
from dist_rec.config import from_mapping, read
from dist_rec.data.footers import read_footers
from dist_rec.data.mutual_information import mutual_information
from dist_rec.settings import ConfigError
from tests import catalogues
from tests.catalogues import CORRELATION


def _information(table: pa.Table, tmp_path, **columns: bool):
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=700)
    return mutual_information(read_footers(str(tmp_path / "items.parquet")), "id", columns)


def test_5_mutual_information_has_its_properties(tmp_path):
    rng = np.random.default_rng(0)
    n = 3000
    a, noise = rng.integers(0, 12, n), rng.integers(0, 12, n)
    b = np.where(rng.random(n) < 0.5, a, noise)
    table = pa.table({"id": np.arange(n), "a": a, "copy": a, "coarse": a // 3, "b": b, "noise": noise})
    found = _information(table, tmp_path, a=False, copy=False, coarse=False, b=False, noise=False)
    nats, h = found.information, found.entropy
    for x, row in nats.items():
        assert all(value >= 0 and value == nats[y][x] for y, value in row.items())
    counts = np.bincount(a) / n
    assert h["a"] == pytest.approx(-(counts * np.log(counts)).sum())
    assert nats["a"]["copy"] == pytest.approx(h["a"])  # I(X, X) = H(X)
    assert nats["a"]["coarse"] == pytest.approx(h["coarse"])  # a function of it
    assert all(nats["id"][x] == pytest.approx(h[x]) for x in h)  # the id determines everything
    joint = np.histogram2d(a, b, bins=(12, 12))[0] / n
    product = np.outer(joint.sum(1), joint.sum(0))
    plain = (joint[joint > 0] * np.log(joint[joint > 0] / product[joint > 0])).sum()
    assert found.plug_in["a"]["b"] == pytest.approx(plain)
    assert nats["a"]["b"] == pytest.approx(plain, abs=0.03)


def test_5_independent_columns_of_many_values_share_nothing(tmp_path):
    rng = np.random.default_rng(1)
    n, v = 20_000, 1000
    lists = [rng.integers(0, v, k).tolist() for k in rng.integers(1, 5, n)]
    table = pa.table({"id": np.arange(n), "a": rng.integers(0, v, n), "b": rng.integers(0, v, n), "c": lists})
    found = _information(table, tmp_path, a=False, b=False, c=True)
    assert found.plug_in["a"]["b"] > 3.8, "the plain estimate is not biased here, so the test shows nothing"
    assert found.information["a"]["b"] < 0.02
    assert found.information["a"]["c"] < 0.1


def test_5_lists_count_every_pair_of_a_row_alike(tmp_path):
    rows = [([0, 1], [0]), ([1], [1, 2]), ([], [0]), ([0], [0]), ([2, 2], [2])] * 40
    table = pa.table({"id": np.arange(len(rows)), "a": [a for a, _ in rows], "b": [b for _, b in rows]})
    found = _information(table, tmp_path, a=True, b=True)
    joint = np.zeros((3, 3))
    for a, b in rows:
        for x in a:
            for y in b:
                joint[x, y] += 1 / (len(a) * len(b))
    joint /= joint.sum()
    product = np.outer(joint.sum(1), joint.sum(0))
    plain = (joint[joint > 0] * np.log(joint[joint > 0] / product[joint > 0])).sum()
    assert found.plug_in["a"]["b"] == pytest.approx(plain)
    # I(id, a) = H(a) - mean log |a|, over the rows that have any
    marginal = np.zeros(3)
    for a, _ in rows:
        for x in a:
            marginal[x] += 1 / len(a)
    marginal /= marginal.sum()
    entropy = -(marginal * np.log(marginal)).sum()
    assert found.information["id"]["a"] == pytest.approx(entropy - np.mean([math.log(len(a)) for a, _ in rows if a]))


def test_the_verb_writes_a_piece_of_config_and_refuses_two_columns(tmp_path, capsys):
    data = catalogues.write(tmp_path / "data")
    out = tmp_path / "correlation.yaml"
    correlation.main([f"{data}/items", str(out), "id=id"])
    assert "brand" in capsys.readouterr().out
    card = tmp_path / "card.yaml"
    card.write_text("base: correlation.yaml\n")
    found = read(str(card))["auxiliary"]["contrastive"]["correlation"]
    assert {a: set(row) for a, row in found.items()} == {a: set(row) for a, row in CORRELATION.items()}
    config = from_mapping(catalogues.values(data, tmp_path / "run", auxiliary={"contrastive": {"correlation": found}}))
    assert config.auxiliary["contrastive"].maskable(config.schema) == ["item", "tags", "brand"]
    with pytest.raises(ConfigError, match="are id, brand: correlated masking needs at least 3"):
        correlation.run(f"{data}/items", str(out), "id", ["brand"])
    for place, words in ((tmp_path, "is a folder"), (card / "x.yaml", "is a file")):
        with pytest.raises(ConfigError, match=f"OUT: .*{words}"):
            correlation.run("nowhere.parquet", str(place), "id")  # said before anything is read
    with pytest.raises(ConfigError, match=r"id: is 'tags', which is no column of single integers"):
        correlation.run(f"{data}/items", str(out), "tags")
    with pytest.raises(ConfigError, match=r"columns: is 'brnd'.*did you mean 'brand'"):
        correlation.run(f"{data}/items", str(out), "id", ["brnd", "tags"])
