"""How often a process that dies is started again, and after which pauses."""

from __future__ import annotations

from collections import deque

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


class RestartBudget:
    """Restarts within a sliding window of time.

    Args:
        most: restarts within the window.
        window_seconds: its length.
    """

    def __init__(self, most: int, window_seconds: float) -> None:
        self._most = most
        self._window_seconds = window_seconds
        self._times: deque[float] = deque()

    def take(self, now: float) -> float | None:
        """Take one restart.

        Args:
            now: monotonic time in seconds.

        Returns:
            the pause before it in seconds, which doubles from one to the next within the window;
            None if there were as many as may be.
        """
        while self._times and self._times[0] <= now - self._window_seconds:
            self._times.popleft()
        if len(self._times) >= self._most:
            return None
        self._times.append(now)
        doubled = FIRST_PAUSE_SECONDS * 2.0 ** min(len(self._times) - 1, 60)
        return min(doubled, LONGEST_PAUSE_SECONDS)
