-- Purpose: read the metadata of every agent, for a listener that watches all.
-- Times are clamped to the years 1 to 9999: another program may have written infinity, or a time beyond them, which no
-- client of ours could represent.
-- Locks: none.
select
    workspace_agent_id, key, value, error,
    least(greatest(collected_at, timestamptz '0001-01-01 00:00:00+00'), timestamptz '9999-12-31 23:59:59.999999+00')
        as collected_at
from workspace_agent_metadata
order by workspace_agent_id, display_order, key
