"""Names of chunks: keyed hashes, so that a key can be neither guessed nor compared between tenants.

BLAKE2b (RFC 7693) with the tenant's secret as its key. Every field has a fixed length or is preceded by its length.
"""

from __future__ import annotations

import struct
from array import array
from hashlib import blake2b

from amem.engine.store.config import ChunkLayout, StoreError
from amem.engine.types import ChunkSpec, Tenant

FORMAT_VERSION = 1
KEY_BYTES = 32


def chain_digest(tenant: Tenant, spec: ChunkSpec) -> bytes:
    """32 bytes for everything that the chunk is computed behind: each context id and the length of the trusted part.

    Raises StoreError when the spec is inconsistent or an id does not fit 32 bits.
    """
    if not 0 <= spec.trusted <= len(spec.context):
        raise StoreError(f"{spec.trusted} trusted ids cannot be part of a context of {len(spec.context)}")
    digest = blake2b(key=tenant.secret, digest_size=KEY_BYTES, person=b"amem-kv-chain")
    digest.update(struct.pack("<QQ", spec.trusted, len(spec.context)))
    digest.update(_packed(spec.context))
    return digest.digest()


def chunk_key(tenant: Tenant, spec: ChunkSpec, layout: ChunkLayout, chain: bytes) -> bytes:
    """32 bytes: the same only for the same tenant, model, format version, context and ids.

    Raises StoreError when an id does not fit 32 bits.
    """
    digest = blake2b(key=tenant.secret, digest_size=KEY_BYTES, person=b"amem-kv-chunk")
    digest.update(struct.pack("<I", FORMAT_VERSION))
    digest.update(tenant.id)
    digest.update(layout.fingerprint_digest)
    digest.update(chain)
    digest.update(struct.pack("<Q", len(spec.token_ids)))
    digest.update(_packed(spec.token_ids))
    return digest.digest()


def _packed(ids: tuple[int, ...]) -> bytes:
    try:
        return array("i", ids).tobytes()
    except (OverflowError, TypeError) as error:
        raise StoreError(f"token ids must be 32-bit integers: {error}") from error
