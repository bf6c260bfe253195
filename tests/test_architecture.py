"""The layers of the package, and what it shows at its surface."""

import ast
from pathlib import Path

import pytest

import postlocal

SOURCE = Path(postlocal.__file__).parent

ROWS = (
    {"errors", "roll"},
    {"group", "tensors", "schedule", "outer", "fragments", "guard", "meter", "packing", "codec"},
    {"topology", "virtual", "replica", "agreement", "anchor", "courier", "powersgd"},
    {"wire", "ballot"},
    {"inner", "strategies", "gradients", "consistency"},
    {"flight"},
    {"sync"},
    {"attachment"},
    {"checkpoint", "planning", "report"},
    {"train", "ddp_comm_hooks", "model_averaging"},
    {"cli", "optim"},
    {"__init__", "__main__"},
)
ROW_OF = {module: row for row, modules in enumerate(ROWS) for module in modules}
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(file: Path) -> str:
    """The module, or the package within postlocal, that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> set[str]:
    """The modules and packages of postlocal that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "postlocal":
            names = [f"postlocal.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("postlocal.")}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_module_imports_only_from_rows_below_its_own(file: Path) -> None:
    own = name_of(file)
    for imported in imports_of(file) - {own}:
        if own != "__init__":
            assert ROW_OF[imported] < ROW_OF[own], f"{own} imports {imported}"


def test_every_module_has_a_row_and_every_row_its_modules() -> None:
    assert {name_of(file) for file in FILES} == set(ROW_OF)


def test_the_design_document_shows_the_same_rows() -> None:
    text = (SOURCE.parents[1] / "docs" / "design.md").read_text()
    picture = text.split("```text")[1].split("```")[0]
    for row in ROWS[:-1]:
        assert any(row <= set(line.replace("/", " ").split()) for line in picture.splitlines()), row


def test_the_package_only_re_exports() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert assigned == {"__all__", "__version__"}
    assert not [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("postlocal")
        for alias in node.names
    }
    assert sorted(imported | {"__version__"}) == sorted(postlocal.__all__)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_annotations_are_real_where_torch_compares_them(file: Path) -> None:
    assert "from __future__ import annotations" not in file.read_text().splitlines()
