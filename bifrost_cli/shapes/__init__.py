"""The toy world: images of coloured shapes, their prompts, plans and questions, and an exact checker."""
