"""The rules of the house that a machine can check, each on the real tree and on a small tree that breaks it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

COMPONENTS = {"models", "objectives", "auxiliary"}
"""Rooms with one component per file or folder, found by its name: deleting a method is deleting its files."""

ENTRIES = {"train", "evaluate", "plan", "init", "prepare", "correlation", "cohorts", "report", "export", "predict"}
ENTRIES |= {"cli", "job"}
"""Modules a user starts, and what those share (job)."""

MAY_IMPORT = {
    "versions": set[str](),
    "settings": set[str](),
    "data": {"settings"},
    "nn": {"settings"},
    "contract": {"data", "settings"},
    "embeddings": {"contract", "data", "nn", "settings"},
    "models": {"contract", "data", "nn", "settings"},
    "objectives": {"contract", "data", "nn", "settings"},
    "auxiliary": {"contract", "data", "nn", "settings"},
    "metrics": {"contract", "data", "settings"},
    "reporting": {"data", "metrics", "settings"},
    "training": {"contract", "data", "metrics", "settings"},
    "serving": {"contract", "data", "embeddings", "metrics", "settings", "training"},
}
"""Room or module of dist_rec -> the others it may import. RunConfig (config) is in none: it stops at the entries."""

ASSEMBLY = {"config", "recommender", *ENTRIES}
"""These may import every room but the components'."""

TOP_LEVEL = {"pyproject.toml", "README.md", "dist_rec", "launch", "configs", "tests", "docker", "scripts"}
MAX_LINES = 400


class Import(NamedTuple):
    """`module` (dotted, seen from the root) names `target` in line `line` of `path`."""

    path: str
    line: int
    module: str
    target: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.module} imports {self.target}"


def imports(root: Path, package: str) -> Iterator[Import]:
    """Every import in `package`, those inside functions and under TYPE_CHECKING included, relative ones resolved."""
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parents = parts[:-1]  # of a module and of an __init__ alike
        module = ".".join(parents if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(path.read_text())):
            targets = []
            if isinstance(node, ast.Import):
                targets = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                near = parents[: len(parents) - node.level + 1] if node.level else ()
                base = ".".join([*near, *([node.module] if node.module else [])])
                targets = [f"{base}.{name.name}" for name in node.names]
            for target in targets:
                yield Import(str(path.relative_to(root)), node.lineno, module, target)


def import_directions(root: Path) -> Iterator[str]:
    """Who may import whom inside dist_rec."""
    known = {path.stem for path in (root / "dist_rec").glob("*.py")} | {p.name for p in (root / "dist_rec").iterdir()}
    for room in sorted(known - {"__init__", "__pycache__"}):
        if "." not in room and room not in MAY_IMPORT and room not in ASSEMBLY:
            yield f"dist_rec/{room}: is no room of the house; put it into one, or give it a row in MAY_IMPORT"
    rooms = known | MAY_IMPORT.keys() | ASSEMBLY
    for found in imports(root, "dist_rec"):
        target = found.target.split(".")
        if target[0] in ("launch", "tests"):
            yield f"{found}; the package must stand without them: move what it needs into dist_rec"
        if target[0] != "dist_rec" or len(target) < 2 or target[1] not in rooms:
            continue
        room, *inside = [*found.module.split(".")[1:], ""]
        to, *to_inside = target[1:]
        if room == to:
            if room in COMPONENTS and inside[0] and inside[0] != to_inside[0]:
                yield f"{found}; components know no sibling: move what both need into dist_rec/nn"
        elif room == "":
            if to != "versions":
                yield f"{found}; dist_rec/__init__.py imports versions only: import it where it is used"
        elif room in ASSEMBLY:
            if to in COMPONENTS:
                yield f"{found}; a component is found by its name in the config: drop the import"
        elif room in MAY_IMPORT and to not in MAY_IMPORT[room]:
            allowed = ", ".join(sorted(MAY_IMPORT[room])) or "nothing of dist_rec"
            yield f"{found}; {room} may import {allowed}: pass the value in, or move the shared part there"


def launch_imports(root: Path) -> Iterator[str]:
    """`launch` runs on submit hosts that have neither torch nor dist_rec."""
    for found in imports(root, "launch"):
        top = found.target.split(".")[0]
        if top not in sys.stdlib_module_names | {"torchx", "launch"}:
            yield f"{found}; launch imports torchx only: pass the value as an argument of the process"


def short_files(root: Path) -> Iterator[str]:
    """No god files."""
    for package in ("dist_rec", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            if (lines := len(path.read_text().splitlines())) > MAX_LINES:
                yield f"{path.relative_to(root)}: {lines} lines, more than {MAX_LINES}: split it by what it does"


def docstrings(root: Path) -> Iterator[str]:
    """Every module, and every public function, class and method says what it is for."""
    for package in ("dist_rec", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            if tree.body and ast.get_docstring(tree) is None:
                yield f"{path.relative_to(root)}:1: the module has no docstring: say in a line what it is for"
            for node in _public(tree):
                if ast.get_docstring(node) is None:
                    place = f"{path.relative_to(root)}:{node.lineno}: {node.name}"
                    yield f"{place} is public and has no docstring: say what it returns and the unit or shape"


def _public(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from _public(child)


def top_level(root: Path) -> Iterator[str]:
    """The root holds the house's rooms only."""
    tracked = subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    for name in sorted({path.split("/")[0].strip('"') for path in tracked if path} - TOP_LEVEL):
        if not name.startswith("."):
            yield f"{name}: does not belong in the root: move it into {', '.join(sorted(TOP_LEVEL))}"


RULES = [import_directions, launch_imports, short_files, docstrings, top_level]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    if rule is top_level and not (ROOT / ".git").exists():
        pytest.skip("no git checkout: there is no list of tracked files")
    complaints = list(rule(ROOT))
    assert not complaints, "\n" + "\n".join(complaints)


GOOD = {
    "dist_rec/__init__.py": '"""D."""\nfrom dist_rec import versions\n',
    "dist_rec/versions.py": '"""D."""\n',
    "dist_rec/settings.py": '"""D."""\nimport torch\n',
    "dist_rec/data/__init__.py": "",
    "dist_rec/data/schema.py": '"""D."""\nfrom dist_rec.settings import parse\nfrom . import batch\n',
    "dist_rec/contract.py": '"""D."""\nfrom dist_rec.data.schema import Schema\n',
    "dist_rec/nn/mlp.py": '"""D."""\nfrom dist_rec.settings import parse\n',
    "dist_rec/models/__init__.py": "",
    "dist_rec/models/dlrm.py": '"""D."""\nfrom dist_rec.contract import Arch\nfrom ..nn.mlp import MLP\n',
    "dist_rec/auxiliary/c2al/__init__.py": '"""D."""\nfrom dist_rec.auxiliary.c2al import heads\n',
    "dist_rec/auxiliary/c2al/heads.py": '"""D."""\n\n\nclass A:\n    """D."""\n\n    def _f(self): ...\n',
    "dist_rec/training/trainer.py": '"""D."""\nfrom dist_rec import contract\nfrom dist_rec.metrics.rows import R\n',
    "dist_rec/metrics/rows.py": '"""D."""\n',
    "dist_rec/config.py": '"""D."""\nfrom dist_rec.training.trainer import T\n',
    "dist_rec/train.py": '"""D."""\nfrom dist_rec.config import RunConfig\n\n\ndef main():\n    """D."""\n',
    "launch/components.py": '"""D."""\nimport os\nfrom torchx import specs\n',
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small tree that keeps every rule."""
    for path, text in GOOD.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    subprocess.run("git init -q && git add -A", cwd=tmp_path, shell=True, check=True)
    return tmp_path


def test_a_good_tree_has_no_complaints(house: Path) -> None:
    assert [complaint for rule in RULES for complaint in rule(house)] == []


@pytest.mark.parametrize(
    ("rule", "path", "text", "complaint"),
    [
        (import_directions, "settings.py", "import dist_rec.data.schema", "settings may import nothing of dist_rec"),
        (import_directions, "data/schema.py", "from dist_rec.contract import A", "data may import settings"),
        (import_directions, "data/schema.py", "from .. import contract", "data may import settings"),
        (import_directions, "nn/mlp.py", "from dist_rec.data import schema", "nn may import settings"),
        (import_directions, "contract.py", "from dist_rec.models import dlrm", "contract may import data, settings"),
        (import_directions, "models/dcn.py", "from dist_rec.models.dlrm import A", "components know no sibling"),
        (import_directions, "models/dcn.py", "from . import dlrm", "components know no sibling"),
        (
            import_directions,
            "models/dcn.py",
            "def f():\n    import dist_rec.metrics.rows",
            "models may import contract",
        ),
        (import_directions, "auxiliary/covariance.py", "from dist_rec.auxiliary import c2al", "know no sibling"),
        (import_directions, "objectives/bce.py", "from dist_rec.models import dlrm", "objectives may import contract"),
        (import_directions, "embeddings/stage.py", "from dist_rec.config import RunConfig", "embeddings may import"),
        (import_directions, "metrics/auc.py", "from dist_rec.training import trainer", "metrics may import contract"),
        (import_directions, "training/trainer.py", "from dist_rec.models import dlrm", "training may import contract"),
        (import_directions, "training/trainer.py", "import dist_rec.config", "training may import contract"),
        (import_directions, "train.py", "from dist_rec.models.dlrm import Config", "found by its name"),
        (import_directions, "config.py", "import dist_rec.objectives.bce", "found by its name"),
        (import_directions, "__init__.py", "from dist_rec.config import RunConfig", "imports versions only"),
        (import_directions, "train.py", "from tests import ranks", "must stand without them"),
        (import_directions, "utils.py", "", "is no room of the house"),
        (import_directions, "helpers/text.py", "", "is no room of the house"),
        (launch_imports, "../launch/components.py", "import torch.distributed", "launch imports torchx only"),
        (launch_imports, "../launch/components.py", "from dist_rec import versions", "launch imports torchx only"),
        (short_files, "models/dlrm.py", "\n" * 401, "401 lines, more than 400"),
        (docstrings, "models/dlrm.py", "x = 1", "the module has no docstring"),
        (docstrings, "models/dlrm.py", '"""D."""\ndef f(): ...', "f is public and has no docstring"),
        (docstrings, "models/dlrm.py", '"""D."""\nclass A:\n  """D."""\n  def f(self): ...', "f is public"),
        (top_level, "../notes/x.md", "", "notes: does not belong in the root"),
        (top_level, "../setup.py", "", "setup.py: does not belong in the root"),
    ],
)
def test_each_rule_can_fail(
    house: Path, rule: Callable[[Path], Iterator[str]], path: str, text: str, complaint: str
) -> None:
    bad = house / "dist_rec" / path
    bad.parent.mkdir(parents=True, exist_ok=True)
    bad.write_text(text)
    subprocess.run(["git", "add", "-A"], cwd=house, check=True)
    (found,) = rule(house)
    assert complaint in found
