"""A benchmark's recipe run by the product, in this process or two at a time."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, set_start_method
from pathlib import Path

import torch
from rich.console import Console

from pipeline.planning.plan import PlannedStep, make_plan
from pipeline.planning.recipe import Recipe
from pipeline.planning.recipe_file import load_recipe
from pipeline.reports.progress import ConsoleReporter
from pipeline.steps.run import run_plan


def run_recipe(recipe: Recipe) -> dict[str, PlannedStep]:
    """Make what is not made yet, telling of it on stderr; return the steps by name."""
    plan = make_plan(recipe)
    run_plan(plan, recipe.execution, ConsoleReporter(Console(stderr=True)))
    return {step.name: step for step in plan}


def run_recipe_file(file: Path) -> dict[str, PlannedStep]:
    """Run the recipe of a YAML file."""
    return run_recipe(load_recipe(file))


def two_processes() -> ProcessPoolExecutor:
    """Return two processes of one thread: models this small gain from no more threads."""
    return ProcessPoolExecutor(2, get_context("spawn"), _begin)


def _begin() -> None:
    """Take one thread; fork data workers, as what was itself spawned would spawn them (14 s)."""
    torch.set_num_threads(1)
    set_start_method("fork", force=True)
