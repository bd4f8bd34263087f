-- Purpose: update the rows that are older, and insert the pairs that have none if $6 allows it; count the rows changed,
--    name their agents, and count the pairs skipped because they have no row.
-- Guard: strict, unlike update_rows.sql: in a tie the row stays. A replay's range may end between two entries of
--    equal times, and must not undo the later one.
-- $1 to $5: as in update_rows.sql; $6 boolean.
-- Locks: the rows it writes, in the order of (agent, key), so that two writers don't deadlock.
-- Plan: as for update_rows.sql, pinned by sql/begin_write.sql.
with given as (
    select agent_id, key, value, error, timestamptz 'epoch' + us * interval '1 microsecond' as collected_at
    from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[])
        as given (agent_id, key, value, error, us)
),
changed as (
    update workspace_agent_metadata as held
    set value = given.value, error = given.error, collected_at = given.collected_at
    from given
    where held.workspace_agent_id = given.agent_id
        and held.key = given.key
        and held.collected_at < given.collected_at
    returning held.workspace_agent_id
),
missing as (
    select given.*
    from given
    where not exists (
        select from workspace_agent_metadata as existing
        where existing.workspace_agent_id = given.agent_id and existing.key = given.key
    )
),
made as (
    insert into workspace_agent_metadata as held (workspace_agent_id, key, value, error, collected_at)
    select agent_id, key, value, error, collected_at
    from missing
    where $6
    on conflict (workspace_agent_id, key) do update
    set value = excluded.value, error = excluded.error, collected_at = excluded.collected_at
    where held.collected_at < excluded.collected_at
    returning held.workspace_agent_id
),
written as (
    select workspace_agent_id from changed
    union all
    select workspace_agent_id from made
)
select
    count(*) as rows,
    array_agg(distinct workspace_agent_id) as agent_ids,
    (select count(*) from missing where not $6) as undeclared
from written
