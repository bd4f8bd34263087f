-- Purpose: read the id of the oldest transaction that may still be writing. What any older one wrote is visible now, or
--    never will be; so whoever reads the table next misses nothing later by looking at this id and newer ones only.
-- Locks: none.
select pg_snapshot_xmin(pg_current_snapshot())::text::bigint
