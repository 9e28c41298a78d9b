"""What went wrong where: whether a node is tried again, and whether a device is still given any."""

from collections.abc import Collection

_DEATHS_LIMIT = 2
"""A node whose workers died this often, without coming any further, has failed."""
_FAILURES_LIMIT = 3
"""A device on which so many nodes in a row failed gets no more."""


class Attempts:
    """Counts of one execution. Nodes by key, devices by name; devices: those of all workers, "" where not known yet."""

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}
        self._reached_before: dict[str, int] = {}
        self._deaths: dict[str, int] = {}
        self._failed_on: dict[str, str] = {}
        self._in_a_row: dict[str, int] = {}

    def reached(self, key: str, epoch: int) -> None:
        self._reached[key] = max(self._reached.get(key, 0), epoch)

    def died(self, key: str) -> bool:
        """Whether a node whose worker died is tried again. Preempted again and again, a run gets done all the same; one
        that needs too much memory does not."""
        reached = self._reached.get(key, 0)
        further = reached > self._reached_before.get(key, 0)
        self._reached_before[key] = reached
        self._deaths[key] = 1 if further else self._deaths.get(key, 0) + 1
        return self._deaths[key] < _DEATHS_LIMIT

    def succeeded(self, device: str) -> None:
        self._in_a_row[device] = 0

    def failed(self, key: str, device: str, devices: Collection[str]) -> bool:
        """Whether the node is to be tried on another of the devices. What fails on two is not the devices' fault."""
        if key in self._failed_on:
            self._in_a_row[self._failed_on[key]] = self._in_a_row[device] = 0
            return False
        self._in_a_row[device] = self._in_a_row.get(device, 0) + 1
        self._failed_on[key] = device
        return self._others_work(device, devices)

    def suits(self, key: str, device: str, devices: Collection[str]) -> bool:
        """Whether the node may be given to the device: it did not fail there, unless there is no other."""
        return self._failed_on.get(key) != device or not self._others_work(device, devices)

    def is_left_out(self, device: str, devices: Collection[str]) -> bool:
        return self._in_a_row.get(device, 0) >= _FAILURES_LIMIT and self._others_work(device, devices)

    def _others_work(self, device: str, devices: Collection[str]) -> bool:
        return any(d not in (device, "") and self._in_a_row.get(d, 0) < _FAILURES_LIMIT for d in devices)
