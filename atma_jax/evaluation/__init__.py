"""Evaluation of checkpoints at and past their training length: suites, scoring, records and the report."""
