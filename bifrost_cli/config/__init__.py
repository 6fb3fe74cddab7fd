"""The recipe: its schema, how a recipe is loaded and overridden, and the strict YAML reader under it."""
