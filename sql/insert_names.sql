-- Purpose: keep the names of agents that have rows, and return the ids of these; a name that is kept already stays.
-- Guard: agents without rows get no name, so that with UNDECLARED=ignore made-up agents don't fill the table.
-- $1 uuid[] agent ids, $2 text[] names; of equal length, each agent once.
-- Locks: the rows it inserts, in the order of agents, after those of workspace_agent_metadata: two writers of the same
--    names don't deadlock.
-- Plan: nested loop over the primary keys, pinned by sql/begin_write.sql.
with named as materialized (
    select agent_id, name
    from unnest($1::uuid[], $2::text[]) as given (agent_id, name)
    where exists (select from workspace_agent_metadata as held where held.workspace_agent_id = given.agent_id)
),
made as (
    insert into agent_metadata_names (agent_id, name)
    select agent_id, name from named order by agent_id
    on conflict do nothing
)
select agent_id::text from named
