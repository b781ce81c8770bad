"""The KV of chunks: keys, file format, tiers, residency, erasure."""
