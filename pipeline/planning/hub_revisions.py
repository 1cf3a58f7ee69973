"""What a branch or a tag of the hub is: looked up once, and its commit written down in the root.

Whatever the branch does later, a recipe runs what it was planned with: ``hub_revisions.json`` says
what that is, models by ``owner/name@branch``, data sets by ``datasets/owner/name@branch``.
"""

import json

from schemas.storage.files import Folder, read_if_there, write_text
from stages.hub import Repository, is_commit

REVISIONS = "hub_revisions.json"


def commit_of(repository: Repository, revision: str, root: Folder) -> str:
    """Return the commit that a revision is, or was when it was first looked up for this root.

    Raises ConfigError where the hub has no such revision, or cannot be asked for a new one.
    """
    if is_commit(revision):
        return revision
    body = read_if_there(root / REVISIONS)
    written: dict[str, str] = json.loads(body) if body else {}
    prefix = "" if repository.kind == "model" else "datasets/"
    key = f"{prefix}{repository.name}@{revision}"
    if key not in written:
        written[key] = repository.commit_of(revision)
        write_text(root / REVISIONS, json.dumps(written, indent=1, sort_keys=True) + "\n")
    return written[key]
