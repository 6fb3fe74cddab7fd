"""Tensors in, tensors out: the frozen models' wrappers and the two trained parts. No file here ever sees a path."""
