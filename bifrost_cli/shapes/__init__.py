"""The built-in world: pictures of coloured shapes, their prompts, plans and questions, and a checker.

NumPy, Pillow, SciPy and the standard library only; nothing here knows models, files or recipes.
"""
