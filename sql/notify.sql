-- Purpose: tell listeners which agents changed, when the transaction commits.
-- $1 text channel, $2 text[] payloads, each under 8,000 bytes.
-- Locks: at commit, the database's one lock for notifying transactions.
select pg_notify($1, payload) from unnest($2::text[]) as payload
