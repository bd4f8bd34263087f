-- Purpose: be the only one who refills this table; the session's end frees it.
-- $1 integer, the lock's class.
-- Locks: an advisory one, without waiting.
select pg_try_advisory_lock($1, 'workspace_agent_metadata'::regclass::oid::integer)
