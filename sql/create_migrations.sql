-- Purpose: make the table that notes which migrations were applied, if it is not there.
-- Locks: none that others wait for.
create table if not exists agent_metadata_migrations (
    version integer primary key,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default now()
)
