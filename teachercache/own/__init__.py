"""Our packages under names below this one, which no folder of a user's can take.

``schemas``, ``stages`` and ``pipeline`` are names that a user's own folder may have, on the path
before ours or loaded already. ``teachercache.own.schemas`` is our ``schemas``, from the folder
beside this package, whatever those names mean to others: each of its modules is read from its file,
and what it imports of our packages by their plain names is imported from here. Modules, classes and
pickles carry the long name, so a worker that is started anew finds them again, by importing this.

They are other objects than those of a plain ``import schemas``: use one of the two in a program.
"""

import ast
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("schemas", "stages", "pipeline")


class _OwnImports(ast.NodeTransformer):
    """Put ``from schemas...`` below this package; ours are imported in no other way."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if not node.level and (node.module or "").partition(".")[0] in NAMES:
            node.module = f"{__name__}.{node.module}"
        return node


class _OwnLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compile the file anew: the bytecode beside it is that of the plain name."""
        path = self.get_filename(fullname)
        tree = _OwnImports().visit(ast.parse(self.get_data(path), path))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code


class _OwnFinder(MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find one of our modules by the long name, and nothing else."""
        parts = fullname.removeprefix(f"{__name__}.").split(".")
        if not fullname.startswith(f"{__name__}.") or parts[0] not in NAMES:
            return None
        place = ROOT.joinpath(*parts)
        is_package = place.is_dir()
        file = place / "__init__.py" if is_package else place.with_suffix(".py")
        if not file.is_file():
            return None
        folders = [str(place)] if is_package else None
        loader = _OwnLoader(fullname, str(file))
        return spec_from_file_location(
            fullname, file, loader=loader, submodule_search_locations=folders
        )


sys.meta_path.insert(0, _OwnFinder())
