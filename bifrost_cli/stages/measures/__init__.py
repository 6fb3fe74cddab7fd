"""What `eval` can measure, one subject a file: distributions of features, text against picture, the checker.

Comes in: picture sets and networks. Goes out: results, each a JSON value that a report can show without knowing the
metric: `metric` (a key), `label`, `value`, `format` (number, share or score), `spread` (its uncertainty in words),
`details`, `n_gen`, `sentence` (what it is, for a table's caption), and `categories` where it has any.
"""
