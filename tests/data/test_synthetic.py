"""The planted structure is there, and what the card declares fits the files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec.data.footers import check_columns, read_footers
from dist_rec.data.loader import DataConfig, Loader
from dist_rec.data.schema import Schema
from dist_rec.data.synthetic import SPLITS, SyntheticConfig, write
from dist_rec.settings import parse

CARDS = Path(__file__).resolve().parents[2] / "configs" / "schemas"
SMALL = {"rows": 5000, "eval_rows": 700, "rows_per_file": 2000, "row_group_rows": 512}


def test_same_config_same_rows_and_unique_row_ids(tmp_path):
    for name in "ab":
        write(SyntheticConfig(path=str(tmp_path / name), **SMALL))
    a, b = ([pq.read_table(tmp_path / name / split) for split in SPLITS] for name in "ab")
    assert all(x.equals(y) for x, y in zip(a, b, strict=True))
    ids = np.concatenate([x["row_id"].to_numpy() for x in a])
    assert len(set(ids)) == len(ids) == 5000 + 2 * 700
    assert [len(list((tmp_path / "a" / split).iterdir())) for split in SPLITS] == [3, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    write(SyntheticConfig(path=str(tmp_path / "mine"), **SMALL))
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize(("name", "counts"), [("synthetic", {"d3.null=fill"}), ("synthetic_domains", set())])
def test_card_fits_the_files(tmp_path, name, counts):
    card, complaints = yaml.safe_load((CARDS / f"{name}.yaml").read_text()), []
    schema = parse(Schema, card["schema"], complaints)
    data = parse(DataConfig, card["data"], complaints)
    assert not complaints and not list(schema.check()) and not list(data.check())
    write(replace(data.synthetic, path=str(tmp_path / "s"), **SMALL))
    for split in SPLITS:
        footers = read_footers(str(tmp_path / "s" / split))
        check_columns(footers, schema)
        loader = Loader(data, schema, footers, rank=0, world_size=1, batch_size=512, seed=0, shuffle=False, epochs=1)
        assert sum(float(batch.weights.sum()) for batch in loader) == sum(sum(f.row_group_rows) for f in footers)
        assert set(loader.counts) == counts


def test_config_complaints():
    assert [c.key for c in SyntheticConfig(rows=0, seed=-1).check()] == ["rows", "seed"]
