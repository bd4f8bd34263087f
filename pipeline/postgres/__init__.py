"""Every statement's caller; knows no stage and no Settings."""
