-- Purpose: record that a migration was applied.
-- $1 integer version, $2 text name, $3 text checksum of its file.
-- Locks: none that others wait for.
insert into agent_metadata_migrations (version, name, checksum) values ($1, $2, $3)
