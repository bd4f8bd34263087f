-- Purpose: read the metadata of every agent in parts, for a listener that watches all.
-- $1 uuid, $2 text the first pair of the part; $3 bigint the most rows.
-- Times are clamped to the years 1 to 9999: another program may have written infinity, or a time beyond them, which no
-- client of ours could represent.
-- A name is looked up row by row, which never reads its whole table.
-- Locks: none.
-- Plan: an index scan of the primary key from that pair on, as far as the limit; no part sorts the table.
select
    workspace_agent_id, key, value, error,
    least(greatest(collected_at, timestamptz '0001-01-01 00:00:00+00'), timestamptz '9999-12-31 23:59:59.999999+00')
        as collected_at,
    (select name from agent_metadata_names where agent_id = workspace_agent_id) as name
from workspace_agent_metadata
where (workspace_agent_id, key) >= ($1::uuid, $2::text)
order by workspace_agent_id, key
limit $3::bigint
