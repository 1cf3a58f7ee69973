"""A recipe as a tree: its models, then each step under what it is made of, with what it left.

Steps form a graph: one of several inputs stands once, under the one of them that is shown last, and
names them all. So whatever a step names stands above it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from pipeline.planning.fingerprint import ADDRESS_DIGITS, fingerprint_of
from pipeline.planning.plan import PlannedStep, needs
from pipeline.planning.recipe import ModelRef, Recipe
from pipeline.reports.cells import human_bytes
from pipeline.state.finished_files import finished_files
from pipeline.state.step_state import Progress, calibration_of, progress_of
from stages.sources.finished_table.stage import FinishedTableStage
from stages.stage import SourceStage, TableStage

INDENT = 4  # columns that rich draws a level in
MOST_LEVELS = 8  # deeper steps stand at the last one: they say themselves what they are made of
STYLES = {"done": "green", "partial": "yellow", "pending": "dim"}


@dataclass(frozen=True, slots=True)
class _Branch:
    """A step, how deep it stands and how far it is, and what is known of its files."""

    step: PlannedStep
    depth: int
    progress: Progress
    num_bytes: int | None
    missing: tuple[str, ...]

    @classmethod
    def of(cls, step: PlannedStep, depth: int) -> "_Branch":
        """Look at the step's folder; bytes are foretold where it is not done."""
        progress, files = progress_of(step), finished_files(step)
        num_bytes = progress.num_bytes
        if files is not None and progress.state == "done":
            num_bytes = files.num_bytes
        return cls(step, depth, progress, num_bytes, () if files is None else files.missing)

    @property
    def is_done(self) -> bool:
        return self.progress.state == "done"

    @property
    def about(self) -> str:
        """What stands before numbers that may turn out otherwise: rows may yet be rejected."""
        return "" if self.is_done else "about "


def print_tree(console: Console, recipe: Recipe, plan: Sequence[PlannedStep]) -> None:
    """Show models, then steps in the order of the flow; folders are named below the root's."""
    flow = _in_order_of_flow(plan)
    branches = [_Branch.of(step, min(depth, MOST_LEVELS)) for step, depth in flow]
    tree = Tree(_head(recipe, branches))
    if recipe.models:
        models = tree.add(Text("models"))
        for line in _model_lines(recipe, plan):
            models.add(line)
    nodes = [tree]  # the tree, and the last step of each depth
    for branch, line in zip(branches, _step_lines(recipe, branches), strict=True):
        del nodes[branch.depth + 1 :]
        nodes.append(nodes[-1].add(line))
    console.print(tree)


def _in_order_of_flow(plan: Sequence[PlannedStep]) -> Iterator[tuple[PlannedStep, int]]:
    """Yield each step once, after all that it needs, and its depth: under the last of these.

    A report sets several steps side by side and is part of none: it stands at the end, under none.
    """
    needed = {step.name: {other.name for other in needs(plan, step)} for step in plan}
    parts = [step for step in plan if step.kind != "report"]
    shown: set[str] = set()

    def from_here(step: PlannedStep, depth: int) -> Iterator[tuple[PlannedStep, int]]:
        shown.add(step.name)
        yield step, depth
        for other in parts:
            if other.name not in shown and step.name in needed[other.name] <= shown:
                yield from from_here(other, depth + 1)

    for step in parts:
        if not needed[step.name]:
            yield from from_here(step, 0)
    yield from ((step, 0) for step in plan if step.kind == "report")


def _head(recipe: Recipe, branches: Sequence[_Branch]) -> Text:
    """Return name, root and what is done; equal steps share a folder, which weighs once."""
    done = [branch for branch in branches if branch.is_done]
    sizes = {branch.step.place: branch.num_bytes or 0 for branch in done}
    size = f", {human_bytes(sum(sizes.values()))}" if done else ""
    damaged = sum(bool(branch.missing) for branch in branches)
    without = f", {damaged} with files missing" if damaged else ""
    said = f"{len(done)} of {len(branches)} steps done{size}{without}, in {recipe.execution.root}"
    return Text.assemble((recipe.name, "bold"), f"  {said}")


def _model_lines(recipe: Recipe, plan: Sequence[PlannedStep]) -> Iterator[Text]:
    """Yield a line a model; one that no step runs has no identity, for nothing has looked at it."""
    run = {name: model for step in plan for name, model in step.models.items()}
    identities = [
        fingerprint_of(run[name].identity)[:ADDRESS_DIGITS] if name in run else "run by none"
        for name in recipe.models
    ]
    refs = recipe.models.values()
    columns = (
        _column(recipe.models),
        _column(identities),
        _column(ref.dtype for ref in refs),
        _column(ref.engine for ref in refs),
    )
    for ref, (name, *cells) in zip(refs, zip(*columns, strict=True), strict=True):
        yield Text.assemble((name, "bold"), "  ", "  ".join(cells), f"  {_maker(ref)}")


def _maker(ref: ModelRef) -> str:
    if ref.step is not None:
        return f"made by {ref.step}"
    adapted = "" if ref.adapter is None else f" with adapter {ref.adapter}"
    where = ref.folder if ref.revision is None else f"{ref.path} at {ref.revision} (hub)"
    return f"{where}{adapted}{', runs its own code' if ref.trust_remote_code else ''}"


def _step_lines(recipe: Recipe, branches: Sequence[_Branch]) -> Iterator[Text]:
    """Yield for each step a line in columns, and below it what it does, leaves and is made of."""
    names = _column(" " * INDENT * branch.depth + branch.step.name for branch in branches)
    states = _column(map(_state, branches))
    rows = _column(map(_rows, branches), right=True)
    sizes = _column(map(_size, branches), right=True)
    for branch, *cells in zip(branches, names, states, rows, sizes, strict=True):
        name, state, *numbers = cells
        style = "red" if branch.missing else STYLES[branch.progress.state]
        line = Text.assemble((name[INDENT * branch.depth :], "bold"), "  ", (state, style))
        line.append("  ".join(("", *numbers)))
        line.rstrip()
        line.append(f"\n{_making(recipe, branch.step)}", "dim")
        yield line.append(_missing(branch), "red")


def _column(cells: Iterable[str], *, right: bool = False) -> list[str]:
    """Return cells of one width, that of the widest."""
    cells = list(cells)
    width = max(map(len, cells))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]


def _state(branch: _Branch) -> str:
    progress = branch.progress
    if gone := len(branch.missing):
        return f"{progress.state}, {gone:,} file{'s' if gone > 1 else ''} missing"
    if progress.state != "partial":
        return progress.state
    total = "" if progress.num_shards is None else f" of {progress.num_shards:,}"
    return f"{progress.state}, {progress.shards_done:,}{total} shards"


def _rows(branch: _Branch) -> str:
    num_rows = branch.progress.num_rows
    return "" if num_rows is None else f"{branch.about}{num_rows:,} rows"


def _size(branch: _Branch) -> str:
    return "" if branch.num_bytes is None else f"{branch.about}{human_bytes(branch.num_bytes)}"


def _making(recipe: Recipe, step: PlannedStep) -> str:
    """Return ``stage -> folder`` and all that a step is made of, by name."""
    said = f"{step.stage.stage} -> {step.place.parent.name}/{step.place.name}"
    if isinstance(step.stage, SourceStage | TableStage | FinishedTableStage):
        table = step.stage.table
        said += f" (v{table.version}, {table.variant})" if table.variant else f" (v{table.version})"
    if calibration := calibration_of(step):
        said += f", tau {calibration.tau:g}"
    if step.inputs:
        said += f" from {', '.join(source.name for source in step.inputs)}"
    if step.models:
        said += f"; model{'s' if len(step.models) > 1 else ''} {', '.join(step.models)}"
    as_written = recipe.steps.get(step.name)  # in the plan a tokenizer is a folder
    if isinstance(as_written, SourceStage):
        said += f"; tokenizer of {as_written.tokenizer}"
    return said


def _missing(branch: _Branch) -> str:
    if not branch.missing:
        return ""
    first, *others = branch.missing
    more = f" and {len(others):,} more" if others else ""
    return f"\nmissing: {first}{more}; `teachercache verify` says how to mend it"
