"""The frozen multimodal LLM, its chat template, and one adapter for each model family."""
