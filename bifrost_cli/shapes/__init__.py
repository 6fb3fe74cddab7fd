"""The built-in world: small pictures of coloured shapes, their captions, plans and questions, and a checker that reads them.

NumPy, Pillow, SciPy and the standard library only; nothing here knows models, files or recipes.
"""
