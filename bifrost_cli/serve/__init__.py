"""A server: one loaded pipeline behind the HTTP interface that OpenAI's clients speak, and a page."""
