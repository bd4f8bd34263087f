-- Purpose: create the table that records which migrations were applied, if it does not exist.
-- Locks: none that others wait for.
create table if not exists agent_metadata_migrations (
    version integer primary key,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default now()
)
