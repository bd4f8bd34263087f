-- Purpose: update existing rows to newer values; count the rows changed and name their agents.
--   It returns no more than that, for speed (decision 7 in DESIGN.md).
-- Guard: a row never goes backwards; in a tie the new value wins; an unchanged row is not written.
-- $1 uuid[] agent ids, $2 text[] keys, $3 text[] values, $4 text[] errors, $5 bigint[] collected_at in microseconds
--    since the Unix epoch; of equal length, each (agent, key) once, sorted by it.
-- Locks: the rows it changes, in the order of (agent, key), so that two writers don't deadlock.
-- Plan: nested loop over the primary key, pinned by sql/begin_write.sql; a hash join would read the whole table.
with changed as (
    update workspace_agent_metadata as held
    set value = new.value, error = new.error, collected_at = new.collected_at
    from (
        select agent_id, key, value, error, timestamptz 'epoch' + us * interval '1 microsecond' as collected_at
        from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[])
            as given (agent_id, key, value, error, us)
    ) as new
    where held.workspace_agent_id = new.agent_id
        and held.key = new.key
        and held.collected_at <= new.collected_at
        and (held.value, held.error, held.collected_at) is distinct from (new.value, new.error, new.collected_at)
    returning held.workspace_agent_id
)
select count(*) as rows, array_agg(distinct workspace_agent_id) as agent_ids
from changed
