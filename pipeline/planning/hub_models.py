"""Models by hub name: fetched by huggingface_hub into its own cache, from there on local folders.

A model's identity is its content, so where it came from is in no fingerprint.
"""

from pipeline.planning.hub_revisions import commit_of
from pipeline.planning.recipe import ModelRef, Recipe
from schemas.errors import ConfigError
from schemas.storage.files import Folder
from stages.hub import Repository

_READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
_OLD_WEIGHTS = "pytorch_model*.bin"  # fetched where there are no others


def with_local_folders(recipe: Recipe) -> Recipe:
    """Return the recipe with a folder of this machine in the place of each hub name.

    Raises ConfigError where a model is not on the hub, or neither there nor here.
    """
    if all(ref.revision is None for ref in recipe.models.values()):
        return recipe
    models = {
        name: ref
        if ref.revision is None
        else _with_folder(ref, f"models.{name}", recipe.execution.root)
        for name, ref in recipe.models.items()
    }
    return recipe.model_copy(update={"models": models})


def _with_folder(ref: ModelRef, place: str, root: Folder) -> ModelRef:
    assert ref.path is not None and ref.revision is not None
    if ref.folder.exists():
        raise ConfigError(
            f"{place}.revision: {ref.path} is a local folder too, which has none: leave it out, or "
            f"run from another folder to mean the hub's"
        )
    repository = Repository(ref.path, "model", place)
    folder = _fetched(repository, commit_of(repository, ref.revision, root))
    return ref.model_copy(update={"path": folder, "revision": None})


def _fetched(repository: Repository, commit: str) -> str:
    """Return the folder of a model in huggingface_hub's cache, whole."""
    # a model's files lie at the top, those of other kinds below
    folder = repository.fetch(commit, _READ, top_only=True)
    if not any(folder.glob("*.safetensors")):
        folder = repository.fetch(commit, (*_READ, _OLD_WEIGHTS), top_only=True)
    return str(folder)
