"""Other programs' layouts: import and export of published checkpoints."""
