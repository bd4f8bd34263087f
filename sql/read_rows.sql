-- Purpose: read the metadata of agents, as listeners show it.
-- $1 uuid[] agent ids.
-- Locks: none.
select workspace_agent_id, key, value, error, collected_at
from workspace_agent_metadata
where workspace_agent_id = any($1::uuid[])
order by workspace_agent_id, display_order, key
