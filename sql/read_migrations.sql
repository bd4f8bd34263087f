-- Purpose: read which migrations were applied, and the checksums of their files then.
-- Locks: none.
select version, checksum, applied_at from agent_metadata_migrations
