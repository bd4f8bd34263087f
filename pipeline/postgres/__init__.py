"""All queries to Postgres; depends on no stage and not on Settings.

store.py                        the transaction: guarded rows, names, progress and NOTIFY
names.py                        names of agents whose id is no UUID
progress.py                     which batches are applied already
epoch.py                        whether the table was emptied
errors.py                       SQLSTATEs as errors of ours: retry, dead-letter the row, or stop
statements.py, migrations.py    the files of sql/: statements, and the tables
connections.py                  connections and pools, through PgBouncer too
"""
