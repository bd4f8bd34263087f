-- Purpose: keep this transaction's joins to nested loops over the primary key, and end it if its sink falls silent.
-- Why: from a few thousand rows per statement on, the planner prefers a hash join that reads the whole table. A sink
-- that is frozen, or waits for Kafka, holds locks that its partition's next owner needs.
-- $1 text: milliseconds of silence after which Postgres ends it. Set here, because poolers refuse it as an option.
-- Locks: none.
select
    set_config('enable_hashjoin', 'off', true),
    set_config('enable_mergejoin', 'off', true),
    set_config('enable_seqscan', 'off', true),
    set_config('enable_bitmapscan', 'off', true),
    set_config('jit', 'off', true),
    set_config('idle_in_transaction_session_timeout', $1, true)
