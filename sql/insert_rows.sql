-- Purpose: insert the pairs that have no row; count the rows written, name their agents, and count the stale pairs,
-- whose row is newer than the given value.
-- Guard: as in update_rows.sql, for a row that another writer inserts at the same moment.
-- $1 to $5: as in update_rows.sql.
-- Locks: the rows it writes, in the order of (agent, key).
with probed as materialized (
    select given.*, existing.collected_at as held_at
    from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[])
        as given (agent_id, key, value, error, us)
    left join workspace_agent_metadata as existing
        on existing.workspace_agent_id = given.agent_id and existing.key = given.key
),
written as (
    insert into workspace_agent_metadata as held (workspace_agent_id, key, value, error, collected_at)
    select agent_id, key, value, error, timestamptz 'epoch' + us * interval '1 microsecond'
    from probed
    where held_at is null
    on conflict (workspace_agent_id, key) do update
    set value = excluded.value, error = excluded.error, collected_at = excluded.collected_at
    where held.collected_at <= excluded.collected_at
        and (held.value, held.error, held.collected_at)
            is distinct from (excluded.value, excluded.error, excluded.collected_at)
    returning held.workspace_agent_id
)
select
    count(*) as rows,
    array_agg(distinct workspace_agent_id) as agent_ids,
    (
        select count(*) from probed
        where held_at is not null and held_at > timestamptz 'epoch' + us * interval '1 microsecond'
    ) as stale
from written
