"""A ledger of allocations: bytes now allocated, by name, and their peak."""

from __future__ import annotations


class Ledger:
    """Counts allocations by name. A name begins with its kind, up to a slash.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add("a", 2); ledger.add("b/1", 3); ledger.drop("a"); ledger.briefly("c", 1)
        >>> ledger.now, ledger.peak, ledger.at_peak
        (3, 5, {'a': 2, 'b': 3})
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        """Bytes now allocated, by name."""
        self.now = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        """Bytes of each kind at the peak."""
        self._kinds: dict[str, int] = {}

    def add(self, name: str, size: int) -> None:
        """Allocate; sizes of the same name are added up."""
        if size <= 0:
            return
        self.sizes[name] = self.sizes.get(name, 0) + size
        self._book(name, size)
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = {kind: total for kind, total in self._kinds.items() if total}

    def drop(self, name: str) -> None:
        """Free; nothing happens if it is not there."""
        if size := self.sizes.pop(name, 0):
            self._book(name, -size)

    def briefly(self, name: str, size: int) -> None:
        """Allocate and free at once, beside what is allocated under that name."""
        if size > 0:
            held = self.sizes.get(name, 0)
            self.add(name, size)
            self._book(name, -size)
            self.sizes[name] = held
            if not held:
                del self.sizes[name]

    def restart(self) -> None:
        """Reset the peak, but not what is allocated."""
        self.peak = self.now
        self.at_peak = {kind: total for kind, total in self._kinds.items() if total}

    def _book(self, name: str, size: int) -> None:
        kind = name.partition("/")[0]
        self._kinds[kind] = self._kinds.get(kind, 0) + size
        self.now += size
