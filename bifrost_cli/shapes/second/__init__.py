"""The second toy world: shaded shapes of two sizes anywhere on a gradient, their prompts, plans and questions."""
