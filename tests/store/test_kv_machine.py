"""Any order of puts, reads, erasures, damage and restarts against a plain dictionary."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kvlib import ALICE, BOB, kv_files, make_kv, open_store, residue, same, spec

from amem.engine.types import ChunkSpec, Tenant

TENANTS = st.sampled_from([ALICE, BOB])
NUMBERS = st.integers(0, 9)


def chunk_of(number: int) -> ChunkSpec:
    """Different lengths; every third chunk is computed behind the one before it."""
    return spec(number, 1 + 11 * number, behind=(f"m{number - 1}",) if number % 3 == 2 else ())


class StoreMachine(RuleBasedStateMachine):
    """`stored` is what may be served. Whether it still is depends on budgets; that it is right does not."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.stored: set[tuple[bytes, int]] = set()
        self.whole = True
        self.ram = 1 << 20
        self.open()

    def open(self) -> None:
        budgets = {"ram_bytes": self.ram, "disk_bytes": 1 << 20, "segment_bytes": 32 << 10}
        self.store = open_store(self.root, linger_s=0.0, **budgets)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    @rule(tenant=TENANTS, number=NUMBERS)
    def put(self, tenant: Tenant, number: int) -> None:
        chunk = chunk_of(number)
        self.store.put(tenant, chunk, make_kv(tenant, chunk))
        self.stored.add((tenant.id, number))

    @rule(tenant=TENANTS, number=NUMBERS)
    def read(self, tenant: Tenant, number: int) -> None:
        chunk = chunk_of(number)
        with self.store.lease(tenant, chunk) as lease:
            if (tenant.id, number) not in self.stored:
                assert lease is None
            elif self.whole:
                assert lease is not None
            if lease is not None:
                assert same(lease.kv, make_kv(tenant, chunk))

    @rule(tenant=TENANTS, numbers=st.lists(NUMBERS, min_size=1, max_size=3))
    def forget(self, tenant: Tenant, numbers: list[int]) -> None:
        memories = tuple(f"m{number}" for number in numbers)
        gone = {
            item
            for item in self.stored
            if item[0] == tenant.id and not {f"m{item[1]}", *chunk_of(item[1]).behind}.isdisjoint(memories)
        }
        receipt = self.store.forget(tenant, memories)
        assert receipt.chunks == len(gone) if self.whole else receipt.chunks <= len(gone)
        self.stored -= gone
        for _, number in gone:
            assert residue(self.root, tenant, chunk_of(number)) == []

    @rule(tenant=TENANTS)
    def forget_tenant(self, tenant: Tenant) -> None:
        self.store.forget(tenant, None)
        self.stored = {item for item in self.stored if item[0] != tenant.id}
        assert not [path for path in kv_files(self.root) if path.parent.name == tenant.id.hex()]

    @rule()
    def flush(self) -> None:
        self.store.flush()
        assert self.store.stats()["pending"] == 0

    @rule(ram=st.sampled_from([8 << 10, 64 << 10, 1 << 20]))
    def reopen(self, ram: int) -> None:
        self.store.close()
        # With little RAM, a chunk may have to go before the writer comes to it.
        self.whole = self.whole and ram == 1 << 20
        self.ram = ram
        self.open()

    @rule(pick=st.integers(0, 10**6), at=st.integers(0, 10**6))
    def damage(self, pick: int, at: int) -> None:
        self.store.flush()
        files = kv_files(self.root)
        if not files:
            return
        path = files[pick % len(files)]
        data = bytearray(path.read_bytes())
        data[at % len(data)] ^= 0x10
        path.write_bytes(data)
        self.whole = False

    @invariant()
    def books(self) -> None:
        stats = self.store.stats()
        assert stats["leases"] == 0
        assert stats["ram_bytes"] <= self.ram
        assert stats["chunks"] <= len(self.stored)
        assert stats["write_errors"] == stats["read_errors"] == 0


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
