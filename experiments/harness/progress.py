"""A bar for work of several kinds, as steps and measurements, which take different times."""

import statistics
import time

from tqdm import tqdm


class Progress:
    """Shows what is done of the first kind of work, and the time that is left at the median pace of each kind."""

    def __init__(self, description: str, left: dict[str, int]):
        self.left = dict(left)
        self._paces: dict[str, list[float]] = {kind: [] for kind in left}
        self._since = time.monotonic()
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"
        self._first = next(iter(left))
        self._bar = tqdm(desc=description, total=left[self._first], unit=self._first, bar_format=form)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def done(self, kind: str, number: int = 1, note: str = "") -> None:
        """That so much of a kind was done since the last call."""
        now = time.monotonic()
        self._paces[kind].append((now - self._since) / number)
        self._since = now
        self.left[kind] -= number
        if kind == self._first:
            self._bar.update(number)
        self._bar.set_postfix_str(", ".join(filter(None, [f"{tqdm.format_interval(self.seconds_left)} left", note])))

    def spared(self, kind: str, number: int) -> None:
        """That so much of a kind need not be done."""
        self.left[kind] -= number
        if kind == self._first:
            self._bar.total -= number

    @property
    def seconds_left(self) -> float:
        """A kind that nothing was done of yet counts nothing."""
        return sum(number * statistics.median(self._paces[kind] or [0.0]) for kind, number in self.left.items())
