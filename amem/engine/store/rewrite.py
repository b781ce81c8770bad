"""Files are immutable, so what has to leave one is left out of a copy that takes its place."""

from __future__ import annotations

from amem.engine.store.disk import DiskTier, Item, Segment
from amem.engine.store.shelf import Shelf


def swap_files(shelf: Shelf, disk: DiskTier, group: list[Segment], without: frozenset[bytes]) -> None:
    """Put one file, lacking the chunks `without`, in the place of several. `shelf.io` is held.

    Raises OSError when the new file cannot be written; the old ones are as before then. Names are not synced here.
    """
    items: list[Item] = []
    damaged = 0
    for segment in group:
        loaded, bad = disk.load_items(segment, {record[0] for record in segment.records} - without)
        items += loaded
        damaged += bad
    draft = disk.draft(group[0].tenant, items) if items else None
    with shelf.changed:
        shelf.counters["corrupt"] += damaged
        # A reader that met a damaged file has dropped it meanwhile: then its records are no longer wanted.
        if any(disk.segments.get(segment.name) is not segment for segment in group):
            _abandon(disk, draft)
            return
        try:
            # The old names go first: a crash in between costs KV, never brings erased KV back.
            for segment in group:
                disk.remove(segment)
            if draft is not None:
                disk.commit(draft)
        except OSError:
            _abandon(disk, draft)
            draft = None
            raise
        finally:
            if draft is not None:
                shelf.place(draft)
            for segment in group:
                if segment.name not in disk.segments:
                    shelf.detach(segment)


def _abandon(disk: DiskTier, draft: Segment | None) -> None:
    if draft is not None:
        disk.discard(draft)
