-- Purpose: record that the table, with this file, is whole.
-- $1 oid.
-- Locks: the row.
with gone as (delete from agent_metadata_epoch)
insert into agent_metadata_epoch values ($1)
