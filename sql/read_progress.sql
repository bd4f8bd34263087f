-- Purpose: read how far partitions are applied, without waiting for a lock.
-- $1 text topic id, $2 int[] partitions.
-- Locks: none.
select partition, next_offset
from agent_metadata_progress
where topic_id = $1 and partition = any($2::int[])
