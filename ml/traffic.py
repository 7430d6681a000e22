"""What of the traffic the challenger gets, and what is told of each request that it was shown.

The registry keeps it, the server acts by it, the log keeps what came out: this is what the three have in common.
"""

from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Literal, get_args
from uuid import UUID

import numpy as np

Mode = Literal["mirror", "canary"]


@dataclass(frozen=True)
class Traffic:
    """How much of the traffic goes to one version while it is the challenger.

    `mirror`: the champion answers, and the challenger predicts the same images unseen. `canary`: the challenger
    answers. `share` of the requests, above 0 and at most 1; `since` in UTC: what was mirrored before does not count.

    Raises:
        ValueError: where version, mode, share or time is none.
    """

    version: int
    mode: Mode
    share: float
    since: datetime

    def __post_init__(self) -> None:
        if isinstance(self.version, bool) or not isinstance(self.version, int) or self.version < 1:
            raise ValueError(f"version is {self.version!r}, not a whole number from 1")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}, not one of {', '.join(get_args(Mode))}")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share!r}, not a number above 0 and at most 1")
        if self.since.tzinfo is None:
            raise ValueError("since has no time zone")

    def is_for(self, challenger: int, champion: int | None) -> bool:
        """Whether it takes effect while these versions bear the aliases: a newer challenger has not been judged."""
        return challenger == self.version != champion

    def chooses(self, request_id: UUID) -> bool:
        """Whether the request is one of the share. The same request is always chosen, or never."""
        # Hashed, since a caller makes its ids as it likes: some count up, some carry the time in front.
        drawn = int.from_bytes(blake2b(request_id.bytes, digest_size=8).digest())
        return drawn < self.share * 2**64


@dataclass(frozen=True)
class Mirrored:
    """One request that the champion answered and the challenger was shown.

    `champion_classes` is int (n,), one for each image; `probabilities` is the challenger's answer, float32 (n, 10).
    Times are of the engine alone, in milliseconds: where several requests were predicted together, this one's share by
    images. Where the challenger failed, `failure` says how, and it has neither
    probabilities nor a time.
    """

    request_id: UUID
    created_at: datetime
    champion_version: int
    challenger_version: int
    champion_classes: np.ndarray
    champion_ms: float
    probabilities: np.ndarray | None
    challenger_ms: float | None
    failure: str | None

    @property
    def disagreements(self) -> int:
        """Images of which the challenger says another class."""
        if self.probabilities is None:
            return 0
        return int((self.probabilities.argmax(axis=1) != self.champion_classes).sum())
