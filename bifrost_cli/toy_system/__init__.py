"""The built-in tiny system: its models, and how they are trained from nothing."""
