"""The public interface: finished tables opened and decoded, whatever else is called ``schemas``.

``teachercache.student`` makes and trains students, ``teachercache.hf`` is for trainers of your own;
``python -m teachercache`` is the command. See ``teachercache.own`` for how it keeps to itself.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import schemas as _schemas
    from schemas import *  # noqa: F403
    from schemas.errors import (
        ConfigError,
        IdentityMismatch,
        SchemaMismatch,
        StoreError,
        TeacherCacheError,
    )
else:
    from teachercache.own import schemas as _schemas
    from teachercache.own.schemas import *  # noqa: F403
    from teachercache.own.schemas.errors import (
        ConfigError,
        IdentityMismatch,
        SchemaMismatch,
        StoreError,
        TeacherCacheError,
    )

__all__ = [
    "ConfigError",
    "IdentityMismatch",
    "SchemaMismatch",
    "StoreError",
    "TeacherCacheError",
]
__all__ += _schemas.__all__
