"""What the README shows must work."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from dist_rec.config import from_mapping

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_configs_are_accepted(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        values = yaml.safe_load(block)
        assert from_mapping({**values, "run": {"dir": str(tmp_path), "device": "cpu"}}).schema.sparse


def test_its_tree_is_that_of_the_package():
    """Every module is named in the lines of its folder, which may sum several up, and no file that is not there."""
    (tree,) = re.findall(r"## The tree\n\n```\ndist_rec/\n(.*?)\nlaunch/", README, re.DOTALL)
    folders = {"": ""}
    folder = ""
    for line in tree.splitlines():
        entry = re.match(r"  (\w+)(/|\.py)( |$)", line)  # two spaces: in dist_rec itself
        if entry:
            folder = entry[1] if entry[2] == "/" else ""
        folders[folder] = folders.get(folder, "") + line + "\n"
    package = ROOT / "dist_rec"
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).parts
        if path.name != "__init__.py":
            lines = folders.get(inside[0] if len(inside) > 1 else "", "")
            assert re.search(rf"\b{path.stem}\b", lines), f"dist_rec/{'/'.join(inside)} is not in README's tree"
    for folder, lines in folders.items():
        for name in re.findall(r"^ +(\w+\.py|\w+/)(?: |$)", lines, re.MULTILINE):
            assert (package / folder / name).exists() or (package / name).is_dir(), f"{folder}/{name} is not there"
