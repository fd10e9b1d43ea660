"""Turns raw event logs (who, what, when) into prepared datasets: `python -m data_prep --help`.

`python -m data_prep NAME --out DIR` reads a public data set or a table of your own, filters it,
puts each user's events in order and writes the directory that `tim4rec_jax.data.open_dataset`
reads. DuckDB does the work, out of core: a log larger than memory is fine. `--engine spark` has
many machines do it.

Times are written as whole seconds, whatever the source has: one unit on disk, the model's own.
`--order exact` sorts by the source's full precision before that; `--order recbole` rounds the
seconds to 32-bit floats and sorts by these. Ties stay in the order of the source.
"""
