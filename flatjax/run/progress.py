"""Show the progress of work of several kinds, as steps and measurements, which take different times."""

import statistics
import time
from collections.abc import Mapping

from flatjax.core.optional import optional

tqdm = optional("tqdm", use="progress is shown with", extras="experiments").tqdm


class Progress:
    """A bar shows which share of all the work is done, and the time that is left at each kind's median pace.

    Args:
        description: name of the work.
        total: number of pieces of each kind, those that were done before included.
        costs: time for a piece of each kind, in any unit, as far as it is known before; all the same by default.
    """

    def __init__(self, description: str, total: Mapping[str, int], costs: Mapping[str, float] | None = None):
        self.total, self.left = dict(total), dict(total)
        self._costs = costs
        self._paces: dict[str, list[float]] = {kind: [] for kind in total}
        self._since = time.monotonic()
        form = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        whole = sum(number * self._cost(kind) for kind, number in total.items())
        self._bar = tqdm(desc=description, total=whole, bar_format=form)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @property
    def share_done(self) -> float:
        return self._bar.n / self._bar.total if self._bar.total else 1.0

    def done(self, kind: str, number: int = 1, note: str = "") -> None:
        """Tell the bar that a number of pieces of a kind were done since the last call."""
        now = time.monotonic()
        self._paces[kind].append((now - self._since) / number)
        self._since = now
        self._advance(kind, number)
        of_kind = f"{self.total[kind] - self.left[kind]}/{self.total[kind]} {kind}s"
        left = f"{tqdm.format_interval(self.seconds_left)} left"
        self._bar.set_postfix_str(", ".join(filter(None, [left, of_kind, note])))

    def were_done(self, pieces: Mapping[str, int]) -> None:
        """Take pieces of some kinds off the work: they were done before, or are not needed."""
        self._since = time.monotonic()
        for kind, number in pieces.items():
            self._advance(kind, number)

    @property
    def seconds_left(self) -> float:
        """Return the time left; a kind not seen yet counts by its cost, or as nothing if no cost is known."""
        return sum(number * self._pace(kind) for kind, number in self.left.items())

    def _advance(self, kind: str, number: int) -> None:
        self.left[kind] -= number
        self._bar.update(number * self._cost(kind))

    def _cost(self, kind: str) -> float:
        return 1.0 if self._costs is None else self._costs[kind]

    def _pace(self, kind: str) -> float:
        if self._paces[kind]:
            return statistics.median(self._paces[kind])
        seen = [other for other, paces in self._paces.items() if paces]
        if self._costs is None or not seen:
            return 0.0
        return self._cost(kind) * statistics.median(self._pace(other) / self._cost(other) for other in seen)
