"""Pages are conserved, shared and freed; double frees are caught."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsejax.cache.allocator import DUMP_PAGE, PageAllocator
from sparsejax.errors import CapacityError


class AllocatorMachine(RuleBasedStateMachine):
    """Owners take, share and release pages; a multiset of references is the model."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(13)
        self.owners: list[list[int]] = []

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        free = self.allocator.num_free
        if count > free:
            with pytest.raises(CapacityError, match=f"{count} pages wanted, {free} of 12 are free"):
                self.allocator.allocate(count)
            return
        self.owners.append(self.allocator.allocate(count))

    @precondition(lambda self: self.owners)
    @rule(index=st.integers(0, 99), count=st.integers(0, 12))
    def share(self, index, count):
        pages = self.owners[index % len(self.owners)][:count]
        self.allocator.share(pages)
        self.owners.append(list(pages))

    @precondition(lambda self: self.owners)
    @rule(index=st.integers(0, 99))
    def release(self, index):
        self.allocator.release(self.owners.pop(index % len(self.owners)))

    @invariant()
    def references_agree(self):
        wanted = Counter(page for pages in self.owners for page in pages)
        assert DUMP_PAGE not in wanted
        for page in range(1, 13):
            assert self.allocator.references(page) == wanted[page]
            assert self.allocator.is_shared(page) == (wanted[page] > 1)
        assert self.allocator.num_live == len(wanted)
        assert self.allocator.num_free + self.allocator.num_live == self.allocator.capacity == 12


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_a_page_freed_twice_or_never_handed_out_is_an_error():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.release(pages)
    for bad in (pages, [DUMP_PAGE], [9]):
        with pytest.raises(CapacityError, match="not live"):
            allocator.release(bad)
        with pytest.raises(CapacityError, match="not live"):
            allocator.share(bad)
    assert allocator.num_free == 3
