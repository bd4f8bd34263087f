-- Purpose: count the rows that replay_rows.sql would change, and the pairs that it would skip.
-- $1 uuid[] agent ids, $2 text[] keys, $3 bigint[] collected_at in microseconds since the Unix epoch; of equal
--    length, each (agent, key) once. $4 boolean: pairs without a row become rows.
-- Locks: none.
-- Plan: as for update_rows.sql, pinned by sql/begin_write.sql.
select
    count(*) filter (
        where case when held.key is null then $4
            else held.collected_at < timestamptz 'epoch' + given.us * interval '1 microsecond' end
    ) as rows,
    null::uuid[] as agent_ids,
    count(*) filter (where held.key is null and not $4) as undeclared
from unnest($1::uuid[], $2::text[], $3::bigint[]) as given (agent_id, key, us)
left join workspace_agent_metadata as held on held.workspace_agent_id = given.agent_id and held.key = given.key
