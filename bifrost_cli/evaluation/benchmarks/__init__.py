"""GenEval and DPG-Bench: their rules, and the files they read and write."""
