"""What every backend module offers."""

from typing import NamedTuple


class Support(NamedTuple):
    ok: bool
    reason: str


YES = Support(True, "")


def no(reason: str) -> Support:
    return Support(False, reason)
