"""Measurements, as programs and as data: rows in bench/results/*.csv, from which
`python -m bench.readme` draws README's tables."""
