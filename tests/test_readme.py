"""What the README shows must work."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from dist_rec.config import from_mapping

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_its_configs_are_accepted(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        values = yaml.safe_load(block)
        assert from_mapping({**values, "run": {"dir": str(tmp_path), "device": "cpu"}}).schema.sparse
