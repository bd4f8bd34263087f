-- Purpose: read the metadata of every agent, for a listener that watches all.
-- Locks: none.
select workspace_agent_id, key, value, error, collected_at
from workspace_agent_metadata
order by workspace_agent_id, display_order, key
