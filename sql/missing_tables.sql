-- Purpose: name those tables that are not in the search path.
-- $1 text[] table names.
-- Locks: none.
select name from unnest($1::text[]) name where to_regclass(name) is null
