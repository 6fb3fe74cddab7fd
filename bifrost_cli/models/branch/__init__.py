"""The visual generation branch: decoder copy, heads, masking and masked sampling."""
