"""Data sets by hub name: the commit in the place of each branch or tag that a step reads.

Their files are fetched when the step is made, so a plan of tables that are there needs none.
"""

from typing import Any

from pipeline.planning.hub_revisions import commit_of
from pipeline.planning.recipe import Recipe
from schemas.storage.files import Folder
from stages.hub import Repository
from stages.sources.reading.source import HubData
from stages.stage import SourceStage, StageConfig


def with_commits(recipe: Recipe) -> Recipe:
    """Return the recipe with a commit as the revision of each data set of the hub.

    Raises ConfigError for a branch or tag that the hub does not have, or cannot be asked for.
    """
    root = recipe.execution.root
    steps = {
        name: _with_commits(stage, f"steps.{name}", root)
        if isinstance(stage, SourceStage)
        else stage
        for name, stage in recipe.steps.items()
    }
    return recipe.model_copy(update={"steps": steps})


def _with_commits(value: Any, place: str, root: Folder) -> Any:
    """Return a setting, whatever it is, with commits in it."""
    if isinstance(value, HubData):
        repository = Repository(value.name, "dataset", place)
        commit = commit_of(repository, value.revision, root)
        return value.model_copy(update={"revision": commit})
    if isinstance(value, tuple):
        return tuple(
            _with_commits(item, f"{place}[{index}]", root) for index, item in enumerate(value)
        )
    if not isinstance(value, StageConfig):
        return value
    settings = {name: getattr(value, name) for name in type(value).model_fields}
    found = {
        name: _with_commits(setting, f"{place}.{name}", root) for name, setting in settings.items()
    }
    changed = {name: setting for name, setting in found.items() if setting != settings[name]}
    return value.model_copy(update=changed) if changed else value
