"""Evaluation: metrics over a set of images, against a reference, with gates and a report."""
