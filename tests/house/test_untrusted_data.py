"""What is read is data: nothing that the product opens may run code by being opened."""

import ast
from collections.abc import Iterator
from functools import cache

from tests.house.tree import REPOSITORY
from tests.house.tree import sources as read_sources

# Between processes that one run has started itself: a socket in a folder of its own.
PICKLE_SITES = {"pipeline/executors/local/training.py", "pipeline/executors/local/training_rank.py"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@cache
def sources() -> list[tuple[str, ast.Module]]:
    """Every module of the product, read once."""
    return list(read_sources())


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call with the words it is written as: ``torch.load``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def setting(call: ast.Call, name: str) -> object:
    return next(
        (ast.unparse(word.value) for word in call.keywords if word.arg == name), "not given"
    )


def test_pickles_are_read_by_nothing_but_a_runs_own_processes() -> None:
    for name, tree in sources():
        found = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
        }
        assert not found & PICKLES or name in PICKLE_SITES, f"{name} imports {found & PICKLES}"


def test_torch_loads_weights_alone() -> None:
    seen = 0
    for name, tree in sources():
        for words, call in calls(tree):
            if words == "torch.load":
                seen += 1
                assert setting(call, "weights_only") == "True", f"{name}:{call.lineno}"
    assert seen, "there is a place that reads .bin files"


def test_numpy_reads_no_objects_and_yaml_makes_none() -> None:
    for name, tree in sources():
        for words, call in calls(tree):
            place = f"{name}:{call.lineno}"
            assert setting(call, "allow_pickle") in ("not given", "False"), place
            assert words not in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), place
            if words == "yaml.load":
                loader = ast.unparse(call.args[1])
                assert loader == "_UniqueKeys", place
    tree = ast.parse((REPOSITORY / "pipeline/planning/recipe_file.py").read_text())
    (kind,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "_UniqueKeys"]
    assert [ast.unparse(base) for base in kind.bases] == ["yaml.SafeLoader"]


def test_no_text_becomes_code() -> None:
    for name, tree in sources():
        for words, call in calls(tree):
            place = f"{name}:{call.lineno}"
            is_loader = name == "teachercache/own/__init__.py"  # of this package's own modules
            assert words not in ("eval", "exec", "os.system", "os.popen"), place
            assert words != "compile" or is_loader, place
            assert setting(call, "shell") in ("not given", "False"), place
            assert setting(call, "trust_remote_code") in ("not given", "False", "trusted"), place
