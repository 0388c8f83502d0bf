"""What every backend module offers."""

from __future__ import annotations

from typing import NamedTuple


class Support(NamedTuple):
    """Whether something can be done, and if not, why."""

    ok: bool
    reason: str


YES = Support(True, "")


def no(reason: str) -> Support:
    """A refusal with its reason."""
    return Support(False, reason)
