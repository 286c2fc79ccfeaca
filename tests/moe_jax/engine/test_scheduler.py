"""Who runs next: fairness, priorities, chunks, and pages that always suffice."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_jax.cache.paged_kv import pages_for
from moe_jax.engine.scheduler import Job, Scheduler

PAGES, ROWS, BUDGET = 24, 5, 32


def job(arrival=0, prompt=20, new=10, **options) -> Job:
    return Job(arrival=arrival, prompt=prompt, limit=prompt + new - 1, **options)


def scheduler(**options) -> Scheduler[Job]:
    return Scheduler(**{"rows": ROWS, "pages": PAGES, "budget": BUDGET} | options)


def admit_all(one: Scheduler[Job]) -> list[Job]:
    found = []
    while (admission := one.admit()) is not None:
        found.append(admission.job)
    return found


def run(step) -> None:
    """What the engine does with a step, as far as the scheduler can see."""
    for one, count in step.run:
        one.length += count
        one.todo -= count
        if one.todo == 0:
            one.decoding, one.todo = True, 1


def test_requests_start_in_the_order_of_their_arrival():
    one = scheduler()
    jobs = [job(arrival=i) for i in range(7)]
    for index in (3, 0, 6, 2, 1, 5, 4):
        one.add(jobs[index])
    assert admit_all(one) == jobs[:ROWS]
    assert one.waiting == jobs[ROWS:]


def test_higher_priority_starts_first():
    one = scheduler(rows=2)
    jobs = [job(arrival=i, priority=i % 2) for i in range(4)]
    for each in jobs:
        one.add(each)
    assert admit_all(one) == [jobs[1], jobs[3]]


def test_nobody_overtakes_a_request_that_does_not_fit_yet():
    one = scheduler()
    for index, prompt in enumerate((200, 200, 4)):
        one.add(job(arrival=index, prompt=prompt))
    assert [each.arrival for each in admit_all(one)] == [0]
    assert [each.arrival for each in one.waiting] == [1, 2]


def test_a_request_of_higher_priority_takes_the_pages_of_lower_ones():
    one = scheduler()
    low = [job(arrival=i, prompt=100) for i in range(3)]
    for each in low:
        one.add(each)
    admit_all(one)
    urgent = job(arrival=9, prompt=200, priority=1)
    one.add(urgent)
    admission = one.admit()
    assert admission.job is urgent
    # The last to arrive go first, and only as many as must.
    assert admission.stopped == (low[2], low[1])
    assert (low[1].restarts, low[0].restarts) == (1, 0)
    assert one.waiting == low[1:]


def test_equal_priority_stops_nobody():
    one = scheduler(rows=1)
    for index in range(2):
        one.add(job(arrival=index, priority=3))
    assert len(admit_all(one)) == 1


def test_prompts_fill_what_decoding_leaves_of_a_step():
    one = scheduler()
    jobs = [job(arrival=0, prompt=5), job(arrival=1, prompt=40), job(arrival=2, prompt=40)]
    for each in jobs:
        one.add(each)
    admit_all(one)
    step = one.step(PAGES)
    assert [count for _, count in step.run] == [5, 27]
    run(step)
    step = one.step(PAGES)
    assert [(each.arrival, count) for each, count in step.run] == [(0, 1), (1, 13), (2, 18)]


def test_guesses_are_dropped_where_the_step_is_full():
    one = scheduler(budget=6)
    jobs = [job(arrival=i, prompt=1) for i in range(3)]
    for each in jobs:
        one.add(each)
    admit_all(one)
    run(one.step(PAGES))
    for each in jobs:
        each.todo = 4
    assert [count for _, count in one.step(PAGES).run] == [4, 1, 1]


@pytest.mark.parametrize("seats, needed", [(1, 3), (4, 9)])
def test_beams_share_the_full_pages_of_their_prompt(seats, needed):
    assert job(prompt=20, new=20, seats=seats).most_pages == needed


@pytest.mark.parametrize("share, running", [(1.0, 2), (0.0, 5)])
def test_a_share_below_one_starts_more(share, running):
    """Each needs 10 of 24 pages at its limit, and one at first."""
    one = scheduler(expected_share=share)
    for index in range(5):
        one.add(job(arrival=index, prompt=16, new=145))
    assert len(admit_all(one)) == running


def test_requests_that_end_early_make_room_in_time():
    """20 and 10 pages at their limits, but the first has ended before the second grows."""
    one = scheduler()
    first, second = job(prompt=300, new=5), job(arrival=1, prompt=16, new=100)
    one.add(first)
    one.add(second)
    assert admit_all(one) == [first, second]


def test_what_must_run_without_pages_is_a_bug():
    one = scheduler()
    one.add(job(restartable=False))
    admit_all(one)
    with pytest.raises(RuntimeError, match="1 free pages do not suffice"):
        one.step(1)


class Machine(RuleBasedStateMachine):
    """Random requests on a pool that counts pages; texts end where they like."""

    share = 1.0

    def __init__(self):
        super().__init__()
        self.one = scheduler(expected_share=self.share)
        self.arrivals = 0

    def held(self, each: Job) -> int:
        return pages_for(each.length) if each.held is None else each.held

    @rule(
        prompt=st.integers(1, 150),
        new=st.integers(1, 120),
        priority=st.integers(0, 1),
        beams=st.sampled_from([1, 1, 1, 3]),
    )
    def submit(self, prompt, new, priority, beams):
        each = job(
            self.arrivals, prompt, new, priority=priority, seats=beams, restartable=beams == 1
        )
        if each.most_pages <= PAGES:
            self.arrivals += 1
            self.one.add(each)

    @precondition(lambda self: self.one.running or self.one.waiting)
    @rule(ends=st.sets(st.integers(0, ROWS - 1)), alike=st.booleans())
    def step(self, ends, alike):
        while (admission := self.one.admit()) is not None:
            for each in admission.stopped:
                self.stop(each)
        while True:
            free = PAGES - sum(self.held(each) for each in self.one.running)
            step = self.one.step(free)
            if step.stop is None:
                break
            # With a share of 1 nobody starts who might have to be stopped.
            assert self.share < 1
            self.stop(step.stop)
        assert step.run, "somebody waits, and nobody runs"
        assert sum(each.active * count for each, count in step.run) <= BUDGET
        decoding = [each for each in self.one.running if each.decoding]
        assert {id(e) for e in decoding} <= {id(e) for e, _ in step.run}, "a decoding one waits"
        run(step)
        for each in self.one.running:
            if each.seats > 1:
                # Beams that come from one share all but what they write next.
                each.held = pages_for(each.length) if alike else each.pages_at(each.length)
        for index, each in enumerate(list(self.one.running)):
            full = each.length >= each.limit and each.decoding
            if full or (each.decoding and index in ends):
                self.one.remove(each)

    def stop(self, each):
        generated = max(0, each.length - each.prompt)
        each.prompt += generated
        each.length, each.todo, each.decoding = 0, each.prompt, False

    @invariant()
    def pages_suffice(self):
        assert sum(self.held(each) for each in self.one.running) <= PAGES
        assert sum(each.seats for each in self.one.running) <= ROWS

    @invariant()
    def queues_are_in_order(self):
        for queue in (self.one.running, self.one.waiting):
            keys = [(-each.priority, each.arrival) for each in queue]
            assert keys == sorted(keys)

    def teardown(self):
        """Everybody is served in the end."""
        for _ in range(5_000):
            if not (self.one.running or self.one.waiting):
                return
            self.step(ends=set(), alike=False)
        pytest.fail("requests wait for ever")


class Optimist(Machine):
    """Starts requests that will not fit at their limits."""

    share = 0.2


TestSure = Machine.TestCase
TestOptimist = Optimist.TestCase
TestSure.settings = TestOptimist.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
