"""The layers of the package, and what it shows at its surface."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tools.house import cycle, imports_of, room_of, rows_in, survey, upward

import postlocal

SOURCE = Path(postlocal.__file__).parent

ROWS = (
    {"torch_versions", "version"},
    {"errors", "checks", "tensors"},
    {"topology", "schedule", "outer", "fragments", "guard", "meter", "codec"},
    {"comm"},
    {"virtual", "wire"},
    {"expressions"},
    {"strategies"},
    {"sync"},
    {"checkpoint", "planning", "ddp_comm_hooks", "model_averaging"},
    {"train", "optim"},
    {"cli"},
    {"__init__", "__main__"},
)
ROW_OF = {module: row for row, modules in enumerate(ROWS) for module in modules}
FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_module_imports_only_from_rows_below_its_own(file: Path) -> None:
    own = room_of(file, SOURCE)
    for imported in imports_of(file) - {own}:
        if own != "__init__":
            assert ROW_OF[imported] < ROW_OF[own], f"{own} imports {imported}"


def test_every_module_has_a_row_and_every_row_its_modules() -> None:
    assert {room_of(file, SOURCE) for file in FILES} == set(ROW_OF)


def test_the_figures_of_the_house_are_those_of_the_rows() -> None:
    assert list(ROWS) == rows_in(Path(__file__))
    house = survey(Path(__file__).parents[1])
    assert (upward(ROWS, house.arrows), cycle(house.arrows)) == ([], [])
    assert set(house.entries) == set(ROW_OF)
    assert "upward imports     none" in str(house).splitlines()


def test_the_design_document_shows_the_same_rows() -> None:
    text = (SOURCE.parents[1] / "docs" / "design.md").read_text()
    picture = text.split("```text")[1].split("```")[0]
    for row in ROWS[:-1]:
        assert any(row <= set(line.replace("/", " ").split()) for line in picture.splitlines()), row


def test_the_package_only_re_exports() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    nodes = list(ast.walk(tree))
    assigned = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert assigned == {"__all__"}
    assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert functions == {"__getattr__", "__dir__"}  # names that are imported at their first use
    imported = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("postlocal")
        for alias in node.names
    }
    assert sorted(imported) == sorted(postlocal.__all__)


def test_every_public_name_is_there_whether_or_not_it_is_imported_at_first_use() -> None:
    assert set(postlocal.__all__) <= set(dir(postlocal))
    for name in postlocal.__all__:
        assert getattr(postlocal, name) is not None
    with pytest.raises(AttributeError, match="module 'postlocal' has no attribute 'diloco'"):
        _ = postlocal.diloco  # type: ignore[attr-defined]


HEAVY = (
    "matplotlib", "networkx", "pydantic", "rich", "safetensors", "simpy", "sympy", "typer",
    "torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor",
)  # fmt: skip


def imported_by(code: str) -> set[str]:
    """The modules that a process of its own has imported after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_little_more_than_torch() -> None:
    more = imported_by("import postlocal") - imported_by("import torch")
    assert not more & set(HEAVY)
    assert not {name for name in more if name.startswith("postlocal.planning")}


def test_training_under_a_strategy_imports_little_more_than_torch() -> None:
    loop = """
import torch, postlocal
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sync = postlocal.attach(model, optimizer, postlocal.strategies.diloco(2))
for _ in range(3):
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    sync.step()
sync.finish()
"""
    plain = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(4)).sum().backward()
optimizer.step()
"""
    assert not (imported_by(loop) - imported_by(plain)) & set(HEAVY)


def test_planning_imports_no_library_for_plots() -> None:
    assert "matplotlib" not in imported_by("from postlocal.planning import plan, simulate")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_annotations_are_real_where_torch_compares_them(file: Path) -> None:
    assert "from __future__ import annotations" not in file.read_text().splitlines()


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_used(file: Path) -> set[str]:
    """Private attributes that a file reads of others, and private modules of torch."""
    used = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return set(filter(is_private, used))


def private_names_defined(file: Path) -> set[str]:
    """Private functions, classes, variables and attributes of ``self`` that a file defines."""
    defined = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            defined.add(node.attr)
    return set(filter(is_private, defined))


def test_only_one_module_reads_private_names_of_torch() -> None:
    others = [file for file in FILES if room_of(file, SOURCE) != "torch_versions"]
    ours = set().union(*map(private_names_defined, others))
    for file in others:
        assert private_names_used(file) - ours <= {"_exit"}, file  # that one is of os
