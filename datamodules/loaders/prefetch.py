"""Work done by threads while its results are not needed yet."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], count: int, threads: int = 1
) -> Iterator[Result]:
    """Yield ``function(item)`` of all items in order, each begun up to ``count`` results early.

    No more than ``count`` results wait, however slowly they are taken. What the function raises is
    raised where its result would come. The threads end with the last item, or when the iterator is
    dropped.
    """
    pool = ThreadPoolExecutor(threads, "prefetch")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(waiting) > count:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        pool.shutdown(wait=False)  # who takes the last result seldom asks for one more
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
