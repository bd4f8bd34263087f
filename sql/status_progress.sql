-- Purpose: read how far each partition of a topic is applied, and when that last advanced.
-- $1 text topic id.
-- Locks: none.
select partition, next_offset, updated_at
from agent_metadata_progress
where topic_id = $1
