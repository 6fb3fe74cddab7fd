"""Verbs: one stage per file. A stage reads artifacts, computes, and writes one artifact."""
