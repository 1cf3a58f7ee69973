"""A recipe file of an experiment run by the product, in this process."""

from pathlib import Path

from rich.console import Console

from pipeline.planning.plan import PlannedStep, make_plan
from pipeline.planning.recipe_file import load_recipe
from pipeline.reports.progress import ConsoleReporter
from pipeline.steps.run import run_plan


def run_recipe(file: Path) -> dict[str, PlannedStep]:
    """Make what is not made yet, telling of it on stderr; return the steps by name."""
    recipe = load_recipe(file)
    plan = make_plan(recipe)
    run_plan(plan, recipe.execution, ConsoleReporter(Console(stderr=True)))
    return {step.name: step for step in plan}
