"""The arrows of the house: which room may import which, read from the source without importing anything."""

import ast

from conftest import ROOT
import pytest

METHOD = ("prompts", "data", "model", "train", "metrics", "evaluate", "tiny")  # the files of the root
HEAVY = {"torch", "transformers", "peft"}

MAY_IMPORT = {  # of the project's own; bench and tests may import all
    "prompts": set(),
    "data": {"prompts", "support"},
    "model": {"prompts", "data", "support"},
    "train": {"prompts", "data", "model", "metrics", "support"},
    "metrics": {"prompts"},
    "evaluate": {"prompts", "data", "model", "train", "metrics", "support"},
    "tiny": {"prompts", "data", "model", "support"},
    "support": {"prompts", "support"},
    "analysis": {*METHOD, "support", "analysis"},
    "recipes": {"data", "metrics", "support", "recipes"},
    "docs": {"data", "support"},
}
WITHOUT_TORCH = {"prompts", "metrics", "data"}  # nowhere in the file
TORCH_WHEN_NEEDED = {"train", "evaluate", "tiny", "analysis"}  # only when_used, or inside functions that need a model
OWN = {*METHOD, "support", "analysis", "recipes", "bench", "tests", "docs"}


def imported(nodes):
    """First names of the modules that these nodes of a syntax tree import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def at_module_level(tree):
    """The nodes that run when a file is imported: all but those inside functions, and imports that wait."""
    for node in ast.iter_child_nodes(tree):
        yield node
        waits = isinstance(node, ast.With) and ast.unparse(node.items[0]) == "when_used()"
        if not waits and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from at_module_level(node)


def wrong_arrows(root):
    """What a file of the project at `root` imports and must not, as a list of `file imports module`."""
    wrong = []
    for path in sorted([*root.glob("*.py"), *(f for room in root.iterdir() for f in room.glob("*.py"))]):
        file = path.relative_to(root)
        room = file.parts[0] if len(file.parts) > 1 else file.stem
        if room in ("bench", "tests"):
            continue
        tree = ast.parse(path.read_text())
        names = set(imported(ast.walk(tree)))
        refused = names & OWN - MAY_IMPORT.get(room, set())
        if room in WITHOUT_TORCH:
            refused |= names & HEAVY
        if room in TORCH_WHEN_NEEDED:
            refused |= set(imported(at_module_level(tree))) & {*HEAVY, "model"}
        wrong += [f"{file} imports {name}" for name in sorted(refused)]
    return wrong


def test_no_file_imports_what_its_room_may_not():
    assert wrong_arrows(ROOT) == []


def test_the_root_holds_the_papers_files_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == set(METHOD)


@pytest.mark.parametrize(
    "file, source, wrong",
    [
        ("evaluate.py", "def f():\n    from analysis import floors", ["analysis"]),  # a circle, though a late one
        ("support/run.py", "import model", ["model"]),
        ("metrics.py", "def f():\n    import torch", ["torch"]),
        ("analysis/listen.py", "class Page:\n    import model", ["model"]),
        ("train.py", "with open_run():\n    import torch", ["torch"]),
        ("train.py", "with when_used():\n    from analysis import floors\n    import torch", ["analysis"]),
        ("analysis/listen.py", "def f():\n    import model, torch", []),
    ],
)
def test_a_wrong_arrow_is_found_and_torch_may_come_where_a_model_is_needed(tmp_path, file, source, wrong):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source)
    assert wrong_arrows(tmp_path) == [f"{file} imports {name}" for name in wrong]
