"""The built-in world: images of coloured shapes, their prompts, plans and questions, and a checker.

NumPy, Pillow, SciPy and the standard library only; nothing here knows models, files or recipes.
"""
