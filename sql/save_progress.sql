-- Purpose: record how far partitions are applied; it never moves back.
-- $1 text[] topic ids, $2 int[] partitions, $3 bigint[] next offsets; of equal length.
-- Locks: the rows, held already by lock_progress.sql.
update agent_metadata_progress as held
set next_offset = greatest(held.next_offset, given.next_offset), updated_at = now()
from unnest($1::text[], $2::int[], $3::bigint[]) as given (topic_id, partition, next_offset)
where held.topic_id = given.topic_id and held.partition = given.partition
