"""The command, also where a folder of the user's has the name of one of our packages."""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the command line with our packages first on the path, if another one hides them."""
    if not all(map(_is_found, ("schemas", "stages", "pipeline"))):
        sys.path.insert(0, str(ROOT))
        inherited = os.environ.get("PYTHONPATH", "")  # of processes that this one starts
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), inherited]))
    from pipeline.cli import main as run_command

    run_command()


def _is_found(name: str) -> bool:
    """Whether a plain import of the name gives ours."""
    spec = PathFinder.find_spec(name)
    expected = ROOT / name / "__init__.py"
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == expected


if __name__ == "__main__":
    main()
