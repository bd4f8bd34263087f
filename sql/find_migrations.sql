-- Purpose: tell whether the table that notes migrations is there.
-- Locks: none.
select to_regclass('agent_metadata_migrations') is not null
