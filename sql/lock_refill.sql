-- Purpose: let one process at a time refill the table; the end of its session frees the lock.
-- $1 integer, the lock's class.
-- Locks: an advisory one, without waiting.
select pg_try_advisory_lock($1, 'workspace_agent_metadata'::regclass::oid::integer)
