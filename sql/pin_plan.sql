-- Purpose: keep this transaction's joins to nested loops over the primary key.
-- Why: from some thousand rows a statement on, the planner turns to a hash join that reads the whole table.
-- Locks: none.
select
    set_config('enable_hashjoin', 'off', true),
    set_config('enable_mergejoin', 'off', true),
    set_config('enable_seqscan', 'off', true),
    set_config('enable_bitmapscan', 'off', true),
    set_config('jit', 'off', true)
