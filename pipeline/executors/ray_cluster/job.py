"""Submit a run as a job of a Ray cluster and follow it to its end."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pipeline.executors.ray_cluster.connection import job_client
from pipeline.planning.recipe import Recipe
from schemas.errors import EngineError


def submit_recipe(recipe: Recipe, address: str, console: Console) -> int:
    """Run ``recipe`` on the cluster at ``address``; print its log, return its exit code.

    What travels is the recipe as it was read here, in a folder of its own: nothing else of this
    machine comes along. The cluster's machines need ``teachercache`` on their path.
    """
    client = job_client(address)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(_text_of(recipe), encoding="utf-8")
        job = client.submit_job(
            entrypoint="teachercache run recipe.yaml",
            runtime_env={"working_dir": folder},
            metadata={"recipe": recipe.name},
        )
    _say(console, f"job {job} runs recipe '{recipe.name}' on {address}")
    try:
        asyncio.run(_follow(client, job, console))
    except KeyboardInterrupt:
        _say(console, f"the job goes on; end it with `ray job stop --address {address} {job}`")
        raise
    return _exit_code(client, job)


def _text_of(recipe: Recipe) -> str:
    """Return the recipe as YAML, to be run by Ray on the cluster that the job finds itself on."""
    body = recipe.model_dump(mode="json")
    body["execution"] |= {"executor": "ray", "address": "auto"}
    return yaml.safe_dump(body, sort_keys=False)


async def _follow(client: Any, job: str, console: Console) -> None:
    async for text in client.tail_job_logs(job):
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def _exit_code(client: Any, job: str) -> int:
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        state = info.status.value.lower()
        raise EngineError(f"job {job} is {state}: {info.message or 'Ray gives no reason'}")
    return int(info.driver_exit_code)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
