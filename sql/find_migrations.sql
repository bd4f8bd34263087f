-- Purpose: tell whether the table that records migrations exists.
-- Locks: none.
select to_regclass('agent_metadata_migrations') is not null
