-- Purpose: read what an agent calls itself; no row if it is by its UUID, or if it never had a row.
-- $1 uuid.
-- Locks: none.
select name from agent_metadata_names where agent_id = $1
