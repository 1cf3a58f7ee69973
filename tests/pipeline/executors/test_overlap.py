"""Items made in one thread and used in another: order, bounds, and every way it may end."""

import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.executors.overlap import overlapped

WITHIN_S = 60.0  # of an event that comes; a test that waits this long has failed


@dataclass
class Item:
    number: int
    __hash__ = object.__hash__


@dataclass
class Maker:
    """Yields numbered items; says when each was made, how many were alive, and that it was closed.

    ``before`` is called with the number of an item that is about to be made.
    """

    count: int
    before: Callable[[int], None] = lambda number: None
    alive: "weakref.WeakSet[Item]" = field(default_factory=weakref.WeakSet)
    most_alive: int = 0
    is_closed: bool = False
    made: dict[int, threading.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.made = {number: threading.Event() for number in range(self.count)}

    def items(self) -> Generator[Item, None, None]:
        try:
            for number in range(self.count):
                self.before(number)
                item = Item(number)
                self.alive.add(item)
                self.most_alive = max(self.most_alive, len(self.alive))
                self.made[number].set()
                yield item
                del item
        finally:
            self.is_closed = True


def run(
    maker: Maker, use: Callable[[Iterator[Item]], Iterator[Any]], *, most: int = 3
) -> Iterator[Any]:
    return overlapped(maker.items(), use, bytes_of=lambda item: 1, most_bytes=most)


def numbers(items: Iterator[Item]) -> Iterator[int]:
    for item in items:
        yield item.number


def raise_(error: BaseException) -> None:
    raise error


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread of ours outlives what started it."""
    yield
    assert not [t for t in threading.enumerate() if t.name == "beside-engine"]


@pytest.mark.parametrize("most", [0, 1, 7, 1000])
def test_all_items_are_used_once_and_in_order(most: int) -> None:
    maker = Maker(500)
    assert list(run(maker, numbers, most=most)) == list(range(500))
    assert maker.is_closed and not maker.alive


def test_the_maker_goes_on_as_far_as_the_bound_while_an_item_is_used_and_never_further() -> None:
    maker = Maker(100)

    def use(items: Iterator[Item]) -> Iterator[int]:
        for item in items:
            ahead = item.number + 4  # three wait, one more is made and waits for room
            if ahead < maker.count:
                assert maker.made[ahead].wait(WITHIN_S)
            yield item.number
            del item

    assert list(run(maker, use, most=3)) == list(range(100))
    assert maker.most_alive == 5  # those four, and the one in use


def test_an_item_above_the_bound_passes_alone() -> None:
    maker = Maker(20)
    made = overlapped(maker.items(), numbers, bytes_of=lambda item: 10, most_bytes=3)
    assert list(made) == list(range(20))
    assert maker.most_alive <= 3  # in use, waiting, made


def test_items_are_made_where_the_caller_is_and_answers_come_before_the_end() -> None:
    places: list[threading.Thread] = []
    goes_on = threading.Event()

    def before(number: int) -> None:
        places.append(threading.current_thread())
        if number == 9:  # not before the first answer was taken
            assert goes_on.wait(WITHIN_S)

    def use(items: Iterator[Item]) -> Iterator[threading.Thread]:
        for item in items:
            yield threading.current_thread()
            if item.number == 4:
                goes_on.set()

    answers = list(run(Maker(10, before), use))
    assert set(places) == {threading.current_thread()}
    assert len(set(answers)) == 1 and answers[0] is not threading.current_thread()


def test_a_failing_user_ends_the_run_with_its_error_though_the_maker_waits_for_room() -> None:
    maker = Maker(1000)

    def use(items: Iterator[Item]) -> Iterator[int]:
        yield next(items).number
        assert maker.made[4].wait(WITHIN_S)  # the maker has no room left
        raise OSError("no space left")

    answers = run(maker, use)
    assert next(answers) == 0
    with pytest.raises(OSError, match="no space left"):
        list(answers)
    assert maker.is_closed and len(maker.made) > sum(e.is_set() for e in maker.made.values())


def test_a_failing_maker_ends_the_run_after_all_that_it_made_was_used() -> None:
    error = ValueError("the engine died")
    maker = Maker(10, lambda number: raise_(error) if number == 6 else None)
    seen: list[BaseException] = []

    def use(items: Iterator[Item]) -> Iterator[int]:
        try:
            yield from numbers(items)
        except ValueError as met:  # what is half written is taken back, as in one thread
            seen.append(met)
            raise

    answers = run(maker, use)
    assert [next(answers) for _ in range(6)] == list(range(6))
    with pytest.raises(ValueError, match="the engine died") as caught:
        next(answers)
    assert caught.value is error and seen == [error]


def test_a_user_that_stops_early_ends_the_maker() -> None:
    maker = Maker(1000)
    assert list(run(maker, lambda items: iter([next(items).number]))) == [0]
    assert maker.is_closed


def ended_use(seen: list[str]) -> Callable[[Iterator[Item]], Iterator[int]]:
    def use(items: Iterator[Item]) -> Iterator[int]:
        try:
            yield from numbers(items)
            seen.append("whole")
        except Exception:  # noqa: BLE001  no handler of errors may go on
            seen.append("caught")
        finally:
            seen.append("ended")

    return use


def test_answers_that_nobody_wants_end_both() -> None:
    maker, seen = Maker(1000), []  # type: tuple[Maker, list[str]]
    answers = run(maker, ended_use(seen))
    assert next(answers) == 0
    answers.close()  # type: ignore[attr-defined]
    assert maker.is_closed and seen == ["ended"]


def test_an_interrupt_while_an_item_is_made_ends_both() -> None:
    seen: list[str] = []
    maker = Maker(1000, lambda number: signal.raise_signal(signal.SIGINT) if number == 5 else None)
    with pytest.raises(KeyboardInterrupt):
        list(run(maker, ended_use(seen), most=1000))
    assert maker.is_closed and seen == ["ended"]


def test_an_interrupt_while_the_maker_waits_for_room_ends_both() -> None:
    maker = Maker(1000)

    def use(items: Iterator[Item]) -> Iterator[int]:
        yield next(items).number
        assert maker.made[4].wait(WITHIN_S)
        os.kill(os.getpid(), signal.SIGINT)
        yield from numbers(items)

    with pytest.raises(KeyboardInterrupt):
        list(run(maker, use))
    assert maker.is_closed
