"""RadixCache: the prefix tree over full pages. A node is one page of K,V and the cache keys of its tokens.

Owns which page holds which prefix, and which prefix goes first when room is needed. Called by allocation (enter, pin,
unpin, evict) and admission (match). Knows no sequences, no tokens as a model reads them and no images.

A pin on a node pins the path to the root. Unpinned nodes stand in one list, least recently unpinned first. A path is
unpinned from its leaf up, so a node always stands after its children: the front of the list is always a leaf, and
evicting the least recently used leaf is taking the front, O(1).
"""

from __future__ import annotations

from collections import OrderedDict

from lightvl.scheduling.pages import PagePool

PageKey = tuple[int, ...]


class RadixNode:
    """The page at `depth - 1` of a prefix (the root has depth 0 and no page). `page` is -1 after eviction."""

    __slots__ = ("children", "depth", "key", "page", "parent", "pins")

    depth: int

    def __init__(self, parent: RadixNode | None, key: PageKey, page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.depth = 0 if parent is None else parent.depth + 1
        self.pins = 0
        self.children: dict[PageKey, RadixNode] = {}

    @property
    def is_in_tree(self) -> bool:
        return self.page >= 0 or self.parent is None


class RadixCache:
    def __init__(self, page_size: int, pages: PagePool) -> None:
        self.page_size = page_size
        self.root = RadixNode(None, (), -1)
        self.num_nodes = 0
        self._pages = pages
        self._unpinned: OrderedDict[RadixNode, None] = OrderedDict()

    @property
    def num_evictable(self) -> int:
        return len(self._unpinned)

    def match(self, keys: list[int], max_tokens: int, after: RadixNode | None = None) -> RadixNode:
        """The deepest node whose prefix is a prefix of `keys[:max_tokens]`. Changes nothing: pin before relying on it.
        `after`: a node already known to match, to go on from."""
        node = after if after is not None and after.is_in_tree else self.root
        size = self.page_size
        for start in range(node.depth * size, max_tokens - size + 1, size):
            child = node.children.get(tuple(keys[start : start + size]))
            if child is None:
                break
            node = child
        return node

    def path_pages(self, node: RadixNode) -> list[int]:
        """Pages of the prefix that ends in this node, in order."""
        pages = []
        while node.parent is not None:
            pages.append(node.page)
            node = node.parent
        pages.reverse()
        return pages

    def count_unpinned(self, node: RadixNode) -> int:
        """Nodes on the path to the root that pinning it would take from the evictable ones."""
        count = 0
        while node.parent is not None and node.pins == 0:
            count += 1
            node = node.parent
        return count

    def pin(self, node: RadixNode) -> None:
        while node.parent is not None:
            if node.pins == 0:
                del self._unpinned[node]
            node.pins += 1
            node = node.parent

    def unpin(self, node: RadixNode) -> None:
        while node.parent is not None:
            assert node.pins > 0
            node.pins -= 1
            if node.pins == 0:
                self._unpinned[node] = None  # leaf first: see the module's head
            node = node.parent

    def extend(self, node: RadixNode, key: PageKey, page: int) -> RadixNode:
        """Enter one page after a pinned node and pin the new node too. If the tree has this prefix already, its own
        page stays and the caller's is not entered."""
        child = node.children.get(key)
        if child is None:
            child = RadixNode(node, key, page)
            node.children[key] = child
            self.num_nodes += 1
            self._pages.enter_cache(page)
        elif child.pins == 0:
            del self._unpinned[child]
        child.pins += 1
        return child

    def evict(self, num_pages: int) -> int:
        """Forget up to that many least recently used unpinned pages; returns how many were forgotten."""
        count = 0
        while count < num_pages and self._unpinned:
            node, _ = self._unpinned.popitem(last=False)
            assert not node.children and node.parent is not None
            del node.parent.children[node.key]
            self._pages.leave_cache(node.page)
            node.page = -1
            count += 1
        self.num_nodes -= count
        return count

    def check(self) -> None:
        """Walk the whole tree: links, pins, the order of the unpinned, and that the pool knows each page once."""
        order = {node: idx for idx, node in enumerate(self._unpinned)}
        seen: set[int] = set()
        stack = [self.root]
        while stack:
            node = stack.pop()
            assert node.parent is None or node.pins >= sum(child.pins for child in node.children.values())
            for key, child in node.children.items():
                assert child.parent is node and child.key == key and child.depth == node.depth + 1
                assert len(key) == self.page_size, "not a full page"
                assert child.page not in seen, f"page {child.page} is in the tree twice"
                assert self._pages.is_in_cache(child.page)
                assert (child.pins == 0) == (child in order), "the list of unpinned nodes is wrong"
                if node in order:
                    assert order[node] > order[child], "a parent would be evicted before its child"
                seen.add(child.page)
                stack.append(child)
        assert len(seen) == self.num_nodes
        assert len(seen) == sum(self._pages.is_in_cache(page) for page in range(self._pages.num_pages))
        assert all(node.page in seen for node in order)
