-- Purpose: make rows of the pairs that have none; count those written and name their agents.
-- Guard: as in update_rows.sql, for a row that another writer makes at the same moment.
-- $1 to $5: as in update_rows.sql.
-- Locks: the rows it writes, in the order of (agent, key).
with written as (
    insert into workspace_agent_metadata as held (workspace_agent_id, key, value, error, collected_at)
    select agent_id, key, value, error, timestamptz 'epoch' + us * interval '1 microsecond'
    from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[])
        as given (agent_id, key, value, error, us)
    where not exists (
        select from workspace_agent_metadata as existing
        where existing.workspace_agent_id = given.agent_id and existing.key = given.key
    )
    on conflict (workspace_agent_id, key) do update
    set value = excluded.value, error = excluded.error, collected_at = excluded.collected_at
    where held.collected_at <= excluded.collected_at
        and (held.value, held.error, held.collected_at)
            is distinct from (excluded.value, excluded.error, excluded.collected_at)
    returning held.workspace_agent_id
)
select count(*) as rows, array_agg(distinct workspace_agent_id) as agent_ids
from written
