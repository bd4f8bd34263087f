"""Every client of Postgres; knows no stage and no Settings."""
