"""Exact metrics of logits, of all rows of an evaluation or the newest rows of training; and how cohorts of rows differ.

- `binary.py`: log loss, normalised entropy, AUC, grouped AUC, calibration; pure functions over numpy arrays.
- `rows.py`: `RowStore` keeps the rows of each step's output and merges those of all ranks.
- `compute.py`: `MetricsConfig`, and from merged rows to the reported dictionary.
- `compare.py`: runs on the same rows: metrics of cohorts, differences with intervals.
- `axes.py`, `quantiles.py`: rows divided along groups of the schema, also at the quantiles of all rows.
- `divergence.py`, `cohorts.py`: how far predictions of cohorts are apart, and the two that differ most.

Why not `torchrec.metrics`: it is exact for metrics that are sums (normalised entropy, calibration). Its AUC sees a
window of the last rows, counts tied scores in whatever order the sort leaves them, and answers 0.5 where only one
class was seen; neither AUC nor any window is in its `state_dict`; its grouped AUC loops over groups in Python,
averages groups without regard to their size and counts groups of one class as 0.5. Keeping rows costs memory
(`RowStore` says how much) and makes every metric of N ranks that of one rank.
"""
