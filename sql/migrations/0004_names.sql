-- Purpose: the names of agents whose id is no UUID: workspace_agent_metadata has the UUID that is made of the name.
-- LOGGED even where that table is not: names are few and small, and a crash of Postgres keeps them.
-- Locks: none that others wait for; the table is new.
create table agent_metadata_names (
    agent_id uuid primary key,
    name text not null
)
