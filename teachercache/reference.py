"""Every loss in plain numpy, to hold one of your own to."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from schemas.reference import divergences, head, icl_losses, preference_losses, token_losses
else:
    from teachercache.own.schemas.reference import (
        divergences,
        head,
        icl_losses,
        preference_losses,
        token_losses,
    )

__all__ = ["divergences", "head", "icl_losses", "preference_losses", "token_losses"]
