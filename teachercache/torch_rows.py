"""The rows of opened tables for torch's ``DataLoader``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from schemas.torch_rows import ShardedRows
else:
    from teachercache.own.schemas.torch_rows import ShardedRows

__all__ = ["ShardedRows"]
