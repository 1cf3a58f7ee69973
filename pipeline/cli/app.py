"""The command itself, what its groups share, and how an error ends it.

Commands parse, call and print; heavy imports happen inside them.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from pipeline.planning.extras import extras_named
from schemas.errors import TeacherCacheError, redacted

if TYPE_CHECKING:
    from pipeline.reports.progress import ConsoleReporter

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run a large teacher once, keep what it knows in Arrow shards, train students from them.",
)
console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width of its own

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command line: one line and a non-zero exit code for whatever a user can cause."""
    # Read when torch is loaded: threads that spin while they wait take the cores of whoever works.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        with extras_named():
            sys.exit(app(standalone_mode=False))
    except TeacherCacheError as error:
        _end_with(str(error), error.exit_code)
    except typer.TyperException as error:
        _end_with(_misused(error), error.exit_code)
    except Exception:  # noqa: BLE001  a fault of ours: all of it is told, without secrets
        print(redacted(traceback.format_exc()), file=sys.stderr, end="")  # noqa: T201
        sys.exit(1)


def _end_with(problem: str, exit_code: int) -> NoReturn:
    if problem:
        print("error:", " ".join(problem.splitlines()), file=sys.stderr)  # noqa: T201
    sys.exit(exit_code)


def _misused(error: typer.TyperException) -> str:
    """Say what is wrong with a command's words; nothing where there were none, and help is out."""
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context else "teachercache"
    problem = error.format_message().rstrip(".")
    return problem and f"{command}: {problem} (see `{command} --help`)"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"teachercache {version('teachercache')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    pass


@contextmanager
def reporting() -> "Iterator[ConsoleReporter]":
    """Give a reporter; however the run ends, the terminal gets its cursor back."""
    from pipeline.reports.progress import ConsoleReporter

    try:
        with closing(ConsoleReporter(console)) as reporter:
            yield reporter
    except KeyboardInterrupt:  # caught here, because typer ends a command without a word
        kept = "finished shards and checkpoints are kept"
        print(f"interrupted: {kept}, run again to go on", file=sys.stderr)  # noqa: T201
        raise typer.Exit(130) from None


def quiet_libraries() -> None:
    """Keep libraries' own progress bars and banners out of the log."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM's kernels on NUMA, say
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
