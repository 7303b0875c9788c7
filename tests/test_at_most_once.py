"""No order of faults sends a file twice: the real client, as processes, against a server."""

import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from kaggle_process import submit_once
from kaggle_server import Fault, KaggleServer
from processes import start

FILES = {"one.csv": "id,label\n1,cat\n2,cat\n", "two.csv": "id,label\n1,cat\n2,dog\n"}

files = st.sampled_from(sorted(FILES))
refusals = st.builds(Fault, st.sampled_from(["400", "429"]))
troubles = st.builds(Fault, st.sampled_from(["reset", "500", "html", "half", "slow", "kill"]))
uploads = st.builds(Fault, st.sampled_from(["reset", "500", "slow", "kill"]))
unclear = st.builds(
    Fault,
    st.sampled_from(["reset", "500", "504", "html", "half", "slow", "kill", "interrupt"]),
    st.sampled_from(["no", "yes", "late"]),
)
answers = st.fixed_dictionaries(
    {"CreateSubmission": st.lists(unclear | refusals, max_size=2)},
    optional={
        "StartSubmissionUpload": st.lists(refusals | troubles, min_size=1, max_size=2),
        "PUT": st.lists(uploads, min_size=1, max_size=2),
        "ListSubmissions": st.lists(refusals | troubles, min_size=1, max_size=2),
    },
)


class AtMostOnce(RuleBasedStateMachine):
    """One folder with its list, two files, and a Kaggle where everything goes wrong."""

    orders: ClassVar[set[tuple[str, ...]]] = set()
    starts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.server = self.stack.enter_context(KaggleServer().running())
        self.order: list[str] = []
        for name, content in (FILES | {"sample.csv": FILES["one.csv"]}).items():
            (self.folder / name).write_text(content)

    def existing(self) -> Counter[bytes]:
        """How many submissions of each file there are at Kaggle, or will be."""
        late = [self.server.uploads[int(one["blobFileTokens"][4:])] for _, one in self.server.late]
        return Counter([content for _, content in self.server.made] + late)

    def start(self, *names: str, again: bool = False) -> None:
        """Start ``submit.py`` with each file, at once; without --again nothing comes twice."""
        flags = ["--competition=cifar-10", "--sample=sample.csv", *["--again"] * again]
        environment = self.server.environment | {"HOME": str(self.folder)}
        before = self.existing()
        self.server.clients.clear()
        for name in names:
            process = start(submit_once, [name, *flags], self.folder, environment)
            self.server.clients.append(process)
        for process in self.server.clients:
            process.join()
        self.starts[f"{len(names)} at once{', again' * again}"] += 1
        self.order.append(f"{names} {again} {self.server.faults}")
        for content, number in self.existing().items():
            assert number <= max(1, before[content] + again), self.said()

    @initialize(fault=unclear)
    def lose_an_answer(self, fault: Fault) -> None:
        self.server.faults = {"CreateSubmission": [fault]}
        self.start("one.csv")

    @rule(name=files, faults=answers, again=st.sampled_from([False, False, False, True]))
    def once(self, name: str, faults: dict[str, list[Fault]], again: bool) -> None:
        self.server.faults = faults
        self.start(name, again=again)

    @rule(names=st.tuples(files, files), faults=answers)
    def two_at_once(self, names: tuple[str, str], faults: dict[str, list[Fault]]) -> None:
        self.server.faults = faults
        self.start(*names)

    def said(self) -> str:
        said = self.folder / "said.txt"
        return said.read_text() if said.exists() else ""

    def teardown(self) -> None:
        """When the faults are over, what was started arrives."""
        self.orders.add(tuple(self.order))
        with self.stack:
            self.server.faults = {}
            for name in {name for name in FILES if name in str(self.order)}:
                sent = ("cifar-10", FILES[name].encode())
                for _ in range(5):  # a healthy answer may be late on a busy machine
                    if sent not in self.server.made:
                        self.start(name)
                assert sent in self.server.made, self.said()
            assert "Traceback" not in self.said()


def try_orders(count: int, steps: int) -> None:
    options = settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    AtMostOnce.orders.clear()
    run_state_machine_as_test(AtMostOnce, settings=options)
    starts = ", ".join(f"{number} of {kind}" for kind, number in AtMostOnce.starts.items())
    print(f"{len(AtMostOnce.orders)} orders of faults ({starts}): 0 sent twice.")


def test_nothing_is_sent_twice() -> None:
    try_orders(count=6, steps=2)


@pytest.mark.slow
def test_nothing_is_sent_twice_in_many_orders() -> None:
    try_orders(count=50, steps=6)
