"""One stream, two threads: items are made in the one and used in the other, in order and bounded.

An engine is not to wait while a core compresses what it made before. It stays in the thread that
opened it, where Ctrl-C reaches it; what comes after it runs beside it, up to one window behind.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def overlapped(
    made: Generator[Item, None, None],
    use: Callable[[Iterator[Item]], Iterable[Answer]],
    *,
    bytes_of: Callable[[Item], int],
    most_bytes: int,
) -> Iterator[Answer]:
    """Yield, in order, what ``use`` answers of the items of ``made``.

    ``made`` runs in the calling thread and ``use`` in another. Items that wait between the two hold
    at most ``most_bytes`` by ``bytes_of``, or are one that holds more.

    The outcome is that of one thread. An Exception of ``made`` is met by ``use`` at its place,
    after all that came before it; what ``use`` raises is raised here as soon as ``made`` yields.
    Where the caller is interrupted or wants no more answers, ``use`` is ended at its next item. In
    every case ``made`` is closed and the thread has ended when this returns.
    """
    belt: _Belt[Item, Answer] = _Belt(bytes_of, most_bytes)
    thread = threading.Thread(target=belt.run, args=(use,), name="beside-engine", daemon=True)
    thread.start()
    try:
        while belt.is_wanted:
            try:
                item = next(made)
            except StopIteration:
                belt.end(None)
                break
            except Exception as error:  # noqa: BLE001  ``use`` meets it at its place
                belt.end(error)
                break
            belt.put(item)
            del item  # whoever takes it frees it
            yield from belt.answered()
        yield from belt.rest()
    finally:
        belt.stop()
        made.close()
        thread.join()


class _Stopped(BaseException):
    """Nobody waits for the answers any more; no handler of errors takes it for one."""


class _Belt(Generic[Item, Answer]):
    """What lies between the two threads: items on the way there, answers on the way back."""

    def __init__(self, bytes_of: Callable[[Item], int], most_bytes: int) -> None:
        self._bytes_of, self._most_bytes = bytes_of, most_bytes
        self._changed = threading.Condition()
        self._items: deque[tuple[Item, int]] = deque()
        self._answers: deque[Answer] = deque()
        self._held = 0
        self._is_ended = self._is_stopped = self._is_used = False
        self._made_error: Exception | None = None
        self._use_error: BaseException | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether there is still somebody who takes items."""
        return not self._is_used

    def put(self, item: Item) -> None:
        """Add an item as soon as there is room for it, or nobody is left to take it."""
        size = self._bytes_of(item)
        with self._changed:
            self._changed.wait_for(
                lambda: not self._items or self._held + size <= self._most_bytes or self._is_used
            )
            self._items.append((item, size))
            self._held += size
            self._changed.notify_all()

    def end(self, error: Exception | None) -> None:
        """Say that no item follows, and why if that is no good end."""
        with self._changed:
            self._is_ended, self._made_error = True, error
            self._changed.notify_all()

    def stop(self) -> None:
        """End the use at its next item."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def answered(self) -> Iterator[Answer]:
        """Yield the answers there are."""
        while self._answers:
            yield self._answers.popleft()

    def rest(self) -> Iterator[Answer]:
        """Yield all answers that are still to come, then raise what ended the use, if anything."""
        while not self._is_used:
            with self._changed:
                self._changed.wait_for(lambda: self._answers or self._is_used)
            yield from self.answered()
        yield from self.answered()
        if self._use_error is not None:
            raise self._use_error

    def run(self, use: Callable[[Iterator[Item]], Iterable[Answer]]) -> None:
        """Use the items, in a thread of its own."""
        try:
            for answer in use(self._taken()):
                with self._changed:
                    self._answers.append(answer)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  ``rest`` raises it
            self._use_error = error
        finally:
            with self._changed:
                self._is_used = True
                self._items.clear()
                self._changed.notify_all()

    def _taken(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._is_ended or self._is_stopped)
                if self._is_stopped:
                    raise _Stopped
                if not self._items:
                    break
                item, size = self._items.popleft()
                self._held -= size
                self._changed.notify_all()
            yield item
            del item
        if self._made_error is not None:
            raise self._made_error
