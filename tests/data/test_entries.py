"""Tables of entries: what they give back, their orders, repetitions, and how little memory they take."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.data.documents import Entry
from atma_jax.data.entries import EachAlone, EntryTable, flattened, total_size
from atma_jax.errors import UserError


def entry(file: int, row: int, content: int, size: int) -> Entry:
  return Entry(file, row, hashlib.blake2b(bytes([content]), digest_size=16).digest(), size)


ENTRIES = st.lists(st.builds(entry, st.integers(0, 3), st.integers(0, 1 << 31), st.integers(0, 9), st.integers(0, 1 << 31)))


@settings(max_examples=60, deadline=None)
@given(entries=ENTRIES, earlier=ENTRIES)
def test_as_a_list_of_entries(entries, earlier):
  """Every operation equals the one on a list."""
  table = EntryTable.of(entries)
  assert list(table) == entries and [table[i] for i in range(len(table))] == entries and list(table[1:3]) == entries[1:3]
  assert list(pickle.loads(pickle.dumps(table))) == entries
  assert list(EntryTable.join([table, EntryTable.of(earlier)])) == entries + earlier
  assert [entries[i] for i in table.by_digest()] == sorted(entries, key=lambda e: e.digest)
  assert [entries[i] for i in table.largest_first()] == sorted(entries, key=lambda e: (-e.size, e.digest))
  seen, repeated = {e.digest for e in earlier}, []
  for e in entries:
    repeated.append(e.digest in seen)
    seen.add(e.digest)
  assert table.repeated([EntryTable.of(earlier)]).tolist() == repeated
  assert b"".join(table.fingerprint_pieces()) == b"".join(e.digest + e.size.to_bytes(8, "little") for e in entries)
  groups = EachAlone(table)
  assert [list(group) for group in groups] == [[e] for e in entries] == [list(groups[i]) for i in range(len(groups))]
  assert total_size(groups[1:]) == total_size([[e] for e in entries[1:]]) == sum(e.size for e in entries[1:])
  assert list(flattened(groups)) == list(flattened([entries])) == entries
  assert [e for _, part in table.by_file() for e in part] == entries


def test_what_does_not_fit():
  with pytest.raises(UserError, match="a file has more than"):
    EntryTable.of([entry(0, 1 << 32, 0, 0)])


def test_memory_of_a_document():
  """28 bytes in a table, and less than a hundred while one is made, searched for repetitions and sorted."""
  count = 60_000
  tracemalloc.start()
  try:
    table = EntryTable.join(EntryTable.of(Entry(file, row, (file * 1000 + row).to_bytes(16, "big"), row) for row in range(1000))
                            for file in range(count // 1000))
    assert tracemalloc.get_traced_memory()[0] / count < 36
    table = table.where(~table.repeated([]))
    table.largest_first()
    assert sum(len(group) for group in EachAlone(table)) == count
    peak = tracemalloc.get_traced_memory()[1] / count
  finally:
    tracemalloc.stop()
  assert peak < 100 + (1 << 21) / count, peak  # some entries at a time are Python objects
