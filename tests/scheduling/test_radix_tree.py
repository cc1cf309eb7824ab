"""RadixCache against a plain list of prefixes: matching, sharing, pins, and the order of eviction."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.radix_cache import RadixCache, RadixNode

PAGE = 2


def enter(pool: PagePool, cache: RadixCache, keys: list[int]) -> RadixNode:
    """As a sequence does: pin the match, add pages of its own, let everything go but the pin."""
    node = cache.match(keys, len(keys))
    cache.pin(node)
    for start in range(node.depth * PAGE, len(keys) - PAGE + 1, PAGE):
        if not pool.num_ready:
            cache.evict(1)
        pages = pool.allocate(1)
        if pages is None:
            break
        node = cache.extend(node, tuple(keys[start : start + PAGE]), pages[0])
        pool.release(pages)
    return node


def test_match_takes_full_pages_only_and_goes_on_from_a_node() -> None:
    pool = PagePool(8)
    cache = RadixCache(PAGE, pool)
    enter(pool, cache, [1, 2, 3, 4, 5])
    assert cache.match([1, 2, 3, 4, 5], 5).depth == 2
    assert cache.match([1, 2, 3, 4], 3).depth == 1
    assert cache.match([1, 9, 3, 4], 4) is cache.root
    middle = cache.match([1, 2], 2)
    assert cache.match([1, 2, 3, 4], 4, middle).depth == 2
    assert len(cache.path_pages(cache.match([1, 2, 3, 4], 4))) == 2


def test_a_node_that_was_evicted_is_no_place_to_go_on_from() -> None:
    pool = PagePool(8)
    cache = RadixCache(PAGE, pool)
    node = enter(pool, cache, [1, 2, 3, 4])
    cache.unpin(node)
    assert cache.evict(1) == 1 and not node.is_in_tree
    assert cache.match([1, 2, 3, 4], 4, node).depth == 1


def test_the_least_recently_used_leaf_goes_first() -> None:
    pool = PagePool(8)
    cache = RadixCache(PAGE, pool)
    nodes = [enter(pool, cache, keys) for keys in ([1, 1, 2, 2], [1, 1, 3, 3], [4, 4])]
    for node in nodes:
        cache.unpin(node)
    cache.pin(nodes[0])
    cache.unpin(nodes[0])
    cache.check()
    order = []
    while cache.num_nodes:
        before = {n for n in nodes if n.is_in_tree}
        cache.evict(1)
        cache.check()
        order += [n.key for n in before if not n.is_in_tree] or [(1, 1)]
    assert order == [(3, 3), (4, 4), (2, 2), (1, 1)]
    assert pool.num_free == 8


def test_image_keys_of_128_bits_and_more_are_told_apart() -> None:
    pool = PagePool(4)
    cache = RadixCache(PAGE, pool)
    enter(pool, cache, [1 << 128 | 7, 1 << 128 | 7])
    assert cache.match([7, 7], 2) is cache.root
    assert cache.match([1 << 128 | 7, 1 << 128 | 7], 2).depth == 1


class Tree(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(10)
        self.cache = RadixCache(PAGE, self.pool)
        self.pinned: list[tuple[RadixNode, list[int]]] = []

    @rule(keys=st.lists(st.integers(0, 2), max_size=9))
    def enter(self, keys: list[int]) -> None:
        node = enter(self.pool, self.cache, keys)
        self.pinned.append((node, keys[: node.depth * PAGE]))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        node, _ = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.cache.unpin(node)

    @rule(num_pages=st.integers(0, 4))
    def evict(self, num_pages: int) -> None:
        evictable = self.cache.num_evictable
        assert self.cache.evict(num_pages) == min(num_pages, evictable)

    @invariant()
    def holds(self) -> None:
        self.cache.check()
        self.pool.check()
        for node, keys in self.pinned:
            assert self.cache.match(keys, len(keys)) is node
        pinned = {tuple(keys[:end]) for _, keys in self.pinned for end in range(PAGE, len(keys) + 1, PAGE)}
        assert self.cache.num_evictable == self.cache.num_nodes - len(pinned)


TestTree = Tree.TestCase
TestTree.settings = settings(
    max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
