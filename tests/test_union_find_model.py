"""The racing kernels of kernels/triton_union_find.py as a model: lanes take turns at every access of the memory.

The interpreter runs one program after the other, so it cannot show what races do. Here a lane is a generator that
yields each access and is sent its result; a schedule says whose access comes next. Tiny cases run in every order there
is, larger ones in many random orders, also with loads that return what a slot held before. The steps are the kernels',
line by line and under the same names: test_union_find_quotes.py holds them to that. To show that the search would
notice, it also runs kernels that are wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence

import pytest

FIRST_RANK = -3  # as in the kernels
Lane = Generator[tuple, int, None]

# ---------------------------------------------------------------------------------- the kernels


def join(voxel: int, touched: Sequence[int], wrong: str = "") -> Lane:
    """A lane of components_join_kernel; ``touched``: the voxels whose runs its own run touches."""
    label = yield "load", voxel  # label = _load_block(...)
    ours = label - 1
    for neighbour in touched:  # theirs = voxel + _offset(todo & -todo, ...)
        theirs, joined = neighbour, False
        while not joined:  # while tl.max(todo, 0) > 0
            p = (yield "load", ours) - 1  # p = tl.load(ptr + ours, ...) - 1
            q = (yield "load", theirs) - 1  # q = tl.load(ptr + theirs, ...) - 1
            small, large = min(p, q), max(p, q)
            at_roots = p == ours and q == theirs and p != q
            old = large
            if at_roots:  # old = tl.atomic_min(ptr + large, small + 1, mask=at_roots, ...) - 1
                if wrong == "stores":
                    yield "store", large, small + 1
                else:
                    old = (yield "atomic_min", large, small + 1) - 1
                if wrong == "ignores what it has replaced":
                    old = large
            late = at_roots and old != large
            joined = p == q or (at_roots and old == large)
            ours = old if late else small if at_roots else p
            theirs = small if late else q


def rank(voxel: int, rank_in_tile: int, wrong: str = "") -> Lane:
    """A lane of components_rank_kernel; ``rank_in_tile`` is what the sum over the tile gives, for a root."""
    label = yield "load", voxel
    node = label - 1
    is_root = node == voxel
    moves = not is_root
    while moves:
        parent = (yield "load", node) - 1
        moves = parent >= 0 and parent != node
        node = parent if moves else node
    found = FIRST_RANK - rank_in_tile if is_root else node + 1
    if wrong == "has ranks that look like parents":
        found = abs(found)
    if found != label:
        yield "store", voxel, found


def number(voxel: int, roots_before: Callable[[int], int], wrong: str = "") -> Lane:
    """A lane of components_number_kernel."""
    label = yield "load", voxel
    points = label > 0
    root = label - 1 if points else voxel
    seen = (yield "load", root) if points else label
    ranked = seen <= FIRST_RANK or wrong == "takes an id for a rank"
    found = roots_before(root) + 1 - (seen - FIRST_RANK) if ranked else seen
    yield "store", voxel, found


# ---------------------------------------------------------------------------------- the machine


class Machine:
    """Memory and lanes in the middle of a kernel."""

    def __init__(self, slots: Sequence[int], lanes: Sequence[Lane]) -> None:
        self.slots = list(slots)
        self.past = [[value] for value in slots]  # all that a slot has held
        self.lanes = list(lanes)
        self.next: list[tuple | None] = [next(lane) for lane in lanes]

    def waiting(self) -> list[int]:
        return [i for i, access in enumerate(self.next) if access is not None]

    def step(self, i: int, stale: random.Random | None = None) -> None:
        """Do the next access of a lane; with ``stale``, a load returns something that the slot has held."""
        kind, slot, *value = self.next[i]
        result = stale.choice(self.past[slot]) if stale and kind == "load" else self.slots[slot]
        if kind != "load":
            self.slots[slot] = min(self.slots[slot], *value) if kind == "atomic_min" else value[0]
            self.past[slot].append(self.slots[slot])
        try:
            self.next[i] = self.lanes[i].send(result)
        except StopIteration:
            self.next[i] = None

    def state(self) -> tuple:
        """What all that follows depends on: the memory, and where each lane is with which values."""
        frames = [lane.gi_frame for lane in self.lanes]  # None: it has ended
        lanes = [
            f and (f.f_lasti, *(item for item in f.f_locals.items() if type(item[1]) in (int, bool))) for f in frames
        ]
        return tuple(self.slots), tuple(lanes)


def every_outcome(slots: Sequence[int], lanes: Callable[[], list[Lane]]) -> tuple[set[tuple[int, ...]], int]:
    """What the memory holds at the end, in any order of accesses; and how many states there are on the way."""
    outcomes, seen, schedules = set(), set(), [()]
    while schedules:
        schedule = schedules.pop()
        assert len(schedule) < 200, "it does not end"
        machine = Machine(slots, lanes())
        for i in schedule:
            machine.step(i)
        if (state := machine.state()) in seen:
            continue
        seen.add(state)
        schedules += [(*schedule, i) for i in machine.waiting()]
        if not machine.waiting():
            outcomes.add(tuple(machine.slots))
    return outcomes, len(seen)


def some_outcome(slots: Sequence[int], lanes: list[Lane], order: random.Random, stale: bool) -> list[int]:
    """Run once, a random lane next; some orders prefer lanes, so that one falls far behind."""
    machine = Machine(slots, lanes)
    weights = [order.choice((0.02, 1, 1, 1)) for _ in lanes]
    for _ in range(10_000 * len(lanes) + 1):
        if not (waiting := machine.waiting()):
            return machine.slots
        machine.step(order.choices(waiting, [weights[i] for i in waiting])[0], order if stale else None)
    raise AssertionError("it does not end")


def root_of(slots: Sequence[int], node: int) -> int:
    while slots[node] != node + 1:
        assert slots[node] <= node, "a parent is a voxel before"
        node = slots[node] - 1
    return node


# ---------------------------------------------------------------------------------- every order of tiny cases

# number of voxels, and per lane: its voxel and those it touches
TINY = {
    "two lanes link the same root": (3, [(2, [1]), (2, [0])]),
    "a chain from both ends": (3, [(1, [0]), (2, [1])]),
    "three lanes, three roots": (3, [(1, [0]), (2, [1]), (2, [0])]),
    "a ring": (4, [(3, [2]), (1, [0]), (2, [0])]),
    "two contacts each": (4, [(3, [0, 1]), (2, [1, 0])]),
    "the same pair twice": (2, [(1, [0]), (1, [0]), (1, [0])]),
    "three lanes link the same root": (4, [(3, [0]), (3, [1]), (3, [2])]),
}


def wrong_outcomes(name: str, wrong: str = "") -> tuple[set, int]:
    voxels, work = TINY[name]
    truth = components(voxels, work)
    outcomes, states = every_outcome(range(1, voxels + 1), lambda: [join(*lane, wrong=wrong) for lane in work])
    assert outcomes
    return {slots for slots in outcomes if [root_of(slots, voxel) for voxel in range(voxels)] != truth}, states


def components(voxels: int, work: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """The smallest voxel of everyone's component, by spreading it until nothing changes."""
    least = list(range(voxels))
    pairs = [(voxel, other) for voxel, touched in work for other in touched]
    for _ in range(voxels):
        for a, b in pairs:
            least[a] = least[b] = min(least[a], least[b])
    return least


@pytest.mark.parametrize("name", TINY)
def test_join_in_every_order(name):
    wrong, states = wrong_outcomes(name)
    assert states >= 20
    assert not wrong


@pytest.mark.parametrize("wrong", ["stores", "ignores what it has replaced"])
def test_every_order_finds_a_wrong_join(wrong):
    assert wrong_outcomes("two lanes link the same root", wrong)[0]
    assert not wrong_outcomes("the same pair twice", wrong)[0]  # two roots alone cannot show it


def ends(wrong: tuple[str, str] = ("", "")) -> set[tuple[int, ...]]:
    """All outcomes of rank and number for trees of voxels 0-3 and 4-5; tiles are of two voxels."""
    slots = [1, 1, 2, 3, 5, 5]
    ranks, before = {0: 0, 4: 0}, [0, 1, 1]
    ranked, _ = every_outcome(slots, lambda: [rank(voxel, ranks.get(voxel, 0), wrong[0]) for voxel in (0, 1, 2, 3)])
    outcomes = set()
    for found in ranked:
        rest = (FIRST_RANK, 5) if not wrong[0] else (abs(FIRST_RANK), 5)
        lanes = lambda: [number(voxel, lambda root: before[root // 2], wrong[1]) for voxel in (0, 1, 3, 5)]  # noqa: E731
        outcomes |= every_outcome((*found[:4], *rest), lanes)[0]
    return outcomes


def test_rank_and_number_in_every_order():
    """Voxels 2 and 4, whose lanes are left out to keep the orders few, keep their parent and their rank."""
    assert ends() == {(1, 1, 1, 1, FIRST_RANK, 2)}


@pytest.mark.parametrize("wrong", [("has ranks that look like parents", ""), ("", "takes an id for a rank")])
def test_every_order_finds_a_wrong_end(wrong):
    assert ends(wrong) != {(1, 1, 1, 1, FIRST_RANK, 2)}


# ---------------------------------------------------------------------------------- whole planes


class Plane:
    """A plane of voxels in raster order, cut into tiles; ``dilated``: corners touch."""

    def __init__(self, hot: Sequence[bool], width: int, tile: int, dilated: bool) -> None:
        self.hot, self.width, self.tile, self.dilated = list(hot), width, tile, dilated

    def at(self, voxel: int, dx: int, dy: int) -> bool:
        y, x = divmod(voxel, self.width)
        return y + dy >= 0 and 0 <= x + dx < self.width and self.hot[voxel + dy * self.width + dx]

    def runs(self) -> list[int]:
        """What components_start_kernel writes."""
        slots: list[int] = []
        for voxel, hot in enumerate(self.hot):
            goes_on = hot and voxel % self.tile > 0 and self.at(voxel, -1, 0)
            slots.append(slots[-1] if goes_on else voxel + 1 if hot else 0)
        return slots

    def contacts(self) -> list[tuple[int, list[int]]]:
        """Per lane of components_join_kernel, what `todo` holds, lowest bit first: _contacts and _SEAM."""
        work = []
        for voxel in [voxel for voxel, hot in enumerate(self.hot) if hot]:
            before, after = self.at(voxel, -1, 0), self.at(voxel, 1, 0)
            left, at, right = (self.at(voxel, dx, -1) for dx in (-1, 0, 1))
            touches = [
                (-self.width - 1, self.dilated and left and not (at or before)),
                (-self.width, at and not (left and before)),
                (-self.width + 1, self.dilated and right and not (at or after)),
                (-1, before and voxel % self.tile == 0),
            ]
            if touched := [voxel + offset for offset, touching in touches if touching]:
                work.append((voxel, touched))
        return work

    def components(self) -> list[int]:
        """The truth, from the neighbours of every voxel."""
        around = [(-1, 0), (0, -1), *([(-1, -1), (1, -1)] if self.dilated else [])]
        pairs = [
            (v, [v + dy * self.width + dx for dx, dy in around if self.at(v, dx, dy)])
            for v, hot in enumerate(self.hot)
            if hot
        ]
        return components(len(self.hot), pairs)

    def labels(self) -> list[int]:
        least = self.components()
        ids = {root: i for i, root in enumerate(sorted({least[v] for v, hot in enumerate(self.hot) if hot}), start=1)}
        return [ids[root] if hot else 0 for root, hot in zip(least, self.hot, strict=True)]


def joined_wrongly(plane: Plane, outcome: Sequence[int]) -> bool:
    truth = plane.components()
    return any(hot and root_of(outcome, voxel) != truth[voxel] for voxel, hot in enumerate(plane.hot))


def wrong_planes(width: int, height: int, tile: int, dilated: bool, wrong: str = "") -> tuple[int, int]:
    """Join all planes of a small shape in every order; how many come out wrong, and the largest number of states."""
    failed = most = 0
    for bits in range(2 ** (width * height)):
        plane = Plane([bool(bits >> i & 1) for i in range(width * height)], width, tile, dilated)
        work = plane.contacts()
        outcomes, states = every_outcome(plane.runs(), lambda work=work: [join(*lane, wrong=wrong) for lane in work])
        failed += any(joined_wrongly(plane, outcome) for outcome in outcomes)
        most = max(most, states)
    return failed, most


@pytest.mark.parametrize("dilated", [False, True])
def test_every_small_plane_in_every_order(dilated):
    for width, height, tile in ((3, 3, 9), (4, 2, 3), (2, 4, 3)):
        failed, most = wrong_planes(width, height, tile, dilated)
        assert failed == 0
        assert most > 50


@pytest.mark.parametrize("wrong", ["stores", "ignores what it has replaced"])
def test_small_planes_find_a_wrong_join(wrong):
    assert wrong_planes(3, 3, 9, False, wrong)[0] > 0


def label(plane: Plane, order: random.Random, stale: bool, wrong: str = "") -> list[int]:
    """All kernels one after the other, each in an order of its own."""
    slots = some_outcome(plane.runs(), [join(*lane, wrong=wrong) for lane in plane.contacts()], order, stale)
    hot = [voxel for voxel, value in enumerate(slots) if value > 0]
    roots = [voxel for voxel in hot if slots[voxel] == voxel + 1]

    def roots_before(voxel: int) -> int:  # components_scan_kernel
        return sum(root < voxel // plane.tile * plane.tile for root in roots)

    lanes = [rank(voxel, sum(root < voxel for root in roots) - roots_before(voxel)) for voxel in hot]
    slots = some_outcome(slots, lanes, order, stale)
    return some_outcome(slots, [number(voxel, roots_before) for voxel in hot], order, stale)


def random_planes(count: int) -> list[Plane]:
    order = random.Random(0)
    densities = (0.3, 0.5, 0.6, 0.7, 0.9)
    return [Plane([order.random() < densities[i % 5] for _ in range(63)], 9, 16, i % 2 == 0) for i in range(count)]


@pytest.mark.parametrize("stale", [False, True])
def test_planes_in_random_orders(stale):
    order = random.Random(1)
    for plane in random_planes(100):
        for _ in range(5):
            assert label(plane, order, stale) == plane.labels()


@pytest.mark.parametrize("wrong", ["stores", "ignores what it has replaced"])
def test_random_orders_find_a_wrong_join(wrong):
    order = random.Random(1)
    assert any(label(plane, order, False, wrong) != plane.labels() for plane in random_planes(100))
