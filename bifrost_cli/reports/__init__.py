"""Reports: artifacts and evaluations as pages that open from disk."""
