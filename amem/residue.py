"""Whether bytes are really gone: blocks sampled from files before, searched for in every file after."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 64
PER_FILE = 64
_FEWEST_VALUES = 24


@dataclass(frozen=True)
class Samples:
    """Blocks of 64 bytes, spread over the files of a directory; blocks that might be there by chance are left out."""

    blocks: tuple[bytes, ...]

    @classmethod
    def of(cls, directory: Path) -> Samples:
        found: dict[bytes, None] = {}
        for path in _files(directory):
            data = path.read_bytes()
            stride = max(BLOCK_BYTES, len(data) // PER_FILE)
            blocks = (data[start : start + BLOCK_BYTES] for start in range(0, len(data) - BLOCK_BYTES, stride))
            found.update(dict.fromkeys(block for block in blocks if len(set(block)) >= _FEWEST_VALUES))
        return cls(tuple(found))

    def found_in(self, directory: Path) -> int:
        """How many of the blocks are still somewhere below `directory`."""
        left = set(self.blocks)
        for path in _files(directory):
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                left -= {block for block in left if data.find(block) >= 0}
        return len(self.blocks) - len(left)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size)
