"""Families of multimodal LLMs: one small adapter each, for the one wrapper `models.mllm.Mllm` and the one branch."""
