-- Purpose: tell which table a connection writes or reads, so that two connections can be compared: they reach the same
--    one if this finds the same table in both, and the second can't have the lock that the first one holds.
-- $1 bigint, any number that nobody else locks. A URL, or the server's own name, would not tell: one server has many
--    addresses, and a copy of a server has its name.
-- Locks: an advisory one, of this database, until the transaction ends.
select to_regclass('workspace_agent_metadata')::oid as table_oid, pg_try_advisory_xact_lock($1) as is_locked
