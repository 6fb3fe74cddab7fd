"""Pure functions in the paper's letters: orders, schedules, flow, Frechet. They know torch and numpy, and no model."""
