-- Purpose: tell listeners which agents changed, when the transaction commits.
-- Why the queue's usage is read: that frees what every listener has read. By itself Postgres does so only when a NOTIFY
--    succeeds, so a queue that a stuck listener had filled would stay full after that listener is gone.
-- $1 text channel, $2 text[] payloads, each under 8,000 bytes.
-- Locks: at commit, the database's one lock for notifying transactions.
with freed as materialized (select pg_notification_queue_usage())
select pg_notify($1, payload) from freed, unnest($2::text[]) as payload
