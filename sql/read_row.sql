-- Purpose: read one pair's row.
-- $1 uuid agent id, $2 text key.
-- Locks: none.
select value, error, collected_at
from workspace_agent_metadata
where workspace_agent_id = $1 and key = $2
